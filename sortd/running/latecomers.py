"""Latecomers: sidecars, films and raws that come after their image was filed, and follow it by the journal.

A phone uploads the film of a Live Photo minutes after the photo, a program writes a sidecar when it gets to it. Their
image is the last one of that name that left the same folder of the inbox, and not long ago: a camera uses its names
again, and next year's film is no part of this year's photo.
"""

import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

from sortd.journaling.history import History
from sortd.journaling.records import Record
from sortd.messages import Move, Outcome
from sortd.moving.companions import companions_of, images_with
from sortd.moving.free_names import split_name
from sortd.moving.relocation import LONGEST_NAME
from sortd.moving.renaming import is_version, stamp_of

LATE_SECONDS = 86_400.0
"""How long after its image a companion may come: uploads over a weak line take hours, a card is full after weeks."""


class Latecomers:
    """Finds where files that are no images belong, in one dataset."""

    def __init__(self, root: Path, history: History, *, clock: Callable[[], float] = time.time) -> None:
        """Begin.

        Args:
            root: the dataset, as its paths are spelled in the moves.
            history: what its journal can be asked.
            clock: seconds since the epoch.
        """
        self._root, self._history, self._clock = os.fspath(root), history, clock

    def order_for(self, path: str) -> Move | None:
        """Return the move that brings a file to its image; None where it has none, or one that is still here.

        Raises:
            JournalError: the journal cannot be read.
        """
        folder, _, name = path.removeprefix(f"{self._root}/").rpartition("/")
        images = images_with(name)
        if not images or folder.partition("/")[0] != "Images":
            return None
        if any(os.path.lexists(f"{self._root}/{folder}/{image}") for image in images):
            return None  # it goes with that one, when that one goes
        record = self._history.last_moved(folder, images, since=self._clock() - LATE_SECONDS)
        if record is None or not self._stands(record):
            return None
        wanted = _name_beside(name, record.relocation.image.name, record.relocation.image.final)
        try:
            found = os.lstat(path)
        except OSError:
            return None  # gone again, or not to be looked at
        if not stat.S_ISREG(found.st_mode) or len(os.fsencode(wanted)) > LONGEST_NAME:
            return None
        return Move(
            path,
            stamp_of(found),
            record.relocation.destination,
            Outcome.FOLLOWED,
            wanted=wanted,
            reason=belongs_to(record),
        )

    def left_by(self, path: str) -> list[Move]:
        """Return the moves of companions that came while their image, which has gone by now, was being copied.

        Raises:
            JournalError: the journal cannot be read.
        """
        folder, _, name = path.rpartition("/")
        left = companions_of(name, lambda other: os.path.isfile(f"{folder}/{other}"))
        orders = [self.order_for(f"{folder}/{companion.name}") for companion in left if not companion.shared]
        return [order for order in orders if order is not None]

    def _stands(self, record: Record) -> bool:
        """Whether an image is still where sortd put it: one that the user moved on is not looked for."""
        mark = record.relocation.image.moved_stamp
        try:
            found = os.lstat(f"{self._root}/{record.destination_path}")
        except OSError:
            return False
        return mark is not None and is_version(found, mark)


def belongs_to(record: Record) -> str:
    """Return the reason by which the journal knows the followers of an image again."""
    return f"belongs to {record.destination_path}"


def _name_beside(companion: str, image: str, final: str) -> str:
    """Return the name that a companion is to have beside an image that got another name than it had."""
    if companion.startswith(image):
        return final + companion.removeprefix(image)
    return split_name(final)[0] + companion.removeprefix(split_name(image)[0])
