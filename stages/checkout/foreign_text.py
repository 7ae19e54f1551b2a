"""Texts from elsewhere, such as names of files, runs and models, made harmless for a terminal and for Markdown."""

from __future__ import annotations

import re
import unicodedata

_MARKUP = re.compile(
    r"(^[-=+]|(?:(?<=^\d)|(?<=^\d\d))[.)](?=\s|$)|(?<![^\W_])_|_(?![^\W_])|[\\`*\[\]<>#|~$&@]|(?<=:)//)"
)


def for_terminal(text: str, *, line_breaks: bool = False) -> str:
    """Return a text with its control and formatting characters escaped, but for tabs.

    They could move the cursor, hide or reorder what is shown.

    Args:
        text: The text.
        line_breaks: Whether the text may have several lines.
    """
    kept = "\t\n" if line_breaks else "\t"
    return "".join(
        letter.encode("unicode_escape").decode() if _is_control(letter) and letter not in kept else letter
        for letter in text
    )


def _is_control(letter: str) -> bool:
    return unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")


def for_markdown(text: str) -> str:
    """Return a text as one line of Markdown that renders as the text itself: no HTML, links, images or columns."""
    line = for_terminal(" ".join(text.split()))
    return _MARKUP.sub(lambda found: "".join(f"&#{ord(letter)};" for letter in found[0]), line)


def as_code(text: str, *, in_table: bool = False) -> str:
    """Return a text as one line of code in Markdown.

    Args:
        text: The text.
        in_table: Whether it is in a table, where `|` must be escaped.
    """
    line = for_terminal(" ".join(text.split()))
    line = line.replace("|", "\\|") if in_table else line
    ticks = "`" * (max(map(len, re.findall("`+", line)), default=0) + 1)
    return f"{ticks} {line} {ticks}" if "`" in line else f"{ticks}{line}{ticks}"


def as_code_block(text: str) -> str:
    """Return a text as a block of code in Markdown, which ends only after it."""
    shown = for_terminal(text, line_breaks=True)
    ticks = "`" * max(3, max(map(len, re.findall("`+", shown)), default=0) + 1)
    return f"{ticks}\n{shown}\n{ticks}"
