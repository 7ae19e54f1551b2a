"""Collator of conversations, which renders and tokenizes them and trains the answer to the last prompt."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sft.chat.render import ChatRenderer, Rendered, Span, TrainOn
from sft.data.records import Kind, Layout, normalize
from sft.labels import IGNORE_INDEX
from sft.tokens.encoding import Encoder

DEFAULT_LENGTH = 1024

Example = Mapping[str, Any]


@dataclass
class DataCollatorForChatML:
    """Collate conversations to a batch that is padded on the left; the last answer is trained, with its terminator.

    A batch has `input_ids`, `labels` and `attention_mask`, each `(batch, longest)`, and the prompts alone as `prompts`
    and `prompt_attention_mask` `(batch, longest prompt)`. `loss_weights` are in it if a message has a weight.

    Give it to `SFTTrainer` with `dataset_kwargs={"skip_prepare_dataset": True}` and `remove_unused_columns=False`,
    since it reads the rows as they are.

    Attributes:
        tokenizer: With a chat template and a padding token.
        ignore_index: Label of tokens that are not trained.
        max_length: Longest row in tokens, truncated at the end; None = the smaller of 1024 and the tokenizer's limit.
        prompt_key: Column with a beginning of the rendered conversation, after which every answer is trained, instead
            of the last one alone; rows may lack it.
        messages_key: Column with the conversation, which ends with an answer.

    Raises:
        ValueError: The tokenizer has no padding token.
    """

    tokenizer: Any
    ignore_index: int = IGNORE_INDEX
    max_length: int | None = None
    prompt_key: str = "prompt"
    messages_key: str = "messages"
    _renderers: dict[TrainOn, ChatRenderer] = field(init=False, repr=False)
    _encoder: Encoder = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer does not have a pad token; set tokenizer.pad_token")
        if self.max_length is None:
            self.max_length = min(self.tokenizer.model_max_length, DEFAULT_LENGTH)
        parts = (TrainOn.LAST_ASSISTANT, TrainOn.ASSISTANT)
        self._renderers = {part: ChatRenderer(self.tokenizer, part) for part in parts}
        self._encoder = Encoder(self.tokenizer)

    def __call__(self, examples: Sequence[Example], return_tensors: str = "pt") -> dict[str, torch.Tensor]:
        """Collate examples.

        Raises:
            ValueError: An example can't be read, or does not end with an answer; the message names its position.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors={return_tensors!r} is not supported; batches are PyTorch tensors ('pt')")
        rows = [self._row(example, place) for place, example in enumerate(examples)]
        prompts = [row["input_ids"][: _prompt_length(row["labels"])] for row in rows]
        without = sum(len(prompt) == len(row["input_ids"]) for prompt, row in zip(prompts, rows, strict=True))
        if without:
            warnings.warn(
                f"{without} of {len(rows)} rows of this batch have no answer in their first {self.max_length} tokens, "
                "so that nothing of them is trained; raise max_length",
                stacklevel=2,
            )
        pad = self.tokenizer.pad_token_id
        batch = {
            "input_ids": _left_padded([row["input_ids"] for row in rows], pad),
            "attention_mask": _left_padded([[1] * len(row["input_ids"]) for row in rows], 0),
            "labels": _left_padded([self._labels(row) for row in rows], self.ignore_index),
            "prompts": _left_padded(prompts, pad),
            "prompt_attention_mask": _left_padded([[1] * len(prompt) for prompt in prompts], 0),
        }
        if any("loss_weights" in row for row in rows):
            weights = [row.get("loss_weights", [1.0] * len(row["input_ids"])) for row in rows]
            batch["loss_weights"] = _left_padded(weights, 0.0)
        return batch

    def _labels(self, row: dict[str, Any]) -> list[int]:
        return [self.ignore_index if label == IGNORE_INDEX else label for label in row["labels"]]

    def _row(self, example: Example, place: int) -> dict[str, Any]:
        """Return `input_ids` and `labels` of an example, truncated."""
        try:
            row = self._tokenized(example) if example.get("input_ids") is not None else self._rendered(example)
        except ValueError as error:
            raise ValueError(f"row {place} of the batch: {error}") from error
        return {name: values[: self.max_length] for name, values in row.items()}

    def _rendered(self, example: Example) -> dict[str, Any]:
        record, prompt = self._record(example), example.get(self.prompt_key)
        if prompt is None:
            rendered = self._renderers[TrainOn.LAST_ASSISTANT].render(record)
        else:
            rendered = _after_prompt(self._renderers[TrainOn.ASSISTANT].render(record), prompt, self.prompt_key)
        return dict(self._encoder.encode([rendered])[0])

    def _record(self, example: Example) -> dict[str, Any]:
        if example.get(self.messages_key) is None:
            raise ValueError(f"it has no {self.messages_key!r}, only {sorted(example)}; set messages_key")
        row = {**example, "messages": example[self.messages_key]}
        record = normalize(row, Layout(Kind.MESSAGES, ("messages",)), prune_nulls=True)
        last = record["messages"][-1]["role"]
        if last != "assistant":
            raise ValueError(f"its last message is by {last}; a conversation that ends with an answer is needed")
        return record

    def _tokenized(self, example: Example) -> dict[str, Any]:
        """Return the row of an example that has token ids already; the prompt before the answer is tokenized."""
        prompt = example.get(self.prompt_key)
        if prompt is None:
            last_turn = self._renderers[TrainOn.LAST_ASSISTANT].last_turn(self._record(example))
            prompt = last_turn.prompt if last_turn is not None else ""
        ids = list(example["input_ids"])
        before = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if ids[: len(before)] != before[: len(ids)]:
            raise ValueError(
                f"its input_ids do not begin with the tokens of its prompt {prompt[:60]!r}...; leave input_ids out, "
                "and the collator tokenizes prompt and answer together"
            )
        return {"input_ids": ids, "labels": [IGNORE_INDEX] * min(len(before), len(ids)) + ids[len(before) :]}


def _after_prompt(rendered: Rendered, prompt: str, key: str) -> Rendered:
    """Return a rendered conversation in which only the answers after a prompt are trained."""
    if not isinstance(prompt, str) or not rendered.text.startswith(prompt):
        raise ValueError(
            f"its {key!r} is not the beginning of its conversation: {prompt!r:.60} and {rendered.text[:60]!r}; leave "
            "it out to train what follows the last generation prompt"
        )
    spans = [Span(max(span.start, len(prompt)), span.end, span.weight) for span in rendered.spans]
    return Rendered(rendered.text, [span for span in spans if span.start < span.end])


def _prompt_length(labels: Sequence[int]) -> int:
    return next((place for place, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))


def _left_padded(rows: Sequence[Sequence[Any]], fill: Any) -> torch.Tensor:
    """Return `(batch, longest)` with the rows on the right."""
    width = max(len(row) for row in rows)
    return torch.tensor([[fill] * (width - len(row)) + list(row) for row in rows])
