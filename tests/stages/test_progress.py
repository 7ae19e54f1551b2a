from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from stages.progress import StageProgress, choose_form, describe_seconds, download_progress, progress, stage_progress

ROOT = Path(__file__).resolve().parents[2]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_live_line_and_a_pipe_plain_ones() -> None:
    assert choose_form(Terminal(), {"TERM": "xterm"}) == "live"
    assert choose_form(Terminal(), {"TERM": "dumb"}) == "lines"
    assert choose_form(io.StringIO(), {"TERM": "xterm"}) == "lines"
    assert choose_form(Terminal(), {"TERM": "xterm", "SFT_PROGRESS": "events"}) == "events"
    with pytest.raises(ValueError, match=r"SFT_PROGRESS='bar': it must be one of events, lines, live"):
        choose_form(Terminal(), {"SFT_PROGRESS": "bar"})


def test_plain_lines_are_rare_but_have_beginning_end_and_points() -> None:
    stream = io.StringIO()
    shown = StageProgress("train", stream, "lines")
    for step in range(1001):
        shown.report(step, 1000, "steps", figures={"loss": 0.5} if step == 700 else {}, point=step == 700)
    first, point, last = stream.getvalue().splitlines()
    assert first == "train: 0 of 1000 steps (0 %)"
    assert point.startswith("train: 700 of 1000 steps (70 %), ")
    assert point.endswith(" left, loss 0.5000")
    assert last == "train: 1000 of 1000 steps (100 %)"


def test_a_download_is_shown_in_megabytes_unless_it_is_small() -> None:
    with redirect_stdout(io.StringIO()) as stream, stage_progress("load"):
        download_progress(0, 40_500_000, "org/model")
        download_progress(500_000, 999_999, "config.json")
        download_progress(40_500_000, 40_500_000, "org/model")
    assert stream.getvalue().splitlines() == [
        "load: 0 of 41 MB of org/model (0 %)",
        "load: 41 of 41 MB of org/model (100 %)",
    ]


def test_the_time_left_of_a_resumed_part_counts_what_was_done_since() -> None:
    stream = io.StringIO()
    shown = StageProgress("train", stream, "events")
    shown.report(90, 100, "steps")
    shown._began -= 20
    shown.report(92, 100, "steps", point=True)
    report = json.loads(stream.getvalue().splitlines()[-1].removeprefix("PROGRESS "))
    assert report["each_s"] == pytest.approx(10, abs=0.1)
    assert report["left_s"] == pytest.approx(80, abs=1)


def test_output_that_is_redirected_within_a_stage_does_not_hide_the_progress(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with stage_progress("quantize"), redirect_stdout(io.StringIO()) as captured:
        print("of a library")
        progress(1, 1, "blocks")
    assert capsys.readouterr().out == "quantize: 1 of 1 blocks (100 %)\n"
    assert captured.getvalue() == "of a library\n"


def test_pages_are_shown_by_flows_alone() -> None:
    shown = {}
    for form in ("events", "lines"):
        stream = io.StringIO()
        StageProgress("train", stream, form).page("samples", "**é**\n")
        shown[form] = stream.getvalue()
    assert shown == {"events": 'PAGE ["samples", "**é**\\n"]\n', "lines": ""}


def test_a_stage_may_report_without_display() -> None:
    progress(1, 2, "rows")


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "1 s"), (61, "1 min 1 s"), (3725, "1 h 2 min")])
def test_durations(seconds: float, text: str) -> None:
    assert describe_seconds(seconds) == text


SCRIPT = """
import contextlib, io
from stages.progress import progress, stage_progress
with stage_progress("train"):
    progress(0, 2, "steps")
    print("note: printed between")
    progress(2, 2, "steps", figures={"loss": 0.25})
    print("summary")
    with contextlib.redirect_stdout(io.StringIO()):
        progress(0, 3, "blocks")
        print("hidden")
        progress(3, 3, "blocks")
print("after")
"""


def test_in_a_terminal_other_output_stays_whole_and_in_order() -> None:
    main, other = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "SFT_PROGRESS": "live"}
    child = subprocess.Popen([sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, stdout=other, stderr=other)
    os.close(other)
    raw = b""
    try:
        while block := os.read(main, 4096):
            raw += block
    except OSError:  # the terminal of a process that has ended
        pass
    os.close(main)
    assert child.wait() == 0
    text = raw.decode()
    places = [text.index(part) for part in ("note: printed between\r\n", "2/2 steps", "loss 0.2500", "summary\r\n")]
    assert places == sorted(places)
    assert text.index("summary\r\n") < text.index("3/3 blocks") < text.index("after\r\n")
    assert "hidden" not in text
    assert "\x1b[?25l" not in text  # the cursor stays visible
