"""`sft preview`: print packed rows token by token, with the trained tokens marked."""

from __future__ import annotations

import sys

from datasets import load_from_disk
from transformers import AutoTokenizer

from sft.tokens.preview import preview_masks
from stages.checkout.paths import Paths
from stages.params.schema import Params
from stages.tools.freshness import warn_if_stale


def run(params: Params, paths: Paths, *, rows: int = 3, seed: int = 0, split: str = "train") -> None:
    """Print a seeded sample of the rows that `pack` wrote.

    Args:
        params: Values of params.yaml.
        paths: Paths of the checkout.
        rows: Number of rows.
        seed: Seed of the sample.
        split: `train` or `eval`.

    Raises:
        ValueError: `pack` has not run here yet.
    """
    folder = paths.out("pack", split)
    if not folder.exists():
        raise ValueError(f"{folder} is missing: type `sft pack` first")
    warn_if_stale(params, paths, "pack")
    tokenizer = AutoTokenizer.from_pretrained(paths.out("format", "tokenizer"))
    packed = load_from_disk(str(folder))
    print(preview_masks(packed, tokenizer, num_rows=rows, seed=seed, colour=sys.stdout.isatty()), end="")
