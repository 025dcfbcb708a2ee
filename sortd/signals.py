"""Signals become messages, so that what they ask for happens between two turns of the loop and not inside of one."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

STOP = frozenset({signal.SIGTERM, signal.SIGINT})
"""Ask for an orderly end; the second one acts as it does in any program."""

HEARD = (*STOP, signal.SIGHUP, signal.SIGUSR1)


@dataclass(frozen=True, slots=True)
class Signalled:
    """A signal arrived."""

    number: int


@contextmanager
def signals_posted(post: Callable[[Signalled], None]) -> Iterator[None]:
    """Post every signal heard, from the main thread, and put the handlers back at the end.

    ``post`` runs between two instructions of the main thread, so it must be reentrant: ``queue.SimpleQueue.put`` is.
    """
    before = {number: signal.getsignal(number) for number in HEARD}

    def handle(number: int, _frame: FrameType | None) -> None:
        if number in STOP:
            signal.signal(number, before[signal.Signals(number)])
        post(Signalled(number))

    for number in HEARD:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
