"""When something is due: what is tried again later each time, rebuilds, and what comes round; times are handed in.

All times are seconds of the caller's monotonic clock.
"""

RETRY_SECONDS = (1.0, 60.0)  # first and longest wait before what failed is tried again; it doubles between
LASTING_TRIES = 4  # what failed so often, over seven seconds, is not over soon
REBUILD_PATIENCE = 30.0  # seconds that a stream of changes in Clases/ puts a rebuild off for, at most
RESTS = 9.0  # a throttled task rests for so many times as long as it took


def doubled_seconds(times: int, seconds: tuple[float, float] = RETRY_SECONDS) -> float:
    """Return the wait after so many failures: the first of ``seconds``, twice as long each time, at most the second."""
    first, longest = seconds
    return min(first * 2.0 ** min(times - 1, 60), longest) if times > 0 else 0.0


class Backoff:
    """Something that failed and will be tried again, later each time."""

    def __init__(self) -> None:
        """Begin with nothing to wait for."""
        self.until: float | None = None
        self.tries = 0

    def begin(self, now: float) -> None:
        """Wait, twice as long as the last time, unless it waits already."""
        if self.until is None:
            self.tries += 1
            self.until = now + doubled_seconds(self.tries)

    def is_over(self, now: float) -> bool:
        """Tell whether it is time to try again, and if so wait no more."""
        if self.until is None or now < self.until:
            return False
        self.until = None
        return True

    def clear(self) -> None:
        """Wait no more, and a short time again after the next failure: it worked."""
        self.until, self.tries = None, 0


class FolderBackoffs:
    """A back-off for each folder that could not be moved into, or out of, so that it does not hold up the others."""

    def __init__(self) -> None:
        """Begin with no folder that refuses."""
        self._of: dict[str, Backoff] = {}

    @property
    def are_lasting(self) -> bool:
        """Tell whether some folder refused again and again, and no other is still given its first chances."""
        tries = [one.tries for one in self._of.values() if one.until is not None]
        return bool(tries) and min(tries) >= LASTING_TRIES

    @property
    def until(self) -> float | None:
        """When the first wait is over; None where no folder has one."""
        return min((one.until for one in self._of.values() if one.until is not None), default=None)

    def begin(self, folder: str, now: float) -> None:
        """Let this folder wait, twice as long as the last time."""
        self._of.setdefault(folder, Backoff()).begin(now)

    def holds(self, folder: str) -> bool:
        """Tell whether nothing may move into, or out of, this folder now."""
        return folder in self._of and self._of[folder].until is not None

    def end_due(self, now: float) -> None:
        """Let those folders be tried again whose time has come."""
        for one in self._of.values():
            one.is_over(now)

    def clear(self, folder: str) -> bool:
        """Note that a move into, or out of, this folder worked; tell whether no other failed meanwhile."""
        if self.holds(folder):
            return False
        self._of.pop(folder, None)
        return True


class RebuildSchedule:
    """Whether a rebuild is due, runs, or failed and is to be tried again; one at a time, one is due at once."""

    def __init__(self) -> None:
        """Begin with one that is due at once."""
        self._at: float | None = 0.0
        self._touched_since: float | None = None
        self.job = 0  # the number of the one that was begun last
        self._is_running = False
        self._backoff = Backoff()

    @property
    def is_pending(self) -> bool:
        """Tell whether one is due or running."""
        return self._is_running or self._at is not None

    @property
    def deadlines(self) -> tuple[float | None, float | None]:
        """When the next is due, and when one that failed is tried again; None where there is nothing to wait for."""
        return None if self._is_running else self._at, self._backoff.until

    def touch(self, now: float, *, settle_seconds: float) -> None:
        """Let one be due once nothing has changed for ``settle_seconds``, or has kept changing for too long."""
        if self._touched_since is None:
            self._touched_since = now
        latest = self._touched_since + max(REBUILD_PATIENCE, settle_seconds)
        self._at = min(now + settle_seconds, latest)
        self._backoff.clear()

    def begin(self, now: float) -> int | None:
        """Return the number of the one that is to begin now, and runs then; None: none is."""
        if self._backoff.is_over(now):
            self._at = now
        if self._is_running or self._at is None or now < self._at:
            return None
        self._at, self._touched_since, self._is_running = None, None, True
        self.job += 1
        return self.job

    def is_running(self, job: int) -> bool:
        """Tell whether that very one runs."""
        return self._is_running and job == self.job

    def succeed(self) -> None:
        """End the one that runs."""
        self._is_running = False
        self._backoff.clear()

    def fail(self, now: float, *, is_lasting: bool) -> None:
        """End the one that runs; it is tried again, later each time, unless only another change can help."""
        self._is_running = False
        if not is_lasting:
            self._backoff.begin(now)

    def retry(self, now: float) -> None:
        """Let another one follow: after the one that runs, where one does, or else later each time."""
        if self._is_running:
            self._at = now
        else:
            self._backoff.begin(now)


class PeriodicTimer:
    """Remembers by name when each periodic task is due next."""

    def __init__(self) -> None:
        """Begin with no task."""
        self._due: dict[str, float] = {}

    def put_off(self, name: str, until: float) -> None:
        """Let a task be due at that time, not before."""
        self._due[name] = until

    def is_due(self, name: str, now: float, every_seconds: float) -> bool:
        """Tell whether a task's time has come, the first time at once, and if so set the next one."""
        if now < self._due.get(name, now):
            return False
        self._due[name] = now + every_seconds
        return True

    def next_deadline(self) -> float:
        """Return when the first task is due; infinity where there is none."""
        return min(self._due.values(), default=float("inf"))


class Throttle:
    """A task that events ask for: done once for all that asked, at once the first time, then with pauses between."""

    def __init__(self, pause_seconds: float) -> None:
        """Begin with nothing asked for; ``pause_seconds`` is the least time between two, longer where one took long."""
        self._pause_seconds = pause_seconds
        self._is_asked = False
        self._not_before = float("-inf")
        self._began = 0.0

    def ask(self) -> None:
        """Ask for the task."""
        self._is_asked = True

    @property
    def deadline(self) -> float:
        """When the task is to begin; infinity where nobody asked for it."""
        return self._not_before if self._is_asked else float("inf")

    def is_due(self, now: float) -> bool:
        """Tell whether somebody asked and the pause is over."""
        return now >= self.deadline

    def begin(self, now: float) -> None:
        """Take note that the task begins, asked for or not: for all that asked so far."""
        self._is_asked, self._began, self._not_before = False, now, now + self._pause_seconds

    def end(self, now: float) -> None:
        """Take note that the task that began last has ended."""
        self._not_before = now + max(self._pause_seconds, RESTS * (now - self._began))
