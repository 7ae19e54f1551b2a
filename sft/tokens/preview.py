"""A look at what is trained: a few rows token by token, trained tokens marked, as text for a terminal."""

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
# A character is spelled out in at most four byte tokens.
_MAX_TOKENS_A_CHARACTER = 4


class Piece(NamedTuple):
    """Text of one token (of several, where only several make up a character), and whether it is trained."""

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
        rows: Token rows (`input_ids`, `labels`, packed or not), or records as `sft.data.records.normalize` returns
            them, which are rendered and tokenized first and for which the shares of the roles are shown too.
        tokenizer: The tokenizer of the rows.
        num_rows: How many rows are shown.
        seed: Which ones.
        train_on: What is trained of records; token rows state it in their labels.
        colour: Colour trained tokens for a terminal instead of putting them in brackets.

    Returns:
        For every row a line of figures, then its tokens, parted by a middle dot; every document of a packed row begins
        on a line of its own.
    """
    chosen = sample_rows(len(rows), num_rows, seed)
    legend = "trained tokens are coloured" if colour else f"trained tokens stand in {' '.join(TRAINED_MARKS)}"
    parts = [f"{len(chosen)} of {len(rows)} rows; tokens are parted by {TOKEN_BORDER}, {legend}"]
    for number in chosen:
        row = rows[number]
        if "input_ids" in row:
            parts.append(_show_row(row, number, tokenizer, colour))
        else:
            parts.append(_show_record(row, number, tokenizer, TrainOn(train_on), colour))
    return "\n\n".join(parts) + "\n"


def _show_record(
    record: Mapping[str, Any], number: int, tokenizer: PreTrainedTokenizerBase, train_on: TrainOn, colour: bool
) -> str:
    rendered = ChatRenderer(tokenizer, train_on).render(record)
    encoded = Encoder(tokenizer).encode([rendered])[0]
    characters = role_characters(record)
    characters["template"] = max(0, len(rendered.text) - sum(characters.values()))
    total = max(1, len(rendered.text))
    shares = ", ".join(f"{role} {count / total:.0%}" for role, count in characters.items())
    return f"{_show_row(encoded, number, tokenizer, colour)}\ncharacters: {shares}"


def role_characters(record: Mapping[str, Any]) -> Counter[str]:
    """How many characters of content every role contributes to a record."""
    counts: Counter[str] = Counter()
    for role, content in role_contents(record):
        counts[role] += len(content)
    return counts


def role_contents(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Who says what in a record, in order: (role, text), without white space around conversation turns."""
    if "text" in record:
        return [("text", record["text"])]
    if isinstance(record.get("completion"), str):
        return [("prompt", record["prompt"]), ("completion", record["completion"])]
    messages = record.get("messages") or [*record["prompt"], *record["completion"]]
    turns = ((message["role"], message["content"]) for message in messages)
    return [(role, content.strip()) for role, content in turns if isinstance(content, str)]


def sample_rows(num_rows: int, num_chosen: int, seed: int) -> list[int]:
    """Numbers of a seeded sample of rows, in order."""
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
    """The text of every token; tokens that hold only parts of a character are joined into one piece.

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
    # decoders of the SentencePiece kind drop the space at the start of what they decode
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
