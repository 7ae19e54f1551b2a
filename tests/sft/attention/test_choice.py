"""Packed documents do not affect each other's logits, loss or gradients; unusable attention is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from sft.attention.choice import (
    check_attention_request,
    check_flash_sdp,
    choose_packed_attention,
    flash_sdp_only,
)
from sft.attention.isolation import probe_isolation
from sft.attention.kernels import SFT_DOCUMENTS
from sft.batches.layout import DocumentLayout, current_layout, document_layout
from sft.hardware import Hardware
from tests.tiny import random_model, tiny_model

pytestmark = pytest.mark.numerics

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gpt2", "opt", "phi", "gpt_neox"]
LENGTHS = (11, 4, 4, 1, 17)
A100 = Hardware("cuda", (8, 0), frozenset({"flash_attn"}))
HUB = Hardware("cuda", (8, 0), frozenset({"kernels"}))


def make(family: str, implementation: str = SFT_DOCUMENTS, **overrides: Any) -> Any:
    return random_model(family, implementation, **overrides)


def documents(vocab_size: int = 300, seed: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, vocab_size, (length,), generator=generator) for length in LENGTHS]


def positions() -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in LENGTHS])[None]


def loss_of(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum")


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def unpacked(model: torch.nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    losses = [loss_of(model(input_ids=ids[None]).logits[0], ids) for ids in documents() if len(ids) > 1]
    total = torch.stack(losses).sum() / sum(LENGTHS)
    total.backward()
    return total.detach(), gradients(model)


def packed(model: torch.nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    docs = documents()
    with document_layout(LENGTHS):
        logits = model(input_ids=torch.cat(docs)[None], position_ids=positions(), use_cache=False).logits[0]
        pieces = zip(logits.split(LENGTHS), docs, strict=True)
        total = torch.stack([loss_of(piece, ids) for piece, ids in pieces if len(ids) > 1]).sum() / sum(LENGTHS)
        total.backward()
    return total.detach(), gradients(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_loss_and_gradients_equal_the_unpacked_ones(family: str) -> None:
    reference_loss, reference = unpacked(make(family, "eager"))
    loss, found = packed(make(family))
    torch.testing.assert_close(loss, reference_loss, rtol=1e-5, atol=1e-6)
    assert found.keys() == reference.keys()
    assert max(gradient.abs().max() for gradient in reference.values()) > 1e-2
    for name, gradient in reference.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("overrides", [{"sliding_window": 5}, {"attention_dropout": 0.0, "num_key_value_heads": 2}])
def test_sliding_window_is_honoured_inside_each_document(overrides: dict[str, Any]) -> None:
    reference_loss, reference = unpacked(make("mistral", "eager", **overrides))
    loss, found = packed(make("mistral", **overrides))
    torch.testing.assert_close(loss, reference_loss, rtol=1e-5, atol=1e-6)
    for name, gradient in reference.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5, msg=name)


def test_sliding_window_of_the_test_above_matters() -> None:
    windowed, _ = packed(make("mistral", sliding_window=5))
    full, _ = packed(make("mistral"))
    assert abs(windowed - full) > 1e-3


def test_attention_sinks_are_honoured() -> None:
    overrides = {"num_key_value_heads": 1, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}
    reference_loss, _ = unpacked(make("gpt_oss", "eager", sliding_window=6, **overrides))
    loss, _ = packed(make("gpt_oss", sliding_window=6, **overrides))
    torch.testing.assert_close(loss, reference_loss, rtol=1e-5, atol=1e-6)


def test_gradient_checkpointing_recomputes_within_the_same_layout() -> None:
    model = make("llama").train()
    reference_loss, reference = packed(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss, found = packed(model)
    torch.testing.assert_close(loss, reference_loss)
    for name, gradient in reference.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_layout_padded_rows_are_computed_as_transformers_does(family: str) -> None:
    ids = torch.full((2, 12), 3)
    ids[0, :12], ids[1, :7] = documents()[4][:12], documents()[0][:7]
    mask = torch.tensor([[1] * 12, [1] * 7 + [0] * 5])
    expected = make(family, "eager")(input_ids=ids, attention_mask=mask).logits
    found = make(family)(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)


def test_generation_with_a_cache_is_the_same_as_with_sdpa() -> None:
    prompt = documents()[0][None]
    expected = make("llama", "sdpa").generate(prompt, max_new_tokens=8, do_sample=False)
    assert make("llama").generate(prompt, max_new_tokens=8, do_sample=False).tolist() == expected.tolist()


def test_attention_dropout_is_applied_in_training() -> None:
    model = make("llama", attention_dropout=0.5).train()
    assert packed(model)[0] != packed(model)[0]


def test_layout_that_does_not_describe_the_row_is_refused() -> None:
    model = make("llama")
    with document_layout([3, 4]), pytest.raises(ValueError, match="one row of 7 tokens"):
        model(input_ids=torch.ones(1, 8, dtype=torch.long))
    with document_layout([4]), pytest.raises(ValueError, match="2 rows of 4 queries"):
        model(input_ids=torch.ones(2, 4, dtype=torch.long))


def test_layout_ends_with_its_block_even_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), document_layout([2]):
        raise ZeroDivisionError
    assert current_layout() is None


def test_empty_documents_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, found 0"):
        DocumentLayout((3, 0))
    with pytest.raises(ValueError, match="at least one document"):
        DocumentLayout(())


def test_layout_gives_runs_boundaries_and_document_ids() -> None:
    layout = DocumentLayout((3, 2, 2, 1))
    cpu = torch.device("cpu")
    assert layout.runs == ((1, 3), (2, 2), (1, 1))
    assert layout.boundaries(cpu).tolist() == [0, 3, 5, 7, 8]
    assert layout.document_ids(cpu).tolist() == [0, 0, 0, 1, 1, 2, 2, 3]
    assert (layout.num_tokens, layout.longest) == (8, 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_probe_passes_for_every_offered_family(family: str) -> None:
    report = probe_isolation(make(family))
    assert report.neighbour_effect <= report.neighbour_tolerance == 1e-5
    assert report.packing_error <= report.packing_tolerance == 1e-4


def test_probe_refuses_a_backend_that_leaks_and_leaves_the_mode_as_it_was() -> None:
    model = make("opt", "sdpa").train()
    with pytest.raises(ValueError, match=r"see each other in opt with attn_implementation='sdpa'.*packing=False"):
        probe_isolation(model)
    assert model.training


def test_probe_refuses_layers_that_carry_state_from_one_document_to_the_next() -> None:
    model = tiny_model("recurrent_gemma", num_key_value_heads=1, lru_width=16, block_types=["recurrent", "attention"])
    model.set_attn_implementation(SFT_DOCUMENTS)
    with pytest.raises(
        ValueError, match=r"see each other in recurrent_gemma .*\. Use packing=False and padding_free=False\."
    ):
        probe_isolation(model)


def test_probe_works_in_half_precision() -> None:
    report = probe_isolation(make("llama").to(torch.bfloat16))
    assert report.neighbour_effect == 0
    assert report.packing_error <= report.packing_tolerance == 5e-2
    with pytest.raises(ValueError, match="see each other"):
        probe_isolation(make("opt", "sdpa").to(torch.bfloat16))


def test_probe_refuses_a_freshly_initialised_leaking_model_too() -> None:
    model = tiny_model("opt")
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="see each other"):
        probe_isolation(model)


@pytest.mark.parametrize("family", ["bloom", "falcon", "mpt"])
def test_attention_code_of_a_models_own_is_left_as_it_is(family: str) -> None:
    extra = {"mpt": {"d_model": 16, "n_heads": 2, "n_layers": 2}}.get(family, {})
    model = tiny_model(family, **extra)
    choice = choose_packed_attention(model, "auto")
    assert choice.implementation == model.config._attn_implementation
    assert choice.reason == "the model computes attention in code of its own"


@pytest.mark.parametrize("requested", [None, "auto", "sdpa", SFT_DOCUMENTS])
def test_per_document_attention_is_chosen_unless_another_is_named(requested: str | None) -> None:
    choice = choose_packed_attention(tiny_model("llama"), requested)
    assert choice.implementation == SFT_DOCUMENTS
    assert "document by document" in choice.reason


def test_another_attention_is_kept_as_requested() -> None:
    assert choose_packed_attention(tiny_model("llama"), "eager").implementation == "eager"
    choice = choose_packed_attention(tiny_model("llama"), "flash_attention_2", A100, torch.bfloat16)
    assert choice.implementation == "flash_attention_2"


@pytest.mark.parametrize(
    ("requested", "dtype", "hardware", "complaint"),
    [
        ("flash_attention_2", torch.bfloat16, Hardware("cpu"), "CUDA devices only, and the model is on 'cpu'"),
        ("flash_attention_2", torch.float32, A100, "float16 or bfloat16, and the model computes in torch.float32"),
        ("flash_attention_2", torch.float16, replace(A100, capability=(7, 5)), "needs compute capability 8.0, .* 7.5"),
        ("flash_attention_3", torch.bfloat16, A100, "needs compute capability 9.0"),
        ("flash_attention_2", torch.float16, replace(A100, packages=frozenset()), "pip install flash-attn"),
        ("kernels-community/flash-attn", torch.float16, A100, "pip install kernels"),
        ("kernels-community/flash-attn2", torch.float32, HUB, "float16 or bfloat16"),
        ("kernels-community/flash-attn2", torch.float16, replace(HUB, capability=(7, 5)), "capability 8.0, .* 7.5"),
        ("kernels-community/vllm-flash-attn3", torch.float16, HUB, "capability 9.0, .* 8.0"),
        ("kernels-community/paged-attention", torch.float16, Hardware("cpu"), "CUDA devices only"),
        ("flash_attention_4", torch.bfloat16, replace(A100, packages=frozenset()), "9.0, .*pip install flash-attn-4"),
        ("flex_attention", torch.float32, Hardware("cpu"), "CUDA devices only"),
        ("paged|eager", torch.float32, Hardware("cpu"), "serves generation"),
    ],
)
def test_attention_that_this_machine_cannot_run_is_refused(
    requested: str, dtype: torch.dtype, hardware: Hardware, complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        check_attention_request(requested, dtype, hardware)


@pytest.mark.parametrize(
    ("requested", "hardware"),
    [
        ("flash_attention_2", A100),
        ("flash_attention_2", HUB),
        ("flash_attention_3", replace(HUB, capability=(9, 0))),
        ("kernels-community/flash-attn2", HUB),
        ("flex_attention", A100),
        ("sdpa", Hardware("cpu")),
        ("eager", Hardware("cpu")),
    ],
)
def test_attention_that_this_machine_can_run_passes(requested: str, hardware: Hardware) -> None:
    check_attention_request(requested, torch.bfloat16, hardware)


@pytest.mark.parametrize(
    ("attention", "dtype", "hardware", "flat", "complaint"),
    [
        ("sdpa", torch.float32, Hardware("cpu"), False, "needs packing=True or padding_free=True"),
        (
            "sdpa",
            torch.float32,
            A100,
            True,
            r"float16 or bfloat16, and the model computes in torch.float32 .*bf16=True",
        ),
        ("sdpa", torch.float16, replace(A100, capability=(7, 5)), True, "needs compute capability 8.0, .* 7.5"),
        ("flash_attention_2", torch.float16, A100, True, "'flash_attention_2' does not use that kernel"),
        ("sdpa", torch.float32, Hardware("mps"), True, "the model is on 'mps'"),
    ],
)
def test_forced_flash_is_refused_where_it_could_not_run(
    attention: str, dtype: torch.dtype, hardware: Hardware, flat: bool, complaint: str
) -> None:
    with pytest.raises(ValueError, match=rf"force_flash_sdp=True cannot be used: .*{complaint}"):
        check_flash_sdp(attention, dtype, hardware, flat)


@pytest.mark.parametrize("hardware", [Hardware("cpu"), A100])
def test_forced_flash_passes_on_flat_batches_in_half_precision(hardware: Hardware) -> None:
    check_flash_sdp("sdpa", torch.bfloat16, hardware, flat=True)


@pytest.mark.parametrize(
    ("family", "overrides", "complaint"),
    [("gemma2", {}, "a soft cap of 50.0"), ("mistral", {"sliding_window": 5}, "a sliding window of 5 tokens")],
)
def test_forced_flash_is_refused_by_layers_that_the_kernel_does_not_support(
    family: str, overrides: dict[str, Any], complaint: str
) -> None:
    with flash_sdp_only(), pytest.raises(ValueError, match=f"this layer asks for {complaint}.*force_flash_sdp=False"):
        packed(make(family, **overrides))


def test_flash_kernel_can_be_forced_on_packed_rows() -> None:
    reference_loss, _ = packed(make("gpt2"))
    with flash_sdp_only():
        loss, _ = packed(make("gpt2"))
    torch.testing.assert_close(loss, reference_loss)
