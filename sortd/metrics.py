"""Metrics for Prometheus, as a text file or over HTTP on the loopback address."""

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

# The packaged model takes milliseconds, a large one on a loaded CPU seconds; a file settles after it is copied.
_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
_READABLE_BY_ALL = 0o644
HEALTH_PATH = "/healthz"


class _Silent(WSGIRequestHandler):
    """Answers requests without a log line on stderr."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- the library's name
        """Log nothing."""


class Metrics:
    """The metrics of one process, in a registry of its own."""

    def __init__(self) -> None:
        """Start all counters at zero."""
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # not of interest
        self._registry = own = CollectorRegistry()
        by = ("dataset",)
        images = "Images that were filed, reviewed or rejected, by outcome."
        held = "1 if a dataset is held because of its folders, its journal or its disk, else 0."
        lost = "Times that the watcher lost events and a scan followed."
        self._images = Counter("sortd_images", images, (*by, "outcome"), registry=own)
        self._seconds = Histogram(
            "sortd_image_seconds", "Time that an image takes in a stage.", ("stage",), registry=own, buckets=_BUCKETS
        )
        self._backlog = Gauge("sortd_backlog", "Images that wait.", by, registry=own)
        self._generation = Gauge(
            "sortd_prototypes_generation", "Generation of the active prototypes.", by, registry=own
        )
        self._overflows = Counter("sortd_watch_overflows", lost, registry=own)
        self._held = Gauge("sortd_dataset_held", held, by, registry=own)
        self._corrections = Counter(
            "sortd_corrections", "Filed images that the user moved to another class.", by, registry=own
        )

    def held(self, dataset: str, *, is_held: bool) -> None:
        """Set whether a dataset is held."""
        self._held.labels(_text(dataset)).set(int(is_held))

    def image(self, dataset: str, outcome: str) -> None:
        """Count an image with its outcome."""
        self._images.labels(_text(dataset), outcome).inc()

    def stage(self, stage: str, seconds: float) -> None:
        """Observe the time of an image in a stage: settle, decode, encode or move."""
        self._seconds.labels(stage).observe(seconds)

    def backlog(self, dataset: str, images: int) -> None:
        """Set the number of images that wait."""
        self._backlog.labels(_text(dataset)).set(images)

    def generation(self, dataset: str, generation: int) -> None:
        """Set the generation of the active prototypes."""
        self._generation.labels(_text(dataset)).set(generation)

    def watch_overflow(self) -> None:
        """Count one loss of events."""
        self._overflows.inc()

    def correction(self, dataset: str) -> None:
        """Count an image that the user moved to another class."""
        self._corrections.labels(_text(dataset)).inc()

    def text(self) -> str:
        """Return all metrics in Prometheus' text format."""
        return prometheus_client.generate_latest(self._registry).decode()

    def write_textfile(self, path: str) -> None:
        """Replace a file with all metrics, readable by node_exporter's textfile collector. Raises OSError."""
        write_atomic(path, self.text().encode(), mode=_READABLE_BY_ALL, durable=False)

    def serve(
        self, port: int, *, address: str = "127.0.0.1", problem: Callable[[], str | None] = lambda: None
    ) -> Callable[[], None]:
        """Serve the metrics over HTTP in a thread until the returned function is called. Raises OSError.

        ``/healthz`` calls ``problem`` in that thread: the answer is 503 with the problem, or 200 if it is None.
        """
        metrics: Callable[..., Iterable[bytes]] = prometheus_client.make_wsgi_app(self._registry)

        def app(environ: "WSGIEnvironment", respond: "StartResponse") -> Iterable[bytes]:
            if environ["PATH_INFO"] != HEALTH_PATH:
                return metrics(environ, respond)
            found = problem()
            respond("200 OK" if found is None else "503 Service Unavailable", [("Content-Type", "text/plain")])
            return [f"{found or 'ok'}\n".encode("utf-8", "backslashreplace")]

        server = make_server(address, port, app, ThreadingWSGIServer, handler_class=_Silent)
        thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
        thread.start()

        def close() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return close


def _text(name: str) -> str:
    """Return a folder's name as a label: escaped, since names need not be UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()
