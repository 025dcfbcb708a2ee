"""A patrol: a look through what was handled, slice by slice, for what the user did with it since.

Dataset/ may hold a million images, and each of them is looked at when its folder changed: all at once that would keep
the loop from its work for as long as the disk takes. Events only say what is wanted: single files come first, and what
is found in a slice is recorded in one commit.
"""

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from time import monotonic, time_ns

from sortd.layout import Area, Layout
from sortd.messages import Stamp
from sortd.running.corrections import Correction, Corrections, Misplaced
from sortd.running.rejects import Rejects
from sortd.running.sweep import Clock, next_slice
from sortd.sorting.rounds import Throttle
from sortd.store.journal import Journal
from sortd.store.records import Record

SLICE = 500
"""Files looked at in one turn of the loop, at most: two milliseconds where none changed."""

MOST_WANTED = 20_000
"""Single files that are remembered as to be looked at; where more changed, everything is looked through."""

PAUSE_SECONDS = 1.0
"""Between two looks that events asked for, through everything or at single files: most of what a storm of renames names
is gone by then."""

MOST_FOLLOWED = 50
"""Images whose companions are looked for in one turn of the loop."""

FOLLOW_NS = 2 * 10**9
"""How long after a person moved an image its companions are left alone."""


@dataclass(frozen=True, slots=True)
class Mended:
    """An image in Rejected/ that is to be tried again: another version than was set aside, or a limit was raised."""

    path: str
    stamp: Stamp


Noticed = Correction | Mended
_Look = Misplaced | Mended


class Patrol:
    """Notices what the user did with the handled images of one dataset; one look through them at a time."""

    def __init__(
        self,
        layout: Layout,
        journal: Journal,
        report: Callable[[OSError], None],
        *,
        clock: Clock = monotonic,
        limits: Mapping[str, float] | None = None,
    ) -> None:
        """Prepare; nothing is looked at yet.

        Args:
            layout: the dataset's.
            journal: the dataset's.
            report: is told what cannot be looked at.
            clock: tells seconds.
            limits: by which images are refused; see ``Rejects``.
        """
        self._corrections, self._rejects = Corrections(layout, journal, report), Rejects(layout, journal, limits)
        self._root = layout.root
        self._clock = clock
        self._wanted: OrderedDict[str, Area] = OrderedDict()
        self._singles: Iterator[_Look | None] | None = None
        self._looks: Iterator[_Look | None] | None = None
        self._began_ns = 0
        self._wanted_at: int | None = None
        self._asked = Throttle(PAUSE_SECONDS)
        self._asked_for_singles = Throttle(PAUSE_SECONDS)
        self._singles_looked_at = 0

    def want(self, area: Area, path: str) -> None:
        """Let one handled file be looked at: at once, or with all that are wanted after a pause."""
        if len(self._wanted) < MOST_WANTED:
            self._wanted[path] = area
            self._asked_for_singles.ask()
        else:
            self._wanted.clear()
            self.ask()

    def ask(self) -> None:
        """Let everything be looked through, once for all that ask: soon, but not again and again."""
        self._asked.ask()

    @property
    def deadline(self) -> float:
        """When what was asked for is to begin, on the clock; infinity where nobody asked, or looks are under way."""
        if self.is_under_way:
            return float("inf")
        return min(self._asked.deadline, self._asked_for_singles.deadline)

    @property
    def has_moved(self) -> bool:
        """Tell whether images were found that a person moved, and ``take_moved`` has not told of yet."""
        return bool(self._corrections.moved)

    def take_moved(self, now_ns: int) -> list[tuple[Record, str]]:
        """Return images that a person moved: what had put each into its place, and where it is, as ``moved`` says.

        One that was moved just now waits: a file manager takes its companions along one after the other.

        Args:
            now_ns: nanoseconds since the epoch.
        """
        taken = []
        for record, place in list(islice(self._corrections.moved.values(), MOST_FOLLOWED)):
            try:
                changed_ns = os.lstat(self._root / place).st_ctime_ns
            except OSError:
                changed_ns = 0  # gone again
            if 0 <= now_ns - changed_ns < FOLLOW_NS:
                continue
            del self._corrections.moved[record.id]
            taken += [(record, place)] if changed_ns else []
        return taken

    def keep(self, path: str, refused: Stamp) -> None:
        """Note that a file in Rejected/ was refused again; see ``Rejects.keep``."""
        self._rejects.keep(path, refused)

    def learnt(self) -> tuple[tuple[str, str], ...]:
        """Return every correction: the label, and the path where the image stood then."""
        return self._corrections.learnt()

    @property
    def files_looked_at(self) -> int:
        """Count the files that were looked at since the start."""
        return self._singles_looked_at + self._corrections.files_scanned + self._rejects.files_scanned

    @property
    def is_under_way(self) -> bool:
        """Tell whether files are left to look at."""
        return self._looks is not None or self._singles is not None

    def begin(self, now_ns: int) -> None:
        """Begin; where one is under way another one follows it, since it may have passed what happened just now.

        Args:
            now_ns: nanoseconds since the epoch.

        Raises:
            JournalError: the journal cannot be read.
        """
        if self._looks is not None:
            self._wanted_at = now_ns
            return
        self._asked.begin(self._clock())
        self._began_ns = now_ns
        self._looks = chain(self._corrections.scan(now_ns), self._mended(now_ns))

    def begin_asked(self) -> None:
        """Begin what events asked for, where its time has come: files that they named, and a look through all."""
        if self._singles is None and self._asked_for_singles.is_due(self._clock()):
            self._asked_for_singles.begin(self._clock())
            self._singles = self._look_at_wanted()
        if self._looks is None and self._asked.is_due(self._clock()):
            self.begin(time_ns())

    def end(self) -> None:
        """Look at no more; the next patrol begins where this one did."""
        self._looks, self._singles, self._wanted_at = None, None, None
        self._wanted.clear()

    def take(self) -> list[Noticed]:
        """Look at the next slice; return what was noticed.

        Raises:
            JournalError: the journal cannot be read or written.
        """
        if self._singles is not None:
            looks, is_last = next_slice(self._singles, SLICE, self._clock)
            if is_last:
                self._singles = None
                self._asked_for_singles.end(self._clock())
            return self._noticed(looks)
        if self._looks is None:
            return []
        looks, is_last = next_slice(self._looks, SLICE, self._clock)
        noticed = self._noticed(looks)
        if is_last:
            self._end_look()
        return noticed

    def _end_look(self) -> None:
        self._corrections.note_scan(self._began_ns)
        again, self._looks, self._wanted_at = self._wanted_at, None, None
        self._asked.end(self._clock())
        if again is not None:
            self.begin(again)

    def _noticed(self, looks: list[_Look | None]) -> list[Noticed]:
        misplaced = [look for look in looks if isinstance(look, Misplaced)]
        return [*self._corrections.record(misplaced), *(look for look in looks if isinstance(look, Mended))]

    def _look_at_wanted(self) -> Iterator[_Look | None]:
        while self._wanted:
            path, area = self._wanted.popitem(last=False)
            self._singles_looked_at += 1
            if area is Area.REJECTED and (found := self._rejects.look(path)) is not None:
                yield Mended(path, found)
            else:
                yield from self._corrections.look(path)
            yield None

    def _mended(self, now_ns: int) -> Iterator[Mended | None]:
        looks = self._rejects.scan(now_ns)
        return (None if found is None else Mended(*found) for found in looks)
