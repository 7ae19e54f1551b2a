"""Limits of downloads from URLs: no private addresses and, for data files, no redirects, unless the user allows them.

URLs of sources and images may come from other people. A private address would reach servers that only this machine can
reach, such as the credentials service of a cloud, and a redirect would lead there from a harmless URL. The environment
variable SFT_ALLOW_URLS (`private`, `redirects`, or both with a comma) allows them. It is not a key of params.yaml, as
who writes the URL must not be the one who allows it. Addresses are checked where the connection is made, so a host name
can't change its address between check and use.
"""

from __future__ import annotations

import http.client
import os
import socket
import urllib.error
import urllib.request
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import Any, NoReturn
from urllib.parse import urlsplit

VARIABLE = "SFT_ALLOW_URLS"

PRIVATE, REDIRECTS = "private", "redirects"

# The only IPv6 addresses that are routed on the internet, and those whose last four bytes are an IPv4 address that a
# gateway connects to.
INTERNET, NAT64 = IPv6Network("2000::/3"), IPv6Network("64:ff9b::/96")


class UrlRefused(OSError):
    """A URL leads to a private address or is redirected; the message states how to allow it."""


def is_allowed(what: str) -> bool:
    """Return whether the environment variable SFT_ALLOW_URLS allows `private` or `redirects`.

    Raises:
        ValueError: The variable contains another word.
    """
    words = {word.strip() for word in os.environ.get(VARIABLE, "").split(",")} - {""}
    unknown = sorted(words - {PRIVATE, REDIRECTS})
    if unknown:
        raise ValueError(f"{VARIABLE}: {', '.join(unknown)}: only `{PRIVATE}` and `{REDIRECTS}` can be allowed")
    return what in words


def is_public(address: str) -> bool:
    """Return whether an IP address is one of the public internet.

    An IPv6 address that contains an IPv4 address is as public as that one.
    """
    found = ip_address(address.partition("%")[0])
    if isinstance(found, IPv6Address):
        inner = _inner(found)
        if inner is None:
            return found.is_global and found in INTERNET
        found = inner
    return found.is_global and not found.is_multicast


def _inner(address: IPv6Address) -> IPv4Address | None:
    """Return the IPv4 address in an IPv6 address: mapped, compatible, 6to4, Teredo or NAT64; None if there is none."""
    if address in NAT64 or int(address) >> 32 == 0:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)


def check_host(host: str) -> None:
    """Check that a host name or address leads to public addresses only, before another library connects to it.

    Raises:
        UrlRefused: It has a private address, and SFT_ALLOW_URLS does not allow that.
        OSError: The name can't be resolved.
    """
    if not is_allowed(PRIVATE):
        for *_, address in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM):
            _check_address(str(address[0]))


def _check_address(address: str) -> None:
    if not is_public(address):
        raise UrlRefused(
            f"{address} is an address of this machine or of a private network; save the file in data/, or allow such "
            f"addresses: {VARIABLE}={PRIVATE}"
        )


@dataclass(frozen=True)
class LimitedClient:
    """Maker of aiohttp sessions for fsspec (its option `get_client`) that keep to the limits.

    Args:
        private: Whether private addresses are allowed.
        redirects: Whether redirects are followed.
    """

    private: bool
    redirects: bool

    async def __call__(self, **options: Any) -> Any:
        """Return a session; `options` are those of `aiohttp.ClientSession`."""
        import aiohttp

        trace = aiohttp.TraceConfig()
        if not self.redirects:
            trace.on_request_redirect.append(_refuse_redirect)
        options["trace_configs"] = [*options.get("trace_configs", ()), trace]
        if not self.private:
            options["connector"] = aiohttp.TCPConnector(socket_factory=_public_socket)
        return aiohttp.ClientSession(**options)


def limited_client() -> LimitedClient:
    """Return the maker of sessions for what SFT_ALLOW_URLS allows."""
    return LimitedClient(is_allowed(PRIVATE), is_allowed(REDIRECTS))


def _public_socket(address: tuple[Any, ...]) -> socket.socket:
    family, kind, protocol, _, place = address
    _check_address(str(place[0]))
    made = socket.socket(family, kind, protocol)
    made.setblocking(False)
    return made


async def _refuse_redirect(session: Any, context: Any, event: Any) -> NoReturn:
    target = str(event.response.headers.get("Location", "")).split("?", 1)[0]
    raise UrlRefused(
        f"the server redirects to {target[:200]!r}; give that address, or allow redirects: {VARIABLE}={REDIRECTS}"
    )


def open_url(url: str, timeout: float) -> Any:
    """Open a URL as `urllib.request.urlopen` does, but refuse private addresses; redirects are followed.

    Args:
        url: An http or https URL.
        timeout: Seconds that one step of the connection may take.

    Raises:
        UrlRefused: It leads to a private address, at once or by a redirect, and SFT_ALLOW_URLS does not allow that.
        OSError: It can't be opened.
    """
    if is_allowed(PRIVATE):
        return urllib.request.urlopen(url, timeout=timeout)
    opener = urllib.request.OpenerDirector()
    for handler in (
        _ProxyHandler(),
        _HTTPHandler(),
        _HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    try:
        found = opener.open(url, timeout=timeout)
    except urllib.error.URLError as error:
        if isinstance(error.reason, UrlRefused):
            raise error.reason from None
        raise
    if found is None:
        raise UrlRefused(f"{url} is not an http or https URL")
    return found


def _connect_publicly(place: tuple[str, int], timeout: Any = None, source: Any = None) -> socket.socket:
    """Connect like `socket.create_connection`, but to public addresses only."""
    problem: OSError = OSError(f"{place[0]} has no address")
    for *_, found in socket.getaddrinfo(place[0], place[1], type=socket.SOCK_STREAM):
        address = str(found[0])
        _check_address(address)
        try:
            return socket.create_connection((address, place[1]), timeout, source)
        except OSError as error:
            problem = error
    raise problem


class _HTTPConnection(http.client.HTTPConnection):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._create_connection = _connect_publicly


class _HTTPSConnection(http.client.HTTPSConnection):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._create_connection = _connect_publicly


class _HTTPHandler(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(http.client.HTTPConnection if _is_proxied(req) else _HTTPConnection, req)


class _HTTPSHandler(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> Any:
        made = http.client.HTTPSConnection if _is_proxied(req) else _HTTPSConnection
        return self.do_open(made, req, context=self._context)  # type: ignore[attr-defined]


class _ProxyHandler(urllib.request.ProxyHandler):
    """Handler of the user's proxy, which may have a private address; the host of the URL may not."""

    def proxy_open(self, req: urllib.request.Request, proxy: str, type: str) -> Any:
        host = urlsplit(req.full_url).hostname or ""
        if not urllib.request.proxy_bypass(host):
            check_host(host)
            req.sft_is_proxied = True  # type: ignore[attr-defined]
        return super().proxy_open(req, proxy, type)


def _is_proxied(request: urllib.request.Request) -> bool:
    return getattr(request, "sft_is_proxied", False)
