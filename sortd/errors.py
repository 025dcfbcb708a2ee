"""The errors that sortd raises, in three families, and the advice for errors of the system.

``StartupError``: the operator must act now. ``ImageError``: one image waits or is rejected, and the others continue.
``StorageError``: a disk must be repaired; the daemon holds the dataset until then.
A message says what happened, to which path, and what to do.
"""

import errno
from collections.abc import Mapping
from typing import Final


class SortdError(Exception):
    """Base class; ``exit_code`` is the exit code of the command line (see sysexits(3))."""

    exit_code = 70


class StartupError(SortdError):
    """sortd cannot start or cannot carry out a command until the operator corrects something."""

    exit_code = 78


class ConfigError(StartupError):
    """The configuration is not valid; each mistake is a line ``file:line:column: key: message``."""


class LayoutError(StartupError):
    """A folder is missing, overlaps another, or is not writable."""


class AlreadyRunningError(StartupError):
    """Another sortd uses the same dataset."""

    exit_code = 75


class StoppedError(StartupError):
    """A signal stopped a command before it was done; it can be repeated."""

    exit_code = 75


class ModelError(StartupError):
    """The model is not available or is no CLIP model, or a package that a command needs is not installed."""

    exit_code = 69


class DataError(StartupError):
    """The data given to a command is not usable: no class, one class, no image."""

    exit_code = 65


class ImageError(SortdError):
    """One image cannot be processed now; the others continue."""

    exit_code = 65


class UnreadableError(ImageError):
    """The file is damaged, or has no format that sortd decodes."""


class TooLargeError(ImageError):
    """The image exceeds a limit on bytes, pixels, sides, memory or time."""


class CrowdedError(ImageError):
    """Decoding the image needs more memory than it was given: that of ``pixels``; the caller may try again."""

    def __init__(self, pixels: int) -> None:
        """Record the needed memory, in pixels."""
        super().__init__(f"decoding it needs the memory of {pixels:,} pixels")
        self.pixels = pixels


class NotAnImageError(ImageError):
    """Neither the name nor the content is that of an image; the file stays where it is."""


class ChangedError(ImageError):
    """The file has changed since it was read."""


class VanishedError(ImageError):
    """The file no longer exists."""


class BusyError(ImageError):
    """The file is open for writing or cannot be opened; sortd tries again later."""


class StorageError(SortdError):
    """A disk refused an operation that durability needs."""

    exit_code = 74


class JournalError(StorageError):
    """The journal of a dataset cannot be written or read: nothing in it is moved until it is opened again."""


class SourceError(StorageError):
    """No file can be moved out of a folder; sortd tries again later."""

    exit_code = 73


class DestinationError(StorageError):
    """A destination refused a file; sortd holds the dataset and tries again later."""

    exit_code = 73


# ---------------------------------------------------------------- advice: see errno(3), open(2), rename(2), write(2)

_RIGHTS_TO_READ: Final = "give sortd permission to read it"
_RIGHTS_TO_WRITE: Final = "give sortd permission to write there"
_MORE_FILES: Final = (
    "raise the limit on open files of this process (RLIMIT_NOFILE: LimitNOFILE= in its unit, ulimit -n in a shell)"
)
_MORE_FILES_OF_ALL: Final = "raise the limit on open files of the whole machine (sysctl fs.file-max)"
_DISK: Final = "check that its disk is mounted and works"
_REPLACE: Final = "remove it, or replace it by a regular file"
_RENAME: Final = "give it a name that its disk can store"

_READING: Final[Mapping[int, str]] = {
    errno.EACCES: _RIGHTS_TO_READ,
    errno.EPERM: _RIGHTS_TO_READ,
    errno.ELOOP: "replace the symbolic link by a real file or folder",
    errno.EINVAL: _REPLACE,
    errno.ENXIO: _REPLACE,
    errno.ENOTDIR: "replace it by a folder",
    errno.EMFILE: _MORE_FILES,
    errno.ENFILE: _MORE_FILES_OF_ALL,
}

_WRITING: Final[Mapping[int, str]] = {
    errno.EACCES: _RIGHTS_TO_WRITE,
    errno.EPERM: "check whether it is immutable (lsattr), or owned by another user in a folder with the sticky bit",
    errno.EROFS: "mount its disk for writing; a service needs it in ReadWritePaths=",
    errno.ENOSPC: "free some space there",
    errno.EMFILE: _MORE_FILES,
    errno.ENFILE: _MORE_FILES_OF_ALL,
    errno.EISDIR: "move away the folder of that name",
    errno.EDQUOT: "free some space there, or raise the quota",
    errno.EFBIG: "raise the limit on the size of files",
    errno.ELOOP: "replace the symbolic link by a folder",
    errno.ENOTDIR: "move away the file of that name",
    errno.ENAMETOOLONG: "give it a shorter name",
    errno.EILSEQ: _RENAME,
    errno.EINVAL: _RENAME,
}

_OF_A_DISK: Final = frozenset({errno.EIO, errno.ENOENT, errno.ENODEV, errno.ENXIO, errno.ENOTCONN, errno.ESTALE})
"""Errors of a disk that fails, was removed, or whose server does not answer."""


def advice_for(error: OSError) -> str:
    """Return what to do about a file or folder that could not be read; never empty."""
    return _READING.get(error.errno or 0, _DISK)


def advice_for_write(error: OSError) -> str:
    """Return what to do about a file or folder that could not be written; empty if there is no advice."""
    number = error.errno or 0
    return _WRITING.get(number, _DISK if number in _OF_A_DISK else "")


def unreadable(error: OSError) -> str:
    """Return a message with the path that could not be read, why, and what to do."""
    return f"{error.filename} cannot be read: {error.strerror or error}; {advice_for(error)}"
