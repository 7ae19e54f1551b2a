"""What greedy answers begin with, learnt while references are scored: tokens that need not be generated again.

Scoring a reference yields the likeliest token at each of its positions. As long as these are the reference's own, they
are the greedy answer, and so is the first that differs: the verification step of speculative decoding (Leviathan et
al., arXiv:2211.17192) with the reference as draft. A model that answers right has been asked already.
"""

from __future__ import annotations

from collections.abc import Sequence

from sft.evaluate.likelihood import Document


class BegunAnswers:
    """Collects beginnings of answers; its `learn` is `evaluate_model`'s `on_predictions`.

    Args:
        prompts: token ids, `(num_prompts, length)`, ragged.
    """

    def __init__(self, prompts: Sequence[Sequence[int]]) -> None:
        self._prompts = [tuple(prompt) for prompt in prompts]
        self._known: dict[tuple[int, ...], list[int]] = {prompt: [] for prompt in self._prompts}

    def learn(self, document: Document, predicted: Sequence[int]) -> None:
        """Look for prompts at the beginning of a document, and for what the model answers them with.

        Args:
            document: scored; a prompt is what stands before one of its supervised spans.
            predicted: the likeliest token at each of its supervised positions.
        """
        likeliest = dict(zip(document.supervised, predicted, strict=True))
        for start in likeliest:
            if start - 1 in likeliest:
                continue
            prompt = tuple(document.input_ids[:start])
            if prompt in self._known:
                self._known[prompt] = _agreed(document, likeliest, start)

    def tokens(self) -> list[list[int]]:
        """What each answer begins with, in the order of the prompts; empty where no document told."""
        return [self._known[prompt] for prompt in self._prompts]


def _agreed(document: Document, likeliest: dict[int, int], position: int) -> list[int]:
    """Greedy tokens from `position` on, up to and with the first that is not the document's."""
    tokens: list[int] = []
    while position in likeliest:
        tokens.append(likeliest[position])
        if tokens[-1] != document.input_ids[position]:
            break
        position += 1
    return tokens
