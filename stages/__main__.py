"""The command `sft`, also `python -m stages`: runs a stage of the pipeline, a tool or a flow (`stages/cli/`)."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__" and "LOCAL_RANK" not in os.environ:  # before the slow imports, in which signals come, too
    from stages.launch.stopping import heed_signals

    heed_signals()

import click

from stages.checkout.full_disk import explain_full_disk, is_full_disk
from stages.checkout.paths import Paths
from stages.checkout.redaction import RedactedStream, redact
from stages.cli.commands import PROJECT, STAGES, TOOLS, command_line
from stages.cli.group import describe_usage_error
from stages.launch.log_noise import reduce_log_noise
from stages.launch.stopping import SavedAndStopped, Stopped, heed_signals, stoppable, tie_to_parent

EXIT_FAILED, EXIT_USAGE, EXIT_STOPPED = 1, 2, 130
AS_SFT = "SFT_COMMAND"
"""Environment variable that lets `python -m stages` act as the command `sft`."""


def main(argv: list[str] | None = None, *, through_dvc: bool = False) -> int:
    """Run what the command line names.

    Args:
        argv: Words of the command line; None for those of this process.
        through_dvc: Whether a stage is brought up to date by DVC, with what it reads, instead of run alone.

    Returns:
        Exit code: 0 on success, 1 if the work failed for a reason that the user can fix, 2 if params.yaml or the
        command line is wrong, 130 if it was interrupted, 143 if SIGTERM ended it, 75 if SIGTERM stopped a training
        that has saved a checkpoint.

    Raises:
        SystemExit: The command line is wrong (code 2).
    """
    commands = command_line(run_command, run_flow, show_alone=through_dvc)
    try:
        code = commands.main(argv, prog_name="sft" if through_dvc else "python -m stages", standalone_mode=False)
    except click.UsageError as error:
        if isinstance(error, click.exceptions.NoArgsIsHelpError):
            print(error.format_message())
        else:
            fail(ValueError(describe_usage_error(error)), EXIT_USAGE)
        raise SystemExit(EXIT_USAGE) from None
    except click.Abort:
        return EXIT_STOPPED
    return int(code or 0)


def console() -> int:
    """Run the command `sft`: with the code of the checkout in which it is typed, if that has its own."""
    os.environ.pop(AS_SFT, None)
    own = Path("stages/__main__.py")
    if own.is_file() and Path("dvc.yaml").is_file() and not own.samefile(__file__):
        os.environ[AS_SFT] = "1"
        os.execv(sys.executable, [sys.executable, "-m", "stages", *sys.argv[1:]])
    heed_signals()
    return start(through_dvc=True)


def start(*, through_dvc: bool) -> int:
    """Run the command line of this process, without secrets in what it and its libraries print."""
    sys.stdout, sys.stderr = RedactedStream(sys.stdout), RedactedStream(sys.stderr)
    return stoppable(lambda: main(through_dvc=through_dvc))


def run_command(
    name: str, *, root: Path = Path(), assignments: tuple[str, ...] = (), alone: bool | None = None, **options: Any
) -> int:
    """Run a stage, a tool or a command of projects.

    Args:
        name: Its name.
        root: Folder of params.yaml.
        assignments: Values of `--set`.
        alone: Whether to run a stage without DVC.
        options: Values of its other options; those that are None are left out.

    Returns:
        The exit code.
    """
    reduce_log_noise()
    paths = Paths(root.resolve())
    if "LOCAL_RANK" in os.environ:
        return run_launched(name, root, paths)
    options = {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()}
    options = {key: value for key, value in options.items() if value is not None}
    module, entry = home(name), (TOOLS | STAGES | PROJECT)[name]
    if name in STAGES and click.get_current_context().find_root().info_name == "sft" and not alone:
        module, options = home("repro"), {"stages": [name], **options}
    elif name in STAGES and "force" in options:
        return fail(ValueError("--force: a stage alone runs always; leave out --force or --alone"), EXIT_USAGE)
    try:
        if not entry.reads_params:
            values = {"assignments": assignments} if assignments else {}
            return importlib.import_module(module).run(paths, **values, **options) or 0
        if module == home("repro"):  # it writes the values after it has checked them
            return importlib.import_module(module).run(paths, assignments=assignments, **options) or 0
        from stages.params.assignments import load_with_assignments, write_assignments
        from stages.params.schema import ParamsError

        if assignments and entry.writes_params:
            print("\n".join(write_assignments(paths.params, assignments)), flush=True)
        params = None
        if names_folder(options.get(entry.folder)):
            if assignments:
                raise ParamsError(f"--set {assignments[0]}: a shipped folder has its own params, which {name} reads")
        else:
            params = load_with_assignments(root / "params.yaml", () if entry.writes_params else assignments)
        return importlib.import_module(module).run(params, paths, **options) or 0
    except KeyboardInterrupt as stop:
        if isinstance(stop, SavedAndStopped):
            print(f"stopped: {stop}. Type the command again to go on from it.", file=sys.stderr, flush=True)
            return stop.exit_code
        print(f"stopped: {name}. Type the command again to go on.", file=sys.stderr, flush=True)
        if isinstance(stop, Stopped):
            stop.seen = True
            return 128 + stop.number
        return EXIT_STOPPED
    except BrokenPipeError:  # the reader, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        from stages.params.schema import ParamsError

        if isinstance(error, ParamsError):
            return fail(error, EXIT_USAGE)
        full = is_full_disk(error, paths.root)
        if os.environ.get("SFT_TRACEBACK") or not (full or isinstance(error, (ValueError, OSError))):
            raise
        explained = explain_full_disk(error, name, paths.root) if full else error
        return fail(explained, getattr(error, "exit_code", EXIT_FAILED))


def names_folder(named: list[str] | str | None) -> bool:
    """Return whether an argument names a shipped folder: it takes nothing else, or a run whose name is not a path."""
    if isinstance(named, list):
        return "/" in named[0] or (Path(named[0]) / "manifest.json").is_file()
    return named is not None


def run_flow(name: str, arguments: tuple[str, ...]) -> int:
    """Become the process of a flow (`flows/`), which reads its own arguments."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", f"flows.{name}", *arguments])


def home(name: str) -> str:
    """Return the name of the module that runs a stage, a tool or a command of projects."""
    return (TOOLS | STAGES | PROJECT)[name].home


def run_launched(name: str, root: Path, paths: Paths) -> int:
    """Run a stage as one of several processes, and leave an error to the launcher, which prints it once.

    Args:
        name: The stage.
        root: Folder of params.yaml.
        paths: The checkout.

    Returns:
        Exit code 0; after an error the process ends without returning.
    """
    from stages.params.schema import load_params

    launcher = importlib.import_module("stages.launch.processes")
    tie_to_parent(signal.SIGKILL)
    try:
        importlib.import_module(f"stages.{name}").run(load_params(root / "params.yaml"), paths)
    except BaseException as error:
        launcher.record_failure(error)
        if os.environ.get("SFT_TRACEBACK"):
            raise
        sys.stdout.flush()
        # an ordinary exit could wait for the other processes, which wait for this one
        os._exit(getattr(error, "exit_code", EXIT_FAILED))
    return 0


def fail(error: Exception, code: int) -> int:
    """Print an error as one message without secrets and return the exit code; SFT_TRACEBACK=1 shows tracebacks."""
    print(f"error: {redact(str(error))}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(start(through_dvc=os.environ.pop(AS_SFT, "") == "1"))
