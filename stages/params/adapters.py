"""`train.adapter`: adapters other than LoRA by their type in peft, checked without loading torch.

adapter_types.json holds the options of each type. `python -m stages.training.option_table` writes it.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from sft.option_types import WORDS, convert_value
from sft.suggest import did_you_mean

TABLE = Path(__file__).with_name("adapter_types.json")

_PROMPT = "it learns tokens that are put before each prompt, and can't be merged into the weights"
_BETWEEN_STEPS = "it needs calls between the steps of a training that the trainer does not make"
_OF_ITS_OWN = "it needs inputs of its own beside the tokens"
_NO_MERGE = "peft can't merge it into the weights"
_NOT_SAVED = "peft saves indices of its weights in a form that can't be loaded to be merged"

REFUSED_TYPES = {
    "LORA": "params.yaml has its options as keys of their own, such as lora_r and use_dora; state method: lora",
    "CARTRIDGE": _PROMPT,
    "CPT": _PROMPT,
    "PROMPT_TUNING": _PROMPT,
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "P_TUNING": _PROMPT,
    "PREFIX_TUNING": _PROMPT,
    "ADAPTION_PROMPT": _PROMPT,
    "ADALORA": _BETWEEN_STEPS,
    "BEFT": "it trains biases, and peft merges it only into layers that have one",
    "FROD": _NOT_SAVED,
    "SUPERTUNING": _NOT_SAVED,
    "LILY": _NO_MERGE,
    "SHADOW": _NO_MERGE,
    "POLY": _OF_ITS_OWN,
    "XLORA": "it mixes adapters that were trained before",
    "TRAINABLE_TOKENS": "state train.trainable_token_indices, which trains rows of tokens beside LoRA",
}
"""Type of adapter -> why a training can't use it: what is shipped is a merged model."""

SET_BY_PIPELINE = (
    "peft_type",
    "task_type",
    "inference_mode",
    "base_model_name_or_path",
    "revision",
    "auto_mapping",
    "peft_version",
    "runtime_config",
)


@cache
def adapter_types() -> dict[str, dict[str, tuple[str, ...]]]:
    """Return the options of each type of adapter of peft: name -> names of the types that it takes."""
    entries = json.loads(TABLE.read_text(encoding="utf-8"))
    return {kind: {name: tuple(types) for name, types in options.items()} for kind, options in entries.items()}


def check_adapter(adapter: dict[str, Any]) -> dict[str, Any]:
    """Check `train.adapter`: its type, and its options by their names and types.

    Returns:
        The same, with the type in capitals, and with numbers that YAML reads as text (`1e-4`) converted.

    Raises:
        ValueError: There is no such type, it can't be trained or merged, or an option is unknown or of another type.
    """
    known, kind = adapter_types(), str(adapter.get("type", "")).upper()
    usable = [name for name in known if name not in REFUSED_TYPES]
    if "type" not in adapter:
        raise ValueError(f"type is missing; there are {', '.join(usable)}")
    if kind in REFUSED_TYPES:
        raise ValueError(f"type {adapter['type']}: {REFUSED_TYPES[kind]}")
    if kind not in known:
        hint = did_you_mean(kind, usable, otherwise=f"there are {', '.join(usable)}")
        raise ValueError(f"type {adapter['type']!r} is not a type of adapter in peft; {hint}")
    options, checked = known[kind], {"type": kind}
    for name, value in adapter.items():
        if name == "type":
            continue
        if name not in options or name in SET_BY_PIPELINE:
            own = [option for option in options if option not in SET_BY_PIPELINE]
            hint = did_you_mean(name, own, otherwise=f"there are {', '.join(own)}")
            raise ValueError(f"{name} is not an option of {kind}; {hint}")
        kinds = tuple(word for word in WORDS if word.__name__ in options[name])
        checked[name] = convert_value(name, value, kinds) if value is not None and kinds else value
    return checked
