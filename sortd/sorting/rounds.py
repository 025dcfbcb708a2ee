"""Rounds: what comes round every so many seconds, by its name, and what events ask for, with pauses between."""

RESTS = 9.0
"""A throttled task rests for so many times as long as it took: it takes at most a tenth of the time."""


class Rounds:
    """Remembers when each round is due next, on the caller's clock."""

    def __init__(self) -> None:
        """Begin with no round."""
        self._due: dict[str, float] = {}

    def put_off(self, name: str, until: float) -> None:
        """Let a round be due at that time, not before."""
        self._due[name] = until

    def is_due(self, name: str, now: float, every_seconds: float) -> bool:
        """Tell whether a round's time has come, the first time at once, and if so set the next one."""
        if now < self._due.get(name, now):
            return False
        self._due[name] = now + every_seconds
        return True

    def next_deadline(self) -> float:
        """Return when the nearest round is due; infinity where there is none."""
        return min(self._due.values(), default=float("inf"))


class Throttle:
    """A task that events ask for: done once for all that asked, at once the first time, then with pauses between.

    The caller's clock is used, in seconds.
    """

    def __init__(self, pause_seconds: float) -> None:
        """Begin with nothing asked for.

        Args:
            pause_seconds: from the end of one to the begin of the next, at least; longer where it took long.
        """
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
