"""Companions that come or are left apart from their image, and follow it by the journal.

A phone uploads the film of a Live Photo minutes after the photo, a program writes a sidecar when it gets to it. Their
image is the last one of that name that left the same folder of the inbox, and not long ago: a camera uses its names
again, and next year's film is no part of this year's photo.

An image that a person moves on leaves its companions where sortd had put it; they follow it too. The journal notes
where an image was seen last, and where companions of it may stand still (``PLACES_FACT``).
"""

import json
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

from sortd.events import Move, Outcome
from sortd.journaling.history import History
from sortd.journaling.records import Record
from sortd.moving.companions import claim_on, claims, companions_of, name_beside, owners_of, starts_of_images
from sortd.moving.listing import Listings
from sortd.moving.relocation import LONGEST_NAME, FolderNameError, Role, checked_folder
from sortd.moving.renaming import Folders, is_version, look, stamp_of

LATE_SECONDS = 86_400.0
"""How long after its image a companion may come: uploads over a weak line take hours, a card is full after weeks."""

PLACES_FACT = "places:"
"""Followed by a record's number: a list in JSON, where its image was seen last and where companions may stand still."""


class Latecomers:
    """Finds where files that are no images belong, in one dataset."""

    def __init__(
        self, root: Path, history: History, listings: Listings | None = None, *, clock: Callable[[], float] = time.time
    ) -> None:
        """Begin.

        Args:
            root: the dataset, as its paths are spelled in the moves.
            history: what its journal can be asked.
            listings: of its folders.
            clock: seconds since the epoch.
        """
        self._root, self._history, self._clock = os.fspath(root), history, clock
        self._listings = listings or Listings()

    def order_for(self, path: str) -> Move | None:
        """Return the move that brings a file to its image; None where it has none, or one that is still here.

        Raises:
            JournalError: the journal cannot be read.
        """
        folder, _, name = path.removeprefix(f"{self._root}/").rpartition("/")
        if folder.partition("/")[0] != "Images" or not claims(name) or self.is_awaiting(path):
            return None
        record = self._image_of(folder, name)
        if record is None:
            return None
        place = places_of(self._history, record)[0]
        if not self._stands(record, place):
            return None
        return self._order(folder, name, record.relocation.image.name, place, record)

    def is_awaiting(self, path: str) -> bool:
        """Tell whether a file belongs to an image that stands beside it: it goes when that one goes."""
        folder, _, name = path.removeprefix(f"{self._root}/").rpartition("/")
        if not claims(name):
            return False
        try:
            with Folders(Path(self._root), self._listings) as folders:
                owners = owners_of(name, folders.names(folder).near(name))
                return any(look(folders.open(folder), owner) is not None for owner in owners)
        except OSError:
            return False

    def left_by(self, path: str) -> list[Move]:
        """Return the moves of companions that came while their image, which has gone by now, was being copied.

        Raises:
            JournalError: the journal cannot be read.
        """
        folder, _, name = path.rpartition("/")
        left = self._companions_in(folder.removeprefix(f"{self._root}/"), name)
        orders = [self.order_for(f"{folder}/{companion}") for companion in left]
        return [order for order in orders if order is not None]

    # ------------------------------------------------------------ images that were moved on by a person

    def follow(self, record: Record, place: str, former: Record | None = None) -> tuple[list[Move], list[str]]:
        """Return the moves that bring the companions of an image to where it stands now, and its places from now on.

        Args:
            record: the move that put the image into its place.
            place: where it stands now, relative to the dataset.
            former: a move before that one, after which a person brought the image back.

        Raises:
            JournalError: the journal cannot be read.
        """
        known = places_of(self._history, record)
        if former is not None:
            known += places_of(self._history, former)
        orders: list[Move] = []
        places = [place]
        for one in dict.fromkeys(known):
            if one != place and (left := self._left_at(one, place, record)):
                orders += left
                places.append(one)
        return orders, places

    def _left_at(self, former: str, place: str, record: Record) -> list[Move]:
        folder, _, name = former.rpartition("/")
        if os.path.lexists(f"{self._root}/{former}"):
            return []  # another file stands there now: what stands beside it is that one's
        left = self._companions_in(folder, name)
        if folder == place.rpartition("/")[0] == "Rejected":
            left += [m.final for m in record.relocation.members if m.role is Role.REASON and m.final]
        orders = [self._order(folder, companion, name, place, record) for companion in dict.fromkeys(left)]
        return [order for order in orders if order is not None]

    def _companions_in(self, folder: str, image: str) -> list[str]:
        """Return what belongs to an image that has left a folder, and to no other image there."""
        try:
            with Folders(Path(self._root), self._listings) as folders:
                opened = folders.open(checked_folder(folder))
                names = [
                    name
                    for name in folders.names(folder).near(image)
                    if (found := look(opened, name)) is not None and stat.S_ISREG(found.st_mode)
                ]
        except (OSError, FolderNameError):
            return []  # gone, or not to be looked at
        return [companion.name for companion in companions_of(image, names) if not companion.shared]

    # ------------------------------------------------------------ the image of a file, and the way to it

    def _image_of(self, folder: str, name: str) -> Record | None:
        """Return the last move of an image of this name out of a folder of the inbox."""
        since = self._clock() - LATE_SECONDS
        moves = (
            record
            for first, beyond in starts_of_images(name)
            for record in self._history.moved_between(folder, first, beyond, since=since)
            if claim_on(name, record.relocation.image.name) is not None
        )
        return max(moves, key=lambda record: record.id, default=None)

    def _order(self, folder: str, name: str, image: str, place: str, record: Record) -> Move | None:
        """Return the move of a file beside an image: ``image`` is its name in the folder, ``place`` where it is now."""
        destination, _, final = place.rpartition("/")
        path, wanted = f"{self._root}/{folder}/{name}", name_beside(name, image, final)
        try:
            found = os.lstat(path)
        except OSError:
            return None  # gone again, or not to be looked at
        if not stat.S_ISREG(found.st_mode) or len(os.fsencode(wanted)) > LONGEST_NAME:
            return None
        return Move(path, stamp_of(found), destination, Outcome.FOLLOWED, wanted=wanted, reason=belongs_to(record))

    def _stands(self, record: Record, place: str) -> bool:
        """Whether an image is still where it was seen last: one that is gone from there is not looked for."""
        mark = record.relocation.image.moved_stamp
        try:
            found = os.lstat(f"{self._root}/{place}")
        except OSError:
            return False
        return mark is not None and is_version(found, mark)


def places_of(history: History, record: Record) -> list[str]:
    """Return where an image was seen last, and where companions of it may stand still, relative to the dataset.

    Raises:
        JournalError: the journal cannot be read.
    """
    return _places(history.fact(f"{PLACES_FACT}{record.id}")) or [record.destination_path]


def images_apart(history: History) -> list[str]:
    """Return the images whose companions stand elsewhere, relative to the dataset.

    Raises:
        JournalError: the journal cannot be read.
    """
    noted = map(_places, history.facts_like(PLACES_FACT, '", "').values())
    return [places[0] for places in noted if len(places) > 1]


def _places(noted: str | None) -> list[str]:
    try:
        found = json.loads(noted or "[]")
    except ValueError:
        return []
    return found if isinstance(found, list) and all(isinstance(place, str) for place in found) else []


def belongs_to(record: Record) -> str:
    """Return the reason by which the journal knows the followers of an image again."""
    return f"belongs to {record.destination_path}"
