"""Lineage of a result: params, git commit, digests of data and model, DVC hashes, versions and machine."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from stages.checkout.artifacts import file_digest, read_json
from stages.checkout.code import DIGESTS, PACKAGE, code_version
from stages.checkout.paths import Paths
from stages.params.schema import Params

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "datasets",
    "accelerate",
    "tokenizers",
    "safetensors",
    "gptqmodel",
    "optimum",
    "dvc",
    "mlflow",
    "prefect",
)

FLOW_RUN_VARIABLES = {"SFT_FLOW_RUN_ID": "prefect.flow_run_id", "SFT_FLOW_RUN_URL": "prefect.flow_run_url"}
"""Environment variable, set by a flow -> tag of the run in MLflow."""

PARENT_VARIABLE, PARENT_TAG = "SFT_PARENT_RUN", "mlflow.parentRunId"
"""Environment variable with the run of a sweep in MLflow, set by the sweep, and the tag of its child runs."""

WRITTEN_BY_RUNS = ("dvc.lock", "reports/")
"""Tracked files that a run of the pipeline changes itself."""

CODE = ("sft/", "stages/", f"{DIGESTS}/")

RECORDED_APART = ("params.yaml", "data/")
"""Tracked files whose content is recorded by params and digests."""

MACHINE = "machine."
"""Prefix of the tags that describe the machine."""

CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class GitState:
    """The commit that is checked out, and the tracked files that differ from it.

    Args:
        commit: Hash of the commit.
        changed: Paths of the files, without those that runs write themselves.
    """

    commit: str
    changed: tuple[str, ...]

    @property
    def dirty(self) -> bool:
        """Whether files differ from the commit, so that it alone does not reproduce a result."""
        return bool(self.changed)


def git_state(root: Path) -> GitState | None:
    """Return the state of the checkout, None outside of git or before the first commit."""
    commit = _git(root, "rev-parse", "--verify", "--quiet", "HEAD")
    if commit is None:
        return None
    # relative to the root, and not quoted, as git quotes names that are not ASCII
    listed = _git(root, "diff", "HEAD", "--name-only", "--no-renames", "--relative", "-z") or ""
    changed = [name for name in listed.split("\0") if name]
    return GitState(commit.strip(), tuple(name for name in changed if not name.startswith(WRITTEN_BY_RUNS)))


def git_diff(root: Path, without: tuple[str, ...] = ()) -> str:
    """Return the uncommitted changes as a patch.

    Args:
        root: The checkout.
        without: Paths of files or folders to leave out, in addition to those that runs write themselves.
    """
    excluded = [f":(exclude){name}" for name in (*WRITTEN_BY_RUNS, *without)]
    return _git(root, "diff", "HEAD", "--", ".", *excluded) or ""


def changed_code(root: Path) -> str:
    """Return a digest of the uncommitted changes except those of params and data; `none` if there are none."""
    patch = git_diff(root, RECORDED_APART)
    return hashlib.sha256(patch.encode()).hexdigest()[:16] if patch else "none"


def versions(root: Path | None = None) -> dict[str, str]:
    """Return the versions of Python and of the installed packages that a result depends on.

    Args:
        root: The checkout or project. For a project, the package with the code is one of them.
    """
    found = {"python": platform.python_version()}
    if root is not None and (code := code_version(root)) is not None:
        found[PACKAGE] = code
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def dvc_hashes(root: Path) -> dict[str, str]:
    """Return path -> content hash of all dependencies and outs in dvc.lock; empty without a dvc.lock.

    The entry of `publish` is left out: while `publish` runs, it is still the one of its last run.
    """
    lock = root / "dvc.lock"
    if not lock.exists():
        return {}
    stages = (YAML(typ="safe", pure=True).load(lock.read_text(encoding="utf-8")) or {}).get("stages", {})
    known = [stage for name, stage in stages.items() if name != "publish"]
    entries = [entry for stage in known for part in ("deps", "outs") for entry in stage.get(part, [])]
    return {entry["path"]: entry[entry.get("hash", "md5")] for entry in entries if entry.get("hash", "md5") in entry}


def dvc_out_of(root: Path, folder: str) -> tuple[str, str] | None:
    """Return the path and the hash of the out of DVC that contains a folder, by which its files are found in a cache.

    Args:
        root: The checkout.
        folder: A folder in it, or an out itself.

    Returns:
        None if there is no such out, or its files are not those that dvc.lock records, such as those of a stage that
        was run without DVC.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo  # a slow import, which only `publish` needs

    try:
        with Repo(str(root)) as repo:
            place = root / folder
            for out in repo.index.outs:
                if place.is_relative_to(out.fs_path) and out.hash_info and out.get_hash() == out.hash_info:
                    return Path(out.fs_path).relative_to(root).as_posix(), str(out.hash_info.value)
    except (DvcException, OSError):  # no project of DVC, or the files are gone
        return None
    return None


def dvc_data_hashes(root: Path) -> dict[str, str]:
    """Return the entries of `dvc_hashes` that are data and results, without those of code."""
    return {path: digest for path, digest in dvc_hashes(root).items() if not path.startswith(CODE)}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts into one dict with dotted keys; lists are kept as values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def result_params(params: Params) -> dict[str, Any]:
    """Return the params that can change a result, with dotted names: all but those of `publish`."""
    return flatten(params.model_dump(exclude={"publish"}))


def result_digest(params: Params, paths: Paths, files: list[Path]) -> str:
    """Return a digest of a result: of its params and files, but not of the commit or the versions.

    Args:
        params: Params of the result.
        paths: The checkout with the result.
        files: Files that make up the result.
    """
    parts = {"params": result_params(params)} | {
        path.relative_to(paths.root).as_posix(): file_digest(path) for path in files
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def training_digest(params: Params, paths: Paths) -> str:
    """Return a digest of a training: of its params, curve and metrics. DVC restores these, so it is stable."""
    stated = params.model_dump(include={"model", "train"})
    made = [file_digest(path) for path in (paths.out("train", "curve.csv"), paths.metrics("train"))]
    return hashlib.sha256(json.dumps([stated, made], sort_keys=True).encode()).hexdigest()


def circumstances(paths: Paths) -> dict[str, str]:
    """Return tags of a run: base model, commit, versions, and the flow or sweep that it belongs to."""
    base, git = base_model(paths), git_state(paths.root)
    variables = {**FLOW_RUN_VARIABLES, PARENT_VARIABLE: PARENT_TAG}
    return {
        "sft.base_model": base["resolved"],
        "sft.base_model_digest": base["digest"],
        "git.commit": git.commit if git else "none",
        "git.dirty": str(bool(git and git.dirty)).lower(),
        "git.changed_code": changed_code(paths.root),
        **{f"version.{name}": value for name, value in versions(paths.root).items()},
        **{tag: os.environ[name] for name, tag in variables.items() if os.environ.get(name)},
    }


def model_name(paths: Paths) -> str:
    """Return the base model's name without organisation or folder, as a part of names of runs."""
    return str(base_model(paths)["name_or_path"]).rpartition("/")[2].removeprefix("embedded:")


def base_model(paths: Paths) -> dict[str, Any]:
    """Read what `load` recorded about the base model."""
    return dict(read_json(paths.out("load", "base_model.json")))


def data_digests(paths: Paths) -> dict[str, str]:
    """Return name -> SHA-256 of the data files that `load` read, from its data card."""
    sources = read_json(paths.out("load", "card.json"))["sources"]
    return {name: digest for source in sources for name, digest in source["sha256"].items()}


def machine_facts() -> dict[str, str]:
    """Return system, processor, number of cores that this process may use, and OMP_NUM_THREADS.

    Besides params, data, code and versions, these decide the last digits of a result.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor_name(CPUINFO.read_text(encoding="utf-8") if CPUINFO.exists() else ""),
        "cores": str(cores),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS", "not set"),
    }


def machine_tags() -> dict[str, str]:
    """Return `machine_facts` as tags of a run."""
    return {f"{MACHINE}{name}": value for name, value in machine_facts().items()}


def processor_name(cpuinfo: str) -> str:
    """Return the processor's name from the text of Linux's /proc/cpuinfo, or from `platform` if it has none."""
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or "unknown"


def _git(root: Path, *arguments: str) -> str | None:
    """Return the output of a git command, None if git is not installed or the command fails."""
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.decode("utf-8", errors="replace") if done.returncode == 0 else None
