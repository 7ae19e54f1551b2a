"""Stage `pack`: rendered chats to tokenized, masked and packed rows.

Every token is in a packed row or, with the reason, in outs/pack/ledger.jsonl. outs/pack/SPLIT_index.jsonl leads from a
packed token back to its record.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import load_from_disk
from transformers import AutoTokenizer

from sft.folders import replacing_folder
from sft.labels import IGNORE_INDEX
from sft.tokens.columns import Columns, Integers, RowPlan, count_trained, row_tables, write_rows
from sft.tokens.packing import Limited, OverflowReport, cut_pieces, kept_by_length, plan_overflow
from sft.tokens.preview import preview_masks
from sft.tokens.prompts import PartColumn
from stages.checkout.artifacts import code_digest, read_json, read_jsonl, write_json, write_jsonl, write_text
from stages.checkout.ledger import Action, Ledger
from stages.checkout.paths import CURRICULUM, EVAL_SOURCES, STREAM, Paths
from stages.loading.rehearsed import SOURCE, is_rehearsed, read_summary
from stages.models.base import read_base_model
from stages.pages.data import SplitFacts, choose_previews, write_data_page
from stages.params.schema import BY_LENGTH, PackSection, Params
from stages.progress import progress, stage_progress
from stages.shards.encoding import (
    DocumentImages,
    Documents,
    ImageFiles,
    Kept,
    LostTokens,
    divided_documents,
    encode_split,
    enter_lost_tokens,
    lost_tokens,
    plan_split,
    without_lengths,
)

SPLITS = ("train", "eval")
SCRATCH = "scratch"

CROSSED = (
    "in {} documents a token lies across the border between untrained and trained text, so that their prompts end in "
    "other tokens when the model generates; see border_in_token in outs/pack/ledger.jsonl and docs/data.md"
)


@stage_progress("pack")
def run(params: Params, paths: Paths) -> None:
    """Write outs/pack, the figures and the data page.

    outs/pack gets packed rows, an index from tokens to record ids, a preview of the masks, and the ledger.

    Raises:
        ValueError: No trainable token is left, or more were cut than `max_lost_fraction` allows.
    """
    tokenizer_folder = paths.out("format", "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    splits: dict[str, SplitFacts] = {}
    image_files = find_image_files(params.pack, paths)
    share = read_summary(paths.out("load", SOURCE))["share"]
    curriculum = Curriculum.read(paths)
    with replacing_folder(paths.out("pack")) as folder, Ledger(folder / "ledger.jsonl", "pack") as ledger:
        for split in SPLITS:
            rendered = paths.out("format", f"{split}.jsonl")
            scratch = folder / SCRATCH / split
            documents = encode_split(rendered, tokenizer_folder, scratch, params.pack, ledger, image_files)
            check_images_kept(documents, params.pack)
            splits[split], kept = pack_split(documents, params.pack, split, folder, ledger, share, curriculum)
            if split == "train":
                packed = load_from_disk(str(folder / split))
                write_text(folder / "preview.txt", preview_masks(packed, tokenizer, num_rows=3, seed=0))
                previews = choose_previews(kept, tokenizer)
        shutil.rmtree(folder / SCRATCH)
        if (paths.out("load", EVAL_SOURCES)).exists():
            known = read_json(paths.out("load", EVAL_SOURCES))
            index = read_jsonl(folder / "eval_index.jsonl")
            rows = [[known["rows"][name] for name in entry["ids"]] for entry in index]
            write_json(folder / EVAL_SOURCES, {"names": known["names"], "rows": rows})
        if read_json(paths.out("load", "card.json")).get("streaming"):
            stream = read_json(paths.out("load", STREAM))
            code = code_digest("sft/tokens", "stages/shards")
            recipe = {"stream": stream, "pack": params.pack.model_dump(), "code": code}
            write_json(folder / STREAM, recipe)
    write_json(paths.metrics("pack"), {split: facts.figures for split, facts in splits.items()})
    write_data_page(paths, splits, previews)
    num_crossed = sum(facts.figures["border_in_token"] for facts in splits.values())
    if num_crossed:
        print(f"warning: {CROSSED.format(num_crossed)}", flush=True)
    print(summary(splits["train"].figures), flush=True)


def find_image_files(section: PackSection, paths: Paths) -> ImageFiles | None:
    """Return where the images of rows are; None if no row has images.

    Raises:
        ValueError: There are images, and `pack.strategy` would join rows.
    """
    if not paths.has_images():
        return None
    if section.strategy != "none":
        raise ValueError(
            f"params.yaml, pack.strategy: {section.strategy} joins rows, and rows with images can't be joined; state "
            "none (one document per row)"
        )
    return ImageFiles(Path(read_base_model(paths.out("load", "base_model.json")).path), paths.images)


def check_images_kept(documents: Documents, section: PackSection) -> None:
    """Check that the length limit cuts into no image.

    Raises:
        ValueError: It does, and long documents are not dropped; names the first one.
    """
    if section.overflow == "drop":
        return
    limit = section.max_length
    for number, images in enumerate(documents.images):
        length = int(documents.lengths[number])
        if images.end > limit or (images.names and length > limit and section.overflow.startswith("split")):
            raise ValueError(
                f"params.yaml, pack.max_length: {documents.ids[number].as_py()} has {length} tokens, those of its "
                f"images up to number {images.end}, and {section.overflow} at {limit} would separate images from "
                "their text; raise it, lower load.images.max_side, or state overflow: drop"
            )


def with_images(tables: Iterator[pa.Table], plan: RowPlan, images: Sequence[DocumentImages]) -> Iterator[pa.Table]:
    """Add the columns `text` and `images` to rows of one document each."""
    first = 0
    for table in tables:
        chosen = [images[number] for number in plan.pieces.document[first : first + len(table)].tolist()]
        first += len(table)
        table = table.append_column("text", pa.array([each.text for each in chosen], pa.string()))
        yield table.append_column("images", pa.array([list(each.names) for each in chosen], pa.list_(pa.string())))


def summary(figures: Mapping[str, Any]) -> str:
    """Describe the packed training rows in one line."""
    return (
        f"{figures['documents']} documents, {figures['tokens']} tokens ({figures['trained_tokens']} trained) "
        f"in {figures['rows']} rows, fill {figures['fill']:.3f}"
    )


def pack_split(
    documents: Documents,
    section: PackSection,
    split: str,
    folder: Path,
    ledger: Ledger,
    share: float = 0.0,
    curriculum: Curriculum | None = None,
) -> tuple[SplitFacts, Kept]:
    """Apply the length limit to the documents of a split, pack them, and write rows, index and ledger entries.

    Args:
        documents: Tokenized documents.
        section: The section `pack` of params.yaml.
        split: train or eval.
        folder: Output folder.
        ledger: Gets an entry for every document that is cut, split, dropped or not needed.
        share: Share of the trained tokens that rehearsed documents get.
        curriculum: What training documents are sorted by; None = they stay in their order.

    Returns:
        The figures and lengths of the split, and the documents as the limit left them.

    Raises:
        ValueError: No trainable token is left, or more were cut than `max_lost_fraction` allows.
    """
    limited = plan_overflow(documents.columns, section.max_length, section.overflow, documents.ids)
    report = limited.report
    mixture = mix_rehearsal(documents.ids.take(pa.array(limited.source)), limited, share)
    limited = limited._replace(pieces=limited.pieces[mixture.kept])
    if split == "train" and (curriculum is not None or section.strategy == "in_order"):
        limited = limited._replace(pieces=limited.pieces[order_of(documents, limited, curriculum)])
    pieces = limited.pieces
    divided = divided_documents(documents, limited)
    plan = plan_split(pieces, section, divided.groups)
    before = np.array([documents.lengths.sum(), documents.trained.sum()])
    lost = np.array([report.num_tokens_lost, sum(report.trained_tokens_lost.values())])
    check_lost_tokens(documents, report, section, lost_tokens(documents.ids, limited, plan), split)
    entered = np.array(enter_lost_tokens(lost_tokens(documents.ids, limited, plan), ledger))
    for name, num_tokens, num_trained in mixture.omitted:
        num_lost = {"tokens_lost": num_tokens, "trained_tokens_lost": num_trained}
        ledger.enter(name, "not_needed", f"rehearsal has its share of {share} without it", Action.OMIT, **num_lost)
        entered += list(num_lost.values())
    count = RowCount(f"packed {split} rows", len(plan.ends))
    tables = row_tables(limited.columns, plan)
    if section.strategy == "none":
        tables = without_lengths(tables)
    if divided.images:
        tables = with_images(tables, plan, divided.images)
    write_rows(count.through(tables), folder / split)
    written = np.array([count.filled().sum(), count.num_trained])
    repeated = np.array([report.num_repeated, 0])
    assert (before + repeated == written + entered).all(), (
        f"{before} tokens (trained) in, {repeated} repeated, {written} out, {entered} in the ledger"
    )
    write_jsonl(folder / f"{split}_index.jsonl", index_entries(divided.ids, plan, limited.columns))
    figures = {
        "documents": len(pieces),
        "rows": len(plan.ends),
        "tokens": int(written[0]),
        "trained_tokens": int(written[1]),
        "fill": int(written[0]) / (len(plan.ends) * section.max_length),
        "truncated": report.num_truncated,
        "split": report.num_split,
        "dropped": report.num_dropped,
        "border_in_token": documents.num_crossed,
        "tokens_lost": int(lost[0]),
        "trained_tokens_lost": int(lost[1]),
        "untrained_pieces": report.num_untrained_pieces,
        "answers_cut": report.num_answers_cut,
        "trained_tokens_cut": report.num_trained_cut,
        "tokens_repeated": report.num_repeated,
        **mixture.figures,
    }
    facts = SplitFacts(figures, documents.lengths, documents.trained, count.filled())
    return facts, Kept(divided, pieces, documents.lengths[limited.source])


class Curriculum(NamedTuple):
    """What documents are sorted by.

    Args:
        column: Column of the rows, or `length`.
        values: Id of each training row and its number; empty for `length`.
    """

    column: str
    values: dict[str, float]

    @classmethod
    def read(cls, paths: Paths) -> Curriculum | None:
        """Return the curriculum that `load` wrote; None if params.yaml states none."""
        column = read_json(paths.out("load", "card.json")).get("curriculum")
        if column is None:
            return None
        file = paths.out("load", CURRICULUM)
        values = {} if column == BY_LENGTH else {row["id"]: row["value"] for row in read_jsonl(file)}
        return cls(column, values)

    def keys(self, ids: list[str], lengths: Integers) -> np.ndarray[Any, Any]:
        """Return what documents are sorted by, `(num_documents,)`.

        Args:
            ids: `(num_documents,)` ids of their records.
            lengths: `(num_documents,)` numbers of tokens.
        """
        # a rehearsed row has no number; `packing_order` places it by its rank
        return lengths if self.column == BY_LENGTH else np.array([self.value(name) for name in ids])

    def value(self, name: str) -> float:
        """Return the number of a row, which may be the repetition of another one; 0 if it has none."""
        return self.values.get(name, self.values.get(name.rpartition("*")[0], 0.0))


def packing_order(keys: np.ndarray[Any, Any], spread: np.ndarray[Any, Any]) -> Integers:
    """Return the order of documents: ascending by key, equal ones as they are, and some at even distances among them.

    Args:
        keys: `(num_documents,)` what they are sorted by.
        spread: `(num_documents,)` bool; documents that are placed at even distances among the others, as they are.

    Returns:
        `(num_documents,)` numbers of documents.
    """
    sorted_ones = np.flatnonzero(~spread)
    sorted_ones = sorted_ones[np.argsort(keys[sorted_ones], kind="stable")]
    spread_ones = np.flatnonzero(spread)
    place = [(np.arange(len(part)) + 0.5) / max(1, len(part)) for part in (sorted_ones, spread_ones)]
    order: Integers = np.concatenate([sorted_ones, spread_ones])[np.argsort(np.concatenate(place), kind="stable")]
    return order


def order_of(documents: Documents, limited: Limited, curriculum: Curriculum | None) -> Integers:
    """Return the order in which the pieces of documents are packed; rehearsed ones are placed among the others."""
    source = limited.source[limited.pieces.document]
    names = documents.ids.take(pa.array(source)).to_pylist() if len(source) else []
    keys = np.zeros(len(source)) if curriculum is None else curriculum.keys(names, documents.lengths[source])
    return packing_order(keys, np.array([is_rehearsed(name) for name in names], dtype=bool))


class Mixture(NamedTuple):
    """Which pieces of documents are packed, so that rehearsed ones have their share of the trained tokens.

    Args:
        kept: `(num_pieces,)` bool.
        omitted: Record id, tokens and trained tokens of each piece that is not needed.
        figures: Documents and trained tokens of the rehearsal, and its share; empty without one.
    """

    kept: np.ndarray[Any, Any]
    omitted: list[tuple[str, int, int]]
    figures: dict[str, float]


def mix_rehearsal(ids: pa.ChunkedArray, limited: Limited, share: float) -> Mixture:
    """Take rehearsed documents in their order until they have their share of the trained tokens, or all if too few.

    Args:
        ids: `(num_documents,)` record id of each document that the length limit left.
        limited: What the limit left.
        share: Share of the trained tokens that rehearsed documents get; 0 = there are none.
    """
    pieces = limited.pieces
    kept = np.ones(len(pieces), dtype=bool)
    if not share:
        return Mixture(kept, [], {})
    names = ids.take(pa.array(pieces.document)).to_pylist() if len(pieces) else []
    rehearsed = np.array([is_rehearsed(name) for name in names], dtype=bool)
    if not rehearsed.any():
        return Mixture(kept, [], {})
    trained = count_trained(limited.columns["labels"], pieces)[0]
    wanted = int(trained[~rehearsed].sum()) * share / (1 - share)
    before = np.cumsum(np.where(rehearsed, trained, 0)) - trained  # of earlier rehearsed pieces
    kept[rehearsed] = before[rehearsed] + trained[rehearsed] / 2 <= wanted  # the piece on the limit: if half fits
    omitted = [(names[i], int(pieces.length[i]), int(trained[i])) for i in np.flatnonzero(~kept)]
    found = int(trained[kept & rehearsed].sum())
    reached = found / max(1, found + int(trained[~rehearsed].sum()))
    if reached < 0.95 * share:
        print(
            f"note: the rehearsal has {reached:.1%} of the trained tokens, load.rehearsal.share asks for {share:.1%}: "
            "give more prompts, or raise load.rehearsal.max_new_tokens",
            flush=True,
        )
    figures = {"documents": int((kept & rehearsed).sum()), "trained_tokens": found, "share": round(reached, 6)}
    return Mixture(kept, omitted, {f"{SOURCE}_{name}": value for name, value in figures.items()})


def check_lost_tokens(
    documents: Documents, report: OverflowReport, section: PackSection, entries: Iterator[LostTokens], split: str
) -> None:
    """Check that the length limit left enough trained tokens, with their prompts.

    Args:
        documents: Documents before the limit.
        report: What the limit did.
        section: The section `pack` of params.yaml.
        entries: Documents that lost tokens; the message names the first ones.
        split: train or eval.

    Raises:
        ValueError: All trained tokens are lost, or more of them are lost or cut from their prompts than
            `max_lost_fraction` allows.
    """
    trained, lost = int(documents.trained.sum()), sum(report.trained_tokens_lost.values())
    first = ", ".join(f"{entry.id} ({entry.reason})" for entry in itertools.islice(entries, 3))
    if lost == trained:
        raise ValueError(
            f"no trainable token is left in the {split} rows: all {trained} were lost at pack.max_length "
            f"{section.max_length}; first rows: {first}; raise pack.max_length"
        )
    share = (lost + report.num_trained_cut) / trained
    if share <= section.max_lost_fraction:
        return
    found = [f"{lost / trained:.1%} are in no row"] if lost else []
    if report.num_trained_cut:
        found.append(f"{report.num_trained_cut / trained:.1%} are answers that are cut from their prompts")
    policy = "set pack.overflow to split_with_prompt" if section.overflow != "split_with_prompt" else ""
    ways = ["raise pack.max_length", policy, "raise pack.max_lost_fraction"]
    higher = kept_by_length(
        documents.lengths, lambda limit: kept_fraction(documents, limit, section.overflow), section.max_length
    )
    raise ValueError(
        f"{share:.1%} of the trained tokens of the {split} rows are lost at pack.max_length {section.max_length}, more "
        f"than pack.max_lost_fraction {section.max_lost_fraction:.1%} allows: {' and '.join(found)}; of other lengths, "
        f"{higher}; first rows: {first}; {', '.join(filter(None, ways[:-1]))}, or {ways[-1]}"
    )


def kept_fraction(documents: Documents, limit: int, policy: str) -> float:
    """Return the fraction of the trained tokens that a limit keeps; where it divides, those of whole documents."""
    fits = documents.lengths <= limit
    kept = int(documents.trained[fits].sum())
    if policy == "truncate":
        pieces = cut_pieces(documents.lengths, limit, policy)[~fits]
        kept += int(count_trained(documents.columns["labels"], pieces)[0].sum())
    return kept / int(documents.trained.sum())


class RowCount:
    """Counts tokens and trained tokens of rows while they are written, and shows the progress.

    Args:
        part: What is written, for the progress.
        num_rows: Number of rows.
    """

    def __init__(self, part: str, num_rows: int) -> None:
        self.num_trained = 0
        self._part, self._num_rows, self._num_written = part, num_rows, 0
        self._filled: list[np.ndarray[Any, Any]] = [np.zeros(0, dtype=np.int64)]

    def through(self, tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
        """Count the rows of tables and yield the tables unchanged."""
        for table in tables:
            for chunk in table.column("labels").chunks:
                self._filled.append(np.diff(chunk.offsets.to_numpy()).astype(np.int64))
                self.num_trained += int((chunk.flatten().to_numpy() != IGNORE_INDEX).sum())
            yield table
            self._num_written += len(table)
            progress(self._num_written, self._num_rows, self._part)

    def filled(self) -> np.ndarray[Any, Any]:
        """Return the number of tokens in each row, `(num_rows,)`."""
        return np.concatenate(self._filled)


def index_entries(ids: pa.ChunkedArray, plan: RowPlan, columns: Columns) -> Iterator[dict[str, Any]]:
    """Yield for every packed row the documents in it, in order.

    Args:
        ids: `(num_documents,)` ids of the records.
        plan: The packed rows.
        columns: Columns of the documents.

    Yields:
        Entries with `row`, `ids`, `ends` (for each document, the position after its last token in the row) and `starts`
        (for each document, which of its record's tokens is its first one in the row; not 0 for the later parts of a
        divided document). With `overflow: split_with_prompt` also `prompts` (number of tokens of the prompt that is
        repeated before a later part) and `continues` (which of the record's tokens follows it).
    """
    parts = column.parts if isinstance(column := columns["input_ids"], PartColumn) else None
    first = 0
    names = ids.take(pa.array(plan.pieces.document)) if len(plan.pieces) else ids
    for row, last in enumerate(plan.ends.tolist()):
        pieces = plan.pieces[first:last]
        entry = {"row": row, "ids": names[first:last].to_pylist(), "ends": np.cumsum(pieces.length).tolist()}
        if parts is None:
            yield {**entry, "starts": pieces.start.tolist()}
        else:
            own = parts[pieces.document]
            starts = np.where(own.prompt_length > 0, own.prompt_start, own.start)
            repeated = {"prompts": own.prompt_length.tolist(), "continues": own.start.tolist()}
            yield {**entry, "starts": starts.tolist(), **repeated}
        first = last
