"""`pack`: rendered chats -> tokenized, masked, packed rows."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sft.chat import Rendered
from sft.encoding import Encoder
from sft.labels import IGNORE_INDEX
from sft.packing import OverflowReport, apply_overflow, pack_with_plan
from sft.preview import preview_masks
from stages.artifacts import progress, read_jsonl, write_json, write_jsonl, write_text
from stages.data_page import SplitFacts, choose_previews, write_data_page
from stages.outfolder import replacing_folder
from stages.params import PackSection, Params
from stages.paths import Paths

Counts = np.ndarray[Any, Any]
SPLITS = ("train", "eval")
BATCH_SIZE = 1000
TOKENS = {"input_ids": List(Value("int32")), "labels": List(Value("int32"))}


def run(params: Params, paths: Paths) -> None:
    """Write outs/pack: packed rows, an index from them to record ids, a preview of the masks; and the figures."""
    tokenizer = AutoTokenizer.from_pretrained(paths.out("format", "tokenizer"))
    splits: dict[str, SplitFacts] = {}
    ledger: list[dict[str, Any]] = []
    with replacing_folder(paths.out("pack")) as folder, tempfile.TemporaryDirectory() as scratch:
        for number, split in enumerate(SPLITS):
            progress(number, len(SPLITS), f"packing {split}")
            encoded = encode_split(paths.out("format", f"{split}.jsonl"), tokenizer, Path(scratch))
            packed, splits[split], entries = pack_split(encoded, params.pack, split, folder)
            ledger += entries
            if split == "train":
                write_text(folder / "preview.txt", preview_masks(packed, tokenizer, num_rows=3, seed=0))
        write_jsonl(folder / "ledger.jsonl", ledger)
        previews = choose_previews(splits["train"].documents, tokenizer)  # before the scratch folder goes
    write_json(paths.metrics("pack"), {split: facts.figures for split, facts in splits.items()})
    write_data_page(paths, splits, previews)
    progress(len(SPLITS), len(SPLITS), summary(splits["train"].figures))


def summary(figures: Mapping[str, Any]) -> str:
    """One line about the training rows."""
    return (
        f"{figures['documents']} documents, {figures['tokens']} tokens ({figures['trained_tokens']} trained) "
        f"in {figures['rows']} rows, fill {figures['fill']:.3f}"
    )


def encode_split(path: Path, tokenizer: PreTrainedTokenizerBase, scratch: Path) -> Dataset:
    """Tokenize one file of rendered chats into `scratch`, so that memory does not grow with the file."""
    weighted = any(span[2] != 1.0 for row in read_jsonl(path) for span in row["spans"])
    features = {"id": Value("string"), **TOKENS}
    if weighted:
        features["loss_weights"] = List(Value("float32"))
    return Dataset.from_generator(
        encoded_rows,
        features=Features(features),
        gen_kwargs={"path": path, "encoder": Encoder(tokenizer), "weighted": weighted},
        cache_dir=str(scratch),
        fingerprint=Hasher.hash(path.name),  # nothing is cached, so nothing needs to be hashed for it
    )


def encoded_rows(path: Path, encoder: Encoder, weighted: bool) -> Iterator[dict[str, Any]]:
    """Token ids and labels of every rendered chat, under its record's id."""
    for batch in _batches(path):
        encoded = encoder.encode([Rendered.from_row(row) for row in batch], with_weights=weighted)
        for row, tokens in zip(batch, encoded, strict=True):
            yield {"id": row["id"], **tokens}


def _batches(path: Path) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    for row in read_jsonl(path):
        batch.append(row)
        if len(batch) == BATCH_SIZE:
            yield batch
            batch = []
    if batch:
        yield batch


def pack_split(
    encoded: Dataset, section: PackSection, split: str, folder: Path
) -> tuple[Dataset, SplitFacts, list[dict[str, Any]]]:
    """Apply the length limit, pack, save; returns the packed rows, what is known of them and the ledger's entries.

    Raises:
        ValueError: Nothing trainable is left, or more trained tokens were cut than `max_lost_fraction` allows.
    """
    lengths, trained = document_tokens(encoded)
    before = (int(lengths.sum()), int(trained.sum()))
    kept, report = apply_overflow(encoded, section.max_length, section.overflow)
    entries = ledger_entries(encoded["id"], report)
    after = count_tokens(kept)
    check_losses(before, after, section, entries, split)
    if section.strategy == "none":
        packed, plan = kept.remove_columns("id"), [[row] for row in range(len(kept))]
    else:
        packed, plan = pack_with_plan(kept.remove_columns("id"), section.max_length, section.strategy)
    filled, filled_trained = document_tokens(packed)
    packed_tokens = (int(filled.sum()), int(filled_trained.sum()))
    assert packed_tokens == after, f"packing changed {after} to {packed_tokens} (tokens, trained tokens)"
    packed.save_to_disk(str(folder / split))
    ids = kept["id"]
    index = ({"row": row, "ids": [ids[document] for document in documents]} for row, documents in enumerate(plan))
    write_jsonl(folder / f"{split}_index.jsonl", index)
    room = len(packed) * section.max_length
    figures = {
        "documents": len(kept),
        "rows": len(packed),
        "tokens": after[0],
        "trained_tokens": after[1],
        "fill": after[0] / room,
        "truncated": report.num_truncated,
        "split": report.num_split,
        "dropped": report.num_dropped,
        "tokens_lost": before[0] - after[0],
        "trained_tokens_lost": before[1] - after[1],
    }
    return packed, SplitFacts(figures, kept, lengths, trained, filled), entries


def count_tokens(dataset: Dataset) -> tuple[int, int]:
    """Tokens, and trained tokens, of a data set."""
    lengths, trained = document_tokens(dataset)
    return int(lengths.sum()), int(trained.sum())


def document_tokens(dataset: Dataset) -> tuple[Counts, Counts]:
    """Tokens, and trained tokens, of every row: two arrays `(num_rows,)`."""
    lengths, trained = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for batch in dataset.select_columns(["labels"]).with_format("arrow").iter(batch_size=10_000):
        column = batch["labels"].combine_chunks()
        counts = pc.list_value_length(column).to_numpy(zero_copy_only=False).astype(np.int64)
        supervised = column.flatten().to_numpy(zero_copy_only=False) != IGNORE_INDEX
        ends = np.cumsum(counts)
        sums = np.concatenate([[0], np.cumsum(supervised)])
        lengths.append(counts)
        trained.append(sums[ends] - sums[ends - counts])
    return np.concatenate(lengths), np.concatenate(trained)


def ledger_entries(ids: list[str], report: OverflowReport) -> list[dict[str, Any]]:
    """One entry for every row that the length limit touched."""
    entries = []
    for reason, rows in report.row_indices.items():
        entries += [{"id": ids[row], "stage": "pack", "reason": reason} for row in rows]
    return entries


def check_losses(
    before: tuple[int, int], after: tuple[int, int], section: PackSection, entries: list[dict[str, Any]], split: str
) -> None:
    """Stop when the length limit took too much, or everything.

    Raises:
        ValueError: Says how much was lost, to what, and which parameter to change.
    """
    first = ", ".join(f"{entry['id']} ({entry['reason']})" for entry in entries[:3])
    if after[1] == 0:
        raise ValueError(
            f"no trainable token is left in the {split} rows: all {before[1]} were lost at pack.max_length "
            f"{section.max_length}; first rows: {first}; raise pack.max_length"
        )
    lost = 1.0 - after[1] / before[1]
    if lost > section.max_lost_fraction:
        raise ValueError(
            f"{lost:.1%} of the trained tokens of the {split} rows are lost at pack.max_length {section.max_length}, "
            f"more than pack.max_lost_fraction {section.max_lost_fraction:.1%} allows; first rows: {first}; "
            "raise pack.max_length, set pack.overflow to split, or raise pack.max_lost_fraction"
        )
