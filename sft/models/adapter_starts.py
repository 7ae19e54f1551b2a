"""Starts of LoRA adapters: which of them change the base weights, and whether a saved adapter can be loaded again.

A start such as PiSSA splits each weight into the first values of the adapter and a rest, and puts the rest in place of
the weight. The saved adapter contains only its trained values, so whoever loads it must compute the same rest again
from the base. This works if the start needs nothing but the weight and takes no random numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora.eva import initialize_lora_eva_weights

from sft.options import UNREPEATABLE_STARTS

logger = logging.getLogger(__name__)

REPRODUCIBLE = ("pissa", "olora", "loftq", "kasa_config")
"""Starts that change the base, and that peft repeats exactly when it loads the adapter."""

LEAVE_THE_BASE = ("True", "False", "gaussian", "eva", "orthogonal", "mica")
"""Starts that do not change the base."""

BY_ACTIVATIONS = "eva"
"""Start that needs the activations of some batches and leaves the base as it is (EVA, arXiv:2410.07170)."""

MAX_PASSES = 1000
"""Forward passes within which the directions of the activations must have been found."""

WAY_OUT = (
    "Use init_lora_weights='pissa' or 'olora', which are repeated exactly, or True. A PeftModel of your own may have "
    "this start, if it is saved with save_pretrained(..., path_initial_model_for_weight_conversion=...)."
)


def start_of(config: PeftConfig | None) -> str:
    """Return the name of a LoRA adapter's start, as in `init_lora_weights`; `True` for other types of adapters."""
    if not isinstance(config, LoraConfig):
        return "True"
    if getattr(config, "kasa_config", None) is not None:
        return "kasa_config"
    return str(config.init_lora_weights)


def start_by_activations(
    model: PeftModel, batches: Sequence[dict[str, Any]], forward: Callable[[Any, dict[str, Any]], Any]
) -> None:
    """Set the first LoRA matrices to the main directions of the layers' inputs, and divide the ranks among layers.

    Args:
        model: Its adapter has `init_lora_weights="eva"`.
        batches: Batches of a collator, with `labels`; trained tokens count. They are passed again until the directions
            are found.
        forward: Runs the model on a batch.

    Raises:
        ValueError: The batches are too short, or their directions do not settle.
    """
    passes = 0

    def counted(each: Any, inputs: dict[str, Any]) -> Any:
        nonlocal passes
        passes += 1
        if passes > MAX_PASSES:
            raise ValueError(
                f"init_lora_weights='eva': the activations of {len(batches)} batches have no settled directions after "
                f"{MAX_PASSES} passes; use a smaller rank, or larger batches"
            )
        with torch.no_grad():
            return forward(each, inputs)

    config = model.active_peft_config
    largest = max([config.r, *config.rank_pattern.values()])
    wanted = round(largest * config.eva_config.rho)
    longest = max(int((batch["labels"] != config.eva_config.label_mask_value).sum()) for batch in batches)
    if longest < wanted:
        raise ValueError(
            f"init_lora_weights='eva' with rank {largest} looks for {wanted} directions, and the largest batch has "
            f"{longest} trained tokens; use a smaller rank, or larger batches"
        )
    initialize_lora_eva_weights(model, list(batches), forward_fn=counted, show_progress_bar=False)


def changes_base(config: PeftConfig) -> bool:
    """Return whether an adapter's start changes the weights of its base, or is not known to leave them."""
    return start_of(config) not in LEAVE_THE_BASE


def why_not_reloadable(config: PeftConfig) -> str | None:
    """Return why a saved adapter with this start computes something else when it is loaded; None if it does not."""
    start = start_of(config)
    return next((reason for name, reason in UNREPEATABLE_STARTS.items() if start.lower().startswith(name)), None)


def check_reloadable(config: PeftConfig) -> None:
    """Check, before training, that the adapter will compute the same after it was saved and loaded.

    Raises:
        ValueError: Its start changes the base in a way that cannot be repeated.
    """
    reason = why_not_reloadable(config)
    if reason is not None:
        raise ValueError(
            f"init_lora_weights={start_of(config)!r} changes the weights of the base, and a saved adapter could be "
            f"neither loaded nor merged as it was trained: {reason}. {WAY_OUT}"
        )


def warn_if_not_reloadable(config: PeftConfig) -> None:
    """Warn that an adapter that is in its model already must be converted when it is saved."""
    reason = why_not_reloadable(config)
    if reason is not None:
        logger.warning(
            "The adapter was made with init_lora_weights=%r, which changed the weights of the base, and what "
            "`save_model` and checkpoints write computes something else when it is loaded: %s. Save it with "
            "model.save_pretrained(..., path_initial_model_for_weight_conversion=...).",
            start_of(config),
            reason,
        )


class BaseFingerprint:
    """First row of each weight of a model, from which a change of the base by an adapter's start is detected.

    Args:
        model: The base, before the adapter is put on it.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._modules = [(module, dict(_first_rows(module))) for module in model.modules()]

    def changed(self) -> bool:
        """Return whether any weight has changed."""
        return any(
            not torch.equal(before, now)
            for module, rows in self._modules
            for name, now in _first_rows(module)
            if (before := rows.get(name)) is not None
        )


def check_start(config: PeftConfig, fingerprint: BaseFingerprint) -> None:
    """Check that a start that has changed the base is one that can be repeated.

    Raises:
        ValueError: The adapter has changed the base, and its start is not known to be repeated by peft.
    """
    if start_of(config) not in (*LEAVE_THE_BASE, *REPRODUCIBLE) and fingerprint.changed():
        raise ValueError(
            f"Putting on the adapter with init_lora_weights={start_of(config)!r} changed the weights of the base, and "
            f"this start is not known to change them equally when the saved adapter is loaded. {WAY_OUT}"
        )


def _first_rows(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in module._parameters.items():
        if value is not None and value.ndim >= 2 and value.numel() and value.device.type != "meta":
            yield name, value.detach()[(0,) * (value.ndim - 1)].cpu().clone()
