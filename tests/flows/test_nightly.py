from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.blocks.system import Secret

from flows.nightly import changed_data, nightly
from tests.flows.conftest import replace_param

pytestmark = pytest.mark.usefixtures("prefect_server")
PUBLISHED = {"registered_model": "shop", "version": "7", "run_id": "0123456789abcdef", "promoted": True}


class Hook(BaseHTTPRequestHandler):
    """Stores what is posted."""

    heard: list[Any]

    def do_POST(self) -> None:
        self.heard.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        return


@pytest.fixture
def heard() -> Iterator[list[Any]]:
    """The requests to a webhook that the block `custom-webhook/team` calls."""
    Hook.heard = []
    server = HTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    block = CustomWebhookNotificationBlock(
        name="team",
        url=f"http://127.0.0.1:{server.server_port}/",
        json_data={"subject": "{{subject}}", "text": "{{body}}"},
        allow_private_urls=True,
    )
    block.save("team", overwrite=True)
    yield Hook.heard
    server.shutdown()


def publish_in_the_end(project: Path, promoted: bool) -> None:
    """Let the last stage write what `publish` writes."""
    record = json.dumps({**PUBLISHED, "promoted": promoted})
    lines = [
        f"mkdir -p outs/publish; echo '{record}' > outs/publish/run.json",
        "cp outs/pack.txt outs/train.txt; echo '{}' > reports/metrics/train.json",
    ]
    (project / "train.sh").write_text("\n".join(lines))


def test_nothing_runs_while_the_data_are_the_same(ran_project: Path, heard: list[Any]) -> None:
    replace_param(ran_project, "max_length: 512", "max_length: 256")  # not data

    state = nightly(notify="custom-webhook/team", return_state=True)

    assert (state.name, state.message) == ("Unchanged", "the data did not change since the last run")
    assert not (ran_project / "ran.log").exists()
    assert heard == []


@pytest.mark.parametrize(
    ("promoted", "subject", "text"),
    [
        (True, "sft nightly: promoted", "the gate passed: shop version 7 (run 0123456789ab) is champion"),
        (False, "sft nightly: held-back", "the gate is closed: shop version 7 (run 0123456789ab) is a candidate only"),
    ],
)
def test_new_data_run_the_pipeline_and_the_outcome_is_announced(
    ran_project: Path, heard: list[Any], promoted: bool, subject: str, text: str
) -> None:
    publish_in_the_end(ran_project, promoted)
    (ran_project / "data" / "rows.txt").write_text("one\nthree\n")
    assert changed_data(ran_project) == ["data"]

    state = nightly(notify="custom-webhook/team", return_state=True)

    assert (state.type, state.message) == ("COMPLETED", f"{text} (changed: data)")
    assert heard == [{"subject": subject, "text": f"{text} (changed: data)"}]
    assert "three" in (ran_project / "outs" / "train.txt").read_text()
    assert changed_data(ran_project) == []


def test_failure_is_announced_and_the_run_fails(ran_project: Path, heard: list[Any]) -> None:
    (ran_project / "pack.sh").write_text("echo 'error: data/rows.txt:3: broken'; exit 1")
    (ran_project / "data" / "more.txt").write_text("three\n")

    state = nightly(notify="custom-webhook/team", return_state=True)

    assert state.is_failed()
    assert [(one["subject"], "data/rows.txt:3: broken" in one["text"]) for one in heard] == [
        ("sft nightly: failed", True)
    ]


def test_notifier_that_is_none_is_refused_before_anything_runs(ran_project: Path) -> None:
    (ran_project / "data" / "more.txt").write_text("three\n")
    Secret(value="x").save("word", overwrite=True)

    missing = nightly(notify="slack-webhook/nobody", return_state=True)
    other = nightly(notify="secret/word", return_state=True)

    assert str(missing.message).startswith("notify 'slack-webhook/nobody': ")
    assert other.message == "notify 'secret/word' is a Secret, not a notification block"
    assert not (ran_project / "ran.log").exists()
