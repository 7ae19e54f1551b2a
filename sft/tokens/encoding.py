"""Encoding of rendered text to token ids and labels, with one tokenizer call per batch.

A token is trained if the characters that it covers overlap a trained span. The tokens that overlap a span are
contiguous, so two look-ups find all of them, without a Python object per token. With byte-level tokenizers, positions
follow from the lengths of tokens (`sft.tokens.byte_level`), with others from the tokenizer's character offsets.

A token may cross the border of a span, with a part in the prompt and a part in the answer. It is trained, but at
inference the prompt ends at the border and is tokenized differently there, so the model never sees the tokens that it
was trained on. Such tokens are reported (`Crossing`); the usual cause is a generation prompt that ends in a space.
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
from sft.untrusted.tokenizer_files import PANIC

_SHOWN = 16
"""Characters shown on each side of a border."""

# Text with the kinds of whitespace that tokenizers exclude from offsets if they trim them.
_TRIM_PROBE = "a b\n\nc  d"


class Encoded(TypedDict):
    """One tokenized document; labels are not shifted: `labels[i] == input_ids[i]` if token i is trained."""

    input_ids: list[int]
    labels: list[int]
    loss_weights: NotRequired[list[float]]


class Document(NamedTuple):
    """Token ids of one document, the runs of its trained tokens, and the first token across a span's border."""

    ids: Ids
    runs: list[Run]
    crossing: Crossing | None = None


class TokenBatch(NamedTuple):
    """Tokenized documents, one after another.

    Args:
        lengths: `(num_documents,)` number of tokens in each document, int64.
        input_ids: `(num_tokens,)` int32.
        labels: `(num_tokens,)` int32, the id if a token is trained, else `IGNORE_INDEX`.
        loss_weights: `(num_tokens,)` float32; None if every trained token has weight 1.
        crossings: Description of the first token that crosses the border of a span, by the index of the document.
    """

    lengths: npt.NDArray[np.int64]
    input_ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    loss_weights: npt.NDArray[np.float32] | None
    crossings: dict[int, str]

    def columns(self) -> dict[str, np.ndarray[Any, Any]]:
        """Return the values of the token columns by name."""
        columns: dict[str, np.ndarray[Any, Any]] = {"input_ids": self.input_ids, "labels": self.labels}
        return columns if self.loss_weights is None else {**columns, "loss_weights": self.loss_weights}

    def table(self) -> pa.Table:
        """Return an Arrow table with one row per document."""
        borders = np.concatenate([[0], np.cumsum(self.lengths)])
        return pa.table({name: list_array(borders, column) for name, column in self.columns().items()})

    def rows(self) -> list[Encoded]:
        """Return one row per document, with lists."""
        ends = np.cumsum(self.lengths)
        borders = zip((ends - self.lengths).tolist(), ends.tolist(), strict=True)
        values = {name: column.tolist() for name, column in self.columns().items()}
        return [cast(Encoded, {name: column[start:end] for name, column in values.items()}) for start, end in borders]


class Encoder:
    """Encode batches with one tokenizer, of which it makes a copy.

    Args:
        tokenizer: A fast tokenizer.

    Raises:
        ValueError: The tokenizer is not a fast one, and so gives no character offsets.
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
        """Encode a batch to arrays, which take less time and memory than lists; see `encode_batch`."""
        if with_weights is None:
            with_weights = any(span.weight != 1.0 for item in rendered for span in item.spans)
        documents = [
            self._closed(item, document) if item.append_eos else document
            for item, document in zip(rendered, self._tokenized(rendered), strict=True)
        ]
        crossings = {
            number: describe(crossing, item.text, int(document.ids[crossing.token]), self._rules)
            for number, (item, document) in enumerate(zip(rendered, documents, strict=True))
            if (crossing := document.crossing) is not None
        }
        return _flatten(documents, crossings, with_weights)

    def _tokenized(self, rendered: Sequence[Rendered]) -> list[Document]:
        try:
            return self._tokenize(rendered)
        except BaseException as error:
            if type(error).__name__ != PANIC:
                raise
            raise ValueError(
                f"the tokenizer ends in an error of its own code ({error!s:.200}) at one of {len(rendered)} texts that "
                f"begin with {rendered[0].text!r:.80}; its tokenizer.json may be damaged: copy the model's again"
            ) from None

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
        """Append the end-of-sequence token to a document; it is trained if the end of the text is."""
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
    """Create a document from the tokenizer's character offsets."""
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
        with_weights: Whether rows have `loss_weights`; None adds them if some weight of this batch is not 1.

    Returns:
        One row per record. Tokens that the tokenizer itself adds before (or after) the text are trained if a span
        begins (or ends) with the text.

    Raises:
        ValueError: The tokenizer gives no character offsets, or has no end-of-sequence token to append.
    """
    return Encoder(tokenizer).encode(rendered, with_weights=with_weights)


def token_run(encoding: Encoding, span: Span, num_characters: int) -> tuple[int, int]:
    """Return the first token that overlaps a span, and the token after the last one that does.

    Args:
        encoding: Tokens of the full text.
        span: Characters of the text.
        num_characters: Length of the text.
    """
    if span.start >= span.end:
        return 0, 0
    first = 0 if span.start == 0 else encoding.char_to_token(span.start)
    last = len(encoding) - 1 if span.end == num_characters else encoding.char_to_token(span.end - 1)
    if first is None or last is None:
        return _run_by_offsets(encoding, span)
    # several tokens may cover one character, each with some of its bytes
    while last + 1 < len(encoding) and _overlaps(encoding.token_to_chars(last + 1), span):
        last += 1
    return first, last + 1


def _overlaps(covered: tuple[int, int] | None, span: Span) -> bool:
    return covered is not None and covered[0] < min(covered[1], span.end) and covered[1] > span.start


def _run_by_offsets(encoding: Encoding, span: Span) -> tuple[int, int]:
    """Do the same for a text with characters that are in no token, for example since a normalizer removed them."""
    inside = [index for index, covered in enumerate(encoding.offsets) if _overlaps(covered, span)]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)


def crossing_of(encoding: Encoding, span: Span, first: int, stop: int) -> Crossing | None:
    """Return the token that crosses the start or the end of a span; None if no token does.

    Args:
        encoding: Tokens of the full text.
        span: The trained characters.
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
    """Describe a crossing, with the text around it.

    Args:
        crossing: The token and the border.
        text: The document.
        token_id: The token's id.
        rules: The tokenizer.
    """
    at = crossing.border
    before, after = text[max(0, at - _SHOWN) : at], text[at : at + _SHOWN]
    token = rules.decode([token_id], skip_special_tokens=False)
    return f"the token {token!r} lies across the border of what is trained: {before!r} | {after!r}"


def _plain_rules(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Return a copy of a tokenizer's rules without truncation, padding and trimmed offsets.

    Some byte-level tokenizers exclude whitespace from the offsets of their tokens, so that the token of a line break
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
