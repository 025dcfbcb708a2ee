"""Rebuilds: when the prototypes are to be built anew; one at a time, after the references have settled."""

from sortd.sorting.pause import Pause

REBUILD_PATIENCE = 30.0
"""A stream of changes in Clases/ puts a rebuild off for at most this many seconds."""


class Rebuilds:
    """Whether a rebuild is due, runs, or failed and is to be tried again; one is due from the start."""

    def __init__(self) -> None:
        """Begin with one that is due at once."""
        self._at: float | None = 0.0
        self._touched_since: float | None = None
        self.job = 0
        """The number of the one that was begun last."""
        self._is_running = False
        self._pause = Pause()

    @property
    def is_pending(self) -> bool:
        """Tell whether one is due or running."""
        return self._is_running or self._at is not None

    @property
    def deadlines(self) -> tuple[float | None, float | None]:
        """When the next is due, and when one that failed is tried again; None where there is nothing to wait for."""
        return None if self._is_running else self._at, self._pause.until

    def touch(self, now: float, *, settle_seconds: float) -> None:
        """Let one be due once nothing has changed for ``settle_seconds``, or has kept changing for too long."""
        if self._touched_since is None:
            self._touched_since = now
        latest = self._touched_since + max(REBUILD_PATIENCE, settle_seconds)
        self._at = min(now + settle_seconds, latest)
        self._pause.clear()

    def begin(self, now: float) -> int | None:
        """Return the number of the one that is to begin now, and runs then; None: none is."""
        if self._pause.is_over(now):
            self._at = now
        if self._is_running or self._at is None or now < self._at:
            return None
        self._at, self._touched_since, self._is_running = None, None, True
        self.job += 1
        return self.job

    def is_running(self, job: int) -> bool:
        """Tell whether that very one runs: an answer about another one is none."""
        return self._is_running and job == self.job

    def succeed(self) -> None:
        """End the one that runs."""
        self._is_running = False
        self._pause.clear()

    def fail(self, now: float, *, is_lasting: bool) -> None:
        """End the one that runs; it is tried again, later each time, unless only another change can help."""
        self._is_running = False
        if not is_lasting:
            self._pause.begin(now)

    def retry(self, now: float) -> None:
        """Let another one follow: after the one that runs, where one does, or else later each time."""
        if self._is_running:
            self._at = now
        else:
            self._pause.begin(now)
