"""Advice on the recipe of a training: rate, adapted layers and rows per update, compared with known good ones.

The figures follow "LoRA Without Regret" (Schulman et al., Thinking Machines Lab, 2025): the best rate of LoRA is about
ten times that of full training and falls with the width of the model; LoRA belongs on all layers, those of the MLP
above all; and it loses more than full training does when an update has many rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from stages.params.schema import TrainSection
from stages.preflight.findings import Problem

FULL_RATE, LORA_FACTOR = 5e-5, 10.0
"""Rate of full training at `WIDTH`, and how many times that rate LoRA takes."""

WIDTH, WIDTH_POWER = 2000, 0.781
"""The rate grows with (`WIDTH` / hidden size) to this power, fitted on Llama models."""

LEAST_WIDTH = 256
"""Width below which the fit says nothing."""

TOLERANCE = 4.0
"""Factor around the known good rate within which nothing is said."""

MOST_ROWS = 128
"""Rows per update above which LoRA falls behind full training."""

ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "out_proj", "c_attn", "query_key_value"})


def check_recipe(section: TrainSection, config: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield what is far from known good recipes; never an error.

    Args:
        section: Section `train` of params.yaml.
        config: Configuration of the base model.
    """
    if section.adapter is not None:
        return
    uses_lora = section.method != "full"
    width = config.get("hidden_size")
    if section.optim.startswith("adamw") and isinstance(width, int) and width >= LEAST_WIDTH:
        good = known_good_rate(width, uses_lora=uses_lora)
        if not good / TOLERANCE <= section.learning_rate <= good * TOLERANCE:
            side = "above" if section.learning_rate > good else "below"
            how = "LoRA, ten times that of full training" if uses_lora else "full training, a tenth of that of LoRA"
            yield Problem(
                "train.learning_rate",
                f"{section.learning_rate:g} is far {side} {good:.1g}, a good rate of {how} for a model of width "
                f'{width} ("LoRA Without Regret", 2025); a sweep finds the best one',
            )
    if not uses_lora:
        return
    modules = section.lora_target_modules
    if not isinstance(modules, str) and modules and {name.rpartition(".")[2] for name in modules} <= ATTENTION:
        yield Problem(
            "train.lora_target_modules",
            'matrices in attention alone learn less than as many in all layers ("LoRA Without Regret", 2025); state '
            "all-linear",
        )
    rows = section.per_device_train_batch_size * section.gradient_accumulation_steps * section.launch.processes
    if rows > MOST_ROWS:
        yield Problem(
            "train.per_device_train_batch_size",
            f"{rows} rows per update (with accumulation and processes) are more than LoRA learns well from: it falls "
            f'behind full training above some {MOST_ROWS} ("LoRA Without Regret", 2025)',
        )


def known_good_rate(width: int, *, uses_lora: bool) -> float:
    """Return a learning rate of AdamW that is good for models of a width."""
    return FULL_RATE * (LORA_FACTOR if uses_lora else 1.0) * (WIDTH / width) ** WIDTH_POWER
