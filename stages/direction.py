"""Which figures are better when they are lower, by their names."""

from __future__ import annotations

LOWER_IS_BETTER = ("loss", "perplexity", ".kl", "size_mb", "relative_error", "dropped", "lost")


def lower_is_better(name: str) -> bool:
    """Whether less of a figure is better: losses and sizes are, scores are not."""
    return name.endswith(LOWER_IS_BETTER)
