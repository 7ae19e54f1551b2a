"""Answers of the models side by side, as the report shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.checkout.artifacts import read_jsonl
from stages.pages.differences import mark_differences, shared_beginning, shared_ending

MAX_GENERATIONS = 200


def generations(file: Path) -> dict[str, Any]:
    """Prompts with every model's answer, differences to the reference marked; the tuned model's mistakes come first."""
    rows = list(read_jsonl(file))
    prompts = [row["prompt"] for row in rows]
    metric = deciding_score(rows)
    start, end = shared_beginning(prompts), shared_ending(prompts)
    shown = [generation(row, slice(len(start), len(row["prompt"]) - len(end)), metric) for row in rows]
    shown.sort(key=lambda row: (row["tuned_right"], row["quantized_same"]))
    return {
        "shared": start.strip(),
        "decided": metric is not None,
        "rows": shown[:MAX_GENERATIONS],
        "num_rows": len(shown),
        "num_wrong": sum(not row["tuned_right"] for row in shown),
        "num_changed": sum(not row["quantized_same"] for row in shown),
    }


def deciding_score(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The first score that is 0 or 1 everywhere and so tells right from wrong; None where no score does."""
    scores = [answer["scores"] for row in rows for answer in row["answers"].values()]
    names = [name for name in scores[0] if all(score[name] in (0.0, 1.0) for score in scores)]
    return names[0] if names else None


def generation(row: Mapping[str, Any], own: slice, metric: str | None) -> dict[str, Any]:
    """One prompt, of which only its own part is shown, and its answers, right or wrong by a metric."""
    answers = row["answers"]
    cells = [
        {
            "model": name,
            "right": metric is None or answer["scores"][metric] == 1.0,
            "stopped": answer["stopped"],
            "text": mark_differences(answer["text"], row["reference"]),
        }
        for name, answer in answers.items()
    ]
    quantized = answers.get("quantized", answers["tuned"])
    return {
        "id": row["id"],
        "prompt": row["prompt"][own].strip(),
        "reference": row["reference"],
        "answers": cells,
        "tuned_right": metric is None or answers["tuned"]["scores"][metric] == 1.0,
        "quantized_same": quantized["text"] == answers["tuned"]["text"],
    }
