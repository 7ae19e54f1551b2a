"""Conditions of a gate that no result could fail, or none could meet: such as a share that must be at least 85.

Every side of a condition gets the range that it can be in, by interval arithmetic; a name that stands in it twice
counts as two, so that a condition is only refused when it is certain.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Sequence

from sft.evaluate.gate import Condition

Range = tuple[float, float]
RangeOf = Callable[[str], Range]

ANYTHING: Range = (-math.inf, math.inf)


def check_ranges(conditions: Sequence[Condition], range_of: RangeOf) -> None:
    """Refuse conditions that say nothing.

    Args:
        conditions: From `sft.gate.parse_gate`.
        range_of: `model.metric` -> the least and the largest value that it can have.

    Raises:
        ValueError: Lists every such condition, with the range of what it names.
    """
    problems = [problem for condition in conditions if (problem := _problem(condition, range_of))]
    if problems:
        raise ValueError("\n".join(problems))


def _problem(condition: Condition, range_of: RangeOf) -> str | None:
    if ast.dump(condition.left) == ast.dump(condition.right):
        return f"gate condition {condition.text!r} compares a figure with itself"
    left, right = _range(condition.left, range_of), _range(condition.right, range_of)
    at_least = condition.comparison in (">", ">=")
    low, high = (left, right) if at_least else (right, left)  # holds when something in `low` exceeds one in `high`
    strict = condition.comparison in (">", "<")
    always = low[0] > high[1] if strict else low[0] >= high[1]
    never = low[1] <= high[0] if strict else low[1] < high[0]
    if not (always or never):
        return None
    what = "holds whatever the result" if always else "can never hold"
    return f"gate condition {condition.text!r} {what}: {', '.join(_known(condition, range_of))}"


def _known(condition: Condition, range_of: RangeOf) -> list[str]:
    texts = []
    for name in condition.names:
        low, high = range_of(name)
        if math.isfinite(low) and math.isfinite(high):
            texts.append(f"{name} is between {low:g} and {high:g}")
        elif math.isfinite(low):
            texts.append(f"{name} is at least {low:g}")
    return texts


def _range(node: ast.expr, range_of: RangeOf) -> Range:
    if isinstance(node, ast.BinOp):
        return _combined(node.op, _range(node.left, range_of), _range(node.right, range_of))
    if isinstance(node, ast.UnaryOp):
        low, high = _range(node.operand, range_of)
        return -high, -low
    if isinstance(node, ast.Constant):
        return float(node.value), float(node.value)  # type: ignore[arg-type]
    return range_of(ast.unparse(node))


def _combined(operation: ast.operator, left: Range, right: Range) -> Range:
    if isinstance(operation, ast.Add):
        return left[0] + right[0], left[1] + right[1]
    if isinstance(operation, ast.Sub):
        return left[0] - right[1], left[1] - right[0]
    if isinstance(operation, ast.Div):
        if right[0] <= 0 <= right[1]:
            return ANYTHING
        right = 1 / right[1], 1 / right[0]
    products = [a * b for a in left for b in right]
    return ANYTHING if any(map(math.isnan, products)) else (min(products), max(products))
