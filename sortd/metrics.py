"""Metrics: what Prometheus is told, in a registry of sortd's own; by text file, or over HTTP on this machine alone."""

from collections.abc import Callable

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from sortd.files import write_atomic

# A packaged model decides in milliseconds, a large one on a loaded CPU in seconds; settling takes as long as a copy.
_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
_READABLE_BY_ALL = 0o644


class Metrics:
    """The counts of one process."""

    def __init__(self) -> None:
        """Begin at zero."""
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # their moment of birth is noise
        self._registry = registry = CollectorRegistry()
        self._images = Counter(
            "sortd_images", "Images whose way ended, by outcome.", ("dataset", "outcome"), registry=registry
        )
        self._seconds = Histogram(
            "sortd_image_seconds", "Time that images spent in a stage.", ("stage",), registry=registry, buckets=_BUCKETS
        )
        self._backlog = Gauge("sortd_backlog", "Images that wait.", ("dataset",), registry=registry)
        self._generation = Gauge(
            "sortd_prototypes_generation", "Generation of the prototypes in force.", ("dataset",), registry=registry
        )
        self._overflows = Counter(
            "sortd_watch_overflows", "Times that the watcher lost hints and a scan had to heal it.", registry=registry
        )
        self._corrections = Counter(
            "sortd_corrections", "Images that the user moved elsewhere afterwards.", ("dataset",), registry=registry
        )

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
        """Write everything for node_exporter's textfile collector: beside, then renamed, so that no half is read.

        The collector is another user and counts are no secret, so anybody may read the file whatever our umask.

        Raises:
            OSError: The folder is absent, full or not ours; the file before stays.
        """
        write_atomic(path, self.text().encode(), mode=_READABLE_BY_ALL, durable=False)

    def serve(self, port: int, *, address: str = "127.0.0.1") -> Callable[[], None]:
        """Answer over HTTP on this machine, in a thread of its own, until the function returned is called.

        Raises:
            OSError: The port is taken or not ours.
        """
        server, thread = prometheus_client.start_http_server(port, address, self._registry)

        def close() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return close


def _text(name: str) -> str:
    """Make a label of a folder's name, which need not be UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()
