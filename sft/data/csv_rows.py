"""Rows of tables that are text: CSV and TSV, each also compressed; damage is named with its line."""

from __future__ import annotations

import csv
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

from sft.data.row import Row, SourceError
from sft.data.text_reader import data_suffix, lines


def csv_rows(path: Path, name: str) -> Iterator[Row]:
    """Rows of a table as text; the header shows what separates columns: commas, tabs or semicolons.

    A row with another number of fields than the header is a damaged one.
    """
    csv.field_size_limit(sys.maxsize)
    numbered = lines(path)
    begin, first = next(((number, line) for number, line in numbered if line.strip()), (1, ""))
    rest = (line for _, line in numbered)
    reader = csv.reader(itertools.chain([first], rest), delimiter=_delimiter(path, first), strict=True)
    header: list[str] | None = None
    number = begin
    try:
        for fields in reader:
            if header is None:
                header = _header(fields, f"{path}:{begin}")
            elif fields:
                yield _row(fields, header, path, name, number)
            number = begin + reader.line_num
    except csv.Error as error:
        found = "a carriage return that ends no line" if "new-line character" in str(error) else str(error)
        place = f"{path}:{begin + reader.line_num - 1}"
        raise SourceError(f"{place}: not {data_suffix(path)[1:].upper()}: {found}") from error


def _row(fields: list[str], header: list[str], path: Path, name: str, number: int) -> Row:
    if len(fields) == len(header):
        return Row(f"{name}:{number}", dict(zip(header, fields, strict=True)))
    found = f"{path}:{number}: {len(fields)} fields where the header has {len(header)}: {header}"
    return Row(f"{name}:{number}", {}, damage=SourceError(found))


def _delimiter(path: Path, header: str) -> str:
    if data_suffix(path) == ".tsv":
        return "\t"
    return "," if "," in header else next((letter for letter in ";\t" if letter in header), ",")


def _header(fields: list[str], place: str) -> list[str]:
    twice = next((name for name in fields if fields.count(name) > 1), None)
    if twice is not None:
        raise SourceError(f"{place}: two columns are named {twice!r}; rename one of them")
    return fields
