"""Rebuilding: what one dataset asks of the worker when its references changed, and what was wished for since."""

import os
from collections.abc import Callable
from dataclasses import replace

from sortd.layout import Area, Layout
from sortd.messages import DatasetId
from sortd.references import ReferenceSettings
from sortd.running.sweep import Glance
from sortd.running.worker import RebuildJob

Learnt = Callable[[], tuple[tuple[str, str], ...]]
"""Returns the images that the user put right: label, path; the worker looks whether they still stand there."""


class Rebuilding:
    """Knows what a dataset is taught by, and orders its prototypes."""

    def __init__(
        self,
        identity: DatasetId,
        layout: Layout,
        teaching: ReferenceSettings,
        *,
        last_generation: int,
        report: Callable[[OSError], None],
    ) -> None:
        """Begin.

        Args:
            identity: by which the worker knows the dataset.
            layout: its folders.
            teaching: what decides, beside the images, what the prototypes are.
            last_generation: the highest number that was ever used; none is used again.
            report: told what of ``Clases/`` cannot be looked at.
        """
        self.teaching = teaching
        self.last_generation = last_generation
        self._identity, self._clases = identity, layout.area(Area.CLASES)
        self._glance = Glance(os.fspath(self._clases), report)
        self._force = False
        self._afresh = False
        self._ordered = (False, False)  # the wishes that the rebuild ordered last is to fulfil

    @property
    def is_comparing(self) -> bool:
        """Tell whether files of ``Clases/`` are left to look at."""
        return self._glance.is_under_way

    def compare(self) -> None:
        """Begin to look whether ``Clases/`` differs from what was last seen of it: a hint may have been lost."""
        self._glance.begin()

    def has_reason(self) -> bool:
        """Look at the next slice of ``Clases/``; tell whether all of it, seen now, differs."""
        return self._glance.differs()

    def force(self) -> None:
        """Let the next rebuild pass the reload gate."""
        self._force = True

    def reload(self, teaching: ReferenceSettings) -> None:
        """Take another teaching over; the next rebuild forgets what emptied classes held."""
        self.teaching, self._afresh = teaching, True

    def note(self, generation: int) -> None:
        """Take note of a generation that serves."""
        self.last_generation = max(self.last_generation, generation)

    def renew_wishes(self) -> None:
        """Let the next rebuild fulfil what the one ordered last was to: it failed, and is tried again."""
        force, afresh = self._ordered
        self._force, self._afresh = self._force or force, self._afresh or afresh

    def order(self, job: int, learnt: Learnt | None) -> RebuildJob:
        """Return the rebuild that is to be done now; wishes are fulfilled by it.

        Args:
            job: its number, which the answer carries.
            learnt: asked where corrections teach; None: nothing is known of any.
        """
        teaching = self.teaching
        if learnt is not None and teaching.learns_from_corrections:
            teaching = replace(teaching, corrections=learnt())
        order = RebuildJob(
            self._identity,
            self._clases,
            teaching,
            self.last_generation,
            job,
            force=self._force,
            afresh=self._afresh,
        )
        self._ordered = self._force, self._afresh
        self._force = self._afresh = False
        return order
