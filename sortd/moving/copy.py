"""The move to another file system: copy, publish, only then remove; each step X1 to X12 of docs/durability.md in order.

Errors are not mended here: whoever calls lets ``recovery.recover`` look at what is there, as after a crash.
"""

import errno
import os
from collections.abc import Callable, Iterable
from dataclasses import replace

from sortd.errors import ChangedError, DestinationError, VanishedError
from sortd.events import Writer
from sortd.files import stamp_of, sync_folder
from sortd.moving.fs import FILE_FLAGS, Folders, check_source, is_version, lstat_at, rename_new, writer_of
from sortd.moving.parts import Copy, content_of, copy_to_part, make_part, never, remove_obsolete, remove_part
from sortd.moving.plan import FreeNames, names_of_one
from sortd.store.records import MoveFile, MoveProgress, MoveRecord

Advance = Callable[[MoveRecord], None]  # writes durably how far a move has come (Journal.advance)

_CANNOT_REFUSE = frozenset({errno.EINVAL, errno.ENOSYS})
_CANNOT_LINK = frozenset({errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK})


def move_by_copy(
    folders: Folders,
    move: MoveRecord,
    advance: Advance,
    interrupted: Callable[[], bool] = never,
    *,
    names: FreeNames,
) -> MoveRecord:
    """Move to another file system; the journal holds the move as intended already (X1).

    Args:
        folders: the dataset's.
        move: the move, in progress INTENDED.
        advance: makes its progress durable.
        interrupted: asked between chunks of a copy.
        names: what earlier moves have found taken.

    Raises:
        OSError, JournalError: a disk refused; the caller recovers.
        SourceError: nothing may be removed from the source folder.
        DestinationError: no name is free; the caller recovers.
        BusyError, ChangedError, VanishedError: the file cannot be had as it was meant; the caller recovers.
    """
    source, destination = folders.open(move.source), folders.make(move.destination)
    check_source(source, move.source)  # else copies would be made and withdrawn at every try, for months
    sealed = _copy_all(source, destination, move, interrupted)
    advance(sealed)  # X5
    for attempt, finals in names.candidates(folders, sealed):
        files = tuple(replace(one, final=final) for one, final in zip(sealed.files, finals, strict=True))
        named = replace(sealed, files=files)
        if _publish_all(destination, named, advance):  # X6
            names.remember(folders, named, attempt, finals)
            return remove_sources(folders, mark_published(destination, named, advance))
    raise AssertionError("candidates end by an error")


def mark_published(destination: int, move: MoveRecord, advance: Advance) -> MoveRecord:
    """Sync the published names and write that they stand (X7, X8); only then may the sources go."""
    sync_folder(destination)
    published = replace(
        move,
        progress=MoveProgress.PUBLISHED,
        files=tuple(with_final(destination, file, file.final) for file in move.files),
    )
    advance(published)
    return published


def remove_sources(folders: Folders, move: MoveRecord) -> MoveRecord:
    """Remove the sources of published copies (X9 to X11); doing it again is no mistake.

    A source that is no longer the version copied, that is being written, or whose copy is gone, is kept: two
    copies are better than none.
    """
    source, destination = folders.open(move.source), folders.open(move.destination)
    kept = [
        file.name
        for position, file in enumerate(move.files)
        if file.leaves and not _remove_source(source, destination, move, position)
    ]
    remove_obsolete(folders, move)
    sync_folder(source)
    message = f"kept in {move.source} too, it changed meanwhile: {', '.join(kept)}" if kept else move.message
    return replace(move, progress=MoveProgress.DONE, message=message)


def with_final(destination: int, file: MoveFile, final: str) -> MoveFile:
    """Return a file of a move under the name that it got, with the version that stands there."""
    status = lstat_at(destination, final)
    return replace(file, final=final, moved_stamp=None if status is None else stamp_of(status))


def publish_part(destination: int, part: str, final: str, note: Callable[[], None]) -> None:
    """Rename to a name that must be free, by whatever this file system can do.

    Args:
        destination: descriptor of the folder.
        part: present name.
        final: wanted name.
        note: called before an empty placeholder is made, where renames can overwrite and nothing can be linked (exFAT).

    Raises:
        FileExistsError: the name is taken.
        ChangedError: the placeholder was replaced by somebody else's file.
    """
    try:
        rename_new(destination, part, destination, final)
    except OSError as error:
        if error.errno not in _CANNOT_REFUSE:
            raise
    else:
        return
    try:
        os.link(part, final, src_dir_fd=destination, dst_dir_fd=destination, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _CANNOT_LINK:
            raise
    else:
        os.unlink(part, dir_fd=destination)
        return
    note()
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    placeholder = os.open(final, flags, 0o600, dir_fd=destination)
    ours = os.fstat(placeholder)
    os.close(placeholder)  # what is open while it is replaced stays behind as a hidden file, by FUSE
    there = lstat_at(destination, final)
    if there is None or (there.st_ino, there.st_size) != (ours.st_ino, 0):
        raise ChangedError(f"{final}: another program took this name")
    os.rename(part, final, src_dir_fd=destination, dst_dir_fd=destination)


def is_copy_intact(destination: int, file: MoveFile, name: str) -> bool:
    """Whether the sealed copy of a file stands under a name, by inode or, where these do not last, by content."""
    status = lstat_at(destination, name)
    size = len(file.body) if file.body else file.stamp.size
    if status is None or status.st_size != size:
        return False
    return status.st_ino == file.copy_inode or content_of(destination, name) == file.content


def publish_under_free_name(folder: int, hidden: str, names: Iterable[str]) -> str:
    """Give a hidden file the first of these names that is free, and return it.

    Raises:
        DestinationError: none is.
    """
    for name in names:
        try:
            publish_part(folder, hidden, name, lambda: None)
        except FileExistsError:
            continue
        return name
    raise DestinationError(f"no name is free for {hidden}")


def restore_name(folder: int, taken: str, move: MoveRecord, position: int) -> None:
    """Give a file in a folder its own name back, or else the next free one."""
    original = replace(move, files=tuple(replace(file, wanted=file.name) for file in move.files))
    publish_under_free_name(folder, taken, names_of_one(original, position))


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
        raise VanishedError(f"{path}: nothing stands there any more") from error
    try:
        remove_part(destination, part)
        copy = copy_to_part(descriptor, destination, part, interrupted)
        by_name = lstat_at(source, file.name)
        if by_name is None or not is_version(by_name, file.stamp) or not is_version(os.fstat(descriptor), file.stamp):
            raise ChangedError(f"{path}: it changed while it was copied")
    finally:
        os.close(descriptor)
    if file.content not in {"", copy.content}:
        raise ChangedError(f"{path}: its bytes are not those that were looked at")
    return copy


def _publish_all(destination: int, move: MoveRecord, advance: Advance) -> bool:
    done: list[tuple[str, str]] = []
    for position, file in enumerate(move.files):
        part = move.part_name(position)
        try:
            publish_part(destination, part, file.final, lambda: advance(move))
        except FileExistsError:
            for published, name in reversed(done):
                publish_part(destination, name, published, lambda: None)
            return False
        done.append((part, file.final))
    return True


def _remove_source(source: int, destination: int, move: MoveRecord, position: int) -> bool:
    file, taken = move.files[position], move.tombstone(position)
    standing = lstat_at(source, file.name)
    if standing is not None and lstat_at(source, taken) is None:
        if not is_version(standing, file.stamp) or not is_copy_intact(destination, file, file.final):
            return False
        _take(source, file.name, taken)
    status = lstat_at(source, taken)
    if status is None:
        return True
    if (
        is_version(status, file.stamp)
        and not _is_written(source, taken)
        and is_copy_intact(destination, file, file.final)
    ):
        os.unlink(taken, dir_fd=source)
        return True
    restore_name(source, taken, move, position)
    return False


def _take(folder: int, name: str, taken: str) -> None:
    try:
        rename_new(folder, name, folder, taken)
    except OSError as error:
        if error.errno not in _CANNOT_REFUSE:
            raise
        # The name holds 64 random bits: nobody else has it, so that there is nothing to overwrite.
        os.rename(name, taken, src_dir_fd=folder, dst_dir_fd=folder)


def _is_written(folder: int, name: str) -> bool:
    descriptor = os.open(name, FILE_FLAGS, dir_fd=folder)
    try:
        return writer_of(descriptor) is Writer.PRESENT
    finally:
        os.close(descriptor)
