"""Removal of folders in Images/ that sortd emptied, a day later.

A folder was emptied by sortd if it last changed (its mtime, see inode(7)) when a move out of it was made, as the
journal has it, or if its only folders were removed here. Whatever a person or a program does in a folder sets its
mtime. rmdir(2) removes no folder that has an entry, so that nothing can be lost.
"""

import os
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path

from sortd.layout import Area
from sortd.moving.fs import Folders
from sortd.store.history import History

AFTER_SECONDS = 86_400.0
MOST_DEPTH = 200  # folders below others in Images/; deeper ones stay, with those above them
ENTRIES_AT_ONCE = 500  # entries of a folder that are read in one step


def remove_emptied_folders(root: Path, history: History, now: float) -> Iterator[str | None]:
    """Remove the folders below Images/ that sortd emptied a day ago; yield the path of each, and None after each step.

    ``now`` is in seconds since the epoch. Raises JournalError.
    """
    with suppress(OSError):
        yield from _removed_below(root, Area.IMAGES.value, history, now - AFTER_SECONDS)


def _removed_below(
    root: Path, folder: str, history: History, before: float
) -> Generator[str | None, None, tuple[int, int]]:
    """Remove the emptied folders below one, the deepest first; return how many were removed, and what is left."""
    if folder.count("/") > MOST_DEPTH:
        return 0, 1
    inner, count, removed = list[str](), 0, 0
    with os.scandir(root / folder) as entries:
        for entry in entries:
            count += 1
            if entry.is_dir(follow_symlinks=False):
                inner.append(entry.name)
            if count % ENTRIES_AT_ONCE == 0:
                yield None
    yield None
    for name in inner:
        place = f"{folder}/{name}"
        with suppress(OSError):  # it is gone, has an entry again, or cannot be removed
            changed_at = os.lstat(root / place).st_mtime
            gone, left = yield from _removed_below(root, place, history, before)
            if left or changed_at > before or not (gone or history.has_move_out_of(place, changed_at)):
                continue
            with Folders(root) as folders:
                os.rmdir(name, dir_fd=folders.open(folder))
            removed += 1
            yield os.fspath(root / place)
    return removed, count - removed
