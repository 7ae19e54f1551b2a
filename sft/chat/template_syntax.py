"""What the source of a chat template shows: whether it only prints the text of messages, and its other variables.

With a template that only prints texts, marks inside the text change nothing else in the output, so one rendering with
marks is enough to locate all turns (`sft.chat.said`). A template may print a text, trim it, and test whether it is
empty; any other use counts as inspecting it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable

from jinja2 import TemplateSyntaxError, nodes
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sft.untrusted.templates import undeclared_variables

_TEXT = "content"
_LIST, _MESSAGE = "list", "message"
_NEIGHBOURS = ("previtem", "nextitem")
# Filters of the list of messages, and tests of a list or message, that do not depend on the texts.
_FILTERS_OF_LIST = ("length", "count")
_TESTS = ("defined", "undefined", "none", "string", "mapping", "sequence", "iterable")
_STATEMENTS = (nodes.Template, nodes.If, nodes.Output, nodes.TemplateData, nodes.Break, nodes.Continue, nodes.ExprStmt)


class _InspectsTextError(Exception):
    """The template may inspect a text."""


_GENERATION_TAGS = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")
_GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "raise_exception"}
"""Variables that every chat is rendered with; `*_token` are those of the tokenizer."""


@functools.lru_cache(maxsize=64)
def template_variables(source: str) -> tuple[str, ...]:
    """Return the variables of a template that a user may set, such as `enable_thinking`, in order of their names.

    Args:
        source: Jinja source; without any if it is not valid.
    """
    try:
        tree = _environment().parse(_GENERATION_TAGS.sub("", source))
        names = undeclared_variables(_GENERATION_TAGS.sub("", source))
    except (TemplateSyntaxError, RecursionError, ValueError):
        return ()
    tested = {test.node.name for test in tree.find_all(nodes.Test) if isinstance(test.node, nodes.Name)}
    names -= {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"} - tested
    return tuple(sorted(name for name in names - _GIVEN if not name.endswith("_token") and name != "strftime_now"))


def _environment() -> ImmutableSandboxedEnvironment:
    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])


@functools.lru_cache(maxsize=64)
def only_prints_contents(source: str) -> bool:
    """Return whether the template prints the `content` of messages, plain or trimmed, and does nothing else with it.

    Args:
        source: Jinja source.

    Returns:
        False also if the check cannot decide.
    """
    try:
        _Reader().read(_environment().parse(source))
    except (TemplateSyntaxError, _InspectsTextError, RecursionError):
        return False
    return True


class _Reader:
    """Walk through the syntax tree and track which names refer to the list of messages, or to a message."""

    def __init__(self) -> None:
        self._kinds: dict[str, str | None] = {"messages": _LIST}

    def read(self, node: nodes.Node, *, is_free: bool = False) -> None:
        """Check a node and its children.

        Args:
            node: Node of the syntax tree.
            is_free: Whether the template only prints the node's value, or tests whether it is empty. The latter is
                safe because marks are never put into empty texts.

        Raises:
            _InspectsTextError: The template may inspect a text.
        """
        if self._kind(node) is not None:
            raise _InspectsTextError
        match node:
            case nodes.For():
                self._read_loop(node)
            case nodes.Assign():
                self._bind(node.target, node.node)
            case nodes.Getattr() | nodes.Getitem():
                self._read_key(node, is_free=is_free)
            case nodes.Filter():
                self._read_filter(node, is_free=is_free)
            case nodes.Test(name=name) if name in _TESTS and node.node is not None:
                self._read_tested(node.node)
            case nodes.CondExpr():
                self.read(node.test, is_free=True)
                self._read_all([node.expr1, node.expr2], is_free=is_free)
            case nodes.If():
                self.read(node.test, is_free=True)
                self._read_all([*node.body, *node.elif_, *node.else_])
            case nodes.Add() | nodes.Concat() | nodes.And() | nodes.Or() | nodes.Not():
                self._read_all(node.iter_child_nodes(), is_free=is_free)
            case nodes.Output():
                self._read_all(node.nodes, is_free=True)
            case nodes.Stmt() if not isinstance(node, _STATEMENTS):
                raise _InspectsTextError  # blocks that capture output: macros, set ... endset, filters
            case _:
                self._read_all(node.iter_child_nodes())

    def _read_all(self, parts: Iterable[nodes.Node | None], *, is_free: bool = False) -> None:
        for part in parts:
            if part is not None:
                self.read(part, is_free=is_free)

    def _kind(self, node: nodes.Node) -> str | None:
        """Return whether an expression is the list of messages (or a slice of it), a message, or neither (None)."""
        match node:
            case nodes.Name(name=name):
                return self._kinds.get(name)
            case nodes.Getitem(node=base, arg=arg) if self._kind(base) == _LIST:
                self.read(arg)
                return _LIST if isinstance(arg, nodes.Slice) else _MESSAGE
            case nodes.Getattr(node=nodes.Name(name="loop"), attr=attr) if attr in _NEIGHBOURS:
                return _MESSAGE
        return None

    def _read_loop(self, node: nodes.For) -> None:
        if node.recursive:
            raise _InspectsTextError
        if self._kind(node.iter) == _LIST and isinstance(node.target, nodes.Name):
            self._set(node.target.name, _MESSAGE)
        else:
            self.read(node.iter)
            self._set_all(node.target)
        self._read_all([node.test, *node.body, *node.else_])

    def _bind(self, target: nodes.Node, value: nodes.Node) -> None:
        kind = self._kind(value)
        if kind is not None and isinstance(target, nodes.Name):
            self._set(target.name, kind)
            return
        self.read(value)
        self._set_all(target)

    def _set_all(self, target: nodes.Node) -> None:
        names = [target] if isinstance(target, nodes.Name) else target.find_all(nodes.Name)
        for name in names:
            self._set(name.name, None)

    def _set(self, name: str, kind: str | None) -> None:
        """Record the kind of a name; a name with two kinds is ambiguous."""
        if self._kinds.setdefault(name, kind) != kind:
            raise _InspectsTextError

    def _read_key(self, node: nodes.Getattr | nodes.Getitem, *, is_free: bool) -> None:
        key = node.attr if isinstance(node, nodes.Getattr) else _constant(node.arg)
        if self._kind(node.node) is None:
            self._read_all(node.iter_child_nodes())
        elif self._kind(node.node) == _LIST or not isinstance(key, str) or hasattr(dict, key):
            raise _InspectsTextError  # `messages.x`, a computed key, or a method that returns all values
        elif key == _TEXT and not is_free:
            raise _InspectsTextError

    def _read_filter(self, node: nodes.Filter, *, is_free: bool) -> None:
        if node.node is None:
            raise _InspectsTextError
        if node.name in _FILTERS_OF_LIST and self._kind(node.node) == _LIST:
            return
        is_trim = node.name == "trim" and not node.args and not node.kwargs
        self.read(node.node, is_free=is_free and is_trim)
        self._read_all([*node.args, *node.kwargs, node.dyn_args, node.dyn_kwargs])

    def _read_tested(self, node: nodes.Node) -> None:
        """Check the operand of a test of type, whose result does not depend on a text."""
        is_key = isinstance(node, nodes.Getattr | nodes.Getitem) and self._kind(node.node) == _MESSAGE
        if self._kind(node) is None and not (is_key and _key(node) == _TEXT):
            self.read(node)


def _constant(node: nodes.Node) -> object:
    return node.value if isinstance(node, nodes.Const) else None


def _key(node: nodes.Node) -> object:
    return (
        node.attr
        if isinstance(node, nodes.Getattr)
        else _constant(node.arg)
        if isinstance(node, nodes.Getitem)
        else None
    )
