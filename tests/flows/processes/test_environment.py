"""Every flow module prepares Prefect's environment before it imports Prefect."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from flows.processes.environment import ROOT, prefect_home

PRINT_HOME = "import flows.{name}; from prefect.settings import PREFECT_HOME; print(PREFECT_HOME.value())"


@pytest.mark.parametrize("name", ["pipeline", "sweep", "nightly", "cleanup"])
def test_flow_uses_the_prefect_home_of_its_checkout(name: str) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
    command = [sys.executable, "-c", PRINT_HOME.format(name=name)]
    printed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(prefect_home(ROOT))
