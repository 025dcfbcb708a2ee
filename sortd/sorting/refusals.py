"""Refusals: versions of files that stay where they are, remembered in a few bytes each.

The backlog keeps an entry for as many as it keeps of others; an inbox may hold a million films and notes beside them.
Of those that have no entry only a number is kept, so that no scan looks into them again.
"""

from sortd.messages import Stamp

MOST = 1_000_000
"""Numbers that are kept: some seventy megabytes. Beyond them all are forgotten, and looked into once more."""


class Refusals:
    """A set of versions, told apart by 64 bits: two of a million are confused once in ten million sortds."""

    def __init__(self, most: int = MOST) -> None:
        """Begin with none."""
        self._most = most
        self._known: set[int] = set()

    def __len__(self) -> int:
        """Count them."""
        return len(self._known)

    def has(self, path: str, stamp: Stamp, why: str = "") -> bool:
        """Tell whether this version was noted."""
        return hash((path, stamp, why)) in self._known

    def note(self, path: str, stamp: Stamp, why: str = "") -> bool:
        """Note a version, with why it was refused where that may change; tell whether it is news."""
        if self.has(path, stamp, why):
            return False
        if len(self._known) >= self._most:
            self._known.clear()
        self._known.add(hash((path, stamp, why)))
        return True
