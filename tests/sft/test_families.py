"""With `SFTTrainer`, packed rows train the same as single documents: for every family, attention and stream."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset
from transformers import DataCollatorWithFlattening, masking_utils
from transformers.integrations import flex_attention

from sft.attention.isolation import probe_isolation
from sft.attention.kernels import SFT_DOCUMENTS
from sft.batches.completion_collator import DataCollatorForCompletionOnlyLM
from sft.batches.layout import document_layout
from sft.loss.supervised import supervised_loss
from sft.tokens.constant_length import ConstantLengthDataset
from sft.tokens.packing import pack_dataset
from sft.train.trainer import SFTTrainer
from tests.tiny import quiet_config, random_model, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.numerics

LENGTHS = (19, 3, 11, 26, 7, 14)
WINDOWED = {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1}
GEMMA_3 = {"num_key_value_heads": 1, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen2 with a window": ("qwen2", WINDOWED),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {}),
    "mistral with a window": ("mistral", {"sliding_window": 5}),
    "gemma": ("gemma", {}),
    "gemma2 with caps and a window": (
        "gemma2",
        {"sliding_window": 5, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0},
    ),
    "gemma3 with a window": ("gemma3_text", {**GEMMA_3, "sliding_window": 5}),
    "gpt2": ("gpt2", {}),
    "opt": ("opt", {}),
    "phi": ("phi", {}),
    "gpt_neox": ("gpt_neox", {}),
}
NO_SDPA = {"gemma2 with caps and a window"}
LEAKING = {"opt"}
"""Families whose own attention, given position ids but no layout, lets documents see each other."""


def make(name: str, attention: str | None = "eager") -> Any:
    family, overrides = FAMILIES[name]
    return random_model(family, attention, **overrides)


def documents() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(4, 300, (length,), generator=generator).tolist() for length in LENGTHS]


def trainer_for(model: Any, folder: Path, dataset: Any, **options: Any) -> SFTTrainer:
    arguments = {"max_length": 48, "per_device_train_batch_size": 8, "packing": True, "max_steps": 1, **options}
    config = quiet_config(folder, **arguments)
    return SFTTrainer(model, args=config, train_dataset=dataset, processing_class=tiny_tokenizer())


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def document_by_document(model: Any, rows: list[list[int]]) -> tuple[float, dict[str, torch.Tensor]]:
    """Compute each document alone, with transformers' eager attention and torch's cross entropy."""
    num_targets = sum(len(row) - 1 for row in rows)
    total = 0.0
    for row in rows:
        ids = torch.tensor(row)
        loss = F.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="sum") / num_targets
        loss.backward()
        total += loss.item()
    return total, gradients(model)


def first_step(trainer: SFTTrainer) -> tuple[float, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return loss and gradients of the first batch, which contains all documents, and the batch."""
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    loss = trainer.training_step(
        trainer.model, dict(batch), trainer._get_num_items_in_batch([batch], torch.device("cpu"))
    )
    return loss.item(), gradients(trainer.model), batch


def assert_same(found: tuple[float, dict[str, torch.Tensor]], expected: tuple[float, dict[str, torch.Tensor]]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_training_step_equals_one_document_at_a_time(name: str, tmp_path: Path) -> None:
    trainer = trainer_for(make(name, None), tmp_path, Dataset.from_dict({"input_ids": documents()}))
    loss, found, batch = first_step(trainer)
    assert batch["input_ids"].shape == (1, sum(LENGTHS))
    assert sorted(batch["seq_lengths"].tolist()) == sorted(LENGTHS)
    assert_same((loss, found), document_by_document(make(name), documents()))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_attention_equals_single_documents_or_is_refused_by_the_probe(name: str, attention: str) -> None:
    if attention == "sdpa" and name in NO_SDPA:
        pytest.skip("transformers offers no sdpa for this family")
    model = make(name, attention)
    if name in LEAKING:
        way_out = rf"see each other in {name} with .*'{attention}'.* Use attn_implementation='auto', or packing=False"
        with pytest.raises(ValueError, match=way_out):
            probe_isolation(model)
        return
    probe_isolation(model)
    rows = documents()
    batch = {
        "input_ids": torch.tensor([[token for row in rows for token in row]]),
        "position_ids": torch.tensor([[place for row in rows for place in range(len(row))]]),
        "seq_lengths": torch.tensor(LENGTHS),
    }
    with document_layout(LENGTHS):
        result = supervised_loss(model, {**batch, "labels": batch["input_ids"]})
        result.loss.backward()
    assert_same((result.loss.item(), gradients(model)), document_by_document(make(name), rows))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_keeps_documents_apart_where_only_its_forward_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    # without the compiler, which takes a minute and whose kernel for CPUs goes wrong after others in one process
    make_mask = masking_utils.create_block_mask
    monkeypatch.setattr(masking_utils, "create_block_mask", lambda **given: make_mask(**{**given, "_compile": False}))
    monkeypatch.setattr(flex_attention.WrappedFlexAttention, "__call__", lambda self: flex_attention.flex_attention)
    assert probe_isolation(make("llama", "flex_attention")).neighbour_effect == 0


@pytest.mark.parametrize("name", [name for name in FAMILIES if "window" in name])
def test_windows_and_caps_of_these_tests_matter(name: str) -> None:
    family, _ = FAMILIES[name]
    without = {"sliding_window": 512, **(GEMMA_3 if family == "gemma3_text" else {})}
    far = tiny_model(family, **without)
    far.load_state_dict(make(name).state_dict())
    near_loss, far_loss = (document_by_document(model, documents())[0] for model in (make(name), far))
    assert abs(near_loss - far_loss) > 1e-3


class Leaking(torch.nn.Module):
    """Attention to everything before a token, in any document."""

    def __call__(self, module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], 1) for states in (key, value))
        return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2), None


def test_probe_refuses_an_attention_that_leaks_on_purpose_and_names_the_way_out() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register("leaking_for_a_test", Leaking())
    model = make("llama")
    model.set_attn_implementation("leaking_for_a_test")
    with pytest.raises(ValueError, match=r"see each other .*'leaking_for_a_test'.*Use attn_implementation='auto'"):
        probe_isolation(model)
    model.set_attn_implementation(SFT_DOCUMENTS)
    probe_isolation(model)


def streamed() -> Iterator[dict[str, list[int]]]:
    for row in documents():
        yield {"input_ids": row}


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_streamed_and_packed_rows_train_what_their_documents_do(strategy: str, tmp_path: Path) -> None:
    stream = IterableDataset.from_generator(streamed)
    loss, found, batch = first_step(trainer_for(make("llama", None), tmp_path, stream, packing_strategy=strategy))
    pieces = [piece.tolist() for piece in batch["input_ids"][0].split(batch["seq_lengths"].tolist())]
    assert sorted(token for piece in pieces for token in piece) == sorted(token for row in documents() for token in row)
    assert_same((loss, found), document_by_document(make("llama"), [piece for piece in pieces if len(piece) > 1]))


def test_constant_length_rows_train_what_their_documents_do(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"input_ids": documents()})
    stream = ConstantLengthDataset(tiny_tokenizer(), rows, seq_length=20, shuffle=False)
    loss, found, batch = first_step(trainer_for(make("opt", None), tmp_path, stream, packing=False, padding_free=True))
    pieces = [piece.tolist() for piece in batch["input_ids"][0].split(batch["seq_lengths"].tolist())]
    assert len(pieces) > len(batch["input_ids"][0]) // 20
    assert_same((loss, found), document_by_document(make("opt"), [piece for piece in pieces if len(piece) > 1]))


@pytest.mark.parametrize("collator", ["flattening", "completions"])
def test_flat_batches_of_a_users_collator_train_what_their_documents_do(collator: str, tmp_path: Path) -> None:
    answers = DataCollatorForCompletionOnlyLM([3], tokenizer=tiny_tokenizer(), padding_free=True)
    given: Any = DataCollatorWithFlattening() if collator == "flattening" else answers
    rows = Dataset.from_dict({"input_ids": [[4, 3, *row] for row in documents()]})
    trainer = SFTTrainer(
        make("opt", "sdpa"),
        args=quiet_config(tmp_path, max_length=48, per_device_train_batch_size=8, max_steps=1),
        train_dataset=rows,
        processing_class=tiny_tokenizer(),
        data_collator=given,
    )
    loss, _, batch = first_step(trainer)
    assert batch["input_ids"].shape[0] == 1
    untrained = 2 if collator == "completions" else 1
    assert loss == pytest.approx(plain_loss(make("opt"), rows["input_ids"][:], untrained), rel=1e-5)


def plain_loss(model: Any, rows: list[list[int]], num_untrained: int) -> float:
    """Return the mean loss over all targets, each document alone; its first `num_untrained` tokens are not targets."""
    targets = [torch.tensor(row[num_untrained:]) for row in rows]
    logits = [model(input_ids=torch.tensor([row])).logits[0, num_untrained - 1 : -1] for row in rows]
    return F.cross_entropy(torch.cat(logits), torch.cat(targets)).item()


def test_rows_packed_beforehand_are_recognised(tmp_path: Path) -> None:
    rows = pack_dataset(Dataset.from_dict({"input_ids": documents()}), 48)
    loss, found, _ = first_step(trainer_for(make("gpt2", None), tmp_path, rows, packing=False))
    assert_same((loss, found), document_by_document(make("gpt2"), documents()))
