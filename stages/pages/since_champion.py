"""What changed since the champion: the section that completes the report, and the same in Markdown for Prefect.

`evaluate` knows no champion: its page, reports/evaluation.html, depends on what the stage reads and on nothing that was
recorded before, so that DVC may restore it from its cache. Which version is the champion is a fact of the record, and
only `publish` reads it. So `publish` writes the report, an out of its own: the page of `evaluate` with this section.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stages.checkout.artifacts import write_text
from stages.checkout.foreign_text import as_code, for_markdown
from stages.checkout.paths import Paths
from stages.pages.comparison import Side, Tests, cause_rows, describe, figure_rows, headline, tables
from stages.pages.page import Section, render_section
from stages.pages.report import PLACES
from stages.tracking.recorded import Difference

ANCHOR, HEADING = "since-champion", "What changed since the champion"

NO_CHAMPION = "There was no champion when this result was published."

MAX_CELL = 200
"""Longest value in a table of Markdown, in characters."""


@dataclass(frozen=True)
class Changes:
    """Differences between a result and the champion before it.

    Args:
        version: Version of the champion.
        sides: The champion (A) and the result (B).
        causes: Kind -> what differs between their inputs.
        tests: Paired tests of their figures.
        warning: What makes the comparison doubtful; empty if nothing does.
    """

    version: str
    sides: tuple[Side, Side]
    causes: Mapping[str, Sequence[Difference]]
    tests: Tests
    warning: str

    def headline(self) -> str:
        """Return the comparison in one line."""
        return headline(figure_rows(self.sides, self.tests), any(self.causes.values()))

    def tables(self) -> list[dict[str, Any]]:
        """Return a table of figures per trained model."""
        return [table for table in tables(figure_rows(self.sides, self.tests)) if not table["folded"]]

    def section(self) -> Section:
        """Return the section of the report: inputs that differ, and the figures of the trained models."""
        return _section(
            {
                "version": self.version,
                "champion": describe(self.sides[0].result),
                "headline": self.headline(),
                "warning": self.warning,
                "tables": self.tables(),
                **cause_rows(self.causes),
            }
        )

    def markdown(self) -> str:
        """Return the headline, the causes, and the figures of the trained models as Markdown."""
        champion = describe(self.sides[0].result)
        lines = [f"**{for_markdown(self.headline())}**", ""]
        lines += [f"A: the champion, version {self.version}, {for_markdown(champion['name'])}. B: this result.", ""]
        lines += [f"{for_markdown(self.warning)}.", ""] if self.warning else []
        changed = cause_rows(self.causes)
        for kind in changed["kinds"]:
            lines += [f"| {kind['kind']} | A | B |", "|---|---|---|"]
            lines += [
                f"| {' | '.join(as_code(cell[:MAX_CELL], in_table=True) for cell in row)} |" for row in kind["rows"]
            ]
            lines.append("")
        lines += [f"The same in both: {', '.join(changed['same'])}.", ""] if changed["same"] else []
        columns = ("before", "after", "difference", "p_value", "num_rows")
        for table in self.tables():
            lines += [f"| {table['model']} | A | B | difference | p | rows |", "|---|---:|---:|---:|---:|---:|"]
            lines += [f"| {row['label']} | {' | '.join(row[name] for name in columns)} |" for row in table["rows"]]
            lines.append("")
        return "\n".join(lines)


def section_without_changes(version: str | None) -> Section:
    """Return the section of a result that is compared with nothing.

    Args:
        version: Version of the champion, which is this result; None if there was none.
    """
    sentence = NO_CHAMPION if version is None else f"This result is the champion, version {version}."
    return _section({"sentence": sentence})


def _section(values: Mapping[str, Any]) -> Section:
    return render_section(ANCHOR, HEADING, "report/since_champion.html.jinja", {"sentence": "", **values})


def complete_report(paths: Paths, section: Section) -> None:
    """Write the report: the page of `evaluate` with a section after its promotion.

    Raises:
        ValueError: An earlier version wrote the page, without a place for the section.
    """
    page = paths.evaluation_page.read_text(encoding="utf-8")
    parts = {
        PLACES[0]: f'<a href="#{section.anchor}">{section.heading}</a>',
        PLACES[1]: f'<section id="{section.anchor}">\n  <h2>{section.heading}</h2>\n{section.body}</section>\n',
    }
    for place, text in parts.items():
        if place not in page:  # texts of rows and models are escaped, so that they can't have it
            raise ValueError(f"{paths.evaluation_page} is of an earlier version; `sft evaluate` writes it anew")
        page = page.replace(place, text, 1)
    write_text(paths.report, page)
