"""Logs: event names, and one stream on stderr for sortd's lines, other libraries' lines and Python's warnings.

On a terminal they are lines for people, shortened unless the level is debug (see ``console_line``), anywhere else one
JSON object a line; where stderr is the journal's, with the ``<N>`` level prefix of sd-daemon(3) before it, which the
journal takes off again.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, MutableMapping
from enum import Enum
from typing import Any, Final, Literal, TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from sortd.console_line import PADDED, for_people, readable_json
from sortd.events import Outcome

Format = Literal["auto", "console", "json"]
Level = Literal["debug", "info", "warning", "error"]

IMAGE_FILED: Final = "image.filed"
IMAGE_SENT_TO_REVIEW: Final = "image.sent_to_review"
IMAGE_REJECTED: Final = "image.rejected"
IMAGE_CORRECTED: Final = "image.corrected"
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
SCAN_FINISHED: Final = "scan.finished"
SCAN_UNREADABLE: Final = "scan.unreadable"
WATCH_OVERFLOWED: Final = "watch.overflowed"
WATCH_RESTARTED: Final = "watch.restarted"
WATCH_DEGRADED: Final = "watch.degraded"
BACKLOG_FULL: Final = "backlog.full"
DATASET_ADDED: Final = "dataset.added"
DATASET_GONE: Final = "dataset.gone"
DATASET_HELD: Final = "dataset.held"
ROOT_ABSENT: Final = "root.absent"
CONFIG_RELOADED: Final = "config.reloaded"
CONFIG_REFUSED: Final = "config.refused"
MODEL_EXPORTING: Final = "model.exporting"
MODEL_EXPORTED: Final = "model.exported"
MODEL_JUDGING: Final = "model.judging"
MODEL_JUDGED: Final = "model.judged"
MODEL_FELL_BACK: Final = "model.fell_back"
MODEL_LOADED: Final = "model.loaded"
DAEMON_STARTING: Final = "daemon.starting"
DAEMON_READY: Final = "daemon.ready"
DAEMON_HAMPERED: Final = "daemon.hampered"
DAEMON_STOPPED: Final = "daemon.stopped"
DAEMON_FAILED: Final = "daemon.failed"
THREAD_DIED: Final = "thread.died"

EVENTS: Final[Mapping[str, str]] = {
    IMAGE_FILED: "an image was moved to Dataset/<label>",
    IMAGE_SENT_TO_REVIEW: "sortd would not decide alone; the image was moved to Review/<best guess>",
    IMAGE_REJECTED: "an image that cannot be decoded, or is over a limit, was moved to Rejected/",
    IMAGE_CORRECTED: "the user moved an image that sortd had put elsewhere",
    IMAGE_LEFT: "a file or folder stays where it is: no image, empty, unfinished, hidden, a link; the line says why",
    IMAGE_VANISHED: "an image was taken away before sortd moved it; nothing is to be done",
    COMPANION_FOLLOWED: "a sidecar or film came later than its image and was moved to it",
    MOVE_FAILED: "a move did not happen; the file is where it was",
    MOVE_UNDONE: "an image was taken back to where it came from",
    MOVE_RECOVERED: "a move that a crash had interrupted was brought to its end",
    PROTOTYPES_REBUILT: "new prototypes decide from now on",
    PROTOTYPES_REBUILD_FAILED: "the last good prototypes stay",
    CLASSIFIER_CHANGED: "a fine-tuned model decides from now on, or the prototypes do again",
    CLASSIFIER_REFUSED: "a fine-tuned model does not serve: other classes, or damaged; the prototypes serve on",
    REFERENCES_UNREADABLE: "a reference image cannot be read; the others count",
    REFERENCES_EMPTIED: "a class folder was emptied while running; its prototype stays until reload",
    REFERENCES_MISNAMED: "a class folder has a name that cannot be a class",
    SCAN_FINISHED: "every file in Images/ was looked at (level debug)",
    SCAN_UNREADABLE: "a folder or file could not be looked at",
    WATCH_OVERFLOWED: "more happened than the watcher could tell; a scan follows",
    WATCH_RESTARTED: "the watcher had died or gone deaf and hears again; a scan follows",
    WATCH_DEGRADED: "a root cannot be watched, or only in part; it is scanned more often",
    BACKLOG_FULL: "Review/ holds more images than `backlog_limit`; the others are decided anew once there is room",
    DATASET_ADDED: "a dataset was taken up",
    DATASET_GONE: "a dataset's folder is gone; it was let go",
    DATASET_HELD: "nothing moves in a dataset until its cause is mended",
    ROOT_ABSENT: "the folder that holds the datasets is not there",
    CONFIG_RELOADED: "a changed configuration is in force",
    CONFIG_REFUSED: "a changed configuration is not valid; the one before stays in force",
    MODEL_EXPORTING: "the model is being written for ONNX Runtime, once; the line says which step, and about how long",
    MODEL_EXPORTED: "the model was written for ONNX Runtime, in float32 and, where that is quicker, int8",
    MODEL_JUDGING: "int8 is being held against float32, on how many references; once for each set of references",
    MODEL_JUDGED: "int8 was held against float32 on the references; the line says what serves, and why",
    MODEL_FELL_BACK: "what was wanted to run the model cannot; something slower does",
    MODEL_LOADED: "the encoder is ready",
    DAEMON_STARTING: "sortd begins",
    DAEMON_READY: "every dataset was scanned and knows its prototypes, or why it has none",
    DAEMON_HAMPERED: "the status, the metrics or an answer could not be written; images are handled as ever",
    DAEMON_STOPPED: "sortd ends, with what it did",
    DAEMON_FAILED: "an error ended sortd, or kept it from starting; the line has the exit code",
    THREAD_DIED: "a thread ended by an error",
}
"""Every event and what it means, in the order of the README's table."""

IMAGE_EVENTS: Final[Mapping[Outcome, str]] = {
    Outcome.FILED: IMAGE_FILED,
    Outcome.REVIEW: IMAGE_SENT_TO_REVIEW,
    Outcome.REJECTED: IMAGE_REJECTED,
    Outcome.FOLLOWED: COMPANION_FOLLOWED,
}
"""The event of the canonical line for each way that a move can go."""

# syslog(3) severities by the names of stdlib levels.
_SEVERITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
_CAUSES = ("dataset", "cause", "refusal", "failure", "root", "loss")  # few values each, unlike a path or a message


_WINDOW_SECONDS = 60.0


class RateLimit:
    """Drops lines of the same event and cause beyond so many a minute, as a processor or a filter, and counts them.

    Lines of images and companions are never dropped: each is said once for each version of a file, as its only record.
    """

    def __init__(
        self, lines_per_minute: int, *, clock: Callable[[], float] = time.monotonic, max_causes: int = 1_000
    ) -> None:
        """Begin with nothing counted.

        Args:
            lines_per_minute: of one event and cause.
            clock: seconds, monotonic.
            max_causes: how many are counted at a time; beyond, counting begins anew.
        """
        self._limit, self._clock, self._max_causes = lines_per_minute, clock, max_causes
        self._windows: dict[tuple[str, ...], tuple[float, int]] = {}

    def __call__(self, _logger: WrappedLogger, _method: str, line: EventDict) -> EventDict:
        """Let one of sortd's lines pass, with ``suppressed`` where others like it were dropped before.

        Raises:
            structlog.DropEvent: It is one too many.
        """
        event = str(line.get("event"))
        if event.startswith("image.") or event == COMPANION_FOLLOWED:
            return line
        dropped = self._count((event, *(str(line.get(name)) for name in _CAUSES)))
        if dropped is None:
            raise structlog.DropEvent
        return {**line, "suppressed": dropped} if dropped else line

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a line of another library passes; those of the same template are of the same cause."""
        if isinstance(record.msg, dict):  # sortd's own: counted on its way here
            return True
        is_bare = record.msg == "%s"  # Python's warnings, all of them
        dropped = self._count((record.name, str(record.args if is_bare else record.msg)))
        if dropped:
            record.msg = f"{record.msg} ({dropped} more of this before)"
        return dropped is not None

    def _count(self, cause: tuple[str, ...]) -> int | None:
        """Count one line: how many were dropped in the minute before, or ``None`` where this one is too many."""
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
    format: Format = "auto",  # noqa: A002 - the configuration's own word
    level: Level = "info",
    *,
    stream: TextIO | None = None,
    environ: Mapping[str, str] = os.environ,
    lines_per_minute: int = 20,
) -> None:
    """Send every log line of the process to ``stream``; may be called again, the last call holds.

    Args:
        format: ``console`` for people, ``json`` for programs, ``auto`` by whether the stream is a terminal.
        level: The least level of sortd's own lines. Other libraries are heard from ``warning`` on, or from ``info``
            where this is ``debug``.
        stream: Where to; standard error if not given.
        environ: Where ``JOURNAL_STREAM`` and ``NO_COLOR`` are looked up.
        lines_per_minute: See ``RateLimit``.
    """
    stream = stream or sys.stderr
    is_terminal = stream.isatty()
    is_console = format == "console" or (format == "auto" and is_terminal)
    limit = RateLimit(lines_per_minute)
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="%H:%M:%S" if is_console else "iso", utc=not is_console),
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            limit,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    colours = is_terminal and not environ.get("NO_COLOR")
    is_journal = not is_console and _is_journal(stream, environ.get("JOURNAL_STREAM", ""))
    handler = _Lines(stream, is_json=not is_console)
    handler.addFilter(limit.filter)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name, _tame],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *(_console(level, colours=colours) if is_console else _json(stream.encoding, is_journal=is_journal)),
            ],
        )
    )
    logging.basicConfig(handlers=[handler], level=logging.INFO if level == "debug" else logging.WARNING, force=True)
    logging.getLogger("sortd").setLevel(level.upper())
    logging.captureWarnings(True)
    threading.excepthook = _log_dead_thread


def is_json() -> bool:
    """Tell whether ``configure`` was called and chose JSON: then nothing but JSON may be written to the stream."""
    return any(isinstance(handler, _Lines) and handler.is_json for handler in logging.getLogger().handlers)


def say_failed(message: str, exit_code: int, fault: BaseException | None = None) -> None:
    """Write the last line of a run that an error ended, with its traceback where ``fault`` was not expected."""
    structlog.get_logger("sortd").error(DAEMON_FAILED, error=message, exit_code=exit_code, exc_info=fault)


def _console(level: Level, *, colours: bool) -> list[Processor]:
    plain = structlog.dev.plain_traceback  # rich's would print local variables
    renderer = structlog.dev.ConsoleRenderer(
        colors=colours, exception_formatter=plain, pad_event_to=PADDED, sort_keys=False
    )
    after_event = structlog.dev.RESET_ALL if colours else ""
    shorten: Processor = lambda _logger, _method, line: for_people(line, after_event=after_event)  # noqa: E731
    return [renderer] if level == "debug" else [shorten, renderer]


def _json(encoding: str | None, *, is_journal: bool) -> list[Processor]:
    render = structlog.processors.JSONRenderer(serializer=readable_json, encoding=encoding, default=_plain)
    prefixed: Processor = lambda logger, method, line: f"<{_severity(line)}>{render(logger, method, line)!s}"  # noqa: E731
    return [structlog.processors.format_exc_info, _order, prefixed if is_journal else render]


def _order(_logger: WrappedLogger, _method: str, line: EventDict) -> EventDict:
    """Put what the eye looks for first, and add the bytes of names that are not UTF-8, which JSON cannot carry."""
    first = {name: line.pop(name) for name in ("timestamp", "level", "event") if name in line}
    raw = {f"{name}_hex": os.fsencode(value).hex() for name, value in line.items() if _has_raw_bytes(value)}
    return {**first, **line, **raw}


def _has_raw_bytes(value: object) -> bool:
    return isinstance(value, str) and any("\udc80" <= character <= "\udcff" for character in value)


def _tame(_logger: WrappedLogger, _method: str, line: EventDict) -> EventDict:
    """Escape control characters in another library's message: it may carry the name of a hostile file."""
    message = str(line.get("event", ""))
    line["event"] = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in message
    )
    return line


def _severity(line: MutableMapping[str, Any]) -> int:
    return _SEVERITIES.get(str(line.get("level")), _SEVERITIES["info"])


def _plain(value: object) -> object:
    """Turn what JSON does not know into what it does."""
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


def _is_journal(stream: TextIO, journal: str) -> bool:
    """Tell whether the stream is the journal's, by its device and inode: systemd.exec(5), $JOURNAL_STREAM."""
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):  # no descriptor behind it
        return False
    return journal == f"{found.st_dev}:{found.st_ino}"


def _log_dead_thread(died: threading.ExceptHookArgs) -> None:
    if died.exc_type is SystemExit or died.exc_value is None:
        return
    name = died.thread.name if died.thread else "?"
    info = (died.exc_type, died.exc_value, died.exc_traceback)
    structlog.get_logger("sortd").error(THREAD_DIED, thread=name, exc_info=info)


class _Lines(logging.StreamHandler[TextIO]):
    """Writes lines whatever is in them, and never raises into the program that logs."""

    def __init__(self, stream: TextIO, *, is_json: bool) -> None:
        """Write to a stream, as JSON or for people."""
        super().__init__(stream)
        self.is_json = is_json

    def format(self, record: logging.LogRecord) -> str:
        """Render, with what the stream's encoding lacks escaped."""
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        return super().format(record).encode(encoding, "backslashreplace").decode(encoding)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - stdlib's name
        """Say in one line what could not be said; where even that fails (a full disk, a closed pipe) go on mute."""
        try:
            said = record.msg.get("event") if isinstance(record.msg, dict) else record.msg
            line = {"level": "error", "event": "log.failed", "line": str(said)[:200], "error": repr(sys.exc_info()[1])}
            self.stream.write(readable_json(line, encoding=self.stream.encoding) + "\n")
        except Exception:  # noqa: BLE001 - a value that cannot be shown, a stream that takes nothing: no way is left
            return
