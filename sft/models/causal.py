"""Whether a model is a causal language model, by its class or else by what it computes.

Supervised fine-tuning trains each token on the tokens before it. A model that reads the tokens after it copies them
and learns nothing, and a model with another head (or none) has no logits over the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

from sft.attention.isolation import rounding_tolerances
from sft.inner_model import causal_lm, evaluating
from sft.models.checkpoint import ADVICE, HEADLESS, MASKED, auto_classes, described, generates_text, task_of

MAYBE_BIDIRECTIONAL = ("bert-generation", "xlnet")
"""Types, besides those with a masked language model, whose causal class attends in both directions by some options."""

NUM_PROBE_TOKENS = 8


def check_causal(model: Any) -> None:
    """Check that a model is a causal language model.

    1. Its class and its config must not be those of another task.
    2. If they leave it open (code that is not transformers' own, families that may attend in both directions), run the
       model on a few tokens: it must return logits over the vocabulary, in which no token sees the tokens after it.

    Args:
        model: Model, wrapped or not.

    Raises:
        ValueError: It is something else; the message says what.
    """
    base = causal_lm(model)
    name = type(base).__name__
    if not hasattr(base, "config"):
        inner = f"; give {name}.pretrained_model" if hasattr(base, "pretrained_model") else ""
        raise ValueError(f"{name} is not a model of transformers: it has no config, and {ADVICE}{inner}")
    class_names = [kind.__name__ for kind in type(base).__mro__]
    is_causal_class = any(found in auto_classes()["CAUSAL_LM"].values() for found in class_names)
    if not is_causal_class and _is_encoder_decoder(base.config):
        raise ValueError(f"{name} is an encoder with a decoder, and {ADVICE}")
    task = task_of(class_names)
    if task == HEADLESS:
        raise ValueError(f"{name} has no language model head, and {ADVICE}")
    if task is not None:
        raise ValueError(f"{name} is a model for {described(task)}, and {ADVICE}")
    if _may_be_other(base, class_names):
        probe_causality(base)


@torch.no_grad()
def probe_causality(base: Any) -> float | None:
    """Run a model on two rows that differ in their last token, and compare the logits of the tokens before it.

    Args:
        base: Model of transformers, without wrappers.

    Returns:
        The largest difference, relative to the largest logit; None if the model can't be run (its weights are
        elsewhere, or it takes more than token ids).

    Raises:
        ValueError: It returns no logits over the vocabulary, or earlier tokens see later ones.
    """
    name = type(base).__name__
    embeddings = _input_embeddings(base)
    weight = getattr(embeddings, "weight", None)
    if weight is None:
        raise ValueError(f"{name} has no token embeddings (get_input_embeddings), and {ADVICE}")
    if weight.is_meta or hasattr(weight, "ds_id") or not weight.numel():
        return None
    num_tokens = weight.shape[0]
    rows = torch.arange(2 * NUM_PROBE_TOKENS).reshape(2, -1)[:1].repeat(2, 1) * 7 % num_tokens
    rows[1, -1] = (rows[1, -1] + num_tokens // 2) % num_tokens
    try:
        with evaluating(base):
            outputs = [base(input_ids=row[None].to(weight.device)) for row in rows]
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, KeyError, IndexError):
        return None
    first, second = (getattr(output, "logits", None) for output in outputs)
    if not isinstance(first, torch.Tensor) or not isinstance(second, torch.Tensor):
        raise ValueError(f"{name} returns no logits, and {ADVICE}")
    if first.ndim != 3 or first.shape[1] != NUM_PROBE_TOKENS or first.shape[2] < num_tokens / 2:
        raise ValueError(
            f"{name} returns logits {tuple(first.shape)} for a row of {NUM_PROBE_TOKENS} tokens and a vocabulary of "
            f"{num_tokens}, and {ADVICE}"
        )
    scale = first.float().abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    effect = ((first - second)[0, :-1].float().abs().max() / scale).item()
    tolerance = rounding_tolerances(base)[0] if hasattr(base, "device") else 1e-5
    if effect > tolerance:
        way_out = "; set config.is_decoder=True" if getattr(base.config, "is_decoder", None) is False else ""
        raise ValueError(
            f"{name} attends in both directions: another last token changed the logits of the tokens before it by "
            f"{effect:.1e} of the largest one, and {ADVICE}{way_out}"
        )
    return effect


def _may_be_other(base: Any, class_names: list[str]) -> bool:
    """Return whether class and config leave open what a model is."""
    if not generates_text(class_names[:1]):
        return True
    config = base.config
    if getattr(config, "model_type", None) in {*auto_classes()[MASKED], *MAYBE_BIDIRECTIONAL}:
        return True
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return bool(getattr(text_config, "use_bidirectional_attention", False)) or (
        getattr(text_config, "is_causal", True) is False
    )


def _input_embeddings(base: Any) -> Any:
    try:
        return base.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def _is_encoder_decoder(config: Any) -> bool:
    text_config = getattr(config, "text_config", None)
    return any(bool(getattr(part, "is_encoder_decoder", False)) for part in (config, text_config))
