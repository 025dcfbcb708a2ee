"""A patrol: a look through what was handled, slice by slice, for what the user did with it since.

Dataset/ may hold a million images, and each of them is looked at when its folder changed: all at once that would keep
the loop from its work for as long as the disk takes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice

from sortd.journal import Journal
from sortd.layout import Area, Layout
from sortd.messages import Stamp
from sortd.running.corrections import Correction, Corrections
from sortd.running.rejects import Rejects

SLICE = 500
"""Files looked at in one turn of the loop: two milliseconds where none changed, some fifty where each is looked up."""


@dataclass(frozen=True, slots=True)
class Mended:
    """An image in Rejected/ that shows another version than was set aside."""

    path: str
    stamp: Stamp


Noticed = Correction | Mended


class Patrol:
    """Notices what the user did with the handled images of one dataset; one look through them at a time."""

    def __init__(self, layout: Layout, journal: Journal, report: Callable[[OSError], None]) -> None:
        """Prepare; nothing is looked at yet. ``report`` is told what cannot be looked at."""
        self._corrections, self._rejects = Corrections(layout, journal, report), Rejects(layout, journal)
        self._looks: Iterator[Noticed | None] | None = None
        self._wanted_at: int | None = None

    def look(self, area: Area, path: str) -> Noticed | None:
        """Look at one file in Dataset/ or Rejected/.

        Raises:
            JournalError: the journal cannot be read or written.
        """
        if area is Area.DATASET:
            return self._corrections.look(path)
        found = self._rejects.look(path) if area is Area.REJECTED else None
        return None if found is None else Mended(path, found)

    def keep(self, path: str, refused: Stamp) -> None:
        """Note that a file in Rejected/ was refused again; see ``Rejects.keep``."""
        self._rejects.keep(path, refused)

    def learnt(self) -> tuple[tuple[str, str, Stamp], ...]:
        """Return every corrected image that still stands where the user put it: label, path, stamp."""
        return self._corrections.learnt()

    @property
    def is_under_way(self) -> bool:
        """Tell whether files are left to look at."""
        return self._looks is not None

    def begin(self, now_ns: int) -> None:
        """Begin; where one is under way another one follows it, since it may have passed what happened just now.

        Args:
            now_ns: nanoseconds since the epoch.
        """
        if self._looks is not None:
            self._wanted_at = now_ns
            return
        self._looks = chain(self._corrections.scan(now_ns), self._mended(now_ns))

    def end(self) -> None:
        """Look at no more; the next patrol begins where this one did."""
        self._looks, self._wanted_at = None, None

    def take(self) -> list[Noticed]:
        """Look at the next slice; return what was noticed.

        Raises:
            JournalError: the journal cannot be read or written.
        """
        if self._looks is None:
            return []
        looks = list(islice(self._looks, SLICE))
        if len(looks) < SLICE:
            again, self._looks, self._wanted_at = self._wanted_at, None, None
            if again is not None:
                self.begin(again)
        return [look for look in looks if look is not None]

    def _mended(self, now_ns: int) -> Iterator[Mended | None]:
        for found in self._rejects.scan(now_ns):
            yield None if found is None else Mended(*found)
