"""Detection of missing disks: whether a dataset is mounted with all its folders, or a folder is an empty mount point.

The marker shows whether the dataset itself is mounted. A folder on another disk has no marker, and images filed into
its empty mount point would be hidden once the disk is mounted. So the journal records the folders that were on another
file system; such a folder counts as missing while it is empty and on the dataset's own file system.
"""

import os
from collections.abc import Callable
from pathlib import Path

from sortd.layout import Area, Layout
from sortd.store.journal import Journal

APART_FACT = "folders_apart"  # key of the names of the folders seen on another file system, separated by spaces


class Presence:
    """Tells whether a dataset is complete; used before each group of moves."""

    def __init__(
        self,
        layout: Layout,
        journal: Journal | None,
        *,
        needs_marker: bool = True,
        lock_problem: Callable[[], str | None] = lambda: None,
    ) -> None:
        """Check ``layout``.

        Args:
            layout: the dataset.
            journal: records which folders were on other disks; None: these are not checked.
            needs_marker: whether a dataset without a marker counts as missing.
            lock_problem: returns a sentence if another sortd works on the dataset, otherwise None.

        Raises:
            JournalError: the journal cannot be read.
        """
        self._layout, self._journal, self._needs_marker = layout, journal, needs_marker
        self.lock_problem = lock_problem
        noted = None if journal is None else journal.history.fact(APART_FACT)
        self._apart = frozenset((noted or "").split())

    def problem(self) -> str | None:
        """Return a sentence that says what is missing; None if nothing is.

        Raises:
            JournalError: the journal cannot be written.
        """
        if self._needs_marker and not self._layout.is_present:
            return f"{self._layout.marker} is missing: is the disk mounted? `sortd init {self._layout.root}` creates it"
        if (taken := self.lock_problem()) is not None:
            return taken
        return None if self._journal is None else self._absent_folder(self._journal)

    def _absent_folder(self, journal: Journal) -> str | None:
        """Return a sentence about a folder whose other disk is missing; record the folders on other disks."""
        own = _device(self._layout.root)
        apart: set[str] = set()
        for area in Area:
            folder = self._layout.area(area)
            try:
                device = _device(folder)
            except OSError as error:
                if area.value in self._apart:
                    return f"{folder} is on another disk, which does not respond: {error.strerror}"
                continue  # opening it fails with the same error
            if device not in {None, own}:
                apart.add(area.value)
            elif area.value in self._apart and _is_empty(folder):
                return (
                    f"{folder} was on another disk and is an empty folder now: is the disk mounted? To use this folder "
                    "instead, create any folder in it"
                )
        if apart != self._apart:
            journal.note(APART_FACT, " ".join(sorted(apart)))
            self._apart = frozenset(apart)
        return None


def _device(folder: Path) -> int | None:
    """Return the device of a folder; None if there is no folder.

    Raises:
        OSError: the disk does not respond.
    """
    try:
        return folder.stat().st_dev
    except (FileNotFoundError, NotADirectoryError):
        return None


def _is_empty(folder: Path) -> bool:
    """Tell whether a folder does not exist, or contains only ``lost+found``."""
    try:
        return all(name == "lost+found" for name in os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return True
