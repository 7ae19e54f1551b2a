"""First tokens of answers, found while scoring, always equal those of generation."""

from __future__ import annotations

import random

import pytest
import torch

from sft.evaluate.generation import BegunAnswers, generate_batch
from sft.evaluate.likelihood import Document, evaluate_model
from sft.labels import IGNORE_INDEX
from tests.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.numerics

NUM_NEW = 10


def row(prompt: list[int], answer: list[int]) -> dict[str, list[int]]:
    return {"input_ids": prompt + answer, "labels": [IGNORE_INDEX] * len(prompt) + answer}


def test_answers_are_those_of_generation_alone_for_right_half_right_and_wrong_references() -> None:
    model, tokenizer, rng = tiny_model(), tiny_tokenizer(), random.Random(3)
    prompts = [[rng.randrange(4, 300) for _ in range(rng.randrange(2, 15))] for _ in range(8)]
    rows, agreed = [], []
    for number, prompt in enumerate(prompts):
        answer = model.generate(torch.tensor([prompt]), max_new_tokens=NUM_NEW, do_sample=False, eos_token_id=-1)
        tokens = answer[0, len(prompt) :].tolist()
        agreed.append(number if number < NUM_NEW - 2 else 0)
        wrong = [token + 1 for token in tokens[agreed[-1] :]]
        rows.append(row(prompt, tokens[: agreed[-1]] + wrong))
    begun = BegunAnswers(prompts)
    evaluate_model(model, rows, 60, on_predictions=begun.learn)
    # all tokens that agree, and the first that does not
    assert [len(tokens) for tokens in begun.tokens()] == [number + 1 for number in agreed]
    expected = generate_batch(model, tokenizer, prompts, NUM_NEW)
    assert generate_batch(model, tokenizer, prompts, NUM_NEW, begun=begun.tokens()) == expected


def test_every_turn_of_a_conversation_may_be_the_prompt() -> None:
    labels = [IGNORE_INDEX, IGNORE_INDEX, 3, 4, IGNORE_INDEX, 6, 7]
    document = Document(0, [1, 2, 3, 4, 5, 6, 7], labels)
    begun = BegunAnswers([[1, 2, 3, 4, 5], [1, 2], [9]])
    begun.learn(document, [3, 8, 6, 7])
    assert begun.tokens() == [[6, 7], [3, 8], []]


def test_a_document_that_is_supervised_from_its_start_gives_no_tokens() -> None:
    begun = BegunAnswers([[1, 2]])
    begun.learn(Document(0, [1, 2, 3], [1, 2, 3]), [2, 3])
    assert begun.tokens() == [[]]
