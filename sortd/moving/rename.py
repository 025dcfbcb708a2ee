"""The move of one version of a file with its companions within one file system, without overwriting."""

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
    """Open every existing file of a move after checking that it is the decided version and has no writer.

    Returns:
        Descriptors, which the caller syncs and closes.

    Raises:
        VanishedError, ChangedError, BusyError: a check failed, or a file cannot be opened.
    """
    opened: list[int] = []
    path = f"{move.source}/{move.image.name}"
    try:
        folder = folders.open(move.source)
        for file in move.files:
            if file.role is not Role.REASON:
                _open_file(folder, file, move.source, opened)
    except BaseException as error:
        close_files(opened)
        if isinstance(error, FileNotFoundError):
            raise VanishedError(f"{path}: the file is gone") from error
        if isinstance(error, OSError):
            raise BusyError(f"{path}: cannot be opened now: {error.strerror}") from error
        raise
    return opened


def sync_files(files: Sequence[int], threads: int) -> dict[int, OSError]:
    """Sync open files before any name changes; return the errors by descriptor.

    Each sync waits for a flush of the disk's cache, but concurrent syncs share it: 64 small files took 1 to 2 seconds
    one after the other and 0.1 to 0.4 in 16 threads, on a busy disk.
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
        if file.role is Role.COMPANION:  # a rename needs no permission to read
            return
        raise
    except FileNotFoundError as error:
        if file.role is Role.IMAGE:
            raise
        raise ChangedError(f"{path}: this companion is gone; sortd will look at its image again") from error
    opened.append(descriptor)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or not is_version(status, file.stamp):
        raise ChangedError(f"{path}: the file was changed or replaced")
    if writer_of(descriptor) is Writer.PRESENT:
        raise BusyError(f"{path}: a program has it open for writing")
    if file.content and file.stamp.ctime_ns not in {0, status.st_ctime_ns} and sha256_of(descriptor) != file.content:
        raise ChangedError(f"{path}: the content changed, although size and time are the same")
    start_writeback(descriptor)


class Renamer:
    """Renames the files of moves."""

    def __init__(self, *, rename: Callable[[int, str, int, str], None] = rename_new) -> None:
        """Begin without knowledge of taken names."""
        self._rename = rename
        self._names = FreeNames()

    def place(self, folders: Folders, move: MoveRecord) -> MoveRecord:
        """Rename every file into the destination folder; the caller syncs both folders, and recovers after an error.

        Raises:
            OSError: a disk returned an error, or cannot rename (``fs.CANNOT_RENAME``).
            DestinationError: no name is free.
            VanishedError, ChangedError: a file is gone or another version.
        """
        source, destination = folders.open(move.source), folders.make(move.destination)
        for position, file in enumerate(move.files):
            if not file.leaves:
                make_part(source, destination, move, position)
        for attempt, names in self._names.candidates(folders, move):
            if (placed := self._try_names(source, destination, move, names)) is not None:
                self._names.remember(folders, move, attempt, names)
                return replace(move, files=placed)
        raise AssertionError("candidates() raises an error at its end")

    def _try_names(
        self, source: int, destination: int, move: MoveRecord, names: tuple[str, ...]
    ) -> tuple[MoveFile, ...] | None:
        """Rename all files to these names; rename none and return None if a name is taken."""
        placed: dict[int, MoveFile] = {}
        done: list[tuple[int, str, str]] = []
        for position in sorted(range(len(names)), key=lambda position: not move.files[position].leaves):
            file, final = move.files[position], names[position]
            origin = (source, file.name) if file.leaves else (destination, move.part_name(position))
            if file.leaves:
                _check_version(source, file, move.source)
            try:
                self._rename(*origin, destination, final)
            except FileExistsError:
                self._rename_back(done, destination)
                return None
            except OSError as error:
                if error.errno in NO_RIGHTS:
                    check_source(source, move.source)
                raise
            done.append((*origin, final))
            status = lstat_at(destination, final)
            if file.leaves and (status is None or not is_version(status, file.stamp)):
                self._rename_back(done, destination)
                raise ChangedError(f"{move.source}/{file.name}: the file was replaced while it was moved")
            moved = NO_STAMP if status is None else stamp_of(status)
            placed[position] = replace(file, final=final, moved_stamp=moved)
        return tuple(placed[position] for position in range(len(names)))

    def _rename_back(self, done: list[tuple[int, str, str]], destination: int) -> None:
        for folder, name, final in reversed(done):
            try:
                self._rename(destination, final, folder, name)
            except FileExistsError as error:
                raise ChangedError(f"{name}: its name was taken while it was moved") from error


def _check_version(folder: int, file: MoveFile, place: str) -> None:
    status = lstat_at(folder, file.name)
    if status is None:
        raise VanishedError(f"{place}/{file.name}: the file is gone")
    if not is_version(status, file.stamp):
        raise ChangedError(f"{place}/{file.name}: the file was changed or replaced")
