"""Merge an adapter into its base file by file: no more of the model is in memory than one of its files holds.

The merging of each layer is peft's own, called on a layer that has just been read. The proof needs no more memory:
base + adapter, and what was written, compute with weights that are read module by module.

A model whose weights stay in their files: each module's are there only while it computes.

Memory is then bounded by the largest module instead of the model. safetensors maps files into memory, so that weights
of the wanted dtype are not even copied.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from sft.export.merge_in_memory import TIE_TOLERANCE
from sft.export.proof import LogitDifference, compare_logits, iterate_logits
from sft.models.checkpoint import auto_class, weight_files
from sft.models.saved_adapters import count_adapted_modules, load_adapter, outgrown
from sft.models.token_rows import embedding_name, head_name

logger = logging.getLogger(__name__)


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


SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

Rows = Sequence[Sequence[int]]


@dataclass
class ShardMerge:
    """A merge that goes through the files of the base.

    Args:
        base: Folder of the plain base.
        adapter: Folder of its adapter; None = the base is written as it is.
        dtype: Of the checkpoint.
        tokenizer: That the adapter was trained with.

    Raises:
        NotStreamableError: It can't be done so; the message says why.
    """

    base: Path
    adapter: Path | None
    dtype: torch.dtype
    tokenizer: PreTrainedTokenizerBase | None = None
    tied: bool = field(init=False)
    streamed: Streamed = field(init=False)

    def __post_init__(self) -> None:
        if not self.base.is_dir():
            raise NotStreamableError("it is no folder")
        if self.adapter is not None:
            _check_kind(self.adapter)
        self.streamed = Streamed(self.base, self.adapter, self.tokenizer)
        self.tied = bool(self.plain.config.get_text_config().tie_word_embeddings)

    @property
    def plain(self) -> PreTrainedModel:
        """The base without weights: its config and generation config are what will be written."""
        return self.streamed.plain

    @property
    def num_adapted(self) -> int:
        """Modules that the adapter changes."""
        return count_adapted_modules(self.streamed.model) if isinstance(self.streamed.model, PeftModel) else 0

    def effect(self, rows: Rows) -> float:
        """Largest change of a logit that the adapter makes on the first row.

        Raises:
            NotStreamableError: The model reads weights outside of the modules that hold them.
        """
        model = self.streamed.model
        first = list(iterate_logits(model, rows[:1]))
        if not first[0].isfinite().all():
            raise NotStreamableError("it reads weights outside of the modules that hold them, or gives NaN")
        if not isinstance(model, PeftModel):
            return 0.0
        with model.disable_adapter():
            return compare_logits(first, iterate_logits(model, rows[:1])).largest

    def write(self, folder: Path) -> None:
        """Write weights, their index and the config.

        Raises:
            ValueError: A merged weight is not finite.
        """
        # merging leaves traces in the adapter's layers, and the proof needs those untouched
        source = Streamed(self.base, self.adapter)
        files = sorted({file.name for file in source.files.place.values()})
        names = {name: SINGLE if len(files) == 1 else name for name in files}
        ends = _Ends(source, self.tied)
        place: dict[str, str] = {}
        total = 0
        shelf = _Shelf(max(_num_weights(source, file) for file in files), self.dtype)
        for file in files:
            for unit in _units_of(source, file):
                for name, value in ends.merged(unit):
                    shelf.put(name, value)
            save_file(shelf.tensors, folder / names[file], metadata={"format": "pt"})
            place |= dict.fromkeys(shelf.tensors, names[file])
            total += sum(tensor.nbytes for tensor in shelf.tensors.values())
            shelf.clear()
        if len(files) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(place.items()))}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        self.tied = ends.are_tied
        self._write_configs(folder)

    def _write_configs(self, folder: Path) -> None:
        config = self.plain.config
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = self.tied
            part.dtype = self.dtype
        config.architectures = [type(self.plain).__name__]
        config.save_pretrained(folder)
        if self.plain.generation_config is not None:
            self.plain.generation_config.save_pretrained(folder)

    def compare(self, folder: Path, rows: Rows) -> LogitDifference:
        """How far the checkpoint in a folder is from base + adapter."""
        written = Streamed(folder)
        return compare_logits(iterate_logits(self.streamed.model, rows), iterate_logits(written.model, rows))


def _units_of(source: Streamed, file: str) -> list[Unit]:
    """The units whose weights stand in a file."""
    return [unit for unit in source.units if source.files.place[next(iter(unit.tensors.values()))].name == file]


def _num_weights(source: Streamed, file: str) -> int:
    """How many weights a merged file can hold at most: a head that is the embeddings may come out as one of its own."""
    units = _units_of(source, file)
    return sum(unit.inner.get_parameter(name).numel() for unit in units for name in unit.tensors)


class _Shelf:
    """One block of memory for the tensors of a file, used again for the next one.

    As single tensors among the many short-lived ones of a merge they would tear the heap into pieces that the system
    does not get back: by the end as much as the whole model.
    """

    def __init__(self, num_weights: int, dtype: torch.dtype) -> None:
        self._block = torch.empty(num_weights, dtype=dtype)
        self.tensors: dict[str, torch.Tensor] = {}
        self._used = 0

    def put(self, name: str, value: torch.Tensor) -> None:
        place = self._block[self._used : self._used + value.numel()].view(value.shape)
        self.tensors[name] = place.copy_(value)
        self._used += value.numel()

    def clear(self) -> None:
        self.tensors, self._used = {}, 0


class _Ends:
    """Embeddings and head, which may share a weight in the base and come out apart or equal."""

    def __init__(self, source: Streamed, tied: bool) -> None:
        plain = source.plain
        self._source = source
        self._embedding, self._head = embedding_name(plain), head_name(plain)
        self.are_tied = tied
        adapted = {unit.path for unit in source.units if unit.is_adapted}
        self._alike = tied and not adapted & {self._embedding, self._head}

    def merged(self, unit: Unit) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights of one unit by the names that they get; none for a head that is the embeddings."""
        if unit.path == self._head and self.are_tied and (self._alike or self._came_out_equal(unit)):
            return
        yield from merged_weights(self._source, unit)

    def _came_out_equal(self, head: Unit) -> bool:
        (embedding,) = (unit for unit in self._source.units if unit.path == self._embedding)
        rows = dict(merged_weights(self._source, embedding))[f"{self._embedding}.weight"]
        others = dict(merged_weights(self._source, head))[f"{self._head}.weight"]
        self.are_tied = float((rows - others).abs().max()) <= TIE_TOLERANCE * float(rows.abs().max())
        if not self.are_tied:
            logger.info("head and embeddings were trained apart: the checkpoint holds both")
        return self.are_tied


def merged_weights(source: Streamed, unit: Unit) -> list[tuple[str, torch.Tensor]]:
    """The weights of a unit with the adapter in them, in float32."""
    source.load(unit)
    module = unit.module
    for layer in module.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.merged_adapters.clear()  # embeddings are merged twice where they are compared with the head
    plain = unit.inner
    if isinstance(module, AuxiliaryTrainingWrapper):
        plain = module.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
    elif isinstance(module, BaseTunerLayer):
        module.merge(safe_merge=True)
    names = unit.tensors if plain is unit.inner else dict(plain.named_parameters())
    weights = [(f"{unit.path}.{name}", plain.get_parameter(name).detach()) for name in names]
    source.release(unit)
    return weights


def _check_kind(adapter: Path) -> None:
    config = PeftConfig.from_pretrained(adapter)
    if not isinstance(config, LoraConfig):
        raise NotStreamableError(f"a {config.peft_type.value} adapter is merged by peft with the model in memory")
    if config.target_parameters:
        raise NotStreamableError("the adapter changes parameters rather than layers")
