"""Truncation and packing lose no token without a word, and documents of one row do not see each other."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.silent_failures.case import REFUSAL, Outcome, case
from benchmarks.silent_failures.libraries import Library
from benchmarks.silent_failures.tiny import make_model, make_tokenizer

WORDS = "The quick brown fox jumps over the lazy dog. "
TEXTS = [WORDS * 2, "What is the capital of France?", "Paris is the capital of France. " * 2, "0 1 2 3 4 5"]
LEAKS = (
    r"flash[_ ]?attention|leak|contaminat|see each other|packed sequences|packed rows|packing=False|padding_free=False"
)


def mean_loss(model: Any, documents: list[list[int]], masked: int = 0) -> float:
    """Return the mean loss over tokens of documents that are computed one by one.

    Args:
        model: The model.
        documents: Token ids.
        masked: Number of first tokens of each document that are not trained.
    """
    total, count = 0.0, 0
    model.eval()
    for ids in documents:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].float()
        targets = torch.tensor(ids[1:])
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")[max(masked - 1, 0) :]
        total, count = total + float(losses.sum()), count + len(losses)
    return total / count


def encoded(texts: list[str]) -> list[list[int]]:
    """Return token ids of texts, each with eos at its end."""
    tokenizer = make_tokenizer()
    return [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]


def packed_loss(library: Library, family: str, **options: Any) -> Outcome:
    """Compare the loss of one row that holds all documents with that of the documents one by one."""
    model = make_model(family)
    right = mean_loss(model, encoded(TEXTS))
    options = {"max_length": 256, "max_steps": 1, "per_device_train_batch_size": 4, **options}
    trainer = library.trainer(model, make_tokenizer(), [{"text": text} for text in TEXTS], **options)
    return Outcome(library.first_loss(trainer), right, tolerance=2e-4)


@case(
    "Packed documents see each other: Llama",
    threads=("huggingface/trl#1230", "huggingface/trl#805", "huggingface/trl#3067", "huggingface/trl#3695"),
    says=LEAKS,
)
def packing_leaks_llama(library: Library) -> Outcome:
    return packed_loss(library, "llama", packing=True)


@case("Packed documents see each other: Llama, eager attention", threads=("huggingface/trl#3695",), says=LEAKS)
def packing_leaks_llama_eager(library: Library) -> Outcome:
    model = make_model()
    model.set_attn_implementation("eager")
    right = mean_loss(model, encoded(TEXTS))
    rows = [{"text": text} for text in TEXTS]
    trainer = library.trainer(model, make_tokenizer(), rows, max_length=256, max_steps=1, packing=True)
    return Outcome(library.first_loss(trainer), right, tolerance=2e-4)


@case(
    "Packed documents see each other: OPT, whose positions are learned",
    threads=("huggingface/trl#1230", "huggingface/trl#805"),
    says=LEAKS,
)
def packing_leaks_opt(library: Library) -> Outcome:
    return packed_loss(library, "opt", packing=True)


@case(
    "Packed documents see each other: Bloom, whose positions come from the mask",
    threads=("huggingface/trl#805",),
    says=LEAKS,
)
def packing_leaks_bloom(library: Library) -> Outcome:
    return packed_loss(library, "bloom", packing=True)


@case(
    "Packed documents see each other: LFM2 (convolutions)",
    threads=("modelscope/ms-swift#9565", "hiyouga/LLaMA-Factory#10436"),
    says=LEAKS,
)
def packing_leaks_lfm2(library: Library) -> Outcome:
    return packed_loss(library, "lfm2", packing=True)


@case(
    "Packed documents see each other: Qwen3-Next (linear attention)",
    threads=(
        "NVIDIA-NeMo/Automodel#2131",
        "NVIDIA-NeMo/Automodel#2147",
        "NVIDIA/Megatron-LM#3798",
        "pytorch/torchtitan#3892",
    ),
    says=LEAKS,
)
def packing_leaks_qwen3_next(library: Library) -> Outcome:
    return packed_loss(library, "qwen3_next", packing=True)


@case("Packed documents see each other: Mamba (state space)", says=LEAKS)
def packing_leaks_mamba(library: Library) -> Outcome:
    return packed_loss(library, "mamba", packing=True)


@case("Rows of a batch joined without padding see each other", threads=("huggingface/trl#3695",), says=LEAKS)
def padding_free_leaks(library: Library) -> Outcome:
    return packed_loss(library, "llama", padding_free=True, max_length=None)


@case(
    "Padding changes the loss: Mamba, whose layers read padded tokens",
    says=r"padding",
)
def padding_changes_mamba(library: Library) -> Outcome:
    return packed_loss(library, "mamba")


@case(
    "Packing cuts off long documents",
    threads=("huggingface/trl#4554", "huggingface/trl#5075"),
    says=r"truncat|max_length|tokens lost|longer",
)
def packing_loses_tokens(library: Library) -> Outcome:
    texts = [WORDS * 8, *TEXTS]
    rows = [{"text": text} for text in texts]
    trainer = library.trainer(make_model(), make_tokenizer(), rows, max_length=48, packing=True)
    return Outcome(sum(len(ids) for ids, _ in library.sequences(trainer)), sum(map(len, encoded(texts))))


@case(
    "Packing by a cut stream loses tokens",
    threads=("huggingface/trl#4554",),
    says=r"truncat|max_length|tokens lost|longer",
)
def wrapped_packing_keeps_tokens(library: Library) -> Outcome:
    texts = [WORDS * 8, *TEXTS]
    options = {"max_length": 48, "packing": True, "packing_strategy": "wrapped"}
    trainer = library.trainer(make_model(), make_tokenizer(), [{"text": text} for text in texts], **options)
    return Outcome(sum(len(ids) for ids, _ in library.sequences(trainer)), sum(map(len, encoded(texts))))


@case(
    "Truncation leaves rows without a trained token, which vanish",
    threads=("huggingface/trl#6668", "huggingface/trl#6025", "huggingface/trl#3927"),
    says=r"masked|nothing|no trained|\d+ (rows )?(were )?dropped|truncat",
)
def rows_masked_by_truncation(library: Library) -> Outcome:
    rows = [{"prompt": "Fox? ", "completion": "Dog."}, {"prompt": WORDS * 4, "completion": "Dog."}]
    trainer = library.trainer(make_model(), make_tokenizer(), rows, max_length=24)
    return Outcome(f"{len(trainer.train_dataset)} of 2 rows", "2 of 2 rows, or a word about the one that is gone")


@case(
    "Truncation leaves nothing to train in any row",
    threads=("huggingface/trl#6668",),
    says=r"nothing|no trained|max_length|truncat",
)
def all_rows_masked(library: Library) -> Outcome:
    rows = [{"prompt": WORDS * 4, "completion": "Dog."}] * 2
    trainer = library.trainer(make_model(), make_tokenizer(), rows, max_length=24, max_steps=1)
    losses = [line.get("loss") for line in library.train(trainer)]
    return Outcome(losses, REFUSAL)


@case("A document longer than the model's positions", threads=("huggingface/transformers#6559",), says=r"position")
def longer_than_positions(library: Library) -> Outcome:
    model = make_model("gpt2", n_positions=16, max_position_embeddings=16)
    trainer = library.trainer(model, make_tokenizer(), [{"text": WORDS * 4}], max_steps=1)
    return Outcome(library.first_loss(trainer), REFUSAL)


@case(
    "The tokenizer has more tokens than the model",
    threads=("huggingface/transformers#11102",),
    says=r"embeddings?\b|vocab|resize",
)
def tokens_without_embedding(library: Library) -> Outcome:
    model, tokenizer = make_model(), make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    trainer = library.trainer(model, tokenizer, [{"text": "A fox <|new|> a dog."}], max_steps=1)
    return Outcome(library.first_loss(trainer) > 0, REFUSAL)
