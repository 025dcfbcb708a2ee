"""The command ``encode``: the configured model, loaded once, for the sortd processes that use it by a socket."""

import os
import signal
import sys
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from socket import AF_UNIX
from socket import socket as Socket  # noqa: N812 -- a class; `socket` is the name of the option
from time import monotonic

import structlog
import typer

from sortd import logs
from sortd.config import SOCKET, Config
from sortd.core.schedule import PeriodicTimer
from sortd.daemon.resources import describe_encoder
from sortd.encoder.backends import load_fastest
from sortd.encoder.clip import Encoder, probe
from sortd.encoder.remote import Greeting
from sortd.encoder.server import EncoderMetrics, EncoderServer, most_images
from sortd.service import STOP, Notifier, Signalled, passed_sockets, signals_posted, socket_place, unix_socket

METRICS_SECONDS = 15.0  # between two writes of the metrics file, as for the daemon


def serve_encoder(
    config: Config,
    *,
    socket: Path | None = None,
    group: str | None = None,
    textfile: Path | None = None,
    environ: MutableMapping[str, str] = os.environ,
    load_encoder: Callable[[Config], Encoder] | None = None,
) -> None:
    """Serve the configured model until a signal stops the process.

    With ``backend: socket:PATH``, the configuration of a client, the backend is ``auto`` and PATH is the default of
    ``socket``. Members of ``group`` can connect; by default only this user can. Prometheus' collector of text files
    finds the metrics in ``textfile``. ``environ`` has the variables of systemd; ``load_encoder`` replaces the loader.

    Raises:
        StartupError: the socket cannot be used, or the model cannot be loaded.
    """
    logs.configure(config.log.format, config.log.level)
    path = socket or config.encoder_socket
    config = config if config.encoder_socket is None else config.model_copy(update={"backend": "auto"})
    notifier, log = Notifier(environ), structlog.get_logger()
    stop: Callable[[], object] = sys.exit  # while the model is being loaded

    def on_signal(signalled: Signalled) -> None:
        if signalled.number in {*STOP, signal.SIGHUP}:  # SIGHUP: its terminal was closed
            stop()

    with ExitStack() as closing:
        closing.callback(notifier.stopping)
        closing.enter_context(signals_posted(on_signal))
        sockets = closing.enter_context(_listening(path, group, environ))
        runs_on: list[str] = []
        encoder = load_encoder(config) if load_encoder else load_fastest(config, report=runs_on.append)
        greeting = greeting_of(encoder, config, describe_encoder(config, encoder, runs_on))
        metrics = EncoderMetrics()
        server = EncoderServer(encoder, greeting, metrics=metrics)
        stop = server.stop
        places = [socket_place(one) for one in sockets]
        log.info(logs.ENCODER_READY, listens_on=places, model=greeting.description, encoder_id=encoder.encoder_id)
        notifier.ready(f"listens on {', '.join(places)}, {greeting.description}")
        server.run(sockets, on_turn=_turn(server, textfile, notifier, metrics))
    log.info(logs.ENCODER_STOPPED)


def greeting_of(encoder: Encoder, config: Config, description: str) -> Greeting:
    """Return what clients are told of an encoder."""
    return Greeting(
        encoder_id=encoder.encoder_id,
        dimensions=encoder.dimensions,
        preprocessing=encoder.preprocessing,
        has_text=encoder.has_text,
        decoding=config.decoding.jpeg,
        runs_on=str(getattr(encoder, "runs_on", "CPU")),
        description=description,
        most_images=most_images(encoder, config.batch_size),
        known_rows=probe(encoder, texts=()),
    )


@contextmanager
def _listening(path: Path | None, group: str | None, environ: MutableMapping[str, str]) -> Iterator[list[Socket]]:
    """Yield the sockets that systemd passes, or a new one; raise StartupError if the path cannot be used."""
    if passed := passed_sockets(environ, families=(AF_UNIX,)):
        with ExitStack() as stack:
            yield [stack.enter_context(one) for one in passed]
        return
    if path is None:
        raise typer.BadParameter(f"give --socket PATH, or set `backend: {SOCKET}PATH`", param_hint="--socket")
    with unix_socket(path.absolute(), group=group) as listener:
        yield [listener]


def _turn(
    server: EncoderServer, textfile: Path | None, notifier: Notifier, metrics: EncoderMetrics
) -> Callable[[], None]:
    """Return what resets the watchdog and writes the metrics, when they are due."""
    timer = PeriodicTimer()

    def turn() -> None:
        now = monotonic()
        pings = notifier.watchdog_seconds and timer.is_due("ping", now, notifier.watchdog_seconds / 3)
        if pings and server.makes_progress:
            notifier.watchdog()
        if textfile is not None and timer.is_due("metrics", now, METRICS_SECONDS):
            try:
                metrics.write_textfile(os.fspath(textfile))
            except OSError as error:
                structlog.get_logger().warning(logs.DAEMON_HAMPERED, path=error.filename, error=error.strerror)

    return turn
