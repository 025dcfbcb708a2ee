"""The move of one version of a file, its companions with it, within one file system; it never overwrites."""

import errno
import os
import stat
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from sortd.errors import BusyError, ChangedError, VanishedError
from sortd.events import Stamp, Writer
from sortd.files import sha256_of, stamp_of
from sortd.moving.fs import FILE_FLAGS, Folders, check_source, is_version, look, rename_new, start_writeback, writer_of
from sortd.moving.parts import make_part
from sortd.moving.plan import FreeNames
from sortd.store.records import MoveFile, MoveRecord, Role

NO_RIGHTS = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
NO_STAMP = Stamp(0, 0, 0, 0)


def open_members(folders: Folders, relocation: MoveRecord) -> list[int]:
    """Open every file of a move that exists already and see that it is the version meant and that nobody writes it.

    Returns:
        Descriptors; the caller syncs and closes them.

    Raises:
        VanishedError, ChangedError, BusyError: it is not so, or it cannot be opened.
    """
    opened: list[int] = []
    path = f"{relocation.source}/{relocation.image.name}"
    try:
        folder = folders.open(relocation.source)
        for member in relocation.members:
            if member.role is not Role.REASON:
                _open_member(folder, member, relocation.source, opened)
    except FileNotFoundError as error:
        close_files(opened)
        raise VanishedError(f"{path}: nothing stands there any more") from error
    except OSError as error:
        close_files(opened)
        raise BusyError(f"{path}: cannot be opened now: {error.strerror}") from error
    except BaseException:
        close_files(opened)
        raise
    return opened


def sync_files(files: Sequence[int], threads: int) -> dict[int, OSError]:
    """Make the bytes of open files survive a power cut, before any name changes.

    One sync waits for one flush of the disk's cache, but syncs at the same time share it: 64 small files took 1 to 2
    seconds one after the other and 0.1 to 0.4 in 16 threads, on a busy disk.

    Returns:
        What the disk refused, by descriptor; the bytes of these are unknown.
    """
    troubles: dict[int, OSError] = {}

    def sync(file: int) -> None:
        try:
            os.fsync(file)
        except OSError as error:
            troubles[file] = error

    if threads == 1 or len(files) == 1:
        for file in files:
            sync(file)
    else:
        with ThreadPoolExecutor(threads, thread_name_prefix="sync") as pool:
            list(pool.map(sync, files))
    return troubles


def close_files(files: Iterable[int]) -> None:
    """Close descriptors."""
    for file in files:
        os.close(file)


def _open_member(folder: int, member: MoveFile, place: str, opened: list[int]) -> None:
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
    if member.content and member.stamp.ctime_ns not in {0, status.st_ctime_ns} and sha256_of(file) != member.content:
        raise ChangedError(f"{path}: it was rewritten, and its time put back")
    start_writeback(file)


class Renamer:
    """Puts moves in their place."""

    def __init__(self, *, rename: Callable[[int, str, int, str], None] = rename_new) -> None:
        """Begin; nothing is known of which names are taken."""
        self._rename = rename
        self._names = FreeNames()

    def place(self, folders: Folders, relocation: MoveRecord) -> MoveRecord:
        """Rename every file into the destination folder; durable only once both folders are synced.

        Raises:
            OSError: a disk refused, or cannot rename (``fs.CANNOT_RENAME``); the caller recovers.
            DestinationError: no name is free; the caller recovers.
            VanishedError, ChangedError: the file is no longer the version meant; the caller recovers.
        """
        source, destination = folders.open(relocation.source), folders.make(relocation.destination)
        for position, member in enumerate(relocation.members):
            if not member.leaves:
                make_part(source, destination, relocation, position)
        for attempt, names in self._names.candidates(folders, relocation):
            if (placed := self._try_names(source, destination, relocation, names)) is not None:
                self._names.remember(folders, relocation, attempt, names)
                return replace(relocation, members=placed)
        raise AssertionError("candidates end by an error")

    def _try_names(
        self, source: int, destination: int, relocation: MoveRecord, names: tuple[str, ...]
    ) -> tuple[MoveFile, ...] | None:
        """Rename all members to these names, or none of them because one is taken."""
        placed: list[MoveFile] = []
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


def _check_version(folder: int, member: MoveFile, place: str) -> None:
    status = look(folder, member.name)
    if status is None:
        raise VanishedError(f"{place}/{member.name}: nothing stands there any more")
    if not is_version(status, member.stamp):
        raise ChangedError(f"{place}/{member.name}: another version stands there now")
