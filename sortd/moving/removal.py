"""The undo of copies and links: they are removed, and the originals stay (steps U1 to U3 of docs/durability.md).

A copy is removed only if it is unchanged and its original has the same content, a hard link only if it is another name
of the original, a symbolic link only if it has the recorded target and that exists.
"""

import os
import stat
from dataclasses import replace

from sortd.files import stamp_of, sync_folder
from sortd.moving.copy import has_writer, hide, restore_name, sha256_at
from sortd.moving.fs import Folders, is_version, lstat_at
from sortd.moving.plan import NO_STAMP, new_token
from sortd.store.records import MoveFile, MoveProgress, MoveRecord, Record, Role

_CHANGED = "changed since it was put there; left where it is"


def plan_removal(folders: Folders, record: Record) -> tuple[MoveRecord, list[str]] | str:
    """Return the move that removes the copies or links of a record, and those that remain; or why it is refused.

    Only a copy whose times changed is read here: the loop waits for the plan, and the copier thread removes.
    Raises OSError.
    """
    move = record.move
    copies, originals = folders.open(move.destination), folders.open(move.source)
    files: list[MoveFile] = []
    left: list[str] = []
    for file in move.files:
        mark = file.moved_stamp or NO_STAMP
        removed = MoveFile(Role.REMOVED, file.final, file.name, mark, content=file.content, body=file.body)
        problem = "no longer there: moved or removed since"
        if file.final and (copy := lstat_at(copies, file.final)) is not None:
            is_copy = _is_recorded(file, copy, lstat_at(originals, file.name))
            problem = "" if is_copy else _why_kept(copies, file.final, originals, removed)
        if not problem:
            files.append(removed)
        elif file is move.image:
            return problem
        else:
            left.append(file.final)
    return MoveRecord(new_token(), move.destination, move.source, tuple(files)), left


def remove_files(folders: Folders, move: MoveRecord) -> MoveRecord:
    """Remove the files of an undo; idempotent, so that this is its recovery as well. Raises OSError."""
    copies, originals = folders.open(move.source), folders.open(move.destination)
    kept = [position for position in range(len(move.files)) if not _remove(copies, originals, move, position)]
    sync_folder(copies)
    if 0 in kept:
        return move.failed("it or its original changed meanwhile; left where it is")
    status = lstat_at(originals, move.image.wanted)
    mark = move.image.stamp if status is None else stamp_of(status)
    image = replace(move.image, final=move.image.wanted, moved_stamp=mark)
    message = f"left where they are: {', '.join(move.files[one].name for one in kept)}" if kept else ""
    return replace(move, files=(image, *move.files[1:]), progress=MoveProgress.DONE, message=message)


def _is_recorded(file: MoveFile, copy: os.stat_result, original: os.stat_result | None) -> bool:
    """Return whether a copy and its original are those of the record; ``remove_files`` reads them before it removes."""
    if file.role is not Role.COPY or file.moved_stamp is None or original is None:
        return False
    return is_version(copy, file.moved_stamp) and is_version(original, file.stamp)


def _remove(copies: int, originals: int, move: MoveRecord, position: int) -> bool:
    """Remove one file by way of its tombstone; return False if it is kept."""
    file, tombstone = move.files[position], move.tombstone(position)
    if lstat_at(copies, tombstone) is None:
        if lstat_at(copies, file.name) is None:
            return True
        if _why_kept(copies, file.name, originals, file):
            return False
        hide(copies, file.name, tombstone)
    if not _why_kept(copies, tombstone, originals, file, is_hidden=True):
        os.unlink(tombstone, dir_fd=copies)
        return True
    restore_name(copies, tombstone, move, position)
    return False


def _why_kept(copies: int, name: str, originals: int, file: MoveFile, *, is_hidden: bool = False) -> str:
    """Return why a copy or link must not be removed; empty if it may. A hidden one is checked for writers, too."""
    copy, original = lstat_at(copies, name), lstat_at(originals, file.wanted)
    if original is None or copy is None:
        return "its original is gone; left where it is"
    if file.body or not stat.S_ISREG(copy.st_mode):
        is_link = stat.S_ISLNK(copy.st_mode) and os.fsencode(os.readlink(name, dir_fd=copies)) == file.body
        return "" if is_link else _CHANGED
    if (copy.st_dev, copy.st_ino) == (original.st_dev, original.st_ino):
        return "" if copy.st_nlink > 1 else "it is the original itself; left where it is"
    if is_hidden and has_writer(copies, name):
        return _CHANGED
    if not file.content or sha256_at(originals, file.wanted) != file.content:
        return "its original was changed or replaced; left where it is"
    return "" if sha256_at(copies, name) == file.content else _CHANGED
