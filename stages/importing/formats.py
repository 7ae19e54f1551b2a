"""Formats of text in other projects, as Jinja: prompts around the columns of a row, and chat formats by name.

Sources of the prompts: Axolotl's prompt styles (`axolotl/prompters.py`, `axolotl/prompt_strategies/`), which follow
Stanford Alpaca (https://github.com/tatsu-lab/stanford_alpaca) and Vicuna.

formats.json has the markers of chat formats: `llamafactory:NAME` as `register_template` in LLaMA-Factory's
`data/template.py` (0.9.5, Apache-2.0) states them, and `axolotl:NAME` as the text of its templates shows them. System
messages of more than 160 characters are left out (null). The marks of generation (`{% generation %}`) are around what
LLaMA-Factory trains: the answer with all that closes it, such as the newline after `<|im_end|>`.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Style(NamedTuple):
    """How a prompt is written, with places such as `{instruction}`.

    Args:
        system: The system text.
        with_input: The turn of a row with an input.
        without_input: The turn of a row without one.
    """

    system: str
    with_input: str
    without_input: str


STYLES = {
    "instruct": Style(
        "{system}\n\n",
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
        "### Instruction:\n{instruction}\n\n### Response:\n",
    ),
    "chat": Style("SYSTEM: {system}\n", "USER: {instruction}\n{input}\nASSISTANT:", "USER: {instruction}\nASSISTANT:"),
    "chatml": Style(
        "<|im_start|>system\n{system}<|im_end|>\n",
        "<|im_start|>user\n{instruction}\n{input}<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n",
    ),
    "phi": Style(
        "<|system|>\n{system}<|end|>\n",
        "<|user|>\n{instruction}<|end|>{input}<|assistant|>",
        "<|user|>\n{instruction}<|end|>\n<|assistant|>\n",
    ),
}

_TASK = "Below is an instruction that describes a task"
_REQUEST = "Write a response that appropriately completes the request."
ALPACA = (f"{_TASK}, paired with an input that provides further context. {_REQUEST}", f"{_TASK}. {_REQUEST}")
_USER = "Below is an instruction from a USER that describes a task"
_ASSISTANT = "The ASSISTANT writes a response that"
CONCISE = (
    f"{_USER}, paired with an input that provides further context. {_ASSISTANT} concisely and appropriately completes "
    "the request.\n\n",
    f"{_USER}. {_ASSISTANT} appropriately and concisely completes the request.\n\n",
)
_CHOICE = "Choose the answer that best answers the question."
_CONTEXT = ("Use the following contextual information to concisely answer the question.\n",) * 2
NO_SYSTEM = ("", "")


class Prompt(NamedTuple):
    """A type of data set: what its rows are turned into.

    Args:
        style: How the prompt is written; None if the type's suffix names it (`alpaca:chat`).
        systems: System texts of rows with and without an input.
        instruction: Jinja expression of the instruction.
        output: Jinja expression of the answer.
        input: Column of the input, if rows may have one.
        system: Column of a system text, in place of `systems`.
    """

    style: str | Style | None
    systems: tuple[str, ...]
    instruction: str = "instruction"
    output: str = "output"
    input: str | None = None
    system: str | None = None


_JEOPARDY = '"what is " ~ answer'
_PLAIN_CHAT = Style("{system}", STYLES["chat"].with_input, STYLES["chat"].without_input)
_ARTICLE = "Summarize the following article as a TL;DR.\n"

TYPES: dict[str, Prompt] = {
    "alpaca": Prompt(None, ALPACA, input="input"),
    "gpteacher": Prompt(None, ALPACA, output="response", input="input"),
    "jeopardy": Prompt(None, ALPACA, instruction="question", output=_JEOPARDY, input="category"),
    "oasst": Prompt(None, ALPACA, instruction="INSTRUCTION", output="RESPONSE"),
    "explainchoice": Prompt(None, (f"{_CHOICE} Explain your reasoning.\n",) * 2, "question", "solution"),
    "concisechoice": Prompt(_PLAIN_CHAT, (f"{_CHOICE} Be concise in your response.\n\n",) * 2, "question", "solution"),
    "summarizetldr": Prompt(
        Style(
            "",
            f"USER: {_ARTICLE}{{instruction}}\n{{input}}\nASSISTANT:",
            f"USER: {_ARTICLE}{{instruction}}\nASSISTANT:",
        ),
        NO_SYSTEM,
        "article",
        "summary",
    ),
    "alpaca_instruct": Prompt("instruct", ALPACA, input="input"),
    "alpaca_instruct.load_no_prompt": Prompt("instruct", NO_SYSTEM, input="input"),
    "alpaca_chat": Prompt("chat", ALPACA, input="input"),
    "alpaca_chat.load_concise": Prompt("chat", CONCISE, input="input"),
    "alpaca_chat.load_qa": Prompt("chat", CONCISE, "question", "answer"),
    "alpaca_chat.load_camel_ai": Prompt("chat", CONCISE, "message_1", "message_2"),
    "alpaca_chat.load_no_prompt": Prompt("chat", NO_SYSTEM, input="input"),
    "alpaca_w_system": Prompt("chat", NO_SYSTEM, input="input", system="system"),
    "alpaca_w_system.load_chat": Prompt("chat", NO_SYSTEM, input="input", system="system"),
    "alpaca_w_system.load_instruct": Prompt("instruct", NO_SYSTEM, input="input", system="system"),
    "alpaca_w_system.load_open_orca": Prompt(
        Style("### System:\n{system}\n", "", "### Human:\n{instruction}\n### Assistant:\n"),
        NO_SYSTEM,
        "question",
        "response",
        system="system_prompt",
    ),
    "alpaca_w_system.load_open_orca_chatml": Prompt(
        "chatml", NO_SYSTEM, "question", "response", system="system_prompt"
    ),
    "orcamini": Prompt(
        Style("### System:\n{system}\n\n", "", "### User:\n{instruction}\n\n### Response:\n"),
        NO_SYSTEM,
        "question",
        "response",
        system="system_prompt",
    ),
    "context_qa": Prompt("chat", _CONTEXT, 'article ~ "\\n===\\n" ~ question', "answer"),
    "context_qa.load_v2": Prompt(
        Style("", "", "{instruction}"),
        NO_SYSTEM,
        '"Context: " ~ context ~ "\\nQuestion: " ~ question ~ "\\n"',
        '"Answer: " ~ answer',
    ),
    "creative_acr.load_answer": Prompt(
        Style("{system}\n", "", "USER: {instruction}\nASSISTANT:"),
        (
            "Answer the following question in a comprehensive, in-depth, and creative way. Additionally your response "
            "should be relevant, accurate, and free of any ambiguity.",
        )
        * 2,
        "instruction",
        "revision",
    ),
}
"""Type of a data set in Axolotl -> its prompt."""

NO_SEPARATORS = Style("{system}", "{instruction} {input} ", "{instruction} ")


def literal(text: str) -> str:
    """Return a text as a Jinja expression."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _filled(form: str, places: Mapping[str, str]) -> str:
    """Return a text with places such as `{input}` as a Jinja expression."""
    parts = []
    for text, name, _, _ in string.Formatter().parse(form):
        if text:
            parts.append(literal(text))
        if name is not None:
            parts.append(places[name])
    return " ~ ".join(parts) or '""'


def pair(prompt: Prompt, style: str = "instruct") -> dict[str, str]:
    """Return the template of a source with prompt and completion.

    Args:
        prompt: The type of the data set.
        style: Style that the type's suffix names.
    """
    form = prompt.style if isinstance(prompt.style, Style) else STYLES[prompt.style or style]
    given = {"instruction": _in_parentheses(prompt.instruction), "input": prompt.input or '""'}
    turns = [
        _joined(
            _filled(form.system, {"system": literal(system)}) if system and form.system else "", _filled(turn, given)
        )
        for system, turn in zip(prompt.systems, (form.with_input, form.without_input), strict=True)
    ]
    body = f"{{{{ {turns[1]} }}}}"
    if prompt.input:
        name = prompt.input
        body = f"{{% if {name} is defined and {name} %}}{{{{ {turns[0]} }}}}{{% else %}}{body}{{% endif %}}"
    if prompt.system:
        name = prompt.system
        shown = _filled(form.system, {"system": name})
        body = f"{{% if {name} is defined and {name} %}}{{{{ {shown} }}}}{{% endif %}}{body}"
    return {"prompt": body, "completion": f"{{{{ {prompt.output} }}}}"}


def _in_parentheses(expression: str) -> str:
    return f"({expression})" if "~" in expression else expression


def _joined(*parts: str) -> str:
    return " ~ ".join(part for part in parts if part)


def user_defined(options: Mapping[str, Any]) -> dict[str, str]:
    """Return the template of Axolotl's `type:` with formats of one's own.

    A system text is a column if rows have it, else the stated one.
    """
    names = {
        "instruction": options.get("field_instruction") or "instruction",
        "input": options.get("field_input") or "input",
        "output": options.get("field_output") or "output",
        "system": options.get("field_system") or "system",
    }
    with_input = options.get("format") or NO_SEPARATORS.with_input
    without = options.get("no_input_format") or NO_SEPARATORS.without_input
    system_format = options.get("system_format") or NO_SEPARATORS.system
    stated = options.get("system_prompt") or ""
    places = {name: names[name] for name in ("instruction", "input")}
    own = f"{{% if {names['system']} is defined %}}{{% if {names['system']} %}}{{{{ "
    own += _filled(system_format, {"system": names["system"]}) + " }}{% endif %}"
    other = f"{{% else %}}{{{{ {_filled(system_format, {'system': literal(stated)})} }}}}" if stated else ""
    body = (
        f"{own}{other}{{% endif %}}"
        f"{{% if {names['input']} is defined and {names['input']} %}}{{{{ {_filled(with_input, places)} }}}}"
        f"{{% else %}}{{{{ {_filled(without, places)} }}}}{{% endif %}}"
    )
    output = names["output"]
    return {"prompt": body, "completion": f"{{% if {output} is defined %}}{{{{ {output} }}}}{{% endif %}}"}


FORMATS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))

CONTENT = "{content}"
_PLACE = re.compile(r"\{(content|bos|eos)\}")
_NAMES = {"content": "content", "bos": "bos_token", "eos": "eos_token"}


def expression(form: str, content: str = "content") -> str:
    """Return a text with `{content}`, `{bos}` and `{eos}` as a Jinja expression."""
    parts, end = [], 0
    for match in _PLACE.finditer(form):
        if form[end : match.start()]:
            parts.append(literal(form[end : match.start()]))
        parts.append(content if match[1] == "content" else _NAMES[match[1]])
        end = match.end()
    if form[end:]:
        parts.append(literal(form[end:]))
    return " ~ ".join(parts) or '""'


def jinja(form: Mapping[str, Any], *, marks: bool = False, thinks: bool = True) -> str:
    """Return the Jinja template of a format for chats without tools.

    Args:
        form: Its markers.
        marks: Whether generation marks are around answers with all that closes them; without them, an answer ends with
            the token that ends its turn.
        thinks: Whether the empty reasoning of an answer without any is part of the answer, and not of the prompt.
    """
    close = form["answer"].partition(CONTENT)[2]
    opening, _, after = form["user"].partition(CONTENT)
    user_close, header = (close, after.removeprefix(close)) if close and after.startswith(close) else ("", after)
    joins = bool(form.get("joins_system"))
    answer = form["answer"] + ("{eos}" if form.get("ends_once") and not close.endswith("{eos}") else "")
    user = expression(opening + CONTENT + user_close, "(joined.system ~ content)" if joins else "content")
    system = expression(form.get("system", CONTENT))
    thought = ""
    if "thought" in form:
        begin, end = form["thought"]
        inside = " and ".join(f"{literal(word.strip())} not in content" for word in (begin, end) if word)
        thought = f"{{% if {inside} %}}{{{{ {literal(begin + end)} }}}}{{% endif %}}"
    spoken = f"{{{{ {expression(answer)} }}}}"
    before, inner = (thought, spoken) if thought and not thinks else ("", thought + spoken)
    if marks:
        inner = f"{{% generation %}}{inner}{{% endgeneration %}}"
    head = f"{{{{ {expression(header)} }}}}" if header else ""
    return "".join(
        [
            '{% set joined = namespace(system="") %}' if joins else "",
            f"{{{{ {expression(form['prefix'])} }}}}" if form.get("prefix") else "",
            "{% for message in messages %}{% set content = message.content %}",
            '{% if message.role == "system" %}',
            f"{{% set joined.system = {system} %}}" if joins else f"{{{{ {system} }}}}",
            '{% elif message.role == "assistant" %}',
            f"{head}{before}{inner}",
            "{% else %}",
            f"{{{{ {user} }}}}",
            '{% set joined.system = "" %}' if joins else "",
            "{% endif %}{% endfor %}",
            f"{{% if add_generation_prompt %}}{head}{_prompted(form, thinks)}{{% endif %}}",
        ]
    )


def _prompted(form: Mapping[str, Any], thinks: bool) -> str:
    """Return the empty reasoning at the end of a prompt, where it is not part of the answer."""
    if "thought" not in form or thinks:
        return ""
    return f"{{{{ {literal(''.join(form['thought']))} }}}}"
