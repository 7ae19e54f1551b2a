"""Sources of a stream: what `load` writes of them, how `train` opens them again, and reading them in turn."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

from sft.data.records import Layout, detect_layout
from sft.data.source_row import Row
from stages.checkout.paths import Paths
from stages.loading.mapping import RowMapping
from stages.loading.sources import DataFile, Source, source_files
from stages.params.schema import LoadSection, SourceSection


def pinned(section: SourceSection) -> SourceSection:
    """Return a source of a stream; one on the hub with the commit that its revision is now.

    Raises:
        ValueError: The hub can't be reached.
    """
    if not section.hub:
        return section
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(section.path, revision=section.revision).sha
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"params.yaml, load.sources: the hub does not tell the commit of the data set {section.path!r} ({reason}); "
            "check its name and revision, and the connection"
        ) from error
    return section.model_copy(update={"streaming": True, "revision": commit})


def describe_stream(section: LoadSection, sources: list[Source], held_out: Mapping[str, str]) -> dict[str, Any]:
    """Return what identifies a stream, as plain values.

    Args:
        section: The section `load` of params.yaml.
        sources: Its sources.
        held_out: Digests of the held-out rows, each with the row's id.
    """
    described = [
        {
            "section": source.section.model_dump(),
            "files": {file.name: file.path.stat().st_size for file in source.files},
            "sha256": {} if source.section.hub else source.digests,
            "columns": list(source.mapping.columns()),
            "seen": list(source.seen),
            "num_rows": source.num_rows,
        }
        for source in sources
    ]
    return {"load": section.model_dump(), "sources": described, "held_out": dict(held_out)}


def open_stream(described: Mapping[str, Any], number: int, paths: Paths, *, with_damaged: bool) -> Source:
    """Open a source of a stream as `load` described it.

    Args:
        described: Its entry in `describe_stream`.
        number: Its number in params.yaml.
        paths: Paths of the checkout.
        with_damaged: As in `open_source`.

    Raises:
        ValueError: Its files are not those that `load` found.
    """
    section = SourceSection.model_validate(described["section"])
    key = f"load.sources[{number}].path"
    files: tuple[DataFile, ...] = () if section.hub else source_files(section, paths, key)
    found = {file.name: file.path.stat().st_size for file in files}
    if found != described["files"]:
        changed = sorted(found.items() ^ described["files"].items())[0][0]
        raise ValueError(
            f"params.yaml, {key}: {changed} has changed since `load` ran; type `sft repro` to run it again"
        )
    mapping = RowMapping(section)
    layout = detect_layout(described["columns"])
    seen = tuple(described["seen"])
    return Source(section, files, mapping, layout, (), seen, described["num_rows"], {}, with_damaged)


class ColumnWatch:
    """Check that no row of a source has a column that would change how its rows are read.

    Args:
        source: The source, of which `load` may have looked at the beginning only.
        columns: Its columns after the mapping, as `load` found them.
    """

    def __init__(self, source: Source, columns: list[str]) -> None:
        self._section = source.section
        self._layout = source.layout
        self._columns = columns
        self._seen = set(source.seen)

    def check(self, row: Row) -> None:
        """Check a row.

        Raises:
            ValueError: A new column would change the layout.
        """
        new = row.columns.keys() - self._seen
        if not new or self._section.template is not None:
            return
        self._seen |= new
        self._columns = [*self._columns, *(self._section.columns.get(name, name) for name in sorted(new))]
        layout = self._layout_of(self._columns)
        if layout != self._layout:
            raise ValueError(
                f"{row.id}: it has the column {min(new)!r}, which no earlier row has, and rows with it are read in "
                "another way; give such rows as a source of their own, or rename the column"
            )

    def _layout_of(self, columns: list[str]) -> Layout | None:
        try:
            return detect_layout(columns)
        except ValueError:
            return None


class Interleaved:
    """The rows of all sources, each source at the rate of its number of rows, so that all end at the same time.

    If the number of a source's rows is not known, the sources take turns.

    Args:
        sources: The sources.
        num_read: Number of rows of each source that were read before; None = none.

    Attributes:
        num_read: Number of rows of each source that have been read.
    """

    def __init__(self, sources: Sequence[Source], num_read: Sequence[int] | None = None) -> None:
        self._sources = sources
        sizes = [source.num_rows for source in sources]
        self._sizes = [1] * len(sizes) if None in sizes else [size or 1 for size in sizes]
        self.num_read = [0] * len(sources) if num_read is None else list(num_read)

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        """Yield the number of a source and a row of it, until all sources have ended."""
        rows = [
            itertools.islice(source.rows(), start, None)
            for source, start in zip(self._sources, self.num_read, strict=True)
        ]
        going = dict.fromkeys(range(len(rows)))
        while going:
            number = min(going, key=lambda number: Fraction(self.num_read[number] + 1, self._sizes[number]))
            row = next(rows[number], None)
            if row is None:
                del going[number]
                continue
            self.num_read[number] += 1
            yield number, row
