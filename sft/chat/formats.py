"""Chat formats by name: a template, the special tokens that it needs, and a model that knows them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase

from sft.chat.template import ChatTemplate, TemplateProfile, special_token_texts

if TYPE_CHECKING:  # seconds of imports, which those who only format have no use for
    from transformers import PreTrainedModel

_TEMPLATES = Path(__file__).parent / "templates"
# Names under which tokenizers already have a token that pads and means nothing else.
PAD_TOKENS = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>")


@dataclass(frozen=True)
class ChatFormat:
    """One chat format.

    Args:
        template: Jinja source.
        eos_token: The token that ends a turn; None: the tokenizer's own.
        bos_token: The token that begins a chat; None: the tokenizer's own.
        special_tokens: Further tokens of the template.
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
    """The format of a name in `FORMATS`, or of a Jinja file.

    Raises:
        ValueError: Neither.
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
    """Give a tokenizer a format's template and special tokens.

    The padding token is made another one than the end of a turn: whoever masks padding would mask the end with it, and
    the model would never learn to stop.

    Returns:
        Ids of the tokens that were new.

    Raises:
        ValueError: The format uses the tokenizer's own end- or beginning-of-sequence token, and there is none.
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


def align_eos_with_template(tokenizer: PreTrainedTokenizerBase, stop_token_ids: tuple[int, ...] = ()) -> str | None:
    """Make the token that ends a turn in the template the end-of-sequence token, unless generation stops at it anyway.

    Args:
        tokenizer: A tokenizer with chat template.
        stop_token_ids: Ids at which generation stops besides the tokenizer's own, as the generation config lists them.

    Returns:
        The new end-of-sequence token, None when nothing had to change.
    """
    template = ChatTemplate(tokenizer.get_chat_template(), dict(tokenizer.special_tokens_map))
    profile = TemplateProfile.probe(template, special_token_texts(tokenizer))
    stop = profile.stop_token
    if stop is None or stop == tokenizer.eos_token or tokenizer.convert_tokens_to_ids(stop) in stop_token_ids:
        return None
    tokenizer.eos_token = stop
    return stop


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase, *, may_add: bool = True) -> None:
    """Give a tokenizer a padding token that is not its end-of-sequence token.

    Args:
        tokenizer: The tokenizer.
        may_add: Add `<|pad|>` when it has none to spare; otherwise the end-of-sequence token has to serve.
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
    """Make a model and its tokenizer speak a chat format.

    Args:
        model: Its embeddings are resized where needed; new rows start as the mean of the old ones.
        tokenizer: Gets the template and the special tokens; a template that it has is replaced.
        format: A name in `FORMATS`, or the path of a Jinja file.
        resize_to_multiple_of: The vocabulary is rounded up to a multiple of this, which suits tensor cores.

    Returns:
        The same model and tokenizer.

    Raises:
        ValueError: An unknown format, or one that needs a token which the tokenizer lacks.
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
    """Copy the chat template of another tokenizer, with the tokens that it needs.

    Args:
        model: Its embeddings are resized where needed; new rows start as the mean of the old ones.
        tokenizer: Gets the template, the added tokens and the end-of-sequence token of the source.
        source_tokenizer_path: Folder or hub id of the source, or the tokenizer itself.
        resize_to_multiple_of: The vocabulary is rounded up to a multiple of this.

    Returns:
        The same model and tokenizer, and the ids of the tokens that were new.

    Raises:
        ValueError: The source has no chat template.
    """
    if isinstance(source_tokenizer_path, (str, Path)):
        source = cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(source_tokenizer_path))
    else:
        source = source_tokenizer_path
    if not source.chat_template:
        raise ValueError(f"the tokenizer {source.name_or_path!r} has no chat template that could be copied")
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
    """Make room for new tokens and start their rows as the mean of the old ones; never shrinks.

    A mean row is neither likely nor unlikely, so the model's first outputs stay what they were. Tied input and output
    embeddings stay tied.

    Args:
        model: The model.
        num_tokens: Length of the tokenizer.
        new_token_ids: Rows to initialise, also those that the model already had room for.
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
    """Make a model's config and generation config agree with its tokenizer on bos, eos and pad."""
    configs = [model.config, model.config.get_text_config(), model.generation_config]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(tokenizer, name)
        for config in configs:
            if config is not None and value is not None:
                setattr(config, name, value)
