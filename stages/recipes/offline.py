"""Memory and speed of a training by the shape of its model, without weights, data or a GPU.

Formulas: weights, gradients and the state of the optimizer by the bytes of each parameter; activations by the sizes
that a decoder layer keeps (arXiv:2205.05198, section 4, without the attention matrix, which no kernel here stores), or
one hidden state per layer with gradient checkpointing; 6 FLOPs per active weight and token, 2 of them for the gradients
of weights, which frozen weights do not have, and 2 more where activations are computed again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from sft.optimizers.names import updates_in_backward
from sft.suggest import did_you_mean

SHAPES = Path(__file__).with_name("shapes.yaml")

GPUS = {"l4": (121e12, 24), "rtx4090": (165e12, 24), "a100": (312e12, 80), "h100": (989e12, 80), "h200": (989e12, 141)}
"""GPU -> dense bfloat16 FLOPs per second, and GB of memory, as the vendor states them."""

UTILISATION = 0.35
"""Share of the stated FLOPs that a training reaches; `sft estimate` measures it."""

CONTEXT_GB = 1.5
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
NF4_BYTES = 0.53
"""Bytes per weight of nf4 with double quantization: 4 bits, and 0.127 for constants (arXiv:2305.14314)."""
STATE_BYTES = {
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit", "adamw_torch_8bit", "ademamix_8bit"), 2),
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit", "muon", "rmsprop", "adagrad"), 4),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit", "adamw_torch_4bit"), 1),
    **dict.fromkeys(("sgd", "adafactor", "lomo", "adalomo"), 0),
}
"""Optimizer -> bytes of its state per trained parameter, where they are not AdamW's."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder.

    Args:
        total: Parameters.
        active: Parameters that a token passes.
        layers: Layers.
        hidden: Width of the hidden state.
        intermediate: Width of the feed-forward layer that a token passes.
        vocabulary: Rows of the embeddings.
    """

    total: float
    active: float
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int


@dataclass(frozen=True)
class Estimate:
    """What a training needs.

    Args:
        memory: GB at the peak by what they are for, on one GPU without sharding.
        trained: Parameters that are trained.
        tokens_per_step: Tokens of an update at most.
        flops_per_token: Floating point operations.
        sharded: Number of processes that share the weights.
    """

    memory: dict[str, float]
    trained: float
    tokens_per_step: int
    flops_per_token: float
    sharded: int

    @property
    def peak(self) -> float:
        """GB at the peak."""
        return sum(self.memory.values())

    def seconds(self, tokens: float, gpu: str, processes: int = 1) -> float:
        """Return the seconds that a number of tokens takes."""
        return tokens * self.flops_per_token / (GPUS[gpu][0] * UTILISATION * processes)


def shape_of(name: str, root: Path = Path()) -> Shape:
    """Return the shape of a model: from its config.json, if it is a folder, else from the table of named models.

    Raises:
        ValueError: It is neither.
    """
    config = root / name / "config.json"
    if config.is_file():
        return shape_of_config(json.loads(config.read_text(encoding="utf-8")))
    known: dict[str, dict[str, Any]] = YAML(typ="safe", pure=True).load(SHAPES.read_text(encoding="utf-8"))
    if name in known:
        return Shape(**known[name])
    hint = did_you_mean(name, known, otherwise="name a local folder with a config.json")
    raise ValueError(f"the shape of {name!r} is not known without its config.json; {hint}")


def shape_of_config(config: Mapping[str, Any]) -> Shape:
    """Return the shape that a config.json describes; of a model with images, that of its language model."""
    text = config.get("text_config") or config.get("llm_config") or config
    hidden, layers = int(text["hidden_size"]), int(text["num_hidden_layers"])
    heads = int(text.get("num_attention_heads", 1))
    head = int(text.get("head_dim") or hidden // heads)
    keys = int(text.get("num_key_value_heads") or heads)
    inner = int(text.get("intermediate_size") or 4 * hidden)
    vocabulary = int(text["vocab_size"])
    attention = hidden * head * (2 * heads + 2 * keys)
    experts = int(text.get("num_experts") or text.get("num_local_experts") or text.get("n_routed_experts") or 0)
    chosen = int(text.get("num_experts_per_tok") or 1)
    width = int(text.get("moe_intermediate_size") or inner)
    dense = 3 * hidden * inner
    total_mlp = experts * 3 * hidden * width if experts else dense
    active_mlp = chosen * 3 * hidden * width if experts else dense
    ends = vocabulary * hidden * (1 if text.get("tie_word_embeddings", config.get("tie_word_embeddings")) else 2)
    return Shape(
        total=layers * (attention + total_mlp) + ends,
        active=layers * (attention + active_mlp) + ends,
        layers=layers,
        hidden=hidden,
        intermediate=chosen * width if experts else inner,
        vocabulary=vocabulary,
    )


def estimate(params: Mapping[str, Any], shape: Shape) -> Estimate:
    """Estimate memory and operations of the training that params.yaml describes.

    Args:
        params: Values of params.yaml.
        shape: The base model.
    """
    model, train, pack = params["model"], params["train"], params["pack"]
    weight, method = BYTES[model["dtype"]], train["method"]
    ends = min(shape.total, 2.0 * shape.vocabulary * shape.hidden)
    trained = shape.total if method == "full" else lora_parameters(shape, train)
    weights = shape.total * weight if method != "qlora" else ends * weight + (shape.total - ends) * NF4_BYTES
    updated = weight if method == "full" else 4
    state = STATE_BYTES.get(train["optim"], 8 if updated == 4 else 4)
    tokens = train["per_device_train_batch_size"] * pack["max_length"]
    half = 2 if train["mixed_precision"] != "no" or weight == 2 else 4
    layer = tokens * (16 * shape.hidden + 4 * shape.intermediate) * half
    hidden = tokens * shape.hidden * half
    kept = hidden * shape.layers + layer if train["gradient_checkpointing"] else layer * shape.layers
    if train["activation_offloading"]:
        kept = layer
    launch = train["launch"]
    sharded = 1 if launch["engine"] in ("ddp", "deepspeed_zero2") else launch["processes"]
    state_sharded = 1 if launch["engine"] == "ddp" else launch["processes"]
    adapter = 0 if method == "full" else trained * 4
    again = 2 if train["gradient_checkpointing"] else 0
    operations = (6 if method == "full" else 4) + again
    return Estimate(
        memory={
            "weights": (weights + adapter) / sharded / 1e9,
            "gradients": 0.0 if updates_in_backward(train["optim"]) else trained * updated / state_sharded / 1e9,
            "optimizer": trained * state / state_sharded / 1e9,
            "activations": kept / 1e9,
            "context": CONTEXT_GB,
        },
        trained=trained,
        tokens_per_step=tokens * train["gradient_accumulation_steps"] * launch["processes"],
        flops_per_token=operations * shape.active,
        sharded=sharded,
    )


def lora_parameters(shape: Shape, train: Mapping[str, Any]) -> float:
    """Return the parameters of LoRA on all linear layers: a rank times the widths of each layer."""
    widths = 2 * shape.hidden * 4 + 3 * (shape.hidden + shape.intermediate)
    return float(train["lora_r"] * widths * shape.layers)


def report(name: str, found: Estimate, gpu: str) -> list[str]:
    """Return an estimate as lines of text."""
    minutes = found.seconds(1e6, gpu) / 60
    limit = GPUS[gpu][1]
    fits = "fits" if found.peak <= limit else "does not fit"
    parts = ", ".join(f"{part} {size:.1f}" for part, size in found.memory.items())
    return [
        f"model       {name}, {found.trained / 1e6:,.1f} M parameters trained",
        f"memory      {found.peak:.1f} GB per GPU: {parts}; {fits} into {limit} GB ({gpu})",
        f"time        {minutes:.1f} min per million tokens on one {gpu}, at {UTILISATION:.0%} of its FLOPs",
        f"step        {found.tokens_per_step:,} tokens at most",
    ]


def gpu_of(text: str) -> str:
    """Return the GPU of a name such as `H100`.

    Raises:
        ValueError: It is not in the table.
    """
    name = re.sub(r"[^a-z0-9]", "", text.lower())
    if name not in GPUS:
        raise ValueError(did_you_mean(text, GPUS, otherwise=f"--gpu {text}: there are {', '.join(GPUS)}"))
    return name
