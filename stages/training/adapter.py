"""The adapter of a training, as params.yaml states it."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from peft import EvaConfig, LoftQConfig, LoraConfig, PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import PreTrainedModel

from sft.config import ModelConfig
from sft.models.adapters import get_peft_config
from stages.params.schema import Params, TrainSection

LAYER = re.compile(r"(?:[^.\d][^.]*\.)+?(\d+)(?:\.|$)")
"""Beginning of a module's name up to the number of its layer."""

OWN_TARGETS = ("IA3",)
"""Types whose layers peft chooses by the family of the model, unless options of the type name them."""


def make_model_config(params: Params) -> ModelConfig:
    """Return the params of base model and adapter as `ModelConfig`."""
    section = params.train
    return ModelConfig(
        model_name_or_path=params.model.name_or_path,
        dtype=params.model.dtype,
        attn_implementation=params.model.attn_implementation,
        trust_remote_code=params.model.trust_remote_code,
        use_peft=section.method != "full",
        lora_r=section.lora_r,
        lora_alpha=section.lora_alpha,
        lora_dropout=section.lora_dropout,
        lora_target_modules=section.lora_target_modules,
        lora_target_parameters=section.lora_target_parameters,
        lora_modules_to_save=section.modules_to_save,
        use_rslora=section.use_rslora,
        use_dora=section.use_dora,
        load_in_4bit=section.method == "qlora",
        use_bnb_nested_quant=section.method == "qlora",
    )


def make_peft_config(params: Params, model: PreTrainedModel) -> PeftConfig | None:
    """Return the configuration of the adapter; None under `method: full`.

    Args:
        params: Values of params.yaml.
        model: The base model, whose layers are counted.

    Raises:
        ValueError: peft refuses an option; the message names the type.
    """
    section = params.train
    if section.method == "full":
        return None
    if section.adapter is not None:
        return _other_adapter(section.adapter, section)
    config = get_peft_config(make_model_config(params))
    assert config is not None, "use_peft is set"
    config = _with_kind_of_lora(config, section)
    if section.layers_to_transform is not None:
        config.exclude_modules = without_layers(model, section.layers_to_transform, section.exclude_modules or ())
    return config


def without_layers(model: PreTrainedModel, layers: Collection[int], excluded: Collection[str]) -> str | list[str]:
    """Return what `exclude_modules` must be so that only some layers get an adapter.

    peft's own `layers_to_transform` can't be used with `all-linear`.

    Args:
        model: The base model.
        layers: Numbers of the layers that get an adapter.
        excluded: Names of modules that get none in any layer.

    Raises:
        ValueError: There is no such layer.
    """
    found = {int(match[1]) for name, _ in model.named_modules() if (match := LAYER.match(name))}
    unknown = sorted(set(layers) - found)
    if unknown:
        raise ValueError(
            f"params.yaml, train.layers_to_transform: there is no layer {unknown[0]}; the model has the layers 0 to "
            f"{max(found, default=0)}"
        )
    if not found - set(layers):
        return list(excluded)
    others = "|".join(map(str, sorted(found - set(layers))))
    parts = [rf"(?:[^.\d][^.]*\.)+(?:{others})\..*", *(rf"(?:.*\.)?{re.escape(name)}" for name in excluded)]
    return "|".join(parts)


def _with_kind_of_lora(config: LoraConfig, section: TrainSection) -> LoraConfig:
    changes: dict[str, Any] = {"init_lora_weights": section.init_lora_weights}
    if section.init_lora_weights == "loftq":
        if not (torch.cuda.is_available() or torch.xpu.is_available()):
            raise ValueError(
                "params.yaml, train.init_lora_weights: loftq: peft computes it on CUDA and XPU devices only, also when "
                "the adapter is merged; use pissa or olora"
            )
        changes["loftq_config"] = LoftQConfig()
    if section.init_lora_weights == "eva":
        changes["eva_config"] = EvaConfig()
    for key in ("rank_pattern", "alpha_pattern", "exclude_modules", "trainable_token_indices"):
        value = getattr(section, key)
        if value:
            changes[key] = dict(value) if isinstance(value, dict) else list(value)
    try:
        return replace(config, **changes)
    except (ValueError, TypeError, ImportError) as error:
        raise ValueError(f"params.yaml, train: peft refuses these options of LoRA: {error}") from None


def _other_adapter(adapter: dict[str, Any], section: TrainSection) -> PeftConfig:
    options = dict(adapter)
    kind = options.pop("type")
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]
    if "target_modules" in config_class.__dataclass_fields__ and kind not in OWN_TARGETS:
        targets = section.lora_target_modules
        options.setdefault("target_modules", list(targets) if isinstance(targets, list) else targets)
    try:
        return config_class(task_type="CAUSAL_LM", **options)
    except (ValueError, TypeError, ImportError) as error:
        raise ValueError(f"params.yaml, train.adapter: peft refuses {kind} with these options: {error}") from None
