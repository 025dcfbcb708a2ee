"""The metrics of the daemon for Prometheus, as text or as a file.

prometheus_client is imported only if something reads the metrics. Names follow https://prometheus.io/docs/practices/naming/.
"""

import logging
from collections.abc import Callable
from typing import Any, Final

from sortd.files import write_atomic

# The packaged model takes milliseconds, a large one on a loaded CPU seconds; a file settles after it is copied.
_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
_READABLE_BY_ALL = 0o644

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
"""Of Prometheus' text format."""

_BY_DATASET = ("dataset",)
_COUNTERS: Final = {
    "sortd_images": ("Images that were filed, reviewed or rejected, by outcome.", ("dataset", "outcome")),
    "sortd_corrections": ("Filed images that the user moved to another class.", _BY_DATASET),
    "sortd_watch_overflows": ("Times that the watcher lost events and a scan followed.", ()),
    "sortd_notifications": ("Notifications by outcome: sent, failed, held_back or dropped.", ("outcome",)),
}
_GAUGES: Final = {
    "sortd_backlog": ("Images that wait.", _BY_DATASET),
    "sortd_review_images": ("Images in Review/ that wait for a person.", _BY_DATASET),
    "sortd_prototypes_generation": ("Generation of the active prototypes.", _BY_DATASET),
    "sortd_prototypes_built_timestamp_seconds": ("When the active prototypes were built.", _BY_DATASET),
    "sortd_dataset_held": (
        "1 if nothing in a dataset is moved because of its folders, its journal, its disk or the guard, else 0.",
        _BY_DATASET,
    ),
    "sortd_checked_images": ("Newest filed images that a person has checked.", ("dataset", "evidence")),
    "sortd_precision_ratio": ("Share of these images that are in the right class.", ("dataset", "evidence")),
    "sortd_precision_wanted_ratio": ("The configured share of right images, abstain.precision.", _BY_DATASET),
    "sortd_encoder_away": ("1 while the encoder of another process is away, else 0.", ()),
    "sortd_model_info": ("The model that is loaded; always 1.", ("model", "encoder_id")),
    "sortd_ready": ("1 while the model is loaded and all datasets are served, else 0.", ()),
    "sortd_last_error_timestamp_seconds": ("When the last error was logged; 0: never.", ()),
}
_SECONDS: Final = "sortd_image_seconds"


class Metrics:
    """The metrics of one process, in a registry of its own."""

    def __init__(self, *, is_on: bool = True) -> None:
        """Start all counters at zero; without ``is_on`` nothing is counted."""
        self.is_on = is_on
        self._known: dict[str, Any] = {}
        self._text: Callable[[], bytes] = bytes
        if not is_on:
            return
        import prometheus_client as prometheus

        prometheus.disable_created_metrics()  # type: ignore[no-untyped-call]  # not of interest
        registry = prometheus.CollectorRegistry()
        for kind, known in ((prometheus.Counter, _COUNTERS), (prometheus.Gauge, _GAUGES)):
            self._known |= {name: kind(name, what, by, registry=registry) for name, (what, by) in known.items()}
        what = "Time that an image takes in a stage."
        self._known[_SECONDS] = prometheus.Histogram(_SECONDS, what, ("stage",), registry=registry, buckets=_BUCKETS)
        self._text = lambda: prometheus.generate_latest(registry)

    def count(self, name: str, *labels: str, by: int = 1) -> None:
        """Add to a counter."""
        if (found := self._labelled(name, labels)) is not None:
            found.inc(by)

    def set(self, name: str, value: float, *labels: str) -> None:
        """Set a gauge."""
        if (found := self._labelled(name, labels)) is not None:
            found.set(value)

    def forget(self, dataset: str) -> None:
        """Remove the gauges of a dataset that is gone: their last values would be taken for present ones."""
        for name, (_, by) in _GAUGES.items():
            if by[:1] == _BY_DATASET and name in self._known:
                for family in list(self._known[name].collect()):
                    for sample in family.samples:
                        if sample.labels["dataset"] == _text(dataset):
                            self._known[name].remove(*(sample.labels[label] for label in by))

    def held(self, dataset: str, *, is_held: bool) -> None:
        """Set whether a dataset is held."""
        self.set("sortd_dataset_held", int(is_held), dataset)

    def image(self, dataset: str, outcome: str) -> None:
        """Count an image with its outcome."""
        self.count("sortd_images", dataset, outcome)

    def stage(self, stage: str, seconds: float) -> None:
        """Observe the time of an image in a stage: settle, decode, encode or move."""
        if (found := self._labelled(_SECONDS, (stage,))) is not None:
            found.observe(seconds)

    def model(self, description: str, encoder_id: str) -> None:
        """Set which model is loaded."""
        if (found := self._known.get("sortd_model_info")) is not None:
            found.clear()
            self.set("sortd_model_info", 1, description, encoder_id)

    def watch_errors(self) -> Callable[[], None]:
        """Set the time of each line of the log with level error or above, until the returned function is called."""
        handler = _ErrorTimes(lambda seconds: self.set("sortd_last_error_timestamp_seconds", seconds))
        logging.getLogger().addHandler(handler)
        return lambda: logging.getLogger().removeHandler(handler)

    def text(self) -> str:
        """Return all metrics in Prometheus' text format; see ``CONTENT_TYPE``."""
        return self._text().decode()

    def write_textfile(self, path: str) -> None:
        """Replace a file with all metrics, readable by node_exporter's textfile collector. Raises OSError."""
        write_atomic(path, self.text().encode(), mode=_READABLE_BY_ALL, durable=False)

    def _labelled(self, name: str, labels: tuple[str, ...]) -> Any:  # noqa: ANN401 -- a metric of prometheus_client
        metric = self._known.get(name)
        return metric if metric is None or not labels else metric.labels(*map(_text, labels))


class _ErrorTimes(logging.Handler):
    """Reports the time of each error."""

    def __init__(self, report: Callable[[float], None]) -> None:
        """Call ``report`` with seconds since the epoch."""
        super().__init__(logging.ERROR)
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        """Report a record."""
        self._report(record.created)


def _text(name: str) -> str:
    """Return a folder's name as a label: escaped, since names need not be UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()
