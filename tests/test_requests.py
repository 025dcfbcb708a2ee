"""Requests reach the process that moves files, once, and are answered or forgotten."""

import json
import os
import signal
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sortd.errors import DataError, JournalError, StartupError
from sortd.running.requests import AnsweredError, Reply, Request, Requests, ask
from sortd.status import Status, started_ticks


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


@contextmanager
def served(state: Path) -> Iterator[list[Request]]:
    """Serve requests of this process by a thread, woken by the signal as the daemon is."""
    requests, heard, woken, stop = Requests(state, report=refuse), [], threading.Event(), threading.Event()
    requests.open()
    before = signal.signal(signal.SIGUSR1, lambda *_: woken.set())

    def answer(request: Request) -> Reply:
        heard.append(request)
        if request["do"] == "fail":
            raise DataError("no such thing")
        return {"done": request["do"]}

    def serve() -> None:
        while not stop.is_set():
            if woken.wait(0.05):
                woken.clear()
                requests.serve(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield heard
    finally:
        stop.set()
        thread.join()
        signal.signal(signal.SIGUSR1, before)


def test_a_question_is_answered(state: Path) -> None:
    """The answer comes back to whoever asked, names that are not UTF-8 included, and no file is left."""
    with served(state) as heard:
        assert ask(state, {"do": "it", "path": "/a/\udcff.png"}) == {"done": "it"}
    assert heard[0]["path"] == "/a/\udcff.png"
    assert list((state / "requests").iterdir()) == []


def test_a_refusal_comes_back_as_an_error(state: Path) -> None:
    """What the daemon cannot do is told with its sentence and exit code."""
    with served(state), pytest.raises(AnsweredError, match="no such thing") as caught:
        ask(state, {"do": "fail"})
    assert caught.value.exit_code == 65


def test_nobody_is_asked_where_none_runs(tmp_path: Path) -> None:
    """Without a live sortd the caller acts itself."""
    assert ask(tmp_path, {"do": "it"}) is None
    Status(tmp_path).write({"running": True, "pid": os.getpid(), "started_ticks": 1})
    assert ask(tmp_path, {"do": "it"}) is None  # the number is another process's by now


def test_a_deaf_daemon_is_reported_and_its_request_withdrawn(state: Path) -> None:
    """Nothing is undone later that somebody has given up on."""
    Requests(state, report=refuse).open()
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with pytest.raises(StartupError, match="did not answer"):
            ask(state, {"do": "it"}, seconds=0.1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert list((state / "requests").iterdir()) == []


def test_what_nobody_waits_for_is_not_done(state: Path) -> None:
    """A request past its time is dropped unanswered."""
    requests, heard = Requests(state, report=refuse), list[Request]()
    requests.open()
    write(state, "late", do="it", expires_at=time.time() - 1)
    requests.serve(lambda request: heard.append(request) or {})  # type: ignore[func-returns-value]  # a list tells nothing
    assert heard == []
    assert list((state / "requests").iterdir()) == []


def test_nonsense_is_answered_as_nonsense(state: Path) -> None:
    """A file that is no request does no harm to the ones behind it."""
    requests = Requests(state, report=refuse)
    requests.open()
    (state / "requests" / "a.request").write_text("{", encoding="utf-8")
    write(state, "b", do="it")
    assert requests.serve(lambda request: {"done": request["do"]}) == 2
    assert "is no request" in json.loads((state / "requests" / "a.answer").read_text(encoding="utf-8"))["error"]
    assert json.loads((state / "requests" / "b.answer").read_text(encoding="utf-8")) == {"done": "it"}


def test_requests_broken_journal_is_answered(state: Path) -> None:
    """Whoever asked hears why; what becomes of the dataset is the collection's."""
    requests = Requests(state, report=refuse)
    requests.open()
    write(state, "a", do="it")

    def answer(_: Request) -> Reply:
        raise JournalError("the disk is gone")

    assert requests.serve(answer) == 1
    reply = json.loads((state / "requests" / "a.answer").read_text(encoding="utf-8"))
    assert reply == {"error": "the disk is gone", "exit_code": 74}


def test_the_past_is_forgotten(state: Path) -> None:
    """What was asked of an earlier run is not done by the next, and answers that nobody took are removed."""
    requests = Requests(state, report=refuse, clock=lambda: time.time() + 3600)
    requests.open()
    write(state, "old", do="it")
    Requests(state, report=refuse).open()
    assert list((state / "requests").iterdir()) == []
    (state / "requests" / "left.answer").write_text("{}", encoding="utf-8")
    requests.serve(lambda _: {})
    assert list((state / "requests").iterdir()) == []


def test_an_answer_that_cannot_be_written_ends_nothing(state: Path) -> None:
    """What was asked for is done, the daemon hears of the disk and goes on to the next."""
    told: list[OSError] = []
    requests = Requests(state, report=told.append)
    requests.open()
    for name in ("a", "b"):
        write(state, name, do="it")
    (state / "requests" / "a.answer.new").mkdir()
    assert requests.serve(lambda request: {"done": request["do"]}) == 2
    assert [Path(str(error.filename)).name for error in told] == ["a.answer.new"]
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
    requests.take_in()
    requests.advance(answer)
    assert steps == ["first 0"]
    write(state, "second", do="second")
    requests.take_in()
    requests.take_in()
    while requests.is_under_way:
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
    requests.take_in()
    requests.advance(answer)
    write(state, "waits", do="it")
    requests.take_in()
    requests.close()
    assert not requests.is_under_way
    for name in ("begun", "waits"):
        told = json.loads((state / "requests" / f"{name}.answer").read_text())
        assert told["exit_code"] == 75
        assert "ask again" in told["error"]
