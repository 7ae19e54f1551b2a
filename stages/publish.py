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

from stages.checkout.artifacts import progress, read_json, write_json
from stages.checkout.paths import Paths
from stages.checkout.redaction import redact
from stages.pages.model_card import write_card
from stages.pages.promotion import Decision, write_page
from stages.params.schema import Params
from stages.tracking import lineage
from stages.tracking.champion import (
    CANDIDATE,
    CHAMPION,
    Champion,
    alias_version,
    check_promotion,
    find_champion,
    held_out_digest,
)
from stages.tracking.result import DIGEST_TAG, record_result, result_files
from stages.tracking.store import Tracking, open_tracking

KEY = "publish.push_to_hub"


def run(params: Params, paths: Paths) -> None:
    """Log the result, register the model, move the aliases, write the card, and push if params.yaml asks for it.

    outs/publish/promotion.html shows whether the result became the champion. outs/publish/run.json is written last.

    Raises:
        ValueError: The tracking store can't be used, or the hub refuses the push.
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
    """Return the champion, and alias -> version that it points at (None if it points at none)."""
    found = {alias: alias_version(tracking, name, alias) for alias in (CANDIDATE, CHAMPION)}
    versions = {alias: None if version is None else str(version.version) for alias, version in found.items()}
    return find_champion(tracking, name), versions


def register(
    tracking: Tracking,
    params: Params,
    paths: Paths,
    run_id: str,
    digest: str,
    results: dict[str, Any],
    promoted: bool,
) -> str:
    """Register a model version for the result and move the aliases to it.

    The version has no files, as DVC stores the weights; a tag names their folder and DVC hash.

    Args:
        tracking: The store.
        params: Values of params.yaml.
        paths: The checkout.
        run_id: Id of the result's run.
        digest: Digest of the result.
        results: Content of outs/evaluate/results.json.
        promoted: Whether the version becomes the champion; it becomes the candidate in any case.

    Returns:
        Number of the version.
    """
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


def shipped_model(results: dict[str, Any]) -> str:
    """Return the name of the model to ship: quantized if there is one, otherwise merged."""
    return "quantized" if "quantized" in results["models"] else "merged"


def push_shipped(params: Params, paths: Paths, shipped: str, digest: str, promoted: bool) -> str | None:
    """Push the shipped model and its card, if params.yaml names a repository and the gate is open.

    Args:
        params: Values of params.yaml.
        paths: The checkout.
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
    progress(2, 3, f"pushing the {shipped} model to {repo_id}")
    folder = paths.out("quantize" if shipped == "quantized" else "merge", "model")
    return push(folder, paths.out("publish", "README.md"), repo_id, f"{params.publish.registered_model} {digest[:12]}")


def push(folder: Path, card: Path, repo_id: str, message: str) -> str:
    """Replace the content of a hub repository by a model folder and its card, in one commit.

    Args:
        folder: Plain checkpoint.
        card: Model card, pushed under its own file name (README.md).
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
        with tempfile.TemporaryDirectory() as work:
            for file in [*folder.iterdir(), card]:
                (Path(work) / file.name).symlink_to(file.resolve())
            api.create_repo(repo_id, private=True, exist_ok=True)
            commit = api.upload_folder(repo_id=repo_id, folder_path=work, commit_message=message, delete_patterns="*")
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
        return f"`{CANDIDATE}` only, as publish.gate does not hold; `{CHAMPION}` is unchanged"
    return f"`{CANDIDATE}` only, as the gate is closed; `{CHAMPION}` is unchanged"
