"""Places of images in the messages of rows, and the images that belong to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sft.data.messages import IMAGE_COLUMNS, IMAGE_PARTS, is_messages
from sft.vision.images import Reader, read_each

if TYPE_CHECKING:
    from transformers import ProcessorMixin

_PART_KEYS = ("image", "image_url", "url", "path", "base64")
"""Keys that contain the image of a part."""


WRITTEN_PLACE = "<image>"
"""Place of an image in the text of data sets for LLaVA and many others."""


def placeholder(processor: ProcessorMixin) -> str:
    """Return the placeholder of an image in the text, before the processor expands it; empty if it has none."""
    return str(getattr(processor, "image_token", None) or "")


def column_images(row: Mapping[str, Any], read: Reader) -> list[Any]:
    """Read the images in the image columns of a row.

    Args:
        row: Row of a data set.
        read: Called with each image.
    """
    return [image for column in IMAGE_COLUMNS for image in read_each(row.get(column), read)]


def take_images(messages: list[dict[str, Any]], read: Reader) -> tuple[list[dict[str, Any]], list[Any], int]:
    """Read the images in the parts of messages, and replace these parts by `{"type": "image"}`.

    Args:
        messages: With a string or a list of parts as content.
        read: Called with each image.

    Returns:
        The new messages, what `read` returned, and the number of image parts (with or without an image).

    Raises:
        ValueError: A part is neither text nor image.
    """
    found: list[Any] = []
    num_parts = 0
    result = []
    for index, message in enumerate(messages):
        content = message["content"]
        if is_messages(content):
            parts = []
            for part in content:
                if part["type"] not in ("text", *IMAGE_PARTS):
                    raise ValueError(
                        f"message {index} has a part of type {part['type']!r}; only text and image are read"
                    )
                is_image = part["type"] != "text"
                num_parts += is_image
                found += [_source_of(part)] if is_image and _source_of(part) is not None else []
                parts.append({"type": "image"} if is_image else {"type": "text", "text": part.get("text", "")})
            message = {**message, "content": parts}
        result.append(message)
    return result, read_each(found, read), num_parts


def _source_of(part: Mapping[str, Any]) -> Any:
    """Return the image of a part, under any of its usual keys, or None if it has none."""
    return next((part[key] for key in _PART_KEYS if part.get(key) is not None), None)


def put_images_first(messages: list[dict[str, Any]], num_images: int) -> list[dict[str, Any]]:
    """Put images that have no place in the messages at the beginning of the first user message.

    Raises:
        ValueError: There is no user message.
    """
    first = next((index for index, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        raise ValueError(f"{num_images} images, and no user message to put them in")
    text = {"type": "text", "text": messages[first]["content"]}
    content = [*({"type": "image"} for _ in range(num_images)), text]
    return [*messages[:first], {**messages[first], "content": content}, *messages[first + 1 :]]


def place_images(
    record: dict[str, Any], images: list[Any], image_token: str, read: Reader
) -> tuple[dict[str, Any], list[Any]]:
    """Match the images of a record with the places for images in its messages, one each.

    Args:
        record: Result of `sft.data.records.normalize`.
        images: Images of the image columns, as `read` returned them.
        image_token: Placeholder that the text of messages may contain; empty if the family has none.
        read: Called with each image in messages.

    Returns:
        The record, whose image parts are now `{"type": "image"}`, and all of its images.

    Raises:
        ValueError: The numbers of places and of images differ, or both columns and messages contain images.
    """
    columns = [name for name in ("messages", "prompt", "completion") if isinstance(record.get(name), list)]
    if not columns:
        return record, images
    messages, inline, num_places = take_images([message for name in columns for message in record[name]], read)
    if inline and images:
        raise ValueError(
            f"{len(images)} images in a column and {len(inline)} in its messages; give them in one of the two"
        )
    images = images or inline
    num_places += sum(_texts(message).count(image_token) for message in messages if image_token)
    if images and not num_places:
        messages, num_places = read_written_places(messages)
    if images and not num_places:
        messages, num_places = put_images_first(messages, len(images)), len(images)
    if num_places != len(images):
        raise ValueError(
            f"its messages have {num_places} image placeholders, and there are {len(images)} images; give one image "
            "for each, in order (column images), or remove all placeholders to put the images first"
        )
    counts = [len(record[name]) for name in columns]
    starts = [sum(counts[:index]) for index in range(len(counts))]
    split = {name: messages[start : start + count] for name, start, count in zip(columns, starts, counts, strict=True)}
    return {**record, **split}, images


def read_written_places(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """Replace `<image>` in the text of messages, which many data sets write whatever the model is, by image parts.

    A line break next to it is removed, since the template decides how images and text are separated.

    Args:
        messages: With a string or a list of text parts as content.

    Returns:
        The new messages, and how many parts they have.
    """
    result, num_places = [], 0
    for message in messages:
        text = _texts(message)
        if WRITTEN_PLACE in text:
            parts: list[dict[str, Any]] = []
            pieces = text.split(WRITTEN_PLACE)
            for number, piece in enumerate(pieces):
                parts += [{"type": "image"}] if number else []
                piece = piece.removeprefix("\n") if number else piece
                piece = piece.removesuffix("\n") if number + 1 < len(pieces) else piece
                parts += [{"type": "text", "text": piece}] if piece else []
            num_places += len(pieces) - 1
            message = {**message, "content": parts}
        result.append(message)
    return result, num_places


def _texts(message: Mapping[str, Any]) -> str:
    """Return the text of a message, its parts joined by line breaks."""
    content = message["content"]
    return content if isinstance(content, str) else "\n".join(part.get("text", "") for part in content)
