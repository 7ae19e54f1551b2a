"""A byte-level BPE tokenizer as llama.cpp's format holds it: tokens, kinds, merges, and the name of its splitter."""

from __future__ import annotations

import json
from typing import Any

import gguf
from gguf import TokenType

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLIT_PATTERNS = {
    rf"{CONTRACTIONS}|{WORDS}|\p{{N}}{{1,3}}|{REST}": "llama-bpe",
    rf"{CONTRACTIONS}|{WORDS}|\p{{N}}|{REST}": "qwen2",
}
"""Regular expression by which text is split before merging -> llama.cpp's name for it."""

SPECIAL_IDS = ("bos", "eos", "pad", "unk")


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any, vocab_size: int) -> None:
    """Write a tokenizer into a GGUF file that is being made.

    Args:
        writer: Of the file.
        tokenizer: A fast tokenizer of the byte-level BPE kind.
        vocab_size: Rows of the embeddings; what is more than tokens is filled up with unused ones.

    Raises:
        ValueError: Another kind of tokenizer, or one that splits text in a way llama.cpp has no name for here.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    splitter = splitter_name(content)
    texts = {index: text for text, index in tokenizer.get_vocab().items()}
    kinds = {
        token["id"]: TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        for token in content["added_tokens"]
    }
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitter)
    writer.add_token_list([texts.get(index, f"[PAD{index}]") for index in range(vocab_size)])
    writer.add_token_types(
        [kinds.get(index, TokenType.NORMAL if index in texts else TokenType.UNUSED) for index in range(vocab_size)]
    )
    writer.add_token_merges([" ".join(merge) for merge in content["model"]["merges"]])
    for name in SPECIAL_IDS:
        if (index := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    begins = tokenizer("x")["input_ids"][:1]
    writer.add_add_bos_token(begins == [tokenizer.bos_token_id])
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def splitter_name(content: dict[str, Any]) -> str:
    """llama.cpp's name for the way in which a tokenizer splits text before merging.

    Args:
        content: The tokenizer as its JSON file holds it.

    Raises:
        ValueError: There is none, and a file with a wrong name would give other tokens.
    """
    if content["model"]["type"] != "BPE" or content["model"].get("byte_fallback"):
        kind = "SentencePiece-like BPE" if content["model"]["type"] == "BPE" else content["model"]["type"]
        raise ValueError(f"the tokenizer is of the kind {kind}; GGUF export supports byte-level BPE")
    steps = content["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0]["use_regex"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
        return "smollm"
    pattern = steps[0].get("pattern", {}).get("Regex") if kinds == ["Split", "ByteLevel"] else None
    if pattern in SPLIT_PATTERNS:
        return SPLIT_PATTERNS[pattern]
    raise ValueError(
        f"the tokenizer splits text by {pattern or kinds}, for which GGUF export knows no name of llama.cpp's; known "
        f"are {', '.join(('gpt-2', 'smollm', *SPLIT_PATTERNS.values()))}"
    )
