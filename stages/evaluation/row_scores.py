"""Scores of every held-out row, as `evaluate` writes them, and the evidence and paired tests that follow from them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft.evaluate.evidence import Measured, mean_parts
from sft.evaluate.intervals import Paired, compare_paired
from stages.checkout.artifacts import read_jsonl
from stages.params.figures import PREFIXES, REGRESSION, STOP_RATE, TEST

ANSWERS, GENERAL_ANSWERS, DOCUMENTS = "generations.jsonl", "general.jsonl", "documents.jsonl"
"""Files in outs/evaluate: answers to held-out prompts, to general prompts, and sums over the tokens of documents."""

TEST_ANSWERS = "test.jsonl"
"""File in outs/evaluate with the answers to test rows, which no page shows."""

ByRow = dict[str, float]
"""Key of a row -> value. A key identifies the content of a row, so that the rows of two results can be matched."""


@dataclass(frozen=True)
class RowScores:
    """Scores of the rows of one result.

    Args:
        means: `model.metric` -> scores of the answers, whose mean is the figure.
        sums: `model.metric` -> sums over the tokens of each document, which the figure divides by all tokens.
        weights: Number of tokens of each document.
        answers: Key of a held-out prompt -> its row in generations.jsonl.
    """

    means: dict[str, ByRow] = field(default_factory=dict)
    sums: dict[str, ByRow] = field(default_factory=dict)
    weights: ByRow = field(default_factory=dict)
    answers: dict[str, Mapping[str, Any]] = field(default_factory=dict)


def read_row_scores(folder: Path) -> RowScores:
    """Read the scores from a folder like outs/evaluate; files that an older result lacks give no scores."""
    found = RowScores()
    for name, prefix in ((ANSWERS, ""), (GENERAL_ANSWERS, REGRESSION), (TEST_ANSWERS, TEST)):
        rows = list(read_jsonl(folder / name)) if (folder / name).exists() else []
        for key, row in zip(row_keys((row["prompt"], row["reference"]) for row in rows), rows, strict=True):
            if not prefix:
                found.answers[key] = row
            for model, answer in row["answers"].items():
                for metric, score in {**answer["scores"], STOP_RATE: float(answer["stopped"])}.items():
                    found.means.setdefault(f"{model}.{prefix}{metric}", {})[key] = score
    rows = list(read_jsonl(folder / DOCUMENTS)) if (folder / DOCUMENTS).exists() else []
    for row in rows:
        found.weights[row["document"]] = row["num_tokens"]
        for model, sums in row["models"].items():
            for metric, value in sums.items():
                prefix = TEST if row.get("test") else REGRESSION if row["general"] else ""
                name = f"{model}.{prefix}{metric}"
                found.sums.setdefault(name, {})[row["document"]] = value
    return found


def row_keys(contents: Iterable[object]) -> list[str]:
    """Return a key for each row: a digest of its content, with a number where rows are equal."""
    seen: Counter[str] = Counter()
    keys = []
    for content in contents:
        digest = hashlib.sha256(repr(content).encode()).hexdigest()[:16]
        keys.append(f"{digest}.{seen[digest]}")
        seen[digest] += 1
    return keys


def evidence_of(
    intervals: Mapping[str, Mapping[str, Any]], rows: RowScores, num_prompts: int, prefix: str = ""
) -> dict[str, Measured]:
    """Return how certain the figures of a result are.

    Args:
        intervals: Model -> metric -> 95 % interval, as in results.json.
        rows: Scores of the rows.
        num_prompts: Number of held-out prompts.
        prefix: Put before each name, such as `champion.`.

    Returns:
        `model.metric` -> how certain it is.
    """
    found = {}
    for model, of_model in intervals.items():
        for metric, (low, high) in of_model.items():
            name = f"{model}.{metric}"
            parts, num_rows = None, None
            summed = f"{model}.{metric.removesuffix('perplexity')}loss" if metric.endswith("perplexity") else name
            if name in rows.means:
                parts = mean_parts(rows.means[name])
            elif summed in rows.sums:
                sums = rows.sums[summed]
                parts = mean_parts(sums, {key: rows.weights[key] for key in sums})
            elif "." not in metric and not metric.startswith(PREFIXES):
                num_rows = num_prompts  # a figure of all answers together, such as BLEU
            if parts is not None:
                num_rows = len(parts)
            found[f"{prefix}{name}"] = Measured((low, high), num_rows, parts)
    return found


def compare_rows(first: RowScores, second: RowScores) -> dict[str, tuple[Paired, int]]:
    """Run paired tests of two results on the rows that both have.

    Returns:
        `model.metric` -> the test, and the number of rows in common. Figures without common rows are left out.
    """
    tests = {}
    for kind, weights in (("means", None), ("sums", first.weights)):
        before, after = getattr(first, kind), getattr(second, kind)
        for name in before:
            common = [key for key in before[name] if key in after.get(name, {})]
            if weights is not None:  # another tokenizer gives a document another number of tokens
                common = [key for key in common if second.weights[key] == weights[key]]
            if common:
                one, other = ([rows[name][key] for key in common] for rows in (before, after))
                lengths = [weights[key] for key in common] if weights is not None else None
                tests[name] = (compare_paired(one, other, lengths), len(common))
    return tests


def rows_warning(rows: Sequence[RowScores]) -> str:
    """Return a sentence on how many held-out rows two results have in common, as far as their rows are known."""
    if len(rows) == 2 and all(side.answers for side in rows):
        first, second = (set(side.answers) for side in rows)
        return (
            f"A was measured on {len(first)} held-out rows and B on {len(second)}, {len(first & second)} of them the "
            "same: figures differ by the rows too; the p-values are of the rows that both have"
        )
    return "A and B were measured on different held-out rows, so their figures can't be compared"
