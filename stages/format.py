"""Stage `format`: records to rendered text with the spans that are trained, and the tokenizer for it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from sft.chat.checks import TerminatorCheck
from sft.chat.formats import (
    FORMATS,
    align_eos_with_template,
    apply_chat_format,
    ensure_pad_token,
    find_format,
    set_template_variables,
)
from sft.chat.render import messages_of
from sft.chat.thinking_variable import set_thinking_variable
from sft.folders import replacing_folder
from sft.models.checkpoint import (
    CheckpointError,
    copy_processor_files,
    is_image_model,
    load_image_processor,
    processor_template,
    save_tokenizer,
)
from sft.untrusted.templates import TemplateSourceError
from sft.vision.chat import VisionTemplate
from sft.vision.places import placeholder
from stages.checkout.artifacts import JsonlWriter, code_digest, read_json, read_jsonl, write_json
from stages.checkout.ledger import Action, Ledger
from stages.checkout.paths import STREAM, Paths
from stages.models.base import read_base_model
from stages.params.schema import FormatSection, Params
from stages.progress import progress, stage_progress
from stages.shards.rendering import RenderingWork
from stages.shards.shards import run_shards, shards_of

SPLITS = ("train", "eval")


@stage_progress("format")
def run(params: Params, paths: Paths) -> None:
    """Render outs/load and write outs/format.

    Raises:
        ValueError: The template refuses a row, a turn can't be located or does not end in a stop token, too many rows
            were dropped, or nothing would be trained.
    """
    section = params.format
    base = Path(read_base_model(paths.out("load", "base_model.json")).path)
    tokenizer = cast(
        PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(base, trust_remote_code=params.model.trust_remote_code)
    )
    own_template = processor_template(base)
    if own_template:
        tokenizer.chat_template = own_template
    num_base_tokens = len(tokenizer)
    stop_token_ids = _stop_token_ids(base)
    image_model = readable_image_model(base, paths)
    image_token = None if image_model is None else placeholder(load_image_processor(image_model))
    new_eos = prepare_tokenizer(tokenizer, section, paths, stop_token_ids, image_token)
    with replacing_folder(paths.out("format")) as folder:
        save_tokenizer(tokenizer, folder / "tokenizer")
        copy_processor_files(base, folder / "tokenizer")
        work = RenderingWork(
            folder / "tokenizer",
            params.model.trust_remote_code,
            section.train_on,
            section.system_message,
            section.special_text,
            section.not_printed,
            section.thinking,
            tuple(section.add_special_tokens),
            stop_token_ids,
            with_prompts=False,
            image_model=image_model,
        )
        with Formatter(folder, tokenizer, work, section) as formatter:
            for split in SPLITS:
                total = read_json(paths.out("load", "card.json"))[f"num_{split}"]
                formatter.take(split, paths.out("load", f"{split}.jsonl"), total)
            figures = formatter.close_accounts()
        new_token_ids = list(range(num_base_tokens, len(tokenizer)))
        facts = {
            "new_token_ids": new_token_ids,
            "new_eos_token": new_eos,
            "stop_tokens": list(formatter.stop_texts),
            "chat_template_sha256": _template_digest(tokenizer),
        }
        write_json(folder / "summary.json", facts)
        if read_json(paths.out("load", "card.json")).get("streaming"):
            recipe = {
                "format": section.model_dump(),
                "stop_token_ids": list(stop_token_ids),
                "reads_images": image_model is not None,
                "code": code_digest("sft/chat", "stages/shards"),
            }
            write_json(folder / STREAM, recipe)
    write_json(paths.metrics("format"), {**figures, "num_new_tokens": len(new_token_ids)})


def prepare_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    section: FormatSection,
    paths: Paths,
    stop_token_ids: tuple[int, ...],
    image_token: str | None = None,
) -> str | None:
    """Set the chat template and add the tokens that params.yaml states, in place.

    Args:
        tokenizer: Tokenizer of the base model.
        section: The section `format` of params.yaml.
        paths: Paths of the checkout.
        stop_token_ids: Ids at which the base model's generation stops.
        image_token: Placeholder of an image in the text; None = rows are rendered without a processor.

    Returns:
        The new end-of-sequence token, if the template ends turns with a token at which generation did not stop.

    Raises:
        ValueError: The chat format is unknown, the Jinja file lies outside data/ or is invalid, or a token exists
            already.
    """
    before = tokenizer.eos_token
    known = sorted(set(section.add_special_tokens) & tokenizer.get_vocab().keys())
    if known:
        raise ValueError(f"params.yaml, format.add_special_tokens: {known} are tokens already; remove them")
    tokenizer.add_tokens(section.add_special_tokens, special_tokens=True)
    try:
        if section.chat_template is not None:
            apply_chat_format(tokenizer, find_format(_format_name(section.chat_template, paths)))
        if section.chat_template_kwargs:
            _set_template_variables(tokenizer, section)
        _set_thinking_variable(tokenizer, section, paths)
        if tokenizer.chat_template and _has_chats(paths):
            template = None
            if image_token is not None:
                template = VisionTemplate.probe(tokenizer.chat_template, tokenizer.special_tokens_map, image_token)
            align_eos_with_template(tokenizer, stop_token_ids, template)
    except TemplateSourceError as error:
        which = section.chat_template or f"null, the base model's own in {tokenizer.name_or_path}"
        way_out = "Fix the template, or name a format: " + ", ".join(FORMATS)
        raise ValueError(f"params.yaml, format.chat_template ({which}): {error}. {way_out}") from error
    ensure_pad_token(tokenizer, may_add=False)
    return str(tokenizer.eos_token) if tokenizer.eos_token != before else None


def readable_image_model(base: Path, paths: Paths) -> Path | None:
    """Return the folder of a base model whose processor rows are rendered with; None if they are text alone.

    Raises:
        ValueError: Rows have images, and the processor can't be created here.
    """
    if not is_image_model(base):
        return None
    try:
        load_image_processor(base)
    except CheckpointError as error:
        if paths.has_images():
            raise
        print(f"note: {error}; the rows are text alone, and are rendered with the tokenizer", flush=True)
        return None
    return base


def _set_template_variables(tokenizer: PreTrainedTokenizerBase, section: FormatSection) -> None:
    try:
        set_template_variables(tokenizer, section.chat_template_kwargs)
    except ValueError as error:
        raise ValueError(f"params.yaml, format.chat_template_kwargs: {error}") from None


def _set_thinking_variable(tokenizer: PreTrainedTokenizerBase, section: FormatSection, paths: Paths) -> None:
    records = (record for split in SPLITS for record in read_jsonl(paths.out("load", f"{split}.jsonl")))
    chats = (chat for record in records if (chat := messages_of(record)))
    try:
        variable = set_thinking_variable(tokenizer, section.thinking, chats, section.chat_template_kwargs)
    except ValueError as error:
        raise ValueError(f"params.yaml, format.thinking: {error}") from None
    if variable:
        print(f"format.thinking {section.thinking}: the chat template gets {json.dumps(variable)}", flush=True)


def _has_chats(paths: Paths) -> bool:
    """Return whether any training record is a chat. Plain text does not use the template."""
    records = read_jsonl(paths.out("load", "train.jsonl"))
    return any("messages" in record or isinstance(record.get("prompt"), list) for record in records)


def _format_name(name: str, paths: Paths) -> str | Path:
    """Return the name of a chat format, or the path of a Jinja file in data/, where DVC sees changes of it."""
    if name in FORMATS:
        return name
    path = (paths.root / name).resolve()
    if path.is_file() and not path.is_relative_to(paths.data.resolve()):
        raise ValueError(f"params.yaml, format.chat_template: move {name!r} into data/, where DVC sees changes of it")
    try:
        find_format(path)
    except ValueError:
        raise ValueError(
            f"params.yaml, format.chat_template: {name!r} is neither a chat format ({', '.join(FORMATS)}) nor an "
            "existing Jinja file in data/"
        ) from None
    return path


def _stop_token_ids(base: Path) -> tuple[int, ...]:
    """Return all ids at which generation stops by the base model's generation config."""
    if not (base / "generation_config.json").is_file():
        return ()
    eos = GenerationConfig.from_pretrained(base).eos_token_id
    return tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)


def _template_digest(tokenizer: PreTrainedTokenizerBase) -> str | None:
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest() if tokenizer.chat_template else None


class Formatter:
    """Rendering of records to the files of their split; dropped rows get ledger entries.

    Args:
        folder: Output folder.
        tokenizer: Tokenizer with the chat template.
        work: How rows are rendered.
        section: The section `format` of params.yaml.
    """

    def __init__(
        self, folder: Path, tokenizer: PreTrainedTokenizerBase, work: RenderingWork, section: FormatSection
    ) -> None:
        self._work = work
        self._section = section
        self._check = TerminatorCheck(tokenizer, work.stop_token_ids)
        self._ledger = Ledger(folder / "ledger.jsonl", "format")
        self._prompts = JsonlWriter(folder / "prompts.jsonl")
        self._writers = {split: JsonlWriter(folder / f"{split}.jsonl") for split in SPLITS}
        self._num_in = dict.fromkeys(SPLITS, 0)
        self._num_characters = dict.fromkeys(SPLITS, 0)
        self._num_trained = dict.fromkeys(SPLITS, 0)
        self._num_unrolled = 0
        self._num_tokens_removed = 0
        self.stop_texts = self._check.stop_texts

    def __enter__(self) -> Formatter:
        return self

    def __exit__(self, *_: object) -> None:
        for writer in (self._ledger, self._prompts, *self._writers.values()):
            writer.close()

    def take(self, split: str, path: Path, num_rows: int) -> None:
        """Render all records of a split. Those of `eval` are written as prompts, too.

        Args:
            split: train or eval.
            path: File of records.
            num_rows: Number of records in it.
        """
        work = replace(self._work, with_prompts=split == "eval")
        progress(0, num_rows, f"{split} rows")
        for part in run_shards(work, shards_of(path), self._section.num_proc, self._section.workers):
            self._num_in[split] += part.num_in
            self._num_characters[split] += part.num_characters
            self._num_trained[split] += part.num_trained
            self._num_unrolled += part.num_unrolled
            self._check.join(part.check)
            self._writers[split].write_lines(part.rows)
            self._prompts.write_lines(part.prompts)
            for entry in part.entries:
                self._ledger.enter(*entry)
            for row_id, detail, tokens in part.thinking_removed:
                self._ledger.enter(row_id, "thinking_removed", detail, Action.REPAIR, tokens=tokens)
                self._num_tokens_removed += tokens
            progress(self._num_in[split], num_rows, f"{split} rows")
        assert self._num_in[split] == num_rows, f"load wrote {num_rows} {split} rows, {self._num_in[split]} are there"

    def close_accounts(self) -> dict[str, Any]:
        """Check that every row is accounted for and that something is trained; return the stage's figures.

        Raises:
            ValueError: Nothing would be trained, too many rows were dropped, rows spell out special tokens and
                `special_text` is `fail`, or a trained turn does not end in a stop token.
        """
        num_out = {split: writer.num_rows for split, writer in self._writers.items()}
        assert sum(self._num_in.values()) + self._num_unrolled == sum(num_out.values()) + self._ledger.num_removed, (
            "a row is neither written nor in the ledger"
        )
        for split in SPLITS:
            if num_out[split] == 0:
                raise ValueError(
                    f"no token of the {self._num_in[split]} {split} rows would be trained with format.train_on "
                    f"{self._work.train_on}: {self._ledger.summary()}. Change train_on or the data"
                )
        self._check_dropped()
        self._check.finish()
        figures: dict[str, Any] = {f"num_{split}": num_out[split] for split in SPLITS}
        for split in SPLITS:
            share = self._num_trained[split] / self._num_characters[split]
            figures[f"trained_characters_{split}"] = round(share, 6)
        counts = {action: dict(sorted(self._ledger.counts[action].items())) for action in Action}
        figures |= {"num_dropped": self._ledger.num_removed, "dropped": counts[Action.DROP]}
        figures |= {"repaired": counts[Action.REPAIR], "warned": counts[Action.WARN]}
        return {**figures, "thinking_removed_tokens": self._num_tokens_removed, "num_unrolled": self._num_unrolled}

    def _check_dropped(self) -> None:
        if self._ledger.counts[Action.FAIL]:
            found = self._ledger.summary(Action.FAIL)
            raise ValueError(
                f"params.yaml, format.special_text: {found}. Fix the data, or state neutralise, warn or drop"
            )
        limit, num_in = self._section.max_dropped_fraction, sum(self._num_in.values())
        dropped = self._ledger.num_removed
        if dropped > limit * num_in:
            raise ValueError(
                f"{dropped} of {num_in} rows ({dropped / num_in:.1%}) had to be dropped, more than "
                f"format.max_dropped_fraction {limit} allows: {self._ledger.summary()}. Fix the data, or raise it"
            )
