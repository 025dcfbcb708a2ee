"""The inbox: signals and answers wait behind no file event, events of a path are merged, and its size is limited."""

import os
import signal
import threading

import pytest

from sortd.daemon.inbox import MANY_EVENTS, Inbox
from sortd.daemon.worker import WorkerReady
from sortd.service import Signalled, signals_posted
from sortd.watch.watcher import DropReason, EventsDropped, FileEvent
from tests.daemon_process import PATIENCE_SECONDS

READY = WorkerReady("clip", "a model")


def test_inbox_signal_is_taken_before_events_and_answers() -> None:
    """Each kind of message is taken on its own, whatever was posted before."""
    inbox = Inbox()
    for number in range(1000):
        inbox.put(FileEvent(str(number)))
    inbox.put(READY)
    inbox.put_signal(Signalled(signal.SIGTERM))
    inbox.wait(0)
    assert list(inbox.signals()) == [Signalled(signal.SIGTERM)]
    assert list(inbox.reported()) == [READY]
    assert len(list(inbox.file_events())) == 1000


def test_inbox_events_of_one_path_are_merged() -> None:
    """Ten thousand renames between two names leave two events; a close after writing is kept."""
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


def test_inbox_too_many_events_are_replaced_by_one_drop() -> None:
    """Memory is limited, a scan finds what was dropped, and later events are kept again."""
    inbox = Inbox(most_events=10)
    for number in range(11):
        inbox.put(FileEvent(str(number)))
    inbox.put(FileEvent("later"))
    (lost, hint) = inbox.file_events()
    assert isinstance(lost, EventsDropped)
    assert (lost.root, lost.reason) == ("", DropReason.OVERFLOWED)
    assert isinstance(hint, FileEvent)
    assert hint.path == "later"


def test_inbox_drops_of_one_root_are_merged() -> None:
    """A repeated overflow causes one scan."""
    inbox = Inbox()
    for number in range(100):
        inbox.put(EventsDropped("/data", f"overflow {number}", DropReason.OVERFLOWED))
    assert [lost.why for lost in inbox.file_events() if isinstance(lost, EventsDropped)] == ["overflow 99"]


def test_inbox_messages_not_taken_stay() -> None:
    """An iteration that stops early leaves the rest for the next one, without waiting."""
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


def test_inbox_any_message_wakes_the_loop() -> None:
    """A file event, a drop, an answer of another thread and a signal each end the wait."""
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


def test_inbox_successive_events_are_collected_without_delaying_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A turn in a storm takes the events of a pause; an answer or a signal ends the pause."""
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
