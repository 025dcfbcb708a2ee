"""One stream of lines that never lies, never breaks, never floods, and never raises into the program."""

import io
import json
import logging
import os
import pty
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import structlog

from sortd import files, logs
from sortd.classify import explain
from sortd.events import Outcome


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Leave logging, warnings and the hook of threads as they were."""
    root = logging.getLogger()
    handlers, level, hook = list(root.handlers), root.level, threading.excepthook
    yield
    logging.captureWarnings(False)
    root.handlers[:], threading.excepthook = handlers, hook
    root.setLevel(level)
    logging.getLogger("sortd").setLevel(logging.NOTSET)
    structlog.reset_defaults()


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    """Return the lines written, each of which must be an object."""
    return [json.loads(line) for line in stream.getvalue().splitlines()]


@pytest.fixture
def stream() -> io.StringIO:
    """A configured stream of JSON lines."""
    stream = io.StringIO()
    logs.configure("json", "info", stream=stream, environ={}, lines_per_minute=5)
    return stream


@pytest.fixture
def log() -> structlog.stdlib.BoundLogger:
    """A logger of sortd's."""
    logger: structlog.stdlib.BoundLogger = structlog.get_logger("sortd.daemon.dataset")
    return logger


def test_line_has_its_event_first_and_its_context(stream: io.StringIO, log: structlog.stdlib.BoundLogger) -> None:
    """Time, level and event come first, and bound values are in every line."""
    bound = log.bind(path="/srv/a.jpg", generation=7)
    with structlog.contextvars.bound_contextvars(dataset="Tornillos"):
        bound.info(logs.IMAGE_FILED, label="hex", score=0.91)
    [line] = lines(stream)
    assert list(line)[:3] == ["timestamp", "level", "event"]
    assert str(line.pop("timestamp")).endswith("Z")
    assert line == {
        "level": "info",
        "event": "image.filed",
        "path": "/srv/a.jpg",
        "generation": 7,
        "dataset": "Tornillos",
        "label": "hex",
        "score": 0.91,
    }


def test_line_of_a_name_not_in_utf8_has_its_bytes(stream: io.StringIO, log: structlog.stdlib.BoundLogger) -> None:
    """The bytes of the name are added in hexadecimal."""
    path = os.fsdecode(b"/srv/caf\xe9\n\x1b[31m.jpg")
    log.info(logs.IMAGE_FILED, path=path)
    assert stream.getvalue().isascii()
    assert stream.getvalue().count("\n") == 1
    [line] = lines(stream)
    assert line["path"] == path
    assert bytes.fromhex(str(line["path_hex"])) == os.fsencode(path)


def test_line_converts_values_that_json_lacks(stream: io.StringIO, log: structlog.stdlib.BoundLogger) -> None:
    """Paths, enumerations, numpy's numbers, sets and other objects are converted."""

    class Colour(Enum):
        RED = "red"

    values = {"folder": Path("/srv"), "score": np.float32(0.5), "colour": Colour.RED, "classes": {"b", "a"}, "x": 1j}
    log.info(logs.DAEMON_READY, **values)
    [line] = lines(stream)
    told = {name: line[name] for name in values}
    assert told == {"folder": "/srv", "score": 0.5, "colour": "red", "classes": ["a", "b"], "x": "1j"}


def test_other_libraries_and_warnings_use_the_same_stream(stream: io.StringIO) -> None:
    """Each has the logger's name, one line and escaped control characters; info lines are dropped."""
    logging.getLogger("PIL.Image").warning("bad name %s", "\x1b[31m\nx\udce9")
    logging.getLogger("PIL.Image").info("small talk")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("watch out", stacklevel=1)
    pillow, python = lines(stream)
    assert (pillow["logger"], pillow["event"]) == ("PIL.Image", r"bad name \x1b[31m\nx\udce9")
    assert python["logger"] == "py.warnings"
    assert "watch out" in str(python["event"])


def test_level_debug_lets_other_libraries_log_info() -> None:
    """Level debug holds for sortd; other libraries log from info on."""
    stream = io.StringIO()
    logs.configure("json", "debug", stream=stream, environ={})
    structlog.get_logger("sortd.core.sorter").debug("fine")
    logging.getLogger("filelock").debug("too fine")
    logging.getLogger("filelock").info("lock taken")
    assert [line["event"] for line in lines(stream)] == ["fine", "lock taken"]
    logs.configure("json", "error", stream=stream, environ={})
    structlog.get_logger("sortd.core.sorter").warning("hidden")
    assert len(lines(stream)) == 2


def test_line_of_an_exception_is_one_object(stream: io.StringIO, log: structlog.stdlib.BoundLogger) -> None:
    """The traceback is a field of the object."""
    try:
        int("caf\udce9")
    except ValueError:
        log.exception(logs.DAEMON_STOPPED)
    [line] = lines(stream)
    assert "ValueError" in str(line["exception"])


def test_thread_that_dies_logs_its_traceback(stream: io.StringIO) -> None:
    """The traceback is in one JSON line."""
    thread = threading.Thread(target=lambda: 1 / 0, name="watcher")
    thread.start()
    thread.join()
    [line] = lines(stream)
    assert (line["event"], line["thread"]) == (logs.THREAD_DIED, "watcher")
    assert "ZeroDivisionError" in str(line["exception"])


def test_logging_never_raises(log: structlog.stdlib.BoundLogger) -> None:
    """A wrong argument, a value without repr or a closed stream raises no exception."""
    stream = io.StringIO()
    logs.configure("json", stream=stream, environ={})  # here, since pytest's own handler raises

    class Broken:
        def __repr__(self) -> str:
            raise RuntimeError("no")

    logging.getLogger("other").error("%d", "no number")
    log.info(logs.DAEMON_READY, value=Broken())
    assert [line["event"] for line in lines(stream)] == ["log.failed", "log.failed"]
    stream.close()
    log.info(logs.DAEMON_READY)


def test_logging_to_a_full_disk_or_closed_pipe_raises_nothing() -> None:
    """Lines that stderr does not accept are lost."""
    with open("/dev/full", "w") as full:
        logs.configure("json", stream=full, environ={})
        structlog.get_logger("sortd.daemon.daemon").info(logs.DAEMON_READY)
        logging.getLogger().handlers.clear()
        with pytest.raises(OSError, match="No space left"):
            full.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())


def test_rate_limit_drops_and_counts_repeats() -> None:
    """Lines above the limit are dropped; the first of the next minute has their number."""
    now = 0.0
    limit = logs.RateLimit(3, clock=lambda: now)

    def passes(event: str, **fields: object) -> structlog.typing.EventDict | None:
        try:
            return limit(None, "warning", {"event": event, **fields})
        except structlog.DropEvent:
            return None

    assert [passes(logs.MOVE_FAILED, failure="busy") is not None for _ in range(10)] == [True] * 3 + [False] * 7
    assert passes(logs.MOVE_FAILED, failure="vanished") is not None
    assert passes(logs.SCAN_UNREADABLE) is not None
    now = 61.0
    assert passes(logs.MOVE_FAILED, failure="busy") == {"event": logs.MOVE_FAILED, "failure": "busy", "suppressed": 7}
    assert passes(logs.MOVE_FAILED, failure="busy") == {"event": logs.MOVE_FAILED, "failure": "busy"}


def test_rate_limit_keeps_every_line_of_an_image(stream: io.StringIO, log: structlog.stdlib.BoundLogger) -> None:
    """Such a line is the only record of its outcome."""
    for event in (*logs.IMAGE_EVENTS.values(), logs.IMAGE_LEFT, logs.IMAGE_CORRECTED):
        for number in range(50):
            log.info(event, path=f"/srv/{number}.jpg", reason="low_margin")
    assert len(lines(stream)) == 50 * (len(logs.IMAGE_EVENTS) + 2)


def test_rate_limit_drops_repeats_of_other_libraries(stream: io.StringIO) -> None:
    """Of a thousand lines of one template five are written."""
    for number in range(1_000):
        logging.getLogger("libtiff").warning("bad tag %d", number)
    assert [line["event"] for line in lines(stream)] == [f"bad tag {number}" for number in range(5)]


def test_rate_limit_memory_is_bounded() -> None:
    """The number of remembered causes is limited."""
    limit = logs.RateLimit(3, clock=lambda: 0.0, max_causes=100)
    for number in range(10_000):
        limit(None, "info", {"event": "x.y", "root": str(number)})
    assert len(limit._windows) <= 100


def test_terminal_has_colours_unless_no_color_is_set() -> None:
    """A terminal gets console lines in colour, without colour if NO_COLOR is set."""
    for environment, is_coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
        ours, theirs = pty.openpty()
        with open(theirs, "w") as terminal:
            logs.configure("auto", stream=terminal, environ=environment)
            structlog.get_logger("sortd.daemon.daemon").info(logs.DAEMON_READY, datasets=["Tornillos"])
            logging.getLogger().handlers.clear()
            terminal.flush()
            text = os.read(ours, 4096).decode()
        os.close(ours)
        assert ("\x1b[" in text) is is_coloured
        assert "daemon.ready" in text
        assert not text.startswith("{")


def test_console_format_in_a_file_has_no_colour(log: structlog.stdlib.BoundLogger) -> None:
    """Console lines can be written to a file, and file names are escaped in them."""
    stream = io.StringIO()
    logs.configure("console", stream=stream, environ={})
    log.info(logs.IMAGE_FILED, path="/srv/\x1b[31m\n\udce9.jpg")
    assert stream.getvalue().isprintable() or stream.getvalue().rstrip("\n").isprintable()
    assert "\x1b" not in stream.getvalue()


MOVE = {
    "dataset": "Tornillos",
    "path": "/srv/sortd/Tornillos/Images/a.jpg",
    "destination": "/srv/sortd/Tornillos/Dataset/hex/a.jpg",
    "label": "hex",
    "score": 0.9981,
    "margin": 0.9972,
    "second_label": "cross",
    "mode": "mixed",
    "generation": 3,
    "encoder_id": "clip-ViT-B-32-512-torch-0123456789abcdef",
    "settle_ms": 1016.4,
}


def on_console(log: structlog.stdlib.BoundLogger, level: logs.Level, event: str, **fields: object) -> str:
    """Return what a console shows of a line."""
    stream = io.StringIO()
    logs.configure("console", level, stream=stream, environ={})
    log.info(event, **fields)
    return stream.getvalue()


def test_console_line_of_an_image_is_short(log: structlog.stdlib.BoundLogger) -> None:
    """It has the paths, the score and the second class, and no repeated values."""
    line = on_console(log, "info", logs.IMAGE_FILED, **MOVE)
    said = " ".join(line.partition("image.filed")[2].split())
    assert said == "Tornillos: Images/a.jpg -> Dataset/hex/ 0.998, then cross 0.001"


def test_console_line_has_a_new_name_and_the_reason(log: structlog.stdlib.BoundLogger) -> None:
    """A renamed file is shown with its new name, and an abstention with its reason."""
    renamed = {**MOVE, "destination": "/srv/sortd/Tornillos/Dataset/hex/a (2).jpg"}
    assert "Images/a.jpg -> Dataset/hex/a (2).jpg" in on_console(log, "info", logs.IMAGE_FILED, **renamed)
    unsure = {**MOVE, "destination": "/srv/sortd/Tornillos/Review/hex/a.jpg", "reason": "margin"}
    assert on_console(log, "info", logs.IMAGE_SENT_TO_REVIEW, **unsure).endswith("not sure enough of the class\n")
    strange = {**unsure, "destination": "/srv/sortd/Tornillos/Review/_none/a.jpg", "reason": "typicality"}
    assert "Review/_none/  hex 0.998, then" in on_console(log, "info", logs.IMAGE_SENT_TO_REVIEW, **strange)
    refused = {"dataset": "T", "path": "/T/Images/a.jpg", "destination": "/T/Rejected/a.jpg", "reason": "truncated"}
    assert on_console(log, "info", logs.IMAGE_REJECTED, **refused).endswith("T: Images/a.jpg -> Rejected/  truncated\n")


def test_every_reason_has_a_short_text() -> None:
    """Each reason of a decision has a text for the console."""
    assert set(logs.SHORT_REASONS) == set(explain.REASONS)


def test_console_line_at_level_debug_is_complete(log: structlog.stdlib.BoundLogger) -> None:
    """At level debug nothing is omitted."""
    line = on_console(log, "debug", logs.IMAGE_FILED, **MOVE)
    assert all(f"{name}=" in line for name in MOVE)


def test_console_line_escapes_control_characters_in_names(log: structlog.stdlib.BoundLogger) -> None:
    """A file name cannot add lines or colours."""
    hostile = {**MOVE, "path": "/srv/sortd/Tornillos/Images/\x1b[31m\n\udce9.jpg", "second_label": "\x1b[2J"}
    line = on_console(log, "info", logs.IMAGE_FILED, **hostile)
    assert line.count("\n") == 1
    assert "\x1b" not in line


def test_journal_lines_have_a_level_prefix() -> None:
    """The journal removes <N>; other streams get pure JSON."""
    program = (
        "import logging, os, sys, structlog; from sortd import logs; found = os.fstat(2);"
        "stream = f'{found.st_dev}:{found.st_ino}' if sys.argv[1] == 'journal' else '1:2';"
        "logs.configure('auto', 'debug', environ={'JOURNAL_STREAM': stream});"
        "log = structlog.get_logger('sortd.x');"
        "[getattr(log, level)('a.b') for level in ('debug', 'info', 'warning', 'error', 'critical')];"
        "logging.getLogger('PIL').error('c')"
    )
    for where, starts in (("journal", ["<7>{", "<6>{", "<4>{", "<3>{", "<2>{", "<3>{"]), ("pipe", ['{"ti'] * 6)):
        done = subprocess.run(
            [sys.executable, "-c", program, where],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": os.fspath(Path(__file__).parents[1])},
        )
        assert [line[:4] for line in done.stderr.splitlines()] == starts


def test_configure_twice_writes_each_line_once(log: structlog.stdlib.BoundLogger) -> None:
    """A second call may change the level, and each line is written once."""
    stream = io.StringIO()
    for _ in range(3):
        logs.configure("json", stream=stream, environ={})
    log.info(logs.CONFIG_RELOADED)
    assert len(lines(stream)) == 1


def test_every_outcome_has_an_event() -> None:
    """Each outcome of a move is logged."""
    assert set(logs.IMAGE_EVENTS) == set(Outcome)


class TestReadableJson:
    """JSON that people search through."""

    @pytest.mark.parametrize("name", ["año/ñandú.jpg", "日本語", "🦜", "Ж"])
    def test_json_does_not_escape_letters(self, name: str) -> None:
        """A search for a name with grep finds it."""
        assert files.readable_json({"path": name}) == f'{{"path": "{name}"}}'

    @pytest.mark.parametrize(
        "name", ["\x9b31m", "\u202egpj.exe", "a\u2028b", "caf\udce9", "\x7f", "\x85", "\U000e0041"]
    )
    def test_json_escapes_invisible_characters(self, name: str) -> None:
        """Control characters are escaped, and the name can be restored."""
        text = files.readable_json({"path": name})
        assert text.isascii()
        assert json.loads(text) == {"path": name}

    def test_json_for_a_limited_encoding_is_ascii(self) -> None:
        """Letters that the encoding lacks are escaped as JSON requires."""
        text = files.readable_json({"path": "é🦜"}, encoding="iso-8859-1", indent=2)
        assert text.isascii()
        assert json.loads(text) == {"path": "é🦜"}

    @pytest.mark.parametrize("encoding", ["utf-8", "ascii", "iso-8859-1"])
    def test_log_lines_are_json_in_every_encoding(self, encoding: str) -> None:
        """Names with letters that the stream lacks, and undecodable bytes, are escaped."""
        written = io.BytesIO()
        logs.configure("json", "info", stream=io.TextIOWrapper(written, encoding, write_through=True), environ={})
        structlog.get_logger("sortd.test").info("image.filed", path="é🦜\udce9")
        assert json.loads(written.getvalue().decode(encoding))["path"] == "é🦜\udce9"
        assert ("é".encode(encoding, "replace") in written.getvalue()) == (encoding == "utf-8")
