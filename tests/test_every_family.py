"""Every family of transformers trains as a plain loop over single documents does, or is refused with its reason."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from benchmarks.families import check_all
from benchmarks.family_checks import Failure, FamilyChecks, FamilyResult, largest_difference
from benchmarks.family_page import PAGE, TRAINED, outcome, page, share, shorten, verdict
from benchmarks.float32_parts import LIBRARY
from benchmarks.tiny_families import Sizes, families
from sft.train.trainer import SFTTrainer

pytestmark = pytest.mark.numerics

OFTEN_TUNED = (
    "bloom",
    "gemma3_text",
    "gpt2",
    "gpt_oss",
    "gptj",
    "granitemoehybrid",
    "kimi_linear",
    "lfm2",
    "llama",
    "mamba2",
    "qwen3",
    "qwen3_5_text",
    "qwen3_next",
)


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """Leave the objects of imported modules out of the garbage collections that every training begins with."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("family", OFTEN_TUNED)
def test_a_step_of_a_family_equals_one_document_at_a_time(family: str) -> None:
    result = FamilyChecks(family, Sizes(), seed=0, quick=True).run()
    assert result.unbuildable is None
    assert result.failures == {}


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_family_is_trained_or_refused_as_the_page_says() -> None:
    results = list(check_all(list(families()), Sizes(), seed=0, num_processes=os.cpu_count() or 1))
    assert [(each.family, each.failures) for each in results if verdict(each) == "fails"] == []
    assert share(results, TRAINED) >= 0.95
    assert share(results, ["packed"]) >= 0.9
    assert page(results) == PAGE.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(heads=6, kv_heads=3, head_dim=12, intermediate=52, layers=3, experts=6, vocab=517, window=7),
        Sizes(heads=2, kv_heads=1, head_dim=16, intermediate=28, layers=2, experts=8, vocab=389, window=4),
    ],
)
def test_what_is_buildable_does_not_depend_on_sizes(sizes: Sizes) -> None:
    buildable = {}
    for given in (Sizes(), sizes):
        results = check_all(list(families()), given, seed=1, num_processes=os.cpu_count() or 1, depth="plain")
        buildable[given] = {each.family for each in results if each.unbuildable is None}
    assert buildable[sizes] == buildable[Sizes()]


def test_the_page_has_a_line_for_every_family() -> None:
    table = PAGE.read_text(encoding="utf-8").rpartition("|---|\n")[2]
    assert [line.split("|")[1].strip() for line in table.splitlines()] == sorted(families())


class OtherWeights(FamilyChecks):
    """Checks whose plain loop runs a model with other weights than the trainer's."""

    def model(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        self.seed += 1
        return super().model(dtype)


def test_a_difference_is_found() -> None:
    result = OtherWeights("llama", Sizes(), seed=0, quick=True).run()
    assert result.failures["packed full float32"].kind == "differs"
    assert verdict(result) == "fails"


def float64_failure(checks: FamilyChecks, layout: str) -> Failure | None:
    """Run the step in float64 alone."""
    name = f"{layout} full float64"
    assert checks._has_float64
    with checks._noting(name):
        checks._compare(name, layout, "full", torch.float64)
    return checks.result.failures.get(name)


@pytest.mark.parametrize(("family", "parts"), [("bloom", True), ("llama", True), ("gpt2", False)])
def test_parts_that_a_model_computes_in_float32_are_measured_and_told_apart(family: str, parts: bool) -> None:
    checks = FamilyChecks(family, Sizes(), seed=0)
    assert float64_failure(checks, "packed") is None
    assert (1e-8 < checks.result.float32_parts < 1e-5) == parts
    assert (checks.result.float32_parts < 1e-12) != parts
    checks._compare_without_float32("packed")
    assert checks.result.worst["packed full float64"] <= 1e-6


class MovedWeights(FamilyChecks):
    """Checks whose trainer has weights that are wrong by less than rounding to float32 is."""

    def trainer(self, folder: Path, layout: str, method: str, dtype: torch.dtype) -> SFTTrainer:
        trainer = super().trainer(folder, layout, method, dtype)
        weight = trainer.model.get_input_embeddings().weight
        weight.data.mul_(1 + 3e-8)
        return trainer


class MovedPosition(FamilyChecks):
    """Checks whose trainer gives the second token of each row a position that is off by one."""

    def trainer(self, folder: Path, layout: str, method: str, dtype: torch.dtype) -> SFTTrainer:
        trainer = super().trainer(folder, layout, method, dtype)
        collator = trainer.data_collator

        def shifted(rows: list[dict[str, Any]]) -> dict[str, Any]:
            batch = collator(rows)
            batch["position_ids"][:, 1] += 1
            return batch

        trainer.data_collator = shifted
        return trainer


class LeakingRows(FamilyChecks):
    """Checks whose trainer lets the layers that run document by document see the complete row."""

    def trainer(self, folder: Path, layout: str, method: str, dtype: torch.dtype) -> SFTTrainer:
        trainer = super().trainer(folder, layout, method, dtype)
        assert trainer._mixers
        trainer._mixers = ()
        return trainer


class RoundedStates(FamilyChecks):
    """Checks whose trainer rounds states to float32 in a function that counts as the library's."""

    def trainer(self, folder: Path, layout: str, method: str, dtype: torch.dtype) -> SFTTrainer:
        trainer = super().trainer(folder, layout, method, dtype)
        code = "def rounded(module, args):\n    return (args[0].float().to(args[0].dtype),)\n"
        names: dict[str, Any] = {}
        exec(compile(code, f"{LIBRARY}/rounded.py", "exec"), names)
        trainer.model.get_output_embeddings().register_forward_pre_hook(names["rounded"])
        return trainer


@pytest.mark.parametrize(
    ("checks", "family", "where"),
    [
        (MovedWeights, "llama", "computed in float64"),
        (MovedPosition, "llama", "single documents"),
        (LeakingRows, "bloom", "single documents"),
        (LeakingRows, "mamba2", "single documents"),
        (RoundedStates, "llama", "computed in float64"),
    ],
)
def test_parts_in_float32_do_not_hide_a_difference(checks: type[FamilyChecks], family: str, where: str) -> None:
    failure = float64_failure(checks(family, Sizes(), seed=0), "packed")
    assert failure is not None
    assert failure.kind == "differs"
    assert failure.reason.endswith(where)


def test_a_missing_gradient_is_a_difference() -> None:
    gradients = {"weight": torch.tensor([1.0, -2.0])}
    assert largest_difference((1.0, gradients), (1.0, gradients)) == (0.0, "loss")
    assert largest_difference((1.0, {}), (1.0, gradients)) == (1.0, "gradient of weight")
    assert largest_difference((float("nan"), gradients), (1.0, gradients))[0] == float("inf")


def test_sizes_that_no_family_can_have_are_refused() -> None:
    with pytest.raises(ValueError, match="intermediate=31 is not a multiple of 4"):
        Sizes(intermediate=31)


def result_of(**failures: Failure) -> FamilyResult:
    runs = [f"{layout} {method} float32" for layout in ("packed", "joined", "padded") for method in ("lora", "full")]
    return FamilyResult("some", runs=runs, failures={name.replace("_", " "): each for name, each in failures.items()})


def test_a_family_counts_for_its_slower_method() -> None:
    refused, crash = Failure("refused", "layers see others. Use packing=False."), Failure("crash", "boom")
    assert verdict(result_of()) == "packed"
    assert verdict(result_of(packed_lora_float32=refused)) == "joined"
    assert outcome(result_of(packed_lora_float32=refused), "full").word == "packed"
    assert verdict(result_of(padded_full_float32=crash)) == "fails"
    assert verdict(result_of(default_lora_float32=refused)) == "fails"
    assert outcome(result_of(resume_lora=refused), "lora").reason == f"resume or merge: {refused.reason}"
    assert shorten(refused.reason) == "layers see others"
    assert share([result_of(), result_of(padded_full_float32=crash)], TRAINED) == 0.5
