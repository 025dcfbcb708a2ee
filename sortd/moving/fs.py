"""System calls that Python lacks, folders and files opened without following links, and the names in folders.

Everything here raises OSError if a disk or a permission prevents an operation.
"""

import ctypes
import errno
import fcntl
import os
import re
import signal
import stat
import time
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path
from typing import Self

from sortd.companions import base_of, claim_on, fold, is_image, near, reach
from sortd.errors import BusyError, ChangedError, SourceError, VanishedError
from sortd.events import Stamp, Writer
from sortd.files import open_descriptor, sha256_of, stamp_of, sync_folder
from sortd.store.records import MoveFile, MoveRecord, Role

_LIBC = ctypes.CDLL(None, use_errno=True)
_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2  # linux/fs.h
_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h

CANNOT_RENAME = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS})
"""Errors of a rename between file systems, or on one without RENAME_NOREPLACE; the only test is to try."""

FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: opening a FIFO with an image's name would block forever.
FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

_MARKS = "\0 (-.[_~"
"""Characters that may follow a stem: the end, a suffix, a number, a mark of a duplicate, an edit or a conflict."""

_NUMBER = re.compile(r" ?\(\d+\)")

FRESH_NAMES = 1000  # folders with at most so many names are listed for every batch, which takes a millisecond

SECONDS_A_NAME = 1e-4  # for which the listing of a larger folder is reused, for each name: 100 times its cost

MOST_KEPT = 300_000  # names cached between batches, in all folders together: about 40 MB


def rename_new(source_folder: int, source: str, destination_folder: int, destination: str) -> None:
    """Rename a file to a name that must be free, atomically, with renameat2(2).

    Raises:
        FileExistsError: the name is taken, also if by another link of the same file.
        OSError: any other error of renameat2(2).
    """
    _renameat2(source_folder, source, destination_folder, destination, _RENAME_NOREPLACE)


def exchange_names(folder: int, one: str, other: str) -> None:
    """Exchange the names of two files in a folder atomically, with renameat2(2). Raises OSError."""
    _renameat2(folder, one, folder, other, _RENAME_EXCHANGE)


def _renameat2(source_folder: int, source: str, destination_folder: int, destination: str, flag: int) -> None:
    if not hasattr(_LIBC, "renameat2"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), source, None, destination)
    answer = _LIBC.renameat2(source_folder, os.fsencode(source), destination_folder, os.fsencode(destination), flag)
    if answer != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), source, None, destination)


def start_writeback(file: int) -> None:
    """Start writing a file's bytes to the disk, so that a later fsync is shorter; guarantees nothing."""
    if hasattr(_LIBC, "sync_file_range"):
        _LIBC.sync_file_range(file, ctypes.c_int64(0), ctypes.c_int64(0), _SYNC_FILE_RANGE_WRITE)


def writer_of(file: int | str) -> Writer:
    """Tell whether a process can write a file, given by path or read-only descriptor, by taking a read lease.

    A lease fails with EAGAIN while any process can write, also through a shared mapping (fcntl(2)).
    """
    if isinstance(file, int):
        return _leased(file)
    try:
        with open_descriptor(file, FILE_FLAGS) as descriptor:
            return _leased(descriptor)
    except OSError:
        return Writer.UNKNOWN


def _leased(descriptor: int) -> Writer:
    try:
        # If a process opens the file during the lease, the kernel sends a signal; SIGIO would end sortd.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as error:
        return Writer.PRESENT if error.errno == errno.EAGAIN else Writer.UNKNOWN
    return Writer.ABSENT


def is_version(status: os.stat_result, stamp: Stamp) -> bool:
    """Tell whether a file is this version.

    The device is ignored, because its number changes when a disk is mounted again, and ctime, because a rename sets it.
    """
    return stamp_of(status).is_same_version(stamp)


def check_unchanged(folder: int, name: str, stamp: Stamp, path: str) -> None:
    """Raise VanishedError or ChangedError unless a file is this version; ``path`` is for the message."""
    status = lstat_at(folder, name)
    if status is None:
        raise VanishedError(f"{path}: the file is gone")
    if not is_version(status, stamp):
        raise ChangedError(f"{path}: the file was changed or replaced")


def lstat_at(folder: int, name: str) -> os.stat_result | None:
    """Return the status of a name in a folder, without following links; None if the name does not exist."""
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.ENAMETOOLONG}:
            return None
        raise


def check_source(folder: int, place: str) -> None:
    """Check that files can be removed from a folder: rename(2) does not say which of two folders it could not write.

    Raises SourceError.
    """
    if not os.access(".", os.W_OK | os.X_OK, dir_fd=folder, effective_ids=True):
        raise SourceError(f"files cannot be removed from {place}: give sortd write permission for this folder")


def names_by_inode(folder: int, inodes: Iterable[int]) -> dict[int, str]:
    """Return a name in the folder for each of these inodes that has one; a visible name rather than a hidden one."""
    wanted = set(inodes)
    found: dict[int, str] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.inode() in wanted and found.get(entry.inode(), ".").startswith("."):
                found[entry.inode()] = entry.name
    return found


class FolderNames:
    """The visible names in one folder when it was listed, with sortd's changes since then."""

    def __init__(self, names: Iterable[str]) -> None:
        """Store the names of a folder."""
        self._keys = sorted(_key(name) for name in names if not name.startswith("."))

    def __len__(self) -> int:
        """Return the number of names."""
        return len(self._keys)

    def near(self, name: str) -> list[str]:
        """Return the names that may belong to the same image as a file, including its own."""
        return list(dict.fromkeys(found for start, whole in near(name) for found in self._from(start, whole=whole)))

    def is_taken(self, name: str) -> bool:
        """Tell whether a file has the same stem as this name, or would be its companion, or it that file's."""
        stem = fold(base_of(name))
        reached = reach(name)
        for other in self.near(name):
            stem_of_other = fold(base_of(other))
            if stem_of_other == stem:
                return True
            if not (is_image(name) and is_image(other)) and (stem in reach(other) or stem_of_other in reached):
                return True
        return False

    def has_relatives(self, name: str) -> bool:
        """Tell whether a file would be a companion of a file with this name, or the reverse."""
        own = fold(name)
        folded = (fold(other) for other in self.near(name))
        return any(claim_on(other, own) is not None or claim_on(own, other) is not None for other in folded)

    def add(self, name: str) -> None:
        """Add a name."""
        insort(self._keys, _key(name))

    def discard(self, name: str) -> None:
        """Remove a name."""
        at = bisect_left(self._keys, _key(name))
        if at < len(self._keys) and self._keys[at] == _key(name):
            del self._keys[at]

    def _from(self, start: str, *, whole: bool) -> Iterator[str]:
        """Yield the names with this folded beginning; if it is a whole stem, only those without a further number."""
        for mark in _MARKS if whole else ("",):
            begun = start + mark
            for at in range(bisect_left(self._keys, begun), len(self._keys)):
                key = self._keys[at]
                if not key.startswith(begun):
                    break
                if not (whole and _NUMBER.match(key, len(start))):
                    yield key.partition("\0")[2]


def _key(name: str) -> str:
    return f"{fold(name)}\0{name}"


class Listings:
    """A cache of listings, so that a large folder is not read for each image that enters it.

    Files that others create in a large folder meanwhile are not seen. No file is overwritten because of that, and a
    companion that was not seen follows its image later.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with an empty cache; ``clock`` returns seconds."""
        self._clock = clock
        self._kept: OrderedDict[tuple[int, int], tuple[float, FolderNames]] = OrderedDict()

    def names(self, folder: int) -> FolderNames:
        """Return the names in a folder given by descriptor."""
        status = os.fstat(folder)
        key, now = (status.st_dev, status.st_ino), self._clock()
        listed_at, names = self._kept.get(key, (0.0, None))
        if names is not None and now - listed_at < SECONDS_A_NAME * len(names):
            self._kept.move_to_end(key)
            return names
        names = FolderNames(os.listdir(folder))
        self._kept.pop(key, None)
        if len(names) > FRESH_NAMES:
            self._kept[key] = (now, names)
            while sum(len(kept) for _, kept in self._kept.values()) > MOST_KEPT:
                self._kept.popitem(last=False)
        return names


class Folders:
    """Descriptors of a dataset's folders, each opened once for a batch; leaving the context closes them."""

    def __init__(self, root: Path, listings: Listings | None = None) -> None:
        """Open the dataset; ``listings`` may have names from earlier batches."""
        self.root = root
        self._stack = ExitStack()
        self._listings = listings or Listings()
        self._names: dict[str, FolderNames] = {}
        self._open = {"": self._adopt(os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))}

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close every descriptor."""
        self._stack.close()

    def open(self, folder: str) -> int:
        """Return a descriptor of a folder, relative to the dataset; no component may be a symbolic link."""
        for path in () if folder in self._open else accumulate(folder.split("/"), "{}/{}".format):
            if path not in self._open:
                parent, _, name = path.rpartition("/")
                self._open[path] = self._adopt(os.open(name, FOLDER_FLAGS, dir_fd=self._open[parent]))
        return self._open[folder]

    def make(self, folder: str) -> int:
        """Like ``open``, but create missing folders durably, with the owner of their parent."""
        for path in accumulate(folder.split("/"), "{}/{}".format):
            try:
                self.open(path)
            except FileNotFoundError:
                self._make_one(path)
        return self._open[folder]

    def names(self, folder: str) -> FolderNames:
        """Return the names in a folder, relative to the dataset, which is listed once for this batch."""
        if folder not in self._names:
            self._names[folder] = self._listings.names(self.open(folder))
        return self._names[folder]

    def note_move(self, source: str, name: str, destination: str, final: str) -> None:
        """Update the listings after a move: remove ``name`` from the source, add ``final`` to the destination."""
        if source in self._names:
            self._names[source].discard(name)
        if destination in self._names:
            self._names[destination].add(final)

    def _make_one(self, path: str) -> None:
        parent_path, _, name = path.rpartition("/")
        parent = self._open[parent_path]
        try:
            os.mkdir(name, dir_fd=parent)
        except FileExistsError:
            self.open(path)
            return
        made = self.open(path)
        if os.geteuid() == 0:
            owner = os.fstat(parent)
            os.fchown(made, owner.st_uid, owner.st_gid)
        sync_folder(parent)

    def _adopt(self, descriptor: int) -> int:
        self._stack.callback(os.close, descriptor)
        return descriptor


def open_files(folders: Folders, move: MoveRecord) -> list[int]:
    """Open every existing file of a move, check that it is the decided version and has no writer; return descriptors.

    Raises:
        VanishedError, ChangedError, BusyError: a check failed, or a file cannot be opened.
    """
    opened: list[int] = []
    path = f"{move.source}/{move.image.name}"
    try:
        folder = folders.open(move.source)
        for file in move.files:
            if file.role not in {Role.REASON, Role.REMOVED}:
                _open_file(folder, file, move, opened)
    except BaseException as error:
        for descriptor in opened:
            os.close(descriptor)
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


def _open_file(folder: int, file: MoveFile, move: MoveRecord, opened: list[int]) -> None:
    path = f"{move.source}/{file.name}"
    try:
        descriptor = os.open(file.name, FILE_FLAGS, dir_fd=folder)
    except PermissionError:
        if file.role is Role.COMPANION:  # a rename needs no permission to read
            return
        raise
    except FileNotFoundError as error:
        if file is move.image:
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
