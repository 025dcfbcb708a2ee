"""The endpoint answers few pages to many clients, and lets none of them keep another out."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from http import HTTPStatus
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sortd.daemon.endpoint import MOST_BYTES, MOST_CONNECTIONS, Endpoint, Page
from sortd.errors import AlreadyRunningError, StartupError
from tests.daemon_process import PATIENCE_SECONDS

Address = tuple[str, int]
PAGES: dict[str, Callable[[], Page]] = {
    "/healthz": lambda: Page(HTTPStatus.OK, b"ok\n"),
    "/large": lambda: Page(HTTPStatus.OK, b"x" * 10_000_000),
}


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port that nothing listens on."""
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as free:
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def address() -> Iterator[Address]:
    """The address of a running endpoint."""
    where = ("127.0.0.1", free_port())
    with closing(Endpoint(where, PAGES)):
        yield where


def ask(address: Address, request: bytes) -> bytes:
    """Return all that the endpoint answers to the bytes of a request."""
    with socket.create_connection(address, timeout=PATIENCE_SECONDS) as client:
        with suppress(OSError):  # the endpoint may have answered, and closed, before all was sent
            client.sendall(request)
            client.shutdown(socket.SHUT_WR)
        return received(client)


def received(client: socket.socket) -> bytes:
    """Return what arrives until the other side closes."""
    pieces = []
    try:
        while piece := client.recv(65_536):
            pieces.append(piece)
    except ConnectionResetError:
        pass
    return b"".join(pieces)


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        ("GET /healthz HTTP/1.1", "200 OK"),
        ("GET /healthz?verbose=1 HTTP/1.0", "200 OK"),
        ("GET / HTTP/1.1", "404 Not Found"),
        ("GET /healthz/ HTTP/1.1", "404 Not Found"),
        ("GET /../healthz HTTP/1.1", "404 Not Found"),
        ("POST /healthz HTTP/1.1", "405 Method Not Allowed"),
        ("DELETE /healthz HTTP/1.1", "405 Method Not Allowed"),
        ("GET /healthz", "400 Bad Request"),
        ("GET /healthz SPDY/3", "400 Bad Request"),
        ("", "400 Bad Request"),
    ],
)
def test_endpoint_answers_each_request_with_its_status(address: Address, request_line: str, status: str) -> None:
    """Only GET and HEAD of a known path are served."""
    answer = ask(address, f"{request_line}\r\nHost: localhost\r\n\r\n".encode())
    assert answer.startswith(f"HTTP/1.1 {status}\r\n".encode())


def test_endpoint_answers_head_without_a_body(address: Address) -> None:
    """The length is that of the page."""
    answer = ask(address, b"HEAD /healthz HTTP/1.1\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert (b"Content-Length: 3" in head, body) == (True, b"")


def test_endpoint_with_a_head_that_is_too_long_answers_400(address: Address) -> None:
    """A client cannot fill the memory."""
    assert b"400" in ask(address, b"GET /healthz HTTP/1.1\r\nX: " + b"x" * (MOST_BYTES + 1))[:20]


def test_endpoint_sends_a_large_page_whole(address: Address) -> None:
    """A page larger than the buffers of a socket arrives in pieces."""
    answer = ask(address, b"GET /large HTTP/1.1\r\n\r\n")
    assert len(answer.partition(b"\r\n\r\n")[2]) == 10_000_000


@settings(deadline=None, max_examples=50)
@given(st.binary(max_size=300))
def test_endpoint_after_any_bytes_serves_the_next_client(address: Address, junk: bytes) -> None:
    """No request ends the thread."""
    ask(address, junk)
    assert ask(address, b"GET /healthz HTTP/1.1\r\n\r\n").endswith(b"\r\n\r\nok\n")


def test_endpoint_with_many_silent_clients_serves_others(address: Address) -> None:
    """Clients that send nothing, or read nothing, keep nobody out: the oldest connection is closed."""
    silent = [socket.create_connection(address, timeout=PATIENCE_SECONDS) for _ in range(3 * MOST_CONNECTIONS)]
    try:
        for number, client in enumerate(silent[-MOST_CONNECTIONS:]):
            client.sendall(b"GET /large HTTP/1.1\r\n\r\n" if number % 2 else b"GET /hea")
        assert ask(address, b"GET /healthz HTTP/1.1\r\n\r\n").endswith(b"ok\n")
        assert received(silent[0]) == b""
    finally:
        for client in silent:
            client.close()


def test_endpoint_closes_a_client_that_is_too_slow() -> None:
    """A connection has few seconds for its request, however it uses them."""
    where = ("127.0.0.1", free_port())
    with closing(Endpoint(where, PAGES, seconds=0.2)):
        with socket.create_connection(where, timeout=PATIENCE_SECONDS) as client:
            client.sendall(b"GET /healthz HT")
            assert received(client) == b""
        assert ask(where, b"GET /healthz HTTP/1.1\r\n\r\n").endswith(b"ok\n")


def test_endpoint_listens_on_ipv6() -> None:
    """The address may be that of IPv6."""
    try:
        where = ("::1", free_port("::1"))
    except OSError:
        pytest.skip("this machine has no IPv6")
    with closing(Endpoint(where, PAGES)):
        assert ask(where, b"GET /healthz HTTP/1.1\r\n\r\n").endswith(b"ok\n")


def test_endpoint_on_a_unix_socket_is_for_its_user(tmp_path: Path) -> None:
    """The socket is removed at the end."""
    path = tmp_path / "s"
    with closing(Endpoint(path, PAGES)), socket.socket(socket.AF_UNIX) as client:
        assert path.stat().st_mode & 0o777 == 0o600
        client.connect(str(path))
        client.sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
        assert received(client).endswith(b"ok\n")
    assert not path.exists()


def test_endpoint_on_a_taken_address_is_an_error() -> None:
    """The message names the address and what to do; nothing is left open."""
    threads = threading.active_count()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartupError, match=f"127.0.0.1 port {port}: Address already in use; name another"):
            Endpoint(("127.0.0.1", port), PAGES)
    assert threading.active_count() == threads


def test_endpoint_on_a_path_that_is_taken_names_the_setting(tmp_path: Path) -> None:
    """Other commands name the path of their socket by an option."""
    path = tmp_path / "s"
    with closing(Endpoint(path, PAGES)), pytest.raises(AlreadyRunningError, match=r"another path with metrics\.http"):
        Endpoint(path, PAGES)
    path.touch()
    with pytest.raises(StartupError, match=r"another path with metrics\.http"):
        Endpoint(path, PAGES)


def test_endpoint_is_free_after_close() -> None:
    """Nothing listens afterwards, and open connections are closed."""
    where = ("127.0.0.1", free_port())
    endpoint = Endpoint(where, PAGES)
    with socket.create_connection(where, timeout=PATIENCE_SECONDS) as client:
        endpoint.close()
        assert received(client) == b""
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(where)
