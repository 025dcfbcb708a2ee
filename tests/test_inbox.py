"""The inbox: signals and answers wait behind no hint, a path is hinted at once, and what is kept is bounded."""

import os
import signal
import threading

import pytest

from sortd.daemon.inbox import MANY_EVENTS, Inbox
from sortd.daemon.worker import WorkerReady
from sortd.systemd import Signalled, signals_posted
from sortd.watch.observer import FileEvent
from sortd.watch.watcher import DropReason, EventsDropped
from tests.daemon_process import PATIENCE_SECONDS

READY = WorkerReady("clip", "a model", 0.1)


def test_inbox_signal_waits_behind_no_hint_and_no_answer() -> None:
    """Whatever was posted before, each kind is taken on its own."""
    inbox = Inbox()
    for number in range(1000):
        inbox.put(FileEvent(str(number)))
    inbox.put(READY)
    inbox.put_signal(Signalled(signal.SIGTERM))
    inbox.wait(0)
    assert list(inbox.signals()) == [Signalled(signal.SIGTERM)]
    assert list(inbox.reported()) == [READY]
    assert len(list(inbox.file_events())) == 1000


def test_inbox_hints_of_one_path_are_one() -> None:
    """Ten thousand renames between two names are two looks; that a writer closed the file is kept."""
    inbox = Inbox()
    for _ in range(5000):
        inbox.put(FileEvent("a"))
        inbox.put(FileEvent("b", closed=True))
        inbox.put(FileEvent("b"))
        inbox.put(FileEvent("b", directory=True))
    hints = list(inbox.file_events())
    assert [(hint.path, hint.closed, hint.directory) for hint in hints if isinstance(hint, FileEvent)] == [
        ("a", False, False),
        ("b", True, False),
        ("b", False, True),
    ]


def test_inbox_more_hints_than_are_kept_become_a_loss() -> None:
    """Memory is bounded, and a scan of everything finds what was dropped; what comes later is hinted at again."""
    inbox = Inbox(most_events=10)
    for number in range(11):
        inbox.put(FileEvent(str(number)))
    inbox.put(FileEvent("later"))
    (lost, hint) = inbox.file_events()
    assert isinstance(lost, EventsDropped)
    assert (lost.root, lost.reason) == ("", DropReason.OVERFLOWED)
    assert isinstance(hint, FileEvent)
    assert hint.path == "later"


def test_inbox_losses_of_one_root_are_one() -> None:
    """An overflow that is told again and again is one scan."""
    inbox = Inbox()
    for number in range(100):
        inbox.put(EventsDropped("/data", f"overflow {number}", DropReason.OVERFLOWED))
    assert [lost.why for lost in inbox.file_events() if isinstance(lost, EventsDropped)] == ["overflow 99"]


def test_inbox_what_was_not_taken_is_there_next_time() -> None:
    """Whoever stops between two hints or answers waits for nothing before it takes the others."""
    inbox = Inbox()
    inbox.put(FileEvent("a"))
    inbox.put(FileEvent("b"))
    next(inbox.file_events())
    inbox.wait(PATIENCE_SECONDS)
    assert [hint.path for hint in inbox.file_events() if isinstance(hint, FileEvent)] == ["b"]
    inbox.put(READY)
    inbox.put(READY)
    next(inbox.reported())
    inbox.wait(PATIENCE_SECONDS)
    assert list(inbox.reported()) == [READY]


def test_inbox_wakes_for_each_kind() -> None:
    """A loop that sleeps is woken by a hint, a loss, an answer of another thread, and a signal."""
    inbox = Inbox()
    for message in (FileEvent("a"), EventsDropped("/data", "why", DropReason.RESTARTED), READY):
        thread = threading.Thread(target=inbox.put, args=(message,))
        thread.start()
        while not (taken := [*inbox.reported(), *inbox.file_events()]):
            inbox.wait(PATIENCE_SECONDS)
        thread.join()
        assert taken == [message]
    with signals_posted(inbox.put_signal):
        os.kill(os.getpid(), signal.SIGHUP)
        while not (heard := list(inbox.signals())):
            inbox.wait(PATIENCE_SECONDS)
    assert heard == [Signalled(signal.SIGHUP)]


def test_inbox_hints_that_follow_on_others_are_gathered_and_nothing_else_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a storm a turn takes what came within a pause; an answer or a signal ends it at once."""
    monkeypatch.setattr("sortd.daemon.inbox.GATHER_SECONDS", 10 * PATIENCE_SECONDS)
    inbox = Inbox()
    inbox.put(FileEvent("first"))
    inbox.wait(PATIENCE_SECONDS)
    assert len(list(inbox.file_events())) == 1  # nothing preceded it
    inbox.put(FileEvent("second"))

    def put_two() -> None:
        inbox.put(FileEvent("third"))
        inbox.put(READY)

    thread = threading.Thread(target=put_two)
    thread.start()
    inbox.wait(PATIENCE_SECONDS)
    thread.join()
    assert list(inbox.reported()) == [READY]
    assert [hint.path for hint in inbox.file_events() if isinstance(hint, FileEvent)] == ["second", "third"]
    for number in range(MANY_EVENTS):
        inbox.put(FileEvent(str(number)))
    inbox.wait(PATIENCE_SECONDS)  # so many are work enough
    assert len(list(inbox.file_events())) == MANY_EVENTS
