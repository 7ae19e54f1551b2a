"""Answers of the models side by side, with their differences from the reference marked."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from stages.checkout.artifacts import read_jsonl
from stages.checkout.redaction import redact

MAX_GENERATIONS = 200
"""Number of prompts on the page."""

PER_PAGE = 20
"""Number of prompts per page of a group."""

MIN_LIKENESS = 0.3
"""Smallest share of common words (`SequenceMatcher.ratio`) at which differences are marked."""


def read_answers(file: Path) -> dict[str, Any]:
    """Read the generations of `evaluate` and return what the page shows of them.

    Args:
        file: JSON lines with a prompt, its reference and the answers of the models per line.

    Returns:
        The first `MAX_GENERATIONS` rows in groups, mistakes of the tuned model first; their counts; the beginning that
        all prompts share; and whether a score decides between right and wrong answers.
    """
    rows = [without_secrets_in_row(row) for row in read_jsonl(file)]
    prompts = [row["prompt"] for row in rows]
    metric = deciding_score(rows)
    start, end = shared_beginning(prompts), shared_ending(prompts)
    shown = [prompt_with_answers(row, slice(len(start), len(row["prompt"]) - len(end)), metric) for row in rows]
    shown.sort(key=lambda row: (row["tuned_right"], row["quantized_same"]))
    return {
        "shared": start.strip(),
        "decided": metric is not None,
        "models": list(rows[0]["answers"]) if rows else [],
        "groups": answer_groups(shown, metric is not None),
        "num_shown": min(len(shown), MAX_GENERATIONS),
        "num_rows": len(shown),
        "num_wrong": sum(not row["tuned_right"] for row in shown),
        "num_changed": sum(not row["quantized_same"] for row in shown),
    }


def answer_groups(rows: Sequence[dict[str, Any]], is_decided: bool) -> list[dict[str, Any]]:
    """Divide rows into groups, and each group into pages of `PER_PAGE` rows.

    Args:
        rows: The rows, mistakes first.
        is_decided: Whether a score decides between right and wrong answers.
    """
    names = {
        (False, False): "The tuned model is wrong, and the quantized one answers differently",
        (False, True): "The tuned model is wrong",
        (True, False): "The quantized model answers differently than the tuned one",
        (True, True): "The tuned model is right" if is_decided else "Same answers of tuned and quantized model",
    }
    if not any("quantized" in (cell["model"] for cell in row["answers"]) for row in rows):
        names[True, True] = "The tuned model is right" if is_decided else "Answers"
    kinds = [names[row["tuned_right"], row["quantized_same"]] for row in rows]
    return make_groups(rows, kinds, list(names.values()), names[True, True])


def make_groups(
    rows: Sequence[dict[str, Any]], kinds: Sequence[str], order: Sequence[str], folded: str
) -> list[dict[str, Any]]:
    """Divide rows into groups of one kind, and the first `MAX_GENERATIONS` rows of all groups into pages.

    Args:
        rows: The rows.
        kinds: The kind of each row, which is the name of its group.
        order: The groups in their order.
        folded: The group that is folded at first.
    """
    groups, left = [], MAX_GENERATIONS
    for name in order:
        of_kind = [row for row, kind in zip(rows, kinds, strict=True) if kind == name]
        shown = of_kind[:left]
        left -= len(shown)
        pages = [shown[start : start + PER_PAGE] for start in range(0, len(shown), PER_PAGE)]
        groups.append({"name": name, "number": len(of_kind), "pages": pages, "folded": name == folded})
    return [group for group in groups if group["pages"]]


def without_secrets_in_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with the secrets in its texts replaced, as long as these are whole."""
    answers = {name: {**answer, "text": redact(answer["text"])} for name, answer in row["answers"].items()}
    return {**row, "prompt": redact(row["prompt"]), "reference": redact(row["reference"]), "answers": answers}


def deciding_score(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the first score that is 0 (wrong) or 1 (right) for every answer; None if there is none."""
    scores = [answer["scores"] for row in rows for answer in row["answers"].values()]
    names = [name for name in scores[0] if all(score[name] in (0.0, 1.0) for score in scores)]
    return names[0] if names else None


def prompt_with_answers(row: Mapping[str, Any], own: slice, metric: str | None) -> dict[str, Any]:
    """Return what the page shows of one prompt and its answers.

    Args:
        row: A row of the generations.
        own: The part of the prompt that other prompts do not share.
        metric: The score that decides whether an answer is right; None if no score does.
    """
    answers = row["answers"]
    quantized = answers.get("quantized", answers["tuned"])
    return {
        "id": row["id"],
        "prompt": row["prompt"][own].strip(),
        "reference": row["reference"],
        "answers": answer_cells(answers, row["reference"], metric),
        "tuned_right": metric is None or answers["tuned"]["scores"][metric] == 1.0,
        "quantized_same": quantized["text"] == answers["tuned"]["text"],
    }


def answer_cells(answers: Mapping[str, Any], reference: str, metric: str | None) -> list[dict[str, Any]]:
    """Return what the page shows of answers to one prompt.

    Args:
        answers: Name of a model -> its answer.
        reference: The expected answer.
        metric: The score that decides whether an answer is right; None if no score does.
    """
    return [
        {
            "model": name,
            "right": metric is None or answer["scores"][metric] == 1.0,
            "stopped": answer["stopped"],
            "text": mark_differences(answer["text"], reference),
        }
        for name, answer in answers.items()
    ]


def mark_differences(answer: str, reference: str) -> Markup:
    """Return an answer as HTML, with `<del>` around what only it has and `<ins>` around what only the reference has.

    An answer whose similarity to the reference is below `MIN_LIKENESS` is returned without marks.
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
    """Return the ending that all texts share, from a special token or line break on; empty for a single text."""
    common = _common([text[::-1] for text in texts])[::-1]
    start = re.search(r"<\||\n", common)
    return common[start.start() :] if start else ""


def shared_beginning(texts: Sequence[str]) -> str:
    """Return the lines that all texts begin with; empty for a single text."""
    common = _common(texts)
    return common[: common.rfind("\n") + 1]


def _common(texts: Sequence[str]) -> str:
    if len(texts) < 2:
        return ""
    # The prefix that the first and the last text in sorted order share is shared by all texts in between.
    first, last = min(texts), max(texts)
    length = next((i for i, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
    return first[:length]
