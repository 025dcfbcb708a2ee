"""One whole, durable copy of a file under a name that nobody sees, with all that its new home can keep of it."""

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sortd.errors import BusyError
from sortd.moving.renaming import FILE_FLAGS, start_writeback

CHUNK_BYTES = 1 << 20
WRITEBACK_BYTES = 64 << 20
"""After so much the disk is sent to work: one fsync of all of a long film could not be interrupted for minutes."""

_PART_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Copy:
    """A copy that survives a power cut under its part name."""

    inode: int
    content: str  # hexadecimal sha256
    lost: tuple[str, ...]  # metadata that could not be kept


def never() -> bool:
    """Answer whether to stop: no."""
    return False


def copy_to_part(source: int, folder: int, part: str, interrupted: Callable[[], bool] = never) -> Copy:
    """Copy an open file into a new part, holes kept, and sync it.

    A failed fsync is never tried again, the kernel may have dropped what it could not write: the copy is worthless
    then, and whoever catches the error removes it.

    Args:
        source: descriptor, opened for reading.
        folder: descriptor of the destination folder.
        part: name of the part; it must be free.
        interrupted: asked between chunks.

    Raises:
        BusyError: interrupted.
        OSError: a disk refused.
    """
    before = os.fstat(source)
    copy = os.open(part, _PART_FLAGS, 0o600, dir_fd=folder)
    try:
        content = _copy_bytes(source, copy, before.st_size, interrupted)
        lost = _copy_metadata(source, copy, before)
        os.fsync(copy)
        return Copy(os.fstat(copy).st_ino, content, lost)
    finally:
        os.close(copy)


def write_part(folder: int, part: str, body: bytes) -> Copy:
    """Write bytes of our own into a new part and sync it.

    Raises:
        OSError: the disk refused.
    """
    descriptor = os.open(part, _PART_FLAGS, 0o666, dir_fd=folder)
    try:
        _write(descriptor, body)
        os.fsync(descriptor)
        return Copy(os.fstat(descriptor).st_ino, hashlib.sha256(body).hexdigest(), ())
    finally:
        os.close(descriptor)


def remove_part(folder: int, part: str) -> None:
    """Remove a part if it is there.

    Raises:
        OSError: the disk refused.
    """
    try:
        os.unlink(part, dir_fd=folder)
    except FileNotFoundError:
        return


def content_of(folder: int, name: str) -> str:
    """Return the sha256 of a file's bytes, in hexadecimal; the empty string if it is not there.

    Raises:
        OSError: it cannot be read.
    """
    try:
        descriptor = os.open(name, FILE_FLAGS, dir_fd=folder)
    except FileNotFoundError:
        return ""
    try:
        with open(descriptor, "rb", closefd=False) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    finally:
        os.close(descriptor)  # a folder cannot be made a file of, and would stay open


def _copy_bytes(source: int, copy: int, size: int, interrupted: Callable[[], bool]) -> str:
    digest = hashlib.sha256()
    at = written = 0
    for start, end in _islands(source, size):
        _hash_zeros(digest.update, start - at, interrupted)
        os.lseek(source, start, os.SEEK_SET)
        os.lseek(copy, start, os.SEEK_SET)
        at = start
        while at < end:
            _go_on_unless(interrupted)
            chunk = os.read(source, min(CHUNK_BYTES, end - at))
            if not chunk:
                raise BusyError("the file became shorter while it was copied; it is looked at again")
            _write(copy, chunk)
            digest.update(chunk)
            at += len(chunk)
            written += len(chunk)
            if written >= WRITEBACK_BYTES:
                start_writeback(copy)
                written = 0
    _hash_zeros(digest.update, size - at, interrupted)
    os.ftruncate(copy, size)
    return digest.hexdigest()


def _islands(source: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield the stretches of a sparse file that hold data; one for all of it where holes cannot be asked for."""
    at = 0
    while at < size:
        try:
            start = os.lseek(source, at, os.SEEK_DATA)
            end = os.lseek(source, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole until the end
                return
            if error.errno not in {errno.EINVAL, errno.ENOTSUP}:
                raise
            start, end = at, size
        yield start, min(end, size)
        at = end


def _go_on_unless(interrupted: Callable[[], bool]) -> None:
    if interrupted():
        raise BusyError("the copy to another file system was interrupted; it begins anew at the next start")


def _hash_zeros(update: Callable[[bytes], None], count: int, interrupted: Callable[[], bool]) -> None:
    """Hash a hole: of a file with terabytes of nothing that takes as long as if they were there."""
    zeros = bytes(min(count, CHUNK_BYTES))
    while count > 0:
        _go_on_unless(interrupted)
        update(zeros[: min(count, CHUNK_BYTES)])
        count -= CHUNK_BYTES


def _write(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _copy_metadata(source: int, copy: int, status: os.stat_result) -> tuple[str, ...]:
    """Give the copy owner, mode, attributes and times, in the order in which none undoes another."""
    lost = []
    try:
        os.fchown(copy, status.st_uid, status.st_gid)
    except OSError:
        lost.append("owner")
    lost += _copy_attributes(source, copy)
    try:
        os.fchmod(copy, status.st_mode & 0o7777)
    except OSError:
        lost.append("mode")
    try:
        os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
    except PermissionError:
        lost.append("mtime")
    kept = os.fstat(copy)
    if "mtime" not in lost and kept.st_mtime_ns != status.st_mtime_ns:
        lost.append("mtime")
    if "owner" not in lost and (kept.st_uid, kept.st_gid) != (status.st_uid, status.st_gid):
        lost.append("owner")
    return tuple(lost)


def _copy_attributes(source: int, copy: int) -> list[str]:
    try:
        names = os.listxattr(source)
    except OSError:
        return []
    lost = []
    for name in names:
        try:
            os.setxattr(copy, name, os.getxattr(source, name))
        except OSError:
            lost.append(name)
    return lost
