"""Labels follow from the characters that tokens cover, for every kind of tokenizer."""

from __future__ import annotations

import random
import re
from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from sft.chat.render import Rendered, Span, TrainOn, render
from sft.labels import IGNORE_INDEX
from sft.tokens.encoding import Encoder, encode_batch
from tests.tiny import CHATML, CORPUS, tiny_tokenizer

CHAT = [
    {"role": "user", "content": "Hello! naïve 🎉?"},
    {"role": "assistant", "content": "é🎉 Paris"},
    {"role": "user", "content": "How are you"},
    {"role": "assistant", "content": "  Lima.\n\n"},
]
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]"]


def trained_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Tokenizers that report offsets in different ways; all begin a text with <s> when special tokens are added."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_rules(kind)), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@lru_cache
def _rules(kind: str) -> str:
    tokenizer = Tokenizer(models.BPE(byte_fallback=not kind.startswith("bytes"), unk_token="<unk>", fuse_unk=True))
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    if kind.startswith("bytes"):
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "bytes_prefix")
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = []
    elif kind == "sentencepiece_legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif kind == "sentencepiece_nfkc":
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind.removeprefix("sentencepiece_"))
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=[*SPECIAL, *alphabet], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if kind.startswith("bytes") else [],
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    bos = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    trim = processors.ByteLevel(trim_offsets=kind == "bytes_trimmed")
    tokenizer.post_processor = processors.Sequence([trim, bos]) if kind.startswith("bytes") else bos
    return tokenizer.to_str()


KINDS = [
    "bytes",
    "bytes_prefix",
    "bytes_trimmed",
    "sentencepiece_always",
    "sentencepiece_first",
    "sentencepiece_never",
    "sentencepiece_legacy",
    "sentencepiece_nfkc",
]


def labels_by_every_offset(rendered: Rendered, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The rule, token by token, for tokenizers that report whole offsets and rows without special tokens."""
    encoded = tokenizer(rendered.text, return_offsets_mapping=True, add_special_tokens=False)
    return [
        token if any(max(start, s.start) < min(end, s.end) for s in rendered.spans) else IGNORE_INDEX
        for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]


def trained_text(encoded: dict, tokenizer: PreTrainedTokenizerFast) -> str:
    return tokenizer.decode([label for label in encoded["labels"] if label != IGNORE_INDEX])


def test_labels_are_exactly_the_ids_of_the_assistant_turns() -> None:
    tokenizer = tiny_tokenizer()
    (encoded,) = encode_batch([render({"messages": CHAT}, tokenizer)], tokenizer)
    ids = tokenizer.apply_chat_template(CHAT, return_dict=False)
    turns = [
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in ("é🎉 Paris<|im_end|>", "  Lima.\n\n<|im_end|>")
    ]
    assert encoded["input_ids"] == ids
    expected = [IGNORE_INDEX] * len(ids)
    for turn in turns:
        start = next(i for i in range(len(ids)) if ids[i : i + len(turn)] == turn)
        expected[start : start + len(turn)] = turn
    assert encoded["labels"] == expected
    assert "loss_weights" not in encoded


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bytes_trimmed"])
def test_labels_equal_the_rule_applied_token_by_token(kind: str) -> None:
    tokenizer = trained_tokenizer(kind)
    rng = random.Random(0)
    texts = [
        "Hello 🎉🎉 naïve é\n\n\n x  y</s>[INST]  Hi[/INST] ok ",
        "<s>[INST] Hello[/INST] Hello</s>",
        "ﬁne Å ½ 日本語 x",
    ]
    rows = []
    for text in texts:
        for _ in range(60):
            cuts = sorted(rng.sample(range(1, len(text)), 4))
            rows.append(Rendered(text, [Span(cuts[0], cuts[1]), Span(cuts[2], cuts[3])]))
    for row, encoded in zip(rows, encode_batch(rows, tokenizer), strict=True):
        assert encoded["input_ids"] == tokenizer(row.text, add_special_tokens=False)["input_ids"]
        assert encoded["labels"] == labels_by_every_offset(row, tokenizer), row


@lru_cache
def encoder_of(kind: str) -> tuple[PreTrainedTokenizerFast, Encoder]:
    """A tokenizer and its encoder, made once: looking through a vocabulary takes a tenth of a second."""
    tokenizer = trained_tokenizer(kind)
    return tokenizer, Encoder(tokenizer)


@settings(max_examples=150, deadline=None)
@given(st.text(min_size=2, max_size=30), st.data())
def test_labels_equal_the_rule_for_any_text(text: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(1, len(text) - 1))
    row = Rendered(text, [Span(start, data.draw(st.integers(start, len(text))))])
    for kind in ("bytes", "sentencepiece_legacy", "sentencepiece_nfkc"):
        tokenizer, encoder = encoder_of(kind)
        (encoded,) = encoder.encode([row])
        if row.spans[0].end < len(text):
            assert encoded["labels"] == labels_by_every_offset(row, tokenizer)


def test_offsets_that_leave_out_whitespace_lose_no_token() -> None:
    tokenizer, plain = trained_tokenizer("bytes_trimmed"), trained_tokenizer("bytes")
    assert (
        tokenizer("a\n\n b", return_offsets_mapping=True)["offset_mapping"]
        != plain("a\n\n b", return_offsets_mapping=True)["offset_mapping"]
    )
    row = Rendered("Question:\n\n Answer \n\nquick \n", [Span(9, 11), Span(18, 28)])
    assert encode_batch([row], tokenizer) == encode_batch([row], plain)
    assert trained_text(encode_batch([row], tokenizer)[0], tokenizer).replace(" ", "") == "\n\n\n\nquick\n"


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_trained_whole_with_its_first_and_last_token(kind: str) -> None:
    tokenizer = trained_tokenizer(kind)
    (encoded,) = encode_batch([render({"text": "Hello Paris"}, tokenizer, TrainOn.ALL)], tokenizer)
    assert encoded["input_ids"] == [1, *tokenizer("Hello Paris", add_special_tokens=False)["input_ids"], 2]
    assert encoded["labels"] == encoded["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_completion_is_tokenized_with_its_prompt(kind: str) -> None:
    tokenizer = trained_tokenizer(kind)
    record = {"prompt": "Question: Hello\nAnswer:", "completion": " Paris is"}
    (encoded,) = encode_batch([render(record, tokenizer)], tokenizer)
    assert encoded["input_ids"] == [*tokenizer("Question: Hello\nAnswer: Paris is")["input_ids"], 2]
    num_trained = sum(label != IGNORE_INDEX for label in encoded["labels"])
    assert encoded["labels"][:-num_trained] == [IGNORE_INDEX] * (len(encoded["labels"]) - num_trained)
    assert encoded["labels"][-1] == 2
    # a token that covers the border, such as ":▁", belongs to the completion
    assert re.sub("[ ▁]", "", trained_text(encoded, tokenizer)).removeprefix(":") == "Parisis</s>"


def test_eos_is_appended_once() -> None:
    tokenizer = trained_tokenizer("bytes")
    (encoded,) = encode_batch([Rendered("Hello</s>", [Span(0, 9)], True, True)], tokenizer)
    assert encoded["input_ids"] == [1, *tokenizer("Hello", add_special_tokens=False)["input_ids"], 2]
    (encoded,) = encode_batch([Rendered("Hello", [Span(0, 2)], False, True)], tokenizer)
    assert encoded["labels"][-1] == IGNORE_INDEX
    assert encoded["input_ids"][-1] == 2


def test_weights_appear_when_some_weight_is_not_one() -> None:
    tokenizer = tiny_tokenizer()
    messages = [*CHAT[:2], CHAT[2], {**CHAT[3], "weight": 0.25}]
    rows = [render({"messages": messages}, tokenizer), render({"messages": CHAT}, tokenizer)]
    weighted, plain = encode_batch(rows, tokenizer)
    assert weighted["labels"] == plain["labels"]
    expected = {IGNORE_INDEX: {0.0}}
    assert {
        w for w, label in zip(weighted["loss_weights"], weighted["labels"], strict=True) if label == IGNORE_INDEX
    } == (expected[IGNORE_INDEX])
    trained = [
        w for w, label in zip(weighted["loss_weights"], weighted["labels"], strict=True) if label != IGNORE_INDEX
    ]
    first = len(tokenizer("é🎉 Paris<|im_end|>", add_special_tokens=False)["input_ids"])
    assert trained == [1.0] * first + [0.25] * (len(trained) - first)
    assert set(plain["loss_weights"]) == {0.0, 1.0}
    assert "loss_weights" not in encode_batch(rows[1:], tokenizer)[0]
    assert "loss_weights" in encode_batch(rows[1:], tokenizer, with_weights=True)[0]


def test_padding_and_truncation_of_the_tokenizer_change_nothing() -> None:
    tokenizer = tiny_tokenizer()
    rows = [render({"messages": CHAT}, tokenizer), render({"messages": CHAT[:2]}, tokenizer)]
    expected = encode_batch(rows, tokenizer)
    tokenizer(["Hello", "Hello you"], padding="max_length", truncation=True, max_length=5)
    assert encode_batch(rows, tokenizer) == expected
    assert tokenizer.pad_token_id not in expected[1]["input_ids"]


def test_pad_equal_to_eos_masks_no_eos() -> None:
    tokenizer = tiny_tokenizer(pad_token="<|im_end|>")
    (encoded,) = encode_batch([render({"messages": CHAT}, tokenizer)], tokenizer)
    assert encoded["labels"].count(tokenizer.eos_token_id) == 2


def test_a_chat_that_prints_bos_gets_no_second_one() -> None:
    tokenizer = trained_tokenizer("bytes")
    tokenizer.chat_template = "{{ bos_token }}" + CHATML
    (encoded,) = encode_batch([render({"messages": CHAT}, tokenizer)], tokenizer)
    assert encoded["input_ids"].count(tokenizer.bos_token_id) == 1


def test_a_tokenizer_without_eos_or_offsets_says_so() -> None:
    tokenizer = tiny_tokenizer(eos_token=None)
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        encode_batch([Rendered("x", [Span(0, 1)], True, True)], tokenizer)


def test_empty_batches_and_texts() -> None:
    tokenizer = tiny_tokenizer()
    assert encode_batch([], tokenizer) == []
    assert encode_batch([Rendered("", [])], tokenizer) == [{"input_ids": [], "labels": []}]


@lru_cache
def encoders_of_variant(variant: str) -> tuple[Encoder, Encoder]:
    """Two encoders of one tokenizer: the first finds tokens by their bytes, the other by offsets."""
    by_bytes, by_offsets = (Encoder(byte_level_variant(variant)) for _ in range(2))
    assert by_bytes._bytes is not None
    by_offsets._bytes = None
    return by_bytes, by_offsets


def byte_level_variant(variant: str) -> PreTrainedTokenizerFast:
    """Byte-level tokenizers whose tokens may not be the bytes of the text."""
    rules = Tokenizer.from_str(_rules("bytes"))
    if variant == "nfc":
        rules.normalizer = normalizers.NFC()
    elif variant == "greedy_token":
        rules.add_special_tokens([AddedToken("[INST]", lstrip=True, rstrip=True)])
    return PreTrainedTokenizerFast(tokenizer_object=rules, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@settings(max_examples=40, deadline=None)
@given(
    st.text(st.sampled_from("ab é\n\u00c5e\u0301\u212b\u0958\uf900🎉"), max_size=20),
    st.text(st.sampled_from("cd .é\u0327🎉"), min_size=1, max_size=12),
    st.sampled_from(["plain", "nfc", "greedy_token"]),
    st.booleans(),
)
def test_lengths_of_bytes_find_the_tokens_that_offsets_find(before: str, answer: str, variant: str, bos: bool) -> None:
    by_bytes, by_offsets = encoders_of_variant(variant)
    text = f"{before} [INST] {answer}</s>"
    spans = [Span(len(before), len(before) + 3), Span(len(text) - 4 - len(answer), len(text), 0.5)]
    batch = [Rendered(text, spans, add_special_tokens=bos), Rendered(before, [Span(0, len(before))], append_eos=True)]
    assert by_bytes.encode(batch) == by_offsets.encode(batch)


@pytest.mark.parametrize("kind", ["bytes", "bytes_trimmed", "sentencepiece_never"])
def test_a_token_across_the_border_of_what_is_trained_is_named(kind: str) -> None:
    tokenizer = trained_tokenizer(kind)
    word = next(text for text in CORPUS[0].split()[1:] if len(tokenizer.tokenize(f" {text}")) == 1)
    text = f"[INST] a[/INST] {word}</s>"
    exact, early = text.index(f" {word}"), text.index(word)
    rows = [
        Rendered(text, [Span(exact, len(text))]),
        Rendered(text, [Span(early, len(text))]),
        Rendered(text, [Span(exact, early + 1)]),
        Rendered(text, [Span(0, len(text))]),
    ]
    crossings = Encoder(tokenizer).encode_flat(rows).crossings
    assert sorted(crossings) == [1, 2]
    assert crossings[1].startswith("the token ")
    assert word in crossings[1]
    assert crossings[1].endswith(
        f"lies across the border of what is trained: {text[:early][-16:]!r} | {text[early:]!r}"
    )


def test_only_tokenizers_whose_tokens_are_bytes_are_measured_by_them() -> None:
    kinds = ["bytes", "bytes_prefix", "sentencepiece_legacy", "sentencepiece_nfkc", "sentencepiece_first"]
    assert [Encoder(trained_tokenizer(kind))._bytes is not None for kind in kinds] == [True, *[False] * 4]
