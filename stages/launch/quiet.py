"""stages.launch.quiet."""

from __future__ import annotations

import logging
import os
import sys
import warnings


class _AboutTorchao(logging.Filter):
    """Drops what importing torchao makes torch say about torchao's own code; a level would be reset by torch."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "natively supported by torch.compile" not in record.getMessage()


def quiet_tools() -> None:
    """Switch telemetry off and keep other packages' chatter out of the log; a value set by the user wins."""
    logging.getLogger("torch.utils._pytree").addFilter(_AboutTorchao())
    # what libraries tell each other about their next versions
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|peft|torch")
    logging.getLogger("torchao").setLevel(logging.ERROR)  # kernels for GPUs that are not there
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # an optional package is missing
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # a bar in a log is a line a tick
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
