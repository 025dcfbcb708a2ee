"""The move to another file system: copy, publish the copy, remove the source (steps X1 to X12 of docs/durability.md).

Code that fails does not clean up: the caller runs ``recovery.recover``, as after a crash.
"""

import errno
import os
from collections.abc import Callable, Iterable
from dataclasses import replace

from sortd.errors import ChangedError, DestinationError, VanishedError
from sortd.events import Writer
from sortd.files import stamp_of, sync_folder
from sortd.moving.fs import FILE_FLAGS, Folders, check_source, is_version, lstat_at, rename_new, writer_of
from sortd.moving.parts import Copy, copy_to_part, make_part, never, remove_obsolete, remove_part, sha256_at
from sortd.moving.plan import FreeNames, names_of_one
from sortd.store.records import MoveFile, MoveProgress, MoveRecord

Advance = Callable[[MoveRecord], None]  # writes the progress of a move durably (Journal.advance)

_NO_NOREPLACE = frozenset({errno.EINVAL, errno.ENOSYS})
_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK})


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
    check_source(source, move.source)  # otherwise every retry would make a copy and remove it again
    sealed = _copy_all(source, destination, move, interrupted)
    advance(sealed)  # X5
    for attempt, finals in names.candidates(folders, sealed):
        files = tuple(replace(file, final=final) for file, final in zip(sealed.files, finals, strict=True))
        named = replace(sealed, files=files)
        if _publish_all(destination, named, advance):  # X6
            names.remember(folders, named, attempt, finals)
            return remove_sources(folders, mark_published(destination, named, advance))
    raise AssertionError("candidates() raises an error at its end")


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
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    placeholder = os.open(final, flags, 0o600, dir_fd=folder)
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
    """Give a hidden file the first of these names that is free, and return it.

    Raises:
        DestinationError: none is free.
    """
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
        if file.leaves:
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


def _publish_all(destination: int, move: MoveRecord, advance: Advance) -> bool:
    """Publish every part under its final name, or none of them because a name is taken."""
    done: list[tuple[str, str]] = []
    for position, file in enumerate(move.files):
        part = move.part_name(position)
        try:
            publish_part(destination, part, file.final, lambda: advance(move))
        except FileExistsError:
            for published, name in reversed(done):
                publish_part(destination, name, published)
            return False
        done.append((part, file.final))
    return True


def _remove_source(source: int, destination: int, move: MoveRecord, position: int) -> bool:
    """Remove one source by way of its tombstone; return False if it is kept."""
    file, tombstone = move.files[position], move.tombstone(position)
    visible = lstat_at(source, file.name)
    if visible is not None and lstat_at(source, tombstone) is None:
        if not is_version(visible, file.stamp) or not is_copy_intact(destination, file, file.final):
            return False
        _hide(source, file.name, tombstone)
    status = lstat_at(source, tombstone)
    if status is None:
        return True
    if (
        is_version(status, file.stamp)
        and not _has_writer(source, tombstone)
        and is_copy_intact(destination, file, file.final)
    ):
        os.unlink(tombstone, dir_fd=source)
        return True
    restore_name(source, tombstone, move, position)
    return False


def _hide(folder: int, name: str, tombstone: str) -> None:
    try:
        rename_new(folder, name, folder, tombstone)
    except OSError as error:
        if error.errno not in _NO_NOREPLACE:
            raise
        # The tombstone has 64 random bits: no other file has this name, so nothing is overwritten.
        os.rename(name, tombstone, src_dir_fd=folder, dst_dir_fd=folder)


def _has_writer(folder: int, name: str) -> bool:
    descriptor = os.open(name, FILE_FLAGS, dir_fd=folder)
    try:
        return writer_of(descriptor) is Writer.PRESENT
    finally:
        os.close(descriptor)
