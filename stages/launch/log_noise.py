"""What other packages print, turned off for the processes of a stage: telemetry, bars, advice, warnings."""

from __future__ import annotations

import logging
import os
import sys

from sft.log_noise import hide_import_messages

OWN = ("sft", "stages")
"""Loggers whose warnings are shown; of all others only errors are."""


def reduce_log_noise() -> None:
    """Turn off telemetry, the bars of other packages, and what they log below the level ERROR.

    Python's warnings are dropped, too. Environment variables that the user has set are kept, so that
    TRANSFORMERS_VERBOSITY=warning and TQDM_DISABLE=0 bring these packages' messages back.
    """
    hide_import_messages()
    root = logging.getLogger()
    if not any(isinstance(handler, StderrHandler) for handler in root.handlers):
        root.addHandler(StderrHandler())
    logging.captureWarnings(True)
    for name, value in {
        "TQDM_DISABLE": "1",  # `stages.progress` shows how far the stage is
        "TRANSFORMERS_VERBOSITY": "error",
        "DATASETS_VERBOSITY": "error",
        "HF_HUB_VERBOSITY": "error",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "DO_NOT_TRACK": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DVC_NO_ANALYTICS": "1",
        "TOKENIZERS_PARALLELISM": "true",
    }.items():
        os.environ.setdefault(name, value)


class StderrHandler(logging.Handler):
    """Handler that prints our warnings and the errors of all packages to the present `sys.stderr`."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.addFilter(_is_shown)

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record in one line: `warning: ...` for ours, with the package's name for others."""
        source = "" if record.name.partition(".")[0] in OWN else f"{record.name}: "
        print(f"{record.levelname.lower()}: {source}{record.getMessage()}", file=sys.stderr, flush=True)


def _is_shown(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR or record.name.partition(".")[0] in OWN
