"""A long training uses no more memory, files or threads at its end than at its beginning."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NUM_STEPS, WARM_UP = 2600, 600


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_memory_files_and_threads_stay_flat_over_two_thousand_steps(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tests.sft.long_training", str(tmp_path), str(NUM_STEPS)],
        cwd=ROOT,
        # freed memory is returned to the system at once, so that only memory in use is measured
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MALLOC_TRIM_THRESHOLD_": "0"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [line.removeprefix("FIGURES ") for line in result.stdout.splitlines() if line.startswith("FIGURES ")]
    figures = {entry["step"]: entry for entry in map(json.loads, lines)}
    first, last = figures[WARM_UP], figures[NUM_STEPS]
    # single readings are off by 1 % when a buffer happens to be in use, or not
    early, late = (
        statistics.median(figures[step]["bytes"] for step in steps)
        for steps in (range(WARM_UP, WARM_UP + 1000, 200), range(NUM_STEPS - 800, NUM_STEPS + 1, 200))
    )
    print(f"median of steps {WARM_UP} to {WARM_UP + 800}: {early:,} bytes; of the last 800: {late / early - 1:+.2%}")
    assert late < 1.01 * early, figures
    assert last["files"] <= first["files"]
    assert last["threads"] <= first["threads"]
