"""Links to images that stay in Images/, hard or symbolic (steps L1 to L5 of docs/durability.md), and their recovery.

A link is made under a hidden name, and the journal names the final one before each attempt to rename. The inode does
not identify a hard link, because a user may have made another one; a hidden name that is gone shows that the link has
the name in the journal.
"""

import os
import stat
from dataclasses import replace

from sortd.errors import VanishedError
from sortd.files import sync_folder
from sortd.moving.copy import Advance, publish_all, publish_under_free_name, remove_part, with_final
from sortd.moving.fs import Folders, check_unchanged, lstat_at
from sortd.moving.plan import FreeNames, names_of_one
from sortd.store.records import MoveFile, MoveProgress, MoveRecord, Record, Role


def link_files(
    folders: Folders, move: MoveRecord, advance: Advance, *, names: FreeNames, earlier: Record | None = None
) -> MoveRecord:
    """Link an image and its companions into a class; the journal must contain the move with progress INTENDED (L1).

    If an ``earlier`` move made this link, which shows every later version of the image, it is kept. After any error the
    caller must recover the move.

    Raises:
        OSError, JournalError: a disk returned an error, or the file system has no such links.
        DestinationError: no name is free.
        ChangedError, VanishedError: a file is another version, or gone.
    """
    source, destination = folders.open(move.source), folders.make(move.destination)
    if (made := _made_earlier(destination, move, earlier)) is not None:
        return made
    for position in range(len(move.files)):
        _make_link(source, destination, move, position)  # L2
    sealed = replace(move, progress=MoveProgress.PUBLISHING)
    linked = names.place(folders, sealed, lambda finals: _publish(destination, sealed, finals, advance))
    return _ended(destination, linked)


def is_link_to(folder: int, name: str, file: MoveFile) -> bool:
    """Tell whether a name is the link of a file that its move made: by the inode, or by the target."""
    status = lstat_at(folder, name)
    if status is None:
        return False
    if file.role is Role.SYMLINK:
        return stat.S_ISLNK(status.st_mode) and os.fsencode(os.readlink(name, dir_fd=folder)) == file.body
    return stat.S_ISREG(status.st_mode) and status.st_ino == file.stamp.inode


def recover_links(folders: Folders, move: MoveRecord) -> MoveRecord:
    """Complete or remove the links of a move that did not end; unchanged if the folder is missing.

    A link that is the last name of its file is published instead of removed.
    """
    try:
        destination = folders.open(move.destination)
    except FileNotFoundError:
        return move.failed("nothing was linked") if move.progress is MoveProgress.INTENDED else move
    made = _published(destination, move)
    if 0 in made and len(made) == len(move.files):
        return _ended(destination, move)
    kept: dict[int, str] = {}
    for position, file in enumerate(move.files):
        part = move.part_name(position)
        name = made.get(position, part)
        if _is_last_name(destination, name):
            is_hidden = name == part
            kept[position] = (
                publish_under_free_name(destination, part, names_of_one(move, position)) if is_hidden else name
            )
        elif position in made and is_link_to(destination, name, file):
            os.unlink(name, dir_fd=destination)
        remove_part(destination, part)
    sync_folder(destination)
    if 0 not in kept:
        return move.failed("the links were removed")
    files = tuple(with_final(destination, move.files[position], name) for position, name in kept.items())
    message = "the original is gone; its link was the last one and was used"
    return replace(move, files=files, progress=MoveProgress.DONE, message=message)


def _made_earlier(destination: int, move: MoveRecord, earlier: Record | None) -> MoveRecord | None:
    if earlier is None or (earlier.move.destination, earlier.move.image.role) != (move.destination, move.image.role):
        return None
    final = earlier.move.image.final
    if not final or not is_link_to(destination, final, move.image):
        return None
    return replace(move, files=(with_final(destination, move.image, final),), progress=MoveProgress.DONE)


def _make_link(source: int, destination: int, move: MoveRecord, position: int) -> None:
    file, part = move.files[position], move.part_name(position)
    path = f"{move.source}/{file.name}"
    remove_part(destination, part)
    if file.role is Role.SYMLINK:
        check_unchanged(source, file.name, file.stamp, path)
        os.symlink(file.body, part, dir_fd=destination)
        return
    try:
        os.link(file.name, part, src_dir_fd=source, dst_dir_fd=destination, follow_symlinks=False)
    except FileNotFoundError as error:
        raise VanishedError(f"{path}: the file is gone") from error
    except OSError as error:
        said = f"a hard link is impossible there ({error.strerror}); set `action: copy` or `action: symlink`"
        raise OSError(error.errno, said) from error
    check_unchanged(destination, part, file.stamp, path)


def _publish(destination: int, sealed: MoveRecord, finals: tuple[str, ...], advance: Advance) -> MoveRecord | None:
    """Record the names to try (L3), then rename to them (L4); return None if one is taken."""
    files = tuple(replace(file, final=final) for file, final in zip(sealed.files, finals, strict=True))
    advance(replace(sealed, files=files))
    return publish_all(destination, sealed, finals, advance)


def _ended(destination: int, move: MoveRecord) -> MoveRecord:
    """Return a move whose links are all published, after a sync of their names (L5)."""
    sync_folder(destination)
    files = tuple(with_final(destination, file, file.final) for file in move.files)
    return replace(move, files=files, progress=MoveProgress.DONE)


def _published(destination: int, move: MoveRecord) -> dict[int, str]:
    """Return the final names of the published links, by position."""
    made = {}
    for position, file in enumerate(move.files):
        if not file.final or not is_link_to(destination, file.final, file):
            continue
        part, there = lstat_at(destination, move.part_name(position)), lstat_at(destination, file.final)
        # Both names exist where renames are links and unlinks.
        if part is None or (there is not None and part.st_ino == there.st_ino):
            made[position] = file.final
    for position in made:
        remove_part(destination, move.part_name(position))
    return made


def _is_last_name(folder: int, name: str) -> bool:
    status = lstat_at(folder, name)
    return status is not None and stat.S_ISREG(status.st_mode) and status.st_nlink == 1
