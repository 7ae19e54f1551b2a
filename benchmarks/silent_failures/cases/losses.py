"""Losses and figures are means over tokens, whatever the batch; options of the loss take effect."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.silent_failures.case import NotOffered, Outcome, case
from benchmarks.silent_failures.cases.lengths import TEXTS, WORDS, encoded, mean_loss
from benchmarks.silent_failures.libraries import Library
from benchmarks.silent_failures.tiny import make_model, make_tokenizer

ROWS = [{"text": text} for text in TEXTS]


@case(
    "The loss of an evaluation depends on the batch size",
    threads=("huggingface/transformers#39241", "huggingface/transformers#24839"),
    says=r"batch size|mean of",
)
def eval_loss_by_batches(library: Library) -> Outcome:
    model = make_model()
    right = mean_loss(model, encoded(TEXTS))
    trainer = library.trainer(model, make_tokenizer(), ROWS, eval_rows=ROWS, per_device_eval_batch_size=1)
    return Outcome(library.eval_loss(trainer), right)


@case(
    "Accuracy of an evaluation depends on the batch size",
    threads=("huggingface/transformers#39241",),
    says=r"batch size|mean of",
)
def eval_accuracy_by_batches(library: Library) -> Outcome:
    model = make_model()
    hits = [
        model(input_ids=torch.tensor([ids])).logits[0, :-1].argmax(-1) == torch.tensor(ids[1:])
        for ids in encoded(TEXTS)
    ]
    hits = torch.cat(hits).float()
    trainer = library.trainer(model, make_tokenizer(), ROWS, eval_rows=ROWS, per_device_eval_batch_size=1)
    metrics = trainer.evaluate()
    if "eval_mean_token_accuracy" not in metrics:
        raise NotOffered("no accuracy of tokens")
    return Outcome(metrics["eval_mean_token_accuracy"], float(hits.mean()))


@case(
    "The loss of accumulated batches is a mean of their means",
    threads=("huggingface/transformers#34191",),
    says=r"accumulation",
)
def loss_by_accumulation(library: Library) -> Outcome:
    model = make_model()
    right = mean_loss(model, encoded(TEXTS))
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 1}
    return Outcome(library.first_loss(library.trainer(model, make_tokenizer(), ROWS, **options)), right)


@case(
    "Gradients of accumulated batches differ from those of one batch",
    threads=("huggingface/transformers#34191",),
    says=r"accumulation",
)
def gradient_by_accumulation(library: Library) -> Outcome:
    norms = []
    for size, steps in ((4, 1), (1, 4)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 1}
        trainer = library.trainer(make_model(), make_tokenizer(), ROWS, **options)
        norms.append(next(line["grad_norm"] for line in library.train(trainer) if "grad_norm" in line))
    return Outcome(norms[1], norms[0])


@case(
    "A loss that is not finite is logged as 0 and training goes on",
    threads=("huggingface/trl#6702",),
    says=r"\bnan\b|not finite|non-finite|infinite",
)
def training_goes_on_with_nan(library: Library) -> Outcome:
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    trainer = library.trainer(model, make_tokenizer(), ROWS, max_steps=2)
    losses = [line["loss"] for line in library.train(trainer) if "loss" in line]
    return Outcome([loss if loss == loss else "nan" for loss in losses], ["nan", "nan"])


@case(
    "Labels that come with the rows are replaced",
    threads=("huggingface/trl#3589", "oobabooga/textgen#4032", "hiyouga/LLaMA-Factory#10475"),
    says=r"labels",
)
def labels_of_rows(library: Library) -> Outcome:
    model = make_model()
    documents = encoded([WORDS])
    rows = [{"input_ids": ids, "labels": [-100] * 5 + ids[5:]} for ids in documents]
    trainer = library.trainer(model, make_tokenizer(), rows, max_steps=1)
    return Outcome(library.first_loss(trainer), mean_loss(make_model(), documents, masked=5))


@case("Label smoothing is ignored", threads=("huggingface/transformers#10338",), says=r"label_smoothing")
def label_smoothing(library: Library) -> Outcome:
    model = make_model()
    total, count = 0.0, 0
    for ids in encoded(TEXTS):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum", label_smoothing=0.1)
        total, count = total + float(losses), count + len(ids) - 1
    options = {"label_smoothing_factor": 0.1, "max_steps": 1, "per_device_train_batch_size": 4}
    trainer = library.trainer(model, make_tokenizer(), ROWS, **options)
    return Outcome(library.first_loss(trainer), total / count)


def loss_of_family(library: Library, family: str) -> Outcome:
    """Compare the loss of a training with that of the model's own logits."""
    model = make_model(family)
    right = mean_loss(model, encoded(TEXTS))
    trainer = library.trainer(model, make_tokenizer(), ROWS, max_steps=1, per_device_train_batch_size=4)
    return Outcome(library.first_loss(trainer), right)


@case(
    "The loss ignores that the head caps its logits (Gemma 2)",
    threads=("apple/ml-cross-entropy#48", "tdrussell/qlora-pipe#18"),
    says=r"softcap",
)
def loss_of_capped_logits(library: Library) -> Outcome:
    return loss_of_family(library, "gemma2")


@case(
    "The loss ignores that the head scales its logits (Cohere)",
    threads=("unslothai/unsloth#11277", "huggingface/trl#5575"),
    says=r"logit_scale",
)
def loss_of_scaled_logits(library: Library) -> Outcome:
    return loss_of_family(library, "cohere")


@case(
    "The loss ignores that the head divides its logits (Granite)",
    threads=("unslothai/unsloth#11277", "unslothai/unsloth#1218"),
    says=r"logits_scaling",
)
def loss_of_divided_logits(library: Library) -> Outcome:
    return loss_of_family(library, "granite")


@case(
    "The loss ignores the bias of the head (Phi)",
    threads=("linkedin/Liger-Kernel#82", "apple/ml-cross-entropy#52"),
    says=r"bias",
)
def loss_of_head_with_bias(library: Library) -> Outcome:
    return loss_of_family(library, "phi")


@case(
    "The mean counts first tokens, which nothing predicts (GPT-2)",
    threads=("huggingface/transformers#46204",),
    says=r"num_items|first tokens?",
)
def loss_of_gpt2(library: Library) -> Outcome:
    return loss_of_family(library, "gpt2")


@case(
    "Padding on the left moves learned positions (OPT)",
    threads=("huggingface/trl#4497", "tloen/alpaca-lora#315"),
    says=r"padding_side|position",
)
def loss_under_left_padding(library: Library) -> Outcome:
    model = make_model("opt")
    right = mean_loss(model, encoded(TEXTS))
    tokenizer = make_tokenizer(padding_side="left")
    trainer = library.trainer(model, tokenizer, ROWS, max_steps=1, per_device_train_batch_size=4)
    return Outcome(library.first_loss(trainer), right)


@case(
    "An adapter on the head is not trained",
    threads=("unslothai/unsloth#9331", "unslothai/unsloth#4098", "huggingface/trl#4612"),
    says=r"lm_head|target_modules",
)
def adapter_on_head(library: Library) -> Outcome:
    from peft import LoraConfig

    config = LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM", lora_dropout=0.0)
    trainer = library.trainer(make_model(), make_tokenizer(), ROWS, peft_config=config, max_steps=1)
    norms = [line["grad_norm"] for line in library.train(trainer) if "grad_norm" in line]
    return Outcome(norms[0] > 0, True)


@case(
    "Activation checkpointing with an adapter: no gradients, a healthy loss",
    threads=("unslothai/unsloth#5230",),
    says=r"grad|checkpointing",
)
def gradients_under_checkpointing(library: Library) -> Outcome:
    from peft import LoraConfig

    norms = []
    for checkpointing in (False, True):
        options: dict[str, Any] = {"gradient_checkpointing": checkpointing, "max_steps": 1}
        if checkpointing:
            options["gradient_checkpointing_kwargs"] = {"use_reentrant": True}
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", lora_dropout=0.0)
        trainer = library.trainer(make_model(), make_tokenizer(), ROWS, peft_config=config, **options)
        norms.append(next(line["grad_norm"] for line in library.train(trainer) if "grad_norm" in line))
    return Outcome(norms[1], norms[0])


@case(
    "A resumed training takes other rows than an uninterrupted one",
    threads=("axolotl-ai-cloud/axolotl#3291",),
    says=r"resum",
)
def rows_after_resume(library: Library) -> Outcome:
    whole, resumed = whole_and_resumed(library)
    return Outcome([line["loss"] for line in resumed], [line["loss"] for line in whole], tolerance=1e-5)


@case(
    "The token counter starts again at a resume", threads=("huggingface/trl#3552",), says=r"resum.*token|token.*resum"
)
def tokens_after_resume(library: Library) -> Outcome:
    whole, resumed = whole_and_resumed(library)
    return Outcome([line["num_tokens"] for line in resumed], [line["num_tokens"] for line in whole])


def whole_and_resumed(library: Library) -> list[list[dict[str, float]]]:
    """Return the log lines after update 3 of an uninterrupted training, and of one that was resumed there."""
    rows = [{"text": f"{text} {number}"} for number in range(3) for text in TEXTS]
    options = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-3}
    whole = library.trainer(make_model(), make_tokenizer(), rows, max_steps=6, **options)
    lines = library.train(whole)
    again = library.trainer(make_model(), make_tokenizer(), rows, max_steps=6, **options)
    resumed = library.train(again, resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-3")
    return [[line for line in log if line.get("step", 0) > 3 and "loss" in line] for log in (lines, resumed)]


@case(
    "A row without trained tokens makes the loss of an evaluation NaN",
    threads=("huggingface/trl#3927", "PrimeIntellect-ai/prime-rl#978"),
    says=r"masked|no (trained|supervised) token|label",
)
def masked_row_in_evaluation(library: Library) -> Outcome:
    model = make_model()
    documents = encoded(TEXTS)
    rows = [{"input_ids": ids, "labels": ids} for ids in documents]
    masked = {"input_ids": documents[0], "labels": [-100] * len(documents[0])}
    trainer = library.trainer(
        model, make_tokenizer(), rows, eval_rows=[*rows, masked], per_device_eval_batch_size=1, max_length=None
    )
    return Outcome(library.eval_loss(trainer), mean_loss(model, documents))
