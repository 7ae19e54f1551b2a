"""What an adapter is asked to train is trained, and what was trained is in the merged model."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.silent_failures.case import REFUSAL, Outcome, case
from benchmarks.silent_failures.cases.lengths import TEXTS
from benchmarks.silent_failures.libraries import Library
from benchmarks.silent_failures.tiny import make_model, make_tokenizer

ROWS = [{"text": text} for text in TEXTS]


UNTRAINED = r"\btied\b|modules_to_save|trainable_token_indices|<\|new\|>|<\|turn\|>|(new|added) tokens?.*train"


def lora(**options: Any) -> Any:
    """Return a LoRA configuration with a large effect."""
    from peft import LoraConfig

    defaults = {"r": 4, "lora_alpha": 64, "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**defaults, "target_modules": ["q_proj", "v_proj"], **options})


def trained(library: Library, model: Any, tokenizer: Any, peft_config: Any, **options: Any) -> tuple[Any, Any]:
    """Train a few updates with an adapter; return the trainer and the folder of the base."""
    base = library.folder()
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    options = {"max_steps": 4, "learning_rate": 5e-2, "per_device_train_batch_size": 4, **options}
    trainer = library.trainer(str(base), tokenizer, ROWS, peft_config=peft_config, **options)
    library.train(trainer)
    return trainer, base


def logits(model: Any) -> list[float]:
    """Return some logits of a model as a list."""
    ids = torch.tensor([make_tokenizer()("The lazy dog")["input_ids"]])
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids).logits[0, :, :24].flatten().float().tolist()


def merged_logits(library: Library, model: Any, peft_config: Any, **options: Any) -> Outcome:
    """Compare the logits of the merged model with those of the model in memory after training."""
    trainer, base = trained(library, model, make_tokenizer(), peft_config, **options)
    right = logits(trainer.model)
    merged = logits(library.merge(trainer, base))
    # merges of unsloth are in 16 bits
    scale = max(abs(number) for number in right)
    distance = max(abs(a - b) for a, b in zip(right, merged, strict=True)) / scale
    return Outcome(f"logits off by {distance:.0%}" if distance > 0.02 else "the trained logits", "the trained logits")


@case(
    "Merging loses trained biases (`bias='all'`)",
    threads=("unslothai/unsloth#1519",),
    says=r"(merg|refus|train).*\bbias",
)
def merge_with_all_biases(library: Library) -> Outcome:
    return merged_logits(library, make_model(attention_bias=True, mlp_bias=True), lora(bias="all"))


@case(
    "Merging loses trained biases (`bias='lora_only'`)",
    threads=("unslothai/unsloth#1519",),
    says=r"(merg|refus|train).*\bbias",
)
def merge_with_biases_of_lora(library: Library) -> Outcome:
    return merged_logits(library, make_model(attention_bias=True), lora(bias="lora_only"))


@case(
    "Merging an adapter whose start changed the base (PiSSA)",
    threads=("huggingface/transformers#34468", "huggingface/peft#1929"),
    says=r"pissa|init_lora_weights",
)
def merge_of_pissa(library: Library) -> Outcome:
    return merged_logits(library, make_model(), lora(init_lora_weights="pissa"))


@case(
    "Merging an adapter whose start is random, too (`pissa_niter_4`)",
    threads=("huggingface/peft#1929",),
    says=r"pissa|init_lora_weights",
)
def merge_of_pissa_niter(library: Library) -> Outcome:
    return merged_logits(library, make_model(), lora(init_lora_weights="pissa_niter_4"))


@case(
    "Merging an adapter whose start changed the base (OLoRA)",
    threads=("huggingface/transformers#34468",),
    says=r"olora|init_lora_weights",
)
def merge_of_olora(library: Library) -> Outcome:
    return merged_logits(library, make_model(), lora(init_lora_weights="olora"))


@case(
    "Merging loses a saved head where embeddings are tied",
    threads=("huggingface/peft#2864", "unslothai/unsloth#2009"),
    says=r"\btied?\b|lm_head|embed_tokens",
)
def merge_with_tied_head(library: Library) -> Outcome:
    return merged_logits(library, make_model(tie_word_embeddings=True), lora(modules_to_save=["lm_head"]))


@case(
    "Merging loses saved embeddings and head",
    threads=("huggingface/peft#2864",),
    says=r"\btied?\b|lm_head|embed_tokens",
)
def merge_with_saved_modules(library: Library) -> Outcome:
    return merged_logits(library, make_model(), lora(modules_to_save=["embed_tokens", "lm_head"]))


@case(
    "New tokens under LoRA: their embedding rows stay as they were drawn",
    threads=("huggingface/peft#1750", "unslothai/unsloth#9331"),
    says=UNTRAINED,
)
def new_tokens_untrained(library: Library) -> Outcome:
    return new_rows_change(library, tied=False)


@case(
    "New tokens under LoRA with tied embeddings",
    threads=("huggingface/peft#2864", "unslothai/unsloth#9331"),
    says=UNTRAINED,
)
def new_tokens_untrained_tied(library: Library) -> Outcome:
    return new_rows_change(library, tied=True)


def new_rows_change(library: Library, *, tied: bool) -> Outcome:
    """Add a token, train texts that have it, and report whether training changed its rows of embeddings and head."""
    base, tokenizer = library.folder(), make_tokenizer()
    make_model(tie_word_embeddings=tied).save_pretrained(base)
    tokenizer.save_pretrained(base)
    rows = [{"text": f"A fox <|new|> {text}"} for text in TEXTS]
    trainer = library.trainer_with_tokens(base, ["<|new|>"], rows, peft_config=lora(), max_steps=4, learning_rate=5e-2)
    before = new_rows(trainer.model)
    library.train(trainer)
    changed = [not torch.equal(a, b) for a, b in zip(before, new_rows(trainer.model), strict=True)]
    return Outcome(changed, [True, True])


def new_rows(model: Any) -> list[torch.Tensor]:
    """Return the last row of embeddings and head, with what an adapter adds to it.

    The rows are read off the layers' outputs, so that it does not matter how an adapter trains them.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    size = model.config.vocab_size
    model.eval()
    with torch.no_grad():
        row = embedding(torch.tensor([[size - 1]]))
        units = torch.eye(model.config.hidden_size)
        return [row.clone(), head(units)[:, size - 1].clone()]


@case(
    "`modules_to_save` that names no module is ignored",
    says=r"embed_token\b|modules_to_save",
)
def module_to_save_not_found(library: Library) -> Outcome:
    config = lora(modules_to_save=["embed_token"])
    trainer = library.trainer(make_model(), make_tokenizer(), ROWS, peft_config=config)
    return Outcome(sum("modules_to_save" in name for name, _ in trainer.model.named_parameters()), REFUSAL)


@case(
    "One of the `target_modules` names no module and is ignored",
    threads=("huggingface/peft#1959", "huggingface/peft#3693", "huggingface/peft#3554"),
    says=r"v_projj|target_modules",
)
def target_module_not_found(library: Library) -> Outcome:
    config = lora(target_modules=["q_proj", "v_projj"])
    trainer = library.trainer(make_model(), make_tokenizer(), ROWS, peft_config=config)
    return Outcome(sum("lora_A" in name for name, _ in trainer.model.named_parameters()), REFUSAL)


@case(
    "`all-linear` leaves the experts of gpt-oss frozen",
    threads=(
        "unslothai/unsloth#6936",
        "axolotl-ai-cloud/axolotl#3515",
        "modelscope/ms-swift#6173",
        "NVIDIA-NeMo/Automodel#1151",
    ),
    says=r"expert",
)
def experts_left_out(library: Library) -> Outcome:
    trainer = library.trainer(
        make_model("gpt_oss"), make_tokenizer(), ROWS, peft_config=lora(target_modules="all-linear")
    )
    names = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    return Outcome(any(".experts" in name for name in names), True)


@case(
    "Experts named by their layers (`gate_proj`, `up_proj`, `down_proj`) stay frozen",
    threads=("NVIDIA-NeMo/Automodel#1151",),
    says=r"expert|gate_proj|up_proj|down_proj",
)
def experts_by_name(library: Library) -> Outcome:
    config = lora(target_modules=["gate_proj", "up_proj", "down_proj"])
    trainer = library.trainer(make_model("qwen3_moe"), make_tokenizer(), ROWS, peft_config=config)
    names = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    return Outcome(any(".experts" in name for name in names), True)


@case(
    "New tokens of a chat template under LoRA with tied embeddings stay untrained",
    threads=("huggingface/peft#2864",),
    says=UNTRAINED,
)
def chat_template_with_new_tokens(library: Library) -> Outcome:
    source = library.folder()
    other = make_tokenizer(extra_special_tokens=["<|turn|>"])
    other.chat_template = make_tokenizer().chat_template.replace("<|im_start|>", "<|turn|>")
    other.save_pretrained(source)
    rows = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}]
    options = {"chat_template_path": str(source), "max_steps": 4, "learning_rate": 5e-2, "peft_config": lora()}
    trainer = library.trainer(make_model(tie_word_embeddings=True), make_tokenizer(), rows, **options)
    before = new_rows(trainer.model)
    library.train(trainer)
    changed = [not torch.equal(a, b) for a, b in zip(before, new_rows(trainer.model), strict=True)]
    return Outcome(changed, [True, True])
