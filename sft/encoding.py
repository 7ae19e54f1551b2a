"""Rendered text to token ids and labels, in one tokenizer call for a whole batch.

A token is trained when the characters it covers overlap a trained span. The tokens that overlap a span are neighbours:
two look-ups in the tokenizer's own offset table give all of them, without a Python object for every token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NotRequired, TypedDict

from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from sft.chat import Rendered, Span
from sft.labels import IGNORE_INDEX

# Whitespace of every kind that tokenizers report as covering no characters when they trim offsets.
_TRIM_PROBE = "a b\n\nc  d"


class Encoded(TypedDict):
    """One document as tokens; labels are not shifted: `labels[i] == input_ids[i]` where token i is trained."""

    input_ids: list[int]
    labels: list[int]
    loss_weights: NotRequired[list[float]]


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
        self._eos = tokenizer.eos_token_id

    def encode(self, rendered: Sequence[Rendered], *, with_weights: bool | None = None) -> list[Encoded]:
        """Encode a batch; see `encode_batch`."""
        if with_weights is None:
            with_weights = any(span.weight != 1.0 for item in rendered for span in item.spans)
        encodings: dict[int, Encoding] = {}
        for flag in (False, True):
            chosen = [index for index, item in enumerate(rendered) if item.add_special_tokens is flag]
            texts = [rendered[index].text for index in chosen]
            if texts:
                batch = self._rules.encode_batch(texts, add_special_tokens=flag)
                encodings.update(zip(chosen, batch, strict=True))
        return [self._encoded(item, encodings[index], with_weights) for index, item in enumerate(rendered)]

    def _encoded(self, item: Rendered, encoding: Encoding, with_weights: bool) -> Encoded:
        ids = encoding.ids
        runs = [(*token_run(encoding, span, len(item.text)), span.weight) for span in item.spans]
        if item.append_eos:
            if self._eos is None:
                raise ValueError("the tokenizer has no end-of-sequence token to close a text with; set its eos_token")
            if not ids or ids[-1] != self._eos:
                ids.append(self._eos)
            if item.spans and item.spans[-1].end == len(item.text):
                first, _, weight = runs[-1]
                runs[-1] = (first, len(ids), weight)
        labels = [IGNORE_INDEX] * len(ids)
        for first, last, _ in runs:
            labels[first:last] = ids[first:last]
        encoded: Encoded = {"input_ids": ids, "labels": labels}
        if with_weights:
            weights = [0.0] * len(ids)
            for first, last, weight in runs:
                weights[first:last] = [weight] * (last - first)
            encoded["loss_weights"] = weights
        return encoded


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
