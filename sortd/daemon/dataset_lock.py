"""Opening a dataset: missing disks, locks, the recovered journal, and the state folder, which follows a rename.

The marker shows whether the dataset itself is mounted. A folder on another disk has no marker, and images filed into
its empty mount point would be hidden once the disk is mounted. So the journal records the folders that were on another
file system; such a folder counts as missing while it is empty and on the dataset's own file system.
"""

import json
import os
import sqlite3
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from sortd.errors import AlreadyRunningError, LayoutError
from sortd.events import Move, Moved
from sortd.files import identity_of, open_folder, read_regular, sync_folder_at, write_atomic
from sortd.layout import JOURNAL_FILE, MARKER, Area, Layout
from sortd.moving.copy import never
from sortd.moving.copy_queue import Submit
from sortd.moving.mover import MoveAnswer, Mover
from sortd.store.damage import translated
from sortd.store.history import open_for_reading
from sortd.store.journal import Journal
from sortd.store.records import MoveRecord

APART_FACT = "folders_apart"  # key of the names of the folders seen on another file system, separated by spaces


class Presence:
    """Tells whether a dataset is complete; used before each group of moves."""

    def __init__(
        self,
        layout: Layout,
        journal: Journal,
        *,
        needs_marker: bool = True,
        lock_problem: Callable[[], str | None] = lambda: None,
    ) -> None:
        """Check ``layout``; ``journal`` records which folders were on other disks. Raises JournalError.

        Without ``needs_marker`` a dataset without a marker does not count as missing. ``lock_problem`` returns a
        sentence if another sortd works on the dataset, otherwise None.
        """
        self._layout, self._journal, self.needs_marker = layout, journal, needs_marker
        self.lock_problem = lock_problem
        self._apart = frozenset((journal.history.fact(APART_FACT) or "").split())

    def problem(self) -> str | None:
        """Return a sentence that says what is missing, None if nothing is; raise JournalError if it cannot be noted."""
        if self.needs_marker and not self._layout.is_present:
            return f"{self._layout.marker} is missing: is the disk mounted? `sortd init {self._layout.root}` creates it"
        if (taken := self.lock_problem()) is not None:
            return taken
        return self.absent_folder()

    def require(self, before: str = "") -> None:
        """Raise LayoutError, which ends with what was done ``before``, if something is missing."""
        if (problem := self.problem()) is not None:
            raise LayoutError(f"{problem}{before}")

    def absent_folder(self) -> str | None:
        """Return a sentence about a folder whose other disk is missing; record the folders on other disks."""
        own = _device(self._layout.root)
        apart: set[str] = set()
        for area in Area:
            folder = self._layout.area(area)
            try:
                device = _device(folder)
            except OSError as error:
                if area.value in self._apart:
                    return f"{folder} is on another disk, which does not respond: {error.strerror}"
                continue  # opening it fails with the same error
            if device not in {None, own}:
                apart.add(area.value)
            elif area.value in self._apart and _is_empty(folder):
                return (
                    f"{folder} was on another disk and is an empty folder now: is the disk mounted? To use this folder "
                    "instead, create any folder in it"
                )
        if apart != self._apart:
            self._journal.note(APART_FACT, " ".join(sorted(apart)))
            self._apart = frozenset(apart)
        return None


def _device(folder: Path) -> int | None:
    """Return the device of a folder; None if there is no folder. Raises OSError if the disk does not respond."""
    try:
        return folder.stat().st_dev
    except (FileNotFoundError, NotADirectoryError):
        return None


def _is_empty(folder: Path) -> bool:
    """Tell whether a folder does not exist, or contains only ``lost+found``."""
    try:
        return all(name == "lost+found" for name in os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return True


POINTER = "state"  # in the marker folder: the path of the state folder, for people and after a rename
POINTER_BYTES = 8192  # more than a path can have; a larger file is not a pointer
OWNER_FILE = "dataset.json"  # in the state folder: the dataset's path, and the inode of its marker


ReportMove = Callable[[str, Move, str], None]  # called for each move of a dry run: dataset, move, destination


class DryRunMover(Mover):
    """Moves nothing, but reports each move with the place where the image would be if that name is free."""

    def __init__(self, root: Path, journal: Journal, report: ReportMove) -> None:
        """Report for the dataset at ``root``; ``journal`` is a copy."""
        super().__init__(root, journal, companions=False)
        self._folder, self._report = root, report

    def recover(self) -> list[MoveRecord]:
        """Return nothing: another sortd may be making the moves that are open in the copied journal."""
        return []

    def move_all(self, moves: Sequence[Move]) -> list[MoveAnswer]:
        """Answer each move as done."""
        done: list[MoveAnswer] = []
        for move in moves:
            destination = os.path.join(self._folder, move.folder, os.path.basename(move.path))
            if move.action == "keywords":
                destination = move.path
            self._report(self._folder.name, move, destination)
            done.append(Moved(move.path, move.stamp, destination, move.outcome, move.stamp))
        return done


@dataclass(frozen=True, slots=True)
class OpenDataset:
    """An open dataset."""

    layout: Layout
    journal: Journal
    mover: Mover
    presence: Presence
    recovered: tuple[MoveRecord, ...] = ()  # moves that a crash had left open, in their present state


class MarkerLock:
    """The lock in the marker folder, which a user may delete and create again while sortd runs."""

    def __init__(self, layout: Layout) -> None:
        """Acquire the lock; see ``_lock`` for the errors."""
        self._layout, self._path = layout, layout.marker / "lock"
        self._lock = FileLock(self._path, timeout=0)
        self._taken: tuple[int, int] | None = None
        self._take()

    def problem(self) -> str | None:
        """Return a sentence if another sortd has the lock; None if this one has it.

        If the lock file was replaced, the new one is acquired first.
        """
        is_ours = self._taken is not None and identity_of(self._path, follow=False) == self._taken
        if is_ours or not self._layout.is_present:
            return None
        self.release()
        try:
            self._take()
        except (AlreadyRunningError, LayoutError) as error:
            return f"{self._layout.marker} was deleted and created again while sortd ran, and {error}"
        return None

    def release(self) -> None:
        """Release the lock; idempotent."""
        self._taken = None
        self._lock.release()

    def _take(self) -> None:
        _lock(self._lock, self._layout)
        self._taken = identity_of(self._path, follow=False)


@contextmanager
def inspect_dataset(layout: Layout, state: Path) -> Iterator[OpenDataset]:
    """Open a dataset for previews only: without locks, recovery or moves; raises JournalError."""
    with Journal(layout.state_folder(state) / JOURNAL_FILE) as journal:
        presence = Presence(layout, journal)
        yield OpenDataset(layout, journal, Mover(layout.root, journal, absence=presence.absent_folder), presence)


@contextmanager
def simulate_dataset(layout: Layout, state: Path, report: ReportMove) -> Iterator[OpenDataset]:
    """Open a dataset for a dry run, with a copy of its journal; nothing of it is written or locked.

    Raises JournalError: its journal cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="sortd-") as folder:
        file, copy = find_state_folder(layout, state) / JOURNAL_FILE, Path(folder) / JOURNAL_FILE
        if file.is_file():
            with closing(open_for_reading(file)) as reader, translated(copy), closing(sqlite3.connect(copy)) as writer:
                reader.backup(writer)  # its current state, which another process may be writing
        with Journal(copy) as journal:
            presence = Presence(layout, journal, needs_marker=False)
            yield OpenDataset(layout, journal, DryRunMover(layout.root, journal, report), presence)


@contextmanager
def lock_dataset(
    layout: Layout,
    state: Path,
    *,
    run: str | None = None,
    companions: bool = True,
    submit: Submit = lambda job: [job()],
    interrupted: Callable[[], bool] = never,
) -> Iterator[OpenDataset]:
    """Lock a dataset and recover its unfinished moves; it stays open until the block ends.

    ``run`` identifies this run in the journal, by default by a random word; for the others, see ``Mover``.

    Raises:
        AlreadyRunningError: another process has locked it.
        LayoutError: it is not mounted or cannot be locked.
        JournalError: its journal cannot be opened.
    """
    if layout.marker.is_symlink():
        raise LayoutError(f"{layout.marker} is a symbolic link: remove it and run `sortd init {layout.root}`")
    if not layout.is_present:
        raise LayoutError(f"{layout.marker} is missing: is the disk mounted? `sortd init {layout.root}` creates it")
    # The second lock remains if a user deletes `.sortd/`, and with it the first lock, and creates it again.
    with ExitStack() as stack:
        lock = MarkerLock(layout)
        stack.callback(lock.release)
        folder = claim_state_folder(layout, state)
        second = FileLock(folder / "lock", timeout=0)
        _lock(second, layout)
        stack.callback(second.release)
        write_pointers(layout, folder)
        journal = stack.enter_context(Journal(folder / JOURNAL_FILE, run=run or uuid.uuid4().hex[:8]))
        presence = Presence(layout, journal, lock_problem=lock.problem)
        mover = Mover(
            layout.root,
            journal,
            companions=companions,
            submit=submit,
            interrupted=interrupted,
            absence=presence.absent_folder,
        )
        yield OpenDataset(layout, journal, mover, presence, tuple(mover.recover()))


def _lock(lock: FileLock, layout: Layout) -> None:
    """Acquire a lock; raise AlreadyRunningError if another process has it, LayoutError if it cannot be locked."""
    try:
        lock.acquire()
    except Timeout as error:
        raise AlreadyRunningError(
            f"another sortd works on {layout.root}; stop it first (`sortd status` shows it; {layout.marker}/state"
            " contains its state directory)"
        ) from error
    except OSError as error:
        raise LayoutError(
            f"{lock.lock_file} cannot be locked: {error.strerror}; check its permissions, or remove whatever has this "
            "name"
        ) from error


def claim_state_folder(layout: Layout, state: Path) -> Path:
    """Return the state folder of a dataset, created or, if the dataset was renamed, renamed.

    A renamed dataset is recognised by the inode of its marker, unless a dataset with the same inode on another disk
    is at the former path: a copy gets a journal of its own.

    Raises:
        LayoutError: it cannot be created.
    """
    folder = layout.state_folder(state)
    try:
        if (former := find_state_folder(layout, state)) != folder:
            with suppress(Timeout), FileLock(former / "lock", timeout=0):  # unless a sortd uses it
                os.rename(former, folder)
                sync_folder_at(folder.parent)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise LayoutError(
            f"{folder} cannot be created: {error.strerror}; check permissions or set state_dir"
        ) from error
    return folder


def find_state_folder(layout: Layout, state: Path) -> Path:
    """Return the state folder that ``claim_state_folder`` would use or rename, without changes."""
    folder = layout.state_folder(state)
    is_begun = folder.is_dir() and any(folder.iterdir())
    return folder if is_begun else _former(layout, state) or folder


def write_pointers(layout: Layout, folder: Path) -> None:
    """Write the path of the state folder to the marker, and the dataset's identity to the state folder.

    Unchanged files are not written, so that sortd can start on a full disk: moves within a file system need no space.

    Raises:
        LayoutError: one of them cannot be written.
    """
    try:
        with open_folder(layout.marker) as marker:
            own = os.fstat(marker)
            owner = {"root": os.fspath(layout.root), "marker": own.st_ino}
            _write(layout.marker / POINTER, os.fsencode(folder) + b"\n", marker)
        _write(folder / OWNER_FILE, json.dumps(owner).encode() + b"\n")
    except OSError as error:
        raise LayoutError(
            f"{error.filename} cannot be written: {error.strerror}; check its permissions and the free space, or move "
            "away whatever has its name"
        ) from error


def _former(layout: Layout, state: Path) -> Path | None:
    """Return the state folder that this dataset had under another name, if any."""
    try:
        with open_folder(layout.marker) as folder:
            own = os.fstat(folder)
            named = os.fsdecode(read_regular(layout.marker / POINTER, limit=POINTER_BYTES, folder=folder)).strip()
        former = Path(named)
        if os.path.realpath(former.parent) != os.path.realpath(state) or not (former / JOURNAL_FILE).is_file():
            return None
        owner = json.loads(read_regular(former / OWNER_FILE))
        # Device numbers change with each mount. On two disks, for example after a copy of the whole disk, two datasets
        # may have one inode number: the state folder belongs to the one that is still at the recorded path.
        there = identity_of(Path(owner["root"]) / MARKER)
        is_copy = there is not None and there[1] == own.st_ino and there[0] != own.st_dev
        is_own = owner["marker"] == own.st_ino and not is_copy
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None  # never written, or damaged: a new journal begins
    return former if is_own else None


def _write(path: Path, content: bytes, folder: int | None = None) -> None:
    """Write a file unless it has this content; anything else with its name is replaced."""
    with suppress(OSError):  # it does not exist, or is a link, a pipe or a large file
        if read_regular(path, limit=len(content), folder=folder) == content:
            return
    write_atomic(path, content, folder=folder)
