"""The watcher: watchdog as a source of file events, with detection and replacement of observers that stopped working.

Each watched root has its own observer, so that a dead one is replaced alone. The loop calls ``health`` every few
seconds, which looks for dead threads, replaced folders, missing probe events and unwatched folders, opens new
observers with back-off, and posts ``EventsDropped`` so that a scan finds what was missed. ``polled`` returns the roots
that inotify does not cover. Open the watch first and scan second, so that nothing is missed in between.

The module works around watchdog 7.1, as observed: an exception in a handler ends the dispatcher; one in the reader
thread ends all watching while ``Observer.is_alive()`` stays true; a watched folder that is renamed, unmounted, mounted
over or recreated is silently no longer watched; a link is never watched; an unreadable folder counts as watched; a
failed start leaks threads and descriptors.
"""

import errno
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice
from time import monotonic
from typing import TYPE_CHECKING, Literal

from watchdog import events as watchdog_events
from watchdog.observers import Observer
from watchdog.utils import BaseThread

from sortd.core.schedule import RETRY_SECONDS, Backoff
from sortd.files import identity_of, open_folder
from sortd.layout import Reason, owner_of, rule_below
from sortd.watch import inotify

if TYPE_CHECKING:
    from watchdog.observers import ObserverType

Polling = Literal["auto", "always", "never"]

CHECK_SECONDS = 2.0  # between two checks of health
_PROBE_SECONDS = 15.0  # between two probes
_ANSWER_SECONDS = 5.0  # until the event of a probe must have come
_COVERAGE_SECONDS = 300.0  # between two comparisons of what is watched with what is there
_COVERAGE_ENTRIES = 20_000  # compared in one check, which takes some 20 ms of the loop

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
# O_NONBLOCK: a pipe under this name would block the open.
_PROBE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_SPARE_DESCRIPTORS = 4  # an observer opens three, and leaks the first if another fails

# watchdog logs events that arrive while the observer stops as errors.
logging.getLogger("watchdog.observers.inotify").addFilter(
    lambda record: "thread is inactive" not in record.getMessage()
)


@dataclass(frozen=True, slots=True)
class FileEvent:
    """Something happened to this path, which may not exist any more."""

    path: str  # absolute, as ``os.fsdecode`` returns it
    closed: bool = False  # after writing
    directory: bool = False  # it is, or was, a folder: scan it
    at: float = field(default=0.0, compare=False)  # when the event arrived, in seconds of the monotonic clock


class RootObserver:
    """One observer on one root, running from construction until ``close``."""

    def __init__(
        self,
        root: str,
        places: tuple[inotify.Place, ...],
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
        tracked = (root, *(os.path.join(root, name) for name in inotify.STANDARD))
        self._identities = {path: identity_of(path) for path in tracked}
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
            found = identity_of(path)
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
        for name in inotify.DEEP:
            if os.path.isdir(path := os.path.join(self._root, name)):
                yield from inotify.unwatched(path, watched)

    def _schedule(self, place: inotify.Place) -> None:
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


# ---------------------------------------------------------------- all roots


class DropReason(StrEnum):
    """Why events were dropped; with the prefix ``watch.`` the name of the event in the log."""

    OVERFLOWED = "overflowed"  # a queue was full
    RESTARTED = "restarted"  # watching had stopped, and works again
    DEGRADED = "degraded"  # watching failed at least in part: the root is scanned more often


class WatchMode(StrEnum):
    """How a root is watched."""

    EVENTS = "events"  # by inotify
    POLLING = "polling"  # by scans, besides inotify if it misses only some folders
    WAITING = "waiting"  # until the folder exists


@dataclass(frozen=True, slots=True)
class EventsDropped:
    """Events of this root were lost: scan it. ``why`` is a sentence for the log, with advice."""

    root: str
    why: str
    reason: DropReason


@dataclass(frozen=True, slots=True)
class WatchStatus:
    """How a root is watched now, and why not by events."""

    root: str
    mode: WatchMode
    why: str = ""


@dataclass(slots=True)
class _Watched:
    """One root and the state of its observer."""

    root: str
    is_dataset: bool
    observer: RootObserver | None = None
    mode: WatchMode = WatchMode.POLLING
    why: str = ""
    reported: str = ""  # the last ``why`` that was posted as a degradation
    unposted: EventsDropped | None = None  # what could not be posted
    backoff: Backoff = field(default_factory=Backoff)
    covered_at: float | None = None
    suspects: frozenset[str] = frozenset()  # folders that were unwatched in the last comparison
    coverage: Iterator[str | None] | None = None  # the comparison under way
    missing: set[str] = field(default_factory=set)  # what it found so far


class Watcher:
    """Watches any number of roots and posts file events; used from one thread, posts from several."""

    def __init__(
        self,
        post: Callable[[FileEvent | EventsDropped], None],
        *,
        polling: Polling = "auto",
        is_blind: Callable[[str], str | None] = inotify.is_blind,
        make_observer: "ObserverType" = Observer,
    ) -> None:
        """Start without roots; ``post`` receives each event, and must not block: if it raises, the event is dropped.

        With ``polling: auto`` a file system where inotify ``is_blind`` is not watched, ``always`` never watches, and
        ``never`` never polls.
        """
        self._post, self._polling, self._is_blind, self._make_observer = post, polling, is_blind, make_observer
        self._watched: dict[str, _Watched] = {}
        self._overflows = _WarningHandler(self._take_warning)
        # Raised in watchdog's reader for a folder created while it is walked; as an error it would end the reader.
        warnings.filterwarnings("ignore", "Callback with id", RuntimeWarning)
        logger = logging.getLogger("watchdog.observers")
        # The level of the root logger must not hide lost events, nor enable the many debug lines.
        logger.setLevel(logging.WARNING)
        logger.addHandler(self._overflows)

    def watch_root(self, root: str | os.PathLike[str]) -> None:
        """Watch the first level of the folder of the datasets."""
        self._watch(_Watched(os.fspath(root), is_dataset=False))

    def watch_dataset(self, root: str | os.PathLike[str]) -> None:
        """Watch a dataset, or a folder that may become one, unless it is watched already."""
        self._watch(_Watched(os.fspath(root), is_dataset=True))

    def forget(self, root: str | os.PathLike[str]) -> None:
        """Stop watching this root, if it is watched."""
        watched = self._watched.pop(os.fspath(root), None)
        if watched is not None:
            self._close_observer(watched)

    def health(self, now: float) -> None:
        """Check every root, repair what can be repaired, and post ``EventsDropped`` for what may have been missed."""
        for watched in self._watched.values():
            if watched.unposted is not None:
                self._tell(watched, watched.unposted)
            self._check(watched, now)

    def polled(self) -> tuple[str, ...]:
        """Return the roots whose events do not suffice now: scan them every few seconds."""
        return tuple(root for root, watched in self._watched.items() if watched.mode is WatchMode.POLLING)

    def status(self) -> tuple[WatchStatus, ...]:
        """Return how each root is watched now."""
        return tuple(WatchStatus(watched.root, watched.mode, watched.why) for watched in self._watched.values())

    def close(self) -> None:
        """Stop watching and join every thread; idempotent."""
        logging.getLogger("watchdog.observers").removeHandler(self._overflows)
        for root in list(self._watched):
            self.forget(root)

    def _watch(self, watched: _Watched) -> None:
        if watched.root not in self._watched:
            self._watched[watched.root] = watched
            self._open(watched)

    def _check(self, watched: _Watched, now: float) -> None:
        fault, backoff = self._fault(watched, now), watched.backoff
        if watched.observer is not None and fault is None:
            if backoff.until is not None and now >= backoff.until + RETRY_SECONDS[1]:
                backoff.clear()
            self._check_coverage(watched, watched.observer, now)
            return
        self._close_observer(watched)
        if fault is not None:
            watched.why = fault
        if not os.path.isdir(watched.root):
            self._degrade(watched, WatchMode.WAITING, f"{watched.root} does not exist")
        elif backoff.until is None or backoff.is_over(now):
            backoff.begin(now)
            self._reopen(watched)

    def _fault(self, watched: _Watched, now: float) -> str | None:
        """Return why the observer of this root must be replaced, if it has one."""
        observer = watched.observer
        if observer is None:
            return None
        if observer.lost is not None:
            lost, observer.lost = observer.lost, None
            self._tell(watched, EventsDropped(watched.root, lost, DropReason.OVERFLOWED))
        return observer.fault() or observer.probe(now, interval_seconds=_PROBE_SECONDS, answer_seconds=_ANSWER_SECONDS)

    def _check_coverage(self, watched: _Watched, observer: RootObserver, now: float) -> None:
        """Compare the watched folders with the existing ones; a folder that is missing twice is no race."""
        if watched.coverage is None:
            is_due = watched.covered_at is None or now - watched.covered_at >= _COVERAGE_SECONDS
            if not (watched.is_dataset and (is_due or watched.suspects)):
                return
            watched.coverage, watched.missing = observer.unwatched(), set()
        looks = list(islice(watched.coverage, _COVERAGE_ENTRIES))
        watched.missing.update(look for look in looks if look is not None)
        if len(looks) == _COVERAGE_ENTRIES:
            return  # the rest at the next check
        missing = frozenset(watched.missing)
        confirmed, watched.suspects, watched.covered_at = missing & watched.suspects, missing, now
        watched.coverage = None
        if confirmed:
            watched.suspects = frozenset()
            self._close_observer(watched)
            watched.why = f"{len(confirmed)} folders were not watched, {min(confirmed)!r} among them"
            self._reopen(watched)

    def _reopen(self, watched: _Watched) -> None:
        """Try to open a new observer and post the result."""
        was = watched.why
        self._open(watched)
        if watched.observer is None:
            return
        missing = [below for below in watched.observer.unwatched() if below is not None] if watched.is_dataset else []
        if missing:
            limit = inotify.advice(OSError(errno.ENOSPC, ""), folders=len(missing))
            why = f"folders below {watched.root} are not watched, {min(missing)!r} among them: most likely {limit}"
            self._degrade(watched, WatchMode.POLLING, why)
        else:
            watched.reported = ""
            self._tell(watched, EventsDropped(watched.root, f"{was}; watched again", DropReason.RESTARTED))

    def _open(self, watched: _Watched) -> None:
        root = watched.root
        reason = self._reason_to_poll(watched)
        if reason is not None:
            self._degrade(watched, WatchMode.POLLING, reason)
            return
        try:
            places = inotify.places_of_dataset(root) if watched.is_dataset else (inotify.Place(root, recursive=False),)
            watched.observer = RootObserver(root, places, self._post, make_observer=self._make_observer)
        except FileNotFoundError:
            self._degrade(watched, WatchMode.WAITING, f"{root} does not exist")
        except OSError as error:
            self._degrade(watched, WatchMode.POLLING, f"{root} cannot be watched: {inotify.advice(error)}")
        else:
            watched.mode, watched.why, watched.covered_at, watched.coverage = WatchMode.EVENTS, "", None, None

    def _reason_to_poll(self, watched: _Watched) -> str | None:
        if self._polling == "always":
            return "polling is configured"
        folders = (watched.root, *(os.path.join(watched.root, name) for name in inotify.DEEP))
        kinds = [kind for folder in folders if (kind := self._is_blind(folder))]
        if self._polling == "auto" and kinds:
            return f"{watched.root} is on {kinds[0]}, where changes by other machines cause no event"
        return None

    def _close_observer(self, watched: _Watched) -> None:
        if watched.observer is not None:
            watched.observer.close()
            watched.observer = None

    def _degrade(self, watched: _Watched, mode: WatchMode, why: str) -> None:
        watched.mode, watched.why = mode, why
        if why != watched.reported:
            watched.reported = why
            self._tell(watched, EventsDropped(watched.root, why, DropReason.DEGRADED))

    def _tell(self, watched: _Watched, dropped: EventsDropped) -> None:
        """Post an event, or keep it until the next check if ``post`` raises."""
        try:
            self._post(dropped)
        except Exception:  # noqa: BLE001 - mostly a full queue; the thread must not end
            watched.unposted = dropped
        else:
            watched.unposted = None

    def _take_warning(self, record: logging.LogRecord) -> None:
        """Turn a warning of watchdog, which is not an event for handlers, into dropped events of its root."""
        for watched in tuple(self._watched.values()):
            observer = watched.observer
            if observer is None or not observer.owns_thread(record.thread):
                continue
            if record.levelno >= logging.ERROR:
                observer.broken = record.getMessage()
            elif record.name.endswith("inotify_c") and "overflow" in record.getMessage():
                why = "the kernel's event queue overflowed (fs.inotify.max_queued_events); a scan finds what was missed"
                self._tell(watched, EventsDropped(watched.root, why, DropReason.OVERFLOWED))


class _WarningHandler(logging.Handler):
    """Passes each warning of a logger to a function."""

    def __init__(self, take: Callable[[logging.LogRecord], None]) -> None:
        super().__init__(logging.WARNING)
        self._take = take

    def emit(self, record: logging.LogRecord) -> None:
        """Pass on one record; never raise, since this runs in the observer threads."""
        try:
            self._take(record)
        except Exception:  # noqa: BLE001 - as logging requires: report on stderr
            self.handleError(record)
