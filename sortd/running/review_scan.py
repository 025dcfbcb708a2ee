"""The scan of Review/: which of the images that sortd put there still stand, slice by slice."""

import os
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Protocol

from sortd.layout import Area, Layout
from sortd.messages import Stamp
from sortd.names import rule_for_folder
from sortd.running.sweep import Sweep
from sortd.sorting.refusals import Refusals
from sortd.sorting.rounds import Throttle
from sortd.store.history import History

SLICE = 200
"""Images looked at in one turn of the loop: each costs a question to the journal, some 0.1 ms."""


class Known(Protocol):
    """What the core remembers of Review/."""

    def knows(self, path: str) -> bool:
        """Tell whether an image under this path is remembered."""

    @property
    def has_room_in_review(self) -> bool:
        """Tell whether one more image of Review/ would be remembered."""


class ReviewScan:
    """One scan of Review/ at a time; ``asked`` is set where an event asks for another one."""

    def __init__(self, layout: Layout, history: History, report: Callable[[OSError], None]) -> None:
        """Prepare.

        Args:
            layout: the dataset's folders.
            history: what its journal can be asked.
            report: told what cannot be looked at.
        """
        self._root, self._history = layout.root, history
        self._sweep = Sweep(os.fspath(layout.area(Area.REVIEW)), report, rule_at_top=rule_for_folder)
        self._foreign = Refusals()  # versions that sortd did not put there
        self.asked = Throttle(1.0)

    @property
    def is_under_way(self) -> bool:
        """Tell whether files are left to look at."""
        return self._sweep.is_under_way

    def begin(self) -> bool:
        """Begin, and tell so; where one is under way another one follows it."""
        if not self._sweep.begin():
            self.asked.ask()
            return False
        self.asked.begin(monotonic())
        return True

    def take(self, known: Known) -> Iterator[tuple[str, Stamp, int]]:
        """Take the next slice: path, version and generation of each image there that sortd could not decide.

        Raises:
            JournalError: the journal cannot be read.
        """
        for path, mark in self._sweep.take(SLICE):
            if (generation := self._generation_of(path, mark, known)) is not None:
                yield path, mark, generation
        if not self._sweep.is_under_way:
            self.asked.end(monotonic())

    def _generation_of(self, path: str, mark: Stamp, known: Known) -> int | None:
        """Return the generation that could not decide an image; None: sortd did not put it there."""
        if self._foreign.has(path, mark):
            return None
        if known.knows(path) or not known.has_room_in_review:
            return 0  # the core notes that it was named, or that there is no room for it
        record = self._history.last_known(mark)
        if record is not None and os.path.join(self._root, record.destination_path) == path:
            return record.grounds.generation
        self._foreign.note(path, mark)
        return None
