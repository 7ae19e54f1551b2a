"""Stored documents are read back unchanged, and rows that are written one by one form a normal data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, load_from_disk

from sft.chat.render import Rendered, Span
from sft.tokens import columns
from sft.tokens.columns import Pieces, row_tables, whole, write_rows
from sft.tokens.encoding import Encoder
from sft.tokens.packing import pack_with_plan, plan_rows
from sft.tokens.store import TokenStore
from tests.tiny import tiny_tokenizer

TEXTS = ["The quick brown fox", "jumps", "over the lazy dog. The dog sleeps on.", "", "Hello there, said the fox."]


def rendered(weight: float = 1.0) -> list[Rendered]:
    return [Rendered(text, [Span(len(text) // 2, len(text), weight)]) for text in TEXTS]


def test_columns_give_back_what_was_appended(tmp_path: Path) -> None:
    encoder, store = Encoder(tiny_tokenizer()), TokenStore(tmp_path)
    for part in (rendered()[:2], rendered()[2:]):
        store.append(encoder.encode_flat(part))
    rows, columns = encoder.encode(rendered()), store.columns()
    assert set(columns) == {"input_ids", "labels"}
    assert columns["input_ids"].lengths().tolist() == [len(row["input_ids"]) for row in rows]
    for name in ("input_ids", "labels"):
        values = columns[name].gather(whole(columns[name].lengths()), np.int32)
        assert values.tolist() == [value for row in rows for value in row[name]]  # type: ignore[literal-required]
    pieces = Pieces(*(np.array(values) for values in ([4, 0, 2], [1, 0, 3], [2, 0, 4])))
    ids = [row["input_ids"] for row in rows]
    assert columns["input_ids"].gather(pieces, np.int32).tolist() == ids[4][1:3] + ids[2][3:7]
    assert store.trained().tolist() == [sum(label != -100 for label in row["labels"]) for row in rows]


def test_weights_of_a_later_batch_are_filled_in_for_earlier_and_later_ones(tmp_path: Path) -> None:
    encoder, store = Encoder(tiny_tokenizer()), TokenStore(tmp_path)
    for weight in (1.0, 0.5, 1.0):
        store.append(encoder.encode_flat(rendered(weight)))
    columns = store.columns()
    expected = [
        value
        for weight in (1.0, 0.5, 1.0)
        for row in encoder.encode(rendered(weight), with_weights=True)
        for value in row["loss_weights"]
    ]
    assert columns["loss_weights"].gather(whole(columns["loss_weights"].lengths()), np.float32).tolist() == expected


def test_rows_packed_from_files_are_those_packed_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, store = Encoder(tiny_tokenizer()), TokenStore(tmp_path)
    for _ in range(5):
        store.append(encoder.encode_flat(rendered()))
    stored = store.columns()
    expected = pack_with_plan(Dataset.from_list(encoder.encode(rendered()) * 5), 16, "bfd_split")[0]
    monkeypatch.setattr(columns, "TOKENS_PER_BATCH", 40)
    monkeypatch.setattr(columns, "MAX_FILE_BYTES", 600)
    plan = plan_rows(whole(stored["input_ids"].lengths()), 16, "bfd_split")
    write_rows(row_tables(stored, plan), tmp_path / "rows")
    found = load_from_disk(str(tmp_path / "rows"))
    assert len(list((tmp_path / "rows").glob("data-*.arrow"))) > 2
    assert {path.suffix for path in (tmp_path / "rows").iterdir()} == {".arrow", ".json"}
    assert found.to_dict() == expected.to_dict()
    assert found.features == expected.features
