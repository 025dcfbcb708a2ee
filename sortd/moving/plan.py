"""What a move is to be: which files go along, the names that it tries, and which companions follow their image later.

A phone uploads the film of a Live Photo minutes after the photo, a program writes a sidecar when it gets to it. Their
image is the last one of that name that left the same folder of the inbox, and not long ago: a camera uses its names
again, and next year's film is no part of this year's photo.

An image that a person moves on leaves its companions where sortd had put it; they follow it too. The journal notes
where an image was seen last, and where companions of it may stand still (``PLACES_FACT``).
"""

import json
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

from sortd.companions import (
    claim_on,
    claims,
    companions_of,
    fold,
    name_beside,
    owners_of,
    parts_beside,
    split_name,
    starts_of_images,
)
from sortd.errors import DestinationError
from sortd.events import Move, Moved, Outcome, Stamp
from sortd.files import stamp_of
from sortd.moving.fs import Folders, Listings, is_version, lstat_at
from sortd.names import CONTROLS
from sortd.store.history import History
from sortd.store.journal import Journal
from sortd.store.records import LONGEST_NAME, FolderNameError, MoveFile, MoveRecord, Record, Role, checked_folder

MOST_ATTEMPTS = 100_000  # names that are tried for one image

_MOST_HINTS = 4096

LATE_SECONDS = 86_400.0
"""How long after its image a companion may come: uploads over a weak line take hours, a card is full after weeks."""

PLACES_FACT = "places:"
"""Followed by a record's number: a list in JSON, where its image was seen last and where companions may stand still."""


def new_token() -> str:
    """Return 16 hexadecimal digits that no other move has."""
    return secrets.token_hex(8)


def with_companions(folders: Folders, move: MoveRecord) -> MoveRecord:
    """Return a move together with the companions that stand beside its image now."""
    folder = folders.open(move.source)
    image = move.image.name
    found: dict[str, Stamp] = {}
    for name in folders.names(move.source).near(image):
        status = lstat_at(folder, name)
        if status is not None and stat.S_ISREG(status.st_mode) and not _is_unfinished(folder, name):
            found[name] = stamp_of(status)
    files = [
        MoveFile(Role.SHARED if one.shared else Role.COMPANION, one.name, one.name, found[one.name])
        for one in companions_of(image, found)
    ]
    return replace(move, files=(*move.files, *files))


def _is_unfinished(folder: int, name: str) -> bool:
    """Tell whether a file beside this one says that it is not whole: then it follows its image later."""
    return any(lstat_at(folder, name + rule.ending) is not None for rule in CONTROLS)


def final_names(move: MoveRecord, attempt: int) -> tuple[str, ...]:
    """Return a name for each file, all with the same number; ``attempt`` counts from 1."""
    if attempt == 1:
        return tuple(_fitted(file.wanted) for file in move.files)
    image = move.image.wanted
    stem, suffix = split_name(image)
    number = os.fsencode(f" ({attempt})")
    parts = [(stem, suffix), *(parts_beside(file.wanted, image) for file in move.files[1:])]
    longest = max(
        len(os.fsencode(tail))
        for (base, tail), file in zip(parts, move.files, strict=True)
        if base == stem and file.role is not Role.REASON  # its ending is cut for itself alone, at no image's cost
    )
    found: list[str] = []
    for (base, tail), file in zip(parts, move.files, strict=True):
        name = _numbered(base, number, tail, longest if base == stem else 0)
        if fold(name) in {fold(other) for other in found}:
            own_stem, own_suffix = split_name(file.wanted)  # the names of two files differ there at least
            name = _numbered(own_stem, number, own_suffix, 0)
        found.append(name)
    return tuple(found)


def names_of_one(move: MoveRecord, position: int) -> Iterator[str]:
    """Yield the names that one file of a move tries."""
    return (final_names(move, attempt)[position] for attempt in range(1, MOST_ATTEMPTS))


def _numbered(base: str, number: bytes, tail: str, longest: int) -> str:
    ending = number + os.fsencode(tail)
    room = LONGEST_NAME - len(number) - max(longest, len(ending) - len(number))
    return os.fsdecode(cut(os.fsencode(base), room) + ending)


def cut(name: bytes, room: int) -> bytes:
    """Return at most ``room`` bytes of ``name`` that end where a character ends."""
    if len(name) <= room:
        return name
    end = max(room, 1)
    # Bytes 10xxxxxx go on with the character before them (RFC 3629, section 3).
    while end > 1 and name[end] & 0xC0 == 0x80:  # noqa: PLR2004 - the two bits of the rule above
        end -= 1
    return name[:end]


def _fitted(name: str) -> str:
    raw = os.fsencode(name)
    if len(raw) <= LONGEST_NAME:
        return name
    tail = b".reason.json"
    return os.fsdecode(cut(raw.removesuffix(tail), LONGEST_NAME - len(tail)) + tail)


class FreeNames:
    """Says which names a move tries, so that each of many equal names costs two attempts.

    It only says where to begin: whether a name is free is found out by trying.
    """

    def __init__(self) -> None:
        """Begin without any memory."""
        self._next: dict[tuple[str, str], int] = {}

    def candidates(self, folders: Folders, move: MoveRecord) -> Iterator[tuple[int, tuple[str, ...]]]:
        """Yield the attempts to make, each with a name for every file: without a number, then from the first free one.

        Names are passed over that would join what stands in the destination.

        Raises:
            OSError: the destination cannot be read.
            DestinationError: no name is free.
        """
        is_taken = _taken_names(folders, move)
        for attempt in chain((1,), range(self._next.get(_wanted(move), 2), MOST_ATTEMPTS)):
            names = final_names(move, attempt)
            if not is_taken(names):
                yield attempt, names
        raise DestinationError(
            f"{move.destination}: no free name for {move.image.wanted!r} in {MOST_ATTEMPTS} attempts"
        )

    def remember(self, folders: Folders, move: MoveRecord, attempt: int, names: Sequence[str]) -> None:
        """Note which attempt succeeded, and which names stand there now."""
        if attempt > 1:
            if len(self._next) >= _MOST_HINTS:
                self._next.clear()
            self._next[_wanted(move)] = attempt + 1
        for file, name in zip(move.files, names, strict=True):
            folders.note_move(move.source, file.name if file.leaves else "", move.destination, name)


def _wanted(move: MoveRecord) -> tuple[str, str]:
    return move.destination, move.image.wanted


def _taken_names(folders: Folders, move: MoveRecord) -> Callable[[Sequence[str]], bool]:
    """Return what tells whether one of the names for all files would join what stands in the destination already.

    The kernel refuses a name that is taken; here it is asked whether anything of its stem stands there: a sidecar
    without its image must not become another image's. In Rejected/ images of one stem may stand side by side, they are
    told apart by their reasons. In Images/ nothing is asked: what is put back there stood beside the same files before.
    """
    top = move.destination.partition("/")[0]
    if top == "Images":
        return lambda _: False
    there = folders.names(move.destination)
    own = tuple(file.wanted for file in move.files) if move.joins else ()
    is_taken = there.has_relatives if top == "Rejected" else there.is_taken
    return lambda finals: tuple(finals) != own and any(map(is_taken, finals))


class LateCompanions:
    """Finds where files that are no images belong, in one dataset; all paths that it takes are absolute.

    What asks the journal raises JournalError where it cannot be read.
    """

    def __init__(
        self, root: Path, journal: Journal, listings: Listings | None = None, *, are_companions_moved: bool = True
    ) -> None:
        """Begin; see ``Mover`` for the arguments."""
        self._root, self._journal, self._history = os.fspath(root), journal, journal.history
        self._listings, self._is_active = listings or Listings(), are_companions_moved

    def move_for(self, path: str) -> Move | None:
        """Return the move that brings a file to its image; None where it has none, or one that is still here."""
        folder, name = self._split(path)
        if not self._is_active or folder.partition("/")[0] != "Images" or not claims(name) or self.awaits_image(path):
            return None
        record = self._image_of(folder, name)
        if record is None:
            return None
        place = places_of(self._history, record)[0]
        if not self._stands(record, place):
            return None
        return self._move(folder, name, record.move.image.name, place, record)

    def awaits_image(self, path: str) -> bool:
        """Tell whether a file belongs to an image that stands beside it: it goes when that one goes."""
        folder, name = self._split(path)
        if not self._is_active or not claims(name):
            return False
        try:
            with Folders(Path(self._root), self._listings) as folders:
                owners = owners_of(name, folders.names(folder).near(name))
                return any(lstat_at(folders.open(folder), owner) is not None for owner in owners)
        except OSError:
            return False

    def left_by(self, path: str) -> list[Move]:
        """Return the moves of companions that came while their image, which has gone by now, was being copied."""
        folder, name = self._split(path)
        left = self._companions_in(folder, name) if self._is_active else []
        moves = [self.move_for(f"{self._root}/{folder}/{companion}") for companion in left]
        return [move for move in moves if move is not None]

    def follow_images(self, found: Sequence[tuple[Record, str]], former: Record | None = None) -> list[Move]:
        """Return the moves of companions that stand where their images are no more; note where the images are.

        Args:
            found: what put each image into its place, and where it is now, relative to the dataset.
            former: an earlier move of the one image, after which a person brought it back.
        """
        moves: list[Move] = []
        facts: dict[str, str] = {}
        for record, place in found if self._is_active else ():
            noted = places_of(self._history, record)
            known = noted if former is None else noted + places_of(self._history, former)
            places = [place]
            for one in dict.fromkeys(known):
                if one != place and (left := self._left_at(one, place, record)):
                    moves += left
                    places.append(one)
            if places != noted:
                facts[f"{PLACES_FACT}{record.id}"] = json.dumps(places)
        if facts:
            self._journal.note_all(facts)
        return moves

    def parted_from(self, moved: Moved) -> list[Move]:
        """Return the moves of companions that a person left where an image had been, before it came back and moved."""
        path, place = "/".join(self._split(moved.path)), "/".join(self._split(moved.destination))
        earlier = [one for one in self._history.known(moved.stamp, limit=2) if one.destination_path != place]
        record = self._history.last_known(moved.moved_stamp) if earlier else None
        if record is None or earlier[0].destination_path == path:
            return []  # it comes from the inbox, or from where sortd had put it, and its companions with it
        return self.follow_images([(record, place)], earlier[0])

    def _split(self, path: str) -> tuple[str, str]:
        """Return folder, relative to the dataset, and name of a file."""
        folder, _, name = path.removeprefix(f"{self._root}/").rpartition("/")
        return folder, name

    def _left_at(self, former: str, place: str, record: Record) -> list[Move]:
        folder, _, name = former.rpartition("/")
        if os.path.lexists(f"{self._root}/{former}"):
            return []  # another file stands there now: what stands beside it is that one's
        left = self._companions_in(folder, name)
        if folder == place.rpartition("/")[0] == "Rejected":
            left += [one.final for one in record.move.files if one.role is Role.REASON and one.final]
        moves = [self._move(folder, companion, name, place, record) for companion in dict.fromkeys(left)]
        return [move for move in moves if move is not None]

    def _companions_in(self, folder: str, image: str) -> list[str]:
        """Return what belongs to an image that has left a folder, and to no other image there."""
        try:
            with Folders(Path(self._root), self._listings) as folders:
                opened = folders.open(checked_folder(folder))
                names = [
                    name
                    for name in folders.names(folder).near(image)
                    if (found := lstat_at(opened, name)) is not None and stat.S_ISREG(found.st_mode)
                ]
        except (OSError, FolderNameError):
            return []  # gone, or not to be looked at
        return [companion.name for companion in companions_of(image, names) if not companion.shared]

    def _image_of(self, folder: str, name: str) -> Record | None:
        """Return the last move of an image of this name out of a folder of the inbox."""
        since = self._journal.clock() - LATE_SECONDS
        moves = (
            record
            for first, beyond in starts_of_images(name)
            for record in self._history.moved_between(folder, first, beyond, since=since)
            if claim_on(name, record.move.image.name) is not None
        )
        return max(moves, key=lambda record: record.id, default=None)

    def _move(self, folder: str, name: str, image: str, place: str, record: Record) -> Move | None:
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
        mark = record.move.image.moved_stamp
        try:
            found = os.lstat(f"{self._root}/{place}")
        except OSError:
            return False
        return mark is not None and is_version(found, mark)


def places_of(history: History, record: Record) -> list[str]:
    """Return where an image was seen last, and where companions of it may stand still, relative to the dataset."""
    return _places(history.fact(f"{PLACES_FACT}{record.id}")) or [record.destination_path]


def images_apart(history: History) -> list[str]:
    """Return the images whose companions stand elsewhere, relative to the dataset."""
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
