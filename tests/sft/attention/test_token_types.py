"""Models that do not train on text without types of tokens are given them, and only those."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertLMHeadModel

from benchmarks.tiny_families import Sizes, tiny_family
from sft.attention.causality import probe_causality
from sft.attention.token_types import add_token_types
from sft.inner_model import in_training
from sft.models.loading import check_causal
from sft.train.images import check_image_types
from sft.vision.collator import DataCollatorForVisionLanguageModeling
from tests.tiny_vision import tiny_processor

IDS = torch.tensor([[5, 9, 14, 7, 30, 11]])


def make(family: str) -> Any:
    return tiny_family(family, Sizes(), {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3})


def logits(model: Any, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False, **inputs).logits


def test_a_model_that_insists_on_types_is_given_those_of_text() -> None:
    model, plain = make("molmo2"), make("molmo2")
    with pytest.raises(ValueError, match="`mm_token_type_ids` is required as a model input when training"):
        logits(plain.train())
    assert add_token_types(model) == {"mm_token_type_ids": 0}
    assert torch.equal(logits(model.train()), logits(plain.train(), mm_token_type_ids=torch.zeros_like(IDS)))
    assert torch.equal(logits(model.eval()), logits(plain.eval()))


def test_a_model_that_is_causal_only_for_one_type_is_given_that_one() -> None:
    model, plain = make("paligemma"), make("paligemma")
    with pytest.raises(ValueError, match="PaliGemmaForConditionalGeneration attends in both directions"):
        check_causal(plain)
    assert add_token_types(model) == {"token_type_ids": 1}
    check_causal(model)
    effect = probe_causality(model, in_training)
    assert effect is not None
    assert effect <= 1e-5
    assert torch.equal(logits(model), logits(plain, token_type_ids=torch.ones_like(IDS)))
    plain.set_attn_implementation("eager")  # which is causal without types
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-5)


def test_types_that_are_given_are_kept() -> None:
    model, plain = make("paligemma"), make("paligemma")
    add_token_types(model)
    prefix = torch.tensor([[0, 0, 0, 1, 1, 1]])
    assert torch.equal(logits(model, token_type_ids=prefix), logits(plain, token_type_ids=prefix))


def test_types_reach_a_model_inside_an_adapter_and_a_copy() -> None:
    model = make("molmo2")
    add_token_types(model)
    expected = logits(model.train())
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert add_token_types(adapted) == {"mm_token_type_ids": 0}
    assert torch.equal(logits(adapted.train()), expected)


@pytest.mark.parametrize("family", ["gemma3", "llama", "qwen2_vl", "git"])
def test_a_model_that_trains_without_types_is_left_as_it_is(family: str) -> None:
    model = make(family)
    assert add_token_types(model) == {}
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_a_model_that_no_type_makes_causal_is_left_as_it_is() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertLMHeadModel(BertConfig(vocab_size=96, **sizes))
    assert add_token_types(model) == {}
    assert not model.bert._forward_pre_hooks
    with pytest.raises(ValueError, match="attends in both directions"):
        check_causal(model)


def test_rows_with_images_are_refused_where_their_types_are_not_causal() -> None:
    model, collator = make("paligemma"), DataCollatorForVisionLanguageModeling(tiny_processor("llava"))
    check_image_types(model, {}, collator)
    check_image_types(model, {"token_type_ids": 1}, None)
    with pytest.raises(ValueError, match="PaliGemmaForConditionalGeneration attends in both directions among tokens"):
        check_image_types(model, {"token_type_ids": 1}, collator)
