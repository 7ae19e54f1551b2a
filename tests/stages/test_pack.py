"""Rendered chats become packed rows, and every token is accounted for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import load_from_disk

from sft.labels import IGNORE_INDEX
from stages import pack
from stages.artifacts import read_json, read_jsonl, write_jsonl
from stages.params import Params, load_params
from stages.paths import Paths
from tests.stages.data_root import ROOT
from tests.tiny import tiny_tokenizer

SENTENCE = "The quick brown fox jumps over the lazy dog. "


def rendered(number: int, repeats: int) -> dict[str, Any]:
    """One chat whose answer, a sentence some times over, is trained."""
    head = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    text = head + SENTENCE * repeats + "<|im_end|>"
    spans = [[len(head), len(text), 1.0]]
    return {
        "id": f"rows.jsonl:{number}",
        "text": text,
        "spans": spans,
        "add_special_tokens": False,
        "append_eos": False,
    }


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    """Outs of `format`: twelve training chats of one to four sentences, two held-out ones."""
    paths = Paths(tmp_path)
    write_jsonl(paths.out("format", "train.jsonl"), (rendered(number, 1 + number % 4) for number in range(12)))
    write_jsonl(paths.out("format", "eval.jsonl"), (rendered(number, 1) for number in range(2)))
    tiny_tokenizer().save_pretrained(paths.out("format", "tokenizer"))
    return paths


def params(**section: Any) -> Params:
    values = load_params(ROOT / "params.yaml").model_dump()
    values["pack"] |= {"max_length": 256, **section}
    return Params.model_validate(values)


def test_rows_tokens_and_trained_tokens_add_up(paths: Paths) -> None:
    pack.run(params(), paths)
    packed = load_from_disk(str(paths.out("pack", "train")))
    figures = read_json(paths.metrics("pack"))["train"]
    assert sum(len(row) for row in packed["input_ids"]) == figures["tokens"]
    assert sum(label != IGNORE_INDEX for row in packed["labels"] for label in row) == figures["trained_tokens"]
    assert [sum(row) for row in packed["seq_lengths"]] == [len(row) for row in packed["input_ids"]]
    assert figures["documents"] == 12
    assert figures["fill"] == pytest.approx(figures["tokens"] / (256 * figures["rows"]))


def test_index_leads_from_a_packed_document_back_to_its_record(paths: Paths) -> None:
    pack.run(params(), paths)
    tokenizer = tiny_tokenizer()
    texts = {row["id"]: row["text"] for row in read_jsonl(paths.out("format", "train.jsonl"))}
    packed = load_from_disk(str(paths.out("pack", "train")))
    seen = []
    for entry in read_jsonl(paths.out("pack", "train_index.jsonl")):
        row, start = packed[entry["row"]], 0
        for name, length in zip(entry["ids"], row["seq_lengths"], strict=True):
            assert tokenizer.decode(row["input_ids"][start : start + length]) == texts[name]
            start += length
            seen.append(name)
    assert sorted(seen) == sorted(texts)


def test_same_input_gives_the_same_bytes(paths: Paths) -> None:
    pack.run(params(), paths)
    first = {path.name: path.read_bytes() for path in paths.out("pack").rglob("*") if path.is_file()}
    pack.run(params(), paths)
    assert {path.name: path.read_bytes() for path in paths.out("pack").rglob("*") if path.is_file()} == first


def test_without_packing_a_row_is_a_document(paths: Paths) -> None:
    pack.run(params(strategy="none"), paths)
    assert len(load_from_disk(str(paths.out("pack", "train")))) == 12


def test_preview_marks_the_trained_tokens(paths: Paths) -> None:
    pack.run(params(), paths)
    preview = paths.out("pack", "preview.txt").read_text(encoding="utf-8")
    assert "trained tokens stand in" in preview
    assert "⟦" in preview


def test_a_cut_document_is_in_the_ledger(paths: Paths) -> None:
    pack.run(params(max_length=100, max_lost_fraction=0.9), paths)
    ledger = list(read_jsonl(paths.out("pack", "ledger.jsonl")))
    assert {entry["reason"] for entry in ledger} == {"truncated"}
    assert read_json(paths.metrics("pack"))["train"]["truncated"] == len(ledger)
    assert ledger[0].keys() == {"id", "stage", "reason"}


def test_too_many_lost_tokens_stop_the_stage_with_the_way_out(paths: Paths) -> None:
    with pytest.raises(
        ValueError, match=r"trained tokens of the train rows are lost at pack\.max_length 60.*raise pack"
    ):
        pack.run(params(max_length=60), paths)
    assert not paths.out("pack").exists()


def test_a_limit_below_every_answer_leaves_nothing_to_train(paths: Paths) -> None:
    with pytest.raises(ValueError, match=r"no trainable token is left in the train rows.*raise pack\.max_length"):
        pack.run(params(max_length=8), paths)
