"""The inbox of the loop: signals apart from all else, answers in order, file events once for each path.

Each kind has a queue of its own, so that none waits behind a hundred thousand of the others. File events are kept by
path, so that a file that changes a thousand times is looked at once; beyond ``most_events`` paths one
``EventsDropped`` replaces them. ``put`` may be called from any thread, ``put_signal`` from a signal handler.
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

MOST_EVENTS = 50_000
"""Paths that are kept until they are looked at: some 20 MB. The kernel queues 16,384 events by default."""

GATHER_SECONDS = 0.02
"""From one turn that takes file events to the next, unless something else is to be done: in a storm each event would be
a turn, and a path that changes a thousand times a thousand looks."""

MANY_EVENTS = 1000  # so many events are not waited with: they are a turn's work

Told = Posted | Copied | CopyFailed | CopyQueueDied
"""What the worker and the copier tell; they have few jobs at a time, so there are few of these."""

Message = Told | FileEvent | EventsDropped


class Inbox:
    """What was posted to the loop and has not been taken yet."""

    def __init__(self, *, most_events: int = MOST_EVENTS) -> None:
        """Begin empty."""
        self._most_events = most_events
        self._signals: deque[Signalled] = deque()
        self._told: deque[Told] = deque()
        self._arriving: queue.SimpleQueue[Told | None] = queue.SimpleQueue()  # None only wakes the loop
        self._events: OrderedDict[tuple[str, bool], FileEvent] = OrderedDict()
        self._drops: dict[tuple[str, DropReason], EventsDropped] = {}
        self._events_taken_at = float("-inf")
        self._lock = threading.Lock()  # of events and drops; a signal handler never takes it

    # ------------------------------------------------------------ from any thread

    def put(self, message: Message) -> None:
        """Take a message in and wake the loop."""
        match message:
            case FileEvent() | EventsDropped():
                self._put_event(message)
            case told:
                self._arriving.put(told)

    def put_signal(self, signalled: Signalled) -> None:
        """Take a signal in and wake the loop; reentrant, for signal handlers."""
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
            why = f"more than {self._most_events} files changed before they could be looked at; a scan finds them"
            self._drops["", DropReason.OVERFLOWED] = EventsDropped("", why, DropReason.OVERFLOWED)
            return
        self._events[event.path, event.directory] = event

    # ------------------------------------------------------------ from the loop

    def wait(self, seconds: float) -> None:
        """Sleep until something is there to be taken, at most so long; events that follow on others are gathered."""
        if not (self._is_urgent or self._events or self._drops):
            self._receive(seconds)
        until = self._events_taken_at + GATHER_SECONDS
        while 0 < len(self._events) < MANY_EVENTS and not self._is_urgent and (left := until - monotonic()) > 0:
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

    def file_events(self) -> Iterator[FileEvent | EventsDropped]:
        """Take drops and events, oldest first; whoever stops between two finds the rest next time."""
        self._events_taken_at = monotonic()
        while (event := self._next_event()) is not None:
            yield event

    def _next_event(self) -> FileEvent | EventsDropped | None:
        with self._lock:
            if self._drops:
                return self._drops.pop(next(iter(self._drops)))
            return self._events.popitem(last=False)[1] if self._events else None

    def _take_in(self, told: Told | None) -> None:
        if told is not None:
            self._told.append(told)
