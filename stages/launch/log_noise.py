"""Telemetry and log lines of other packages, turned off for the processes of a stage."""

from __future__ import annotations

import logging
import os
import sys
import warnings

from sft.log_noise import hide_torchao_messages


def reduce_log_noise() -> None:
    """Turn off telemetry, progress bars in logs, and messages of other packages that a user can't act on.

    Environment variables that the user has set are kept.
    """
    hide_torchao_messages()
    # deprecations that concern these packages, not the user
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|peft|torch")
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # an optional package is missing
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # in a file, each update of a bar would be one more line
    for name, value in {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "DO_NOT_TRACK": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DVC_NO_ANALYTICS": "1",
        "TOKENIZERS_PARALLELISM": "true",
    }.items():
        os.environ.setdefault(name, value)
