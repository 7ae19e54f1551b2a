"""Arguments that scripts gave to the trainer itself before they had a place of their own: taken over, or answered."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from typing import Any

from sft.config import SFTConfig

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
    near = difflib.get_close_matches(name, [*options, *OPTIONS, *FROM_PRETRAINED, "processing_class"], n=1)
    return f"did you mean {near[0]!r}?" if near else "options of the training go into args=SFTConfig(...)"


def _call(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())
