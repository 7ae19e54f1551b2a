"""Render rows with images as text: the chat template's output, the images' placeholders, and the trained characters.

Chat templates of vision models differ in the content that they accept: a list of parts only (LLaVA, Idefics), parts or
a string (Qwen2-VL), or a string only (a format such as ChatML that was set on the tokenizer). Each template is probed
once. Messages are converted to the accepted form whenever they are rendered, so that assistant turns are found in the
same way as in rows of text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import ProcessorMixin

from sft.chat.render import ChatRenderer, Rendered, Span, TrainOn
from sft.chat.template import PROBE_CHAT, ChatTemplate, chat_template_of, in_parts, prints_probe
from sft.data.messages import is_messages
from sft.options import NotPrintedPolicy, ThinkingPolicy
from sft.vision.places import placeholder


@dataclass(frozen=True)
class VisionTemplate(ChatTemplate):
    """Chat template that converts the content of messages to the form that it accepts.

    Args:
        image_token: Placeholder of an image in the text, if the template accepts strings only.
        takes_parts: Whether content may be a list of parts.
    """

    image_token: str = ""
    takes_parts: bool = True

    @classmethod
    def probe(cls, source: str, variables: Mapping[str, Any], image_token: str) -> VisionTemplate:
        """Find out which content a template accepts, by rendering a question and an answer in both forms.

        Args:
            source: Jinja source.
            variables: Variables of the template, such as the special tokens.
            image_token: See the class.

        Raises:
            ValueError: The template prints neither form.
        """
        plain = ChatTemplate(source, variables)
        takes_text, takes_parts = prints_probe(plain, PROBE_CHAT), prints_probe(plain, in_parts(PROBE_CHAT))
        if not (takes_text or takes_parts):
            raise ValueError(
                "the chat template prints a plain question and its answer neither as text nor as parts; set the "
                "processor's chat_template to the one that belongs to the model"
            )
        return cls(source, variables, takes_text, image_token=image_token, takes_parts=takes_parts)

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
    """Renderer of records that uses a processor's chat template, or its tokenizer's if the processor has none.

    Args:
        processor: Tokenizer and image processor; the order of templates is that of its `apply_chat_template`.
        train_on: The part of a row that the spans cover.
        not_printed: See `ChatRenderer`.
        thinking: See `ChatRenderer`.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        train_on: TrainOn,
        not_printed: NotPrintedPolicy = "fail",
        thinking: ThinkingPolicy = "keep",
    ) -> None:
        super().__init__(processor.tokenizer, train_on, not_printed, thinking)
        self._processor = processor

    def _plain_template(self, record: Mapping[str, Any]) -> VisionTemplate:
        variables = {**self.tokenizer.special_tokens_map, **json.loads(record.get("chat_template_kwargs") or "{}")}
        source = template_source(self._processor, has_tools=bool(record.get("tools")))
        return VisionTemplate.probe(source, variables, placeholder(self._processor))


def template_source(processor: ProcessorMixin, *, has_tools: bool = False) -> str:
    """Return the Jinja source of the template that a processor uses.

    Args:
        processor: Tokenizer and image processor.
        has_tools: Whether to prefer a template named `tool_use`.

    Raises:
        ValueError: Neither the processor nor its tokenizer has a template.
    """
    own = getattr(processor, "chat_template", None)
    if isinstance(own, Mapping):
        own = own.get("tool_use" if has_tools and "tool_use" in own else "default")
    return own or chat_template_of(processor.tokenizer, [{}] if has_tools else None).source


@dataclass(frozen=True)
class VisionRow:
    """One row as text and images.

    Args:
        name: Name of the row in error messages.
        rendered: Text with one placeholder per image, and the spans of characters that are trained.
        train_on: The part of the row that the spans cover.
        images: Decoded images, in the order of their placeholders.
    """

    name: str
    rendered: Rendered
    train_on: TrainOn
    images: list[Any] = field(default_factory=list)


def expand(rendered: Rendered, replacements: list[Mapping[str, Any]]) -> Rendered:
    """Return the text after the processor expanded its placeholders, with the spans moved accordingly.

    Spans never cover the replacement of a placeholder; one that contained it is split in two.

    Args:
        rendered: Text with one placeholder per image.
        replacements: The processor's replacement of each placeholder: its `span` (start, end) in the text, and the
            `replacement`.
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
