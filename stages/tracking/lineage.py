"""Where a result comes from: params, git commit, data and model digests, DVC hashes, versions.

The machine that computes: what decides, besides params, data, code and versions, on a result's last digits.
"""

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

PARENT_VARIABLE, PARENT_TAG = "SFT_PARENT_RUN", "mlflow.parentRunId"
"""How flows tell stages for whom they run: the flow run, and the run of a sweep in MLflow."""

# A run rewrites these itself.
WRITTEN_BY_RUNS = ("dvc.lock", "reports/")

CODE = ("sft/", "stages/")

RECORDED_APART = ("params.yaml", "data/")


@dataclass(frozen=True)
class GitState:
    """The commit that is checked out, and the tracked files that differ from it (a run's own outputs left out)."""

    commit: str
    changed: tuple[str, ...]

    @property
    def dirty(self) -> bool:
        """Whether the commit alone does not reproduce the result."""
        return bool(self.changed)


def git_state(root: Path) -> GitState | None:
    """The state of the checkout, None outside of git or before the first commit."""
    commit = _git(root, "rev-parse", "--verify", "--quiet", "HEAD")
    if commit is None:
        return None
    lines = (_git(root, "status", "--porcelain", "--untracked-files=no") or "").splitlines()
    changed = [line[3:].strip().strip('"') for line in lines]
    return GitState(commit.strip(), tuple(name for name in changed if not name.startswith(WRITTEN_BY_RUNS)))


def git_diff(root: Path, without: tuple[str, ...] = ()) -> str:
    """The changes that `GitState.changed` names, as a patch; those of some files or folders left out."""
    excluded = [f":(exclude){name}" for name in (*WRITTEN_BY_RUNS, *without)]
    return _git(root, "diff", "HEAD", "--", ".", *excluded) or ""


def changed_code(root: Path) -> str:
    """Digest of what differs from the commit beside params and data, which are recorded for themselves."""
    patch = git_diff(root, RECORDED_APART)
    return hashlib.sha256(patch.encode()).hexdigest()[:16] if patch else "none"


def main_checkout(root: Path) -> Path:
    """The checkout that a git worktree belongs to; the folder itself when it is no worktree or not in git."""
    common = _git(root, "rev-parse", "--path-format=absolute", "--git-common-dir")
    if common is None or Path(common.strip()).name != ".git":
        return root
    return Path(common.strip()).parent


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on, those that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def dvc_hashes(root: Path) -> dict[str, str]:
    """Path -> content hash of every dependency and output that dvc.lock records; empty when there is no dvc.lock."""
    lock = root / "dvc.lock"
    if not lock.exists():
        return {}
    stages = (YAML(typ="safe", pure=True).load(lock.read_text(encoding="utf-8")) or {}).get("stages", {})
    entries = [entry for stage in stages.values() for part in ("deps", "outs") for entry in stage.get(part, [])]
    return {entry["path"]: entry[entry.get("hash", "md5")] for entry in entries if entry.get("hash", "md5") in entry}


def dvc_data_hashes(root: Path) -> dict[str, str]:
    """The part of `dvc_hashes` that is data and results, without the code of this package."""
    return {path: digest for path, digest in dvc_hashes(root).items() if not path.startswith(CODE)}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def result_params(params: Params) -> dict[str, Any]:
    """Every param that can change a result, flat: all but where the result is recorded."""
    return flatten(params.model_dump(exclude={"publish"}))


def result_digest(params: Params, paths: Paths, files: list[Path]) -> str:
    """One digest of params and of the files that hold a result: equal digests mean the same result.

    Neither commit nor versions are in it: what computes the same is the same result.
    """
    parts = {"params": result_params(params)} | {
        path.relative_to(paths.root).as_posix(): file_digest(path) for path in files
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def training_digest(params: Params, paths: Paths) -> str:
    """One digest of a training: its params and what came of it. It is the same when DVC brings the training back."""
    stated = params.model_dump(include={"model", "train"})
    made = [file_digest(path) for path in (paths.out("train", "curve.csv"), paths.metrics("train"))]
    return hashlib.sha256(json.dumps([stated, made], sort_keys=True).encode()).hexdigest()


def circumstances(paths: Paths) -> dict[str, str]:
    """Tags of a run: base model, commit, versions, and for whom it runs."""
    base, git = base_model(paths), git_state(paths.root)
    told = {**FLOW_RUN_VARIABLES, PARENT_VARIABLE: PARENT_TAG}
    return {
        "sft.base_model": base["resolved"],
        "sft.base_model_digest": base["digest"],
        "git.commit": git.commit if git else "none",
        "git.dirty": str(bool(git and git.dirty)).lower(),
        "git.changed_code": changed_code(paths.root),
        **{f"version.{name}": value for name, value in versions().items()},
        **{tag: os.environ[name] for name, tag in told.items() if os.environ.get(name)},
    }


def model_name(paths: Paths) -> str:
    """The base model's name, short enough to be part of a run's."""
    return str(base_model(paths)["name_or_path"]).rpartition("/")[2].removeprefix("embedded:")


def base_model(paths: Paths) -> dict[str, Any]:
    """What `load` recorded about the base model."""
    return dict(read_json(paths.out("load", "base_model.json")))


def data_digests(paths: Paths) -> dict[str, str]:
    """Name -> SHA-256 of every data file that `load` read, as its data card states them."""
    sources = read_json(paths.out("load", "card.json"))["sources"]
    return {name: digest for source in sources for name, digest in source["sha256"].items()}


def _git(root: Path, *arguments: str) -> str | None:
    """Output of a git command, None when git is missing or refuses (not a repository)."""
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None


CPUINFO = Path("/proc/cpuinfo")

MACHINE = "machine."


def machine_facts() -> dict[str, str]:
    """Processor, its cores that this process may use, and how many threads it was told to use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor_name(CPUINFO.read_text(encoding="utf-8") if CPUINFO.exists() else ""),
        "cores": str(cores),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS", "not set"),
    }


def machine_tags() -> dict[str, str]:
    """This machine, as a run's tags name it."""
    return {f"{MACHINE}{name}": value for name, value in machine_facts().items()}


def processor_name(cpuinfo: str) -> str:
    """The processor's name out of Linux's /proc/cpuinfo, or what Python knows elsewhere."""
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or "unknown"
