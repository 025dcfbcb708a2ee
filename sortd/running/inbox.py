"""The inbox of the loop: signals apart from all else, answers of other threads in order, hints once for each path.

Signals, answers and hints have a queue each, so that none of them waits behind a hundred thousand of the others. Hints
are kept by path, so that a file that changes a thousand times is looked at once; beyond ``most_hints`` paths they are
dropped for ``HintsLost``, which asks for a scan. ``put`` may be called from any thread, ``put_signal`` from a signal
handler too.
"""

import queue
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import suppress
from time import monotonic

from sortd.moving.copy_queue import Copied, CopyFailed, CopyQueueDied
from sortd.running.worker import Posted
from sortd.signals import Signalled
from sortd.watch import Hint, HintsLost, Loss

MOST_HINTS = 50_000
"""Paths that are kept until they are looked at: some 20 MB. The kernel queues 16,384 events by default."""

GATHER_SECONDS = 0.02
"""From one turn that looks for hints to the next, unless something else is to be done: in a storm each hint would be a
turn, and a path that changes a thousand times a thousand looks."""

MANY_HINTS = 1000
"""So many hints are not waited with: they are a turn's work."""

Told = Posted | Copied | CopyFailed | CopyQueueDied
"""What the worker and the copier tell; they have few jobs at a time, so there are few of these."""

Message = Told | Hint | HintsLost


class Inbox:
    """What was posted to the loop and has not been taken yet."""

    def __init__(self, *, most_hints: int = MOST_HINTS) -> None:
        """Begin empty."""
        self._most_hints = most_hints
        self._signals: deque[Signalled] = deque()
        self._told: deque[Told] = deque()
        self._arriving: queue.SimpleQueue[Told | None] = queue.SimpleQueue()  # None only wakes the loop
        self._hints: OrderedDict[tuple[str, bool], Hint] = OrderedDict()
        self._losses: dict[tuple[str, Loss], HintsLost] = {}
        self._hints_taken_at = float("-inf")
        self._lock = threading.Lock()  # of hints and losses; a signal handler never takes it

    # ------------------------------------------------------------ from any thread

    def put(self, message: Message) -> None:
        """Take a message in and wake the loop."""
        match message:
            case Hint() | HintsLost():
                self._put_hint(message)
            case told:
                self._arriving.put(told)

    def put_signal(self, signalled: Signalled) -> None:
        """Take a signal in and wake the loop; reentrant, for signal handlers."""
        self._signals.append(signalled)
        self._arriving.put(None)

    def _put_hint(self, message: Hint | HintsLost) -> None:
        with self._lock:
            was_empty = not (self._hints or self._losses)
            if isinstance(message, HintsLost):
                self._losses[message.root, message.loss] = message
            else:
                self._keep(message)
        if was_empty:
            self._arriving.put(None)

    def _keep(self, hint: Hint) -> None:
        known = self._hints.get((hint.path, hint.directory))
        if known is not None and known.closed:
            return
        if known is None and len(self._hints) >= self._most_hints:
            self._hints.clear()
            why = f"more than {self._most_hints} files changed before they could be looked at; a scan finds them"
            self._losses["", Loss.OVERFLOWED] = HintsLost("", why, Loss.OVERFLOWED)
            return
        self._hints[hint.path, hint.directory] = hint

    # ------------------------------------------------------------ from the loop

    def wait(self, seconds: float) -> None:
        """Sleep until something is there to be taken, at most so long; hints that follow on others are gathered."""
        if not (self._is_urgent or self._hints or self._losses):
            self._receive(seconds)
        until = self._hints_taken_at + GATHER_SECONDS
        while 0 < len(self._hints) < MANY_HINTS and not self._is_urgent and (left := until - monotonic()) > 0:
            self._receive(left)

    @property
    def _is_urgent(self) -> bool:
        return bool(self._signals or self._told)

    def _receive(self, seconds: float) -> None:
        with suppress(queue.Empty):
            self._take_in(self._arriving.get(timeout=seconds))

    def signals(self) -> Iterator[Signalled]:
        """Take every signal."""
        while self._signals:
            yield self._signals.popleft()

    def told(self) -> Iterator[Told]:
        """Take what the worker and the copier tell, in order; whoever stops between two finds the rest next time."""
        with suppress(queue.Empty):
            for _ in range(self._arriving.qsize()):
                self._take_in(self._arriving.get_nowait())
        while self._told:
            yield self._told.popleft()

    def hints(self) -> Iterator[Hint | HintsLost]:
        """Take losses and hints, oldest first; whoever stops between two finds the rest next time."""
        self._hints_taken_at = monotonic()
        while (hint := self._next_hint()) is not None:
            yield hint

    def _next_hint(self) -> Hint | HintsLost | None:
        with self._lock:
            if self._losses:
                return self._losses.pop(next(iter(self._losses)))
            return self._hints.popitem(last=False)[1] if self._hints else None

    def _take_in(self, told: Told | None) -> None:
        if told is not None:
            self._told.append(told)
