"""A mixture of experts through the stages `train`, `merge` and `quantize`."""

from __future__ import annotations

import csv

import pytest

from stages import merge
from stages.checkout.artifacts import read_json
from stages.checkout.paths import Paths
from stages.params.schema import load_params
from tests.stages.training_root import make_training_root, train_here
from tests.tiny_moe import tiny_moe

pytestmark = pytest.mark.numerics


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    base = tiny_moe("qwen3_moe")
    paths = make_training_root(tmp_path_factory.mktemp("moe"), base, max_steps=2, router_aux_loss_coef=0.01)
    train_here(paths)
    return paths


def test_experts_are_trained_and_counted(trained: Paths) -> None:
    shares = read_json(trained.out("train", "weights.json"))
    assert {kind: counts["reached"] / counts["weights"] for kind, counts in shares.items()} == {
        "attention": 1,
        "experts": 1,
        "router": 0,
        "embeddings": 0,
        "norms": 0,
        "head": 0,
    }
    assert (
        sum(counts["trained"] for counts in shares.values())
        == read_json(trained.metrics("train"))["trainable_parameters"]
    )


def test_loss_of_the_routers_is_in_the_figures_and_the_curve(trained: Paths) -> None:
    with trained.out("train", "curve.csv").open(encoding="utf-8", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    figures = read_json(trained.metrics("train"))
    assert 0.01 < figures["aux_loss"] == float(last["aux_loss"])
    assert 0.01 < figures["eval_aux_loss"] == float(last["eval_aux_loss"])


def test_merged_experts_compute_what_base_and_adapter_do(trained: Paths) -> None:
    merge.run(load_params(trained.root / "params.yaml"), trained)
    figures = read_json(trained.metrics("merge"))
    assert figures["max_logit_diff"] < 1e-4 < figures["adapter_effect"]
