"""Data files of URLs are downloaded once per version, and every failure is one message."""

from __future__ import annotations

import functools
import io
import threading
import traceback
import zipfile
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest

from sft.data.remote import check_url, fetch_files, is_url
from sft.data.source_row import SourceError
from sft.web import PRIVATE, VARIABLE

URL = "memory://bucket/chats"


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    system = fsspec.filesystem("memory")
    for name in ("a.jsonl", "b/c.csv", "notes.md"):
        system.pipe(f"/bucket/chats/{name}", name.encode())
    yield
    system.rm("/bucket", recursive=True)


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder; /to/X is redirected to X."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to"))
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            super().do_GET()

    do_HEAD = do_GET


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv(VARIABLE, PRIVATE)
    monkeypatch.setattr(Handler, "asked", [])
    (tmp_path / "served").mkdir()
    handler = functools.partial(Handler, directory=str(tmp_path / "served"))
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


def test_the_bytes_of_a_file_are_counted_while_they_arrive_and_a_copy_counts_none(tmp_path: Path, server: str) -> None:
    content = b"x" * 12_000_000
    (tmp_path / "served" / "a.jsonl").write_bytes(content)
    seen: list[tuple[int, int, str]] = []
    fetch_files(f"{server}/a.jsonl", tmp_path / "cache", lambda *report: seen.append(report))
    done = [report[0] for report in seen]
    assert done == sorted(done)
    assert len({*done} - {0, len(content)}) >= 1
    assert (seen[-1], {report[1:] for report in seen}) == (
        (len(content),) * 2 + ("a.jsonl",),
        {(len(content), "a.jsonl")},
    )
    system = fsspec.filesystem("memory")
    system.pipe("/bucket/chats/a.jsonl", content)
    seen.clear()
    fetch_files(f"{URL}/a.jsonl", tmp_path / "cache", lambda *report: seen.append(report))
    assert seen[-1] == (len(content), len(content), "a.jsonl")


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
        ("http://x.invalid/a.jsonl", "a\\.jsonl does not exist, or can't be reached"),
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


@pytest.mark.parametrize(
    ("url", "innermost"),
    [
        ("simplecache::file:///etc/rows.jsonl", "file"),
        ("dir://rows.jsonl::file:///etc", "file"),
        ("zip://rows.jsonl::/etc/rows.zip", "file"),
        ("zip://rows.jsonl::data/rows.zip", "file"),
        ("simplecache::zip://rows.jsonl::local:///etc/rows.zip", "local"),
        ("simplecache::", "file"),
        ("dvc:///etc/rows.jsonl", "dvc"),
        ("reference:///etc/rows.jsonl", "reference"),
    ],
)
def test_the_innermost_part_of_a_url_decides_whether_it_is_local(tmp_path: Path, url: str, innermost: str) -> None:
    for check in (check_url, lambda url: fetch_files(url, tmp_path)):
        with pytest.raises(SourceError, match=rf": {innermost}:// is the innermost part, and it reads files of this m"):
            check(url)


@pytest.mark.parametrize("url", ["reference://a.jsonl::https://host/a", "file:///etc/a.jsonl::https://host/a.jsonl"])
def test_a_layer_that_reads_what_a_file_states_is_refused(url: str) -> None:
    with pytest.raises(SourceError, match=r":: can't be used in a source; supported are blockcache, cached, dir, file"):
        check_url(url)


def test_a_layer_around_a_remote_file_is_opened(tmp_path: Path) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("rows/a.jsonl", "rows")
    fsspec.filesystem("memory").pipe("/bucket/rows.zip", packed.getvalue())
    (file,) = fetch_files("zip://rows/*.jsonl::memory://bucket/rows.zip", tmp_path)
    assert file.path.read_text() == "rows"


@pytest.mark.parametrize("around", ["", "simplecache::", "zip://*.jsonl::"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", "10.0.0.1", "169.254.169.254", "0x7f.1"])
def test_private_addresses_are_refused_before_a_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, around: str, host: str
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(SourceError, match=r" is an address of this machine or of a private network; .*=private$"):
        fetch_files(f"{around}http://{host}:9/rows.jsonl", tmp_path)


def test_hosts_of_other_protocols_are_checked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(SourceError, match=r"127\.0\.0\.1 is an address of this machine"):
        fetch_files("ftp://127.0.0.1:9/rows.jsonl", tmp_path)


def test_a_redirect_is_refused_and_followed_only_if_it_is_allowed(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "served" / "a.jsonl").write_text("content")
    with pytest.raises(SourceError, match=r"the server redirects to '/a\.jsonl'; give that address, or .*=redirects$"):
        fetch_files(f"{server}/to/a.jsonl", tmp_path / "cache")
    assert "/a.jsonl" not in Handler.asked
    monkeypatch.setenv(VARIABLE, "private, redirects")
    assert fetch_files(f"{server}/to/a.jsonl", tmp_path / "cache")[0].path.read_text() == "content"
    monkeypatch.setenv(VARIABLE, "all")
    with pytest.raises(SourceError, match="SFT_ALLOW_URLS: all: only `private` and `redirects` can be allowed"):
        fetch_files(f"{server}/to/a.jsonl", tmp_path / "cache")


def test_a_secret_of_the_environment_is_sent_but_in_no_record(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFT_SECRET_ROWS", "sig=a/b+c%3D")
    (tmp_path / "served" / "a.jsonl").write_text("content")
    (file,) = fetch_files(f"{server}/a.jsonl?${{SFT_SECRET_ROWS}}", tmp_path / "cache")
    assert (file.url, file.path.read_text()) == (f"{server}/a.jsonl?${{SFT_SECRET_ROWS}}", "content")
    assert {"/a.jsonl?sig=a/b+c%3D"} == set(Handler.asked)
    with pytest.raises(SourceError) as caught:
        fetch_files(f"{server}/none.jsonl?${{SFT_SECRET_ROWS}}", tmp_path / "cache")
    assert "sig=" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("SFT_SECRET_NONE", "the environment variable SFT_SECRET_NONE is not set; set it where the pipeline runs"),
        ("AWS_SECRET_ACCESS_KEY", r"variables of URLs are called SFT_SECRET_\.\.\.; rename AWS_SECRET_ACCESS_KEY"),
    ],
)
def test_only_variables_for_urls_are_sent(monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "key")
    with pytest.raises(SourceError, match=message):
        check_url(f"https://host/a.jsonl?${{{name}}}")
