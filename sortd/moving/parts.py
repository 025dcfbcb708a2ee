"""Complete, durable copies under hidden names, with all metadata that the file system of their folder can keep.

Everything here raises OSError if a disk returns an error.
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
"""Write-back starts after so many bytes: one fsync of a whole film could not be interrupted for minutes."""

_USER_ATTRIBUTES, _ACCESS_LISTS = "user.", "system."

_PART_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Copy:
    """A durable copy with its part name."""

    inode: int
    content: str  # hexadecimal sha256
    lost: tuple[str, ...]  # metadata that could not be kept


def never() -> bool:
    """Return False."""
    return False


def copy_to_part(source: int, folder: int, part: str, interrupted: Callable[[], bool] = never) -> Copy:
    """Copy an open file to a new part, which must not exist, keeping holes, and sync it.

    A failed fsync must not be retried, because the kernel may have dropped the data: the caller removes the copy.
    ``interrupted`` is called between chunks.

    Raises:
        BusyError: interrupted, or the file became shorter.
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


def remove_part(folder: int, part: str) -> None:
    """Remove a part if it exists."""
    with suppress(FileNotFoundError):
        os.unlink(part, dir_fd=folder)


def make_part(source: int, destination: int, move: MoveRecord, position: int) -> Copy:
    """Make the part of a file that does not leave the source: a copy of a shared companion, or a reason.

    Raises:
        ChangedError: the shared companion is another version.
    """
    file, part = move.files[position], move.part_name(position)
    remove_part(destination, part)
    if file.role is Role.REASON:
        return write_part(destination, part, file.body)
    descriptor = os.open(file.name, FILE_FLAGS, dir_fd=source)
    try:
        if not is_version(os.fstat(descriptor), file.stamp):
            raise ChangedError(f"{move.source}/{file.name}: the file was changed or replaced")
        return copy_to_part(descriptor, destination, part)
    finally:
        os.close(descriptor)


def remove_obsolete(folders: Folders, move: MoveRecord) -> None:
    """Remove the files that sortd once made beside an image that leaves; changed ones are kept."""
    folder = folders.open(move.source)
    for file in move.obsolete:
        status = lstat_at(folder, file.name)
        if status is not None and is_version(status, file.stamp):
            os.unlink(file.name, dir_fd=folder)


def sha256_at(folder: int, name: str) -> str:
    """Return the hexadecimal sha256 of a file; the empty string if it does not exist."""
    try:
        descriptor = open_regular(name, folder=folder)
    except FileNotFoundError:
        return ""
    try:
        return sha256_of(descriptor)
    finally:
        os.close(descriptor)


def write_part(folder: int, part: str, body: bytes) -> Copy:
    """Write bytes of sortd's own to a new part and sync it."""
    descriptor = os.open(part, _PART_FLAGS, 0o666, dir_fd=folder)
    try:
        _write(descriptor, body)
        os.fsync(descriptor)
        return Copy(os.fstat(descriptor).st_ino, hashlib.sha256(body).hexdigest(), ())
    finally:
        os.close(descriptor)


def _copy_bytes(source: int, copy: int, size: int, interrupted: Callable[[], bool]) -> str:
    digest = hashlib.sha256()
    at = written = 0
    for start, end in _data_ranges(source, size):
        _hash_zeros(digest.update, start - at, interrupted)
        os.lseek(source, start, os.SEEK_SET)
        os.lseek(copy, start, os.SEEK_SET)
        at = start
        while at < end:
            _raise_if(interrupted)
            chunk = os.read(source, min(CHUNK_BYTES, end - at))
            if not chunk:
                raise BusyError("the file became shorter while it was copied; sortd will try again")
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


def _data_ranges(source: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges of a sparse file that contain data; one for the whole file if holes are not supported."""
    at = 0
    while at < size:
        try:
            start = os.lseek(source, at, os.SEEK_DATA)
            end = os.lseek(source, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole until the end
                return
            if error.errno not in {errno.EINVAL, errno.ENOTSUP}:
                raise
            start, end = at, size
        yield start, min(end, size)
        at = end


def _raise_if(interrupted: Callable[[], bool]) -> None:
    if interrupted():
        raise BusyError("the copy to another file system was interrupted; it will be made again later")


def _hash_zeros(update: Callable[[bytes], None], count: int, interrupted: Callable[[], bool]) -> None:
    """Hash a hole, which takes as long as if its zeros were on the disk."""
    zeros = bytes(min(count, CHUNK_BYTES))
    while count > 0:
        _raise_if(interrupted)
        update(zeros[: min(count, CHUNK_BYTES)])
        count -= CHUNK_BYTES


def _write(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _copy_metadata(source: int, copy: int, status: os.stat_result) -> tuple[str, ...]:
    """Set owner, attributes, mode and times, in this order, because the former would reset the latter.

    The copy never grants a permission that the source did not grant: see ``_safe_mode``.
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
    with suppress(PermissionError):  # the times are checked below
        os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
    if os.fstat(copy).st_mtime_ns != status.st_mtime_ns:
        lost.append("mtime")
    return tuple(dict.fromkeys(lost))


def _copy_owner(copy: int, status: os.stat_result) -> list[str]:
    """Give the copy the owner and group of its source, or at least the group; return ``["owner"]`` if one differs."""
    for owner in (status.st_uid, -1):
        with suppress(OSError):  # only root may change the owner; the result is checked below
            os.fchown(copy, owner, status.st_gid)
            break
    kept = os.fstat(copy)
    return [] if (kept.st_uid, kept.st_gid) == (status.st_uid, status.st_gid) else ["owner"]


def _copy_attributes(source: int, copy: int, *, with_acl: bool) -> list[str]:
    """Copy the attributes that users can set; return the names of the others.

    ``security.*`` and ``trusted.*`` are not copied: file capabilities from another disk would take effect on this one.
    An access control list (``system.*``) refers to an owner and a group, so it is not copied if these differ.
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

    Setuid on a copy with another owner would run a program as that owner. If owner or group differ, or an access list
    was not copied, other people are in the group or among the others: both get only what the source granted to both.
    """
    mode = stat.S_IMODE(mode) & 0o777
    if not any(name == "owner" or name.startswith(_ACCESS_LISTS) for name in lost):
        return mode
    both = mode >> 3 & mode & 0o007
    return mode & 0o700 | both << 3 | both
