"""`publish`: all figures and artifacts -> one complete MLflow run, a version in its model registry, a model card.

The run is built from the outputs of the other stages alone, so that it is as complete when they came from the cache.
One result is one run: it is found again by a digest of params and results, and logged anew only when the store lacks
it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stages.checkout.artifacts import progress, read_json, write_json, write_text
from stages.checkout.paths import Paths
from stages.checkout.redaction import redact
from stages.hub_upload import push
from stages.pages.model_card import write_card
from stages.pages.promotion import CANDIDATE, Decision, write_page
from stages.params.schema import Params
from stages.tracking import lineage
from stages.tracking.champion import (
    CHAMPION,
    HELD_OUT_TAG,
    Champion,
    alias_version,
    check_promotion,
    find_champion,
    held_out_digest,
)
from stages.tracking.machine import machine_tags
from stages.tracking.store import PROGRESS_TAG, PUBLISHED, TRAINING_TAG, Tracking, open_tracking

DIGEST_TAG = "sft.result_digest"
MEASURED_STAGES = ("load", "format", "pack", "train", "merge", "quantize", "evaluate")


def run(params: Params, paths: Paths) -> None:
    """Log the result, register the model, move the aliases, write the card, push where asked.

    outs/publish/promotion.html says what became of the result; outs/publish/run.json is written last.

    Raises:
        ValueError: The tracking store can't be used, or the hub refuses.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    digest = lineage.result_digest(params, paths, result_files(paths))
    results = read_json(paths.out("evaluate", "results.json"))
    tracking = open_tracking(params.publish, lineage.main_checkout(paths.root))
    progress(1, 3, f"recording in {redact(tracking.uri)}")
    run_id = record_result(tracking, params, paths, digest, passed=results["passed"])
    progress(2, 3, f"registering {params.publish.registered_model}")
    champion, before = champion_before(tracking, params.publish.registered_model)
    promotion = check_promotion(params, paths, run_id, results["models"], champion)
    promoted = results["passed"] and all(row.passed for row in promotion)
    version = register(tracking, params, paths, run_id, digest, results, promoted)
    decision = Decision(
        name=params.publish.registered_model,
        version=version,
        before=before,
        champion=champion,
        is_comparable=champion is not None and champion.held_out == held_out_digest(paths),
        gate=results["gate"],
        promotion=promotion,
        promoted=promoted,
    )
    conditions = [*params.evaluate.gate, *params.publish.gate]
    write_page(paths.out("publish", "promotion.html"), decision, conditions, results)
    shipped = shipped_model(results)
    write_card(paths.out("publish", "README.md"), params, paths, shipped, digest)
    pushed = push_shipped(params, paths, shipped, digest, promoted)
    write_json(
        paths.out("publish", "run.json"),
        {
            "experiment": params.publish.experiment,
            "run_id": run_id,
            "result_digest": digest,
            "registered_model": params.publish.registered_model,
            "version": version,
            "gate_passed": results["passed"],
            "promotion": [asdict(row) for row in promotion],
            "promoted": promoted,
            "pushed": pushed,
        },
    )
    for row in promotion:
        print(f"  {'holds' if row.passed else 'FAILS'}  {row.condition}  ({row.reason})", flush=True)
    progress(3, 3, f"run {run_id}, model version {version}: {alias_text(results['passed'], promoted)}")


def champion_before(tracking: Tracking, name: str) -> tuple[Champion | None, dict[str, str | None]]:
    """The champion, and the version that each alias stands at; None for one that stands at none."""
    found = {alias: alias_version(tracking, name, alias) for alias in (CANDIDATE, CHAMPION)}
    versions = {alias: None if version is None else str(version.version) for alias, version in found.items()}
    return find_champion(tracking, name), versions


def shipped_model(results: dict[str, Any]) -> str:
    """Which of the models is the one to ship."""
    return "quantized" if "quantized" in results["models"] else "merged"


def push_shipped(params: Params, paths: Paths, shipped: str, digest: str, promoted: bool) -> str | None:
    """Push the shipped model and its card where params.yaml names a repository and the gate is open.

    Returns:
        Address of the commit, None when nothing was pushed.
    """
    repo_id = params.publish.push_to_hub
    if repo_id is None:
        return None
    if not promoted:
        print(f"note: the gate is closed, so nothing was pushed to {repo_id}", flush=True)
        return None
    progress(2, 3, f"pushing the {shipped} model to {repo_id}")
    folder = paths.out("quantize" if shipped == "quantized" else "merge", "model")
    return push(folder, paths.out("publish", "README.md"), repo_id, f"{params.publish.registered_model} {digest[:12]}")


def alias_text(passed: bool, promoted: bool) -> str:
    """What happened to the aliases."""
    if promoted:
        return f"`{CANDIDATE}` and `{CHAMPION}`, the gate is open"
    if passed:
        return f"`{CANDIDATE}` only, publish.gate does not hold and `{CHAMPION}` stays where it was"
    return f"`{CANDIDATE}` only, the gate is closed and `{CHAMPION}` stays where it was"


def result_files(paths: Paths) -> list[Path]:
    """The files that a result consists of: none of them holds a wall time, a commit or a path of this machine."""
    outs = [
        paths.out("load", "base_model.json"),
        paths.out("load", "card.json"),
        paths.out("train", "curve.csv"),
        paths.out("evaluate", "results.json"),
        paths.out("evaluate", "generations.jsonl"),
    ]
    return [*outs, *(path for stage in MEASURED_STAGES if (path := paths.metrics(stage)).exists())]


def record_result(
    tracking: Tracking,
    params: Params,
    paths: Paths,
    digest: str,
    passed: bool,
    more: Mapping[str, str] | None = None,
) -> str:
    """The one run of a result: found, or the one that its training has begun, completed, or a new one.

    Args:
        tracking: The store.
        params: The result's params.
        paths: The checkout that holds the result.
        digest: The result's.
        passed: Whether the gate is open.
        more: Tags of the run, beside those that every run has.

    Returns:
        Its id.
    """
    begun = tracking.find_unfinished(TRAINING_TAG, lineage.training_digest(params, paths))
    known = tracking.find_run(DIGEST_TAG, digest)
    if known is None:
        return log_run(tracking, params, paths, digest, passed, more, begun[0] if begun else None)
    print(f"this result is already run {known}", flush=True)
    for run_id in begun:  # a forced training, say: it came to the same to the last digit
        tracking.client.set_tag(run_id, PROGRESS_TAG, f"removed: the same result as run {known}")
        tracking.client.delete_run(run_id)
    return known


def log_run(
    tracking: Tracking,
    params: Params,
    paths: Paths,
    digest: str,
    passed: bool,
    more: Mapping[str, str] | None = None,
    begun: str | None = None,
) -> str:
    """Log params, figures, the curve, lineage and files as one finished run; a failure leaves none that is finished."""
    git = lineage.git_state(paths.root)
    tags = {
        "mlflow.source.name": "python -m stages publish",
        "sft.gate": "passed" if passed else "failed",
        HELD_OUT_TAG: held_out_digest(paths),
        **lineage.circumstances(paths),
        **machine_tags(),
        **{f"dvc.{path}": value for path, value in lineage.dvc_data_hashes(paths.root).items()},
        **(more or {}),
    }
    with tracking.whole_run(f"{lineage.model_name(paths)}-{digest[:8]}", tags, begun) as run:
        run.log_params(lineage.result_params(params))
        run.log_metrics(figures(paths))
        run.log_curve(paths.out("train", "curve.csv"))
        run.log_data(lineage.data_digests(paths))
        for path in [paths.report, *result_files(paths), paths.out("quantize", "report.json")]:
            run.log_file(path, folder=path.parent.relative_to(paths.root).as_posix())
        for file in ("params.yaml", "dvc.yaml", "dvc.lock", "requirements.lock"):
            if (paths.root / file).exists():
                log_text(run, file, (paths.root / file).read_text(encoding="utf-8"))
        if git and git.dirty:
            log_patch(run, paths.root)
        run.set_tag(PROGRESS_TAG, PUBLISHED)
        # Last, so that a run that was cut short is never taken for a whole one.
        run.set_tag(DIGEST_TAG, digest)
    return run.run_id


def log_patch(run: Any, root: Path) -> None:
    """The uncommitted changes, without which the commit would not reproduce the result."""
    log_text(run, "uncommitted.patch", lineage.git_diff(root))


def log_text(run: Any, name: str, text: str) -> None:
    """Log a text of the checkout, without the secrets that may stand in it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / name
        write_text(file, redact(text))
        run.log_file(file, folder="lineage")


def figures(paths: Paths) -> dict[str, float]:
    """`<stage>.<metric>` -> value, of every stage that has figures."""
    flat: dict[str, Any] = {}
    for stage in MEASURED_STAGES:
        path = paths.metrics(stage)
        if path.exists():
            flat |= lineage.flatten(read_json(path), f"{stage}.")
    return {name: float(value) for name, value in flat.items() if isinstance(value, (int, float))}


def register(
    tracking: Tracking,
    params: Params,
    paths: Paths,
    run_id: str,
    digest: str,
    results: dict[str, Any],
    promoted: bool,
) -> str:
    """One model version a result, weights left where DVC keeps them; returns the version's number."""
    shipped = shipped_model(results)
    folder = "outs/quantize/model" if shipped == "quantized" else "outs/merge/model"
    tags = {
        DIGEST_TAG: digest,
        "sft.gate": "passed" if results["passed"] else "failed",
        "sft.weights": folder,
        "sft.weights_dvc": lineage.dvc_hashes(paths.root).get(folder, "not in dvc.lock"),
    }
    metrics = {f"{shipped}.{name}": value for name, value in results["models"][shipped].items()}
    version = tracking.register(params.publish.registered_model, run_id, tags, metrics, DIGEST_TAG)
    tracking.set_alias(params.publish.registered_model, CANDIDATE, version)
    if promoted:
        tracking.set_alias(params.publish.registered_model, CHAMPION, version)
    return version
