"""`python -m stages reproduce RUN`: repeat a recorded run from its record alone, and say what came out the same.

A throw-away checkout as a recorded run found it: its commit, its uncommitted changes, its params, its data.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow.entities import Run
from ruamel.yaml import YAML

from stages.checkout.paths import Paths
from stages.checkout.worktree import dvc_cache, locked_worktree
from stages.params.schema import Params
from stages.tools.compare import (
    VERSION,
    Difference,
    differences,
    effect_shown,
    find_run,
    metrics_of,
    open_recorded,
    shown,
    title,
)
from stages.tracking import lineage
from stages.tracking.lineage import MACHINE, machine_tags
from stages.tracking.result import figures
from stages.tracking.store import Tracking

PATCH, LOCK = "uncommitted.patch", "dvc.lock"


@dataclass(frozen=True)
class Record:
    """The files that a run keeps of its lineage.

    Args:
        folder: Where copies of them lie.
        commit: The commit that was checked out.
        dirty: Whether files differed from it.
    """

    folder: Path
    commit: str
    dirty: bool

    @property
    def patch(self) -> Path | None:
        """The uncommitted changes; None when there were none."""
        path = self.folder / PATCH
        return path if self.dirty and path.exists() and path.stat().st_size else None


@contextmanager
def fetched_record(tracking: Tracking, run: Run) -> Iterator[Record]:
    """The record of a run, copied out of MLflow for the time of the block.

    Raises:
        ValueError: The run does not hold what is needed to repeat it.
    """
    run_id = run.info.run_id
    commit = run.data.tags.get("git.commit", "none")
    names = {Path(item.path).name for item in tracking.client.list_artifacts(run_id, "lineage")}
    missing = [name for name in ("params.yaml", LOCK) if name not in names]
    if commit == "none" or missing:
        what = ", ".join([*missing, *(["a git commit"] if commit == "none" else [])])
        raise ValueError(f"run {run_id[:12]} ({run.info.run_name}) can't be repeated: it was recorded without {what}")
    with tempfile.TemporaryDirectory() as folder:
        tracking.client.download_artifacts(run_id, "lineage", folder)
        yield Record(Path(folder) / "lineage", commit, run.data.tags.get("git.dirty") == "true")


@contextmanager
def recorded_checkout(home: Path, record: Record, name: str, keep: bool) -> Iterator[Path]:
    """A git worktree in the state that a record tells, gone behind the block unless it is to be kept.

    It has a DVC cache of its own, so that nothing is taken from the cache that is to be computed, and no dvc.lock.

    Args:
        home: The main checkout.
        record: What the state was.
        name: Name of the worktree.
        keep: Leave it there.

    Raises:
        ValueError: The commit is not in this repository, the patch does not fit it, data can't be brought back, or the
            same run is being repeated already.
    """
    if _call(["git", "cat-file", "-e", f"{record.commit}^{{commit}}"], home):
        raise ValueError(f"commit {record.commit} is not in this repository; fetch it: git fetch --all")
    with locked_worktree(home, name, record.commit, wait=False, keep=keep) as path:
        if record.patch is not None:
            _expect(["git", "apply", "--whitespace=nowarn", str(record.patch)], path)
        shutil.copyfile(record.folder / "params.yaml", path / "params.yaml")
        _bring_data(home, path)
        (path / LOCK).unlink(missing_ok=True)
        yield path


def _bring_data(home: Path, path: Path) -> None:
    """Data that DVC keeps instead of git: from the cache of the checkout, else from the remote."""
    local = path / ".dvc" / "config.local"
    listed = subprocess.run(["git", "ls-files", "*.dvc"], cwd=path, capture_output=True, text=True, check=False).stdout
    # a remote that only this checkout's own settings name is used as well
    own = home / ".dvc" / "config.local"
    settings = own.read_text(encoding="utf-8") if own.exists() else ""
    local.write_text(settings, encoding="utf-8")
    if listed.split():
        _expect(dvc("cache", "dir", "--local", str(dvc_cache(home))), path)
        if _call(dvc("checkout", "--quiet", *listed.split()), path):
            _expect(dvc("pull", "--quiet", *listed.split()), path)
    _expect(dvc("cache", "dir", "--local", str(path / ".dvc" / "cache")), path)


def dvc(*arguments: str) -> list[str]:
    """A command of this interpreter's DVC."""
    return [sys.executable, "-m", "dvc", *arguments]


def stage_environment(path: Path) -> dict[str, str]:
    """For the stages of a checkout: its own checkpoints, no run of its own in MLflow, this interpreter's tools."""
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**os.environ, "PATH": search, "SFT_STATE_DIR": str(path / ".state"), "SFT_LIVE_RUN": "off"}


def _call(command: list[str], cwd: Path) -> str:
    """What a command said when it failed; empty when it did not."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    said = " ".join((done.stderr or done.stdout).split())
    return "" if done.returncode == 0 else said or f"exit code {done.returncode}"


def _expect(command: list[str], cwd: Path) -> None:
    problem = _call(command, cwd)
    if problem:
        shown = " ".join(command[2:] if command[1] == "-m" else command)
        raise ValueError(f"{shown}: {problem}")


LAST_STAGE = "evaluate"

NUM_FILES_NAMED = 5

CONFIG, CARD, BASE_KEY = "adapter_config.json", "README.md", "base_model_name_or_path"
"""Files of an adapter in which peft states the folder of the base model, and where."""

SAME = "the same, bit for bit"


def run(params: Params, paths: Paths, *, runs: list[str], keep: bool = False) -> None:
    """Check out, set up, compute everything up to the evaluation anew, and compare.

    Args:
        params: Where runs are recorded.
        paths: The checkout.
        runs: One run: its id or the beginning of it, its name, or an alias of the registered model.
        keep: Leave the worktree with the results there.

    Raises:
        ValueError: There is no such run, it can't be repeated, or something did not come out the same.
    """
    home = lineage.main_checkout(paths.root)
    tracking = open_recorded(params, home)
    recorded = find_run(tracking, runs[0], params.publish.registered_model)
    print(f"repeating {title(recorded)}", flush=True)
    with fetched_record(tracking, recorded) as record:
        print("\n".join(circumstances(recorded, record)), flush=True)
        with recorded_checkout(home, record, f"reproduce-{recorded.info.run_id[:12]}", keep) as folder:
            repeat(folder)
            outcome = compare(recorded, record, folder, [folder / ".dvc" / "cache", dvc_cache(home)])
            if keep:
                outcome.lines.append(f"kept: {folder}")
    print("\n".join(outcome.lines), flush=True)
    if not outcome.same:
        raise ValueError(f"run {recorded.info.run_id[:12]} was not reproduced: {outcome.reason}")


def circumstances(recorded: Run, record: Record) -> list[str]:
    """What is known before anything is computed: uncommitted changes, versions and machine then and now."""
    lines = []
    if record.patch is not None:
        names = [line.split(" b/", 1)[1] for line in _diff_headers(record.patch)]
        lines.append(f"uncommitted changes: {', '.join(names)} (applied)")
    now = {f"{VERSION}{name}": value for name, value in lineage.versions().items()}
    lines += described("versions", tag_differences(recorded, VERSION, now))
    return lines + described("machine", tag_differences(recorded, MACHINE, machine_tags()))


def _diff_headers(patch: Path) -> Iterable[str]:
    return [line for line in patch.read_text(encoding="utf-8").splitlines() if line.startswith("diff --git a/")]


def tag_differences(recorded: Run, prefix: str, now: Mapping[str, str]) -> list[Difference]:
    """Tags of one kind, then and now; runs of earlier times have none of some kinds, which tells nothing."""
    then = {name: value for name, value in recorded.data.tags.items() if name.startswith(prefix)}
    return differences(then, {name: now.get(name) for name in then})


def described(what: str, found: list[Difference]) -> list[str]:
    """One kind of circumstance in words."""
    if not found:
        return [f"{what}: the same"]
    return [f"{what}: {len(found)} differ", *(shown(difference) for difference in found)]


def repeat(folder: Path) -> None:
    """Let DVC run every stage up to the evaluation; nothing is published.

    Raises:
        ValueError: A stage failed; what it said stands above.
    """
    done = subprocess.run(dvc("repro", LAST_STAGE), cwd=folder, env=stage_environment(folder), check=False)
    if done.returncode != 0:
        raise ValueError(f"a stage failed in {folder.name}, see above; `--keep` leaves the folder to look at")


@dataclass(frozen=True)
class Outcome:
    """What the comparison found, in words.

    Args:
        lines: All of it.
        reason: What is not the same; empty when all is.
    """

    lines: list[str]
    reason: str

    @property
    def same(self) -> bool:
        """Whether the run was reproduced to the last bit."""
        return not self.reason


def compare(recorded: Run, record: Record, folder: Path, caches: list[Path]) -> Outcome:
    """Hold inputs, outs and figures against those of the record."""
    then, now = read_lock(record.folder / LOCK), read_lock(folder / LOCK)
    sources = [change for change in differences(then.deps, now.deps) if change.after is not None]
    lines = ["", *described("code and data", sources)]
    outs = {name: then.outs[name] for name in now.outs if name in then.outs}
    other_outs = differences(outs, {name: now.outs[name] for name in outs})
    changed = {difference.name: changed_files(difference, caches) for difference in other_outs}
    lines += [f"{name}: {changed.get(name, SAME)}" for name in outs]
    fresh = figures(Paths(folder))
    measured = {name: value for name, value in metrics_of(recorded).items() if name in fresh}
    effects = differences(measured, {name: fresh[name] for name in measured})
    lines += (
        [f"figures: {len(effects)} of {len(measured)} differ", *map(effect_shown, effects)]
        if effects
        else [f"figures: every figure is the same ({len(measured)} of them)"]
    )
    differing = [name for name, words in changed.items() if not words.startswith(SAME)]
    differing += [effect.name for effect in effects]
    reason = f"{', '.join(differing[:NUM_FILES_NAMED])} {'differ' if len(differing) > 1 else 'differs'}"
    lines += ["", "reproduced: every result is the same, bit for bit"] if not differing else []
    return Outcome(lines, reason if differing else "")


@dataclass(frozen=True)
class Lock:
    """What a dvc.lock states: path -> content hash, of what stages read from outside and of what they made."""

    deps: dict[str, str]
    outs: dict[str, str]


def read_lock(path: Path) -> Lock:
    """Read a dvc.lock up to the stage that is the last one here; pages and figures files are left out.

    Pages state commit and versions; figures are compared one by one.
    """
    stages = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))["stages"]
    known = {name: entry for name, entry in stages.items() if name != "publish"}
    made = {out["path"]: out["md5"] for entry in known.values() for out in entry.get("outs", [])}
    read = {dep["path"]: dep["md5"] for entry in known.values() for dep in entry.get("deps", [])}
    sources = {
        name: digest
        for name, digest in read.items()
        if not any(name == out or name.startswith(f"{out}/") or out.startswith(f"{name}/") for out in made)
    }
    return Lock(sources, {name: digest for name, digest in made.items() if name.startswith("outs/")})


def changed_files(difference: Difference, caches: list[Path]) -> str:
    """Which files of a folder differ, as far as DVC's listings are still in a cache."""
    listings = [listing(str(digest), caches) for digest in (difference.before, difference.after)]
    if None in listings:
        return "differs"
    before, after = (found or {} for found in listings)
    changes = differences(before, after)
    names = [change.name for change in changes]
    if all(states_only_a_folder(change, caches) for change in changes):
        return f"{SAME}, but for {', '.join(names)}, which state where the base model lay, and names in any order"
    more = f" and {len(names) - NUM_FILES_NAMED} more" if len(names) > NUM_FILES_NAMED else ""
    return f"{len(names)} of {len(before)} files differ: {', '.join(names[:NUM_FILES_NAMED])}{more}"


def states_only_a_folder(change: Difference, caches: list[Path]) -> bool:
    """Whether an adapter's file differs in nothing but where the base model lay; its card, a text, is not read.

    peft writes sets of module names as lists, in an order that is another one in every process.
    """
    if None in (change.before, change.after) or Path(change.name).name not in (CONFIG, CARD):
        return False
    if Path(change.name).name == CARD:
        return True
    files = [cached(digest, caches) for digest in (change.before, change.after)]
    configs = [in_order(json.loads(file.read_text(encoding="utf-8"))) for file in files if file is not None]
    return len(configs) == 2 and configs[0] == configs[1]


def in_order(config: dict[str, Any]) -> dict[str, Any]:
    """An adapter's config without the folder of the base model, lists of names sorted."""
    values = {name: sorted(value, key=str) if isinstance(value, list) else value for name, value in config.items()}
    return {**values, BASE_KEY: ""}


def listing(digest: str, caches: list[Path]) -> dict[str, Any] | None:
    """A folder's files by their hashes, as DVC keeps them; None when no cache has it."""
    file = cached(digest, caches) if digest.endswith(".dir") else None
    if file is None:
        return None
    return {entry["relpath"]: entry["md5"] for entry in json.loads(file.read_text(encoding="utf-8"))}


def cached(digest: str, caches: list[Path]) -> Path | None:
    """A file of a DVC cache by its hash; None when no cache has it."""
    paths = (cache / "files" / "md5" / digest[:2] / digest[2:] for cache in caches)
    return next((path for path in paths if path.exists()), None)
