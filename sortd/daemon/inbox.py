"""The messages to the loop of the daemon that have not been taken yet."""

import queue
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import suppress
from time import monotonic

from sortd.daemon.worker import Posted
from sortd.moving.copy_queue import Copied, CopyFailed, CopyQueueDied
from sortd.service import Signalled
from sortd.watch.watcher import DropReason, EventsDropped, FileEvent

MOST_EVENTS = 50_000  # some 20 MB; the kernel queues 16,384 events by default
GATHER_SECONDS = 0.02  # between turns for file events alone: else each event of a storm would cost a turn
MANY_EVENTS = 1000  # enough for a turn

Reported = Posted | Copied | CopyFailed | CopyQueueDied  # by the worker and the copier
Message = Reported | FileEvent | EventsDropped


class Inbox:
    """The messages to the loop that have not been taken yet.

    Each kind has its own queue, so that none waits behind many of another kind. A file that changes a thousand times
    is inspected once; beyond ``most_events`` paths one ``EventsDropped`` replaces them. ``put`` may be called from any
    thread, ``put_signal`` from a signal handler.
    """

    def __init__(self, *, most_events: int = MOST_EVENTS) -> None:
        """Start empty."""
        self._most_events = most_events
        self._signals: deque[Signalled] = deque()
        self._reported: deque[Reported] = deque()
        self._wakes: queue.SimpleQueue[None] = queue.SimpleQueue()  # its ``put`` is reentrant
        self._events: OrderedDict[tuple[str, bool], FileEvent] = OrderedDict()
        self._drops: dict[tuple[str, DropReason], EventsDropped] = {}
        self._events_taken_at = float("-inf")
        self._lock = threading.Lock()  # of events and drops; never used by a signal handler

    def put(self, message: Message) -> None:
        """Add a message and wake the loop."""
        if not isinstance(message, FileEvent | EventsDropped):
            self._reported.append(message)
            self._wakes.put(None)
            return
        with self._lock:
            was_empty = not (self._events or self._drops)
            if isinstance(message, EventsDropped):
                self._drops[message.root, message.reason] = message
            else:
                self._keep(message)
        if was_empty:
            self._wakes.put(None)

    def put_signal(self, signalled: Signalled) -> None:
        """Add a signal and wake the loop; reentrant."""
        self._signals.append(signalled)
        self._wakes.put(None)

    def _keep(self, event: FileEvent) -> None:
        known = self._events.get((event.path, event.directory))
        if known is not None and known.closed:
            return
        if known is None and len(self._events) >= self._most_events:
            self._events.clear()
            why = f"more than {self._most_events} files changed before they could be inspected; a scan finds them"
            self._drops["", DropReason.OVERFLOWED] = EventsDropped("", why, DropReason.OVERFLOWED)
            return
        self._events[event.path, event.directory] = event

    def wait(self, seconds: float) -> None:
        """Sleep until there is a message, at most this long; file events are collected for ``GATHER_SECONDS``."""
        if not (self._signals or self._reported or self._events or self._drops):
            self._sleep(seconds)
        until = self._events_taken_at + GATHER_SECONDS
        while 0 < len(self._events) < MANY_EVENTS and not (self._signals or self._reported):
            if (left := until - monotonic()) <= 0:
                break
            self._sleep(left)

    def _sleep(self, seconds: float) -> None:
        with suppress(queue.Empty):
            self._wakes.get(timeout=seconds)
            while True:
                self._wakes.get_nowait()

    def signals(self) -> Iterator[Signalled]:
        """Yield and remove every signal."""
        while self._signals:
            yield self._signals.popleft()

    def reported(self) -> Iterator[Reported]:
        """Yield and remove the answers of the worker and the copier, in order; stopping early keeps the rest."""
        while self._reported:
            yield self._reported.popleft()

    def file_events(self) -> Iterator[FileEvent | EventsDropped]:
        """Yield and remove drops and events, oldest first; stopping early keeps the rest."""
        self._events_taken_at = monotonic()
        while self._drops or self._events:
            with self._lock:
                event = self._drops.pop(next(iter(self._drops))) if self._drops else self._events.popitem(last=False)[1]
            yield event
