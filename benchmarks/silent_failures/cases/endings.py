"""The model learns to stop, and what it learned to end with ends generation."""

from __future__ import annotations

from typing import Any

from benchmarks.silent_failures.case import Outcome, case
from benchmarks.silent_failures.libraries import Library
from benchmarks.silent_failures.tiny import CHATML, make_model, make_tokenizer

CHAT = [{"role": "user", "content": "What is the capital of France?"}, {"role": "assistant", "content": "Paris."}]

WITHOUT_END = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)

WITH_BOS = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>"
    "\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

ENDS = r"\beos\b|end[- ]of[- ]|terminator|\bstop\b|<\|im_end\|>|<\|endoftext\|>|never (end|stop)"


def stop_tokens(folder: Any, tokenizer: Any) -> set[str]:
    """Return the tokens that end generation with a saved model."""
    from transformers import AutoTokenizer, GenerationConfig

    config = GenerationConfig.from_pretrained(folder)
    ids = config.eos_token_id
    ids = AutoTokenizer.from_pretrained(folder).eos_token_id if ids is None else ids
    return set(tokenizer.convert_ids_to_tokens(ids if isinstance(ids, list) else [ids]))


@case(
    "pad is eos, and the loss masks padding: eos is never trained",
    threads=("huggingface/trl#1623", "huggingface/trl#931", "huggingface/trl#2059", "huggingface/trl#3091"),
    says=ENDS,
)
def eos_is_pad(library: Library) -> Outcome:
    tokenizer = make_tokenizer(pad_token="<|im_end|>")
    trainer = library.trainer(
        make_model(), tokenizer, [{"text": "The quick fox."}, {"text": "Fox."}], per_device_train_batch_size=2
    )
    kept = ("input_ids", "labels", "seq_lengths")
    rows = [{name: row[name] for name in kept if name in row} for row in trainer.train_dataset]
    labels = trainer.data_collator(rows)["labels"]
    return Outcome(int((labels == tokenizer.eos_token_id).sum()), 2)


@case(
    "eos is masked by transformers' collator for language modelling",
    threads=("huggingface/trl#1623", "huggingface/trl#3091"),
    says=ENDS,
)
def eos_masked_by_collator(library: Library) -> Outcome:
    from transformers import DataCollatorForLanguageModeling

    tokenizer = make_tokenizer(pad_token="<|im_end|>")
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = library.trainer(make_model(), tokenizer, [{"text": "The quick fox."}], data_collator=collator)
    batch = next(iter(trainer.get_train_dataloader()))
    return Outcome(bool((batch["labels"] == tokenizer.eos_token_id).any()), True)


@case(
    "The template ends turns with one token, generation stops at another",
    threads=("hiyouga/LlamaFactory#7454", "modelscope/ms-swift#3113", "PrimeIntellect-ai/prime-rl#2644"),
    says=ENDS,
)
def end_of_turn_is_not_eos(library: Library) -> Outcome:
    tokenizer = make_tokenizer(CHATML, eos_token="<|endoftext|>")
    model = make_model(eos_token_id=tokenizer.eos_token_id)
    trainer = library.trainer(model, tokenizer, [{"messages": CHAT}], max_steps=1)
    library.train(trainer)
    return Outcome("<|im_end|>" in stop_tokens(library.save(trainer), tokenizer), True)


@case("The template ends no turn at all", threads=("hiyouga/LlamaFactory#7454",), says=ENDS)
def template_without_end(library: Library) -> Outcome:
    tokenizer = make_tokenizer(WITHOUT_END)
    trainer = library.trainer(make_model(), tokenizer, [{"prompt": CHAT[:1], "completion": CHAT[1:]}])
    return Outcome(library.spans(trainer, tokenizer)[0][-1].strip().endswith("<|im_end|>"), True)


@case(
    "Truncation cuts off the end of an answer, and no one is told",
    says=r"truncat|max_length",
)
def end_cut_off(library: Library) -> Outcome:
    tokenizer = make_tokenizer()
    rows = [{"prompt": "Question: ", "completion": "The quick brown fox jumps over the lazy dog. " * 4}]
    trainer = library.trainer(make_model(), tokenizer, rows, max_length=24)
    return Outcome(library.spans(trainer, tokenizer)[0][-1].endswith("<|im_end|>"), True)


@case(
    "A text that begins with bos gets a second one",
    threads=("huggingface/trl#1912", "OpenRLHF/OpenRLHF#393"),
    says=r"\bbos\b|<s>",
)
def second_bos(library: Library) -> Outcome:
    tokenizer = make_tokenizer(WITH_BOS, adds_bos=True)
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    trainer = library.trainer(make_model(), tokenizer, [{"text": text}])
    ((ids, _),) = library.sequences(trainer)
    return Outcome(ids.count(tokenizer.bos_token_id), 1)


@case(
    "A chat whose template prints bos gets a second one",
    threads=("huggingface/trl#1400", "huggingface/trl#3328"),
    says=r"\bbos\b|<s>",
)
def second_bos_in_chat(library: Library) -> Outcome:
    tokenizer = make_tokenizer(WITH_BOS, adds_bos=True)
    trainer = library.trainer(make_model(), tokenizer, [{"messages": CHAT}])
    ((ids, _),) = library.sequences(trainer)
    return Outcome(ids.count(tokenizer.bos_token_id), 1)


@case(
    "An empty answer trains the model to say nothing",
    threads=("youkaichao/dolly#1",),
    says=r"\bempty\b|no (text|content|words)",
)
def empty_answer(library: Library) -> Outcome:
    tokenizer = make_tokenizer()
    empty = {"prompt": CHAT[:1], "completion": [{"role": "assistant", "content": ""}]}
    trainer = library.trainer(make_model(), tokenizer, [{"prompt": CHAT[:1], "completion": CHAT[1:]}, empty])
    return Outcome(len(trainer.train_dataset), 1)
