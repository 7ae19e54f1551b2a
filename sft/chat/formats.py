"""Named chat formats, and their set-up on a tokenizer and a model: chat template, special tokens, new embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase

from sft.chat.template import ChatTemplate, TemplateProfile, special_token_texts
from sft.chat.template_syntax import template_variables
from sft.suggest import did_you_mean

if TYPE_CHECKING:  # importing it takes seconds, and formatting alone does not need it
    from transformers import PreTrainedModel

_TEMPLATES = Path(__file__).parent / "templates"
# Padding tokens of known tokenizers, which have no other meaning.
PAD_TOKENS = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>")


@dataclass(frozen=True)
class ChatFormat:
    """One chat format.

    Args:
        template: Jinja source.
        eos_token: Token that ends a turn; None keeps the tokenizer's own.
        bos_token: Token that begins a chat; None keeps the tokenizer's own.
        special_tokens: Further special tokens that the template prints.
        needs_bos: Whether the template prints the beginning-of-sequence token.
    """

    template: str
    eos_token: str | None = None
    bos_token: str | None = None
    special_tokens: tuple[str, ...] = ()
    needs_bos: bool = False


def _format(name: str, **tokens: object) -> ChatFormat:
    template = (_TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    return ChatFormat(template, **tokens)  # type: ignore[arg-type]


FORMATS: dict[str, ChatFormat] = {
    "chatml": _format("chatml", eos_token="<|im_end|>", bos_token="<|im_start|>"),
    "llama3": _format(
        "llama3",
        eos_token="<|eot_id|>",
        special_tokens=("<|start_header_id|>", "<|end_header_id|>"),
        needs_bos=True,
    ),
    "zephyr": _format("zephyr"),
    "gemma": _format("gemma", eos_token="<end_of_turn>", special_tokens=("<start_of_turn>",), needs_bos=True),
    "phi3": _format("phi3", eos_token="<|end|>", special_tokens=("<|system|>", "<|user|>", "<|assistant|>")),
    "mistral": _format("mistral", special_tokens=("[INST]", "[/INST]"), needs_bos=True),
}


def find_format(name_or_path: str | Path) -> ChatFormat:
    """Return the format with a name in `FORMATS`, or one made from a Jinja file.

    Raises:
        ValueError: There is no such format or file.
    """
    if str(name_or_path) in FORMATS:
        return FORMATS[str(name_or_path)]
    path = Path(name_or_path)
    if path.is_file():
        return ChatFormat(path.read_text(encoding="utf-8"))
    raise ValueError(
        f"{str(name_or_path)!r} is neither a chat format ({', '.join(FORMATS)}) nor an existing Jinja file"
    )


def apply_chat_format(tokenizer: PreTrainedTokenizerBase, chat_format: ChatFormat) -> list[int]:
    """Set a format's template and special tokens on a tokenizer.

    The padding token is set to a different token than the one that ends a turn: masking padding would otherwise mask
    the end of turns, and the model would never learn to stop.

    Returns:
        Ids of the added tokens.

    Raises:
        ValueError: The format uses the tokenizer's own end- or beginning-of-sequence token, and the tokenizer has none.
    """
    before = len(tokenizer)
    wanted = [chat_format.bos_token, chat_format.eos_token, *chat_format.special_tokens]
    tokenizer.add_tokens(
        [AddedToken(text, special=True, normalized=False) for text in wanted if text], special_tokens=True
    )
    if chat_format.eos_token is not None:
        tokenizer.eos_token = chat_format.eos_token
    if chat_format.bos_token is not None:
        tokenizer.bos_token = chat_format.bos_token
    if tokenizer.eos_token is None or (chat_format.needs_bos and tokenizer.bos_token is None):
        name = "eos_token" if tokenizer.eos_token is None else "bos_token"
        raise ValueError(
            f"the chat format prints {name}, and the tokenizer {tokenizer.name_or_path!r} has none; set it"
        )
    tokenizer.chat_template = chat_format.template
    align_eos_with_template(tokenizer)
    ensure_pad_token(tokenizer)
    return list(range(before, len(tokenizer)))


def set_template_variables(tokenizer: Any, variables: Mapping[str, Any]) -> None:
    """Give variables of a chat template other defaults, in the template itself, so that they are saved with it.

    Args:
        tokenizer: Tokenizer or processor; its template, or each of its named ones, is replaced.
        variables: Values by name, such as `{"enable_thinking": False}`.

    Raises:
        ValueError: There is no template, or one does not use a variable.
    """
    given = tokenizer.chat_template
    if not given:
        raise ValueError("chat_template_kwargs sets variables of the chat template, and the tokenizer has none")
    templates = given if isinstance(given, dict) else {"default": given}
    new = {name: _with_defaults(source, variables) for name, source in templates.items()}
    tokenizer.chat_template = new if isinstance(given, dict) else new["default"]


def _with_defaults(source: str, variables: Mapping[str, Any]) -> str:
    known = template_variables(source)
    for name in variables:
        if name not in known:
            hint = did_you_mean(name, known, otherwise=f"it has {', '.join(known) or 'none'}")
            raise ValueError(
                f"chat_template_kwargs names {name!r}, which is not a variable of the chat template; {hint}"
            )
    lines = (
        f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(value)} %}}{{%- endif %}}"
        for name, value in variables.items()
    )
    return "".join(lines) + source


def _literal(value: Any) -> str:
    """Return a JSON value as Jinja writes it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(str(key))}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def align_eos_with_template(
    tokenizer: PreTrainedTokenizerBase, stop_token_ids: tuple[int, ...] = (), template: ChatTemplate | None = None
) -> str | None:
    """Make the token that ends a turn in the template the end-of-sequence token, unless generation stops at it anyway.

    Args:
        tokenizer: A tokenizer with a chat template.
        stop_token_ids: Ids at which generation stops in addition to the tokenizer's own, as in the generation config.
        template: The template as it renders rows; None = the tokenizer's, for messages of text.

    Returns:
        The new end-of-sequence token; None if it did not change.
    """
    template = template or ChatTemplate(tokenizer.get_chat_template(), dict(tokenizer.special_tokens_map))
    profile = TemplateProfile.probe(template, special_token_texts(tokenizer))
    stop = profile.stop_token
    if stop is None or stop == tokenizer.eos_token or tokenizer.convert_tokens_to_ids(stop) in stop_token_ids:
        return None
    tokenizer.eos_token = stop
    return stop


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase, *, may_add: bool = True) -> None:
    """Set a padding token that differs from the beginning- and end-of-sequence tokens.

    Args:
        tokenizer: The tokenizer.
        may_add: Add `<|pad|>` if the tokenizer has no unused token of `PAD_TOKENS`. If False, padding falls back to
            the end-of-sequence token.
    """
    used = (tokenizer.eos_token, tokenizer.bos_token)
    if tokenizer.pad_token is not None and tokenizer.pad_token not in used:
        return
    known = set(special_token_texts(tokenizer))
    spare = [token for token in PAD_TOKENS if token in known and token not in used]
    if spare:
        tokenizer.pad_token = spare[0]
    elif may_add:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKENS[0]})
    elif tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def setup_chat_format(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    format: str | Path = "chatml",
    resize_to_multiple_of: int | None = 64,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Set up a model and its tokenizer for a chat format.

    Args:
        model: The model; its embeddings are resized if needed, new rows initialized to the mean of the old ones.
        tokenizer: The tokenizer; its chat template is replaced, and the format's special tokens are added.
        format: A name in `FORMATS`, or the path of a Jinja file.
        resize_to_multiple_of: Round the number of embeddings up to a multiple of this, for tensor cores.

    Returns:
        The same model and tokenizer.

    Raises:
        ValueError: The format is unknown, or needs a token that the tokenizer does not have.
    """
    added = apply_chat_format(tokenizer, find_format(format))
    resize_embeddings(model, len(tokenizer), added, resize_to_multiple_of)
    align_special_tokens(model, tokenizer)
    return model, tokenizer


def clone_chat_template(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source_tokenizer_path: str | Path | PreTrainedTokenizerBase,
    resize_to_multiple_of: int | None = 64,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[int]]:
    """Copy the chat template of another tokenizer, with its added tokens and its end-of-sequence token.

    Args:
        model: The model; its embeddings are resized if needed, new rows initialized to the mean of the old ones.
        tokenizer: The tokenizer to change.
        source_tokenizer_path: Folder or Hub id of the source tokenizer, or the tokenizer itself.
        resize_to_multiple_of: Round the number of embeddings up to a multiple of this.

    Returns:
        The same model and tokenizer, and the ids of the added tokens.

    Raises:
        ValueError: The source has no chat template.
    """
    if isinstance(source_tokenizer_path, (str, Path)):
        source = cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(source_tokenizer_path))
    else:
        source = source_tokenizer_path
    if not source.chat_template:
        raise ValueError(f"the tokenizer {source.name_or_path!r} has no chat template to copy")
    before = len(tokenizer)
    known = tokenizer.get_vocab()
    tokens = [token for _, token in sorted(source.added_tokens_decoder.items()) if str(token) not in known]
    for special in (True, False):
        tokenizer.add_tokens([token for token in tokens if token.special is special], special_tokens=special)
    for name in ("eos_token", "bos_token"):
        if getattr(source, name) is not None and (name == "eos_token" or tokenizer.bos_token is None):
            setattr(tokenizer, name, getattr(source, name))
    tokenizer.chat_template = source.chat_template
    ensure_pad_token(tokenizer)
    added = list(range(before, len(tokenizer)))
    resize_embeddings(model, len(tokenizer), added, resize_to_multiple_of)
    align_special_tokens(model, tokenizer)
    return model, tokenizer, added


def resize_embeddings(
    model: PreTrainedModel, num_tokens: int, new_token_ids: list[int], multiple_of: int | None = None
) -> None:
    """Add embedding rows for new tokens, initialized to the mean of the old ones; never removes rows.

    With mean rows, new tokens are neither likely nor unlikely, so the model's outputs hardly change at first. Tied
    input and output embeddings stay tied.

    Args:
        model: The model.
        num_tokens: Length of the tokenizer.
        new_token_ids: Rows to initialize, including those for which the model already had unused rows.
        multiple_of: Round the number of rows up to a multiple of this.
    """
    current = model.get_input_embeddings().weight.shape[0]
    rows = max(num_tokens, current)
    rows = -(-rows // multiple_of) * multiple_of if multiple_of else rows
    if rows != current:
        model.resize_token_embeddings(rows, mean_resizing=False)
    fresh = sorted({*new_token_ids, *range(current, rows)})
    old = [row for row in range(min(current, num_tokens)) if row not in set(new_token_ids)]
    if not fresh:
        return
    head = model.get_output_embeddings()
    weights = {id(tensor): tensor for tensor in (model.get_input_embeddings().weight, getattr(head, "weight", None))}
    weights[id(getattr(head, "bias", None))] = getattr(head, "bias", None)
    with torch.no_grad():
        for weight in weights.values():
            if weight is not None:
                weight[fresh] = weight[old].float().mean(dim=0).to(weight.dtype)


def align_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Copy the ids of the bos, eos and pad tokens from a tokenizer to a model's config and generation config."""
    configs = [model.config, model.config.get_text_config(), model.generation_config]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(tokenizer, name)
        for config in configs:
            if config is not None and value is not None:
                setattr(config, name, value)
