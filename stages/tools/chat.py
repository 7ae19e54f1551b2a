"""`python -m stages chat`: talk to one of the four models in the terminal, as it was trained to be talked to."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase, TextStreamer

from sft.evaluate.generation import stop_token_ids
from sft.models.checkpoint import load_tokenizer
from stages.checkout.artifacts import read_json, read_jsonl
from stages.checkout.paths import Paths
from stages.models.variants import find_variant, load_variant
from stages.params.schema import Params

NEW = "/new"
Message = dict[str, str]


@dataclass(frozen=True)
class Habits:
    """How the training conversations look: their most frequent system message, and how many questions they hold."""

    system: str | None
    num_rows: int
    num_with_system: int
    is_multi_turn: bool


def run(
    params: Params, paths: Paths, *, model: str = "merged", max_new_tokens: int = 256, system: str | None = None
) -> None:
    """Answer every line of the standard input, greedily, until it ends; notes go to the standard error.

    Args:
        params: The pipeline's values.
        paths: The checkout.
        model: base, tuned, merged or quantized.
        max_new_tokens: Longest answer.
        system: System message; None = the one of the training rows.

    Raises:
        ValueError: The model is not there yet, or was not trained on conversations.
    """
    variant = find_variant(paths, model)
    tokenizer = load_tokenizer(paths.out("format", "tokenizer"))
    habits = training_habits(params, paths)
    if system is None:
        system = habits.system
    note(f"loading {variant.name} from {variant.adapter or variant.checkpoint}")
    new_token_ids = read_json(paths.out("format", "summary.json"))["new_token_ids"]
    talker = Talker(load_variant(variant, params.model, len(tokenizer), new_token_ids), tokenizer, max_new_tokens)
    note(*opening_notes(habits, system))
    opening = [] if system is None else [{"role": "system", "content": system}]
    conversation = list(opening)
    for line in lines():
        if line == NEW or not habits.is_multi_turn:
            conversation = list(opening)
        if line != NEW:
            conversation = talker.answer([*conversation, {"role": "user", "content": line}])


def lines() -> Iterator[str]:
    """Lines of the standard input that hold anything; a person sees a prompt, a pipe does not."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line:
            yield line


def note(*texts: str) -> None:
    """Say something that is no answer, apart from the answers."""
    for text in texts:
        print(f"note: {text}", file=sys.stderr, flush=True)


def training_habits(params: Params, paths: Paths) -> Habits:
    """Read the training rows for what a conversation with the model begins with.

    Raises:
        ValueError: They are no conversations.
    """
    file = paths.out("load", "train.jsonl")
    systems: Counter[str | None] = Counter()
    is_multi_turn = False
    for record in read_jsonl(file):
        messages = record.get("messages", record.get("prompt"))
        if not isinstance(messages, list):
            raise ValueError(
                f"{file}, {record['id']}: plain text, no conversation: chat speaks by the chat template, and this "
                "model was trained without it"
            )
        own = [message["content"] for message in messages if message["role"] == "system"]
        systems[own[0] if own else params.format.system_message] += 1
        is_multi_turn |= sum(message["role"] == "user" for message in messages) > 1
    system, count = systems.most_common(1)[0]
    return Habits(system, systems.total(), count, is_multi_turn)


def opening_notes(habits: Habits, system: str | None) -> list[str]:
    """What a person should know before the first message."""
    if system is None:
        notes = ["no system message; --system TEXT gives one"]
    elif system == habits.system:
        share = f"{habits.num_with_system} of {habits.num_rows} training rows"
        notes = [f"system message {system!r}, as {share} have it; --system TEXT gives another"]
    else:
        notes = [f"system message {system!r}"]
    if habits.is_multi_turn:
        return [*notes, f"{NEW} begins a new conversation, end of input (Ctrl-D) ends"]
    return [*notes, "trained on single questions: each line begins a new conversation; end of input (Ctrl-D) ends"]


class Talker:
    """A model that streams its answers to the standard output.

    Args:
        model: Loaded for inference.
        tokenizer: With the chat template that the model was trained on.
        max_new_tokens: Longest answer.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> None:
        self._model, self._tokenizer, self._max_new_tokens = model, tokenizer, max_new_tokens
        stops = stop_token_ids(model, tokenizer)
        self._generation = GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=stops, pad_token_id=tokenizer.pad_token_id
        )
        # In place of the model's own, whose sampling and penalties would fill in what is not stated: `evaluate` has
        # none of them either. An adapter leaves generation to the model that it wraps.
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        inner.generation_config = self._generation

    def answer(self, conversation: list[Message]) -> list[Message]:
        """Stream the next turn; returns the conversation with it, or without the last message when that is too long."""
        inputs: Any = self._tokenizer.apply_chat_template(
            conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(next(self._model.parameters()).device)
        length = inputs["input_ids"].shape[1]
        limit = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and length + self._max_new_tokens > limit:
            note(f"not answered: {length} tokens and {self._max_new_tokens} new ones are more than {limit}; {NEW}")
            return conversation[:-1]
        streamer: Any = TextStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)
        output = self._model.generate(**inputs, generation_config=self._generation, streamer=streamer)
        tokens = output[0, length:].tolist()
        if len(tokens) == self._max_new_tokens and tokens[-1] not in self._generation.eos_token_id:
            note(f"cut after {self._max_new_tokens} tokens; --max-new-tokens N allows more")
        text = str(self._tokenizer.decode(tokens, skip_special_tokens=True))
        return [*conversation, {"role": "assistant", "content": text}]
