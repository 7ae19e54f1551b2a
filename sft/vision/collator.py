"""Collator of rows with images, for vision-language models."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import ProcessorMixin

from sft.batches.collator import DataCollatorForSFT
from sft.chat.render import Rendered, TrainOn, asked_part
from sft.data.messages import IMAGE_COLUMNS
from sft.data.records import Kind, Layout, detect_layout, normalize
from sft.labels import IGNORE_INDEX
from sft.options import NotPrintedPolicy, ThinkingPolicy
from sft.tokens.columns import TOKEN_COLUMNS
from sft.tokens.encoding import Encoder
from sft.vision.chat import VisionRenderer, VisionRow, expand
from sft.vision.images import read_image
from sft.vision.places import column_images, place_images, placeholder

logger = logging.getLogger(__name__)

# Names of added tokens that are only used for images or around them: `<|vision_start|>`, `[IMG_END]`, `<row_1_col_2>`,
# `<fake_token_around_image>`, `<global-img>`, `<end_of_image>`.
_IMAGE_TOKEN = re.compile(r"image|img|vision|video|^<row_\d+_col_\d+>$", re.IGNORECASE)
_BUILT_HERE = ("input_ids", "attention_mask", "offset_mapping", "text_replacement_offsets")
"""Keys of a processor's output that the collator does not copy into the batch."""


class EncodedRows(NamedTuple):
    """Rows with images as tokens.

    Args:
        tokens: Rows with `input_ids`, `labels`, and the columns that the model needs besides.
        output: The processor's output for the rows that have images.
        crossings: Description of a token that crosses the border of what is trained, by the index of the row.
    """

    tokens: list[dict[str, Any]]
    output: dict[str, Any]
    crossings: dict[int, str]


class VisionEncoder:
    """Encode rows with images to token rows, whose labels leave out the tokens of images.

    Args:
        processor: Tokenizer and image processor.
    """

    def __init__(self, processor: ProcessorMixin) -> None:
        self.processor = processor

    def as_printed(self, rendered: Rendered) -> Rendered:
        """Write out the special tokens that the tokenizer would add to plain text, as chat templates do."""
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

    def encode(self, rows: Sequence[VisionRow]) -> EncodedRows:
        """Tokenize rows, label the trained characters, and let the processor preprocess the images."""
        with_images = [index for index, row in enumerate(rows) if row.images]
        output = self.process([rows[index] for index in with_images]) if with_images else {}
        texts = [row.rendered for row in rows]
        offsets = output.get("text_replacement_offsets") or [None] * len(with_images)
        for index, replacements in zip(with_images, offsets, strict=True):
            texts[index] = expand(texts[index], replacements or [])
        flat = self._encoder.encode_flat(texts)
        encoded: list[dict[str, Any]] = [dict(row) for row in flat.rows()]
        for at, index in enumerate(with_images):
            encoded[index] = self._use_processor_ids(rows[index], encoded[index], list(output["input_ids"][at]))
            for name in self.type_columns(output):
                encoded[index][name] = list(output[name][at])
        for row in encoded:
            row["labels"] = [IGNORE_INDEX if token in self.image_token_ids else token for token in row["labels"]]
        if "cross_attention_mask" in output and len(with_images) < len(rows):
            without = next(row.name for row in rows if not row.images)
            raise ValueError(
                f"row {without} has no image and others of its batch have some, which {type(self.processor).__name__} "
                "can't put together; sort the data so that the rows of a batch have images or have none"
            )
        return EncodedRows(encoded, output, flat.crossings)

    def process(self, rows: Sequence[VisionRow]) -> dict[str, Any]:
        """Run the processor on rows that have images, without padding.

        Rows without images are not among them, since processors expect images for every row.

        Raises:
            ValueError: The processor raised an error; the message names the rows.
        """
        try:
            output = self.processor(
                text=[row.rendered.text for row in rows],
                images=[row.images for row in rows],
                padding=False,
                truncation=False,
                add_special_tokens=False,  # the text has them already
                return_text_replacement_offsets=True,
                text_kwargs={"return_tensors": None},  # some processors would stack rows of different lengths
                images_kwargs={"return_tensors": "pt"},
            )
        except (ValueError, IndexError) as error:
            names = "; ".join(f"row {row.name} with {len(row.images)} images" for row in rows)
            raise ValueError(f"{type(self.processor).__name__} refused a batch: {error}. It has {names}") from error
        return dict(output)

    def _use_processor_ids(self, row: VisionRow, encoded: dict[str, Any], ids: list[int]) -> dict[str, Any]:
        """Return a token row that has the processor's ids: `encoded` if they are the same, else a new one.

        They differ if the processor does not report how it expands placeholders.

        Args:
            row: Row with images.
            encoded: Token row with labels, from the expanded text.
            ids: Token ids of the processor.

        Raises:
            ValueError: They differ, and only a part of the row is trained, whose tokens are then unknown.
        """
        if encoded["input_ids"] == ids:
            return encoded
        if row.train_on is not TrainOn.ALL:
            raise ValueError(
                f"row {row.name}: {type(self.processor).__name__} does not report how it expands images, so the "
                f"{row.train_on.value} part can't be found in its {len(ids)} tokens; train on all of them "
                "(completion_only_loss=False, assistant_only_loss=False)"
            )
        return {"input_ids": ids, "labels": list(ids)}

    def type_columns(self, output: Mapping[str, Any]) -> list[str]:
        """Return the columns with a number per token, other than the ids, such as `mm_token_type_ids`."""
        lengths = [len(ids) for ids in output.get("input_ids", ())]
        known = [name for name, value in output.items() if name not in _BUILT_HERE and is_per_token(value, lengths)]
        return list(dict.fromkeys([*known, *self._text_columns]))

    @cached_property
    def _text_columns(self) -> list[str]:
        """The same for rows without images, since some models need these columns in every training batch."""
        output = self.processor(text=["a"], padding=False, add_special_tokens=False)
        return [name for name in output if name not in _BUILT_HERE]

    @cached_property
    def image_token_ids(self) -> frozenset[int]:
        """Ids of all tokens that this family uses for images or around them."""
        added = self.processor.tokenizer.added_tokens_decoder
        named = {token_id for token_id, token in added.items() if _IMAGE_TOKEN.search(str(token))}
        own = {*getattr(self.processor, "image_token_ids", ()), getattr(self.processor, "image_token_id", None)}
        return frozenset(named | {token_id for token_id in own if token_id is not None})

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.processor.tokenizer)

    @cached_property
    def _added_bos(self) -> str | None:
        """The beginning-of-sequence token if the tokenizer adds it to plain text, else None."""
        tokenizer = self.processor.tokenizer
        ids = tokenizer("a").input_ids
        return tokenizer.bos_token if ids and ids[0] == tokenizer.bos_token_id else None

    def batch(
        self, tokens: Sequence[dict[str, Any]], output: Mapping[str, Any], pad_to_multiple_of: int | None = None
    ) -> dict[str, torch.Tensor]:
        """Pad token rows to a batch, with the processor's output for images as tensors.

        Args:
            tokens: Rows as `encode` returns them, or their beginnings.
            output: The processor's output for the rows that have images, in the order of the rows.
            pad_to_multiple_of: Pad to a multiple of this many tokens.
        """
        batch = DataCollatorForSFT(self._pad_token_id, pad_to_multiple_of=pad_to_multiple_of)(tokens)
        width = batch["input_ids"].shape[1]
        for name in self.type_columns(output):
            padded = [list(row.get(name, [])) for row in tokens]
            batch[name] = torch.tensor([values + [0] * (width - len(values)) for values in padded])
        return {**batch, **image_tensors(output, width)}

    @property
    def _pad_token_id(self) -> int:
        token_id = self.processor.tokenizer.pad_token_id
        if token_id is None:
            raise ValueError("the processor's tokenizer has no pad token; set processor.tokenizer.pad_token")
        return token_id


@dataclass
class DataCollatorForVisionLanguageModeling:
    """Collate rows with images into a batch.

    A row has `messages` (or another conversation that `sft.data.records` knows), `prompt` and `completion`, or
    text. In addition it may have `images` or `image`: PIL images, paths, or `{"bytes", "path"}`. The content of a
    message is a string, or a list of `{"type": "image"}` and `{"type": "text", "text": ...}` parts. Image parts may
    contain their image. Images without a place in the messages are put at the beginning of the first user message.

    1. Decode the images of each row and render its text, with one placeholder per image.
    2. Let the processor expand the placeholders and preprocess the images of the batch.
    3. Tokenize the expanded text, and label the trained characters.
    4. Truncate, and pad on the right.

    Padding, the tokens that a placeholder expands to, and the image tokens of the model's family are never trained.
    The options decide what else is trained, as for rows of text.

    Pass it to the trainer with `SFTConfig(remove_unused_columns=False, dataset_kwargs={"skip_prepare_dataset": True})`.

    Attributes:
        processor: Processor of `AutoProcessor`, with a tokenizer and an image processor.
        max_length: Most tokens of a row, image tokens included; longer text is truncated. None = no limit.
        completion_only_loss: Whether to train on completions only; None = yes, if rows have prompt and completion.
        pad_to_multiple_of: Pad to a multiple of this many tokens.
        dataset_text_field: Column of plain text, which must contain the placeholders.
        return_tensors: `pt`.
        assistant_only_loss: Whether to train on assistant turns only.
        last_turn_only_loss: Whether to train on the last assistant turn only.
        image_folder: Folder that relative paths in rows start in, and that no path may lead out of; None = the working
            directory, "/" = any folder.
        not_printed: What to do with a conversation that says more than the chat template prints: fail or warn. Rows
            are rendered when their batch is made, which is too late to drop one.
        thinking: What to do with the reasoning of the assistant: keep or last, for the same reason.
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
    not_printed: NotPrintedPolicy = "fail"
    thinking: ThinkingPolicy = "keep"

    def __post_init__(self) -> None:
        if not hasattr(self.processor, "tokenizer") or not hasattr(self.processor, "image_processor"):
            raise ValueError(
                f"processor is a {type(self.processor).__name__}, without tokenizer or image processor; give that of "
                "AutoProcessor.from_pretrained(...)"
            )
        if self.return_tensors != "pt":
            raise ValueError(f"return_tensors={self.return_tensors!r} is not supported; batches are PyTorch tensors")
        if self.not_printed == "drop":
            raise ValueError(
                "not_printed='drop' can't be applied to rows with images, which are rendered batch by batch; remove "
                "such rows from the data, or state fail or warn"
            )
        if self.thinking not in ("keep", "last"):
            raise ValueError(
                f"thinking={self.thinking!r} can't be applied to rows with images, which are rendered batch by batch "
                "with the processor's template; state keep or last, or change the data"
            )
        self._encoder = VisionEncoder(self.processor)
        self._renderers: dict[TrainOn, VisionRenderer] = {}
        self._has_warned = False

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate rows.

        Returns:
            `input_ids`, `labels` and `attention_mask`, each `(batch, longest)`; `loss_weights` `(batch, longest)` if a
            weight is not 1; and, if any row has images, the processor's output for them, in the order of the rows.

        Raises:
            ValueError: A row is invalid or does not fit the options; the message names it.
        """
        rows = [self.read(row, place) for place, row in enumerate(features)]
        encoded = self._encoder.encode(rows)
        tokens = [self._limit(row, token_row) for row, token_row in zip(rows, encoded.tokens, strict=True)]
        return self._encoder.batch(tokens, encoded.output, self.pad_to_multiple_of)

    def read(self, row: Mapping[str, Any], place: int = 0) -> VisionRow:
        """Decode the images of one row, render its text, and check that it has one placeholder per image.

        Args:
            row: Row of a data set.
            place: Position in the batch, which names the row in messages if it has no `id`.

        Raises:
            ValueError: The row is invalid or does not fit the options; the message names it.
        """
        name = row_name(row, place)
        given = {column: value for column, value in row.items() if value is not None and column not in IMAGE_COLUMNS}
        try:
            layout = self._layout(given)
            train_on = self._train_on(layout.kind)
            if layout.kind is Kind.TEXT:
                given = {"text": given[self.dataset_text_field]}
            record = normalize(given, layout, prune_nulls=True)
            read = partial(read_image, folder=self.image_folder)
            record, images = place_images(record, column_images(row, read), placeholder(self.processor), read)
        except ValueError as error:
            raise ValueError(f"row {name}: {error}") from error
        rendered = self._renderer(train_on).render({**record, "id": name})
        if rendered.not_printed and not self._has_warned:
            self._has_warned = True
            logger.warning("row %s and perhaps others: %s", name, rendered.not_printed)
        check_rendered(name, rendered, len(images), placeholder(self.processor))
        return VisionRow(name, self._encoder.as_printed(rendered), train_on, images)

    def _layout(self, given: Mapping[str, Any]) -> Layout:
        if self.dataset_text_field in given:
            return Layout(Kind.TEXT, ("text",))
        layout = detect_layout(given)
        if layout.kind is Kind.TOKENIZED:
            raise ValueError("input_ids can't be collated with images; give messages, or remove this collator")
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
            self._renderers[train_on] = VisionRenderer(self.processor, train_on, self.not_printed, self.thinking)
        return self._renderers[train_on]

    def _limit(self, row: VisionRow, tokens: dict[str, Any]) -> dict[str, Any]:
        """Truncate a row to `max_length`.

        Raises:
            ValueError: Image tokens would be cut off, and the model would be given images without tokens for them.
        """
        ids = tokens["input_ids"]
        if self.max_length is None or len(ids) <= self.max_length:
            return tokens
        last = max((place for place, token in enumerate(ids) if token in self._encoder.image_token_ids), default=-1)
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


@dataclass
class DataCollatorForImageRows:
    """Collate rows that were tokenized by a `VisionEncoder`, and read their images from files.

    Rows have `input_ids` and `labels`; those with images also have `text`, with one placeholder per image, and
    `images`, the names of their files.

    Attributes:
        processor: Processor with the tokenizer that the rows were tokenized with.
        folder: Folder of the images.
        dtype: Floating-point type of the images' tensors; None = that of the processor.
    """

    processor: ProcessorMixin
    folder: str
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        self._encoder = VisionEncoder(self.processor)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate rows; see `DataCollatorForVisionLanguageModeling` for the batch.

        Raises:
            ValueError: An image can't be read, or the processor gives other tokens than those of the row.
        """
        with_images = [place for place, row in enumerate(features) if row.get("images")]
        rows = [self.read(str(place), features[place]["text"], features[place]["images"]) for place in with_images]
        output = self._encoder.process(rows) if rows else {}
        tokens = [{name: row[name] for name in TOKEN_COLUMNS if row.get(name) is not None} for row in features]
        for at, place in enumerate(with_images):
            row, length = tokens[place], len(tokens[place]["input_ids"])
            if list(output["input_ids"][at])[:length] != list(row["input_ids"]):
                raise ValueError(
                    f"{type(self.processor).__name__} gives other tokens for {features[place]['text']!r:.80} with "
                    f"{features[place]['images']} than those that were packed; type: dvc repro pack"
                )
            for name in self._encoder.type_columns(output):
                row[name] = list(output[name][at])[:length]
        return self._cast(self._encoder.batch(tokens, output))

    def inputs(self, row: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Return the model's inputs for one row, without labels."""
        return {name: value for name, value in self([row]).items() if name not in ("labels", "loss_weights")}

    def prompt(self, text: str, images: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return the model's inputs for one text with images, such as a prompt to answer."""
        output = self._encoder.process([self.read(repr(text[:40]), text, images)])
        row = {"input_ids": list(output["input_ids"][0])}
        row |= {name: list(output[name][0]) for name in self._encoder.type_columns(output)}
        batch = self._cast(self._encoder.batch([row], output))
        del batch["labels"]
        return batch

    def read(self, name: str, text: str, images: Sequence[str]) -> VisionRow:
        """Return a row with its images decoded."""
        decoded = [read_image(Path(self.folder) / image) for image in images]
        return VisionRow(name, Rendered(text, []), TrainOn.ALL, decoded)

    def _cast(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self.dtype is None:
            return batch
        kept = ("loss_weights",)
        return {
            name: value.to(self.dtype) if value.is_floating_point() and name not in kept else value
            for name, value in batch.items()
        }


def check_rendered(name: str, rendered: Rendered, num_images: int, image_token: str) -> None:
    """Check that a rendered text has one placeholder per image.

    A template may print none, and plain text may contain any number.

    Raises:
        ValueError: The numbers differ; the message names the row.
    """
    found = rendered.text.count(image_token) if image_token else num_images
    if found != num_images:
        raise ValueError(
            f"row {name}: {found} placeholders {image_token!r} in its text, {num_images} images; write one for each "
            "image, or give messages with image parts and the chat template of the model"
        )


def is_per_token(value: Any, lengths: list[int]) -> bool:
    """Return whether a column of a processor's unpadded output has one number per token.

    Args:
        value: Column of the output.
        lengths: `(num_rows,)` tokens of each row.
    """
    return isinstance(value, list) and [len(row) if isinstance(row, list) else -1 for row in value] == lengths


def image_tensors(output: Mapping[str, Any], width: int) -> dict[str, torch.Tensor]:
    """Return a processor's output for images as tensors.

    Args:
        output: Unpadded output of the processor.
        width: Tokens of a padded row. A `cross_attention_mask` `(rows, length, ...)` is padded or cut to it.
    """
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


def row_name(row: Mapping[str, Any], place: int) -> str:
    """Return a name for a row in messages: its id, or its position in the batch and the beginning of its text."""
    if row.get("id") is not None:
        return str(row["id"])
    said = re.search(r"'(?:content|text|value)': '([^']+)'", repr({k: row[k] for k in row if k not in IMAGE_COLUMNS}))
    return f"{place} of the batch" + (f" ({said.group(1)[:40]!r})" if said else "")
