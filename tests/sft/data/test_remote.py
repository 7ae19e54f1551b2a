"""Data files of URLs are downloaded once per version, and every failure is one message."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from sft.data.remote import fetch_files, is_url
from sft.data.source_row import SourceError

URL = "memory://bucket/chats"


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    system = fsspec.filesystem("memory")
    for name in ("a.jsonl", "b/c.csv", "notes.md"):
        system.pipe(f"/bucket/chats/{name}", name.encode())
    yield
    system.rm("/bucket", recursive=True)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "served").mkdir()
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "served"))
    found = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{found.server_port}"
    found.shutdown()
    found.server_close()


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (URL, ["a.jsonl", "b/c.csv"]),
        (f"{URL}/a.jsonl", ["a.jsonl"]),
        (f"{URL}/**/*.csv", ["b/c.csv"]),
        (f"{URL}/*.[jc]*", ["a.jsonl"]),
    ],
)
def test_a_url_is_a_file_a_folder_or_a_pattern(tmp_path: Path, url: str, expected: list[str]) -> None:
    files = fetch_files(url, tmp_path)
    assert [file.url for file in files] == [f"memory:///bucket/chats/{name}" for name in expected]
    assert [file.path.read_text() for file in files] == expected
    assert [file.version["size"] for file in files] == [len(name) for name in expected]
    assert all(file.path.name == Path(file.url).name for file in files)


def test_a_file_that_changed_is_copied_again(tmp_path: Path) -> None:
    fetch_files(f"{URL}/a.jsonl", tmp_path)
    fsspec.filesystem("memory").pipe("/bucket/chats/a.jsonl", b"other")
    assert fetch_files(f"{URL}/a.jsonl", tmp_path)[0].path.read_text() == "other"


def test_a_file_of_a_web_server_is_copied(tmp_path: Path, server: str) -> None:
    (tmp_path / "served" / "a.jsonl").write_text("content")
    (file,) = fetch_files(f"{server}/a.jsonl?download=true", tmp_path / "cache")
    assert (file.path.name, file.path.read_text(), file.version["size"]) == ("a.jsonl", "content", 7)
    with pytest.raises(SourceError, match=r"b\.jsonl does not exist"):
        fetch_files(f"{server}/b.jsonl", tmp_path / "cache")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://bucket/none.jsonl", r"memory://bucket/none\.jsonl does not exist, or"),
        ("memory://bucket/none", "does not exist"),
        ("memory://bucket/chats/notes.md", "has an unsupported format; supported are"),
        ("memory://bucket/chats/*.parquet", "contains no data file; supported are"),
        ("file:///etc/hosts", "is on this machine; give its path, without file://"),
        (
            "nosuch://x/a.jsonl",
            r"can't be read \(ValueError: Protocol not known.*; check address",
        ),
        ("http://127.0.0.1:9/a.jsonl", "a\\.jsonl does not exist, or can't be reached"),
    ],
)
def test_a_url_that_cannot_be_read_is_one_message(tmp_path: Path, url: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        fetch_files(url, tmp_path)


def test_splits_of_save_to_disk_are_not_mixed(tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe("/bucket/chats/dataset_dict.json", b"{}")
    with pytest.raises(SourceError, match="belongs to a folder of save_to_disk; copy that folder into data/"):
        fetch_files(URL, tmp_path)


def test_local_paths_are_not_urls() -> None:
    assert [is_url(text) for text in ("s3://b/a.jsonl", "data/a.jsonl", "/data/a.jsonl", "org/name")] == [
        True, False, False, False
    ]  # fmt: skip
