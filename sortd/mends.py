"""Mends: what a person can do about an error of the operating system, in half a sentence behind what went wrong.

An errno tells little to whoever has to act on it; the numbers are those of errno(3), the causes those of open(2),
rename(2) and write(2) on Linux. Pure: nothing is looked at, so the advice holds wherever the error came from.
"""

import errno
from collections.abc import Mapping
from typing import Final

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
"""What a disk answers that fails, that was taken out, or whose server went away."""


def to_read(error: OSError) -> str:
    """Return what mends a file or folder that could not be read; something, whatever the error is."""
    return _READING.get(error.errno or 0, _DISK)


def to_write(error: OSError) -> str:
    """Return what mends a file or folder that could not be written; empty where the error says all there is."""
    number = error.errno or 0
    return _WRITING.get(number, _DISK if number in _OF_A_DISK else "")


def unreadable(error: OSError) -> str:
    """Say which path could not be read, why, and what to do."""
    return f"{error.filename} cannot be read: {error.strerror or error}; {to_read(error)}"
