"""What preview, chat, serve and summary say of a result that is older than params.yaml or than its inputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from stages.checkout.paths import Paths
from stages.params.schema import Params, load_params
from stages.tools.freshness import find_stale, folder_digest, warn_if_stale
from tests.stages.data_root import ROOT


@pytest.fixture
def params() -> Params:
    return load_params(ROOT / "params.yaml")


@pytest.fixture
def lock(tmp_path: Path, params: Params) -> dict[str, Any]:
    """A dvc.lock as after a run with the shipped params; `train` reads a part of what `pack` wrote."""
    files = {"train/rows.arrow": "11", "eval/rows.arrow": "22"}
    cache = tmp_path / ".dvc" / "cache" / "files" / "md5"
    digest = folder_digest(files)
    (cache / digest[:2]).mkdir(parents=True)
    listing = [{"relpath": name, "md5": md5} for name, md5 in files.items()]
    (cache / digest[:2] / digest[2:]).write_text(json.dumps(listing))
    (tmp_path / ".dvc" / "config").write_text("[core]\n    no_scm = true\n")
    values = params.model_dump(exclude_unset=True)
    return {
        "pack": {"params": {"params.yaml": {"pack": values["pack"]}}, "outs": [{"path": "outs/pack", "md5": digest}]},
        "train": {
            "params": {"params.yaml": {"model": values["model"], "train": values["train"]}},
            "deps": [{"path": "outs/pack/train", "md5": folder_digest({"rows.arrow": "11"})}],
            "outs": [{"path": "outs/train", "md5": "33.dir"}],
        },
        "evaluate": {"deps": [{"path": "outs/train", "md5": "33.dir"}], "outs": []},
    }


def stale(root: Path, lock: dict[str, Any], params: Params, stage: str) -> list[str]:
    with (root / "dvc.lock").open("w", encoding="utf-8") as file:
        YAML(typ="safe").dump({"schema": "2.0", "stages": lock}, file)
    return list(find_stale(params, Paths(root), stage))


def changed(params: Params, section: str, **values: Any) -> Params:
    return params.model_copy(update={section: getattr(params, section).model_copy(update=values)})


def test_present_result_is_not_stale(tmp_path: Path, lock: dict[str, Any], params: Params) -> None:
    assert [stale(tmp_path, lock, params, stage) for stage in lock] == [[], [], []]


def test_value_that_has_changed_since_is_named_with_both_values(
    tmp_path: Path, lock: dict[str, Any], params: Params
) -> None:
    other = changed(params, "pack", max_length=1024)
    reason = "outs/pack is older than params.yaml: pack.max_length was 512 and is 1024 now"
    assert stale(tmp_path, lock, other, "pack") == [reason]
    assert stale(tmp_path, lock, other, "evaluate") == [reason]  # what it reads, directly or not
    assert stale(tmp_path, lock, changed(params, "train", lora_r=8), "pack") == []


def test_result_of_a_stage_that_failed_since_is_told(tmp_path: Path, lock: dict[str, Any], params: Params) -> None:
    """`pack` ran with other data, `train` failed, and its former result came back."""
    lock["train"]["deps"][0]["md5"] = folder_digest({"rows.arrow": "99"})
    (reason,) = stale(tmp_path, lock, params, "evaluate")
    assert reason.startswith("outs/train was made from an earlier outs/pack/train")
    assert stale(tmp_path, lock, params, "pack") == []


def test_nothing_is_said_without_a_record(tmp_path: Path, params: Params) -> None:
    assert list(find_stale(params, Paths(tmp_path), "pack")) == []
    assert stale(tmp_path, {}, params, "pack") == []


def test_warning_names_the_command(
    tmp_path: Path, lock: dict[str, Any], params: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    stale(tmp_path, lock, params, "pack")
    assert warn_if_stale(changed(params, "pack", max_length=1024), Paths(tmp_path), "pack")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "`sft pack` makes it anew" in printed.err
