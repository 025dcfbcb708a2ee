"""The residence: which state folder is a dataset's own, also after the dataset was renamed.

A state folder is named by its dataset's name and place. A dataset that is renamed takes its journal along: what was
filed, held and corrected does not depend on how the folder above is called.
"""

import json
import os
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from sortd.commands.journals import JOURNAL_FILE
from sortd.errors import LayoutError
from sortd.files import open_folder, read_regular, write_atomic
from sortd.layout import MARKER, Layout

POINTER = "state"
"""In the marker folder: names the state folder, for people and for a dataset that was renamed."""

POINTER_BYTES = 8192
"""More than a path can have: whoever owns the dataset may have put anything under that name."""

OWNER_FILE = "dataset.json"
"""In the state folder: whose it is, by path and by the inode of the marker folder."""


def settled_folder(layout: Layout, state: Path) -> Path:
    """Return the state folder of a dataset, which is there then; the one that it had under another name is renamed.

    Only a folder that was renamed is known again, by the inode of its marker: a copy of a dataset has a journal of its
    own, and so has one on another disk.

    Raises:
        LayoutError: it cannot be made.
    """
    folder = layout.state_folder(state)
    try:
        is_begun = folder.is_dir() and any(folder.iterdir())
        if not is_begun and (former := _former(layout, state)) is not None:
            _rename(former, folder)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise LayoutError(f"{folder} cannot be made: {error.strerror}; mend its rights, or set state_dir") from error
    return folder


def known_folder(layout: Layout, state: Path) -> Path:
    """Return the state folder of a dataset as ``settled_folder`` would find it; nothing is made or renamed."""
    folder = layout.state_folder(state)
    is_begun = folder.is_dir() and any(folder.iterdir())
    return folder if is_begun else _former(layout, state) or folder


def write_down(layout: Layout, folder: Path) -> None:
    """Let the dataset and its state folder name each other; where they do already nothing is written to either disk.

    A disk that is full must keep no sortd from starting: moves within a file system take no room.

    Raises:
        LayoutError: one of them cannot be written.
    """
    try:
        with open_folder(layout.marker) as marker:
            owner = {"root": os.fspath(layout.root), "marker": os.fstat(marker).st_ino}
            _write(layout.marker / POINTER, os.fsencode(folder) + b"\n", marker)
        _write(folder / OWNER_FILE, json.dumps(owner).encode() + b"\n")
    except OSError as error:
        raise LayoutError(
            f"{error.filename} cannot be written: {error.strerror}; mend its rights or room, or move away what "
            "stands under its name"
        ) from error


def _former(layout: Layout, state: Path) -> Path | None:
    """Return the state folder that this very dataset had under another name."""
    try:
        with open_folder(layout.marker) as folder:
            own = os.fstat(folder)
            named = os.fsdecode(read_regular(layout.marker / POINTER, limit=POINTER_BYTES, folder=folder)).strip()
        former = Path(named)
        if os.path.realpath(former.parent) != os.path.realpath(state) or not (former / JOURNAL_FILE).is_file():
            return None
        owner = json.loads(read_regular(former / OWNER_FILE))
        marker, root = int(owner["marker"]), Path(owner["root"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None  # never written, or damaged: a journal of its own begins
    return former if own.st_ino == marker and not _is_elsewhere(root, own) else None


def _is_elsewhere(root: Path, own: os.stat_result) -> bool:
    """Whether another dataset stands where the former one stood: two disks may use one inode number."""
    try:
        there = (root / MARKER).stat()
    except OSError:
        return False
    return (there.st_dev, there.st_ino) != (own.st_dev, own.st_ino)


def _rename(former: Path, folder: Path) -> None:
    """Give a state folder its new name, unless a sortd works in it."""
    lock = FileLock(former / "lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        return
    try:
        os.rename(former, folder)
        descriptor = os.open(folder.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    finally:
        lock.release()


def _write(path: Path, content: bytes, folder: int | None = None) -> None:
    """Give a file its content unless it has it; whatever else stands under its name is replaced."""
    with suppress(OSError):  # nothing there, or a link, a pipe or a large file that somebody put there
        if read_regular(path, limit=len(content), folder=folder) == content:
            return
    write_atomic(path, content, folder=folder)
