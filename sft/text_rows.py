"""Rows out of text files: JSON lines, JSON, CSV and TSV, each also compressed; damage is named with its line."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import sys
import zlib
from collections.abc import Generator, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa

from sft.row import Row, SourceError

COMPRESSIONS = (".gz", ".zst")
BOM = b"\xef\xbb\xbf"
_WHITESPACE = " \t\r\n"
MAX_DIGITS = 4300
MAX_LINE_BYTES = 256 << 20
"""Longest line, and largest .json file: both are read whole, and a small archive may hold anything."""
# Names under which a JSON file may hold its list of rows.
_WRAPPERS = {"data", "rows", "examples", "instances", "train"}


def _open(path: Path) -> IO[bytes]:
    match path.suffix.lower():
        case ".gz":
            return cast(IO[bytes], gzip.open(path, "rb"))
        case ".zst":
            return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def data_suffix(path: Path) -> str:
    """The ending of a file's name that says what it holds: lower case, that of a compression left out."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Decoded lines with their numbers, line ends kept, without a byte order mark."""
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(iter(partial(file.readline, MAX_LINE_BYTES + 1), b""), start=1):
                if len(line) > MAX_LINE_BYTES:
                    raise SourceError(f"{path}:{number}: a line of more than {_LIMIT}, which is no row; {_ONE_A_LINE}")
                yield number, _decode(line.removeprefix(BOM) if number == 1 else line, path, number)
    except (EOFError, zlib.error, gzip.BadGzipFile, pa.ArrowException, OSError) as error:
        # a damaged .zst is an error of the operating system to Arrow, one without a number
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise SourceError(f"{path}:{number + 1}: the compressed data is damaged or ends too early: {error}") from error


def _decode(line: bytes, path: Path, number: int) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        found = line[error.start : error.start + 4].hex(" ")
        raise SourceError(f"{path}:{number}:{error.start + 1}: not UTF-8 (bytes {found}); convert the file") from error


def jsonl_rows(path: Path, name: str) -> Iterator[Row]:
    """Rows of JSON lines: one object a line, blank lines between them at will."""
    is_first = True
    for number, line in _lines(path):
        if line.isspace():
            continue
        place = f"{path}:{number}"
        try:
            value = _DECODER.decode(line)
        except RecursionError as error:
            raise SourceError(f"{place}: {_TOO_DEEP}") from error
        except json.JSONDecodeError as error:
            hint = _LIST_HINT if is_first and line.lstrip().startswith("[") else ""
            raise SourceError(f"{place}:{error.colno}: not JSON: {error.msg}, in {_excerpt(error)}{hint}") from error
        except ValueError as error:
            raise SourceError(f"{place}: {error}") from error
        if is_first and isinstance(value, list):
            raise SourceError(f"{place}: a row must be a JSON object, not {_shown(value)}{_LIST_HINT}")
        is_first = False
        yield Row(f"{name}:{number}", _object(value, place))


class RepeatedKeyError(ValueError):
    """A JSON object that states a key twice: which of the two is meant, nobody can tell."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise RepeatedKeyError(f"the key {twice!r} stands twice in one object; remove one of the two")
    return result


def _integer(digits: str) -> int:
    """A whole number; Python itself refuses very long ones, in words that name no file."""
    if len(digits) > MAX_DIGITS:
        raise LongNumberError(f"a number of {len(digits)} digits, more than {MAX_DIGITS}; write it as text")
    return int(digits)


class LongNumberError(ValueError):
    """A number in a JSON file that is too long to be one."""


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_integer)
_TOO_DEEP = "lists or objects lie too deep in one another to be read"
_LIMIT = f"{MAX_LINE_BYTES >> 20} MB"
_ONE_A_LINE = "write one object a line (jq -c '.[]' FILE.json > FILE.jsonl)"
_LIST_HINT = "; a list of all rows is a .json file: rename it to .json, or write one object a line"
_JSON_NAMES: dict[type, str] = {list: "list", str: "text", bool: "truth value", int: "number", float: "number"}


def _shown(value: Any) -> str:
    """A JSON value as its kind and beginning; null is its own kind."""
    return "null" if value is None else f"{_JSON_NAMES.get(type(value), type(value).__name__)} {value!r:.60}"


def _excerpt(error: json.JSONDecodeError) -> str:
    return repr(error.doc[max(0, error.pos - 30) : error.pos + 30].strip("\r\n"))


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise SourceError(f"{place}: a row must be a JSON object, not {_shown(value)}")
    return value


def json_rows(path: Path, name: str) -> Iterator[Row]:
    """Rows of a JSON file: a list of objects, one object that holds such a list, or objects one after the other."""
    text = _whole(path)
    line, position, on_line = 1, 0, 0
    try:
        for at, value in _elements(text):
            passed = text.count("\n", position, at)
            line, position, on_line = line + passed, at, 1 if passed else on_line + 1
            number = f"{line}" if on_line <= 1 else f"{line}#{on_line}"
            yield Row(f"{name}:{number}", _object(value, f"{path}:{number}"))
    except (RepeatedKeyError, LongNumberError) as error:
        raise SourceError(f"{path}: in or after the row at line {line}: {error}") from error
    except RecursionError as error:
        raise SourceError(f"{path}: in or after the row at line {line}: {_TOO_DEEP}") from error
    except json.JSONDecodeError as error:
        place = f"{path}:{error.lineno}:{error.colno}"
        raise SourceError(f"{place}: not JSON: {error.msg}, in {_excerpt(error)}") from error


def _whole(path: Path) -> str:
    """The text of a file that is read at once."""
    lines, size = [], 0
    for _, line in _lines(path):
        lines.append(line)
        size += len(line)
        if size > MAX_LINE_BYTES:
            raise SourceError(f"{path}: more than {_LIMIT} of JSON in one piece; {_ONE_A_LINE}")
    return "".join(lines)


def _elements(text: str) -> Iterator[tuple[int, Any]]:
    """Rows of a JSON text, each with its position, without building a list of all."""
    start = _skip(text, 0)
    if text[start : start + 1] == "[":
        end = yield from _list_elements(text, start)
        if end != len(text):
            raise json.JSONDecodeError("something stands behind the list of rows", text, end)
        return
    if start == len(text):
        return
    value, end = _DECODER.raw_decode(text, start)
    if not text[end:].strip(_WHITESPACE) and isinstance(value, dict) and len(value) == 1 and value.keys() & _WRAPPERS:
        yield from _list_elements(text, text.index("[", start))
        return
    while start < len(text):
        value, end = _DECODER.raw_decode(text, start)
        yield start, value
        start = _skip(text, end)


def _list_elements(text: str, start: int) -> Generator[tuple[int, Any], None, int]:
    """The elements of a list, each with its position; returns the position of what follows the list."""
    at = _skip(text, start + 1)
    if text[at : at + 1] == "]":
        return _skip(text, at + 1)
    while True:
        value, end = _DECODER.raw_decode(text, at)
        yield at, value
        end = _skip(text, end)
        if text[end : end + 1] == "]":
            return _skip(text, end + 1)
        if text[end : end + 1] != ",":
            raise json.JSONDecodeError("expected , or ] after a row", text, end)
        at = _skip(text, end + 1)


def _skip(text: str, at: int) -> int:
    while text[at : at + 1] in _WHITESPACE and at < len(text):
        at += 1
    return at


def csv_rows(path: Path, name: str) -> Iterator[Row]:
    """Rows of a table as text; the header shows what separates columns: commas, tabs or semicolons."""
    csv.field_size_limit(sys.maxsize)
    lines = _lines(path)
    begin, first = next(((number, line) for number, line in lines if line.strip()), (1, ""))
    rest = (line for _, line in lines)
    reader = csv.reader(itertools.chain([first], rest), delimiter=_delimiter(path, first), strict=True)
    header: list[str] | None = None
    number = begin
    try:
        for fields in reader:
            if header is None:
                header = _header(fields, f"{path}:{begin}")
            elif fields:
                if len(fields) != len(header):
                    raise SourceError(
                        f"{path}:{number}: {len(fields)} fields where the header has {len(header)}: {header}"
                    )
                yield Row(f"{name}:{number}", dict(zip(header, fields, strict=True)))
            number = begin + reader.line_num
    except csv.Error as error:
        found = "a carriage return that ends no line" if "new-line character" in str(error) else str(error)
        place = f"{path}:{begin + reader.line_num - 1}"
        raise SourceError(f"{place}: not {data_suffix(path)[1:].upper()}: {found}") from error


def _delimiter(path: Path, header: str) -> str:
    if data_suffix(path) == ".tsv":
        return "\t"
    return "," if "," in header else next((letter for letter in ";\t" if letter in header), ",")


def _header(fields: list[str], place: str) -> list[str]:
    twice = next((name for name in fields if fields.count(name) > 1), None)
    if twice is not None:
        raise SourceError(f"{place}: two columns are named {twice!r}; rename one of them")
    return fields
