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
from collections.abc import Callable, Mapping
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

from transformers.image_utils import is_valid_image

from sft.untrusted.images import ImageError, open_image
from sft.web import open_url

URL_TIMEOUT_S = 30.0
URL_MAX_BYTES = 64_000_000
SHORTEST_BASE64 = 64
"""Shorter strings are never read as base64, since no image is so small.

A longer path may be valid base64 by chance, but does not decode to an image.
"""

Reader = Callable[[Any], Any]
"""Reads one image, as `read_image` does, or puts something else in its place, such as the name of a file."""


def read_images(value: Any, folder: str | None = None) -> list[Any]:
    """Decode the images of a column.

    Args:
        value: None, one image, or a list of images, in any form that `read_image` accepts.
        folder: Folder that paths must be in, see `inside`.

    Raises:
        ValueError: A value is not an image, or its path is outside the folder.
    """
    return read_each(value, partial(read_image, folder=folder))


def read_each(value: Any, read: Reader) -> list[Any]:
    """Return what a reader makes of the images of a column: None, one image, or a list of images."""
    if value is None:
        return []
    values = value if isinstance(value, (list, tuple)) else [value]
    return [read(item) for item in values if item is not None]


def read_image(value: Any, folder: str | None = None) -> Any:
    """Decode one image and rotate it by its EXIF orientation; a PIL image or array is returned unchanged.

    Args:
        value: PIL image, array, bytes, path, URL, base64, or a dict `{"bytes", "path", "url"}` with one of the latter.
        folder: Folder that paths must be in, see `inside`.

    Raises:
        ValueError: It is not an image, can't be read, or its path is outside the folder.
    """
    found = find_image(value, folder)
    if isinstance(found.source, (bytes, Path)):
        return _decode(io.BytesIO(found.source) if isinstance(found.source, bytes) else found.source, found.shown)
    return found.source


class FoundImage(NamedTuple):
    """An image that has not been decoded yet.

    Args:
        source: Its bytes, the path of a regular file, or an image that needs no decoding.
        shown: What it is called in messages.
    """

    source: Any
    shown: str


def find_image(value: Any, folder: str | None = None, limit: str | None = None, *, urls: bool = True) -> FoundImage:
    """Find one image without decoding it.

    Args:
        value: See `read_image`.
        folder: Folder that relative paths start in; None = the working directory.
        limit: Folder that paths must be in, see `inside`; None = `folder`.
        urls: Whether to download images of URLs.

    Raises:
        ValueError: It is not an image, there is no such file, its path is outside the folder, or it is a URL, and
            `urls` is False.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path") or value.get("url")
        if value is None:
            raise ValueError("an image has neither bytes nor path; cast the column with datasets.Image() or load it")
    if isinstance(value, bytes):
        return FoundImage(value, "the image's bytes")
    shown = f"{str(value)!r:.120}"
    if isinstance(value, str):
        return FoundImage(_find_text(value, folder, limit, shown, urls=urls), shown)
    if isinstance(value, Path):
        return FoundImage(_regular(value, shown), shown)
    if not is_valid_image(value):
        raise ValueError(
            f"{type(value).__name__} {value!r:.60} is not an image; give PIL images, arrays, paths, or a dict with "
            "bytes or path"
        )
    return FoundImage(value, f"a {type(value).__name__}")


def inside(name: str, folder: str | None, limit: str | None = None) -> Path:
    """Return the path of an image file, and check that it is inside the folder.

    Args:
        name: Path as in the row; a relative one starts in the folder.
        folder: Folder that relative paths start in; None = the working directory.
        limit: Folder that the path must be in; None = `folder`. Symbolic links in it may point anywhere.

    Raises:
        ValueError: The path leads out of the folder.
    """
    start = Path(folder or ".").absolute()
    base = Path(limit).absolute() if limit is not None else start
    path = Path(os.path.normpath(start / name))
    if not path.is_relative_to(os.path.normpath(base)):
        way_out = (
            "copy it there"
            if limit is not None
            else "set image_folder to the folder that contains the images, '/' for any"
        )
        raise ValueError(
            f"the image {name!r:.120} lies outside of {base}, and paths in rows may not lead out of there; {way_out}"
        )
    return path


def _find_text(text: str, folder: str | None, limit: str | None, shown: str, *, urls: bool) -> bytes | Path:
    """Find the image that a string means: a URL, a data URI, base64, or else a path in the folder."""
    if text.startswith(("http://", "https://")):
        if not urls:
            raise ValueError(f"{shown} is a URL, and images are not downloaded here; save it as a file")
        return _fetch(text, shown)
    if text.startswith("data:image/"):
        return _of_base64(text.partition(",")[2]) or b""
    packed = _of_base64(text) if len(text) >= SHORTEST_BASE64 else None
    if packed is not None:
        try:
            _decode(io.BytesIO(packed), shown)
        except ValueError:  # not an image, so it is a long path
            pass
        else:
            return packed
    return _regular(inside(text, folder, limit), shown)


def _of_base64(text: str) -> bytes | None:
    """Decode base64, white space allowed; None if it is not valid."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        return None


def _regular(path: Path, shown: str) -> Path:
    """Return the path of a regular file; devices and pipes are refused, since reading them might never end."""
    try:
        found = path.is_file()
    except (OSError, ValueError):  # the name is too long, or contains a null character
        found = False
    if not found:
        raise ValueError(f"{shown} can't be read as an image: there is no such file ({path!s:.120})")
    return path


def _decode(source: io.BytesIO | Path, shown: str) -> Any:
    try:
        return open_image(source)[0]
    except ImageError as error:
        raise ValueError(f"{shown} can't be read as an image: {error}") from error


def _fetch(url: str, shown: str) -> bytes:
    """Download a URL within `URL_TIMEOUT_S` and `URL_MAX_BYTES`."""
    content = bytearray()
    deadline = time.monotonic() + URL_TIMEOUT_S
    try:
        with open_url(url, URL_TIMEOUT_S) as answer:
            while part := answer.read1():
                content += part
                if len(content) > URL_MAX_BYTES or time.monotonic() > deadline:
                    limits = f"{URL_MAX_BYTES / 1e6:.0f} MB and {URL_TIMEOUT_S:.0f} s"
                    raise ValueError(f"it is not complete within {limits}")
    except (OSError, HTTPException, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{shown} can't be downloaded: {reason or type(error).__name__}; save it as a file") from error
    return bytes(content)
