"""`sft repro`: check, restore from the cache, run `dvc repro`, and print the figures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from stages import supervise
from stages.checkout.code import write_code_digests
from stages.checkout.paths import Paths
from stages.cli.run_cache import prefer_cached_results
from stages.launch.stopping import grace_s
from stages.params.assignments import load_with_assignments, write_assignments


def run(
    paths: Paths,
    *,
    assignments: Sequence[str] = (),
    stages: Sequence[str] = (),
    force: bool = False,
    pull: bool = False,
) -> int:
    """Bring stages up to date.

    Args:
        paths: Paths of the checkout.
        assignments: Values to write into params.yaml, after they were checked.
        stages: The stages to bring up to date with what they read; empty for all.
        force: Whether to run stages whose results are in the cache.
        pull: Whether to fetch results from the DVC remote.

    Returns:
        The exit code: 0, or 1 if a stage failed or `check` found a mistake; then nothing was written or run.

    Raises:
        ParamsError: params.yaml or an assignment is not valid.
    """
    params = load_with_assignments(paths.params, assignments)
    values = [word for assignment in assignments for word in ("--set", assignment)]
    # a process of its own, as it may load torch, and this one lives as long as the training
    checked = subprocess.run([sys.executable, "-m", "stages", "check", "--root", str(paths.root), *values], check=False)
    if checked.returncode != 0:
        return checked.returncode
    if assignments:
        print("\n".join(write_assignments(paths.params, assignments)), flush=True)
    write_code_digests(paths.root)
    if not force:
        for line in prefer_cached_results(paths.root):
            print(line, flush=True)
    options = [*(["--force"] if force else []), *(["--pull"] if pull else [])]
    figures = read_metrics_files(paths.root)
    code = 1
    try:
        code = run_dvc(paths.root, "repro", *options, *stages)
    finally:
        if code != 0:
            restore(paths.root, figures)
    if code != 0:
        return 1
    if not stages:
        from stages.tools import summary

        summary.run(params, paths)
    return 0


def run_dvc(root: Path, *arguments: str) -> int:
    """Run a DVC command, and end it with all that it has started when this process is stopped.

    Raises:
        KeyboardInterrupt: This process was stopped; DVC and its stage have ended.
    """
    if remove_cut_lock(root):
        print("removed .dvc/tmp/rwlock, which is incomplete because DVC was killed", flush=True)
    guard = [sys.executable, "-P", str(Path(supervise.__file__)), str(os.getpid()), str(grace_s())]
    process = subprocess.Popen([*guard, *dvc_command(*arguments)], cwd=root, env=dvc_environment())
    try:
        return process.wait()
    except KeyboardInterrupt as stop:
        _wait_for_end(process, getattr(stop, "number", signal.SIGINT))
        raise


def remove_cut_lock(root: Path) -> bool:
    """Remove DVC's list of files in use if a kill has cut it off, as DVC refuses every command from then on.

    Returns:
        Whether the file was removed.
    """
    file = root / ".dvc" / "tmp" / "rwlock"
    for attempt in range(2):
        try:
            json.loads(file.read_bytes())
            return False
        except FileNotFoundError:
            return False
        except ValueError:
            if attempt == 0:
                time.sleep(1)  # another DVC may be writing it
    file.unlink(missing_ok=True)
    return True


def _wait_for_end(process: subprocess.Popen[bytes], number: int) -> None:
    """Wait for a supervised command to end after a signal, which Ctrl-C in a terminal has sent to it, too."""
    if number == signal.SIGINT:
        try:
            process.wait(grace_s())
            return
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            pass  # only this process got the signal, or the user insists
    process.terminate()
    process.wait()


def restore(root: Path, figures: dict[Path, bytes], *stages: str, environment: dict[str, str] | None = None) -> None:
    """Restore the outs and figures of stages that failed, which DVC removed before it started them.

    Args:
        root: The checkout.
        figures: What `read_metrics_files` returned before the stages ran.
        stages: The stages; all if there are none.
        environment: Environment of DVC; None = `dvc_environment`.
    """
    command = dvc_command("checkout", "--quiet", "--allow-missing", *stages)
    subprocess.run(command, cwd=root, env=environment or dvc_environment(), capture_output=True, check=False)
    for path, content in figures.items():
        if not path.exists():
            path.write_bytes(content)


def read_metrics_files(root: Path) -> dict[Path, bytes]:
    """Return the contents of the metrics files, which DVC does not cache."""
    return {path: path.read_bytes() for path in (root / "reports" / "metrics").glob("*.json")}


def dvc_command(*arguments: str) -> list[str]:
    """Return the command line of this interpreter's DVC."""
    return [sys.executable, "-m", "dvc", *arguments]


def dvc_environment() -> dict[str, str]:
    """Return the environment of DVC: this interpreter is the `python` of the stages."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    # bash replaces itself with the command; other shells remain as a parent that does not pass signals on
    return {**os.environ, "PATH": path, "SHELL": "/bin/bash", "DVC_NO_ANALYTICS": "1"}
