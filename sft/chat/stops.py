"""Whether what ends a turn in training also ends generation, for a model that is going to be trained.

The pipeline makes the template's closing token the tokenizer's eos, and refuses rows that end in no stop token. A
script keeps its tokenizer: the closing token is added to the model's generation config, and what can't be mended is
logged.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from sft.chat.checks import TerminatorCheck
from sft.chat.render import Rendered
from sft.labels import IGNORE_INDEX

logger = logging.getLogger(__name__)


class TurnEnds:
    """Check on some rows that what ends a trained turn ends generation; mend the model's generation config if not.

    Args:
        model: Model of transformers, without wrappers. Its `generation_config` may get another stop token.
        tokenizer: Its end-of-sequence token stops generation, too.
        saves_generation_config: Whether the generation config is saved with what is trained; an adapter's is not.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, *, saves_generation_config: bool = True) -> None:
        self._generation_config = getattr(model, "generation_config", None)
        self._tokenizer = tokenizer
        self._saves_generation_config = saves_generation_config

    def stop_token_ids(self) -> list[int]:
        """Return the ids of the generation config at which generation stops."""
        configured = getattr(self._generation_config, "eos_token_id", None)
        return [] if configured is None else [configured] if isinstance(configured, int) else list(configured)

    def check_rendered(self, rows: Iterable[Rendered]) -> None:
        """Check rendered rows: chats, or texts to which the end-of-sequence token is appended."""
        rows = list(rows)
        closing = closing_tokens(rows, self._tokenizer)
        stops = set(TerminatorCheck(self._tokenizer, self.stop_token_ids()).stop_texts)
        missing = [token for token in closing if token not in stops]
        if missing and self._generation_config is not None:
            self._add_stop_tokens(missing)
        check = TerminatorCheck(self._tokenizer, self.stop_token_ids())
        for number, rendered in enumerate(rows):
            check.add(f"row {number}", rendered)
        try:
            check.finish()
        except ValueError as error:
            logger.warning("%s", error)

    def check_tokens(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
        """Check token ids and labels of rows: one of them should train a stop token."""
        stops = {*self.stop_token_ids(), self._tokenizer.eos_token_id} - {None}
        trained = {label for _, labels in rows for label in labels if label != IGNORE_INDEX}
        if rows and not stops & trained:
            names = self._tokenizer.convert_ids_to_tokens(sorted(stops))
            logger.warning(
                "none of the first %d rows trains a token that stops generation (%s), so the model would never learn "
                "to stop: end input_ids with %s, or, if rows end in another token, name it: SFTConfig(eos_token=...)",
                len(rows),
                ", ".join(map(repr, names)) or "the tokenizer has none",
                repr(self._tokenizer.eos_token) if self._tokenizer.eos_token else "an end-of-sequence token",
            )

    def _add_stop_tokens(self, tokens: list[str]) -> None:
        before = self.stop_token_ids()
        own = [] if before or self._tokenizer.eos_token_id is None else [self._tokenizer.eos_token_id]
        new = [int(token) for token in self._tokenizer.convert_tokens_to_ids(tokens)]
        self._generation_config.eos_token_id = [*new, *before, *own]  # type: ignore[union-attr]
        named = ", ".join(map(repr, tokens))
        logger.warning(
            "trained turns end in %s, at which generation did not stop (it stopped at %s): added it to the model's "
            "generation_config.eos_token_id. %s",
            named,
            ", ".join(map(repr, self._tokenizer.convert_ids_to_tokens([*before, *own]))) or "no token",
            f"The tokenizer's eos_token is still {self._tokenizer.eos_token!r}; SFTConfig(eos_token={tokens[0]!r}) "
            "changes it, too"
            if self._saves_generation_config
            else f"An adapter is saved without generation config: set SFTConfig(eos_token={tokens[0]!r}), so that the "
            "saved tokenizer names it, or pass it to generate as eos_token_id",
        )


def closing_tokens(rows: Iterable[Rendered], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the special tokens that trained chats end in, the most frequent first."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special = (special | set(tokenizer.all_special_tokens)) - {str(tokenizer.unk_token)} | {str(tokenizer.eos_token)}
    longest_first = sorted(special, key=len, reverse=True)
    counts: dict[str, int] = {}
    for rendered in rows:
        if rendered.append_eos or not rendered.spans:
            continue
        trained = rendered.text[: rendered.spans[-1].end].rstrip()
        token = next((token for token in longest_first if token and trained.endswith(token)), None)
        if token is not None:
            counts[token] = counts.get(token, 0) + 1
    return sorted(counts, key=lambda token: -counts[token])
