"""Counts for Prometheus in a registry of sortd's own, by text file or over HTTP on this machine alone."""

import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIRequestHandler, make_server

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import ThreadingWSGIServer

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

from sortd.files import write_atomic

# A packaged model decides in milliseconds, a large one on a loaded CPU in seconds; settling takes as long as a copy.
_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
_READABLE_BY_ALL = 0o644
HEALTH_PATH = "/healthz"


class _Silent(WSGIRequestHandler):
    """Answers without a line on stderr for each request."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- the library's name
        """Log nothing."""


class Metrics:
    """The counts of one process."""

    def __init__(self) -> None:
        """Begin at zero."""
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # their moment of birth is noise
        self._registry = own = CollectorRegistry()
        by = ("dataset",)
        images = "Images whose way ended, by outcome."
        held = "1 where a dataset is held by a fault of its folders, its journal or its disk, else 0."
        lost = "Times that the watcher lost hints and a scan had to heal it."
        self._images = Counter("sortd_images", images, (*by, "outcome"), registry=own)
        self._seconds = Histogram(
            "sortd_image_seconds", "Time that images spent in a stage.", ("stage",), registry=own, buckets=_BUCKETS
        )
        self._backlog = Gauge("sortd_backlog", "Images that wait.", by, registry=own)
        self._generation = Gauge(
            "sortd_prototypes_generation", "Generation of the prototypes in force.", by, registry=own
        )
        self._overflows = Counter("sortd_watch_overflows", lost, registry=own)
        self._held = Gauge("sortd_dataset_held", held, by, registry=own)
        self._corrections = Counter(
            "sortd_corrections", "Images that the user moved elsewhere afterwards.", by, registry=own
        )

    def held(self, dataset: str, *, is_held: bool) -> None:
        """Note whether a dataset is held: nothing of it moves until its cause is gone."""
        self._held.labels(_text(dataset)).set(int(is_held))

    def image(self, dataset: str, outcome: str) -> None:
        """Count an image whose way ended."""
        self._images.labels(_text(dataset), outcome).inc()

    def stage(self, stage: str, seconds: float) -> None:
        """Note how long an image spent in a stage: settle, decode, encode or move."""
        self._seconds.labels(stage).observe(seconds)

    def backlog(self, dataset: str, images: int) -> None:
        """Note how many images wait."""
        self._backlog.labels(_text(dataset)).set(images)

    def generation(self, dataset: str, generation: int) -> None:
        """Note which prototypes decide."""
        self._generation.labels(_text(dataset)).set(generation)

    def watch_overflow(self) -> None:
        """Count hints that were lost."""
        self._overflows.inc()

    def correction(self, dataset: str) -> None:
        """Count an image that the user moved elsewhere."""
        self._corrections.labels(_text(dataset)).inc()

    def text(self) -> str:
        """Return everything in Prometheus' text format."""
        return prometheus_client.generate_latest(self._registry).decode()

    def write_textfile(self, path: str) -> None:
        """Write everything for node_exporter's textfile collector, which is another user, as a whole.

        Raises:
            OSError: The folder is absent, full or not ours; the file before stays.
        """
        write_atomic(path, self.text().encode(), mode=_READABLE_BY_ALL, durable=False)

    def serve(
        self, port: int, *, address: str = "127.0.0.1", problem: Callable[[], str | None] = lambda: None
    ) -> Callable[[], None]:
        """Answer over HTTP in a thread of its own until the function returned is called.

        ``problem`` is called in that thread for ``/healthz`` and says why sortd does no work (503), or None (200). Any
        other path has the counts.

        Raises:
            OSError: The port is taken or not ours.
        """
        counts: Callable[..., Iterable[bytes]] = prometheus_client.make_wsgi_app(self._registry)

        def app(environ: "WSGIEnvironment", respond: "StartResponse") -> Iterable[bytes]:
            if environ["PATH_INFO"] != HEALTH_PATH:
                return counts(environ, respond)
            said = problem()
            respond("200 OK" if said is None else "503 Service Unavailable", [("Content-Type", "text/plain")])
            return [f"{said or 'ok'}\n".encode("utf-8", "backslashreplace")]

        server = make_server(address, port, app, ThreadingWSGIServer, handler_class=_Silent)
        thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
        thread.start()

        def close() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return close


def _text(name: str) -> str:
    """Make a label of a folder's name, which need not be UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()
