"""Arguments of `SFTTrainer`, resolved: its options, model, tokenizer and chat template.

Older scripts gave options and arguments of `from_pretrained` to the trainer itself. These former arguments are moved to
the options that replaced them, or refused with a message that says where they belong now.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin, TrainingArguments
from transformers.training_args import ParallelMode

from sft.batches.layout import document_layout
from sft.chat.formats import (
    FORMATS,
    clone_chat_template,
    ensure_pad_token,
    set_template_variables,
    setup_chat_format,
)
from sft.chat.template import Messages
from sft.chat.thinking_variable import set_thinking_variable
from sft.config import SFTConfig
from sft.hardware import current_hardware
from sft.inner_model import causal_lm, evaluating
from sft.kernels.liger import check_liger_hardware, liger_kernel_config
from sft.loss.supervised import ROUTER_WEIGHTS, router_loss_weight
from sft.models.checkpoint import load_processor
from sft.models.loading import load_model
from sft.options import ThinkingPolicy
from sft.suggest import did_you_mean

logger = logging.getLogger(__name__)

FORMER_OPTIONS = (
    "chars_per_token",
    "dataset_batch_size",
    "dataset_kwargs",
    "dataset_num_proc",
    "dataset_text_field",
    "eval_packing",
    "max_seq_length",
    "model_init_kwargs",
    "neftune_noise_alpha",
    "num_of_sequences",
    "packing",
    "prepare_in_int8_kwargs",
)
"""Options of `SFTConfig` that older scripts give to the trainer."""

FROM_PRETRAINED = (
    "attn_implementation",
    "device_map",
    "dtype",
    "load_in_4bit",
    "load_in_8bit",
    "quantization_config",
    "revision",
    "torch_dtype",
    "trust_remote_code",
    "use_cache",
)
"""Arguments of `from_pretrained` that older scripts give to the trainer."""

REPLACED = {
    "infinite": "give train_dataset=ConstantLengthDataset(..., infinite=True)",
    "model_init": "give the model itself",
}
"""Former arguments without an option of their own, and what to do instead."""


def resolve_config(args: TrainingArguments | None, model: Any, former: Mapping[str, Any] | None = None) -> SFTConfig:
    """Return the options as an `SFTConfig`, with defaults for what was not given.

    Args:
        args: As the user gave them.
        model: A name or an object.
        former: Arguments of the trainer that older scripts use, by name; see `take_over_arguments`.

    Raises:
        ValueError: Options would be ignored, or several GPUs are visible without a launcher.
    """
    if args is None:
        name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "") or "model"
        args = SFTConfig(output_dir=f"{Path(name).name}-SFT")
    elif not isinstance(args, SFTConfig):
        given = {field.name: getattr(args, field.name) for field in fields(args) if field.init}
        args = SFTConfig(**given)
    take_over_arguments(args, former or {}, model)
    args.model_init_kwargs = _with_trust(args, model)
    if not isinstance(model, str) and args.model_init_kwargs:
        raise ValueError(
            f"model_init_kwargs={args.model_init_kwargs} would be ignored: the model is an object already; give them "
            "to its from_pretrained, or give the model's name"
        )
    if args.device.type == "cpu":
        args.dataloader_pin_memory = False  # memory is pinned for copies to a GPU; without one, torch warns
    if args.parallel_mode is ParallelMode.NOT_DISTRIBUTED and args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process, which would mean torch's DataParallel; start the script "
            f"with `accelerate launch --num_processes {args.n_gpu}`, or show it one GPU (CUDA_VISIBLE_DEVICES=0)"
        )
    if args.use_liger_kernel:
        check_liger_hardware(current_hardware(args.device))
    return args


def take_over_arguments(config: SFTConfig, former: Mapping[str, Any], model: Any) -> None:
    """Move former arguments of the trainer to the options that replaced them.

    Args:
        config: Changed in place.
        former: Arguments of the trainer that it does not have any more, by name.
        model: A name, or an object, for which arguments of `from_pretrained` come too late.

    Raises:
        ValueError: A value contradicts the options, comes too late, or has no option; the message says what to write.
    """
    loading = {name: value for name, value in former.items() if name in FROM_PRETRAINED}
    if loading and not isinstance(model, str):
        call = ", ".join(f"{name}={value!r}" for name, value in loading.items())
        raise ValueError(
            f"{call} would be ignored: the model is an object already; give them to its from_pretrained, or give the "
            "model's name"
        )
    for name, value in former.items():
        name = "prepare_in_int8_kwargs" if name == "prepare_model_for_kbit_training_kwargs" else name
        if name in FORMER_OPTIONS:
            _set_option(config, name, value)
        elif name not in FROM_PRETRAINED:
            raise ValueError(f"SFTTrainer has no argument {name}={value!r}: {_way_out(name, value)}")
    if loading:
        given = config.model_init_kwargs if isinstance(config.model_init_kwargs, dict) else {}
        twice = [name for name in loading if given.get(name, loading[name]) != loading[name]]
        if twice:
            raise ValueError(
                f"{', '.join(twice)} is also given in model_init_kwargs, with another value; give it there"
            )
        config.model_init_kwargs = {**given, **loading}
    config.validate()


def _with_trust(config: SFTConfig, model: Any) -> dict[str, Any] | str | None:
    """Return `model_init_kwargs` with `trust_remote_code`, if that option is set and the model is given by name."""
    if not config.trust_remote_code or not isinstance(model, str):
        return config.model_init_kwargs
    given = _model_init_kwargs(config)
    if not given.get("trust_remote_code", True):
        raise ValueError(
            "trust_remote_code=True and model_init_kwargs={'trust_remote_code': False} contradict each other; give one"
        )
    return {**given, "trust_remote_code": True}


def _set_option(config: SFTConfig, name: str, value: Any) -> None:
    current = getattr(config, name)
    if current not in (_default(name), value):
        raise ValueError(
            f"{name}={value!r} contradicts args, where it is {current!r}; give it once, as SFTConfig({name}=...)"
        )
    setattr(config, name, value)


def _default(name: str) -> Any:
    field: Field = next(field for field in fields(SFTConfig) if field.name == name)
    return None if field.default is MISSING else field.default


def _way_out(name: str, value: Any) -> str:
    """Return what to write instead of an argument that the trainer does not have."""
    if name in REPLACED:
        return REPLACED[name]
    options = [field.name for field in fields(SFTConfig)]
    if name in options:
        return f"it is an option of the training; give args=SFTConfig({name}={value!r})"
    known = [*options, *FORMER_OPTIONS, *FROM_PRETRAINED, "processing_class"]
    return did_you_mean(name, known, otherwise="options of the training go into args=SFTConfig(...)")


def choose_processing_class(processing_class: Any, former_tokenizer: Any) -> Any:
    """Return the tokenizer or processor that was given under either of its names; None if it was not given.

    Raises:
        ValueError: Both names are given, with different objects.
    """
    if processing_class is None or former_tokenizer is None or processing_class is former_tokenizer:
        return former_tokenizer if processing_class is None else processing_class
    raise ValueError("processing_class and tokenizer are two names of one argument; give processing_class alone")


def resolve_model(model: Any, config: SFTConfig) -> Any:
    """Load a model that is given as a name, with `model_init_kwargs`; return an object as it is."""
    if not isinstance(model, str):
        return model
    return load_model(model, mixed_precision=config.autocast_precision, **_model_init_kwargs(config))


def resolve_processor(processing_class: Any, model: Any, config: SFTConfig) -> Any:
    """Return the tokenizer or processor, with the eos and pad tokens that the options ask for.

    Args:
        processing_class: As the user gave it; None = load the one that is saved with the model.
        model: A name or an object.
        config: `eos_token`, `pad_token`, and `model_init_kwargs` for loading.

    Raises:
        ValueError: No tokenizer can be found, or a token of the options is not in the vocabulary.
    """
    if processing_class is None:
        name = model if isinstance(model, str) else model.config._name_or_path
        if not name:
            raise ValueError("processing_class is needed: the model was made in memory and names no tokenizer")
        given = _model_init_kwargs(config) if isinstance(model, str) else {}
        trusted = config.trust_remote_code or bool(given.get("trust_remote_code"))
        processing_class = load_processor(name, given.get("revision"), trusted)
    tokenizer = tokenizer_of(processing_class)
    if not tokenizer.chat_template:  # rows without images are rendered with the tokenizer
        tokenizer.chat_template = getattr(processing_class, "chat_template", None)
    for option in ("eos_token", "pad_token"):
        token = getattr(config, option)
        if token is None:
            continue
        if token not in tokenizer.get_vocab():
            raise ValueError(f"{option}={token!r} is not in the tokenizer's vocabulary; add it, or name one that is")
        setattr(tokenizer, option, token)
    if tokenizer.pad_token is None:
        ensure_pad_token(tokenizer, may_add=False)  # padding is masked by its position, so eos may serve as pad
    return processing_class


def _model_init_kwargs(config: SFTConfig) -> dict[str, Any]:
    # TrainingArguments has parsed what a command line gave as JSON
    return config.model_init_kwargs if isinstance(config.model_init_kwargs, dict) else {}


def tokenizer_of(processing_class: Any) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a processor; return a tokenizer as it is."""
    return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class


def apply_chat_template(
    model: Any, tokenizer: PreTrainedTokenizerBase, config: SFTConfig, chats: Iterable[Messages] = ()
) -> Any:
    """Give tokenizer and model the chat template of `chat_template_path`, with its special tokens and variables.

    Args:
        model: Its embeddings are resized where the template brings new tokens.
        tokenizer: Gets the template and the special tokens.
        config: `chat_template_path`: a named format, a Jinja file, or a tokenizer's folder or hub id; and
            `chat_template_kwargs`; and `thinking`.
        chats: Conversations of the data sets, read only if it depends on them whether `thinking` needs a variable.

    Returns:
        The model.

    Raises:
        ValueError: `chat_template_path` is none of these, or the template does not use a variable of
            `chat_template_kwargs`, or that sets a variable to another value than `thinking` needs.
    """
    path = config.chat_template_path
    if path is not None and (path in FORMATS or Path(path).suffix in (".jinja", ".jinja2", ".j2")):
        model = setup_chat_format(model, tokenizer, path, resize_to_multiple_of=None)[0]
    elif path is not None:
        model = clone_chat_template(model, tokenizer, path, resize_to_multiple_of=None)[0]
    if config.chat_template_kwargs:
        assert isinstance(config.chat_template_kwargs, dict), "SFTConfig has parsed it"
        set_template_variables(tokenizer, config.chat_template_kwargs)
    thinking = cast(ThinkingPolicy, config.thinking)
    variable = set_thinking_variable(tokenizer, thinking, chats, cast(dict[str, Any], config.chat_template_kwargs))
    if variable:
        logger.warning("thinking=%r: the chat template gets %s", config.thinking, json.dumps(variable))
    return model


def align_special_tokens(model: Any, tokenizer: PreTrainedTokenizerBase, config: SFTConfig) -> None:
    """Write the ids of the padding token, and of an end that `eos_token` asks for, to the model's configurations.

    `transformers.Trainer` aligns all special tokens when training begins, and warns about each that differs. The
    generation config may have several ends; the new one is put first.
    """
    inner = causal_lm(model)
    configs = [inner.config.get_text_config(), getattr(inner, "generation_config", None)]
    if tokenizer.pad_token_id is not None:
        for each in filter(None, configs):
            each.pad_token_id = tokenizer.pad_token_id
    if config.eos_token is None:
        return
    configs[0].eos_token_id = tokenizer.eos_token_id
    generation = configs[1]
    if generation is not None:
        ends = generation.eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        generation.eos_token_id = ends if tokenizer.eos_token_id in ends else [tokenizer.eos_token_id, *ends]


def choose_router_loss(model: Any, config: SFTConfig, *, own_loss: bool = False) -> tuple[float, bool]:
    """Write `router_aux_loss_coef` to the model's configuration, and return what holds.

    Args:
        model: Its configuration decides where the option is None: `output_router_logits` adds the load-balancing loss
            of a mixture of experts, `router_aux_loss_coef` is its weight.
        config: The options.
        own_loss: Whether the user's `compute_loss_func` computes the loss.

    Returns:
        The weight, 0 if the configuration has none, and whether the loss is added.

    Raises:
        ValueError: The option is below 0, the model returns no such loss, or a `compute_loss_func` would ignore it.
    """
    inner = causal_lm(model)
    text_config, asked = inner.config.get_text_config(), config.router_aux_loss_coef
    has_routers = hasattr(text_config, "output_router_logits")
    if asked is not None:
        if asked < 0:
            raise ValueError(f"router_aux_loss_coef={asked} must be at least 0: it weighs a loss to minimize")
        if asked and own_loss:
            raise ValueError(
                f"router_aux_loss_coef={asked} would be ignored, as compute_loss_func computes the loss: add "
                "outputs.aux_loss there, set output_router_logits=True in the model's configuration, and leave "
                "router_aux_loss_coef out"
            )
        if asked and not has_routers:
            raise ValueError(
                f"router_aux_loss_coef={asked} weighs the load-balancing loss of a mixture of experts, and "
                f"{type(inner).__name__} is not a Mixture-of-Experts model that returns what its routers choose; leave "
                "it out"
            )
        if has_routers:
            name = next((name for name in ROUTER_WEIGHTS if hasattr(text_config, name)), ROUTER_WEIGHTS[0])
            text_config.output_router_logits = asked > 0
            setattr(text_config, name, asked)
    coefficient = router_loss_weight(inner.config)
    enabled = bool(has_routers and text_config.output_router_logits and coefficient)
    if enabled and not _returns_router_loss(inner):
        raise ValueError(
            f"{type(inner).__name__} returns no load-balancing loss, although its configuration has routers: "
            f"router_aux_loss_coef={coefficient} would have no effect; set router_aux_loss_coef=0"
        )
    return coefficient, enabled


@torch.no_grad()
def _returns_router_loss(model: Any) -> bool:
    """Return whether a model with routers returns their loss, from a pass on a few tokens.

    Weights that are not there yet, or in parts, can't be used; then the model is believed.
    """
    if any(parameter.is_meta or hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return True
    tokens = torch.arange(4, device=model.device)[None]
    with evaluating(model), document_layout(None):
        outputs = model(input_ids=tokens, use_cache=False, output_router_logits=True)
    return isinstance(getattr(outputs, "aux_loss", None), torch.Tensor)


def check_router_padding(data_collator: Any) -> None:
    """Check that flat batches have no padding, which the load-balancing loss of a mixture of experts would count.

    Raises:
        ValueError: They are padded to a multiple.
    """
    multiple = getattr(data_collator, "pad_to_multiple_of", None)
    if getattr(data_collator, "padding_free", False) and multiple:
        raise ValueError(
            f"pad_to_multiple_of={multiple} adds padding to joined rows, and the load-balancing loss of the experts "
            "would count it as tokens; leave it out, set padding_free=False, or set router_aux_loss_coef=0"
        )


def choose_liger_kernels(model: Any, config: SFTConfig) -> None:
    """Write the choice of Liger's kernels for this model into the options, if they are asked for.

    `transformers.Trainer` puts the kernels into the model when training begins.
    """
    if config.use_liger_kernel:
        config.liger_kernel_config = liger_kernel_config(model, config.liger_kernel_config)
