"""Generation: the same answers as `generate` at any batch size, with a flag for those that end with a stop token."""

from __future__ import annotations

import random

import pytest
import torch

from sft.evaluate.generation import generate_batch, stop_token_ids
from tests.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.numerics


def make_prompts(num_shared: int = 0) -> list[list[int]]:
    rng = random.Random(1)
    shared = [rng.randrange(4, 300) for _ in range(num_shared)]
    return [shared + [rng.randrange(4, 300) for _ in range(rng.randrange(2, 15))] for _ in range(9)]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom", "qwen3", "gemma2", "phi", "gpt_neox"])
@pytest.mark.parametrize("num_shared", [0, 20])
def test_answers_equal_those_of_generate_one_prompt_at_a_time(family: str, num_shared: int) -> None:
    model, tokenizer, prompts = tiny_model(family), tiny_tokenizer(), make_prompts(num_shared)
    # A token that the random weights prefer, so that some answers stop early and leave the batch.
    likely = model.generate(torch.tensor([prompts[0]]), max_new_tokens=4, do_sample=False, eos_token_id=-1)[0, -1]
    model.generation_config.eos_token_id = [int(likely), tokenizer.eos_token_id]
    answers = generate_batch(model, tokenizer, prompts, max_new_tokens=12, batch_size=4)
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=3)[
            0, len(prompt) :
        ].tolist()
        stopped = tokens[-1] in model.generation_config.eos_token_id
        content = tokens[:-1] if stopped else tokens
        assert answer.text == tokenizer.decode(content, skip_special_tokens=False)
        assert (answer.stopped, answer.num_tokens) == (stopped, len(content))


@pytest.mark.parametrize("num_known", [0, 1, 5, 12])
def test_answers_that_have_begun_end_as_if_generated_whole(num_known: int) -> None:
    model, tokenizer, prompts = tiny_model(), tiny_tokenizer(), make_prompts()
    whole = [
        model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=-1)[0, len(prompt) :]
        for prompt in prompts
    ]
    model.generation_config.eos_token_id = [int(whole[0][3])]
    begun = [answer[: num_known if row % 2 else 0].tolist() for row, answer in enumerate(whole)]
    expected = generate_batch(model, tokenizer, prompts, max_new_tokens=12)
    calls: list[tuple[int, int, str]] = []
    answers = generate_batch(
        model, tokenizer, prompts, 12, batch_size=2, begun=begun, on_progress=lambda *call: calls.append(call)
    )
    assert answers == expected
    assert calls[-1][:2] == (len(prompts), len(prompts))


def test_nothing_is_computed_for_answers_that_are_known_to_their_end() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    calls: list[tuple[int, int, str]] = []
    model.forward = None
    (answer,) = generate_batch(
        model,
        tokenizer,
        [[5, 6]],
        max_new_tokens=12,
        begun=[[9, tokenizer.eos_token_id, 4]],
        on_progress=lambda *call: calls.append(call),
    )
    assert (answer.text, answer.stopped, answer.num_tokens) == (tokenizer.decode([9]), True, 1)
    assert calls == [(1, 1, "prompts answered")]


def test_some_answers_in_that_test_stop_and_some_do_not() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    likely = model.generate(torch.tensor([make_prompts()[0]]), max_new_tokens=4, do_sample=False, eos_token_id=-1)[
        0, -1
    ]
    model.generation_config.eos_token_id = [int(likely)]
    stopped = [answer.stopped for answer in generate_batch(model, tokenizer, make_prompts(), max_new_tokens=12)]
    assert len(set(stopped)) == 2


def test_stop_tokens_are_those_of_the_generation_config_and_of_the_tokenizer() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.generation_config.eos_token_id = [7, 0]
    assert stop_token_ids(model, tokenizer) == [0, tokenizer.eos_token_id, 7]


def test_model_that_can_never_stop_is_refused() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer(eos_token=None)
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="set eos_token_id"):
        generate_batch(model, tokenizer, [[5]], max_new_tokens=2)


def test_empty_prompt_is_named() -> None:
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate_batch(tiny_model(), tiny_tokenizer(), [[5], []], max_new_tokens=2)
