from __future__ import annotations

from pathlib import Path

import pytest

from flows.runs.graph import RunRefused, read_plan


def test_plan_is_the_topological_order_of_dvc_yaml(project: Path) -> None:
    plan = read_plan(project)

    assert plan.names == ["load", "pack", "train"]
    assert [sorted(stage.upstream) for stage in plan.stages] == [[], ["load"], ["pack"]]
    assert [stage.params for stage in plan.stages] == [("load",), ("pack",), ("train",)]


def test_stage_that_depends_on_all_of_params_uses_the_section_of_its_name(project: Path) -> None:
    text = (project / "dvc.yaml").read_text()
    (project / "dvc.yaml").write_text(text.replace("params: [train]", "params: [params.yaml: ]"))

    assert read_plan(project).stages[-1].params == ("train",)


def test_sources_are_what_no_stage_writes(project: Path) -> None:
    assert [stage.sources for stage in read_plan(project).stages] == [("data",), ("pack.sh",), ("train.sh",)]


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        (None, None, ["load", "pack", "train"]),
        ("pack", None, ["pack", "train"]),
        (None, "pack", ["load", "pack"]),
        ("pack", "pack", ["pack"]),
    ],
)
def test_part_of_the_plan(project: Path, first: str | None, last: str | None, expected: list[str]) -> None:
    assert read_plan(project).between(first, last).names == expected


def test_part_reads_outs_of_the_stage_before_it(project: Path) -> None:
    whole = read_plan(project)

    assert whole.between("pack", None).inputs_from_outside(whole) == ["load"]
    assert whole.inputs_from_outside(whole) == []


def test_unknown_stage_is_refused_with_the_nearest_name(project: Path) -> None:
    with pytest.raises(RunRefused, match=r"no stage 'trian' in dvc.yaml; did you mean 'train'\?"):
        read_plan(project).between("trian", None)


def test_empty_part_is_refused_with_the_order(project: Path) -> None:
    with pytest.raises(
        RunRefused, match="there is no stage between 'train' and 'load'; the order is load, pack, train"
    ):
        read_plan(project).between("train", "load")


def test_folder_without_dvc_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunRefused, match="not inside of a DVC repository"):
        read_plan(tmp_path)
