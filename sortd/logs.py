"""Event names, and the log on stderr with the lines of sortd, of other libraries and of Python's warnings.

docs/log.md explains each event. On a terminal, lines are shortened unless the level is debug (see ``render_console``);
elsewhere each is one JSON object, after the ``<N>`` level prefix of sd-daemon(3) if stderr is the systemd journal.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping, MutableMapping
from enum import Enum
from typing import Any, Final, Literal, TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from sortd.events import LIKE_NO_CLASS, Outcome
from sortd.files import readable_json

LogFormat = Literal["auto", "console", "json"]
Level = Literal["debug", "info", "warning", "error"]

IMAGE_FILED: Final = "image.filed"
IMAGE_SENT_TO_REVIEW: Final = "image.sent_to_review"
IMAGE_REJECTED: Final = "image.rejected"
IMAGE_CORRECTED: Final = "image.corrected"
IMAGE_CONFIRMED: Final = "image.confirmed"
IMAGE_REFILED: Final = "image.refiled"
IMAGE_ASSIGNED: Final = "image.assigned"
IMAGE_LEFT: Final = "image.left"
IMAGE_VANISHED: Final = "image.vanished"
COMPANION_FOLLOWED: Final = "companion.followed"
MOVE_FAILED: Final = "move.failed"
MOVE_UNDONE: Final = "move.undone"
MOVE_RECOVERED: Final = "move.recovered"
PROTOTYPES_REBUILT: Final = "prototypes.rebuilt"
PROTOTYPES_REBUILD_FAILED: Final = "prototypes.rebuild_failed"
CLASSIFIER_CHANGED: Final = "classifier.changed"
CLASSIFIER_REFUSED: Final = "classifier.refused"
REFERENCES_UNREADABLE: Final = "references.unreadable"
REFERENCES_EMPTIED: Final = "references.emptied"
REFERENCES_MISNAMED: Final = "references.misnamed"
JOURNAL_PRUNED: Final = "journal.pruned"
FOLDER_REMOVED: Final = "folder.removed"
SCAN_FINISHED: Final = "scan.finished"
SCAN_UNREADABLE: Final = "scan.unreadable"
WATCH_OVERFLOWED: Final = "watch.overflowed"
WATCH_RESTARTED: Final = "watch.restarted"
WATCH_DEGRADED: Final = "watch.degraded"
BACKLOG_FULL: Final = "backlog.full"
DATASET_ADDED: Final = "dataset.added"
DATASET_GONE: Final = "dataset.gone"
DATASET_HELD: Final = "dataset.held"
DATASET_MISSING: Final = "dataset.missing"
DATASET_NESTED: Final = "dataset.nested"
ROOT_ABSENT: Final = "root.absent"
CONFIG_RELOADED: Final = "config.reloaded"
CONFIG_REFUSED: Final = "config.refused"
MODEL_FELL_BACK: Final = "model.fell_back"
MODEL_LOADED: Final = "model.loaded"
DAEMON_STARTING: Final = "daemon.starting"
DAEMON_READY: Final = "daemon.ready"
DAEMON_HAMPERED: Final = "daemon.hampered"
DAEMON_STOPPED: Final = "daemon.stopped"
DAEMON_FAILED: Final = "daemon.failed"
ENDPOINT_FAILED: Final = "endpoint.failed"
ENDPOINT_LISTENING: Final = "endpoint.listening"
ENCODER_READY: Final = "encoder.ready"
ENCODER_REFUSED: Final = "encoder.refused"
ENCODER_STOPPED: Final = "encoder.stopped"
ENCODER_AWAY: Final = "encoder.away"
ENCODER_BACK: Final = "encoder.back"
REVIEW_READY: Final = "review.ready"
REVIEW_REFUSED: Final = "review.refused"
REVIEW_FAILED: Final = "review.failed"
REVIEW_STOPPED: Final = "review.stopped"
NOTIFICATION_FAILED: Final = "notification.failed"
THREAD_DIED: Final = "thread.died"

IMAGE_EVENTS: Final[Mapping[Outcome, str]] = {
    Outcome.FILED: IMAGE_FILED,
    Outcome.REVIEW: IMAGE_SENT_TO_REVIEW,
    Outcome.REJECTED: IMAGE_REJECTED,
    Outcome.FOLLOWED: COMPANION_FOLLOWED,
    Outcome.ASSIGNED: IMAGE_ASSIGNED,
    Outcome.REFILED: IMAGE_REFILED,
}
"""The event of a finished move, by outcome."""

PADDED = 22
"""Width of the event column: the longest frequent event, ``image.sent_to_review``, and a space."""

_UNSAID = ("encoder_id",)
"""Omitted on a terminal: long and equal in all lines of a run; ``model.loaded`` has it."""

SHORT_REASONS = {
    "no_classes": "there is no class",
    "name_only": "the class has no image, only a name",
    "too_few": "too few references",
    "stranger": "belongs to no class",
    "typicality": "too unlike the references",
    "margin": "not sure enough of the class",
}
"""Short texts for the reasons to send an image to Review/; ``sortd explain`` has longer ones."""

_SEVERITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}  # of syslog(3), by level
_CAUSES = ("dataset", "cause", "refusal", "failure", "root", "loss")  # few values each, unlike a path or a message
_WINDOW_SECONDS = 60.0


class RateLimit:
    """Drops and counts lines with the same event and cause above a number per minute, as a processor or a filter.

    Lines of images and companions are never dropped, since each is the only record of a version of a file.
    """

    def __init__(
        self, lines_per_minute: int, *, clock: Callable[[], float] = time.monotonic, max_causes: int = 1_000
    ) -> None:
        """Count up to ``max_causes``; beyond that, all counts are reset."""
        self._limit, self._clock, self._max_causes = lines_per_minute, clock, max_causes
        self._windows: dict[tuple[str, ...], tuple[float, int]] = {}

    def __call__(self, _logger: WrappedLogger, _method: str, line: EventDict) -> EventDict:
        """Return one of sortd's lines, with ``suppressed`` if such lines were dropped before, or raise DropEvent."""
        event = str(line.get("event"))
        if event.startswith("image.") or event == COMPANION_FOLLOWED:
            return line
        dropped = self._count((event, *(str(line.get(name)) for name in _CAUSES)))
        if dropped is None:
            raise structlog.DropEvent
        return {**line, "suppressed": dropped} if dropped else line

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a line of another library passes; its cause is its message template."""
        if isinstance(record.msg, dict):  # sortd's own, which __call__ has counted
            return True
        is_bare = record.msg == "%s"  # a warning of Python
        dropped = self._count((record.name, str(record.args if is_bare else record.msg)))
        if dropped:
            record.msg = f"{record.msg} ({dropped} such lines were dropped before)"
        return dropped is not None

    def _count(self, cause: tuple[str, ...]) -> int | None:
        """Count one line; return how many were dropped in the previous minute, or None to drop this one."""
        now = self._clock()
        if len(self._windows) >= self._max_causes and cause not in self._windows:
            self._windows.clear()
        began, count = self._windows.get(cause, (now, 0))
        dropped = 0
        if now - began >= _WINDOW_SECONDS:
            dropped, began, count = max(0, count - self._limit), now, 0
        self._windows[cause] = (began, count + 1)
        return dropped if count < self._limit else None


def configure(
    format: LogFormat = "auto",  # noqa: A002 - the configuration's own word
    level: Level = "info",
    *,
    stream: TextIO | None = None,
    environ: Mapping[str, str] = os.environ,
    lines_per_minute: int = 20,
    without: Collection[str] = (),
) -> None:
    """Send every log line of the process to ``stream`` (default: stderr); replaces an earlier configuration.

    ``auto`` is ``console`` on a terminal, else ``json``. ``level`` holds for sortd's lines; other libraries log from
    ``info`` on if it is ``debug``, else from ``warning`` on. ``environ``: ``JOURNAL_STREAM`` and ``NO_COLOR``.
    Lines of the events in ``without`` are not written.
    """
    stream = stream or sys.stderr
    is_terminal = stream.isatty()
    is_console = format == "console" or (format == "auto" and is_terminal)
    limit = RateLimit(lines_per_minute)

    def drop(_logger: WrappedLogger, _method: str, line: EventDict) -> EventDict:
        if line.get("event") in without:
            raise structlog.DropEvent
        return line

    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="%H:%M:%S" if is_console else "iso", utc=not is_console),
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            drop,
            *shared,
            limit,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    colours = is_terminal and not environ.get("NO_COLOR")
    to_journal = not is_console and is_journal(stream, environ.get("JOURNAL_STREAM", ""))
    handler = _Lines(stream, is_json=not is_console)
    handler.addFilter(limit.filter)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name, _escape_event],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *(_console(level, colours=colours) if is_console else _json(stream.encoding, is_journal=to_journal)),
            ],
        )
    )
    logging.basicConfig(handlers=[handler], level=logging.INFO if level == "debug" else logging.WARNING, force=True)
    logging.getLogger("sortd").setLevel(level.upper())
    logging.captureWarnings(True)
    threading.excepthook = _log_dead_thread


def is_json() -> bool:
    """Tell whether ``configure`` chose JSON: then only JSON may be written to the stream."""
    return any(isinstance(handler, _Lines) and handler.is_json for handler in logging.getLogger().handlers)


def say_failed(message: str, exit_code: int, fault: BaseException | None = None) -> None:
    """Log the error that ends a run, with the traceback of ``fault``, an unexpected exception."""
    structlog.get_logger("sortd").error(DAEMON_FAILED, error=message, exit_code=exit_code, exc_info=fault)


def _console(level: Level, *, colours: bool) -> list[Processor]:
    plain = structlog.dev.plain_traceback  # rich's would print local variables
    renderer = structlog.dev.ConsoleRenderer(
        colors=colours, exception_formatter=plain, pad_event_to=PADDED, sort_keys=False
    )
    after_event = structlog.dev.RESET_ALL if colours else ""
    shorten: Processor = lambda _logger, _method, line: render_console(line, after_event=after_event)  # noqa: E731
    return [renderer] if level == "debug" else [shorten, renderer]


def render_console(line: MutableMapping[str, Any], *, after_event: str = "") -> MutableMapping[str, Any]:
    """Return a shorter line: a move as one sentence, any other line without ``encoder_id``.

    ``image.filed  Tornillos: Images/a.jpg -> Dataset/hex/  0.998, then cross 0.001``

    ``after_event`` is the escape sequence that ends the style of the event's name.
    """
    path, destination = line.get("path"), line.get("destination")
    if not (isinstance(path, str) and isinstance(destination, str)) or "exception" in line or "exc_info" in line:
        return {name: value for name, value in line.items() if name not in _UNSAID}
    sentence = f"{line.get('dataset', '')}: {_way(path, destination)}  {_why(line)}".rstrip()
    event = f"{line['event']!s:<{PADDED}}{after_event} {_escaped(sentence)}"
    kept = {name: line[name] for name in ("timestamp", "level", "suppressed") if name in line}
    return {**kept, "event": event}


def _way(path: str, destination: str) -> str:
    """Return both paths relative to their common folder; the target's name only if it differs."""
    common = os.path.commonpath([path, destination])
    source, target = os.path.relpath(path, common), os.path.relpath(destination, common)
    folder, name = os.path.split(target)
    return f"{source} -> {f'{folder}/' if name == os.path.basename(path) and folder else target}"


def _why(line: Mapping[str, Any]) -> str:
    """Return the score, the second class with its score, and the reason not to file."""
    score, margin, second = (line.get(name) for name in ("score", "margin", "second_label"))
    # Where the folder in Review/ is not that of the best guess, the score names it.
    guess = f"{line['label']} " if line.get("reason") in LIKE_NO_CLASS and line.get("label") else ""
    parts = [] if score is None else [f"{guess}{score:.3f}"]
    if score is not None and margin is not None and second is not None:
        parts.append(f"then {second} {score - margin:.3f}")
    if line.get("reason"):
        parts.append(SHORT_REASONS.get(line["reason"], str(line["reason"])))
    return ", ".join(parts)


def _escaped(text: str) -> str:
    """Return a text with control characters and line ends escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def _json(encoding: str | None, *, is_journal: bool) -> list[Processor]:
    render = structlog.processors.JSONRenderer(serializer=readable_json, encoding=encoding, default=_plain)

    def prefixed(logger: WrappedLogger, method: str, line: EventDict) -> str:
        severity = _SEVERITIES.get(str(line.get("level")), _SEVERITIES["info"])
        return f"<{severity}>{render(logger, method, line)!s}"

    return [structlog.processors.format_exc_info, _order, prefixed if is_journal else render]


def _order(_logger: WrappedLogger, _method: str, line: EventDict) -> EventDict:
    """Put time, level and event first, and add the bytes of names that are not UTF-8, which JSON cannot represent."""
    first = {name: line.pop(name) for name in ("timestamp", "level", "event") if name in line}
    raw = {
        f"{name}_hex": os.fsencode(value).hex()
        for name, value in line.items()
        if isinstance(value, str) and any("\udc80" <= character <= "\udcff" for character in value)
    }
    return {**first, **line, **raw}


def _escape_event(_logger: WrappedLogger, _method: str, line: EventDict) -> EventDict:
    """Escape control characters in another library's message, which may contain a file name."""
    line["event"] = _escaped(str(line.get("event", "")))
    return line


def _plain(value: object) -> object:
    """Convert a value that JSON cannot represent."""
    match value:
        case Enum():
            return value.value
        case os.PathLike():
            return os.fsdecode(value)
        case set() | frozenset():
            return sorted(map(str, value))
        case Mapping():
            return dict(value)
    item = getattr(value, "item", None)  # a numpy scalar
    return item() if callable(item) and getattr(value, "shape", None) == () else repr(value)


def is_journal(stream: TextIO, journal: str) -> bool:
    """Tell whether a stream is the systemd journal: systemd.exec(5), $JOURNAL_STREAM."""
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):  # the stream has no descriptor
        return False
    return journal == f"{found.st_dev}:{found.st_ino}"


def _log_dead_thread(died: threading.ExceptHookArgs) -> None:
    if died.exc_type is SystemExit or died.exc_value is None:
        return
    name = died.thread.name if died.thread else "?"
    info = (died.exc_type, died.exc_value, died.exc_traceback)
    structlog.get_logger("sortd").error(THREAD_DIED, thread=name, exc_info=info)


class _Lines(logging.StreamHandler[TextIO]):
    """Writes lines, and never raises an exception in the program that logs."""

    def __init__(self, stream: TextIO, *, is_json: bool) -> None:
        """Write to a stream; ``is_json`` records the format."""
        super().__init__(stream)
        self.is_json = is_json

    def format(self, record: logging.LogRecord) -> str:
        """Render a record; characters that the stream's encoding lacks are escaped."""
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        return super().format(record).encode(encoding, "backslashreplace").decode(encoding)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - stdlib's name
        """Write a line about the failure; if that fails too (a full disk, a closed pipe), write nothing."""
        try:
            lost = record.msg.get("event") if isinstance(record.msg, dict) else record.msg
            line = {"level": "error", "event": "log.failed", "line": str(lost)[:200], "error": repr(sys.exc_info()[1])}
            self.stream.write(readable_json(line, encoding=self.stream.encoding) + "\n")
        except Exception:  # noqa: BLE001 - logging must never raise
            return
