"""Which tokens an answer has is decided by characters, however templates and messages are tokenized together."""

from __future__ import annotations

import random
import warnings
from functools import cache
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from sft.batches.completion_collator import DataCollatorForCompletionOnlyLM
from sft.batches.token_text import TokenText

SPECIAL = ["<s>", "</s>", "<unk>", "<pad>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>"]

CORPUS = [
    "### Human: Hello, how are you?\n### Assistant: I am fine.\n\n### Human: ok\n### Assistant:\nyes\n",
    "\n\n### Instruction:\nDo it.\n\n### Response:\nDone.\n",
    "Question: what\n ### Answer: that\n",
    "user\nhello\nassistant\nworld\n\n\n",
    "中文问题：你好\n回答：很好。",
    "[INST] x [/INST] y",
]

TEMPLATES = [
    ("### Human:", "### Assistant:"),
    ("\n### Human:", "\n### Assistant:"),
    ("### Human:\n", "### Assistant:\n"),
    ("\n\n### Instruction:\n", "\n\n### Response:\n"),
    ("Question:", " ### Answer:"),
    ("Human: ", "Assistant: "),
    ("问题：", "回答："),
    ("[INST]", "[/INST]"),
    ("<|im_start|>user\n", "<|im_start|>assistant\n"),
    ("<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
    ("<|user|>\n", "<|assistant|>\n"),
]

WORDS = [
    "a",
    "Hello",
    " ",
    "  ",
    "\n",
    "\n\n",
    ".",
    "#",
    "##",
    ":",
    "yes",
    " no",
    "文",
    "。",
    "😀",
    "é",
    "<",
    "|",
    "\t",
    "1",
    "?",
]


def byte_level(*, regex: bool = True, prefix: bool = False, size: int = 500) -> Tokenizer:
    """Return byte-level BPE; without its regular expression, tokens cross words and lines."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=regex)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return tokenizer


def byte_fallback(scheme: str) -> Tokenizer:
    """Return BPE as Llama 2 has it: spaces are `▁`, one comes before the text, unknown characters are bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if scheme == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[*SPECIAL, *bytes_], show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return tokenizer


def wordpiece() -> Tokenizer:
    """Return WordPiece as BERT has it: lower case, no white space, `##` before the later parts of a word."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    letters = sorted({*"".join([*WORDS, *CORPUS]).lower(), *"abcdefghijklmnopqrstuvwxyz"})
    alphabet = [character for character in letters if not character.isspace()]
    vocabulary = [*SPECIAL, *alphabet, *(f"##{character}" for character in alphabet), "human", "assistant", "##stant"]
    tokenizer.model = models.WordPiece({token: number for number, token in enumerate(vocabulary)}, unk_token="<unk>")
    return tokenizer


TOKENIZERS: dict[str, Any] = {
    "byte-level": byte_level,
    "byte-level across words": lambda: byte_level(regex=False, size=800),
    "byte-level with a space before": lambda: byte_level(prefix=True),
    "byte-level with bos": byte_level,
    "special tokens that strip spaces": byte_level,
    "byte fallback": lambda: byte_fallback("first"),
    "byte fallback, every part": lambda: byte_fallback("always"),
    "byte fallback with bos": lambda: byte_fallback("normalizer"),
    "wordpiece": wordpiece,
}


@cache
def tokenizer_named(name: str) -> PreTrainedTokenizerFast:
    backend = TOKENIZERS[name]()
    if "bos" in name:
        bos = ("<s>", backend.token_to_id("<s>"))
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    if "strip" in name:
        stripping = [AddedToken(text, special=True, rstrip=True) for text in ("<|user|>", "<|assistant|>")]
        tokenizer.add_tokens(stripping, special_tokens=True)
    return tokenizer


def wrong_tokens(tokenizer: Any, trained: Any, encoded: Any, text: str, kinds: str) -> list[str]:
    """Return the tokens that are trained against what their characters say.

    Args:
        tokenizer: Names the tokens.
        trained: Which tokens are trained.
        encoded: Token ids and the characters of each.
        text: The document.
        kinds: For each character, `u` (a user's), `t` (a template's) or `a` (an answer's).
    """
    wrong = []
    for number, (start, end) in enumerate(encoded["offset_mapping"]):
        visible = {kind for kind, character in zip(kinds[start:end], text[start:end], strict=True) if character.strip()}
        of_template = visible == {"t"} or (not visible and "t" in kinds[start:end])
        is_right = {
            "u": "u" in visible and not trained[number],
            "t": of_template and not trained[number],
            "a": "a" in visible and "u" not in visible and trained[number],
            " ": not visible and trained[number] == (set(kinds[start:end]) == {"a"}),
        }
        if end > start and not any(is_right.values()):
            wrong.append(tokenizer.convert_ids_to_tokens(encoded["input_ids"][number]))
    return wrong


@pytest.mark.parametrize("as_ids", [False, True], ids=["text", "ids"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_answers_are_trained_and_no_word_of_a_user_is(name: str, as_ids: bool) -> None:
    tokenizer, draw = tokenizer_named(name), random.Random(0)
    num_tried = 0
    for _ in range(120):
        instruction, response = draw.choice(TEMPLATES)
        several = draw.random() < 0.7
        num_turns = draw.randint(1, 3) if several else 1
        messages = ["".join(draw.choices(WORDS, k=draw.randint(0, 8))) for _ in range(2 * num_turns + 1)]
        parts = [("u", messages[0] if draw.random() < 0.3 else "")]
        for turn in range(num_turns):
            parts += [("t", instruction), ("u", messages[1 + 2 * turn]), ("t", response), ("a", messages[2 + 2 * turn])]
        parts += [("a", "</s>")] if draw.random() < 0.5 else []
        text, kinds = "".join(part for _, part in parts), "".join(kind * len(part) for kind, part in parts)
        if text.count(instruction) != num_turns or text.count(response) != num_turns:
            continue
        templates = [response, instruction] if several else [response]
        given: Any = [tokenizer.encode(part, add_special_tokens=False) if as_ids else part for part in templates]
        collator = DataCollatorForCompletionOnlyLM(*given, tokenizer=tokenizer)
        encoded = tokenizer(text, return_offsets_mapping=True)
        wrong = wrong_tokens(tokenizer, collator.trained_tokens(encoded["input_ids"]), encoded, text, kinds)
        assert wrong == [], (templates, text)
        num_tried += 1
    assert num_tried > 60


def test_bytes_of_one_character_in_several_tokens_are_its_characters() -> None:
    tokenizer = tokenizer_named("byte-level")
    ids = tokenizer.encode("a😀b", add_special_tokens=False)
    text, starts, ends = TokenText(tokenizer).characters(ids)
    assert text == "a😀b"
    assert list(zip(starts.tolist(), ends.tolist(), strict=True)) == [(0, 1), *[(1, 2)] * (len(ids) - 2), (2, 3)]


def test_special_token_is_one_character_that_no_text_spells() -> None:
    tokenizer = tokenizer_named("byte-level")
    spelled = [token for part in "<|user|>" for token in tokenizer.encode(part)]
    text, _, _ = TokenText(tokenizer).characters([*tokenizer.encode("<|user|>"), *spelled])
    assert (len(text), text[1:]) == (9, "<|user|>")


def trained_text(tokenizer: Any, collator: DataCollatorForCompletionOnlyLM, text: str) -> str:
    ids = np.array(tokenizer.encode(text))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tokenizer.decode(ids[collator.trained_tokens(ids)])


@pytest.mark.parametrize("name", ["byte-level", "byte-level across words", "byte fallback"])
def test_turn_whose_message_begins_with_a_line_break_is_found_like_the_others(name: str) -> None:
    tokenizer = tokenizer_named(name)
    collator = DataCollatorForCompletionOnlyLM("<|im_start|>assistant\n", "<|im_start|>user\n", tokenizer)
    turns = ("user\n", "plain", "assistant\n", "one"), ("user\n", "\n\n.broken", "assistant\n", "\n\ntwo")
    text = "".join(
        f"<|im_start|>{role}{content}<|im_end|>"
        for turn in turns
        for role, content in zip(turn[::2], turn[1::2], strict=True)
    )
    assert trained_text(tokenizer, collator, text).split() == ["one<|im_end|>", "two<|im_end|>"]


def test_line_break_that_two_templates_share_ends_an_empty_answer() -> None:
    tokenizer = tokenizer_named("byte-level")
    collator = DataCollatorForCompletionOnlyLM("### Assistant:\n", "\n### Human:", tokenizer)
    assert (
        trained_text(tokenizer, collator, "\n### Human: a\n### Assistant:\n### Human: secret\n### Assistant:\nb") == "b"
    )


def test_template_that_begins_a_document_needs_no_line_break_before() -> None:
    tokenizer = tokenizer_named("byte-level with bos")
    collator = DataCollatorForCompletionOnlyLM("\n### Assistant:", "\n### Human:", tokenizer)
    assert trained_text(tokenizer, collator, "### Assistant: hi\n### Human: secret\n### Assistant: b") == " hi b"


def test_template_within_another_is_not_found_there() -> None:
    tokenizer = tokenizer_named("byte-level")
    collator = DataCollatorForCompletionOnlyLM("A:", "QA:", tokenizer)
    assert trained_text(tokenizer, collator, "QA: secret A: yes QA: secret A: no") == " yes  no"


def test_mention_of_the_template_inside_a_line_ends_no_question_and_no_answer() -> None:
    tokenizer = tokenizer_named("byte-level")
    collator = DataCollatorForCompletionOnlyLM("### Assistant:", "### Human:", tokenizer)
    text = (
        "### Human: say ### Assistant: to me\n### Assistant: I say ### Assistant: too\n### Human: ok\n### Assistant: b"
    )
    assert trained_text(tokenizer, collator, text) == " I say ### Assistant: too\n b"


@pytest.mark.parametrize(
    ("instruction", "said"), [(None, "give instruction_template"), ("Question:", "what follows each")]
)
def test_template_that_a_turn_has_several_times_is_said_once(instruction: str | None, said: str) -> None:
    tokenizer = tokenizer_named("byte-level")
    collator = DataCollatorForCompletionOnlyLM("Answer:", instruction, tokenizer)
    ids = tokenizer.encode("Question: 1 Answer: 2 Answer: 3")
    with pytest.warns(UserWarning, match=f"a turn has the response_template 'Answer:' 2 times: .*{said}"):
        collator([{"input_ids": ids}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collator([{"input_ids": ids}])
