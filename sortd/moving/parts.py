"""Parts: whole, durable copies under hidden names, with all of a file that their folder's file system can keep.

Everything here raises OSError where a disk refuses.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from sortd.errors import BusyError, ChangedError
from sortd.files import open_regular, sha256_of
from sortd.moving.fs import FILE_FLAGS, Folders, is_version, lstat_at, start_writeback
from sortd.store.records import MoveRecord, Role

CHUNK_BYTES = 1 << 20
WRITEBACK_BYTES = 64 << 20
"""After so much the disk is sent to work: one fsync of all of a long film could not be interrupted for minutes."""

_USER_ATTRIBUTES, _ACCESS_LISTS = "user.", "system."

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
        interrupted: asked between chunks; BusyError is raised when it says so.
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
    """Write bytes of our own into a new part and sync it."""
    descriptor = os.open(part, _PART_FLAGS, 0o666, dir_fd=folder)
    try:
        _write(descriptor, body)
        os.fsync(descriptor)
        return Copy(os.fstat(descriptor).st_ino, hashlib.sha256(body).hexdigest(), ())
    finally:
        os.close(descriptor)


def remove_part(folder: int, part: str) -> None:
    """Remove a part if it is there."""
    try:
        os.unlink(part, dir_fd=folder)
    except FileNotFoundError:
        return


def make_part(source: int, destination: int, move: MoveRecord, position: int) -> Copy:
    """Make, durably and under a hidden name, one file that does not leave the source: a copy or a reason.

    Raises:
        ChangedError: a shared companion is no longer the version meant.
    """
    file, part = move.files[position], move.part_name(position)
    remove_part(destination, part)
    if file.role is Role.REASON:
        return write_part(destination, part, file.body)
    descriptor = os.open(file.name, FILE_FLAGS, dir_fd=source)
    try:
        if not is_version(os.fstat(descriptor), file.stamp):
            raise ChangedError(f"{move.source}/{file.name}: another version stands there now")
        return copy_to_part(descriptor, destination, part)
    finally:
        os.close(descriptor)


def remove_obsolete(folders: Folders, move: MoveRecord) -> None:
    """Remove what sortd itself once made beside an image that is put back; what was changed since is kept."""
    folder = folders.open(move.source)
    for file in move.obsolete:
        status = lstat_at(folder, file.name)
        if status is not None and is_version(status, file.stamp):
            os.unlink(file.name, dir_fd=folder)


def content_of(folder: int, name: str) -> str:
    """Return the sha256 of a file's bytes, in hexadecimal; the empty string if it is not there."""
    try:
        descriptor = open_regular(name, folder=folder)
    except FileNotFoundError:
        return ""
    try:
        return sha256_of(descriptor)
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
    """Give the copy owner, attributes, mode and times, in the order in which none undoes another.

    The copy gives nobody a right that the source did not give: see ``_safe_mode``.
    """
    lost = _copy_owner(copy, status)
    lost += _copy_attributes(source, copy, with_acl=not lost)
    mode = _safe_mode(status.st_mode, lost)
    try:
        os.fchmod(copy, mode)
    except OSError:
        lost.append("mode")
    if mode != stat.S_IMODE(status.st_mode):
        lost.append("mode")
    try:
        os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
    except PermissionError:
        lost.append("mtime")
    if os.fstat(copy).st_mtime_ns != status.st_mtime_ns:
        lost.append("mtime")
    return tuple(dict.fromkeys(lost))


def _copy_owner(copy: int, status: os.stat_result) -> list[str]:
    """Give the copy its source's owner and group, or at least the group; return ``owner`` if it has not both."""
    for owner in (status.st_uid, -1):
        with suppress(OSError):  # only root may give files away; what came of it is looked at
            os.fchown(copy, owner, status.st_gid)
            break
    kept = os.fstat(copy)
    return [] if (kept.st_uid, kept.st_gid) == (status.st_uid, status.st_gid) else ["owner"]


def _copy_attributes(source: int, copy: int, *, with_acl: bool) -> list[str]:
    """Copy what users may set; return the names of what was left behind.

    ``security.*`` and ``trusted.*`` are left: file capabilities from a foreign disk would take effect on this one. An
    access control list (``system.*``) is about an owner and a group, and is left where the copy has others.
    """
    kept = (_USER_ATTRIBUTES, _ACCESS_LISTS) if with_acl else (_USER_ATTRIBUTES,)
    try:
        names = os.listxattr(source)
    except OSError:
        return []
    lost = []
    for name in names:
        try:
            if not name.startswith(kept):
                raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), name)
            os.setxattr(copy, name, os.getxattr(source, name))
        except OSError:
            lost.append(name)
    return lost


def _safe_mode(mode: int, lost: Sequence[str]) -> int:
    """Return the permissions of a copy, never wider than its source's and never with the bits 07000.

    Setuid on a copy with another owner would let anybody run a stranger's program as that owner. Where owner or group
    could not be kept, or an access list was left behind, other people are the group and the others than were meant:
    both get only what the source gave to both.
    """
    mode = stat.S_IMODE(mode) & 0o777
    if not any(name == "owner" or name.startswith(_ACCESS_LISTS) for name in lost):
        return mode
    both = mode >> 3 & mode & 0o007
    return mode & 0o700 | both << 3 | both
