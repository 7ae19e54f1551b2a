"""Templates, which are programs: rendered in a sandbox, in a child process with limits.

Every rendering is done in the child, since a template may misbehave at any row, and no limit inside of a process holds
for single operations of C code: nested lists that share their elements are compared, hashed, sorted and printed for
longer than the universe lasts. Integers are limited besides, so that the message says what is wrong with them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import pickle
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateSyntaxError, meta
from jinja2.exceptions import SecurityError
from jinja2.ext import loopcontrols
from jinja2.filters import do_round
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sft.untrusted.child import Child, ChildError, RaisedError, problem

MAX_BITS = 4096
"""Largest size of an integer in bits: more than any template needs, and fast to compute."""

MAX_BYTES = 2 << 30
"""Memory in bytes that a template may allocate."""

MAX_RANGES = 1_000_000
"""Most generation marks in all conversations of a call."""

MAX_CHARACTERS = 100_000_000
"""Longest text in characters that a template may make."""

FIRST_CHAT_S, CHAT_S = 10.0, 0.1
"""Time limit in seconds for a call, and in addition per conversation; some thousand times what any template needs."""

_child = Child(MAX_BYTES)


class TemplateSourceError(ValueError):
    """A template that is not valid Jinja, and so fails for every conversation."""


class FillError(ValueError):
    """A template that can't be filled in from a row; the message says why."""


class BoundedSandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with a limit on the size of integers."""

    intercepted_binops = frozenset(("*", "**", "//", "%"))

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.filters["round"] = bounded_round

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute a binary operation, unless its result would be too long an integer.

        Raises:
            SecurityError: The result, or an operand, has more than `MAX_BITS` bits.
        """
        if isinstance(left, int):
            bits = left.bit_length()
            if operator == "**" and isinstance(right, int):
                bits *= max(1, right)
            if bits > MAX_BITS:
                raise SecurityError(f"a number of {bits} bits, more than {MAX_BITS}")
        if isinstance(right, int) and right.bit_length() > MAX_BITS:
            raise SecurityError(f"a number of {right.bit_length()} bits, more than {MAX_BITS}")
        return super().call_binop(context, operator, left, right)


def bounded_round(value: Any, precision: Any = 0, method: Any = "common") -> Any:
    """Round as Jinja's filter `round` does, which computes ten to the power of the precision.

    Raises:
        SecurityError: The precision exceeds that of any float.
    """
    if isinstance(precision, int) and abs(precision) > sys.float_info.max_10_exp:
        raise SecurityError(f"round with precision {precision}")
    return do_round(value, precision, method)


def render_in_child(
    source: str, conversations: Sequence[Any], tools: Any, options: Mapping[str, Any], variables: Mapping[str, Any]
) -> tuple[list[str], list[list[tuple[int, int]]]]:
    """Render conversations with a chat template as transformers does.

    Args:
        source: Jinja source.
        conversations: Lists of messages.
        tools: Schemas of tools; None = none.
        options: Further arguments of transformers' `render_jinja_template`.
        variables: Variables of the template.

    Returns:
        The texts and, for each, ranges of characters inside generation marks.

    Raises:
        ValueError: The template refused a conversation, took too long or too much memory, ended the child, or is not
            valid Jinja (`TemplateSourceError`).
    """
    seconds = FIRST_CHAT_S + CHAT_S * len(conversations)
    arguments = [source, list(conversations), tools, dict(variables), dict(options), MAX_CHARACTERS]
    try:
        done = _called(_rendered, arguments, seconds)
    except ChildError as error:
        raise ValueError(
            f"{problem(error, 'rendering with the chat template')} for {len(conversations)} conversations; look for an "
            "endless loop in the template, or for what it repeats"
        ) from None
    match done.get("error"):
        case "syntax":
            raise TemplateSourceError(syntax_message(source, done["message"], done["line"]))
        case "refused":
            raise ValueError(f"the chat template refused the conversation: {done['message']}")
        case "long":
            raise ValueError(
                f"the chat template made {done['characters']} characters of one conversation, more than "
                f"{MAX_CHARACTERS}; look for what it repeats"
            )
    return done["texts"], [[(start, end) for start, end in found] for found in done["ranges"]]


def syntax_message(source: str, found: str, number: int) -> str:
    """Return the message for a syntax error in a template, with the number and the text of the line; 0 = unknown."""
    if not number:
        return f"the chat template is not valid Jinja: {found}"
    lines = source.splitlines()
    text = lines[number - 1].strip() if number <= len(lines) else ""
    return f"the chat template is not valid Jinja: line {number}: {found}, in {text!r:.120}"


def render_each_in_child(
    source: str, chats: Sequence[tuple[Any, Any]], variables: Mapping[str, Any]
) -> list[str | None]:
    """Render several conversations, each with its own tools, in one call.

    A call takes about as long as a rendering, so that this is faster than one call for each.

    Returns:
        The texts; None for a conversation for which `render_in_child` raises an error.
    """
    try:
        done = _called(
            _rendered_each, [source, list(chats), dict(variables), MAX_CHARACTERS], FIRST_CHAT_S + CHAT_S * len(chats)
        )
    except ChildError:
        return [None] * len(chats)
    return [answer["texts"][0] if "texts" in answer else None for answer in done]


def undeclared_variables(source: str) -> set[str]:
    """Return the variables that a template reads and does not set itself; none if it is not valid.

    Jinja computes constant expressions to find them out, such as `'a' * 10 ** 9`, so this is done in the child, too.

    Raises:
        ValueError: It takes too long or too much memory.
    """
    try:
        return set(_child.call(_undeclared, source, seconds=FIRST_CHAT_S))
    except RaisedError:
        return set()
    except ChildError as error:
        raise ValueError(problem(error, "reading the template")) from None


def _undeclared(source: str) -> list[str]:
    """Find the variables in the child; see `undeclared_variables`."""
    environment = BoundedSandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    return sorted(meta.find_undeclared_variables(environment.parse(source)))


@contextlib.contextmanager
def chat_templates_in_child() -> Iterator[None]:
    """Let `apply_chat_template` of all tokenizers and processors render in the child process.

    It renders what `apply_chat_template` renders otherwise, with a `ValueError` where the template fails. The function
    that transformers renders with is replaced for the duration, for other threads, too.
    """
    from transformers import processing_utils, tokenization_utils_base

    global _num_replaced
    modules: tuple[Any, ...] = (processing_utils, tokenization_utils_base)
    with _replacing:
        if _num_replaced == 0:
            for module in modules:
                module.render_jinja_template = _render_like_transformers
        _num_replaced += 1
    try:
        yield
    finally:
        with _replacing:
            _num_replaced -= 1
            if _num_replaced == 0:
                for module in modules:
                    module.render_jinja_template = _original()


_replacing, _num_replaced = threading.Lock(), 0


def _original() -> Any:
    from transformers.utils import chat_template_utils

    return chat_template_utils.render_jinja_template


def _render_like_transformers(
    conversations: list[Any],
    tools: list[Any] | None = None,
    documents: Any = None,
    chat_template: str | None = None,
    return_assistant_tokens_mask: bool = False,
    continue_final_message: bool | str = False,
    add_generation_prompt: bool = False,
    **variables: Any,
) -> tuple[list[str], list[list[tuple[int, int]]]]:
    """Do what `transformers.utils.chat_template_utils.render_jinja_template` does, in the child."""
    from transformers.utils import get_json_schema

    if tools is not None:
        # functions describe themselves here, where their source is
        tools = [get_json_schema(tool) if isinstance(tool, FUNCTIONS) else tool for tool in tools]
    options: dict[str, Any] = {"continue_final_message": continue_final_message} if continue_final_message else {}
    options |= {"add_generation_prompt": add_generation_prompt}
    options |= {"documents": documents} if documents is not None else {}
    options |= {"return_assistant_tokens_mask": True} if return_assistant_tokens_mask else {}
    chats = [getattr(chat, "messages", chat) for chat in conversations]
    texts, ranges = render_in_child(str(chat_template), chats, tools, options, variables)
    return texts, ranges if return_assistant_tokens_mask else []


FUNCTIONS = (types.FunctionType, types.MethodType)

PLAIN_TYPES = (str, int, float, bool, bytes, date, time, datetime, timedelta, Decimal)
"""Types of values that templates get as they are."""


def fill_in_child(texts: Mapping[str, str], row: Mapping[str, Any]) -> dict[str, str]:
    """Fill in templates from the columns of a row, with nulls as empty text.

    Args:
        texts: Jinja templates by role.
        row: Values by column: texts, numbers, times, lists and dicts. Others, such as images, become their type's name.

    Returns:
        The texts by role.

    Raises:
        FillError: A column is missing or of another type, or a template takes too long or too much memory.
    """
    try:
        done = _child.call(_filled, dict(texts), pickle.dumps(_plain(row)), MAX_CHARACTERS, seconds=FIRST_CHAT_S)
    except ChildError as error:
        raise FillError(f"the template can't be filled in: {problem(error, 'filling it in')}") from None
    if "error" in done:
        raise FillError(f"the template of {done['role']} can't be filled in: {done['error']}")
    return done


def _plain(value: Any) -> Any:
    """Return a value without objects whose methods could do harm in a template."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or type(value) in PLAIN_TYPES else f"<{type(value).__name__}>"


@functools.cache
def _sandbox() -> BoundedSandbox:
    return BoundedSandbox(undefined=StrictUndefined, keep_trailing_newline=True)


@functools.lru_cache(maxsize=64)
def _compiled(text: str) -> Template:
    return _sandbox().from_string(text)


def _filled(texts: dict[str, str], pickled: bytes, max_characters: int) -> dict[str, str]:
    """Fill in templates in the child; see `fill_in_child`."""
    # the parent pickled it, which is trusted
    columns = {name: "" if value is None else value for name, value in pickle.loads(pickled).items()}
    result = {}
    for role, text in texts.items():
        try:
            result[role] = _compiled(text).render(columns)
        except MemoryError:
            raise
        except Exception as error:
            return {"role": role, "error": str(error)[:2000] or type(error).__name__}
        if len(result[role]) > max_characters:
            return {"role": role, "error": f"it makes {len(result[role])} characters, more than {max_characters}"}
    return result


def _called(function: Callable[..., Any], arguments: list[Any], seconds: float) -> Any:
    try:
        return _child.call(function, *arguments, seconds=seconds)
    except ChildError:
        raise
    except ValueError:  # marshal does not take the types of some values
        pass
    # transformers converts these values to plain ones before a template sees them
    from transformers.utils.chat_template_utils import _plain_template_data

    return _child.call(function, *_plain_template_data(arguments), seconds=seconds)


def _rendered_each(
    source: str, chats: list[tuple[Any, Any]], variables: dict[str, Any], max_characters: int
) -> list[dict[str, Any]]:
    return [_rendered(source, [chat], tools, variables, {}, max_characters) for chat, tools in chats]


def _rendered(
    source: str,
    conversations: list[Any],
    tools: Any,
    variables: dict[str, Any],
    options: dict[str, bool],
    max_characters: int,
) -> dict[str, Any]:
    """Render in the child; see `render_in_child`."""
    try:
        texts, ranges = sys.modules["transformers.utils.chat_template_utils"].render_jinja_template(
            conversations=conversations, tools=tools, chat_template=source, **options, **variables
        )
    except TemplateSyntaxError as error:
        return {"error": "syntax", "line": error.lineno, "message": str(error.message)[:2000]}
    except SyntaxError as error:  # Jinja parses a break outside of a loop, but Python does not compile it
        return {"error": "syntax", "line": 0, "message": error.msg}
    except MemoryError:
        raise
    except Exception as error:
        return {"error": "refused", "message": str(error)[:2000] or type(error).__name__}
    longest = max((len(text) for text in texts), default=0)
    if longest > max_characters or sum(map(len, ranges)) > MAX_RANGES:
        return {"error": "long", "characters": longest}
    return {"texts": texts, "ranges": ranges}


def prepare_child() -> None:
    """Import transformers' module of chat templates alone, as the package would load torch, and patch its sandbox."""
    sys.modules["torch"] = None  # type: ignore[assignment]
    spec = importlib.util.find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent
    for package, path in (("transformers", folder), ("transformers.utils", folder / "utils")):
        stub = types.ModuleType(package)
        stub.__path__ = [str(path)]
        sys.modules[package] = stub
    module: Any = importlib.import_module("transformers.utils.chat_template_utils")
    module.ImmutableSandboxedEnvironment = BoundedSandbox
