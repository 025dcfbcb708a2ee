"""The endpoint answers few pages to many clients, and lets none of them keep another out."""

import fcntl
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from http import HTTPStatus
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from sortd.daemon.endpoint import MOST_BYTES, MOST_CONNECTIONS, Endpoint, Page
from sortd.service import unix_socket
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


def wait_until(is_true: Callable[[], bool]) -> None:
    """Wait until something is true."""
    until = time.monotonic() + PATIENCE_SECONDS
    while not is_true():
        assert time.monotonic() < until
        time.sleep(0.005)


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


@pytest.mark.parametrize(
    ("where", "said"),
    [
        (lambda _: ("192.0.2.1", 9464), "metrics.http: cannot listen on 192.0.2.1:9464: "),
        (lambda _: ("fe80::1%none", 9464), "metrics.http: cannot listen on [fe80::1%none]:9464: "),
        (lambda _: ("fe80::1%a..b", 9464), "metrics.http: cannot listen on [fe80::1%a..b]:9464: "),
        (lambda _: (f"fe80::1%{'x' * 64}", 9464), "metrics.http: cannot listen on [fe80::1%xx"),
        (lambda folder: folder / "missing" / "s", "missing cannot be used: No such file"),
        (lambda folder: folder / "file" / "s", "file/s cannot be "),
        (lambda folder: folder / "open" / "s", "others can write to it"),
        (lambda folder: folder / "file", "file exists and is no socket"),
        (lambda folder: folder / "open", "open exists and is no socket"),
        (lambda folder: folder / "link", "link exists and is no socket"),
        (lambda folder: folder / ("x" * 120), "cannot be a socket: AF_UNIX path too long; name another path"),
        (lambda folder: folder / ("x" * 300), "cannot be a socket: File name too long; name another path"),
    ],
)
def test_endpoint_whose_address_cannot_be_used_says_why(
    tmp_path: Path, where: Callable[[Path], Path | Address], said: str
) -> None:
    """It is no error; nothing is left open; the message names the address, and what to do."""
    (tmp_path / "file").touch()
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "link").symlink_to("nowhere")
    threads = threading.active_count()
    with capture_logs() as lines:
        endpoint = Endpoint(where(tmp_path), PAGES)
        endpoint.close()
    assert [(line["event"], line["log_level"]) for line in lines] == [("endpoint.failed", "error")]
    assert said in lines[0]["error"]
    assert "; " in lines[0]["error"]
    assert endpoint.facts() == {"address": lines[0]["address"], "problem": lines[0]["error"]}
    assert threading.active_count() == threads


def test_endpoint_on_a_privileged_port_says_what_to_do() -> None:
    """A service needs a capability for it."""
    if os.geteuid() == 0 or Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text().strip() == "0":
        pytest.skip("this user may use every port")
    with closing(Endpoint(("127.0.0.1", 1), PAGES)) as endpoint:
        assert endpoint.problem is not None
        assert "127.0.0.1:1: Permission denied; name a port from 1024 on, or" in endpoint.problem


def test_endpoint_on_a_taken_port_listens_when_it_is_free() -> None:
    """It says once that the port is taken, however often it tries, and that it listens."""
    with capture_logs() as lines, socket.create_server(("127.0.0.1", 0)) as taken:
        where = ("127.0.0.1", int(taken.getsockname()[1]))
        with closing(Endpoint(where, PAGES, retry_seconds=0.01)) as endpoint:
            tried = endpoint._retry_at
            wait_until(lambda: endpoint._retry_at > tried + 0.05)
            taken.close()
            wait_until(lambda: endpoint.problem is None)
            assert ask(where, b"GET /healthz HTTP/1.1\r\n\r\n").endswith(b"ok\n")
    place = f"127.0.0.1:{where[1]}"
    assert [(line["event"], line["address"]) for line in lines] == [
        ("endpoint.failed", place),
        ("endpoint.listening", place),
    ]
    assert f"{place}: Address already in use; stop the program that uses it, or name another port" in lines[0]["error"]


def test_endpoint_on_a_taken_path_listens_when_it_is_free(tmp_path: Path) -> None:
    """What stands there, a socket that is used or a file, is left alone; each reason is said."""
    path = tmp_path / "s"
    path.touch()
    with capture_logs() as lines, closing(Endpoint(path, PAGES, retry_seconds=0.01)) as endpoint:
        path.unlink()
        with unix_socket(path):
            wait_until(lambda: "another program listens" in str(endpoint.problem))
        wait_until(lambda: endpoint.problem is None)
        assert path.is_socket()
    assert {line["event"] for line in lines[:-1]} == {"endpoint.failed"}
    assert all("another path with metrics.http" in line["error"] for line in lines[:-1])
    assert lines[-1]["event"] == "endpoint.listening"


def test_endpoint_in_a_folder_that_is_locked_waits_a_moment_only(tmp_path: Path) -> None:
    """Any user who can read the folder can lock it: sortd must not wait for that for ever."""
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    with closing(Endpoint(tmp_path / "s", PAGES)) as endpoint:
        assert f"another program has locked {tmp_path}" in str(endpoint.problem)
    os.close(folder)


def is_refused(address: Address) -> bool:
    """Return whether nothing listens at an address."""
    try:
        socket.create_connection(address).close()
    except ConnectionRefusedError:
        return True
    return False


def test_move_endpoint_leaves_the_address_and_takes_another() -> None:
    """Also none; a problem is looked at again at once, and where it listens already, its clients stay."""
    first, second = ("127.0.0.1", free_port()), ("127.0.0.1", free_port())
    with closing(Endpoint(first, PAGES)) as endpoint:
        with socket.create_connection(first, timeout=PATIENCE_SECONDS) as client:
            endpoint.move(first)
            client.sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
            assert received(client).endswith(b"ok\n")
        endpoint.move(second)
        wait_until(lambda: not is_refused(second))
        assert is_refused(first)
        with socket.create_server(first):
            endpoint.move(first)
            wait_until(lambda: endpoint.problem is not None)
        endpoint.move(first)
        wait_until(lambda: endpoint.problem is None)
        assert ask(first, b"GET /healthz HTTP/1.1\r\n\r\n").endswith(b"ok\n")
        endpoint.move(None)
        wait_until(lambda: is_refused(first))
        assert endpoint.facts() is None


def test_move_endpoint_to_a_locked_folder_does_not_wait_for_it(tmp_path: Path) -> None:
    """The loop reloads the configuration: it must not wait for a lock that another user can hold."""
    (tmp_path / "locked").mkdir()
    folder = os.open(tmp_path / "locked", os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    with closing(Endpoint(tmp_path / "s", PAGES)) as endpoint:
        endpoint.move(tmp_path / "locked" / "s")
        assert endpoint.problem is None  # not known yet
        os.close(folder)
        wait_until((tmp_path / "locked" / "s").is_socket)
        assert not (tmp_path / "s").exists()
    assert not (tmp_path / "locked" / "s").exists()


@pytest.mark.parametrize("where", [lambda _: ("127.0.0.1", free_port()), lambda folder: folder / "s"])
def test_endpoint_without_descriptors_listens_when_there_are_some(
    tmp_path: Path, where: Callable[[Path], Path | Address]
) -> None:
    """No error of the system ends its thread."""
    address, limits = where(tmp_path), resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as last, closing(Endpoint(None, PAGES, retry_seconds=0.01)) as endpoint:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (last.fileno(), limits[1]))
            endpoint.move(address)
            wait_until(lambda: "Too many open files" in str(endpoint.problem))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        wait_until(lambda: endpoint.problem is None)


def test_endpoint_is_free_after_close() -> None:
    """Nothing listens afterwards, and open connections are closed."""
    where = ("127.0.0.1", free_port())
    endpoint = Endpoint(where, PAGES)
    with socket.create_connection(where, timeout=PATIENCE_SECONDS) as client:
        endpoint.close()
        assert received(client) == b""
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(where)
