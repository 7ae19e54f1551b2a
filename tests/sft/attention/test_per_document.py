"""Modules that mix tokens run document by document inside a row, so that documents are what they are alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sft.attention.isolation import DocumentsMixError, Isolation, isolate_documents, probe_padding
from sft.attention.kernels import SFT_DOCUMENTS
from sft.attention.per_document import CannotDivideError, Mixer, Way, find_mixers, flat_row, per_document
from sft.batches.layout import DocumentLayout, batch_layout, document_layout
from sft.batches.shared_tokens import share_tokens
from tests.sft.test_families import assert_same, gradients
from tests.tiny import random_model

pytestmark = pytest.mark.numerics

DELTA_NET = {
    "num_key_value_heads": 1,
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "recurrent_gemma": (
        {"num_key_value_heads": 1, "lru_width": 16, "block_types": ["recurrent", "attention"]},
        "1 RecurrentGemmaRecurrentBlock",
    ),
    "qwen3_5_text": (DELTA_NET, "1 Qwen3_5GatedDeltaNet"),
    "lfm2": (
        {"num_key_value_heads": 1, "layer_types": ["conv", "full_attention"], "block_ff_dim": 32},
        "1 Lfm2ShortConv",
    ),
    "mamba": ({"state_size": 4}, "2 MambaMixer"),
    "rwkv": ({"attention_hidden_size": 16}, "2 RwkvSelfAttention, 2 RwkvFeedForward"),
    "bloom": ({}, "2 BloomAttention"),
    "xglm": ({"d_model": 16, "num_layers": 2, "attention_heads": 2, "ffn_dim": 32}, "2 XGLMAttention"),
}
LENGTHS = (19, 3, 11, 26, 7, 14, 11, 1)


def make(family: str) -> Any:
    model = random_model(family, None, **FAMILIES[family][0])
    if model._can_set_attn_implementation():
        model.set_attn_implementation(SFT_DOCUMENTS)
    return model


def documents() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(4, 300, (length,), generator=generator).tolist() for length in LENGTHS]


def weighted(logits: torch.Tensor, start: int = 0) -> torch.Tensor:
    weights = torch.sin(torch.arange(start, start + logits.shape[0]))[:, None]
    return (logits * weights).square().sum()


def results_in_one_row(model: Any, isolation: Isolation) -> tuple[float, dict[str, torch.Tensor]]:
    with document_layout(LENGTHS), per_document(model, isolation.mixers):
        loss = weighted(model(**flat_row(model, documents()), use_cache=False).logits[0])
        loss.backward()
    return loss.item(), gradients(model)


def results_alone(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    total, start = 0.0, 0
    for document in documents():
        loss = weighted(model(input_ids=torch.tensor([document]), use_cache=False).logits[0], start)
        loss.backward()
        total, start = total + loss.item(), start + len(document)
    return total, gradients(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_documents_in_one_row_have_the_results_and_gradients_of_documents_alone(family: str) -> None:
    model = make(family)
    isolation = isolate_documents(model)
    assert isolation.describe(model) == f"{FAMILIES[family][1]} run document by document"
    assert not isolation.is_complete
    found, expected = results_in_one_row(model, isolation), results_alone(model)
    scale = max(gradient.abs().max().item() for gradient in expected[1].values())
    assert_same(
        (found[0], {name: gradient / scale for name, gradient in found[1].items()}),
        (expected[0], {name: gradient / scale for name, gradient in expected[1].items()}),
    )


def test_model_is_as_before_after_the_block() -> None:
    model = make("lfm2")
    with per_document(model, isolate_documents(model).mixers):
        assert "forward" in vars(model.model.layers[0].conv)
    assert not any("forward" in vars(module) for module in model.modules())


def test_padded_rows_run_as_ever_inside_the_block() -> None:
    model, ids = make("lfm2"), torch.arange(24).reshape(2, 12)
    expected = model(input_ids=ids).logits
    with per_document(model, isolate_documents(model).mixers):
        assert torch.equal(model(input_ids=ids).logits, expected)


def test_recurrent_layers_run_as_batches_and_attention_with_a_mask_one_by_one() -> None:
    assert {mixer.way for mixer in isolate_documents(make("lfm2")).mixers} == {Way.BATCHES}
    assert {mixer.way for mixer in isolate_documents(make("bloom")).mixers} == {Way.ONE_BY_ONE}


def test_beginnings_computed_once_are_given_to_every_document() -> None:
    model = make("lfm2")
    begin = list(range(10, 22))
    rows = [[*begin, *range(30 + 10 * number, 36 + 10 * number)] for number in range(3)]
    ids = torch.tensor([token for row in rows for token in row])
    lengths = torch.tensor([len(row) for row in rows])
    plan = share_tokens(ids.numpy(), ids.numpy(), lengths.numpy())
    assert plan is not None
    batch = plan.to_batch()
    mixers = isolate_documents(model).mixers
    row = {name: value[:, batch["computed"]] for name, value in flat_row(model, rows).items()}
    with torch.no_grad(), per_document(model, mixers), document_layout(batch_layout(batch)):
        shared = model(**row, use_cache=False).logits[0]
    for number, document in enumerate(rows):
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([document]), use_cache=False).logits[0]
        places = batch["places"][number * 18 : number * 18 + 17]
        torch.testing.assert_close(shared[places], alone[:17], rtol=1e-5, atol=1e-5)


class Shift(nn.Module):
    """Adds to each token the states of the one before it."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states + torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], dim=1)


def test_code_that_was_never_seen_is_found_by_what_it_does() -> None:
    model = random_model("llama", SFT_DOCUMENTS)
    layer = model.model.layers[1]
    layer.post_attention_layernorm = nn.Sequential(layer.post_attention_layernorm, Shift())
    isolation = isolate_documents(model)
    assert [mixer.name for mixer in isolation.mixers] == ["model.layers.1.post_attention_layernorm"]


def test_a_model_that_mixes_below_its_layers_runs_document_by_document_as_a_whole() -> None:
    model = random_model("llama", SFT_DOCUMENTS)
    model.model.embed_tokens = nn.Sequential(model.model.embed_tokens, Shift())
    model.get_input_embeddings = lambda: model.model.embed_tokens[0]
    isolation = isolate_documents(model)
    assert isolation.is_complete
    assert isolation.describe(model) == "1 LlamaModel run document by document"


def test_a_model_that_mixes_above_its_layers_is_refused_with_the_way_out() -> None:
    model = random_model("llama", SFT_DOCUMENTS)
    model.lm_head = nn.Sequential(Shift(), model.lm_head)
    with pytest.raises(
        DocumentsMixError, match=r"see each other in llama .*Use packing=False and padding_free=False\."
    ):
        isolate_documents(model)


def test_output_of_the_complete_row_cannot_be_divided() -> None:
    class Mean(nn.Module):
        def __init__(self, attention: nn.Module) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, **given: Any) -> tuple[torch.Tensor, torch.Tensor]:
            states = Shift()(self.attention(**given)[0])
            return states, states.mean()

    model = random_model("llama", SFT_DOCUMENTS)
    model.model.layers[0].self_attn = Mean(model.model.layers[0].self_attn)
    with pytest.raises(CannotDivideError, match="belongs to the complete row"):
        find_mixers(model, documents()[:2])


def test_documents_of_similar_length_share_a_batch() -> None:
    seen: list[tuple[int, ...]] = []

    class Watched(Shift):
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            seen.append(tuple(states.shape))
            return super().forward(states)

    module = nn.ModuleDict({"layer": Watched()})
    mixer = Mixer("layer", {}, ((1,),), Way.BATCHES)
    states = torch.arange(20.0)[None, :, None].expand(1, 20, 2)
    with document_layout(DocumentLayout((8, 2, 7, 3))), per_document(module, [mixer]):
        found = module["layer"](states)
    assert seen == [(2, 8, 2), (1, 3, 2), (1, 2, 2)]
    assert found[0, :, 0].tolist() == [0, 1, 3, 5, 7, 9, 11, 13, 8, 17, 10, 21, 23, 25, 27, 29, 31, 17, 35, 37]


class BorderedShift(nn.Module):
    """`Shift` that keeps documents apart by itself if it is told where they begin, as kernels for GPUs do."""

    def forward(self, states: torch.Tensor, seq_idx: torch.Tensor | None = None, **_: Any) -> torch.Tensor:
        before = torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], dim=1)
        if seq_idx is not None:
            begins = torch.cat([torch.ones_like(seq_idx[:, :1], dtype=torch.bool), seq_idx.diff() != 0], dim=1)
            before = before.masked_fill(begins[..., None], 0)
        return states + before


def test_a_module_that_takes_borders_gets_them_with_the_complete_row() -> None:
    model = random_model("llama", SFT_DOCUMENTS)
    model.model.layers[0].input_layernorm = BorderedShift()
    isolation = isolate_documents(model)
    assert [(mixer.name, mixer.way) for mixer in isolation.mixers] == [("model.layers.0.input_layernorm", Way.BORDERS)]
    found, expected = results_in_one_row(model, isolation), results_alone(model)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)


class Last(nn.Module):
    """Adds the states of the last token of the row, whatever it is, to the first one."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return torch.cat([states[:, :1] + states[:, -1:], states[:, 1:]], dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_rows_have_the_logits_of_documents_alone(family: str) -> None:
    probe_padding(make(family))


def test_a_model_that_reads_padding_is_refused_with_the_way_out() -> None:
    model = random_model("llama", None)
    model.model.norm = nn.Sequential(model.model.norm, Last())
    with pytest.raises(
        DocumentsMixError, match=r"padding changes what llama .* Use packing=True or padding_free=True\."
    ):
        probe_padding(model)
