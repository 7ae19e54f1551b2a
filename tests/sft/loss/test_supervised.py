"""The loss of a batch does not depend on how it is padded, packed, cut up or computed."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from sft.attention.kernels import SFT_DOCUMENTS
from sft.batches.collator import DataCollatorForSFT
from sft.batches.layout import document_layout
from sft.labels import IGNORE_INDEX
from sft.loss.cross_entropy import LossOptions
from sft.loss.head import plain_head, states_before_head
from sft.loss.supervised import SupervisedLoss, dft_loss, supervised_logits, supervised_loss
from sft.loss.targets import Targets, find_targets, model_arguments, num_targets
from sft.train.counters import TokenTotals
from sft.train.trainer import SFTTrainer
from tests.tiny import quiet_config, random_model, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.numerics

X = IGNORE_INDEX
FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gpt2", "opt", "phi", "gpt_neox", "bloom"]
NOT_BLOOM = [family for family in FAMILIES if family != "bloom"]
ROWS = [
    {"input_ids": [5, 6, 7, 8, 9, 10], "labels": [X, X, 7, 8, X, 10]},
    {"input_ids": [11, 12, 13], "labels": [11, 12, 13]},
    {"input_ids": [14, 15, 16, 17], "labels": [X, X, X, X]},
]


def make(family: str, **overrides: Any) -> Any:
    return random_model(family, SFT_DOCUMENTS if family != "bloom" else None, **overrides)


def batch(flat: bool, rows: Any = ROWS) -> dict[str, torch.Tensor]:
    return DataCollatorForSFT(pad_token_id=3, padding_free=flat)(rows)


def run(
    model: Any, inputs: dict[str, torch.Tensor], **arguments: Any
) -> tuple[SupervisedLoss, dict[str, torch.Tensor]]:
    model.zero_grad()
    with document_layout(inputs.get("seq_lengths")):
        result = supervised_loss(model, inputs, **arguments)
        result.loss.backward()
    return result, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def reference(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Compute loss and gradients row by row, from all logits and torch's cross entropy, per target."""
    model.zero_grad()
    losses = []
    for row in ROWS:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        labels = torch.tensor(row["labels"])
        losses.append(F.cross_entropy(logits[:-1], labels[1:], reduction="sum", ignore_index=X))
    loss = torch.stack(losses).sum() / 5
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5, msg=name)


def test_targets_stay_within_their_document() -> None:
    inputs = {
        "labels": torch.tensor([[1, 2, 3, 4, 5]]),
        "seq_lengths": torch.tensor([3, 2]),
        "loss_weights": torch.tensor([[1.0, 0.0, 0.5, 1.0, 2.0]]),
    }
    targets = find_targets(inputs)
    assert targets.position.tolist() == [1, 3]
    assert targets.token.tolist() == [3, 5]
    assert targets.weight.tolist() == [0.5, 2.0]
    assert num_targets(inputs) == 2.5


def test_targets_of_padded_rows_are_listed_row_by_row() -> None:
    targets = find_targets(batch(flat=False))
    assert targets.row.tolist() == [0, 0, 0, 1, 1]
    assert targets.position.tolist() == [1, 2, 4, 0, 1]
    assert targets.token.tolist() == [7, 8, 10, 12, 13]
    assert num_targets(batch(flat=False)) == num_targets(batch(flat=True)) == 5


def test_shift_labels_of_parts_of_rows_give_the_targets_of_the_whole_rows() -> None:
    whole = {**batch(flat=False), "loss_weights": torch.rand(3, 6) + 0.5}
    following = F.pad(whole["labels"], (0, 1), value=X)[:, 1:]
    assert_equal_targets(find_targets({**whole, "shift_labels": following}), find_targets(whole))
    del whole["loss_weights"]
    parts = [
        find_targets({"labels": whole["labels"][:, part], "shift_labels": following[:, part]})
        for part in (slice(0, 3), slice(3, 6))
    ]
    found = sorted(
        (row, position + 3 * number, token)
        for number, part in enumerate(parts)
        for row, position, token in zip(part.row.tolist(), part.position.tolist(), part.token.tolist(), strict=True)
    )
    # the second token that row 0 trains comes after the first part
    assert found == [(0, 1, 7), (0, 2, 8), (0, 4, 10), (1, 0, 12), (1, 1, 13)]


def test_shift_labels_do_not_reach_the_model_and_give_the_same_loss_and_gradients() -> None:
    model, inputs = make("llama"), batch(flat=False)
    expected_loss, expected = run(model, inputs)
    named = {**inputs, "shift_labels": F.pad(inputs["labels"], (0, 1), value=X)[:, 1:]}
    assert model_arguments(model, named).keys() == model_arguments(model, inputs).keys()
    found_loss, found = run(model, named)
    assert found_loss.loss == expected_loss.loss
    assert_same(found, expected)


def assert_equal_targets(found: Targets, expected: Targets) -> None:
    for name in ("row", "position", "token", "weight"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


@pytest.mark.parametrize("flat", [False, True], ids=["padded", "flat"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_those_of_single_rows(family: str, flat: bool) -> None:
    if family == "bloom" and flat:
        pytest.skip("bloom attends in code of its own, which only the trainer runs document by document")
    expected_loss, expected = reference(make(family))
    model = make(family)
    result, found = run(model, batch(flat))
    assert plain_head(model) is not None
    assert result.loss.item() == pytest.approx(expected_loss, rel=1e-5)
    assert (result.num_targets, result.weight) == (5, 5)
    assert_same(found, expected)


@pytest.mark.parametrize("flat", [False, True], ids=["padded", "flat"])
@pytest.mark.parametrize("family", NOT_BLOOM)
def test_supervised_logits_are_the_models_logits_at_the_supervised_positions(family: str, flat: bool) -> None:
    model, inputs = make(family), batch(flat)
    with document_layout(inputs.get("seq_lengths")), torch.no_grad():
        supervised = supervised_logits(model, inputs)
        full = model(**model_arguments(model, inputs)).logits
    targets = supervised.targets
    torch.testing.assert_close(supervised.logits, full[targets.row, targets.position], rtol=1e-5, atol=1e-6)
    assert supervised.outputs.logits.shape[1] < full.shape[1]


def test_head_runs_on_supervised_positions_only_and_never_makes_all_logits() -> None:
    model, sizes = make("llama"), []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: sizes.append(output.shape[:-1].numel()))
    with document_layout(batch(flat=True)["seq_lengths"]):
        supervised_logits(model, batch(flat=True))
    handle.remove()
    assert sizes == [5]
    with torch.no_grad():
        hidden, outputs = states_before_head(model, batch(flat=False))
    assert hidden.shape == (3, 6, 16)
    assert outputs.logits.shape[1] == 0


@pytest.mark.parametrize("options", [LossOptions("dft"), LossOptions(label_smoothing=0.1), LossOptions(entropy=True)])
def test_fused_head_and_logits_at_hand_agree(options: LossOptions) -> None:
    model = make("gemma2")
    fused, fused_gradients = run(model, batch(flat=True), options=options)
    kept, kept_gradients = run(model, batch(flat=True), options=options, keep_logits=True)
    torch.testing.assert_close(fused.loss, kept.loss, rtol=1e-5, atol=1e-6)
    assert_same(fused_gradients, kept_gradients)
    assert fused.logits is None
    assert kept.logits is not None
    assert kept.logits.shape[:2] == (1, 13)
    assert (fused.entropy is None) == (not options.entropy)
    if fused.entropy is not None:
        torch.testing.assert_close(fused.entropy, kept.entropy)


def test_parts_of_a_batch_add_up_to_the_whole() -> None:
    model = make("llama")
    _, expected = run(model, batch(flat=True))
    total: dict[str, torch.Tensor] = {}
    for row in ROWS:
        _, found = run(model, batch(flat=False, rows=[row]), num_items=5)
        total = {name: total.get(name, 0) + gradient for name, gradient in found.items()}
    assert_same(total, expected)


def test_weights_scale_each_tokens_share() -> None:
    model = make("llama")
    weighted = [{**row, "loss_weights": [0.25 * place for place in range(len(row["input_ids"]))]} for row in ROWS]
    result, _ = run(model, batch(flat=True, rows=weighted))
    logits = supervised_logits(model, batch(flat=False)).logits
    weights = torch.tensor([0.5, 0.75, 1.25, 0.25, 0.5])
    losses = F.cross_entropy(logits, torch.tensor([7, 8, 10, 12, 13]), reduction="none")
    torch.testing.assert_close(result.loss, (losses * weights).sum() / weights.sum(), rtol=1e-5, atol=1e-6)


def test_batch_without_targets_costs_nothing_and_trains_nothing() -> None:
    result, gradients = run(make("llama"), batch(flat=False, rows=ROWS[2:]))
    assert result.loss == 0
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients.values())


def test_adapter_on_the_base_uses_the_fused_head_and_an_adapted_head_does_not() -> None:
    adapted = get_peft_model(make("llama"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    assert plain_head(adapted) is not None
    result, gradients = run(adapted, batch(flat=True))
    kept, kept_gradients = run(adapted, batch(flat=True), keep_logits=True)
    torch.testing.assert_close(result.loss, kept.loss, rtol=1e-5, atol=1e-6)
    assert_same(gradients, kept_gradients)
    with_head = get_peft_model(make("qwen2"), LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    assert plain_head(with_head) is None
    result, gradients = run(with_head, batch(flat=True))
    kept, kept_gradients = run(with_head, batch(flat=True), keep_logits=True)
    torch.testing.assert_close(result.loss, kept.loss, rtol=1e-5, atol=1e-6)
    assert_same(gradients, kept_gradients)


def test_prompt_tuning_is_scored_after_its_virtual_tokens() -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(make("llama"), config)
    result, gradients = run(model, batch(flat=False))
    inputs = batch(flat=False)
    inputs["labels"][:, 0] = X  # a first token is never a target, even if virtual ones precede it
    expected = model(**inputs).loss
    torch.testing.assert_close(result.loss, expected, rtol=1e-5, atol=1e-6)
    assert list(gradients) == ["prompt_encoder.default.embedding.weight"]


def test_model_that_does_more_to_its_logits_is_noticed_and_scored_from_them() -> None:
    model = make("llama")
    original = model.forward

    def twisted(*args: Any, logits_to_keep: Any = 0, **kwargs: Any) -> Any:
        output = original(*args, logits_to_keep=logits_to_keep, **kwargs)
        output.logits = output.logits * 1.5 + 0.1
        return output

    model.forward = twisted
    assert plain_head(model) is None
    result, _ = run(model, batch(flat=True))
    with document_layout(batch(flat=True)["seq_lengths"]):
        supervised = supervised_logits(model, batch(flat=True))
    torch.testing.assert_close(result.loss, F.cross_entropy(supervised.logits, supervised.targets.token))


def test_scaled_logits_of_granite_and_cohere_are_known() -> None:
    for family, key in (("granite", "logits_scaling"), ("cohere", "logit_scale")):
        assert plain_head(make(family, **{key: 4.0})) is not None


def test_compiled_and_offloaded_heads_are_left_to_the_model() -> None:
    model = make("llama")
    assert plain_head(torch.compile(model)) is None
    untied = make("qwen2")
    untied.lm_head.to("meta")
    assert plain_head(untied) is None


def test_training_mode_of_every_part_survives_the_trial_of_the_head() -> None:
    model = make("llama").train()
    model.model.layers[0].eval()
    assert plain_head(model) is not None
    assert model.training
    assert not model.model.layers[0].training
    assert model.model.layers[1].training


def test_router_loss_of_a_mixture_of_experts_counts_by_its_share() -> None:
    overrides = {"num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2}
    with_router = make("mixtral", output_router_logits=True, router_aux_loss_coef=0.5, **overrides)
    without = make("mixtral", output_router_logits=False, **overrides)
    inputs = batch(flat=False)
    router_loss = 0.5 * with_router(**{**inputs, "labels": None}).aux_loss
    difference = run(with_router, inputs, num_items=10)[0].loss - run(without, inputs, num_items=10)[0].loss
    torch.testing.assert_close(difference, router_loss / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("keep_logits", [False, True], ids=["fused head", "all logits"])
def test_loss_is_the_mean_over_targets_or_their_sum_divided_by_num_items(keep_logits: bool) -> None:
    model = make("llama")
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    inputs = {"input_ids": ids, "labels": ids}
    logits, targets = model(input_ids=ids).logits[0, :-1], ids[0, 1:]
    mean = F.cross_entropy(logits, targets)
    torch.testing.assert_close(supervised_loss(model, inputs, keep_logits=keep_logits).loss, mean)
    torch.testing.assert_close(supervised_loss(model, inputs, num_items=8, keep_logits=keep_logits).loss, mean / 2)
    one_counts = {**inputs, "loss_weights": torch.tensor([[1.0, 1.0, 0.0, 0.0, 0.0]])}
    weighted = supervised_loss(model, one_counts, keep_logits=keep_logits)
    torch.testing.assert_close(weighted.loss, F.cross_entropy(logits[:1], targets[:1]))


def test_totals_are_means_over_tokens_and_over_processes() -> None:
    model, totals, entropy = make("llama"), TokenTotals(), LossOptions(entropy=True)
    assert totals.means() == {}
    for row in ROWS:
        totals.add(supervised_loss(model, batch(flat=False, rows=[row]), options=entropy))
    whole = supervised_loss(model, batch(flat=False), options=entropy)
    means = totals.means()
    assert means["loss"] == pytest.approx(whole.loss.item(), rel=1e-6)
    assert means["mean_token_accuracy"] == whole.num_correct.item() / 5
    assert whole.entropy is not None
    assert means["entropy"] == pytest.approx(whole.entropy.item() / 5, rel=1e-6)
    assert totals.means(gather=lambda sums: torch.cat([sums, sums])) == means
    nothing = TokenTotals()
    nothing.add(supervised_loss(model, batch(flat=False, rows=ROWS[2:])))
    assert nothing.means() == {}


def unsloth_like(model: Any, takes_lists: bool) -> Any:
    """Patch a model's class as unsloth does: the argument has both names, and tensors in it are ignored or fail."""
    plain = type(model).forward

    def fast_forward(
        self: Any,
        input_ids: Any = None,
        causal_mask: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        labels: Any = None,
        num_logits_to_keep: Any = 0,
        logits_to_keep: Any = 0,
        **kwargs: Any,
    ) -> Any:
        assert labels is None
        if not takes_lists:
            max(num_logits_to_keep, logits_to_keep)
        return plain(self, input_ids, attention_mask, position_ids, **kwargs)

    model.__class__ = type("FastModel", (type(model),), {"forward": fast_forward})
    model.for_training = model.for_inference = lambda: model
    return model


@pytest.mark.parametrize("takes_lists", [False, True])
@pytest.mark.parametrize("flat", [False, True], ids=["padded", "flat"])
@pytest.mark.parametrize("adapted", ["q_proj", "lm_head"])
def test_model_patched_by_unsloth_passes_through(flat: bool, takes_lists: bool, adapted: str) -> None:
    """With an adapted head too, which keeps the loss from applying the head itself."""

    def lora() -> LoraConfig:
        torch.manual_seed(0)
        return LoraConfig(target_modules=[adapted], init_lora_weights=False)

    expected, expected_gradients = run(get_peft_model(make("qwen2"), lora()), batch(flat))
    patched = get_peft_model(unsloth_like(make("qwen2"), takes_lists), lora())
    result, found = run(patched, batch(flat))
    torch.testing.assert_close(result.loss, expected.loss, rtol=1e-5, atol=1e-6)
    assert (result.num_correct, result.num_targets) == (expected.num_correct, expected.num_targets)
    assert_same(found, expected_gradients)


def test_logits_of_a_model_that_ignores_the_list_of_positions_are_not_mistaken() -> None:
    model = make("qwen2")
    plain = model.forward
    model.forward = lambda *args, logits_to_keep=0, **kwargs: plain(*args, **kwargs)
    supervised = supervised_logits(model, batch(flat=False))
    expected = supervised_logits(make("qwen2"), batch(flat=False))
    torch.testing.assert_close(supervised.logits, expected.logits, rtol=1e-5, atol=1e-6)


def test_dft_loss_of_logits_weighs_each_token_by_its_probability() -> None:
    # with equal logits of two tokens, each has the probability 1/2: the loss is half the cross entropy
    logits = torch.full((2, 3, 2), 0.7, requires_grad=True)
    labels = torch.tensor([[1, 0, 0], [0, 1, IGNORE_INDEX]])
    expected = 0.5 * math.log(2)
    assert dft_loss(SimpleNamespace(logits=logits), labels).item() == pytest.approx(expected)
    assert dft_loss(SimpleNamespace(logits=logits), labels, 6).item() == pytest.approx(expected * 3 / 6)
    dft_loss(SimpleNamespace(logits=logits), labels).backward()
    assert logits.grad is not None
    assert logits.grad[0, 0].tolist() == pytest.approx([-0.25 / 3, 0.25 / 3])


def test_dft_loss_as_a_function_trains_as_the_option_does(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"text": ["Paris is the capital of France.", "Hello! How are you today?"]})
    options = [{"loss_type": "dft"}, {}]
    losses = [
        SFTTrainer(
            tiny_model(),
            args=quiet_config(tmp_path, max_steps=2, save_strategy="no", **option),
            train_dataset=rows,
            processing_class=tiny_tokenizer(),
            compute_loss_func=None if option else dft_loss,
        )
        .train()
        .training_loss
        for option in options
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("flat", [True, False])
def test_the_losses_of_groups_are_those_of_their_tokens_alone(family: str, flat: bool) -> None:
    model = make(family)
    rows = [
        {**ROWS[0], "loss_groups": [0, 0, 0, 0, 1, 1]},
        {**ROWS[1], "loss_groups": [1, 1, -1]},
        {**ROWS[2], "loss_groups": [2, 2, 2, 2]},
    ]
    whole, gradients = run(model, batch(flat, ROWS))
    grouped, same_gradients = run(model, batch(flat, rows), num_groups=3)
    torch.testing.assert_close(grouped.loss_sum, whole.loss_sum)
    for name, gradient in gradients.items():
        torch.testing.assert_close(same_gradients[name], gradient)
    assert grouped.groups is not None
    assert grouped.groups[:, 1].tolist() == [2, 2, 0]
    for number, labels in enumerate(([X, X, 7, 8, X, X], [X, X, X, X, X, 10])):
        others = [{**ROWS[0], "labels": labels}, {**ROWS[1], "labels": [X, 12 if number else X, X]}]
        alone, _ = run(model, batch(flat, others))
        torch.testing.assert_close(grouped.groups[number, 0], alone.loss_sum)
    assert run(model, batch(flat, rows))[0].groups is None
