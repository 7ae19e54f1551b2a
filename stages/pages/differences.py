"""Marks what is wrong and what is missing in an answer, for people to see at a glance."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from markupsafe import Markup

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


def soft_breaks(text: str) -> Markup:
    """Text, or marked text, that may break after punctuation: JSON without spaces would break inside words."""
    return Markup(re.sub(r"([,:{}\[\]])(?=\S)", r"\1<wbr>", str(Markup("{}").format(text))))


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
