"""ASGI middleware for servers on loopback: refuse what other web pages send, and require a credential.

A browser sends requests of any web page to 127.0.0.1. So a server there needs more than its address: a page of another
origin must not reach it (`OwnOriginOnly`), and neither must another user of the machine (`KeyRequired`).
"""

from __future__ import annotations

import base64
import binascii
import hmac
import re
import secrets
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d{1,5})?", re.IGNORECASE)
"""Values of the header Host under which a server on loopback answers. Another name was rebound to 127.0.0.1 by DNS."""

SIMPLE_TYPES = {"", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"}
"""Content types that a page of another origin can post without asking the server first (CORS)."""

HEADERS = {
    # no frames in other pages, no leak of addresses to them, no reading as an image or a script
    "x-frame-options": "SAMEORIGIN",
    "content-security-policy": "frame-ancestors 'self'",
    "referrer-policy": "same-origin",
    "x-content-type-options": "nosniff",
    "cross-origin-resource-policy": "same-origin",
}


def new_key() -> str:
    """Return a random credential of 256 bits, which consists of letters, digits, `-` and `_`."""
    return secrets.token_urlsafe(32)


class OwnOriginOnly:
    """Refuse requests that a page of another origin sent, and requests for another host.

    Programs send neither `Origin` nor `Sec-Fetch-Site` and pass. From other pages, only links pass: they open a page in
    a tab, and the page that has the link can't read it.

    Args:
        app: The server's application.
        json_only: Refuse bodies of any type but JSON.
    """

    def __init__(self, app: ASGIApp, *, json_only: bool) -> None:
        self.app = app
        self.json_only = json_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on to the application, or answer why it is refused."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope, Headers(scope=scope))
        if refusal is not None:
            await refuse(scope, receive, send, *refusal)
            return
        await self.app(scope, receive, _with_headers(send) if scope["type"] == "http" else send)

    def _refusal(self, scope: Scope, headers: Headers) -> tuple[int, str] | None:
        hosts = headers.getlist("host")
        if len(hosts) != 1 or LOOPBACK.fullmatch(hosts[0]) is None:
            named = " and ".join(map(repr, hosts)) or "no host"
            return 403, f"refused: the request is for {named}, and this server answers only for 127.0.0.1 or localhost"
        own = f"http://{hosts[0]}".lower()
        foreign = [origin for origin in headers.getlist("origin") if origin.lower() != own]
        if foreign:
            return 403, f"refused: the request comes from a page of {foreign[0]!r}, and not of {own}"
        site = headers.get("sec-fetch-site", "none")
        if site not in ("same-origin", "none") and not _opens_a_page(scope, headers):
            return 403, f"refused: a page of another origin sent the request (Sec-Fetch-Site: {site})"
        return None if scope["type"] == "websocket" else self._refusal_of_body(scope, headers)

    def _refusal_of_body(self, scope: Scope, headers: Headers) -> tuple[int, str] | None:
        if headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers:
            return None
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if self.json_only and kind != "application/json":
            return 415, f"refused: the body's Content-Type is {kind!r}; send application/json"
        if scope["method"] == "POST" and kind in SIMPLE_TYPES:
            return 415, f"refused: a POST with Content-Type {kind!r}; send application/json"
        return None


class KeyRequired:
    """Refuse requests without the server's key.

    Args:
        app: The server's application.
        key: The key, as the token of `Authorization: Bearer`, or the password of `Authorization: Basic`.
        in_path: Accept the key also as the first part of the path, which is removed from it. A page's relative
            addresses then keep it, and, unlike a cookie, the browser never sends it to another port or by itself.
        open_paths: Paths that need no key.
        way_out: What to do, for the message of a refusal.
    """

    def __init__(
        self,
        app: ASGIApp,
        key: str,
        *,
        in_path: bool = False,
        open_paths: Collection[str] = ("/health",),
        way_out: str,
    ) -> None:
        self.app = app
        self.key = key
        self.in_path = in_path
        self.open_paths = frozenset(open_paths)
        self.way_out = way_out

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request with the key on to the application, or answer that it is missing."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        first, slash, rest = scope["path"].removeprefix("/").partition("/")
        if self.in_path and _same(first, self.key):
            if not slash:
                location = {"location": f"/{self.key}/"}
                await PlainTextResponse("", 307, location)(scope, receive, send)
                return
            raw = scope.get("raw_path") or scope["path"].encode()
            scope = {**scope, "path": f"/{rest}", "raw_path": raw[len(self.key) + 1 :]}
        elif scope["path"] not in self.open_paths and not self._is_authorized(Headers(scope=scope)):
            await refuse(scope, receive, send, 401, f"refused: the key is missing or wrong; {self.way_out}")
            return
        await self.app(scope, receive, send)

    def _is_authorized(self, headers: Headers) -> bool:
        scheme, _, value = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return _same(value.strip(), self.key)
        if scheme.lower() != "basic":
            return False
        try:
            password = base64.b64decode(value.strip(), validate=True).decode().partition(":")[2]
        except (binascii.Error, ValueError):
            return False
        return _same(password, self.key)


async def refuse(scope: Scope, receive: Receive, send: Send, status: int, why: str) -> None:
    """Answer a request with a status and a sentence; close a websocket before it opens."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": why[:120]})
        return
    # a browser opens no dialog for the scheme Bearer
    headers = {"www-authenticate": "Bearer"} if status == 401 else None
    await PlainTextResponse(why + "\n", status, headers)(scope, receive, send)


def _opens_a_page(scope: Scope, headers: Headers) -> bool:
    return (
        scope["type"] == "http"
        and scope["method"] in ("GET", "HEAD")
        and headers.get("sec-fetch-mode") == "navigate"
        and headers.get("sec-fetch-dest") == "document"
    )


def _same(given: str, key: str) -> bool:
    return hmac.compare_digest(given.encode(), key.encode())


def _with_headers(send: Send) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
        await send(message)

    return send_with_headers
