"""Load an adapter and merge it in memory, where head and embeddings may share one weight.

Keep peft from importing GPTQModel for models that have no GPTQ layers.

peft asks for every layer whether it is one of GPTQModel's, and imports that package to find out: seconds of start-up, a
banner on the terminal and another logging set-up. But a layer of a package that was never imported does not exist:
loading a GPTQ checkpoint imports the package first.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PACKAGE = "gptqmodel"


def gptqmodel_in_use() -> bool:
    """Whether anything in this process has imported GPTQModel, without which none of its layers can exist."""
    return PACKAGE in sys.modules


def ask_peft_to_wait() -> None:
    """Replace peft's question "is GPTQModel installed?" by "is it in use?", wherever peft has imported it to."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "peft" and hasattr(module, "is_gptqmodel_available"):
            vars(module)["is_gptqmodel_available"] = gptqmodel_in_use


ADAPTER_CONFIG = "adapter_config.json"

ADAPTER_WEIGHTS = "adapter_model.safetensors"


def check_adapter_folder(adapter: Path) -> None:
    """Refuse a folder without adapter, with pickled weights, or with an adapter that has no merged form."""
    if not (adapter / ADAPTER_CONFIG).is_file():
        raise ValueError(f"{adapter} holds no adapter: it has no {ADAPTER_CONFIG}.")
    if not (adapter / ADAPTER_WEIGHTS).is_file():
        raise ValueError(f"{adapter} has no {ADAPTER_WEIGHTS}; pickled adapters (.bin) are refused: reading runs code.")
    config = PeftConfig.from_pretrained(adapter)
    if config.is_prompt_learning:
        kind = config.peft_type.value
        raise ValueError(f"The {kind} adapter in {adapter} can't be merged: it adds to the input, not to the weights.")


def load_adapter(model: PreTrainedModel, adapter: Path, *, low_cpu_mem_usage: bool = False) -> PeftModel:
    """Put a saved adapter on its base, and make sure that every weight of it found its place.

    Args:
        model: The base.
        adapter: Folder that `PeftModel.save_pretrained` wrote.
        low_cpu_mem_usage: The base's weights are not there yet: the adapter's take places rather than being copied.

    Raises:
        ValueError: It belongs to another base.
    """
    try:
        ask_peft_to_wait()
        peft_model = PeftModel.from_pretrained(model, adapter, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    except (RuntimeError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"The adapter in {adapter} does not fit {type(model).__name__}: {reason}") from error
    check_complete(peft_model, adapter)
    return peft_model


def check_complete(peft_model: PeftModel, adapter: Path, name: str = "default") -> None:
    """Make sure that every weight of a saved adapter, loaded under a name, found its place.

    Raises:
        ValueError: It belongs to another base.
    """
    saved = set(adapter_shapes(adapter))
    expected = set(get_peft_model_state_dict(peft_model, adapter_name=name, save_embedding_layers=False))
    missing, unknown = sorted(expected - saved), sorted(key for key in saved - expected if not _is_whole_weight(key))
    if missing or unknown:
        raise ValueError(
            f"The adapter in {adapter} belongs to another base: {len(missing)} of its weights are missing "
            f"({', '.join(missing[:2])}) and {len(unknown)} have no place ({', '.join(unknown[:2])})."
        )


def adapter_shapes(adapter: Path) -> dict[str, list[int]]:
    """Names and shapes of all weights in an adapter's file, without reading them."""
    with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as file:
        return {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def outgrown(model: PreTrainedModel, adapter: Path, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Rows of embeddings that the adapter needs, 0 where the base has enough."""
    rows, width = model.get_input_embeddings().weight.shape
    whole = [shape for key, shape in adapter_shapes(adapter).items() if _is_whole_weight(key) and len(shape) == 2]
    saved = [shape[0] for shape in whole if shape[1] == width and shape[0] > rows]
    wanted = max(saved, default=len(tokenizer) if tokenizer is not None else 0)
    return wanted if wanted > rows else 0


def count_adapted_modules(peft_model: PeftModel) -> int:
    """Modules with weights of the adapter: adapted layers, trained copies, trained token rows."""
    wrappers = [module for module in peft_model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    inside = {id(part) for wrapper in wrappers for part in wrapper.modules()}
    layers = [module for module in peft_model.modules() if isinstance(module, BaseTunerLayer)]
    return len(wrappers) + sum(id(layer) not in inside for layer in layers)


def _is_whole_weight(key: str) -> bool:
    """Whether a key of an adapter's file belongs to embeddings or a module trained whole, not to an adapted layer."""
    return (key.endswith((".weight", ".bias")) and "lora_" not in key) or ".token_adapter." in key
