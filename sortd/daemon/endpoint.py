"""The HTTP endpoint of the daemon: a few pages that programs read, from one thread.

A request is answered from its head; its body is not read. Each connection carries one request and has few seconds; if
there are too many of them, the oldest is closed, so that clients which send nothing keep nobody else out. An address
that cannot be used is tried again and again: no image depends on it.
"""

import errno
import math
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Final

import structlog

from sortd import logs
from sortd.config_reporting import UNIX
from sortd.errors import StartupError
from sortd.service import unix_socket

SECONDS = 5.0
"""For a request and its answer."""
RETRY_SECONDS = 10.0
"""Until an address that could not be used is tried again."""
CLOSE_SECONDS = 5.0
"""For the end of the thread."""
MOST_CONNECTIONS = 32
MOST_BYTES = 8192
"""Of the head of a request."""
_PIECE = 65_536


@dataclass(frozen=True, slots=True)
class Page:
    """An answer."""

    status: HTTPStatus
    body: bytes
    content_type: str = "text/plain; charset=utf-8"


Pages = Mapping[str, Callable[[], Page]]
"""By path; called in the thread of the endpoint."""

Address = Path | tuple[str, int]
"""The path of a Unix socket, or an IP address and a port."""

_ADVICE: Final[Mapping[int, str]] = {
    errno.EADDRINUSE: "stop the program that uses it, or name another port",
    errno.EADDRNOTAVAIL: "name an address of this machine",
    errno.EACCES: "name a port from 1024 on, or give sortd the capability CAP_NET_BIND_SERVICE",
    errno.EAFNOSUPPORT: "let the service use this family of addresses (RestrictAddressFamilies=), or name another",
}


@dataclass(slots=True, eq=False)
class _Connection:
    """A client, and what was received from it or is left to send."""

    socket: socket.socket
    until: float
    received: bytearray = field(default_factory=bytearray)
    left: memoryview | None = None


class Endpoint:
    """Serves pages on an address until it is closed; the first try to listen is over when it is made.

    Later tries wait in its thread for the lock of a folder, or for a disk.
    """

    def __init__(
        self, address: Address | None, pages: Pages, *, seconds: float = SECONDS, retry_seconds: float = RETRY_SECONDS
    ) -> None:
        """Listen at the path of a Unix socket, for this user only, at an IP address and a port, or nowhere."""
        self.address = address
        self.problem: str | None = None  # why it does not listen, and what to do
        self._pages, self._seconds, self._retry_seconds = pages, seconds, retry_seconds
        self._connections: dict[_Connection, None] = {}  # the oldest first
        self._log: structlog.stdlib.BoundLogger = structlog.get_logger()
        self._closing = ExitStack()
        self._selector = self._closing.enter_context(selectors.DefaultSelector())
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closing.callback(os.close, self._wake)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._listener: socket.socket | None = None
        self._listening = ExitStack()  # closes it
        self._is_closing = False
        self._listen()
        self._thread = threading.Thread(target=self._run, name="endpoint", daemon=True)
        self._thread.start()

    def move(self, address: Address | None) -> None:
        """Listen somewhere else, or nowhere, soon; returns at once. One that could not be used is tried again."""
        if address != self.address:
            self.address, self.problem = address, None
        elif self.problem is None:
            return
        os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """Close all connections and end the thread, which is left alone if a disk does not respond."""
        self._is_closing = True
        os.eventfd_write(self._wake, 1)
        self._thread.join(CLOSE_SECONDS)
        if not self._thread.is_alive():
            self._closing.close()

    def facts(self) -> dict[str, object] | None:
        """Return the entry in ``sortd status``, as plain values; None without an address."""
        address = self.address
        return None if address is None else {"address": text_of_address(address), "problem": self.problem}

    def _listen(self) -> None:
        """Try to listen; log why that is not possible, each reason once."""
        if (address := self.address) is None:
            self._retry_at = math.inf
            return
        place = text_of_address(address)
        try:
            listener = self._listening.enter_context(listening_socket(address))
        except StartupError as error:
            if str(error) != self.problem and address == self.address:
                self.problem = str(error)
                self._log.error(logs.ENDPOINT_FAILED, address=place, error=self.problem)
            self._retry_at = time.monotonic() + self._retry_seconds
            return
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)
        self._listener, self.problem = listener, None
        self._log.info(logs.ENDPOINT_LISTENING, address=place)

    def _leave(self) -> None:
        """Close all connections and the listener; the address is tried at once."""
        for connection in list(self._connections):
            self._drop(connection)
        if self._listener is not None:
            self._selector.unregister(self._listener)
        self._listening.close()
        self._listener, self._retry_at = None, 0.0

    def _timeout(self) -> float | None:
        """Return the seconds until the next try, or the end of the oldest connection."""
        oldest = next(iter(self._connections), None)
        until = self._retry_at if self._listener is None else math.inf if oldest is None else oldest.until
        return None if until == math.inf else max(0.0, until - time.monotonic())

    def _run(self) -> None:
        while not self._is_closing:
            if self._listener is None and time.monotonic() >= self._retry_at:
                self._listen()
            for key, _ in self._selector.select(self._timeout()):
                if key.fileobj == self._wake:
                    os.eventfd_read(self._wake)
                    self._leave()
                    break
                if key.fileobj is self._listener:
                    self._accept(self._listener)
                elif key.data in self._connections:
                    self._go_on(key.data)
            now = time.monotonic()
            for connection in [one for one in self._connections if one.until <= now]:
                self._drop(connection)
        self._leave()

    def _accept(self, listener: socket.socket) -> None:
        if len(self._connections) >= MOST_CONNECTIONS:
            self._drop(next(iter(self._connections)))
        try:
            accepted, _ = listener.accept()
        except BlockingIOError:
            return
        except OSError:  # gone already, or out of descriptors, which is not tried again at once
            time.sleep(0.1)
            return
        accepted.setblocking(False)
        connection = _Connection(accepted, time.monotonic() + self._seconds)
        self._connections[connection] = None
        self._selector.register(accepted, selectors.EVENT_READ, connection)

    def _go_on(self, connection: _Connection) -> None:
        """Receive or send what is possible now."""
        try:
            if connection.left is None:
                self._receive(connection)
            if connection.left is not None:
                connection.left = connection.left[connection.socket.send(connection.left[:_PIECE]) :]
                if not connection.left:
                    self._drop(connection)
        except BlockingIOError:
            return
        except OSError:
            self._drop(connection)

    def _receive(self, connection: _Connection) -> None:
        received = connection.socket.recv(MOST_BYTES)
        connection.received += received
        is_complete = b"\r\n\r\n" in connection.received or b"\n\n" in connection.received
        if is_complete or len(connection.received) > MOST_BYTES:
            connection.left = memoryview(self._answer(bytes(connection.received), is_complete=is_complete))
            self._selector.modify(connection.socket, selectors.EVENT_WRITE, connection)
        elif not received:
            self._drop(connection)

    def _answer(self, head: bytes, *, is_complete: bool) -> bytes:
        words = head.partition(b"\n")[0].decode("latin-1").split()
        try:
            method, target, version = words
        except ValueError:
            is_complete, method, target, version = False, "", "", ""
        if not is_complete or not version.startswith("HTTP/1."):
            return _response(Page(HTTPStatus.BAD_REQUEST, b"bad request\n"))
        path = target.partition("?")[0]
        if path not in self._pages:
            known = " ".join(sorted(self._pages))
            return _response(Page(HTTPStatus.NOT_FOUND, f"not found; there are {known}\n".encode()))
        if method not in {"GET", "HEAD"}:
            return _response(Page(HTTPStatus.METHOD_NOT_ALLOWED, b"only GET and HEAD\n"), "Allow: GET, HEAD\r\n")
        return _response(self._pages[path](), with_body=method == "GET")

    def _drop(self, connection: _Connection) -> None:
        self._connections.pop(connection, None)
        with suppress(KeyError):
            self._selector.unregister(connection.socket)
        connection.socket.close()


def text_of_address(address: Address) -> str:
    """Return an address as the configuration writes it."""
    if isinstance(address, Path):
        return f"{UNIX}{address}"
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@contextmanager
def listening_socket(address: Address) -> Iterator[socket.socket]:
    """Yield a socket that listens. Raises StartupError."""
    if isinstance(address, Path):
        with unix_socket(address, setting="metrics.http") as listener:
            yield listener
        return
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    try:
        listener = socket.create_server(address, family=family)
    except (OSError, UnicodeError) as error:  # the latter for the zone of an address
        # create_server changes the texts of the system; errors of getaddrinfo(3) have numbers below 0.
        number = (error.errno or 0) if isinstance(error, OSError) else 0
        why = os.strerror(number) if number > 0 else getattr(error, "strerror", str(error))
        advice = _ADVICE.get(number, "name another address")
        place = text_of_address(address)
        raise StartupError(f"metrics.http: cannot listen on {place}: {why}; {advice}") from error
    with listener:
        yield listener


def _response(page: Page, more: str = "", *, with_body: bool = True) -> bytes:
    head = (
        f"HTTP/1.1 {page.status.value} {page.status.phrase}\r\nContent-Type: {page.content_type}\r\n"
        f"Content-Length: {len(page.body)}\r\nCache-Control: no-store\r\nConnection: close\r\n{more}\r\n"
    )
    return head.encode("latin-1") + (page.body if with_body else b"")
