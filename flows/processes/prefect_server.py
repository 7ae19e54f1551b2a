"""`python -m flows.processes.prefect_server PORT`: Prefect's server with its pages, for this machine's user only.

`prefect server start` answers any web page under any host name. Here the same application runs behind
`stages.access.guard.OwnOriginOnly`, and a page signs a browser in.
"""

from __future__ import annotations

import sys
from pathlib import Path

import uvicorn
from starlette.responses import HTMLResponse, PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from flows.processes.environment import ROOT, UiLock, prepare_prefect

prepare_prefect()

from prefect.server.api.server import create_app
from prefect.settings import get_current_settings

from flows.processes.servers import HOST, RECORD, SIGN_IN
from stages.access.guard import KeyRequired, OwnOriginOnly

PAGE = """<!doctype html><meta charset="utf-8"><title>Prefect</title><link rel="icon" href="data:,">
<p id="said">signing in ...</p>
<script>
const [, key, page] = location.hash.match(/^#([\\w-]+)(\\/(?!\\/).*)$/) ?? [];
history.replaceState(null, "", location.pathname);
// where Prefect's pages look for what they send with every request
const credential = btoa("sft:" + key);
fetch("api/admin/version", {headers: {Authorization: "Basic " + credential}}).then(answer => {
  if (!key || !answer.ok) throw new Error();
  localStorage.setItem("prefect-password", credential);
  location.replace(page);
}).catch(() => {
  document.getElementById("said").textContent =
    "This link is not valid (any more). Open the link that `sft ui` printed when it was last started.";
});
</script>"""

LEAD = """<!doctype html><meta charset="utf-8"><title>MLflow</title><link rel="icon" href="data:,">
<p id="said">opening MLflow ...</p>
<script>
const credential = localStorage.getItem("prefect-password");
fetch("ADDRESS", {headers: {Authorization: "Basic " + credential}}).then(answer => {
  if (!answer.ok) throw new Error();
  return answer.text();
}).then(address => location.replace(address + location.hash)).catch(() => {
  document.getElementById("said").textContent =
    "MLflow is not served here, or this browser is not signed in. Open the link that `sft ui` printed.";
});
</script>"""

ADDRESS = f"{RECORD}/address"


class SignIn:
    """Serve the page that signs a browser in, and the one that leads to MLflow; pass other requests on.

    Args:
        app: The server's application.
        key: The password of the server's credential, which the address of MLflow's server is told for.
        root: The checkout whose pages are served.
    """

    def __init__(self, app: ASGIApp, key: str, root: Path = ROOT) -> None:
        self.app = app
        self.root = root
        self.address = KeyRequired(
            self._tell_address, key, open_paths=(), way_out="open the link that `sft ui` printed"
        )

    async def _tell_address(self, scope: Scope, receive: Receive, send: Send) -> None:
        address = UiLock(self.root).holder().get("mlflow", "")
        answer = PlainTextResponse(address, 200 if address else 404, {"cache-control": "no-store"})
        await answer(scope, receive, send)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "http" and scope["path"] == SIGN_IN and scope["method"] == "GET":
            await HTMLResponse(PAGE, headers={"cache-control": "no-store"})(scope, receive, send)
            return
        if scope["type"] == "http" and scope["path"] == RECORD and scope["method"] == "GET":
            await HTMLResponse(LEAD.replace("ADDRESS", ADDRESS))(scope, receive, send)
            return
        if scope["type"] == "http" and scope["path"] == ADDRESS:
            await self.address(scope, receive, send)
            return
        await self.app(scope, receive, send)


def main(argv: list[str]) -> int:
    """Serve on a port until a signal; refuse to serve without a credential."""
    server = get_current_settings().server
    api = server.api
    key = api.auth_string.get_secret_value().partition(":")[2] if api.auth_string else ""
    if not key:
        print("error: PREFECT_SERVER_API_AUTH_STRING is not set, and without it anyone could start runs")
        return 1
    uvicorn.run(
        OwnOriginOnly(SignIn(create_app(final=True), key), json_only=True),
        host=HOST,
        port=int(argv[0]),
        timeout_keep_alive=api.keepalive_timeout,
        ws_ping_interval=api.websocket_ping_interval,
        ws_ping_timeout=api.websocket_ping_timeout,
        log_level=server.logging_level.lower(),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
