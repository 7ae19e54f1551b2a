"""The attention of a training fits its device and precision, and keeps documents from seeing each other."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PromptTuningConfig
from transformers import PreTrainedModel

from sft.attention.choice import flash_sdp_only
from sft.attention.kernels import SFT_DOCUMENTS
from sft.batches.collator import DataCollatorForSFT
from sft.batches.layout import document_layout
from sft.config import SFTConfig
from sft.hardware import Hardware
from sft.train import batches
from sft.train.batches import choose_attention, refuse_flat_reason
from sft.train.trainer import SFTTrainer
from tests.tiny import random_model, tiny_model, tiny_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(tmp_path)


def config(folder: str, **options: Any) -> SFTConfig:
    return SFTConfig(output_dir=folder, report_to=[], use_cpu=True, **options)


def test_padded_batches_keep_the_models_attention(folder: str) -> None:
    model = tiny_model("opt")
    before = model.config._attn_implementation
    assert choose_attention(model, config(folder), flat=False).description == f"attention {before} on padded batches"
    assert model.config._attn_implementation == before


def test_flat_batches_replace_an_attention_that_leaks(folder: str) -> None:
    model = tiny_model("opt")
    before = model.config._attn_implementation
    choose_attention(model, config(folder), flat=True)
    assert model.config._attn_implementation != before  # opt's own lets documents see each other


def test_forced_flash_is_refused_where_batches_are_padded(folder: str) -> None:
    with pytest.raises(ValueError, match="needs packing=True"):
        choose_attention(tiny_model(), config(folder, force_flash_sdp=True), flat=False)


def test_model_on_another_device_is_not_probed_and_the_log_says_so(
    folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model().to(torch.device("meta"))
    with caplog.at_level(logging.WARNING, logger="sft.train.batches"):
        choose_attention(model, config(folder), flat=True)
    assert "not checked that sft_documents keeps documents from seeing each other" in caplog.text


# ---- padded or flat batches where the options leave it open ----


def trainer(folder: str, model: Any = None, kind: type = SFTTrainer, arguments: Any = None, **options: Any) -> Any:
    """A trainer of a tiny model on four rows of different lengths."""
    rows = Dataset.from_dict({"input_ids": [list(range(5, 8 + 3 * length)) for length in range(4)]})
    return kind(
        model or tiny_model(),
        args=config(
            folder, per_device_train_batch_size=4, max_steps=3, save_strategy="no", disable_tqdm=True, **options
        ),
        train_dataset=rows,
        processing_class=tiny_tokenizer(),
        **(arguments or {}),
    )


def batch_of(trained: Any) -> Any:
    return next(iter(trained.get_train_dataloader()))


def test_batches_are_flat_by_default_and_the_log_says_why(folder: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="sft.train.trainer"):
        chosen = trainer(folder)
    assert batch_of(chosen)["input_ids"].shape[0] == 1
    assert chosen.model.config._attn_implementation == SFT_DOCUMENTS
    assert "batches are joined rows without padding; attention sft_documents" in caplog.text


def test_flat_and_padded_batches_train_alike(folder: str) -> None:
    losses = []
    for padding_free in (None, False):
        trained = trainer(folder, random_model("llama", None), padding_free=padding_free, logging_steps=1)
        trained.train()
        losses.append([entry["loss"] for entry in trained.state.log_history if "loss" in entry])
        assert batch_of(trained)["input_ids"].shape[0] == (4 if padding_free is False else 1)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


class OwnLoss(SFTTrainer):
    """A script's own loss, which passes batches on to the model."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's own."""
        loss = model(**inputs).loss
        return (loss, {}) if return_outputs else loss


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        ({"padding_free": False}, "attention sdpa on padded batches"),
        ({"pad_to_multiple_of": 8}, "pad_to_multiple_of is set"),
        ({"arguments": {"data_collator": DataCollatorForSFT(0)}}, "attention sdpa on padded batches"),
        ({"arguments": {"compute_metrics": dict}}, "compute_metrics"),
        ({"arguments": {"compute_loss_func": print}}, "compute_loss_func"),
        ({"kind": OwnLoss}, "compute_loss is the script's own"),
        (
            {"arguments": {"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)}},
            "prompt tuning",
        ),
    ],
    ids=lambda made: str(made)[:40],
)
def test_batches_stay_padded_where_something_needs_them_so(folder: str, made: dict[str, Any], reason: str) -> None:
    chosen = trainer(folder, **made)
    assert reason in chosen.attention
    assert batch_of(chosen)["input_ids"].shape[0] == 4


def test_trainer_with_its_own_compute_loss_trains(folder: str) -> None:
    trainer(folder, kind=OwnLoss).train()


def test_model_whose_documents_leak_gets_padded_batches(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    before = model.config._attn_implementation

    def leaks(model: Any, own_attention: str) -> None:
        raise ValueError("documents see each other")

    monkeypatch.setattr(batches, "isolate_documents", leaks)
    chosen = trainer(folder, model)
    assert chosen.attention == f"attention {before} on padded batches: documents see each other"
    assert chosen.model.config._attn_implementation == before
    assert batch_of(chosen)["input_ids"].shape[0] == 4


@pytest.mark.parametrize(
    ("hardware", "dtype", "flat"),
    [
        (Hardware("cpu"), torch.float32, True),
        (Hardware("cuda", (8, 0), frozenset({"torch.nn.attention.varlen"})), torch.bfloat16, True),
        (Hardware("cuda", (9, 0), frozenset({"flash_attn_interface"})), torch.bfloat16, True),
        (Hardware("cuda", (8, 0), frozenset({"torch.nn.attention.varlen"})), torch.float32, False),
        (Hardware("cuda", (7, 5), frozenset({"flash_attn"})), torch.float16, False),
        (Hardware("cuda", (8, 0)), torch.bfloat16, False),
        (Hardware("mps"), torch.float32, False),
    ],
)
def test_a_device_without_a_kernel_for_whole_rows_gets_padded_batches(
    folder: str, hardware: Hardware, dtype: torch.dtype, flat: bool
) -> None:
    chosen = trainer(folder, tiny_model().to(dtype))
    reason = refuse_flat_reason(chosen, SFTTrainer, hardware)
    assert (reason is None) is flat
    assert flat or "has no kernel" in str(reason)


def asked_for(attention: str, family: str = "llama", **overrides: Any) -> PreTrainedModel:
    model = tiny_model(family, **overrides)
    model.set_attn_implementation(attention)
    return model


def test_eager_attention_is_kept_where_it_was_asked_for(folder: str) -> None:
    model = asked_for("eager")
    assert choose_attention(model, config(folder), flat=True).description.startswith("attention eager: as requested")
    assert model.config._attn_implementation == "eager"
    model = tiny_model("gemma2")  # eager is the default of transformers for it, not a request
    assert model.config._attn_implementation == "eager"
    assert choose_attention(model, config(folder), flat=True).description.startswith("attention sft_documents: ")


def test_eager_attention_that_leaks_runs_document_by_document_where_it_was_asked_for(folder: str) -> None:
    chosen = choose_attention(asked_for("eager", "opt"), config(folder), flat=True)
    assert chosen.description.endswith("; 2 OPTAttention run document by document")
    assert [mixer.name for mixer in chosen.mixers] == [
        "model.decoder.layers.0.self_attn",
        "model.decoder.layers.1.self_attn",
    ]


@pytest.mark.parametrize("flat", [False, True])
def test_an_attention_that_cannot_train_here_is_refused_on_padded_batches_too(folder: str, flat: bool) -> None:
    with pytest.raises(ValueError, match="attn_implementation='flex_attention' cannot be used: it trains on CUDA"):
        choose_attention(asked_for("flex_attention"), config(folder), flat=flat)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    ("capability", "mixed", "complaint"),
    [((8, 0), {}, "computes in torch.float32 .set bf16=True"), ((7, 5), {"bf16": True}, "capability 8.0, and .* 7.5")],
)
def test_flash_attention_of_a_model_object_is_checked_against_the_gpu(
    folder: str,
    monkeypatch: pytest.MonkeyPatch,
    flat: bool,
    capability: tuple[int, int],
    mixed: dict[str, bool],
    complaint: str,
) -> None:
    gpu = Hardware("cuda", capability, frozenset({"flash_attn"}))
    monkeypatch.setattr("sft.train.batches.current_hardware", lambda device: gpu)
    model = tiny_model()
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match=f"attn_implementation='flash_attention_2' cannot be used: .*{complaint}"):
        choose_attention(model, config(folder, **mixed), flat=flat)


def test_forced_flash_is_refused_together_with_eager(folder: str) -> None:
    with pytest.raises(ValueError, match="'eager' does not use that kernel: set it to 'sdpa'"):
        choose_attention(asked_for("eager"), config(folder, force_flash_sdp=True), flat=True)


def test_forced_flash_is_refused_where_layers_attend_in_chunks(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    model.config.attention_chunk_size = 4
    with pytest.raises(ValueError, match=r"takes no mask, and layers attend in chunks of 4.*force_flash_sdp=False"):
        choose_attention(model, config(folder, force_flash_sdp=True), flat=True)


def test_forced_flash_says_what_the_kernel_does_not_take() -> None:
    model = tiny_model("gpt2", attn_pdrop=0.1)
    model.set_attn_implementation(SFT_DOCUMENTS)
    message = r"flash kernel does not take this layer's attention on cpu: .*dropout 0\.1 .*force_flash_sdp=False"
    with flash_sdp_only(), document_layout([3, 2]), pytest.raises(ValueError, match=message):
        model.train()(input_ids=torch.tensor([[5, 6, 7, 5, 6]]), position_ids=torch.tensor([[0, 1, 2, 0, 1]]))
