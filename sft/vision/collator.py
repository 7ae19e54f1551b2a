"""Rows with images in, one batch for a vision-language model out."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import ProcessorMixin

from sft.batches.collator import DataCollatorForSFT
from sft.chat.render import Rendered, TrainOn, asked_part
from sft.data.messages import IMAGE_COLUMNS
from sft.data.records import (
    Kind,
    Layout,
    detect_layout,
    normalize,
)
from sft.labels import IGNORE_INDEX
from sft.tokens.encoding import Encoder
from sft.vision.chat import VisionRenderer, VisionRow, column_images, expand, placeholder, put_images_first, take_images

logger = logging.getLogger(__name__)

# Names of added tokens that only ever stand for, or around, pictures: `<|vision_start|>`, `[IMG_END]`, `<row_1_col_2>`,
# `<fake_token_around_image>`, `<global-img>`, `<end_of_image>`.
_IMAGE_TOKEN = re.compile(r"image|img|vision|video|^<row_\d+_col_\d+>$", re.IGNORECASE)
_BUILT_HERE = ("input_ids", "attention_mask", "offset_mapping", "text_replacement_offsets")


@dataclass
class DataCollatorForVisionLanguageModeling:
    """Make a batch of rows with images: renders, runs the processor, masks.

    A row has `messages` (or another conversation that `sft.data.records` knows), `prompt` and `completion`, or
    text; and `images` or `image`: PIL images, paths, `{"bytes", "path"}`, or nothing. Content is text or a list of
    `{"type": "image"}` and `{"type": "text", "text": ...}` parts; image parts may bring their image. Images that no
    message mentions stand at the beginning of the first question.

    Never trained: padding (by place), whatever an image's placeholder expands to, and the family's image tokens.
    What else is trained depends on the options, as for rows of text.

    Give it with `SFTConfig(remove_unused_columns=False, dataset_kwargs={"skip_prepare_dataset": True})`.

    Attributes:
        processor: Of `AutoProcessor`: a tokenizer and an image processor.
        max_length: Longest row in tokens, image tokens included; text beyond it is cut off. None = no limit.
        completion_only_loss: Train on completions only; None = yes where rows have prompt and completion.
        pad_to_multiple_of: Padded length is a multiple of this.
        dataset_text_field: Column of plain text, which holds the placeholders itself.
        return_tensors: `pt`.
        assistant_only_loss: Train on assistant turns only.
        last_turn_only_loss: Train on the last assistant turn only.
        image_folder: Paths in rows start in this folder and may not lead out of it; None = the working directory, "/" =
            anywhere.
    """

    processor: ProcessorMixin
    max_length: int | None = None
    completion_only_loss: bool | None = None
    pad_to_multiple_of: int | None = None
    dataset_text_field: str = "text"
    return_tensors: str = "pt"
    assistant_only_loss: bool = False
    last_turn_only_loss: bool = False
    image_folder: str | None = None

    def __post_init__(self) -> None:
        if not hasattr(self.processor, "tokenizer") or not hasattr(self.processor, "image_processor"):
            raise ValueError(
                f"processor is a {type(self.processor).__name__}, without tokenizer or image processor; give that of "
                "AutoProcessor.from_pretrained(...)"
            )
        if self.return_tensors != "pt":
            raise ValueError(f"return_tensors={self.return_tensors!r} is not supported; batches are PyTorch tensors")
        self._renderers: dict[TrainOn, VisionRenderer] = {}

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate rows.

        Returns:
            `input_ids`, `labels`, `attention_mask`, each `(batch, longest)`; `loss_weights` when a weight is not 1; and
            what the processor made of the images, in the order of the rows. Nothing of images when no row has one.

        Raises:
            ValueError: A row does not fit; names it, what was found, and the way out.
        """
        rows = [self.read(row, place) for place, row in enumerate(features)]
        tokens, image_inputs = self._tokenize(rows)
        tokens = [self._limit(row, token_row) for row, token_row in zip(rows, tokens, strict=True)]
        pad = DataCollatorForSFT(self._pad_token_id, pad_to_multiple_of=self.pad_to_multiple_of)
        batch = pad(tokens)
        width = batch["input_ids"].shape[1]
        for name in self._type_columns(image_inputs):
            padded = [list(row.get(name, [])) for row in tokens]
            batch[name] = torch.tensor([values + [0] * (width - len(values)) for values in padded])
        return {**batch, **image_tensors(image_inputs, width)}

    def read(self, row: Mapping[str, Any], place: int = 0) -> VisionRow:
        """Decode the images of one row, render its text, and compare their numbers.

        Args:
            row: As the data set has it.
            place: Names the row where it has no `id`.

        Raises:
            ValueError: It does not fit; names the row.
        """
        name = row_name(row, place)
        given = {column: value for column, value in row.items() if value is not None and column not in IMAGE_COLUMNS}
        try:
            layout = self._layout(given)
            train_on = self._train_on(layout.kind)
            if layout.kind is Kind.TEXT:
                given = {"text": given[self.dataset_text_field]}
            record = normalize(given, layout, prune_nulls=True)
            images = column_images(row, self.image_folder)
            record, images = place_images(record, images, placeholder(self.processor), self.image_folder)
        except ValueError as error:
            raise ValueError(f"row {name}: {error}") from error
        rendered = self._renderer(train_on).render({**record, "id": name})
        self._check_rendered(name, rendered, images)
        return VisionRow(name, self._as_printed(rendered), train_on, images)

    def _layout(self, given: Mapping[str, Any]) -> Layout:
        if self.dataset_text_field in given:
            return Layout(Kind.TEXT, ("text",))
        layout = detect_layout(given)
        if layout.kind is Kind.TOKENIZED:
            raise ValueError("input_ids can't be collated with images; give messages, or leave this collator out")
        return layout

    def _train_on(self, kind: Kind) -> TrainOn:
        part = asked_part(self, has_completion=kind is Kind.PROMPT_COMPLETION)
        if part is None:
            raise ValueError(
                f"completion_only_loss=True needs columns prompt and completion, the row is {kind.value}; use "
                "assistant_only_loss=True for conversations"
            )
        return part

    def _renderer(self, train_on: TrainOn) -> VisionRenderer:
        if train_on not in self._renderers:
            self._renderers[train_on] = VisionRenderer(self.processor, train_on)
        return self._renderers[train_on]

    def _check_rendered(self, name: str, rendered: Rendered, images: list[Any]) -> None:
        """Refuse a text without one placeholder for each image: a template may print none, or plain text some."""
        token = placeholder(self.processor)
        found = rendered.text.count(token) if token else len(images)
        if found != len(images):
            raise ValueError(
                f"row {name}: {found} placeholders {token!r} in its text, {len(images)} images; write one for each "
                "image, or give messages with image parts and the chat template of the model"
            )

    def _as_printed(self, rendered: Rendered) -> Rendered:
        """Plain text with the special tokens that the tokenizer would add written out, as templates write them."""
        if not rendered.append_eos:
            return rendered
        bos, eos = (str(token or "") for token in (self._added_bos, self.processor.tokenizer.eos_token))
        before = bos if rendered.add_special_tokens else ""
        after = "" if rendered.text.endswith(eos) else eos
        spans = [
            span._replace(
                start=span.start + len(before) if span.start else 0,
                end=span.end + len(before) + (len(after) if span.end == len(rendered.text) else 0),
            )
            for span in rendered.spans
        ]
        return Rendered(before + rendered.text + after, spans)

    def _tokenize(self, rows: Sequence[VisionRow]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Token rows with labels, and what the processor made of the images."""
        with_images = [index for index, row in enumerate(rows) if row.images]
        output = self._process([rows[index] for index in with_images]) if with_images else {}
        texts = [row.rendered for row in rows]
        offsets = output.get("text_replacement_offsets") or [None] * len(with_images)
        for index, replacements in zip(with_images, offsets, strict=True):
            texts[index] = expand(texts[index], replacements or [])
        encoded: list[dict[str, Any]] = [dict(row) for row in self._encoder.encode(texts)]
        for at, index in enumerate(with_images):
            encoded[index] = self._settle(rows[index], encoded[index], list(output["input_ids"][at]))
            for name in self._type_columns(output):
                encoded[index][name] = list(output[name][at])
        for row in encoded:
            row["labels"] = [IGNORE_INDEX if token in self.image_token_ids else token for token in row["labels"]]
        if "cross_attention_mask" in output and len(with_images) < len(rows):
            without = next(row.name for row in rows if not row.images)
            raise ValueError(
                f"row {without} has no image and others of its batch have some, which {type(self.processor).__name__} "
                "can't put together; sort the data so that the rows of a batch have images or have none"
            )
        return encoded, output

    def _process(self, rows: Sequence[VisionRow]) -> dict[str, Any]:
        """Run the processor over rows that have images, unpadded: text-only rows would have to bring images too.

        Raises:
            ValueError: The processor refused them; names the rows.
        """
        try:
            output = self.processor(
                text=[row.rendered.text for row in rows],
                images=[row.images for row in rows],
                padding=False,
                truncation=False,
                add_special_tokens=False,  # the text has them already
                return_text_replacement_offsets=True,
                images_kwargs={"return_tensors": "pt"},
            )
        except (ValueError, IndexError) as error:
            names = "; ".join(f"row {row.name} with {len(row.images)} images" for row in rows)
            raise ValueError(f"{type(self.processor).__name__} refused a batch: {error}. It has {names}") from error
        return dict(output)

    def _settle(self, row: VisionRow, encoded: dict[str, Any], ids: list[int]) -> dict[str, Any]:
        """Make sure that the labelled tokens are those of the processor, which alone knows how it expands images.

        Raises:
            ValueError: They differ, so that spans can't be found in them.
        """
        if encoded["input_ids"] == ids:
            return encoded
        if row.train_on is not TrainOn.ALL:
            raise ValueError(
                f"row {row.name}: {type(self.processor).__name__} does not say what it expands images to, so the "
                f"{row.train_on.value} part can't be found in its {len(ids)} tokens; train on all of them "
                "(completion_only_loss=False, assistant_only_loss=False)"
            )
        return {"input_ids": ids, "labels": list(ids)}

    def _limit(self, row: VisionRow, tokens: dict[str, Any]) -> dict[str, Any]:
        """Cut a row to `max_length`.

        Raises:
            ValueError: Image tokens would be cut off: the model would get more images than places for them.
        """
        ids = tokens["input_ids"]
        if self.max_length is None or len(ids) <= self.max_length:
            return tokens
        last = max((place for place, token in enumerate(ids) if token in self.image_token_ids), default=-1)
        if last >= self.max_length:
            raise ValueError(
                f"row {row.name} has {len(ids)} tokens and image tokens up to number {last + 1}: max_length="
                f"{self.max_length} would cut into an image; raise it, or make the images smaller (size of the image "
                "processor)"
            )
        cut = {name: values[: self.max_length] for name, values in tokens.items()}
        left = "" if any(label != IGNORE_INDEX for label in cut["labels"]) else "; nothing of it is trained"
        logger.warning("row %s: cut from %d to max_length=%d tokens%s", row.name, len(ids), self.max_length, left)
        return cut

    def _type_columns(self, output: Mapping[str, Any]) -> list[str]:
        """Columns beside the ids that the processor gives for each token, such as `mm_token_type_ids`."""
        lengths = [len(ids) for ids in output.get("input_ids", ())]
        known = [name for name, value in output.items() if name not in _BUILT_HERE and is_per_token(value, lengths)]
        return list(dict.fromkeys([*known, *self._text_columns]))

    @cached_property
    def _text_columns(self) -> list[str]:
        """The same for rows without images: some models demand them of every training batch."""
        output = self.processor(text=["a"], padding=False, add_special_tokens=False)
        return [name for name in output if name not in _BUILT_HERE]

    @cached_property
    def image_token_ids(self) -> frozenset[int]:
        """Ids of all tokens that stand for, or around, images in this family."""
        added = self.processor.tokenizer.added_tokens_decoder
        named = {token_id for token_id, token in added.items() if _IMAGE_TOKEN.search(str(token))}
        own = {*getattr(self.processor, "image_token_ids", ()), getattr(self.processor, "image_token_id", None)}
        return frozenset(named | {token_id for token_id in own if token_id is not None})

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.processor.tokenizer)

    @cached_property
    def _added_bos(self) -> str | None:
        """The beginning-of-sequence token, where the tokenizer puts it before plain text."""
        tokenizer = self.processor.tokenizer
        ids = tokenizer("a").input_ids
        return tokenizer.bos_token if ids and ids[0] == tokenizer.bos_token_id else None

    @property
    def _pad_token_id(self) -> int:
        token_id = self.processor.tokenizer.pad_token_id
        if token_id is None:
            raise ValueError("the processor's tokenizer has no pad token; set processor.tokenizer.pad_token")
        return token_id


def place_images(
    record: dict[str, Any], images: list[Any], image_token: str, folder: str | None = None
) -> tuple[dict[str, Any], list[Any]]:
    """Bring the images of a record's columns and of its messages together, each with one place in the messages.

    Args:
        record: As `sft.data.records.normalize` returns it.
        images: Of the columns, decoded.
        image_token: A placeholder that texts may hold themselves.
        folder: Where paths in messages may lie.

    Returns:
        The record with bare image parts, and all of its images.

    Raises:
        ValueError: Places and images differ in number, or images come from both sides.
    """
    columns = [name for name in ("messages", "prompt", "completion") if isinstance(record.get(name), list)]
    if not columns:
        return record, images
    messages, inline, num_places = take_images([message for name in columns for message in record[name]], folder)
    if inline and images:
        raise ValueError(
            f"{len(images)} images in a column and {len(inline)} in its messages; give them in one of both"
        )
    images = images or inline
    num_places += sum(_texts(message).count(image_token) for message in messages if image_token)
    if images and not num_places:
        messages, num_places = put_images_first(messages, len(images)), len(images)
    if num_places != len(images):
        raise ValueError(
            f"its messages have {num_places} image placeholders, and there are {len(images)} images; give one image "
            "for each, in order (column images), or leave all placeholders out to have the images first"
        )
    counts = [len(record[name]) for name in columns]
    starts = [sum(counts[:index]) for index in range(len(counts))]
    split = {name: messages[start : start + count] for name, start, count in zip(columns, starts, counts, strict=True)}
    return {**record, **split}, images


def is_per_token(value: Any, lengths: list[int]) -> bool:
    """Whether a column of the processor's unpadded output has one number for each token of each row."""
    return isinstance(value, list) and [len(row) if isinstance(row, list) else -1 for row in value] == lengths


def image_tensors(output: Mapping[str, Any], width: int) -> dict[str, torch.Tensor]:
    """What a processor made of images, as tensors; a cross attention mask gets the batch's width."""
    lengths = [len(ids) for ids in output.get("input_ids", ())]
    tensors = {
        name: torch.as_tensor(value)
        for name, value in output.items()
        if name not in _BUILT_HERE and not is_per_token(value, lengths)
    }
    mask = tensors.get("cross_attention_mask")
    if mask is not None:
        filled = mask.new_zeros(mask.shape[0], width, *mask.shape[2:])
        shared = min(width, mask.shape[1])
        filled[:, :shared] = mask[:, :shared]
        tensors["cross_attention_mask"] = filled
    return tensors


def _texts(message: Mapping[str, Any]) -> str:
    """All text of a message."""
    content = message["content"]
    return content if isinstance(content, str) else "\n".join(part.get("text", "") for part in content)


def row_name(row: Mapping[str, Any], place: int) -> str:
    """What to call a row: its id, else its place and the beginning of what it says, by which it can be found."""
    if row.get("id") is not None:
        return str(row["id"])
    said = re.search(r"'(?:content|text|value)': '([^']+)'", repr({k: row[k] for k in row if k not in IMAGE_COLUMNS}))
    return f"{place} of the batch" + (f" ({said.group(1)[:40]!r})" if said else "")
