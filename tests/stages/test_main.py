"""A user's mistake gives one message and an exit code: no traceback, nothing overwritten, nothing expensive started."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from stages.__main__ import STAGES, main
from tests.stages.data_root import ROOT, ROWS, DataRoot


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataRoot:
    """A checkout with usable data, model and params, and an earlier result of `load`."""
    monkeypatch.setenv("SFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    root = DataRoot(tmp_path / "checkout")
    root.write("train.jsonl", ROWS)
    change(root)
    earlier = root.paths.out("load", "train.jsonl")
    earlier.parent.mkdir(parents=True)
    earlier.write_text("earlier\n")
    return root


def change(root: DataRoot, **sections: dict[str, Any]) -> None:
    """Write params.yaml with other values."""
    values = YAML(typ="safe", pure=True).load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    values["model"]["name_or_path"] = str(root.model)
    values["load"] |= {"sources": [{"path": "data/train.jsonl"}], "eval": {"path": None, "fraction": 0.3}}
    for section, entries in sections.items():
        values[section] |= entries
    with root.paths.params.open("w", encoding="utf-8") as file:
        YAML().dump(values, file)


def run(root: DataRoot, capsys: pytest.CaptureFixture[str], stage: str = "load") -> tuple[int, str]:
    code = main([stage, "--root", str(root.paths.root)])
    return code, capsys.readouterr().err


def refused(root: DataRoot, capsys: pytest.CaptureFixture[str], code: int, *parts: str) -> None:
    """The message has these parts, the code is right, and the earlier result is still there."""
    found, message = run(root, capsys)
    assert found == code, message
    assert message.startswith("error: ")
    assert "Traceback" not in message
    for part in parts:
        assert part in message
    assert root.paths.out("load", "train.jsonl").read_text() == "earlier\n"


def test_unknown_key_and_wrong_type(root: DataRoot, capsys: pytest.CaptureFixture[str]) -> None:
    change(root, train={"lerning_rate": 1}, pack={"max_length": "long"})
    refused(root, capsys, 2, "did you mean 'learning_rate'?", "pack.max_length", "'long'")


def test_missing_params_file(root: DataRoot, capsys: pytest.CaptureFixture[str]) -> None:
    root.paths.params.unlink()
    refused(root, capsys, 2, "params.yaml: no such file")


def test_a_gate_on_something_that_is_not_measured(root: DataRoot, capsys: pytest.CaptureFixture[str]) -> None:
    change(root, evaluate={"gate": ["tuned.exactmatch >= 0.5"]})
    refused(root, capsys, 2, "evaluate.gate", "did you mean tuned.exact_match?")


def test_missing_data_file(root: DataRoot, capsys: pytest.CaptureFixture[str]) -> None:
    change(root, load={"sources": [{"path": "data/trian.jsonl"}]})
    refused(root, capsys, 1, "data/trian.jsonl", "load.sources")


def test_broken_json_line_is_named_by_file_and_line(root: DataRoot, capsys: pytest.CaptureFixture[str]) -> None:
    file = root.paths.data / "train.jsonl"
    lines = file.read_text().splitlines()
    lines[2] = lines[2][:-4]
    file.write_text("\n".join(lines) + "\n")
    refused(root, capsys, 1, "train.jsonl:3")


def test_empty_data_set(root: DataRoot, capsys: pytest.CaptureFixture[str]) -> None:
    (root.paths.data / "train.jsonl").write_text("")
    refused(root, capsys, 1, "train.jsonl")


def test_base_model_that_does_not_exist(root: DataRoot, capsys: pytest.CaptureFixture[str]) -> None:
    change(root, model={"name_or_path": "no-such-org/no-such-model"})
    refused(root, capsys, 1, "no-such-org/no-such-model", "model.name_or_path")


def test_data_without_a_trainable_token(root: DataRoot, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"messages": [{**message, "train": False} for message in row["messages"]]} for row in ROWS]
    root.write("train.jsonl", rows)
    assert run(root, capsys)[0] == 0
    code, message = run(root, capsys, "format")
    assert code == 1
    assert "train" in message
    assert not root.paths.out("format").exists()


def test_summary_before_the_first_run_says_what_to_type(root: DataRoot, capsys: pytest.CaptureFixture[str]) -> None:
    code, message = run(root, capsys, "summary")
    assert code == 1
    assert "sft repro" in message


def test_an_unknown_stage_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["lode"])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert [stage for stage in STAGES if stage not in message] == []


def test_an_interrupted_stage_says_so_in_one_line(
    root: DataRoot, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("stages.load.run", interrupted)
    assert run(root, capsys) == (130, "stopped: load. Type the command again to go on.\n")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded", "/somewhere/rows.jsonl"),
        Exception("No space left on device (os error 28)"),  # as tokenizers and safetensors say it
        RuntimeError("(sqlite3.OperationalError) database or disk is full"),
    ],
)
def test_a_full_disk_is_one_message_and_leaves_no_half_of_a_file(
    root: DataRoot, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    before = sorted(root.paths.root.rglob("*"))

    def fill(path: Path, text: str, encoding: str) -> None:
        path.write_bytes(text.encode()[:10])
        raise error

    monkeypatch.setattr("pathlib.Path.write_text", fill)
    refused(root, capsys, 1, "no space left on the disk: `load` could not write", "Free some space")
    left = [path for path in root.paths.root.rglob("*") if path.is_file() and path not in before]
    assert left == []


def test_an_error_of_the_code_keeps_its_traceback(root: DataRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down(*arguments: object) -> None:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr("stages.load.run", break_down)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        main(["load", "--root", str(root.paths.root)])
