"""`sft compare A B`: what differs between two results, and how their figures differ, as text and as a page."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from sft.common_prefix import common_prefix_length
from sft.evaluate.intervals import Paired
from stages.checkout.foreign_text import for_terminal
from stages.checkout.paths import Paths, main_checkout
from stages.evaluation.row_scores import RowScores, compare_rows, read_row_scores, rows_warning
from stages.pages.comparison import Side, write_comparison
from stages.params.figures import lower_is_better
from stages.params.schema import Params
from stages.tools.freshness import warn_if_stale
from stages.tracking.address import absolute_uri, database
from stages.tracking.champion import RESULTS_FOLDER
from stages.tracking.lineage import PARENT_TAG
from stages.tracking.recorded import (
    COMMIT,
    DIRTY,
    GATE_TAG,
    Difference,
    Recorded,
    differences,
    differing_rows,
    fetch_files,
    find_causes,
    present_result,
    recorded_run,
)
from stages.tracking.result import DIGEST_TAG, MEASURED_STAGES
from stages.tracking.store import KIND_TAG, SWEEP, Tracking, open_tracking

MAX_VALUE = 60
"""Longest text of a value, in characters."""

MAX_BEFORE = 20
"""Characters of long values that are shown before the first one that differs."""

NOISE = 1e-9
"""Differences of figures below this are treated as rounding errors."""


HERE = "."
"""Name of the result in the checkout, in the place of a run."""

PAGE = "comparison.html"
"""Name of the page in the folder `reports/`, unless another file is given."""


def run(params: Params, paths: Paths, *, runs: Sequence[str], html: str | None = None, as_json: bool = False) -> None:
    """Print the comparison of two results, and write it as a page if a file is given.

    Args:
        params: Values of params.yaml; `publish` has the store of the runs.
        paths: Paths of the checkout.
        runs: Two results: ids of runs or their beginnings, names, aliases of the registered model such as `champion`,
            or `.` for the result in the checkout.
        html: File of the page; an empty text = reports/comparison.html; None = no page.
        as_json: Whether to print JSON.

    Raises:
        ValueError: No run, or more than one, has such an id, name or alias, or the checkout has no result.
    """
    tracking = open_recorded(params, main_checkout(paths.root))
    results = []
    for name in runs:
        if name == HERE:
            warn_if_stale(params, paths, "evaluate")
            results.append(present_result(params, paths))
        else:
            results.append(recorded_run(find_result(tracking, name, params.publish.registered_model)))
    first, second = results
    with tempfile.TemporaryDirectory() as work:
        folders = [fetch_files(r, tracking, paths, Path(work) / side) for r, side in zip(results, "ab", strict=True)]
        rows = [read_row_scores(folder / RESULTS_FOLDER) for folder in folders]
        tests = compare_rows(*rows)
        if as_json:
            value = as_values(first, second, tracking.client, tests)
            print(json.dumps(value, indent=2, ensure_ascii=False, default=str), flush=True)
        else:
            print("\n".join(report(first, second, tracking.client, tests, rows)), flush=True)
        if html is not None:
            causes = find_causes(first, second, tracking.client)
            sides = [Side(r, folder, row.answers) for r, folder, row in zip(results, folders, rows, strict=True)]
            file = Path(html) if html else paths.root / "reports" / PAGE
            warning = rows_warning(rows) if differing_rows(first, second) else ""
            write_comparison(file, (sides[0], sides[1]), causes, tests, warning)
            print(f"page: {file}", file=sys.stderr if as_json else sys.stdout, flush=True)


def as_values(
    first: Recorded,
    second: Recorded,
    client: MlflowClient | None = None,
    tests: Mapping[str, tuple[Paired, int]] | None = None,
) -> dict[str, Any]:
    """Return the comparison as values for JSON: both results, inputs and figures that differ, and the verdict.

    Args:
        first: A result.
        second: Another result.
        client: Client of the store, by which long params are read from the artifacts; None = show their digests.
        tests: `model.metric` -> paired test on the rows that both have, and their number.
    """
    causes = find_causes(first, second, client)
    effects = differences(metrics_of(first), metrics_of(second))
    figures = []
    for effect in effects:
        numbers = effect.before is not None and effect.after is not None
        change = effect.after - effect.before if numbers else None
        test, num_rows = (tests or {}).get(effect.name.removeprefix("evaluate."), (None, None))
        better = {", better": True, ", worse": False}.get(rating(effect.name, change)) if change is not None else None
        paired = {**asdict(test), "rows": num_rows} if test is not None else None
        figures.append({**asdict(effect), "change": change, "better": better, "paired": paired})
    return {
        **{
            side: {
                "run_id": result.run_id,
                "name": result.name,
                "commit": result.tags.get(COMMIT),
                "uncommitted_changes": result.tags.get(DIRTY) == "true",
                "gate": result.tags.get(GATE_TAG),
            }
            for side, result in (("a", first), ("b", second))
        },
        "inputs": {cause: [asdict(found) for found in differing] for cause, differing in causes.items()},
        "figures": figures,
        "same_rows": not differing_rows(first, second),
        "verdict": verdict(first, second, {name for name, found in causes.items() if found}, effects),
    }


def open_recorded(params: Params, home: Path) -> Tracking:
    """Open the MLflow store that earlier runs were recorded in.

    Raises:
        ValueError: Nothing has been recorded yet, or the store can't be used.
    """
    uri = absolute_uri(params.publish.tracking_uri, home)
    if (file := database(uri)) is not None and not file.exists():
        raise ValueError(f"nothing is recorded yet at {uri}: `sft repro` ends with a recorded run")
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


def report(
    first: Recorded,
    second: Recorded,
    client: MlflowClient | None = None,
    tests: Mapping[str, tuple[Paired, int]] | None = None,
    rows: Sequence[RowScores] = (),
) -> list[str]:
    """Return the comparison as lines of text: the two runs, their inputs that differ, their figures that differ.

    Args:
        first: A result.
        second: Another result.
        client: Client of the store, by which long params are read from the artifacts; None = show their digests.
        tests: `model.metric` -> paired test on the rows that both have, and their number.
        rows: Scores of the rows of both.
    """
    lines = [f"A  {describe_run(first)}", f"B  {describe_run(second)}", ""]
    if first.run_id == second.run_id:
        return [*lines, "These are the same run."]
    causes = find_causes(first, second, client)
    for cause, found in causes.items():
        lines += [heading(cause, found), *map(describe_difference, found)]
    effects = differences(metrics_of(first), metrics_of(second))
    lines += ["", heading("figures", effects), *(describe_effect(effect, tests or {}) for effect in effects)]
    if differing_rows(first, second):
        lines += ["", f"warning: {rows_warning(rows)}"]
    return [*lines, "", verdict(first, second, {name for name, found in causes.items() if found}, effects)]


def heading(what: str, found: list[Difference]) -> str:
    """Return the line with the number of differences of one kind."""
    return f"{what}: {len(found) or 'no'} difference{'s' if len(found) != 1 else ''}"


def describe_run(result: Recorded) -> str:
    """Describe a result in one line: name, id, commit, gate."""
    tags = result.tags
    commit = tags.get(COMMIT, "none")[:10] + (" with uncommitted changes" if tags.get(DIRTY) == "true" else "")
    run = f"run {result.run_id[:12]}, " if result.run_id else ""
    return for_terminal(f"{result.name} ({run}commit {commit}, gate {tags.get(GATE_TAG, 'unknown')})")


def metrics_of(result: Recorded) -> dict[str, float]:
    """Return the figures of the stages, those of `evaluate` first; curves and other metrics are left out."""
    found = {name: value for name, value in result.metrics.items() if name.partition(".")[0] in MEASURED_STAGES}
    return {name: found[name] for name in sorted(found, key=lambda name: (not name.startswith("evaluate."), name))}


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


def describe_effect(effect: Difference, tests: Mapping[str, tuple[Paired, int]] | None = None) -> str:
    """Describe a figure that differs in one line, with the change, whether it is better or worse, and its p-value."""
    if effect.before is None or effect.after is None:
        return describe_difference(effect)
    name, change = for_terminal(effect.name), effect.after - effect.before
    test = (tests or {}).get(effect.name.removeprefix("evaluate."))
    tested = f"; p {test[0].p_value:.3f} on {test[1]} rows" if test else ""
    return f"  {name}: {effect.before:.6g} -> {effect.after:.6g} ({change:+.3g}{rating(effect.name, change)}{tested})"


def rating(name: str, change: float) -> str:
    """Return `, better` or `, worse` if a figure of `evaluate` differs by more than rounding, else an empty text."""
    if not name.startswith("evaluate.") or name == "evaluate.gate_passed" or abs(change) < NOISE:
        return ""
    return ", better" if (change < 0) == lower_is_better(name) else ", worse"


def verdict(first: Recorded, second: Recorded, causes: set[str], effects: list[Difference]) -> str:
    """Summarize the comparison in a sentence or two."""
    digests = [result.tags.get(DIGEST_TAG) for result in (first, second)]
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
