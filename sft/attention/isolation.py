"""How a model keeps documents in one row from affecting each other, found and proved by running it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, count
from typing import Any

import torch

from sft.attention.kernels import SFT_DOCUMENTS
from sft.attention.per_document import (
    Mixer,
    find_counting_decoder,
    find_decoder,
    find_layers,
    find_mixers,
    flat_row,
    per_document,
)
from sft.batches.layout import document_layout
from sft.inner_model import causal_lm, evaluating

PROBE_LENGTHS = (13, 10)
"""Tokens of the two documents of the probe."""


LONG_ROW = 4096
"""Most tokens of a row that is run to see whether a model's own code has room for it."""


@dataclass(frozen=True)
class IsolationReport:
    """Largest differences of logits in the probe, relative to the largest absolute logit.

    Attributes:
        neighbour_effect: Difference in the second document after the first one was changed.
        packing_error: Difference between packed documents and the same documents alone.
        neighbour_tolerance: Limit of `neighbour_effect`.
        packing_tolerance: Limit of `packing_error`.
    """

    neighbour_effect: float
    packing_error: float
    neighbour_tolerance: float
    packing_tolerance: float

    @property
    def is_within(self) -> bool:
        """Return whether both differences are within their limits."""
        return self.neighbour_effect <= self.neighbour_tolerance and self.packing_error <= self.packing_tolerance


class DocumentsMixError(ValueError):
    """Documents in one row see each other in this model, or are computed otherwise than alone."""


@dataclass(frozen=True)
class Isolation:
    """How a model keeps the documents of a row apart.

    Attributes:
        report: Differences found with the mixers in place.
        mixers: Modules to run document by document, see `sft.attention.per_document`.
        is_complete: Whether that is all of the model below its head, so that nothing is computed as one row.
    """

    report: IsolationReport
    mixers: tuple[Mixer, ...] = ()
    is_complete: bool = False

    def describe(self, base: Any) -> str:
        """Return in a few words what runs document by document; empty if nothing has to."""
        if not self.mixers:
            return ""
        modules = dict(base.named_modules())
        counts = Counter(type(modules[mixer.name]).__name__ for mixer in self.mixers)
        return ", ".join(f"{count} {name}" for name, count in counts.items()) + " run document by document"


@torch.no_grad()
def isolate_documents(model: torch.nn.Module, own_attention: str | None = None) -> Isolation:
    """Find out how this model keeps documents in one row from affecting each other, by trying it.

    1. Probe the model as it is. If changing one document changes nothing at all in the other, that is enough.
    2. Otherwise run document by document, as far as needed: the modules of its layers that mix tokens; complete layers;
       all that is below the head. Probe each.

    Args:
        model: Causal model of transformers, with the attention that is going to be used.
        own_attention: Attention of the model before that was set, which documents alone are run with. None = the same.

    Raises:
        DocumentsMixError: Not even the last way gives the logits of documents alone.
    """
    base = causal_lm(model)
    lengths = _probe_lengths(base)
    with evaluating(model), _attending(base, own_attention):
        alone = _alone(model, base, lengths)
    with evaluating(model):
        first = _try_to_measure(model, base, lengths, alone)
        if isinstance(first, IsolationReport) and first.is_within and first.neighbour_effect == 0:
            return Isolation(first)
        documents = _probe_documents(base, lengths)[:2]
        for find in (find_mixers, find_layers, find_decoder, find_counting_decoder):
            try:
                mixers = find(base, documents)
            except Exception:  # as above; CannotDivideError among them
                continue
            with per_document(base, mixers):
                report = _try_to_measure(model, base, lengths, alone)
            if isinstance(report, IsolationReport) and report.is_within:
                return Isolation(report, tuple(mixers), is_complete=find in (find_decoder, find_counting_decoder))
    raise _mixing_error(base, first)


@torch.no_grad()
def probe_isolation(model: torch.nn.Module) -> IsolationReport:
    """Check that two documents packed into one row do not affect each other's logits.

    Takes four forward passes of at most 23 tokens:

    1. Run both documents in one row.
    2. Run them again with another first document: the second one's logits must stay the same.
    3. Run each document alone as the model does by itself (two passes): the logits must equal those of the packed row.

    Args:
        model: Causal model of transformers, with the attention that is going to be used.

    Returns:
        The differences found, all within their tolerances.

    Raises:
        DocumentsMixError: A document affects its neighbour, or packing changes its logits.
    """
    base = causal_lm(model)
    with evaluating(model):
        report = _measure_isolation(model, base, PROBE_LENGTHS, _alone(model, base, PROBE_LENGTHS))
    if not report.is_within:
        raise _mixing_error(base, report)
    return report


@torch.no_grad()
def probe_padding(model: torch.nn.Module) -> None:
    """Check that documents padded to one length, on the right, have the logits of documents alone.

    Args:
        model: Causal model of transformers.

    Raises:
        DocumentsMixError: They differ, or the model fails on such a batch.
    """
    base = causal_lm(model)
    documents = _probe_documents(base, PROBE_LENGTHS)[:2]
    longest = max(PROBE_LENGTHS)
    filler = base.config.get_text_config().pad_token_id
    ids = [document + [filler or 0] * (longest - len(document)) for document in documents]
    mask = [[int(place < len(document)) for place in range(longest)] for document in documents]
    batch = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    name = f"{base.config.model_type} with attn_implementation={base.config._attn_implementation!r}"
    way_out = "Use packing=True or padding_free=True."
    with evaluating(model), document_layout(None):
        alone = [_logits_alone(model, base, document) for document in documents]
        try:
            padded = model(
                **{key: value.to(base.device) for key, value in batch.items()}, use_cache=False
            ).logits.float()
        except Exception as error:  # a model may fail on such a batch in any way
            raise DocumentsMixError(
                f"{name} fails on padded rows: {type(error).__name__}: {error}. {way_out}"
            ) from error
    scale = max(logits.abs().max() for logits in alone)
    difference = max((row[: len(one)] - one).abs().max() / scale for row, one in zip(padded, alone, strict=True)).item()
    tolerance = rounding_tolerances(base)[1]
    if difference > tolerance:
        raise DocumentsMixError(
            f"padding changes what {name} computes: logits differ by {difference:.1e} of the largest one from the "
            f"unpadded ones (limit {tolerance:.1e}). {way_out}"
        )


def _try_to_measure(
    model: torch.nn.Module, base: Any, lengths: tuple[int, int], alone: torch.Tensor
) -> IsolationReport | Exception:
    try:
        if base.config._attn_implementation != SFT_DOCUMENTS:
            _run_long_row(model, base)
        return _measure_isolation(model, base, lengths, alone)
    except Exception as error:  # a model may fail on a row of documents in any way
        return error


def _run_long_row(model: torch.nn.Module, base: Any) -> None:
    """Run a row longer than a document can be, as joined rows may be: a model's own code may lack room for it."""
    longest = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(longest, int) and longest <= LONG_ROW:
        document = _probe_documents(base, PROBE_LENGTHS)[0]
        _flat_logits(model, base, [document] * (longest // len(document) + 1))


@contextmanager
def _attending(base: Any, implementation: str | None) -> Iterator[None]:
    """Set another attention inside the block."""
    current = base.config._attn_implementation
    if implementation in (None, current):
        yield
        return
    base.set_attn_implementation(implementation)
    try:
        yield
    finally:
        base.set_attn_implementation(current)


def _mixing_error(base: Any, found: IsolationReport | Exception) -> DocumentsMixError:
    name = f"{base.config.model_type} with attn_implementation={base.config._attn_implementation!r}"
    way_out = "Use packing=False and padding_free=False."
    if base.config._attn_implementation != SFT_DOCUMENTS and base._can_set_attn_implementation():
        way_out = "Use attn_implementation='auto', or packing=False and padding_free=False."
    if not isinstance(found, IsolationReport):
        problem = f"{name} fails on packed rows: {type(found).__name__}: {next(iter(str(found).splitlines()), '')}"
    elif found.neighbour_effect > found.neighbour_tolerance:
        problem = (
            f"documents packed into one row see each other in {name}: changing one changed its neighbour's logits by "
            f"{found.neighbour_effect:.1e} of the largest one (limit {found.neighbour_tolerance:.1e})"
        )
    else:
        problem = (
            f"packing changes what {name} computes: logits differ by {found.packing_error:.1e} of the largest one "
            f"from the unpacked ones (limit {found.packing_tolerance:.1e})"
        )
    return DocumentsMixError(f"{problem}. {way_out}")


def _probe_lengths(base: Any) -> tuple[int, int]:
    """Return lengths of two documents, as `PROBE_LENGTHS` or longer, whose sum is not a dimension of a tensor.

    So a dimension of that size counts tokens.
    """
    taken = {size for tensor in chain(base.parameters(), base.buffers()) for size in tensor.shape}
    config = base.config.get_text_config().to_dict()
    taken |= {value for value in config.values() if isinstance(value, int)}
    heads = {value // other for value in taken for other in (2, 4, 8, 16, 32) if value % other == 0}
    first = next(length for length in count(PROBE_LENGTHS[0]) if length + PROBE_LENGTHS[1] not in taken | heads)
    return first, PROBE_LENGTHS[1]


def _probe_documents(base: Any, lengths: tuple[int, int]) -> list[list[int]]:
    """Return both documents, and another first one."""
    vocab_size = base.get_input_embeddings().weight.shape[0]
    return [_probe_document(vocab_size, length, seed) for seed, length in enumerate((*lengths, lengths[0]))]


def _alone(model: torch.nn.Module, base: Any, lengths: tuple[int, int]) -> torch.Tensor:
    """Return the logits of both documents alone, one after the other."""
    return torch.cat([_logits_alone(model, base, document) for document in _probe_documents(base, lengths)[:2]])


def _measure_isolation(
    model: torch.nn.Module, base: Any, lengths: tuple[int, int], alone: torch.Tensor
) -> IsolationReport:
    first, second, changed = _probe_documents(base, lengths)
    packed = _flat_logits(model, base, [first, second])
    perturbed = _flat_logits(model, base, [changed, second])
    scale = alone.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    neighbour_tolerance, packing_tolerance = rounding_tolerances(base)
    return IsolationReport(
        neighbour_effect=((packed - perturbed)[lengths[0] :].abs().max() / scale).item(),
        packing_error=((packed - alone).abs().max() / scale).item(),
        neighbour_tolerance=neighbour_tolerance,
        packing_tolerance=packing_tolerance,
    )


def rounding_tolerances(base: Any) -> tuple[float, float]:
    """Return the tolerances for the effect of a neighbour and for that of packing.

    Rounding errors are far below them, and the effect of attention to another document is far above. The first compares
    runs of the same shape, whose rounding errors are the same. The second does not; on a GPU its float32 limit is
    higher, since products in TF32 round more.

    Args:
        base: Model of transformers, without wrappers.
    """
    device_type = base.device.type
    if torch.finfo(base.dtype).eps > 1e-6 or torch.is_autocast_enabled(device_type):
        return 5e-2, 5e-2
    return 1e-5, 1e-4 if device_type == "cpu" else 1e-2


def _probe_document(vocab_size: int, length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (length,), generator=generator).tolist()


def _flat_logits(model: torch.nn.Module, base: Any, documents: list[list[int]]) -> torch.Tensor:
    """Return float32 logits `(num_tokens, vocab)` of documents run in one flat row."""
    with document_layout([len(document) for document in documents]):
        logits = model(**flat_row(base, documents), use_cache=False).logits
    return logits[0].float()


def _logits_alone(model: torch.nn.Module, base: Any, document: list[int]) -> torch.Tensor:
    """Return float32 logits `(num_tokens, vocab)` of one document, whose positions the model counts itself."""
    with document_layout(None):
        logits = model(input_ids=torch.tensor([document], device=base.device), use_cache=False).logits
    return logits[0].float()
