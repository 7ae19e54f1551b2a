"""Whether a model trained on rendered rows will learn to stop.

A model stops because it was trained to print a token at which generation ends. If the trained part of a turn does not
include that token, or if generation waits for another one, the tuned model talks on for ever.
"""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from sft.chat.render import Rendered
from sft.chat.template import special_token_texts

NUM_EXAMPLES = 3


class TerminatorCheck:
    """Looks at the end of every trained span, row by row.

    Args:
        tokenizer: Its end-of-sequence token ends generation.
        stop_token_ids: Further ids that end it, as the generation config lists them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_token_ids: Iterable[int] = ()) -> None:
        tokens = tokenizer.convert_ids_to_tokens(sorted(set(stop_token_ids)))
        own = [str(tokenizer.eos_token)] if tokenizer.eos_token is not None else []
        self.stop_texts = tuple(dict.fromkeys([*own, *(token for token in tokens if token)]))
        self._special_tokens = tuple(special_token_texts(tokenizer))
        self.num_spans = 0
        self.num_open = 0
        self._examples: list[str] = []

    def add(self, row_id: str, rendered: Rendered) -> None:
        """Look at one row."""
        for number, span in enumerate(rendered.spans, start=1):
            # an inner turn may be closed by a token of its own, as long as the last one stops generation
            closing = self.stop_texts if number == len(rendered.spans) else self._special_tokens
            closed = rendered.append_eos and span.end == len(rendered.text)
            # a template may print a line break after the stop token, which does no harm
            trained = rendered.text[span.start : span.end].rstrip()
            self.num_spans += 1
            if not closed and not trained.endswith(closing or ("\0",)):
                self.num_open += 1
                if len(self._examples) < NUM_EXAMPLES:
                    self._examples.append(f"{row_id} ends in {trained[-24:]!r}")

    def join(self, other: TerminatorCheck) -> None:
        """Add what a check of the same tokenizer found in the rows after these."""
        self.num_spans += other.num_spans
        self.num_open += other.num_open
        self._examples = [*self._examples, *other._examples][:NUM_EXAMPLES]

    def finish(self) -> None:
        """Raise when a trained turn does not end in a stop token.

        Raises:
            ValueError: Says how many, shows the first ones, and what would stop generation.
        """
        if self.num_open:
            stops = ", ".join(map(repr, self.stop_texts)) or "the tokenizer has none"
            raise ValueError(
                f"{self.num_open} of {self.num_spans} trained turns do not end in a token that stops generation "
                f"({stops}), so the model would never learn to stop: {'; '.join(self._examples)}. Make the chat "
                "template close the assistant's turns with one of them, inside its generation marks if it has any, or "
                "make its closing token the tokenizer's eos_token"
            )


def check_terminator(
    rendered: Iterable[tuple[str, Rendered]], tokenizer: PreTrainedTokenizerBase, stop_token_ids: Iterable[int] = ()
) -> None:
    """Make sure that every trained turn ends in a trained token that stops generation.

    Args:
        rendered: Row ids and rendered rows.
        tokenizer: Its end-of-sequence token ends generation.
        stop_token_ids: Further ids that end it, as the generation config lists them.

    Raises:
        ValueError: Some do not; says how many and shows the first ones.
    """
    check = TerminatorCheck(tokenizer, stop_token_ids)
    for row_id, row in rendered:
        check.add(row_id, row)
    check.finish()
