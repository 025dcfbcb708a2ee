"""The process of ``sortd review``: its sockets, the file with its address, and uvicorn with limits of time and number.

It listens on 127.0.0.1, on a Unix socket, or on the sockets that systemd passes (sd_listen_fds(3)), and nowhere else.
"""

import asyncio
import os
import re
import signal
import sys
from collections.abc import Callable, Generator, Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from socket import AF_INET, AF_UNIX, SO_REUSEADDR, SOCK_STREAM, SOL_SOCKET
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
from sortd.service import (
    STOP,
    WAITING_CONNECTIONS,
    Notifier,
    Signalled,
    passed_sockets,
    signals_posted,
    socket_place,
    unix_socket,
)

PORT: Final = 8337
LOOPBACK: Final = "127.0.0.1"
URL_FILE: Final = "review.url"
"""The file in the state folder with the address of the page, its token included."""

NICENESS: Final = 10
"""The daemon's filing comes before pages and pictures; `benchmarks.review filing` measures how much they cost it."""
STOP_SECONDS: Final = 2
"""How long a stop waits for responses; streams of events end at once."""

_HOST = re.compile(r"([a-z0-9]([a-z0-9.-]*[a-z0-9])?|\[[0-9a-f:.]+\])(:[0-9]{1,5})?", re.IGNORECASE)


def serve(
    make_app: Callable[[Config], ASGIApp],
    config: Config,
    *,
    port: int | None = None,
    socket: Path | None = None,
    behind_proxy: str | None = None,
) -> None:
    """Serve the pages until a signal stops the process.

    ``make_app`` makes the pages when the sockets and the log are ready. They are served at ``port`` of 127.0.0.1 (0:
    any free one; default: ``PORT``) or on a Unix ``socket``; ``behind_proxy`` is the host of a proxy that ends TLS.

    Raises:
        StartupError: the address cannot be used.
    """
    logs.configure(config.log.format, config.log.level)
    os.nice(NICENESS)
    if behind_proxy is not None and not _HOST.fullmatch(behind_proxy):
        raise typer.BadParameter("give a host name, and a port if it is not 443", param_hint="--behind-proxy")
    notifier, log = Notifier(os.environ), structlog.get_logger("sortd")
    with listening(port, socket, os.environ) as sockets:
        access = Access(port=_common_port(sockets), proxy=behind_proxy)
        url = f"{_origin(sockets, behind_proxy)}/enter/{access.token}"
        with _url_file(config.state_dir, url) as file:

            def on_ready() -> None:
                places = [socket_place(one) for one in sockets]
                log.info(logs.REVIEW_READY, listens_on=places, url_file=os.fspath(file))
                if not logs.is_journal(sys.stdout, os.environ.get("JOURNAL_STREAM", "")):
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
    paths = [printable(socket_place(one)) for one in sockets if one.family == AF_UNIX]
    if paths:
        typer.echo(f"On the machine with the browser: ssh -L {PORT}:{paths[0]} HOST")
    typer.echo(f"Open {url}")
    sys.stdout.flush()


@contextmanager
def _url_file(state: Path, url: str) -> Iterator[Path]:
    """Write the address into a file that only this user can read; remove it at the end, unless it is another's.

    Raises StartupError: it cannot be written.
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


@contextmanager
def listening(port: int | None, path: Path | None, environ: MutableMapping[str, str]) -> Iterator[list[Socket]]:
    """Yield the sockets of this process: those that systemd passes, a Unix socket, or a port of loopback.

    Raises StartupError: the address is taken or not allowed.
    """
    if port is not None and path is not None:
        raise typer.BadParameter("give either --port or --socket")
    passed = passed_sockets(environ)
    if passed and (port is not None or path is not None):
        raise typer.BadParameter("omit --port and --socket: a socket unit of systemd has passed a socket")
    if path is not None:
        with unix_socket(path.absolute()) as listener:
            yield [listener]
        return
    with ExitStack() as stack:
        yield [stack.enter_context(one) for one in passed or [_loopback_socket(PORT if port is None else port)]]


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


def _common_port(sockets: Sequence[Socket]) -> int | None:
    """Return the port that all connections come through; None if one comes from a Unix socket, by any port of ssh."""
    ports = {None if one.family == AF_UNIX else int(one.getsockname()[1]) for one in sockets}
    return ports.pop() if len(ports) == 1 else None


def _origin(sockets: Sequence[Socket], proxy: str | None) -> str:
    """Return the origin of the pages for a browser: at the proxy, at a port, or at the near end of `ssh -L`."""
    ports = [one.getsockname()[1] for one in sockets if one.family != AF_UNIX]
    return f"https://{proxy}" if proxy is not None else f"http://{LOOPBACK}:{(*ports, PORT)[0]}"
