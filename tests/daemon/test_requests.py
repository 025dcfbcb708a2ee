"""Requests reach the process that moves files, once, and are answered or forgotten."""

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sortd.daemon.control import MOST_BYTES, AnsweredError, Answering, Reply, Request, Requests, ask
from sortd.errors import DataError, DestinationError, JournalError, LayoutError, StartupError
from sortd.service import Status, started_ticks
from tests.daemon_process import PATIENCE_SECONDS
from tests.hostile_files import HOSTILE

REPOSITORY = Path(__file__).parents[2]


def refuse(error: OSError) -> None:
    """Fail where everything can be written."""
    raise error


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state directory in which this very process claims to be the sortd that runs."""
    Status(tmp_path).write({"running": True, "pid": os.getpid(), "started_ticks": started_ticks(os.getpid())})
    return tmp_path


def write(state: Path, name: str, **request: Any) -> None:
    """Leave a request as an asker does."""
    facts = {"expires_at": time.time() + 60, **request}
    (state / "requests" / f"{name}.request").write_text(json.dumps(facts), encoding="utf-8")


def serve(requests: Requests, answer: Answering) -> int:
    """Answer every request that waits; return how many there were."""
    before = len(list(requests._path.glob("*.answer")))
    requests.wake()
    while requests.is_due:
        requests.advance(answer)
    return len(list(requests._path.glob("*.answer"))) - before


def do_it(request: Request) -> Reply:
    """Do what is asked, or fail if that is asked."""
    if request["do"] == "fail":
        raise DataError("no such thing")
    return {"done": request["do"]}


@contextmanager
def served(state: Path, do: Callable[[Request], Reply] = do_it) -> Iterator[list[Request]]:
    """Serve requests of this process by a thread, woken by the signal as the daemon is."""
    requests, heard, woken, stop = Requests(state, report=refuse), [], threading.Event(), threading.Event()
    requests.open()
    before = signal.signal(signal.SIGUSR1, lambda *_: woken.set())

    def answer(request: Request) -> Reply:
        heard.append(request)
        return do(request)

    def serve_in_turn() -> None:
        while not stop.is_set():
            if woken.wait(0.05):
                woken.clear()
                serve(requests, answer)

    thread = threading.Thread(target=serve_in_turn)
    thread.start()
    try:
        yield heard
    finally:
        stop.set()
        thread.join()
        signal.signal(signal.SIGUSR1, before)


def test_requests_question_is_answered(state: Path) -> None:
    """The answer comes back to whoever asked, names that are not UTF-8 included, and no file is left."""
    with served(state) as heard:
        assert ask(state, {"do": "it", "path": "/a/\udcff.png"}) == {"done": "it"}
    assert heard[0]["path"] == "/a/\udcff.png"
    assert list((state / "requests").iterdir()) == []


def test_requests_refusal_comes_back_as_an_error(state: Path) -> None:
    """What the daemon cannot do is told with its sentence and exit code."""
    with served(state), pytest.raises(AnsweredError, match="no such thing") as caught:
        ask(state, {"do": "fail"})
    assert caught.value.exit_code == 65


def test_nobody_is_asked_where_none_runs(tmp_path: Path) -> None:
    """Without a live sortd the caller acts itself."""
    assert ask(tmp_path, {"do": "it"}) is None
    Status(tmp_path).write({"running": True, "pid": os.getpid(), "started_ticks": 1})
    assert ask(tmp_path, {"do": "it"}) is None  # the number is another process's by now


def test_ask_daemon_that_ends_with_the_request_leaves_it_to_the_caller(tmp_path: Path) -> None:
    """Nobody waits for the answer of a process that is gone, and the request is withdrawn."""
    Requests(tmp_path, report=refuse).open()
    process = subprocess.Popen(["sleep", "1000"])  # which the signal of the request ends
    Status(tmp_path).write({"running": True, "pid": process.pid, "started_ticks": started_ticks(process.pid)})
    reaper = threading.Thread(target=process.wait)
    reaper.start()
    assert ask(tmp_path, {"do": "it"}, seconds=PATIENCE_SECONDS) is None
    reaper.join()
    assert list((tmp_path / "requests").iterdir()) == []


def test_ask_daemon_that_does_not_answer_is_reported_and_its_request_withdrawn(state: Path) -> None:
    """Nothing is undone later that somebody has given up on."""
    Requests(state, report=refuse).open()
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with pytest.raises(StartupError, match="did not answer"):
            ask(state, {"do": "it"}, seconds=0.1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert list((state / "requests").iterdir()) == []


def test_requests_expired_request_is_not_done(state: Path) -> None:
    """A request past its time is dropped unanswered."""
    requests, heard = Requests(state, report=refuse), list[Request]()
    requests.open()
    write(state, "late", do="it", expires_at=time.time() - 1)
    serve(requests, lambda request: heard.append(request) or {})  # type: ignore[func-returns-value]  # a list tells nothing
    assert heard == []
    assert list((state / "requests").iterdir()) == []


def test_nonsense_is_answered_as_nonsense(state: Path) -> None:
    """A file that is no request does no harm to the ones behind it."""
    requests = Requests(state, report=refuse)
    requests.open()
    (state / "requests" / "a.request").write_text("{", encoding="utf-8")
    write(state, "b", do="it")
    assert serve(requests, lambda request: {"done": request["do"]}) == 2
    assert "is not a valid request" in answered(state, "a")["error"]
    assert json.loads((state / "requests" / "b.answer").read_text(encoding="utf-8")) == {"done": "it"}


def test_requests_broken_journal_is_answered(state: Path) -> None:
    """Whoever asked hears why; what becomes of the dataset is the collection's."""
    requests = Requests(state, report=refuse)
    requests.open()
    write(state, "a", do="it")

    def answer(_: Request) -> Reply:
        raise JournalError("the disk is gone")

    assert serve(requests, answer) == 1
    reply = json.loads((state / "requests" / "a.answer").read_text(encoding="utf-8"))
    assert reply == {"error": "the disk is gone", "exit_code": 74}


def test_requests_old_files_are_removed(state: Path) -> None:
    """What was asked of an earlier run is not done by the next, and answers that nobody took are removed."""
    requests = Requests(state, report=refuse, clock=lambda: time.time() + 3600)
    requests.open()
    write(state, "old", do="it")
    Requests(state, report=refuse).open()
    assert list((state / "requests").iterdir()) == []
    (state / "requests" / "left.answer").write_text("{}", encoding="utf-8")
    serve(requests, lambda _: {})
    assert list((state / "requests").iterdir()) == []


def test_requests_answer_that_cannot_be_written_ends_nothing(state: Path) -> None:
    """What was asked for is done, the daemon hears of the disk and goes on to the next."""
    told: list[OSError] = []
    requests = Requests(state, report=told.append)
    requests.open()
    for name in ("a", "b"):
        write(state, name, do="it")
    (state / "requests" / "a.answer").mkdir()
    serve(requests, lambda request: {"done": request["do"]})
    assert [Path(str(error.filename)).name for error in told] == ["a.answer"]
    assert (state / "requests" / "b.answer").exists()
    assert not list((state / "requests").glob("*.request"))


def test_only_the_daemons_user_may_ask(state: Path) -> None:
    """The folder is closed to others: whoever can ask can have files moved."""
    Requests(state, report=refuse).open()
    assert (state / "requests").stat().st_mode & 0o077 == 0


def test_requests_long_answer_is_done_step_by_step(state: Path) -> None:
    """Each step is one turn of the loop; what comes meanwhile waits for its end, and is not begun twice."""
    requests = Requests(state, report=refuse)
    requests.open()
    steps: list[str] = []

    def answer(request: Request) -> Generator[None, None, Reply]:
        for step in range(3):
            steps.append(f"{request['do']} {step}")
            yield
        return {"done": request["do"]}

    write(state, "first", do="first")
    requests.wake()
    requests.advance(answer)
    assert steps == ["first 0"]
    write(state, "second", do="second")
    requests.wake()
    while requests.is_due:
        requests.advance(answer)
    assert steps == [f"{name} {step}" for name in ("first", "second") for step in range(3)]
    assert json.loads((state / "requests" / "first.answer").read_text()) == {"done": "first"}
    assert sorted(path.name for path in (state / "requests").iterdir()) == ["first.answer", "second.answer"]


def test_requests_under_way_at_a_stop_are_answered_as_not_done(state: Path) -> None:
    """Nobody waits for an answer that will not come: neither to what had begun nor to what waited."""
    requests = Requests(state, report=refuse)
    requests.open()

    def answer(_: Request) -> Generator[None, None, Reply]:
        yield
        return {"done": "never"}

    write(state, "begun", do="it")
    requests.wake()
    requests.advance(answer)
    write(state, "waits", do="it")
    requests.wake()
    requests.close()
    assert not requests.is_due
    for name in ("begun", "waits"):
        told = json.loads((state / "requests" / f"{name}.answer").read_text())
        assert told["exit_code"] == 75
        assert "repeat the request" in told["error"]


def no_answer(_: Request) -> Reply:
    """Fail: nothing that makes sense was asked."""
    raise AssertionError


def answered(state: Path, name: str) -> dict[str, Any]:
    """Return the answer to a request."""
    reply: dict[str, Any] = json.loads((state / "requests" / f"{name}.answer").read_text(encoding="utf-8"))
    return reply


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", HOSTILE)
def test_serve_with_hostile_file_answers_and_goes_on(state: Path, kind: str) -> None:
    """It is answered as no request, the ones behind it are served, and it is not looked at again."""
    told: list[OSError] = []
    requests = Requests(state, report=told.append)
    requests.open()
    HOSTILE[kind](state / "requests" / "a.request")
    write(state, "b", do="it")
    for _ in range(3):
        serve(requests, lambda request: {"done": request["do"]})
    assert "is not a valid request" in answered(state, "a")["error"]
    assert answered(state, "b") == {"done": "it"}
    left = [] if kind != "folder" else [str(state / "requests" / "a.request")]
    assert [error.filename for error in told] == left
    assert [str(path) for path in (state / "requests").glob("*.request")] == left


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b"\xff\xfe\x00",
        b"",
        b"null",
        b"[]",
        b'"text"',
        b'{"expires_at": 1e999999}',
        b'{"expires_at": ' + b"9" * 400 + b"}",
        b'{"expires_at": ' + b"9" * 5000 + b"}",
        b'{"expires_at": []}',
        b" " * (MOST_BYTES + 1),
    ],
    ids=lambda content: f"{content[:20]!r}, {len(content)} bytes",
)
def test_serve_with_nonsense_answers(state: Path, content: bytes) -> None:
    """Depth, numbers, types, encoding and size are whatever somebody wrote; the answer is a short sentence."""
    requests = Requests(state, report=refuse)
    requests.open()
    (state / "requests" / "a.request").write_bytes(content)
    serve(requests, lambda request: {"done": request["do"]})
    reply = answered(state, "a")
    assert reply["exit_code"] == 65
    assert len(reply["error"]) < 300


@pytest.mark.parametrize(
    "error", [OverflowError(), RecursionError(), OSError(5, "I/O error", "/x"), DestinationError("full")]
)
def test_serve_answers_what_cannot_be_done(state: Path, error: Exception) -> None:
    """Only a journal that fails stops the daemon; whatever else comes of a request is an answer."""
    told: list[OSError] = []
    requests = Requests(state, report=told.append)
    requests.open()
    write(state, "a", do="it")

    def answer(_: Request) -> Reply:
        raise error

    assert serve(requests, answer) == 1
    assert answered(state, "a")["error"]
    assert told == ([error] if isinstance(error, OSError) else [])


def test_advance_answers_one_request_a_turn_the_oldest_first(state: Path) -> None:
    """Thousands of requests do not keep the loop from its work, though nobody takes the answers."""
    requests = Requests(state, report=refuse)
    requests.open()
    for number in range(25):
        write(state, f"{number:03}", do=number)
        os.utime(state / "requests" / f"{number:03}.request", ns=(number, number))
    heard: list[int] = []

    def answer(request: Request) -> Reply:
        heard.append(request["do"])
        return {}

    requests.wake()
    for turn in range(25):
        assert requests.is_due
        requests.advance(answer)
        assert heard == list(range(turn + 1))
    assert not requests.is_due


def test_advance_request_that_comes_while_others_wait_is_answered(state: Path) -> None:
    """A request that comes while others wait is not forgotten."""
    requests = Requests(state, report=refuse)
    requests.open()
    for number in range(3):
        write(state, str(number), do="it")
    requests.wake()
    requests.advance(lambda _: {})
    write(state, "late", do="it")
    requests.wake()
    while requests.is_due:
        requests.advance(lambda _: {})
    assert answered(state, "late") == {}


@pytest.mark.parametrize("kind", HOSTILE)
def test_open_with_leftovers_of_any_kind_serves(state: Path, kind: str) -> None:
    """What an earlier run left does not keep the next one from starting; what cannot be removed is told."""
    (state / "requests").mkdir()
    HOSTILE[kind](state / "requests" / "a.request")
    told: list[OSError] = []
    requests = Requests(state, report=told.append)
    requests.open()
    assert len(told) == (kind == "folder")
    write(state, "b", do="it")
    serve(requests, lambda request: {"done": request["do"]})
    assert answered(state, "b") == {"done": "it"}


def test_open_closes_a_folder_that_was_open_to_others(state: Path) -> None:
    """Whoever may write there could have files moved; a link in its place is refused."""
    (state / "requests").mkdir(mode=0o755)
    Requests(state, report=refuse).open()
    assert (state / "requests").stat().st_mode & 0o077 == 0
    (state / "requests").rename(state / "aside")
    (state / "requests").symlink_to("aside")
    with pytest.raises(LayoutError, match="requests cannot be used"):
        Requests(state, report=refuse).open()


def test_serve_with_unreadable_request_answers(state: Path) -> None:
    """A file that the daemon's user may not read, as one that root wrote under a umask of 077, is answered."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become somebody who may not read everything")
    requests = Requests(state, report=refuse)
    requests.open()
    write(state, "a", do="it")
    for path in (state, state / "requests"):
        os.chown(path, 65_534, 65_534)
    (state / "requests" / "a.request").chmod(0o600)
    folder = os.open(state, os.O_RDONLY)
    os.fchdir(folder)
    os.close(folder)
    os.seteuid(65_534)
    try:
        requests = Requests(Path(), report=refuse)
        assert serve(requests, no_answer) == 1
    finally:
        os.seteuid(0)
        os.chdir(REPOSITORY)
    assert "Permission denied" in answered(state, "a")["error"]


def test_ask_with_strict_umask_writes_what_the_daemon_can_read(state: Path) -> None:
    """Root with a umask of 077 may ask a daemon of another user."""
    modes: list[int] = []
    before = os.umask(0o077)

    def answer(_: Request) -> Reply:
        modes.extend(path.stat().st_mode & 0o777 for path in (state / "requests").glob("*.request"))
        return {}

    try:
        with served(state, answer):
            ask(state, {"do": "it"})
    finally:
        os.umask(before)
    assert modes == [0o644]


@pytest.mark.timeout(60)
def test_ask_with_hostile_answer_is_refused(state: Path) -> None:
    """Root does not wait for a pipe that the daemon's user put there, nor read a file through a link."""
    (state / "requests").mkdir()
    before = signal.signal(signal.SIGUSR1, lambda *_: plant(state))
    try:
        with pytest.raises(StartupError, match="cannot be asked"):
            ask(state, {"do": "it"}, seconds=30)
    finally:
        signal.signal(signal.SIGUSR1, before)


def plant(state: Path) -> None:
    """Put a pipe in the place of each answer that is waited for."""
    for path in (state / "requests").glob("*.request"):
        os.mkfifo(path.with_suffix(".answer"))


def test_ask_never_signals_a_process_of_another_user(state: Path) -> None:
    """Whoever may write the status file could have root end any process by naming it there."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to give a file away")
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
    os.chown(state / "status.json", 65_534, 65_534)
    Requests(state, report=refuse).open()
    try:
        with pytest.raises(StartupError, match="another user"):
            ask(state, {"do": "it"}, seconds=0.1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert heard == []


@pytest.mark.timeout(60)
def test_advance_without_its_folder_comes_to_an_end(state: Path) -> None:
    """Requests that were found before somebody removed the folder are forgotten: the loop may sleep."""
    requests = Requests(state, report=lambda _: None)
    requests.open()
    for name in ("a", "b", "c"):
        write(state, name, do="it")
    requests.wake()
    requests.advance(lambda _: {})
    shutil.rmtree(state / "requests")
    while requests.is_due:
        requests.advance(no_answer)
