"""Helper of the tests: `TerminatorCheck` on a few rows."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from sft.chat.checks import TerminatorCheck
from sft.chat.render import Rendered


def check_stops(
    rows: Iterable[tuple[str, Rendered]], tokenizer: PreTrainedTokenizerBase, stop_token_ids: Iterable[int] = ()
) -> None:
    check = TerminatorCheck(tokenizer, stop_token_ids)
    for row_id, rendered in rows:
        check.add(row_id, rendered)
    check.finish()
