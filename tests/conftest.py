"""Settings of all tests: the order of their files, separate locks, live curves switched off."""

from __future__ import annotations

import gc
import os
import tempfile

import pytest

os.environ.setdefault("SFT_LOCK_DIR", tempfile.mkdtemp(prefix="sft-locks-"))
# making a tracking store takes MLflow seconds; the tests that are about curves switch them on
os.environ.setdefault("SFT_LIVE_RUN", "off")

LONGEST_FIRST = (
    "tests/test_pipeline.py",
    "launch/test_processes.py",
    "test_sweep.py",
    "sft/test_processes.py",
    "test_trainer.py",
    "test_trajectory.py",
    "test_remotes.py",
)
"""Ends of the paths of files that take long: begun last, one of them would keep a process busy while others idle."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take longest first; a process of pytest-xdist runs a file as a whole."""
    ranks = {name: rank for rank, name in enumerate(LONGEST_FIRST)}

    def rank(item: pytest.Item) -> int:
        path = item.path.as_posix()
        return next((ranks[name] for name in ranks if path.endswith(f"/{name}")), len(ranks))

    items.sort(key=rank)


def pytest_collection_finish() -> None:
    """Keep garbage collections short: accelerate and GPTQModel collect after every training or layer.

    Each of them would look through the million objects of the imported libraries, which are never garbage.
    """
    gc.collect()
    gc.freeze()
