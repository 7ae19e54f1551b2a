"""Checkpoints: resumed only if valid and of the same training; a killed training ends as an uninterrupted one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import sft
from stages.checkout.artifacts import read_json, write_json
from stages.checkout.paths import Paths
from stages.params.schema import Params, load_params
from stages.training.checkpoints import SEAL, TrainingState, explaining_full_disk, seal, what_is_wrong
from tests.stages.training_root import REPO, environment, make_training_root, run_stage


def params(**section: Any) -> Params:
    values = load_params(REPO / "params.yaml").model_dump()
    launch = section.pop("launch", {})
    values["train"] |= section
    values["train"]["launch"] |= launch
    return Params.model_validate(values)


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    paths = Paths(tmp_path)
    write_json(paths.out("load", "base_model.json"), {"digest": "a"})
    write_json(paths.out("pack", "train", "data.json"), [1])
    return paths


def checkpoint(state: TrainingState, step: int, *, sealed: bool = True) -> Path:
    folder = state.folder / f"checkpoint-{step}"
    (folder / "optimizer_0").mkdir(parents=True)
    save_file({"weight": torch.arange(100.0)}, folder / "model.safetensors")
    torch.save({"step": step}, folder / "optimizer.pt")
    (folder / "optimizer_0" / "part").write_bytes(bytes(100))
    (folder / "trainer_state.json").write_text("{}")
    if sealed:
        seal(folder)
    return folder


def test_newest_whole_checkpoint_is_resumed_and_half_written_ones_are_removed(paths: Paths) -> None:
    state = TrainingState.open(params(), paths)
    checkpoint(state, 20)
    newest = checkpoint(state, 100)
    broken = checkpoint(state, 120, sealed=False)
    assert state.last_checkpoint() == newest
    assert not broken.exists()


def damages(folder: Path) -> Iterator[tuple[str, str]]:
    """Damage one file after the other; yield its name and words of the message."""
    for name in ("model.safetensors", "optimizer.pt", "trainer_state.json", "optimizer_0/part"):
        file = folder / name
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        yield name, "bytes instead of"
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        yield name, "is damaged"
        file.unlink()
        yield name, "is missing"
        file.write_bytes(content)
        assert what_is_wrong(folder) is None


def test_a_truncated_altered_or_missing_file_is_noticed(paths: Paths) -> None:
    folder = checkpoint(TrainingState.open(params(), paths), 20)
    found = 0
    for name, said in damages(folder):
        problem = what_is_wrong(folder)
        assert problem is not None
        assert problem.startswith(name)
        assert said in problem
        found += 1
    assert found == 12
    (folder / SEAL).write_text("{")
    assert what_is_wrong(folder) == "seal.json is damaged"


def test_a_checkpoint_of_another_training_or_step_is_not_gone_on_from(paths: Paths) -> None:
    state, other = (TrainingState.open(params(learning_rate=rate), paths) for rate in (1e-3, 2e-3))
    own = checkpoint(state, 20)
    foreign = shutil.copytree(checkpoint(other, 40), state.folder / "checkpoint-40")
    renamed = shutil.copytree(own, state.folder / "checkpoint-60")
    assert what_is_wrong(foreign) == f"it is checkpoint-40 of training {other.folder.name}, moved here by hand"
    assert what_is_wrong(renamed) == f"it is checkpoint-20 of training {state.folder.name}, moved here by hand"
    assert state.last_checkpoint() == own
    assert not foreign.exists()


def test_how_many_processes_share_an_update_does_not_matter_but_how_large_it_is_does(paths: Paths) -> None:
    folders = [
        TrainingState.of(params(**values), paths).folder
        for values in (
            {"per_device_train_batch_size": 8},
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
            {"per_device_train_batch_size": 4, "launch": {"processes": 2}},
            {"per_device_train_batch_size": 8, "launch": {"processes": 2}},
            {"per_device_train_batch_size": 8, "launch": {"engine": "fsdp2"}},
        )
    ]
    assert folders[0] == folders[1] == folders[2]
    assert len(set(folders)) == 3


@pytest.mark.parametrize("what", ["rate", "rows", "base"])
def test_other_params_rows_or_base_do_not_see_the_checkpoints(paths: Paths, what: str) -> None:
    checkpoint(TrainingState.open(params(), paths), 20)
    if what == "rows":
        write_json(paths.out("pack", "train", "data.json"), [2])
    if what == "base":
        write_json(paths.out("load", "base_model.json"), {"digest": "b"})
    changed = params(learning_rate=params().train.learning_rate / 2) if what == "rate" else params()
    assert TrainingState.open(changed, paths).last_checkpoint() is None


@pytest.mark.parametrize("place", ["labels.py", "rooms/deep/loss.py"])
def test_code_anywhere_in_the_library_is_part_of_what_a_checkpoint_belongs_to(
    paths: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    library = tmp_path / "elsewhere" / "sft"
    for name in ("__init__.py", "labels.py", "rooms/deep/loss.py", "rooms/deep/labels.py"):
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text(f"# {name}\n")
    monkeypatch.setattr(sft, "__file__", str(library / "__init__.py"))
    before = TrainingState.of(params(), paths).folder
    (library / place).write_text("# changed\n")
    assert TrainingState.of(params(), paths).folder != before


def test_a_finished_training_is_cleared_away_by_the_next_one_not_by_itself(paths: Paths) -> None:
    first = TrainingState.open(params(), paths)
    checkpoint(first, 20)
    first.mark_finished()
    assert TrainingState.open(params(), paths).last_checkpoint() is not None
    TrainingState.open(params(seed=1), paths)
    assert not first.folder.exists()


def test_an_unfinished_training_survives_another_one(paths: Paths) -> None:
    first = TrainingState.open(params(), paths)
    checkpoint(first, 20)
    TrainingState.open(params(seed=1), paths)
    assert TrainingState.open(params(), paths).last_checkpoint() is not None


@pytest.mark.timeout(400)
@pytest.mark.slow
@pytest.mark.parametrize("num_kills", [3, 10])
def test_a_training_killed_many_times_ends_as_one_that_never_was(tmp_path: Path, num_kills: int) -> None:
    # logging and saving at different steps, and all that draws random numbers
    values = {"max_steps": 12 * num_kills, "logging_steps": 3, "save_steps": 2, "eval_steps": 8, "lora_dropout": 0.1}
    whole, killed = (
        make_training_root(tmp_path / name, neftune_noise_alpha=5.0, **values) for name in ("whole", "killed")
    )
    run_stage(whole)
    result = subprocess.run(
        [sys.executable, "-m", "tests.stages.kill_loop", str(killed.root), str(num_kills), "7"],
        cwd=REPO,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=380,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("killed after") == num_kills, result.stdout
    assert result.stdout.count("resuming from") >= 0.6 * num_kills, result.stdout
    for name in ("model/adapter_model.safetensors", "curve.csv"):
        assert killed.out("train", name).read_bytes() == whole.out("train", name).read_bytes(), name
    assert read_json(killed.metrics("train")) == read_json(whole.metrics("train"))


SMALL = 20 * 2**20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of twenty megabytes."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SMALL}", "tmpfs", folder]
    if os.geteuid() != 0 or subprocess.run(mount).returncode:
        pytest.skip("only root can mount a small file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_full_disk_leaves_the_last_whole_checkpoint_from_which_the_same_weights_are_reached(
    tmp_path: Path, small_disk: Path
) -> None:
    whole = make_training_root(tmp_path / "whole", max_steps=20, save_steps=1, lora_dropout=0.1)
    run_stage(whole)
    paths = make_training_root(tmp_path / "root", max_steps=20, save_steps=1, lora_dropout=0.1)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(SMALL - 300_000))

    output = run_stage(paths, code=1, SFT_STATE_DIR=str(small_disk))

    said = output.rpartition("train: ")[2].splitlines()
    errors = [line for line in said if line.startswith("error: ")]
    assert len(errors) == 1, output
    assert "no space left for a checkpoint" in errors[0]
    assert "Traceback" not in output
    kept = sorted((small_disk / "train").glob("*/checkpoint-*"), key=lambda path: int(path.name[11:]))
    assert f"{kept[-1].name} is complete" in errors[0]
    assert all(what_is_wrong(checkpoint) is None for checkpoint in kept)
    assert not paths.out("train").exists()

    ballast.unlink()
    assert f"resuming from {kept[-1].name}" in run_stage(paths, SFT_STATE_DIR=str(small_disk))
    for name in ("model/adapter_model.safetensors", "curve.csv"):
        assert paths.out("train", name).read_bytes() == whole.out("train", name).read_bytes(), name
    assert read_json(paths.metrics("train")) == read_json(whole.metrics("train"))


def test_other_errors_than_a_full_disk_pass_unchanged(paths: Paths) -> None:
    with pytest.raises(RuntimeError, match="something else"), explaining_full_disk(TrainingState.open(params(), paths)):
        raise RuntimeError("something else")
