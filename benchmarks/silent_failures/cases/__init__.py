"""The cases, one module per kind. Each is registered by the decorator `case`."""

from __future__ import annotations

import importlib

from benchmarks.silent_failures.case import CASES, Case

KINDS = {
    "messages": "What a message says",
    "spans": "Which tokens are trained",
    "endings": "Where an answer ends",
    "lengths": "Truncation and packing",
    "losses": "Loss and evaluation",
    "adapters": "Adapters and merging",
    "inputs": "Options, models and data",
}
"""Module of cases -> its heading in the table."""


def load_cases() -> dict[str, Case]:
    """Import all modules of cases and return the cases by name, in the order of the table."""
    for kind in KINDS:
        importlib.import_module(f"{__name__}.{kind}")
    return dict(CASES)
