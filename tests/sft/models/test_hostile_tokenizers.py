"""Tokenizers from elsewhere are opened or refused in one message: they fill no memory and end no process."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft.models.checkpoint import CheckpointError, load_tokenizer
from tests.tiny import tiny_tokenizer


def hostile(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    tiny_tokenizer().save_pretrained(folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")
    return folder


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(*rules: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(rules)}


def said(folder: Path) -> str:
    with pytest.raises(CheckpointError) as raised:
        load_tokenizer(folder)
    return str(raised.value)


DOUBLING = [replace({"String": "a"}, "aa")] * 34
INSERTING = [replace({"Regex": ""}, "a")] * 34
CHARACTER_MAP = base64.b64encode((4).to_bytes(4, "little") + b"\0\0\0\0" + b"x" * 5000 + b"\0").decode()


@pytest.mark.parametrize(
    ("rule", "growth"),
    [
        (sequence(*DOUBLING), "3.44e+10"),
        (sequence(*DOUBLING[:20], sequence(*DOUBLING[:14])), "3.44e+10"),
        (sequence(*INSERTING), "3.44e+10"),
        (replace({"Regex": "q"}, "x" * 2000), "4e+03"),
        (sequence(*[{"type": "ByteLevel"}] * 34), "3.44e+10"),
        ({"type": "Precompiled", "precompiled_charsmap": CHARACTER_MAP}, "1e+04"),
    ],
)
def test_rules_that_make_texts_far_longer_are_refused(tmp_path: Path, rule: dict[str, Any], growth: str) -> None:
    folder = hostile(tmp_path, lambda content: content.update(normalizer=rule))
    # with the byte-level rule of the tiny tokenizer, which makes two bytes of some
    assert f"its rules can make a text {growth} times as long, more than 1000 times" in said(folder)


def test_a_post_processor_that_copies_the_text_is_refused(tmp_path: Path) -> None:
    pieces = [{"Sequence": {"id": "A", "type_id": 0}}] * 5000
    rule = {"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": {}}
    message = said(hostile(tmp_path, lambda content: content.update(post_processor=rule)))
    assert "its rules can make a text 1e+04 times as long, more than 1000 times" in message


def test_an_expression_that_backtracks_without_end_is_refused(tmp_path: Path) -> None:
    rule = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    message = said(hostile(tmp_path, lambda content: content.update(pre_tokenizer=rule)))
    assert "it ends in an error of its own code: Onig: Regex search error: retry-limit-in-match over" in message


def test_padding_to_more_tokens_than_fit_into_memory_is_refused(tmp_path: Path) -> None:
    padding = {
        "strategy": {"Fixed": 1 << 33},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 3,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    message = said(hostile(tmp_path, lambda content: content.update(padding=padding)))
    assert "can't be used: " in message


def test_a_tokenizer_of_ordinary_rules_is_opened(tmp_path: Path) -> None:
    rule = sequence({"type": "NFKC"}, replace({"String": "``"}, '"'), replace({"Regex": " {2,}"}, " "))
    folder = hostile(tmp_path, lambda content: content.update(normalizer=rule))
    assert load_tokenizer(folder).decode(load_tokenizer(folder)("a  b")["input_ids"]) == "a b"
