"""Rendered text to token ids and labels, in one tokenizer call for a whole batch.

A token is trained when the characters it covers overlap a trained span. The tokens that overlap a span are neighbours:
two look-ups give all of them, without a Python object for every token. Where a tokenizer's tokens are the text's bytes,
their lengths tell where they lie (`sft.tokens.byte_level`); elsewhere the tokenizer's own offset table does.

Tokens that lie across a border of what is trained: half in the prompt, half in the answer.

Such a token is trained, and with it the end of the prompt. When the model generates, its prompt ends at the border, in
other tokens than those it was trained behind. A template whose generation prompt ends in a space is the usual cause.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple, NotRequired, TypedDict, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from sft.chat.render import Rendered, Span
from sft.labels import IGNORE_INDEX
from sft.tokens.byte_level import Crossing, Ids, Run, TokenBytes, WordCache
from sft.tokens.columns import list_array

_SHOWN = 16

# Whitespace of every kind that tokenizers report as covering no characters when they trim offsets.
_TRIM_PROBE = "a b\n\nc  d"


class Encoded(TypedDict):
    """One document as tokens; labels are not shifted: `labels[i] == input_ids[i]` where token i is trained."""

    input_ids: list[int]
    labels: list[int]
    loss_weights: NotRequired[list[float]]


class Document(NamedTuple):
    """Token ids of one document, which of its tokens are trained, and one that lies across the border of those."""

    ids: Ids
    runs: list[Run]
    crossing: Crossing | None = None


class TokenBatch(NamedTuple):
    """Documents as tokens, one after another.

    Args:
        lengths: `(num_documents,)` tokens of each, int64.
        input_ids: `(num_tokens,)` int32.
        labels: `(num_tokens,)` int32, the id where a token is trained.
        loss_weights: `(num_tokens,)` float32; None where every trained token weighs 1.
        crossings: Document -> what is wrong where one of its tokens lies across the border of what is trained.
    """

    lengths: npt.NDArray[np.int64]
    input_ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    loss_weights: npt.NDArray[np.float32] | None
    crossings: dict[int, str]

    def columns(self) -> dict[str, np.ndarray[Any, Any]]:
        """The values of every token column by its name."""
        columns: dict[str, np.ndarray[Any, Any]] = {"input_ids": self.input_ids, "labels": self.labels}
        return columns if self.loss_weights is None else {**columns, "loss_weights": self.loss_weights}

    def table(self) -> pa.Table:
        """One row a document, as an Arrow table."""
        borders = np.concatenate([[0], np.cumsum(self.lengths)])
        return pa.table({name: list_array(borders, column) for name, column in self.columns().items()})

    def rows(self) -> list[Encoded]:
        """One row a document, as lists."""
        ends = np.cumsum(self.lengths)
        borders = zip((ends - self.lengths).tolist(), ends.tolist(), strict=True)
        values = {name: column.tolist() for name, column in self.columns().items()}
        return [cast(Encoded, {name: column[start:end] for name, column in values.items()}) for start, end in borders]


class Encoder:
    """Encodes batches with one tokenizer; makes a copy of the tokenizer's rules once.

    Args:
        tokenizer: A fast tokenizer.

    Raises:
        ValueError: The tokenizer gives no character offsets.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise ValueError(
                f"tokenizer {tokenizer.name_or_path!r} ({type(tokenizer).__name__}) gives no character offsets, which "
                "masking needs; convert it to a fast tokenizer (a tokenizer.json)"
            )
        self._rules = _plain_rules(tokenizer)
        self._bytes = TokenBytes.of(self._rules)
        self._words = None if self._bytes is None else WordCache.of(self._rules)
        self._eos = tokenizer.eos_token_id

    def encode(self, rendered: Sequence[Rendered], *, with_weights: bool | None = None) -> list[Encoded]:
        """Encode a batch; see `encode_batch`."""
        return self.encode_flat(rendered, with_weights=with_weights).rows()

    def encode_flat(self, rendered: Sequence[Rendered], *, with_weights: bool | None = None) -> TokenBatch:
        """Encode a batch into arrays, which takes less time and memory than lists; see `encode_batch`."""
        if with_weights is None:
            with_weights = any(span.weight != 1.0 for item in rendered for span in item.spans)
        documents = [
            self._closed(item, document) if item.append_eos else document
            for item, document in zip(rendered, self._tokenize(rendered), strict=True)
        ]
        crossings = {
            number: describe(crossing, item.text, int(document.ids[crossing.token]), self._rules)
            for number, (item, document) in enumerate(zip(rendered, documents, strict=True))
            if (crossing := document.crossing) is not None
        }
        return _flatten(documents, crossings, with_weights)

    def _tokenize(self, rendered: Sequence[Rendered]) -> list[Document]:
        documents: dict[int, Document] = {}
        if self._bytes is not None:
            chosen = [index for index, item in enumerate(rendered) if self._bytes.covers(item)]
            texts = [rendered[index].text for index in chosen]
            ids = self._ids(texts)
            found, crossings = self._bytes.runs([rendered[index] for index in chosen], ids)
            documents = {
                index: Document(tokens, runs, crossings.get(number))
                for number, (index, tokens, runs) in enumerate(zip(chosen, ids, found, strict=True))
                if runs is not None
            }
        for flag in (False, True):
            left = [i for i, item in enumerate(rendered) if i not in documents and item.add_special_tokens is flag]
            texts = [rendered[index].text for index in left]
            for index, encoding in zip(left, self._rules.encode_batch(texts, add_special_tokens=flag), strict=True):
                documents[index] = _document(encoding, rendered[index])
        return [documents[index] for index in range(len(rendered))]

    def _ids(self, texts: list[str]) -> list[Ids]:
        if self._words is not None:
            return self._words.encode(texts)
        encodings = self._rules.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def _closed(self, item: Rendered, document: Document) -> Document:
        """The document with the end-of-sequence token behind it; it is trained when the text's end is."""
        ids, runs, crossing = document
        if self._eos is None:
            raise ValueError("the tokenizer has no end-of-sequence token to close a text with; set its eos_token")
        if not len(ids) or ids[-1] != self._eos:
            ids = np.append(ids, np.int32(self._eos))
        if item.spans and item.spans[-1].end == len(item.text):
            first, _, weight = runs[-1]
            runs = [*runs[:-1], (first, len(ids), weight)]
        return Document(ids, runs, crossing)


def _document(encoding: Encoding, item: Rendered) -> Document:
    """A text by its tokenizer's table of offsets."""
    runs: list[Run] = [(*token_run(encoding, span, len(item.text)), span.weight) for span in item.spans]
    crossings = (crossing_of(encoding, span, *run[:2]) for span, run in zip(item.spans, runs, strict=True))
    first = next((crossing for crossing in crossings if crossing is not None), None)
    return Document(np.array(encoding.ids, dtype=np.int32), runs, first)


def _flatten(documents: Sequence[Document], crossings: dict[int, str], with_weights: bool) -> TokenBatch:
    lengths = np.array([len(document.ids) for document in documents], dtype=np.int64)
    total = int(lengths.sum())
    ids = np.concatenate([np.zeros(0, dtype=np.int32), *(document.ids for document in documents)])
    labels = np.full(total, IGNORE_INDEX, dtype=np.int32)
    weights = np.zeros(total, dtype=np.float32) if with_weights else None
    for start, document in zip((np.cumsum(lengths) - lengths).tolist(), documents, strict=True):
        for first, last, weight in document.runs:
            labels[start + first : start + last] = ids[start + first : start + last]
            if weights is not None:
                weights[start + first : start + last] = weight
    return TokenBatch(lengths, ids, labels, weights, crossings)


def encode_batch(
    rendered: Sequence[Rendered], tokenizer: PreTrainedTokenizerBase, *, with_weights: bool | None = None
) -> list[Encoded]:
    """Tokenize rendered records and label their trained tokens; `Encoder` does the same for many batches.

    Args:
        rendered: Texts with trained character spans.
        tokenizer: A fast tokenizer.
        with_weights: Whether rows carry `loss_weights`; None: when some weight of this batch is not 1.

    Returns:
        One row a record. Tokens that the tokenizer itself puts before (or after) the text are trained when a span
        begins (or ends) with the text.

    Raises:
        ValueError: The tokenizer gives no offsets, or has no end-of-sequence token where one is appended.
    """
    return Encoder(tokenizer).encode(rendered, with_weights=with_weights)


def token_run(encoding: Encoding, span: Span, num_characters: int) -> tuple[int, int]:
    """First token that overlaps a span, and the token after the last one that does.

    Args:
        encoding: Tokens of the whole text.
        span: Characters of the text.
        num_characters: Length of the text.
    """
    if span.start >= span.end:
        return 0, 0
    first = 0 if span.start == 0 else encoding.char_to_token(span.start)
    last = len(encoding) - 1 if span.end == num_characters else encoding.char_to_token(span.end - 1)
    if first is None or last is None:
        return _run_by_offsets(encoding, span)
    # several tokens may cover one character: a byte-level tokenizer spells it out in bytes
    while last + 1 < len(encoding) and _overlaps(encoding.token_to_chars(last + 1), span):
        last += 1
    return first, last + 1


def _overlaps(covered: tuple[int, int] | None, span: Span) -> bool:
    return covered is not None and covered[0] < min(covered[1], span.end) and covered[1] > span.start


def _run_by_offsets(encoding: Encoding, span: Span) -> tuple[int, int]:
    """The same for a text of which some characters belong to no token, as after a normalizer that removes them."""
    inside = [index for index, covered in enumerate(encoding.offsets) if _overlaps(covered, span)]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)


def crossing_of(encoding: Encoding, span: Span, first: int, stop: int) -> Crossing | None:
    """The token across the start or the end of a span; None when tokens begin and end with it.

    Args:
        encoding: Tokens of the whole text.
        span: Characters that are trained.
        first: First token of the span.
        stop: The token after its last one.
    """
    if first >= stop:
        return None
    begin, end = encoding.token_to_chars(first), encoding.token_to_chars(stop - 1)
    if begin is not None and begin[0] < span.start < begin[1]:
        return Crossing(first, span.start)
    if end is not None and end[0] < span.end < end[1]:
        return Crossing(stop - 1, span.end)
    return None


def describe(crossing: Crossing, text: str, token_id: int, rules: Tokenizer) -> str:
    """What is wrong, in a sentence that shows the place.

    Args:
        crossing: The token and the border.
        text: The document.
        token_id: The token's id.
        rules: The tokenizer.
    """
    at = crossing.border
    before, behind = text[max(0, at - _SHOWN) : at], text[at : at + _SHOWN]
    token = rules.decode([token_id], skip_special_tokens=False)
    return f"the token {token!r} lies across the border of what is trained: {before!r} | {behind!r}"


def _plain_rules(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A copy of a tokenizer's rules without truncation, padding, and trimmed offsets.

    Some byte-level tokenizers report offsets without the whitespace that their tokens cover, so that a line break
    seems to cover nothing and would never be trained.
    """
    rules = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    rules.no_truncation()
    rules.no_padding()
    offsets = rules.encode(_TRIM_PROBE, add_special_tokens=False).offsets
    if sum(end - start for start, end in offsets) >= len(_TRIM_PROBE):
        return rules
    state = json.loads(rules.to_str())
    _keep_whitespace(state.get("post_processor"))
    return Tokenizer.from_str(json.dumps(state))


def _keep_whitespace(post_processor: dict | None) -> None:
    for part in (post_processor or {}).get("processors", [post_processor or {}]):
        if "trim_offsets" in part:
            part["trim_offsets"] = False
