"""Heads of models by their classes' names: which classes of transformers are causal language models.

Imports no torch at module level: `stages check` reads a config by it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

GENERATES = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ")
"""Tasks of transformers' auto classes whose models generate text; encoders with decoders are known by their config."""

HEADLESS, MASKED = "HEADLESS", "MASKED_LM"

TASK_NAMES = {MASKED: "masked language modelling", "CTC": "speech recognition"}
"""Tasks whose names in transformers are no words."""

ADVICE = (
    "supervised fine-tuning needs a causal language model, which predicts each token from those before it: load one "
    "with AutoModelForCausalLM"
)


def check_architecture(place: str, config: Any, **overrides: Any) -> None:
    """Check by a config, before weights are read, that a causal language model can be loaded.

    Args:
        place: Folder or hub id, for the message.
        config: Config object, or the content of config.json.
        overrides: Values that replace those of the config.

    Raises:
        ValueError: The config names a class with another head, an encoder with a decoder, or a type that has no causal
            language model.
    """
    read = _reader(config, overrides)
    architectures, model_type = list(read("architectures") or ()), read("model_type")
    if any(name in auto_classes()["CAUSAL_LM"].values() for name in architectures):
        return
    named = f"{place} holds {architectures[0]}" if architectures else f"{place} holds a model of type {model_type!r}"
    if read("is_encoder_decoder"):
        raise ValueError(f"{named}, an encoder with a decoder, and {ADVICE}")
    task = task_of(architectures)
    if task not in (None, HEADLESS) and not (task == MASKED and read("is_decoder")):
        raise ValueError(f"{named}, a model for {described(str(task))}, and {ADVICE}")
    trainable = {*auto_classes()["CAUSAL_LM"], *auto_classes()["IMAGE_TEXT_TO_TEXT"]}
    is_own_code = "AutoModelForCausalLM" in (read("auto_map") or {})
    if model_type in auto_classes()[HEADLESS] and model_type not in trainable and not is_own_code:
        raise ValueError(f"{named}, of which transformers has no causal language model, and {ADVICE}")


def generates_text(class_names: Iterable[str]) -> bool:
    """Return whether one of the classes generates text: a language model, alone or with images, speech or an encoder."""
    known = {name for task in GENERATES for name in auto_classes()[task].values()}
    return not known.isdisjoint(class_names)


def task_of(class_names: Iterable[str]) -> str | None:
    """Return the task of the first known class of a list: `HEADLESS` without a head, None if it generates text."""
    for name in class_names:
        if generates_text([name]):
            return None
        found = next((task for task, names in auto_classes().items() if name in names.values()), None)
        if found is not None:
            return found
    return None


def described(task: str) -> str:
    """Return a task's name in words, for messages."""
    return TASK_NAMES.get(task, task.lower().replace("_", " "))


@functools.cache
def auto_classes() -> dict[str, dict[str, str]]:
    """Return the classes that transformers' auto classes load: task -> type -> name."""
    from transformers.models.auto import modeling_auto

    begin, end = "MODEL_FOR_", "_MAPPING_NAMES"
    tasks = {
        name.removeprefix(begin).removesuffix(end): names
        for name, names in vars(modeling_auto).items()
        if name.startswith(begin) and name.endswith(end)
    }
    tasks.pop("PRETRAINING", None)  # has models of all tasks
    return {task: _one_by_one(names) for task, names in {**tasks, HEADLESS: modeling_auto.MODEL_MAPPING_NAMES}.items()}


def _one_by_one(names: Mapping[str, Any]) -> dict[str, str]:
    """Return one entry per class; some types have several."""
    classes = ((kind, [found] if isinstance(found, str) else found) for kind, found in names.items())
    return {f"{kind}:{place}" if place else kind: name for kind, found in classes for place, name in enumerate(found)}


def _reader(config: Any, overrides: Mapping[str, Any]) -> Any:
    def read(name: str) -> Any:
        if name in overrides:
            return overrides[name]
        if isinstance(config, Mapping):
            return config.get(name)
        return getattr(config, name, None)

    return read
