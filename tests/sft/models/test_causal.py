"""Models that are no causal language models are refused in a sentence, and every one that is passes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, LlamaConfig, LlamaModel, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.auto import modeling_auto

from sft.attention.causality import probe_causality
from sft.models.checkpoint import check_architecture
from sft.models.loading import check_causal, load_model
from sft.train.trainer import SFTTrainer
from tests.tiny import quiet_config, tiny_model, tiny_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
ENCODER_DECODER_SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
}
OTHER_SIZES: dict[str, dict[str, Any]] = {
    "bart": ENCODER_DECODER_SIZES,
    "t5": {"vocab_size": 96, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2},
    "xlm": {"vocab_size": 96, "emb_dim": 16, "n_layers": 2, "n_heads": 2},
    "xlnet": {"vocab_size": 96, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32},
    "electra": {**SIZES, "embedding_size": 16},
    "vit": {
        key: SIZES[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    },
}


def make(auto_class: str, family: str, **overrides: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(family, **{**OTHER_SIZES.get(family, SIZES), **overrides})
    torch.manual_seed(0)
    return getattr(modeling_auto, auto_class).from_config(config)


@pytest.mark.parametrize(
    ("auto_class", "family", "what"),
    [
        ("AutoModelForSequenceClassification", "llama", "a model for sequence classification"),
        ("AutoModelForTokenClassification", "qwen2", "a model for token classification"),
        ("AutoModelForQuestionAnswering", "llama", "a model for question answering"),
        ("AutoModel", "llama", "LlamaModel has no language model head"),
        ("AutoModelForMaskedLM", "bert", "a model for masked language modelling"),
        ("AutoModelForPreTraining", "bert", "BertForPreTraining returns no logits"),
        ("AutoModelForSeq2SeqLM", "t5", "an encoder with a decoder"),
        ("AutoModelForSeq2SeqLM", "bart", "an encoder with a decoder"),
        ("AutoModelForTextEncoding", "t5", "a model for text encoding"),
        ("AutoModelForImageClassification", "vit", "a model for image classification"),
        ("AutoModelForCausalLM", "bert", "BertLMHeadModel attends in both directions"),
        ("AutoModelForCausalLM", "roberta", "attends in both directions"),
        ("AutoModelForCausalLM", "xlm", "attends in both directions"),
        ("AutoModelForCausalLM", "xlnet", "attends in both directions"),
    ],
)
def test_models_of_other_tasks_are_refused(auto_class: str, family: str, what: str) -> None:
    with pytest.raises(ValueError, match=f"{what}.*supervised fine-tuning needs a causal language model"):
        check_causal(make(auto_class, family))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *((family, {"is_decoder": True}) for family in ("bert", "roberta", "electra", "bert-generation")),
        ("bart", {}),
        ("xlm", {"causal": True}),
        ("llama", {}),
    ],
)
def test_decoders_of_families_with_encoders_pass(family: str, options: dict[str, Any]) -> None:
    model = make("AutoModelForCausalLM", family, **options)
    check_causal(model)
    effect = probe_causality(model)
    assert effect is not None
    assert effect <= 1e-5


class OwnModel(PreTrainedModel):
    """A model whose class transformers does not know."""

    config_class = LlamaConfig
    _supports_sdpa = True

    def __init__(self, config: LlamaConfig, width: int | None = None) -> None:
        super().__init__(config)
        self.model, self.head = LlamaModel(config), nn.Linear(config.hidden_size, width or config.vocab_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def mixed(self, states: torch.Tensor) -> torch.Tensor:
        return states

    def forward(self, input_ids: torch.Tensor, **options: Any) -> Any:
        states = self.model(input_ids=input_ids, **options).last_hidden_state
        return CausalLMOutput(logits=self.head(self.mixed(states)))


class BidirectionalModel(OwnModel):
    """Has each token see the mean of all."""

    def mixed(self, states: torch.Tensor) -> torch.Tensor:
        return states + states.mean(dim=1, keepdim=True)


class TupleModel(OwnModel):
    """Returns logits, loss and values, as models with a value head do."""

    def forward(self, input_ids: torch.Tensor, **options: Any) -> Any:
        return super().forward(input_ids, **options).logits, None, None


def test_unknown_class_is_judged_by_what_it_computes() -> None:
    config = LlamaConfig(**SIZES)
    check_causal(OwnModel(config))
    with pytest.raises(ValueError, match="BidirectionalModel attends in both directions"):
        check_causal(BidirectionalModel(config))
    with pytest.raises(ValueError, match=r"OwnModel returns logits \(1, 8, 1\) for a row of 8 tokens"):
        check_causal(OwnModel(config, width=1))
    with pytest.raises(ValueError, match="TupleModel returns no logits"):
        check_causal(TupleModel(config))


def test_module_without_config_is_refused_with_the_model_inside_it() -> None:
    class WithValueHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pretrained_model = tiny_model()

    with pytest.raises(
        ValueError, match=r"WithValueHead is not a model of transformers.*; give WithValueHead.pretrained"
    ):
        check_causal(WithValueHead())


def test_adapter_on_another_head_is_refused() -> None:
    model = get_peft_model(make("AutoModelForSequenceClassification", "llama"), LoraConfig(task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match="LlamaForSequenceClassification is a model for sequence classification"):
        check_causal(model)


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "a model for masked language modelling"),
        ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}, "sequence classification"),
        (
            {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
            "an encoder",
        ),
        ({"model_type": "distilbert", "architectures": ["DistilBertModel"]}, "a model for text encoding"),
        ({"model_type": "vit"}, "type 'vit', of which transformers has no causal language model"),
    ],
)
def test_config_of_another_task_is_refused_before_weights_are_read(config: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=f"^hub/model holds .*{what}.*, and supervised fine-tuning"):
        check_architecture("hub/model", config)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
        {"model_type": "bloom", "architectures": ["BloomModel"]},
        {"model_type": "bart", "architectures": ["BartForCausalLM"], "is_encoder_decoder": True},
        {"model_type": "bert", "architectures": ["BertForMaskedLM"], "is_decoder": True},
        {"model_type": "qwen2_vl", "architectures": ["Qwen2VLForConditionalGeneration"]},
        {"model_type": "llava"},
        {"model_type": "own", "architectures": ["OwnModel"]},
        {"model_type": "bert", "auto_map": {"AutoModelForCausalLM": "modeling.Own"}, "architectures": ["Own"]},
    ],
)
def test_config_of_a_causal_language_model_passes(config: dict[str, Any]) -> None:
    check_architecture("hub/model", config)


def test_all_causal_language_models_of_transformers_pass_by_their_config() -> None:
    for family, name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        check_architecture(family, {"model_type": family, "architectures": [name]})


def test_checkpoint_of_another_task_is_refused_by_name(tmp_path: Path) -> None:
    make("AutoModelForSequenceClassification", "llama").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForSequenceClassification"]
    with pytest.raises(ValueError, match="holds LlamaForSequenceClassification, a model for sequence classification"):
        load_model(tmp_path)


def test_trainer_refuses_before_it_reads_data(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"text": ["Hello"]})
    with pytest.raises(ValueError, match="LlamaModel has no language model head"):
        SFTTrainer(
            make("AutoModel", "llama"),
            args=quiet_config(tmp_path),
            train_dataset=rows,
            processing_class=tiny_tokenizer(),
        )
