"""A merged checkpoint, read back from disk, computes the same as base and adapter; otherwise none is written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sft.chat.formats import setup_chat_format
from sft.config import ModelConfig
from sft.export import merge, merge_by_file
from sft.export.merge import merge_adapter
from sft.export.merge_by_file import StreamedModel, Unit
from sft.export.merge_in_memory import merge_into_base
from sft.export.proof import check_logits, compare_logits
from sft.models.adapters import wrap_adapter
from sft.models.kbit import get_quantization_config
from sft.models.loading import load_model
from sft.models.saved_adapters import load_adapter
from tests.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.numerics

ROOT = Path(__file__).resolve().parents[3]
RIGHT = merge_by_file.merged_weights
ROWS = [list(range(5, 45)), list(range(60, 80)), [7]]
BOTH = {"modules_to_save": ["embed_tokens", "lm_head"]}


def save_base(folder: Path, **overrides: Any) -> Path:
    tiny_model(**overrides).save_pretrained(folder)
    return folder


def train_adapter(model: PreTrainedModel, config: Any, folder: Path, steps: int = 4, tokenizer: Any = None) -> Any:
    torch.manual_seed(0)
    adapted = wrap_adapter(model, config, tokenizer)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.02)
    for _ in range(steps):
        adapted(input_ids=torch.tensor(ROWS[:1]), labels=torch.tensor(ROWS[:1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.save_pretrained(folder)
    return adapted.eval()


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})


def assert_peft_merges_the_same(base: Path, adapter: Path, merged: Path) -> None:
    """Check that the checkpoint equals, bit by bit, what peft merges with the complete model in memory."""
    expected = merge_into_base(load_adapter(load_model(base), adapter))
    written = AutoModelForCausalLM.from_pretrained(merged).state_dict()
    assert written.keys() == expected.state_dict().keys()
    different = [name for name, tensor in expected.state_dict().items() if not torch.equal(tensor, written[name])]
    assert different == []


@pytest.mark.parametrize(
    ("options", "tied"),
    [
        ({}, True),
        ({"use_dora": True}, True),
        ({"use_rslora": True, "target_modules": ["q_proj", "v_proj"]}, True),
        (BOTH, True),
        ({"modules_to_save": ["embed_tokens"]}, True),
        ({"modules_to_save": ["lm_head"]}, True),
        ({"trainable_token_indices": {"embed_tokens": [5, 6]}}, True),
        ({"target_modules": ["q_proj", "embed_tokens"]}, True),
        ({"target_modules": ["q_proj", "lm_head"]}, True),
        ({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, True),
        (BOTH, False),
        ({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, False),
        ({"trainable_token_indices": {"embed_tokens": [5, 6], "lm_head": [5, 6]}}, False),
    ],
    ids=str,
)
def test_merged_logits_are_those_of_base_and_adapter(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, options: dict[str, Any], tied: bool
) -> None:
    base = save_base(tmp_path / "base", tie_word_embeddings=tied)
    adapted = train_adapter(load_model(base), lora(**options), tmp_path / "adapter")
    report = merge_adapter(base, tmp_path / "adapter", tmp_path / "merged", ROWS, tolerance=1e-4)
    assert "complete model in memory" not in caplog.text
    assert_peft_merges_the_same(base, tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.tensor(ROWS[:1])
    torch.testing.assert_close(merged(input_ids=ids).logits, adapted(input_ids=ids).logits, atol=1e-4, rtol=0)
    assert report.max_logit_diff <= 1e-4 < 1e-3 < report.adapter_effect
    assert report.num_positions == 61
    assert report.tied_embeddings is tied
    assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) is tied


def test_head_and_embeddings_that_were_trained_apart_are_both_kept(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    torch.manual_seed(0)
    config = lora(target_modules=["q_proj", "embed_tokens", "lm_head"], init_lora_weights=False)
    adapted = get_peft_model(load_model(base), config).eval()  # without the tie that wrap_adapter asks for
    adapted.save_pretrained(tmp_path / "adapter")
    report = merge_adapter(base, tmp_path / "adapter", tmp_path / "merged", ROWS, tolerance=1e-4)
    assert report.tied_embeddings is False
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox", "phi", "qwen3", "gemma"])
def test_other_families_merge_as_well(tmp_path: Path, family: str) -> None:
    base = tmp_path / "base"
    tiny_model(family).save_pretrained(base)
    train_adapter(load_model(base), lora(), tmp_path / "adapter")
    report = merge_adapter(base, tmp_path / "adapter", tmp_path / "merged", ROWS, tolerance=1e-4)
    assert report.max_logit_diff <= 1e-4
    assert report.num_adapted_modules > 0


def test_other_adapters_merge_as_well(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
    train_adapter(load_model(base), config, tmp_path / "adapter")
    assert merge_adapter(base, tmp_path / "adapter", tmp_path / "merged", ROWS, tolerance=1e-4).num_adapted_modules == 4


def test_folder_holds_tokenizer_and_generation_config(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    train_adapter(load_model(base), lora(), tmp_path / "adapter")
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged", ROWS, tokenizer=tiny_tokenizer())
    assert sorted(file.name for file in (tmp_path / "merged").iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter", "base", "merged"]
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == len(tiny_tokenizer())


def test_generation_stops_at_the_eos_of_the_tokenizer_too(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", eos_token_id=0)
    train_adapter(load_model(base), lora(), tmp_path / "adapter")
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged", ROWS, tokenizer=tiny_tokenizer())
    config = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert config["eos_token_id"] == [tiny_tokenizer().eos_token_id, 0]


def test_half_precision_is_proven_against_its_own_rounding(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    train_adapter(load_model(base), lora(), tmp_path / "adapter")
    with pytest.raises(
        ValueError, match=r"as bfloat16, differs from the trained one.*raise the tolerance, or save float32"
    ):
        merge_adapter(base, tmp_path / "adapter", tmp_path / "merged", ROWS, tolerance=1e-6, dtype="bfloat16")
    report = merge_adapter(base, tmp_path / "adapter", tmp_path / "merged", ROWS, tolerance=0.1, dtype="bfloat16")
    assert report.dtype == "bfloat16"
    assert 1e-6 < report.max_logit_diff < 0.1
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype is torch.bfloat16


def test_failed_proof_leaves_nothing(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    train_adapter(load_model(base), lora(), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"logits differ by up to .* and the tolerance is 1e-12"):
        merge_adapter(base, tmp_path / "adapter", tmp_path / "merged", ROWS, tolerance=1e-12)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize("place", ["a layer", "the file", "the complete model"])
def test_a_broken_merge_is_caught_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    base = save_base(tmp_path / "base")
    config: Any = lora()
    if place == "the complete model":  # adapters other than LoRA are merged in memory
        config = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    train_adapter(load_model(base), config, tmp_path / "adapter")
    broken = {
        "a layer": (merge_by_file, "merged_weights", lose_a_layer),
        "the file": (merge_by_file, "save_file", lose_in_file),
        "the complete model": (merge, "merge_into_base", lose_in_memory),
    }
    monkeypatch.setattr(*broken[place])
    with pytest.raises(ValueError, match=r"logits differ by up to .* \(mean .*, and the tolerance is 1e-06"):
        merge_adapter(base, tmp_path / "adapter", tmp_path / "merged", ROWS, tolerance=1e-6)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter", "base"]


def lose_a_layer(source: StreamedModel, unit: Unit) -> list[tuple[str, torch.Tensor]]:
    """Return the weights of a unit; for one layer, those without the adapter."""
    if unit.path == "model.layers.1.mlp.up_proj":
        return [(f"{unit.path}.weight", source.files.tensor(f"{unit.path}.weight"))]
    return RIGHT(source, unit)


def lose_in_file(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
    """Save tensors with one row of a weight set to zero."""
    tensors["model.layers.1.mlp.up_proj.weight"][0] = 0.0
    save_file(tensors, file, metadata=metadata)


def lose_in_memory(peft_model: PeftModel) -> PreTrainedModel:
    """Merge in memory, and set one row of a weight to zero."""
    merged = merge_into_base(peft_model)
    merged.model.layers[1].mlp.up_proj.weight.data[0] = 0.0
    return merged


SHARDS = """
import json, sys, threading, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from sft.export.merge import merge_adapter
from tests.sft.export.test_merge import Memory
folder = Path(sys.argv[1])
merge_adapter(folder / "small", folder / "small_adapter", folder / "unused", [[5]])  # imports all modules
dtype, tolerance = sys.argv[2], float(sys.argv[3])
with Memory() as memory:
    rows = [[5, 6, 7], [9]]
    report = merge_adapter(folder / "base", folder / "adapter", folder / "merged", rows, tolerance, dtype)
print(json.dumps({"peak_mb": memory.peak_mb, "difference": report.max_logit_diff}))
"""


class Memory:
    """Peak of the anonymous memory of this process (without mapped files), relative to its value at the start."""

    def __init__(self) -> None:
        self.peak_mb = 0.0
        self._done = threading.Event()
        self._watch = threading.Thread(target=self._look)

    def _look(self) -> None:
        start = own_mb()
        while not self._done.wait(0.002):
            self.peak_mb = max(self.peak_mb, own_mb() - start)

    def __enter__(self) -> Memory:
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watch.join()


def own_mb() -> float:
    """Return the anonymous memory of this process (without mapped files), in megabytes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) / 1000  # type: ignore[index]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read as Linux tells it")
@pytest.mark.parametrize(("dtype", "tolerance", "shard"), [("float32", 1e-3, "8MB"), ("bfloat16", 1.0, "4MB")])
def test_memory_is_bounded_by_the_largest_file_and_not_by_the_model(
    tmp_path: Path, dtype: str, tolerance: float, shard: str
) -> None:
    model = tiny_model(hidden_size=256, intermediate_size=1024, num_hidden_layers=40).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "base", max_shard_size=shard)
    adapted = get_peft_model(model.float(), lora(init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    files = sorted((tmp_path / "base").glob("*.safetensors"))
    total_mb, largest_mb = (fold(file.stat().st_size / 1e6 for file in files) for fold in (sum, max))
    assert len(files) > 15
    small = get_peft_model(load_model(save_base(tmp_path / "small")), lora(init_lora_weights=False))
    small.save_pretrained(tmp_path / "small_adapter")
    command = [sys.executable, "-c", SHARDS, str(tmp_path), dtype, str(tolerance)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["difference"] < tolerance
    # adapters and empty layers of two models take 20 to 25 MB for any size of the base
    assert found["peak_mb"] < 3 * largest_mb + 32 < 0.7 * total_mb
    merged = sorted((tmp_path / "merged").glob("*.safetensors"))
    assert [file.name for file in merged] == [file.name for file in files]
    if dtype == "float32":  # what peft merges is not rounded
        assert_peft_merges_the_same(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")


def test_what_can_not_be_merged_by_file_is_merged_in_memory_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = save_base(tmp_path / "base")
    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    train_adapter(load_model(base), config, tmp_path / "adapter")
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged", ROWS, tolerance=1e-4)
    assert "with the complete model in memory: adapters of type IA3" in caplog.text


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_base_of_half_precision_is_merged_in_float32(tmp_path: Path, stored: str) -> None:
    tiny_model().to(getattr(torch, stored)).save_pretrained(tmp_path / "base")
    train_adapter(load_model(tmp_path / "base"), lora(), tmp_path / "adapter")
    merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", ROWS, tolerance=1e-4)
    assert_peft_merges_the_same(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype is torch.float32


def test_configs_are_those_that_transformers_writes(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    train_adapter(load_model(base), lora(), tmp_path / "adapter")
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged", ROWS, dtype="bfloat16", tolerance=0.1)
    load_model(base, dtype="bfloat16").save_pretrained(tmp_path / "expected")
    for name in ("config.json", "generation_config.json"):
        ours, theirs = (json.loads((tmp_path / where / name).read_text()) for where in ("merged", "expected"))
        assert ours == theirs


def test_adapter_of_a_four_bit_base_goes_into_the_plain_one(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", hidden_size=64, intermediate_size=128)
    quantized = load_model(base, quantization_config=get_quantization_config(ModelConfig(load_in_4bit=True)))
    train_adapter(quantized, lora(), tmp_path / "adapter")
    report = merge_adapter(base, tmp_path / "adapter", tmp_path / "merged", ROWS, tolerance=1e-4)
    assert report.max_logit_diff <= 1e-4
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    assert report.dtype == "float32"


def test_quantized_base_on_disk_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", hidden_size=64, intermediate_size=128)
    quantized = load_model(base, quantization_config=get_quantization_config(ModelConfig(load_in_4bit=True)))
    quantized.save_pretrained(tmp_path / "quantized")
    train_adapter(load_model(base), lora(), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"are quantized \(bitsandbytes\).*Give the plain base"):
        merge_adapter(tmp_path / "quantized", tmp_path / "adapter", tmp_path / "merged", ROWS)


def test_adapter_that_was_never_trained_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    train_adapter(load_model(base), lora(), tmp_path / "adapter", steps=0)
    with pytest.raises(ValueError, match="changes no logit of the first sample row"):
        merge_adapter(base, tmp_path / "adapter", tmp_path / "merged", ROWS)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"num_hidden_layers": 3}, "belongs to another base: 2 of its weights are missing"),
        ({"num_hidden_layers": 1}, "belongs to another base: 0 of its weights are missing .* and 2 have no place"),
        ({"hidden_size": 32}, "does not fit LlamaForCausalLM: .*size mismatch"),
    ],
)
def test_adapter_of_another_base_is_refused(tmp_path: Path, overrides: dict[str, int], words: str) -> None:
    train_adapter(tiny_model(), lora(target_modules=["q_proj"]), tmp_path / "adapter")
    other = save_base(tmp_path / "base", **overrides)
    with pytest.raises(ValueError, match=words):
        merge_adapter(other, tmp_path / "adapter", tmp_path / "merged", ROWS)


def test_damaged_adapter_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    train_adapter(load_model(base), lora(), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = {name: tensor * float("nan") for name, tensor in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="NaN"):
        merge_adapter(base, tmp_path / "adapter", tmp_path / "merged", ROWS)
    assert not (tmp_path / "merged").exists()


def test_prompt_tuning_has_no_merged_form(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    get_peft_model(load_model(base), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).save_pretrained(
        tmp_path / "adapter"
    )
    with pytest.raises(ValueError, match=r"PROMPT_TUNING adapter .* can't be merged"):
        merge_adapter(base, tmp_path / "adapter", tmp_path / "merged", ROWS)


@pytest.mark.parametrize(
    ("rows", "dtype", "words"),
    [([], "float32", "has no rows"), ([[]], "float32", "or empty ones"), (ROWS, "auto", "name the dtype to save")],
)
def test_merge_without_a_proof_is_refused(tmp_path: Path, rows: list[list[int]], dtype: str, words: str) -> None:
    base = save_base(tmp_path / "base")
    train_adapter(load_model(base), lora(), tmp_path / "adapter")
    with pytest.raises(ValueError, match=words):
        merge_adapter(base, tmp_path / "adapter", tmp_path / "merged", rows, dtype=dtype)


def test_folder_with_something_in_it_is_not_written_to(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    train_adapter(load_model(base), lora(), tmp_path / "adapter")
    with pytest.raises(ValueError, match="is not empty"):
        merge_adapter(base, tmp_path / "adapter", base, ROWS)


def test_folder_without_adapter_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    with pytest.raises(ValueError, match=r"holds no adapter: it has no adapter_config.json"):
        merge_adapter(base, base, tmp_path / "merged", ROWS)


def test_new_tokens_that_outgrow_the_vocabulary_survive_the_merge(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    tiny_tokenizer().save_pretrained(base)
    model, tokenizer = setup_chat_format(load_model(base), AutoTokenizer.from_pretrained(base), "llama3")
    assert len(tokenizer) > tiny_model().config.vocab_size
    adapted = train_adapter(model, lora(), tmp_path / "adapter", tokenizer=tokenizer)
    rows = [[*ROWS[0], tokenizer.eos_token_id]]
    report = merge_adapter(base, tmp_path / "adapter", tmp_path / "merged", rows, 1e-4, tokenizer=tokenizer)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.tensor(rows)
    torch.testing.assert_close(merged(input_ids=ids).logits, adapted(input_ids=ids).logits, atol=1e-4, rtol=0)
    assert report.tied_embeddings is True


def test_full_weights_are_copied_under_the_same_proof(tmp_path: Path) -> None:
    source = save_base(tmp_path / "source")
    report = merge_adapter(source, None, tmp_path / "copy", ROWS, tokenizer=tiny_tokenizer())
    assert (report.max_logit_diff, report.adapter_effect, report.num_adapted_modules) == (0.0, 0.0, 0)
    ours, copied = tiny_model().state_dict(), AutoModelForCausalLM.from_pretrained(tmp_path / "copy").state_dict()
    assert all(torch.equal(ours[name], copied[name]) for name in ours)


def test_comparison_counts_what_it_compares() -> None:
    reference = [torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
    found = [torch.tensor([[1.0, 2.5], [0.0, 3.0]]), torch.tensor([[0.0, 1.0]])]
    difference = compare_logits(reference, found)
    assert difference.largest == 3.0
    assert difference.mean == pytest.approx(6.5 / 6)
    assert difference.top_token_agreement == pytest.approx(2 / 3)
    assert difference.num_positions == 3


@pytest.mark.parametrize("nan_first", [True, False])
def test_nan_never_passes_the_proof(nan_first: bool) -> None:
    good, bad = torch.zeros(2, 3), torch.full((2, 3), float("nan"))
    found = [bad, good] if nan_first else [good, bad]
    with pytest.raises(ValueError, match="differ by up to nan"):
        check_logits(compare_logits([good, good], found), tolerance=1e9, state="in a test")
