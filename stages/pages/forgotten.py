"""What training made worse: answers of base and tuned model to general prompts, side by side, worst first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from stages.pages.answers import deciding_score, shared_beginning, shared_ending, without_secrets_in_row
from stages.params.figures import figure_of

BEFORE, AFTER = "base", "tuned"

MAX_ROWS = 50
"""Number of prompts on the page."""


def forgotten(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the answers to general prompts with the change of their score, largest losses first.

    Args:
        rows: Rows of outs/evaluate/general.jsonl.

    Returns:
        The rows, the label of the score, and how many prompts are answered worse, as well, and better; None if no
        prompt was answered by both models.
    """
    answered = [without_secrets_in_row(row) for row in rows if {BEFORE, AFTER} <= row["answers"].keys()]
    if not answered:
        return None
    prompts = [row["prompt"] for row in answered]
    begin, end = len(shared_beginning(prompts)), len(shared_ending(prompts))
    score = score_of(answered[0]["answers"][BEFORE]["scores"], deciding_score(answered))
    shown = [
        {
            "prompt": row["prompt"][begin : len(row["prompt"]) - end].strip(),
            "reference": row["reference"],
            "before": row["answers"][BEFORE]["text"].strip(),
            "after": row["answers"][AFTER]["text"].strip(),
            "scores": [row["answers"][name]["scores"].get(score) for name in (BEFORE, AFTER)],
        }
        for row in answered
    ]
    changes = [after - before for before, after in (row["scores"] for row in shown)]
    order = sorted(range(len(shown)), key=changes.__getitem__)
    return {
        "rows": [shown[number] for number in order[:MAX_ROWS]],
        "num_rows": len(shown),
        "label": figure_of(score).label,
        "num_worse": sum(change < 0 for change in changes),
        "num_same": sum(change == 0 for change in changes),
        "num_better": sum(change > 0 for change in changes),
    }


def score_of(scores: Mapping[str, float], deciding: str | None) -> str:
    """Return the score that says most about how good an answer is: one with values between right and wrong."""
    return next((name for name in ("word_f1", "rougeL", "field_f1") if name in scores), deciding or next(iter(scores)))
