"""The collator of a run's packed rows with images, for the stages after `pack`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedTokenizerBase

from sft.models.checkpoint import load_image_processor
from stages.checkout.paths import Paths
from stages.models.base import read_base_model

if TYPE_CHECKING:
    from sft.vision.collator import DataCollatorForImageRows


def image_collator(
    paths: Paths, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype | None = None
) -> DataCollatorForImageRows:
    """Return the collator of packed rows, with the base model's processor and the run's tokenizer.

    Args:
        paths: The checkout.
        tokenizer: Tokenizer of the run.
        dtype: Floating-point type of the model, and so of the images' tensors; None = that of the processor.
    """
    from sft.vision.collator import DataCollatorForImageRows  # only for rows with images

    base = Path(read_base_model(paths.out("load", "base_model.json")).path)
    return DataCollatorForImageRows(load_image_processor(base, tokenizer), str(paths.images), dtype)
