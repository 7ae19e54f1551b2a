"""What is trained is what the model generates: no word of a user, and no word of an answer left out."""

from __future__ import annotations

from typing import Any

from benchmarks.silent_failures.case import Outcome, case
from benchmarks.silent_failures.libraries import Library, trained_stretches
from benchmarks.silent_failures.tiny import CHATML, CHATML_WITH_MARKERS, make_model, make_tokenizer

CHAT = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "Thanks. And of England?"},
    {"role": "assistant", "content": "London."},
]

CHANNELS = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% if message['thinking'] %}<|start|>assistant<|channel|>analysis<|message|>{{ message['thinking'] }}<|end|>"
    "{% endif %}<|start|>assistant<|channel|>final<|message|>{{ message['content'] }}"
    "{% if loop.last %}<|return|>{% else %}<|end|>{% endif %}"
    "{% else %}<|start|>{{ message['role'] }}<|message|>{{ message['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
"""As gpt-oss has it: one turn repeats the header for each of its channels."""

NOT_THINKING = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is not defined or not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""As small Qwen3.5 have it: what is generated begins after an empty thought, which the text of a chat does not have."""

BLANK_BEFORE_ANSWER = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""Its generation prompt ends in a blank, which the tokenizer joins to the first word of the answer."""

MARKERS = r"\{% ?generation|assistant[_ ]mask|generation prompt|chat_template_kwargs"


def spans_of_chat(library: Library, template: str, messages: list[dict[str, Any]], right: list[str]) -> Outcome:
    """Train on the assistant's turns of a chat and compare the trained stretches."""
    tokenizer = make_tokenizer(template)
    trainer = library.trainer(make_model(), tokenizer, [{"messages": messages}], assistant_only_loss=True)
    return Outcome(library.spans(trainer, tokenizer)[0], right)


@case(
    "`assistant_only_loss` needs markers that the template does not have",
    threads=("huggingface/trl#4879", "huggingface/trl#5471", "huggingface/trl#6577"),
    says=MARKERS,
    reviewed=("chat template is not training-compatible", "not prefix-preserving"),
)
def assistant_turns_without_markers(library: Library) -> Outcome:
    return spans_of_chat(library, CHATML, CHAT, ["Paris.<|im_end|>", "London.<|im_end|>"])


@case(
    "`assistant_only_loss` trains other tokens than the template's markers say",
    threads=("huggingface/trl#4879",),
    says=MARKERS,
)
def assistant_turns_with_markers(library: Library) -> Outcome:
    return spans_of_chat(library, CHATML_WITH_MARKERS, CHAT, ["Paris.<|im_end|>", "London.<|im_end|>"])


@case(
    "One turn in several channels (gpt-oss): the analysis is not trained",
    threads=("NVIDIA-NeMo/Megatron-Bridge#5389", "NovaSky-AI/SkyRL#390"),
    says=MARKERS,
    reviewed=("chat template is not training-compatible",),
)
def channels_of_one_turn(library: Library) -> Outcome:
    messages = [CHAT[0], {"role": "assistant", "content": "Paris.", "thinking": "It is Paris."}]
    right = (
        "<|channel|>analysis<|message|>It is Paris.<|end|><|start|>assistant<|channel|>final<|message|>Paris.<|return|>"
    )
    return spans_of_chat(library, CHANNELS, messages, [right])


@case(
    "One turn in several channels, as prompt and completion",
    threads=("NVIDIA-NeMo/Megatron-Bridge#5389",),
    says=MARKERS,
)
def channels_of_a_completion(library: Library) -> Outcome:
    tokenizer = make_tokenizer(CHANNELS)
    answer = {"role": "assistant", "content": "Paris.", "thinking": "It is Paris."}
    trainer = library.trainer(make_model(), tokenizer, [{"prompt": CHAT[:1], "completion": [answer]}])
    right = (
        "<|channel|>analysis<|message|>It is Paris.<|end|><|start|>assistant<|channel|>final<|message|>Paris.<|return|>"
    )
    return Outcome(library.spans(trainer, tokenizer)[0], [right])


@case(
    "The generation prompt ends in an empty thought that the trained text lacks",
    threads=("huggingface/trl#6766", "modelscope/ms-swift#9829"),
    says=rf"{MARKERS}|prompt is not a prefix",
    reviewed=("chat template is not training-compatible",),
)
def generation_prompt_longer_than_text(library: Library) -> Outcome:
    tokenizer = make_tokenizer(NOT_THINKING)
    row = {"prompt": CHAT[:1], "completion": CHAT[1:2]}
    trainer = library.trainer(make_model(), tokenizer, [row])
    ((ids, labels),) = library.sequences(trainer)
    first = next(place for place, label in enumerate(labels) if label != -100)
    prompt = tokenizer.apply_chat_template(CHAT[:1], add_generation_prompt=True, return_dict=False)
    return Outcome(tokenizer.decode(ids[:first]), tokenizer.decode(prompt))


@case(
    "The prompt's last token merges with the answer's first",
    threads=("huggingface/trl#5213", "huggingface/trl#6361"),
    says=r"not a prefix|prompt ends|token boundary|complete token|generation prompt",
)
def prompt_merges_with_completion(library: Library) -> Outcome:
    tokenizer = make_tokenizer(BLANK_BEFORE_ANSWER)
    row = {"prompt": CHAT[:1], "completion": [{"role": "assistant", "content": "Paris."}]}
    trainer = library.trainer(make_model(), tokenizer, [row])
    ((ids, labels),) = library.sequences(trainer)
    first = next(place for place, label in enumerate(labels) if label != -100)
    prompt = tokenizer.apply_chat_template(CHAT[:1], add_generation_prompt=True, return_dict=False)
    return Outcome(ids[:first], prompt)


@case(
    "The line break of a response template merges with the answer",
    threads=("huggingface/trl#1183", "huggingface/trl#598", "huggingface/trl#588", "huggingface/trl#1820"),
    says=r"(response|instruction)[_ ](template|part)",
)
def response_template_merges(library: Library) -> Outcome:
    text = "### Instruction:\nWhat is the capital?\n\n### Response:\n\nParis.<|im_end|>"
    spans = response_spans(library, text, "### Response:\n")
    return Outcome(spans, ["Paris.<|im_end|>"], also=(["\nParis.<|im_end|>"],))


@case(
    "Answers of several turns, found by templates in the text: others are trained",
    threads=("huggingface/trl#619", "huggingface/trl#1282"),
    says=r"(response|instruction)[_ ](template|part)",
)
def response_templates_of_turns(library: Library) -> Outcome:
    turns = [f"### Instruction:\n{q}\n### Response:\n{a}\n" for q, a in (("One?", "Paris."), ("Two?", "London."))]
    spans = response_spans(library, "".join(turns) + "<|im_end|>", "### Response:\n")
    return Outcome([span.strip("\n") for span in spans], ["Paris.", "London.\n<|im_end|>"])


def response_spans(library: Library, text: str, response: str) -> list[str]:
    """Train on what follows a template in plain text and return the trained stretches."""
    tokenizer = make_tokenizer(None)
    rows = [{"text": text}]
    trainer = library.response_trainer(
        make_model(), tokenizer, rows, instruction="### Instruction:\n", response=response
    )
    return library.spans(trainer, tokenizer)[0]


@case("`'loss': false` of a message is ignored", threads=("modelscope/ms-swift#9263",), says=r"['\"`]loss['\"`]")
def loss_flag_of_message(library: Library) -> Outcome:
    return flagged(library, "loss", False)


@case(
    "`'weight': 0` of a message is ignored",
    threads=("axolotl-ai-cloud/axolotl#1703", "openai/openai-cookbook#1270"),
    says=r"['\"`]weight['\"`]",
)
def weight_of_message(library: Library) -> Outcome:
    return flagged(library, "weight", 0)


@case("`'train': false` of a message is ignored", threads=("allenai/open-instruct#283",), says=r"['\"`]train['\"`]")
def train_flag_of_message(library: Library) -> Outcome:
    return flagged(library, "train", False)


@case("`'train_on': false` of a message is ignored", says=r"train_on")
def train_on_flag_of_message(library: Library) -> Outcome:
    return flagged(library, "train_on", False)


def flagged(library: Library, key: str, value: Any) -> Outcome:
    """Train on a chat whose first answer is marked as not to be trained."""
    tokenizer = make_tokenizer(CHATML_WITH_MARKERS)
    messages = [{**message, key: None} for message in CHAT]
    messages[1][key] = value
    messages[3][key] = type(value)(1)
    messages = [{name: kept for name, kept in message.items() if kept is not None} for message in messages]
    trainer = library.trainer(make_model(), tokenizer, [{"messages": messages}], assistant_only_loss=True)
    ((ids, labels),) = library.sequences(trainer)
    weights = library.weights(trainer)
    if weights is not None:
        labels = [label if weight else -100 for label, weight in zip(labels, weights[0], strict=True)]
    return Outcome(trained_stretches(ids, labels, tokenizer), ["London.<|im_end|>"])
