"""The files of a tokenizer, the same wherever they are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

OF_THE_PROCESS = ("local_files_only",)
"""What transformers writes down of the environment: with HF_HUB_OFFLINE the same tokenizer would be other bytes."""


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer, or a processor, without what depends on how this process was started.

    Args:
        tokenizer: With `save_pretrained`.
        folder: Made if need be.
    """
    for part in (tokenizer, getattr(tokenizer, "tokenizer", None)):
        for name in OF_THE_PROCESS:
            getattr(part, "init_kwargs", {}).pop(name, None)
    tokenizer.save_pretrained(folder)
