"""The gate: conditions that a result must meet before it is promoted, such as `quantized.loss <= 1.05 * tuned.loss`.

A condition compares two arithmetic expressions of numbers and `model.metric` names; `champion.model.metric` is the
value of the model that was promoted before. Conditions are parsed with Python's `ast` and evaluated node by node, so
that no text is ever executed as code.

`check_ranges` finds conditions that are true for all results or for none, such as a share that must be at least 85. It
computes the range of both sides by interval arithmetic. A name that occurs twice is treated as two independent values,
which can only widen a range: a condition is never rejected by mistake.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sft.evaluate.evidence import MIN_ROWS, Evidence, expression_interval, too_few_rows
from sft.suggest import did_you_mean

Results = Mapping[str, Mapping[str, float]]
"""Model name -> metric name -> value."""

Range = tuple[float, float]
"""Smallest and largest possible value."""

RangeOf = Callable[[str], Range]
"""Function from `model.metric` to its range."""

ANYTHING: Range = (-math.inf, math.inf)

COMPARISONS = {
    ast.GtE: (">=", operator.ge),
    ast.LtE: ("<=", operator.le),
    ast.Gt: (">", operator.gt),
    ast.Lt: ("<", operator.lt),
}

ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}

HINT = "write e.g. `tuned.exact_match >= 0.85` or `quantized.loss <= 1.05 * tuned.loss`"

MAX_LENGTH = 300

# `model.metric`, with `champion.` before it for the promoted model; figures of lm-eval are `model.task.metric`, and
# those of serving engines `engine.NAME.metric` or `engine.NAME.model.metric`.
NAME = re.compile(r"(champion\.)?(engine\.)?\w+\.\w+(\.\w+)?")


@dataclass(frozen=True)
class Condition:
    """Parsed condition; `names` are the `model.metric` values that it needs."""

    text: str
    comparison: str
    left: ast.expr
    right: ast.expr
    names: tuple[str, ...]


SHOWN, NOT_SHOWN, FAILED = "shown", "not shown", "failed"
"""Verdicts on a condition: the measured values meet it and its interval excludes the limit; they meet it, but the
interval includes the limit or the rows are too few; they do not meet it."""

Needs = Literal["interval", "value"]
"""What a condition needs to pass: that it is shown, or that the measured values meet it."""


@dataclass(frozen=True)
class GateRow:
    """Result of one condition.

    Args:
        condition: Its text.
        left: Value of its left side; None if unknown.
        right: Value of its right side; None if unknown.
        passed: Whether it counts as met.
        reason: Why, in a few words.
        verdict: `shown`, `not shown` or `failed`; by default what `passed` says.
    """

    condition: str
    left: float | None
    right: float | None
    passed: bool
    reason: str
    verdict: str = ""

    def __post_init__(self) -> None:
        """Set the verdict of a condition that was checked without intervals."""
        if not self.verdict:
            object.__setattr__(self, "verdict", SHOWN if self.passed else FAILED)


def parse_condition(text: str) -> Condition:
    """Parse one condition.

    Raises:
        ValueError: The condition is invalid; the message shows it, what is wrong with it, and a valid one.
    """
    if len(text) > MAX_LENGTH:
        raise ValueError(f"gate condition with {len(text)} characters, the limit is {MAX_LENGTH}: {text[:40]!r}...")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"gate condition {text!r} is not a comparison; {HINT}") from None
    if not isinstance(tree, ast.Compare) or len(tree.ops) != 1 or type(tree.ops[0]) not in COMPARISONS:
        raise ValueError(f"gate condition {text!r} must compare once, with >=, <=, > or <; {HINT}")
    names = tuple(dict.fromkeys([*_names(tree.left, text), *_names(tree.comparators[0], text)]))
    if not names:
        raise ValueError(f"gate condition {text!r} names no result; {HINT}")
    return Condition(text.strip(), COMPARISONS[type(tree.ops[0])][0], tree.left, tree.comparators[0], names)


def parse_gate(
    conditions: Sequence[str], available: Collection[str] | None = None, open_ended: Sequence[str] = ()
) -> list[Condition]:
    """Parse all conditions and report everything that is wrong with them at once.

    Args:
        conditions: Conditions as text.
        available: `model.metric` names that will exist; None to check the grammar only.
        open_ended: Prefixes of further names that will exist, such as those of tasks whose metrics are not known yet.

    Raises:
        ValueError: Some conditions are invalid; the message lists each, with the nearest known name for an unknown one.
    """
    parsed, problems = [], []
    for text in conditions:
        try:
            condition = parse_condition(text)
        except ValueError as error:
            problems.append(str(error))
            continue
        parsed.append(condition)
        if available is not None:
            unknown = [n for n in condition.names if n not in available and not n.startswith(tuple(open_ended))]
            problems += [f"gate condition {text!r}: {_unknown_name(name, available)}" for name in unknown]
    if problems:
        raise ValueError("\n".join(problems))
    return parsed


def check_gate(
    conditions: Sequence[Condition], results: Results, evidence: Evidence | None = None, needs: Needs = "interval"
) -> list[GateRow]:
    """Check conditions against results; a missing or non-finite value fails its condition, with that as the reason.

    Args:
        conditions: From `parse_gate`.
        results: Model name -> metric name -> value.
        evidence: How certain the figures are; None = all are exact.
        needs: Whether a condition that is met but not shown passes (`value`) or not (`interval`).
    """
    return [_check(condition, results, evidence or {}, needs) for condition in conditions]


def _check(condition: Condition, results: Results, evidence: Evidence, needs: Needs) -> GateRow:
    values = {}
    for name in condition.names:
        value = _find(name, results)
        if value is None:
            return GateRow(condition.text, None, None, False, f"{name} was not measured")
        values[name] = float(value)
    try:
        left, right = _value(condition.left, values), _value(condition.right, values)
    except (ZeroDivisionError, OverflowError) as error:
        return GateRow(condition.text, None, None, False, f"can't be computed: {error}")
    if not (math.isfinite(left) and math.isfinite(right)):
        return GateRow(condition.text, None, None, False, f"{left:g} {condition.comparison} {right:g} is not finite")
    compare = dict(COMPARISONS.values())[condition.comparison]
    reason = f"{left:.4g} {condition.comparison} {right:.4g}"
    if not compare(left, right):
        return GateRow(condition.text, left, right, False, f"{reason} does not hold")
    doubt = _doubt(condition, values, evidence)
    if not doubt:
        return GateRow(condition.text, left, right, True, reason)
    return GateRow(condition.text, left, right, needs == "value", f"{reason}, not shown: {doubt}", NOT_SHOWN)


def _doubt(condition: Condition, values: Mapping[str, float], evidence: Evidence) -> str:
    """Return why a condition that the measured values meet is not shown; an empty text if it is shown."""
    fewest = too_few_rows(condition.names, evidence)
    if fewest is not None:
        return f"measured on {_rows(fewest)}, and fewer than {MIN_ROWS} show nothing"
    if not any(name in evidence for name in condition.names):
        return ""

    def margin(figures: Mapping[str, float]) -> float:
        return _value(condition.left, figures) - _value(condition.right, figures)

    try:
        low, high = expression_interval(margin, values, evidence)
    except (ZeroDivisionError, OverflowError):
        return "its interval can't be computed"
    compare = dict(COMPARISONS.values())[condition.comparison]
    if compare(low, 0) and compare(high, 0):
        return ""
    limit, alone = _limit(condition, values)
    if alone:
        return f"its 95 % interval {low + limit:.4g} to {high + limit:.4g} includes {limit:.4g}"
    return f"the 95 % interval of left minus right, {low:.2g} to {high:.2g}, includes 0"


def _limit(condition: Condition, values: Mapping[str, float]) -> tuple[float, bool]:
    """Return the right side, and whether it is a number and the left side is not."""
    return _value(condition.right, values), not _names(condition.right, condition.text)


def _rows(number: int) -> str:
    return f"{number} row" if number == 1 else f"{number} rows"


def passes_with(conditions: Sequence[Condition], results: Results, model: str, except_for: Collection[str]) -> bool:
    """Return whether the figures of one model alone would meet all conditions.

    Each `other.metric` is replaced by `model.metric`, and `champion.other.metric` stays as it is.

    Args:
        conditions: From `parse_gate`.
        results: Model name -> metric name -> value.
        model: The model, such as `base`.
        except_for: Metrics that are not replaced, such as sizes.
    """
    own = results.get(model, {})
    replaced = {
        other: {name: figures[name] if name in except_for else own.get(name, figures[name]) for name in figures}
        if not other.startswith("champion.")
        else figures
        for other, figures in results.items()
    }
    return all(row.passed for row in check_gate(conditions, replaced))


def _find(name: str, results: Results) -> float | None:
    """Return the value of `model.metric`, where both parts may contain dots; None if there is none."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        value = results.get(".".join(parts[:end]), {}).get(".".join(parts[end:]))
        if value is not None:
            return value
    return None


def _names(node: ast.expr, text: str) -> list[str]:
    """Check the grammar of one side of a comparison and return the names in it."""
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        return [*_names(node.left, text), *_names(node.right, text)]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return _names(node.operand, text)
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return []
    if isinstance(node, ast.Attribute) and NAME.fullmatch(ast.unparse(node)):
        return [ast.unparse(node)]
    raise ValueError(
        f"gate condition {text!r} contains {ast.unparse(node)!r}: only numbers, + - * / and model.metric are allowed; "
        + HINT
    )


def _value(node: ast.expr, values: Mapping[str, float]) -> float:
    if isinstance(node, ast.BinOp):
        return ARITHMETIC[type(node.op)](_value(node.left, values), _value(node.right, values))
    if isinstance(node, ast.UnaryOp):
        return -_value(node.operand, values)
    if isinstance(node, ast.Constant):
        return float(node.value)  # type: ignore[arg-type]
    return values[ast.unparse(node)]


def _unknown_name(name: str, available: Collection[str]) -> str:
    hint = did_you_mean(name, available, otherwise=f"known: {', '.join(sorted(available))}", shown=str)
    return f"nothing is called {name}; {hint}"


def check_ranges(conditions: Sequence[Condition], range_of: RangeOf) -> None:
    """Check that each condition depends on the result: that it can be true and can be false.

    Args:
        conditions: From `parse_gate`.
        range_of: `model.metric` -> its smallest and largest possible value.

    Raises:
        ValueError: Some do not; the message lists each, with the ranges of the names in it.
    """
    problems = [problem for condition in conditions if (problem := _problem(condition, range_of))]
    if problems:
        raise ValueError("\n".join(problems))


def _problem(condition: Condition, range_of: RangeOf) -> str | None:
    if ast.dump(condition.left) == ast.dump(condition.right):
        return f"gate condition {condition.text!r} compares a figure with itself"
    left, right = _range(condition.left, range_of), _range(condition.right, range_of)
    at_least = condition.comparison in (">", ">=")
    low, high = (left, right) if at_least else (right, left)  # true if the value from `low` exceeds the one from `high`
    strict = condition.comparison in (">", "<")
    always = low[0] > high[1] if strict else low[0] >= high[1]
    never = low[1] <= high[0] if strict else low[1] < high[0]
    if not (always or never):
        return None
    what = "is true for all results" if always else "can never be true"
    return f"gate condition {condition.text!r} {what}: {', '.join(_known_ranges(condition, range_of))}"


def _known_ranges(condition: Condition, range_of: RangeOf) -> list[str]:
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
