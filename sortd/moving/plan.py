"""The plan of a move: which companions it includes, the names to try, and which late companions follow their image.

A phone uploads the film of a Live Photo minutes after the photo; a program may write a sidecar even later. A late
companion belongs to the last image of its name that left the same folder of the inbox, if that was recent: cameras
reuse names, and next year's film does not belong to this year's photo.

If a person moves an image that sortd has filed, its companions follow as well. The journal records where an image was
last seen and where companions may remain (``PLACES_FACT``).
"""

import json
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
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
from sortd.layout import CONTROLS
from sortd.moving.fs import Folders, Listings, is_version, lstat_at
from sortd.store.history import History
from sortd.store.journal import Journal
from sortd.store.records import (
    LONGEST_NAME,
    PLACES_FACT,
    FolderNameError,
    MoveFile,
    MoveReason,
    MoveRecord,
    Record,
    Role,
    checked_folder,
    checked_name,
)

NO_STAMP = Stamp(0, 0, 0, 0)
MOST_ATTEMPTS = 100_000  # names tried for one image
_MOST_FOLDERS = 4096

LATE_SECONDS = 86_400.0
"""How long after its image a companion may arrive: slow uploads take hours, cameras reuse names after weeks."""


def new_token() -> str:
    """Return a unique token of 16 hexadecimal digits."""
    return secrets.token_hex(8)


def image_file(folders: Folders, move: Move, source: str, name: str) -> MoveFile:
    """Return the image of a move out of a folder, with its role: only an image of Images/ may stay there."""
    wanted = checked_name(move.wanted or name)
    image = MoveFile(Role.IMAGE, checked_name(name), wanted, move.stamp, content=move.content)
    if move.action == "move" or source.partition("/")[0] != "Images":
        return image
    image = replace(image, role=Role(move.action))
    return replace(image, body=_target(folders, image, source, move.folder)) if image.role is Role.SYMLINK else image


def _target(folders: Folders, file: MoveFile, source: str, destination: str) -> bytes:
    """Return the target of a symbolic link: relative, so that the dataset can be moved, unless a disk is between."""
    path, existing = f"{source}/{file.name}", folders.open("")
    for place in (destination.partition("/")[0], destination):
        with suppress(FileNotFoundError):
            existing = folders.open(place)
    if os.fstat(existing).st_dev == os.fstat(folders.open(source)).st_dev:
        return os.fsencode(os.path.relpath(path, destination))
    return os.fsencode(f"{folders.root}/{path}")


def with_companions(folders: Folders, move: MoveRecord) -> MoveRecord:
    """Return a move extended by the companions beside its image; those of one that stays are treated as it is."""
    if move.image.role is Role.KEYWORDS:
        return move
    folder = folders.open(move.source)
    image = move.image.name
    found: dict[str, Stamp] = {}
    for name in folders.names(move.source).near(image):
        status = lstat_at(folder, name)
        if status is not None and stat.S_ISREG(status.st_mode) and not _is_unfinished(folder, name):
            found[name] = stamp_of(status)
    files = []
    for one in companions_of(image, found, stays=move.stays):
        role = move.image.role if move.stays else Role.SHARED if one.shared else Role.COMPANION
        file = MoveFile(role, one.name, one.name, found[one.name])
        is_link = role is Role.SYMLINK
        files.append(replace(file, body=_target(folders, file, move.source, move.destination)) if is_link else file)
    return replace(move, files=(*move.files, *files))


def _is_unfinished(folder: int, name: str) -> bool:
    """Tell whether a control file marks this file as unfinished; it then follows its image later."""
    return any(lstat_at(folder, name + rule.ending) is not None for rule in CONTROLS)


def move_reason_of(move: Move) -> MoveReason:
    """Return the reason of a move, for the journal."""
    decided = MoveReason.of(move.decision, move.outcome.value)
    return replace(
        decided,
        label=move.assigned_label or decided.label,
        reason=move.reason or decided.reason,
        generation=move.generation,
        encoder_id=move.encoder_id,
        content=move.content,
    )


def reason_file(move: Move, source: str, name: str) -> MoveFile:
    """Return the file that says why an image was rejected."""
    facts = {
        "name": name,
        "from": source,
        "reason": move.reason,
        "size": move.stamp.size,
        "mtime_ns": move.stamp.mtime_ns,
        "content": move.content or None,
    }
    text = json.dumps(facts, indent=2, ensure_ascii=False)
    body = text.encode("utf-8", "backslashreplace") + b"\n"  # bytes of names that are not UTF-8 become escapes
    return MoveFile(Role.REASON, name, f"{name}.reason.json", NO_STAMP, body=body)


def final_names(move: MoveRecord, attempt: int) -> tuple[str, ...]:
    """Return a name for each file, all with the same number; ``attempt`` starts at 1."""
    if attempt == 1:
        return tuple(_fitted(file.wanted) for file in move.files)
    image = move.image.wanted
    stem, suffix = split_name(image)
    number = os.fsencode(f" ({attempt})")
    parts = [(stem, suffix), *(parts_beside(file.wanted, image) for file in move.files[1:])]
    longest = max(
        len(os.fsencode(tail))
        for (base, tail), file in zip(parts, move.files, strict=True)
        if base == stem and file.role is not Role.REASON  # only the reason's own name is cut for its long ending
    )
    found: list[str] = []
    for (base, tail), file in zip(parts, move.files, strict=True):
        name = _numbered(base, number, tail, longest if base == stem else 0)
        if fold(name) in {fold(other) for other in found}:
            own_stem, own_suffix = split_name(file.wanted)  # these parts differ between any two files
            name = _numbered(own_stem, number, own_suffix, 0)
        found.append(name)
    return tuple(found)


def names_of_one(move: MoveRecord, position: int) -> Iterator[str]:
    """Yield the names to try for one file of a move."""
    return (final_names(move, attempt)[position] for attempt in range(1, MOST_ATTEMPTS))


def _numbered(base: str, number: bytes, tail: str, longest: int) -> str:
    ending = number + os.fsencode(tail)
    room = LONGEST_NAME - len(number) - max(longest, len(ending) - len(number))
    return os.fsdecode(cut(os.fsencode(base), room) + ending)


def cut(name: bytes, room: int) -> bytes:
    """Return at most the first ``room`` bytes of a name, without cutting a UTF-8 character."""
    if len(name) <= room:
        return name
    end = max(room, 1)
    # Bytes 10xxxxxx continue a character (RFC 3629, section 3).
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
    """Chooses the names that a move tries, so that each of many equal names needs two attempts.

    Only the attempt to rename shows whether a name is free.
    """

    def __init__(self) -> None:
        """Start without any known name."""
        self._next: dict[tuple[str, str], int] = {}

    def place(
        self, folders: Folders, move: MoveRecord, attempt: Callable[[tuple[str, ...]], MoveRecord | None]
    ) -> MoveRecord:
        """Call ``attempt`` with names for the files until it returns the move: it returns None if one is taken.

        The first names have no number, the next ones the first that may be free. Names that would associate a file with
        one in the destination are skipped.

        Raises:
            OSError: the destination cannot be read.
            DestinationError: no name is free.
        """
        is_taken = _taken_names(folders, move)
        for number in chain((1,), range(self._next.get(_wanted(move), 2), MOST_ATTEMPTS)):
            names = final_names(move, number)
            if not is_taken(names) and (placed := attempt(names)) is not None:
                self._remember(folders, placed, number)
                return placed
        raise DestinationError(
            f"{move.destination}: no free name for {move.image.wanted!r} in {MOST_ATTEMPTS} attempts"
        )

    def _remember(self, folders: Folders, move: MoveRecord, number: int) -> None:
        if number > 1:
            if len(self._next) >= _MOST_FOLDERS:
                self._next.clear()
            self._next[_wanted(move)] = number + 1
        for file in move.files:
            folders.note_move(move.source, file.name if file.leaves else "", move.destination, file.final)


def _wanted(move: MoveRecord) -> tuple[str, str]:
    return move.destination, move.image.wanted


def _taken_names(folders: Folders, move: MoveRecord) -> Callable[[Sequence[str]], bool]:
    """Return a predicate that tells whether any of a move's names would be related to a file in the destination.

    The kernel refuses equal names; this checks stems, so that a sidecar does not become another image's. In Rejected/
    images with equal stems are allowed. In Images/ nothing is checked: a file that is put back there had the same
    neighbours before.
    """
    top = move.destination.partition("/")[0]
    if top == "Images":
        return lambda _: False
    there = folders.names(move.destination)
    own = tuple(file.wanted for file in move.files) if move.joins else ()
    is_taken = there.has_relatives if top == "Rejected" else there.is_taken
    return lambda finals: tuple(finals) != own and any(map(is_taken, finals))


class LateCompanions:
    """Finds the moves of late companions in one dataset; paths are absolute.

    Methods raise JournalError if the journal cannot be read or written.
    """

    def __init__(
        self, root: Path, journal: Journal, listings: Listings | None = None, *, are_companions_moved: bool = True
    ) -> None:
        """See ``Mover`` for the arguments."""
        self._root, self._journal, self._history = os.fspath(root), journal, journal.history
        self._listings, self._is_active = listings or Listings(), are_companions_moved

    def move_for(self, path: str) -> Move | None:
        """Return the move of a file to its image; None if it has none, or if that image is still in the same folder."""
        folder, name = self._split(path)
        if not self._is_active or folder.partition("/")[0] != "Images" or not claims(name) or self.awaits_image(path):
            return None
        record = self._image_of(folder, name)
        if record is None or record.move.stays:
            return None
        place = places_of(self._history, record)[0]
        if not self._is_at(record, place):
            return None
        return self._move(folder, name, record.move.image.name, place, record)

    def awaits_image(self, path: str) -> bool:
        """Tell whether a file belongs to an image in the same folder, with which it will move."""
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
        """Return the moves of companions that arrived while their image, which has left, was being copied."""
        folder, name = self._split(path)
        left = self._companions_in(folder, name) if self._is_active else []
        moves = [self.move_for(f"{self._root}/{folder}/{companion}") for companion in left]
        return [move for move in moves if move is not None]

    def follow_images(self, found: Sequence[tuple[Record, str]], former: Record | None = None) -> list[Move]:
        """Return the moves of companions to images that a person moved; record where the images are.

        Args:
            found: the record of each image, and where the image is now, relative to the dataset.
            former: an earlier move of the one image in ``found``, after which a person moved it back.
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
        """Return the moves of companions left where an image was before a person brought it back and sortd moved it."""
        path, place = "/".join(self._split(moved.path)), self._split(moved.destination)
        earlier = self._history.moved_elsewhere(moved.stamp, *place)
        record = None if earlier is None else self._history.last_known(moved.moved_stamp)
        if earlier is None or record is None or earlier.destination_path == path:
            return []  # it came from the inbox or from where sortd had put it, with its companions
        return self.follow_images([(record, "/".join(place))], earlier)

    def _split(self, path: str) -> tuple[str, str]:
        """Return the folder of a file, relative to the dataset, and its name."""
        folder, _, name = path.removeprefix(f"{self._root}/").rpartition("/")
        return folder, name

    def _left_at(self, former: str, place: str, record: Record) -> list[Move]:
        folder, _, name = former.rpartition("/")
        if os.path.lexists(f"{self._root}/{former}"):
            return []  # another file has this name now, and the companions beside it are that file's
        left = self._companions_in(folder, name)
        if folder == place.rpartition("/")[0] == "Rejected":
            left += [one.final for one in record.move.files if one.role is Role.REASON and one.final]
        moves = [self._move(folder, companion, name, place, record) for companion in dict.fromkeys(left)]
        return [move for move in moves if move is not None]

    def _companions_in(self, folder: str, image: str) -> list[str]:
        """Return the companions of an image that has left a folder, except those of other images there."""
        try:
            with Folders(Path(self._root), self._listings) as folders:
                opened = folders.open(checked_folder(folder))
                names = [
                    name
                    for name in folders.names(folder).near(image)
                    if (found := lstat_at(opened, name)) is not None and stat.S_ISREG(found.st_mode)
                ]
        except (OSError, FolderNameError):
            return []  # gone, or not readable
        return [companion.name for companion in companions_of(image, names) if not companion.shared]

    def _image_of(self, folder: str, name: str) -> Record | None:
        """Return the last recent move of this file's image out of a folder of the inbox."""
        since = self._journal.clock() - LATE_SECONDS
        moves = (
            record
            for first, beyond in starts_of_images(name)
            for record in self._history.moved_between(folder, first, beyond, since=since)
            if claim_on(name, record.move.image.name) is not None
        )
        return max(moves, key=lambda record: record.id, default=None)

    def _move(self, folder: str, name: str, image: str, place: str, record: Record) -> Move | None:
        """Return the move of a file to its image, which was named ``image`` in ``folder`` and is at ``place`` now."""
        destination, _, final = place.rpartition("/")
        path, wanted = f"{self._root}/{folder}/{name}", name_beside(name, image, final)
        try:
            found = os.lstat(path)
        except OSError:
            return None  # gone, or not readable
        if not stat.S_ISREG(found.st_mode) or len(os.fsencode(wanted)) > LONGEST_NAME:
            return None
        return Move(path, stamp_of(found), destination, Outcome.FOLLOWED, wanted=wanted, reason=belongs_to(record))

    def _is_at(self, record: Record, place: str) -> bool:
        mark = record.move.image.moved_stamp
        try:
            return mark is not None and is_version(os.lstat(f"{self._root}/{place}"), mark)
        except OSError:
            return False


def places_of(history: History, record: Record) -> list[str]:
    """Return where an image was last seen, then where companions may remain, relative to the dataset."""
    return _places(history.fact(f"{PLACES_FACT}{record.id}")) or [record.destination_path]


def images_apart(history: History) -> list[str]:
    """Return the images that have companions elsewhere, as paths relative to the dataset."""
    noted = map(_places, history.facts_like(PLACES_FACT, '", "').values())
    return [places[0] for places in noted if len(places) > 1]


def _places(noted: str | None) -> list[str]:
    try:
        found = json.loads(noted or "[]")
    except ValueError:
        return []
    return found if isinstance(found, list) and all(isinstance(place, str) for place in found) else []


def belongs_to(record: Record) -> str:
    """Return the reason in the journal of the companions that followed an image."""
    return f"belongs to {record.destination_path}"
