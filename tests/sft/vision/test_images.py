"""Images of rows are read from one folder, from base64 and from URLs within limits, and from nowhere else."""

from __future__ import annotations

import base64
import io
import os
import random
import struct
import threading
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from PIL import Image

from sft.untrusted.images import ImageError, check_image
from sft.vision.images import inside, read_image, read_images
from sft.web import PRIVATE, VARIABLE
from tests.tiny_vision import square


def png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    square(colour).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with an image; another image is next to it, and the working directory is elsewhere."""
    images = tmp_path / "images"
    (images / "deep").mkdir(parents=True)
    (images / "deep" / "red.png").write_bytes(png())
    (tmp_path / "secret.png").write_bytes(png())
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return images


@pytest.mark.parametrize("name", ["deep/red.png", "./deep/../deep/red.png", "{folder}/deep/red.png"])
def test_paths_inside_of_the_folder_are_opened(folder: Path, name: str) -> None:
    for value in (name.format(folder=folder), {"bytes": None, "path": name.format(folder=folder)}):
        assert read_image(value, str(folder)).size == square("red").size


@pytest.mark.parametrize(
    "name", ["../secret.png", "deep/../../secret.png", "{folder}/../secret.png", "/etc/passwd", "..", "/"]
)
def test_paths_that_lead_out_of_the_folder_are_refused(folder: Path, name: str) -> None:
    found = name.format(folder=folder)
    for value in (found, {"path": found}, {"url": found}):
        with pytest.raises(ValueError, match=r"lies outside of .*images, and paths in rows may not lead out .*'/' for"):
            read_images([value], str(folder))


def test_without_a_folder_it_is_the_working_directory(folder: Path) -> None:
    (folder.parent / "work" / "blue.png").write_bytes(png("blue"))
    assert read_image("blue.png").size == square("blue").size
    with pytest.raises(ValueError, match=r"lies outside of .*work"):
        read_image("../secret.png")
    assert read_image(str(folder.parent / "secret.png"), "/").size == square("red").size


def test_a_path_object_comes_from_the_users_own_code_and_may_lie_anywhere(folder: Path) -> None:
    assert read_image(folder.parent / "secret.png", str(folder)).size == square("red").size


def test_a_link_inside_may_lead_anywhere_and_neighbours_of_like_names_are_outside(folder: Path) -> None:
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    assert read_image("link.png", str(folder)).size == square("red").size
    folder.with_name("images-other").mkdir()
    with pytest.raises(ValueError, match="lies outside"):
        inside("../images-other/a.png", str(folder))


@pytest.mark.parametrize("shape", ["plain", "wrapped", "data"])
def test_base64_is_read_also_when_it_looks_like_a_path(folder: Path, shape: str) -> None:
    buffer = io.BytesIO()
    square("red", 40, 40).save(buffer, format="JPEG")
    text = base64.b64encode(buffer.getvalue()).decode()
    assert text.startswith("/9j/")
    lines = "\n".join(text[start : start + 76] for start in range(0, len(text), 76))
    value = {"plain": text, "wrapped": lines, "data": f"data:image/jpeg;base64,{text}"}[shape]
    assert read_image(value, str(folder)).size == (40, 40)


def bomb() -> bytes:
    """Return a PNG of a few kilobytes whose header claims 10^10 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content).to_bytes(4, "big")
        return len(content).to_bytes(4, "big") + kind + content + checksum

    size = (100_000).to_bytes(4, "big")
    header = chunk(b"IHDR", size + size + bytes([8, 0, 0, 0, 0]))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "content",
    [b"", b"GIF89a", png()[:60], png()[:40] + b"\xff" * 40, bomb(), b"root:x:0:0", png().replace(b"IDAT", b"IDAX")],
)
def test_damaged_images_and_bombs_are_one_clear_error(folder: Path, content: bytes) -> None:
    (folder / "a.png").write_bytes(content)
    for value in (content or b" ", "a.png", base64.b64encode(content * 8).decode()):
        with pytest.raises(ValueError, match="image"):
            read_image(value, str(folder))


@pytest.mark.timeout(20)
def test_pipes_folders_and_impossible_names_are_refused(folder: Path) -> None:
    os.mkfifo(folder / "pipe.png")
    for name in ("pipe.png", "deep", "nothing.png", "a" * 300 + ".png", "a\0b.png", ""):
        with pytest.raises(ValueError, match="there is no such file"):
            read_image(name, str(folder))


class Answers(BaseHTTPRequestHandler):
    """Server of an image, of an endless one, and of a redirect to a file."""

    def do_GET(self) -> None:
        self.send_response(302 if self.path == "/file" else 200)
        if self.path == "/file":
            self.send_header("Location", "file:///etc/passwd")
        self.end_headers()
        if self.path == "/red.png":
            self.wfile.write(png())
        while self.path == "/endless":
            self.wfile.write(bytes(100_000))

    def log_message(self, *arguments: object) -> None:
        """Print nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr("sft.vision.images.URL_MAX_BYTES", 1_000_000)
    monkeypatch.setenv(VARIABLE, PRIVATE)
    server = HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_an_address_on_this_machine_is_not_fetched(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(
        ValueError, match=r"can't be downloaded: 127\.0\.0\.1 is an address of this machine or of a priv"
    ):
        read_image(f"{server}/red.png")


def test_an_address_is_fetched_within_limits_and_leads_to_no_file(server: str) -> None:
    assert read_image(f"{server}/red.png").size == square("red").size
    with pytest.raises(ValueError, match="can't be downloaded: it is not complete within 1 MB and 30 s"):
        read_image(f"{server}/endless")
    for address in (f"{server}/file", "http://", "http://127.0.0.1:9/a.png", "https://a b/c.png"):
        with pytest.raises(ValueError, match=r"can't be downloaded|can't be read as an image"):
            read_image(address)
    with pytest.raises(ValueError, match=r"lies outside|no such file"):
        read_image("file:///etc/passwd")


def test_values_that_are_not_images_are_named() -> None:
    assert read_image(Image.new("RGB", (3, 4))).size == (3, 4)
    with pytest.raises(ValueError, match="int 5 is not an image"):
        read_image(5)


def saved(kind: str) -> bytes:
    stream = io.BytesIO()
    square("red", 64, 64).save(stream, format=kind)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["DDS", "BLP", "PPM", "ICO", "TGA", "EPS", "PCX", "SGI", "IM"])
def test_formats_that_are_not_listed_are_not_opened(kind: str) -> None:
    stream = io.BytesIO()
    picture = square("red", 64, 64)
    (picture.convert("P") if kind == "BLP" else picture).save(stream, format=kind)
    for check in (read_image, check_image):
        with pytest.raises(ValueError, match="it is damaged, or not one of PNG, JPEG, WEBP, GIF, BMP, TIFF"):
            check(stream.getvalue())


HEADERS = {
    "DDS": b"DDS " + struct.pack("<7I", 124, 0x1007, 4, 4, 8, 0, 0) + bytes(44) + struct.pack("<2I4s", 32, 4, b"????"),
    "BLP": b"BLP2" + struct.pack("<i4B2I", 1, 9, 9, 9, 9, 4, 4) + bytes(200),
    "AVIF": b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + b"\xff" * 60,
    "GIF": b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes(3) + b",\0\0\0\0\xff\xff\xff\xff\0\x02\x01\x01\0;",
    "BMP": b"BM" + bytes(12) + struct.pack("<IiiHHIIiiII", 40, 1 << 30, 1 << 30, 1, 24, 0, 0, 0, 0, 0, 0),
    "TIFF": b"II*\0\x08\0\0\0" + struct.pack("<HHHII", 0xFFFF, 256, 4, 1, 1 << 31),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_crafted_headers_are_one_clear_error(kind: str) -> None:
    for check in (read_image, check_image):
        with pytest.raises(ValueError, match=r"."):
            check(HEADERS[kind])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_damage_at_any_place_is_read_or_refused(kind: str) -> None:
    whole, source = saved(kind), random.Random(0)
    assert check_image(whole) == (kind, 64, 64)
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(source.choice((1, 4, 16))):
            damaged[source.randrange(len(whole))] = source.randrange(256)
        message = "image"
        try:
            read_image(bytes(damaged)).convert("RGB")
        except ValueError as error:
            message = str(error)
        assert "image" in message
        try:
            check_image(bytes(damaged))
        except ImageError as error:
            message = str(error)
        assert message
