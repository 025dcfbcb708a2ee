"""The watcher: watchdog as a source of hints, never of truth, that notices when it has gone deaf and mends itself.

Each watched root has an ear of its own, so that a dead one is replaced alone. ``health`` is called every few seconds
by the loop: it looks for dead threads, for other folders under a watched name, for a canary that is not heard, for
folders that the kernel does not watch; it opens a new ear, with back-off, and says ``HintsLost`` so that a scan heals
what was missed. Roots where inotify is blind or out of reach are named by ``polled``: the loop scans them more often.

Open the watch first and scan second: then nothing falls between the two.
"""

import errno
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Literal

from watchdog.observers import Observer

from sortd.watching import inotify
from sortd.watching.ear import Ear, Place, places_of_dataset
from sortd.watching.hints import Hint, HintsLost, Loss, Mode, WatchStatus
from sortd.watching.scanning import scan, stamp

if TYPE_CHECKING:
    from watchdog.observers import ObserverType

__all__ = [
    "Hint",
    "HintsLost",
    "Loss",
    "Mode",
    "Polling",
    "WatchStatus",
    "Watcher",
    "scan",
    "stamp",
]

Polling = Literal["auto", "always", "never"]

CHECK_SECONDS = 2.0  # between two checks of health
_CANARY_SECONDS = 15.0  # between two songs of the canary
_ANSWER_SECONDS = 5.0  # until it must have been heard
_COVERAGE_SECONDS = 300.0  # between two comparisons of what is watched with what is there
_COVERAGE_ENTRIES = 20_000  # looked at in one check: some 20 ms, in which the loop does nothing else
_FIRST_DELAY_SECONDS = 1.0
_LAST_DELAY_SECONDS = 60.0


@dataclass(slots=True)
class _Watched:
    """One root, and what is known of its ear."""

    root: str
    is_dataset: bool
    ear: Ear | None = None
    mode: Mode = Mode.POLLING
    why: str = ""
    told: str = ""  # the last `why` that was posted as a degradation: said once, not at each attempt
    untold: HintsLost | None = None  # what `post` would not take; said again at the next check
    retry_at: float = float("-inf")
    delay_seconds: float = _FIRST_DELAY_SECONDS
    covered_at: float | None = None
    suspects: frozenset[str] = frozenset()  # folders that were not watched at the comparison before
    coverage: Iterator[str | None] | None = None  # the comparison under way
    missing: set[str] = field(default_factory=set)  # what it found so far


class Watcher:
    """Follows any number of roots and posts hints about them; used from one thread, posts from several."""

    def __init__(
        self,
        post: Callable[[Hint | HintsLost], None],
        *,
        polling: Polling = "auto",
        is_blind: Callable[[str], str | None] = inotify.is_blind,
        make_observer: "ObserverType" = Observer,
    ) -> None:
        """Begin to follow nothing yet.

        Args:
            post: Takes each hint and loss; must not block. What it raises counts as a lost hint.
            polling: ``auto`` leaves watching where inotify is blind, ``always`` never watches, ``never`` never polls.
            is_blind: Names the file system where inotify is blind, else ``None``.
            make_observer: Makes an observer.
        """
        self._post = post
        self._polling = polling
        self._is_blind = is_blind
        self._make_observer = make_observer
        self._watched: dict[str, _Watched] = {}
        self._overflows = _WarningHandler(self._hear_warning)
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
            self._close_ear(watched)

    def health(self, now: float) -> float:
        """Check every root, mend what can be mended, and post ``HintsLost`` for what was or may have been missed.

        Args:
            now: Seconds of a monotonic clock.

        Returns:
            When to call again, on the same clock.
        """
        for watched in self._watched.values():
            if watched.untold is not None:
                self._tell(watched, watched.untold)
            self._check(watched, now)
        return now + CHECK_SECONDS

    def polled(self) -> tuple[str, ...]:
        """Name the roots whose hints do not suffice now: to be scanned every few seconds."""
        return tuple(root for root, watched in self._watched.items() if watched.mode is Mode.POLLING)

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
        fault = self._fault(watched, now)
        if watched.ear is not None and fault is None:
            if now >= watched.retry_at + _LAST_DELAY_SECONDS:
                watched.delay_seconds = _FIRST_DELAY_SECONDS
            self._check_coverage(watched, watched.ear, now)
            return
        self._close_ear(watched)
        if fault is not None:
            watched.why = fault
        if not os.path.isdir(watched.root):
            self._degrade(watched, Mode.WAITING, f"{watched.root} is not there")
        elif now >= watched.retry_at:
            watched.retry_at = now + watched.delay_seconds
            watched.delay_seconds = min(2 * watched.delay_seconds, _LAST_DELAY_SECONDS)
            self._reopen(watched)

    def _fault(self, watched: _Watched, now: float) -> str | None:
        """Say why the ear of this root, where it has one, must be replaced."""
        ear = watched.ear
        if ear is None:
            return None
        if ear.lost is not None:
            lost, ear.lost = ear.lost, None
            self._tell(watched, HintsLost(watched.root, lost, Loss.OVERFLOWED))
        return ear.fault() or ear.ask_canary(now, interval_seconds=_CANARY_SECONDS, answer_seconds=_ANSWER_SECONDS)

    def _check_coverage(self, watched: _Watched, ear: Ear, now: float) -> None:
        """Compare the folders that are watched with those that are there; what is missing twice is no race."""
        if watched.coverage is None:
            is_due = watched.covered_at is None or now - watched.covered_at >= _COVERAGE_SECONDS
            if not (watched.is_dataset and (is_due or watched.suspects)):
                return
            watched.coverage, watched.missing = ear.unwatched(), set()
        looks = list(islice(watched.coverage, _COVERAGE_ENTRIES))
        watched.missing.update(look for look in looks if look is not None)
        if len(looks) == _COVERAGE_ENTRIES:
            return  # the rest at the next check
        missing = frozenset(watched.missing)
        confirmed, watched.suspects, watched.covered_at = missing & watched.suspects, missing, now
        watched.coverage = None
        if confirmed:
            watched.suspects = frozenset()
            self._close_ear(watched)
            watched.why = f"{len(confirmed)} folders were not watched, {min(confirmed)!r} among them"
            self._reopen(watched)

    def _reopen(self, watched: _Watched) -> None:
        """Try to open a new ear where there was one, or should have been one, and say how it went."""
        was = watched.why
        if not self._open(watched) or watched.ear is None:
            return
        missing = [below for below in watched.ear.unwatched() if below is not None] if watched.is_dataset else []
        if missing:
            limit = inotify.advice(OSError(errno.ENOSPC, ""), folders=len(missing))
            why = f"folders below {watched.root} are not watched, {min(missing)!r} among them: most likely {limit}"
            self._degrade(watched, Mode.POLLING, why)
        else:
            watched.told = ""
            self._tell(watched, HintsLost(watched.root, f"{was}; watched again", Loss.RESTARTED))

    def _open(self, watched: _Watched) -> bool:
        """Open an ear; tell whether there is one now."""
        reason = self._reason_to_poll(watched)
        if reason is not None:
            self._degrade(watched, Mode.POLLING, reason)
            return False
        try:
            places = places_of_dataset(watched.root) if watched.is_dataset else (Place(watched.root, recursive=False),)
            watched.ear = Ear(watched.root, places, self._post, make_observer=self._make_observer)
        except FileNotFoundError:
            self._degrade(watched, Mode.WAITING, f"{watched.root} is not there")
            return False
        except OSError as error:
            self._degrade(watched, Mode.POLLING, f"{watched.root} cannot be watched: {inotify.advice(error)}")
            return False
        watched.mode, watched.why, watched.covered_at, watched.coverage = Mode.EVENTS, "", None, None
        return True

    def _reason_to_poll(self, watched: _Watched) -> str | None:
        if self._polling == "always":
            return "polling is configured"
        folders = (watched.root, *(os.path.join(watched.root, name) for name in ("Images", "Clases")))
        kinds = [kind for folder in folders if (kind := self._is_blind(folder))]
        if self._polling == "auto" and kinds:
            return f"{watched.root} lies on {kinds[0]}, where changes made on another machine raise no event"
        return None

    def _close_ear(self, watched: _Watched) -> None:
        if watched.ear is not None:
            watched.ear.close()
            watched.ear = None

    def _degrade(self, watched: _Watched, mode: Mode, why: str) -> None:
        watched.mode, watched.why = mode, why
        if why != watched.told:
            watched.told = why
            self._tell(watched, HintsLost(watched.root, why, Loss.DEGRADED))

    def _tell(self, watched: _Watched, lost: HintsLost) -> None:
        """Post a loss, or keep it for the next check where it is not taken."""
        try:
            self._post(lost)
        except Exception:  # noqa: BLE001 - a full queue, mostly; nothing is dropped, and a watcher's thread lives on
            watched.untold = lost
        else:
            watched.untold = None

    def _hear_warning(self, record: logging.LogRecord) -> None:
        """Turn watchdog's own warning, which it gives to no handler of events, into a loss of the root concerned."""
        for watched in tuple(self._watched.values()):
            ear = watched.ear
            if ear is None or not ear.owns_thread(record.thread):
                continue
            if record.levelno >= logging.ERROR:
                ear.broken = record.getMessage()
            elif record.name.endswith("inotify_c") and "overflow" in record.getMessage():
                why = "more happened at once than the kernel queues (fs.inotify.max_queued_events); a scan finds it"
                self._tell(watched, HintsLost(watched.root, why, Loss.OVERFLOWED))


class _WarningHandler(logging.Handler):
    """Hands each warning of a logger to a function."""

    def __init__(self, hear: Callable[[logging.LogRecord], None]) -> None:
        super().__init__(logging.WARNING)
        self._hear = hear

    def emit(self, record: logging.LogRecord) -> None:
        """Hand on one record; never raises, since it runs in the threads that watch."""
        try:
            self._hear(record)
        except Exception:  # noqa: BLE001 - logging's own rule: report on stderr and go on
            self.handleError(record)
