"""A pause: something failed and will be tried again, later each time."""

RETRY_SECONDS = (1.0, 60.0)
"""First and longest pause before what failed (a rebuild, a destination) is tried again; it doubles between."""


class Pause:
    """Something that failed and will be tried again, later each time."""

    def __init__(self) -> None:
        """Begin with nothing to wait for."""
        self.until: float | None = None
        self._seconds = RETRY_SECONDS[0]

    def begin(self, now: float) -> None:
        """Wait, twice as long as the last time."""
        if self.until is None:
            self.until = now + self._seconds
            self._seconds = min(2 * self._seconds, RETRY_SECONDS[1])

    def is_over(self, now: float) -> bool:
        """Tell whether it is time to try again, and if so wait no more."""
        if self.until is None or now < self.until:
            return False
        self.until = None
        return True

    def clear(self) -> None:
        """It worked: the next failure waits a short time again."""
        self.until, self._seconds = None, RETRY_SECONDS[0]
