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
from sortd.moving.fs import (
    FILE_FLAGS,
    Folders,
    check_source,
    is_version,
    lstat_at,
    rename_new,
    start_writeback,
    writer_of,
)
from sortd.moving.parts import make_part
from sortd.moving.plan import FreeNames
from sortd.store.records import MoveFile, MoveRecord, Role

NO_RIGHTS = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
NO_STAMP = Stamp(0, 0, 0, 0)


def open_files(folders: Folders, move: MoveRecord) -> list[int]:
    """Open every file of a move that exists already and see that it is the version meant and that nobody writes it.

    Returns:
        Descriptors; the caller syncs and closes them.

    Raises:
        VanishedError, ChangedError, BusyError: it is not so, or it cannot be opened.
    """
    opened: list[int] = []
    path = f"{move.source}/{move.image.name}"
    try:
        folder = folders.open(move.source)
        for file in move.files:
            if file.role is not Role.REASON:
                _open_file(folder, file, move.source, opened)
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
    failures: dict[int, OSError] = {}

    def sync(file: int) -> None:
        try:
            os.fsync(file)
        except OSError as error:
            failures[file] = error

    if threads == 1 or len(files) == 1:
        for file in files:
            sync(file)
    else:
        with ThreadPoolExecutor(threads, thread_name_prefix="sync") as pool:
            list(pool.map(sync, files))
    return failures


def close_files(files: Iterable[int]) -> None:
    """Close descriptors."""
    for file in files:
        os.close(file)


def _open_file(folder: int, file: MoveFile, place: str, opened: list[int]) -> None:
    path = f"{place}/{file.name}"
    try:
        descriptor = os.open(file.name, FILE_FLAGS, dir_fd=folder)
    except PermissionError:
        if file.role is Role.COMPANION:  # a rename needs no right to read
            return
        raise
    except FileNotFoundError as error:
        if file.role is Role.IMAGE:
            raise
        raise ChangedError(f"{path}: this companion is gone, the image is looked at again") from error
    opened.append(descriptor)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or not is_version(status, file.stamp):
        raise ChangedError(f"{path}: another version stands there now")
    if writer_of(descriptor) is Writer.PRESENT:
        raise BusyError(f"{path}: a program has it open for writing")
    if file.content and file.stamp.ctime_ns not in {0, status.st_ctime_ns} and sha256_of(descriptor) != file.content:
        raise ChangedError(f"{path}: it was rewritten, and its time put back")
    start_writeback(descriptor)


class Renamer:
    """Puts moves in their place."""

    def __init__(self, *, rename: Callable[[int, str, int, str], None] = rename_new) -> None:
        """Begin; nothing is known of which names are taken."""
        self._rename = rename
        self._names = FreeNames()

    def place(self, folders: Folders, move: MoveRecord) -> MoveRecord:
        """Rename every file into the destination folder; durable only once both folders are synced.

        Raises:
            OSError: a disk refused, or cannot rename (``fs.CANNOT_RENAME``); the caller recovers.
            DestinationError: no name is free; the caller recovers.
            VanishedError, ChangedError: the file is no longer the version meant; the caller recovers.
        """
        source, destination = folders.open(move.source), folders.make(move.destination)
        for position, file in enumerate(move.files):
            if not file.leaves:
                make_part(source, destination, move, position)
        for attempt, names in self._names.candidates(folders, move):
            if (placed := self._try_names(source, destination, move, names)) is not None:
                self._names.remember(folders, move, attempt, names)
                return replace(move, files=placed)
        raise AssertionError("candidates end by an error")

    def _try_names(
        self, source: int, destination: int, move: MoveRecord, names: tuple[str, ...]
    ) -> tuple[MoveFile, ...] | None:
        """Rename all files to these names, or none of them because one is taken."""
        placed: list[MoveFile] = []
        order = sorted(range(len(names)), key=lambda position: not move.files[position].leaves)
        done: list[tuple[int, str, str]] = []
        for position in order:
            file, final = move.files[position], names[position]
            origin = (source, file.name) if file.leaves else (destination, move.part_name(position))
            if file.leaves:
                _check_version(source, file, move.source)
            try:
                self._rename(*origin, destination, final)
            except FileExistsError:
                self._take_back(done, destination)
                return None
            except OSError as error:
                if error.errno in NO_RIGHTS:
                    check_source(source, move.source)
                raise
            done.append((*origin, final))
            status = lstat_at(destination, final)
            if file.leaves and (status is None or not is_version(status, file.stamp)):
                self._take_back(done, destination)
                raise ChangedError(f"{move.source}/{file.name}: it was replaced while it was moved")
            moved = NO_STAMP if status is None else stamp_of(status)
            placed.append(replace(file, final=final, moved_stamp=moved))
        return tuple(placed[order.index(position)] for position in range(len(names)))

    def _take_back(self, done: list[tuple[int, str, str]], destination: int) -> None:
        for folder, name, final in reversed(done):
            try:
                self._rename(destination, final, folder, name)
            except FileExistsError as error:
                raise ChangedError(f"{name}: its name was taken while it was moved") from error


def _check_version(folder: int, file: MoveFile, place: str) -> None:
    status = lstat_at(folder, file.name)
    if status is None:
        raise VanishedError(f"{place}/{file.name}: nothing stands there any more")
    if not is_version(status, file.stamp):
        raise ChangedError(f"{place}/{file.name}: another version stands there now")
