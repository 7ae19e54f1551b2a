"""Rows with images as text: what the chat template prints, where the images stand in it, and what is trained.

Templates of vision models differ in what they take: content as parts only (LLaVA, Idefics), as parts or text
(Qwen2-VL), or text only (a format such as ChatML put on the tokenizer). Probing shows which; messages are brought to
that form each time they are rendered, so that the search for assistant turns works as it does for text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import ProcessorMixin

from sft.chat.render import ChatRenderer, Rendered, Span, TrainOn
from sft.chat.template import PROBE_CHAT, ChatTemplate, chat_template_of, in_parts, prints_probe
from sft.data.messages import IMAGE_COLUMNS, is_messages
from sft.vision.images import read_images

_PART_KEYS = ("image", "image_url", "url", "path", "base64")


@dataclass(frozen=True)
class VisionTemplate(ChatTemplate):
    """A chat template that is given content in the form it takes.

    Args:
        image_token: Stands for an image where the template takes text only.
        takes_parts: Whether content may be a list of parts.
    """

    image_token: str = ""
    takes_parts: bool = True

    @classmethod
    def probe(cls, source: str, variables: Mapping[str, Any], image_token: str) -> VisionTemplate:
        """Find out what a template takes by rendering a question and an answer in both forms.

        Raises:
            ValueError: It prints neither.
        """
        plain = ChatTemplate(source, variables)
        takes_text, takes_parts = prints_probe(plain, PROBE_CHAT), prints_probe(plain, in_parts(PROBE_CHAT))
        if not (takes_text or takes_parts):
            raise ValueError(
                "the chat template prints a plain question and its answer neither as text nor as parts; set the "
                "processor's chat_template to the one that belongs to the model"
            )
        return cls(source, variables, takes_text, image_token, takes_parts)

    def _render(self, chats: Iterable[Any], tools: list[Any] | None, **options: bool) -> tuple[list[str], list[Any]]:
        adapted = [
            [{**message, "content": self._content(message.get("content"))} for message in chat] for chat in chats
        ]
        return super()._render(adapted, tools, **options)

    def _content(self, content: Any) -> Any:
        if is_messages(content) and not self.takes_parts:
            return "".join(self.image_token if part["type"] == "image" else part["text"] for part in content)
        return content


class VisionRenderer(ChatRenderer):
    """Renders records with a processor's chat template, else with its tokenizer's.

    Args:
        processor: Its template goes before the tokenizer's, as in its own `apply_chat_template`.
        train_on: What the spans cover.
    """

    def __init__(self, processor: ProcessorMixin, train_on: TrainOn) -> None:
        super().__init__(processor.tokenizer, train_on)
        self._processor = processor
        self._vision_templates: dict[tuple[bool, str], VisionTemplate] = {}

    def template(self, record: Mapping[str, Any]) -> VisionTemplate:
        """The template that a record uses; every one is probed once."""
        key = bool(record.get("tools")), record.get("chat_template_kwargs") or "{}"
        if key not in self._vision_templates:
            variables = {**self.tokenizer.special_tokens_map, **json.loads(key[1])}
            source = template_source(self._processor, has_tools=key[0])
            self._vision_templates[key] = VisionTemplate.probe(source, variables, placeholder(self._processor))
        return self._vision_templates[key]


def template_source(processor: ProcessorMixin, *, has_tools: bool = False) -> str:
    """Jinja source of the template that a processor uses.

    Raises:
        ValueError: Neither the processor nor its tokenizer has one.
    """
    own = getattr(processor, "chat_template", None)
    if isinstance(own, Mapping):
        own = own.get("tool_use" if has_tools and "tool_use" in own else "default")
    return own or chat_template_of(processor.tokenizer, [{}] if has_tools else None).source


def placeholder(processor: ProcessorMixin) -> str:
    """The text that stands for an image before the processor expands it; empty where the family has none."""
    return str(getattr(processor, "image_token", None) or "")


@dataclass(frozen=True)
class VisionRow:
    """One row as text and images.

    Args:
        name: What messages call the row.
        rendered: Its text, each image one placeholder, and the characters that are trained.
        train_on: What those were chosen by.
        images: Decoded, in the order of their placeholders.
    """

    name: str
    rendered: Rendered
    train_on: TrainOn
    images: list[Any] = field(default_factory=list)


def column_images(row: Mapping[str, Any], folder: str | None = None) -> list[Any]:
    """Decode the images of a row's columns.

    Args:
        row: As the data set has it.
        folder: Where paths may lie.

    Raises:
        ValueError: A value is no image, or lies elsewhere.
    """
    return [image for column in IMAGE_COLUMNS for image in read_images(row.get(column), folder)]


def take_images(
    messages: list[dict[str, Any]], folder: str | None = None
) -> tuple[list[dict[str, Any]], list[Any], int]:
    """Take images out of the parts of messages, leaving bare `{"type": "image"}` parts.

    Returns:
        The messages, the images found, decoded, and how many image parts there are.

    Raises:
        ValueError: A part is neither text nor image, or its image can't be read.
    """
    found: list[Any] = []
    num_parts = 0
    result = []
    for index, message in enumerate(messages):
        content = message["content"]
        if is_messages(content):
            parts = []
            for part in content:
                if part["type"] not in ("text", "image", "image_url"):
                    raise ValueError(
                        f"message {index} has a part of type {part['type']!r}; only text and image are read"
                    )
                is_image = part["type"] != "text"
                num_parts += is_image
                found += [_source_of(part)] if is_image and _source_of(part) is not None else []
                parts.append({"type": "image"} if is_image else {"type": "text", "text": part.get("text", "")})
            message = {**message, "content": parts}
        result.append(message)
    return result, read_images(found, folder), num_parts


def _source_of(part: Mapping[str, Any]) -> Any:
    """The image that a part brings with it, under any of the names in use."""
    return next((part[key] for key in _PART_KEYS if part.get(key) is not None), None)


def put_images_first(messages: list[dict[str, Any]], num_images: int) -> list[dict[str, Any]]:
    """Place images that no message mentions at the beginning of the first question, as templates do by convention.

    Raises:
        ValueError: No message is by the user.
    """
    first = next((index for index, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        raise ValueError(f"{num_images} images, and no user message to put them in")
    text = {"type": "text", "text": messages[first]["content"]}
    content = [*({"type": "image"} for _ in range(num_images)), text]
    return [*messages[:first], {**messages[first], "content": content}, *messages[first + 1 :]]


def expand(rendered: Rendered, replacements: list[Mapping[str, Any]]) -> Rendered:
    """The text that the processor tokenized, with the spans moved to it; what stands for an image is in none of them.

    Args:
        rendered: Text with one placeholder an image.
        replacements: What the processor put for each placeholder: `span` in the text, and its `replacement`.
    """
    pieces: list[str] = []
    spans: list[Span] = []
    last = moved = 0
    for item in [*replacements, {"span": (len(rendered.text),) * 2, "replacement": ""}]:
        start, end = item["span"]
        pieces += [rendered.text[last:start], item["replacement"]]
        for span in rendered.spans:
            first, stop = max(span.start, last), min(span.end, start)
            if first < stop:
                spans.append(Span(first + moved, stop + moved, span.weight))
        moved += len(item["replacement"]) - (end - start)
        last = end
    return Rendered("".join(pieces), sorted(spans))
