"""A training in several processes (over gloo) makes the same updates and logs the same figures as in one process."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from sft.batches.layout import FILLER
from sft.train.processes import EvenCollator, EvenRows
from tests.sft.rank_training import CHECKPOINTS, FIGURES, NAMES, NUM_STEPS, ROWS, train

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run(file: Path, processes: int, per_device: int, accumulation: int, **variables: str) -> dict[str, Any]:
    """Run all trainings in so many processes with one thread each."""
    launcher = ["torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={free_port()}", "-m"]
    command = [*(launcher if processes > 1 else []), "tests.sft.rank_training", str(file)]
    result = subprocess.run(
        [sys.executable, "-m", *command, str(per_device), str(accumulation), *NAMES],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr[-6000:]
    return torch.load(file, weights_only=True)


@cache
def whole_batches() -> dict[str, Any]:
    """What all trainings give in one process, this one."""
    return {name: train(name, per_device=8, accumulation=1) for name in NAMES}


LAYOUTS = [
    pytest.param((1, 1, 8), id="accumulated", marks=pytest.mark.slow),
    pytest.param((2, 4, 1), id="two processes"),
    pytest.param((2, 2, 2), id="two processes, accumulated", marks=pytest.mark.slow),
    pytest.param((4, 2, 1), id="four processes", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_weights_do_not_depend_on_the_number_of_processes(
    tmp_path_factory: pytest.TempPathFactory, layout: tuple[int, int, int]
) -> None:
    expected = whole_batches()
    found = run(tmp_path_factory.mktemp("parts") / "parts.pt", *layout)
    assert_same(found, expected)


SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
}


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.parametrize("copies", [1, 2])
def test_weights_in_two_parts_and_their_copies_give_the_same_losses_and_weights(tmp_path: Path, copies: int) -> None:
    variables = {**SHARDED, "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": str(copies)}
    found = run(tmp_path / "parts.pt", 2 * copies, 4 // copies, 1, **variables)
    assert_same(found, whole_batches(), weights_within=1e-4)  # AdamW enlarges the rounding of small gradients


def test_rows_in_two_parts_are_refused_in_two_processes(tmp_path: Path) -> None:
    variables = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_CP_SIZE": "2"}
    with pytest.raises(AssertionError, match="has cp_size=2"):
        run(tmp_path / "parts.pt", 2, 4, 1, **variables)
    assert not (tmp_path / "parts.pt").exists()


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.parametrize(("before", "after"), [((2, 4, 1), (1, 8, 1)), ((1, 8, 1), (2, 4, 1)), ((2, 4, 1), (4, 2, 1))])
def test_training_is_resumed_with_another_number_of_processes(
    tmp_path_factory: pytest.TempPathFactory, before: tuple[int, int, int], after: tuple[int, int, int]
) -> None:
    expected = whole_batches()
    folder = tmp_path_factory.mktemp("resumed")
    run(folder / "before.pt", *before, **{CHECKPOINTS: str(folder)})
    for name in NAMES:
        assert sorted(path.name for path in (folder / name).glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-20"]
        shutil.rmtree(folder / name / "checkpoint-20")
    found = run(folder / "after.pt", *after, **{CHECKPOINTS: str(folder)})
    assert_same(found, expected)


def assert_same(found: dict[str, Any], expected: dict[str, Any], weights_within: float = 2e-5) -> None:
    for name in NAMES:
        assert len(expected[name]["loss"]) == NUM_STEPS
        assert max(expected[name]["grad_norm"]) > 0.15, "gradients should have been clipped"
        assert expected[name]["loss"][-1] < expected[name]["loss"][0] - 0.1, "nothing was learnt"
        for figure in FIGURES:
            relative = 1e-4 if figure == "grad_norm" else 0.0  # it may be far above 1
            expectation = pytest.approx(expected[name][figure], abs=1e-5, rel=relative)
            assert found[name][figure] == expectation, (name, figure)
        for parameter, value in expected[name]["weights"].items():
            close = {"rtol": 0, "atol": weights_within, "msg": f"{name}: {parameter}"}
            torch.testing.assert_close(found[name]["weights"][parameter], value, **close)
    assert expected["full measured"]["eval_targets"][0] > 0


def test_fillers_come_after_all_rows_and_are_marked() -> None:
    rows = EvenRows(ROWS, 8)
    assert len(rows) == 24
    assert [FILLER in rows[place] for place in range(24)] == [False] * 21 + [True] * 3
    assert rows[20] == ROWS[20]
    assert rows.total_dataset_length == 21


def test_both_names_of_the_labels_of_fillers_are_masked() -> None:
    rows = EvenRows([{"labels": [7, 8]}], 2)
    named = lambda features: {name: torch.tensor([[7, 8]] * len(features)) for name in ("labels", "shift_labels")}  # noqa: E731
    for keep_rows, trained in ((False, [[-100, -100]]), (True, [[7, 8], [-100, -100]])):
        features = [rows[0], rows[1]] if keep_rows else [rows[1]]
        found = EvenCollator(named, keep_rows=keep_rows)(features)
        assert found["labels"].tolist() == found["shift_labels"].tolist() == trained


def test_fillers_are_dropped_from_a_batch_and_nothing_is_trained_in_a_batch_of_fillers_alone() -> None:
    rows = EvenRows([{"labels": [number]} for number in (1, 2, 3)], 4)
    collator = EvenCollator(lambda features: {"labels": torch.tensor([row["labels"] for row in features])})
    assert collator([rows[0], rows[3]])["labels"].tolist() == [[1]]
    empty = collator([rows[3], rows[3]])
    assert empty["labels"].tolist() == [[-100]]
    assert FILLER in empty
    kept = EvenCollator(collator.collator, keep_rows=True)([rows[0], rows[3]])
    assert kept["labels"].tolist() == [[1], [-100]]
