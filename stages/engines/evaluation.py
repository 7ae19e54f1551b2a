"""Serving engines in `evaluate`: those that params.yaml names are asked the held-out prompts, after the models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from stages.checkout.paths import Paths
from stages.engines.asking import ANSWERED_BY, answer, check_text, find_served, stop_texts
from stages.engines.comparison import EngineResult
from stages.engines.programs import Served, check_installed, command_of, version_of
from stages.engines.prompts import read_requests
from stages.evaluation.results import ModelResult
from stages.evaluation.rows import EvalRows
from stages.params.engines import read_entry
from stages.params.figures import engine_name
from stages.params.schema import Params

KEY = "evaluate.engines"

NOT_IN_RESULTS = ("intervals", "rows", "speed")
"""Fields of a result that lie elsewhere: intervals and answers beside those of the models, and wall times."""


@dataclass(frozen=True)
class EngineRun:
    """An engine with the model that it serves.

    Args:
        name: Beginning of the names of its figures, such as `engine.vllm`.
        engine: transformers, vllm or llama_cpp.
        served: The model.
    """

    name: str
    engine: str
    served: Served

    @property
    def answered_by(self) -> str:
        """The model whose answers are compared."""
        return ANSWERED_BY[self.served.model]


def find_runs(params: Params, paths: Paths, asked: EvalRows) -> list[EngineRun]:
    """Return the engines that params.yaml names, before a model is measured.

    Raises:
        ValueError: An engine is not installed, or can't serve the model or be sent the prompts.
    """
    entries = {engine_name(text): read_entry(text) for text in params.evaluate.engines}
    runs = []
    try:
        check_installed([engine for engine, _ in entries.values()], paths.root)
        for name, (engine, model) in entries.items():
            (served,) = find_served(params, paths, engine, model)
            command_of(engine, served, paths.root, port=0)  # vLLM does not load every adapter
            runs.append(EngineRun(name, engine, served))
        if runs:
            check_text(asked)
    except ValueError as error:
        raise ValueError(f"{KEY}: {error}") from None
    return runs


def ask_runs(
    runs: Sequence[EngineRun],
    params: Params,
    paths: Paths,
    asked: EvalRows,
    tokenizer: PreTrainedTokenizerBase,
    measured: Mapping[str, ModelResult],
    on_progress: Callable[[str, int, int], None],
) -> dict[str, EngineResult]:
    """Start each engine, ask it the prompts, and compare its answers with those of the models.

    Args:
        runs: From `find_runs`.
        params: Values of params.yaml.
        paths: The checkout.
        asked: The held-out rows.
        tokenizer: Tokenizer of the run.
        measured: Model -> its results, with answers.
        on_progress: Called with the name of an engine, its number of answers, 0 as soon as it is ready, and the number
            of prompts.

    Returns:
        Name of the engine -> its result.

    Raises:
        ValueError: An engine failed.
    """
    if not runs:
        return {}
    prompts, stops = read_requests(paths, asked, tokenizer, params.format.system_message), stop_texts(paths, tokenizer)
    found = {}
    for run in runs:
        recorded = (run.answered_by, [asdict(each) for each in measured[run.answered_by].answers])

        def show(done: int, total: int, name: str = run.name) -> None:
            on_progress(name, done, total)

        try:
            found[run.name] = answer(run.engine, run.served, paths.root, recorded, prompts, asked, stops, show)
        except ValueError as error:
            raise ValueError(f"{KEY}: {error}") from None
    return found


def entries_of(runs: Sequence[EngineRun], found: Mapping[str, EngineResult], paths: Paths) -> dict[str, dict[str, Any]]:
    """Return what results.json has of the engines: version, figures, and the first differences."""
    return {
        run.name: {
            "version": version_of(run.engine, paths.root),
            **{key: value for key, value in found[run.name].to_dict().items() if key not in NOT_IN_RESULTS},
        }
        for run in runs
    }
