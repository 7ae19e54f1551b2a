"""`python -m stages reproduce RUN`: repeat a recorded run from its record alone and compare the results.

The run's commit, uncommitted changes, params and data are checked out into a git worktree, everything up to the
evaluation is computed again, and outputs and figures are compared with the recorded ones. The record is that of a run
in MLflow, or that of a shipped folder (`stages/shipping/`), which may also bring the code.

Whoever writes to the store, or made the folder, must not be able to run code here. What a record adds to the commit
(uncommitted changes, params that start programs, or the whole code) is shown, and is run only if the user trusts it by
its digest (`--trust-patch`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow.entities import Run
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stages.checkout.artifacts import file_digest
from stages.checkout.code import STAGE as CODE_STAGE
from stages.checkout.foreign_text import for_terminal
from stages.checkout.paths import Paths, main_checkout
from stages.checkout.worktree import dvc_cache, locked_worktree, use_dvc_cache
from stages.engines.programs import FOLDER_VARIABLE, engines_folder
from stages.models.base import BASE_KEY
from stages.params.schema import Params
from stages.shipping.code_archive import ARCHIVE
from stages.shipping.inspection import inspect_folder
from stages.shipping.record import FOLDER
from stages.shipping.record import Record as ShippedRecord
from stages.shipping.replay import place_data, unpacked_checkout
from stages.tools.compare import (
    describe_difference,
    describe_effect,
    describe_run,
    find_run,
    metrics_of,
    open_recorded,
)
from stages.tracking import lineage
from stages.tracking.lineage import MACHINE, machine_tags
from stages.tracking.recorded import VERSION, Difference, differences, recorded_run
from stages.tracking.result import PATCH_TAG, figures
from stages.tracking.store import Tracking

LAST_STAGE = "evaluate"

PARAMS, PATCH, LOCK = "params.yaml", "uncommitted.patch", "dvc.lock"
"""Names of the files that a run records of its lineage."""

CONFIG, CARD = "adapter_config.json", "README.md"
"""Files of an adapter in which peft writes the folder of the base model; runs that are older still have it."""

COMMIT = re.compile(r"[0-9a-f]{7,64}")

SHORTEST_DIGEST = 8

SAME = "the same, bit for bit"

NUM_FILES_NAMED = 5


@dataclass(frozen=True)
class Record:
    """The recorded lineage of a run.

    Args:
        folder: Folder with copies of the recorded files.
        commit: The commit that was checked out.
        dirty: Whether tracked files differed from it.
    """

    folder: Path
    commit: str
    dirty: bool

    @property
    def patch(self) -> Path | None:
        """The uncommitted changes as a patch; None if there were none."""
        path = self.folder / PATCH
        return path if self.dirty and path.exists() and path.stat().st_size else None


@dataclass(frozen=True)
class Outcome:
    """The result of the comparison.

    Args:
        lines: The comparison as text.
        reason: What differs, in words; empty if nothing does.
    """

    lines: list[str]
    reason: str

    @property
    def same(self) -> bool:
        """Whether every result is the same to the last bit."""
        return not self.reason


@dataclass(frozen=True)
class Lock:
    """Content hashes from a dvc.lock, by path.

    Args:
        deps: Of the files that stages read and no stage wrote.
        outs: Of the files and folders that stages wrote.
    """

    deps: dict[str, str]
    outs: dict[str, str]


@dataclass(frozen=True)
class Addition:
    """What a record would run in addition to its commit.

    Args:
        patch: The uncommitted changes.
        params: Lines that state params which start code, and their values in the commit and in the record.
    """

    patch: bytes
    params: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Digest by which the user trusts the addition; empty if there is nothing to trust."""
        if not self.patch and not self.params:
            return ""
        return hashlib.sha256(b"\0".join([self.patch, *(line.encode() for line in self.params)])).hexdigest()[:16]

    def text(self) -> str:
        """Return the patch and the params as they are shown to the user."""
        lines = [self.patch.decode("utf-8", "replace").rstrip("\n"), *self.params]
        return for_terminal("\n".join(lines), line_breaks=True).strip("\n")


def run(
    params: Params | None,
    paths: Paths,
    *,
    runs: list[str],
    keep: bool = False,
    trust_patch: str | None = None,
    data: str | None = None,
) -> None:
    """Repeat a recorded run in a worktree, up to the evaluation, and print how the results compare.

    Args:
        params: Values of params.yaml; `publish` has the store of the runs. None if a folder is named.
        paths: Paths of the checkout.
        runs: One run: its id or the beginning of it, its name, an alias of the registered model, or a shipped folder.
        keep: Don't remove the worktree with the results.
        trust_patch: Digest of the uncommitted changes that may be run, or its beginning; an empty text trusts those
            that the run has; None trusts none.
        data: Folder with the data of a shipped folder's run; None = that of the checkout.

    Raises:
        ValueError: There is no such run, it can't be repeated, its changes are not trusted, or a result differs.
    """
    if params is None:
        folder = Path(runs[0])
        repeat_shipped(folder, paths, keep=keep, trust_patch=trust_patch, data=None if data is None else Path(data))
        return
    if data is not None:
        raise ValueError("--data gives the data of a shipped folder; a run in MLflow has that of its commit")
    home = main_checkout(paths.root)
    tracking = open_recorded(params, home)
    recorded = find_run(tracking, runs[0], params.publish.registered_model)
    print(f"repeating {describe_run(recorded_run(recorded))}", flush=True)
    with fetched_record(tracking, recorded) as record:
        print("\n".join(circumstances(recorded.data.tags, record, home)), flush=True)
        check_trusted(addition(home, record), trust_patch, runs[0])
        name = re.sub(r"[^\w-]", "_", recorded.info.run_id[:12])
        with recorded_checkout(home, record, f"reproduce-{name}", keep) as folder:
            repeat(folder, home)
            metrics = metrics_of(recorded_run(recorded))
            outcome = compare(metrics, record, folder, [folder / ".dvc" / "cache", dvc_cache(home)])
            if keep:
                outcome.lines.append(f"kept: {folder}")
    report(outcome, f"run {recorded.info.run_id[:12]}")


def report(outcome: Outcome, what: str) -> None:
    """Print the comparison of a repeated run.

    Raises:
        ValueError: A result differs.
    """
    print("\n".join(outcome.lines), flush=True)
    if not outcome.same:
        raise ValueError(f"{what} was not reproduced: {outcome.reason}")


def repeat_shipped(
    shipped: Path, paths: Paths, *, keep: bool = False, trust_patch: str | None = None, data: Path | None = None
) -> None:
    """Repeat the run of a shipped folder: with the commit if this repository has it, else with the folder's own code.

    Args:
        shipped: The folder.
        paths: Paths of the present folder, which need not be a checkout.
        keep: Don't remove the checkout with the results.
        trust_patch: As that of `run`; the folder's own code must be trusted, too.
        data: Folder with the data of the run; None = that of the commit, or data/ of the present folder.

    Raises:
        ValueError: The folder is not as it was written, it can't be repeated or is not trusted, or a result differs.
    """
    found = inspect_folder(shipped)
    if found.record is None or found.wrong:
        names = ", ".join(f"{verdict.path} ({verdict.state})" for verdict in found.wrong[:NUM_FILES_NAMED])
        raise ValueError(found.problem or f"{shipped} is not as it was written: {for_terminal(names)}")
    if found.lacking or found.record.code is None:
        raise ValueError(f"{shipped} can't be repeated: it was recorded without {', '.join(found.lacking)}")
    home, code = main_checkout(paths.root), found.record.code
    record = Record(shipped / FOLDER, code.commit, dirty=bool(code.changed))
    has_commit = not _failure(["git", "cat-file", "-e", f"{code.commit}^{{commit}}"], home) if _is_git(home) else False
    if not has_commit and not found.has_code:
        raise ValueError(
            f"commit {code.commit} is not in this repository, and {shipped} was published without its code"
        )
    print(
        for_terminal(f"repeating {found.record.name}, result {found.record.result_digest[:12]} of {shipped}"),
        flush=True,
    )
    print("\n".join(circumstances(_tags_of(found.record), record, home)), flush=True)
    added = addition(home, record) if has_commit else whole_code(shipped)
    check_trusted(added, trust_patch, str(shipped), "made this folder")
    name = f"reproduce-{found.record.result_digest[:12]}"
    if has_commit:
        checkout = recorded_checkout(home, record, re.sub(r"[^\w-]", "_", name), keep)
    else:
        data = data or paths.data
        checkout = unpacked_checkout(shipped, found.record, paths.root, keep)
    with checkout as folder:
        place_data(found.record.local_files(), data, folder)
        repeat(folder, home)
        caches = [folder / ".dvc" / "cache", *([dvc_cache(home)] if has_commit else [])]
        outcome = compare(found.record.figures, record, folder, caches)
        if keep:
            outcome.lines.append(f"kept: {folder}")
    report(outcome, str(shipped))


def whole_code(shipped: Path) -> Addition:
    """Return what a shipped folder would run if its commit is not here: all of its code, by its digest."""
    archive = shipped / FOLDER / ARCHIVE
    starting = _starting_code((shipped / FOLDER / PARAMS).read_text(encoding="utf-8"))
    lines = [f"all of the code in {FOLDER}/{ARCHIVE}: SHA-256 {file_digest(archive)}"]
    return Addition(b"", (*lines, *(f"{name}: {value}" for name, value in starting.items())))


def _tags_of(record: ShippedRecord) -> dict[str, str]:
    """Return versions and machine of a shipped folder as the tags of a run."""
    versions = {f"{VERSION}{name}": value for name, value in record.versions.items()}
    redacted = {PATCH_TAG: "true"} if record.code is not None and record.code.patch_redacted else {}
    return versions | {f"{MACHINE}{name}": value for name, value in record.machine.items()} | redacted


def _is_git(folder: Path) -> bool:
    return shutil.which("git") is not None and not _failure(["git", "rev-parse", "--git-dir"], folder)


@contextmanager
def fetched_record(tracking: Tracking, run: Run) -> Iterator[Record]:
    """Download the record of a run from MLflow for the time of the block.

    Raises:
        ValueError: The record lacks something that is needed to repeat the run.
    """
    run_id = run.info.run_id
    commit = run.data.tags.get("git.commit", "none")
    names = {Path(item.path).name for item in tracking.client.list_artifacts(run_id, "lineage")}
    missing = [name for name in (PARAMS, LOCK) if name not in names]
    if commit == "none" or missing:
        what = ", ".join([*missing, *(["a git commit"] if commit == "none" else [])])
        raise ValueError(f"run {run_id[:12]} ({run.info.run_name}) can't be repeated: it was recorded without {what}")
    with tempfile.TemporaryDirectory() as folder:
        for name in names & {PARAMS, PATCH, LOCK}:
            found = tracking.client.download_artifacts(run_id, f"lineage/{name}", folder)
            Path(found).rename(Path(folder) / name)
        yield Record(Path(folder), commit, run.data.tags.get("git.dirty") == "true")


def circumstances(tags: Mapping[str, str], record: Record, home: Path) -> list[str]:
    """Describe what is known before anything is computed: uncommitted changes, versions and machine then and now.

    Args:
        tags: Tags of the recorded run.
        record: Its lineage.
        home: The checkout.
    """
    lines = []
    if record.patch is not None:
        patch = record.patch.read_text(encoding="utf-8", errors="replace")
        names = [line.partition(" b/")[2] for line in patch.splitlines() if line.startswith("diff --git a/")]
        without = ", without the secrets in them" if tags.get(PATCH_TAG) == "true" else ""
        lines.append(for_terminal(f"uncommitted changes: {', '.join(names)} (applied{without})"))
    now = {f"{VERSION}{name}": value for name, value in lineage.versions(home).items()}
    lines += _describe_kind("versions", _tag_differences(tags, VERSION, now))
    return lines + _describe_kind("machine", _tag_differences(tags, MACHINE, machine_tags()))


def addition(home: Path, record: Record) -> Addition:
    """Return what a record would run in addition to its commit: the patch, and params that start code.

    Params start code if they trust code that comes with a model, or name the launcher, its configuration or the
    cluster that runs the training. Those that are as in the commit are known here.
    """
    patch = b"" if record.patch is None else record.patch.read_bytes()
    stated = subprocess.run(
        ["git", "show", f"{record.commit}:{PARAMS}"], cwd=home, capture_output=True, text=True, check=False
    ).stdout
    committed, recorded = (
        _starting_code(text) for text in (stated, (record.folder / PARAMS).read_text(encoding="utf-8"))
    )
    changed = differences(committed, {**dict.fromkeys(committed), **recorded})
    # whole values, as the digest must stand for all that the user trusts
    lines = (f"{change.name}: {change.before} -> {change.after}" for change in changed if change.name in recorded)
    return Addition(patch, tuple(lines))


def _starting_code(text: str) -> dict[str, Any]:
    """Return the params that start code in the text of a params.yaml, by dotted name."""
    try:
        values = YAML(typ="safe", pure=True).load(text)
        flat = lineage.flatten(values if isinstance(values, dict) else {})
    except (YAMLError, RecursionError, ValueError):
        raise ValueError(f"the recorded {PARAMS} can't be read; the run can't be repeated") from None
    trusting = ("model.",) if flat.get("model.trust_remote_code") is True else ()
    return {name: value for name, value in flat.items() if name.startswith((*trusting, "train.launch."))}


def check_trusted(found: Addition, trusted: str | None, run: str, who: str = "can write to the store") -> None:
    """Print what a record would run in addition to its commit, and check that the user trusts it.

    Args:
        found: The addition.
        trusted: As `trust_patch` of `run`.
        run: Name of the run on the command line.
        who: Who could have written it, after "whoever".

    Raises:
        ValueError: The user does not trust it, or trusts another one.
    """
    if not found.digest:
        return
    print(f"\nthis run was computed with code or params that are in no commit ({found.digest}):", flush=True)
    print(f"{found.text()}\n", flush=True)
    if trusted is None:
        raise ValueError(
            f"whoever {who} could have written the changes above, and they would be run here. Read "
            f"them; if you trust them: python -m stages reproduce {run} --trust-patch {found.digest}"
        )
    if trusted and (len(trusted) < SHORTEST_DIGEST or not found.digest.startswith(trusted)):
        raise ValueError(
            f"--trust-patch {trusted}: the changes above are {found.digest}; read them, and trust that one if you do"
        )


def _tag_differences(tags: Mapping[str, str], prefix: str, now: Mapping[str, str]) -> list[Difference]:
    """Compare the tags that a run has of one kind with their present values; tags that it lacks are ignored."""
    then = {name: value for name, value in tags.items() if name.startswith(prefix)}
    return differences(then, {name: now.get(name) for name in then})


def _describe_kind(what: str, found: list[Difference]) -> list[str]:
    if not found:
        return [f"{what}: the same"]
    return [f"{what}: {len(found)} differ", *(describe_difference(difference) for difference in found)]


@contextmanager
def recorded_checkout(home: Path, record: Record, name: str, keep: bool) -> Iterator[Path]:
    """Check out the state of a record into a git worktree for the time of the block.

    The worktree has an empty DVC cache and no dvc.lock, so that every stage is computed instead of restored.

    Args:
        home: The main checkout.
        record: The recorded state.
        name: Name of the worktree.
        keep: Don't remove the worktree after the block.

    Yields:
        The worktree's root.

    Raises:
        ValueError: The commit is not in this repository, the patch does not apply to it, the data can't be restored,
            or another process is repeating the same run.
    """
    is_commit = COMMIT.fullmatch(record.commit)  # another text could be an option of git
    if not is_commit or _failure(["git", "cat-file", "-e", f"{record.commit}^{{commit}}"], home):
        raise ValueError(f"commit {for_terminal(record.commit)} is not in this repository; fetch it: git fetch --all")
    with locked_worktree(home, name, record.commit, wait=False, keep=keep) as path:
        if record.patch is not None:
            _check_call(["git", "apply", "--whitespace=nowarn", str(record.patch)], path)
        shutil.copyfile(record.folder / PARAMS, path / PARAMS)
        _restore_data(home, path)
        (path / LOCK).unlink(missing_ok=True)
        yield path


def _restore_data(home: Path, path: Path) -> None:
    """Restore the data that DVC tracks, from the main checkout's cache or else from the remote; then empty the cache.

    The main checkout's local settings are copied, because they may name the remote.
    """
    settings = home / ".dvc" / "config.local"
    text = settings.read_text(encoding="utf-8") if settings.exists() else ""
    (path / ".dvc" / "config.local").write_text(text, encoding="utf-8")
    listed = subprocess.run(["git", "ls-files", "*.dvc"], cwd=path, capture_output=True, text=True, check=False).stdout
    if listed.split():
        use_dvc_cache(path, dvc_cache(home))
        if _failure(_dvc("checkout", "--quiet", *listed.split()), path):
            _check_call(_dvc("pull", "--quiet", *listed.split()), path)
    use_dvc_cache(path, path / ".dvc" / "cache")


def repeat(folder: Path, home: Path) -> None:
    """Run every stage up to the evaluation with DVC; nothing is published.

    Args:
        folder: The checkout in which they run.
        home: The present folder, whose serving engines are used.

    Raises:
        ValueError: A stage failed; its own message was printed before.
    """
    done = subprocess.run(_dvc("repro", LAST_STAGE), cwd=folder, env=_stage_environment(folder, home), check=False)
    if done.returncode != 0:
        raise ValueError(f"a stage failed in {folder.name}, see above; `--keep` keeps the folder for inspection")


def _stage_environment(folder: Path, home: Path) -> dict[str, str]:
    """Return the environment of the repeated stages: own checkpoints, no MLflow run, this interpreter's tools first."""
    own = {"SFT_STATE_DIR": str(folder / ".state"), "SFT_LIVE_RUN": "off"}
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**os.environ, "PATH": search, FOLDER_VARIABLE: str(engines_folder(home)), **own}


def compare(metrics: Mapping[str, float], record: Record, folder: Path, caches: list[Path]) -> Outcome:
    """Compare inputs, outputs and figures of a repeated run with the recorded ones.

    Args:
        metrics: The recorded figures, `<stage>.<metric>` -> value.
        record: Its lineage.
        folder: The checkout in which it was repeated.
        caches: DVC caches that may have the file lists of folders.
    """
    then, now = read_lock(record.folder / LOCK), read_lock(folder / LOCK)
    sources = [change for change in differences(then.deps, now.deps) if change.after is not None]
    lines = ["", *_describe_kind("code and data", sources)]
    outs = {name: then.outs[name] for name in now.outs if name in then.outs}
    other_outs = differences(outs, {name: now.outs[name] for name in outs})
    changed = {difference.name: changed_files(difference, caches) for difference in other_outs}
    lines += [f"{name}: {changed.get(name, SAME)}" for name in outs]
    fresh = figures(Paths(folder))
    measured = {name: value for name, value in metrics.items() if name in fresh}
    effects = differences(measured, {name: fresh[name] for name in measured})
    lines += (
        [f"figures: {len(effects)} of {len(measured)} differ", *map(describe_effect, effects)]
        if effects
        else [f"figures: every figure is the same ({len(measured)} of them)"]
    )
    differing = [name for name, words in changed.items() if not words.startswith(SAME)]
    differing += [effect.name for effect in effects]
    if not differing:
        return Outcome([*lines, "", "reproduced: every result is the same, bit for bit"], "")
    return Outcome(lines, f"{', '.join(differing[:NUM_FILES_NAMED])} {'differ' if len(differing) > 1 else 'differs'}")


def read_lock(path: Path) -> Lock:
    """Read the hashes of a dvc.lock, except those of `publish`, whose pages contain commit and versions.

    Metrics files are left out of `outs`: their figures are compared one by one.
    """
    try:
        stages = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))["stages"]
        known = {name: entry for name, entry in stages.items() if name != "publish"}
        written = [entry for name, entry in known.items() if name != CODE_STAGE]  # digests of code count as sources
        made = {out["path"]: str(out["md5"]) for entry in written for out in entry.get("outs", [])}
        read = {dep["path"]: str(dep["md5"]) for entry in known.values() for dep in entry.get("deps", [])}
    except (YAMLError, RecursionError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path.name} can't be read: it is not a lock file of DVC ({error!r:.100})") from None
    sources = {
        name: digest
        for name, digest in read.items()
        if not any(name == out or name.startswith(f"{out}/") or out.startswith(f"{name}/") for out in made)
    }
    return Lock(sources, {name: digest for name, digest in made.items() if name.startswith("outs/")})


def changed_files(difference: Difference, caches: list[Path]) -> str:
    """Describe which files of a folder differ, if a cache has DVC's file lists of both versions."""
    listings = [_file_list(str(digest), caches) for digest in (difference.before, difference.after)]
    if None in listings:
        return "differs"
    before, after = (found or {} for found in listings)
    changes = differences(before, after)
    names = [change.name for change in changes]
    if all(_differs_in_base_folder_only(change, caches) for change in changes):
        return f"{SAME}, but for {', '.join(names)}, which contain the folder of the base model and unordered lists"
    more = f" and {len(names) - NUM_FILES_NAMED} more" if len(names) > NUM_FILES_NAMED else ""
    return f"{len(names)} of {len(before)} files differ: {', '.join(names[:NUM_FILES_NAMED])}{more}"


def _differs_in_base_folder_only(change: Difference, caches: list[Path]) -> bool:
    """Whether two versions of an adapter's file differ at most in the base model's folder and in the order of lists.

    peft writes sets of module names as lists, whose order differs from process to process. The model card is not
    compared: it is text that contains the folder.
    """
    if None in (change.before, change.after) or Path(change.name).name not in (CONFIG, CARD):
        return False
    if Path(change.name).name == CARD:
        return True
    files = [_cached_file(digest, caches) for digest in (change.before, change.after)]
    configs = [_comparable(json.loads(file.read_text(encoding="utf-8"))) for file in files if file is not None]
    return len(configs) == 2 and configs[0] == configs[1]


def _comparable(config: dict[str, Any]) -> dict[str, Any]:
    """Return an adapter's config with its lists sorted and without the base model's folder."""
    values = {name: sorted(value, key=str) if isinstance(value, list) else value for name, value in config.items()}
    return {**values, BASE_KEY: ""}


def _file_list(digest: str, caches: list[Path]) -> dict[str, Any] | None:
    """Return the hashes of a folder's files by path, as DVC caches them; None if it is not a folder or not cached."""
    file = _cached_file(digest, caches) if digest.endswith(".dir") else None
    if file is None:
        return None
    return {entry["relpath"]: entry["md5"] for entry in json.loads(file.read_text(encoding="utf-8"))}


def _cached_file(digest: str, caches: list[Path]) -> Path | None:
    if "/" in digest or digest.startswith("."):  # the store states it, and it becomes a path
        return None
    paths = (cache / "files" / "md5" / digest[:2] / digest[2:] for cache in caches)
    return next((path for path in paths if path.exists()), None)


def _dvc(*arguments: str) -> list[str]:
    """Return the command line of this interpreter's DVC."""
    return [sys.executable, "-m", "dvc", *arguments]


def _check_call(command: list[str], cwd: Path) -> None:
    problem = _failure(command, cwd)
    if problem:
        shown = " ".join(command[2:] if command[1] == "-m" else command)
        raise ValueError(f"{shown}: {problem}")


def _failure(command: list[str], cwd: Path) -> str:
    """Run a command and return what it printed if it failed; an empty text if it succeeded."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    printed = " ".join((done.stderr or done.stdout).split())
    return "" if done.returncode == 0 else printed or f"exit code {done.returncode}"
