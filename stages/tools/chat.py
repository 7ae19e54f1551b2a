"""`sft chat`: chat with one of the four models in the terminal, in the form of its training rows."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase, TextStreamer

from sft.evaluate.generation import stop_token_ids
from sft.models.checkpoint import load_tokenizer
from sft.untrusted.templates import chat_templates_in_child
from stages.checkout.artifacts import read_json, read_jsonl
from stages.checkout.paths import Paths
from stages.models.variants import MADE_BY, find_variant, load_variant
from stages.params.schema import Params
from stages.tools.freshness import warn_if_stale

NEW = "/new"
Message = dict[str, str]


@dataclass(frozen=True)
class Habits:
    """What the training conversations have in common.

    Args:
        system: Their most frequent system message; None if most have none.
        num_rows: Number of training rows.
        num_with_system: How many of them have this system message.
        is_multi_turn: Whether any has more than one user message.
    """

    system: str | None
    num_rows: int
    num_with_system: int
    is_multi_turn: bool


def run(
    params: Params, paths: Paths, *, model: str = "merged", max_new_tokens: int = 256, system: str | None = None
) -> None:
    """Answer every line of standard input with greedy decoding, until end of input; notes go to standard error.

    Args:
        params: Values of params.yaml.
        paths: Paths of the checkout.
        model: base, tuned, merged or quantized.
        max_new_tokens: Longest answer, in tokens.
        system: System message; None for the most frequent one of the training rows.

    Raises:
        ValueError: The model does not exist yet, or was not trained on conversations.
    """
    variant = find_variant(paths, model)
    warn_if_stale(params, paths, MADE_BY[model][0])
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
    """Yield the lines of standard input that are not blank; a terminal shows a prompt."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line:
            yield line


def note(*texts: str) -> None:
    """Print notes to standard error, so that standard output has only the answers."""
    for text in texts:
        print(f"note: {text}", file=sys.stderr, flush=True)


def training_habits(params: Params, paths: Paths) -> Habits:
    """Find out from the training rows how a conversation with the model should begin.

    Raises:
        ValueError: The rows are not conversations.
    """
    file = paths.out("load", "train.jsonl")
    systems: Counter[str | None] = Counter()
    is_multi_turn = False
    for record in read_jsonl(file):
        messages = record.get("messages", record.get("prompt"))
        if not isinstance(messages, list):
            raise ValueError(
                f"{file}, {record['id']}: plain text, not a conversation: `chat` uses the chat template, and this "
                "model was trained without it"
            )
        own = [message["content"] for message in messages if message["role"] == "system"]
        systems[own[0] if own else params.format.system_message] += 1
        is_multi_turn |= sum(message["role"] == "user" for message in messages) > 1
    system, count = systems.most_common(1)[0]
    return Habits(system, systems.total(), count, is_multi_turn)


def opening_notes(habits: Habits, system: str | None) -> list[str]:
    """Return the notes to print before the first message."""
    if system is None:
        notes = ["no system message; --system TEXT sets one"]
    elif system == habits.system:
        share = f"{habits.num_with_system} of {habits.num_rows} training rows"
        notes = [f"system message {system!r}, as {share} have it; --system TEXT sets another"]
    else:
        notes = [f"system message {system!r}"]
    if habits.is_multi_turn:
        return [*notes, f"{NEW} begins a new conversation; Ctrl-D (end of input) ends"]
    return [*notes, "trained on single questions: each line begins a new conversation; Ctrl-D (end of input) ends"]


class Talker:
    """A model that streams its answers to standard output.

    Args:
        model: A causal language model in evaluation mode, or a PEFT model around one.
        tokenizer: Its tokenizer, with the chat template of the training.
        max_new_tokens: Longest answer, in tokens.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> None:
        self._model, self._tokenizer, self._max_new_tokens = model, tokenizer, max_new_tokens
        stops = stop_token_ids(model, tokenizer)
        self._generation = GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=stops, pad_token_id=tokenizer.pad_token_id
        )
        # Replaces the model's own generation config: `generate` would take sampling and penalties from it for options
        # that are not set here, and `evaluate` uses none. A PEFT model generates with the config of the model it wraps.
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        inner.generation_config = self._generation

    def answer(self, conversation: list[Message]) -> list[Message]:
        """Print the answer to a conversation while it is generated.

        Returns:
            The conversation with the answer; without its last message if the template refuses it, or it does not fit
            into the context.
        """
        try:
            with chat_templates_in_child():
                rendered: Any = self._tokenizer.apply_chat_template(
                    conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
                )
        except ValueError as error:
            note(f"not answered: {error}")
            return conversation[:-1]
        inputs = rendered.to(next(self._model.parameters()).device)
        length = inputs["input_ids"].shape[1]
        limit = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and length + self._max_new_tokens > limit:
            note(f"not answered: {length} tokens and {self._max_new_tokens} new ones are more than {limit}; type {NEW}")
            return conversation[:-1]
        streamer: Any = TextStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)
        output = self._model.generate(**inputs, generation_config=self._generation, streamer=streamer)
        tokens = output[0, length:].tolist()
        if len(tokens) == self._max_new_tokens and tokens[-1] not in self._generation.eos_token_id:
            note(f"cut after {self._max_new_tokens} tokens; --max-new-tokens N allows more")
        text = str(self._tokenizer.decode(tokens, skip_special_tokens=True))
        return [*conversation, {"role": "assistant", "content": text}]
