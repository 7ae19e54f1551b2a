"""Recording of a result as one run in MLflow: params, metrics, curve, lineage and files."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from stages.checkout.artifacts import read_json, write_text
from stages.checkout.paths import Paths
from stages.checkout.redaction import redact
from stages.params.schema import Params
from stages.tracking import lineage
from stages.tracking.champion import HELD_OUT_TAG, held_out_digest
from stages.tracking.lineage import machine_tags
from stages.tracking.run_text import main_figures, run_name, run_note
from stages.tracking.store import (
    GATE_TAG,
    HASHES,
    HASHES_TAG,
    NOTE_TAG,
    PROGRESS_TAG,
    PUBLISHED,
    TRAINING_TAG,
    Tracking,
)

DIGEST_TAG = "sft.result_digest"

REPORTS = "reports"
"""Folder of a run's artifacts with its pages."""

PATCH_TAG = "git.patch_redacted"
"""Tag of a run whose recorded patch lacks the secrets that the uncommitted changes contained."""

MEASURED_STAGES = ("load", "format", "pack", "train", "merge", "quantize", "evaluate")


def result_files(paths: Paths) -> list[Path]:
    """Return the files that make up a result; none of them contains a wall time, a commit or a path."""
    outs = [
        paths.out("load", "base_model.json"),
        paths.out("load", "card.json"),
        paths.out("train", "curve.csv"),
        paths.out("evaluate", "results.json"),
        paths.out("evaluate", "generations.jsonl"),
    ]
    return [*outs, *(path for stage in MEASURED_STAGES if (path := paths.metrics(stage)).exists())]


def result_digest_of(params: Params, paths: Paths) -> str:
    """Return the digest of the result in a checkout, by which its run is found."""
    return lineage.result_digest(params, paths, result_files(paths))


@dataclass(frozen=True)
class Result:
    """A result to be recorded.

    Args:
        params: Its params.
        paths: The checkout with its files.
        passed: Whether the conditions of `evaluate.gate` are met.
        tags: Tags of its run, in addition to those of every run.
    """

    params: Params
    paths: Paths
    passed: bool
    tags: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """The digest of params and files, by which its run is found."""
        return result_digest_of(self.params, self.paths)


def record_result(tracking: Tracking, result: Result) -> str:
    """Find the run of a result, or complete the one that its training started, or create one.

    The store is locked meanwhile, so that one result has one run, however many processes record it at once. Other
    machines that use the same server are not locked out: of two runs of one result, the one that ended last is deleted.

    Returns:
        Id of the run.
    """
    with tracking.locked():
        begun = tracking.find_unfinished(TRAINING_TAG, lineage.training_digest(result.params, result.paths))
        known = tracking.find_run(DIGEST_TAG, result.digest)
        if known is not None:
            print(f"this result is already run {known}", flush=True)
        else:
            created = _log_run(tracking, result, begun[0] if begun else None)
            known = tracking.find_run(DIGEST_TAG, result.digest) or created
            begun = [created] if known != created else []
        for run_id in begun:  # of a training that was forced to run again, or of another machine at the same time
            tracking.client.set_tag(run_id, PROGRESS_TAG, f"removed: the same result as run {known}")
            tracking.client.delete_run(run_id)
        return known


def _log_run(tracking: Tracking, result: Result, begun: str | None) -> str:
    """Log params, metrics, the curve, lineage and files as one run, which is finished only if all are logged.

    Args:
        tracking: The store.
        result: What is logged.
        begun: Id of the run that the training started; None = create a run.

    Returns:
        Id of the run.
    """
    params, paths = result.params, result.paths
    git = lineage.git_state(paths.root)
    patch = lineage.git_diff(paths.root) if git and git.dirty else ""
    tags = {
        "mlflow.source.name": "python -m stages publish",
        GATE_TAG: "passed" if result.passed else "failed",
        HELD_OUT_TAG: held_out_digest(paths),
        **lineage.circumstances(paths),
        **machine_tags(),
        **({PATCH_TAG: "true"} if redact(patch) != patch else {}),
        HASHES_TAG: HASHES,
        **result.tags,
    }
    stated, measured = lineage.result_params(params), figures(paths)
    shipped = "quantized" if params.quantize.method != "none" else "merged"
    main = main_figures(measured, read_json(paths.out("evaluate", "results.json"))["figures"][0], shipped)
    name = run_name(stated, tracking.newest_params(DIGEST_TAG), measured, lineage.model_name(paths))
    with tracking.whole_run(name, tags, begun) as run:
        run.log_params(stated)
        run.log_metrics({**main, **measured})
        run.log_curve(paths.out("train", "curve.csv"))
        run.log_data(lineage.data_digests(paths))
        details = [paths.out("evaluate", name) for name in ("documents.jsonl", "general.jsonl")]
        details += [paths.out("train", name) for name in ("selection.json", "effect.json", "samples.jsonl")]
        details = [path for path in details if path.exists()]  # older results lack some
        run.log_file(paths.evaluation_page, REPORTS, paths.report.name)  # `publish` replaces it by the complete one
        for path in [*result_files(paths), paths.out("quantize", "report.json"), *details]:
            run.log_file(path, folder=path.parent.relative_to(paths.root).as_posix())
        report = tracking.page(run.run_id, f"{REPORTS}/{paths.report.name}")
        run.set_tag(NOTE_TAG, run_note(name, main, result.passed, report))
        log_text(run, Path(HASHES).name, json.dumps(lineage.dvc_data_hashes(paths.root), indent=2))
        for file in ("params.yaml", "dvc.yaml", "dvc.lock", "requirements.lock"):
            if (paths.root / file).exists():
                log_text(run, file, (paths.root / file).read_text(encoding="utf-8"))
        if git and git.dirty:
            log_patch(run, paths.root)
        run.set_tag(PROGRESS_TAG, PUBLISHED)
        # set last, as runs are found by it: an interrupted one must not be found
        run.set_tag(DIGEST_TAG, result.digest)
    tracking.show_columns([*main, "train/loss"])
    return run.run_id


def log_patch(run: Any, root: Path) -> None:
    """Log the uncommitted changes, which reproducing the result needs besides the commit."""
    log_text(run, "uncommitted.patch", lineage.git_diff(root))


def log_text(run: Any, name: str, text: str) -> None:
    """Log a text file, with secrets replaced."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / name
        write_text(file, redact(text))
        run.log_file(file, folder="lineage")


def figures(paths: Paths) -> dict[str, float]:
    """Return `<stage>.<metric>` -> value for all stages that have run."""
    flat: dict[str, Any] = {}
    for stage in MEASURED_STAGES:
        path = paths.metrics(stage)
        if path.exists():
            flat |= lineage.flatten(read_json(path), f"{stage}.")
    return {name: float(value) for name, value in flat.items() if isinstance(value, (int, float))}
