"""TensorBoard, W&B (offline) and Trackio get the curve of a training; a resumed training repeats no point."""

from __future__ import annotations

import importlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from stages import train
from stages.params.schema import load_params
from stages.tracking.trackers import PACKAGES, SENT, TrackedRun, Trackers, check_trackers
from tests.stages.training_root import make_training_root

POINTS = {
    ("train/loss", 1): 2.5,
    ("eval/loss", 1): 2.25,
    ("train/loss", 2): 1.5,
    ("train/loss", 3): 0.5,
}


def tracked_run(root: Path) -> TrackedRun:
    (root / "state").mkdir(exist_ok=True)
    params = {"train.learning_rate": 0.001, "train.method": "lora"}
    return TrackedRun("tiny-0123", "our-project", params, root / "trackers", root / "state")


def write(trackers: Trackers, *steps: int) -> None:
    """Two log lines at step 1, one at each of the others, as a training has them."""
    for column, step in [("loss", 1), ("eval_loss", 1), ("loss", 2), ("loss", 3)]:
        name = {"loss": "train/loss", "eval_loss": "eval/loss"}[column]
        if step in steps:
            trackers.log({column: POINTS[name, step]}, step, 0)


def read_tensorboard(root: Path) -> dict[tuple[str, int], float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (root / "trackers" / "tensorboard").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    points = [(name, point.step, point.value) for name in events.Tags()["scalars"] for point in events.Scalars(name)]
    assert len({point[:2] for point in points}) == len(points)
    return {(name, step): value for name, step, value in points}


def read_wandb(root: Path) -> dict[tuple[str, int], float]:
    """Read the records of the files: after a header of 7 bytes, each has a checksum, its length and its kind."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # as at the end of a process: waits until all files are written
    points: list[tuple[str, int, float]] = []
    for file in sorted((root / "trackers" / "wandb").glob("offline-run-*/run-*.wandb")):
        content, place = file.read_bytes(), 7
        while place + 7 <= len(content):
            _, length, kind = struct.unpack("<IHB", content[place : place + 7])
            assert kind == 1, "small files have whole records only"
            record = Record.FromString(content[place + 7 : place + 7 + length])
            for item in record.history.item:
                name = item.key or ".".join(item.nested_key)
                if not name.startswith("_"):
                    points.append((name, record.history.step.num, json.loads(item.value_json)))
            place += 7 + length
    assert len({point[:2] for point in points}) == len(points)
    return {(name, step): value for name, step, value in points}


def read_trackio(root: Path) -> dict[tuple[str, int], float]:
    from trackio.sqlite_storage import SQLiteStorage

    rows = SQLiteStorage.get_logs("our-project", "tiny-0123")
    points = [(name, row["step"], value) for row in rows for name, value in row.items() if "/" in name]
    assert len({point[:2] for point in points}) == len(points)
    return {(name, step): value for name, step, value in points}


READ: dict[str, Any] = {"tensorboard": read_tensorboard, "wandb": read_wandb, "trackio": read_trackio}


@pytest.mark.parametrize("name", PACKAGES)
def test_a_tracker_gets_every_point_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip(name, reason=f"the extra {name} is not installed")
    if name == "trackio":  # another test may have imported it with another folder
        for module in ("trackio.utils", "trackio.sqlite_storage"):
            monkeypatch.setattr(importlib.import_module(module), "TRACKIO_DIR", tmp_path / "trackio")
    first = Trackers(["mlflow", name, name], tracked_run(tmp_path))
    write(first, 1, 2)
    first.close()
    resumed = Trackers([name], tracked_run(tmp_path))  # from a checkpoint of step 1
    write(resumed, 1, 2, 3)
    resumed.close()
    assert READ[name](tmp_path) == POINTS
    sent = json.loads((tmp_path / "state" / SENT).read_text())
    assert sent == {name: {"train/loss": 3, "eval/loss": 1}}


def test_a_missing_package_and_a_missing_key_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.tracking.trackers.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^train\.report_to: the package trackio .* pip install trackio, or"):
        check_trackers(["mlflow", "trackio"])
    check_trackers(["mlflow"])
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    for variable in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"^train\.report_to: wandb has no key on this machine: set WANDB_API_KEY"):
        Trackers(["wandb"], tracked_run(tmp_path))


def test_a_training_reports_to_tensorboard_outside_its_outs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    paths = make_training_root(tmp_path, report_to=["tensorboard"], max_steps=4)
    train.run(load_params(paths.params), paths)
    (folder,) = (tmp_path / ".state" / "trackers" / "tensorboard").iterdir()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    assert [point.step for point in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [point.step for point in events.Scalars("eval/loss")] == [4]
    assert not list(paths.out("train").rglob("*tfevents*"))
