"""What quantizing a checkpoint did to it, by whichever method: sizes, and the error of every layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

SUMMARY = ("size_ratio", "mean_relative_error", "max_relative_error")


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """What quantization did to one linear layer: `|W - Wq| / |W|` in the Frobenius norm, comparable between layers."""

    layer: int
    module: str
    relative_error: float


@dataclass(frozen=True, kw_only=True)
class QuantizationReport:
    """Sizes are of the weight files.

    Args:
        source_bytes: Size of the plain weights.
        quantized_bytes: Size of the quantized ones.
        modules: One error a quantized layer.
        loading_deviation: Mean difference of the logits of the folder as transformers loads it to those that it stands
            for, over their standard deviation.
    """

    source_bytes: int
    quantized_bytes: int
    modules: tuple[LayerError, ...]
    loading_deviation: float

    @property
    def size_ratio(self) -> float:
        """Quantized size over source size."""
        return self.quantized_bytes / self.source_bytes

    @property
    def mean_relative_error(self) -> float:
        """Mean of `relative_error` over the modules."""
        return sum(module.relative_error for module in self.modules) / len(self.modules)

    @property
    def max_relative_error(self) -> float:
        """The largest `relative_error`."""
        return max(module.relative_error for module in self.modules)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {**asdict(self), **{name: getattr(self, name) for name in SUMMARY}}
