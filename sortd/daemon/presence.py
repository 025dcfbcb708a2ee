"""The presence of a dataset: is it there with all its disks, or does a mount point only look like an empty folder?

The marker tells whether the dataset itself is mounted. A folder of it may lie on a disk of its own, without marker:
images filed into its mount point while it is not mounted would be hidden once it is. So the journal remembers which
folders lay on another file system than the dataset; one that is empty and lies on the dataset's own now is taken for
absent until its disk is back, or something stands in it.
"""

import os
from collections.abc import Callable
from pathlib import Path

from sortd.layout import Area, Layout
from sortd.store.journal import Journal

APART_FACT = "folders_apart"
"""The journal's note of the folders that were seen on a file system of their own, by name, a space between."""


class Presence:
    """Whether a dataset is there; asked before each group of moves."""

    def __init__(
        self,
        layout: Layout,
        journal: Journal | None,
        *,
        needs_marker: bool = True,
        lock_problem: Callable[[], str | None] = lambda: None,
    ) -> None:
        """Ask about ``layout``; without a journal, folders are taken for what they look like.

        Args:
            layout: the dataset.
            journal: remembers which of its folders lay on disks of their own.
            needs_marker: whether a dataset without a marker is absent.
            lock_problem: says why another sortd has the dataset now, in a sentence; None where none has.

        Raises:
            JournalError: the journal cannot be read.
        """
        self._layout, self._journal, self._needs_marker = layout, journal, needs_marker
        self.lock_problem = lock_problem
        noted = None if journal is None else journal.history.fact(APART_FACT)
        self._apart = frozenset((noted or "").split())

    def problem(self) -> str | None:
        """Return why the dataset is taken for absent, in a sentence; None where it is there.

        Raises:
            JournalError: the journal cannot be written.
        """
        if self._needs_marker and not self._layout.is_present:
            return f"{self._layout.marker} is gone: is the disk mounted? `sortd init {self._layout.root}` makes it anew"
        if (taken := self.lock_problem()) is not None:
            return taken
        return None if self._journal is None else self._absent_folder(self._journal)

    def _absent_folder(self, journal: Journal) -> str | None:
        """Say which folder, that was on a disk of its own, is not any more; remember those that are."""
        own = _device(self._layout.root)
        apart: set[str] = set()
        for area in Area:
            folder = self._layout.area(area)
            try:
                device = _device(folder)
            except OSError as error:
                if area.value in self._apart:
                    return f"{folder} is on a disk of its own that does not answer: {error.strerror}"
                continue  # whoever opens it hears the same
            if device not in {None, own}:
                apart.add(area.value)
            elif area.value in self._apart and _is_empty(folder):
                return (
                    f"{folder} was on a disk of its own and is an empty folder now: is the disk mounted? If its files "
                    f"are to lie in {self._layout.root} from now on, make any folder in it"
                )
        if apart != self._apart:
            journal.note(APART_FACT, " ".join(sorted(apart)))
            self._apart = frozenset(apart)
        return None


def _device(folder: Path) -> int | None:
    """Return the number of the file system that a folder lies on; None where there is no folder.

    Raises:
        OSError: the disk does not answer.
    """
    try:
        return folder.stat().st_dev
    except (FileNotFoundError, NotADirectoryError):
        return None


def _is_empty(folder: Path) -> bool:
    """Whether a folder is gone, or has nothing in it but what file systems put there."""
    try:
        return all(name == "lost+found" for name in os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return True
