"""Log lines of torchao and bitsandbytes about themselves, which peft and transformers cause by importing them."""

from __future__ import annotations

import logging


def hide_import_messages() -> None:
    """Drop log lines that a user can't act on: about missing kernels for GPUs, and advice about torchao's own code."""
    # torch resets the level of its loggers, so these are filters
    logging.getLogger("torch.utils._pytree").addFilter(_is_no_advice)
    logging.getLogger("torchao").addFilter(_is_no_missing_kernel)
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_no_missing_kernel)


def _is_no_advice(record: logging.LogRecord) -> bool:
    return "natively supported by torch.compile" not in record.getMessage()


def _is_no_missing_kernel(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Failed to load")
