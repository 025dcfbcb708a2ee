"""The system calls that Python lacks, folders by descriptor in which no link was followed, and the names in them.

Everything here raises OSError where a disk or its rights refuse.
"""

import ctypes
import errno
import fcntl
import os
import re
import signal
import time
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from sortd.companions import base_of, claim_on, fold, is_image, near, reach
from sortd.errors import SourceError
from sortd.events import Stamp, Writer
from sortd.files import stamp_of, sync_folder

_LIBC = ctypes.CDLL(None, use_errno=True)
_RENAME_NOREPLACE = 1  # linux/fs.h
_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h

CANNOT_RENAME = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS})
"""What a rename between file systems, or on one that knows no RENAME_NOREPLACE, answers. Only trying tells."""

FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: a FIFO under an image's name would hang the open for ever.
FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

_MARKS = "\0 (-.[_~"
"""What a stem may be followed by: an end, a suffix, a number, a mark of a duplicate, of an edit or of a conflict."""

_NUMBER = re.compile(r" ?\(\d+\)")

FRESH_NAMES = 1000  # folders of no more names than this are listed for every batch: that takes a millisecond

SECONDS_A_NAME = 1e-4
"""How long the listing of a larger folder serves, for each name in it: that is a hundred times what it takes."""

MOST_KEPT = 300_000  # names that are kept between two batches, in all folders together: some 40 MB


def rename_new(source_folder: int, source: str, destination_folder: int, destination: str) -> None:
    """Rename a file to a name that must be free: the kernel decides, in one step.

    Raises:
        FileExistsError: the name is taken, also by another link of the same file.
        OSError: everything else that renameat2(2) answers.
    """
    if not hasattr(_LIBC, "renameat2"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), source, None, destination)
    answer = _LIBC.renameat2(
        source_folder, os.fsencode(source), destination_folder, os.fsencode(destination), _RENAME_NOREPLACE
    )
    if answer != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), source, None, destination)


def start_writeback(file: int) -> None:
    """Begin to write the file's bytes to the disk; a promise of nothing, the fsync that follows is shorter for it."""
    if hasattr(_LIBC, "sync_file_range"):
        _LIBC.sync_file_range(file, ctypes.c_int64(0), ctypes.c_int64(0), _SYNC_FILE_RANGE_WRITE)


def writer_of(file: int | str) -> Writer:
    """Tell whether some process has the file open for writing, by asking for a read lease and giving it back.

    A lease is refused with EAGAIN as long as anybody can write, be it only through a shared mapping (fcntl(2)).

    Args:
        file: a descriptor opened for reading only, or a path.
    """
    if isinstance(file, int):
        return _leased(file)
    try:
        descriptor = os.open(file, FILE_FLAGS)
    except OSError:
        return Writer.UNKNOWN
    try:
        return _leased(descriptor)
    finally:
        os.close(descriptor)


def _leased(descriptor: int) -> Writer:
    try:
        # Who opens the file while we hold the lease makes the kernel signal us: SIGIO would end the process.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as error:
        return Writer.PRESENT if error.errno == errno.EAGAIN else Writer.UNKNOWN
    return Writer.ABSENT


def is_version(status: os.stat_result, stamp: Stamp) -> bool:
    """Whether this is that version; the device does not count, its number changes when a disk is mounted again.

    Nor does the time of its last change, which every rename sets.
    """
    return stamp_of(status).is_same_version(stamp)


def lstat_at(folder: int, name: str) -> os.stat_result | None:
    """Return what stands under a name, without following it; None if nothing does."""
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.ENAMETOOLONG}:
            return None
        raise


def check_source(folder: int, place: str) -> None:
    """See that files may be taken out of a folder: rename(2) and unlink(2) do not tell which folder refused.

    Raises:
        SourceError: they may not.
    """
    if not os.access(".", os.W_OK | os.X_OK, dir_fd=folder, effective_ids=True):
        raise SourceError(f"nothing may be removed from {place}; give sortd the right to write to that folder")


def names_by_inode(folder: int, inodes: Iterable[int]) -> dict[int, str]:
    """Return a name for each of these inodes that has one in the folder, visible names before hidden ones."""
    wanted = set(inodes)
    found: dict[int, str] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.inode() in wanted and found.get(entry.inode(), ".").startswith("."):
                found[entry.inode()] = entry.name
    return found


class FolderNames:
    """The visible names in one folder, as they were when it was listed and as sortd changed them since."""

    def __init__(self, names: Iterable[str]) -> None:
        """Take the names of a folder."""
        self._keys = sorted(_key(name) for name in names if not name.startswith("."))

    def __len__(self) -> int:
        """Count them."""
        return len(self._keys)

    def near(self, name: str) -> list[str]:
        """Return the names of all that may belong to the same image as a file, itself included if it is there."""
        return list(dict.fromkeys(found for start, whole in near(name) for found in self._from(start, whole=whole)))

    def is_taken(self, name: str) -> bool:
        """Tell whether something stands there that shares a name's stem, or would belong to it, or it to that."""
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
        """Tell whether something stands there that would belong to a file of this name, or to which that would."""
        own = fold(name)
        folded = (fold(other) for other in self.near(name))
        return any(claim_on(other, own) is not None or claim_on(own, other) is not None for other in folded)

    def add(self, name: str) -> None:
        """Take a name in that sortd gave."""
        insort(self._keys, _key(name))

    def discard(self, name: str) -> None:
        """Forget a name that sortd took away."""
        at = bisect_left(self._keys, _key(name))
        if at < len(self._keys) and self._keys[at] == _key(name):
            del self._keys[at]

    def _from(self, start: str, *, whole: bool) -> Iterator[str]:
        """Yield the names with this folded beginning; of a whole stem, those that are not of its next number."""
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
    """The listings of folders that serve for a while: a large one is not read for each image that comes into it.

    What somebody else puts into a large folder meanwhile is not seen; no file is overwritten for that, and a companion
    that is missed follows its image later.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with nothing listed; ``clock`` gives seconds."""
        self._clock = clock
        self._kept: OrderedDict[tuple[int, int], tuple[float, FolderNames]] = OrderedDict()

    def names(self, folder: int) -> FolderNames:
        """Return the names in an open folder."""
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
    """Descriptors of a dataset's folders, opened once for a batch; closing it closes them all."""

    def __init__(self, root: Path, listings: Listings | None = None) -> None:
        """Open the dataset itself; ``listings`` are of its folders, from earlier batches."""
        self._stack = ExitStack()
        self._listings = listings or Listings()
        self._names: dict[str, FolderNames] = {}
        self._open: dict[str, int] = {}
        self._open[""] = self._adopt(os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close every descriptor."""
        self._stack.close()

    def open(self, folder: str) -> int:
        """Return a descriptor of a folder given relative to the dataset; no component may be a symbolic link."""
        if folder not in self._open:
            parent, _, name = folder.rpartition("/")
            self._open[folder] = self._adopt(os.open(name, FOLDER_FLAGS, dir_fd=self.open(parent)))
        return self._open[folder]

    def make(self, folder: str) -> int:
        """Like ``open``; what is missing is made, durably, and belongs to whom its parent belongs to."""
        try:
            return self.open(folder)
        except FileNotFoundError:
            parent_path, _, name = folder.rpartition("/")
            parent = self.make(parent_path) if parent_path else self.open("")
        try:
            os.mkdir(name, dir_fd=parent)
        except FileExistsError:
            return self.open(folder)
        made = self.open(folder)
        if os.geteuid() == 0:
            owner = os.fstat(parent)
            os.fchown(made, owner.st_uid, owner.st_gid)
        sync_folder(parent)
        return made

    def names(self, folder: str) -> FolderNames:
        """Return the names in a folder given relative to the dataset, which is listed once for this batch."""
        if folder not in self._names:
            self._names[folder] = self._listings.names(self.open(folder))
        return self._names[folder]

    def note_move(self, source: str, name: str, destination: str, final: str) -> None:
        """Let what was listed know of a name that a file left, and of the one that it got."""
        if source in self._names:
            self._names[source].discard(name)
        if destination in self._names:
            self._names[destination].add(final)

    def _adopt(self, descriptor: int) -> int:
        self._stack.callback(os.close, descriptor)
        return descriptor
