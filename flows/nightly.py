"""`nightly`: a Prefect flow, and `python -m flows.nightly`, that runs the pipeline if the data changed.

The gate of the pipeline decides whether the new model becomes champion. The outcome is sent as a notification and as an
event.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from flows.processes.environment import prepare_prefect

prepare_prefect()

from prefect import flow
from prefect.blocks.abstract import NotificationBlock
from prefect.blocks.core import Block
from prefect.client.schemas.objects import State
from prefect.events import emit_event
from prefect.states import Completed, Failed

from flows.pipeline import pipeline
from flows.processes.terminal import run_in_terminal
from flows.runs.graph import RunRefused, read_plan
from flows.runs.recorded import present_inputs, recorded_inputs

EVENT = "sft.nightly"
"""Prefix of the events' names, such as `sft.nightly.promoted`, which can trigger automations."""


@flow(name="nightly", persist_result=False)
def nightly(notify: str | None = None, always: bool = False) -> State[Any]:
    """Run the pipeline if the data changed since the last run, and report the outcome.

    Args:
        notify: A notification block of Prefect as `type/name`, such as `slack-webhook/team`. Empty: no notification.
            The outcome is also emitted as an event (`sft.nightly.promoted`, `.held-back`, `.failed`, `.done` if no
            model was published, or `.unchanged`), which can trigger automations.
        always: Run the pipeline even if the data did not change.
    """
    root = Path.cwd().resolve()
    try:
        block = load_notifier(notify)
        changed = changed_data(root)
    except (RunRefused, ValueError) as refusal:
        return Failed(message=str(refusal))
    if not changed and not always:
        announce(root, "unchanged", "the data did not change since the last run", None)
        return Completed(name="Unchanged", message="the data did not change since the last run")
    why = f"changed: {', '.join(changed)}" if changed else "the data did not change"
    state: State[Any] = pipeline(return_state=True)
    kind, text = read_outcome(root, state)
    announce(root, kind, f"{text} ({why})", block)
    return Completed(message=f"{text} ({why})") if state.is_completed() else Failed(message=f"{text} ({why})")


def changed_data(root: Path) -> list[str]:
    """Return the data files and folders that differ from those that DVC recorded at the last run.

    Changes of code are ignored: who changes code runs the pipeline, too.
    """
    plan = read_plan(root)
    found: set[str] = set()
    for stage in plan.stages:
        data = [source for source in stage.sources if source.partition("/")[0] == "data"]
        if data:
            here, then = present_inputs(root, stage.name), recorded_inputs(root, stage.name)
            found |= {source for source in data if here.get(source) != then.get(source)}
    return sorted(found)


def load_notifier(name: str | None) -> NotificationBlock | None:
    """Load the notification block of this name; None if there is no name.

    Raises:
        RunRefused: There is no such block, or it is not a notification block.
    """
    if name is None:
        return None
    try:
        block = Block.load(name)
    except ValueError as error:
        raise RunRefused(
            f"notify {name!r}: {' '.join(str(error).split())} Create it on the Prefect page, under Blocks"
        ) from None
    if not isinstance(block, NotificationBlock):
        raise RunRefused(f"notify {name!r} is a {type(block).__name__}, not a notification block")
    return block


def read_outcome(root: Path, state: State[Any]) -> tuple[str, str]:
    """Return the outcome of a run of the pipeline: the last part of the event's name, and a sentence."""
    if not state.is_completed():
        return "failed", f"the pipeline failed: {state.message}"
    record = root / "outs" / "publish" / "run.json"
    published = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    if not published:
        return "done", f"the pipeline ran: {state.message}"
    model = f"{published['registered_model']} version {published['version']} (run {published['run_id'][:12]})"
    if published["promoted"]:
        return "promoted", f"the gate passed: {model} is champion"
    return "held-back", f"the gate is closed: {model} is a candidate only"


def announce(root: Path, kind: str, text: str, block: NotificationBlock | None) -> None:
    """Print the outcome, emit it as an event, and send the notification."""
    print(text, flush=True)
    emit_event(f"{EVENT}.{kind}", resource={"prefect.resource.id": f"sft.{root.name}"}, payload={"text": text})
    if block is not None:
        block.notify(text, subject=f"sft nightly: {kind}")  # type: ignore[unused-coroutine]


def main(argv: list[str] | None = None) -> int:
    """Run the flow in this terminal.

    Returns:
        0 on success, 1 if the pipeline failed, 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(prog="python -m flows.nightly", description=__doc__)
    parser.add_argument("--notify", metavar="TYPE/NAME", help="a notification block of Prefect for the outcome")
    parser.add_argument("--always", action="store_true", help="run even if the data did not change")
    args = parser.parse_args(argv)
    return run_in_terminal(lambda: nightly(args.notify, args.always, return_state=True))


if __name__ == "__main__":
    sys.exit(main())
