"""The move of one version of a file, its companions with it, within one file system; it never overwrites."""

import errno
import hashlib
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from sortd.errors import BusyError, ChangedError, DestinationError, SourceError, VanishedError
from sortd.events import Stamp, Writer
from sortd.moving.companions import companions_of
from sortd.moving.copying import Copy, copy_to_part, remove_part, write_part
from sortd.moving.free_names import final_names
from sortd.moving.relocation import Member, Progress, Relocation, Role
from sortd.moving.renaming import (
    FILE_FLAGS,
    Folders,
    is_version,
    look,
    rename_new,
    stamp_of,
    start_writeback,
    writer_of,
)
from sortd.names import CONTROLS

NO_RIGHTS = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
NO_STAMP = Stamp(0, 0, 0, 0)
MOST_ATTEMPTS = 100_000
_MOST_HINTS = 4096


def new_token() -> str:
    """Return 16 hexadecimal digits that no other relocation has."""
    return secrets.token_hex(8)


def with_companions(folders: Folders, relocation: Relocation) -> Relocation:
    """Return a relocation together with the companions that stand beside its image now.

    Raises:
        OSError: the source folder cannot be read.
    """
    folder = folders.open(relocation.source)
    image = relocation.image.name
    found: dict[str, Stamp] = {}
    for name in folders.names(relocation.source).near(image):
        status = look(folder, name)
        if status is not None and stat.S_ISREG(status.st_mode) and not _is_unfinished(folder, name):
            found[name] = stamp_of(status)
    members = [
        Member(Role.SHARED if one.shared else Role.COMPANION, one.name, one.name, found[one.name])
        for one in companions_of(image, found)
    ]
    return replace(relocation, members=(*relocation.members, *members))


def _is_unfinished(folder: int, name: str) -> bool:
    """Tell whether a file beside this one says that it is not whole: then it follows its image later."""
    return any(look(folder, name + rule.ending) is not None for rule in CONTROLS)


def open_members(folders: Folders, relocation: Relocation) -> list[int]:
    """Open every member that exists already and see that it is the version meant and that nobody writes it.

    Returns:
        Descriptors; the caller syncs and closes them.

    Raises:
        VanishedError, ChangedError, BusyError: it is not so, or it cannot be opened.
    """
    opened: list[int] = []
    try:
        folder = folders.open(relocation.source)
        for member in relocation.members:
            if member.role is not Role.REASON:
                _open_member(folder, member, relocation.source, opened)
    except FileNotFoundError as error:
        close_files(opened)
        raise VanishedError(f"{relocation.source}/{relocation.image.name}: nothing stands there any more") from error
    except OSError as error:
        close_files(opened)
        raise BusyError(
            f"{relocation.source}/{relocation.image.name}: cannot be opened now: {error.strerror}"
        ) from error
    except BaseException:
        close_files(opened)
        raise
    return opened


def sync_files(files: Sequence[int], threads: int) -> dict[int, OSError]:
    """Make the bytes of open files survive a power cut, before any name changes.

    One sync waits for one flush of the disk's cache, but syncs at the same time share it: 64 small files took 1 to 2
    seconds one after the other and 0.1 to 0.4 in 16 threads, on a busy disk.

    Args:
        files: descriptors.
        threads: how many syncs are under way at the same time; with 1, no thread is made.

    Returns:
        What the disk refused, by descriptor; the bytes of these are unknown.
    """
    if threads == 1 or len(files) == 1:
        troubles = [_sync_file(file) for file in files]
    else:
        with ThreadPoolExecutor(threads, thread_name_prefix="sync") as pool:
            troubles = list(pool.map(_sync_file, files))
    return {file: trouble for file, trouble in zip(files, troubles, strict=True) if trouble is not None}


def close_files(files: Iterable[int]) -> None:
    """Close descriptors."""
    for file in files:
        os.close(file)


def _sync_file(file: int) -> OSError | None:
    try:
        os.fsync(file)
    except OSError as error:
        return error
    return None


def _open_member(folder: int, member: Member, place: str, opened: list[int]) -> None:
    path = f"{place}/{member.name}"
    try:
        file = os.open(member.name, FILE_FLAGS, dir_fd=folder)
    except PermissionError:
        if member.role is Role.COMPANION:  # a rename needs no right to read
            return
        raise
    except FileNotFoundError as error:
        if member.role is Role.IMAGE:
            raise
        raise ChangedError(f"{path}: this companion is gone, the image is looked at again") from error
    opened.append(file)
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode) or not is_version(status, member.stamp):
        raise ChangedError(f"{path}: another version stands there now")
    if writer_of(file) is Writer.PRESENT:
        raise BusyError(f"{path}: a program has it open for writing")
    if member.content and member.stamp.ctime_ns not in {0, status.st_ctime_ns} and _hash(file) != member.content:
        raise ChangedError(f"{path}: it was rewritten, and its time put back")
    start_writeback(file)


def _hash(file: int) -> str:
    """Return the sha256 of an open file's bytes, in hexadecimal."""
    with open(file, "rb", closefd=False) as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


class TakenNumbers:
    """Remembers up to which number a name is taken, so that each of many equal names costs two attempts.

    It only says where to begin: whether a name is free is found out by trying.
    """

    def __init__(self) -> None:
        """Begin without any memory."""
        self._next: dict[tuple[str, str], int] = {}

    def attempts(self, relocation: Relocation) -> Iterator[int]:
        """Yield the attempts to make, see ``final_names``: first without a number, then from the first free one on."""
        yield 1
        yield from range(self._next.get(_wanted(relocation), 2), MOST_ATTEMPTS)

    def remember(self, relocation: Relocation, attempt: int) -> None:
        """Note which attempt was the one that succeeded."""
        if attempt > 1:
            if len(self._next) >= _MOST_HINTS:
                self._next.clear()
            self._next[_wanted(relocation)] = attempt + 1


def _wanted(relocation: Relocation) -> tuple[str, str]:
    return relocation.destination, relocation.image.wanted


class Mover:
    """Puts relocations in their place."""

    def __init__(self, *, rename: Callable[[int, str, int, str], None] = rename_new) -> None:
        """Begin; nothing is known of which names are taken."""
        self._rename = rename
        self._numbers = TakenNumbers()

    def place(self, folders: Folders, relocation: Relocation) -> Relocation:
        """Rename every member into the destination folder; durable only once both folders are synced.

        Raises:
            FileExistsError: never; another name is tried.
            OSError: a disk refused, or cannot rename (``renaming.CANNOT_RENAME``); the caller recovers.
            VanishedError, ChangedError: the file is no longer the version meant; the caller recovers.
        """
        source, destination = folders.open(relocation.source), folders.make(relocation.destination)
        make_parts(source, destination, relocation)
        is_taken = taken_names(folders, relocation)
        for attempt in self._numbers.attempts(relocation):
            names = final_names(relocation, attempt)
            if not is_taken(names) and (placed := self._try_names(source, destination, relocation, names)) is not None:
                self._numbers.remember(relocation, attempt)
                for member, name in zip(relocation.members, names, strict=True):
                    folders.note_move(
                        relocation.source, member.name if member.leaves else "", relocation.destination, name
                    )
                return replace(relocation, members=placed)
        raise DestinationError(
            f"{relocation.destination}: no free name for {relocation.image.wanted!r} in {MOST_ATTEMPTS} attempts"
        )

    def _try_names(
        self, source: int, destination: int, relocation: Relocation, names: tuple[str, ...]
    ) -> tuple[Member, ...] | None:
        """Rename all members to these names, or none of them because one is taken."""
        placed: list[Member] = []
        order = sorted(range(len(names)), key=lambda position: not relocation.members[position].leaves)
        done: list[tuple[int, str, str]] = []
        for position in order:
            member, final = relocation.members[position], names[position]
            origin = (source, member.name) if member.leaves else (destination, relocation.part_name(position))
            if member.leaves:
                _check_version(source, member, relocation.source)
            try:
                self._rename(*origin, destination, final)
            except FileExistsError:
                self._take_back(done, destination)
                return None
            except OSError as error:
                if error.errno in NO_RIGHTS:
                    check_source(source, relocation.source)
                raise
            done.append((*origin, final))
            status = look(destination, final)
            if member.leaves and (status is None or not is_version(status, member.stamp)):
                self._take_back(done, destination)
                raise ChangedError(f"{relocation.source}/{member.name}: it was replaced while it was moved")
            moved = NO_STAMP if status is None else stamp_of(status)
            placed.append(replace(member, final=final, moved_stamp=moved))
        return tuple(placed[order.index(position)] for position in range(len(names)))

    def _take_back(self, done: list[tuple[int, str, str]], destination: int) -> None:
        for folder, name, final in reversed(done):
            try:
                self._rename(destination, final, folder, name)
            except FileExistsError as error:
                raise ChangedError(f"{name}: its name was taken while it was moved") from error


def taken_names(folders: Folders, relocation: Relocation) -> Callable[[Sequence[str]], bool]:
    """Return what tells whether one of the names for all members would join what stands in the destination already.

    The kernel refuses a name that is taken; here it is asked whether anything of its stem stands there: a sidecar
    without its image must not become another image's. In Rejected/ images of one stem may stand side by side, they are
    told apart by their reasons. In Images/ nothing is asked: what is put back there stood beside the same files before.

    Raises:
        OSError: the destination cannot be read.
    """
    top = relocation.destination.partition("/")[0]
    if top == "Images":
        return lambda _: False
    there = folders.names(relocation.destination)
    own = tuple(member.wanted for member in relocation.members) if relocation.joins else ()
    is_taken = there.has_relatives if top == "Rejected" else there.is_taken
    return lambda finals: tuple(finals) != own and any(map(is_taken, finals))


def make_parts(source: int, destination: int, relocation: Relocation) -> dict[int, Copy]:
    """Make, durably and under hidden names, the members that do not leave the source: copies and reasons.

    Raises:
        OSError: a disk refused.
        ChangedError: a shared companion is no longer the version meant.
    """
    return {
        position: make_part(source, destination, relocation, position)
        for position, member in enumerate(relocation.members)
        if not member.leaves
    }


def make_part(source: int, destination: int, relocation: Relocation, position: int) -> Copy:
    """Make one member's part; see ``make_parts``."""
    member, part = relocation.members[position], relocation.part_name(position)
    remove_part(destination, part)
    if member.role is Role.REASON:
        return write_part(destination, part, member.body)
    file = os.open(member.name, FILE_FLAGS, dir_fd=source)
    try:
        if not is_version(os.fstat(file), member.stamp):
            raise ChangedError(f"{relocation.source}/{member.name}: another version stands there now")
        return copy_to_part(file, destination, part)
    finally:
        os.close(file)


def remove_spent(folders: Folders, relocation: Relocation) -> None:
    """Remove what sortd itself once made beside an image that is put back; what was changed since is kept.

    Raises:
        OSError: the disk refused.
    """
    folder = folders.open(relocation.source)
    for member in relocation.spent:
        status = look(folder, member.name)
        if status is not None and is_version(status, member.stamp):
            os.unlink(member.name, dir_fd=folder)


def done(relocation: Relocation) -> Relocation:
    """Return the relocation as ended well."""
    return replace(relocation, progress=Progress.DONE)


def check_source(folder: int, place: str) -> None:
    """See that files may be taken out of a folder: rename(2) and unlink(2) do not tell which folder refused.

    Raises:
        SourceError: they may not.
    """
    if not os.access(".", os.W_OK | os.X_OK, dir_fd=folder, effective_ids=True):
        raise SourceError(f"nothing may be removed from {place}; give sortd the right to write to that folder")


def _check_version(folder: int, member: Member, place: str) -> None:
    status = look(folder, member.name)
    if status is None:
        raise VanishedError(f"{place}/{member.name}: nothing stands there any more")
    if not is_version(status, member.stamp):
        raise ChangedError(f"{place}/{member.name}: another version stands there now")
