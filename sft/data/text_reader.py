"""The text of data files, also compressed, in lines or pieces; what is no text or would fill the memory is refused.

Rows of tables that are text: CSV and TSV, each also compressed; damage is named with its line.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import itertools
import sys
import zlib
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
"""Bytes of a line: a row some thousand times longer than any that can be trained."""

MAX_EXPANSION, MAX_UNPACKED = 200, 1 << 30
"""How much larger than its compressed file a text may be, beyond the first gibibyte; ten times is usual."""

PIECE = 1 << 20
"""Bytes that are read at once where lines do not matter."""

DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, pa.ArrowException, OSError)

_SHORTER = "each row has a line of its own here; a list of all rows is a .json file"

_BOMB = "no text shrinks so much; unpack it yourself if it is meant to be so"


def data_suffix(path: Path) -> str:
    """The ending of a file's name that says what it holds: lower case, that of a compression left out."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers, line ends kept, without a byte order mark.

    Raises:
        SourceError: A line is too long, or the file is damaged or unpacks to far more than a text does.
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
    """The same as text.

    Raises:
        SourceError: As `raw_lines`, or a line is not UTF-8.
    """
    for number, line in raw_lines(path):
        yield number, decoded(line, path, number)


def decoded(line: bytes, path: Path, number: int) -> str:
    """A line as text.

    Raises:
        SourceError: It is not UTF-8; says where.
    """
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        found = line[error.start : error.start + 4].hex(" ")
        is_gzip = number == 1 and line.startswith(GZIP)
        way_out = "it begins as gzip does: give its name the ending .gz" if is_gzip else "convert the file"
        raise SourceError(f"{path}:{number}:{error.start + 1}: not UTF-8 (bytes {found}); {way_out}") from error


def pieces(path: Path) -> Iterator[str]:
    """The text in pieces of about a mebibyte, without a byte order mark.

    Raises:
        SourceError: It is not UTF-8, damaged, or unpacks to far more than a text does.
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
    """The file, unpacked, and how many bytes it may have."""
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
        raise SourceError(f"{path}:{number}: unpacked, it is more than {MAX_EXPANSION} times as large; {_BOMB}")


def _damage(error: Exception, path: Path, number: int) -> Exception:
    # a damaged .zst is an error of the operating system to Arrow, one without a number
    if isinstance(error, OSError) and error.errno is not None:
        return error
    return SourceError(f"{path}:{number}: the compressed data is damaged or ends too early: {error}")


def _not_utf8(error: UnicodeDecodeError, path: Path, num_ends: int, column: int) -> SourceError:
    """What is not UTF-8 in a piece before which there are so many line ends, and so many bytes behind the last one."""
    before = error.object[: error.start]
    number = num_ends + before.count(b"\n") + 1
    place = error.start - before.rfind(b"\n") if b"\n" in before else column + error.start + 1
    found = error.object[error.start : error.start + 4].hex(" ")
    return SourceError(f"{path}:{number}:{place}: not UTF-8 (bytes {found}); convert the file")


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
