"""A root observer: one watchdog observer on one root, which posts ``FileEvent`` and can be checked.

The module works around watchdog 7.1, as observed: an exception in a handler ends the dispatcher; one in the reader
thread ends all watching while ``Observer.is_alive()`` stays true; a watched folder that is renamed, unmounted, mounted
over or recreated is silently no longer watched; a link is never watched; an unreadable folder counts as watched; a
failed start leaks threads and descriptors.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING

from watchdog import events as watchdog_events
from watchdog.observers import Observer
from watchdog.utils import BaseThread

from sortd.files import open_folder
from sortd.layout import Reason, owner_of, rule_below
from sortd.watch import inotify

if TYPE_CHECKING:
    from watchdog.observers import ObserverType

# Without OPEN, ACCESS, MODIFY and ATTRIB: our reads and each write of a slow copy would fill the kernel's queue.
_EVENTS: list[type[watchdog_events.FileSystemEvent]] = [
    watchdog_events.FileCreatedEvent,
    watchdog_events.FileClosedEvent,
    watchdog_events.FileMovedEvent,
    watchdog_events.FileDeletedEvent,
    watchdog_events.DirCreatedEvent,
    watchdog_events.DirMovedEvent,
    watchdog_events.DirDeletedEvent,
]
_DEEP = ("Images", "Clases")  # watched at any depth
_STANDARD = (*_DEEP, "Dataset", "Review", ".sortd")
# O_NONBLOCK: a pipe under this name would block the open.
_PROBE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_SPARE_DESCRIPTORS = 4  # an observer opens three, and leaks the first if another fails

# watchdog logs events that arrive while the observer stops as errors.
logging.getLogger("watchdog.observers.inotify").addFilter(
    lambda record: "thread is inactive" not in record.getMessage()
)


@dataclass(frozen=True, slots=True)
class FileEvent:
    """Something happened to this path, which may not exist any more.

    Attributes:
        path: Absolute, as ``os.fsdecode`` returns it.
        closed: The file was closed after writing.
        directory: It is, or was, a folder: scan it.
        at: When the event arrived, in seconds of the monotonic clock; not compared.
    """

    path: str
    closed: bool = False
    directory: bool = False
    at: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True)
class Place:
    """One folder to watch."""

    path: str
    recursive: bool


def places_of_dataset(root: str, *, max_folders: int = 2_000, max_entries: int = 200_000) -> tuple[Place, ...]:
    """Return the folders to watch: the whole dataset, unless it is too large to walk at each start.

    One recursive watch pairs our moves from Images/ into Dataset/; two would delay each by half a second. But a tree of
    900,000 folders costs gigabytes and hours: then Images/ and Clases/ are watched at any depth, the rest at its first
    level, and the scan finds corrections deeper in Dataset/.
    """
    deep = [os.path.join(root, name) for name in _DEEP]
    if _is_small(root, leave_out=frozenset(deep), max_folders=max_folders, max_entries=max_entries):
        return (Place(root, recursive=True),)
    standard = [path for name in _STANDARD if os.path.isdir(path := os.path.join(root, name))]
    return Place(root, recursive=False), *(Place(path, path in deep) for path in standard)


class RootObserver:
    """One observer on one root, running from construction until ``close``."""

    def __init__(
        self,
        root: str,
        places: tuple[Place, ...],
        post: Callable[[FileEvent], None],
        *,
        make_observer: "ObserverType" = Observer,
    ) -> None:
        """Start it; ``post`` is called in an observer thread for each event that ``path_meant`` accepts.

        Raises:
            OSError: The root cannot be watched; nothing is leaked.
        """
        self.lost: str | None = None  # why an event was dropped; set in the observer's threads
        self.broken: str | None = None  # why watching ended; set in the observer's threads
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
        """Stop and join every thread and close every descriptor; idempotent."""
        self._observer.stop()
        if self._observer.is_alive():
            self._observer.join(timeout=10.0)

    def owns_thread(self, ident: int | None) -> bool:
        """Return whether the thread of this identifier belongs to this observer."""
        return any(thread.ident == ident for thread in self._threads)

    def fault(self) -> str | None:
        """Return why this observer no longer works, a dead thread or another folder under a watched name, else None."""
        if self.broken is not None:
            return self.broken
        for thread in self._threads:
            if not thread.is_alive():
                return f"a thread of the watcher ended ({type(thread).__name__})"
        for path, known in self._identities.items():
            found = _identity(path)
            if known is not None and found is not None and found != known:
                return f"{path} is another folder now: it was recreated, renamed, mounted or mounted over"
            if found != known and (path == self._root or not self._places[0].recursive):
                return f"{path} {'appeared' if known is None else 'is gone'}"
            self._identities[path] = found
        return None

    def probe(self, now: float, *, interval_seconds: float, answer_seconds: float) -> str | None:
        """Touch a probe file every ``interval_seconds``; return an error if no event follows within ``answer_seconds``.

        The file in ``.sortd/`` is opened for writing and closed unwritten: an event without a write to the disk. There
        is no probe without ``.sortd/``, which marks a mounted dataset and is never created here, or if the file cannot
        be opened.
        """
        if self._probed_at is not None and not self._answered.is_set():
            late = now - self._probed_at
            return f"no event came back within {late:.0f} s" if late >= answer_seconds else None
        if self._probed_at is None or now - self._probed_at >= interval_seconds:
            self._answered.clear()
            self._probed_at = now if _touch(self._probe) else None
        return None

    def unwatched(self) -> Iterator[str | None]:
        """Yield the folders in Images/ and Clases/ that are not watched; None for each entry."""
        watched = inotify.watched_inodes(self._descriptors)
        for name in _DEEP:
            if os.path.isdir(path := os.path.join(self._root, name)):
                yield from inotify.unwatched(path, watched)

    def _schedule(self, place: Place) -> None:
        real = os.path.realpath(place.path)  # the root itself may be reached through links
        os.scandir(real).close()  # watchdog does not report an unreadable folder
        handler = _Handler(lambda event: self._take(event, real, place.path))
        self._observer.schedule(handler, real, recursive=place.recursive, event_filter=_EVENTS)

    def _take(self, event: watchdog_events.FileSystemEvent, real: str, shown: str) -> None:
        """Post one event; never raise, since that would end the dispatcher."""
        try:
            closed = isinstance(event, watchdog_events.FileClosedEvent)
            for named in (event.src_path, event.dest_path):  # only moves have a destination
                path = shown + os.fsdecode(named).removeprefix(real)
                if path == self._probe:
                    self._answered.set()
                elif named and (meant := path_meant(path, self._root, is_folder=event.is_directory)) is not None:
                    self._post(FileEvent(meant, closed, event.is_directory, monotonic()))
        except BaseException as error:  # noqa: BLE001 - reported at the next check
            self.lost = f"an event could not be processed ({error!r})"


class _Handler(watchdog_events.FileSystemEventHandler):
    """Passes every event to one function."""

    def __init__(self, take: Callable[[watchdog_events.FileSystemEvent], None]) -> None:
        self._take = take

    def dispatch(self, event: watchdog_events.FileSystemEvent) -> None:
        """Pass one event on."""
        self._take(event)


def path_meant(path: str, root: str, *, is_folder: bool) -> str | None:
    """Return the path to inspect for an event at ``path``; None: the scan does it.

    The deletion of a control file completes its file, so that is the path.
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
    """Return whether a tree is small enough to watch recursively; stops walking as soon as it is not."""
    folders = entries = 0
    for folder in inotify.folders_of(root, leave_out=leave_out):
        folders, entries = folders + (folder is not None), entries + (folder is None)
        if folders > max_folders or entries > max_entries:
            return False
    return True


def _identity(path: str) -> tuple[int, int] | None:
    """Return device and inode of the folder under this name, through links; None if there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _touch(path: str) -> bool:
    """Cause a close-after-write event without writing; return whether that succeeded."""
    folder, name = os.path.split(path)
    try:
        with open_folder(folder) as opened:
            os.close(os.open(name, _PROBE_FLAGS, 0o600, dir_fd=opened))
    except OSError:
        return False
    return True


def _require_spare_descriptors() -> None:
    with ExitStack() as opened:  # raises OSError before watchdog can leak anything
        for _ in range(_SPARE_DESCRIPTORS):
            opened.callback(os.close, os.open("/", os.O_PATH | os.O_CLOEXEC))
