"""Saved adapters: checks of their folder, loading onto a base model, and a check that every weight was used.

Two functions change peft, wherever adapters are loaded or created: `ask_peft_to_wait` keeps it from importing
GPTQModel, `keep_own_names` from renaming weights whose names are right.
"""

from __future__ import annotations

import logging
import re
import sys
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, transformers_weight_conversion
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sft.models.adapter_starts import start_of, why_not_reloadable
from sft.models.values import check_adapter_config, check_adapter_values, read_adapter_config

logger = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"

ADAPTER_WEIGHTS = "adapter_model.safetensors"


def check_adapter_folder(adapter: Path) -> None:
    """Check that a folder has an adapter that can be merged.

    Raises:
        ValueError: There is no adapter, its weights are pickled, or it learns a prompt, which can't be merged.
    """
    if not (adapter / ADAPTER_CONFIG).is_file():
        raise ValueError(f"{adapter} holds no adapter: it has no {ADAPTER_CONFIG}.")
    if not (adapter / ADAPTER_WEIGHTS).is_file():
        raise ValueError(f"{adapter} has no {ADAPTER_WEIGHTS}; pickled adapters (.bin) are refused: reading runs code.")
    config = _config_of(adapter)
    kind = config.peft_type.value
    if config.is_prompt_learning:
        raise ValueError(f"The {kind} adapter in {adapter} can't be merged: it adds to the input, not to the weights.")
    if not hasattr(PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type], "merge_and_unload"):
        raise ValueError(f"The {kind} adapter in {adapter} can't be merged: peft has no merged form of this type.")
    if getattr(config, "layer_replication", None):
        raise ValueError(
            f"The adapter in {adapter} can't be merged: layer_replication={config.layer_replication} repeats layers of "
            f"the base, and the copies share the weights that each of them would have to change."
        )
    reason = why_not_reloadable(config)
    if reason is not None:
        raise ValueError(
            f"The adapter in {adapter} was made with init_lora_weights={start_of(config)!r}, which changed the weights "
            f"of its base, and what it was trained with cannot be computed again: {reason}. Only adapters saved with "
            f"path_initial_model_for_weight_conversion can be merged."
        )


def _config_of(adapter: Path) -> PeftConfig:
    read_adapter_config(adapter, ADAPTER_CONFIG)
    try:
        config = PeftConfig.from_pretrained(adapter)
    except Exception as error:  # values of other types than peft expects raise errors of any class
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(f"{adapter / ADAPTER_CONFIG} can't be read by peft: {reason}") from error
    if not isinstance(config.peft_type, PeftType):
        raise ValueError(f"{adapter / ADAPTER_CONFIG} states no peft_type that peft knows: {config.peft_type!r:.80}")
    return config


def load_adapter(model: PreTrainedModel, adapter: Path, *, low_cpu_mem_usage: bool = False) -> PeftModel:
    """Put a saved adapter on its base model as peft does, and check that every weight of the adapter was used.

    Args:
        model: The base model.
        adapter: Folder that `PeftModel.save_pretrained` wrote.
        low_cpu_mem_usage: Put the adapter's tensors into the model instead of copying their values, as is needed while
            the model's own weights are not loaded yet.

    Returns:
        The model with the adapter, in evaluation mode.

    Raises:
        ValueError: The adapter belongs to another base model.
    """
    check_adapter_values(adapter / ADAPTER_WEIGHTS)
    module_names = [name for name, _ in model.named_modules()]
    check_adapter_config(adapter, _config_of(adapter), module_names, adapter_shapes(adapter).values())
    try:
        ask_peft_to_wait()
        keep_own_names()
        peft_model = PeftModel.from_pretrained(model, adapter, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    except Exception as error:  # see _config_of
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(f"The adapter in {adapter} does not fit {type(model).__name__}: {reason}") from error
    check_complete(peft_model, adapter, low_cpu_mem_usage=low_cpu_mem_usage)
    return peft_model


def check_complete(
    peft_model: PeftModel, adapter: Path, name: str = "default", *, low_cpu_mem_usage: bool = False
) -> None:
    """Check that a saved adapter has the weights, and only those, that the loaded adapter of this name needs.

    peft drops weights that it has no place for. Loading the weights once more tells which ones these are: peft may
    rename and join weights while it loads them, so that their names in the file and in the model cannot be compared.

    Args:
        peft_model: The model with the adapter.
        adapter: Folder of the adapter.
        name: Name of the adapter in the model.
        low_cpu_mem_usage: As the adapter was loaded.

    Raises:
        ValueError: The adapter belongs to another base model.
    """
    loaded = peft_model.load_adapter(str(adapter), name, low_cpu_mem_usage=low_cpu_mem_usage)
    saved = set(adapter_shapes(adapter))
    expected = set(get_peft_model_state_dict(peft_model, adapter_name=name, save_embedding_layers=False))
    missing = sorted(expected - saved)
    unknown = sorted(key for key in loaded.unexpected_keys if not _is_written_twice(adapter, key))
    if unknown or (missing and (loaded.missing_keys or not saved - expected)):
        raise ValueError(
            f"The adapter in {adapter} belongs to another base: {len(missing)} of its weights are missing "
            f"({', '.join(missing[:2])}) and {len(unknown)} have no place ({', '.join(unknown[:2])})."
        )


def check_resumed(model: Any, checkpoint: Path) -> None:
    """Check that a LoRA adapter has all weights of the checkpoint that was loaded into it.

    `transformers.Trainer` does not look at what peft found no place for, and would train on from weights drawn anew.

    Args:
        model: The model with the adapter. One without an adapter, or with one of another kind, is not checked.
        checkpoint: Folder of the checkpoint; transformers writes an adapter that is not called `default` into a folder
            of its name.

    Raises:
        ValueError: The checkpoint belongs to another adapter or base model.
    """
    if not isinstance(model, PeftModel):
        return
    name = model.active_adapters[0]
    adapter = next((folder for folder in (checkpoint / name, checkpoint) if (folder / ADAPTER_WEIGHTS).is_file()), None)
    if adapter is not None and model.peft_config[name].peft_type == PeftType.LORA:
        check_complete(model, adapter, name)


def _is_written_twice(adapter: Path, key: str) -> bool:
    """Return whether a key of an adapter's file holds a value that the file has under another name, too.

    With `bias='all'`, peft writes the biases of modules that are trained in full twice; and if the vocabulary has
    grown, the trained token rows of tied embeddings and head.
    """
    with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as file:
        names = set(file.keys()) - {key}
        twins = {key.replace(".modules_to_save.", ".")} & names
        if ".token_adapter." in key:
            twins |= {name for name in names if name.endswith(".token_adapter." + key.partition(".token_adapter.")[2])}
        return any(torch.equal(file.get_tensor(key), file.get_tensor(twin)) for twin in twins)


def adapter_shapes(adapter: Path) -> dict[str, list[int]]:
    """Return the names and shapes of all weights in an adapter's file, without reading the weights."""
    with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as file:
        return {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def outgrown(model: PreTrainedModel, adapter: Path, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Return the number of embedding rows that an adapter needs, or 0 if the base model has enough.

    Args:
        model: The base model.
        adapter: Folder of the adapter, which may contain embeddings that were resized and trained in full.
        tokenizer: Its length counts if the adapter contains no such embeddings; None = it does not count.
    """
    rows, width = model.get_input_embeddings().weight.shape
    full = [shape for key, shape in adapter_shapes(adapter).items() if _is_full_weight(key) and len(shape) == 2]
    saved = [shape[0] for shape in full if shape[1] == width and shape[0] > rows]
    wanted = max(saved, default=len(tokenizer) if tokenizer is not None else 0)
    return wanted if wanted > rows else 0


def count_adapted_modules(peft_model: PeftModel) -> int:
    """Count modules that have weights of the adapter: adapted layers, modules trained in full, trained token rows."""
    wrappers = [module for module in peft_model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    inside = {id(part) for wrapper in wrappers for part in wrapper.modules()}
    layers = [module for module in peft_model.modules() if isinstance(module, BaseTunerLayer)]
    return len(wrappers) + sum(id(layer) not in inside for layer in layers)


def _is_full_weight(key: str) -> bool:
    """Return whether a key of an adapter's file is a weight of a module trained in full, or trained token rows."""
    return (key.endswith((".weight", ".bias")) and "lora_" not in key) or ".token_adapter." in key


def ask_peft_to_wait() -> None:
    """Keep peft from importing GPTQModel until something else has imported it.

    peft asks for each layer whether it is one of GPTQModel's, and imports the package to find out. This takes seconds,
    prints a banner and changes the logging set-up. A model can only have such layers if loading it has imported the
    package already, so that peft's question "is it installed?" can be replaced by "is it imported?".
    """
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "peft" and hasattr(module, "is_gptqmodel_available"):
            vars(module)["is_gptqmodel_available"] = gptqmodel_in_use


def gptqmodel_in_use() -> bool:
    """Return whether GPTQModel has been imported in this process."""
    return "gptqmodel" in sys.modules


def keep_own_names() -> None:
    """Have peft load the weights of a LoRA adapter as they are if their names are those of the model.

    peft renames the weights of every LoRA adapter by the rules for checkpoints with former names. An adapter that peft
    saved has the model's own names already. Some rules match these, too (`layers.` becomes `language_model.layers.`,
    `.experts.` becomes `.mlp.experts.`): then there is no place for the weights, and the adapter keeps those that it
    was made with.
    """
    rename = transformers_weight_conversion.convert_peft_adapter_state_dict_for_transformers
    if hasattr(rename, "__wrapped__"):
        return

    @wraps(rename)
    def rename_former_names(
        model: torch.nn.Module,
        peft_config: PeftConfig,
        adapter_state_dict: dict[str, Any],
        adapter_name: str = "default",
    ) -> dict[str, Any]:
        if _own_names(adapter_state_dict) <= _own_names(dict(model.named_parameters()), adapter_name):
            return adapter_state_dict
        return rename(model, peft_config, adapter_state_dict, adapter_name)

    transformers_weight_conversion.convert_peft_adapter_state_dict_for_transformers = rename_former_names


def _own_names(weights: dict[str, Any], adapter_name: str | None = None) -> set[str]:
    """Return the names of LoRA weights inside the base model, without the name of the adapter."""
    names = {name.removeprefix("base_model.model.") for name in weights if ".lora_" in name}
    if adapter_name is None:
        return names
    adapter = re.compile(rf"(\.lora_\w+)\.{re.escape(adapter_name)}(?=\.|$)")
    return {adapter.sub(r"\1", name) for name in names if adapter.search(name)}
