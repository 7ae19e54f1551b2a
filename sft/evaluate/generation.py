"""Batched greedy generation that says whether a model stops by itself.

What greedy answers begin with, learnt while references are scored: tokens that need not be generated again.

Scoring a reference yields the likeliest token at each of its positions. As long as these are the reference's own, they
are the greedy answer, and so is the first that differs: the verification step of speculative decoding (Leviathan et
al., arXiv:2211.17192) with the reference as draft. A model that answers right has been asked already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from sft.evaluate.likelihood import Document
from sft.evaluate.prefix_cache import SharedPrefix, forward_parameters, share_prefix

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Generation:
    """What a model answered: text without special tokens, whether a stop token ended it, tokens without that one."""

    text: str
    stopped: bool
    num_tokens: int


@torch.inference_mode()
def generate_batch(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int = 32,
    on_progress: Progress | None = None,
    begun: Sequence[Sequence[int]] | None = None,
) -> list[Generation]:
    """Continue every prompt with the likeliest tokens.

    Prompts of like length share a batch, padded on the left. Rows that have stopped leave the batch, so that one long
    answer does not keep all others computing.

    Args:
        model: a causal language model (an adapter model too).
        tokenizer: decodes the answers.
        prompts: token ids, `(num_prompts, length)`, ragged.
        max_new_tokens: where an answer is cut that does not stop.
        batch_size: prompts generated together; the answers do not depend on it but for rounding.
        on_progress: called with (prompts done, of how many, text).
        begun: tokens that each answer is known to begin with (see `begun_answers`); only what follows is computed.

    Returns:
        One generation a prompt, in the order of the prompts.

    Raises:
        ValueError: a prompt is empty, or there is no stop token.
    """
    empty = [index for index, prompt in enumerate(prompts) if not prompt]
    if empty:
        raise ValueError(f"prompt {empty[0]} is empty: nothing to continue")
    stop_ids = stop_token_ids(model, tokenizer)
    answers = [_answer(tokens, stop_ids, max_new_tokens) for tokens in begun or [[] for _ in prompts]]
    texts = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    open_ones = [
        i for i, tokens in enumerate(answers) if len(tokens) < max_new_tokens and not _stopped(tokens, stop_ids)
    ]
    order = sorted(open_ones, key=[len(text) for text in texts].__getitem__)
    done = len(prompts) - len(order)
    training = model.training
    model.eval()
    try:
        prefix = share_prefix(
            model, [texts[index] for index in order], limit=min((len(texts[index]) for index in order), default=0) - 1
        )
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            longest = max_new_tokens - min(len(answers[index]) for index in chosen)
            rests = [texts[index][prefix.length :] for index in chosen]
            for index, tokens in zip(chosen, _continue(model, rests, prefix, stop_ids, longest), strict=True):
                answers[index] = _answer([*answers[index], *tokens], stop_ids, max_new_tokens)
            done += len(chosen)
            if on_progress is not None:
                on_progress(done, len(prompts), "prompts answered")
        if on_progress is not None and not order:
            on_progress(done, len(prompts), "prompts answered")
    finally:
        model.train(training)
    return [_generation(answer, stop_ids, tokenizer) for answer in answers]


def stop_token_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end an answer: those of the generation config, and the tokenizer's own end token.

    Raises:
        ValueError: there is none, so that no answer could ever end.
    """
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = set(_as_list(configured)) | set(_as_list(tokenizer.eos_token_id))
    if not ids:
        raise ValueError("neither the generation config nor the tokenizer has an eos token: set eos_token_id")
    return sorted(ids)


def _as_list(value: int | Iterable[int] | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)


def _answer(tokens: Sequence[int], stop_ids: list[int], max_new_tokens: int) -> list[int]:
    """The tokens up to and with the first stop token, at most `max_new_tokens`."""
    end = next((place + 1 for place, token in enumerate(tokens) if token in stop_ids), len(tokens))
    return list(tokens[: min(end, max_new_tokens)])


def _stopped(answer: Sequence[int], stop_ids: list[int]) -> bool:
    return bool(answer) and answer[-1] in stop_ids


def _continue(
    model: nn.Module, rests: Sequence[Sequence[int]], prefix: SharedPrefix, stop_ids: list[int], max_new_tokens: int
) -> list[list[int]]:
    """Greedy continuations of prefix and rest, each up to and with its stop token."""
    input_ids, mask = _left_pad(rests, next(model.parameters()).device)
    mask, cache = prefix.mask(mask), prefix.rows(len(rests))
    answers: list[list[int]] = [[] for _ in rests]
    active = list(range(len(rests)))
    stops = torch.tensor(stop_ids, device=mask.device)
    for _ in range(max_new_tokens):
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -input_ids.shape[1] :]
        output = _step(model, input_ids, mask, positions, cache)
        cache = output.past_key_values
        chosen = output.logits[:, -1].argmax(-1)
        for row, token in zip(active, chosen.tolist(), strict=True):
            answers[row].append(token)
        going = ~torch.isin(chosen, stops)
        if not going.any():
            break
        if not going.all():
            keep = going.nonzero().squeeze(1)
            cache.batch_select_indices(keep)
            mask, chosen = mask[keep], chosen[keep]
            active = [active[index] for index in keep.tolist()]
        input_ids = chosen.unsqueeze(1)
        mask = torch.cat([mask, mask.new_ones(len(active), 1)], dim=1)
    return answers


def _left_pad(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Input ids and attention mask `(batch, longest)`, rows flush right so that all go on at the same place."""
    width = max(len(row) for row in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long, device=device)
    mask = torch.zeros_like(input_ids)
    for index, row in enumerate(rows):
        input_ids[index, width - len(row) :] = torch.tensor(row, device=device)
        mask[index, width - len(row) :] = 1
    return input_ids, mask


def _step(model: nn.Module, input_ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any) -> Any:
    inputs = {"input_ids": input_ids, "attention_mask": mask, "past_key_values": cache, "use_cache": True}
    accepted = forward_parameters(model)
    if "position_ids" in accepted:
        inputs["position_ids"] = positions
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = 1
    return model(**inputs)


def _generation(tokens: list[int], stop_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> Generation:
    stopped = _stopped(tokens, stop_ids)
    content = tokens[:-1] if stopped else tokens
    return Generation(tokenizer.decode(content, skip_special_tokens=True), stopped, len(content))


class BegunAnswers:
    """Collects beginnings of answers; its `learn` is `evaluate_model`'s `on_predictions`.

    Args:
        prompts: token ids, `(num_prompts, length)`, ragged.
    """

    def __init__(self, prompts: Sequence[Sequence[int]]) -> None:
        self._prompts = [tuple(prompt) for prompt in prompts]
        self._known: dict[tuple[int, ...], list[int]] = {prompt: [] for prompt in self._prompts}

    def learn(self, document: Document, predicted: Sequence[int]) -> None:
        """Look for prompts at the beginning of a document, and for what the model answers them with.

        Args:
            document: scored; a prompt is what stands before one of its supervised spans.
            predicted: the likeliest token at each of its supervised positions.
        """
        likeliest = dict(zip(document.supervised, predicted, strict=True))
        for start in likeliest:
            if start - 1 in likeliest:
                continue
            prompt = tuple(document.input_ids[:start])
            if prompt in self._known:
                self._known[prompt] = _agreed(document, likeliest, start)

    def tokens(self) -> list[list[int]]:
        """What each answer begins with, in the order of the prompts; empty where no document told."""
        return [self._known[prompt] for prompt in self._prompts]


def _agreed(document: Document, likeliest: dict[int, int], position: int) -> list[int]:
    """Greedy tokens from `position` on, up to and with the first that is not the document's."""
    tokens: list[int] = []
    while position in likeliest:
        tokens.append(likeliest[position])
        if tokens[-1] != document.input_ids[position]:
            break
        position += 1
    return tokens
