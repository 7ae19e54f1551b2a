"""Embedding rows of new special tokens: how they are found, and how an adapter trains them.

LoRA changes neither embeddings nor head. A token that was added for a chat template would keep the row it was
initialized with: the model could neither read nor write it, and generation would not stop at the end of a turn.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from peft import LoraConfig, PeftConfig
from peft.utils.other import match_target_against_key
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sft.chat.template import chat_template_of

UNTRAINED_DISTANCE = 0.05
"""Share of the median distance to the mean row; a row that is nearer was initialized as the mean and never trained."""

UNTRAINED_NORM = 1e-3
"""Share of the median norm of a row; a row with a smaller norm was initialized as zero and never trained."""

SAMPLE_ROWS = 4096
"""Number of rows from which the medians are computed."""

PROBE = (
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
)
"""Conversation that shows which special tokens a chat template writes."""


def untrained_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Find the tokens that training needs and pre-training has not trained.

    These are tokens that were added to the checkpoint's tokenizer, and special tokens that the chat template writes
    (reserved ones of a base model, for example) whose rows are still as they were initialized.

    Args:
        model: A model whose embeddings are large enough for the tokenizer.
        tokenizer: The tokenizer with its added tokens and chat template.

    Returns:
        Token ids in ascending order.

    Raises:
        ValueError: The tokenizer has more tokens than the model has rows.
    """
    weight = model.get_input_embeddings().weight
    added = tokenizer.get_added_vocab()
    if weight.ndim != 2 or weight.numel() == 0:  # ZeRO-3 has distributed the rows: they can't be read here
        return []
    beyond = sorted(token for token, index in added.items() if index >= weight.shape[0])
    if beyond:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens and the model {weight.shape[0]} rows of embeddings: "
            f"{beyond[0]!r} has none. Resize first: sft.setup_chat_format(model, tokenizer), or "
            f"model.resize_token_embeddings(len(tokenizer))."
        )
    known = checkpoint_tokens(model)
    new = {index for token, index in added.items() if known is not None and token not in known}
    found = new | set(rows_as_initialised(weight, template_token_ids(tokenizer)))
    if tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        found.discard(tokenizer.pad_token_id)  # a token that is only padding is not trained
    return sorted(found)


def checkpoint_tokens(model: PreTrainedModel) -> set[str] | None:
    """Return all tokens of the tokenizer that was saved with the model; None if its file is not on this machine."""
    name = model.config.name_or_path
    if not name:
        return None
    file = Path(name) / "tokenizer.json"
    if not file.is_file():
        cached = try_to_load_from_cache(name, "tokenizer.json") if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else None
        if not isinstance(cached, str):
            return None
        file = Path(cached)
    content = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = content["model"].get("vocab", {})
    words = vocabulary if isinstance(vocabulary, dict) else (entry[0] for entry in vocabulary)
    return {*words, *(token["content"] for token in content.get("added_tokens", []))}


def template_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of added tokens that the chat template writes into a conversation, and of eos."""
    found = {tokenizer.eos_token_id} - {None}
    if tokenizer.chat_template is not None:
        text = chat_template_of(tokenizer).render([PROBE])[0]  # in a sandbox
        added = set(tokenizer.get_added_vocab().values())
        found |= added & set(tokenizer(text, add_special_tokens=False)["input_ids"])
    return sorted(found)


@torch.no_grad()
def rows_as_initialised(weight: torch.Tensor, token_ids: list[int]) -> list[int]:
    """Return the tokens whose row is about zero, about the mean row, or equal to another token's row.

    Args:
        weight: Embeddings `(num_tokens, width)`.
        token_ids: Tokens to check.
    """
    mean = weight.mean(dim=0, dtype=torch.float32)
    # medians of a sample suffice, so that a table of 100,000s of rows need not be copied to float32
    sample = weight[:: max(1, len(weight) // SAMPLE_ROWS)].float()
    usual_distance = (sample - mean).norm(dim=1).median()
    usual_norm = sample.norm(dim=1).median()
    found = []
    for index in token_ids:
        row = weight[index].float()
        is_mean = (row - mean).norm() < UNTRAINED_DISTANCE * usual_distance
        is_zero = row.norm() < UNTRAINED_NORM * usual_norm
        is_copy = int((weight == weight[index]).all(dim=1).sum()) > 1
        if is_mean or is_zero or is_copy:
            found.append(index)
    return found


def train_token_rows(
    peft_config: PeftConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, token_ids: list[int]
) -> PeftConfig:
    """Have an adapter train the rows of these tokens, in the embeddings and in the head, unless it does already.

    With tied weights, only the rows of the embeddings are added, and peft uses them in the head, too.

    Args:
        peft_config: Configuration of the adapter; not changed.
        model: The base model.
        tokenizer: Converts ids to tokens for the error message.
        token_ids: What `untrained_token_ids` found.

    Returns:
        A configuration with `trainable_token_indices`, or the one given if nothing is missing.

    Raises:
        ValueError: This kind of adapter can't train single rows, and trains neither embeddings nor head.
    """
    missing = [name for name in _modules_with_rows(model) if not _covers(peft_config, model, name, token_ids)]
    if not token_ids or not missing or (is_tied(model) and len(missing) < len(_modules_with_rows(model))):
        return peft_config
    if not isinstance(peft_config, LoraConfig):
        tokens = tokenizer.convert_ids_to_tokens(token_ids)
        raise ValueError(
            f"The tokens {tokens} are new to the model, and a {peft_config.peft_type.value} adapter leaves their rows "
            f"untrained, so generation would not stop at them. Use LoRA, or modules_to_save={missing}, or a chat "
            f"template with tokens that the model knows."
        )
    config = copy.deepcopy(peft_config)
    rows = _as_mapping(config.trainable_token_indices, model)
    # tied: peft gives the head the rows of the embeddings
    for name in missing[:1] if is_tied(model) else missing:
        rows[name] = sorted({*rows.get(name, []), *token_ids})
    config.trainable_token_indices = rows
    return config


def is_tied(model: PreTrainedModel) -> bool:
    """Return whether embeddings and head are one tensor."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def declares_tie(config: Any) -> bool:
    """Return whether a config asks for one tensor as embeddings and head; that of a model with images decides."""
    for part in (config, config.get_text_config()):
        if hasattr(part, "tie_word_embeddings"):
            return bool(part.tie_word_embeddings)
    return False


def embedding_name(model: PreTrainedModel) -> str:
    """Return the dotted name of the embeddings."""
    return _name_of(model, model.get_input_embeddings())


def head_name(model: PreTrainedModel) -> str | None:
    """Return the dotted name of the head; None if there is no head."""
    head = model.get_output_embeddings()
    return None if head is None else _name_of(model, head)


def names_module(entry: str, name: str) -> bool:
    """Return whether an entry of a list in a peft configuration, such as `q_proj`, means the module `name` (dotted)."""
    return name == entry or name.endswith(f".{entry}")


def _name_of(model: PreTrainedModel, wanted: torch.nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def _modules_with_rows(model: PreTrainedModel) -> list[str]:
    return [name for name in (embedding_name(model), head_name(model)) if name is not None]


def _covers(config: PeftConfig, model: PreTrainedModel, name: str, token_ids: list[int]) -> bool:
    """Return whether the adapter already trains these rows of the module."""
    if any(names_module(entry, name) for entry in getattr(config, "modules_to_save", None) or []):
        return True
    targets = getattr(config, "target_modules", None) or []
    if isinstance(targets, str):
        if targets != "all-linear" and match_target_against_key(targets, name):
            return True
    elif any(names_module(entry, name) for entry in targets):
        return True
    rows = _as_mapping(getattr(config, "trainable_token_indices", None), model)
    return any(names_module(entry, name) and set(ids) >= set(token_ids) for entry, ids in rows.items())


def _as_mapping(rows: Any, model: PreTrainedModel) -> dict[str, list[int]]:
    if rows is None:
        return {}
    return dict(rows) if isinstance(rows, dict) else {embedding_name(model): list(rows)}
