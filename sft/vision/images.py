"""Images as rows name them: decoded, from files only where the images of rows may lie.

Rows often come from others, and a path in them could lead to any file of the machine. A text is therefore a path inside
of one folder, an address on the web, or the image itself in base64; a `Path` can only come from the user's own code.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import time
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from transformers.image_utils import is_valid_image

URL_TIMEOUT_S = 30.0
URL_MAX_BYTES = 64_000_000
SHORTEST_BASE64 = 64
"""No image takes fewer characters; a path of this length that is base64 by chance does not decode to an image."""

# what Pillow raises for files that are damaged, none at all, or far larger unpacked than packed
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)


def read_images(value: Any, folder: str | None = None) -> list[Any]:
    """Decode a column's images: nothing, one, or a list of PIL images, arrays, paths, URLs, `{"bytes", "path"}`.

    Args:
        value: What the column holds.
        folder: Where paths may lie, see `inside`.

    Raises:
        ValueError: A value is no image, or lies elsewhere.
    """
    if value is None:
        return []
    values = value if isinstance(value, (list, tuple)) else [value]
    return [read_image(item, folder) for item in values if item is not None]


def read_image(value: Any, folder: str | None = None) -> Any:
    """Decode one image, turned upright as its EXIF data says; what is decoded already is left as it is.

    Args:
        value: A PIL image, an array, bytes, a path, a URL, base64, or a dict with one of the last five.
        folder: Where paths may lie, see `inside`.

    Raises:
        ValueError: It is none, can't be read, or lies elsewhere; says where it should come from.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path") or value.get("url")
        if value is None:
            raise ValueError("an image has neither bytes nor path; cast the column with datasets.Image() or load it")
    if isinstance(value, bytes):
        return _decode(io.BytesIO(value), "the image's bytes")
    if isinstance(value, str):
        return _read_text(value, folder)
    if isinstance(value, Path):
        return _open(value, f"{str(value)!r:.120}")
    if not is_valid_image(value):
        raise ValueError(
            f"{type(value).__name__} {value!r:.60} is no image; give PIL images, arrays, paths, or a dict with "
            "bytes or path"
        )
    return value


def inside(name: str, folder: str | None) -> Path:
    """The file that a row means.

    Args:
        name: A path as the row states it; a relative one starts in the folder.
        folder: The folder that no row may lead out of; None = the working directory. Links inside may lead anywhere.

    Raises:
        ValueError: It leads out of the folder; says how to allow that.
    """
    base = Path(folder or ".").absolute()
    path = Path(os.path.normpath(base / name))
    if not path.is_relative_to(os.path.normpath(base)):
        raise ValueError(
            f"the image {name!r:.120} lies outside of {base}, and paths in rows may not lead out of there; set "
            "image_folder to the folder that holds the images, '/' for any"
        )
    return path


def _read_text(text: str, folder: str | None) -> Any:
    shown = f"{text!r:.120}"
    if text.startswith(("http://", "https://")):
        return _decode(io.BytesIO(_fetch(text, shown)), shown)
    if text.startswith("data:image/"):
        return _decode(io.BytesIO(_of_base64(text.partition(",")[2]) or b""), shown)
    packed = _of_base64(text) if len(text) >= SHORTEST_BASE64 else None
    if packed is not None:
        try:
            return _decode(io.BytesIO(packed), shown)
        except ValueError:  # a long path, then
            pass
    return _open(inside(text, folder), shown)


def _of_base64(text: str) -> bytes | None:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        return None


def _open(path: Path, shown: str) -> Any:
    """Open a file; a device or a pipe might never end."""
    try:
        found = path.is_file()
    except (OSError, ValueError):  # a name longer than any file's, or with a null in it
        found = False
    if not found:
        raise ValueError(f"{shown} can't be read as an image: there is no such file ({path!s:.120})")
    return _decode(path, shown)


def _decode(source: Any, shown: str) -> Any:
    try:
        return ImageOps.exif_transpose(Image.open(source))
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{shown} can't be read as an image: {reason or type(error).__name__}") from error


def _fetch(url: str, shown: str) -> bytes:
    """What an address answers, within limits of time and size."""
    content = bytearray()
    deadline = time.monotonic() + URL_TIMEOUT_S
    try:
        with urllib.request.urlopen(url, timeout=URL_TIMEOUT_S) as answer:
            while part := answer.read1():
                content += part
                if len(content) > URL_MAX_BYTES or time.monotonic() > deadline:
                    limits = f"{URL_MAX_BYTES / 1e6:.0f} MB and {URL_TIMEOUT_S:.0f} s"
                    raise ValueError(f"it is not all there within {limits}")
    except (OSError, HTTPException, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{shown} can't be fetched: {reason or type(error).__name__}; download it") from error
    return bytes(content)
