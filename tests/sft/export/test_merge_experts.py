"""Adapters on experts merge into checkpoints that compute what base and adapter do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from sft.export.merge import merge_adapter
from sft.export.merge_in_memory import AdapterMix
from sft.models.adapters import wrap_adapter
from tests.tiny_moe import tiny_moe

pytestmark = pytest.mark.numerics

ROWS = [list(range(5, 25)), list(range(60, 70))]
FAMILIES = ("mixtral", "gpt_oss", "deepseek_v3", "jetmoe")
"""Experts under other names in the files, stacked there, beside dense and shared ones, and inside attention."""


def save_adapter(family: str, folder: Path) -> torch.Tensor:
    """Save an adapter with random values, and return the logits of base and adapter on the first row."""
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(1)
    model = wrap_adapter(tiny_moe(family), config).eval()
    model.save_pretrained(folder)
    with torch.no_grad():
        return model(torch.tensor(ROWS[:1]), use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_checkpoint_computes_what_base_and_adapter_do(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_moe(family).save_pretrained(tmp_path / "base")
    expected = save_adapter(family, tmp_path / "adapter")
    report = merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", ROWS, tolerance=1e-4)
    assert report.max_logit_diff < 1e-5 < report.adapter_effect
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        found = merged(torch.tensor(ROWS[:1]), use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert "in memory: the adapter changes parameters instead of layers" in caplog.text


def test_experts_that_were_trained_in_full_are_copied(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_moe("mixtral")
    model.save_pretrained(tmp_path / "trained")
    report = merge_adapter(tmp_path / "trained", None, tmp_path / "copy", ROWS)
    assert (report.max_logit_diff, report.adapter_effect, report.num_adapted_modules) == (0.0, 0.0, 0)
    assert f"the base {tmp_path / 'trained'} is copied with the complete model in memory" in caplog.text
    copied = AutoModelForCausalLM.from_pretrained(tmp_path / "copy").state_dict()
    assert [name for name, value in model.state_dict().items() if not torch.equal(copied[name], value)] == []


def test_mix_of_adapters_on_experts_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    for name in "ab":
        save_adapter("mixtral", tmp_path / name)
    mix = AdapterMix([tmp_path / "a", tmp_path / "b"], [0.5, 0.5])
    with pytest.raises(ValueError, match="was made with target_parameters: only adapters that add"):
        merge_adapter(tmp_path / "missing", mix, tmp_path / "merged", ROWS)
