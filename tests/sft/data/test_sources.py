"""Files of every format yield rows with ids that locate them; errors for damaged files state the place."""

from __future__ import annotations

import csv
import gzip
import json
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sft.data import text_reader
from sft.data.source_row import Row, SourceError
from sft.data.sources import data_files, hub_rows, read_rows

ROWS = [{"text": "first"}, {"text": "second\nline é 🎉"}, {"text": 'third, "quoted"'}]


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def rows_of(path: Path, **kwargs: Any) -> list[Row]:
    return [row for file in data_files(path) for row in read_rows(file, **kwargs)]


def as_jsonl(rows: list[dict[str, Any]], end: str = "\n") -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_json_lines_with_any_line_end_and_mark(tmp_path: Path, end: str, bom: bytes) -> None:
    path = written(tmp_path / "a.jsonl", bom + (as_jsonl(ROWS[:2], end) + end + as_jsonl(ROWS[2:], "")).encode())
    assert rows_of(path) == [Row("a.jsonl:1", ROWS[0]), Row("a.jsonl:2", ROWS[1]), Row("a.jsonl:4", ROWS[2])]


def test_compressed_json_lines(tmp_path: Path) -> None:
    content = as_jsonl(ROWS).encode()
    written(tmp_path / "a.jsonl.gz", gzip.compress(content))
    with pa.CompressedOutputStream(str(tmp_path / "b.jsonl.zst"), "zstd") as file:
        file.write(content)
    assert [row.columns for row in rows_of(tmp_path / "a.jsonl.gz")] == ROWS
    assert [row.columns for row in rows_of(tmp_path / "b.jsonl.zst")] == ROWS


@pytest.mark.parametrize(
    ("content", "ids"),
    [
        (json.dumps(ROWS, indent=2), ["a.json:2", "a.json:5", "a.json:8"]),
        (json.dumps(ROWS), ["a.json:1", "a.json:1#2", "a.json:1#3"]),
        (json.dumps({"data": ROWS}, indent=1), ["a.json:3", "a.json:6", "a.json:9"]),
        (as_jsonl(ROWS), ["a.json:1", "a.json:2", "a.json:3"]),
        ("[]", []),
        ("", []),
        (json.dumps(ROWS[0], indent=2), ["a.json:1"]),
    ],
)
def test_json_files(tmp_path: Path, content: str, ids: list[str]) -> None:
    rows = rows_of(written(tmp_path / "a.json", content))
    assert [row.id for row in rows] == ids
    assert [row.columns for row in rows] == ROWS[: len(ids)]


@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("tsv", "\t")])
def test_tables_as_text(tmp_path: Path, suffix: str, delimiter: str) -> None:
    path = tmp_path / f"a.{suffix}"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["text", "n"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows({**row, "n": 1} for row in ROWS)
    rows = rows_of(path)
    assert [row.columns for row in rows] == [{**row, "n": "1"} for row in ROWS]
    assert [row.id for row in rows] == [f"a.{suffix}:2", f"a.{suffix}:3", f"a.{suffix}:5"]


def test_parquet_and_arrow_files(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_file(str(tmp_path / "b.arrow"), table.schema) as writer:
        writer.write_table(table)
    with pa.ipc.new_stream(str(tmp_path / "c.arrow"), table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "b.arrow", "c.arrow"):
        expected = [Row(f"{name}:{number}", row) for number, row in enumerate(ROWS, start=1)]
        assert rows_of(tmp_path / name) == expected


@pytest.mark.parametrize("name", ["a.parquet", "b.arrow", "folder"])
def test_nulls_that_arrow_added_go_and_those_of_the_user_stay(tmp_path: Path, name: str) -> None:
    rows = [
        {"messages": [{"role": "assistant", "arguments": {"city": "Lima", "unit": None}}]},
        {"messages": [{"role": "assistant", "arguments": {"zone": "UTC", "unit": None}}]},
    ]
    table = pa.Table.from_pylist(rows)
    if name == "folder":
        Dataset(table).save_to_disk(str(tmp_path / name))
    elif name == "a.parquet":
        pq.write_table(table, tmp_path / name)
    else:
        with pa.ipc.new_file(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
    assert [row.columns for row in rows_of(tmp_path / name)] == rows


def test_folders_of_datasets(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "one"))
    splits = {"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:1])}
    DatasetDict(splits).save_to_disk(str(tmp_path / "many"))
    assert [row.columns for row in rows_of(tmp_path / "one")] == ROWS
    assert [row.columns for row in rows_of(tmp_path / "many", split="test")] == ROWS[:1]
    with pytest.raises(SourceError, match=r"no split 'dev', only \['test', 'train'\]"):
        rows_of(tmp_path / "many", split="dev")


def test_a_folder_and_a_pattern_give_all_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    written(tmp_path / "b.jsonl", as_jsonl(ROWS[:1]))
    written(tmp_path / "a.csv", "text\nx\n")
    written(tmp_path / "sub" / "c.json", json.dumps(ROWS[1:]))
    written(tmp_path / "README.md", "hello")
    written(tmp_path / ".hidden.jsonl", "broken")
    assert [file.name for file in data_files(tmp_path)] == ["a.csv", "b.jsonl", "c.json"]
    assert [file.name for file in data_files(tmp_path / "*.jsonl")] == ["b.jsonl"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": "y",}\n', r"a\.jsonl:2:14: not JSON: .*property name.*"),
        ("a.jsonl", '{"text": "x"}\n{"text": "y', r"a\.jsonl:2:10: not JSON: Unterminated string"),
        ("a.jsonl", '{"text": "x"}\n[1]\n', r"a\.jsonl:2: a row must be a JSON object, not list \[1\]"),
        ("a.jsonl", '[{"text": "x"}]\n', r"a\.jsonl:1: a row must be .*, not list .*rename it to \.json"),
        ("a.jsonl", '[\n{"text": "x"}\n]\n', r"a\.jsonl:1:\d+: not JSON: .*rename it to \.json"),
        ("a.jsonl", '{"text": "x"}\nnull\n', r"a\.jsonl:2: a row must be a JSON object, not null$"),
        ("a.jsonl", '{"text": "x"}\n{"text": "y", "text": "z"}\n', r"a\.jsonl:2: the key 'text' stands twice"),
        ("a.json", '[\n {"text": "x"},\n {"text": 1, "text": 2}]', r"a\.json: .*: the key 'text' stands twice"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xe9t\xe9"}\n', r"a\.jsonl:2:11: not UTF-8 \(bytes e9 74 e9 22\)"),
        ("a.json", '[\n {"text": "x"},\n {"text" 1}\n]', r"a\.json:3:10: not JSON: Expecting ':' delimiter"),
        ("a.json", '[\n {"text": "x"}\n {"text": "y"}\n]', r"a\.json:3:2: not JSON: expected , or \]"),
        ("a.json", '[\n {"text": "x"},\n', r"a\.json:3:1: not JSON"),
        ("a.json", "[1, 2]", r"a\.json:1: a row must be a JSON object, not number 1"),
        ("a.json", '[{"text": "x"}]\n[{"text": "y"}]', r"a\.json:2:1: not JSON: unexpected text after the list"),
        ("a.jsonl", '{"text": "x"}\n{"text": ' + "[" * 100_000, r"a\.jsonl:2: lists or objects lie too deep"),
        ("a.json", "[" * 100_000, r"a\.json: in or after the row at line 1: lists or objects lie too deep"),
        ("a.jsonl", '{"text": "x"}\n{"text": ' + "9" * 5000 + "}", r"a\.jsonl:2: a number of 5000 digits"),
        (
            "a.json",
            '[{"text": ' + "9" * 5000 + "}]",
            r"a\.json: .* line 1: a number of 5000 digits",
        ),
        ("a.csv", "text,text\nx,y\n", r"a\.csv:1: two columns are named 'text'"),
        ("a.csv", "text,n\rx,1\r", r"a\.csv:1: not CSV: a carriage return that does not end a line"),
        ("a.jsonl.zst", "no zstandard", r"a\.jsonl\.zst:1: the compressed data is damaged"),
        ("a.csv", "text,n\nx,1\ny\n", r"a\.csv:3: 1 fields where the header has 2"),
        ("a.csv", 'text,n\n"x,1\n', r"a\.csv:2: not CSV: unexpected end of data"),
        ("a.parquet", "not parquet", r"a\.parquet: damaged or incomplete Parquet file"),
        ("a.arrow", "not arrow, not at all", r"a\.arrow: damaged or incomplete Arrow file"),
        ("a.xlsx", "", r"a\.xlsx has an unsupported format; supported are \.arrow, \.csv"),
    ],
)
def test_damage_is_named_with_its_place(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        rows_of(written(tmp_path / name, content))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=4), children, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.lists(st.dictionaries(st.sampled_from(["text", "data", "\u00e9"]), JSON_VALUES), max_size=5),
    layout=st.sampled_from(["list", "wrapped", "lines"]),
    indent=st.sampled_from([None, 0, 1]),
    size=st.integers(1, 40),
)
@example(rows=[{"data": [None]}], layout="lines", indent=None, size=3)
def test_a_json_file_read_in_pieces_gives_all_of_its_rows(
    rows: list[dict[str, Any]], layout: str, indent: int | None, size: int
) -> None:
    texts = {"list": [rows], "wrapped": [{"rows": rows}], "lines": rows}
    content = "\n".join(json.dumps(part, indent=indent, ensure_ascii=size % 2 == 0) for part in texts[layout])
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path = written(Path(folder) / "a.json", content)
        whole = rows_or_error(path)
        patch.setattr(text_reader, "PIECE", size)
        assert rows_or_error(path) == whole
    expected = rows[0]["data"] if layout == "lines" and len(rows) == 1 and is_wrapper(rows[0]) else rows
    if all(isinstance(row, dict) for row in expected):
        assert [row.columns for row in whole] == expected
    else:
        assert "a row must be a JSON object, not " in whole


def rows_or_error(path: Path) -> Any:
    try:
        return rows_of(path)
    except SourceError as error:
        return str(error)


def is_wrapper(row: dict[str, Any]) -> bool:
    return list(row) == ["data"] and isinstance(row["data"], list)


@pytest.mark.parametrize("size", [1, 3, 1 << 20])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[\n {"text": "x"},\n {"text" 1}\n]', r"a\.json:3:10: not JSON: Expecting ':' delimiter"),
        (b'[{"text": "x"}, {"text": "y"} {"text": "z"}]', r"a\.json:1:31: not JSON: expected , or \]"),
        (b'{"data": [{"text": "x"}, {"text" 1}]}', r"a\.json:1:34: not JSON: Expecting ':' delimiter"),
        (b'[{"text": "x"},\n {"text": "\xe9t"}]', r"a\.json:2:12: not UTF-8 \(bytes e9"),
        (b'[{"text": "x"}, {"text": "\xc3', r"a\.json:1:27: not UTF-8 \(bytes c3"),
    ],
)
def test_damage_has_the_same_place_in_pieces_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str, size: int
) -> None:
    monkeypatch.setattr(text_reader, "PIECE", size)
    with pytest.raises(SourceError, match=message):
        rows_of(written(tmp_path / "a.json", content))


def test_a_long_json_list_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    row = json.dumps({"text": "a" * 1000})
    path = written(tmp_path / "a.json", "[" + ",\n".join([row] * 32_000) + "]")
    tracemalloc.start()
    num_rows = sum(1 for _ in read_rows(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num_rows == 32_000
    assert peak < path.stat().st_size / 3


def test_rows_that_cannot_be_read_are_given_with_their_damage_when_asked_for(tmp_path: Path) -> None:
    lines = [b'{"text": "a"}', b'{"text": "b"', b"\xff", b"5", b'{"text": "c"}']
    written(tmp_path / "a.jsonl", b"\n".join(lines))
    written(tmp_path / "b.csv", "x,y\n1,2\n3\n4,5\n")
    written(tmp_path / "c.json", '[{"text": "a"}, 7, {"text": "b"}]')
    found = [row for name in ("a.jsonl", "b.csv", "c.json") for row in read_rows(tmp_path / name, with_damaged=True)]
    damaged = {row.id: str(row.damage) for row in found if row.damage is not None}
    assert list(damaged) == ["a.jsonl:2", "a.jsonl:3", "a.jsonl:4", "b.csv:3", "c.json:1#2"]
    assert all(said.startswith(f"{tmp_path}/{place.split('#')[0]}") for place, said in damaged.items())
    assert [list(row.columns.values()) for row in found if row.damage is None] == [
        *(["a"], ["c"], ["1", "2"], ["4", "5"], ["a"], ["b"]),
    ]


def test_a_packed_file_without_its_ending_is_recognized(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"a\.jsonl:1:2: not UTF-8 .* give its name the ending \.gz"):
        rows_of(written(tmp_path / "a.jsonl", gzip.compress(b'{"text": "a"}')))


def test_a_truncated_archive_is_an_error(tmp_path: Path) -> None:
    content = gzip.compress(as_jsonl(ROWS * 1000).encode())
    with pytest.raises(SourceError, match=r"a\.jsonl\.gz:\d+: the compressed data is damaged or ends too early"):
        rows_of(written(tmp_path / "a.jsonl.gz", content[: len(content) // 2]))
    with pytest.raises(SourceError, match=r"b\.jsonl\.gz:1: the compressed data is damaged"):
        rows_of(written(tmp_path / "b.jsonl.gz", b"plain text"))


def test_csv_rows_with_text_after_a_quote_are_given_with_their_damage_and_the_next_rows_as_they_are(
    tmp_path: Path,
) -> None:
    file = written(tmp_path / "a.csv", 'x,y\n"1"2,3\n4,"5\n6"\n"7" ,8\n9,0\n"1,2')
    found = {row.id: row.damage or row.columns for row in read_rows(file, with_damaged=True)}
    assert {name: row for name, row in found.items() if isinstance(row, dict)} == {
        "a.csv:3": {"x": "4", "y": "5\n6"},
        "a.csv:6": {"x": "9", "y": "0"},
    }
    damaged = {name: str(row) for name, row in found.items() if not isinstance(row, dict)}
    after = "not CSV: ',' expected after '\"'"
    assert damaged == {
        "a.csv:2": f"{file}:2: {after}",
        "a.csv:5": f"{file}:5: {after}",
        "a.csv:7": f"{file}:7: not CSV: unexpected end of data",
    }


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ('x,y\n"1,2\n3,4\n', "3: not CSV: unexpected end of data"),
        ('x,y\n"1,2\n3,"4\n', "3: not CSV: ',' expected"),
        ("x,y\n1,2\r3,4\r5,6\n7,8\n", "2: not CSV: a carriage return"),
        ('"x"y\n1\n', "1: not CSV: ',' expected"),
    ],
)
def test_a_csv_part_with_an_unknown_number_of_rows_is_an_error_also_where_damaged_rows_are_asked_for(
    tmp_path: Path, content: str, place: str
) -> None:
    file = written(tmp_path / "a.csv", content)
    with pytest.raises(SourceError, match=rf"a\.csv:{place}"):
        list(read_rows(file, with_damaged=True))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_an_archive_that_unpacks_to_far_more_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, compression: str
) -> None:
    monkeypatch.setattr(text_reader, "MAX_UNPACKED", 1 << 20)
    row = {".jsonl": b'{"text": "a"}\n', ".json": b'{"text": "a"} ', ".csv": b"text\n"}[suffix]
    file = tmp_path / f"rows{suffix}.{'gz' if compression == 'gzip' else 'zst'}"
    file.write_bytes(pa.compress(row * 1_000_000, compression, asbytes=True))
    assert len(row) * 1_000_000 > text_reader.MAX_EXPANSION * file.stat().st_size
    with pytest.raises(
        SourceError, match=r"rows\S+:\d+: unpacked, it is more than 200 times as large as the compressed file"
    ):
        list(read_rows(file))


def test_a_line_without_end_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_reader, "MAX_LINE", 1 << 20)
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "a"}\n{"text": "' + b"a" * (2 << 20) + b'"}\n')
    with pytest.raises(
        SourceError,
        match=r"rows\.jsonl:2: a line of more than 1 MiB; this format has one row per line; if the file is one JSON "
        r"array, name it \.json",
    ):
        list(read_rows(tmp_path / "rows.jsonl"))
    (tmp_path / "rows.json").write_bytes(b'[{"text": "' + b"a" * (2 << 20) + b'"}]')
    assert len(list(read_rows(tmp_path / "rows.json"))) == 1


def test_the_error_for_a_missing_file_lists_its_folder(tmp_path: Path) -> None:
    written(tmp_path / "train.jsonl", "")
    with pytest.raises(SourceError, match=r"trian\.jsonl does not exist; .* contains train\.jsonl"):
        data_files(tmp_path / "trian.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="empty contains no data file"):
        data_files(tmp_path / "empty")


def test_a_row_of_ten_megabytes_is_read(tmp_path: Path) -> None:
    row = {"text": "x" * 10_000_000}
    assert rows_of(written(tmp_path / "a.jsonl", as_jsonl([row]))) == [Row("a.jsonl:1", row)]
    assert rows_of(written(tmp_path / "a.csv", "text\n" + row["text"] + "\n")) == [Row("a.csv:2", row)]


@pytest.mark.parametrize("header", ["question;answer", "question\tanswer", "question,answer"])
def test_the_header_shows_what_separates_columns(tmp_path: Path, header: str) -> None:
    content = f"\n{header}\n" + header.replace("question", "a").replace("answer", "b") + "\n"
    assert rows_of(written(tmp_path / "a.csv", content)) == [Row("a.csv:3", {"question": "a", "answer": "b"})]


def test_any_part_of_a_path_may_have_wildcards(tmp_path: Path) -> None:
    for name in ("a/x.jsonl", "b/c/x.jsonl", "b/c/y.jsonl", "b/c/x.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        written(tmp_path / name, as_jsonl(ROWS[:1]))
    found = {
        pattern: [file.relative_to(tmp_path).as_posix() for file in data_files(tmp_path / pattern)]
        for pattern in ("*/x.jsonl", "**/x.*", "b/**/[y]*")
    }
    assert found == {
        "*/x.jsonl": ["a/x.jsonl"],
        "**/x.*": ["a/x.jsonl", "b/c/x.csv", "b/c/x.jsonl"],
        "b/**/[y]*": ["b/c/y.jsonl"],
    }
    written(tmp_path / "x[1].jsonl", as_jsonl(ROWS))
    assert len(rows_of(tmp_path / "x[1].jsonl")) == 3


def test_damage_inside_of_tables_is_named(tmp_path: Path) -> None:
    texts = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\1\0\0\0\3\0\0\0"), pa.py_buffer(b"x\xff\xfe"))
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match=r"a\.parquet:2: a text is not UTF-8 \(bytes ff fe\)"):
        rows_of(tmp_path / "a.parquet")
    with pa.ipc.new_file(tmp_path / "c.arrow", (table := pa.table({"text": [{"qqqq": "x"}]})).schema) as file:
        file.write_table(table)
    damaged = (tmp_path / "c.arrow").read_bytes().replace(b"qqqq", b"q\xf4qq")
    with pytest.raises(SourceError, match=r"c\.arrow: the name of a column is not UTF-8"):
        rows_of(written(tmp_path / "c.arrow", damaged))
    pq.write_table(pa.table({"text": ["x" * 1000] * 1000}), tmp_path / "b.parquet")
    content = bytearray((tmp_path / "b.parquet").read_bytes())
    content[10:60] = bytes(50)
    with pytest.raises(SourceError, match=r"b\.parquet: damaged or incomplete Parquet file"):
        rows_of(written(tmp_path / "b.parquet", bytes(content)))


def test_rows_of_a_hub_data_set_can_be_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "train.jsonl", as_jsonl(ROWS))
    read = datasets.load_dataset
    # a folder in the place of the hub, which tests can't reach
    monkeypatch.setattr(datasets, "load_dataset", lambda _, *args, **options: read(str(tmp_path), *args, **options))
    rows = list(hub_rows("team/rows", None, "train", None, streaming=True))
    assert [row.columns for row in rows] == ROWS
    assert rows[0].id == "team/rows/train:1"


def test_a_local_folder_is_not_read_in_the_place_of_a_hub_data_set(tmp_path: Path) -> None:
    written(tmp_path / "train.jsonl", as_jsonl(ROWS))
    with pytest.raises(SourceError, match=r"is a file or folder of this machine; rename it"):
        list(hub_rows(str(tmp_path), None, "train", None))


def test_a_chat_of_two_hundred_turns_is_one_row(tmp_path: Path) -> None:
    turns = [{"role": role, "content": f"{number}"} for number in range(100) for role in ("user", "assistant")]
    assert rows_of(written(tmp_path / "a.jsonl", as_jsonl([{"messages": turns}]))) == [
        Row("a.jsonl:1", {"messages": turns})
    ]
