"""Probe that documents packed into one row do not affect each other in a model."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from sft.attention.kernels import SFT_DOCUMENTS
from sft.batches.layout import DocumentLayout, document_layout
from sft.inner_model import causal_lm, evaluating

PROBE_LENGTHS = (13, 10)
"""Tokens of the two documents of the probe."""


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


@torch.no_grad()
def probe_isolation(model: torch.nn.Module) -> IsolationReport:
    """Check that two documents packed into one row do not affect each other's logits.

    Takes four forward passes of at most 23 tokens:

    1. Run both documents in one row.
    2. Run them again with another first document: the second one's logits must stay the same.
    3. Run each document alone (two passes): the logits must equal those of the packed row.

    Args:
        model: Causal model of transformers, with the attention that is going to be used.

    Returns:
        The differences found, all within their tolerances.

    Raises:
        ValueError: A document affects its neighbour, or packing changes its logits.
    """
    base = causal_lm(model)
    with evaluating(model):
        report = _measure_isolation(model, base)
    name = f"{base.config.model_type} with attn_implementation={base.config._attn_implementation!r}"
    way_out = "Use packing=False."
    if base.config._attn_implementation != SFT_DOCUMENTS:
        way_out = "Use attn_implementation='auto', or packing=False."
    if report.neighbour_effect > report.neighbour_tolerance:
        raise ValueError(
            f"documents packed into one row see each other in {name}: changing one changed its neighbour's logits by "
            f"{report.neighbour_effect:.1e} of the largest one (limit {report.neighbour_tolerance:.1e}). {way_out}"
        )
    if report.packing_error > report.packing_tolerance:
        raise ValueError(
            f"packing changes what {name} computes: logits differ by {report.packing_error:.1e} of the largest one "
            f"from the unpacked ones (limit {report.packing_tolerance:.1e}). {way_out}"
        )
    return report


def _measure_isolation(model: torch.nn.Module, base: Any) -> IsolationReport:
    vocab_size = base.get_input_embeddings().weight.shape[0]
    first, second = (_probe_document(vocab_size, length, seed) for seed, length in enumerate(PROBE_LENGTHS))
    changed = _probe_document(vocab_size, PROBE_LENGTHS[0], seed=len(PROBE_LENGTHS))
    packed = _flat_logits(model, base, [first, second])
    perturbed = _flat_logits(model, base, [changed, second])
    alone = torch.cat([_flat_logits(model, base, [first]), _flat_logits(model, base, [second])])
    scale = alone.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    start_of_second = PROBE_LENGTHS[0]
    neighbour_tolerance, packing_tolerance = rounding_tolerances(base)
    return IsolationReport(
        neighbour_effect=((packed - perturbed)[start_of_second:].abs().max() / scale).item(),
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
    if base.dtype != torch.float32 or torch.is_autocast_enabled(device_type):
        return 5e-2, 5e-2
    return 1e-5, 1e-4 if device_type == "cpu" else 1e-2


def _probe_document(vocab_size: int, length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (length,), generator=generator).tolist()


def _flat_logits(model: torch.nn.Module, base: Any, documents: list[list[int]]) -> torch.Tensor:
    """Return float32 logits `(num_tokens, vocab)` of documents run in one flat row."""
    layout = DocumentLayout(tuple(len(document) for document in documents))
    input_ids = torch.tensor([list(chain.from_iterable(documents))], device=base.device)
    position_ids = torch.tensor([[place for length in layout.lengths for place in range(length)]], device=base.device)
    with document_layout(layout):
        logits = model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
    return logits[0].float()
