"""The watcher: watchdog as a source of file events, which notices when events do not come any more and mends that.

Each watched root has an observer of its own, so that a dead one is replaced alone. ``health`` is called every few
seconds by the loop: it looks for dead threads, for other folders under a watched name, for a probe file whose event
does not come, for folders that the kernel does not watch; it opens a new observer, with back-off, and posts
``EventsDropped`` so that a scan finds what was missed. ``polled`` names the roots that inotify does not cover, to be
scanned more often. Open the watch first and scan second: then nothing falls between the two.
"""

import errno
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice
from typing import TYPE_CHECKING, Literal

from watchdog.observers import Observer

from sortd.core.schedule import RETRY_SECONDS, Backoff
from sortd.watch import inotify
from sortd.watch.observer import FileEvent, Place, RootObserver, places_of_dataset

if TYPE_CHECKING:
    from watchdog.observers import ObserverType

Polling = Literal["auto", "always", "never"]

CHECK_SECONDS = 2.0  # between two checks of health
_PROBE_SECONDS = 15.0  # between two probes
_ANSWER_SECONDS = 5.0  # until the event of a probe must have come
_COVERAGE_SECONDS = 300.0  # between two comparisons of what is watched with what is there
_COVERAGE_ENTRIES = 20_000  # looked at in one check: some 20 ms, in which the loop does nothing else


class DropReason(StrEnum):
    """Why events were dropped; with ``watch.`` before it, the event's name in the log."""

    OVERFLOWED = "overflowed"  # more happened than the queue holds
    RESTARTED = "restarted"  # the watch had died or gone deaf, and works again
    DEGRADED = "degraded"  # the watch cannot be had, or only in part: the root is scanned more often


class WatchMode(StrEnum):
    """How a root is followed."""

    EVENTS = "events"  # by inotify; the scan is the safety net
    POLLING = "polling"  # by scans alone, or besides an inotify that misses some folders
    WAITING = "waiting"  # the folder is not there


@dataclass(frozen=True, slots=True)
class EventsDropped:
    """Events of this root did not arrive: scan it.

    Attributes:
        root: As it was given to the watcher.
        why: A sentence for the log, with the setting that mends it where there is one.
        reason: The kind.
    """

    root: str
    why: str
    reason: DropReason


@dataclass(frozen=True, slots=True)
class WatchStatus:
    """How a root is followed now, and why not by events where that is so."""

    root: str
    mode: WatchMode
    why: str = ""


@dataclass(slots=True)
class _Watched:
    """One root, and what is known of its observer."""

    root: str
    is_dataset: bool
    observer: RootObserver | None = None
    mode: WatchMode = WatchMode.POLLING
    why: str = ""
    told: str = ""  # the last `why` that was posted as a degradation: said once, not at each attempt
    untold: EventsDropped | None = None  # what `post` would not take; said again at the next check
    backoff: Backoff = field(default_factory=Backoff)
    covered_at: float | None = None
    suspects: frozenset[str] = frozenset()  # folders that were not watched at the comparison before
    coverage: Iterator[str | None] | None = None  # the comparison under way
    missing: set[str] = field(default_factory=set)  # what it found so far


class Watcher:
    """Follows any number of roots and posts file events; used from one thread, posts from several."""

    def __init__(
        self,
        post: Callable[[FileEvent | EventsDropped], None],
        *,
        polling: Polling = "auto",
        is_blind: Callable[[str], str | None] = inotify.is_blind,
        make_observer: "ObserverType" = Observer,
    ) -> None:
        """Begin to follow nothing yet.

        Args:
            post: Takes each event; must not block. What it raises counts as a dropped event.
            polling: ``auto`` leaves watching where inotify is blind, ``always`` never watches, ``never`` never polls.
            is_blind: Names the file system where inotify is blind, else ``None``.
            make_observer: Makes an observer.
        """
        self._post, self._polling, self._is_blind, self._make_observer = post, polling, is_blind, make_observer
        self._watched: dict[str, _Watched] = {}
        self._overflows = _WarningHandler(self._take_warning)
        # Said in watchdog's reader when a folder is made while it is walked; where warnings are errors it ends there.
        warnings.filterwarnings("ignore", "Callback with id", RuntimeWarning)
        logger = logging.getLogger("watchdog.observers")
        # Set here, so that no level of the root logger can hide that events were lost; its debug lines are a flood.
        logger.setLevel(logging.WARNING)
        logger.addHandler(self._overflows)

    def watch_root(self, root: str | os.PathLike[str]) -> None:
        """Follow the folder that holds the datasets, at its first level: datasets that come and go."""
        self._watch(_Watched(os.fspath(root), is_dataset=False))

    def watch_dataset(self, root: str | os.PathLike[str]) -> None:
        """Follow a dataset, or a folder that may become one; nothing happens where it is followed already."""
        self._watch(_Watched(os.fspath(root), is_dataset=True))

    def forget(self, root: str | os.PathLike[str]) -> None:
        """Follow this root no longer; nothing happens where it was not followed."""
        watched = self._watched.pop(os.fspath(root), None)
        if watched is not None:
            self._close_observer(watched)

    def health(self, now: float) -> None:
        """Check every root, mend what can be mended, and post ``EventsDropped`` for what was or may have been missed.

        Args:
            now: Seconds of a monotonic clock.
        """
        for watched in self._watched.values():
            if watched.untold is not None:
                self._tell(watched, watched.untold)
            self._check(watched, now)

    def polled(self) -> tuple[str, ...]:
        """Name the roots whose events do not suffice now: to be scanned every few seconds."""
        return tuple(root for root, watched in self._watched.items() if watched.mode is WatchMode.POLLING)

    def status(self) -> tuple[WatchStatus, ...]:
        """Tell how each root is followed now: the effective mode, not the configured one."""
        return tuple(WatchStatus(watched.root, watched.mode, watched.why) for watched in self._watched.values())

    def close(self) -> None:
        """Stop following everything, join every thread; harmless when repeated."""
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
            self._degrade(watched, WatchMode.WAITING, f"{watched.root} is not there")
        elif backoff.until is None or backoff.is_over(now):
            backoff.begin(now)
            self._reopen(watched)

    def _fault(self, watched: _Watched, now: float) -> str | None:
        """Say why the observer of this root, where it has one, must be replaced."""
        observer = watched.observer
        if observer is None:
            return None
        if observer.lost is not None:
            lost, observer.lost = observer.lost, None
            self._tell(watched, EventsDropped(watched.root, lost, DropReason.OVERFLOWED))
        return observer.fault() or observer.probe(now, interval_seconds=_PROBE_SECONDS, answer_seconds=_ANSWER_SECONDS)

    def _check_coverage(self, watched: _Watched, observer: RootObserver, now: float) -> None:
        """Compare the folders that are watched with those that are there; what is missing twice is no race."""
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
        """Try to open a new observer where there was one, or should have been one, and say how it went."""
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
            watched.told = ""
            self._tell(watched, EventsDropped(watched.root, f"{was}; watched again", DropReason.RESTARTED))

    def _open(self, watched: _Watched) -> None:
        """Open an observer, if one is to be had."""
        root = watched.root
        reason = self._reason_to_poll(watched)
        if reason is not None:
            self._degrade(watched, WatchMode.POLLING, reason)
            return
        try:
            places = places_of_dataset(root) if watched.is_dataset else (Place(root, recursive=False),)
            watched.observer = RootObserver(root, places, self._post, make_observer=self._make_observer)
        except FileNotFoundError:
            self._degrade(watched, WatchMode.WAITING, f"{root} is not there")
        except OSError as error:
            self._degrade(watched, WatchMode.POLLING, f"{root} cannot be watched: {inotify.advice(error)}")
        else:
            watched.mode, watched.why, watched.covered_at, watched.coverage = WatchMode.EVENTS, "", None, None

    def _reason_to_poll(self, watched: _Watched) -> str | None:
        if self._polling == "always":
            return "polling is configured"
        folders = (watched.root, *(os.path.join(watched.root, name) for name in ("Images", "Clases")))
        kinds = [kind for folder in folders if (kind := self._is_blind(folder))]
        if self._polling == "auto" and kinds:
            return f"{watched.root} lies on {kinds[0]}, where changes made on another machine raise no event"
        return None

    def _close_observer(self, watched: _Watched) -> None:
        if watched.observer is not None:
            watched.observer.close()
            watched.observer = None

    def _degrade(self, watched: _Watched, mode: WatchMode, why: str) -> None:
        watched.mode, watched.why = mode, why
        if why != watched.told:
            watched.told = why
            self._tell(watched, EventsDropped(watched.root, why, DropReason.DEGRADED))

    def _tell(self, watched: _Watched, dropped: EventsDropped) -> None:
        """Post it, or keep it for the next check where it is not taken."""
        try:
            self._post(dropped)
        except Exception:  # noqa: BLE001 - a full queue, mostly; nothing is dropped, and a watcher's thread lives on
            watched.untold = dropped
        else:
            watched.untold = None

    def _take_warning(self, record: logging.LogRecord) -> None:
        """Turn watchdog's own warning, which it gives to no handler of events, into dropped events of its root."""
        for watched in tuple(self._watched.values()):
            observer = watched.observer
            if observer is None or not observer.owns_thread(record.thread):
                continue
            if record.levelno >= logging.ERROR:
                observer.broken = record.getMessage()
            elif record.name.endswith("inotify_c") and "overflow" in record.getMessage():
                why = "more happened at once than the kernel queues (fs.inotify.max_queued_events); a scan finds it"
                self._tell(watched, EventsDropped(watched.root, why, DropReason.OVERFLOWED))


class _WarningHandler(logging.Handler):
    """Hands each warning of a logger to a function."""

    def __init__(self, take: Callable[[logging.LogRecord], None]) -> None:
        super().__init__(logging.WARNING)
        self._take = take

    def emit(self, record: logging.LogRecord) -> None:
        """Hand on one record; never raises, since it runs in the threads that watch."""
        try:
            self._take(record)
        except Exception:  # noqa: BLE001 - logging's own rule: report on stderr and go on
            self.handleError(record)
