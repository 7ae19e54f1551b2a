"""Checks of the quality of a record: truncated answers, wrongly decoded text, control characters, tools and tool calls.

The checks of text are heuristics that report candidates for a person to look at, tuned for few false alarms. Tools must
be valid JSON Schema, and tool calls must match it (https://json-schema.org/draft/2020-12).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from sft.data.contents import Content, contents, with_texts
from sft.data.messages import Problem
from sft.untrusted.patterns import PatternError, schema_problem, schema_validator, validation_problem

Finder = Callable[[Mapping[str, Any]], Problem | None]

# Lengths in characters below which the signs of a truncated answer are not looked for: shorter answers are often
# fragments on purpose.
MIN_FRAGMENT, MIN_PROSE, MIN_LAST_LINE = 40, 200, 80

_SENTENCE_END = re.compile(r"[.!?][\"')\]]*\s")

_NAME_OF_SOMETHING = re.compile(r"[/._@=`*]")

# C0 controls except tab and line ends, DEL and C1, a byte order mark inside text, bidirectional overrides and isolates,
# noncharacters; and tag characters, which are invisible text, except in the emoji sequence of a flag.
_CONTROL = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\u202a-\u202e\u2066-\u2069\ufffe\uffff]"
    "|[\U000e0001\U000e0020-\U000e007f](?<![\U0001f3f4\U000e0020-\U000e007f].)[\U000e0020-\U000e007f]*"
)

_MAY_HOLD_PLACE = re.compile(r"[{<\[]")
_CODE_BLOCK = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)

# `{{name}}` of Jinja and Mustache, but not `{{x}}` in a formula, which stands after a letter, a brace, _ or ^
_PLACE = re.compile(
    r"(?<![\w^{}\\])\{\{\s*[A-Za-z]\w+(?:\.\w+)*\s*\}\}(?!\})"
    r"|<(?:your|insert|enter|put|add|type)[ _-][\w '_-]{1,40}>"
    r"|\[(?:your|insert|enter) [\w ,'/-]{1,40}\](?!\()"
    r"|<(?:placeholder|todo|tbd)>",
    re.IGNORECASE,
)

LOST = "\ufffd"

# Longer than any match of ftfy's pattern, which contains at least one character that is not ASCII.
_REACH = 8

_NOT_ASCII = re.compile(rf"[^\x00-\x7f]+(?:[\x00-\x7f]{{1,{2 * _REACH}}}[^\x00-\x7f]+)*")


def truncated_answer(record: Mapping[str, Any]) -> Problem | None:
    """Find an answer that seems truncated: it ends inside a code block, inside JSON, or in the middle of a sentence."""
    for content in contents(record):
        sign = _break(content.text.rstrip()) if content.is_answer else None
        if sign:
            return Problem("truncated_answer", f"{content.place} {sign}: {content.text.rstrip()[-40:]!r}")
    return None


def _break(text: str) -> str | None:
    if text.count("```") % 2:
        return "ends inside a code block"
    if text[:1] in ("{", "[") and _is_begun_json(text):
        return "ends inside JSON"
    if len(text) >= MIN_FRAGMENT and text[-1] in ",:([{":
        return f"ends in {text[-1]!r}"
    line = text[text.rfind("\n") + 1 :]
    is_prose = len(text) >= MIN_PROSE and len(line) >= MIN_LAST_LINE and line[-1].islower()
    # a URL, a path or a formula at the end of a paragraph needs no full stop
    if is_prose and not _NAME_OF_SOMETHING.search(line.rsplit(maxsplit=1)[-1]) and _SENTENCE_END.search(line):
        return "ends in the midst of a sentence"
    return None


def _is_begun_json(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error.pos >= len(text) or error.msg.startswith("Unterminated string")
    except (RecursionError, ValueError):
        return False
    return False


def mojibake(record: Mapping[str, Any]) -> Problem | None:
    """Find text that was decoded with the wrong encoding (ftfy's heuristic), or in which characters were lost."""
    for content in contents(record):
        if content.text.isascii():
            continue
        if LOST in content.text:
            at = content.text.index(LOST)
            return Problem("mojibake", f"{content.place} holds U+FFFD, a lost character: {_around(content.text, at)}")
        match = _badly_decoded(content.text)
        if match:
            around = _around(content.text, match.start())
            return Problem("mojibake", f"{content.place} reads as if it was decoded wrongly: {around}")
    return None


def _badly_decoded(text: str) -> re.Match[str] | None:
    """Search for ftfy's pattern; since it is slow, first only around characters that are not ASCII."""
    from ftfy.badness import BADNESS_RE

    near = (text[max(0, part.start() - _REACH) : part.end() + _REACH] for part in _NOT_ASCII.finditer(text))
    return BADNESS_RE.search(text) if any(map(BADNESS_RE.search, near)) else None


def _around(text: str, at: int) -> str:
    return repr(text[max(0, at - 15) : at + 15])


def without_mojibake(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record with wrongly decoded text repaired, as far as ftfy can."""
    from ftfy import fix_encoding

    return _changed(record, lambda content: content.text if content.text.isascii() else fix_encoding(content.text))


def control_characters(record: Mapping[str, Any]) -> Problem | None:
    """Find invisible characters that a model would learn: controls, bidirectional overrides, tag characters."""
    for content in contents(record):
        match = _CONTROL.search(content.text)
        if match:
            names = f"U+{ord(match[0][0]):04X}"
            where = _around(content.text, match.start())
            return Problem("control_characters", f"{content.place} holds {names}: {where}")
    return None


def without_control_characters(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record without the characters that `control_characters` finds."""
    return _changed(record, lambda content: _CONTROL.sub("", content.text))


def _changed(record: Mapping[str, Any], change: Callable[[Content], str]) -> dict[str, Any]:
    texts = {content.path: change(content) for content in contents(record)}
    return with_texts(record, texts)


def placeholder(record: Mapping[str, Any]) -> Problem | None:
    """Find a place of a template that was not filled in, such as `{{name}}` or `<your text>`; code is skipped."""
    for content in contents(record):
        if content.role == "tools" or not _MAY_HOLD_PLACE.search(content.text):
            continue
        match = _PLACE.search(_CODE_BLOCK.sub("", content.text))
        if match:
            return Problem("placeholder", f"{content.place} holds {match[0]!r:.60}, a place that was not filled in")
    return None


def tool_schema(record: Mapping[str, Any]) -> Problem | None:
    """Find a tool whose parameters are not valid JSON Schema, or two tools with the same name."""
    return _tools(record["tools"])[1] if record.get("tools") else None


def tool_call(record: Mapping[str, Any]) -> Problem | None:
    """Find a call of a tool that the record does not list, or whose arguments do not match its schema.

    Records without tools pass.
    """
    if not record.get("tools"):
        return None
    validators, problem = _tools(record["tools"])
    if problem is not None:
        return None
    for place, name, arguments in _calls(record):
        if name not in validators:
            return Problem("tool_call", f"{place} calls {name!r:.80}, offered are {sorted(validators)}"[:300])
        detail = _misfit(validators[name], arguments)
        if detail:
            return Problem("tool_call", f"{place} calls {name!r:.80}: {detail}"[:300])
    return None


def _calls(record: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    messages = record["messages"] if "messages" in record else [*record["prompt"], *record["completion"]]
    for index, message in enumerate(messages):
        for call in message.get("tool_calls") or ():
            yield f"message {index}", call["function"]["name"], call["function"]["arguments"]


@functools.lru_cache(maxsize=1024)
def _tools(text: str) -> tuple[dict[str, Any], Problem | None]:
    """Return a validator for each tool by its name, and the first problem; cached, since rows share tools."""
    from jsonschema import Draft202012Validator, SchemaError

    validators: dict[str, Any] = {}
    for tool in json.loads(text):
        name, schema = tool["function"]["name"], tool["function"].get("parameters") or {}
        if name in validators:
            return {}, Problem("tool_schema", f"two tools are named {name!r:.80}")
        try:
            Draft202012Validator.check_schema(schema)
        except RecursionError:
            return {}, Problem("tool_schema", f"parameters of {name!r:.80} lie too deep in one another")
        except SchemaError as error:
            place = "".join(f".{part}" for part in error.absolute_path)
            return {}, Problem("tool_schema", f"parameters{place} of {name!r:.80}: {error.message}"[:300])
        validators[name] = schema_validator(schema)
    return validators, None


def _misfit(validator: Any, arguments: str) -> str | None:
    try:
        value = json.loads(arguments)
    except RecursionError:
        return "the arguments are nested too deeply"
    except ValueError as problem:  # also a number of thousands of digits
        return f"the arguments are not JSON ({problem})"
    schema = json.dumps(validator.schema)
    if not ("pattern" in schema or "Ref" in schema or '"$ref"' in schema):
        return validation_problem(validator, value)
    # an expression may backtrack, and references multiply, without end
    try:
        return schema_problem(validator.schema, value)
    except (PatternError, RecursionError) as problem:
        return f"its schema can't be checked: {problem}"


FINDERS: dict[str, Finder] = {
    "truncated_answer": truncated_answer,
    "mojibake": mojibake,
    "control_characters": control_characters,
    "placeholder": placeholder,
}

REPAIRS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "mojibake": without_mojibake,
    "control_characters": without_control_characters,
}
