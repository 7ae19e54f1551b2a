"""`python -m stages NAME`: run one stage, or one of the tools that look at the pipeline."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path
from typing import Any

from stages.checkout.full_disk import explain_full_disk, is_full_disk
from stages.checkout.paths import Paths
from stages.checkout.redaction import redact
from stages.launch.quiet import quiet_tools
from stages.params.figures import MODELS
from stages.params.schema import ParamsError, load_params

STAGES = ("load", "format", "pack", "train", "merge", "quantize", "evaluate", "publish")

TOOLS = ("chat", "check", "compare", "estimate", "preview", "reproduce", "serve", "summary")

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
}

EXIT_FAILED, EXIT_USAGE, EXIT_STOPPED = 1, 2, 130


def main(argv: list[str] | None = None) -> int:
    """Run what the command line names.

    Returns:
        0 on success, 1 when the work failed for a reason a user can mend, 2 when params.yaml or the call is wrong, 130
        when it was interrupted.
    """
    args, options = read_command(argv)
    quiet_tools()
    paths = Paths(args.root.resolve())
    if "LOCAL_RANK" in os.environ:
        return run_launched(args.name, args.root, paths)
    try:
        params = load_params(args.root / "params.yaml")
        importlib.import_module(home(args.name)).run(params, paths, **options)
    except KeyboardInterrupt:
        print(f"stopped: {args.name}. Type the command again to go on.", file=sys.stderr, flush=True)
        return EXIT_STOPPED
    except ParamsError as error:
        return fail(error, EXIT_USAGE)
    except Exception as error:
        full = is_full_disk(error, paths.root)
        if os.environ.get("SFT_TRACEBACK") or not (full or isinstance(error, (ValueError, OSError))):
            raise
        told = explain_full_disk(error, args.name, paths.root) if full else error
        return fail(told, getattr(error, "exit_code", EXIT_FAILED))
    return 0


def read_command(argv: list[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """What to run, and the options for it; a wrong call ends with a message and code 2."""
    parser = argparse.ArgumentParser(prog="python -m stages", description=__doc__)
    names = (*STAGES, *TOOLS)
    parser.add_argument("name", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument(
        "runs", nargs="*", metavar="RUN", help="recorded runs by id, name or alias: compare takes two, reproduce one"
    )
    parser.add_argument("--root", type=Path, default=Path(), help="the checkout (default: this folder)")
    preview = parser.add_argument_group("preview")
    preview.add_argument("--rows", type=positive, metavar="N", help="packed rows to show (default: 3)")
    preview.add_argument("--seed", type=int, help="which ones (default: 0)")
    preview.add_argument("--split", choices=("train", "eval"), help="of training or held-out rows (default: train)")
    chat = parser.add_argument_group("chat and serve")
    chat.add_argument("--model", choices=MODELS, help="which of the four models (default: merged)")
    chat.add_argument("--max-new-tokens", type=positive, metavar="N", help="chat: longest answer (default: 256)")
    chat.add_argument("--system", metavar="TEXT", help="chat: system message (default: the training rows')")
    chat.add_argument("--port", type=positive, help="serve: on loopback (default: 8000)")
    reproduce = parser.add_argument_group("reproduce")
    keep = "leave the worktree with the results there"
    reproduce.add_argument("--keep", action="store_true", default=None, help=keep)
    args = parser.parse_args(argv)
    options: dict[str, Any] = {name: value for name in OPTIONS if (value := getattr(args, name)) is not None}
    foreign = [name for name in options if args.name not in OPTIONS[name]]
    if foreign:
        flags = ", --".join(name.replace("_", "-") for name in foreign)
        owners = sorted({tool for name in foreign for tool in OPTIONS[name]})
        parser.error(f"--{flags} belong to {' and '.join(owners)}, not to {args.name}")
    if len(args.runs) != NUM_RUNS.get(args.name, 0):
        parser.error("compare takes two runs, reproduce one: their ids, names or aliases; the other names take none")
    if args.runs:
        options["runs"] = args.runs
    return args, options


def positive(text: str) -> int:
    """A number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: a number of at least 1 is needed")
    return int(text)


def home(name: str) -> str:
    """The module that runs a stage or a tool."""
    return f"stages.tools.{name}" if name in TOOLS else f"stages.{name}"


def run_launched(name: str, root: Path, paths: Paths) -> int:
    """Run a stage as one of several processes: what goes wrong is left to the launcher, which says it once."""
    launcher = importlib.import_module("stages.launch.processes")
    launcher.tie_to_launcher()
    try:
        importlib.import_module(f"stages.{name}").run(load_params(root / "params.yaml"), paths)
    except BaseException as error:
        launcher.record_failure(error)
        if os.environ.get("SFT_TRACEBACK"):
            raise
        sys.stdout.flush()
        os._exit(EXIT_FAILED)  # an ordinary exit could wait for the others, who wait for this process
    return 0


def fail(error: Exception, code: int) -> int:
    """Print one message instead of a traceback; SFT_TRACEBACK=1 shows where it came from."""
    print(f"error: {redact(str(error))}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
