"""The attention of a training fits its device and precision, and leaks nothing."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from sft.attention_setup import settle_attention
from sft.config import SFTConfig
from tests.tiny import tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(tmp_path)


def config(folder: str, **options: Any) -> SFTConfig:
    return SFTConfig(output_dir=folder, report_to=[], use_cpu=True, **options)


def test_padded_batches_keep_the_models_attention(folder: str) -> None:
    model = tiny_model("opt")
    before = model.config._attn_implementation
    assert settle_attention(model, config(folder), flat=False) == f"attention {before} on padded batches"
    assert model.config._attn_implementation == before


def test_flat_batches_replace_an_attention_that_leaks(folder: str) -> None:
    model = tiny_model("opt")
    before = model.config._attn_implementation
    settle_attention(model, config(folder), flat=True)
    assert model.config._attn_implementation != before  # opt's own lets documents see each other


def test_forced_flash_is_refused_where_batches_are_padded(folder: str) -> None:
    with pytest.raises(ValueError, match="needs packing=True"):
        settle_attention(tiny_model(), config(folder, force_flash_sdp=True), flat=False)


def test_model_that_is_elsewhere_yet_is_not_probed_and_the_log_says_so(
    folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model().to(torch.device("meta"))
    with caplog.at_level(logging.WARNING, logger="sft.attention_setup"):
        settle_attention(model, config(folder), flat=True)
    assert "not probed for leaks" in caplog.text
