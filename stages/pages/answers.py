"""Answers of the models side by side, as the report shows them.

Marks what is wrong and what is missing in an answer, for people to see at a glance.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from stages.checkout.artifacts import read_jsonl

MIN_LIKENESS = 0.3


def mark_differences(answer: str, reference: str) -> Markup:
    """The answer as HTML: `<del>` around what the reference does not have, `<ins>` around what it has and the answer
    lacks.

    An answer that has little in common with the reference is shown as it is: marks all over would say nothing.
    """
    left, right = (re.findall(r"\w+|\s+|[^\w\s]", text) for text in (answer, reference))
    matcher = difflib.SequenceMatcher(None, left, right, autojunk=False)
    if answer == reference or matcher.ratio() < MIN_LIKENESS:
        return Markup("{}").format(answer)
    parts = []
    for operation, start, end, other_start, other_end in matcher.get_opcodes():
        extra, missing = "".join(left[start:end]), "".join(right[other_start:other_end])
        if operation == "equal":
            parts.append(Markup("{}").format(extra))
            continue
        if extra:
            parts.append(Markup("<del>{}</del>").format(extra))
        if missing:
            parts.append(Markup("<ins>{}</ins>").format(missing))
    return Markup("").join(parts)


def shared_ending(texts: Sequence[str]) -> str:
    """What all texts end with, from a special token or line break on; nothing when there is only one text."""
    common = _common([text[::-1] for text in texts])[::-1]
    start = re.search(r"<\||\n", common)
    return common[start.start() :] if start else ""


def shared_beginning(texts: Sequence[str]) -> str:
    """What all texts begin with, up to the end of its last whole line; nothing when there is only one text."""
    common = _common(texts)
    return common[: common.rfind("\n") + 1]


def _common(texts: Sequence[str]) -> str:
    if len(texts) < 2:
        return ""
    # What the first and the last in order share, all between them share.
    first, last = min(texts), max(texts)
    length = next((i for i, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
    return first[:length]


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
