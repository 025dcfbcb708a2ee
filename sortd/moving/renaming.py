"""The system calls that Python lacks, and descriptors of folders in which no symbolic link was followed."""

import ctypes
import errno
import fcntl
import os
import signal
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from sortd.events import Stamp, Writer
from sortd.moving.listing import Listings, Names

_LIBC = ctypes.CDLL(None, use_errno=True)
_RENAME_NOREPLACE = 1  # linux/fs.h
_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h

CANNOT_RENAME = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS})
"""What a rename between file systems, or on one that knows no RENAME_NOREPLACE, answers. Only trying tells."""

_CANNOT_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP})

FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: a FIFO under an image's name would hang the open for ever.
FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def rename_new(source_folder: int, source: str, destination_folder: int, destination: str) -> None:
    """Rename a file to a name that must be free: the kernel decides, in one step.

    Raises:
        FileExistsError: the name is taken, also by another link of the same file.
        OSError: everything else that renameat2(2) answers.
    """
    if not hasattr(_LIBC, "renameat2"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), source, None, destination)
    answer = _LIBC.renameat2(
        source_folder,
        os.fsencode(source),
        destination_folder,
        os.fsencode(destination),
        _RENAME_NOREPLACE,
    )
    if answer != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), source, None, destination)


def start_writeback(file: int) -> None:
    """Begin to write the file's bytes to the disk; a promise of nothing, the fsync that follows is shorter for it."""
    if hasattr(_LIBC, "sync_file_range"):
        _LIBC.sync_file_range(file, ctypes.c_int64(0), ctypes.c_int64(0), _SYNC_FILE_RANGE_WRITE)


def sync_folder(folder: int) -> None:
    """Make the names in a folder survive a power cut, where its file system can be asked to.

    Raises:
        OSError: the disk refused.
    """
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise


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


def stamp_of(status: os.stat_result) -> Stamp:
    """Return the stamp of the version that was looked at."""
    return Stamp(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def is_version(status: os.stat_result, stamp: Stamp) -> bool:
    """Whether this is that version; the device does not count, its number changes when a disk is mounted again.

    Nor does the time of its last change, which every rename sets.
    """
    return stamp_of(status).is_same_version(stamp)


def look(folder: int, name: str) -> os.stat_result | None:
    """Return what stands under a name, without following it; None if nothing does."""
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.ENAMETOOLONG}:
            return None
        raise


def names_of(folder: int, inodes: Iterable[int]) -> dict[int, str]:
    """Return a name for each of these inodes that has one in the folder, visible names before hidden ones."""
    wanted = set(inodes)
    found: dict[int, str] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.inode() in wanted and found.get(entry.inode(), ".").startswith("."):
                found[entry.inode()] = entry.name
    return found


class Folders:
    """Descriptors of a dataset's folders, opened once for a batch; closing it closes them all."""

    def __init__(self, root: Path, listings: Listings | None = None) -> None:
        """Open the dataset itself.

        Args:
            root: the dataset.
            listings: of its folders, from earlier batches.

        Raises:
            OSError: it is not there.
        """
        self._stack = ExitStack()
        self._listings = listings or Listings()
        self._names: dict[str, Names] = {}
        self._open: dict[str, int] = {}
        self._open[""] = self._adopt(os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close every descriptor."""
        self._stack.close()

    def open(self, folder: str) -> int:
        """Return a descriptor of a folder given relative to the dataset; no component may be a symbolic link.

        Raises:
            OSError: it is not there, or a component is no folder.
        """
        if folder not in self._open:
            parent, _, name = folder.rpartition("/")
            self._open[folder] = self._adopt(os.open(name, FOLDER_FLAGS, dir_fd=self.open(parent)))
        return self._open[folder]

    def make(self, folder: str) -> int:
        """Like ``open``; what is missing is made, durably, and belongs to whom its parent belongs to.

        Raises:
            OSError: it cannot be made, or a component is no folder.
        """
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

    def names(self, folder: str) -> Names:
        """Return the names in a folder given relative to the dataset, which is listed once for this batch.

        Raises:
            OSError: it is not there, or cannot be read.
        """
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
