"""Adapters: add a new one to a model or continue an existing one, and check that the intended modules are trained."""

from __future__ import annotations

import copy
import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.other import match_target_against_key
from peft.utils.transformers_weight_conversion import (
    convert_peft_config_for_transformers,
    get_model_conversion_mapping,
)
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sft.hardware import HALF_PRECISIONS
from sft.models.adapter_starts import (
    BaseFingerprint,
    changes_base,
    check_reloadable,
    check_start,
    start_of,
    warn_if_not_reloadable,
)
from sft.models.all_linear import (
    ALL_LINEAR,
    add_dropped_layers,
    is_all_linear,
    linear_targets,
    log_left_out,
    resolve_all_linear,
)
from sft.models.kbit import (
    is_kbit,
    is_quantized,
    needs_kbit_preparation,
    prepare_model_for_kbit_training,
)
from sft.models.loading import keep_weights
from sft.models.saved_adapters import ask_peft_to_wait, keep_own_names
from sft.models.token_rows import (
    embedding_name,
    head_name,
    is_tied,
    names_module,
    train_token_rows,
    untrained_token_ids,
)
from sft.models.weight_kinds import as_percent, is_expert, matrices_outside_layers, num_values, weight_shares
from sft.suggest import did_you_mean

if TYPE_CHECKING:
    from sft.config import ModelConfig

ask_peft_to_wait()
keep_own_names()

logger = logging.getLogger(__name__)

MAX_PLAIN_SHARE = 0.05
"""Share of the weights of a k-bit base that may be left in full without a warning."""


@dataclass(frozen=True)
class ParameterCount:
    """Number of parameters of a model, and how many of them are trained."""

    num_trainable: int
    num_total: int

    def __str__(self) -> str:
        share = 100 * self.num_trainable / max(self.num_total, 1)
        return f"{self.num_trainable:,} of {self.num_total:,} parameters are trained ({share:.2f} %)"


def get_peft_config(model_config: ModelConfig) -> LoraConfig | None:
    """Return peft's configuration for the `lora_*` options (LoRA, arXiv:2106.09685); None if `use_peft` is not set.

    Raises:
        ValueError: `lora_target_parameters` is set together with `lora_dropout`.
    """
    if not model_config.use_peft:
        return None
    target_parameters = _as_list(model_config.lora_target_parameters)
    if target_parameters and model_config.lora_dropout:
        raise ValueError(
            f"lora_dropout={model_config.lora_dropout} can't be used with lora_target_parameters, whose matrices are "
            "added to the parameters and not applied to an input; set lora_dropout=0"
        )
    return LoraConfig(
        r=model_config.lora_r,
        lora_alpha=model_config.lora_alpha,
        lora_dropout=model_config.lora_dropout,
        target_modules=_as_targets(model_config.lora_target_modules),
        target_parameters=target_parameters,
        modules_to_save=model_config.lora_modules_to_save,
        task_type=model_config.lora_task_type,
        use_rslora=model_config.use_rslora,
        use_dora=model_config.use_dora,
        bias="none",
    )


def _as_targets(targets: list[str] | str | None) -> list[str] | str:
    """Return `all-linear`, a list of names, or a regular expression; peft would read a single name as an expression."""
    if targets is None:
        return ALL_LINEAR
    if isinstance(targets, list):
        return ALL_LINEAR if targets == [ALL_LINEAR] else targets
    return [targets] if targets != ALL_LINEAR and re.fullmatch(r"[\w.]+", targets) else targets


def _as_list(names: list[str] | str | None) -> list[str] | None:
    """Return a list of names; an empty one for `none`, as a command line cannot give an empty list."""
    names = [names] if isinstance(names, str) else names
    return [] if names == ["none"] else names


def wrap_adapter(
    model: PreTrainedModel | PeftModel,
    peft_config: PeftConfig | None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    gradient_checkpointing: bool = False,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
) -> PreTrainedModel | PeftModel:
    """Return a model that is ready for training, with the adapter of `peft_config` if one is given.

    Args:
        model: A base model, or a `PeftModel` whose active adapter is continued.
        peft_config: Adapter to put on a base model; None = train the base model, or continue the adapter.
        tokenizer: If given, the embedding rows of new special tokens are trained, too (LoRA only).
        gradient_checkpointing: Turn gradient checkpointing on when a k-bit base model is prepared.
        gradient_checkpointing_kwargs: Arguments of `torch.utils.checkpoint`.

    Returns:
        The model to train. If it has an adapter, the parameters of the base model are frozen.

    Raises:
        ValueError: `peft_config` is given for a `PeftModel`, names a module that does not exist, starts in a way that
            can't be repeated when the adapter is loaded, or can't train new tokens; the weights are quantized and there
            is not an adapter; or parameters would be trained that the saved adapter does not contain.
    """
    checkpointing = {
        "use_gradient_checkpointing": gradient_checkpointing,
        "gradient_checkpointing_kwargs": gradient_checkpointing_kwargs,
    }
    keep_weights(model)
    if isinstance(model, PeftModel):
        wrapped = _continue_adapter(model, peft_config, checkpointing)
    elif peft_config is None:
        _check_trainable_base(model)
        log_shares(model)
        return model
    else:
        wrapped = _add_adapter(model, peft_config, tokenizer, checkpointing)
    _check_all_saved(wrapped)
    logger.info("%s", count_parameters(wrapped))
    log_shares(wrapped)
    return wrapped


def count_parameters(model: torch.nn.Module) -> ParameterCount:
    """Count the parameters of a model; a byte of a 4-bit tensor counts as two."""
    num_trainable = num_total = 0
    for parameter in model.parameters():
        size = num_values(parameter)
        num_total += size
        num_trainable += size if parameter.requires_grad else 0
    return ParameterCount(num_trainable, num_total)


def log_shares(model: torch.nn.Module) -> None:
    """Log which share of each kind of weight training changes, itself or through an adapter."""
    logger.info("weights that training changes: %s", ", ".join(map(str, weight_shares(model))))


def check_module_names(model: PreTrainedModel, peft_config: PeftConfig) -> None:
    """Check that every entry in peft's lists of modules names a module: peft ignores most wrong names silently.

    Names of layers that transformers has fused into parameters, such as `gate_proj` of experts, are converted by peft.

    Raises:
        ValueError: Some do not; the message lists them with the most similar names of modules.
    """
    names = [name for name, _ in model.named_modules() if name]
    was_expression = isinstance(getattr(peft_config, "target_modules", None), str)
    peft_config = _converted(model, peft_config)
    problems = []
    parameters = [name for name, _ in model.named_parameters()]
    for entry in sorted(getattr(peft_config, "target_parameters", None) or []):
        if not any(names_module(entry, name) for name in parameters):
            problems.append(f"target_parameters has {entry!r}, {_nearest(entry, parameters)}")
    for option in ("modules_to_save", "target_modules", "exclude_modules"):
        entries = getattr(peft_config, option, None) or []
        if option == "target_modules" and was_expression and not isinstance(entries, str):
            continue  # peft has resolved the expression to names that it matches
        if isinstance(entries, str):
            problems += _expression_problems(option, entries, names)
        else:
            unknown = [entry for entry in sorted(entries) if not any(names_module(entry, name) for name in names)]
            problems += [f"{option} has {entry!r}, {_nearest(entry, names)}" for entry in unknown]
    if problems:
        raise ValueError(f"{type(model).__name__} has no module of that name: {'; '.join(problems)}.")


def _converted(model: PreTrainedModel, peft_config: PeftConfig) -> PeftConfig:
    """Return a copy of a configuration with the targets that peft makes of its names for this model."""
    config = copy.deepcopy(peft_config)
    if getattr(config, "target_modules", None) is not None and hasattr(config, "target_parameters"):
        convert_peft_config_for_transformers(config, model, get_model_conversion_mapping(model))
    return config


def _expression_problems(option: str, expression: str, names: list[str]) -> list[str]:
    if expression == ALL_LINEAR or any(match_target_against_key(expression, name) for name in names):
        return []
    as_list = f" (a string is a regular expression; names go into a list: [{expression!r}])"
    return [f"{option} is {expression!r}, {_nearest(expression, names)}{as_list}"]


def _nearest(entry: str, names: list[str]) -> str:
    last_parts = {name.rpartition(".")[2] for name in names}
    candidates = sorted(part for part in last_parts if not part.isdigit())
    otherwise = f"its modules are {', '.join(candidates[:20])}"
    return did_you_mean(entry.rpartition(".")[2], candidates, otherwise=otherwise, at_most=3)


def _continue_adapter(model: PeftModel, peft_config: PeftConfig | None, checkpointing: dict[str, Any]) -> PeftModel:
    if peft_config is not None:
        raise ValueError(
            f"The model already has the adapter {model.active_adapter!r}, and peft_config asks for another one. To "
            f"continue it, leave peft_config out; to start anew, pass model.merge_and_unload() or the base."
        )
    warn_if_not_reloadable(model.active_peft_config)
    base = model.get_base_model()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if is_unprepared(model):
        prepare_model_for_kbit_training(base, **checkpointing)  # this freezes all parameters
        for name in trained:
            model.get_parameter(name).requires_grad_(True)
    # PeftModel.from_pretrained freezes adapters unless is_trainable=True, and training would change nothing
    if model.active_peft_config.is_prompt_learning:
        model.prompt_encoder[model.active_adapter].requires_grad_(True)
    else:
        model.set_requires_grad(model.active_adapters, requires_grad=True)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"No parameter of the adapter {model.active_adapter!r} can be trained. Load it with "
            f"PeftModel.from_pretrained(base, adapter, is_trainable=True)."
        )
    return model


def _check_all_saved(model: PeftModel) -> None:
    """Check that the adapter, once saved, will contain all that is trained.

    Raises:
        ValueError: A parameter of the base is trained that peft does not save.
    """
    names = model.active_adapters
    beside = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not any(part in names for part in name.split("."))
    }
    if not beside or model.active_peft_config.is_prompt_learning:
        return
    saved = {
        value.data_ptr()
        for name in names
        for value in get_peft_model_state_dict(model, adapter_name=name).values()
        if isinstance(value, torch.Tensor)
    }
    lost = [name for name, parameter in beside.items() if parameter.numel() and parameter.data_ptr() not in saved]
    if lost:
        modules = sorted({name.rpartition(".")[0].rpartition(".")[2] for name in lost})
        raise ValueError(
            f"{len(lost)} parameters of the base are trained beside the adapter ({', '.join(lost[:2])}), and the saved "
            f"adapter would not contain them. Name their modules in modules_to_save={modules[:5]}, or freeze them with "
            f"requires_grad_(False)."
        )


def is_unprepared(model: PreTrainedModel | PeftModel) -> bool:
    """Return whether a k-bit model is not prepared for training yet, see `needs_kbit_preparation`.

    Under an adapter, parameters with gradients are the adapter's, so that those in half precision decide.
    """
    if not isinstance(model, PeftModel):
        return needs_kbit_preparation(model)
    if hasattr(model, "for_inference"):  # a model of unsloth, whose kernels need half precision
        return False
    frozen = (parameter for parameter in model.parameters() if not parameter.requires_grad)
    return is_kbit(model.get_base_model()) and any(parameter.dtype in HALF_PRECISIONS for parameter in frozen)


def _check_trainable_base(model: PreTrainedModel) -> None:
    if is_quantized(model) and not getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "The weights of this base are quantized, so they can't be trained themselves. Give a peft_config (QLoRA), "
            "or load the model without quantization_config."
        )


def _add_adapter(
    model: PreTrainedModel,
    peft_config: PeftConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    checkpointing: dict[str, Any],
) -> PeftModel:
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"The model carries adapters {sorted(model.peft_config)} already (model.add_adapter), and peft_config asks "
            f"for another one. Leave peft_config out, or pass a base without adapters."
        )
    config = copy.deepcopy(peft_config)  # peft changes it
    targets = linear_targets(model, config) if is_all_linear(config) else None
    if targets is not None:
        config = resolve_all_linear(config, targets)
    check_module_names(model, config)
    if targets is None:
        config = add_dropped_layers(model, config)
    check_reloadable(peft_config)
    if changes_base(peft_config) and is_quantized(model):
        raise ValueError(
            f"init_lora_weights={start_of(peft_config)!r} changes the weights of the base, which are quantized here: "
            f"the same start on the plain base, into which the adapter is merged, gives other weights. Load the base "
            f"without quantization, or use init_lora_weights=True."
        )
    if tokenizer is not None:
        config = train_token_rows(config, model, tokenizer, untrained_token_ids(model, tokenizer))
    if is_tied(model) and _touches_embeddings(config, model) and hasattr(config, "ensure_weight_tying"):
        # otherwise only one of the two is trained, and they are not tied any more
        config.ensure_weight_tying = True
    if needs_kbit_preparation(model):
        prepare_model_for_kbit_training(model, **checkpointing)
    if is_kbit(model):
        _warn_of_plain_matrices(model)
    fingerprint = BaseFingerprint(model)
    wrapped = get_peft_model(model, config)
    check_start(config, fingerprint)
    if targets is not None:
        log_left_out(wrapped, targets)
    return wrapped


def _warn_of_plain_matrices(model: PreTrainedModel) -> None:
    """Warn that a k-bit base holds matrices in full, such as experts, which may be most of its memory."""
    left = matrices_outside_layers(model)
    experts = [weight for weight in left if is_expert(weight)]
    total = count_parameters(model).num_total
    if experts:
        left, what = experts, "experts, and bitsandbytes quantizes layers, not parameters"
    elif sum(num_values(weight.parameter) for weight in left) > MAX_PLAIN_SHARE * total:
        what = f"of layers of class {type(left[0].owner).__name__}, which bitsandbytes does not quantize"
    else:
        return
    logger.warning(
        "%s of the weights of %s are %s: they take %.1f GB in %s",
        as_percent(sum(num_values(weight.parameter) for weight in left), total),
        type(model).__name__,
        what,
        sum(weight.parameter.nbytes for weight in left) / 1e9,
        str(left[0].parameter.dtype).removeprefix("torch."),
    )


def _touches_embeddings(config: PeftConfig, model: PreTrainedModel) -> bool:
    places = [name for name in (embedding_name(model), head_name(model)) if name is not None]
    for option in ("modules_to_save", "target_modules"):
        entries = getattr(config, option, None) or []
        if isinstance(entries, str):
            if entries != ALL_LINEAR and any(match_target_against_key(entries, place) for place in places):
                return True
        elif any(names_module(entry, place) for entry in entries for place in places):
            return True
    return False
