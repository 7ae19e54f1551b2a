"""Preview of trained tokens: a few rows token by token, with trained tokens marked, as text for a terminal."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from sft.chat.render import ChatRenderer, TrainOn
from sft.labels import IGNORE_INDEX
from sft.tokens.encoding import Encoder

TRAINED_MARKS = ("⟦", "⟧")
TRAINED_COLOUR, PLAIN_COLOUR, RESET = "\033[30;42m", "\033[2m", "\033[0m"
TOKEN_BORDER = "·"
# Byte-level tokenizers encode one character in at most four tokens.
_MAX_TOKENS_A_CHARACTER = 4


class Piece(NamedTuple):
    """Text of one token, or of several that together form a character, and whether it is trained."""

    text: str
    is_trained: bool


def preview_masks(
    rows: Any,
    tokenizer: PreTrainedTokenizerBase,
    num_rows: int = 3,
    seed: int = 0,
    *,
    train_on: TrainOn | str = TrainOn.ASSISTANT,
    colour: bool = False,
) -> str:
    """Show a seeded sample of rows token by token.

    Args:
        rows: Tokenized rows (`input_ids`, `labels`, packed or not), or records as `sft.data.records.normalize` returns
            them. Records are rendered and tokenized first, and the share of characters of each role is shown too.
        tokenizer: The tokenizer of the rows.
        num_rows: Number of rows to show.
        seed: Seed of the sample.
        train_on: Part of records that is trained; ignored for tokenized rows, which have labels.
        colour: Colour trained tokens for a terminal instead of putting them in brackets.

    Returns:
        For every row a line with its counts, then its tokens separated by a middle dot; every document of a packed row
        begins on a new line.
    """
    chosen = sample_rows(len(rows), num_rows, seed)
    tools: tuple[ChatRenderer, Encoder] | None = None
    legend = "trained tokens are coloured" if colour else f"trained tokens stand in {' '.join(TRAINED_MARKS)}"
    parts = [f"{len(chosen)} of {len(rows)} rows; tokens are parted by {TOKEN_BORDER}, {legend}"]
    for number in chosen:
        row = rows[number]
        if "input_ids" in row:
            parts.append(_show_row(row, number, tokenizer, colour))
        else:
            tools = tools or (ChatRenderer(tokenizer, TrainOn(train_on)), Encoder(tokenizer))
            parts.append(_show_record(row, number, *tools, colour))
    return "\n\n".join(parts) + "\n"


def _show_record(record: Mapping[str, Any], number: int, renderer: ChatRenderer, encoder: Encoder, colour: bool) -> str:
    rendered = renderer.render(record)
    encoded = encoder.encode([rendered])[0]
    characters = role_characters(record)
    characters["template"] = max(0, len(rendered.text) - sum(characters.values()))
    total = max(1, len(rendered.text))
    shares = ", ".join(f"{role} {count / total:.0%}" for role, count in characters.items())
    return f"{_show_row(encoded, number, renderer.tokenizer, colour)}\ncharacters: {shares}"


def role_characters(record: Mapping[str, Any]) -> Counter[str]:
    """Count the characters of content of each role in a record."""
    counts: Counter[str] = Counter()
    for role, content in role_contents(record):
        counts[role] += len(content)
    return counts


def role_contents(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the role and text of each part of a record, in order, without whitespace around turns of conversations."""
    if "text" in record:
        return [("text", record["text"])]
    if isinstance(record.get("completion"), str):
        return [("prompt", record["prompt"]), ("completion", record["completion"])]
    messages = record.get("messages") or [*record["prompt"], *record["completion"]]
    turns = ((message["role"], message["content"]) for message in messages)
    return [(role, content.strip()) for role, content in turns if isinstance(content, str)]


def sample_rows(num_rows: int, num_chosen: int, seed: int) -> list[int]:
    """Return the indices of a seeded sample of rows, in order."""
    return sorted(random.Random(seed).sample(range(num_rows), min(num_chosen, num_rows)))


def _show_row(row: Mapping[str, Any], number: int, tokenizer: PreTrainedTokenizerBase, colour: bool) -> str:
    ids, labels = list(row["input_ids"]), list(row["labels"])
    lengths = list(row["seq_lengths"]) if row.get("seq_lengths") is not None else [len(ids)]
    num_trained = sum(label != IGNORE_INDEX for label in labels)
    head = f"row {number}: {len(ids)} tokens, {num_trained} trained ({num_trained / max(1, len(ids)):.1%})"
    lines = [f"{head}, {len(lengths)} documents" if len(lengths) > 1 else head]
    start = 0
    for length in lengths:
        stop = start + length
        lines.append(_paint(token_pieces(ids[start:stop], labels[start:stop], tokenizer), colour))
        start = stop
    return "\n".join(lines)


def token_pieces(ids: Sequence[int], labels: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """Return the text of every token; tokens that are only parts of a character are combined into one piece.

    Args:
        ids: Token ids of one document.
        labels: Its labels.
        tokenizer: The tokenizer.
    """
    pieces = []
    start = 0
    while start < len(ids):
        stop = start + 1
        text = _decode(ids[start:stop], tokenizer)
        while "\ufffd" in text and stop < min(len(ids), start + _MAX_TOKENS_A_CHARACTER):
            stop += 1
            text = _decode(ids[start:stop], tokenizer)
        if "\ufffd" in text:
            stop = start + 1
            text = _decode(ids[start:stop], tokenizer)
        pieces.append(Piece(text, any(label != IGNORE_INDEX for label in labels[start:stop])))
        start = stop
    return pieces


def _decode(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    text = str(tokenizer.decode(list(ids), skip_special_tokens=False))
    first = str(tokenizer.convert_ids_to_tokens(int(ids[0])))
    # SentencePiece decoders drop the space at the start of the decoded text
    return f" {text}" if first.startswith("▁") and not text.startswith(" ") else text


def _paint(pieces: Sequence[Piece], colour: bool) -> str:
    painted = []
    for is_trained, run in groupby(pieces, key=lambda piece: piece.is_trained):
        text = TOKEN_BORDER.join(piece.text for piece in run)
        if colour:
            painted.append(f"{TRAINED_COLOUR if is_trained else PLAIN_COLOUR}{text}{RESET}")
        else:
            painted.append(text.join(TRAINED_MARKS) if is_trained else text)
    return "".join(painted)
