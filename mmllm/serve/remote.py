"""A file from somebody else's server, for a client that only gave its URL.

The danger is that we stand where the client does not: a URL can name this machine, its network or a cloud's metadata service, at
once, by a redirect, or by a name that resolves to one thing when it is checked and to another when it is used. So every hop is
resolved once, refused unless all its addresses are public, and the connection goes to the very address that was checked."""

import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable
from urllib.parse import urljoin, urlsplit

REDIRECTS = 3
PORTS = {"http": 80, "https": 443}


def is_public(address: str) -> bool:
    """Whether the whole internet knows it by this address; addresses that carry another one are as private as that."""
    ip = ipaddress.ip_address(address.split("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in ipaddress.ip_network("64:ff9b::/96"):  # NAT64, RFC 6052 section 2.1
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None and not is_public(str(inner)):
            return False
    return ip.is_global and not ip.is_multicast


def fetch(url: str, max_bytes: int, timeout_s: float = 10.0, allowed: Callable[[str], bool] = is_public) -> bytes:
    """The body behind an http(s) URL. `allowed`: which addresses may be connected to. Errors: ValueError, one sentence."""
    end = time.monotonic() + timeout_s
    for _ in range(REDIRECTS + 1):
        answer = _get(url, max_bytes, end, allowed)
        if isinstance(answer, bytes):
            return answer
        url = urljoin(url, answer)
    raise ValueError(f"the URL was redirected more than {REDIRECTS} times")


def _get(url: str, max_bytes: int, end: float, allowed: Callable[[str], bool]) -> bytes | str:
    """One hop: the body, or where it points."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or PORTS.get(parts.scheme, 0)
    except ValueError as error:
        raise ValueError("the URL cannot be read") from error
    if parts.scheme not in PORTS or not host:
        raise ValueError("the URL is not one of http:// or https://")
    if parts.username is not None or parts.password is not None:
        raise ValueError("the URL holds a user name or password, which is never sent")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"the host {host} is not known") from error
    addresses = [str(entry[4][0]) for entry in found]
    if not addresses or not all(map(allowed, addresses)):
        raise ValueError(f"the host {host} is in a private network, which is never asked")
    connection = http.client.HTTPConnection(host, port, timeout=max(0.1, end - time.monotonic()))
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    try:
        sock = socket.create_connection((addresses[0], port), max(0.1, end - time.monotonic()))
        connection.sock = ssl.create_default_context().wrap_socket(sock, server_hostname=host) if parts.scheme == "https" else sock
        connection.request("GET", path, headers={"Accept": "image/*", "User-Agent": "mmllm", "Host": parts.netloc})
        answer = connection.getresponse()
        if answer.status in (301, 302, 303, 307, 308):
            return answer.getheader("Location") or ""
        if answer.status != 200:
            raise ValueError(f"{host} answers with status {answer.status}")
        body = bytearray()
        while piece := answer.read1(65_536):
            body += piece
            if len(body) > max_bytes:
                raise ValueError(f"the file behind the URL is over the limit of {max_bytes:,} bytes")
            if time.monotonic() > end:
                raise ValueError(f"{host} takes too long")
        return bytes(body)
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        raise ValueError(f"{host} could not be read ({type(error).__name__})") from error
    finally:
        connection.close()
