"""The inbox of the loop: signals, answers in order, and file events once for each path.

Each kind has its own queue, so that none waits behind many of another kind. A file that changes a thousand times is
inspected once; beyond ``most_events`` paths one ``EventsDropped`` replaces them. ``put`` may be called from any thread,
``put_signal`` from a signal handler.
"""

import queue
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import suppress
from time import monotonic

from sortd.daemon.worker import Posted
from sortd.moving.copy_queue import Copied, CopyFailed, CopyQueueDied
from sortd.systemd import Signalled
from sortd.watch.observer import FileEvent
from sortd.watch.watcher import DropReason, EventsDropped

MOST_EVENTS = 50_000  # some 20 MB; the kernel queues 16,384 events by default

GATHER_SECONDS = 0.02  # between turns for file events alone: else each event of a storm would cost a turn

MANY_EVENTS = 1000  # enough for a turn

Reported = Posted | Copied | CopyFailed | CopyQueueDied  # by the worker and the copier

Message = Reported | FileEvent | EventsDropped


class Inbox:
    """The messages to the loop that have not been taken yet."""

    def __init__(self, *, most_events: int = MOST_EVENTS) -> None:
        """Start empty."""
        self._most_events = most_events
        self._signals: deque[Signalled] = deque()
        self._reported: deque[Reported] = deque()
        self._arriving: queue.SimpleQueue[Reported | None] = queue.SimpleQueue()  # None: wake up only
        self._events: OrderedDict[tuple[str, bool], FileEvent] = OrderedDict()
        self._drops: dict[tuple[str, DropReason], EventsDropped] = {}
        self._events_taken_at = float("-inf")
        self._lock = threading.Lock()  # of events and drops; never used by a signal handler

    def put(self, message: Message) -> None:
        """Add a message and wake the loop."""
        match message:
            case FileEvent() | EventsDropped():
                self._put_event(message)
            case reported:
                self._arriving.put(reported)

    def put_signal(self, signalled: Signalled) -> None:
        """Add a signal and wake the loop; reentrant."""
        self._signals.append(signalled)
        self._arriving.put(None)

    def _put_event(self, message: FileEvent | EventsDropped) -> None:
        with self._lock:
            was_empty = not (self._events or self._drops)
            if isinstance(message, EventsDropped):
                self._drops[message.root, message.reason] = message
            else:
                self._keep(message)
        if was_empty:
            self._arriving.put(None)

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
        if not (self._is_urgent or self._events or self._drops):
            self._receive(seconds)
        until = self._events_taken_at + GATHER_SECONDS
        while 0 < len(self._events) < MANY_EVENTS and not self._is_urgent and (left := until - monotonic()) > 0:
            self._receive(left)

    @property
    def _is_urgent(self) -> bool:
        return bool(self._signals or self._reported)

    def _receive(self, seconds: float) -> None:
        with suppress(queue.Empty):
            self._take_in(self._arriving.get(timeout=seconds))

    def signals(self) -> Iterator[Signalled]:
        """Yield and remove every signal."""
        while self._signals:
            yield self._signals.popleft()

    def reported(self) -> Iterator[Reported]:
        """Yield and remove the answers of the worker and the copier, in order; stopping early keeps the rest."""
        with suppress(queue.Empty):
            for _ in range(self._arriving.qsize()):
                self._take_in(self._arriving.get_nowait())
        while self._reported:
            yield self._reported.popleft()

    def file_events(self) -> Iterator[FileEvent | EventsDropped]:
        """Yield and remove drops and events, oldest first; stopping early keeps the rest."""
        self._events_taken_at = monotonic()
        while (event := self._next_event()) is not None:
            yield event

    def _next_event(self) -> FileEvent | EventsDropped | None:
        with self._lock:
            if self._drops:
                return self._drops.pop(next(iter(self._drops)))
            return self._events.popitem(last=False)[1] if self._events else None

    def _take_in(self, reported: Reported | None) -> None:
        if reported is not None:
            self._reported.append(reported)
