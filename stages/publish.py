"""Stage `publish`: all figures and files to one run in MLflow, a version in the model registry, a model card.

The run is built from the outs of the other stages, so it is also complete if DVC restored these from its cache. Each
result has one run, found by a digest of params and results; it is logged only if the store does not have it yet. If
params.yaml names a repository, the model and its card are pushed to the hub.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sft.evaluate.evidence import Measured
from stages.checkout.artifacts import read_json, write_json, write_text
from stages.checkout.paths import Paths, main_checkout
from stages.checkout.redaction import redact
from stages.evaluation.row_scores import compare_rows, evidence_of, read_row_scores, rows_warning
from stages.pages.comparison import Side, write_comparison
from stages.pages.model_card import write_card
from stages.pages.promotion import Decision, write_page
from stages.pages.since_champion import Changes, complete_report, section_without_changes
from stages.pages.verdict import doubts, read_results
from stages.params.figures import VERDICTS, all_figures
from stages.params.schema import Params
from stages.progress import progress, stage_progress
from stages.shipping.folder import write_shipped_folder
from stages.shipping.signature import signing_key
from stages.tracking import lineage
from stages.tracking.champion import (
    CANDIDATE,
    CHAMPION,
    RESULTS_FOLDER,
    Champion,
    Publication,
    begin_publication,
    check_promotion,
    fetch_results,
    find_champion,
    held_out_digest,
)
from stages.tracking.recorded import Difference, differing_rows, fetch_files, find_causes, recorded_run
from stages.tracking.result import DIGEST_TAG, REPORTS, Result, record_result
from stages.tracking.store import Tracking, open_tracking

KEY = "publish.push_to_hub"

MANIFEST_TAG = "sft.manifest_sha256"
"""Tag of a model version with the digest of the shipped folder's manifest."""

SINCE_CHAMPION = "since_champion.html"
"""Page in outs/publish that compares the result with the champion before it; the same in short, as Markdown, is beside
it."""


@stage_progress("publish")
def run(params: Params, paths: Paths) -> None:
    """Log the result, register the model, move the aliases, write the card, and push if params.yaml asks for it.

    outs/publish/model is the folder that is shipped (`stages/shipping/`).
    outs/publish/promotion.html shows whether the result became the champion, and what changed since the last one.
    reports/report.html is the page of `evaluate` with what changed since the champion.
    outs/publish/run.json is written last.
    The store is locked from the first look at the aliases until the page is written.

    Raises:
        ValueError: The tracking store can't be used, or the hub refuses the push.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    key = signing_key()
    results = read_results(paths)
    result = Result(params, paths, results["passed"])
    tracking = open_tracking(params.publish, main_checkout(paths.root))
    progress(1, 3, "steps", f"recording in {redact(tracking.uri)}")
    with tracking.locked():
        tracking.end_interrupted()
        run_id = record_result(tracking, result)
        progress(2, 3, "steps", f"registering {params.publish.registered_model}")
        version = register(tracking, result, run_id, results)
        decision, publication = decide(tracking, result, run_id, version, results)
        move_aliases(tracking, publication, decision)
        conditions = [*params.evaluate.gate, *params.publish.gate]
        changes = compare_with_champion(tracking, params, paths, run_id, decision.champion)
        compared = paths.out("publish", SINCE_CHAMPION).exists()
        write_page(paths.out("publish", "promotion.html"), decision, conditions, results, changes)
    shipped = shipped_model(results)
    card = paths.out("publish", "README.md")
    write_card(card, params, paths, shipped, result.digest)
    folder = paths.out("publish", "model")
    manifest = write_shipped_folder(
        folder,
        model_folder(paths, shipped),
        card,
        params,
        paths,
        shipped=shipped,
        digest=result.digest,
        results=results,
        key=key,
    )
    tracking.describe(params.publish.registered_model, version, card.read_text(encoding="utf-8"), decision.promoted)
    tracking.client.set_model_version_tag(params.publish.registered_model, version, MANIFEST_TAG, manifest)
    pushed = push_shipped(params, folder, shipped, result.digest, decision.promoted)
    write_json(
        paths.out("publish", "run.json"),
        {
            "experiment": params.publish.experiment,
            "run_id": run_id,
            "result_digest": result.digest,
            "registered_model": params.publish.registered_model,
            "version": version,
            "manifest_sha256": manifest,
            "gate_passed": results["passed"],
            "promotion": [asdict(row) for row in decision.promotion],
            "promoted": decision.promoted,
            "pushed": pushed,
            "comparison": tracking.page(run_id, f"{REPORTS}/{SINCE_CHAMPION}") if compared else None,
        },
    )
    publication.finish()
    for row in decision.promotion:
        print(f"  {VERDICTS[row.verdict]:<9}  {row.condition}  ({row.reason})", flush=True)
    outcome = f"run {run_id}, model version {version}: {alias_text(results['passed'], decision.promoted)}"
    progress(3, 3, "steps", outcome)


def register(tracking: Tracking, result: Result, run_id: str, results: dict[str, Any]) -> str:
    """Register a model version for the result.

    The version has no files, as DVC stores the weights. Tags name their folder, the out of DVC that contains it, and
    the hash by which the out is found in DVC's caches.

    Args:
        tracking: The store.
        result: The result.
        run_id: Id of its run.
        results: Content of outs/evaluate/results.json.

    Returns:
        Number of the version.
    """
    shipped = shipped_model(results)
    folder = "outs/quantize/model" if shipped == "quantized" else "outs/merge/model"
    found = lineage.dvc_out_of(result.paths.root, folder)
    out, digest = found or ("none", "not in dvc.lock")
    weights = {"sft.weights_out": out, "sft.weights_dvc": digest}
    tags = {
        DIGEST_TAG: result.digest,
        "sft.gate": "passed" if result.passed else "failed",
        "sft.weights": folder,
        **weights,
    }
    metrics = {f"{shipped}.{name}": value for name, value in results["models"][shipped].items()}
    name = result.params.publish.registered_model
    version = tracking.register(name, run_id, tags, metrics, DIGEST_TAG)
    if found is not None:  # an earlier publication may have been started without DVC
        for key, value in weights.items():
            tracking.client.set_model_version_tag(name, version, key, value)
    return version


def decide(
    tracking: Tracking, result: Result, run_id: str, version: str, results: dict[str, Any]
) -> tuple[Decision, Publication]:
    """Decide whether the result becomes the champion, and write the decision down before any alias moves.

    Returns:
        The decision, and the publication that carries it out.
    """
    params = result.params.publish
    publication = begin_publication(tracking, params.registered_model, version, params.gate)
    champion = find_champion(tracking, params.registered_model, publication.before[CHAMPION])
    evidence = read_evidence(tracking, result.paths, results, champion)
    promotion = check_promotion(result.params, result.paths, run_id, all_figures(results), champion, evidence)
    decision = Decision(
        name=params.registered_model,
        version=version,
        before=publication.before,
        champion=champion,
        is_comparable=champion is not None and champion.held_out == held_out_digest(result.paths),
        gate=results["gate"],
        promotion=promotion,
        promoted=results["passed"] and all(row.passed for row in promotion),
        doubts=doubts(results),
    )
    return decision, publication


def read_evidence(
    tracking: Tracking, paths: Paths, results: dict[str, Any], champion: Champion | None
) -> dict[str, Measured]:
    """Return how certain the figures of this result and of the champion are."""
    found = evidence_of(results["intervals"], read_row_scores(paths.out("evaluate")), results["num_prompts"])
    if champion is None:
        return found
    with tempfile.TemporaryDirectory() as work:
        folder = fetch_results(tracking, champion.run_id, Path(work))
        if (file := folder / "results.json").exists():
            then = read_json(file)
            rows = read_row_scores(folder)
            found |= evidence_of(then["intervals"], rows, then["num_prompts"], f"{CHAMPION}.")
    return found


def compare_with_champion(
    tracking: Tracking, params: Params, paths: Paths, run_id: str, champion: Champion | None
) -> dict[str, list[Difference]]:
    """Complete the report with what changed since the champion before this result, and write the page with all of it.

    Both are logged to this result's run. If the champion is this result, the run keeps the report that compares it with
    the champion before.

    Returns:
        Kind -> what differs between their inputs; empty if there was no champion, or it was this result. Then an
        earlier page is deleted.
    """
    page = paths.out("publish", SINCE_CHAMPION)
    short = page.with_suffix(".md")
    for file in (page, short):
        file.unlink(missing_ok=True)
    if champion is None or champion.run_id == run_id:
        complete_report(paths, section_without_changes(champion.version if champion else None))
        if champion is None:
            tracking.client.log_artifact(run_id, str(paths.report), REPORTS)
        return {}
    before = recorded_run(tracking.client.get_run(champion.run_id))
    after = recorded_run(tracking.client.get_run(run_id))
    causes = find_causes(before, after, tracking.client)
    with tempfile.TemporaryDirectory() as work:
        folders = [fetch_files(before, tracking, paths, Path(work)), paths.root]
        rows = [read_row_scores(folder / RESULTS_FOLDER) for folder in folders]
        sides = [Side(r, f, row.answers) for r, f, row in zip((before, after), folders, rows, strict=True)]
        warning = rows_warning(rows) if differing_rows(before, after) else ""
        changes = Changes(champion.version, (sides[0], sides[1]), causes, compare_rows(*rows), warning)
        write_comparison(page, changes.sides, causes, changes.tests, warning)
        complete_report(paths, changes.section())
        write_text(short, redact(changes.markdown()))
    for file in (page, paths.report):
        tracking.client.log_artifact(run_id, str(file), REPORTS)
    link = tracking.page(run_id, f"{REPORTS}/{SINCE_CHAMPION}")
    tracking.add_to_note(run_id, f"- [what changed since the champion, version {champion.version}]({link})")
    return causes


def move_aliases(tracking: Tracking, publication: Publication, decision: Decision) -> None:
    """Point `candidate` at the version of a decision, and `champion` if the version is promoted."""
    tracking.set_alias(publication.name, CANDIDATE, decision.version)
    if decision.promoted:
        tracking.set_alias(publication.name, CHAMPION, decision.version)


def shipped_model(results: dict[str, Any]) -> str:
    """Return the name of the model to ship: quantized if there is one, otherwise merged."""
    return "quantized" if "quantized" in results["models"] else "merged"


def model_folder(paths: Paths, shipped: str) -> Path:
    """Return the folder of the checkpoint that is shipped."""
    return paths.out("quantize" if shipped == "quantized" else "merge", "model")


def push_shipped(params: Params, folder: Path, shipped: str, digest: str, promoted: bool) -> str | None:
    """Push the shipped folder, if params.yaml names a repository and the gate is open.

    Args:
        params: Values of params.yaml.
        folder: The shipped folder.
        shipped: Name of the model to ship.
        digest: Digest of the result, for the message of the commit.
        promoted: Whether the gate is open.

    Returns:
        URL of the commit; None if nothing was pushed.
    """
    repo_id = params.publish.push_to_hub
    if repo_id is None:
        return None
    if not promoted:
        print(f"note: the gate is closed, so nothing was pushed to {repo_id}", flush=True)
        return None
    progress(2, 3, "steps", f"pushing the {shipped} model to {repo_id}")
    return push(folder, repo_id, f"{params.publish.registered_model} {digest[:12]}")


def push(folder: Path, repo_id: str, message: str) -> str:
    """Replace the content of a hub repository by the shipped folder, in one commit.

    Args:
        folder: The shipped folder.
        repo_id: `owner/name`; a repository that does not exist is created as a private one.
        message: Message of the commit.

    Returns:
        URL of the commit.

    Raises:
        ValueError: The hub can't be reached or refuses the push; names the key of params.yaml.
    """
    # imported here, as the import is slow and few runs push
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    api = HfApi()
    try:
        api.create_repo(repo_id, private=True, exist_ok=True)
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message, delete_patterns="*")
    except LocalTokenNotFoundError:
        raise ValueError(f"{KEY} {repo_id!r}: no one is logged in; type `hf auth login`, or set HF_TOKEN") from None
    except OfflineModeIsEnabled:
        raise ValueError(f"{KEY} {repo_id!r}: HF_HUB_OFFLINE is set; unset it, or set {KEY}: null") from None
    except (HTTPError, HFValidationError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{KEY} {repo_id!r}: the hub refused or can't be reached: {reason}") from error
    return str(commit.commit_url)


def alias_text(passed: bool, promoted: bool) -> str:
    """Describe which aliases were moved."""
    if promoted:
        return f"`{CANDIDATE}` and `{CHAMPION}`, the gate is open"
    if passed:
        return f"`{CANDIDATE}` only, as a condition for it is not met; `{CHAMPION}` is unchanged"
    return f"`{CANDIDATE}` only, as the gate is closed; `{CHAMPION}` is unchanged"
