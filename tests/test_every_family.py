"""Every family of transformers trains as a plain loop over single documents does, or is refused with its reason."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch
from transformers import PreTrainedModel

from benchmarks.families import check_all
from benchmarks.family_checks import Failure, FamilyChecks, FamilyResult, largest_difference
from benchmarks.family_page import PAGE, TRAINED, outcome, page, share, shorten, verdict
from benchmarks.tiny_families import Sizes, families

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
    _, table = PAGE.read_text(encoding="utf-8").split("| family | LoRA | full | why |\n|---|---|---|---|\n")
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
