"""A root observer is one watchdog observer on one root: it turns events into ``FileEvent`` and can be checked.

What watchdog 7.1 does that this module is built around, each seen in a run: an exception in a handler ends the
dispatcher; one in the reader thread ends all watching while ``Observer.is_alive()`` stays true; a watched folder that
is renamed, unmounted, mounted over or made anew is watched no more without a word; a link is never watched; a folder
that may not be read counts as watched; a start that fails leaves threads and descriptors behind.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING

from watchdog import events as watchdog_events
from watchdog.observers import Observer
from watchdog.utils import BaseThread

from sortd.files import open_folder
from sortd.names import Reason, owner_of, rule_below
from sortd.watch import inotify

if TYPE_CHECKING:
    from watchdog.observers import ObserverType

# No OPEN, ACCESS, MODIFY or ATTRIB: our own reads, and each write of a slow copy, would fill the kernel's queue.
_EVENTS: list[type[watchdog_events.FileSystemEvent]] = [
    watchdog_events.FileCreatedEvent,
    watchdog_events.FileClosedEvent,
    watchdog_events.FileMovedEvent,
    watchdog_events.FileDeletedEvent,
    watchdog_events.DirCreatedEvent,
    watchdog_events.DirMovedEvent,
    watchdog_events.DirDeletedEvent,
]
_DEEP = ("Images", "Clases")  # must be watched at any depth
_STANDARD = (*_DEEP, "Dataset", "Review", ".sortd")
# A pipe under the name would hang the open for ever.
_PROBE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_SPARE_DESCRIPTORS = 4  # an observer opens three; the constructor leaks the first where the others fail

# An event that comes while the observer stops is told as an error, and is none: nobody listens any more.
logging.getLogger("watchdog.observers.inotify").addFilter(
    lambda record: "thread is inactive" not in record.getMessage()
)


@dataclass(frozen=True, slots=True)
class FileEvent:
    """Something happened to this path; look for yourself.

    Attributes:
        path: Absolute, as ``os.fsdecode`` gives it; nothing need stand there any more.
        closed: A writer closed the file: it may well be whole.
        directory: It is, or was, a folder: scan it.
        at: When it came, in seconds of the monotonic clock; events that differ in nothing else are equal.
    """

    path: str
    closed: bool = False
    directory: bool = False
    at: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True)
class Place:
    """One folder to be watched."""

    path: str
    recursive: bool


def places_of_dataset(root: str, *, max_folders: int = 2_000, max_entries: int = 200_000) -> tuple[Place, ...]:
    """Choose what to watch of a dataset: all of it, unless what was filed has grown too large to walk at each start.

    One recursive watch pairs our own moves from Images/ into Dataset/; two would hold each back for half a second,
    waiting for the other half. But a tree of 900,000 folders costs gigabytes and hours: then Images/ and Clases/ are
    watched at any depth, the rest at its first level, and corrections deeper in Dataset/ are found by the scan.
    """
    deep = [os.path.join(root, name) for name in _DEEP]
    if _is_small(root, leave_out=frozenset(deep), max_folders=max_folders, max_entries=max_entries):
        return (Place(root, recursive=True),)
    standard = [path for name in _STANDARD if os.path.isdir(path := os.path.join(root, name))]
    return Place(root, recursive=False), *(Place(path, path in deep) for path in standard)


class RootObserver:
    """One observer on one root, alive from construction until ``close``."""

    def __init__(
        self,
        root: str,
        places: tuple[Place, ...],
        post: Callable[[FileEvent], None],
        *,
        make_observer: "ObserverType" = Observer,
    ) -> None:
        """Open it; ``post`` is called in a thread of the observer's for each event that ``path_meant`` lets through.

        Raises:
            OSError: The watch cannot be had; nothing is left behind.
        """
        self.lost: str | None = None  # why an event did not get through; set in the observer's threads
        self.broken: str | None = None  # why the watch is no good any more; set in the observer's threads
        self._root, self._places, self._post = root, places, post
        tracked = (root, *(os.path.join(root, name) for name in _STANDARD))
        self._identities = {path: _identity(path) for path in tracked}
        self._probe = os.path.join(root, ".sortd", "canary")
        self._probed_at: float | None = None
        self._answered = threading.Event()
        _require_spare_descriptors()
        threads, descriptors = set(threading.enumerate()), inotify.instances()
        self._observer = make_observer()
        try:
            for place in places:
                self._schedule(place)
            self._observer.start()
        except BaseException:
            self.close()
            raise
        self._threads = [t for t in threading.enumerate() if isinstance(t, BaseThread) and t not in threads]
        self._descriptors = inotify.instances() - descriptors

    def close(self) -> None:
        """Stop and join every thread, close every descriptor; harmless when repeated."""
        self._observer.stop()
        if self._observer.is_alive():
            self._observer.join(timeout=10.0)

    def owns_thread(self, ident: int | None) -> bool:
        """Tell whether the thread of this identifier works for this observer."""
        return any(thread.ident == ident for thread in self._threads)

    def fault(self) -> str | None:
        """Say why this observer sees no more, else ``None``: a dead thread, or another folder under a watched name."""
        if self.broken is not None:
            return self.broken
        for thread in self._threads:
            if not thread.is_alive():
                return f"a thread of the watcher ended ({type(thread).__name__})"
        for path, known in self._identities.items():
            found = _identity(path)
            if known is not None and found is not None and found != known:
                return f"{path} is another folder now: made anew, renamed, mounted or mounted over"
            if found != known and (path == self._root or not self._places[0].recursive):
                return f"{path} {'appeared' if known is None else 'is gone'}"
            self._identities[path] = found
        return None

    def probe(self, now: float, *, interval_seconds: float, answer_seconds: float) -> str | None:
        """Touch a probe file every ``interval_seconds``; say so if its event does not come in ``answer_seconds``.

        The file in ``.sortd/`` is opened for writing and closed unwritten: an event without a write to the disk. Where
        there is no ``.sortd/`` (it marks a mounted dataset, so it is never made here) or the file cannot be opened,
        there is no probe.
        """
        if self._probed_at is not None and not self._answered.is_set():
            late = now - self._probed_at
            return f"no event came back within {late:.0f} s" if late >= answer_seconds else None
        if self._probed_at is None or now - self._probed_at >= interval_seconds:
            self._answered.clear()
            self._probed_at = now if _touch(self._probe) else None
        return None

    def unwatched(self) -> Iterator[str | None]:
        """Yield the folders in Images/ and Clases/ that exist and are not watched; None for each entry looked at."""
        watched = inotify.watched_inodes(self._descriptors)
        for name in _DEEP:
            if os.path.isdir(path := os.path.join(self._root, name)):
                yield from inotify.unwatched(path, watched)

    def _schedule(self, place: Place) -> None:
        real = os.path.realpath(place.path)  # the root itself may be reached through links
        os.scandir(real).close()  # watchdog takes a folder that it may not read for a watched one
        handler = _Handler(lambda event: self._take(event, real, place.path))
        self._observer.schedule(handler, real, recursive=place.recursive, event_filter=_EVENTS)

    def _take(self, event: watchdog_events.FileSystemEvent, real: str, shown: str) -> None:
        """Post what one event tells; never raises, since that would end the dispatcher and with it all watching."""
        try:
            closed = isinstance(event, watchdog_events.FileClosedEvent)
            for named in (event.src_path, event.dest_path):  # of a move both ends; nothing else has a destination
                path = shown + os.fsdecode(named).removeprefix(real)
                if path == self._probe:
                    self._answered.set()
                elif named and (meant := path_meant(path, self._root, is_folder=event.is_directory)) is not None:
                    self._post(FileEvent(meant, closed, event.is_directory, monotonic()))
        except BaseException as error:  # noqa: BLE001 - whatever it is: kept, and told at the next check
            self.lost = f"an event could not be handed on ({error!r})"


class _Handler(watchdog_events.FileSystemEventHandler):
    """What watchdog asks for; no look-up by kind of event."""

    def __init__(self, take: Callable[[watchdog_events.FileSystemEvent], None]) -> None:
        self._take = take

    def dispatch(self, event: watchdog_events.FileSystemEvent) -> None:
        """Hand on one event."""
        self._take(event)


def path_meant(path: str, root: str, *, is_folder: bool) -> str | None:
    """Return the path to be looked at for an event at ``path``; None: it is left to the scan.

    A control file that goes makes its file whole, so that is the path.
    """
    left = rule_below(path, root)
    if left is None:
        return path
    place, rule = left
    if place != path or rule.reason is Reason.SYSTEM:
        return None
    if rule.is_control:
        return owner_of(path)
    return None if is_folder or rule.reason is Reason.UNFINISHED else path


def _is_small(root: str, *, leave_out: frozenset[str], max_folders: int, max_entries: int) -> bool:
    """Tell whether the tree is small enough to watch whole; gives up the walk as soon as it is not."""
    folders = entries = 0
    for folder in inotify.folders_of(root, leave_out=leave_out):
        folders, entries = folders + (folder is not None), entries + (folder is None)
        if folders > max_folders or entries > max_entries:
            return False
    return True


def _identity(path: str) -> tuple[int, int] | None:
    """Which folder stands under this name, through links; ``None`` where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _touch(path: str) -> bool:
    """Raise a close-after-write event without writing; tell whether that was possible."""
    folder, name = os.path.split(path)
    try:
        with open_folder(folder) as opened:
            os.close(os.open(name, _PROBE_FLAGS, 0o600, dir_fd=opened))
    except OSError:
        return False
    return True


def _require_spare_descriptors() -> None:
    """Find out that descriptors are short while it costs nothing.

    Raises:
        OSError: There are too few left for an observer.
    """
    opened: list[int] = []
    try:
        opened.extend(os.open("/", os.O_PATH | os.O_CLOEXEC) for _ in range(_SPARE_DESCRIPTORS))
    finally:
        for descriptor in opened:
            os.close(descriptor)
