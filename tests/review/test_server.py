"""The process of the review page: its sockets, its address, systemd's sockets and notifications, and its end."""

import fcntl
import os
import re
import signal
import socket
import stat
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from sortd.errors import AlreadyRunningError, ModelError, StartupError
from sortd.review import require_review_packages
from sortd.review.server import PORT, listening
from sortd.service import passed_sockets
from tests.command_line import sortd, write_config
from tests.daemon_process import PATIENCE_SECONDS
from tests.review.served import Reply, parsed, received_from
from tests.review.world import ReviewProcess


def served(folder: Path, *options: str, fds: Sequence[int] = ()) -> ReviewProcess:
    """Serve the application of the tests, with everything below a folder."""
    systemd = {"NOTIFY_SOCKET": f"{folder}/notify", "WATCHDOG_USEC": "1000000"}
    return ReviewProcess(write_config(folder), *options, program="tests.review.served", environment=systemd, fds=fds)


def events(review: ReviewProcess) -> list[str]:
    """Return the events of the log."""
    return re.findall(r'"event": "([a-z._]+)"', review.log)


def ask(connection: socket.socket, target: str, *lines: str, host: str = "localhost:8337") -> Reply:
    """Send a request over a connection, which ends."""
    with connection:
        head = [f"GET {target} HTTP/1.1", f"Host: {host}", *lines, "Connection: close", "", ""]
        connection.sendall("\r\n".join(head).encode())
        return parsed(received_from(connection))


def connected(place: Path | int) -> socket.socket:
    """Return a connection to a Unix socket or a port."""
    if isinstance(place, int):
        return socket.create_connection(("127.0.0.1", place), timeout=PATIENCE_SECONDS)
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(PATIENCE_SECONDS)
    connection.connect(os.fspath(place))
    return connection


def port_of(url: str) -> int:
    """Return the port in an address that was printed."""
    found = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/enter/[\w-]{43}", url)
    assert found is not None, url
    return int(found[1])


def entry_of(url: str) -> str:
    """Return the path in an address."""
    return "/" + url.split("/", 3)[3]


@pytest.fixture
def private(tmp_path: Path) -> Path:
    """A folder that only this user can write to."""
    folder = tmp_path / "private"
    folder.mkdir(mode=0o700)
    return folder


# ---------------------------------------------------------------- ports


def test_serve_on_a_port_listens_on_loopback_only_and_prints_its_address(tmp_path: Path) -> None:
    """The address gives a session; the same is in a file that only this user can read, until the end."""
    with served(tmp_path) as review:
        url = review.url
        port = port_of(url)
        addresses = Path(f"/proc/{review.process.pid}/net/tcp").read_text().splitlines()
        assert [line.split()[1] for line in addresses if f":{port:04X} 00000000:0000 0A" in line] == [
            f"0100007F:{port:04X}"
        ]
        url_file = tmp_path / "state" / "review.url"
        assert url_file.read_text() == f"{url}\n"
        assert stat.S_IMODE(url_file.stat().st_mode) == 0o600
        host = f"127.0.0.1:{port}"
        entered = ask(connected(port), entry_of(url), host=host)
        cookie = str(entered.headers["Set-Cookie"]).partition(";")[0]
        assert ask(connected(port), "/", f"Cookie: {cookie}", host=host).status == 200
        assert ask(connected(port), "/", f"Cookie: {cookie}").status == 421
        assert review.stop() == 0
        assert not url_file.exists()
        assert events(review) == ["review.ready", "review.refused", "review.stopped"]


def test_serve_never_logs_the_token(tmp_path: Path) -> None:
    """Others than this user may read logs."""
    with served(tmp_path) as review:
        url = review.url
        ask(connected(port_of(url)), entry_of(url), host=f"127.0.0.1:{port_of(url)}")
        assert review.stop() == 0
        assert f"Open {url}" in review.log
        assert review.log.count(url.rpartition("/")[2]) == 1


def test_command_serves_pages(tmp_path: Path) -> None:
    """`sortd review` is the same server."""
    with ReviewProcess(write_config(tmp_path), program="sortd") as review:
        url = review.url
        assert ask(connected(port_of(url)), entry_of(url), host=f"127.0.0.1:{port_of(url)}").status == 303
        assert review.stop(signal.SIGINT) == 0


def test_command_with_a_state_folder_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    """The address of the page has no place: a sentence, and no traceback."""
    (tmp_path / "state").write_text("a file")
    ran = sortd("review", "-c", write_config(tmp_path), "--port", 0)
    assert ran.code == 78
    assert f"{tmp_path / 'state' / 'review.url'} cannot be written: File exists" in ran.err
    assert "Traceback" not in ran.err


def test_command_on_a_port_in_use_says_where_the_page_is(tmp_path: Path) -> None:
    """Most often another review runs."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ran = sortd("review", "-c", write_config(tmp_path), "--port", port)
    assert ran.code == 75
    assert f"port {port} cannot be used: Address already in use" in ran.err
    assert "review.url" in ran.err


@pytest.mark.parametrize(
    "options",
    [
        ("--port", "0.0.0.0:80"), ("--port", "70000"), ("--port", "-1"), ("--host", "::"),
        ("--port", "0", "--socket", "x"), ("--behind-proxy", "https://example.org"), ("--behind-proxy", ""),
        ("--behind-proxy", "a b"), ("--behind-proxy", "a/b"), ("--behind-proxy", "a\r\nb"),
    ],
)  # fmt: skip
def test_command_with_wrong_options_is_usage(tmp_path: Path, options: tuple[str, ...]) -> None:
    """There is no option for another address than loopback."""
    assert sortd("review", "-c", write_config(tmp_path), *options).code == 2


def test_require_review_packages_names_the_extra() -> None:
    """Without it, a person gets the command that installs it."""
    require_review_packages()
    with pytest.raises(ModelError, match=r"needs starlette: pip install 'sortd-images\[review\]'") as raised:
        require_review_packages(lambda name: None if name == "starlette" else name)
    assert raised.value.exit_code == 69


def test_serve_behind_a_proxy_prints_its_address(tmp_path: Path) -> None:
    """The proxy has TLS; the server still listens on loopback."""
    with served(tmp_path, "--port", "0", "--behind-proxy", "review.example.org") as review:
        assert re.fullmatch(r"https://review\.example\.org/enter/[\w-]{43}", review.url)


# ---------------------------------------------------------------- Unix sockets


def test_serve_on_a_socket_is_for_this_user_only(tmp_path: Path, private: Path) -> None:
    """Mode 0600; the token is needed all the same, since others may reach the far end of `ssh -L`."""
    path = private / "review.sock"
    with served(tmp_path, "--socket", str(path)) as review:
        url = review.url
        found = path.lstat()
        assert (stat.S_ISSOCK(found.st_mode), stat.S_IMODE(found.st_mode)) == (True, 0o600)
        assert port_of(url) == PORT
        assert ask(connected(path), "/", host="localhost:9000").status == 403
        entered = ask(connected(path), entry_of(url), host="localhost:9000")
        cookie = str(entered.headers["Set-Cookie"]).partition(";")[0]
        assert ask(connected(path), "/", f"Cookie: {cookie}", host="localhost:9000").status == 200
        assert ask(connected(path), "/", f"Cookie: {cookie}", host="evil.example").status == 421
        assert review.stop() == 0
        assert not path.exists()


def test_serve_on_a_socket_says_how_to_reach_it(tmp_path: Path, private: Path) -> None:
    """A server has no browser: the command for the machine that has one is printed."""
    with served(tmp_path, "--socket", str(private / "review.sock")) as review:
        assert f"ssh -L 8337:{private}/review.sock HOST\n" in review.log


@contextmanager
def unix_socket(path: Path) -> Iterator[None]:
    """Listen as the server does."""
    with listening(None, path, {}):
        yield


def test_listening_on_a_stale_socket_replaces_it(private: Path) -> None:
    """A killed server leaves its socket."""
    path = private / "review.sock"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(os.fspath(path))
    before = path.lstat().st_ino, path.lstat().st_ctime_ns
    with unix_socket(path):
        assert (path.lstat().st_ino, path.lstat().st_ctime_ns) != before
        connected(path).close()
    assert not path.exists()


def test_listening_on_a_socket_in_use_is_refused(private: Path) -> None:
    """Another server keeps its socket."""
    path = private / "review.sock"
    with unix_socket(path):
        before = path.lstat()
        with pytest.raises(AlreadyRunningError, match="another program listens on"), unix_socket(path):
            pass
        assert os.path.samestat(before, path.lstat())
        connected(path).close()


def times_open(folder: Path) -> int:
    """Return how many descriptors of this process are open on a folder."""
    found = (os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd"))
    return sum(path == os.fspath(folder) for path in found)


def test_listening_of_two_at_once_is_of_one(private: Path) -> None:
    """While one takes the place of a stale socket, the other waits, and is then refused: it takes away no live one."""
    path, refused = private / "review.sock", threading.Event()

    def listen() -> None:
        try:
            with unix_socket(path):
                pass
        except AlreadyRunningError:
            refused.set()

    folder = os.open(private, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        second = threading.Thread(target=listen)
        with socket.socket(socket.AF_UNIX) as first:
            first.bind(os.fspath(path))
            second.start()
            while second.is_alive() and times_open(private) < 2:  # it tries to lock the folder
                time.sleep(0.005)
            first.listen()
            fcntl.flock(folder, fcntl.LOCK_UN)
            second.join()
    finally:
        os.close(folder)
    assert refused.is_set()


@pytest.mark.parametrize("kind", ["file", "folder", "link", "link to a socket"])
def test_listening_on_what_is_no_socket_removes_nothing(private: Path, kind: str) -> None:
    """A wrong path costs nobody a file."""
    path, other = private / "review.sock", private / "other"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(os.fspath(other))
    match kind:
        case "file":
            path.write_text("content")
        case "folder":
            path.mkdir()
        case "link":
            path.symlink_to("nowhere")
        case _:
            path.symlink_to(other)
    before = path.lstat()
    with pytest.raises(StartupError, match="is no socket of this user"), unix_socket(path):
        pass
    assert os.path.samestat(before, path.lstat())
    assert other.exists()


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_listening_in_a_folder_of_others_is_refused(private: Path, mode: int) -> None:
    """Others could put a socket of theirs in its place."""
    private.chmod(mode)
    with pytest.raises(StartupError, match="others can write to it"), unix_socket(private / "review.sock"):
        pass
    assert list(private.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_listening_in_a_folder_of_another_user_is_refused(private: Path) -> None:
    """Its owner could do that as well."""
    os.chown(private, 12345, -1)
    with pytest.raises(StartupError, match="belongs to another user"), unix_socket(private / "review.sock"):
        pass


def test_listening_on_an_impossible_path_says_why(private: Path) -> None:
    """A missing folder, and a path that is too long for a socket."""
    with pytest.raises(StartupError, match="No such file"), unix_socket(private / "nowhere" / "review.sock"):
        pass
    with pytest.raises(StartupError, match="too long"), unix_socket(private / ("x" * 120)):
        pass


def test_listening_removes_only_its_own_socket(private: Path) -> None:
    """Whatever took its place stays."""
    path = private / "review.sock"
    with unix_socket(path):
        path.unlink()
        path.write_text("of another program")
    assert path.read_text() == "of another program"


# ---------------------------------------------------------------- sockets of systemd


def test_serve_uses_the_socket_that_systemd_passes(tmp_path: Path, private: Path) -> None:
    """It was open before the server started, and stays when it ends."""
    path = private / "passed.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(path))
        listener.listen()
        waiting = connected(path)
        with served(tmp_path, fds=[listener.fileno()]) as review:
            assert ask(waiting, entry_of(review.url)).status == 303
            assert review.stop() == 0
        assert path.exists()
        connected(path).close()


def test_serve_uses_a_port_that_systemd_passes(tmp_path: Path) -> None:
    """The port of the Host is that of the socket; several sockets are served."""
    with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as second:
        with served(tmp_path, fds=[first.fileno()]) as review:
            url = review.url
            assert port_of(url) == first.getsockname()[1]
            assert ask(connected(port_of(url)), entry_of(url)).status == 421
            assert review.stop() == 0
        with served(tmp_path, fds=[first.fileno(), second.fileno()]) as review:
            entry = entry_of(review.url)
            for one in (first, second):
                port = int(one.getsockname()[1])
                assert ask(connected(port), entry, host=f"127.0.0.1:{port}").status == 303


def passed(*sockets: socket.socket | int, pid: int | None = None) -> list[socket.socket]:
    """Return the sockets that systemd would pass by these descriptors, which are moved to a row of numbers."""
    first = 200
    for at, one in enumerate(sockets):
        os.dup2(one if isinstance(one, int) else one.fileno(), first + at)
    environ = {"LISTEN_PID": str(pid or os.getpid()), "LISTEN_FDS": str(len(sockets)), "LISTEN_FDNAMES": "a", "A": "b"}
    found = passed_sockets(environ, first=first)
    assert environ == {"A": "b"}
    return found


def test_passed_sockets_are_not_inherited_by_children() -> None:
    """A decoder must not hold the address of the page."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        [one] = passed(listener)
        with one:
            assert not one.get_inheritable()


def test_passed_sockets_of_another_process_are_left_alone() -> None:
    """The variables of a parent do not count; sd_listen_fds(3) compares the process number."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert passed(listener, pid=1) == []
        os.close(200)
    assert passed_sockets({}) == []
    assert passed_sockets({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "many"}) == []


def test_passed_sockets_of_another_address_are_refused(tmp_path: Path) -> None:
    """A page about a person's pictures is on no network, and no socket without permissions."""
    with socket.create_server(("", 0)) as everywhere, pytest.raises(StartupError, match=r"0\.0\.0\.0:"):
        passed(everywhere)
    with socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind("\0sortd-review-test")
        abstract.listen()
        with pytest.raises(StartupError, match="correct ListenStream="):
            passed(abstract)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        datagrams.bind(("127.0.0.1", 0))
        with pytest.raises(StartupError, match="correct ListenStream="):
            passed(datagrams)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        with pytest.raises(StartupError, match="correct ListenStream="):
            passed(silent)
    with open(tmp_path / "file", "w") as file, pytest.raises(StartupError, match="no socket"):
        passed(file.fileno())
    os.close(200)


def test_command_with_a_passed_socket_takes_no_other_address(tmp_path: Path) -> None:
    """Two answers to one question are a mistake."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        pytest.raises(AssertionError, match="exit 2: "),
    ):
        ReviewProcess(write_config(tmp_path), "--port", "0", program="sortd", fds=[listener.fileno()])


def test_serve_notifies_systemd(tmp_path: Path) -> None:
    """Ready once it answers, then a sign of progress again and again."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"{tmp_path}/notify")
        manager.settimeout(PATIENCE_SECONDS)
        with served(tmp_path) as review:
            first = manager.recv(4096).decode()
            told = {first, *(manager.recv(4096).decode() for _ in range(3))}
            assert "WATCHDOG=1" in told
            assert [text for text in told if re.fullmatch(r"READY=1\nSTATUS=listens on 127\.0\.0\.1:\d+", text)]
            assert review.stop() == 0


# ---------------------------------------------------------------- the end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_serve_ends_on_a_signal_while_events_are_sent(tmp_path: Path, number: signal.Signals) -> None:
    """A browser with the page open keeps a stream; the server does not wait for it, and says nothing of it."""
    with served(tmp_path) as review:
        url = review.url
        host = f"127.0.0.1:{port_of(url)}"
        entered = ask(connected(port_of(url)), entry_of(url), host=host)
        cookie = str(entered.headers["Set-Cookie"]).partition(";")[0]
        with connected(port_of(url)) as stream, connected(port_of(url)):
            stream.sendall(f"GET /events HTTP/1.1\r\nHost: {host}\r\nCookie: {cookie}\r\n\r\n".encode())
            received = b""
            while received.count(b"an event") < 2:
                received += stream.recv(1 << 16)
            assert review.stop(number) == 0
        assert events(review) == ["review.ready", "review.stopped"]


def test_serve_leaves_the_address_of_another_server(tmp_path: Path) -> None:
    """With one state folder for two servers, the file has the address of the one that started last."""
    with served(tmp_path) as first, served(tmp_path) as second:
        assert first.stop() == 0
        assert (tmp_path / "state" / "review.url").read_text() == f"{second.url}\n"


def test_serve_replaces_a_link_at_the_place_of_its_address(tmp_path: Path) -> None:
    """The token is written into no file of another."""
    (tmp_path / "state").mkdir()
    (tmp_path / "other").write_text("content")
    link = tmp_path / "state" / "review.url"
    link.symlink_to(tmp_path / "other")
    with served(tmp_path):
        assert (tmp_path / "other").read_text() == "content"
        assert not link.is_symlink()


def test_threads_of_the_tests_have_ended() -> None:
    """Nothing of a server remains in this process."""
    assert [thread.name for thread in threading.enumerate() if thread.name == "review"] == []
