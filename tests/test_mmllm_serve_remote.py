"""Fetching for others: only public addresses, the one that was checked, at every hop, within limits."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mmllm.serve.remote import fetch, is_public


@pytest.mark.parametrize(("address", "public"), [
    ("8.8.8.8", True), ("2606:4700:4700::1111", True), ("127.0.0.1", False), ("10.1.2.3", False), ("172.16.0.1", False),
    ("192.168.1.1", False), ("169.254.169.254", False), ("100.64.0.1", False), ("0.0.0.0", False), ("224.0.0.1", False),
    ("255.255.255.255", False), ("::1", False), ("::", False), ("fe80::1%eth0", False), ("fd00::1", False), ("ff02::1", False),
    ("::ffff:10.0.0.1", False), ("64:ff9b::a00:1", False), ("2002:7f00:1::", False)])
def test_only_addresses_of_the_whole_internet_are_public(address: str, public: bool) -> None:
    assert is_public(address) is public


class Site(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        kind, _, rest = self.path[1:].partition("/")
        if kind == "to":
            self.send_response(302)
            self.send_header("Location", rest)
            self.end_headers()
        elif kind == "bytes":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"x" * int(rest))
        else:
            self.send_error(404)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def here(address: str) -> bool:
    return address == "127.0.0.1"


def test_a_file_is_fetched_also_behind_a_redirect(site: str) -> None:
    assert fetch(f"http://{site}/bytes/1000", 1000, allowed=here) == b"x" * 1000
    assert fetch(f"http://{site}/to//to/http://{site}/bytes/3", 1000, allowed=here) == b"xxx"


@pytest.mark.parametrize(("path", "sentence"), [
    ("bytes/1001", "over the limit of 1,000 bytes"), ("nothing", "answers with status 404"),
    ("to/http://127.0.0.2:1/x", "in a private network"), ("to/file:///etc/passwd", "not one of http"),
    ("to/http://user:pass@127.0.0.1/", "user name or password"), ("to/http://127.0.0.1:1/", "could not be read"),
    ("to/http://no.such.host.invalid/", "is not known"), ("to/", "redirected more than 3 times")])
def test_every_hop_is_checked(site: str, path: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        fetch(f"http://{site}/{path}", 1000, allowed=here)


def test_nothing_private_is_asked_by_default(site: str) -> None:
    with pytest.raises(ValueError, match="private network"):
        fetch(f"http://{site}/bytes/3", 1000)
