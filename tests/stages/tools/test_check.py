"""`python -m stages check` refuses what `load` would refuse, without touching anything."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from stages.loading import preflight
from stages.params.schema import Params
from stages.tools import check
from tests.stages.data_root import ROWS, DataRoot
from tests.stages.tiny_run import WIDE
from tests.tiny import tiny_model, tiny_tokenizer
from tests.tiny_moe import tiny_moe


@pytest.fixture
def root(tmp_path: Path) -> DataRoot:
    root = DataRoot(tmp_path)
    root.write("train.jsonl", ROWS)
    return root


def with_model(params: Params, name: str) -> Params:
    return params.model_copy(update={"model": params.model.model_copy(update={"name_or_path": name})})


def test_usable_data_and_model_pass_and_nothing_is_written(root: DataRoot) -> None:
    before = sorted(root.paths.root.rglob("*"))
    check.run(root.params(), root.paths)
    assert sorted(root.paths.root.rglob("*")) == before


def test_a_broken_line_is_named(root: DataRoot) -> None:
    file = root.paths.data / "train.jsonl"
    file.write_text(file.read_text() + '{"messages": [\n')
    with pytest.raises(ValueError, match=rf"train\.jsonl:{len(ROWS) + 1}"):
        check.run(root.params(), root.paths)


def test_a_missing_file_is_named_with_its_key(root: DataRoot) -> None:
    with pytest.raises(ValueError, match=r"load\.sources\[0\]\.path: .*data/nothing\.jsonl does not exist"):
        check.run(root.params({"sources": [{"path": "data/nothing.jsonl"}]}), root.paths)


def test_large_data_are_read_at_their_beginning(root: DataRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    file = root.paths.data / "train.jsonl"
    file.write_text(file.read_text() * 5 + "broken\n")
    monkeypatch.setattr(preflight, "LARGEST_READ_BYTES", 1)
    check.run(root.params(), root.paths)
    file.write_text("broken\n" + file.read_text())
    with pytest.raises(ValueError, match=r"train\.jsonl:1"):
        check.run(root.params(), root.paths)


@pytest.mark.parametrize("method", ["gptq", "int8", "nf4"])
def test_a_quantization_that_is_not_for_the_experts_of_the_base_model_is_refused(root: DataRoot, method: str) -> None:
    folder = root.paths.root / "models" / "moe"
    tiny_moe("qwen3_moe").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    params = with_model(root.params(), "models/moe")
    quantized = params.quantize.model_copy(update={"method": method})
    with pytest.raises(
        ValueError, match=rf"^params\.yaml: quantize\.method: {method}: 43 % of the weights of .* are experts"
    ):
        check.run(params.model_copy(update={"quantize": quantized}), root.paths)
    plain = params.quantize.model_copy(update={"method": "none"})
    check.run(params.model_copy(update={"quantize": plain}), root.paths)


@pytest.mark.parametrize("name", ["./nowhere", "embedded:none-such"])
def test_a_base_model_that_is_not_there_is_named(root: DataRoot, name: str) -> None:
    with pytest.raises(ValueError, match=r"nowhere|none-such"):
        check.run(with_model(root.params(), name), root.paths)


def test_a_store_that_can_not_be_reached_is_named_with_its_key(root: DataRoot) -> None:
    params = root.params()
    section = params.publish.model_copy(update={"tracking_uri": "http://127.0.0.1:9"})
    with pytest.raises(ValueError, match=r"publish\.tracking_uri 'http://127\.0\.0\.1:9': the store can't be used"):
        check.run(params.model_copy(update={"publish": section}), root.paths)


@pytest.mark.parametrize("key", ["load.sources[0].path", "load.eval.path"])
def test_a_url_that_leads_to_this_machine_is_named_with_its_key(root: DataRoot, key: str) -> None:
    url = "simplecache::file:///etc/rows.jsonl"
    load = {"sources": [{"path": url}]} if "sources" in key else {"eval": {"path": url, "fraction": None}}
    said = re.escape(f"params.yaml: {key}: {url}: file:// is the innermost part")
    with pytest.raises(ValueError, match=said):
        check.run(root.params(load), root.paths)


def test_conversations_without_any_chat_template_are_named_before_a_run(root: DataRoot) -> None:
    folder = root.paths.root / "models" / "plain"
    tiny_model(**WIDE).save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    params = with_model(root.params(), "models/plain")
    check.run(params, root.paths)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"format\.chat_template: the base model has no chat template, which train"):
        check.run(params, root.paths)
    named = params.model_copy(update={"format": params.format.model_copy(update={"chat_template": "chatml"})})
    check.run(named, root.paths)


def test_engines_that_are_not_installed_are_one_message_that_names_the_way_out(
    root: DataRoot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFT_ENGINES", str(root.paths.root / "none"))
    params = root.params()
    asked = params.evaluate.model_copy(update={"engines": ["vllm.merged", "llama_cpp.q8_0", "transformers"]})
    with pytest.raises(check.CheckFailed) as caught:
        check.run(params.model_copy(update={"evaluate": asked}), root.paths)
    assert re.fullmatch(
        r"params\.yaml: evaluate\.engines: the engines vllm and llama_cpp are not installed, .*none/vllm/\.ready and "
        r".*none/llama_cpp/\.ready are missing: `make engines` installs vLLM and llama.cpp outside \.venv",
        str(caught.value),
    )
