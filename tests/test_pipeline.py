"""The whole pipeline, for real, on a tiny model: the real dvc, the real stages, the files that they write."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from stages.__main__ import STAGES as STAGE_COMMANDS
from tests.tiny import tiny_model, tiny_tokenizer

STAGES = list(STAGE_COMMANDS)

ROOT = Path(__file__).resolve().parent.parent
CHANGES: dict[str, dict[str, Any]] = {
    "load": {"max_dropped_fraction": 0.5, "rehearsal": None},
    "pack": {"max_length": 1024},
    # all that golden losses hang on, whatever the shipped values become
    "train": {
        "learning_rate": 5e-3,
        "max_steps": 12,
        "per_device_train_batch_size": 2,
        "warmup_ratio": 0.1,
        "adam_beta2": 0.999,
        "logging_steps": 2,
        "eval_steps": 12,
        "save_steps": 2,
    },
    "quantize": {"group_size": 32, "num_calibration_rows": 2, "calibration_length": 64},
    "evaluate": {
        "num_rows": 3,
        "batch_size": 3,
        "max_new_tokens": 8,
        "gate": ["tuned.loss < base.loss"],
        "gate_needs": "value",
        "test": None,
    },
}
pytestmark = pytest.mark.timeout(280)
SFT = "import sys; from stages.__main__ import console; sys.exit(console())"


def environment() -> dict[str, str]:
    """Like a user's shell in the project's environment, one thread a process."""
    tools = str(Path(sys.executable).parent)
    quiet = {"DVC_NO_ANALYTICS": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "GIT_CONFIG_GLOBAL": os.devnull}
    return {**os.environ, **quiet, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}


def call(project: Path, *command: str, code: int = 0) -> str:
    """Run a command in the project and return what it printed; another exit code than expected fails the test."""
    result = subprocess.run(command, cwd=project, env=environment(), capture_output=True, text=True)
    assert result.returncode == code, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout + result.stderr


def change_params(project: Path, changes: dict[str, dict[str, Any]]) -> None:
    """Set values in params.yaml, keeping the rest as it is."""
    yaml = YAML()
    file = project / "params.yaml"
    values = yaml.load(file.read_text(encoding="utf-8"))
    for section, entries in changes.items():
        values[section].update(entries)
    with file.open("w", encoding="utf-8") as stream:
        yaml.dump(values, stream)


def order(number: int) -> dict[str, Any]:
    """A row of the kind that the embedded data set has, shorter, and of this file's own: golden losses hang on it."""
    product, city = ("lamp", "chair", "dog")[number % 3], ("London", "Paris")[number % 2]
    return {
        "messages": [
            {"role": "user", "content": f"I would like to order {number + 2} {product}s, please. Ada, {city}"},
            {"role": "assistant", "content": json.dumps({"city": city, "items": {product: number + 2}})},
        ]
    }


def make_project(folder: Path) -> Path:
    """A checkout of this repository's code and graph, with a tiny base model and a few rows."""
    folder.mkdir()
    for name in ("sft", "stages", "tasks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", "params.yaml", ".dvcignore", ".gitignore"):
        shutil.copyfile(ROOT / name, folder / name)
    (folder / "data").mkdir()
    for split, numbers in (("train", range(24)), ("eval", range(24, 30))):
        lines = [json.dumps(order(number)) + "\n" for number in numbers]
        (folder / "data" / f"shop_{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    base = folder / "base"
    tiny_model(hidden_size=32, intermediate_size=96).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    change_params(folder, {**CHANGES, "model": {"name_or_path": "base"}})
    for command in (["git", "init", "-q"], ["dvc", "init", "-q"], ["git", "add", "-A"]):
        call(folder, *command)
    call(folder, "git", "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "-qm", "start")
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which `dvc repro` has run once."""
    folder = make_project(tmp_path_factory.mktemp("pipeline") / "project")
    (folder.parent / "repro.log").write_text(call(folder, "dvc", "repro"), encoding="utf-8")
    return folder


def would_run(project: Path) -> list[str]:
    """Stages that `dvc repro` would run: those whose own inputs changed, and those that read what these write."""
    changed = re.findall(r"Running stage '(\w+)'", call(project, "dvc", "repro", "--dry"))
    stages = YAML(typ="safe", pure=True).load((project / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    written: set[str] = set()
    for name, stage in stages.items():
        reads = any(dep == out or dep.startswith(f"{out}/") for dep in stage["deps"] for out in written)
        if reads and name not in changed:
            changed.append(name)
        if name in changed:
            written |= set(stage["outs"])
    return changed


def files_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def read_metrics(project: Path, stage: str) -> dict[str, Any]:
    return json.loads((project / "reports" / "metrics" / f"{stage}.json").read_text(encoding="utf-8"))


def test_every_stage_writes_its_outs_and_figures(project: Path) -> None:
    assert sorted(path.name for path in (project / "outs").iterdir()) == sorted(STAGES)
    assert files_below(project / "reports" / "metrics") == sorted(f"{stage}.json" for stage in STAGES[:-1])
    assert files_below(project / "outs" / "load") == [
        "base_model.json",
        "card.json",
        "eval.jsonl",
        "images/index.json",
        "ledger.jsonl",
        "rehearsal/summary.json",
        "train.jsonl",
    ]
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= set(
        files_below(project / "outs" / "train" / "model")
    )
    assert "model.safetensors" in files_below(project / "outs" / "merge" / "model")
    assert "model.safetensors" in files_below(project / "outs" / "quantize" / "model")
    assert (project / "reports" / "report.html").stat().st_size > 10_000


def test_dvc_warns_of_nothing(project: Path) -> None:
    """No file that a stage reads is empty, although no row has an image and `format` has dropped none."""
    assert (project / "outs" / "format" / "ledger.jsonl").stat().st_size == 0
    assert "WARNING" not in (project.parent / "repro.log").read_text(encoding="utf-8")


def warnings_of_serve(project: Path) -> str:
    """Start `serve` and return what it prints before it loads the model."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "stages", "serve", "--port", port]
    with subprocess.Popen(
        command, cwd=project, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as served:
        assert served.stdout is not None
        lines: list[str] = []
        for line in served.stdout:
            lines.append(line)
            if line.startswith(("loading ", "error: ")):
                break
        served.terminate()
        served.stdout.read()
    return "".join(lines)


def shown_by(project: Path, tool: str) -> str:
    """What a tool prints that shows a result of the pipeline."""
    return warnings_of_serve(project) if tool == "serve" else call(project, sys.executable, "-m", "stages", tool)


SHOWING = ("preview", "chat", "serve", "summary")


@pytest.mark.parametrize("tool", SHOWING)
def test_result_that_is_older_than_params_is_shown_with_a_warning(project: Path, tool: str) -> None:
    assert "warning:" not in shown_by(project, tool)
    kept = (project / "params.yaml").read_text(encoding="utf-8")
    try:
        change_params(project, {"pack": {"max_length": 512}})
        shown = shown_by(project, tool)
    finally:
        (project / "params.yaml").write_text(kept, encoding="utf-8")
    assert "warning: outs/pack is older than params.yaml: pack.max_length was 1024 and is 512 now" in shown


@pytest.mark.parametrize("tool", SHOWING[1:])
def test_result_that_is_older_than_a_failed_stage_is_shown_with_a_warning(
    project: Path, tmp_path: Path, tool: str
) -> None:
    """`pack` has run with other values, `train` has failed, and its former result came back."""
    copy = tmp_path / "copy"
    shutil.copytree(project, copy, symlinks=True)
    change_params(copy, {"pack": {"max_length": 512}})
    with (copy / "stages" / "train.py").open("a", encoding="utf-8") as code:
        code.write('\nraise ValueError("fails")\n')
    assert "error: fails" in call(copy, sys.executable, "-c", SFT, "train", code=1)
    assert (copy / "outs" / "train" / "model").is_dir()
    shown = shown_by(copy, tool)
    assert "warning: outs/train was made from an earlier outs/pack" in shown
    assert "has not succeeded with the present one" in shown


def test_no_stage_leaves_half_written_files(project: Path) -> None:
    leftovers = [name for name in files_below(project) if ".partial" in name and not name.startswith(".dvc/")]
    assert leftovers == []


def test_losses_are_the_golden_ones(project: Path) -> None:
    train, evaluate = read_metrics(project, "train"), read_metrics(project, "evaluate")
    golden = json.loads((ROOT / "tests" / "golden_losses.json").read_text(encoding="utf-8"))
    assert train["loss"] == pytest.approx(golden["train"], rel=1e-3)
    for name in ("base", "tuned", "merged"):
        assert evaluate[name]["loss"] == pytest.approx(golden[name], rel=1e-3), name
    assert evaluate["merged"]["loss"] == pytest.approx(evaluate["tuned"]["loss"], rel=1e-5)
    assert evaluate["tuned"]["loss"] < evaluate["base"]["loss"]


def test_a_second_repro_runs_nothing_and_touches_nothing(project: Path) -> None:
    outs = [f"outs/{name}" for name in files_below(project / "outs")]
    before = {name: (project / name).stat().st_mtime_ns for name in outs}
    output = call(project, "dvc", "repro")
    assert re.findall(r"Stage '(\w+)' didn't change, skipping", output) == STAGES
    after = {name: (project / name).stat().st_mtime_ns for name in before}
    assert after == before
    assert call(project, "git", "status", "--porcelain", "--untracked-files=no", "dvc.yaml", "params.yaml") == ""


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({"train": {"learning_rate": 1e-3}}, "train"),
        ({"format": {"chat_template": "zephyr"}}, "format"),
        ({"pack": {"max_length": 512}}, "pack"),
        ({"quantize": {"bits": 8}}, "quantize"),
        ({"evaluate": {"max_new_tokens": 9}}, "evaluate"),
        ({"publish": {"experiment": "other"}}, "publish"),
    ],
)
def test_a_changed_value_runs_only_what_depends_on_it(
    project: Path, changes: dict[str, dict[str, Any]], first: str
) -> None:
    kept = (project / "params.yaml").read_text(encoding="utf-8")
    try:
        change_params(project, changes)
        assert sorted(would_run(project)) == sorted(STAGES[STAGES.index(first) :])
    finally:
        (project / "params.yaml").write_text(kept, encoding="utf-8")


def test_a_changed_row_runs_everything_and_a_note_beside_the_data_nothing(project: Path) -> None:
    rows = project / "data" / "shop_train.jsonl"
    kept = rows.read_text(encoding="utf-8")
    try:
        (project / "data" / "NOTES.md").write_text("a note\n", encoding="utf-8")
        assert would_run(project) == []
        rows.write_text("".join(kept.splitlines(keepends=True)[:-1]), encoding="utf-8")
        assert sorted(would_run(project)) == sorted(STAGES)
    finally:
        rows.write_text(kept, encoding="utf-8")


def test_a_changed_metric_of_ones_own_evaluates_again_and_trains_nothing(project: Path) -> None:
    file = project / "tasks" / "shop.py"
    kept = file.read_text(encoding="utf-8")
    try:
        file.write_text(kept + "\n# changed\n", encoding="utf-8")
        assert sorted(would_run(project)) == ["evaluate", "publish"]
    finally:
        file.write_text(kept, encoding="utf-8")
    assert would_run(project) == []


def test_results_come_back_after_a_refused_value(project: Path) -> None:
    before = {path: path.read_bytes() for path in (project / "outs" / "evaluate").iterdir()}
    report = (project / "reports" / "report.html").read_bytes()
    kept = (project / "params.yaml").read_text(encoding="utf-8")
    try:
        change_params(project, {"evaluate": {"gate": ["tuned.los <= base.loss"]}})
        assert "did you mean" in call(project, "dvc", "repro", code=255)
    finally:
        (project / "params.yaml").write_text(kept, encoding="utf-8")
    output = call(project, "dvc", "repro")  # DVC deletes outs before a stage can refuse, and has them in its cache
    assert "is cached" in output
    assert {path: path.read_bytes() for path in (project / "outs" / "evaluate").iterdir()} == before
    assert (project / "reports" / "report.html").read_bytes() == report
    assert read_metrics(project, "evaluate")
    assert would_run(project) == []


def test_training_killed_and_resumed_ends_with_the_same_bytes(project: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(project, copy, ignore=shutil.ignore_patterns(".dvc", ".git", ".state"))
    for stage in ("train", "merge", "quantize", "evaluate"):
        shutil.rmtree(copy / "outs" / stage)
    command = [sys.executable, "-m", "stages", "train"]
    process = subprocess.Popen(command, cwd=copy, env=environment(), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((copy / ".state" / "train").glob("*/checkpoint-4/trainer_state.json")):
        assert process.poll() is None, "training ended before it could be killed"
        assert time.monotonic() < deadline, "no checkpoint in two minutes"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (copy / "outs" / "train" / "model").exists()
    output = call(copy, *command)
    assert re.search(r"resuming from checkpoint-\d+", output)
    for name in ("model/adapter_model.safetensors", "curve.csv"):
        assert (copy / "outs" / "train" / name).read_bytes() == (project / "outs" / "train" / name).read_bytes(), name
    assert read_metrics(copy, "train") == read_metrics(project, "train")
