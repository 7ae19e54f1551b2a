"""A model whose weights stay in their files: each module's are there only while it computes.

Memory is then bounded by the largest module instead of the model. safetensors maps files into memory, so that weights
of the wanted dtype are not even copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from sft.models.checkpoint import auto_class, weight_files
from sft.models.saved_adapters import load_adapter, outgrown


class NotStreamableError(Exception):
    """A model or an adapter that has to be loaded whole; says why."""


class WeightFiles:
    """The tensors of a checkpoint folder by name, in float32, read when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self.place: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        for file in weight_files(folder):
            self._open[file] = safe_open(file, framework="pt").__enter__()
            self.place |= dict.fromkeys(self._open[file].keys(), file)

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor; of a float32 file it may be the file itself, mapped into memory, and is not to be written to."""
        tensor: torch.Tensor = self._open[self.place[name]].get_tensor(name)
        return tensor.float()


@dataclass(frozen=True)
class Unit:
    """A module that is loaded as one.

    Args:
        path: Its name in the plain model.
        module: What is called: the module, or the adapter's layer around it.
        inner: What holds the base model's weights.
        tensors: Name of a parameter in `inner` -> name of its tensor in the files.
        stand_ins: Name of a parameter in `inner` -> what is there while the weight is not. Made once: a new one at
            every release would take a bite out of the memory that the weight left, and the next weight then has no
            room there.
    """

    path: str
    module: nn.Module
    inner: nn.Module
    tensors: dict[str, str]
    stand_ins: dict[str, nn.Parameter]

    @property
    def is_adapted(self) -> bool:
        """Whether an adapter changes it."""
        return isinstance(self.module, (BaseTunerLayer, AuxiliaryTrainingWrapper))


class Streamed:
    """A model without weights, with or without an adapter, and the files that they come from.

    Args:
        folder: Plain checkpoint.
        adapter: Folder of a LoRA adapter for it.
        tokenizer: For which the embeddings may have grown when the adapter was trained.

    Raises:
        NotStreamableError: The model has to be loaded whole.
        ValueError: The adapter belongs to another base.
    """

    def __init__(
        self, folder: Path, adapter: Path | None = None, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        self.files = WeightFiles(folder)
        self.plain = empty_model(folder)
        self.aliases = _aliases(self.plain, self.files)
        self.model: PreTrainedModel | PeftModel = self.plain
        if adapter is not None:
            if outgrown(self.plain, adapter, tokenizer):
                raise NotStreamableError("its embeddings have to grow")
            self.model = load_adapter(self.plain, adapter, low_cpu_mem_usage=True)
        self.units = list(_units(self.plain, self.aliases))
        for unit in self.units:
            loader = _Loader(self, unit)
            unit.module.register_forward_pre_hook(loader.before)
            unit.module.register_forward_hook(loader.after, always_call=True)

    def load(self, unit: Unit) -> None:
        """Give a unit its weights."""
        for name, tensor in unit.tensors.items():
            _set(unit.inner, name, nn.Parameter(self.files.tensor(tensor), requires_grad=False))

    def release(self, unit: Unit) -> None:
        """Take them away."""
        for name, stand_in in unit.stand_ins.items():
            _set(unit.inner, name, stand_in)


class _Loader:
    """Hooks of one unit."""

    def __init__(self, streamed: Streamed, unit: Unit) -> None:
        self._streamed, self._unit = streamed, unit

    def before(self, module: nn.Module, inputs: Any) -> None:
        """Load ahead of the computation."""
        self._streamed.load(self._unit)

    def after(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Release behind it."""
        self._streamed.release(self._unit)


def empty_model(folder: Path) -> PreTrainedModel:
    """The model of a folder in eval mode, with stand-ins for its weights; ties are as they should be."""
    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "auto_map"):
        raise NotStreamableError("it comes with Python code of its own")
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = auto_class(config).from_config(config, dtype=torch.float32)
    model.tie_weights()  # what was put on `meta` one by one is tied no more
    stand_ins: dict[int, torch.Tensor] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        owner, _, leaf = name.rpartition(".")
        stand_in = stand_ins.setdefault(id(parameter), nn.Parameter(_stand_in(parameter), requires_grad=False))
        setattr(model.get_submodule(owner), leaf, stand_in)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def _stand_in(like: torch.Tensor) -> torch.Tensor:
    """A weight of the same shape that takes four bytes; NaN, so that nothing computes with it unnoticed.

    peft would move an adapter to where its layer is, and so lose it on the device `meta`.
    """
    return torch.full((1,), torch.nan).expand(like.shape)


def _aliases(model: PreTrainedModel, files: WeightFiles) -> dict[str, str]:
    """Name of every parameter -> name of its tensor in the files, which tied parameters share.

    Raises:
        NotStreamableError: The files call weights otherwise than the model does, hold more, or lack some.
    """
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    aliases: dict[str, str] = {}
    for names in groups.values():
        found = [name for name in names if name in files.place]
        if not found:
            raise NotStreamableError(f"its files hold no {names[0]}")
        aliases |= dict.fromkeys(names, found[0])
    unknown = files.place.keys() - aliases.keys()
    if unknown:
        raise NotStreamableError(f"its files hold {sorted(unknown)[0]}, which the model calls otherwise or computes")
    return aliases


def _units(model: PreTrainedModel, aliases: dict[str, str]) -> Iterator[Unit]:
    """All modules that hold weights of the base, an adapter's layer together with what it wraps."""
    wrapped: list[str] = []
    for path, module in model.named_modules():
        if path.startswith(tuple(f"{name}." for name in wrapped)):
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            wrapped.append(path)
            inner = _inner(path, module)
            names = [name for name, _ in inner.named_parameters()]
        else:
            inner, names = module, [name for name, value in module._parameters.items() if value is not None]
        if names:
            tensors = {name: aliases[f"{path}.{name}"] for name in names}
            yield Unit(path, module, inner, tensors, {name: inner.get_parameter(name) for name in names})


def _inner(path: str, module: nn.Module) -> nn.Module:
    inner: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
    if any(isinstance(part, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for part in inner.modules()):
        raise NotStreamableError(f"its adapter changes {path} in two ways")
    return inner


def _set(module: nn.Module, name: str, value: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, value)
