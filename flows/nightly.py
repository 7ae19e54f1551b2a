"""New data, new model: a Prefect flow for a schedule, and `python -m flows.nightly` for a plain shell.

It looks whether the data changed since the last run; if so, it runs the pipeline, whose gate decides on the champion,
and tells the outcome.
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
"""Beginning of the events' names, `sft.nightly.promoted` and so on: an automation can wait for them."""


@flow(name="nightly", persist_result=False)
def nightly(notify: str | None = None, always: bool = False) -> State[Any]:
    """Run the pipeline if the data changed, and tell what came of it.

    Args:
        notify: A notification block of Prefect, as `type/name`, such as `slack-webhook/team`. Empty: tell nobody. The
            outcome is an event as well (`sft.nightly.promoted`, `.held-back`, `.failed`, `.unchanged`), on which an
            automation can act.
        always: Run it also when the data are the same.
    """
    root = Path.cwd().resolve()
    try:
        block = load_notifier(notify)
        changed = changed_data(root)
    except (RunRefused, ValueError) as refusal:
        return Failed(message=str(refusal))
    if not changed and not always:
        tell(root, "unchanged", "the data are those of the last run: nothing to do", None)
        return Completed(name="Unchanged", message="the data are those of the last run: nothing to do")
    why = f"changed: {', '.join(changed)}" if changed else "run although the data are the same"
    state: State[Any] = pipeline(return_state=True)
    kind, text = judge(root, state)
    tell(root, kind, f"{text} ({why})", block)
    return Completed(message=f"{text} ({why})") if state.is_completed() else Failed(message=f"{text} ({why})")


def changed_data(root: Path) -> list[str]:
    """Data that stages read from outside and that are not those which DVC recorded at the last run.

    Code does not count: it is changed by people, who see what it does.
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
    """The block that tells people.

    Raises:
        RunRefused: There is no such block, or it can't notify.
    """
    if name is None:
        return None
    try:
        block = Block.load(name)
    except ValueError as error:
        raise RunRefused(f"notify {name!r}: {' '.join(str(error).split())} Make it on the page, under Blocks") from None
    if not isinstance(block, NotificationBlock):
        raise RunRefused(f"notify {name!r} is a {type(block).__name__}, which notifies nobody")
    return block


def judge(root: Path, state: State[Any]) -> tuple[str, str]:
    """What a run of the pipeline amounts to: a word for the event, and a sentence."""
    if not state.is_completed():
        return "failed", f"the pipeline failed: {state.message}"
    record = root / "outs" / "publish" / "run.json"
    published = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    if not published:
        return "done", f"the pipeline ran: {state.message}"
    model = f"{published['registered_model']} version {published['version']} (run {published['run_id'][:12]})"
    if published["promoted"]:
        return "promoted", f"the gate passed: {model} is champion"
    return "held-back", f"the gate is closed: {model} is candidate only"


def tell(root: Path, kind: str, text: str, block: NotificationBlock | None) -> None:
    """Emit the event, and notify whoever is to be notified."""
    print(text, flush=True)
    emit_event(f"{EVENT}.{kind}", resource={"prefect.resource.id": f"sft.{root.name}"}, payload={"text": text})
    if block is not None:
        block.notify(text, subject=f"sft nightly: {kind}")  # type: ignore[unused-coroutine]


def main(argv: list[str] | None = None) -> int:
    """Run it in this terminal.

    Returns:
        0 on success, 1 when the pipeline failed, 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(prog="python -m flows.nightly", description=__doc__)
    parser.add_argument("--notify", metavar="TYPE/NAME", help="a notification block of Prefect that hears the outcome")
    parser.add_argument("--always", action="store_true", help="run also when the data are the same")
    args = parser.parse_args(argv)
    return run_in_terminal(lambda: nightly(args.notify, args.always, return_state=True))


if __name__ == "__main__":
    sys.exit(main())
