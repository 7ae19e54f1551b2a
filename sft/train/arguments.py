"""The decisions that `SFTTrainer` makes before training, each a function that can be tested alone.

Arguments that scripts gave to the trainer itself before they had a place of their own: taken over, or answered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin, TrainingArguments
from transformers.training_args import ParallelMode

from sft.chat.formats import FORMATS, clone_chat_template, ensure_pad_token, setup_chat_format
from sft.config import SFTConfig
from sft.hardware import current_hardware
from sft.kernels.liger import check_liger_hardware, liger_kernel_config
from sft.models.checkpoint import load_processor
from sft.models.loading import load_model
from sft.suggest import did_you_mean

# Options of SFTConfig that SFTTrainer itself used to take.
OPTIONS = (
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
)

# Arguments of from_pretrained that it used to hand on.
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

REPLACED = {
    "infinite": "give train_dataset=ConstantLengthDataset(..., infinite=True)",
    "model_init": "give the model itself",
    "prepare_in_int8_kwargs": "call prepare_model_for_kbit_training(model, ...) before, and give the prepared model",
    "prepare_model_for_kbit_training_kwargs": "call prepare_model_for_kbit_training(model, ...) before",
}


def take_over_arguments(config: SFTConfig, former: Mapping[str, Any], model: Any) -> None:
    """Write former arguments of the trainer into the options that replaced them.

    Args:
        config: Changed in place.
        former: What the trainer was given beyond its own arguments, by name.
        model: A name, for which `from_pretrained`'s arguments are kept, or an object, for which they come too late.

    Raises:
        ValueError: A value contradicts the options, comes too late, or has no place any more; says what to write.
    """
    loading = {name: value for name, value in former.items() if name in FROM_PRETRAINED}
    if loading and not isinstance(model, str):
        raise ValueError(
            f"{_call(loading)} would be ignored: the model is an object already; give them to its from_pretrained, or "
            "give the model's name"
        )
    for name, value in former.items():
        if name in OPTIONS:
            _set_option(config, name, value)
        elif name not in FROM_PRETRAINED:
            raise ValueError(f"SFTTrainer has no argument {name}={value!r}: {_way_out(name, value)}")
    if loading:
        given = config.model_init_kwargs if isinstance(config.model_init_kwargs, dict) else {}
        twice = [name for name in loading if given.get(name, loading[name]) != loading[name]]
        if twice:
            raise ValueError(f"{', '.join(twice)} stands in model_init_kwargs too, with another value; give it there")
        config.model_init_kwargs = {**given, **loading}
    config.settle()


def one_processor(processing_class: Any, former_tokenizer: Any) -> Any:
    """The tokenizer or processor under either of its names.

    Raises:
        ValueError: Both names are given, with different objects.
    """
    if processing_class is None or former_tokenizer is None or processing_class is former_tokenizer:
        return former_tokenizer if processing_class is None else processing_class
    raise ValueError("processing_class and tokenizer are two names of one argument; give processing_class alone")


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
    if name in REPLACED:
        return REPLACED[name]
    options = [field.name for field in fields(SFTConfig)]
    if name in options:
        return f"it is an option of the training; give args=SFTConfig({name}={value!r})"
    known = [*options, *OPTIONS, *FROM_PRETRAINED, "processing_class"]
    return did_you_mean(name, known, otherwise="options of the training go into args=SFTConfig(...)")


def _call(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


def resolve_config(args: TrainingArguments | None, model: Any, former: Mapping[str, Any] | None = None) -> SFTConfig:
    """The options, with defaults for what was not given.

    Args:
        args: As the user gave them.
        model: A name or an object.
        former: Options that were given to the trainer itself, as older scripts do.

    Raises:
        ValueError: Options that would be ignored, or several GPUs without a launcher.
    """
    if args is None:
        name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "") or "model"
        args = SFTConfig(output_dir=f"{Path(name).name}-SFT")
    elif not isinstance(args, SFTConfig):
        given = {field.name: getattr(args, field.name) for field in fields(args) if field.init}
        args = SFTConfig(**given)
    take_over_arguments(args, former or {}, model)
    if not isinstance(model, str) and args.model_init_kwargs:
        raise ValueError(
            f"model_init_kwargs={args.model_init_kwargs} would be ignored: the model is an object already; give them "
            "to its from_pretrained, or give the model's name"
        )
    if args.device.type == "cpu":
        args.dataloader_pin_memory = False  # there is nothing to pin for, and torch warns at every data loader
    if args.parallel_mode is ParallelMode.NOT_DISTRIBUTED and args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process, which would mean torch's DataParallel; start the script "
            f"with `accelerate launch --num_processes {args.n_gpu}`, or show it one GPU (CUDA_VISIBLE_DEVICES=0)"
        )
    if args.use_liger_kernel:
        check_liger_hardware(current_hardware(args.device))
    return args


def model_arguments(config: SFTConfig) -> dict[str, Any]:
    """`model_init_kwargs`, which a command line gives as JSON text and upstream parses."""
    return config.model_init_kwargs if isinstance(config.model_init_kwargs, dict) else {}


def resolve_model(model: Any, config: SFTConfig) -> Any:
    """Load a model given as a name, with `model_init_kwargs`; pass an object through."""
    if not isinstance(model, str):
        return model
    return load_model(model, mixed_precision=config.autocast_precision, **model_arguments(config))


def resolve_processor(processing_class: Any, model: Any, config: SFTConfig) -> Any:
    """The tokenizer or processor: as given, else the one that belongs to the model; eos and pad set as asked.

    Raises:
        ValueError: None can be found, or a token that the options name is not in the vocabulary.
    """
    if processing_class is None:
        name = model if isinstance(model, str) else model.config._name_or_path
        if not name:
            raise ValueError("processing_class is needed: the model was made in memory and names no tokenizer")
        given = model_arguments(config) if isinstance(model, str) else {}
        processing_class = load_processor(name, given.get("revision"), bool(given.get("trust_remote_code")))
    tokenizer = tokenizer_of(processing_class)
    if not tokenizer.chat_template:  # rows of text are rendered with the tokenizer
        tokenizer.chat_template = getattr(processing_class, "chat_template", None)
    for option in ("eos_token", "pad_token"):
        token = getattr(config, option)
        if token is None:
            continue
        if token not in tokenizer.get_vocab():
            raise ValueError(f"{option}={token!r} is not in the tokenizer's vocabulary; add it, or name one that is")
        setattr(tokenizer, option, token)
    if tokenizer.pad_token is None:
        ensure_pad_token(tokenizer, may_add=False)  # labels are masked by place, so eos may serve
    return processing_class


def tokenizer_of(processing_class: Any) -> PreTrainedTokenizerBase:
    """The tokenizer inside a processor, or the tokenizer itself."""
    return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class


def apply_chat_template(model: Any, tokenizer: PreTrainedTokenizerBase, config: SFTConfig) -> Any:
    """Put the format of `chat_template_path` on tokenizer and model.

    Args:
        model: Resized where the format brings new tokens.
        tokenizer: Gets the template and the special tokens.
        config: `chat_template_path`: a named format, a Jinja file, or a tokenizer's folder or hub id.

    Raises:
        ValueError: It is none of these.
    """
    path = config.chat_template_path
    if path is None:
        return model
    if path in FORMATS or Path(path).suffix in (".jinja", ".jinja2", ".j2"):
        return setup_chat_format(model, tokenizer, path, resize_to_multiple_of=None)[0]
    return clone_chat_template(model, tokenizer, path, resize_to_multiple_of=None)[0]


def settle_liger(model: Any, config: SFTConfig) -> None:
    """Choose Liger's kernels for the model where they are asked for; `Trainer` puts them in when training begins."""
    if config.use_liger_kernel:
        config.liger_kernel_config = liger_kernel_config(model, config.liger_kernel_config)
