"""What users of the library see when they import it: nothing."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


CODE = """
from sft import *
import sft
for name in sft.__all__:
    getattr(sft, name)
"""


def test_a_bare_script_that_imports_the_library_prints_nothing(tmp_path: Path) -> None:
    """Among what is imported are torch, transformers, peft and bitsandbytes."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONWARNINGS", None)
    run = subprocess.run(
        [sys.executable, "-c", CODE], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())
