"""The four models of a run (base, tuned, merged, quantized): where each lies, how it is loaded, what it weighs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft.chat.formats import resize_embeddings
from sft.export.gptq import load_dequantized
from sft.models.loading import load_model, training_device
from stages.checkout.artifacts import read_json
from stages.checkout.paths import Paths
from stages.models.base import read_base_model
from stages.params.schema import ModelSection

# model -> the stage that makes it, and where in its outs
MADE_BY = {
    "base": ("load", "base_model.json"),
    "tuned": ("train", "model"),
    "merged": ("merge", "model"),
    "quantized": ("quantize", "model"),
}


@dataclass(frozen=True)
class Variant:
    """One model: a checkpoint folder, and an adapter on top of it or none."""

    name: str
    checkpoint: Path
    adapter: Path | None = None


def find_variants(paths: Paths) -> list[Variant]:
    """The models that the stages before have written: base, tuned, merged, and quantized where there is one.

    Raises:
        ValueError: The training has left neither an adapter nor weights.
    """
    base = Variant("base", Path(read_base_model(paths.out("load", "base_model.json")).path))
    trained, quantized = paths.out("train", "model"), paths.out("quantize", "model")
    if (trained / "adapter_config.json").exists():
        tuned = Variant("tuned", base.checkpoint, trained)
    elif (trained / "config.json").exists():
        tuned = Variant("tuned", trained)
    else:
        raise ValueError(f"{trained} holds neither an adapter nor a model: run the stage `train` again")
    found = [base, tuned, Variant("merged", paths.out("merge", "model"))]
    if (quantized / "config.json").exists():
        found.append(Variant("quantized", quantized))
    return found


def find_variant(paths: Paths, name: str) -> Variant:
    """One of the four models, by name; those that later stages make need not be there.

    Raises:
        ValueError: The stage that makes it has not run here yet; the message says what to type.
    """
    stage, file = MADE_BY[name]
    for needed in ("load", "format", stage):
        made = paths.out(*MADE_BY["base"]) if needed == "load" else paths.out(needed)
        if not made.exists():
            raise ValueError(f"{made} is missing, so there is no {name} model yet: type `dvc repro {stage}` first")
    if name == "base":
        return Variant("base", Path(read_base_model(paths.out(stage, file)).path))
    found = {variant.name: variant for variant in find_variants(paths)}
    if name not in found or not (found[name].checkpoint / "config.json").exists():
        reason = "quantize.method is none" if name == "quantized" else f"the stage {stage} has left none"
        raise ValueError(f"{paths.out(stage, file)} holds no model: {reason}; `dvc repro {stage}` makes it")
    return found[name]


def load_variant(variant: Variant, section: ModelSection, num_tokens: int, new_token_ids: list[int]) -> Any:
    """Load one model for inference.

    Args:
        variant: Which one.
        section: dtype, attention and trust of the base model.
        num_tokens: Size of the tokenizer.
        new_token_ids: Tokens that `format` added: their rows are made in the base as `train` made them.
    """
    if (variant.checkpoint / "quantize_config.json").exists() and training_device().type == "cpu":
        # The packed kernel is four times slower here; `quantize` has proved that it computes the same.
        return load_dequantized(variant.checkpoint)
    model = load_model(
        variant.checkpoint,
        dtype=saved_dtype(variant.checkpoint) or section.dtype,
        attn_implementation=section.attn_implementation,
        trust_remote_code=section.trust_remote_code,
        device_map={"": training_device()},
    )
    if variant.name == "base" or variant.adapter is not None:
        resize_embeddings(model, num_tokens, new_token_ids)
    if variant.adapter is not None:
        from sft.models.saved_adapters import load_adapter  # slow, and the other models need no peft

        model = load_adapter(model, variant.adapter)
    return model.eval()


def saved_dtype(checkpoint: Path) -> str | None:
    """The dtype that a checkpoint of bitsandbytes has to be loaded in, None for any other.

    transformers leaves the norms of such a checkpoint in their own dtype whatever it is asked for, and torch's layer
    norm takes no other.
    """
    config = read_json(checkpoint / "config.json")
    is_rounded = config.get("quantization_config", {}).get("quant_method") == "bitsandbytes"
    return config.get("dtype") if is_rounded else None


def size_mb(variant: Variant) -> float:
    """Megabytes (10^6 bytes) of weight files that must be kept to run the model, an adapter's base included."""
    folders = [variant.checkpoint, *([variant.adapter] if variant.adapter else [])]
    return sum(path.stat().st_size for folder in folders for path in folder.glob("*.safetensors")) / 1e6
