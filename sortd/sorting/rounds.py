"""Rounds: what comes round every so many seconds, each by its name."""


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
