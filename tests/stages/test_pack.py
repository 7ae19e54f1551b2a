"""Rendered chats become packed rows, and every token is accounted for."""

from __future__ import annotations

import re
from bisect import bisect_right
from pathlib import Path
from typing import Any

import pytest
from datasets import load_from_disk

from sft.labels import IGNORE_INDEX
from stages import pack
from stages.checkout.artifacts import read_json, read_jsonl, write_json, write_jsonl
from stages.checkout.paths import Paths
from stages.params.schema import Params, load_params
from stages.shards import shards
from stages.tools import preview
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
    source = {"path": "rows.jsonl", "purpose": "train", "kind": "messages", "columns": ["messages"]}
    source |= {"unused": ["score"], "num_rows": 13}
    counts = {"num_rows_in": 13, "num_train": 12, "num_eval": 2, "num_repeated": 0, "num_omitted": 0, "num_dropped": 1}
    write_json(paths.out("load", "card.json"), {"sources": [{**source, "dropped": {"duplicate": 1}}], **counts})
    write_jsonl(paths.out("load", "train.jsonl"), (record(number, 1 + number % 4) for number in range(13)))
    write_jsonl(
        paths.out("load", "ledger.jsonl"),
        [{"id": "rows.jsonl:99", "stage": "load", "reason": "duplicate", "action": "drop"}],
    )
    return paths


def record(number: int, repeats: int) -> dict[str, Any]:
    """What `load` wrote of the same chat."""
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": SENTENCE * repeats}]
    return {"id": f"rows.jsonl:{number}", "messages": turns}


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


def test_rows_of_one_record_are_packed_next_to_each_other(paths: Paths) -> None:
    rows = [
        {**rendered(number, repeats), "turn": turn}
        for number in range(4)
        for turn, repeats in ((1, 2), (3, 2 + number % 2))
    ]
    write_jsonl(paths.out("format", "train.jsonl"), rows)
    lengths = [len(tiny_tokenizer()(row["text"], add_special_tokens=False)["input_ids"]) for row in rows[2:4]]
    pack.run(params(max_length=sum(lengths)), paths)
    ids = [entry["ids"] for entry in read_jsonl(paths.out("pack", "train_index.jsonl"))]
    assert sorted(ids) == [[f"rows.jsonl:{number}"] * 2 for number in range(4)]


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
    figures = read_json(paths.metrics("pack"))
    assert figures["train"]["truncated"] == len(ledger)
    assert ledger[0].keys() == {"id", "stage", "reason", "action", "tokens_lost", "trained_tokens_lost"}
    assert {entry["action"] for entry in ledger} == {"cut"}


OVERFLOWS = [
    {"overflow": "truncate"},
    {"overflow": "drop"},
    {"overflow": "split"},
    {"overflow": "truncate", "strategy": "none"},
    {"overflow": "split", "strategy": "wrapped"},
    {"overflow": "split", "strategy": "bfd_split"},
]


@pytest.mark.parametrize("overflow", ["truncate", "drop", "error"])
def test_a_strategy_that_divides_is_refused_where_the_limit_does_not(overflow: str) -> None:
    with pytest.raises(ValueError, match=r"strategy bfd_split divides longer documents.* state overflow: split"):
        params(strategy="bfd_split", overflow=overflow)


@pytest.mark.parametrize("section", OVERFLOWS)
def test_tokens_in_are_tokens_out_and_tokens_of_the_ledger(paths: Paths, section: dict[str, str]) -> None:
    pack.run(params(max_length=100, max_lost_fraction=0.9, **section), paths)
    tokenizer, ledger = tiny_tokenizer(), list(read_jsonl(paths.out("pack", "ledger.jsonl")))
    for split in ("train", "eval"):
        rendered_rows = list(read_jsonl(paths.out("format", f"{split}.jsonl")))
        num_in = sum(len(tokenizer(row["text"])["input_ids"]) for row in rendered_rows)
        num_out = sum(map(len, load_from_disk(str(paths.out("pack", split)))["input_ids"]))
        figures = read_json(paths.metrics("pack"))[split]
        assert (num_out, num_in) == (figures["tokens"], figures["tokens"] + figures["tokens_lost"])
    touched = {"truncate": "truncated", "drop": "dropped", "split": "split"}[section["overflow"]]
    assert touched in {entry["reason"] for entry in ledger}
    lost = [figures["tokens_lost"] for figures in read_json(paths.metrics("pack")).values()]
    assert sum(entry["tokens_lost"] for entry in ledger) == sum(lost)
    assert (sum(lost) == 0) == (section["overflow"] == "split")
    assert any(entry["reason"] == "divided" for entry in ledger) == (section.get("strategy") == "wrapped")


@pytest.mark.parametrize("section", OVERFLOWS)
def test_every_packed_token_leads_back_to_its_record_and_its_place_there(paths: Paths, section: dict[str, str]) -> None:
    pack.run(params(max_length=100, max_lost_fraction=0.9, **section), paths)
    tokenizer = tiny_tokenizer()
    ids = {row["id"]: tokenizer(row["text"])["input_ids"] for row in read_jsonl(paths.out("format", "train.jsonl"))}
    packed = load_from_disk(str(paths.out("pack", "train")))
    entries = list(read_jsonl(paths.out("pack", "train_index.jsonl")))
    origins = []
    for row, entry in zip(packed, entries, strict=True):
        for position, token in enumerate(row["input_ids"]):
            place = bisect_right(entry["ends"], position)
            begin = entry["ends"][place - 1] if place else 0
            origin = entry["ids"][place], entry["starts"][place] + position - begin
            assert ids[origin[0]][origin[1]] == token
            origins.append(origin)
    assert len(set(origins)) == len(origins) == read_json(paths.metrics("pack"))["train"]["tokens"]


def test_parts_with_their_prompts_lead_back_to_their_records(paths: Paths) -> None:
    pack.run(params(max_length=100, overflow="split_with_prompt", max_lost_fraction=0.0501), paths)
    tokenizer = tiny_tokenizer()
    ids = {row["id"]: tokenizer(row["text"])["input_ids"] for row in read_jsonl(paths.out("format", "train.jsonl"))}
    figures = read_json(paths.metrics("pack"))["train"]
    assert (figures["answers_cut"], figures["tokens_lost"]) == (0, 0)
    num_repeated = num_continued = 0
    for row, entry in zip(
        load_from_disk(str(paths.out("pack", "train"))), read_jsonl(paths.out("pack", "train_index.jsonl")), strict=True
    ):
        begin = 0
        for name, end, start, prompt, following in zip(
            *(entry[key] for key in ("ids", "ends", "starts", "prompts", "continues")), strict=True
        ):
            rest = end - begin - prompt
            assert row["input_ids"][begin:end] == [
                *ids[name][start : start + prompt],
                *ids[name][following : following + rest],
            ]
            assert row["labels"][begin : begin + prompt + bool(prompt)] == [IGNORE_INDEX] * (prompt + bool(prompt))
            num_repeated, num_continued = num_repeated + prompt, num_continued + bool(prompt)
            begin = end
    assert (figures["tokens_repeated"], figures["trained_tokens_lost"]) == (num_repeated, num_continued)
    assert num_continued > 0
    page = paths.data_page.read_text(encoding="utf-8")
    assert (
        f"Length limit, train: {figures['split']} documents are divided; prompts that are repeated have {num_repeated}"
        in page
    )


def test_split_says_which_answers_it_cuts_from_their_prompts(paths: Paths) -> None:
    with pytest.raises(
        ValueError,
        match=r"allows: \d+\.\d% are answers that are cut from their prompts; of other lengths, \d+ keeps all; "
        r"first rows: rows\.jsonl:\d+ \(split\).*set pack\.overflow to split_with_prompt, or raise pack\.max_lost",
    ):
        pack.run(params(max_length=100, overflow="split", max_lost_fraction=0.0), paths)
    pack.run(params(max_length=100, overflow="split", max_lost_fraction=0.9), paths)
    figures = read_json(paths.metrics("pack"))["train"]
    assert figures["answers_cut"] > 0
    page = paths.data_page.read_text(encoding="utf-8")
    assert f"{figures['answers_cut']} answers are trained without their whole prompt" in page
    assert "nothing lost" not in page


def test_other_lengths_are_named_with_what_they_keep(paths: Paths) -> None:
    write_jsonl(paths.out("format", "train.jsonl"), (rendered(number, 3 + 30 * number) for number in range(3)))
    with pytest.raises(
        ValueError,
        match=r"are in no row; of other lengths, 512 keeps 4\d\.\d%, 1,024 keeps 8\d\.\d%, 1,\d+ keeps all;",
    ):
        pack.run(params(max_length=100), paths)
    with pytest.raises(ValueError, match=r"Raise max_length \(of the rows, 512 keeps 33\.3%, .* keeps all\)"):
        pack.run(params(max_length=100, overflow="error"), paths)


def test_a_strategy_that_divides_anywhere_keeps_no_prompts() -> None:
    with pytest.raises(ValueError, match="could not keep their prompts; state strategy: bfd"):
        params(strategy="wrapped", overflow="split_with_prompt")


def test_the_same_bytes_whatever_the_number_of_processes(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    pack.run(params(max_length=100, max_lost_fraction=0.9, num_proc=1), paths)
    first = {path: path.read_bytes() for path in paths.out("pack").rglob("*") if path.is_file()}
    monkeypatch.setattr(shards, "SHARD_BYTES", 600)
    assert len(shards.shards_of(paths.out("format", "train.jsonl"))) >= 2 * shards.SHARDS_PER_PROCESS
    pack.run(params(max_length=100, max_lost_fraction=0.9, num_proc=2), paths)
    assert {path: path.read_bytes() for path in paths.out("pack").rglob("*") if path.is_file()} == first


def test_a_token_across_a_border_is_warned_of_and_listed(paths: Paths, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [rendered(number, 2) for number in range(12)]
    for row in rows[3:5]:
        row["spans"][0][0] += 2
    write_jsonl(paths.out("format", "train.jsonl"), iter(rows))
    pack.run(params(), paths)
    figures = read_json(paths.metrics("pack"))
    ledger = [entry for entry in read_jsonl(paths.out("pack", "ledger.jsonl")) if entry["reason"] == "border_in_token"]
    assert [(entry["id"], entry["action"]) for entry in ledger] == [("rows.jsonl:3", "warn"), ("rows.jsonl:4", "warn")]
    assert ledger[0]["detail"].startswith("the token 'The' lies across the border of what is trained: ")
    assert (figures["train"]["border_in_token"], figures["eval"]["border_in_token"]) == (2, 0)
    assert "warning: in 2 documents a token lies across the border" in capsys.readouterr().out


def test_too_many_lost_tokens_stop_the_stage_with_the_way_out(paths: Paths) -> None:
    with pytest.raises(
        ValueError, match=r"trained tokens of the train rows are lost at pack\.max_length 60.*raise pack"
    ):
        pack.run(params(max_length=60), paths)
    assert not paths.out("pack").exists()


def test_a_limit_below_every_answer_leaves_nothing_to_train(paths: Paths) -> None:
    with pytest.raises(ValueError, match=r"no trainable token is left in the train rows.*raise pack\.max_length"):
        pack.run(params(max_length=8), paths)


def test_the_page_shows_tokens_roles_lengths_and_what_was_left_out(paths: Paths) -> None:
    pack.run(params(), paths)
    page = paths.data_page.read_text(encoding="utf-8")
    assert page.count("<article>") == 5
    trained = re.sub(
        r"<[^>]+>", "", "".join(re.findall(r'<span class="t">.*?</span>', page.split("Coloured")[1], re.S))
    )
    assert trained.startswith(SENTENCE.strip())
    assert "Hello" not in trained
    assert "13 rows were read: 12 to train on, 2 held out, 1 left out." in page
    roles = re.findall(r'<th scope="row">(\w+)</th><td class="num">(\S+?)\s*%</td><td class="num">(\S+?)\s*%', page)
    shares = {role: float(trained) for role, _, trained in roles}
    assert shares["user"] == 0
    assert shares["assistant"] == 100
    assert 0 < shares["template"] < 50
    assert "rows.jsonl:99" in page
    assert page.count("<svg") == 3
    assert "http" not in page.replace("http-equiv", "")


def test_what_a_document_says_cannot_break_out_of_the_page(paths: Paths) -> None:
    evil = rendered(0, 1)
    evil["text"] = evil["text"].replace("quick", "<script>alert(1)</script>")
    evil["spans"] = [[0, len(evil["text"]), 1.0]]
    write_jsonl(paths.out("format", "train.jsonl"), [evil])
    pack.run(params(), paths)
    assert "<script" not in paths.data_page.read_text(encoding="utf-8")


def test_preview_prints_rows_in_the_terminal(paths: Paths, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="sft pack"):
        preview.run(params(), paths)
    pack.run(params(), paths)
    capsys.readouterr()
    preview.run(params(), paths, rows=2, seed=1)
    printed = capsys.readouterr().out
    assert printed.startswith("2 of ")
    assert "⟦" in printed


def test_plain_text_has_a_page_too(paths: Paths) -> None:
    texts = [SENTENCE.strip() for _ in range(12)]
    write_jsonl(paths.out("load", "train.jsonl"), ({"id": f"t:{n}", "text": text} for n, text in enumerate(texts)))
    spans = {"spans": [[0, len(texts[0]), 1.0]]}
    rows = ({**rendered(n, 1), "id": f"t:{n}", "text": text, **spans} for n, text in enumerate(texts))
    write_jsonl(paths.out("format", "train.jsonl"), rows)
    pack.run(params(), paths)
    page = paths.data_page.read_text(encoding="utf-8")
    assert '<th scope="row">text</th>' in page
    assert '<th scope="row">template</th>' not in page


def test_the_page_shows_documents_as_the_limit_left_them(paths: Paths) -> None:
    pack.run(params(max_length=64, max_lost_fraction=1.0), paths)
    shown = re.findall(r", (\d+) tokens</p>", paths.data_page.read_text(encoding="utf-8"))
    assert shown
    assert max(map(int, shown)) <= 64


@pytest.mark.parametrize(
    ("section", "lines"),
    [
        (
            {"overflow": "truncate", "max_length": 100},
            [
                '{"id": "rows.jsonl:3", "stage": "pack", "reason": "border_in_token", "action": "warn", "detail": "the '
                "token 'The' lies across the border of what is trained: 'rt|>assistant\\\\nTh' | 'e quick brown fo'\", "
                '"tokens_lost": 0, "trained_tokens_lost": 0}',
                '{"id": "rows.jsonl:3", "stage": "pack", "reason": "truncated", "action": "cut", '
                '"tokens_lost": 7, "trained_tokens_lost": 7}',
            ],
        ),
        (
            {"overflow": "drop", "max_length": 100},
            [
                '{"id": "rows.jsonl:3", "stage": "pack", "reason": "dropped", "action": "drop", '
                '"tokens_lost": 107, "trained_tokens_lost": 93}',
            ],
        ),
        (
            {"overflow": "truncate", "max_length": 50},
            [
                '{"id": "rows.jsonl:2", "stage": "pack", "reason": "masked", "action": "drop", '
                '"tokens_lost": 84, "trained_tokens_lost": 24}',
            ],
        ),
        (
            {"overflow": "split", "strategy": "wrapped", "max_length": 100},
            [
                '{"id": "rows.jsonl:3", "stage": "pack", "reason": "split", "action": "split", '
                '"tokens_lost": 0, "trained_tokens_lost": 0}',
                '{"id": "rows.jsonl:3", "stage": "pack", "reason": "divided", "action": "split", '
                '"tokens_lost": 0, "trained_tokens_lost": 0}',
            ],
        ),
    ],
)
def test_the_bytes_of_an_entry_of_each_action(paths: Paths, section: dict[str, Any], lines: list[str]) -> None:
    rows = [rendered(number, 1 + number % 4) for number in range(12)]
    rows[2]["spans"][0][0] = len(rows[2]["text"]) - len(SENTENCE + "<|im_end|>")
    rows[3]["spans"][0][0] += 2
    write_jsonl(paths.out("format", "train.jsonl"), iter(rows))
    pack.run(params(max_lost_fraction=1.0, **section), paths)
    written = paths.out("pack", "ledger.jsonl").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line not in written] == []
