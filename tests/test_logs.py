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


def test_a_line_carries_its_event_first_and_its_context(stream: io.StringIO, log: structlog.stdlib.BoundLogger) -> None:
    """Time, level and event lead; path and generation are bound once and stand in every line."""
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


def test_a_name_that_is_no_utf8_survives_with_its_bytes(stream: io.StringIO, log: structlog.stdlib.BoundLogger) -> None:
    """The line is ASCII, and the bytes stand beside it in hexadecimal."""
    path = os.fsdecode(b"/srv/caf\xe9\n\x1b[31m.jpg")
    log.info(logs.IMAGE_FILED, path=path)
    assert stream.getvalue().isascii()
    assert stream.getvalue().count("\n") == 1
    [line] = lines(stream)
    assert line["path"] == path
    assert bytes.fromhex(str(line["path_hex"])) == os.fsencode(path)


def test_values_of_any_kind_are_told(stream: io.StringIO, log: structlog.stdlib.BoundLogger) -> None:
    """Paths, enumerations, numpy's numbers, sets and what else comes become what JSON knows."""

    class Colour(Enum):
        RED = "red"

    values = {"folder": Path("/srv"), "score": np.float32(0.5), "colour": Colour.RED, "classes": {"b", "a"}, "x": 1j}
    log.info(logs.DAEMON_READY, **values)
    [line] = lines(stream)
    told = {name: line[name] for name in values}
    assert told == {"folder": "/srv", "score": 0.5, "colour": "red", "classes": ["a", "b"], "x": "1j"}


def test_other_libraries_and_warnings_come_in_the_same_stream(stream: io.StringIO) -> None:
    """With the name of who speaks, on one line, with control characters escaped; their small talk is left out."""
    logging.getLogger("PIL.Image").warning("bad name %s", "\x1b[31m\nx\udce9")
    logging.getLogger("PIL.Image").info("small talk")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("watch out", stacklevel=1)
    pillow, python = lines(stream)
    assert (pillow["logger"], pillow["event"]) == ("PIL.Image", r"bad name \x1b[31m\nx\udce9")
    assert python["logger"] == "py.warnings"
    assert "watch out" in str(python["event"])


def test_levels_hold_for_sortd_and_for_others_apart() -> None:
    """Debug is ours alone: other libraries are then heard from info on."""
    stream = io.StringIO()
    logs.configure("json", "debug", stream=stream, environ={})
    structlog.get_logger("sortd.core.sorter").debug("fine")
    logging.getLogger("filelock").debug("too fine")
    logging.getLogger("filelock").info("lock taken")
    assert [line["event"] for line in lines(stream)] == ["fine", "lock taken"]
    logs.configure("json", "error", stream=stream, environ={})
    structlog.get_logger("sortd.core.sorter").warning("hidden")
    assert len(lines(stream)) == 2


def test_an_exception_is_one_line(stream: io.StringIO, log: structlog.stdlib.BoundLogger) -> None:
    """The traceback is a field, so that every line is an object."""
    try:
        int("caf\udce9")
    except ValueError:
        log.exception(logs.DAEMON_STOPPED)
    [line] = lines(stream)
    assert "ValueError" in str(line["exception"])


def test_a_thread_that_dies_says_so_in_the_stream(stream: io.StringIO) -> None:
    """Its traceback does not break the stream of objects."""
    thread = threading.Thread(target=lambda: 1 / 0, name="watcher")
    thread.start()
    thread.join()
    [line] = lines(stream)
    assert (line["event"], line["thread"]) == (logs.THREAD_DIED, "watcher")
    assert "ZeroDivisionError" in str(line["exception"])


def test_logging_never_raises(log: structlog.stdlib.BoundLogger) -> None:
    """A wrong argument, a value that cannot be shown, a stream that is closed: the program goes on."""
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


def test_a_full_disk_or_a_closed_pipe_does_no_harm() -> None:
    """What standard error cannot take is not worth dying for."""
    with open("/dev/full", "w") as full:
        logs.configure("json", stream=full, environ={})
        structlog.get_logger("sortd.daemon.daemon").info(logs.DAEMON_READY)
        logging.getLogger().handlers.clear()
        with pytest.raises(OSError, match="No space left"):
            full.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())


def test_repeats_of_one_cause_are_dropped_and_counted() -> None:
    """Beyond so many a minute a line is dropped; the first of the next minute says how many."""
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


def test_the_line_of_an_image_is_never_dropped(stream: io.StringIO, log: structlog.stdlib.BoundLogger) -> None:
    """It is the only record of that outcome."""
    for event in (*logs.IMAGE_EVENTS.values(), logs.IMAGE_LEFT, logs.IMAGE_CORRECTED):
        for number in range(50):
            log.info(event, path=f"/srv/{number}.jpg", reason="low_margin")
    assert len(lines(stream)) == 50 * (len(logs.IMAGE_EVENTS) + 2)


def test_another_librarys_flood_is_dropped_and_counted(stream: io.StringIO) -> None:
    """A thousand lines of one template are five."""
    for number in range(1_000):
        logging.getLogger("libtiff").warning("bad tag %d", number)
    assert [line["event"] for line in lines(stream)] == [f"bad tag {number}" for number in range(5)]


def test_the_memory_of_the_limit_is_bounded() -> None:
    """However many causes there are, only so many are remembered."""
    limit = logs.RateLimit(3, clock=lambda: 0.0, max_causes=100)
    for number in range(10_000):
        limit(None, "info", {"event": "x.y", "root": str(number)})
    assert len(limit._windows) <= 100


def test_a_terminal_gets_lines_for_people_in_colour_unless_refused() -> None:
    """Colours are for terminals, and NO_COLOR is heard there."""
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


def test_a_console_that_is_no_terminal_has_no_colour(log: structlog.stdlib.BoundLogger) -> None:
    """Lines for people can be asked for in a file, and a hostile name cannot paint or break them."""
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


def test_an_image_is_one_short_line_on_a_console(log: structlog.stdlib.BoundLogger) -> None:
    """Where it went, how sure that was and which class came second, and nothing that repeats line by line."""
    line = on_console(log, "info", logs.IMAGE_FILED, **MOVE)
    said = " ".join(line.partition("image.filed")[2].split())
    assert said == "Tornillos: Images/a.jpg -> Dataset/hex/ 0.998, then cross 0.001"


def test_a_console_says_a_new_name_and_the_reason_not_to_file(log: structlog.stdlib.BoundLogger) -> None:
    """A file that had to be renamed is told of by its new name; what was not filed says why."""
    renamed = {**MOVE, "destination": "/srv/sortd/Tornillos/Dataset/hex/a (2).jpg"}
    assert "Images/a.jpg -> Dataset/hex/a (2).jpg" in on_console(log, "info", logs.IMAGE_FILED, **renamed)
    unsure = {**MOVE, "destination": "/srv/sortd/Tornillos/Review/hex/a.jpg", "reason": "margin"}
    assert on_console(log, "info", logs.IMAGE_SENT_TO_REVIEW, **unsure).endswith("scores nearly as high\n")
    refused = {"dataset": "T", "path": "/T/Images/a.jpg", "destination": "/T/Rejected/a.jpg", "reason": "truncated"}
    assert on_console(log, "info", logs.IMAGE_REJECTED, **refused).endswith("T: Images/a.jpg -> Rejected/  truncated\n")


def test_every_reason_is_said_in_words() -> None:
    """A reason that a decision can have and that no console could say would come out as a word of the code."""
    assert set(logs.SHORT_REASONS) == set(explain.REASONS)


def test_a_console_leaves_nothing_out_at_level_debug(log: structlog.stdlib.BoundLogger) -> None:
    """Whoever asks for everything gets it on a terminal too."""
    line = on_console(log, "debug", logs.IMAGE_FILED, **MOVE)
    assert all(f"{name}=" in line for name in MOVE)


def test_a_hostile_name_neither_paints_nor_breaks_a_short_line(log: structlog.stdlib.BoundLogger) -> None:
    """Names come from whoever drops files."""
    hostile = {**MOVE, "path": "/srv/sortd/Tornillos/Images/\x1b[31m\n\udce9.jpg", "second_label": "\x1b[2J"}
    line = on_console(log, "info", logs.IMAGE_FILED, **hostile)
    assert line.count("\n") == 1
    assert "\x1b" not in line


def test_the_journal_gets_the_level_before_each_line_and_nobody_else() -> None:
    """The journal takes <N> off and files by it; a pipe into a program stays pure JSON."""
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


def test_configuring_again_replaces_and_doubles_nothing(log: structlog.stdlib.BoundLogger) -> None:
    """A reload may change the level; each line is still said once."""
    stream = io.StringIO()
    for _ in range(3):
        logs.configure("json", stream=stream, environ={})
    log.info(logs.CONFIG_RELOADED)
    assert len(lines(stream)) == 1


def test_every_outcome_of_a_move_has_an_event() -> None:
    """No move is silent."""
    assert set(logs.IMAGE_EVENTS) == set(Outcome)


class TestReadableJson:
    """JSON that people search through."""

    @pytest.mark.parametrize("name", ["año/ñandú.jpg", "日本語", "🦜", "Ж"])
    def test_json_leaves_letters_as_they_are(self, name: str) -> None:
        """Whoever looks for a name with grep finds it."""
        assert files.readable_json({"path": name}) == f'{{"path": "{name}"}}'

    @pytest.mark.parametrize(
        "name", ["\x9b31m", "\u202egpj.exe", "a\u2028b", "caf\udce9", "\x7f", "\x85", "\U000e0041"]
    )
    def test_json_escapes_what_cannot_be_seen(self, name: str) -> None:
        """No terminal is painted, no line broken, and the very name comes back."""
        text = files.readable_json({"path": name})
        assert text.isascii()
        assert json.loads(text) == {"path": name}

    def test_json_for_a_stream_of_few_letters_is_ascii(self) -> None:
        """A parrot in Latin-1 would be an escape that JSON does not know."""
        text = files.readable_json({"path": "é🦜"}, encoding="iso-8859-1", indent=2)
        assert text.isascii()
        assert json.loads(text) == {"path": "é🦜"}

    @pytest.mark.parametrize("encoding", ["utf-8", "ascii", "iso-8859-1"])
    def test_log_lines_are_json_in_every_encoding(self, encoding: str) -> None:
        """Also of names that the stream has no letters for, and of bytes that are none."""
        written = io.BytesIO()
        logs.configure("json", "info", stream=io.TextIOWrapper(written, encoding, write_through=True), environ={})
        structlog.get_logger("sortd.test").info("image.filed", path="é🦜\udce9")
        assert json.loads(written.getvalue().decode(encoding))["path"] == "é🦜\udce9"
        assert ("é".encode(encoding, "replace") in written.getvalue()) == (encoding == "utf-8")
