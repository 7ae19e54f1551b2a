"""The artifact of a flow run that compares the result with the champion before it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flows.processes.environment import UiLock
from flows.runs import comparison
from flows.runs.comparison import read_comparison

PAGE = "#/experiments/1/runs/a1/artifacts/reports/since_champion.html?workflowType=machine_learning"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout whose result was compared with a champion."""
    folder = tmp_path / "outs" / "publish"
    folder.mkdir(parents=True)
    (folder / "since_champion.md").write_text("**B is better in 2 of 5 tested figures**\n")
    (folder / "run.json").write_text(json.dumps({"run_id": "a1", "comparison": PAGE}))
    (tmp_path / "params.yaml").write_text("publish: {tracking_uri: 'sqlite:///mlflow.db'}\n")
    monkeypatch.setattr(comparison, "ROOT", tmp_path)
    return tmp_path


def test_link_leads_to_mlflow_through_the_pages_that_are_served_and_has_no_key(root: Path) -> None:
    lock = UiLock(root)
    assert lock.acquire(api_url="http://127.0.0.1:4200/api", mlflow="http://127.0.0.1:5000/key/")
    text = read_comparison(root)
    assert text is not None
    assert text.startswith("**B is better in 2 of 5 tested figures**\n")
    assert text.endswith(f"[Curves and answers of both, in MLflow](http://127.0.0.1:4200/record{PAGE})\n")


def test_link_leads_to_the_server_that_params_name(root: Path) -> None:
    (root / "params.yaml").write_text("publish: {tracking_uri: 'https://mlflow.example/'}\n")
    assert f"](https://mlflow.example/{PAGE})" in str(read_comparison(root))


def test_without_a_server_the_place_is_named(root: Path) -> None:
    assert "`reports/since_champion.html` of the run `a1` in MLflow (`sft ui`)" in str(read_comparison(root))


def test_result_that_is_compared_with_nothing_has_no_text(root: Path) -> None:
    (root / "outs" / "publish" / "since_champion.md").unlink()
    assert read_comparison(root) is None
