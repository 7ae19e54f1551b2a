"""`python -m stages compare A B`: print what differs between two recorded runs, and how their figures differ."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from sft.common_prefix import common_prefix_length
from stages.checkout.foreign_text import for_terminal
from stages.checkout.paths import Paths, main_checkout
from stages.params.figures import lower_is_better
from stages.params.schema import Params
from stages.tracking.address import absolute_uri, database
from stages.tracking.lineage import MACHINE, PARENT_TAG
from stages.tracking.result import DIGEST_TAG, MEASURED_STAGES
from stages.tracking.store import KIND_TAG, SWEEP, Tracking, open_tracking, whole_value

VERSION, COMMIT, DIRTY, CODE, BASE = "version.", "git.commit", "git.dirty", "git.changed_code", "sft.base_model"
MAX_VALUE = 60
"""Longest text of a value, in characters."""

MAX_BEFORE = 20
"""Characters of long values that are shown before the first one that differs."""

NOISE = 1e-9
"""Differences of figures below this are treated as rounding errors."""


@dataclass(frozen=True)
class Difference:
    """A value that differs between two runs.

    Args:
        name: Its name.
        before: Its value in the first run; None if that run lacks it.
        after: The same for the second run.
    """

    name: str
    before: Any
    after: Any


def run(params: Params, paths: Paths, *, runs: list[str]) -> None:
    """Print the comparison of two recorded runs.

    Args:
        params: Values of params.yaml; `publish` has the store of the runs.
        paths: Paths of the checkout.
        runs: Two runs: ids or their beginnings, names, or aliases of the registered model such as `champion`.

    Raises:
        ValueError: No run, or more than one, has such an id, name or alias.
    """
    tracking = open_recorded(params, main_checkout(paths.root))
    first, second = (find_result(tracking, name, params.publish.registered_model) for name in runs)
    print("\n".join(report(first, second, tracking.client)), flush=True)


def open_recorded(params: Params, home: Path) -> Tracking:
    """Open the MLflow store that earlier runs were recorded in.

    Raises:
        ValueError: Nothing has been recorded yet, or the store can't be used.
    """
    uri = absolute_uri(params.publish.tracking_uri, home)
    if (file := database(uri)) is not None and not file.exists():
        raise ValueError(f"nothing is recorded yet at {uri}: `make repro` ends with a recorded run")
    return open_tracking(params.publish, home)


def find_run(tracking: Tracking, name: str, model: str) -> Run:
    """Find a finished run by its id or the beginning of it, its name, or an alias of the registered model.

    Raises:
        ValueError: There is none, or there are several.
    """
    finished = tracking.client.search_runs([tracking.experiment_id], "attributes.status = 'FINISHED'")
    try:
        aliased = tracking.client.get_model_version_by_alias(model, name).run_id
    except MlflowException:
        aliased = None
    found = [r for r in finished if name in (r.info.run_id, r.info.run_name) or r.info.run_id == aliased]
    found = found or [r for r in finished if r.info.run_id.startswith(name)]
    if len(found) == 1:
        return found[0]
    shown = "\n".join(f"  {r.info.run_id[:12]}  {for_terminal(r.info.run_name)}" for r in (found or finished)[:20])
    what = f"{len(found)} runs are called" if found else "no finished run is called"
    raise ValueError(f"{what} {name!r}; give the beginning of an id, a name, or an alias such as champion:\n{shown}")


def find_result(tracking: Tracking, name: str, model: str) -> Run:
    """Find a finished run as `find_run` does, and check that it is not a sweep, which has no result.

    Raises:
        ValueError: There is none, there are several, or it is a sweep; the message lists the sweep's trials.
    """
    run = find_run(tracking, name, model)
    if run.data.tags.get(KIND_TAG) != SWEEP:
        return run
    of_sweep = f"tags.`{PARENT_TAG}` = '{run.info.run_id}' and attributes.status = 'FINISHED'"
    trials = tracking.client.search_runs([tracking.experiment_id], of_sweep, order_by=["attributes.start_time ASC"])
    shown = "\n".join(f"  {trial.info.run_id[:12]}  {for_terminal(trial.info.run_name)}" for trial in trials)
    raise ValueError(
        f"{for_terminal(run.info.run_name)!r} is a sweep; give one of its trials:\n{shown or '  none succeeded'}"
    )


def report(first: Run, second: Run, client: MlflowClient | None = None) -> list[str]:
    """Return the comparison as lines of text: the two runs, their inputs that differ, their figures that differ.

    Args:
        first: A run.
        second: Another run.
        client: Client of the store, by which long params are read from the artifacts; None = show their digests.
    """
    lines = [f"A  {describe_run(first)}", f"B  {describe_run(second)}", ""]
    if first.info.run_id == second.info.run_id:
        return [*lines, "These are the same run."]
    causes = {
        "params": sorted(differences(first.data.params, second.data.params), key=lambda difference: difference.name),
        "data": differences(data_of(first), data_of(second)),
        "base model": tagged(first, second, lambda name: name.startswith(BASE)),
        "code": tagged(first, second, lambda name: name in code_tags(first, second)),
        "versions": tagged(first, second, lambda name: name.startswith(VERSION)),
        "machine": tagged(first, second, lambda name: name.startswith(MACHINE)),
    }
    if client is not None:
        causes["params"] = [read_whole(client, first, second, difference) for difference in causes["params"]]
    for cause, found in causes.items():
        lines += [heading(cause, found), *map(describe_difference, found)]
    effects = differences(metrics_of(first), metrics_of(second))
    lines += ["", heading("figures", effects), *map(describe_effect, effects)]
    return [*lines, "", verdict(first, second, {name for name, found in causes.items() if found}, effects)]


def heading(what: str, found: list[Difference]) -> str:
    """Return the line with the number of differences of one kind."""
    return f"{what}: {len(found) or 'no'} difference{'s' if len(found) != 1 else ''}"


def describe_run(run: Run) -> str:
    """Describe a run in one line: name, id, commit, gate."""
    tags = run.data.tags
    commit = tags.get(COMMIT, "none")[:10] + (" with uncommitted changes" if tags.get(DIRTY) == "true" else "")
    return for_terminal(
        f"{run.info.run_name} (run {run.info.run_id[:12]}, commit {commit}, gate {tags.get('sft.gate', 'unknown')})"
    )


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Difference]:
    """Return the entries that differ between two mappings, including those that only one has."""
    names = [*before, *(name for name in after if name not in before)]
    return [
        Difference(name, before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)
    ]


def read_whole(client: MlflowClient, first: Run, second: Run, difference: Difference) -> Difference:
    """Return a difference of params with the whole values, if they were too long for MLflow."""
    before, after = (
        None if value is None else whole_value(client, run.info.run_id, value)
        for run, value in ((first, difference.before), (second, difference.after))
    )
    return Difference(difference.name, before, after)


def data_of(run: Run) -> dict[str, str]:
    """Return the SHA-256 of every data file of a run, by the file's name."""
    inputs = run.inputs.dataset_inputs if run.inputs else []
    return {item.dataset.name: json.loads(item.dataset.source)["sha256"] for item in inputs}


def code_tags(*runs: Run) -> tuple[str, ...]:
    """Return the names of the tags that identify the code: the commit, and a digest of the uncommitted changes.

    Older runs have no digest, only a tag for whether anything was uncommitted.
    """
    return (COMMIT, CODE) if all(CODE in run.data.tags for run in runs) else (COMMIT, DIRTY)


def metrics_of(run: Run) -> dict[str, float]:
    """Return the figures of the stages, those of `evaluate` first; curves and other metrics are left out."""
    figures = {name: value for name, value in run.data.metrics.items() if name.partition(".")[0] in MEASURED_STAGES}
    return {name: figures[name] for name in sorted(figures, key=lambda name: (not name.startswith("evaluate."), name))}


def tagged(first: Run, second: Run, wanted: Callable[[str], bool]) -> list[Difference]:
    """Return the tags of one kind that differ between two runs."""
    before, after = (
        {name: value for name, value in sorted(run.data.tags.items()) if wanted(name)} for run in (first, second)
    )
    return differences(before, after)


def describe_difference(difference: Difference) -> str:
    """Describe a value that differs in one line; of long values, the part where they begin to differ."""
    texts = ["-" if value is None else str(value) for value in (difference.before, difference.after)]
    start = max(0, common_prefix_length(*texts) - MAX_BEFORE)
    before, after = (shorten(text, start) for text in texts)
    return for_terminal(f"  {difference.name}: {before} -> {after}")


def shorten(text: str, start: int = 0) -> str:
    """Shorten a text to at most `MAX_VALUE` characters and ellipses.

    Args:
        text: The text.
        start: Index of the first character to show, if the text is too long.
    """
    if len(text) <= MAX_VALUE:
        return text
    return ("..." if start else "") + text[start : start + MAX_VALUE] + ("..." if start + MAX_VALUE < len(text) else "")


def describe_effect(effect: Difference) -> str:
    """Describe a figure that differs in one line, with the change and whether it is better or worse."""
    if effect.before is None or effect.after is None:
        return describe_difference(effect)
    name, change = for_terminal(effect.name), effect.after - effect.before
    return f"  {name}: {effect.before:.6g} -> {effect.after:.6g} ({change:+.3g}{rating(effect.name, change)})"


def rating(name: str, change: float) -> str:
    """Return `, better` or `, worse` if a figure of `evaluate` differs by more than rounding, else an empty text."""
    if not name.startswith("evaluate.") or name == "evaluate.gate_passed" or abs(change) < NOISE:
        return ""
    return ", better" if (change < 0) == lower_is_better(name) else ", worse"


def verdict(first: Run, second: Run, causes: set[str], effects: list[Difference]) -> str:
    """Summarize the comparison in a sentence or two."""
    digests = [run.data.tags.get(DIGEST_TAG) for run in (first, second)]
    if digests[0] is not None and digests[0] == digests[1]:
        return "Same params, same result to the last digit."
    if all(effect.before is None or effect.after is None for effect in effects):
        without = [name for name, digest in zip("AB", digests, strict=True) if digest is None]
        ended = f" {' and '.join(without)} ended before the evaluation." if without else ""
        others = f"B differs from A in {', '.join(sorted(causes))}" if causes else "Nothing that is recorded differs"
        return f"{others}; the figures that both have are the same.{ended}"
    if not causes:
        return "No recorded cause, but the results differ: another processor, or something that is not recorded."
    reasons = ", ".join(sorted(causes))
    evaluated = [effect for effect in effects if effect.before is not None and effect.after is not None]
    words = [rating(effect.name, effect.after - effect.before) for effect in evaluated]
    better, worse = words.count(", better"), words.count(", worse")
    reason = "That is all that differs, so it is the reason."
    if len(causes) > 1:
        reason = "The comparison can't tell which of these is the reason."
    if "data" in causes:
        reason += " The data differ, so the figures may have been measured on different rows."
    return f"B differs from A in {reasons}; {better} figures of the evaluation are better in B, {worse} worse. {reason}"
