"""Downloads reach public addresses only, unless SFT_ALLOW_URLS allows private ones."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from sft.web import PRIVATE, VARIABLE, UrlRefused, is_public, open_url


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:4700:4700::1111", True),
        ("::ffff:93.184.216.34", True),
        ("64:ff9b::5db8:d822", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00:ec2::254", False),
        ("fec0::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::127.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b:1::7f00:1", False),
        ("2002:7f00:1::", False),
    ],
)
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert is_public(address) is public


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"content")


@pytest.fixture
def server() -> Iterator[str]:
    found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{found.server_port}"
    found.shutdown()
    found.server_close()


def test_an_image_of_a_private_address_is_fetched_only_if_that_is_allowed(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    for url in (server, server.replace("127.0.0.1", "localhost"), server.replace("http", "https")):
        with pytest.raises(OSError, match="is an address of this machine or of a private network"):
            open_url(url, timeout=5)
    with pytest.raises(UrlRefused, match="file:///etc/hosts is not an http or https URL"):
        open_url("file:///etc/hosts", timeout=5)
    monkeypatch.setenv(VARIABLE, PRIVATE)
    with open_url(server, timeout=5) as answer:
        assert answer.read() == b"content"


def test_a_name_is_checked_by_the_address_that_is_connected_to(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that was public a moment ago leads nowhere else when the connection is made."""
    monkeypatch.delenv(VARIABLE, raising=False)
    answers = iter(["93.184.216.34", "127.0.0.1"])
    resolved = []

    def resolve(host: str, port: int, *args: Any, **options: Any) -> list[Any]:
        resolved.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), port))]

    connected: list[Any] = []

    def connect(place: Any, *args: Any) -> socket.socket:
        connected.append(place)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(OSError, match="no network in tests"):
        open_url("http://rebinding.example/a.png", timeout=5)
    assert (resolved, connected) == (["rebinding.example"], [("93.184.216.34", 80)])
    with pytest.raises(OSError, match=r"127\.0\.0\.1 is an address of this machine"):
        open_url("http://rebinding.example/a.png", timeout=5)
    assert connected == [("93.184.216.34", 80)]
