"""Ids from the cache of words equal those of the tokenizer itself."""

from __future__ import annotations

import json
import random

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from sft.tokens import byte_level
from sft.tokens.byte_level import WordCache

GPT = pre_tokenizers.ByteLevel(add_prefix_space=False)
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
STYLES = {
    "gpt2": GPT,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT]),
    "qwen": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}
WORDS = [
    "the",
    "quick",
    "don't",
    "I'll",
    "émigré",
    "день",
    "λόγος",
    "你好",
    "x=1",
    "3.14",
    "“quoted”",
    "—",
    "...",
    "a_b",
]
GAPS = [" ", " ", " ", " ", "  ", "\n", " \n ", "\t", "", "\u00a0", " \u200b", "<|end|>", "<|end|> "]


def tokenizer(pre_tokenizer: pre_tokenizers.PreTokenizer) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizer
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=["<|end|>"])
    made.train_from_iterator(texts(0, 300), trainer)
    return made


def texts(seed: int, number: int) -> list[str]:
    source = random.Random(seed)
    return [
        "".join(source.choice(WORDS) + source.choice(GAPS) for _ in range(source.randrange(30))) for _ in range(number)
    ]


def own_ids(rules: Tokenizer, rows: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in rules.encode_batch(rows, add_special_tokens=False)]


@pytest.mark.parametrize("style", STYLES)
def test_ids_are_those_of_the_whole_text(style: str) -> None:
    rules = tokenizer(STYLES[style])
    cache = WordCache.of(rules)
    assert cache is not None
    for seed in (1, 2, 1):
        rows = texts(seed, 400)
        assert [ids.tolist() for ids in cache.encode(rows)] == own_ids(rules, rows)
    assert 0 < len(cache._known) < 4000


def test_a_text_of_nothing_has_no_ids() -> None:
    cache = WordCache.of(tokenizer(GPT))
    assert cache is not None
    assert cache.encode([""])[0].tolist() == []


def test_texts_without_repetition_go_to_the_tokenizer_whole() -> None:
    rules = tokenizer(GPT)
    cache = WordCache.of(rules)
    assert cache is not None
    rows = [f"{number:x}q{number * 7919:x} {number * 104729:x}" for number in range(200)]
    assert [ids.tolist() for ids in cache.encode(rows)] == own_ids(rules, rows)
    known = dict(cache._known)
    others = texts(3, 50)
    assert [ids.tolist() for ids in cache.encode(others)] == own_ids(rules, others)
    assert cache._known == known


def test_words_are_forgotten_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_level, "MAX_CHARACTERS", 10)
    rules = tokenizer(GPT)
    cache = WordCache.of(rules)
    assert cache is not None
    rows = texts(4, 400)
    assert [ids.tolist() for ids in cache.encode(rows)] == own_ids(rules, rows)
    assert cache._known == {}


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["model"].update(dropout=0.1),
        lambda state: state["pre_tokenizer"].update(add_prefix_space=True),
        lambda state: state["pre_tokenizer"].update(use_regex=False),
        lambda state: state["added_tokens"][0].update(rstrip=True),
        lambda state: state["added_tokens"][0].update(lstrip=True),
        lambda state: state["added_tokens"][0].update(content="<|the end|>"),
    ],
)
def test_tokenizers_with_tokens_across_spaces_have_no_cache(change: object) -> None:
    state = json.loads(tokenizer(GPT).to_str())
    assert callable(change)
    change(state)
    assert WordCache.of(Tokenizer.from_str(json.dumps(state))) is None
