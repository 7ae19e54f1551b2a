"""reports/data.html: one self-contained page with the training data as tokens, to be inspected before training."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from sft.tokens.preview import Piece, role_contents, sample_rows, token_pieces
from stages.checkout.artifacts import read_json, read_jsonl, write_text
from stages.checkout.paths import Paths
from stages.checkout.redaction import HIDDEN, secret_spans
from stages.pages.charts import histogram
from stages.pages.page import ledger_summary, percent, render_page, rows_sentence

TEMPLATE = "data.html.jinja"
NUM_PREVIEWS = 5
MAX_PREVIEW_TOKENS = 1500
MAX_ROWS_FOR_ROLES = 20_000


@dataclass(frozen=True)
class SplitFacts:
    """Statistics of one packed split.

    Args:
        figures: Its figures in the metrics file of `pack`.
        lengths: Tokens of each document before the length limit `(num_documents,)`.
        trained: Trained tokens of each document `(num_documents,)`.
        filled: Tokens of each packed row `(num_rows,)`.
    """

    figures: Mapping[str, Any]
    lengths: np.ndarray[Any, Any]
    trained: np.ndarray[Any, Any]
    filled: np.ndarray[Any, Any]


def write_data_page(paths: Paths, splits: Mapping[str, SplitFacts], previews: list[dict[str, Any]]) -> None:
    """Build the page from the outs of `load` and `format` and the statistics of `pack`, and write it.

    Args:
        paths: Paths of the checkout.
        splits: Statistics of `train` and `eval`.
        previews: What `choose_previews` returned.
    """
    card, figures = read_json(paths.out("load", "card.json")), splits["train"].figures
    context = {
        "summary": summary(card, figures),
        "splits": {name: split.figures for name, split in splits.items()},
        "sources": card["sources"],
        "ledger": ledger_summary(paths),
        "charts": charts(splits["train"]),
        "roles": role_table(paths),
        "num_rows_for_roles": MAX_ROWS_FOR_ROLES,
        "limits": [limit_sentence(name, split.figures) for name, split in splits.items()],
        "previews": previews,
        "percent": percent,
    }
    write_text(paths.data_page, render_page(TEMPLATE, context))


def summary(card: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    """Return a sentence on the rows and one on the tokens."""
    share = figures["trained_tokens"] / figures["tokens"]
    return (
        f"{rows_sentence(card)} {figures['tokens']:,} tokens go into training, {percent(share)} of them "
        f"are trained; they fill {figures['rows']:,} packed rows to {percent(figures['fill'])}."
    )


def limit_sentence(name: str, figures: Mapping[str, Any]) -> str:
    """Return what the length limit did to the documents of a split."""
    found = []
    if figures["truncated"]:
        found.append(f"{figures['truncated']:,} documents are cut off")
    if figures["dropped"]:
        found.append(f"{figures['dropped']:,} documents are dropped")
    if figures["split"]:
        found.append(f"{figures['split']:,} documents are divided")
    if figures["untrained_pieces"]:
        found.append(f"{figures['untrained_pieces']:,} of their parts have no trained token and are dropped")
    if figures["answers_cut"]:
        share = percent(figures["trained_tokens_cut"] / figures["trained_tokens"])
        found.append(
            f"{figures['answers_cut']:,} answers are trained without their whole prompt ({share} of all tokens "
            "that are trained)"
        )
    if figures["tokens_repeated"]:
        found.append(f"prompts that are repeated have {figures['tokens_repeated']:,} tokens")
    if figures["tokens_lost"]:
        found.append(f"{figures['tokens_lost']:,} tokens are lost, {figures['trained_tokens_lost']:,} of them trained")
    return f"Length limit, {name}: {'; '.join(found) or 'all documents fit, nothing is lost'}."


def charts(split: SplitFacts) -> list[Any]:
    """Draw histograms of the documents' tokens, their trained tokens, and the packed rows' tokens."""
    return [
        histogram("Tokens of a document", split.lengths.tolist(), "tokens"),
        histogram("Trained tokens of a document", split.trained.tolist(), "tokens"),
        histogram("Tokens of a packed row", split.filled.tolist(), "tokens"),
    ]


def role_table(paths: Paths) -> list[dict[str, Any]]:
    """Return each role's share of the rendered characters, and the share of those that is trained.

    A message is searched for in the rendered text after the previous message. Text that the template rewrote is not
    found, and counts as text of the template.
    """
    total: Counter[str] = Counter()
    trained: Counter[str] = Counter()
    records = read_jsonl(paths.out("load", "train.jsonl"))
    rendered = read_jsonl(paths.out("format", "train.jsonl"))
    for record, row in itertools.islice(matching(records, rendered), MAX_ROWS_FOR_ROLES):
        count_row(record, row, total, trained)
    everything = sum(total.values())
    return [
        {"role": role, "share": count / everything, "trained": trained[role] / count}
        for role, count in total.most_common()
        if count  # plain text has no template
    ]


def matching(
    records: Iterable[dict[str, Any]], rendered: Iterable[dict[str, Any]]
) -> Iterable[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield records with their rendered rows.

    Both are in the same order. Some records have no rendered row, and some have several, one per turn.
    """
    rest = iter(records)
    record: dict[str, Any] | None = None
    previous = -1
    for row in rendered:
        turn = row.get("turn", -1)
        if record is None or record["id"] != row["id"] or turn <= previous:
            record = next((record for record in rest if record["id"] == row["id"]), None)
        previous = turn
        if record is None:
            return
        yield record, row


def count_row(record: dict[str, Any], row: dict[str, Any], total: Counter[str], trained: Counter[str]) -> None:
    """Add the characters of one rendered row to the counts of the roles and of the template."""
    text, spans, cursor = row["text"], row["spans"], 0
    left, left_trained = len(text), sum(stop - start for start, stop, _ in spans)
    for role, content in role_contents(record):
        content = content.strip()
        start = text.find(content, cursor) if content else -1
        if start < 0:
            continue
        cursor = start + len(content)
        inside = sum(max(0, min(cursor, stop) - max(start, begin)) for begin, stop, _ in spans)
        total[role] += len(content)
        trained[role] += inside
        left, left_trained = left - len(content), left_trained - inside
    total["template"] += left
    trained["template"] += left_trained


class Documents(Protocol):
    """Tokenized documents by number, with their ids."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> dict[str, Any]: ...


def choose_previews(documents: Documents, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Return a seeded sample of the tokenized training documents, token by token."""
    return [preview(documents[number], tokenizer) for number in sample_rows(len(documents), NUM_PREVIEWS, seed=0)]


def preview(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what the page shows of one document: id, tokens, where the length limit cut it, how many are not shown."""
    pieces = without_secrets(
        token_pieces(row["input_ids"][:MAX_PREVIEW_TOKENS], row["labels"][:MAX_PREVIEW_TOKENS], tokenizer)
    )
    return {
        "id": row["id"],
        "pieces": pieces,
        "num_tokens": len(row["input_ids"]),
        "start": row["start"],
        "num_in_document": row["num_in_document"],
        "num_hidden": max(0, len(row["input_ids"]) - MAX_PREVIEW_TOKENS),
    }


def without_secrets(pieces: list[Piece]) -> list[Piece]:
    """Return the pieces of a document with its secrets replaced, each of which usually consists of several pieces."""
    spans = secret_spans("".join(piece.text for piece in pieces))
    kept, start = [], 0
    for piece in pieces:
        stop = start + len(piece.text)
        text, end = "", start
        for first, last in spans:
            if first < stop and last > start:
                text += piece.text[end - start : max(first, start) - start] + (HIDDEN if first >= start else "")
                end = min(last, stop)
        kept.append(piece._replace(text=text + piece.text[end - start :]))
        start = stop
    return kept
