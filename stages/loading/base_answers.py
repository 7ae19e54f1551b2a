"""The base model's answers to rehearsed prompts, and its most likely tokens after each token of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from sft.chat.render import ChatRenderer
from sft.evaluate.generation import generate_batch, greedy, sampled
from sft.evaluate.likelihood import Document, evaluate_model
from sft.models.checkpoint import load_tokenizer
from sft.models.loading import load_model, training_device
from sft.tokens.encoding import encode_batch
from stages.params.schema import ModelSection, RehearsalSection
from stages.progress import progress

BATCH_SIZE = 64

_SENTENCE_END = re.compile(r"[.!?…。！？][\"')\]*`]*(?=\s|$)|\n\s*\n")


def answer_prompts(
    section: RehearsalSection,
    model_section: ModelSection,
    base: Path,
    prompts: Sequence[list[dict[str, str]]],
    recorded: Path,
) -> list[dict[str, Any]]:
    """Answer prompts with the base model, and record its most likely tokens at each token of the answers.

    Args:
        section: The section `load.rehearsal` of params.yaml.
        model_section: The section `model`.
        base: Folder of the base model.
        prompts: Messages of each prompt.
        recorded: File to write the recorded tokens to, if `top_k` is not 0.

    Returns:
        One row per prompt: `id`, `prompt` and `completion` as messages, and `unfinished`: None, or what was found if
        the answer reached `max_new_tokens`. An unfinished answer ends after its last complete sentence; where it has
        none, it is empty.
    """
    trusted = model_section.trust_remote_code
    tokenizer = load_tokenizer(base, trust_remote_code=trusted)
    model = load_model(
        base,
        dtype=model_section.dtype,
        attn_implementation=model_section.attn_implementation,
        trust_remote_code=trusted,
    ).to(training_device())
    progress(0, len(prompts), "prompts of the rehearsal")
    answers = generate_batch(
        model,
        tokenizer,
        [prompt_ids(prompt, tokenizer) for prompt in prompts],
        section.max_new_tokens,
        BATCH_SIZE,
        on_progress=lambda done, total, text: progress(done, total, "prompts of the rehearsal", text),
        choose=sampled(section.temperature, section.seed) if section.temperature else greedy,
    )
    rows = []
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), start=1):
        text = answer.text.strip() if answer.stopped else whole_sentences(answer.text)
        detail = None if answer.stopped else f"cut at max_new_tokens {section.max_new_tokens}"
        completion = [{"role": "assistant", "content": text}]
        rows.append({"id": f"rehearsal:{number}", "prompt": prompt, "completion": completion, "unfinished": detail})
    if section.top_k:
        save_file(record_likeliest(model, tokenizer, rows, section.top_k), recorded)
    return rows


def prompt_ids(prompt: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids of a prompt in the tokenizer's own chat template, or as plain text if it has none."""
    if not tokenizer.chat_template:
        return list(tokenizer("\n".join(message["content"] for message in prompt) + "\n")["input_ids"])
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def whole_sentences(text: str) -> str:
    """Return a text up to the end of its last complete sentence or paragraph; empty if it has none."""
    ends = [found.end() for found in _SENTENCE_END.finditer(text)]
    return text[: ends[-1]].strip() if ends else ""


def record_likeliest(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]], top_k: int
) -> dict[str, torch.Tensor]:
    """Return the model's most likely tokens at the supervised positions of the rows, as later stages tokenize them.

    Rows without an answer, and all rows of a tokenizer without a chat template, are left out.

    Returns:
        `ids` of all documents one after another, their `lengths`, for each token the `rows` of its distribution (-1 =
        none), and `tokens` and `probabilities` `(num_rows, top_k)`.
    """
    answered = [row for row in rows if row["completion"][0]["content"]] if tokenizer.chat_template else []
    records = [{"prompt": row["prompt"], "completion": row["completion"]} for row in answered]
    renderer = ChatRenderer(tokenizer)
    documents = encode_batch([renderer.render(record) for record in records], tokenizer)
    tokens, probabilities, places = [], [], [[-1] * len(document["input_ids"]) for document in documents]
    count = 0

    def record(batch: Sequence[Document], logits: torch.Tensor, targets: torch.Tensor) -> None:
        nonlocal count
        likeliest = logits.softmax(-1).topk(min(top_k, logits.shape[-1]), dim=-1)
        tokens.append(likeliest.indices.to("cpu", torch.int32))
        probabilities.append(likeliest.values.cpu())
        for document in batch:
            for position in document.supervised:
                places[document.index][position] = count
                count += 1

    if documents:
        shown = "answers of the rehearsal recorded"
        evaluate_model(
            model,
            [dict(document) for document in documents],
            on_logits=record,
            on_progress=lambda done, total, text: progress(done, total, shown, text),
        )
    empty = torch.zeros(0, top_k)
    return {
        "ids": torch.tensor([token for document in documents for token in document["input_ids"]], dtype=torch.int32),
        "lengths": torch.tensor([len(document["input_ids"]) for document in documents], dtype=torch.int32),
        "rows": torch.tensor([place for row in places for place in row], dtype=torch.int32),
        "tokens": torch.cat([empty[:, : tokens[0].shape[1]].int() if tokens else empty.int(), *tokens]),
        "probabilities": torch.cat([empty[:, : tokens[0].shape[1]] if tokens else empty, *probabilities]),
    }
