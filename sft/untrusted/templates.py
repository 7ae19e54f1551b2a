"""Chat templates, which are programs: rendered in transformers' sandbox, in a child process with limits.

Every rendering is done in the child, since a template may misbehave at any row, and no limit inside of a process holds
for single operations of C code: nested lists that share their elements are compared, hashed, sorted and printed for
longer than the universe lasts. Integers are limited besides, so that the message says what is wrong with them.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from jinja2.exceptions import SecurityError
from jinja2.filters import do_round
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sft.untrusted.child import Child, ChildError

MAX_BITS = 4096
"""Largest size of an integer in bits: more than any template needs, and fast to compute."""

MAX_BYTES = 2 << 30
"""Memory in bytes that a template may allocate."""

MAX_RANGES = 1_000_000
"""Most generation marks in all conversations of a call."""

_child = Child(MAX_BYTES)


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
    source: str,
    conversations: Sequence[Any],
    tools: Any,
    options: dict[str, bool],
    variables: Mapping[str, Any],
    *,
    max_characters: int,
    seconds: float,
) -> dict[str, Any]:
    """Render conversations with a chat template as transformers does.

    Args:
        source: Jinja source.
        conversations: Lists of messages.
        tools: Schemas of tools; None = none.
        options: Further arguments of transformers' `render_jinja_template`.
        variables: Variables of the template.
        max_characters: Longest text that is returned.
        seconds: Time limit.

    Returns:
        `texts` and, for each, `ranges` of characters inside generation marks. Otherwise `error` is `syntax` (with its
        `line`, 0 if it is not known, and `message`), `refused` (`message`) or `long` (`characters` of the longest).

    Raises:
        ChildError: It took too long or too much memory, or ended the child.
    """
    arguments = [source, list(conversations), tools, dict(variables), options, max_characters]
    return _called(_rendered, arguments, seconds)


def render_each_in_child(
    source: str, chats: Sequence[tuple[Any, Any]], variables: Mapping[str, Any], *, max_characters: int, seconds: float
) -> list[dict[str, Any]]:
    """Render several conversations, each with its own tools, in one call, and return what `render_in_child` does.

    A call takes about as long as a rendering, so that this is faster than one call for each.
    """
    return _called(_rendered_each, [source, list(chats), dict(variables), max_characters], seconds)


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
