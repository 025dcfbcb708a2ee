"""The HTTP endpoint of the daemon: a few pages that programs read, from one thread.

A request is answered from its head; its body is not read. Each connection carries one request and has few seconds; if
there are too many of them, the oldest is closed, so that clients which send nothing keep nobody else out.
"""

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

from sortd.errors import StartupError
from sortd.service import unix_socket

SECONDS = 5.0
"""For a request and its answer."""
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


@dataclass(slots=True, eq=False)
class _Connection:
    """A client, and what was received from it or is left to send."""

    socket: socket.socket
    until: float
    received: bytearray = field(default_factory=bytearray)
    left: memoryview | None = None


class Endpoint:
    """Serves pages on an address until it is closed."""

    def __init__(self, address: Path | tuple[str, int], pages: Pages, *, seconds: float = SECONDS) -> None:
        """Listen at the path of a Unix socket, for this user only, or at an IP address and a port.

        Raises:
            StartupError: the address cannot be used.
        """
        self._pages, self._seconds = pages, seconds
        self._connections: dict[_Connection, None] = {}  # the oldest first
        self._selector = selectors.DefaultSelector()
        self._closing = ExitStack()
        self._closing.callback(self._selector.close)
        try:
            self._listener = self._closing.enter_context(_listening(address))
            self._listener.setblocking(False)
            self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        except BaseException:
            self._closing.close()
            raise
        self._closing.callback(os.close, self._wake)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="endpoint", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Close all connections and end the thread."""
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        self._closing.close()

    def _run(self) -> None:
        while True:
            oldest = next(iter(self._connections), None)
            timeout = None if oldest is None else max(0.0, oldest.until - time.monotonic())
            for key, _ in self._selector.select(timeout):
                if key.fileobj == self._wake:
                    for connection in list(self._connections):
                        self._drop(connection)
                    return
                if key.fileobj is self._listener:
                    self._accept()
                elif key.data in self._connections:
                    self._go_on(key.data)
            now = time.monotonic()
            for connection in [one for one in self._connections if one.until <= now]:
                self._drop(connection)

    def _accept(self) -> None:
        if len(self._connections) >= MOST_CONNECTIONS:
            self._drop(next(iter(self._connections)))
        try:
            accepted, _ = self._listener.accept()
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


@contextmanager
def _listening(address: Path | tuple[str, int]) -> Iterator[socket.socket]:
    """Yield a socket that listens. Raises StartupError."""
    if isinstance(address, Path):
        with unix_socket(address, setting="metrics.http") as listener:
            yield listener
        return
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    try:
        listener = socket.create_server(address, family=family)
    except OSError as error:
        raise StartupError(
            f"metrics.http: cannot listen on {address[0]} port {address[1]}: {os.strerror(error.errno or 0)}; name "
            "another address, or stop the program that uses it"
        ) from error
    with listener:
        yield listener


def _response(page: Page, more: str = "", *, with_body: bool = True) -> bytes:
    head = (
        f"HTTP/1.1 {page.status.value} {page.status.phrase}\r\nContent-Type: {page.content_type}\r\n"
        f"Content-Length: {len(page.body)}\r\nCache-Control: no-store\r\nConnection: close\r\n{more}\r\n"
    )
    return head.encode("latin-1") + (page.body if with_body else b"")
