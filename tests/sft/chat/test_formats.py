"""Model and tokenizer agree after a chat format was set up, and the model is otherwise unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sft.chat.formats import (
    FORMATS,
    align_eos_with_template,
    apply_chat_format,
    clone_chat_template,
    find_format,
    resize_embeddings,
    setup_chat_format,
)
from sft.chat.render import render
from tests.sft.chat.stops import check_stops
from tests.sft.template_styles import CHATML
from tests.tiny import tiny_model, tiny_tokenizer

CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you"},
]
EXPECTED = {
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\nSee you<|im_end|>\n"
    ),
    "llama3": (
        "<|endoftext|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nSee you<|eot_id|>"
    ),
    "zephyr": (
        "<|system|>\nBe brief.<|im_end|>\n<|user|>\nHi<|im_end|>\n<|assistant|>\nHello<|im_end|>\n"
        "<|user|>\nBye<|im_end|>\n<|assistant|>\nSee you<|im_end|>\n"
    ),
    "gemma": (
        "<|endoftext|><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\nSee you<end_of_turn>\n"
    ),
    "phi3": (
        "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nHello<|end|>\n"
        "<|user|>\nBye<|end|>\n<|assistant|>\nSee you<|end|>\n"
    ),
    "mistral": "<|endoftext|>[INST] Be brief.\n\nHi [/INST] Hello<|im_end|>[INST] Bye [/INST] See you<|im_end|>",
}
STOPS = {"llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "phi3": "<|end|>"}


def base_tokenizer(**kwargs: Any) -> Any:
    return tiny_tokenizer(chat_template=None, bos_token="<|endoftext|>", **kwargs)


@pytest.mark.parametrize("name", FORMATS)
def test_named_formats_print_their_chats(name: str) -> None:
    tokenizer = base_tokenizer()
    apply_chat_format(tokenizer, FORMATS[name])
    chat = [{"role": "system", "content": "Be brief."}, *CHAT]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == EXPECTED[name]
    stop = STOPS.get(name, "<|im_end|>")
    rendered = render({"messages": chat}, tokenizer)
    trained = [rendered.text[start:end] for start, end, _ in rendered.spans]
    space = " " if name == "mistral" else ""
    assert trained == [f"{space}Hello{stop}", f"{space}See you{stop}"]
    check_stops([("row", rendered)], tokenizer)
    prompt = tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
    assert EXPECTED[name].startswith(prompt)


@pytest.mark.parametrize("name", FORMATS)
def test_model_and_tokenizer_agree(name: str) -> None:
    model, tokenizer = tiny_model(), base_tokenizer()
    out_model, out_tokenizer = setup_chat_format(model, tokenizer, format=name, resize_to_multiple_of=64)
    assert out_model is model
    assert out_tokenizer is tokenizer
    assert tokenizer.eos_token == STOPS.get(name, "<|im_end|>")
    assert len({tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token}) == 3
    for token in ("bos", "eos", "pad"):
        value = getattr(tokenizer, f"{token}_token_id")
        assert getattr(model.config, f"{token}_token_id") == value
        assert getattr(model.generation_config, f"{token}_token_id") == value
    rows = model.get_input_embeddings().weight.shape[0]
    assert rows % 64 == 0
    assert rows >= len(tokenizer)
    assert model.config.vocab_size == rows
    assert model.get_output_embeddings().weight.shape[0] == rows
    out = model(**tokenizer("Hi<|im_end|>", return_tensors="pt"))
    assert out.logits.shape[-1] == rows


@pytest.mark.parametrize("family", ["mistral", "qwen3", "gemma2", "phi", "gpt_neox", "gpt2", "opt", "bloom"])
def test_every_family_gets_room_for_the_new_tokens(family: str) -> None:
    model, tokenizer = tiny_model(family), base_tokenizer()
    setup_chat_format(model, tokenizer, "llama3")
    tokens = tokenizer("<|eot_id|>Hi", return_tensors="pt", return_token_type_ids=False)
    logits = model(**tokens).logits
    assert logits.shape[-1] == model.get_input_embeddings().weight.shape[0] >= len(tokenizer)
    assert torch.isfinite(logits).all()


def test_special_tokens_are_one_token_each() -> None:
    tokenizer = base_tokenizer()
    added = apply_chat_format(tokenizer, FORMATS["llama3"])
    assert [tokenizer.decode(token) for token in added] == ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    assert tokenizer("<|eot_id|>", add_special_tokens=False)["input_ids"] == [added[0]]


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_the_mean_of_the_old_ones_and_old_rows_stay(tied: bool) -> None:
    model, tokenizer = tiny_model(tie_word_embeddings=tied), base_tokenizer()
    tokens = tokenizer("Hello you", return_tensors="pt")
    before = model(**tokens).logits
    embeddings = model.get_input_embeddings().weight.clone()
    head = model.get_output_embeddings().weight.clone()
    num_old = len(tokenizer)
    setup_chat_format(model, tokenizer, "llama3", resize_to_multiple_of=64)
    new_embeddings, new_head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (new_embeddings.data_ptr() == new_head.data_ptr()) is tied
    for new, old in ((new_embeddings, embeddings), (new_head, head)):
        torch.testing.assert_close(new[:num_old], old)
        torch.testing.assert_close(new[num_old:], old.mean(dim=0).expand(len(new) - num_old, -1))
    torch.testing.assert_close(model(**tokens).logits[..., :num_old], before)


def test_a_model_with_room_to_spare_is_not_resized_but_its_new_rows_are_initialised() -> None:
    tokenizer = base_tokenizer()
    model = tiny_model(vocab_size=512)
    old = model.get_input_embeddings().weight[: len(tokenizer)].clone()
    setup_chat_format(model, tokenizer, "gemma")
    weight = model.get_input_embeddings().weight
    assert weight.shape[0] == 512
    added = tokenizer.convert_tokens_to_ids(["<start_of_turn>", "<end_of_turn>"])
    torch.testing.assert_close(weight[added], old.mean(dim=0).expand(2, -1))


def test_nothing_new_leaves_the_model_alone() -> None:
    model, tokenizer = tiny_model(), base_tokenizer()
    before = model.get_input_embeddings().weight.clone()
    resize_embeddings(model, len(tokenizer), [])
    assert torch.equal(model.get_input_embeddings().weight, before)


def test_a_bias_of_the_head_gets_the_mean_too() -> None:
    model, tokenizer = tiny_model("phi"), base_tokenizer()
    with torch.no_grad():
        model.lm_head.bias.fill_(0.5)
    setup_chat_format(model, tokenizer, "gemma")
    assert set(model.lm_head.bias.tolist()) == {0.5}


def test_a_jinja_file_is_a_format(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text(CHATML.template)
    model, tokenizer = tiny_model(), base_tokenizer(eos_token="<|endoftext|>")
    setup_chat_format(model, tokenizer, path)
    assert tokenizer.chat_template == CHATML.template
    assert tokenizer.eos_token == "<|im_end|>"
    with pytest.raises(ValueError, match=r"'chatlm' is neither a chat format \(chatml, llama3"):
        find_format("chatlm")


def test_a_format_that_prints_a_missing_token_is_refused() -> None:
    with pytest.raises(ValueError, match="the chat format prints bos_token"):
        apply_chat_format(tiny_tokenizer(chat_template=None, bos_token=None), FORMATS["gemma"])


def test_eos_follows_the_template_unless_generation_stops_there_anyway() -> None:
    tokenizer = tiny_tokenizer(CHATML.template, eos_token="<|endoftext|>")
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert align_eos_with_template(tokenizer, (stop,)) is None
    assert tokenizer.eos_token == "<|endoftext|>"
    assert align_eos_with_template(tokenizer) == "<|im_end|>"
    assert tokenizer.eos_token == "<|im_end|>"


def test_chatml_prints_tools_and_calls() -> None:
    tokenizer = base_tokenizer()
    apply_chat_format(tokenizer, FORMATS["chatml"])
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Lima"}'}}
    chat = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "Rain."},
    ]
    rendered = render({"messages": chat, "tools": '[{"type": "function", "function": {"name": "weather"}}]'}, tokenizer)
    assert '<tools>\n{"type": "function", "function": {"name": "weather"}}\n</tools>' in rendered.text
    assert [rendered.text[start:end] for start, end, _ in rendered.spans] == [
        '<tool_call>{"name": "weather", "arguments": {"city": "Lima"}}</tool_call><|im_end|>',
        "Rain.<|im_end|>",
    ]


@pytest.mark.parametrize("as_path", [True, False])
def test_a_template_is_cloned_with_its_tokens(tmp_path: Path, as_path: bool) -> None:
    source = base_tokenizer()
    apply_chat_format(source, FORMATS["gemma"])
    source.save_pretrained(tmp_path)
    model, tokenizer = tiny_model(), base_tokenizer()
    model, tokenizer, added = clone_chat_template(model, tokenizer, str(tmp_path) if as_path else source)
    assert tokenizer.chat_template == source.chat_template
    assert sorted(tokenizer.decode(token) for token in added) == ["<end_of_turn>", "<start_of_turn>"]
    assert tokenizer.eos_token == "<end_of_turn>"
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.get_input_embeddings().weight.shape[0] % 64 == 0
    with pytest.raises(ValueError, match="has no chat template to copy"):
        clone_chat_template(model, tokenizer, base_tokenizer())
