"""Values of later stages are refused before training, with their key."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.artifacts import write_jsonl
from stages.paths import Paths
from stages.preflight import check_later_stages
from tests.stages.tiny_run import tiny_params, write_tiny_run


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    return write_tiny_run(tmp_path_factory.mktemp("preflight"))


def test_values_that_fit_pass(paths: Paths) -> None:
    check_later_stages(tiny_params(), paths)


def test_group_size_that_does_not_divide_a_width_is_refused(paths: Paths) -> None:
    with pytest.raises(ValueError, match=r"quantize\.group_size: group_size 64 does not divide the width 32"):
        check_later_stages(tiny_params(quantize={"group_size": 64}), paths)


def test_group_size_does_not_matter_where_nothing_is_quantized(paths: Paths) -> None:
    check_later_stages(tiny_params(quantize={"method": "none", "group_size": 64}), paths)


def test_reference_that_the_task_cannot_score_is_named(tmp_path: Path) -> None:
    paths = write_tiny_run(tmp_path)
    prompt = {"id": "faq.csv:2", "prompt": "When?", "reference": "At nine.", "add_special_tokens": False}
    write_jsonl(paths.out("format", "prompts.jsonl"), [prompt])
    with pytest.raises(ValueError, match=r"evaluate\.task is json, held-out row faq\.csv:2"):
        check_later_stages(tiny_params(), paths)
