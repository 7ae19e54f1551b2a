"""The preview shows exactly what is trained."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset

from sft.chat.render import render
from sft.labels import IGNORE_INDEX
from sft.tokens import preview
from sft.tokens.encoding import encode_batch
from sft.tokens.preview import Piece, preview_masks, role_characters, token_pieces
from tests.tiny import tiny_tokenizer

CHAT = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Paris é."}]


def test_trained_tokens_stand_in_brackets() -> None:
    tokenizer = tiny_tokenizer()
    text = preview_masks([{"messages": CHAT}], tokenizer)
    assert "row 0: 23 tokens, 7 trained (30.4%)" in text
    assert "⟦Pa·ris· ·é·.·<|im_end|>⟧" in text
    assert text.count("⟦") == 2  # one in the legend
    assert "characters: user 8%, assistant 11%, template 81%" in text


def test_pieces_join_the_bytes_of_a_character() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("é🎉<|im_end|>", add_special_tokens=False)["input_ids"]
    assert len(ids) == 7
    pieces = token_pieces(ids, [IGNORE_INDEX] * 6 + ids[6:], tokenizer)
    assert pieces == [Piece("é", False), Piece("🎉", False), Piece("<|im_end|>", True)]


def test_half_a_character_is_shown_as_such() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("🎉", add_special_tokens=False)["input_ids"][:2]
    assert token_pieces(ids, ids, tokenizer) == [Piece("\ufffd", True), Piece("\ufffd", True)]


def test_packed_rows_show_their_documents_apart() -> None:
    tokenizer = tiny_tokenizer()
    documents = encode_batch([render({"messages": CHAT}, tokenizer)] * 2, tokenizer)
    packed = {name: documents[0][name] + documents[1][name] for name in ("input_ids", "labels")}
    lengths = [len(document["input_ids"]) for document in documents]
    text = preview_masks(Dataset.from_list([{**packed, "seq_lengths": lengths}]), tokenizer)
    assert "row 0: 46 tokens, 14 trained (30.4%), 2 documents" in text
    assert text.count("⟦Pa·ris· ·é·.·<|im_end|>⟧") == 2


def test_the_sample_is_seeded() -> None:
    tokenizer = tiny_tokenizer()
    rows = [{"prompt": f"Question {i}", "completion": " Answer"} for i in range(12)]
    assert preview_masks(rows, tokenizer, 3, seed=1) == preview_masks(rows, tokenizer, 3, seed=1)
    assert preview_masks(rows, tokenizer, 3, seed=1) != preview_masks(rows, tokenizer, 3, seed=2)
    assert "12 of 12 rows" in preview_masks(rows, tokenizer, 80)


def test_all_records_of_a_preview_share_one_renderer_and_one_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    for kind in (preview.ChatRenderer, preview.Encoder):

        class Counted(kind):  # type: ignore[valid-type, misc]
            def __init__(self, *args: Any) -> None:
                made.append(type(self).__mro__[1].__name__)
                super().__init__(*args)

        monkeypatch.setattr(preview, kind.__name__, Counted)
    assert "3 of 4 rows" in preview_masks([{"messages": CHAT}] * 4, tiny_tokenizer())
    assert made == ["ChatRenderer", "Encoder"]


def test_colour_replaces_brackets() -> None:
    text = preview_masks([{"messages": CHAT}], tiny_tokenizer(), colour=True)
    assert "⟦" not in text
    assert "\033[30;42mPa·ris· ·é·.·<|im_end|>\033[0m" in text


def test_characters_are_counted_by_role() -> None:
    assert role_characters({"messages": CHAT}) == {"user": 6, "assistant": 8}
    assert role_characters({"prompt": "ab", "completion": "c"}) == {"prompt": 2, "completion": 1}
    assert role_characters({"text": "abc"}) == {"text": 3}
