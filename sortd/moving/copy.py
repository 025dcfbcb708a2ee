"""The move to another file system: copy, publish the copy, remove the source (steps X1 to X12 of docs/durability.md).

A copy is durable under a hidden name before it is published, with all metadata that the file system of its folder can
keep. Code that fails does not clean up: the caller runs ``recovery.recover``, as after a crash.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from sortd.errors import BusyError, ChangedError, DestinationError, VanishedError
from sortd.events import Writer
from sortd.files import open_descriptor, sha256_of, stamp_of, sync_folder
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
from sortd.moving.plan import FreeNames, names_of_one
from sortd.store.records import MoveFile, MoveProgress, MoveRecord, Role

Advance = Callable[[MoveRecord], None]  # writes the progress of a move durably (Journal.advance)

_NO_NOREPLACE = frozenset({errno.EINVAL, errno.ENOSYS})
_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK})

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


def move_by_copy(
    folders: Folders,
    move: MoveRecord,
    advance: Advance,
    interrupted: Callable[[], bool] = never,
    *,
    names: FreeNames,
) -> MoveRecord:
    """Move files to another file system; the journal must contain the move with progress INTENDED (X1).

    ``interrupted`` is called between chunks. After any error the caller must recover the move.

    Raises:
        OSError, JournalError: a disk returned an error.
        SourceError: the source folder cannot be written.
        DestinationError: no name is free.
        BusyError, ChangedError, VanishedError: the file is in use, is another version, or is gone.
    """
    source, destination = folders.open(move.source), folders.make(move.destination)
    if not move.stays:
        check_source(source, move.source)  # otherwise every retry would make a copy and remove it again
    sealed = _copy_all(source, destination, move, interrupted)
    advance(sealed)  # X5
    named = names.place(folders, sealed, lambda finals: publish_all(destination, sealed, finals, advance))  # X6
    return remove_sources(folders, mark_published(destination, named, advance))


def mark_published(destination: int, move: MoveRecord, advance: Advance) -> MoveRecord:
    """Sync the published names, then record them (X7, X8); only after this may the sources be removed."""
    sync_folder(destination)
    files = tuple(with_final(destination, file, file.final) for file in move.files)
    published = replace(move, progress=MoveProgress.PUBLISHED, files=files)
    advance(published)
    return published


def remove_sources(folders: Folders, move: MoveRecord) -> MoveRecord:
    """Remove the sources of published copies (X9 to X11); idempotent.

    A source that changed, that has a writer, or whose copy is gone is kept: two copies are better than none.
    """
    source, destination = folders.open(move.source), folders.open(move.destination)
    kept = [
        file.name
        for position, file in enumerate(move.files)
        if file.leaves and not _remove_source(source, destination, move, position)
    ]
    remove_obsolete(folders, move)
    sync_folder(source)
    message = f"also kept in {move.source}, because it changed meanwhile: {', '.join(kept)}" if kept else move.message
    return replace(move, progress=MoveProgress.DONE, message=message)


def with_final(destination: int, file: MoveFile, final: str) -> MoveFile:
    """Return a file of a move with its final name and the version found under that name."""
    status = lstat_at(destination, final)
    return replace(file, final=final, moved_stamp=None if status is None else stamp_of(status))


def publish_part(folder: int, part: str, final: str, note: Callable[[], None] = lambda: None) -> None:
    """Rename a file to a name that must be free, by the first of three methods that the file system supports.

    ``note`` is called before an empty placeholder is created, where renames can overwrite and links are impossible
    (exFAT).

    Raises:
        FileExistsError: the name is taken.
        ChangedError: another program replaced the placeholder.
    """
    try:
        rename_new(folder, part, folder, final)
    except OSError as error:
        if error.errno not in _NO_NOREPLACE:
            raise
    else:
        return
    try:
        os.link(part, final, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    else:
        os.unlink(part, dir_fd=folder)
        return
    note()
    placeholder = os.open(final, _PART_FLAGS, 0o600, dir_fd=folder)
    ours = os.fstat(placeholder)
    os.close(placeholder)  # FUSE keeps a file that is replaced while it is open as a hidden file
    there = lstat_at(folder, final)
    if there is None or (there.st_ino, there.st_size) != (ours.st_ino, 0):
        raise ChangedError(f"{final}: another program took this name")
    os.rename(part, final, src_dir_fd=folder, dst_dir_fd=folder)


def is_copy_intact(destination: int, file: MoveFile, name: str) -> bool:
    """Tell whether a name has the copy of a file, by inode or, where inode numbers do not last, by content."""
    status = lstat_at(destination, name)
    size = len(file.body) if file.body else file.stamp.size
    if status is None or status.st_size != size:
        return False
    return status.st_ino == file.copy_inode or sha256_at(destination, name) == file.content


def publish_under_free_name(folder: int, hidden: str, names: Iterable[str]) -> str:
    """Give a hidden file the first of these names that is free, and return it. Raises DestinationError."""
    for name in names:
        try:
            publish_part(folder, hidden, name)
        except FileExistsError:
            continue
        return name
    raise DestinationError(f"no name is free for {hidden}")


def restore_name(folder: int, hidden: str, move: MoveRecord, position: int) -> None:
    """Give a hidden source its original name again, or the next free one."""
    original = replace(move, files=tuple(replace(file, wanted=file.name) for file in move.files))
    publish_under_free_name(folder, hidden, names_of_one(original, position))


def _copy_all(source: int, destination: int, move: MoveRecord, interrupted: Callable[[], bool]) -> MoveRecord:
    files, lost = [], set(move.lost)
    for position, file in enumerate(move.files):
        if file.may_be_last:
            copy = _copy_source(source, destination, move, position, interrupted)
        else:
            copy = make_part(source, destination, move, position)
        lost.update(copy.lost)
        files.append(replace(file, copy_inode=copy.inode, content=copy.content))
    return replace(move, files=tuple(files), lost=tuple(sorted(lost)), progress=MoveProgress.PUBLISHING)


def _copy_source(
    source: int, destination: int, move: MoveRecord, position: int, interrupted: Callable[[], bool]
) -> Copy:
    file, part = move.files[position], move.part_name(position)
    path = f"{move.source}/{file.name}"
    try:
        descriptor = os.open(file.name, FILE_FLAGS, dir_fd=source)
    except FileNotFoundError as error:
        raise VanishedError(f"{path}: the file is gone") from error
    try:
        remove_part(destination, part)
        copy = copy_to_part(descriptor, destination, part, interrupted)
        by_name = lstat_at(source, file.name)
        if by_name is None or not is_version(by_name, file.stamp) or not is_version(os.fstat(descriptor), file.stamp):
            raise ChangedError(f"{path}: the file changed while it was copied")
    finally:
        os.close(descriptor)
    if file.content not in {"", copy.content}:
        raise ChangedError(f"{path}: the content is not the one that was classified")
    return copy


def publish_all(destination: int, sealed: MoveRecord, finals: tuple[str, ...], advance: Advance) -> MoveRecord | None:
    """Publish every part of a move under these names; publish none and return None if a name is taken."""
    done: list[tuple[str, str]] = []
    files = tuple(replace(file, final=final) for file, final in zip(sealed.files, finals, strict=True))
    move = replace(sealed, files=files)
    for position, file in enumerate(move.files):
        part = move.part_name(position)
        try:
            publish_part(destination, part, file.final, lambda: advance(move))
        except FileExistsError:
            for published, name in reversed(done):
                publish_part(destination, name, published)
            return None
        done.append((part, file.final))
    return move


def _remove_source(source: int, destination: int, move: MoveRecord, position: int) -> bool:
    """Remove one source by way of its tombstone; return False if it is kept."""
    file, tombstone = move.files[position], move.tombstone(position)
    visible = lstat_at(source, file.name)
    if visible is not None and lstat_at(source, tombstone) is None:
        if not is_version(visible, file.stamp) or not is_copy_intact(destination, file, file.final):
            return False
        hide(source, file.name, tombstone)
    status = lstat_at(source, tombstone)
    if status is None:
        return True
    if (
        is_version(status, file.stamp)
        and not has_writer(source, tombstone)
        and is_copy_intact(destination, file, file.final)
    ):
        os.unlink(tombstone, dir_fd=source)
        return True
    restore_name(source, tombstone, move, position)
    return False


def hide(folder: int, name: str, tombstone: str) -> None:
    """Rename a file to its tombstone, which removes its name atomically."""
    try:
        rename_new(folder, name, folder, tombstone)
    except OSError as error:
        if error.errno not in _NO_NOREPLACE:
            raise
        # The tombstone has 64 random bits: no other file has this name, so nothing is overwritten.
        os.rename(name, tombstone, src_dir_fd=folder, dst_dir_fd=folder)


def has_writer(folder: int, name: str) -> bool:
    """Tell whether a process can write a file."""
    with open_descriptor(name, FILE_FLAGS, folder=folder) as descriptor:
        return writer_of(descriptor) is Writer.PRESENT


# ---------------------------------------------------------------- one durable copy under a hidden name


def copy_to_part(source: int, folder: int, part: str, interrupted: Callable[[], bool] = never) -> Copy:
    """Copy an open file to a new part, which must not exist, keeping holes, and sync it.

    A failed fsync must not be retried, because the kernel may have dropped the data: the caller removes the copy.
    ``interrupted`` is called between chunks.

    Raises:
        BusyError: interrupted, or the file became shorter.
    """
    before = os.fstat(source)
    with open_descriptor(part, _PART_FLAGS, 0o600, folder=folder) as copy:
        content = _copy_bytes(source, copy, before.st_size, interrupted)
        lost = copy_metadata(source, copy, before)
        os.fsync(copy)
        return Copy(os.fstat(copy).st_ino, content, lost)


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
    with open_descriptor(file.name, FILE_FLAGS, folder=source) as descriptor:
        if not is_version(os.fstat(descriptor), file.stamp):
            raise ChangedError(f"{move.source}/{file.name}: the file was changed or replaced")
        return copy_to_part(descriptor, destination, part)


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
        return sha256_of(name, folder=folder)
    except FileNotFoundError:
        return ""


def write_part(folder: int, part: str, body: bytes) -> Copy:
    """Write bytes of sortd's own to a new part and sync it."""
    with open_descriptor(part, _PART_FLAGS, folder=folder) as descriptor:
        _write(descriptor, body)
        os.fsync(descriptor)
        return Copy(os.fstat(descriptor).st_ino, hashlib.sha256(body).hexdigest(), ())


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


def copy_metadata(source: int, copy: int, status: os.stat_result) -> tuple[str, ...]:
    """Set owner, attributes, mode and times, in this order, because the former would reset the latter.

    The copy never grants a permission that the source did not grant: see ``safe_mode``.
    """
    lost = copy_owner(copy, status)
    lost += _copy_attributes(source, copy, with_acl=not lost)
    mode = safe_mode(status.st_mode, lost)
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


def copy_owner(copy: int, status: os.stat_result) -> list[str]:
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


def safe_mode(mode: int, lost: Sequence[str]) -> int:
    """Return the permissions of a copy, never wider than its source's and never with the bits 07000.

    Setuid on a copy with another owner would run a program as that owner. If owner or group differ, or an access list
    was not copied, other people are in the group or among the others: both get only what the source granted to both.
    """
    mode = stat.S_IMODE(mode) & 0o777
    if not any(name == "owner" or name.startswith(_ACCESS_LISTS) for name in lost):
        return mode
    both = mode >> 3 & mode & 0o007
    return mode & 0o700 | both << 3 | both
