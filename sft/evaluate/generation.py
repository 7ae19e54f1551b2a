"""Batched generation, greedy or sampled, with a flag for answers that end with a stop token.

`BegunAnswers` saves part of the generation. Scoring a reference yields the most likely token at each of its positions.
As long as these tokens equal the reference, they are the greedy answer, and so is the first one that differs. This is
the verification step of speculative decoding (Leviathan et al., arXiv:2211.17192) with the reference as draft.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache, DynamicLayer, LinearAttentionCacheLayerMixin

from sft.evaluate.likelihood import Document, Progress
from sft.evaluate.prefix_cache import SharedPrefix, forward_parameters, share_prefix
from sft.inner_model import on_model

logger = logging.getLogger(__name__)

CACHE_ERRORS = (ValueError, LookupError, AttributeError, TypeError, RuntimeError, NotImplementedError)
"""Errors that models raise whose cache does not work."""


@dataclass(frozen=True)
class Generation:
    """One generated answer.

    Args:
        text: Decoded with its special tokens, such as those of a tool call, but without the stop token.
        stopped: Whether it ended with a stop token.
        num_tokens: Number of tokens without the stop token.
    """

    text: str
    stopped: bool
    num_tokens: int


Choose = Callable[[torch.Tensor], torch.Tensor]
"""Chooses the next token of each row, `(rows,)`, from logits `(rows, vocabulary)`."""


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """Choose the most likely token of each row."""
    return logits.argmax(-1)


def sampled(temperature: float, seed: int) -> Choose:
    """Return a choice that samples by the probabilities at a temperature, the same for one seed on one machine.

    Raises:
        ValueError: The temperature is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"a temperature must be above 0, found {temperature}; greedy answers need no sampling")
    generator = torch.Generator().manual_seed(seed)

    def choose(logits: torch.Tensor) -> torch.Tensor:
        probabilities = (logits.float() / temperature).softmax(-1).cpu()
        return torch.multinomial(probabilities, 1, generator=generator).squeeze(1).to(logits.device)

    return choose


@torch.inference_mode()
def generate_batch(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int = 32,
    on_progress: Progress | None = None,
    begun: Sequence[Sequence[int]] | None = None,
    choose: Choose = greedy,
) -> list[Generation]:
    """Generate answers to prompts.

    Prompts of similar length share a batch, padded on the left. Rows that have stopped are removed from the batch, so
    that one long answer does not keep the others computing. Models with recurrent states (Mamba, linear attention,
    convolutions) would read the padding into them, so that only prompts of the same length share a batch of theirs.

    Args:
        model: Causal language model, with or without an adapter.
        tokenizer: Decodes the answers.
        prompts: Token ids, `(num_prompts, length)`, ragged.
        max_new_tokens: Largest number of tokens of an answer, stop token included.
        batch_size: Number of prompts in a batch. The answers do not depend on it, except for rounding.
        on_progress: Called with (prompts done, number of prompts, text).
        begun: Known first tokens of each answer, `(num_prompts, length)`, ragged (see `BegunAnswers`); only the rest is
            generated.
        choose: Chooses the tokens: `greedy`, or `sampled` ones, which depend on the batch size.

    Returns:
        One generation per prompt, in the order of the prompts.

    Raises:
        ValueError: A prompt is empty, or there is no stop token.
    """
    empty = [index for index, prompt in enumerate(prompts) if not prompt]
    if empty:
        raise ValueError(f"prompt {empty[0]} is empty: it needs at least one token")
    stop_ids = stop_token_ids(model, tokenizer)
    answers = [_truncate(tokens, stop_ids, max_new_tokens) for tokens in begun or [[] for _ in prompts]]
    texts = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    unfinished = [
        i for i, tokens in enumerate(answers) if len(tokens) < max_new_tokens and not _stopped(tokens, stop_ids)
    ]
    order = sorted(unfinished, key=[len(text) for text in texts].__getitem__)
    done = len(prompts) - len(order)
    training = model.training
    model.eval()
    try:
        shared = [texts[index] for index in order]
        may_pad = bool(order) and caches_attention_only(model, shared[0])
        prefix = share_prefix(model, shared, limit=min(map(len, shared)) - 1) if may_pad else SharedPrefix()
        for chosen in _batches(order, [len(text) for text in texts], batch_size, same_length=not may_pad):
            longest = max_new_tokens - min(len(answers[index]) for index in chosen)
            rests = [texts[index][prefix.length :] for index in chosen]
            if may_pad:
                continued = _continue(model, rests, prefix, stop_ids, longest, choose)
            elif choose is not greedy:
                continued = [_continue_by_full_passes(model, row, stop_ids, longest, choose) for row in rests]
            else:
                continued = _continue_same_length(model, rests, stop_ids, longest)
            for index, tokens in zip(chosen, continued, strict=True):
                answers[index] = _truncate([*answers[index], *tokens], stop_ids, max_new_tokens)
            done += len(chosen)
            if on_progress is not None:
                on_progress(done, len(prompts), "prompts answered")
        if on_progress is not None and not order:
            on_progress(done, len(prompts), "prompts answered")
    finally:
        model.train(training)
    return [_generation(answer, stop_ids, tokenizer) for answer in answers]


@torch.inference_mode()
def generate_from_inputs(
    model: Any, tokenizer: PreTrainedTokenizerBase, inputs: Mapping[str, torch.Tensor], max_new_tokens: int
) -> Generation:
    """Generate the greedy answer to one prompt with images, by the model's own `generate`.

    Args:
        model: Vision-language model, with or without an adapter.
        tokenizer: Decodes the answer.
        inputs: The model's inputs for the prompt, each with a batch of one.
        max_new_tokens: Largest number of tokens of the answer, stop token included.
    """
    stop_ids = stop_token_ids(model, tokenizer)
    training = model.training
    model.eval()
    try:
        (tokens,) = _generate(model, inputs, stop_ids, max_new_tokens)
    finally:
        model.train(training)
    return _generation(tokens, stop_ids, tokenizer)


def stop_token_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids that end an answer: those of the generation config, and the tokenizer's eos token.

    Raises:
        ValueError: There are none, so that no answer could end.
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


def _truncate(tokens: Sequence[int], stop_ids: list[int], max_new_tokens: int) -> list[int]:
    """Return the tokens up to and including the first stop token, at most `max_new_tokens`."""
    end = next((place + 1 for place, token in enumerate(tokens) if token in stop_ids), len(tokens))
    return list(tokens[: min(end, max_new_tokens)])


def _stopped(answer: Sequence[int], stop_ids: list[int]) -> bool:
    return bool(answer) and answer[-1] in stop_ids


def _continue(
    model: nn.Module,
    rests: Sequence[Sequence[int]],
    prefix: SharedPrefix,
    stop_ids: list[int],
    max_new_tokens: int,
    choose: Choose = greedy,
) -> list[list[int]]:
    """Continue sequences, each up to and including its first stop token.

    Args:
        model: Causal language model.
        rests: Token ids of the sequences after the shared prefix, `(num_sequences, length)`, ragged.
        prefix: Shared prefix of the sequences.
        stop_ids: Token ids that end an answer.
        max_new_tokens: Largest number of tokens per answer.
        choose: Chooses the tokens.
    """
    input_ids, mask = _left_pad(rests, next(model.parameters()).device)
    mask, cache = prefix.mask(mask), prefix.rows(len(rests))
    answers: list[list[int]] = [[] for _ in rests]
    active = list(range(len(rests)))
    stops = torch.tensor(stop_ids, device=mask.device)
    for _ in range(max_new_tokens):
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -input_ids.shape[1] :]
        output = _step(model, input_ids, mask, positions, cache)
        cache = output.past_key_values
        chosen = choose(output.logits[:, -1])
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


def _batches(order: list[int], lengths: list[int], batch_size: int, *, same_length: bool) -> Iterator[list[int]]:
    """Divide prompts, in order of length, into batches; with `same_length`, into batches of one length."""
    groups = [list(group) for _, group in itertools.groupby(order, key=lengths.__getitem__)] if same_length else [order]
    for group in groups:
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


def caches_attention_only(model: nn.Module, tokens: Sequence[int]) -> bool:
    """Return whether a model's cache consists of keys and values, from which padding and rows can be removed.

    Args:
        model: Causal language model.
        tokens: Token ids of a text, whose first is used to find out.
    """
    if "past_key_values" not in forward_parameters(model):
        return False
    device = next(model.parameters()).device
    try:
        output = model(input_ids=torch.tensor([list(tokens[:1])], device=device), use_cache=True)
    except CACHE_ERRORS:  # some families can't make their own cache
        return False
    cache = getattr(output, "past_key_values", None)
    # a family's own class of cache may hold more than its layers
    return isinstance(cache, DynamicCache) and type(cache) is DynamicCache and all(map(_is_attention, cache.layers))


def _is_attention(layer: Any) -> bool:
    return isinstance(layer, DynamicLayer) and not isinstance(layer, LinearAttentionCacheLayerMixin)


@functools.lru_cache(maxsize=64)
def _warn_once(text: str) -> None:
    logger.warning(text)


def _continue_same_length(
    model: Any, rows: Sequence[Sequence[int]], stop_ids: list[int], max_new_tokens: int
) -> list[list[int]]:
    """Continue sequences of one length greedily, by the model's own states if they give the answers of a full pass."""
    try:
        input_ids = torch.tensor([list(row) for row in rows])
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        answers = _generate(model, inputs, stop_ids, max_new_tokens)
    except CACHE_ERRORS as error:
        _warn_once(f"{_family(model)} can't generate with its states ({type(error).__name__}): answers take longer")
        logger.debug("generation of %s", _family(model), exc_info=error)
    else:
        if all(_is_greedy(model, row, tokens) for row, tokens in zip(rows, answers, strict=True)):
            return answers
        _warn_once(f"the states of {_family(model)} give other answers than full passes, which are taken instead")
    return [_continue_by_full_passes(model, row, stop_ids, max_new_tokens) for row in rows]


def _family(model: Any) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))


def _is_greedy(model: nn.Module, row: Sequence[int], answer: Sequence[int]) -> bool:
    """Return whether each token of an answer is the most likely one after those before it, in one full pass."""
    device = next(model.parameters()).device
    logits = model(input_ids=torch.tensor([[*row, *answer]], device=device), use_cache=False).logits[0]
    return logits[len(row) - 1 : -1].argmax(-1).tolist() == list(answer)


def _continue_by_full_passes(
    model: nn.Module, row: Sequence[int], stop_ids: list[int], max_new_tokens: int, choose: Choose = greedy
) -> list[int]:
    """Continue a sequence without a cache: right for every family, in time quadratic in the length."""
    device = next(model.parameters()).device
    answer: list[int] = []
    while len(answer) < max_new_tokens and not _stopped(answer, stop_ids):
        logits = model(input_ids=torch.tensor([[*row, *answer]], device=device), use_cache=False).logits
        answer.append(int(choose(logits[:, -1])))
    return answer


def _generate(
    model: Any, inputs: Mapping[str, torch.Tensor], stop_ids: list[int], max_new_tokens: int
) -> list[list[int]]:
    """Continue sequences of one length by the model's own `generate`, which knows the states of its family."""
    device = next(model.parameters()).device
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    configured = inner.generation_config
    # `generate` takes options that are not given, such as a repetition penalty, from the model's own configuration
    inner.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=stop_ids, pad_token_id=stop_ids[0]
    )
    try:
        generated = model.generate(**on_model(inputs, model, device))
    finally:
        inner.generation_config = configured
    length = inputs["input_ids"].shape[1]
    return [_truncate(row, stop_ids, max_new_tokens) for row in generated[:, length:].tolist()]


def _left_pad(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return input ids and attention mask `(batch, longest)`, padded on the left so that all rows end together."""
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
    return Generation(answer_text(content, tokenizer), stopped, len(content))


def answer_text(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Decode an answer with its special tokens, which are part of it: tool calls and channels consist of them."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=False))


def reference_text(prompt: str, reference: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a reference as it reads if a model generates its tokens, so that the right answer equals it.

    Args:
        prompt: Text before the reference.
        reference: Expected answer, without the stop token.
        tokenizer: A fast tokenizer.
    """
    encoded = tokenizer(prompt + reference, add_special_tokens=False, return_offsets_mapping=True)
    spans = list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))
    border = len(prompt)
    if any(start < border < end for _, (start, end) in spans):  # a token crosses the border, which no answer can have
        return answer_text(tokenizer(reference, add_special_tokens=False)["input_ids"], tokenizer)
    return answer_text([token for token, (start, end) in spans if start >= border and end > start], tokenizer)


class BegunAnswers:
    """First tokens of greedy answers, found while references are scored.

    Pass `learn` to `evaluate_model` as `on_predictions`.

    Args:
        prompts: Token ids, `(num_prompts, length)`, ragged.
    """

    def __init__(self, prompts: Sequence[Sequence[int]]) -> None:
        self._prompts = [tuple(prompt) for prompt in prompts]
        self._known: dict[tuple[int, ...], list[int]] = {prompt: [] for prompt in self._prompts}

    def learn(self, document: Document, predicted: Sequence[int]) -> None:
        """Record the first tokens of the answers to all prompts that a document begins with.

        Args:
            document: Scored document. All tokens before one of its supervised spans may be a prompt.
            predicted: Most likely token at each of its supervised positions.
        """
        if document.row is not None:  # a prompt of the same tokens may have other images
            return
        most_likely = dict(zip(document.supervised, predicted, strict=True))
        for start in most_likely:
            if start - 1 in most_likely:
                continue
            prompt = tuple(document.input_ids[:start])
            if prompt in self._known:
                self._known[prompt] = _greedy_tokens(document, most_likely, start)

    def tokens(self) -> list[list[int]]:
        """Return the known first tokens of each answer, in the order of the prompts; empty for unknown ones."""
        return [self._known[prompt] for prompt in self._prompts]


def _greedy_tokens(document: Document, most_likely: dict[int, int], position: int) -> list[int]:
    """Return the greedy tokens from `position` on, up to and including the first that differs from the document."""
    tokens: list[int] = []
    while position in most_likely:
        tokens.append(most_likely[position])
        if tokens[-1] != document.input_ids[position]:
            break
        position += 1
    return tokens
