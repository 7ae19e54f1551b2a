"""The four models of a run (base, tuned, merged, quantized): their folders, how they are loaded, and their sizes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft.chat.formats import resize_embeddings
from sft.export.gptq import load_dequantized
from sft.models.checkpoint import CheckpointError
from sft.models.loading import load_model, training_device
from stages.checkout.artifacts import read_json
from stages.checkout.paths import Paths
from stages.models.base import read_base_model
from stages.params.schema import ModelSection

MADE_BY = {
    "base": ("load", "base_model.json"),
    "tuned": ("train", "model"),
    "merged": ("merge", "model"),
    "quantized": ("quantize", "model"),
}
"""Model -> the stage that makes it, and its path in the stage's output folder."""


@dataclass(frozen=True)
class Variant:
    """A model of a run.

    Args:
        name: base, tuned, merged or quantized.
        checkpoint: Folder of the checkpoint.
        adapter: Folder of an adapter on top of it, if there is one.
    """

    name: str
    checkpoint: Path
    adapter: Path | None = None


def find_variants(paths: Paths) -> list[Variant]:
    """Return the models that earlier stages have written: base, tuned, merged, and quantized if there is one.

    Raises:
        ValueError: The training wrote neither an adapter nor weights.
    """
    base = Variant("base", Path(read_base_model(paths.out("load", "base_model.json")).path))
    trained, quantized = paths.out("train", "model"), paths.out("quantize", "model")
    if (trained / "adapter_config.json").exists():
        tuned = Variant("tuned", base.checkpoint, trained)
    elif (trained / "config.json").exists():
        tuned = Variant("tuned", trained)
    else:
        raise ValueError(f"{trained} contains neither an adapter nor a model: run the stage `train` again")
    found = [base, tuned, Variant("merged", paths.out("merge", "model"))]
    if (quantized / "config.json").exists():
        found.append(Variant("quantized", quantized))
    return found


def find_variant(paths: Paths, name: str) -> Variant:
    """Return one of the four models. Models of later stages need not exist.

    Args:
        paths: Paths of the checkout.
        name: base, tuned, merged or quantized.

    Raises:
        ValueError: The stage that makes the model has not run here yet; the message states what to type.
    """
    stage, file = MADE_BY[name]
    for needed in ("load", "format", stage):
        made = paths.out(*MADE_BY["base"]) if needed == "load" else paths.out(needed)
        if not made.exists():
            raise ValueError(f"{made} is missing, so there is no {name} model yet: type `sft {stage}` first")
    if name == "base":
        return Variant("base", Path(read_base_model(paths.out(stage, file)).path))
    found = {variant.name: variant for variant in find_variants(paths)}
    if name not in found or not (found[name].checkpoint / "config.json").exists():
        reason = "quantize.method is none" if name == "quantized" else f"the stage {stage} wrote none"
        raise ValueError(f"{paths.out(stage, file)} contains no model: {reason}; `sft {stage}` makes it")
    return found[name]


def load_variant(variant: Variant, section: ModelSection, num_tokens: int, new_token_ids: list[int]) -> Any:
    """Load one model for inference.

    Args:
        variant: The model.
        section: The section `model` of params.yaml: dtype, attention and trust.
        num_tokens: Size of the tokenizer's vocabulary.
        new_token_ids: Tokens that `format` added. Their embedding rows in the base model are initialized as in `train`.

    Raises:
        CheckpointError: The checkpoint is damaged; the message names the model and the stage that makes it.
    """
    if (variant.checkpoint / "quantize_config.json").exists() and training_device().type == "cpu":
        # On a CPU the packed kernel is four times slower; `quantize` has proved that it computes the same.
        return load_dequantized(variant.checkpoint)
    try:
        model = load_model(
            variant.checkpoint,
            dtype=saved_dtype(variant.checkpoint) or section.dtype,
            attn_implementation=section.attn_implementation,
            trust_remote_code=section.trust_remote_code,
            device_map={"": training_device()},
        )
    except CheckpointError as error:
        stage = "load" if variant.adapter is not None else MADE_BY[variant.name][0]
        raise CheckpointError(f"the {variant.name} model: {error} The stage `{stage}` makes its folder.") from error
    if variant.name == "base" or variant.adapter is not None:
        resize_embeddings(model, num_tokens, new_token_ids)
    if variant.adapter is not None:
        from sft.models.saved_adapters import (
            load_adapter,
        )  # A slow import, which models without an adapter do not need.

        model = load_adapter(model, variant.adapter)
    return model.eval()


def saved_dtype(checkpoint: Path) -> str | None:
    """Return the dtype in which a bitsandbytes checkpoint must be loaded; None for any other checkpoint.

    transformers keeps the norms of such a checkpoint in their saved dtype whatever dtype is requested, and torch's
    layer norm requires its input in the same dtype.
    """
    config = read_json(checkpoint / "config.json")
    is_rounded = config.get("quantization_config", {}).get("quant_method") == "bitsandbytes"
    return config.get("dtype") if is_rounded else None


def size_mb(variant: Variant) -> float:
    """Return the megabytes (10^6 bytes) of weight files that running the model needs, including an adapter's base."""
    folders = [variant.checkpoint, *([variant.adapter] if variant.adapter else [])]
    return sum(path.stat().st_size for folder in folders for path in folder.glob("*.safetensors")) / 1e6
