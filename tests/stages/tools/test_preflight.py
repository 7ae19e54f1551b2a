"""Values of later stages are refused before training, with their key."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.checkout.artifacts import read_json, write_json, write_jsonl, write_text
from stages.checkout.paths import Paths
from stages.models.base import folder_digest
from stages.tools.check import check_later_stages
from tests.stages.tiny_run import tiny_params, write_tiny_run
from tests.tiny_moe import tiny_moe


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    return write_tiny_run(tmp_path_factory.mktemp("preflight"))


def test_values_that_fit_pass(paths: Paths) -> None:
    check_later_stages(tiny_params(), paths)


def test_group_size_that_does_not_divide_a_width_is_refused(paths: Paths) -> None:
    with pytest.raises(ValueError, match=r"quantize\.group_size: group_size 64 does not divide the width 32"):
        check_later_stages(tiny_params(quantize={"group_size": 64}), paths)


def test_group_size_does_not_matter_where_nothing_is_quantized(paths: Paths) -> None:
    check_later_stages(tiny_params(quantize={"method": "none", "group_size": 64}), paths)


def test_nf4_of_narrow_layers_is_refused(paths: Paths) -> None:
    with pytest.raises(
        ValueError, match=r"quantize\.method: model\.layers\.0.* has 32 inputs and 32 outputs; on a CPU nf4"
    ):
        check_later_stages(tiny_params(quantize={"method": "nf4"}), paths)
    check_later_stages(tiny_params(quantize={"method": "int8"}), paths)


@pytest.mark.parametrize("method", ["gptq", "int8", "nf4"])
def test_experts_that_a_method_does_not_quantize_are_refused(tmp_path: Path, method: str) -> None:
    paths = write_tiny_run(tmp_path)
    folder = paths.root / "models" / "base"
    tiny_moe("mixtral").save_pretrained(folder)
    record = read_json(paths.out("load", "base_model.json"))
    write_json(paths.out("load", "base_model.json"), {**record, "digest": folder_digest(folder)})
    with pytest.raises(ValueError, match=rf"^quantize\.method: {method}: 43 % of the weights of .* are experts"):
        check_later_stages(tiny_params(quantize={"method": method}), paths)
    check_later_stages(tiny_params(quantize={"method": "none"}), paths)


def test_reference_that_the_task_cannot_score_is_named(tmp_path: Path) -> None:
    paths = write_tiny_run(tmp_path)
    prompt = {"id": "faq.csv:2", "prompt": "When?", "reference": "At nine.", "add_special_tokens": False}
    write_jsonl(paths.out("format", "prompts.jsonl"), [prompt])
    with pytest.raises(ValueError, match=r"evaluate\.task is json, held-out row faq\.csv:2"):
        check_later_stages(tiny_params(), paths)


def test_gguf_without_llama_cpp_and_a_base_that_it_does_not_know_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write_tiny_run(tmp_path)
    monkeypatch.setenv("SFT_ENGINES", str(tmp_path / "engines"))
    folder = tmp_path / "engines" / "llama_cpp"
    check_later_stages(tiny_params(), paths)
    params = tiny_params(quantize={"export_gguf": ["f16"]})
    with pytest.raises(ValueError, match=r"quantize\.export_gguf: llama\.cpp is not installed, .*: `make engines`"):
        check_later_stages(params, paths)
    write_text(folder / ".ready", "")
    write_text(folder / "source" / "conversion" / "__init__.py", 'TEXT_MODEL_MAP: dict = {"NewForCausalLM": "new"}\n')
    with pytest.raises(ValueError, match=r"quantize\.export_gguf: .* architecture LlamaForCausalLM, which this llama"):
        check_later_stages(params, paths)
