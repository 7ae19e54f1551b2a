"""Images of rows: found, checked, made smaller, and written once each, under the digest of their content."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sft.data.messages import IMAGE_COLUMNS, IMAGE_PARTS, RowError, is_messages, media_problems
from sft.untrusted.images import FORMATS, ImageError, check_image, open_image
from stages.checkout.artifacts import read_jsonl, write_json
from stages.checkout.paths import IMAGE_INDEX
from stages.params.schema import LoadSection

IMAGE_REASONS = ("image_places", "image_too_large", "image_unreadable")
"""Reasons of rows whose images can't be used."""

CHATS = ("messages", "prompt", "completion")


@dataclass(frozen=True)
class Home:
    """Where the relative paths of a row's images start.

    Args:
        folder: Folder of the row's data file; None if the row is not from a file in data/.
        limit: Folder that no path may lead out of: data/, whose changes DVC sees.
    """

    folder: Path | None
    limit: Path


class ImageStore:
    """Folder of the images of all rows.

    Args:
        folder: Folder to write to, which is created.
        section: The section `load` of params.yaml.
        model: Folder of the base model.
    """

    def __init__(self, folder: Path, section: LoadSection, model: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self._section = section.images
        self._is_streaming = section.streaming
        self._model = model
        self._placeholder: str | None = None
        self._refusal: str | None = None
        self._sizes: dict[str, tuple[int, int]] = {}

    def placed(self, record: dict[str, Any], columns: Mapping[str, Any], layout: Iterable[str], home: Home) -> Any:
        """Return a record whose images are names of files in the folder, one per place in its text.

        Args:
            record: The row as a record.
            columns: The row's columns, which may contain images besides those in its messages.
            layout: Columns that the record was made of, which are not columns of images.
            home: Where its images' paths start.

        Returns:
            The same record if the row has no images, else one with the key `images`.

        Raises:
            RowError: The base model reads text alone, an image can't be used, or the numbers of images and of their
                places differ.
        """
        given = {name: columns[name] for name in IMAGE_COLUMNS if name not in layout and columns.get(name)}
        messages = [message for name in CHATS if is_messages(record.get(name)) for message in record[name]]
        in_messages = [
            f"message {index}"
            for index, message in enumerate(messages)
            if is_messages(message["content"]) and any(part["type"] in IMAGE_PARTS for part in message["content"])
        ]
        if not given and not in_messages:
            return record
        where = f"the column {next(iter(given))} holds images" if given else f"{in_messages[0]} has an image"
        self._check_model(where)
        problems = media_problems(messages, with_images=True)
        if problems:
            raise RowError(*problems[0])
        from sft.vision.places import column_images, place_images

        read = partial(self._add, home=home)
        try:
            found = column_images(given, read)
            record, images = place_images(record, found, self._placeholder or "", read)
            self._check_text(record, len(images))
        except RowError:
            raise
        except ValueError as error:
            raise RowError("image_places", str(error)) from error
        return {**record, "images": images}

    def _check_model(self, where: str) -> None:
        """Load the base model's processor once, to know its placeholder; refuse the row if there is none.

        Raises:
            ValueError: Rows are streamed, so that no image is written to the disk.
        """
        if self._is_streaming:
            raise ValueError(
                f"params.yaml, load.streaming: {where}, and rows with images can't be streamed; state false"
            )
        if self._placeholder is None and self._refusal is None:
            from sft.models.checkpoint import CheckpointError, load_image_processor
            from sft.vision.places import placeholder

            try:
                self._placeholder = placeholder(load_image_processor(self._model))
            except CheckpointError as error:
                self._refusal = str(error)
        if self._refusal is not None:
            raise RowError("has_media", f"{where}, and {self._refusal}")

    def _check_text(self, record: Mapping[str, Any], num_images: int) -> None:
        """Check plain text, which has no parts, for one placeholder per image."""
        texts = [record[name] for name in ("text", "prompt", "completion") if isinstance(record.get(name), str)]
        found = sum(text.count(self._placeholder) for text in texts) if self._placeholder else num_images
        if texts and found != num_images:
            raise ValueError(
                f"its text has {found} placeholders {self._placeholder!r}, and there are {num_images} images; write "
                "one for each image"
            )

    def _add(self, value: Any, home: Home) -> str:
        """Write an image, unless it is there, and return the name of its file.

        Raises:
            RowError: It can't be found or read, or is too large.
        """
        try:
            content, shown = self._content(value, home)
            try:
                kind, width, height = check_image(content)
            except ImageError as error:
                raise ValueError(f"{shown} can't be read as an image: {error}") from error
        except RowError:
            raise
        except (ValueError, OSError, SyntaxError, EOFError) as error:
            raise RowError("image_unreadable", " ".join(str(error).split())[:300]) from error
        if max(width, height) > self._section.max_side:
            image, _ = open_image(io.BytesIO(content))
            image.thumbnail((self._section.max_side, self._section.max_side))
            content, kind, (width, height) = _as_png(image), "PNG", image.size
        name = f"{hashlib.sha256(content).hexdigest()}.{FORMATS[kind]}"
        if name not in self._sizes:
            (self._folder / name).write_bytes(content)
            self._sizes[name] = width, height
        return name

    def _content(self, value: Any, home: Home) -> tuple[bytes, str]:
        """Return the bytes of an image, as they are or as PNG, and what it is called in messages."""
        from sft.vision.images import find_image

        is_named = home.folder is not None
        folder = str(home.folder if is_named else home.limit)
        found = find_image(value, folder, str(home.limit), urls=self._section.urls)
        if isinstance(found.source, Path):
            if not is_named:
                raise ValueError(f"{found.shown} is a path, and this source is not a file in data/; copy both there")
            self._check_bytes(found.source.stat().st_size, found.shown)
            return found.source.read_bytes(), found.shown
        content = found.source if isinstance(found.source, bytes) else _as_png(found.source)
        self._check_bytes(len(content), found.shown)
        return content, found.shown

    def _check_bytes(self, num_bytes: int, shown: str) -> None:
        limit = self._section.max_megabytes
        if num_bytes > limit * 1e6:
            raise RowError(
                "image_too_large",
                f"{shown} has {num_bytes / 1e6:.1f} MB, more than load.images.max_megabytes {limit} allows",
            )

    def close(self, files: Iterable[Path]) -> None:
        """Delete the images of rows that were not written, and write the index of the others.

        Args:
            files: Files of the rows that were written.
        """
        used = {name for file in files for row in read_jsonl(file) for name in row.get("images", ())} & {*self._sizes}
        for name in self._sizes.keys() - used:
            (self._folder / name).unlink()
        index = []
        for name in sorted(used):
            width, height = self._sizes[name]
            num_bytes = (self._folder / name).stat().st_size
            index.append({"name": name, "width": width, "height": height, "bytes": num_bytes})
        write_json(self._folder / IMAGE_INDEX, index)


def digestible(value: Any) -> str:
    """Return a text for the digest of a value that JSON does not have, such as a decoded image."""
    if hasattr(value, "tobytes"):
        return hashlib.sha256(value.tobytes()).hexdigest()
    return str(value)


def _as_png(image: Any) -> bytes:
    from PIL import Image

    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    stream = io.BytesIO()
    picture.save(stream, format="PNG")
    return stream.getvalue()
