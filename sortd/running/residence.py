"""The residence: which state folder is a dataset's own, also after the dataset was renamed.

A state folder is named by its dataset's name and place. A dataset that is renamed takes its journal along: what was
filed, held and corrected does not depend on how the folder above is called.
"""

import json
import os
from pathlib import Path

from filelock import FileLock, Timeout

from sortd.commands.journals import JOURNAL_FILE
from sortd.errors import LayoutError
from sortd.layout import MARKER, Layout

POINTER = "state"
"""In the marker folder: names the state folder, for people and for a dataset that was renamed."""

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
        owner = {"root": os.fspath(layout.root), "marker": layout.marker.stat().st_ino}
        _write(layout.marker / POINTER, os.fsencode(folder) + b"\n")
        _write(folder / OWNER_FILE, json.dumps(owner).encode() + b"\n")
    except OSError as error:
        raise LayoutError(f"{error.filename} cannot be written: {error.strerror}; mend its rights or room") from error


def _former(layout: Layout, state: Path) -> Path | None:
    """Return the state folder that this very dataset had under another name."""
    try:
        named = (layout.marker / POINTER).read_text(encoding="utf-8", errors="surrogateescape").strip()
        former = Path(named)
        owner = json.loads((former / OWNER_FILE).read_text(encoding="ascii"))
        marker, root = int(owner["marker"]), Path(owner["root"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None  # never written, or damaged: a journal of its own begins
    if former.parent.resolve() != state.resolve() or not (former / JOURNAL_FILE).is_file():
        return None
    own = layout.marker.stat()
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


def _write(path: Path, content: bytes) -> None:
    """Give a file its content unless it has it, beside and then renamed: half of a path would name another folder."""
    try:
        if path.read_bytes() == content:
            return
    except FileNotFoundError:
        pass
    beside = path.with_suffix(".new")
    beside.write_bytes(content)
    os.replace(beside, path)
