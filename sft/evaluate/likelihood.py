"""Loss, perplexity and token accuracy of a causal model, and its divergence from another model, in one pass.

The figures are weighted by tokens and do not depend on batch size, packing or padding. `DocumentScores` collects the
same sums per document, which intervals and paired tests need.

The divergence KL(reference || model) is computed over the reference's `NUM_KEPT` most likely tokens and one class for
all other tokens, so that 0.5 kB per token are kept instead of the logits of the complete vocabulary. By the data
processing inequality it is a lower bound of the divergence over the vocabulary. The two are equal if the model
distributes the remaining probability over the other tokens as the reference does.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from sft.evaluate.prefix_cache import SharedPrefix, forward_parameters, share_prefix
from sft.inner_model import on_model
from sft.labels import IGNORE_INDEX

Collate = Callable[[Sequence[Mapping[str, Any]]], Mapping[str, torch.Tensor]]
"""Makes a batch of rows."""

Progress = Callable[[int, int, str], None]
"""Called with (done, total, text)."""

NUM_KEPT = 64
"""Number of most likely tokens per position that a divergence distinguishes."""


@dataclass(frozen=True)
class Document:
    """One document, truncated after its last supervised token; `index` is its position in the input.

    A document with images also has its `row`.
    """

    index: int
    input_ids: list[int]
    labels: list[int]
    row: Mapping[str, Any] | None = None

    @property
    def supervised(self) -> list[int]:
        """Positions that have a label and at least one token before them."""
        return [p for p, label in enumerate(self.labels) if label != IGNORE_INDEX and p > 0]


@torch.inference_mode()
def evaluate_model(
    model: nn.Module,
    rows: Sequence[Mapping[str, Any]],
    tokens_per_batch: int = 2048,
    on_progress: Progress | None = None,
    on_predictions: Callable[[Document, list[int]], None] | None = None,
    on_logits: Callable[[Sequence[Document], torch.Tensor, torch.Tensor], None] | None = None,
    collate_images: Collate | None = None,
) -> dict[str, float]:
    """Compute loss, perplexity and token accuracy of a causal model on supervised tokens.

    Packed rows are split into their documents, so that the figures do not depend on the packing or on the attention
    that packed rows need. Documents of similar length share a padded batch. The prefix that all documents share is
    computed once, and the head runs only on positions that have a label.

    Args:
        model: Causal language model, with or without an adapter.
        rows: Dicts with `input_ids` and `labels`, both `(length,)`. `labels[i]` belongs to `input_ids[i]` and is
            `IGNORE_INDEX` for tokens that are not trained. Packed rows also have `seq_lengths`, the lengths of their
            documents.
        tokens_per_batch: Largest number of tokens of a padded batch, which contains at least one document.
        on_progress: Called with (documents done, number of documents, text).
        on_predictions: Called with each document and the most likely token at each of its supervised positions.
        on_logits: Called with the documents of a batch, their logits `(num_supervised, vocabulary)` in the same order,
            and the targets `(num_supervised,)`.
        collate_images: Makes a batch of rows that have `images`, with `input_ids`, `labels` and the images' tensors.

    Returns:
        `loss` (mean negative log-likelihood in nats per supervised token), `perplexity`, `token_accuracy`,
        `num_tokens`.

    Raises:
        ValueError: No row has a supervised token, or rows have images and `collate_images` is missing.
    """
    documents = list(split_documents(rows))
    if collate_images is None and any(document.row is not None for document in documents):
        raise ValueError("rows have images, and evaluate_model is given no collate_images, which reads them")
    if not documents:
        raise ValueError(f"none of the {len(rows)} rows has a token with a label: nothing can be evaluated")
    training = model.training
    model.eval()
    losses, hits, num_tokens, done = 0.0, 0, 0, 0
    try:
        texts = [document for document in documents if document.row is None]
        pictures = [document for document in documents if document.row is not None]
        limit = min(map(_first_supervised, texts), default=1) - 1
        prefix = share_prefix(model, [document.input_ids for document in texts], limit)
        batches = itertools.chain(
            _batches(texts, tokens_per_batch, prefix.length), _batches(pictures, tokens_per_batch, 0)
        )
        for batch in batches:
            if batch[0].row is not None and collate_images is not None:
                logits, targets = _logits_with_images(model, batch, collate_images)
            else:
                logits, targets = _supervised_logits(model, batch, prefix)
            losses += float(cross_entropy(logits, targets, reduction="sum"))
            predicted = logits.argmax(-1)
            hits += int((predicted == targets).sum())
            num_tokens += targets.numel()
            done += len(batch)
            if on_logits is not None:
                on_logits(batch, logits, targets)
            if on_predictions is not None:
                counts = [len(document.supervised) for document in batch]
                for document, tokens in zip(batch, predicted.split(counts), strict=True):
                    on_predictions(document, tokens.tolist())
            if on_progress is not None:
                on_progress(done, len(documents), "documents evaluated")
    finally:
        model.train(training)
    loss = losses / num_tokens
    # exp overflows past 709 nats, which a broken model can reach.
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return {"loss": loss, "perplexity": perplexity, "token_accuracy": hits / num_tokens, "num_tokens": num_tokens}


def split_documents(rows: Sequence[Mapping[str, Any]]) -> Iterator[Document]:
    """Split packed rows into documents.

    Documents without a supervised token are skipped, and tokens after the last supervised one are cut off.

    Raises:
        ValueError: The `seq_lengths` of a row do not add up to its length.
    """
    index = 0
    for number, row in enumerate(rows):
        input_ids, labels = list(row["input_ids"]), list(row["labels"])
        lengths = list(row.get("seq_lengths") or [len(input_ids)])
        if sum(lengths) != len(input_ids) or len(labels) != len(input_ids):
            raise ValueError(
                f"row {number}: {len(input_ids)} ids, {len(labels)} labels, but seq_lengths add up to {sum(lengths)}"
            )
        start = 0
        for length in lengths:
            piece = slice(start, start + length)
            start += length
            supervised = Document(index, input_ids[piece], labels[piece]).supervised
            if supervised:
                last = supervised[-1] + 1
                with_images = row if row.get("images") else None
                yield Document(index, input_ids[piece][:last], labels[piece][:last], with_images)
                index += 1


def _batches(documents: Sequence[Document], tokens_per_batch: int, num_shared: int) -> Iterator[list[Document]]:
    batch: list[Document] = []
    for document in sorted(documents, key=_length, reverse=True):
        # Longest first: the first document of a batch sets its padded width.
        if batch and (_length(batch[0]) - num_shared) * (len(batch) + 1) > tokens_per_batch:
            yield batch
            batch = []
        batch.append(document)
    if batch:
        yield batch


def _length(document: Document) -> int:
    return len(document.input_ids)


def _first_supervised(document: Document) -> int:
    return document.supervised[0]


# Not `sft.loss.supervised.supervised_logits`, which runs complete rows without a cache: here the rows continue the
# cached keys and values of a shared prefix, with an attention mask and position ids that include it.
def _supervised_logits(
    model: nn.Module, batch: Sequence[Document], prefix: SharedPrefix
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float32 logits `(num_supervised, vocabulary)` and targets `(num_supervised,)` of a padded batch."""
    device = next(model.parameters()).device
    input_ids, mask, targets = (tensor.to(device) for tensor in _pad(batch, prefix.length))
    positions = (targets != IGNORE_INDEX).any(0).nonzero().squeeze(1)
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": prefix.mask(mask), "use_cache": False}
    parameters = forward_parameters(model)
    if prefix.length:
        inputs |= {"past_key_values": prefix.rows(len(batch)), "use_cache": True}
        inputs["position_ids"] = torch.arange(prefix.length, prefix.length + input_ids.shape[1], device=device)[None]
    if "logits_to_keep" in parameters:
        logits = model(**inputs, logits_to_keep=positions).logits
    else:
        logits = model(**inputs).logits[:, positions]
    targets = targets[:, positions]
    supervised = targets != IGNORE_INDEX
    return logits[supervised].float(), targets[supervised]


def _logits_with_images(
    model: nn.Module, batch: Sequence[Document], collate: Collate
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same as `_supervised_logits` for documents with images."""
    inputs = dict(collate([document.row for document in batch if document.row is not None]))
    inputs.pop("loss_weights", None)
    labels = inputs.pop("labels")
    device = next(model.parameters()).device
    logits = model(**on_model(inputs, model, device), use_cache=False).logits[:, :-1]
    targets = labels[:, 1:].to(device)
    supervised = targets != IGNORE_INDEX
    return logits[supervised].float(), targets[supervised]


def _pad(batch: Sequence[Document], num_shared: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return input ids, attention mask and next-token targets, each `(batch, longest)`, after the shared prefix."""
    width = _length(batch[0]) - num_shared
    input_ids = torch.zeros(len(batch), width, dtype=torch.long)
    mask, targets = torch.zeros_like(input_ids), torch.full_like(input_ids, IGNORE_INDEX)
    for row, document in enumerate(batch):
        length = _length(document) - num_shared
        input_ids[row, :length] = torch.tensor(document.input_ids[num_shared:])
        mask[row, :length] = 1
        # Position p predicts token p + 1.
        targets[row, : length - 1] = torch.tensor(document.labels[num_shared + 1 :])
    return input_ids, mask, targets


@dataclass(frozen=True)
class Kept:
    """Most likely tokens at the supervised positions of a document.

    Args:
        tokens: Their ids, `(num_supervised, NUM_KEPT)`.
        logits: Their logits, of the same shape.
        rest: Log-sum-exp of the logits of all other tokens, `(num_supervised,)`.
    """

    tokens: torch.Tensor
    logits: torch.Tensor
    rest: torch.Tensor


@dataclass
class DocumentScores:
    """Sums of loss, correct tokens and divergence per document; pass `add` to `evaluate_model` as `on_logits`.

    Args:
        reference: `kept` of another model after the same rows. If None, no divergence is computed.
        keep: Whether to keep this model's most likely tokens in `kept`, as the reference for other models.
    """

    reference: dict[int, Kept] | None = None
    keep: bool = False
    kept: dict[int, Kept] = field(default_factory=dict)
    _sums: dict[int, dict[str, float]] = field(default_factory=dict)

    def add(self, documents: Sequence[Document], logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Add the sums of a batch.

        Args:
            documents: Documents of the batch.
            logits: Logits of all documents in order, `(num_supervised, vocabulary)`.
            targets: `(num_supervised,)`.
        """
        counts = [len(document.supervised) for document in documents]
        losses = cross_entropy(logits, targets, reduction="none").double().split(counts)
        hits = (logits.argmax(-1) == targets).split(counts)
        for document, scores, loss, hit in zip(documents, logits.split(counts), losses, hits, strict=True):
            sums = {"num_tokens": float(len(loss)), "loss": float(loss.sum()), "token_accuracy": float(hit.sum())}
            if self.reference is not None:
                sums["kl"] = float(divergence(self.reference[document.index], scores).sum())
            if self.keep:
                self.kept[document.index] = keep_likeliest(scores)
            self._sums[document.index] = sums

    def column(self, name: str) -> list[float]:
        """Return one number per document, in order: `num_tokens`, or the sum of a figure over its tokens."""
        return [self._sums[index][name] for index in sorted(self._sums)]


def keep_likeliest(logits: torch.Tensor) -> Kept:
    """Return the part of logits `(num_supervised, vocabulary)` that a divergence needs, on the CPU."""
    values, tokens = logits.topk(min(NUM_KEPT, logits.shape[-1]), dim=-1)
    return Kept(tokens.to("cpu", torch.int32), values.cpu(), _rest(logits, tokens).cpu())


def divergence(reference: Kept, logits: torch.Tensor) -> torch.Tensor:
    """Return KL(reference || model) in nats at each position, `(num_supervised,)`, in float64.

    Args:
        reference: Most likely tokens of the other model.
        logits: Logits of this model, `(num_supervised, vocabulary)`.

    Raises:
        ValueError: The reference has a different number of positions.
    """
    tokens = reference.tokens.to(logits.device, torch.long)
    if len(tokens) != len(logits):
        raise ValueError(f"a divergence needs the same positions of both models, got {len(tokens)} and {len(logits)}")
    ours = _log_probabilities(logits.gather(-1, tokens).cpu(), _rest(logits, tokens).cpu())
    theirs = _log_probabilities(reference.logits, reference.rest)
    # If the reference has probability 0, 0 * log 0 counts as 0.
    parts = torch.where(theirs.isneginf(), 0.0, theirs.exp() * (theirs - ours))
    return parts.sum(-1)


def _rest(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the log-sum-exp of all logits but those of some tokens.

    It is summed directly, since 1 minus the probability of the tokens would be mostly rounding error.
    """
    return logits.scatter(-1, tokens, -torch.inf).logsumexp(-1)


def _log_probabilities(logits: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    return torch.cat([logits.double(), rest.double()[:, None]], dim=-1).log_softmax(-1)
