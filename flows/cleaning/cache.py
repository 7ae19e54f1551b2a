"""Removal of files from DVC's cache to which no checkout, git commit or recorded run in MLflow refers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow.exceptions import MlflowException
from ruamel.yaml import YAML

from flows.processes.environment import child_environment
from flows.processes.supervised import run_supervised
from flows.runs.graph import RunRefused
from stages.checkout import worktree
from stages.checkout.paths import main_checkout
from stages.params.schema import load_params
from stages.tracking.address import absolute_uri, database
from stages.tracking.store import HASHES, HASHES_TAG, open_tracking

HASH_TAG = "dvc."
"""Prefix of the tags with hashes that runs have which were recorded before `HASHES`."""

_HASH = re.compile(r"^[0-9a-f]{32}(\.dir)?$")
_REMOVING = re.compile(r"^Removing (.+)$")


@dataclass(frozen=True)
class Unreferenced:
    """The files of the cache that nothing refers to.

    Args:
        num_objects: Number of files.
        num_bytes: Their total size.
    """

    num_objects: int
    num_bytes: int


def clean_cache(root: Path, dry: bool) -> Unreferenced:
    """Remove the files that nothing refers to with `dvc gc`.

    Args:
        root: The checkout.
        dry: Only find them.

    Raises:
        RunRefused: A run is in progress, whose results are not recorded yet; or `dvc gc` failed.
        ValueError: The tracking store, which has the references of recorded runs, can't be read.
    """
    at_work = worktree.living(root)
    if at_work:
        raise RunRefused(f"the cache is in use by {', '.join(at_work)}; clean it when these runs have ended")
    hashes = recorded_hashes(root)
    with tempfile.TemporaryDirectory() as folder:
        keep = Path(folder) / "recorded"
        write_references(keep, hashes, worktree.dvc_cache(root))
        listed = _collect(root, keep, dry=True)
        found = Unreferenced(len(listed), sum(path.stat().st_size for path in listed if path.is_file()))
        if listed and not dry:
            _collect(root, keep, dry=False)
    return found


def recorded_hashes(root: Path) -> set[str]:
    """Return the DVC hashes of data and results of all runs in MLflow's store, of every experiment."""
    home = main_checkout(root)
    publish = load_params(root / "params.yaml").publish
    uri = absolute_uri(publish.tracking_uri, home)
    if (file := database(uri)) is not None and not file.exists():
        return set()
    client = open_tracking(publish, home).client
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    hashes: set[str] = set()
    token: str | None = None
    while True:
        page: Any = client.search_runs(experiments, page_token=token)
        for run in page:
            tags = run.data.tags.items()
            hashes |= {value for name, value in tags if name.startswith(HASH_TAG) and _HASH.match(value)}
            if HASHES_TAG in run.data.tags:
                hashes |= hashes_in_artifact(client, run.info.run_id)
        token = page.token
        if not token:
            return hashes


def hashes_in_artifact(client: Any, run_id: str) -> set[str]:
    """Return the DVC hashes that a run has as an artifact.

    Raises:
        RunRefused: The artifact can't be read, so that it is unknown what the run refers to.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            file = Path(client.download_artifacts(run_id, HASHES, folder))
            found = json.loads(file.read_text(encoding="utf-8")).values()
        except (MlflowException, OSError, ValueError) as error:
            raise RunRefused(f"run {run_id} in MLflow: its artifact {HASHES} can't be read: {error}") from error
    return {value for value in found if _HASH.match(value)}


def write_references(folder: Path, hashes: set[str], cache: Path) -> None:
    """Create a DVC project with these hashes and the same cache, so that `dvc gc --projects` keeps their files."""
    folder.mkdir()
    for command in (["git", "init", "--quiet"], [sys.executable, "-m", "dvc", "init", "--quiet"]):
        subprocess.run(command, cwd=folder, env=child_environment(), check=True, capture_output=True)
    worktree.use_dvc_cache(folder, cache)
    outs = [{"md5": value, "hash": "md5", "path": f"recorded-{value}"} for value in sorted(hashes)]
    with (folder / "recorded.dvc").open("w", encoding="utf-8") as file:
        YAML().dump({"outs": outs}, file)
    identity = ["-c", "user.name=cleanup", "-c", "user.email=cleanup@localhost"]
    for arguments in (["add", "--all"], [*identity, "commit", "--quiet", "--message", "references"]):
        subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True)


def _collect(root: Path, keep: Path, dry: bool) -> list[Path]:
    lines: list[str] = []
    command = [sys.executable, "-m", "dvc", "gc", "--all-commits", "--force", *(["--dry"] if dry else [])]
    code = run_supervised([*command, "--projects", str(keep)], root, child_environment(), lines.append)
    if code != 0:
        raise RunRefused("dvc gc: " + " ".join(line.strip() for line in lines if line.strip()))
    return [Path(match[1]) for line in lines if (match := _REMOVING.match(line))]
