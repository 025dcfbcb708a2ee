"""The inbox: signals and answers wait behind no hint, a path is hinted at once, and what is kept is bounded."""

import os
import signal
import threading

import pytest

from sortd.running.inbox import MANY_HINTS, Inbox
from sortd.running.worker import WorkerReady
from sortd.signals import Signalled, signals_posted
from sortd.watch import Hint, HintsLost, Loss
from tests.daemon_process import PATIENCE_SECONDS

READY = WorkerReady("clip", "a model", 0.1)


def test_inbox_signal_waits_behind_no_hint_and_no_answer() -> None:
    """Whatever was posted before, each kind is taken on its own."""
    inbox = Inbox()
    for number in range(1000):
        inbox.put(Hint(str(number)))
    inbox.put(READY)
    inbox.put_signal(Signalled(signal.SIGTERM))
    inbox.wait(0)
    assert list(inbox.signals()) == [Signalled(signal.SIGTERM)]
    assert list(inbox.told()) == [READY]
    assert len(list(inbox.hints())) == 1000


def test_inbox_hints_of_one_path_are_one() -> None:
    """Ten thousand renames between two names are two looks; that a writer closed the file is kept."""
    inbox = Inbox()
    for _ in range(5000):
        inbox.put(Hint("a"))
        inbox.put(Hint("b", closed=True))
        inbox.put(Hint("b"))
        inbox.put(Hint("b", directory=True))
    hints = list(inbox.hints())
    assert [(hint.path, hint.closed, hint.directory) for hint in hints if isinstance(hint, Hint)] == [
        ("a", False, False),
        ("b", True, False),
        ("b", False, True),
    ]


def test_inbox_more_hints_than_are_kept_become_a_loss() -> None:
    """Memory is bounded, and a scan of everything finds what was dropped; what comes later is hinted at again."""
    inbox = Inbox(most_hints=10)
    for number in range(11):
        inbox.put(Hint(str(number)))
    inbox.put(Hint("later"))
    (lost, hint) = inbox.hints()
    assert isinstance(lost, HintsLost)
    assert (lost.root, lost.loss) == ("", Loss.OVERFLOWED)
    assert isinstance(hint, Hint)
    assert hint.path == "later"


def test_inbox_losses_of_one_root_are_one() -> None:
    """An overflow that is told again and again is one scan."""
    inbox = Inbox()
    for number in range(100):
        inbox.put(HintsLost("/data", f"overflow {number}", Loss.OVERFLOWED))
    assert [lost.why for lost in inbox.hints() if isinstance(lost, HintsLost)] == ["overflow 99"]


def test_inbox_what_was_not_taken_is_there_next_time() -> None:
    """Whoever stops between two hints or answers waits for nothing before it takes the others."""
    inbox = Inbox()
    inbox.put(Hint("a"))
    inbox.put(Hint("b"))
    next(inbox.hints())
    inbox.wait(PATIENCE_SECONDS)
    assert [hint.path for hint in inbox.hints() if isinstance(hint, Hint)] == ["b"]
    inbox.put(READY)
    inbox.put(READY)
    next(inbox.told())
    inbox.wait(PATIENCE_SECONDS)
    assert list(inbox.told()) == [READY]


def test_inbox_wakes_for_each_kind() -> None:
    """A loop that sleeps is woken by a hint, a loss, an answer of another thread, and a signal."""
    inbox = Inbox()
    for message in (Hint("a"), HintsLost("/data", "why", Loss.RESTARTED), READY):
        thread = threading.Thread(target=inbox.put, args=(message,))
        thread.start()
        while not (taken := [*inbox.told(), *inbox.hints()]):
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
    monkeypatch.setattr("sortd.running.inbox.GATHER_SECONDS", 10 * PATIENCE_SECONDS)
    inbox = Inbox()
    inbox.put(Hint("first"))
    inbox.wait(PATIENCE_SECONDS)
    assert len(list(inbox.hints())) == 1  # nothing preceded it
    inbox.put(Hint("second"))

    def put_two() -> None:
        inbox.put(Hint("third"))
        inbox.put(READY)

    thread = threading.Thread(target=put_two)
    thread.start()
    inbox.wait(PATIENCE_SECONDS)
    thread.join()
    assert list(inbox.told()) == [READY]
    assert [hint.path for hint in inbox.hints() if isinstance(hint, Hint)] == ["second", "third"]
    for number in range(MANY_HINTS):
        inbox.put(Hint(str(number)))
    inbox.wait(PATIENCE_SECONDS)  # so many are work enough
    assert len(list(inbox.hints())) == MANY_HINTS
