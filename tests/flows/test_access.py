"""Attacks on the servers of `make ui` as a web page or another user would make them, and what the user can do."""

from __future__ import annotations

import base64
import http.client
import http.server
import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import pytest
from playwright.sync_api import sync_playwright
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from flows.processes.environment import UiLock
from tests.flows.test_ui import Pages, environment, fetch, serve_pages, wait_for_end

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = "http://evil.example"
SHELL = "prefect.deployments.steps.run_shell_script"


@pytest.fixture(scope="module")
def served(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Pages]]:
    project = tmp_path_factory.mktemp("access") / "project"
    shutil.copytree(template, project, symlinks=True)
    with serve_pages(project) as pages:
        yield project, pages


def ask(
    url: str, method: str = "GET", path: str = "/", body: Any = None, **headers: str
) -> tuple[int, str, dict[str, str]]:
    """Send a request with exactly these headers, and return the status, the body and the headers of the answer."""
    address = urllib.parse.urlsplit(url).netloc
    connection = http.client.HTTPConnection(address, timeout=30)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    data = None if body is None else body.encode() if isinstance(body, str) else json.dumps(body).encode()
    sent = {"Host": address, **{name.replace("_", "-"): value for name, value in headers.items()}}
    if data is not None:
        sent["Content-Length"] = str(len(data))
    for name, value in sent.items():
        connection.putheader(name, value)
    connection.endheaders(data)
    answer = connection.getresponse()
    text = answer.read().decode(errors="replace")
    connection.close()
    return answer.status, text, {name.lower(): value for name, value in answer.getheaders()}


def basic(credential: str) -> str:
    return f"Basic {base64.b64encode(credential.encode()).decode()}"


def simple_posts(body: dict[str, Any]) -> list[tuple[str, str]]:
    """What a page can post to any server without asking it first: the content type and the body."""
    text = json.dumps(body)
    return [
        ("text/plain", text),
        ("application/x-www-form-urlencoded", f'{text[:-1]}, "x": "="}}'),
        ("multipart/form-data; boundary=b", f'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n{text}\r\n--b--'),
    ]


def test_no_page_can_make_a_deployment_or_start_a_run(served: tuple[Path, Pages], tmp_path: Path) -> None:
    project, pages = served
    credential = basic(UiLock(project).holder()["credential"])
    flow_id = fetch(project, "/deployments/name/pipeline/pipeline")["flow_id"]
    deployment = fetch(project, "/deployments/name/pipeline/pipeline")["id"]
    step = {SHELL: {"script": f"touch {tmp_path}/owned"}}
    evil = {"name": "evil", "flow_id": flow_id, "entrypoint": "a.py:b", "work_pool_name": "local", "pull_steps": [step]}
    before = len(fetch(project, "/deployments/filter", {})), len(fetch(project, "/flow_runs/filter", {}))

    for path, body in (("/api/deployments/", evil), (f"/api/deployments/{deployment}/create_flow_run", {})):
        preflight = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "content-type"}
        for origin in (EVIL, "null", "http://127.0.0.1:1", "http://localhost:4200"):
            status, _, headers = ask(pages.prefect, "OPTIONS", path, Origin=origin, **preflight)
            assert (status, headers.get("access-control-allow-origin")) == (403, None)
            # with the credential, as if it had leaked
            for authorization in ({}, {"Authorization": credential}):
                sent = {"Origin": origin, "Content_Type": "application/json", **authorization}
                assert ask(pages.prefect, "POST", path, body, **sent)[0] == 403
        for kind, text in simple_posts(body):
            assert ask(pages.prefect, "POST", path, text, Origin=EVIL, Content_Type=kind)[0] == 403
            assert ask(pages.prefect, "POST", path, text, Sec_Fetch_Site="cross-site", Content_Type=kind)[0] == 403
            assert ask(pages.prefect, "POST", path, text, Content_Type=kind, Authorization=credential)[0] == 415
        for host in ("evil.example", f"evil.example:{urllib.parse.urlsplit(pages.prefect).port}"):
            sent = {"Host": host, "Origin": f"http://{host}", "Content_Type": "application/json"}
            assert ask(pages.prefect, "POST", path, body, Authorization=credential, **sent)[0] == 403
        # another program without the credential, and a page's request if both checks of its origin failed
        for authorization in ({}, {"Authorization": basic("sft:guess")}, {"Authorization": "Basic x"}):
            client = str(uuid4())
            token = ask(pages.prefect, path=f"/api/csrf-token?client={client}", Authorization=credential)[1]
            csrf = {"Prefect_Csrf_Client": client, "Prefect_Csrf_Token": json.loads(token)["token"]}
            sent = {"Content_Type": "application/json", **csrf, **authorization}
            assert ask(pages.prefect, "POST", path, body, **sent)[0] == 401
        no_csrf = ask(pages.prefect, "POST", path, body, Content_Type="application/json", Authorization=credential)
        assert no_csrf[:2] == (403, '{"detail":"Missing CSRF token."}')

    assert (len(fetch(project, "/deployments/filter", {})), len(fetch(project, "/flow_runs/filter", {}))) == before
    assert not (tmp_path / "owned").exists()


def test_no_page_can_read_what_prefect_knows(served: tuple[Path, Pages]) -> None:
    project, pages = served
    credential = basic(UiLock(project).holder()["credential"])
    for path in ("/api/admin/settings", "/api/deployments/name/pipeline/pipeline", "/api/admin/version"):
        assert ask(pages.prefect, path=path)[0] == 401
        assert ask(pages.prefect, path=path, Authorization=credential, Host="evil.example")[0] == 403
        assert ask(pages.prefect, path=path, Authorization=credential, Origin=EVIL)[0] == 403
        assert ask(pages.prefect, path=path, Authorization=credential)[0] == 200
    status, text, headers = ask(pages.prefect, path="/deployments", Accept="text/html")
    assert (status, headers["x-frame-options"]) == (200, "SAMEORIGIN")
    assert UiLock(project).holder()["credential"].partition(":")[2] not in text
    assert json.loads(ask(pages.prefect, path="/ui-settings")[1])["auth"] == "BASIC"


@pytest.mark.parametrize(
    "path",
    [
        "/api/events/in",
        "/api/events/out",
        "/api/logs/out",
        "/api/task_runs/subscriptions/scheduled",
        "/api/work_pools/local/workers/connect",
    ],
)
def test_no_page_can_open_a_websocket(served: tuple[Path, Pages], path: str) -> None:
    project, pages = served
    credential = UiLock(project).holder()["credential"]
    url = f"{pages.prefect.replace('http', 'ws')}{path}"
    for headers in ({"Origin": EVIL}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
        with pytest.raises(InvalidStatus) as refused:
            connect(url, additional_headers=headers, subprotocols=["prefect"])
        assert refused.value.response.status_code == 403
    for token in (None, "sft:guess"):
        with connect(url, subprotocols=["prefect"]) as stranger:
            stranger.send(json.dumps({"type": "auth", "token": token}))
            with pytest.raises(ConnectionClosed):
                stranger.recv(timeout=10)
    with connect(url, origin=pages.prefect, subprotocols=["prefect"]) as own:
        own.send(json.dumps({"type": "auth", "token": credential}))
        assert json.loads(own.recv(timeout=10)) == {"type": "auth_success"}


def test_no_page_can_use_mlflow(served: tuple[Path, Pages]) -> None:
    project, pages = served
    link = UiLock(project).holder()["mlflow"]
    key = link.rstrip("/").rpartition("/")[2]
    assert link == f"{pages.mlflow}/{key}/"
    create, search = "api/2.0/mlflow/experiments/create", "ajax-api/2.0/mlflow/experiments/search?max_results=10"
    json_type = {"Content_Type": "application/json"}

    for path in (f"/{create}", f"/x/{create}", f"/{key}x/{create}"):
        assert ask(pages.mlflow, "POST", path, {"name": "evil"}, **json_type)[0] == 401
    for path in (f"/{search}", "/", "/graphql", "/static-files/x", "/api/2.0/mlflow-artifacts/artifacts", "/version"):
        assert ask(pages.mlflow, path=path) == ask(pages.mlflow, path="/x")
        assert ask(pages.mlflow, path=path)[0] == 401
    assert "open the link that `sft ui` printed when it was last started" in ask(pages.mlflow, path="/")[1]
    # with the key, as if it had leaked
    for origin in (EVIL, "null", "http://127.0.0.1:1", "http://localhost:5000"):
        sent = {"Origin": origin, "Access_Control_Request_Method": "POST"}
        status, _, headers = ask(pages.mlflow, "OPTIONS", f"/{key}/{create}", **sent)
        assert (status, headers.get("access-control-allow-origin")) == (403, None)
        assert ask(pages.mlflow, "POST", f"/{key}/{create}", {"name": "evil"}, Origin=origin, **json_type)[0] == 403
    for kind, text in simple_posts({"name": "evil"}):
        assert ask(pages.mlflow, "POST", f"/{key}/{create}", text, Content_Type=kind)[0] == 415
        assert ask(pages.mlflow, "POST", f"/{create}", text, Content_Type=kind)[0] in (401, 415)
    assert ask(pages.mlflow, "POST", f"/{key}/{create}", {"name": "evil"}, Host="evil.example", **json_type)[0] == 403
    assert ask(pages.mlflow, path=f"/{key}/{search}", Sec_Fetch_Site="same-site", Sec_Fetch_Mode="cors")[0] == 403

    names = [each["name"] for each in json.loads(ask(pages.mlflow, path=f"/{key}/{search}")[1])["experiments"]]
    assert names == ["Default"]
    status, text, headers = ask(pages.mlflow, path=f"/{key}/", Sec_Fetch_Site="none")
    assert (status, "MLflow" in text, headers["referrer-policy"]) == (200, True, "same-origin")
    own = {"Origin": pages.mlflow, "Sec_Fetch_Site": "same-origin", **json_type}
    assert ask(pages.mlflow, "POST", f"/{key}/{create}", {"name": "mine"}, **own)[0] == 200


def test_the_worker_refuses_what_prefect_yaml_does_not_deploy(served: tuple[Path, Pages], tmp_path: Path) -> None:
    project, _ = served
    known = fetch(project, "/deployments/name/pipeline/pipeline")
    owned = tmp_path / "owned"
    (tmp_path / "evil.py").write_text(f"from prefect import flow\nopen({str(owned)!r}, 'w')\n@flow\ndef evil(): pass\n")
    step = {SHELL: {"script": f"touch {owned}"}}
    base = {"flow_id": known["flow_id"], "entrypoint": known["entrypoint"], "work_pool_name": "local"}

    def run(changes: dict[str, Any], run_changes: dict[str, Any]) -> tuple[str, str]:
        made = fetch(project, "/deployments/", {**base, **changes})["id"] if changes else known["id"]
        started = fetch(project, f"/deployments/{made}/create_flow_run", run_changes)["id"]
        state = wait_for_end(project, started)
        return state["type"], state["message"]

    place = project / "prefect.yaml"
    assert run({"name": "evil", "pull_steps": [step]}, {}) == (
        "FAILED",
        f"refused: {place} has no deployment 'evil'; add it there and start `sft ui` again",
    )
    advice = (
        f"which {place} does not; start `sft ui` again, which deploys it anew, and leave the run's job variables empty"
    )
    asks = "refused: the deployment 'pipeline' or the run asks for "
    command = {"command": f"touch {owned}"}
    variables = {"env": {"PYTHONPATH": str(tmp_path), "BASH_ENV": str(tmp_path / "evil.sh")}}
    assert run({}, {"job_variables": command}) == ("FAILED", f"{asks}job_variables={command!r}, {advice}")
    assert run({}, {"job_variables": variables}) == ("FAILED", f"{asks}job_variables={variables!r}, {advice}")
    # of the same name, as the server takes it from another flow
    for number, (change, shown) in enumerate(
        (
            ({"pull_steps": [step]}, f"pull_steps={[step]!r}"),
            ({"entrypoint": f"{tmp_path}/evil.py:evil"}, f"entrypoint='{tmp_path}/evil.py:evil'"),
            ({"path": str(tmp_path)}, f"path={str(tmp_path)!r}"),
            ({"job_variables": command}, f"job_variables={command!r}"),
        )
    ):
        flow_id = fetch(project, "/flows/", {"name": f"evil-{number}"})["id"]
        assert run({"name": "pipeline", "flow_id": flow_id, **change}, {}) == ("FAILED", f"{asks}{shown}, {advice}")
    assert not owned.exists()


def test_a_template_of_the_pool_changes_nothing_of_a_run(served: tuple[Path, Pages], tmp_path: Path) -> None:
    project, _ = served
    pool = fetch(project, "/work_pools/local")
    template = pool["base_job_template"]
    template["job_configuration"] |= {"command": f"touch {tmp_path}/owned", "working_dir": str(tmp_path)}
    patch(project, "/work_pools/local", {"base_job_template": template})
    known = fetch(project, "/deployments/name/pipeline/pipeline")["id"]

    run_id = fetch(project, f"/deployments/{known}/create_flow_run", {"parameters": {"to_stage": "load"}})["id"]

    assert wait_for_end(project, run_id)["type"] == "COMPLETED"
    assert (project / "outs" / "load.txt").read_text() == "one\ntwo\n"
    assert not (tmp_path / "owned").exists()


def patch(project: Path, path: str, body: dict[str, Any]) -> None:
    """Change an entry of the Prefect server of `make ui`."""
    pages = UiLock(project).holder()
    url, credential = pages["api_url"].removesuffix("/api"), {"Authorization": basic(pages["credential"])}
    client = str(uuid4())
    token = json.loads(ask(url, path=f"/api/csrf-token?client={client}", **credential)[1])["token"]
    sent = {"Content_Type": "application/json", "Prefect_Csrf_Client": client, "Prefect_Csrf_Token": token}
    assert ask(url, "PATCH", f"/api{path}", body, **credential, **sent)[0] == 204


def test_other_users_can_read_no_credential(served: tuple[Path, Pages]) -> None:
    project, pages = served
    found = UiLock(project).holder()
    secrets = (found["credential"].partition(":")[2], found["mlflow"].rstrip("/").rpartition("/")[2])
    for process in psutil.Process(pages.process.pid).children(recursive=True):
        assert not any(secret in word for secret in secrets for word in process.cmdline())
    state = project / ".state"
    for path in (state / "ui.lock", *(state / "logs").iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    logs = "".join(path.read_text(errors="replace") for path in (state / "logs").iterdir())
    assert not any(secret in logs for secret in secrets)


def test_every_port_is_on_loopback_and_only_the_two_servers_answer_http(served: tuple[Path, Pages]) -> None:
    _, pages = served
    tree = psutil.Process(pages.process.pid).children(recursive=True)
    listening = [
        each.laddr for process in tree for each in process.net_connections("inet") if each.status == psutil.CONN_LISTEN
    ]
    servers = {urllib.parse.urlsplit(url).port for url in (pages.prefect, pages.mlflow)}
    assert {each.ip for each in listening} == {"127.0.0.1"}
    assert servers <= {each.port for each in listening}
    # a Prefect worker tells its flows by another port to stop; that protocol begins with a token of the run
    for port in {each.port for each in listening} - servers:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as other:
            other.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert other.recv(1) == b""


def test_a_run_in_the_terminal_and_prefect_s_commands_use_the_servers(served: tuple[Path, Pages]) -> None:
    project, _ = served
    run = [sys.executable, "-m", "flows.pipeline", "--to-stage", "load"]
    done = subprocess.run(run, cwd=project, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    printed = subprocess.run(
        [sys.executable, "-m", "flows.ui", "--environment"],
        cwd=project,
        env=environment(),
        capture_output=True,
        text=True,
    ).stdout
    assert [line.partition("=")[0] for line in printed.splitlines()] == [
        "export PREFECT_API_URL",
        "export PREFECT_API_AUTH_STRING",
        "export MLFLOW_TRACKING_URI",
        "export MLFLOW_TRACKING_TOKEN",
    ]
    script = f"{printed}\nprefect deployment ls && mlflow experiments search"
    shown = subprocess.run(["bash", "-c", script], cwd=project, env=environment(), capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "pipeline/pipeline" in shown.stdout
    assert "Default" in shown.stdout
    names = [each["name"] for each in fetch(project, "/flow_runs/filter", {"sort": "START_TIME_DESC", "limit": 1})]
    assert names == ["start to load"]
    assert os.environ.get("PREFECT_API_AUTH_STRING") is None


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A browser with an empty profile."""
    if BROWSER is None:
        pytest.skip("needs Chromium or Chrome: apt install chromium")
    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield started
        started.close()


def test_one_click_opens_each_page_and_a_run_is_started_there(served: tuple[Path, Pages], browser: Any) -> None:
    project, pages = served
    form, mlflow = re.findall(r"(?:start a run: |MLflow +)(http\S+)", pages.printed)
    page = browser.new_context().new_page()
    page.set_default_timeout(60_000)

    page.goto(form)
    page.wait_for_url("**/deployments/deployment/*/run")
    assert "#" not in page.url
    label = page.locator(".schema-form-property__label", has_text=re.compile(r"^max_steps \(Optional\)$"))
    page.locator(".schema-form-property").filter(has=label).last.locator("input").fill("6")
    page.get_by_role("button", name="Submit").click()
    page.wait_for_url("**/deployments/deployment/*?tab=Runs")
    (run,) = fetch(project, "/flow_runs/filter", {"sort": "EXPECTED_START_TIME_DESC", "limit": 1})
    assert (wait_for_end(project, run["id"])["type"], run["parameters"]["overrides"]["train"]) == (
        "COMPLETED",
        {"max_steps": 6},
    )
    page.goto(f"{pages.prefect}/runs/flow-run/{run['id']}")
    page.get_by_text("Completed", exact=True).first.wait_for()
    page.goto(f"{pages.prefect}/deployments")
    for name in ("pipeline", "sweep", "nightly", "cleanup"):
        page.get_by_text(name).first.wait_for()
    page.goto(mlflow)
    page.get_by_text("Default").first.wait_for()

    stale = browser.new_context().new_page()
    stale.goto(f"{pages.prefect}/sign-in#of-an-earlier-start/deployments")
    stale.get_by_text("Open the link that `sft ui` printed when it was last started.").wait_for()
    assert stale.evaluate("localStorage.length") == 0
    stale.goto(f"{pages.prefect}/sign-in#{form.partition('#')[2].partition('/')[0]}//evil.example/")
    stale.get_by_text("This link is not valid").wait_for()


EVIL_PAGE = """<!doctype html><body><iframe name="sink"></iframe><script>
const [deployments, start, experiments, mlflow, socket] = %s;
const body = %s, said = [];
const attempt = (name, promise) => promise.catch(() => "refused").then(answer => said.push([name, answer]));
const json = {"content-type": "application/json"};
const opened = url => new Promise((resolve, reject) => {
  const found = new WebSocket(url, ["prefect"]);
  found.onopen = () => resolve("open");
  found.onerror = reject;
});
const shown = url => new Promise((resolve, reject) => {
  const found = new Image();
  found.onload = () => resolve("shown");
  found.onerror = reject;
  found.src = url;
});
for (const url of [deployments, start, experiments]) {
  const form = document.createElement("form");
  Object.assign(form, {action: url, method: "post", enctype: "text/plain", target: "sink"});
  const input = document.createElement("input");
  Object.assign(input, {name: body.slice(0, -1) + ', "x": "', value: '"}'});
  form.append(input);
  document.body.append(form);
  form.submit();
}
Promise.all([
  ...[deployments, start, experiments].flatMap(url => [
    attempt("json", fetch(url, {method: "POST", body, headers: json}).then(a => a.type)),
    attempt("text", fetch(url, {method: "POST", body, mode: "no-cors", credentials: "include"}).then(a => a.type)),
    attempt("blob", fetch(url, {method: "POST", body: new Blob([body]), mode: "no-cors"}).then(a => a.type)),
    attempt("read", fetch(url).then(a => a.text())),
  ]),
  attempt("socket", opened(socket)),
  attempt("image", shown(mlflow + "static-files/favicon.ico")),
]).then(() => setTimeout(() => document.title = JSON.stringify(said), 1000));
</script>"""


def test_a_foreign_page_in_a_browser_that_is_signed_in_reaches_nothing(
    served: tuple[Path, Pages], browser: Any
) -> None:
    project, pages = served
    form, mlflow = re.findall(r"(?:start a run: |MLflow +)(http\S+)", pages.printed)
    known = fetch(project, "/deployments/name/pipeline/pipeline")
    step = {SHELL: {"script": "true"}}
    evil = {"name": "evil-page", "flow_id": known["flow_id"], "work_pool_name": "local", "pull_steps": [step]}
    addresses = [
        f"{pages.prefect}/api/deployments/",
        f"{pages.prefect}/api/deployments/{known['id']}/create_flow_run",
        # with the key, as if it had leaked
        f"{mlflow.partition('#')[0]}api/2.0/mlflow/experiments/create",
        mlflow.partition("#")[0],
        f"{pages.prefect.replace('http', 'ws')}/api/events/out",
    ]
    text = EVIL_PAGE % (json.dumps(addresses), json.dumps(json.dumps(evil)))
    before = names(project, mlflow)

    context = browser.new_context()
    signed_in = context.new_page()
    signed_in.goto(form)
    signed_in.wait_for_url("**/deployments/deployment/*/run")
    for host in ("127.0.0.1", "evil.localhost"):  # of the same site, and of another one
        with serve_page(text) as port:
            page = context.new_page()
            page.goto(f"http://{host}:{port}/")
            page.wait_for_function("document.title.startsWith('[')", timeout=60_000)
            said = json.loads(page.title())
        assert {name for name, answer in said if answer == "refused"} == {"json", "read", "socket", "image"}
        # a page can't read these answers; that nothing came of the requests is what counts
        assert {answer for name, answer in said if name in ("text", "blob")} <= {"opaque", "refused"}
        assert len(said) == 14

    assert names(project, mlflow) == before


def names(project: Path, mlflow: str) -> tuple[list[str], int, list[str]]:
    """The deployments, the number of runs, and the experiments."""
    key = urllib.parse.urlsplit(mlflow).path.split("/")[1]
    found = ask(mlflow, path=f"/{key}/api/2.0/mlflow/experiments/search?max_results=100")[1]
    deployments = sorted(each["name"] for each in fetch(project, "/deployments/filter", {}))
    runs = fetch(project, "/flow_runs/count", {})
    return deployments, runs, sorted(each["name"] for each in json.loads(found)["experiments"])


@contextmanager
def serve_page(text: str) -> Iterator[int]:
    """Serve one page on a free port."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: Any) -> None:
            """Print nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()
