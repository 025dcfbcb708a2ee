"""The process of ``sortd review``: its sockets, the file with its address, and uvicorn with limits of time and number.

It listens on 127.0.0.1, on a Unix socket, or on the sockets that systemd passes (sd_listen_fds(3)), and nowhere else.
"""

import asyncio
import ipaddress
import os
import re
import signal
import stat
import sys
from collections.abc import Callable, Generator, Iterator, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from socket import AF_INET, AF_INET6, AF_UNIX, SO_ACCEPTCONN, SO_REUSEADDR, SO_TYPE, SOCK_STREAM, SOL_SOCKET
from socket import socket as Socket  # noqa: N812 -- a class; `socket` is the name of the option
from typing import Final

import h11
import structlog
import typer
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from sortd import logs
from sortd.commands.console import printable
from sortd.config import Config
from sortd.errors import AlreadyRunningError, StartupError, advice_for_write
from sortd.files import read_regular, write_atomic
from sortd.review.security import HEADER_BYTES, HEADERS, Access, error_page, secured
from sortd.service import STOP, Notifier, Signalled, signals_posted

PORT: Final = 8337
LOOPBACK: Final = "127.0.0.1"
URL_FILE: Final = "review.url"
"""The file in the state folder with the address of the page, its token included."""

FIRST_PASSED: Final = 3  # SD_LISTEN_FDS_START
WAITING_CONNECTIONS: Final = 64
NICENESS: Final = 10
"""The daemon's filing comes before pages and pictures; `benchmarks.review filing` measures how much they cost it."""
STOP_SECONDS: Final = 2
"""How long a stop waits for responses; streams of events end at once."""

_HOST = re.compile(r"([a-z0-9]([a-z0-9.-]*[a-z0-9])?|\[[0-9a-f:.]+\])(:[0-9]{1,5})?", re.IGNORECASE)
_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH


def serve(
    make_app: Callable[[Config], ASGIApp],
    config: Config,
    *,
    port: int | None = None,
    socket: Path | None = None,
    behind_proxy: str | None = None,
    environ: MutableMapping[str, str] = os.environ,
) -> None:
    """Serve the pages until a signal stops the process.

    Args:
        make_app: makes the pages, when the sockets and the log are ready.
        config: the state folder and the log.
        port: on 127.0.0.1; 0: any free one; default: ``PORT``.
        socket: path of a Unix socket, instead of a port.
        behind_proxy: the host of a proxy that ends TLS before this server.
        environ: the variables of systemd.

    Raises:
        StartupError: the address cannot be used.
    """
    logs.configure(config.log.format, config.log.level)
    os.nice(NICENESS)
    if behind_proxy is not None and not _HOST.fullmatch(behind_proxy):
        raise typer.BadParameter("give a host name, and a port if it is not 443", param_hint="--behind-proxy")
    notifier, log = Notifier(environ), structlog.get_logger("sortd")
    with listening(port, socket, environ) as sockets:
        access = Access(port=_common_port(sockets), proxy=behind_proxy)
        url = f"{_origin(sockets, behind_proxy)}/enter/{access.token}"
        with _url_file(config.state_dir, url) as file:

            def on_ready() -> None:
                places = [_place(one) for one in sockets]
                log.info(logs.REVIEW_READY, listens_on=places, url_file=os.fspath(file))
                if not logs.is_journal(sys.stdout, environ.get("JOURNAL_STREAM", "")):
                    _print_url(url, sockets)
                notifier.ready(f"listens on {', '.join(places)}")

            server = ReviewServer(server_config(secured(make_app(config), access), notifier), on_ready)

            def on_signal(signalled: Signalled) -> None:
                # SIGHUP: its terminal was closed.
                server.should_exit |= signalled.number in {*STOP, signal.SIGHUP}

            with signals_posted(on_signal):
                server.run(sockets=[*sockets])
    log.info(logs.REVIEW_STOPPED)


def _print_url(url: str, sockets: Sequence[Socket]) -> None:
    """Print the address to open, and how to reach a Unix socket from another machine."""
    paths = [printable(_place(one)) for one in sockets if one.family == AF_UNIX]
    if paths:
        typer.echo(f"On the machine with the browser: ssh -L {PORT}:{paths[0]} HOST")
    typer.echo(f"Open {url}")
    sys.stdout.flush()


@contextmanager
def _url_file(state: Path, url: str) -> Iterator[Path]:
    """Write the address into a file that only this user can read; remove it at the end, unless it is another's.

    Raises:
        StartupError: it cannot be written.
    """
    file, content = state / URL_FILE, f"{url}\n".encode()
    try:
        state.mkdir(parents=True, exist_ok=True)
        write_atomic(file, content, mode=0o600, durable=False)
    except OSError as error:
        advice = advice_for_write(error) or "run the command as the user that runs sortd, or correct state_dir"
        raise StartupError(f"{file} cannot be written: {error.strerror}; {advice}") from error
    try:
        yield file
    finally:
        with suppress(OSError):
            if read_regular(file) == content:
                file.unlink()


# ---------------------------------------------------------------- uvicorn


def server_config(
    app: ASGIApp, notifier: Notifier, *, protocol: type[asyncio.Protocol] | None = None
) -> uvicorn.Config:
    """Return the configuration of uvicorn: nothing from the environment, no trust in headers of a proxy, limits."""

    async def on_progress() -> None:
        notifier.watchdog()

    return uvicorn.Config(
        app,
        loop="asyncio",
        http=protocol or LimitedProtocol,
        ws="none",
        log_config=None,
        access_log=False,
        workers=1,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=STOP_SECONDS,
        callback_notify=on_progress if notifier.watchdog_seconds else None,
        timeout_notify=max(1, int(notifier.watchdog_seconds / 3)),
        h11_max_incomplete_event_size=HEADER_BYTES,
    )


class ReviewServer(uvicorn.Server):
    """uvicorn's server, which leaves signals to its caller and tells when it is ready."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        """Call ``on_ready`` once requests are answered."""
        super().__init__(config)
        self._on_ready = on_ready

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave the signals alone: uvicorn would raise them again after an orderly stop."""
        yield

    async def startup(self, sockets: list[Socket] | None = None) -> None:
        """Start, and tell that it has."""
        await super().startup(sockets=sockets)
        self._on_ready()


class LimitedProtocol(H11Protocol):
    """uvicorn's connection, with limits that uvicorn lacks: a client cannot keep one without sending or receiving."""

    head_seconds = 10.0
    """How long the head of a request may take; uvicorn waits for ever. ``security`` limits the body."""
    stalled_seconds = 30.0
    """How long a client may take to receive what was written."""
    most_connections = 64

    _head: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn does
        """Begin a connection, or end it if there are too many."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # `pause_writing` is called as soon as the client lags behind
        if len(self.connections) > self.most_connections:
            transport.abort()
        else:
            self._limit_head()

    def data_received(self, data: bytes) -> None:
        """Read a part of a request."""
        super().data_received(data)
        self._limit_head()

    def _limit_head(self) -> None:
        """Limit the time while the head of a request is not complete."""
        is_waiting = self.conn.their_state is h11.IDLE
        if self._head is None and is_waiting:
            self._head = self.loop.call_later(self.head_seconds, self.transport.abort)
        elif self._head is not None and not is_waiting:
            self._head.cancel()
            self._head = None

    def pause_writing(self) -> None:
        """Limit the time while the client does not receive."""
        super().pause_writing()
        self._stalled = self.loop.call_later(self.stalled_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """Continue to write."""
        if self._stalled is not None:
            self._stalled.cancel()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the connection."""
        for timer in (self._head, self._stalled):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer to what is no HTTP with a page like those of other errors."""
        del msg
        page = error_page(400)
        kind = [(b"content-type", b"text/html; charset=utf-8"), (b"content-length", str(len(page)).encode())]
        headers = [*kind, (b"connection", b"close"), (b"cache-control", b"no-store"), *HEADERS]
        with suppress(h11.LocalProtocolError):  # a response has already begun
            for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=page), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def shutdown(self) -> None:
        """End the connection at a stop of the server: after its response, but a stream of events at once.

        Pages are sent whole, so a response that has begun and is not complete is a stream, or its client is slow.
        """
        super().shutdown()
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.abort()


# ---------------------------------------------------------------- sockets


@contextmanager
def listening(port: int | None, path: Path | None, environ: MutableMapping[str, str]) -> Iterator[list[Socket]]:
    """Yield the sockets that this process listens on: those that systemd passes, a Unix socket, or a port of loopback.

    Raises:
        StartupError: the address is taken or not allowed.
    """
    if port is not None and path is not None:
        raise typer.BadParameter("give either --port or --socket")
    passed = passed_sockets(environ)
    if passed and (port is not None or path is not None):
        raise typer.BadParameter("omit --port and --socket: a socket unit of systemd has passed a socket")
    if path is not None:
        with _unix_socket(path.absolute()) as listener:
            yield [listener]
        return
    sockets = passed or [_loopback_socket(PORT if port is None else port)]
    try:
        yield sockets
    finally:
        for one in sockets:
            one.close()


def passed_sockets(environ: MutableMapping[str, str], *, first: int = FIRST_PASSED) -> list[Socket]:
    """Return the sockets that systemd passed to this process, and remove its variables, as sd_listen_fds(3) does.

    Raises:
        StartupError: one of them is no listening stream socket, is not of loopback, or has no permissions.
    """
    process, number = environ.pop("LISTEN_PID", ""), environ.pop("LISTEN_FDS", "")
    environ.pop("LISTEN_FDNAMES", None)
    if process != str(os.getpid()) or not number.isdigit():
        return []
    sockets: list[Socket] = []
    try:
        for descriptor in range(first, first + int(number)):
            os.set_inheritable(descriptor, False)
            sockets.append(Socket(fileno=descriptor))
            _check_passed(sockets[-1])
    except (OSError, StartupError) as error:
        for one in sockets:
            one.close()
        if isinstance(error, StartupError):
            raise
        raise StartupError(f"descriptor {descriptor} of systemd is no socket: {error.strerror}") from error
    return sockets


def _check_passed(one: Socket) -> None:
    """Raise StartupError unless a socket listens for streams, on loopback or at a path, which has permissions."""
    name = one.getsockname()
    if one.family in {AF_INET, AF_INET6}:
        is_local = ipaddress.ip_address(name[0]).is_loopback
    else:
        is_local = one.family == AF_UNIX and isinstance(name, str) and name.startswith("/")
    is_stream = one.getsockopt(SOL_SOCKET, SO_TYPE) == SOCK_STREAM
    if not (is_local and is_stream and one.getsockopt(SOL_SOCKET, SO_ACCEPTCONN)):
        raise StartupError(
            f"the socket unit passes {_place(one)!r}; sortd review listens only on 127.0.0.1, [::1], or the path of a "
            "Unix socket: correct ListenStream="
        )


def _loopback_socket(port: int) -> Socket:
    listener = Socket(AF_INET, SOCK_STREAM)
    try:
        listener.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
        listener.bind((LOOPBACK, port))
        listener.listen(WAITING_CONNECTIONS)
    except OSError as error:
        listener.close()
        raise AlreadyRunningError(
            f"port {port} cannot be used: {error.strerror}; if a sortd review runs already, the file {URL_FILE} in its "
            "state folder has its address; else choose another port with --port"
        ) from error
    return listener


@contextmanager
def _unix_socket(path: Path) -> Iterator[Socket]:
    """Yield a socket that only this user can connect to; remove it at the end."""
    _check_folder(path.parent)
    _remove_unused(path)
    with Socket(AF_UNIX, SOCK_STREAM) as listener:
        before = os.umask(0o177)
        try:
            listener.bind(os.fspath(path))
        except OSError as error:  # Python's own, for a long path, has no number
            why = error.strerror or str(error)
            raise StartupError(f"{path} cannot be a socket: {why}; name another path with --socket") from error
        finally:
            os.umask(before)
        own = os.lstat(path).st_ino
        listener.listen(WAITING_CONNECTIONS)
        try:
            yield listener
        finally:
            with suppress(OSError):
                if os.lstat(path).st_ino == own:
                    path.unlink()


def _check_folder(folder: Path) -> None:
    """Raise StartupError unless a folder is this user's and nobody else can put a socket there."""
    try:
        found = os.stat(folder)
    except OSError as error:
        raise StartupError(f"{folder} cannot be used: {error.strerror}; name another path with --socket") from error
    if found.st_uid != os.geteuid() or found.st_mode & _OTHERS_WRITE:
        raise StartupError(
            f"{folder} belongs to another user, or others can write to it; name a path in a folder of your own with "
            "--socket, for example in $XDG_RUNTIME_DIR"
        )


def _remove_unused(path: Path) -> None:
    """Remove a socket of this user that nobody listens on. Raises StartupError for anything else of that name."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.geteuid():
        raise StartupError(f"{path} exists and is no socket of this user; name another path with --socket")
    with Socket(AF_UNIX, SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except OSError:
            pass
    raise AlreadyRunningError(f"another program listens on {path}; stop it, or name another path with --socket")


def _common_port(sockets: Sequence[Socket]) -> int | None:
    """Return the port that all connections come through; None if one comes from a Unix socket, by any port of ssh."""
    ports = {None if one.family == AF_UNIX else int(one.getsockname()[1]) for one in sockets}
    return ports.pop() if len(ports) == 1 else None


def _origin(sockets: Sequence[Socket], proxy: str | None) -> str:
    """Return the origin of the pages for a browser: at the proxy, at a port, or at the near end of `ssh -L`."""
    ports = [one.getsockname()[1] for one in sockets if one.family != AF_UNIX]
    return f"https://{proxy}" if proxy is not None else f"http://{LOOPBACK}:{(*ports, PORT)[0]}"


def _place(one: Socket) -> str:
    """Return the address of a socket."""
    name = one.getsockname()
    return f"{name[0]}:{name[1]}" if isinstance(name, tuple) else os.fsdecode(name)
