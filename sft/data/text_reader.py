"""Reading of text files, also compressed: in lines, in pieces, and as rows of CSV and TSV tables.

Files that are not UTF-8, overlong lines and decompression bombs raise an error that names the line.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import itertools
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

import pyarrow as pa

from sft.data.source_row import Row, SourceError

COMPRESSIONS = (".gz", ".zst")

BOM = b"\xef\xbb\xbf"

GZIP = b"\x1f\x8b"

MAX_LINE = 256 << 20
"""Longest line in bytes: far longer than any row that can be trained."""

MAX_EXPANSION, MAX_UNPACKED = 200, 1 << 30
"""Largest decompressed size: 200 times the compressed file, or 1 GiB if that is more; a ratio of 10 is typical."""

PIECE = 1 << 20
"""Bytes to read at once if lines do not matter."""

DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, pa.ArrowException, OSError)

_SHORTER = "this format has one row per line; if the file is one JSON array, name it .json"

_BOMB = "text does not compress that much; if this is intended, unpack the file first"


def data_suffix(path: Path) -> str:
    """Return the lower-case suffix of a file's name that states its format, without that of a compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield lines with their numbers, with their line ends and without a byte order mark.

    Raises:
        SourceError: A line is too long, or the file is damaged or a decompression bomb.
    """
    number = size = 0
    with _opened(path) as (file, largest):
        try:
            while line := file.readline(MAX_LINE + 1):
                number, size = number + 1, size + len(line)
                _check_size(size, largest, path, number)
                if len(line) > MAX_LINE:
                    raise SourceError(f"{path}:{number}: a line of more than {MAX_LINE >> 20} MiB; {_SHORTER}")
                yield number, line.removeprefix(BOM) if number == 1 else line
        except DAMAGE as error:
            raise _damage(error, path, number + 1) from error


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield lines as text with their numbers, as `raw_lines` does.

    Raises:
        SourceError: As in `raw_lines`, or a line is not UTF-8.
    """
    for number, line in raw_lines(path):
        yield number, decoded(line, path, number)


def decoded(line: bytes, path: Path, number: int) -> str:
    """Decode a line.

    Raises:
        SourceError: The line is not UTF-8; the error states the place.
    """
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        found = line[error.start : error.start + 4].hex(" ")
        is_gzip = number == 1 and line.startswith(GZIP)
        way_out = "it begins as gzip does: give its name the ending .gz" if is_gzip else "convert the file"
        raise SourceError(f"{path}:{number}:{error.start + 1}: not UTF-8 (bytes {found}); {way_out}") from error


def pieces(path: Path) -> Iterator[str]:
    """Yield the text in pieces of about one MiB, without a byte order mark.

    Raises:
        SourceError: The text is not UTF-8, or the file is damaged or a decompression bomb.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    size = num_ends = column = 0
    with _opened(path) as (file, largest):
        try:
            while True:
                piece = file.read(PIECE)
                start = column - len(decoder.getstate()[0])
                data = piece.removeprefix(BOM) if size == 0 else piece
                size += len(piece)
                _check_size(size, largest, path, num_ends + 1)
                yield decoder.decode(data, final=not piece)
                if not piece:
                    return
                num_ends += data.count(b"\n")
                column = len(data) - data.rfind(b"\n") - 1 if b"\n" in data else column + len(data)
        except UnicodeDecodeError as error:
            raise _not_utf8(error, path, num_ends, start) from error
        except DAMAGE as error:
            raise _damage(error, path, num_ends + 1) from error


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], int]]:
    """Open a file for reading, decompressed; also give the largest size in bytes that it may have."""
    largest = max(MAX_UNPACKED, MAX_EXPANSION * path.stat().st_size)
    match path.suffix.lower():
        case ".gz":
            file = cast(IO[bytes], gzip.GzipFile(path, "rb"))
        case ".zst":
            file = io.BufferedReader(pa.input_stream(str(path), compression="zstd"))
        case _:
            file = path.open("rb")
    with file:
        yield file, largest


def _check_size(size: int, largest: int, path: Path, number: int) -> None:
    if size > largest:
        raise SourceError(
            f"{path}:{number}: unpacked, it is more than {MAX_EXPANSION} times as large as the compressed file; {_BOMB}"
        )


def _damage(error: Exception, path: Path, number: int) -> Exception:
    # Arrow reports a damaged .zst as an OSError without errno; a real OSError has one
    if isinstance(error, OSError) and error.errno is not None:
        return error
    return SourceError(f"{path}:{number}: the compressed data is damaged or ends too early: {error}")


def _not_utf8(error: UnicodeDecodeError, path: Path, num_ends: int, column: int) -> SourceError:
    """Return the error for a piece of a file that is not UTF-8.

    Args:
        error: The error of decoding the piece.
        path: The file.
        num_ends: Line ends before the piece.
        column: Bytes between the last of them and the piece.
    """
    before = error.object[: error.start]
    number = num_ends + before.count(b"\n") + 1
    place = error.start - before.rfind(b"\n") if b"\n" in before else column + error.start + 1
    found = error.object[error.start : error.start + 4].hex(" ")
    return SourceError(f"{path}:{number}:{place}: not UTF-8 (bytes {found}); convert the file")


def csv_rows(path: Path, name: str) -> Iterator[Row]:
    """Yield the rows of a CSV or TSV table; the separator (comma, tab or semicolon) is detected from the header.

    A row with a different number of fields than the header, or with text after a closing quote, is yielded with
    `damage` set.

    Raises:
        SourceError: The table can't be read to its end, or it is not known how many rows a damaged part has: quotes
            span several lines, or a line has carriage returns.
    """
    csv.field_size_limit(sys.maxsize)
    numbered = lines(path)
    begin, first = next(((number, line) for number, line in numbered if line.strip()), (1, ""))
    num_characters = 0

    def rest() -> Iterator[str]:
        nonlocal num_characters
        for place, line in numbered:
            num_characters += len(line)
            if num_characters > MAX_LINE:
                raise SourceError(f"{path}:{place}: a row of more than {MAX_LINE >> 20} MiB; a quote may be missing")
            yield line

    reader = csv.reader(itertools.chain([first], rest()), delimiter=_delimiter(path, first), strict=True)
    header: list[str] | None = None
    number = begin
    while True:
        before, num_characters = reader.line_num, 0
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:  # the reader continues with the next line
            carriage_return = "new-line character" in str(error)
            found = "a carriage return that does not end a line" if carriage_return else str(error)
            place = f"{path}:{begin + reader.line_num - 1}"
            damage = SourceError(f"{place}: not {data_suffix(path)[1:].upper()}: {found}")
            if header is None or carriage_return or reader.line_num > before + 1:
                raise damage from error
            yield Row(f"{name}:{number}", {}, damage=damage)
        else:
            if header is None:
                header = _header(fields, f"{path}:{begin}")
            elif fields:
                yield _row(fields, header, path, name, number)
        number = begin + reader.line_num


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
    twice = next((name for name, number in Counter(fields).items() if number > 1), None)
    if twice is not None:
        raise SourceError(f"{place}: two columns are named {twice!r:.80}; rename one of them")
    return fields
