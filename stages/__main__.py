"""Command line `python -m stages NAME`: runs one stage of the pipeline, or one of its tools."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__" and "LOCAL_RANK" not in os.environ:  # before the slow imports, in which signals come, too
    from stages.launch.stopping import heed_signals

    heed_signals()

from stages.checkout.full_disk import explain_full_disk, is_full_disk
from stages.checkout.paths import Paths
from stages.checkout.redaction import RedactedStream, redact
from stages.launch.log_noise import reduce_log_noise
from stages.launch.stopping import SavedAndStopped, Stopped, stoppable, tie_to_parent
from stages.params.figures import MODELS
from stages.params.schema import ParamsError, load_params

STAGE_HELP = {
    "load": "read and check the sources, and set held-out rows apart",
    "format": "render the rows as chats and mark what is trained",
    "pack": "tokenize the chats and pack them into rows of at most pack.max_length tokens",
    "train": "train an adapter or all weights",
    "merge": "merge the adapter into the base model",
    "quantize": "write a smaller copy of the merged model",
    "evaluate": "measure every model on the held-out rows and check the gate",
    "publish": "record the result in MLflow and register the model",
}

TOOL_HELP = {
    "chat": "talk to a model in the terminal",
    "check": "check params.yaml, the data and the name of the base model before a run",
    "compare": "show how two recorded runs differ",
    "estimate": "estimate time and memory of the training from a few steps",
    "preview": "show packed rows token by token, with the trained tokens marked",
    "reproduce": "repeat a recorded run and compare the results",
    "serve": "serve a model over HTTP with OpenAI's API",
    "summary": "show the figures of the last run and where its files are",
}

STAGES, TOOLS = tuple(STAGE_HELP), tuple(TOOL_HELP)

NUM_RUNS = {"compare": 2, "reproduce": 1}

# option -> the tools that take it
OPTIONS = {
    "rows": ("preview",),
    "seed": ("preview",),
    "split": ("preview",),
    "model": ("chat", "serve"),
    "max_new_tokens": ("chat",),
    "system": ("chat",),
    "port": ("serve",),
    "keep": ("reproduce",),
    "trust_patch": ("reproduce",),
}

EXIT_FAILED, EXIT_USAGE, EXIT_STOPPED = 1, 2, 130


def main(argv: list[str] | None = None) -> int:
    """Run the stage or tool that the command line names.

    Args:
        argv: Words of the command line; None for those of this process.

    Returns:
        Exit code: 0 on success, 1 if the work failed for a reason that the user can fix, 2 if params.yaml or the
        command line is wrong, 130 if it was interrupted, 143 if SIGTERM ended it, 75 if SIGTERM stopped a training
        that has saved a checkpoint.
    """
    args, options = read_command(argv)
    reduce_log_noise()
    paths = Paths(args.root.resolve())
    if "LOCAL_RANK" in os.environ:
        return run_launched(args.name, args.root, paths)
    try:
        params = load_params(args.root / "params.yaml")
        importlib.import_module(home(args.name)).run(params, paths, **options)
    except KeyboardInterrupt as stop:
        if isinstance(stop, SavedAndStopped):
            print(f"stopped: {stop}. Type the command again to go on from it.", file=sys.stderr, flush=True)
            return stop.exit_code
        print(f"stopped: {args.name}. Type the command again to go on.", file=sys.stderr, flush=True)
        if isinstance(stop, Stopped):
            stop.seen = True
            return 128 + stop.number
        return EXIT_STOPPED
    except ParamsError as error:
        return fail(error, EXIT_USAGE)
    except Exception as error:
        full = is_full_disk(error, paths.root)
        if os.environ.get("SFT_TRACEBACK") or not (full or isinstance(error, (ValueError, OSError))):
            raise
        explained = explain_full_disk(error, args.name, paths.root) if full else error
        return fail(explained, getattr(error, "exit_code", EXIT_FAILED))
    return 0


def read_command(argv: list[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Parse the command line.

    Returns:
        The parsed arguments, and those among them that are passed to the tool.

    Raises:
        SystemExit: The command line is wrong (code 2) or asks for help (code 0).
    """
    parser = argparse.ArgumentParser(
        prog="python -m stages",
        description="Run one stage of the pipeline, or a tool. `make repro` runs all stages whose inputs have changed.",
        epilog="\n\n".join([listing("stages, in order", STAGE_HELP), listing("tools", TOOL_HELP)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=(*STAGES, *TOOLS), metavar="NAME", help="a stage or a tool of the lists below")
    parser.add_argument(
        "runs", nargs="*", metavar="RUN", help="recorded run, by id, name or alias; compare takes two, reproduce one"
    )
    parser.add_argument("--root", type=Path, default=Path(), help="folder with params.yaml (default: this folder)")
    preview = parser.add_argument_group("options of preview")
    preview.add_argument("--rows", type=positive, metavar="N", help="number of packed rows to show (default: 3)")
    preview.add_argument("--seed", type=int, metavar="N", help="seed of the choice of rows (default: 0)")
    preview.add_argument(
        "--split", choices=("train", "eval"), help="show training rows or held-out rows (default: train)"
    )
    chat = parser.add_argument_group("options of chat and serve")
    chat.add_argument("--model", choices=MODELS, help="model to load (default: merged)")
    chat.add_argument("--max-new-tokens", type=positive, metavar="N", help="chat: longest answer (default: 256 tokens)")
    chat.add_argument("--system", metavar="TEXT", help="chat: system message (default: that of the training rows)")
    chat.add_argument("--port", type=positive, metavar="N", help="serve: port on this machine (default: 8000)")
    reproduce = parser.add_argument_group("options of reproduce")
    reproduce.add_argument(
        "--keep", action="store_true", default=None, help="keep the worktree that the run was repeated in"
    )
    reproduce.add_argument(
        "--trust-patch",
        nargs="?",
        const="",
        metavar="DIGEST",
        help="run the uncommitted changes that were recorded; DIGEST, which is shown with them, names those that you "
        "have read",
    )
    args = parser.parse_args(argv)
    options: dict[str, Any] = {name: value for name in OPTIONS if (value := getattr(args, name)) is not None}
    foreign = [name for name in options if args.name not in OPTIONS[name]]
    if foreign:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in foreign)
        owners = sorted({tool for name in foreign for tool in OPTIONS[name]})
        parser.error(f"{args.name} does not take {flags}: only {' and '.join(owners)} do")
    if len(args.runs) != NUM_RUNS.get(args.name, 0):
        parser.error("compare takes two runs, reproduce one: their ids, names or aliases; the other names take none")
    if args.runs:
        options["runs"] = args.runs
    return args, options


def listing(title: str, entries: dict[str, str]) -> str:
    """Return names with their descriptions, one line each, below a title."""
    return "\n".join([f"{title}:", *(f"  {name:<11}{text}" for name, text in entries.items())])


def positive(text: str) -> int:
    """Parse an integer of at least 1.

    Raises:
        ArgumentTypeError: The text is not one.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: a number of at least 1 is needed")
    return int(text)


def home(name: str) -> str:
    """Return the name of the module that runs a stage or a tool."""
    return f"stages.tools.{name}" if name in TOOLS else f"stages.{name}"


def run_launched(name: str, root: Path, paths: Paths) -> int:
    """Run a stage as one of several processes, and leave an error to the launcher, which prints it once.

    Args:
        name: The stage.
        root: Folder of params.yaml.
        paths: The checkout.

    Returns:
        Exit code 0; after an error the process ends without returning.
    """
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
    # also for what libraries print, and for tracebacks
    sys.stdout, sys.stderr = RedactedStream(sys.stdout), RedactedStream(sys.stderr)
    sys.exit(stoppable(main))
