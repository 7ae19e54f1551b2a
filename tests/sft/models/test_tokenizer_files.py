"""A tokenizer's files do not depend on the environment of the process that wrote them."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from sft.models.checkpoint import save_tokenizer
from tests.tiny import tiny_tokenizer


@pytest.mark.parametrize("is_offline", [False, True])
def test_a_tokenizer_loaded_offline_is_written_like_any_other(tmp_path: Path, is_offline: bool) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "source", local_files_only=is_offline)
    assert "local_files_only" in loaded.init_kwargs
    save_tokenizer(loaded, tmp_path / "written")
    assert "local_files_only" not in (tmp_path / "written" / "tokenizer_config.json").read_text()
    assert AutoTokenizer.from_pretrained(tmp_path / "written").get_vocab() == loaded.get_vocab()
