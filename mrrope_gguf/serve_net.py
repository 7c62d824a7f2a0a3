"""Addresses of a server: who can reach it, whether its port is free, and whether the RPC servers it needs answer."""

from __future__ import annotations

import errno
import ipaddress
import json
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Sequence

from .errors import EngineTrouble, Refused
from .text import printable

_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # where a server on every interface answers  # nosec B104
RPC_PORT = 50052  # ggml-rpc-server's default
_RPC_SECONDS = 3.0  # until an RPC server must have taken the connection


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine reach a server that listens on `host`.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("::1"), is_loopback("0.0.0.0")
    (True, True, True, False)
    """
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def url_of(host: str, port: int, scheme: str = "http") -> str:
    """The address to type on this machine; a server on every interface answers on the loopback device too.

    >>> url_of("127.0.0.1", 8080), url_of("0.0.0.0", 80), url_of("::", 80)
    ('http://127.0.0.1:8080', 'http://127.0.0.1:80', 'http://[::1]:80')
    """
    host = _LOOPBACK.get(host.strip("[]"), host.strip("[]"))
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def require_host(host: str) -> str:
    """One address to listen on. Refused for a list or a socket's path, which llama-server itself would take."""
    if "," in host or host.endswith(".sock") or not host.strip():
        raise Refused(
            f"--host {printable(host)!r}: serve listens on one address",
            why="lists and UNIX sockets are llama-server's own",
            fix="`mrrope export llama-server MODEL` prints the command, to which they can be added",
        )
    return host.strip().strip("[]")


def free_port(host: str, port: int) -> int:
    """`port`, or a free one where it is 0. Raises Refused where it is taken or the address is not this machine's."""
    try:
        return _bound(host, port)
    except socket.gaierror as error:
        raise Refused(f"--host {printable(host)}: no such address", why=str(error), fix="--host 127.0.0.1") from None
    except OSError as error:
        raise _cannot_listen(host, port, error) from error


def _bound(host: str, port: int) -> int:
    family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, proto) as probe:
        if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):  # Windows lets two programs share a port otherwise
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:  # as llama-server does: connections of a server that has just ended do not count
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)
        return int(probe.getsockname()[1])


def _cannot_listen(host: str, port: int, error: OSError) -> Refused:
    if error.errno == errno.EADDRINUSE:
        return Refused(
            f"{host}:{port}: the port is taken",
            why=f"{_who(host, port)} listens there",
            fix=f"stop it, or --port {_next_free(host, port)}",
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        fix = "--port 8080, or any other above 1023"
        return Refused(f"{host}:{port}: this port may not be taken", why=str(error), fix=fix)
    fix = "--host 127.0.0.1 for this machine alone, --host 0.0.0.0 for every network it is in"
    return Refused(f"{host}:{port}: the server cannot listen there", why=str(error), fix=fix)


def _who(host: str, port: int) -> str:
    try:
        with urllib.request.urlopen(f"{url_of(host, port)}/health", timeout=1) as answer:  # url_of's http  # nosec B310
            served = answer.headers.get("Server", "")
    except urllib.error.HTTPError as answered:  # a server that is still loading says 503
        served = answered.headers.get("Server", "")
    except (OSError, ValueError):
        served = ""
    return "a llama-server" if served == "llama.cpp" else "another program"


def _next_free(host: str, port: int) -> int:
    for other in range(port + 1, min(port + 100, 65536)):
        try:
            return _bound(host, other)
        except OSError:
            continue
    return 0


def rpc_servers(text: str) -> tuple[str, ...]:
    """The host:port of each RPC server in a list parted by commas; the port is 50052 where none is given.

    >>> rpc_servers("10.0.0.2:50052, box")
    ('10.0.0.2:50052', 'box:50052')
    """
    found = []
    for word in filter(None, map(str.strip, text.split(","))):
        host, colon, port = word.rpartition(":")
        if not colon:
            host, port = word, str(RPC_PORT)
        if not host or not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
            raise Refused(
                f"--rpc {printable(word)}: no such address", why="it is host:port", fix="--rpc 10.0.0.2:50052"
            )
        found.append(f"{host}:{port}")
    if not found:
        raise Refused("--rpc names no server", why="it is host:port,host:port", fix="--rpc 10.0.0.2:50052")
    return tuple(found)


def require_rpc(servers: Sequence[str], program: str) -> None:
    """EngineTrouble naming the first RPC server that takes no connection; llama-server would go on without it."""
    for server in servers:
        host, _, port = server.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_RPC_SECONDS).close()
        except OSError as error:
            raise EngineTrouble(
                f"--rpc {printable(server)}: no RPC server answers there",
                why=str(error),
                fix=f"on that machine: `{program} --host ADDRESS --port {port}`, ADDRESS being one this one reaches",
            ) from error


def healthy(url: str) -> bool:
    """Whether the server at `url` has its model loaded."""
    try:
        return bool(json.loads(_get(f"{url}/health"))["status"] == "ok")
    except (OSError, ValueError, LookupError, TypeError):
        return False


def has_page(url: str) -> bool:
    """Whether the server at `url` has a web page."""
    try:
        return b"<html" in _get(f"{url}/")[:10000]
    except (OSError, ValueError):
        return False


def _get(url: str) -> bytes:
    # our own server is asked, and only how it is: whose certificate it shows does not matter
    context = ssl._create_unverified_context() if url.startswith("https:") else None  # see above  # nosec B323
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity"})
    with urllib.request.urlopen(request, timeout=5, context=context) as answer:  # url_of's http or https  # nosec B310
        return bytes(answer.read())
