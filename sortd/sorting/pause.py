"""A pause: something failed and will be tried again, later each time."""

RETRY_SECONDS = (1.0, 60.0)
"""First and longest pause before what failed (a rebuild, a destination) is tried again; it doubles between."""

LASTING_TRIES = 4
"""What failed so often, over seven seconds, is not over soon: whoever waits for the end of the work waits no more."""


class Pause:
    """Something that failed and will be tried again, later each time."""

    def __init__(self) -> None:
        """Begin with nothing to wait for."""
        self.until: float | None = None
        self.tries = 0
        self._seconds = RETRY_SECONDS[0]

    def begin(self, now: float) -> None:
        """Wait, twice as long as the last time."""
        if self.until is None:
            self.until = now + self._seconds
            self.tries += 1
            self._seconds = min(2 * self._seconds, RETRY_SECONDS[1])

    def is_over(self, now: float) -> bool:
        """Tell whether it is time to try again, and if so wait no more."""
        if self.until is None or now < self.until:
            return False
        self.until = None
        return True

    def clear(self) -> None:
        """It worked: the next failure waits a short time again."""
        self.until, self.tries, self._seconds = None, 0, RETRY_SECONDS[0]


class FolderPauses:
    """A pause for each folder that could not be moved into, or out of, so that it does not hold up the others."""

    def __init__(self) -> None:
        """Begin with no folder that refuses."""
        self._of: dict[str, Pause] = {}

    @property
    def are_lasting(self) -> bool:
        """Tell whether some folder refused again and again, and no other is still given its first chances."""
        tries = [pause.tries for pause in self._of.values() if pause.until is not None]
        return bool(tries) and min(tries) >= LASTING_TRIES

    @property
    def until(self) -> float | None:
        """When the first pause is over; None where no folder has one."""
        return min((pause.until for pause in self._of.values() if pause.until is not None), default=None)

    def begin(self, folder: str, now: float) -> None:
        """Let this folder wait, twice as long as the last time."""
        self._of.setdefault(folder, Pause()).begin(now)

    def holds(self, folder: str) -> bool:
        """Tell whether nothing may move into, or out of, this folder now."""
        return folder in self._of and self._of[folder].until is not None

    def end_due(self, now: float) -> None:
        """Let those folders be tried again whose time has come."""
        for pause in self._of.values():
            pause.is_over(now)

    def clear(self, folder: str) -> bool:
        """Something was moved into, or out of, this folder; tell whether it is open: no other move failed meanwhile.

        Its next failure waits a short time again.
        """
        if self.holds(folder):
            return False
        self._of.pop(folder, None)
        return True
