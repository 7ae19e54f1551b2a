"""Modules that are run document by document inside a flat row.

Attention keeps the documents of a row apart by itself (`sft.attention.kernels`). Recurrent layers, convolutions, linear
attention and attention code of a model's own do not: they would carry one document's tokens into the next. Such a
module is given every document by itself, while the rest of the model computes the complete row. Where even that is not
enough (positions that the model counts itself), all its layers are, as one module.

`find_mixers` finds the modules by trying them out, whatever their class. `per_document` replaces their forward.

A module is run in the first of these ways that gives the same as each document alone:

1. With borders: it gets the row, and where documents begin (`seq_idx`, `cu_seq_lens_q`). Layers of transformers pass
   this on to the kernels of flash-linear-attention, causal-conv1d and mamba-ssm, if these are installed.
2. As batches of documents of similar length, filled up to the longest by repeating their last token: no token of a
   causal module depends on later ones.
3. One document after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from sft.batches.layout import DocumentLayout, current_layout, document_layout
from sft.inner_model import evaluating, takes_position_ids

Places = tuple[int, ...]
"""Dimensions of a tensor that count tokens."""

FILL = 0.75
"""Least length of a document in a batch, as a fraction of the longest one there."""


class Way(StrEnum):
    """Ways to run a module document by document."""

    BORDERS = "with borders"
    BATCHES = "as batches"
    ONE_BY_ONE = "one by one"


@dataclass(frozen=True)
class Mixer:
    """A module to run document by document.

    Attributes:
        name: Its name in the model.
        inputs: Path of each tensor in its arguments -> dimensions that count tokens.
        outputs: The same for its outputs, in order.
        way: How it is run.
        left_out: Names of arguments that it is not given.
    """

    name: str
    inputs: Mapping[str, Places]
    outputs: tuple[Places, ...]
    way: Way
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Call:
    """Arguments that a module was called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def without(self, names: tuple[str, ...]) -> _Call:
        """Return the call without these keyword arguments."""
        return _Call(self.args, {name: value for name, value in self.kwargs.items() if name not in names})


class CannotDivideError(ValueError):
    """A module's arguments or outputs can't be divided into documents."""


@contextmanager
def per_document(model: nn.Module, mixers: Sequence[Mixer]) -> Iterator[None]:
    """Run the mixers document by document inside the block, wherever a `document_layout` is set."""
    modules = dict(model.named_modules()) if mixers else {}
    with ExitStack() as stack:
        for mixer in mixers:
            stack.enter_context(_replaced_forward(modules[mixer.name], mixer))
        yield


@contextmanager
def _replaced_forward(module: Any, mixer: Mixer) -> Iterator[None]:
    own, is_replaced = module.forward, "forward" in vars(module)
    module.forward = partial(_forward, own, mixer)
    try:
        yield
    finally:
        if is_replaced:
            module.forward = own
        else:
            del module.forward


def _forward(own: Callable[..., Any], mixer: Mixer, *args: Any, **kwargs: Any) -> Any:
    layout = current_layout()
    if layout is None:
        return own(*args, **kwargs)
    return _run(own, mixer, _Call(args, kwargs).without(mixer.left_out), layout)


def _run(own: Callable[..., Any], mixer: Mixer, call: _Call, layout: DocumentLayout) -> Any:
    """Run a module on each document of the layout, and put the outputs together as one row."""
    leaves, spec = _flatten(call)
    num_tokens = layout.num_computed
    dims = [mixer.inputs.get(path, _token_dims(leaf, num_tokens)) for path, leaf in leaves]
    values = [leaf for _, leaf in leaves]
    device = next(leaf.device for leaf, places in zip(values, dims, strict=True) if places)
    batched = mixer.way == Way.BATCHES
    pick = _pick_batch if batched else _pick_document
    parts: list[list[Any]] = []
    for places in _parts(layout, mixer.way, device):
        picked = [
            pick(leaf, places_of, places) if places_of else leaf for leaf, places_of in zip(values, dims, strict=True)
        ]
        args, kwargs = pytree.tree_unflatten(picked, spec)
        inner, borders = None, {}
        if mixer.way == Way.ONE_BY_ONE:  # a layout of its own, which windows need; a batch is masked by causality alone
            inner = DocumentLayout((places.shape[1],))
        if mixer.way == Way.BORDERS:
            inner = DocumentLayout(layout.lengths)
            borders = {"seq_idx": inner.document_ids(device)[None].int(), "cu_seq_lens_q": inner.boundaries(device)}
        with document_layout(inner):
            outputs, outputs_spec = pytree.tree_flatten(own(*args, **kwargs, **borders))
        parts.append(outputs)
    order = _order(layout, batched, device)
    joined = [
        _join([part[number] for part in parts], places, order, batched) for number, places in enumerate(mixer.outputs)
    ]
    return pytree.tree_unflatten(joined, outputs_spec)


def _parts(layout: DocumentLayout, way: Way, device: torch.device) -> list[torch.Tensor]:
    """Return for each call of a module the places of its tokens in the row of computed tokens, `(rows, length)`."""
    if way == Way.BATCHES:
        return _batches(layout, device)
    documents = _documents(layout, device)
    return [torch.cat(documents)[None]] if way == Way.BORDERS else [document[None] for document in documents]


def _flatten(call: _Call) -> tuple[list[tuple[str, Any]], Any]:
    leaves, spec = pytree.tree_flatten_with_path((call.args, call.kwargs))
    return [(pytree.keystr(path), leaf) for path, leaf in leaves], spec


def _token_dims(leaf: Any, num_tokens: int) -> Places:
    if not isinstance(leaf, torch.Tensor):
        return ()
    return tuple(dim for dim, size in enumerate(leaf.shape) if size == num_tokens)


def _pick_document(leaf: torch.Tensor, dims: Places, places: torch.Tensor) -> torch.Tensor:
    """Return one document's part of a tensor, with the dimensions as they are."""
    for dim in dims:
        leaf = leaf.index_select(dim, places[0])
    return leaf


def _pick_batch(leaf: torch.Tensor, dims: Places, places: torch.Tensor) -> torch.Tensor:
    """Return the documents' parts of `(..., 1, ..., tokens, ...)` as `(..., documents, ..., longest, ...)`."""
    (dim,) = dims
    batch = _batch_dim(leaf, dim)
    picked = leaf.index_select(dim, places.reshape(-1)).unflatten(dim, tuple(places.shape))
    return picked.movedim(dim, batch).squeeze(batch + 1)


def _batch_dim(leaf: torch.Tensor, dim: int) -> int:
    """Return the dimension before `dim` that counts rows.

    Raises:
        CannotDivideError: There is none.
    """
    for before in range(dim):
        if leaf.shape[before] == 1:
            return before
    raise CannotDivideError(f"a tensor of shape {tuple(leaf.shape)} has no dimension for rows before its tokens")


def _join(parts: list[Any], dims: Places, order: torch.Tensor, batched: bool) -> Any:
    """Put an output's parts together, in the order of the row's computed tokens."""
    if len(dims) != 1:
        return None  # attention weights, which no one reads in a flat row
    (dim,) = dims
    if not batched:
        return torch.cat(parts, dim).index_select(dim, order)
    rows = [part.movedim(dim, 1).flatten(0, 1) for part in parts]
    return torch.cat(rows).index_select(0, order)[None].movedim(1, dim)


def _documents(layout: DocumentLayout, device: torch.device) -> list[torch.Tensor]:
    """Return for each document the places of its tokens among the computed tokens of the row."""
    key = f"documents:{device}"
    if key not in layout.cache:
        sources = torch.arange(layout.num_tokens) if layout.sharing is None else layout.sharing.sources
        layout.cache[key] = list(sources.to(device).split(list(layout.lengths)))
    return layout.cache[key]


def _groups(lengths: Sequence[int]) -> list[list[int]]:
    """Divide documents into groups of similar lengths.

    Args:
        lengths: Tokens of each document.

    Returns:
        Numbers of the documents of each group. The shortest has at least `FILL` times the tokens of the longest.
    """
    groups: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        if groups and lengths[number] >= FILL * lengths[groups[-1][0]]:
            groups[-1].append(number)
        else:
            groups.append([number])
    return groups


def _batches(layout: DocumentLayout, device: torch.device) -> list[torch.Tensor]:
    """Return for each group of documents the places of their tokens; the last one fills up the shorter documents."""
    key = f"document_batches:{device}"
    if key not in layout.cache:
        documents = _documents(layout, device)
        batches = []
        for group in _groups(layout.lengths):
            longest = layout.lengths[group[0]]
            filled = [
                torch.cat([documents[number], documents[number][-1:].expand(longest - layout.lengths[number])])
                for number in group
            ]
            batches.append(torch.stack(filled))
        layout.cache[key] = batches
    return layout.cache[key]


def _order(layout: DocumentLayout, batched: bool, device: torch.device) -> torch.Tensor:
    """Return where each computed token of the row is among the outputs of all documents, `(num_computed,)`."""
    key = f"document_order:{batched}:{device}"
    if key not in layout.cache:
        if batched:
            starts, start = [0] * len(layout.lengths), 0
            for group in _groups(layout.lengths):
                longest = layout.lengths[group[0]]
                for number in group:
                    starts[number], start = start, start + longest
            order = torch.cat(
                [torch.arange(length) + begin for begin, length in zip(starts, layout.lengths, strict=True)]
            ).to(device)
        else:
            order = torch.arange(layout.num_tokens, device=device)
        layout.cache[key] = order if layout.sharing is None else order[layout.sharing.kept]
    return layout.cache[key]


def find_mixers(base: Any, documents: Sequence[Sequence[int]]) -> list[Mixer]:
    """Find the modules below a model's layers that carry tokens of one document into another.

    1. Run the documents in one row, and keep what each layer and each of its children is called with.
    2. Run each of them again with another first document. It mixes if this changes its output for the second.
    3. Take the children that mix; the layer itself if it mixes without them.

    Args:
        base: Causal model of transformers, without wrappers.
        documents: Token ids of two documents, of different lengths. No dimension of a tensor in the model may be as
            long as both together.
    """
    layers = _layers(base)
    children = {name: _children(name, layer) for name, layer in layers.items()}
    modules = {**layers, **{name: module for found in children.values() for name, module in found.items()}}
    trial = _Trial(base, modules, documents)
    found: list[Mixer] = []
    for name, layer in layers.items():
        if trial.mixes(name, layer):
            mixing = {child: module for child, module in children[name].items() if trial.mixes(child, module)}
            found += [trial.mixer(child, module) for child, module in (mixing or {name: layer}).items()]
    return found


def find_layers(base: Any, documents: Sequence[Sequence[int]]) -> list[Mixer]:
    """Return all layers of a model as mixers; arguments as for `find_mixers`."""
    layers = _layers(base)
    trial = _Trial(base, layers, documents)
    return [trial.mixer(name, layer) for name, layer in layers.items() if name in trial.calls]


def find_decoder(base: Any, documents: Sequence[Sequence[int]], left_out: tuple[str, ...] = ()) -> list[Mixer]:
    """Return all that is below the head of a model as one mixer.

    Args:
        base: As for `find_mixers`.
        documents: As for `find_mixers`.
        left_out: Arguments that it is not given.

    Raises:
        CannotDivideError: The model has no such part.
    """
    names = {id(module): name for name, module in base.named_modules()}
    parts = {names[id(module)]: module for module in _below_head(base, base.get_output_embeddings())}
    trial = _Trial(base, parts, documents)
    for name, module in parts.items():
        if name in trial.calls:
            return [trial.mixer(name, module, left_out)]
    raise CannotDivideError(f"{type(base).__name__} has no part below its head")


def _below_head(base: Any, head: nn.Module) -> list[nn.Module]:
    """Return the parts of a model that may be all that is below its head, the outermost first.

    A model may call a part of its `base_model` alone, such as the decoder of an encoder-decoder family. Another model
    may be wrapped around the one that has the head.
    """
    candidates = [base.base_model]  # with the embeddings, which may count positions
    outer: Any = base
    while outer is not None:
        inner = outer.get_decoder() if hasattr(outer, "get_decoder") else None
        inner = next((module for module in (inner, *_largest_first(outer)) if module not in (None, outer, head)), None)
        candidates += [] if inner is None else [inner]
        outer = inner if inner is not None and any(module is head for module in inner.modules()) else None
    below = [module for module in candidates if all(part not in (base, head) for part in module.modules())]
    return list(dict.fromkeys(below))


def _largest_first(module: nn.Module) -> list[nn.Module]:
    return sorted(module.children(), key=lambda child: -sum(parameter.numel() for parameter in child.parameters()))


def find_counting_decoder(base: Any, documents: Sequence[Sequence[int]]) -> list[Mixer]:
    """Return the same for a model that is to count positions itself, as those of RoBERTa do from 2 on."""
    return find_decoder(base, documents, left_out=("position_ids",))


def _layers(base: nn.Module) -> dict[str, nn.Module]:
    """Return the items of the outermost `nn.ModuleList`s, by name."""
    lists: list[str] = []
    for name, module in base.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in lists):
            lists.append(name)
    return {name: module for name, module in base.named_modules() if name.rpartition(".")[0] in lists}


def _children(name: str, layer: nn.Module) -> dict[str, nn.Module]:
    """Return the children of a layer by name; instead of a list or dict of modules, its items."""
    found: dict[str, nn.Module] = {}
    for child, module in layer.named_children():
        inner = isinstance(module, nn.ModuleList | nn.ModuleDict)
        found.update(_children(f"{name}.{child}", module) if inner else {f"{name}.{child}": module})
    return found


class _Trial:
    """Modules of a model, with what they are called with when two documents are in one row.

    Attributes:
        calls: Name -> arguments of its first call; modules that are not called are missing.
    """

    def __init__(self, base: Any, modules: Mapping[str, nn.Module], documents: Sequence[Sequence[int]]) -> None:
        self.layout = DocumentLayout(tuple(len(document) for document in documents))
        self.calls: dict[str, _Call] = {}
        handles = [
            module.register_forward_pre_hook(partial(self._keep, name), with_kwargs=True)
            for name, module in modules.items()
        ]
        try:
            # a model may fail on such a row in any way: then the modules before the fault are known
            with evaluating(base), torch.no_grad(), document_layout(self.layout), suppress(Exception):
                base(**flat_row(base, documents), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.calls.setdefault(name, _Call(args, kwargs))

    @torch.no_grad()
    def mixes(self, name: str, module: nn.Module) -> bool:
        """Return whether a module's output for the second document depends on the first one."""
        if name not in self.calls:
            return False
        call, first = self.calls[name], self.layout.lengths[0]
        with evaluating(module), document_layout(self.layout):
            before, after = (pytree.tree_leaves(module(*c.args, **c.kwargs)) for c in (call, self._changed(call)))
        for old, new in zip(before, after, strict=True):
            dims = _token_dims(old, self.layout.num_tokens)
            if len(dims) == 1 and old.is_floating_point():
                old, new = (leaf.movedim(dims[0], 0)[first:].float() for leaf in (old, new))
                if (new - old).abs().max() > _noise(before) * old.abs().max():
                    return True
        return False

    def _changed(self, call: _Call) -> _Call:
        """Return the call with other states of the first document."""
        leaves, spec = _flatten(call)
        generator = torch.Generator().manual_seed(0)
        changed = []
        for _, leaf in leaves:
            dims = _token_dims(leaf, self.layout.num_tokens)
            if len(dims) == 1 and leaf.is_floating_point():
                noise = torch.randn(leaf.shape, generator=generator).to(leaf)
                leaf = leaf.clone()
                part = leaf.movedim(dims[0], 0)[: self.layout.lengths[0]]
                part += noise.movedim(dims[0], 0)[: self.layout.lengths[0]] * leaf.float().std().to(leaf)
            changed.append(leaf)
        return _Call(*pytree.tree_unflatten(changed, spec))

    @torch.no_grad()
    def mixer(self, name: str, module: nn.Module, left_out: tuple[str, ...] = ()) -> Mixer:
        """Return how to run a module document by document, see the head of this module.

        Raises:
            CannotDivideError: The module is not called, or its outputs can't be divided into documents.
        """
        if name not in self.calls:
            raise CannotDivideError(f"{name} is not called")
        call = self.calls[name].without(left_out)
        inputs = {path: _token_dims(leaf, self.layout.num_tokens) for path, leaf in _flatten(call)[0]}
        with evaluating(module):
            alone = Mixer(name, inputs, self._outputs(call, inputs, module), Way.ONE_BY_ONE, left_out)
            expected = _run(module, alone, call, self.layout)
            for mixer in (replace(alone, way=Way.BORDERS), replace(alone, way=Way.BATCHES)):
                # it takes no borders, an argument has no dimension for rows, it takes one row only
                with suppress(Exception):
                    if _same(expected, _run(module, mixer, call, self.layout)):
                        return mixer
        return alone

    def _outputs(self, call: _Call, inputs: Mapping[str, Places], module: nn.Module) -> tuple[Places, ...]:
        """Return the token dimensions of a module's outputs: those that differ between documents of two lengths."""
        leaves, spec = _flatten(call)
        found = []
        for places in _parts(self.layout, Way.ONE_BY_ONE, _device_of(leaves)):
            picked = [_pick_document(leaf, inputs[path], places) if inputs[path] else leaf for path, leaf in leaves]
            args, kwargs = pytree.tree_unflatten(picked, spec)
            with document_layout((places.shape[1],)):
                found.append(pytree.tree_leaves(module(*args, **kwargs)))
        return tuple(self._common(*outputs) for outputs in zip(*found, strict=True))

    def _common(self, first: Any, second: Any) -> Places:
        if not isinstance(first, torch.Tensor):
            return ()
        pairs = enumerate(zip(first.shape, second.shape, strict=True))
        dims = tuple(dim for dim, pair in pairs if pair == self.layout.lengths)
        if not dims and first.dim() != 2 and first.is_floating_point():  # a pooled state has two dimensions
            raise CannotDivideError(f"an output of shape {tuple(first.shape)} belongs to the complete row")
        return dims


def _device_of(leaves: list[tuple[str, Any]]) -> torch.device:
    device: torch.device = next(leaf.device for _, leaf in leaves if isinstance(leaf, torch.Tensor))
    return device


def _noise(leaves: list[Any]) -> float:
    """Return the rounding error of runs of one shape, relative to the largest value, in the dtype of the leaves."""
    eps = max(
        torch.finfo(leaf.dtype).eps for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
    )
    return (16 if eps < 1e-5 else 2) * eps


def _same(first: Any, second: Any) -> bool:
    pairs = zip(pytree.tree_leaves(first), pytree.tree_leaves(second), strict=True)
    tensors = [(a.float(), b.float(), _noise([a])) for a, b in pairs if isinstance(a, torch.Tensor)]
    return all((a - b).abs().max() <= 8 * noise * a.abs().max() for a, b, noise in tensors)


def flat_row(base: Any, documents: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Return documents in one row as arguments of a model: `input_ids`, and `position_ids` if the model takes them.

    Args:
        base: Causal model of transformers, without wrappers.
        documents: Token ids of each document.
    """
    ids = [token for document in documents for token in document]
    places = [place for document in documents for place in range(len(document))]
    row = {"input_ids": torch.tensor([ids], device=base.device)}
    if takes_position_ids(base):
        row["position_ids"] = torch.tensor([places], device=base.device)
    return row
