"""sft.attention.isolation."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from sft.attention.kernels import SFT_DOCUMENTS
from sft.batches.layout import DocumentLayout, document_layout
from sft.inner_model import causal_lm, evaluating

PROBE_LENGTHS = (13, 10)


@dataclass(frozen=True)
class IsolationReport:
    """Largest differences of logits that the probe saw, relative to the largest logit."""

    neighbour_effect: float
    packing_error: float
    neighbour_tolerance: float
    packing_tolerance: float


@torch.no_grad()
def probe_isolation(model: torch.nn.Module) -> IsolationReport:
    """Run two documents in one row, change the first, and see that the second does not notice.

    Also compares both with the same documents run alone. Four forward passes of at most 23 tokens.

    Args:
        model: a transformers causal model with the attention set that is to be used.

    Returns:
        The differences found, all within tolerance.

    Raises:
        ValueError: a document sees its neighbour, or packing changes its logits.
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
            f"documents packed into one row see each other in {name}: changing one moved its neighbour's logits by "
            f"{report.neighbour_effect:.1e} of their size (limit {report.neighbour_tolerance:.1e}). {way_out}"
        )
    if report.packing_error > report.packing_tolerance:
        raise ValueError(
            f"packing changes what {name} computes: logits differ by {report.packing_error:.1e} of their size from the "
            f"unpacked ones (limit {report.packing_tolerance:.1e}). {way_out}"
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
    """Limits for a neighbour's effect and for packing's; rounding alone stays well below, leaks lie well above.

    The former compares runs of equal shape, which round alike; the latter does not, and TF32 products round more.
    """
    device_type = base.device.type
    if base.dtype != torch.float32 or torch.is_autocast_enabled(device_type):
        return 5e-2, 5e-2
    return 1e-5, 1e-4 if device_type == "cpu" else 1e-2


def _probe_document(vocab_size: int, length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (length,), generator=generator).tolist()


def _flat_logits(model: torch.nn.Module, base: Any, documents: list[list[int]]) -> torch.Tensor:
    """Logits `(num_tokens, vocab)` in fp32 of documents run in one flat row."""
    layout = DocumentLayout(tuple(len(document) for document in documents))
    input_ids = torch.tensor([list(chain.from_iterable(documents))], device=base.device)
    position_ids = torch.tensor([[place for length in layout.lengths for place in range(length)]], device=base.device)
    with document_layout(layout):
        logits = model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
    return logits[0].float()
