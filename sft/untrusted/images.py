"""Images: which formats are opened, how large they may be, and a trial in a child process.

Pillow opens dozens of formats, some of which start programs or raise errors of any class, so that only those in
`FORMATS` are opened. The pipeline decodes each image once in the child when rows are loaded; what passes is decoded
again where it is needed, since sending the pixels through a pipe would take longer than decoding them.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageOps, UnidentifiedImageError

from sft.untrusted.child import Child, ChildError, problem

FORMATS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}
"""Formats that are read, as Pillow names them, with the endings of their files."""

MAX_PIXELS = 178_956_970
"""Most pixels of an image: where Pillow suspects a decompression bomb."""

MAX_BYTES = 2 << 30
"""Memory in bytes that decoding an image may need."""

SECONDS = 30.0
"""Time limit for decoding an image."""

_child = Child(MAX_BYTES)


class ImageError(ValueError):
    """An image that can't be read; the message says why."""


class Checked(NamedTuple):
    """Format of an image, as Pillow names it, and its size in pixels after its rotation by its EXIF orientation."""

    format: str
    width: int
    height: int


def check_image(content: bytes) -> Checked:
    """Decode an image in the child process.

    Raises:
        ImageError: It is not an image of one of the `FORMATS`, damaged, too large, or takes too long.
    """
    try:
        return Checked(*_child.call(_decoded, content, seconds=SECONDS))
    except ChildError as error:
        raise ImageError(problem(error, "decoding it")) from None


def _decoded(content: bytes) -> tuple[str, int, int]:
    """Decode an image in the child."""
    image, kind = open_image(io.BytesIO(content))
    return kind, *image.size


def open_image(source: io.BytesIO | Path) -> tuple[Any, str]:
    """Decode an image and rotate it by its EXIF orientation.

    Returns:
        The image, and its format.

    Raises:
        ImageError: See `check_image`.
    """
    try:
        with Image.open(source, formats=tuple(FORMATS)) as image:
            # a photo with a second picture for depth or preview is a JPEG file, too
            kind = "JPEG" if image.format == "MPO" else str(image.format)
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ImageError(f"it has {width} x {height} pixels, more than {MAX_PIXELS}")
            image.load()
            return ImageOps.exif_transpose(image), kind
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"it is damaged, or not one of {', '.join(FORMATS)}") from None
    except (Exception, MemoryError) as error:  # decoders raise errors of any class for damaged files
        reason = " ".join(str(error).split())[:200]
        raise ImageError(reason or type(error).__name__) from error
