"""What the watcher says: hints, hints that were lost, and how each root is followed. A part of the watch edge."""

from dataclasses import dataclass, field
from enum import StrEnum


@dataclass(frozen=True, slots=True)
class Hint:
    """Something happened to this path; look for yourself.

    Attributes:
        path: Absolute, as ``os.fsdecode`` gives it; nothing need stand there any more.
        closed: A writer closed the file: it may well be whole.
        directory: It is, or was, a folder: scan it.
        at: When it was heard, in seconds of the monotonic clock; hints that differ in nothing else are equal.
    """

    path: str
    closed: bool = False
    directory: bool = False
    at: float = field(default=0.0, compare=False)


class Loss(StrEnum):
    """Why hints were lost; with ``watch.`` before it, the event's name in the log."""

    OVERFLOWED = "overflowed"  # more happened than the queue holds
    RESTARTED = "restarted"  # the watch had died or gone deaf, and hears again
    DEGRADED = "degraded"  # the watch cannot be had, or only in part: the root is scanned more often


class Mode(StrEnum):
    """How a root is followed."""

    EVENTS = "events"  # by inotify; the scan is the safety net
    POLLING = "polling"  # by scans alone, or besides an inotify that misses some folders
    WAITING = "waiting"  # the folder is not there


@dataclass(frozen=True, slots=True)
class HintsLost:
    """Hints about this root did not arrive: scan it.

    Attributes:
        root: As it was given to the watcher.
        why: A sentence for the log, with the setting that mends it where there is one.
        loss: The kind.
    """

    root: str
    why: str
    loss: Loss


@dataclass(frozen=True, slots=True)
class WatchStatus:
    """How a root is followed now, and why not by events where that is so."""

    root: str
    mode: Mode
    why: str = ""
