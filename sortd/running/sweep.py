"""A sweep: one scan of a folder taken slice by slice, so that a million files do not keep the loop from its work."""

from collections.abc import Callable, Iterator
from itertools import islice

from sortd.messages import Stamp
from sortd.watching.scanning import scan

SLICE = 2000
"""Files taken in one turn of the loop: about ten milliseconds."""


class Sweep:
    """The scan of one folder that is under way, if any."""

    def __init__(self, folder: str, report: Callable[[OSError], None]) -> None:
        """Prepare to scan ``folder``; ``report`` is told what cannot be looked at."""
        self._folder, self._report = folder, report
        self._found: Iterator[tuple[str, Stamp]] | None = None
        self._is_wanted_again = False

    @property
    def is_under_way(self) -> bool:
        """Tell whether files are left to take."""
        return self._found is not None

    def begin(self) -> bool:
        """Begin, and tell so; where one is under way another one is to follow it instead."""
        if self._found is not None:
            self._is_wanted_again = True
            return False
        self._found = scan(self._folder, report=self._report)
        self._is_wanted_again = False
        return True

    def end(self) -> None:
        """Take no more: what is left does not fit into the backlog, and is found by another sweep."""
        self._found, self._is_wanted_again = None, False

    def take(self) -> list[tuple[str, Stamp]]:
        """Take the next slice; a short one is the last, after which nothing is under way."""
        taken = [] if self._found is None else list(islice(self._found, SLICE))
        if len(taken) < SLICE:
            self._found = None
        return taken

    @property
    def is_wanted_again(self) -> bool:
        """Tell whether another sweep was asked for while this one was under way."""
        return self._is_wanted_again


class Glance:
    """A look at all of a folder, slice by slice, to tell whether it differs from the last one."""

    def __init__(self, folder: str, report: Callable[[OSError], None]) -> None:
        """Prepare to look at ``folder``; ``report`` is told what cannot be looked at."""
        self._folder, self._report = folder, report
        self._found: Iterator[tuple[str, Stamp]] | None = None
        self._sum = 0
        self._seen: int | None = None

    @property
    def is_under_way(self) -> bool:
        """Tell whether files are left to look at."""
        return self._found is not None

    def begin(self) -> None:
        """Begin, unless one is under way: what it has passed already the next one sees."""
        if self._found is None:
            self._found, self._sum = scan(self._folder, report=self._report), 0

    def differs(self) -> bool:
        """Look at the next slice; with the last, tell whether other versions stand there than at the last look.

        The first look tells of no difference.
        """
        if self._found is None:
            return False
        taken = list(islice(self._found, SLICE))
        self._sum = (self._sum + sum(map(hash, taken))) % 2**64  # in whatever order they are named
        if len(taken) == SLICE:
            return False
        self._found = None
        before, self._seen = self._seen, self._sum
        return before is not None and before != self._seen
