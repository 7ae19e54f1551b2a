"""The page docs/models.md, made from the results of all families."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from benchmarks.family_checks import LAYOUTS, LIMITS, METHODS, FamilyResult

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"

NOT_BUILDABLE = "not buildable"
OUTCOMES = (*LAYOUTS, "refused", "fails")
TRAINED = tuple(LAYOUTS)

LONGEST_REASON = 200

SHORTER = (
    (r" by [\d.e+-]+ of the largest one(?: from the unpacked ones)? \(limit [\d.e+-]+\)", ""),
    (r"[.:;,]? (?:[Uu]se|or) (?:attn_implementation='auto', or )?packing=False\b.*", ""),
)
"""Parts of messages that depend on the machine or tell what to do -> what they are replaced by."""

INTRODUCTION = """# Models

<!-- Written by `python benchmarks/families.py --write docs/models.md`; edit benchmarks/family_page.py instead. -->

All types of causal language models that transformers {version} has, and its vision-language models with rows of text.
Each was built as a tiny model from its configuration and trained on documents of different lengths, by LoRA
(`all-linear`) and in full. Loss and gradients of all weights equal those of a plain loop over single documents that
uses nothing of this library: to 1e-5 in float32, or to the rounding of the model's own code, and to 1e-9 in float64. A
training that was resumed has the same weights, and the merged or saved model has the logits of the trained one, unless
the last column says "resume or merge".

The column "float64" says what was compared in float64: all of the model, or the model "without float32 parts", if its
own code computes norms, softmax or other parts in float32 whatever the precision of its weights. The roundings of these
parts change loss and gradients of the plain loop, mostly by some 1e-7. The limit is 1e-9 where they are computed in
float64, too, and 1e-6 as they are. The column is empty for a model whose code does not compute in float64 at all.

[benchmarks/README.md](../benchmarks/README.md#families) says how to repeat this, with other sizes and seeds.

| result | meaning |
|---|---|
| packed | rows of several documents (`packing`), joined batches and padded batches |
| joined | joined batches without padding (`padding_free`) and padded batches |
| padded | padded batches |
| refused | an error before training says why |
| **fails** | a crash or a difference |
| not buildable | there is no plain loop to compare with: the model takes more than token ids, or its own code fails |
"""


@dataclass(frozen=True)
class Outcome:
    """How a family is trained by one method: one of `OUTCOMES`, and why not in a faster way."""

    word: str
    reason: str = ""


def outcome(result: FamilyResult, method: str) -> Outcome:
    """Return how a family is trained by a method, at best.

    Args:
        result: Of a family that is buildable.
        method: One of `METHODS`.
    """
    failures = {name: failure for name, failure in result.failures.items() if method in name or name == "all runs"}
    for failure in failures.values():
        if failure.kind != "refused":
            return Outcome("fails", failure.reason)
    run = [layout for layout in LAYOUTS if any(name.startswith(f"{layout} {method}") for name in result.runs)]
    refused = {
        layout: failure.reason for layout in (*run, "resume") for name, failure in failures.items() if layout in name
    }
    if all(layout in refused for layout in run):
        return Outcome("refused", refused[run[0]])
    best = next(layout for layout in run if layout not in refused)
    default = failures.get(f"default {method} float32")
    if default is not None:
        return Outcome("fails", f"with default options: {default.reason}")
    for layout, what in (("resume", "resume or merge"), ("padded", "padded batches are refused"), (run[0], "")):
        if layout in refused:
            return Outcome(best, f"{what}: {refused[layout]}" if what else refused[layout])
    return Outcome(best)


def verdict(result: FamilyResult) -> str:
    """Return the outcome of a family in a word: for the method that is trained in the slower way."""
    if result.unbuildable is not None:
        return NOT_BUILDABLE
    if not result.runs:
        return "buildable"
    return max((outcome(result, method).word for method in METHODS), key=OUTCOMES.index)


def share(results: Sequence[FamilyResult], words: Sequence[str]) -> float:
    """Return the share of buildable families whose verdict is one of `words`."""
    verdicts = [verdict(result) for result in results if result.unbuildable is None]
    return sum(word in words for word in verdicts) / max(1, len(verdicts))


def page(results: Sequence[FamilyResult]) -> str:
    """Return the text of the page."""
    parts = [INTRODUCTION.format(version=transformers.__version__), _totals(results)]
    lines = ["| family | LoRA | full | float64 | why |", "|---|---|---|---|---|"]
    lines += [_line(result) for result in sorted(results, key=lambda result: result.family)]
    return "\n".join([*parts, "\n".join(lines)]) + "\n"


def _totals(results: Sequence[FamilyResult]) -> str:
    counts = Counter(verdict(result) for result in results)
    buildable = len(results) - counts[NOT_BUILDABLE]
    words = ", ".join(f"{counts[word]} {word}" for word in OUTCOMES if counts[word])
    return (
        f"Of {len(results)} families, {buildable} are buildable here. Of these, {share(results, TRAINED):.1%} train "
        f"and {share(results, ('packed',)):.1%} train packed: {words}. A family whose LoRA and full "
        "training differ counts for the slower one.\n"
    )


def _line(result: FamilyResult) -> str:
    if result.unbuildable is not None:
        return f"| {result.family} | {NOT_BUILDABLE} | | | {shorten(result.unbuildable)} |"
    lora, full = (outcome(result, method) for method in METHODS)
    reasons = list(dict.fromkeys(shorten(each.reason) for each in (lora, full) if each.reason))
    words = ["**fails**" if each.word == "fails" else each.word for each in (lora, full)]
    return f"| {result.family} | {words[0]} | {words[1]} | {_precise(result)} | {'; '.join(reasons)} |"


def _precise(result: FamilyResult) -> str:
    """Return what was compared in float64; without figures, which differ among machines."""
    if not any(name.endswith("float64") for name in result.runs):
        return ""
    return "without float32 parts" if result.float32_parts > LIMITS[torch.float64] else "all"


def shorten(reason: str) -> str:
    """Return a reason without its advice, the figures that differ among machines, and what would break the table."""
    for pattern, replacement in SHORTER:
        reason = re.sub(pattern, replacement, reason)
    reason = reason.replace("|", "\\|").replace("<", "&lt;").strip()
    return reason if len(reason) <= LONGEST_REASON else reason[: LONGEST_REASON - 1].rstrip() + "…"
