"""Every recipe runs through all stages, with its own values, on a tiny model of its model's family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.tiny_families import Sizes, tiny_family
from stages import evaluate, format, load, merge, pack, quantize, train
from stages.checkout.artifacts import read_json
from stages.checkout.paths import Paths
from stages.params.schema import check_params
from stages.recipes.catalog import read_recipe, recipe_names
from stages.tools.check import check_later_stages
from tests.tiny import tiny_tokenizer
from tests.tiny_vision import TEXT_FAMILIES, square, tiny_processor, tiny_text_family, tiny_vision_model

FAMILIES = {
    "deepseek-r1-llama": "llama",
    "deepseek-r1-qwen": "qwen2",
    "gemma3-1b": "gemma3_text",
    "gemma3": "gemma3",
    "gemma4": "gemma4",
    "gpt-oss": "gpt_oss",
    "granite4": "granitemoehybrid",
    "lfm2.5": "lfm2",
    "llama3": "llama",
    "ministral3": "mistral3",
    "mistral": "mistral",
    "olmo3": "olmo3",
    "phi4": "phi3",
    "qwen3-8b": "qwen3",
    "qwen3-vl": "qwen3_vl",
    "qwen3.5-35b-a3b": "qwen3_5_moe_text",
    "qwen3.5": "qwen3_5",
    "smollm2": "llama",
    "smollm3": "smollm3",
    "smolvlm2": "smolvlm",
}
"""How the name of a recipe begins -> the family of its model; the first that fits."""

TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}"
    "{{ message['content'] or '' }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

STOCK = {
    "type": "function",
    "function": {
        "name": "stock",
        "description": "Lamps that are left.",
        "parameters": {"type": "object", "properties": {"product": {"type": "string"}}, "required": ["product"]},
    },
}


def family_of(recipe: str) -> str:
    return next(family for start, family in FAMILIES.items() if recipe.startswith(start))


def write_base(recipe: str, folder: Path) -> None:
    family = family_of(recipe)
    if family == "smolvlm":
        processor = tiny_processor(family)
        tiny_vision_model(family, processor).save_pretrained(folder)
        processor.save_pretrained(folder)
        return
    if family in TEXT_FAMILIES:
        model, tokenizer = tiny_text_family(family)
        tokenizer.chat_template = TEMPLATE
    else:
        tokenizer = tiny_tokenizer(TEMPLATE)
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        model = tiny_family(family, Sizes(head_dim=16, intermediate=64, vocab=len(tokenizer), positions=2048), ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def row(recipe: str, number: int, folder: Path) -> dict[str, Any]:
    """A row of the recipe's task."""
    question: dict[str, Any] = {"role": "user", "content": f"Question {number}?"}
    answer: dict[str, Any] = {"role": "assistant", "content": f"Answer {number}."}
    values: dict[str, Any] = {}
    if recipe.endswith("tools"):
        answer = {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"type": "function", "function": {"name": "stock", "arguments": {"product": f"lamp {number}"}}}
            ],
        }
        values = {"tools": [STOCK]}
    elif recipe.endswith("reasoning"):
        answer["reasoning_content"] = f"It is {number}."
    elif recipe.endswith("extraction"):
        answer["content"] = json.dumps({"number": number})
    elif recipe.startswith("smolvlm2"):
        square("red", 16 + number, 16).save(folder / f"{number}.png")
        values = {"images": [f"{number}.png"]}
    return {"messages": [question, answer], **values}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", recipe_names())
def test_recipe_runs_on_a_twin_of_its_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SFT_LIVE_RUN", "off")
    write_base(name, tmp_path / "base")
    (tmp_path / "data").mkdir()
    rows = [row(name, number, tmp_path / "data") for number in range(16)]
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    values = read_recipe(name).params()
    values["model"]["name_or_path"] = str(tmp_path / "base")
    values["load"] |= {"sources": [{"path": "data/train.jsonl"}], "eval": {"path": None, "fraction": 0.3}}
    values["load"]["checks"] |= {"near_duplicate": "off", "near_eval": "off"}
    values["train"]["max_steps"] = 2
    values["evaluate"] |= {"num_rows": 3, "max_new_tokens": 4}
    if not torch.cuda.is_available() and values["train"]["optim"] == "paged_adamw_8bit":
        values["train"]["optim"] = "adamw_torch"  # pages are memory of a GPU
    params, paths = check_params(values), Paths(tmp_path)
    for stage in (load, format, pack):
        stage.run(params, paths)
    check_later_stages(params, paths)
    for stage in (train, merge, quantize, evaluate):
        stage.run(params, paths)
    figures = read_json(paths.metrics("evaluate"))
    assert figures["tuned"]["loss"] > 0
    assert read_json(paths.metrics("train"))["steps"] == 2
