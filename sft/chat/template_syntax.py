"""Whether a chat template does nothing with a message's text but print it, read off its syntax.

Such a template prints a marked text where it prints the plain one, and all else stays the same: rendering the plain one
too would only show what is known. Printing, trimming, and asking whether there is any text are allowed; whatever else a
template does counts as looking into the text.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

from jinja2 import TemplateSyntaxError, nodes
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

_TEXT = "content"
_LIST, _MESSAGE = "list", "message"
_NEIGHBOURS = ("previtem", "nextitem")
# What may be asked of the list of messages, or of a message as a whole, without a look at the texts.
_FILTERS_OF_LIST = ("length", "count")
_TESTS = ("defined", "undefined", "none", "string", "mapping", "sequence", "iterable")
_STATEMENTS = (nodes.Template, nodes.If, nodes.Output, nodes.TemplateData, nodes.Break, nodes.Continue, nodes.ExprStmt)


class _LooksIntoTextsError(Exception):
    """The template may do something else with a text than print it."""


@functools.lru_cache(maxsize=64)
def only_prints_contents(source: str) -> bool:
    """Whether the template prints `content` of messages as it is, or trimmed, and does nothing else with it.

    Args:
        source: Jinja source.

    Returns:
        False also where that can't be told.
    """
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    try:
        _Reader().read(environment.parse(source))
    except (TemplateSyntaxError, _LooksIntoTextsError, RecursionError):
        return False
    return True


class _Reader:
    """Goes through a template and remembers which names are the messages, or one of them."""

    def __init__(self) -> None:
        self._kinds: dict[str, str | None] = {"messages": _LIST}

    def read(self, node: nodes.Node, *, is_free: bool = False) -> None:
        """Read a node.

        Args:
            node: Of the syntax tree.
            is_free: Whether the template does nothing with its value but print it, or ask whether it is empty; nothing
                is put into an empty text.

        Raises:
            _LooksIntoTextsError: A text may be looked at.
        """
        if self._kind(node) is not None:
            raise _LooksIntoTextsError
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
                raise _LooksIntoTextsError  # blocks that keep what is printed: macros, set ... endset, filters
            case _:
                self._read_all(node.iter_child_nodes())

    def _read_all(self, parts: Iterable[nodes.Node | None], *, is_free: bool = False) -> None:
        for part in parts:
            if part is not None:
                self.read(part, is_free=is_free)

    def _kind(self, node: nodes.Node) -> str | None:
        """Whether an expression is the list of messages, a part of it, or a message."""
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
            raise _LooksIntoTextsError
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
        """A name that is one thing here and another there could be either."""
        if self._kinds.setdefault(name, kind) != kind:
            raise _LooksIntoTextsError

    def _read_key(self, node: nodes.Getattr | nodes.Getitem, *, is_free: bool) -> None:
        key = node.attr if isinstance(node, nodes.Getattr) else _constant(node.arg)
        if self._kind(node.node) is None:
            self._read_all(node.iter_child_nodes())
        elif self._kind(node.node) == _LIST or not isinstance(key, str) or hasattr(dict, key):
            raise _LooksIntoTextsError  # `messages.x`, a computed key, or a method that hands out all values
        elif key == _TEXT and not is_free:
            raise _LooksIntoTextsError

    def _read_filter(self, node: nodes.Filter, *, is_free: bool) -> None:
        if node.node is None:
            raise _LooksIntoTextsError
        if node.name in _FILTERS_OF_LIST and self._kind(node.node) == _LIST:
            return
        is_trim = node.name == "trim" and not node.args and not node.kwargs
        self.read(node.node, is_free=is_free and is_trim)
        self._read_all([*node.args, *node.kwargs, node.dyn_args, node.dyn_kwargs])

    def _read_tested(self, node: nodes.Node) -> None:
        """What kind of value something is does not depend on what a text says."""
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
