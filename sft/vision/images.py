"""Decode the images of rows: from objects, bytes, base64, URLs, and files inside one folder.

Rows often come from other people, and a path in them could point to any file of the machine. A string is therefore read
as a path inside one folder, a URL, or the image itself in base64. A `pathlib.Path` may point anywhere, since only the
user's own code can make one.
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
"""Shorter strings are never read as base64, since no image is so small.

A longer path may be valid base64 by chance, but does not decode to an image.
"""

# what Pillow raises for files that are damaged, not images, or decompression bombs
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)


def read_images(value: Any, folder: str | None = None) -> list[Any]:
    """Decode the images of a column.

    Args:
        value: None, one image, or a list of images, in any form that `read_image` accepts.
        folder: Folder that paths must be in, see `inside`.

    Raises:
        ValueError: A value is not an image, or its path is outside the folder.
    """
    if value is None:
        return []
    values = value if isinstance(value, (list, tuple)) else [value]
    return [read_image(item, folder) for item in values if item is not None]


def read_image(value: Any, folder: str | None = None) -> Any:
    """Decode one image and rotate it by its EXIF orientation; a PIL image or array is returned unchanged.

    Args:
        value: PIL image, array, bytes, path, URL, base64, or a dict `{"bytes", "path", "url"}` with one of the latter.
        folder: Folder that paths must be in, see `inside`.

    Raises:
        ValueError: It is not an image, can't be read, or its path is outside the folder.
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
            f"{type(value).__name__} {value!r:.60} is not an image; give PIL images, arrays, paths, or a dict with "
            "bytes or path"
        )
    return value


def inside(name: str, folder: str | None) -> Path:
    """Return the path of an image file, and check that it is inside the folder.

    Args:
        name: Path as in the row; a relative one starts in the folder.
        folder: Folder that the path must be in; None = the working directory. Symbolic links in it may point anywhere.

    Raises:
        ValueError: The path leads out of the folder.
    """
    base = Path(folder or ".").absolute()
    path = Path(os.path.normpath(base / name))
    if not path.is_relative_to(os.path.normpath(base)):
        raise ValueError(
            f"the image {name!r:.120} lies outside of {base}, and paths in rows may not lead out of there; set "
            "image_folder to the folder that contains the images, '/' for any"
        )
    return path


def _read_text(text: str, folder: str | None) -> Any:
    """Decode the image that a string means: a URL, a data URI, base64, or else a path in the folder."""
    shown = f"{text!r:.120}"
    if text.startswith(("http://", "https://")):
        return _decode(io.BytesIO(_fetch(text, shown)), shown)
    if text.startswith("data:image/"):
        return _decode(io.BytesIO(_of_base64(text.partition(",")[2]) or b""), shown)
    packed = _of_base64(text) if len(text) >= SHORTEST_BASE64 else None
    if packed is not None:
        try:
            return _decode(io.BytesIO(packed), shown)
        except ValueError:  # not an image, so it is a long path
            pass
    return _open(inside(text, folder), shown)


def _of_base64(text: str) -> bytes | None:
    """Decode base64, white space allowed; None if it is not valid."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        return None


def _open(path: Path, shown: str) -> Any:
    """Decode a regular file; devices and pipes are refused, since reading them might never end."""
    try:
        found = path.is_file()
    except (OSError, ValueError):  # the name is too long, or contains a null character
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
    """Download a URL within `URL_TIMEOUT_S` and `URL_MAX_BYTES`."""
    content = bytearray()
    deadline = time.monotonic() + URL_TIMEOUT_S
    try:
        with urllib.request.urlopen(url, timeout=URL_TIMEOUT_S) as answer:
            while part := answer.read1():
                content += part
                if len(content) > URL_MAX_BYTES or time.monotonic() > deadline:
                    limits = f"{URL_MAX_BYTES / 1e6:.0f} MB and {URL_TIMEOUT_S:.0f} s"
                    raise ValueError(f"it is not complete within {limits}")
    except (OSError, HTTPException, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{shown} can't be downloaded: {reason or type(error).__name__}; save it as a file") from error
    return bytes(content)
