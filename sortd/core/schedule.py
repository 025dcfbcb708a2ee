"""Schedules: retries with growing delays, rebuilds, periodic tasks and rate-limited tasks; times are arguments.

All times are seconds of the caller's monotonic clock.
"""

from dataclasses import dataclass, field

RETRY_SECONDS = (1.0, 60.0)  # first and longest delay before a retry; it doubles in between
LASTING_TRIES = 4  # after this many failures, over seven seconds, a failure counts as lasting
REBUILD_PATIENCE = 30.0  # seconds for which a stream of changes in Clases/ delays a rebuild, at most
RESTS = 9.0  # a throttled task pauses for this many times its own duration


def doubled_seconds(times: int, seconds: tuple[float, float] = RETRY_SECONDS) -> float:
    """Return the delay after ``times`` failures: it doubles from the first of ``seconds`` up to the second."""
    first, longest = seconds
    return min(first * 2.0 ** min(times - 1, 60), longest) if times > 0 else 0.0


@dataclass(slots=True)
class Backoff:
    """The delay before the next try of something that failed; it doubles with each failure."""

    until: float | None = None
    tries: int = 0

    def begin(self, now: float) -> None:
        """Start a delay, twice as long as the last one, unless one is running."""
        if self.until is None:
            self.tries += 1
            self.until = now + doubled_seconds(self.tries)

    def is_over(self, now: float) -> bool:
        """Return whether the delay has ended just now, and clear it."""
        if self.until is None or now < self.until:
            return False
        self.until = None
        return True

    def clear(self) -> None:
        """Reset after a success."""
        self.until, self.tries = None, 0


class FolderBackoffs:
    """One ``Backoff`` for each source or destination folder that failed, so that it does not block the others."""

    def __init__(self) -> None:
        """Start without delays."""
        self._of: dict[str, Backoff] = {}

    @property
    def are_lasting(self) -> bool:
        """Whether every folder that is being retried has failed ``LASTING_TRIES`` times."""
        tries = [one.tries for one in self._of.values() if one.until is not None]
        return bool(tries) and min(tries) >= LASTING_TRIES

    @property
    def until(self) -> float | None:
        """The end of the first delay; None without delays."""
        return min((one.until for one in self._of.values() if one.until is not None), default=None)

    def begin(self, folder: str, now: float) -> None:
        """Start the delay of a folder."""
        self._of.setdefault(folder, Backoff()).begin(now)

    def holds(self, folder: str) -> bool:
        """Return whether the delay of a folder is running."""
        return folder in self._of and self._of[folder].until is not None

    def end_due(self, now: float) -> None:
        """Clear the delays that are over."""
        for one in self._of.values():
            one.is_over(now)

    def clear(self, folder: str) -> bool:
        """Reset a folder after a success; return False if a later failure has started its delay."""
        if self.holds(folder):
            return False
        self._of.pop(folder, None)
        return True


@dataclass(slots=True)
class RebuildSchedule:
    """When the next rebuild is due: the first one at once, then after changes; one runs at a time."""

    job: int = 0  # the number of the last rebuild that was started
    _at: float | None = 0.0
    _touched_since: float | None = None
    _is_running: bool = False
    _backoff: Backoff = field(default_factory=Backoff)

    @property
    def is_pending(self) -> bool:
        """Whether a rebuild is due or running."""
        return self._is_running or self._at is not None

    @property
    def deadlines(self) -> tuple[float | None, float | None]:
        """When the next rebuild is due, and when a failed one is retried; None where there is none."""
        return None if self._is_running else self._at, self._backoff.until

    def touch(self, now: float, *, settle_seconds: float) -> None:
        """Schedule a rebuild ``settle_seconds`` after the last change, at most ``REBUILD_PATIENCE`` after the first."""
        if self._touched_since is None:
            self._touched_since = now
        latest = self._touched_since + max(REBUILD_PATIENCE, settle_seconds)
        self._at = min(now + settle_seconds, latest)
        self._backoff.clear()

    def begin(self, now: float) -> int | None:
        """Start the rebuild that is due and return its number; None if none is."""
        if self._backoff.is_over(now):
            self._at = now
        if self._is_running or self._at is None or now < self._at:
            return None
        self._at, self._touched_since, self._is_running = None, None, True
        self.job += 1
        return self.job

    def is_running(self, job: int) -> bool:
        """Return whether the rebuild of this number is running."""
        return self._is_running and job == self.job

    def succeed(self) -> None:
        """End the running rebuild."""
        self._is_running = False
        self._backoff.clear()

    def fail(self, now: float, *, is_lasting: bool) -> None:
        """End the running rebuild, and retry it with growing delays unless the failure is lasting."""
        self._is_running = False
        if not is_lasting:
            self._backoff.begin(now)

    def retry(self, now: float) -> None:
        """Schedule another rebuild: after the running one, or else with growing delays."""
        if self._is_running:
            self._at = now
        else:
            self._backoff.begin(now)


class PeriodicTimer:
    """The next due time of each periodic task, by name."""

    def __init__(self) -> None:
        """Start without tasks."""
        self._due: dict[str, float] = {}

    def put_off(self, name: str, until: float) -> None:
        """Make a task due at ``until``."""
        self._due[name] = until

    def is_due(self, name: str, now: float, every_seconds: float) -> bool:
        """Return whether a task is due, which it is on the first call, and if so schedule the next time."""
        if now < self._due.get(name, now):
            return False
        self._due[name] = now + every_seconds
        return True

    def next_deadline(self) -> float:
        """Return when the first task is due; infinity without tasks."""
        return min(self._due.values(), default=float("inf"))


@dataclass(slots=True)
class Throttle:
    """A task that runs once for all requests made meanwhile: the first at once, later ones after a pause.

    The pause is ``pause_seconds``, or ``RESTS`` times the duration of the last run if that is longer.
    """

    pause_seconds: float
    _is_asked: bool = False
    _not_before: float = float("-inf")
    _began: float = 0.0

    def ask(self) -> None:
        """Request the task."""
        self._is_asked = True

    @property
    def deadline(self) -> float:
        """When the requested task may start; infinity without a request."""
        return self._not_before if self._is_asked else float("inf")

    def is_due(self, now: float) -> bool:
        """Return whether the task is requested and its pause is over."""
        return now >= self.deadline

    def begin(self, now: float) -> None:
        """Note the start of the task, which answers all requests so far."""
        self._is_asked, self._began, self._not_before = False, now, now + self.pause_seconds

    def end(self, now: float) -> None:
        """Note the end of the task."""
        self._not_before = now + max(self.pause_seconds, RESTS * (now - self._began))
