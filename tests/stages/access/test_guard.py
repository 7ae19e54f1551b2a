"""Requests as web pages, rebound host names and programs send them, to a real server behind the guard."""

from __future__ import annotations

import base64
import http.client
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from stages.access.guard import KeyRequired, OwnOriginOnly, new_key

KEY = "k-0123456789"
EVIL = "http://evil.example"


async def show(request: Request) -> JSONResponse:
    return JSONResponse({"path": request.url.path, "body": (await request.body()).decode()})


async def echo(socket: WebSocket) -> None:
    await socket.accept()
    await socket.send_text("open")
    await socket.close()


def serve(app: object) -> Iterator[int]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield listening.getsockname()[1]
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """A server with a key, which may also be the first part of the path."""
    routes = [Route("/{path:path}", show, methods=["GET", "POST", "PUT", "OPTIONS"]), WebSocketRoute("/socket", echo)]
    app = KeyRequired(Starlette(routes=routes), KEY, in_path=True, way_out="ask its owner")
    yield from serve(OwnOriginOnly(app, json_only=False))


@pytest.fixture(scope="module")
def json_port() -> Iterator[int]:
    """A server without a key that takes JSON only."""
    app = Starlette(routes=[Route("/{path:path}", show, methods=["GET", "POST", "PUT"])])
    yield from serve(OwnOriginOnly(app, json_only=True))


def ask(
    port: int, method: str = "GET", path: str = f"/{KEY}/x", body: str | None = None, **headers: str
) -> tuple[int, str, dict[str, str]]:
    """Send a request with exactly these headers, and return the status, the body and the headers of the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in {"Host": f"127.0.0.1:{port}", **headers}.items():
        connection.putheader(name.replace("_", "-"), value)
    if body is not None:
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(None if body is None else body.encode())
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text, {name.lower(): value for name, value in answer.getheaders()}


def basic(password: str) -> str:
    return f"Basic {base64.b64encode(f'anyone:{password}'.encode()).decode()}"


def test_a_key_is_random_and_long() -> None:
    assert new_key() != new_key()
    assert len(new_key()) == 43


def test_the_key_opens_as_part_of_the_path_as_a_token_and_as_a_password(port: int) -> None:
    assert ask(port)[:2] == (200, '{"path":"/x","body":""}')
    assert ask(port, path=f"/{KEY}/a%20b/c?d=e")[1] == '{"path":"/a b/c","body":""}'
    assert ask(port, path="/x", Authorization=f"Bearer {KEY}")[:2] == (200, '{"path":"/x","body":""}')
    assert ask(port, path="/x", Authorization=basic(KEY))[0] == 200
    status, _, headers = ask(port, path=f"/{KEY}")
    assert (status, headers["location"]) == (307, f"/{KEY}/")
    assert ask(port, path="/health")[0] == 200


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/x", {}),
        ("/", {}),
        ("/health/x", {}),
        (f"/{KEY}0/x", {}),
        (f"/{KEY[:-1]}/x", {}),
        (f"/x/{KEY}/", {}),
        (f"//{KEY}/x", {}),
        ("/%C3%A9/x", {}),
        ("/x", {"Authorization": f"Bearer {KEY}0"}),
        ("/x", {"Authorization": "Bearer "}),
        ("/x", {"Authorization": KEY}),
        ("/x", {"Authorization": basic(KEY[1:])}),
        ("/x", {"Authorization": "Basic not/base64!"}),
        ("/x", {"Authorization": "Basic /////w=="}),
        ("/x", {"Cookie": f"key={KEY}"}),
    ],
)
def test_without_the_key_nothing_is_answered(port: int, path: str, headers: dict[str, str]) -> None:
    status, text, answered = ask(port, path=path, **headers)
    assert (status, text) == (401, "refused: the key is missing or wrong; ask its owner\n")
    assert answered["www-authenticate"] == "Bearer"


FOREIGN_HOSTS = [
    "evil.example",
    "evil.example:{port}",
    "127.0.0.1.evil.example:{port}",
    "localhost.evil.example",
    "sub.localhost",
    "127.0.0.1:{port}@evil.example",
    "127.0.0.1:1:2",
    "localhost:",
    "0.0.0.0:{port}",
    "10.0.0.1",
    "",
]


@pytest.mark.parametrize("host", FOREIGN_HOSTS)
def test_a_rebound_host_is_refused(port: int, host: str) -> None:
    named = host.format(port=port)
    status, text, _ = ask(port, Host=named)
    assert status in (400, 403)
    if status == 403:
        assert text == (
            f"refused: the request is for {named!r}, and this server answers only for 127.0.0.1 or localhost\n"
        )


@pytest.mark.parametrize("host", ["127.0.0.1:{port}", "localhost:{port}", "LOCALHOST:9", "[::1]:{port}", "127.0.0.1"])
def test_the_names_of_this_machine_are_answered(port: int, host: str) -> None:
    assert ask(port, Host=host.format(port=port))[0] == 200


def test_two_hosts_and_two_origins_are_refused(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    for twice in (("Host", "evil.example"), ("Origin", EVIL)):
        connection.putrequest("GET", f"/{KEY}/x", skip_host=True)
        connection.putheader("Host", f"127.0.0.1:{port}")
        connection.putheader("Origin", f"http://127.0.0.1:{port}")
        connection.putheader(*twice)
        connection.endheaders()
        answer = connection.getresponse()
        answer.read()
        assert answer.status in (400, 403)
    connection.close()


@pytest.mark.parametrize(
    "origin", [EVIL, "null", "http://127.0.0.1:1", "https://127.0.0.1:{port}", "http://localhost:{port}"]
)
@pytest.mark.parametrize("method", ["OPTIONS", "GET", "POST"])
def test_a_page_of_another_origin_is_refused_even_with_the_key(port: int, method: str, origin: str) -> None:
    origin = origin.format(port=port)
    headers = {"Origin": origin, "Content_Type": "application/json", "Access_Control_Request_Method": "POST"}
    status, text, answered = ask(port, method, body="{}", **headers)
    assert (status, text) == (
        403,
        f"refused: the request comes from a page of {origin!r}, and not of http://127.0.0.1:{port}\n",
    )
    assert [name for name in answered if name.startswith("access-control")] == []


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_what_a_page_of_another_origin_embeds_or_posts_is_refused_and_a_link_opens(port: int, site: str) -> None:
    image = {"Sec_Fetch_Site": site, "Sec_Fetch_Mode": "no-cors", "Sec_Fetch_Dest": "image"}
    frame = {"Sec_Fetch_Site": site, "Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "iframe"}
    link = {"Sec_Fetch_Site": site, "Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "document"}
    refusal = (403, f"refused: a page of another origin sent the request (Sec-Fetch-Site: {site})\n")
    assert ask(port, **image)[:2] == refusal
    assert ask(port, **frame)[:2] == refusal
    assert ask(port, "POST", body="{}", Content_Type="application/json", **link)[:2] == refusal
    assert ask(port, **link)[0] == 200


def test_the_server_s_own_page_is_answered(port: int) -> None:
    own = {"Origin": f"http://127.0.0.1:{port}", "Sec_Fetch_Site": "same-origin", "Content_Type": "application/json"}
    status, text, headers = ask(port, "POST", body="{}", **own)
    assert (status, text) == (200, '{"path":"/x","body":"{}"}')
    assert headers["x-frame-options"] == "SAMEORIGIN"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert ask(port, Sec_Fetch_Site="none")[0] == 200


FORM = "application/x-www-form-urlencoded"
SIMPLE = ["", "text/plain", "text/plain;charset=UTF-8", FORM, "multipart/form-data; boundary=x"]


@pytest.mark.parametrize("kind", SIMPLE)
def test_a_post_that_a_page_can_send_without_asking_is_refused(port: int, json_port: int, kind: str) -> None:
    headers = {"Content_Type": kind} if kind else {}
    shown = kind.partition(";")[0]
    assert ask(port, "POST", body='{"a": 1}', **headers)[:2] == (
        415,
        f"refused: a POST with Content-Type {shown!r}; send application/json\n",
    )
    # to write a file into the store; a page of another origin would have to ask before it may PUT
    assert ask(port, "PUT", body="text", **headers)[0] == 200
    for method in ("POST", "PUT"):
        assert ask(json_port, method, "/x", body='{"a": 1}', **headers)[:2] == (
            415,
            f"refused: the body's Content-Type is {shown!r}; send application/json\n",
        )


def test_a_body_without_a_length_is_checked_too(json_port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", json_port, timeout=10)
    connection.request("POST", "/x", iter([b"{}"]), {"Content-Type": "text/plain"}, encode_chunked=True)
    assert connection.getresponse().status == 415
    connection.close()


def test_json_is_answered(json_port: int) -> None:
    assert ask(json_port, "POST", "/x", body="{}", Content_Type="Application/JSON; charset=utf-8")[0] == 200
    assert ask(json_port, "POST", "/x", Content_Length="0")[0] == 200


def test_a_websocket_of_another_page_or_without_the_key_is_not_opened(port: int) -> None:
    with connect(f"ws://127.0.0.1:{port}/{KEY}/socket", origin=f"http://127.0.0.1:{port}") as own:
        assert own.recv() == "open"
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    with_key = f"/{KEY}/socket"
    refused = [(with_key, {"Origin": EVIL}), (with_key, {"Origin": "null"}), (with_key, link), ("/socket", {})]
    for path, headers in refused:
        with pytest.raises(InvalidStatus) as failure:
            connect(f"ws://127.0.0.1:{port}{path}", additional_headers=headers)
        assert failure.value.response.status_code == 403
