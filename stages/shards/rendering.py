"""Rendering of the records of a shard, as `format` does it in each of its processes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sft.chat.checks import SpecialText, TerminatorCheck
from sft.chat.render import ChatRenderer, TrainOn
from sft.chat.thinking import REASONING_TAGS, with_reasoning_apart
from sft.models.checkpoint import load_image_processor
from sft.options import NotPrintedPolicy, ThinkingPolicy
from stages.checkout.ledger import Action
from stages.shards.shards import Rows

RENDERED_AT_ONCE = 64
"""Records whose chats the child process renders in one call."""


@dataclass
class RenderedShard:
    """The rendered records of a shard, with counts and ledger entries.

    Args:
        check: Collects how trained turns end.
        num_in: Number of records read.
        num_characters: Number of characters of all rendered texts.
        num_trained: How many of them are trained.
        rows: Lines of rendered texts, as JSON.
        prompts: Lines of prompts and references, as JSON.
        num_unrolled: Number of rows beyond the first of records that became several rows.
        entries: Ledger entries: id, reason, detail and action of each record that was dropped, repaired or warned of.
        thinking_removed: Id, detail and number of tokens of each record whose reasoning was removed.
    """

    check: TerminatorCheck
    num_in: int = 0
    num_characters: int = 0
    num_trained: int = 0
    num_unrolled: int = 0
    rows: list[str] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    entries: list[tuple[str, str, str, Action]] = field(default_factory=list)
    thinking_removed: list[tuple[str, str, int]] = field(default_factory=list)


@dataclass(frozen=True)
class RenderingWork:
    """Work that renders shards of records.

    Args:
        tokenizer: Folder of the tokenizer with the chat template.
        trust_remote_code: Whether to run Python code that comes with it.
        train_on: What is trained.
        system_message: System message for conversations that have none.
        special_text: What to do with special tokens that are spelled out in messages.
        not_printed: What to do with a conversation that says more than the template prints.
        thinking: What to do with the reasoning of the assistant.
        meant_tokens: Special tokens that messages may spell out.
        stop_token_ids: Ids at which the base model's generation stops.
        with_prompts: Whether to split each record before its last answer, for evaluation.
        image_model: Folder of a base model that reads images, whose processor's placeholders are printed; None = the
            base model reads text alone, or its processor can't be created here.
    """

    tokenizer: Path
    trust_remote_code: bool
    train_on: str
    system_message: str | None
    special_text: str
    not_printed: NotPrintedPolicy
    thinking: ThinkingPolicy
    meant_tokens: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    with_prompts: bool
    image_model: Path | None = None

    def build(self) -> ShardRenderer:
        """Load the tokenizer, and the processor if there is one."""
        loaded = AutoTokenizer.from_pretrained(self.tokenizer, trust_remote_code=self.trust_remote_code)
        return ShardRenderer(loaded, self)


class ShardRenderer:
    """Renderer of records. Records in which nothing is trained are dropped, with a ledger entry."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, work: RenderingWork) -> None:
        self._tokenizer = tokenizer
        self._work = work
        self._renderer = ChatRenderer(tokenizer, TrainOn(work.train_on), work.not_printed, work.thinking)
        self._placeholder = ""
        if work.image_model is not None:
            from sft.vision.chat import VisionRenderer  # only for models that read images
            from sft.vision.places import placeholder

            processor = load_image_processor(work.image_model, tokenizer)
            self._renderer = VisionRenderer(processor, TrainOn(work.train_on), work.not_printed, work.thinking)
            self._placeholder = placeholder(processor)
        self._special_text = SpecialText(tokenizer, allowed=work.meant_tokens)
        self._special_text_beside_images = SpecialText(tokenizer, allowed=(*work.meant_tokens, self._placeholder))
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._has_special_tags = not special.isdisjoint(REASONING_TAGS)

    def __call__(self, shard: Rows) -> RenderedShard:
        """Render all records of a shard.

        Raises:
            ValueError: The template refuses a record, or a turn cannot be located.
        """
        done = RenderedShard(TerminatorCheck(self._tokenizer, self._work.stop_token_ids))
        rows = shard.rows()
        while batch := list(itertools.islice(rows, RENDERED_AT_ONCE)):
            done.num_in += len(batch)
            treated = [self._treat_special_text(with_system_message(row, self._work.system_message)) for row in batch]
            self._renderer.render_ahead(record for record, _ in treated if record is not None)
            for record, entries in treated:
                done.entries += entries
                if record is not None:
                    self._render(record, done)
        return done

    def _render(self, record: dict[str, Any], done: RenderedShard) -> None:
        rows = self._renderer.render_rows(record)
        not_printed = next((row.not_printed for row in rows if row.not_printed), "")
        if not_printed:
            action = Action(self._work.not_printed)
            done.entries.append((record["id"], "not_printed", not_printed, action))
            if action is Action.DROP:
                return
        if not any(row.spans for row in rows):
            detail = f"train_on {self._work.train_on} selects nothing"
            done.entries.append((record["id"], "nothing_trained", detail, Action.DROP))
            return
        self._count_removed(record["id"], [text for row in rows for text in row.thinking_removed], done)
        for rendered in rows:
            if self._work.train_on != TrainOn.ALL:
                done.check.add(record["id"], rendered)
            # the message that is trained tells the rows of one record apart
            images = self._images_of(record, rendered.text)
            turn = {} if rendered.turn is None else {"turn": rendered.turn}
            row = {"id": record["id"], **turn, **rendered.to_row(), **images}
            done.rows.append(json.dumps(row, ensure_ascii=False))
            done.num_characters += len(rendered.text)
            done.num_trained += sum(span.end - span.start for span in rendered.spans)
        done.num_unrolled += len(rows) - 1
        last = self._renderer.last_turn(record) if self._work.with_prompts else None
        if last is not None:
            images = self._images_of(record, last.prompt, is_complete=False)
            done.prompts.append(json.dumps({"id": record["id"], **last._asdict(), **images}, ensure_ascii=False))

    def _images_of(self, record: Mapping[str, Any], text: str, *, is_complete: bool = True) -> dict[str, list[str]]:
        """Return the images whose placeholders are in a text, as columns of its row; none for a record of text alone.

        Args:
            record: The record.
            text: Its text, or the beginning of it.
            is_complete: Whether all images of the record must have a placeholder in the text.

        Raises:
            ValueError: The template prints more or fewer placeholders than the record has images.
        """
        if "images" not in record:
            return {}
        images = list(record["images"])
        num_found = text.count(self._placeholder) if self._placeholder else len(images)
        if num_found != len(images) and (is_complete or num_found > len(images)):
            raise ValueError(
                f"row {record['id']}: the chat template prints {num_found} placeholders {self._placeholder!r} for "
                f"{len(images)} images; use the template of the base model (format.chat_template: null)"
            )
        return {"images": images[:num_found]}

    def _count_removed(self, row_id: str, removed: list[str], done: RenderedShard) -> None:
        if not removed:
            return
        tokens = sum(map(len, self._tokenizer(removed, add_special_tokens=False)["input_ids"]))
        answers = "1 answer" if len(removed) == 1 else f"{len(removed)} answers"
        done.thinking_removed.append((row_id, f"reasoning of {answers}, first {removed[0]!r:.60}", tokens))

    def _treat_special_text(
        self, record: dict[str, Any]
    ) -> tuple[dict[str, Any] | None, list[tuple[str, str, str, Action]]]:
        """Treat special tokens that are spelled out in a record as the work states.

        Returns:
            The record, None if it is dropped, and the entries for the ledger.
        """
        wanted = self._work.special_text
        if wanted != "off" and self._has_special_tags:  # these tags are meant where they enclose reasoning
            record = with_reasoning_apart(record)
        checker = self._special_text_beside_images if record.get("images") else self._special_text
        problem = None if wanted == "off" else checker.find(record)
        if problem is None:
            return record, []
        kept: dict[str, Any] | None = record
        action = Action.REPAIR if wanted == "neutralise" else Action(wanted)
        if wanted == "neutralise":
            kept = checker.neutralised(record)
        if kept is None or action is Action.DROP:
            kept, action = None, Action.DROP
        return kept, [(record["id"], problem.reason, problem.detail, action)]


def with_system_message(record: dict[str, Any], system_message: str | None) -> dict[str, Any]:
    """Add a system message to a conversation that has none; None adds nothing."""
    key = "messages" if "messages" in record else "prompt"
    messages: list[Mapping[str, Any]] | Any = record.get(key)
    if system_message is None or not isinstance(messages, list) or messages[0]["role"] == "system":
        return record
    return {**record, key: [{"role": "system", "content": system_message}, *messages]}
