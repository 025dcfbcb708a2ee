"""A memory of versions of files that need no further look, 64 bits each."""

from sortd.events import Stamp

MOST_REFUSALS = 1_000_000  # some 70 MB


class Refusals:
    """Versions of files that stay where they are and have no ``Image``, 64 bits each."""

    def __init__(self, most: int = MOST_REFUSALS) -> None:
        """Start empty; beyond ``most`` versions all are dropped, and those files are decoded once more."""
        self._most = most
        self._known: set[int] = set()

    def has(self, path: str, stamp: Stamp, why: str = "") -> bool:
        """Return whether this version was noted."""
        return bool(self._known) and hash((path, stamp, why)) in self._known  # hashing a stamp takes a microsecond

    def note(self, path: str, stamp: Stamp, why: str = "") -> bool:
        """Note a version, and ``why`` if that can change; return whether it is new."""
        if self.has(path, stamp, why):
            return False
        if len(self._known) >= self._most:
            self._known.clear()
        self._known.add(hash((path, stamp, why)))
        return True
