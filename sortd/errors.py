"""Every error that sortd raises on purpose, in three families: who must act?

``StartupError``: the operator, now. ``ImageError``: nobody, that image waits or is set aside and the rest goes on.
``StorageError``: the disk or whoever owns it; the daemon holds a dataset rather than guess.
A message says what happened, to which path, and what to do; ``advice_for`` knows that for errors of the system.
"""

import errno
from collections.abc import Mapping
from typing import Final


class SortdError(Exception):
    """Base of all of them; ``exit_code`` is what the command line returns (see sysexits(3))."""

    exit_code = 70


class StartupError(SortdError):
    """sortd cannot start, or cannot do what was asked; the operator has to mend something."""

    exit_code = 78


class ConfigError(StartupError):
    """The configuration is not valid; one line for each mistake as ``file:line:col: key: message``."""


class LayoutError(StartupError):
    """The folders are not what they must be: missing, overlapping, not writable."""


class AlreadyRunningError(StartupError):
    """Another sortd works on the same dataset."""

    exit_code = 75


class StoppedError(StartupError):
    """What was to be done once was stopped by a signal before it was done; whoever asked may ask again."""

    exit_code = 75


class ModelError(StartupError):
    """The model cannot be had or is no CLIP."""

    exit_code = 69


class DataError(StartupError):
    """The data handed to an offline command cannot serve: no classes, one class, no image."""

    exit_code = 65


class ImageError(SortdError):
    """One image cannot be handled now; the others go on."""

    exit_code = 65


class UnreadableError(ImageError):
    """The bytes are no image that sortd decodes, or a broken one."""


class TooLargeError(ImageError):
    """The image is over a limit on bytes, pixels, sides, memory or time."""


class CrowdedError(ImageError):
    """Decoding the image takes more room than it was given; it is to be asked for again with ``pixels`` of it."""

    def __init__(self, pixels: int) -> None:
        """Say how much room, in pixels, it takes."""
        super().__init__(f"decoding it takes the room of {pixels:,} pixels")
        self.pixels = pixels


class NotAnImageError(ImageError):
    """Neither the name nor the content says image: it is left where it is."""


class ChangedError(ImageError):
    """The file is no longer the version that was looked at."""


class VanishedError(ImageError):
    """The file is gone."""


class BusyError(ImageError):
    """The file cannot be taken now: a writer has it open, or it cannot be opened; it is looked at again later."""


class StorageError(SortdError):
    """A disk refused what durability needs."""

    exit_code = 74


class JournalError(StorageError):
    """The journal of a dataset cannot be written or read: nothing of it may move until it was opened anew."""


class SourceError(StorageError):
    """Nothing may be taken out of the folder of a file: that folder waits and is tried again."""

    exit_code = 73


class DestinationError(StorageError):
    """A destination refused the file: that dataset is held and tried again."""

    exit_code = 73


# ---------------------------------------------------------------- advice: see errno(3), open(2), rename(2), write(2)

_RIGHTS_TO_READ: Final = "give sortd the right to read it"
_RIGHTS_TO_WRITE: Final = "give sortd the right to write there"
_ROOM: Final = "make room there"
_MORE_FILES: Final = (
    "raise the limit on open files of this process (RLIMIT_NOFILE: LimitNOFILE= in its unit, ulimit -n in a shell)"
)
_MORE_FILES_OF_ALL: Final = "raise the limit on open files of the whole machine (sysctl fs.file-max)"
_DISK: Final = "see whether its disk is mounted and well"

_READING: Final[Mapping[int, str]] = {
    errno.EACCES: _RIGHTS_TO_READ,
    errno.EPERM: _RIGHTS_TO_READ,
    errno.ELOOP: "put a real file or folder in the place of the symbolic link",
    errno.EINVAL: "remove it, or put a regular file in its place",
    errno.ENXIO: "remove it, or put a regular file in its place",
    errno.ENOTDIR: "put a folder there",
    errno.EMFILE: _MORE_FILES,
    errno.ENFILE: _MORE_FILES_OF_ALL,
}

_WRITING: Final[Mapping[int, str]] = {
    errno.EACCES: _RIGHTS_TO_WRITE,
    errno.EPERM: "see whether it is immutable (lsattr), or owned by another user in a folder with the sticky bit",
    errno.EROFS: "mount its disk for writing; a service needs it in ReadWritePaths=",
    errno.ENOSPC: _ROOM,
    errno.EMFILE: _MORE_FILES,
    errno.ENFILE: _MORE_FILES_OF_ALL,
    errno.EISDIR: "move away the folder that stands in the place of the file",
    errno.EDQUOT: "make room there, or raise the quota",
    errno.EFBIG: "raise the limit on the size of files",
    errno.ELOOP: "put a folder in the place of the symbolic link",
    errno.ENOTDIR: "move away the file that stands in the place of the folder",
    errno.ENAMETOOLONG: "give it a shorter name",
    errno.EILSEQ: "give it a name that its disk can write",
    errno.EINVAL: "give it a name that its disk can write",
}

_OF_A_DISK: Final = frozenset({errno.EIO, errno.ENOENT, errno.ENODEV, errno.ENXIO, errno.ENOTCONN, errno.ESTALE})
"""Errors of a disk that fails, was taken out, or whose server is gone."""


def advice_for(error: OSError) -> str:
    """Return what to do about a file or folder that could not be read; never empty."""
    return _READING.get(error.errno or 0, _DISK)


def advice_for_write(error: OSError) -> str:
    """Return what to do about a file or folder that could not be written; empty where the error says it all."""
    number = error.errno or 0
    return _WRITING.get(number, _DISK if number in _OF_A_DISK else "")


def unreadable(error: OSError) -> str:
    """Say which path could not be read, why, and what to do."""
    return f"{error.filename} cannot be read: {error.strerror or error}; {advice_for(error)}"
