"""Merge of an adapter into its base one weight file at a time.

At most the weights of one file are in memory. Each layer is merged by peft's own code, right after its weights were
read. The comparison of the written checkpoint with base + adapter is as frugal: both models read the weights of a
module just before it computes and release them afterwards. safetensors maps files into memory, so that weights that
are stored in float32 are not even copied.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from sft.export.merge_in_memory import TIE_TOLERANCE, refusing_unmergeable
from sft.export.proof import LogitDifference, Row, compare_logits, iterate_logits
from sft.models.adapter_starts import changes_base, start_of
from sft.models.checkpoint import empty_model, weight_files
from sft.models.loading import keep_weights
from sft.models.saved_adapters import count_adapted_modules, load_adapter, outgrown
from sft.models.token_rows import declares_tie, embedding_name, head_name

logger = logging.getLogger(__name__)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

STREAMED_OPTIONS = (
    *(option.name for option in fields(PeftConfig)),
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "lora_bias"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "bias"),
    *("modules_to_save", "trainable_token_indices", "ensure_weight_tying"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config"),
    *("megatron_config", "megatron_core", "qalora_group_size"),
    *("target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight"),  # AdaLoRA
    *("total_step",),
)
"""Options of an adapter under which each layer can be merged alone; with any other, the complete model is loaded."""

Rows = Sequence[Row]

Progress = Callable[[int, int, str], None]


class NotStreamableError(Exception):
    """A model or an adapter must be loaded completely; the message gives the reason."""


@dataclass
class ShardMerge:
    """Merge of one base and one adapter, file by file.

    Args:
        base: Folder of the plain base.
        adapter: Folder of its adapter. If None, the base is written unchanged.
        dtype: Data type of the merged checkpoint.
        tokenizer: Tokenizer that the adapter was trained with.

    Raises:
        NotStreamableError: The base or the adapter cannot be merged file by file.
    """

    base: Path
    adapter: Path | None
    dtype: torch.dtype
    tokenizer: PreTrainedTokenizerBase | None = None
    tied: bool = field(init=False)
    streamed: StreamedModel = field(init=False)

    def __post_init__(self) -> None:
        if not self.base.is_dir():
            raise NotStreamableError("it is not a folder")
        if self.adapter is not None:
            _check_kind(self.adapter)
        self.streamed = StreamedModel(self.base, self.adapter, self.tokenizer)
        self.tied = declares_tie(self.plain.config)

    @property
    def plain(self) -> PreTrainedModel:
        """The base without weights; its config and generation config are written to the merged checkpoint."""
        return self.streamed.plain

    @property
    def num_adapted(self) -> int:
        """Number of modules that the adapter changes."""
        return count_adapted_modules(self.streamed.model) if isinstance(self.streamed.model, PeftModel) else 0

    def effect(self, rows: Rows) -> float:
        """Return the largest change of a logit that the adapter causes on the first row.

        Raises:
            NotStreamableError: The model reads weights outside of the modules that contain them.
        """
        first = list(iterate_logits(self.streamed.model, rows[:1]))
        if not first[0].isfinite().all():
            raise NotStreamableError("it reads weights outside of the modules that contain them, or gives NaN")
        if self.adapter is None:
            return 0.0
        # not the same model with its adapter disabled, which would keep biases that the adapter has replaced
        return compare_logits(first, iterate_logits(StreamedModel(self.base).model, rows[:1])).largest

    def write(self, folder: Path, on_progress: Progress | None = None) -> None:
        """Write the merged weights, their index and the configs.

        Args:
            folder: An empty folder.
            on_progress: Called with (modules done, number of modules, what is counted).

        Raises:
            ValueError: A merged weight is not finite.
        """
        # Merging changes the adapter's layers, and `compare` needs those of `self.streamed` as they were loaded.
        source = StreamedModel(self.base, self.adapter)
        files = sorted({file.name for file in source.files.place.values()})
        names = {name: SINGLE if len(files) == 1 else name for name in files}
        merger = _UnitMerger(source, self.tied)
        place: dict[str, str] = {}
        total = 0
        buffer = _TensorBuffer(max(_num_weights(source, file) for file in files), self.dtype)
        done = 0
        for file in files:
            for unit in _units_in_file(source, file):
                for name, value in merger.merged(unit):
                    buffer.add(name, value)
                done += 1
                if on_progress is not None:
                    on_progress(done, len(source.units), "modules merged")
            save_file(buffer.tensors, folder / names[file], metadata={"format": "pt"})
            place |= dict.fromkeys(buffer.tensors, names[file])
            total += sum(tensor.nbytes for tensor in buffer.tensors.values())
            buffer.clear()
        if len(files) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(place.items()))}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        self.tied = merger.are_tied
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

    def compare(self, folder: Path, rows: Rows, on_progress: Progress | None = None) -> LogitDifference:
        """Compare the checkpoint in a folder with base + adapter on the given rows.

        Args:
            folder: The checkpoint.
            rows: Rows of token ids, or the model's inputs.
            on_progress: Called with (rows done, number of rows, what is counted).
        """

        def counted(logits: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
            for done, row in enumerate(logits, start=1):
                yield row
                if on_progress is not None:
                    on_progress(done, len(rows), "documents compared")

        written = StreamedModel(folder)
        return compare_logits(iterate_logits(self.streamed.model, rows), counted(iterate_logits(written.model, rows)))


def _check_kind(adapter: Path) -> None:
    config = PeftConfig.from_pretrained(adapter)
    if not isinstance(config, LoraConfig):
        raise NotStreamableError(
            f"adapters of type {config.peft_type.value} are merged by peft with the model in memory"
        )
    if config.target_parameters:
        raise NotStreamableError("the adapter changes parameters instead of layers")
    if changes_base(config):
        raise NotStreamableError(f"the start of the adapter, {start_of(config)}, changes the weights of the base")
    unknown = [option for option in fields(config) if option.name not in STREAMED_OPTIONS]
    used = [option.name for option in unknown if getattr(config, option.name) not in (option.default, None, [], {})]
    if used:
        raise NotStreamableError(f"the adapter has the option {used[0]}")


def _units_in_file(source: StreamedModel, file: str) -> list[Unit]:
    return [unit for unit in source.units if source.files.place[next(iter(unit.tensors.values()))].name == file]


def _num_weights(source: StreamedModel, file: str) -> int:
    """Return the largest number of weights that a merged file can contain.

    A head that shares its tensor with the embeddings counts as well, since the merge may untie the two.
    """
    units = _units_in_file(source, file)
    return sum(unit.inner.get_parameter(name).numel() for unit in units for name in unit.tensors)


class _TensorBuffer:
    """One block of memory for the tensors of a file, reused for the next file.

    Allocated one by one among the many short-lived tensors of a merge, they would fragment the heap: by the end, the
    process would occupy as much memory as the complete model.
    """

    def __init__(self, num_weights: int, dtype: torch.dtype) -> None:
        self._block = torch.empty(num_weights, dtype=dtype)
        self.tensors: dict[str, torch.Tensor] = {}
        self._used = 0

    def add(self, name: str, value: torch.Tensor) -> None:
        place = self._block[self._used : self._used + value.numel()].view(value.shape)
        self.tensors[name] = place.copy_(value)
        self._used += value.numel()

    def clear(self) -> None:
        self.tensors, self._used = {}, 0


class _UnitMerger:
    """Merges units and decides whether embeddings and head, where the base ties them, are still equal afterwards."""

    def __init__(self, source: StreamedModel, tied: bool) -> None:
        plain = source.plain
        self._source = source
        self._embedding, self._head = embedding_name(plain), head_name(plain)
        self.are_tied = tied
        adapted = {unit.path for unit in source.units if unit.is_adapted}
        self._neither_adapted = not adapted & {self._embedding, self._head}

    def merged(self, unit: Unit) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the name and the merged value of each weight of a unit; nothing for a head that stays tied."""
        if unit.path == self._head and self.are_tied and (self._neither_adapted or self._equals_embeddings(unit)):
            return
        yield from merged_weights(self._source, unit)

    def _equals_embeddings(self, head: Unit) -> bool:
        (embedding,) = (unit for unit in self._source.units if unit.path == self._embedding)
        rows = dict(merged_weights(self._source, embedding))[f"{self._embedding}.weight"]
        others = dict(merged_weights(self._source, head))[f"{self._head}.weight"]
        self.are_tied = float((rows - others).abs().max()) <= TIE_TOLERANCE * float(rows.abs().max())
        if not self.are_tied:
            logger.info("head and embeddings differ after the merge: the checkpoint contains both")
        return self.are_tied


def merged_weights(source: StreamedModel, unit: Unit) -> list[tuple[str, torch.Tensor]]:
    """Return name and value of each weight of a unit with the adapter merged in, in float32."""
    source.load(unit)
    module = unit.module
    for layer in module.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.merged_adapters.clear()  # embeddings are merged twice if they are compared with the head
    carried = {name: unit.inner.get_parameter(name) for name in unit.tensors.keys() - unit.placeholders.keys()}
    for name, value in carried.items():  # peft changes the parameter that it merges into, which may be shared
        _set_parameter(unit.inner, name, nn.Parameter(value.detach(), requires_grad=False))
    plain = unit.inner
    with refusing_unmergeable("LORA"):
        if isinstance(module, AuxiliaryTrainingWrapper):
            plain = module.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
        elif isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
    names = unit.tensors if plain is unit.inner else dict(plain.named_parameters())
    weights = [(f"{unit.path}.{name}", plain.get_parameter(name).detach()) for name in names]
    source.release(unit)
    for name, value in carried.items():
        _set_parameter(unit.inner, name, value)
    return weights


class WeightFiles:
    """The tensors of a checkpoint folder by name, read in float32 on request."""

    def __init__(self, folder: Path) -> None:
        self.place: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        for file in weight_files(folder):
            self._open[file] = safe_open(file, framework="pt").__enter__()
            self.place |= dict.fromkeys(self._open[file].keys(), file)

    def tensor(self, name: str) -> torch.Tensor:
        """Return one tensor. It must not be modified: a float32 tensor may be the file itself, mapped into memory."""
        tensor: torch.Tensor = self._open[self.place[name]].get_tensor(name)
        return tensor.float()


@dataclass(frozen=True)
class Unit:
    """A module whose weights are loaded and released together.

    Args:
        path: Name of the module in the plain model.
        module: Module that is called: the plain module, or the adapter's layer that wraps it.
        inner: Module that contains the base model's weights.
        tensors: Name of a parameter in `inner` -> name of its tensor in the files.
        placeholders: Name of a parameter in `inner` -> placeholder while the weight is not loaded. Made once: a new
            one at each release would be allocated in the memory that the weight just left, which would then be too
            small for the next weight. A parameter without placeholder has got its value from the adapter and keeps it.
    """

    path: str
    module: nn.Module
    inner: nn.Module
    tensors: dict[str, str]
    placeholders: dict[str, nn.Parameter]

    @property
    def is_adapted(self) -> bool:
        """Whether an adapter changes this module."""
        return isinstance(self.module, (BaseTunerLayer, AuxiliaryTrainingWrapper))


class StreamedModel:
    """Model that reads the weights of each module from the files just before it computes, and releases them after it.

    Args:
        folder: Plain checkpoint.
        adapter: Folder of a LoRA adapter for it; None for the plain model.
        tokenizer: Tokenizer of the training; if it has more tokens than the embeddings have rows, they must grow.

    Raises:
        NotStreamableError: The model must be loaded completely.
        ValueError: The adapter belongs to another base.
    """

    def __init__(
        self, folder: Path, adapter: Path | None = None, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        self.files = WeightFiles(folder)
        self.plain = _placeholder_model(folder)
        self.aliases = _aliases(self.plain, self.files)
        self.model: PreTrainedModel | PeftModel = self.plain
        if adapter is not None:
            if outgrown(self.plain, adapter, tokenizer):
                raise NotStreamableError("its embeddings have to grow")
            shared = _shared_parameters(self.plain)
            self.model = load_adapter(self.plain, adapter, low_cpu_mem_usage=True)
            _share_again(shared)
            for parameter in self.model.parameters():
                if not _is_placeholder(parameter):
                    # peft keeps the dtype of the adapter's file, and reads it to a GPU if there is one
                    parameter.data = parameter.data.to("cpu", torch.float32)
        self.units = list(_units(self.plain, self.aliases))
        for unit in self.units:
            self._add_hooks(unit)

    def _add_hooks(self, unit: Unit) -> None:
        def load_before(module: nn.Module, inputs: Any) -> None:
            self.load(unit)

        def release_after(module: nn.Module, inputs: Any, output: Any) -> None:
            self.release(unit)

        unit.module.register_forward_pre_hook(load_before)
        unit.module.register_forward_hook(release_after, always_call=True)

    def load(self, unit: Unit) -> None:
        """Read the weights of a unit from the files."""
        for name in unit.placeholders:
            tensor = self.files.tensor(unit.tensors[name])
            _set_parameter(unit.inner, name, nn.Parameter(tensor, requires_grad=False))

    def release(self, unit: Unit) -> None:
        """Put placeholders in place of the weights of a unit."""
        for name, placeholder in unit.placeholders.items():
            _set_parameter(unit.inner, name, placeholder)


def _placeholder_model(folder: Path) -> PreTrainedModel:
    """Build the model of a folder with placeholders for its weights; tied weights share one.

    Raises:
        NotStreamableError: The model needs Python code from its folder.
    """
    if hasattr(AutoConfig.from_pretrained(folder), "auto_map"):
        raise NotStreamableError("it comes with its own Python code")
    model = empty_model(folder)
    placeholders: dict[int, torch.Tensor] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        placeholder = placeholders.setdefault(id(parameter), nn.Parameter(_placeholder(parameter), requires_grad=False))
        _set_parameter(model, name, placeholder)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    keep_weights(model)
    return model


def _placeholder(like: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the same shape that takes four bytes.

    It contains NaN, so that computing with it does not go unnoticed. It is not on the device `meta`, because peft
    moves an adapter to the device of its layer, where its weights would be lost.
    """
    return torch.full((1,), torch.nan).expand(like.shape)


def _is_placeholder(parameter: torch.Tensor) -> bool:
    return parameter.untyped_storage().nbytes() == 4 and bool(parameter[(0,) * parameter.ndim].isnan())


Shared = list[list[tuple[nn.Module, str]]]


def _shared_parameters(model: nn.Module) -> Shared:
    """Return the places (module, name) of each parameter that several modules share."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, name))
    return [group for group in places.values() if len(group) > 1]


def _share_again(shared: Shared) -> None:
    """Give a value that an adapter has for one place of a shared parameter to the other places, too.

    Where the weights are loaded, peft copies the value into the parameter, and all places see it.
    """
    for group in shared:
        values = [module.get_parameter(name) for module, name in group]
        carried = [value for value in values if not _is_placeholder(value)]
        if carried:
            for module, name in group:
                _set_parameter(module, name, carried[-1])


def _aliases(model: PreTrainedModel, files: WeightFiles) -> dict[str, str]:
    """Return the name of each parameter -> the name of its tensor in the files, which tied parameters share.

    Raises:
        NotStreamableError: The names in the files and those of the model do not match.
    """
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    aliases: dict[str, str] = {}
    for names in groups.values():
        found = [name for name in names if name in files.place]
        if not found:
            raise NotStreamableError(f"its files contain no {names[0]}")
        aliases |= dict.fromkeys(names, found[0])
    unknown = files.place.keys() - aliases.keys()
    if unknown:
        raise NotStreamableError(f"its files contain {sorted(unknown)[0]}, which is not the name of a parameter")
    return aliases


def _units(model: PreTrainedModel, aliases: dict[str, str]) -> Iterator[Unit]:
    """Yield all modules that contain weights of the base; an adapter's layer and what it wraps are one unit."""
    wrapped: list[str] = []
    for path, module in model.named_modules():
        if path.startswith(tuple(f"{name}." for name in wrapped)):
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            wrapped.append(path)
            inner = _wrapped_module(path, module)
            names = [name for name, _ in inner.named_parameters()]
        else:
            inner, names = module, [name for name, value in module._parameters.items() if value is not None]
        if names:
            tensors = {name: aliases[f"{path}.{name}"] for name in names}
            values = {name: inner.get_parameter(name) for name in names}
            placeholders = {name: value for name, value in values.items() if _is_placeholder(value)}
            yield Unit(path, module, inner, tensors, placeholders)


def _wrapped_module(path: str, module: nn.Module) -> nn.Module:
    inner: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
    if any(isinstance(part, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for part in inner.modules()):
        raise NotStreamableError(f"its adapter changes {path} in two ways")
    return inner


def _set_parameter(module: nn.Module, name: str, value: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, value)
