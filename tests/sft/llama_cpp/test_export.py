"""llama.cpp's own converter and quantizer write files that read back as the checkpoint; skipped without them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sft.llama_cpp.export import SPLIT_PATTERNS, export_gguf, pre_tokenizer_name, tensor_kinds
from sft.llama_cpp.programs import LlamaCpp
from stages.engines.programs import llama_cpp
from stages.params.engines import IMPORTANCE_KINDS
from tests.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[3]
ROWS = [list(range(5, 45)), list(range(60, 90))]
# a k-quant has blocks of 256 weights
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}

needs_llama_cpp = pytest.mark.skipif(
    not llama_cpp(ROOT).ready.is_file(), reason="llama.cpp is not installed: `make engines`"
)


def save_tiny(folder: Path, family: str = "llama") -> Path:
    torch.manual_seed(1)
    tiny_model(family, **WIDE).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.slow
@needs_llama_cpp
@pytest.mark.numerics
def test_files_of_every_kind_read_back_as_the_checkpoint(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")
    kinds = ["f32", "f16", "q8_0", "q4_k_m", "iq3_xxs"]
    out = tmp_path / "out"
    reports = export_gguf(source, out, kinds, ROWS, llama_cpp(ROOT), by_importance=IMPORTANCE_KINDS)
    assert sorted(file.name for file in out.iterdir()) == sorted(f"model-{kind}.gguf" for kind in kinds)
    assert [report.kind for report in reports] == kinds
    assert all(report.not_compared is None and report.deviation is not None for report in reports)
    assert reports[0].deviation == pytest.approx(0, abs=1e-5)
    assert tensor_kinds(out / "model-q4_k_m.gguf")["q4_k"] > 0
    assert [report.num_bytes for report in reports] == sorted((r.num_bytes for r in reports), reverse=True)


@pytest.mark.slow
@needs_llama_cpp
@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "mistral"])
def test_families_that_our_own_writer_did_not_know_are_exported(tmp_path: Path, family: str) -> None:
    source = save_tiny(tmp_path / "source", family)
    (report,) = export_gguf(source, tmp_path / "out", ["f16"], ROWS, llama_cpp(ROOT))
    assert report.num_bytes == (tmp_path / "out" / "model-f16.gguf").stat().st_size
    assert report.not_compared is not None or (report.deviation or 0) < 0.02


def test_missing_llama_cpp_is_named_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"llama\.cpp is not installed, .*\.ready is missing: `make engines`"):
        export_gguf(tmp_path, tmp_path / "out", ["f16"], ROWS, LlamaCpp(tmp_path / "none"))
    assert not (tmp_path / "out").exists()


def test_pre_tokenizers_that_llama_cpp_has_a_name_for() -> None:
    def content(*steps: dict[str, object], **model: object) -> dict[str, object]:
        return {
            "model": {"type": "BPE", **model},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(steps)},
        }

    level = {"type": "ByteLevel", "use_regex": False}
    assert pre_tokenizer_name(content({"type": "ByteLevel", "use_regex": True})) == "gpt-2"
    assert pre_tokenizer_name(content({"type": "Digits", "individual_digits": True}, level)) == "smollm"
    for pattern, name in SPLIT_PATTERNS.items():
        assert pre_tokenizer_name(content({"type": "Split", "pattern": {"Regex": pattern}}, level)) == name
    assert pre_tokenizer_name(content({"type": "Split", "pattern": {"Regex": "x"}}, level)) is None
    assert pre_tokenizer_name(content(level, byte_fallback=True)) is None
