"""`python -m flows.processes.prefect_server PORT`: Prefect's server with its pages, for this machine's user only.

`prefect server start` answers any web page under any host name. Here the same application runs behind
`stages.access.guard.OwnOriginOnly`, and a page signs a browser in.
"""

from __future__ import annotations

import sys

import uvicorn
from starlette.responses import HTMLResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from flows.processes.environment import prepare_prefect

prepare_prefect()

from prefect.server.api.server import create_app
from prefect.settings import get_current_settings

from flows.processes.servers import HOST, SIGN_IN
from stages.access.guard import OwnOriginOnly

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


class SignIn:
    """Serve the page that signs a browser in; pass other requests on.

    Args:
        app: The server's application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "http" and scope["path"] == SIGN_IN and scope["method"] == "GET":
            await HTMLResponse(PAGE, headers={"cache-control": "no-store"})(scope, receive, send)
            return
        await self.app(scope, receive, send)


def main(argv: list[str]) -> int:
    """Serve on a port until a signal; refuse to serve without a credential."""
    server = get_current_settings().server
    api = server.api
    if not api.auth_string:
        print("error: PREFECT_SERVER_API_AUTH_STRING is not set, and without it anyone could start runs")
        return 1
    uvicorn.run(
        OwnOriginOnly(SignIn(create_app(final=True)), json_only=True),
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
