"""Checks of values against the base model: names of modules and templates, lengths."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import sft.chat
from sft.models.checkpoint import empty_model
from sft.suggest import did_you_mean
from stages.checkout.paths import Paths
from stages.params.schema import Params, TrainSection
from stages.preflight.checkpoint import Outline
from stages.preflight.findings import Problem


def check_model_values(params: Params, paths: Paths, outline: Outline | None) -> Iterator[Problem]:
    """Yield what does not fit the base model.

    Args:
        params: Values of params.yaml.
        paths: Paths of the checkout.
        outline: The base model; None if it is not on this machine.
    """
    yield from _check_template(params.format.chat_template, paths)
    if outline is None:
        return
    yield from _check_length(params.pack.max_length, outline)
    if params.train.method != "full":
        yield from _check_targets(params.train, outline)


def _check_template(name: str | None, paths: Paths) -> Iterator[Problem]:
    """Check that a chat template is the name of one that is shipped, or a file in data/."""
    known = sorted(file.stem for file in (Path(sft.chat.__path__[0]) / "templates").glob("*.jinja"))
    if name is None or name in known:
        return
    key, path = "format.chat_template", (paths.root / name).resolve()
    if not path.is_file():
        files = [file.relative_to(paths.root).as_posix() for file in paths.data.rglob("*.jinja")]
        hint = did_you_mean(name, [*known, *files], before="; ")
        yield Problem(
            key,
            f"{name!r} is neither a chat format ({', '.join(known)}) nor an existing Jinja file in data/{hint}",
            is_error=True,
        )
    elif not path.is_relative_to(paths.data.resolve()):
        yield Problem(key, f"move {name!r} into data/, where DVC sees changes of it", is_error=True)


def _check_length(max_length: int, outline: Outline) -> Iterator[Problem]:
    """Check that rows are not longer than the positions of the model."""
    limit = outline.config.get("max_position_embeddings")
    if isinstance(limit, int) and 0 < limit < max_length:
        yield Problem(
            "pack.max_length",
            f"{max_length} is more than the {limit} positions that the base model was made for "
            "(max_position_embeddings); later positions are wrong or an error",
        )


def _check_targets(section: TrainSection, outline: Outline) -> Iterator[Problem]:
    """Check that modules and parameters named for LoRA exist in the base model.

    The names of the weights in the files settle it for most models. Where some name is not among them, the model is
    built from its config on the meta device, which takes seconds.
    """
    modules = section.lora_target_modules
    names = [] if isinstance(modules, str) else modules
    parameters = section.lora_target_parameters or []
    weights = list(outline.shapes)
    in_files = all(any(f".{weight}".endswith(f".{name}.weight") for weight in weights) for name in names)
    if (in_files and not parameters) or names == ["all-linear"]:
        return
    try:
        model = empty_model(outline.folder)
    except Exception:  # code of the model's own, or an unknown class: `load` and `train` say more
        return
    from peft import LoraConfig

    from sft.models.adapters import check_module_names

    for key, config in (
        ("train.lora_target_modules", LoraConfig(target_modules=names)),
        ("train.lora_target_parameters", LoraConfig(target_modules=[], target_parameters=parameters)),
    ):
        try:
            check_module_names(model, config)
        except ValueError as error:
            yield Problem(key, str(error), is_error=True)
