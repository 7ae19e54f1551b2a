"""Comparison of an engine's answers with those that `evaluate` recorded: equal answers, figures, first difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sft.evaluate.intervals import mean_interval
from sft.evaluate.tasks import Task, mean_scores
from stages.engines.client import Answers
from stages.engines.prompts import Prompt
from stages.params.figures import EQUAL_ANSWERS, SAME_PROMPTS, STOP_RATE


@dataclass(frozen=True)
class EngineResult:
    """What an engine made of a model.

    Args:
        engine: vllm, llama_cpp or transformers.
        model: The model, such as merged or gguf-q8_0.
        compared_with: The model whose recorded answers were compared.
        figures: Share of equal answers and of prompts that were read as the same tokens, and the task's figures.
        intervals: Name of a figure -> its 95 % interval.
        num_prompts: Number of prompts.
        num_chats: Number of those that were asked as messages, so that the engine rendered the template.
        first_difference: Id of the first row with another answer, and both answers; None if all are equal.
        first_prompt_difference: Id of the first row whose prompt the engine read as other tokens, and both; or None.
        speed: Tokens per second, seconds of all answers, and seconds until the engine was ready.
        rows: Id, answer and scores of each prompt; the scores have those of the two shares, too.
    """

    engine: str
    model: str
    compared_with: str
    figures: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    num_prompts: int
    num_chats: int
    first_difference: dict[str, Any] | None
    first_prompt_difference: dict[str, Any] | None
    speed: dict[str, float]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields by name."""
        return asdict(self)


def compare(
    engine: str,
    model: str,
    recorded: tuple[str, Sequence[Mapping[str, Any]]],
    prompts: Sequence[Prompt],
    answers: Answers,
    task: Task,
    references: Sequence[str],
) -> EngineResult:
    """Compare answers with recorded ones.

    Args:
        engine: The engine.
        model: The model that it served.
        recorded: Name of the model that `evaluate` asked, and its answers with `text` and `stopped`.
        prompts: The prompts.
        answers: The engine's answers.
        task: The task that scores answers.
        references: Expected answers.
    """
    texts = [answer.text for answer in answers.generations]
    equal = [float(text == before["text"]) for text, before in zip(texts, recorded[1], strict=True)]
    same = [
        float(read == prompt.token_ids if isinstance(read, list) else read == len(prompt.token_ids))
        for prompt, read in zip(prompts, answers.prompt_tokens, strict=True)
    ]
    scores = [task.score(text, reference) for text, reference in zip(texts, references, strict=True)]
    stops = [float(answer.stopped) for answer in answers.generations]
    rows = [{**each, STOP_RATE: stop} for each, stop in zip(scores, stops, strict=True)]
    whole = task.summarize(texts, list(references))
    measured = mean_scores(rows) | {name: figure.value for name, figure in whole.items()}
    intervals = {name: mean_interval([row[name] for row in rows]) for name in rows[0]}
    intervals |= {name: figure.interval for name, figure in whole.items() if figure.interval is not None}
    intervals |= {EQUAL_ANSWERS: mean_interval(equal), SAME_PROMPTS: mean_interval(same)}
    figures = {EQUAL_ANSWERS: sum(equal) / len(equal), SAME_PROMPTS: sum(same) / len(same)}
    figures |= {name: measured[name] for name in [*task.names, STOP_RATE]}
    first = next((number for number, value in enumerate(equal) if not value), None)
    other = next((number for number, value in enumerate(same) if not value), None)
    return EngineResult(
        engine=engine,
        model=model,
        compared_with=recorded[0],
        figures=figures,
        intervals=intervals,
        num_prompts=len(prompts),
        num_chats=sum(prompt.messages is not None for prompt in prompts),
        first_difference=None if first is None else _difference(prompts[first], texts[first], recorded[1][first]),
        first_prompt_difference=None
        if other is None
        else {"id": prompts[other].id, "engine": answers.prompt_tokens[other], "evaluate": prompts[other].token_ids},
        speed={
            "tokens_per_second": round(answers.num_tokens / answers.seconds, 1),
            "seconds": round(answers.seconds, 1),
        },
        rows=[
            {
                "id": prompt.id,
                **asdict(given),
                "scores": {**score, EQUAL_ANSWERS: same_text, SAME_PROMPTS: same_prompt},
            }
            for prompt, given, same_text, same_prompt, score in zip(
                prompts, answers.generations, equal, same, scores, strict=True
            )
        ],
    )


def _difference(prompt: Prompt, text: str, before: Mapping[str, Any]) -> dict[str, Any]:
    """Describe the first character at which two answers differ."""
    pairs = enumerate(zip(text, before["text"], strict=False))
    place = next((number for number, (ours, theirs) in pairs if ours != theirs), min(len(text), len(before["text"])))
    return {"id": prompt.id, "character": place, "engine": text, "evaluate": before["text"]}
