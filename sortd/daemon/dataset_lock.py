"""A held dataset: locked for this process, its journal open and recovered, so that files may be moved in it.

A state folder is named by its dataset's name and place. A dataset that is renamed takes its journal along: what was
filed, held and corrected does not depend on how the folder above is called.
"""

import json
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from sortd.daemon.presence import Presence
from sortd.errors import AlreadyRunningError, LayoutError
from sortd.files import identity_of, open_folder, read_regular, sync_folder_at, write_atomic
from sortd.layout import JOURNAL_FILE, Layout
from sortd.moving.copy_queue import Submit
from sortd.moving.mover import Mover
from sortd.moving.parts import never
from sortd.store.journal import Journal
from sortd.store.records import MoveRecord

POINTER = "state"  # in the marker folder: names the state folder, for people and for a dataset that was renamed
POINTER_BYTES = 8192  # more than a path can have: whoever owns the dataset may have put anything under that name
OWNER_FILE = "dataset.json"  # in the state folder: whose it is, by path, and by device and inode of the marker folder


@dataclass(frozen=True, slots=True)
class OpenDataset:
    """What is open while a dataset is held."""

    layout: Layout
    journal: Journal
    mover: Mover
    recovered: tuple[MoveRecord, ...] = ()  # what a crash had left open, as it is now
    lock_problem: Callable[[], str | None] = lambda: None  # why another sortd works here now; see MarkerLock


class MarkerLock:
    """The lock in the marker folder, which somebody may delete, and make anew, while a sortd works."""

    def __init__(self, layout: Layout) -> None:
        """Take it; see ``_lock`` for what that raises."""
        self._layout, self._path = layout, layout.marker / "lock"
        self._lock = FileLock(self._path, timeout=0)
        self._taken: tuple[int, int] | None = None
        self._take()

    def problem(self) -> str | None:
        """Return why nothing may be moved: another sortd works here now. None: the lock at the path is ours.

        Where the one that was taken is not there any more, the one that is there is taken in its place.
        """
        is_ours = self._taken is not None and identity_of(self._path, follow=False) == self._taken
        if is_ours or not self._layout.is_present:
            return None
        self.release()
        try:
            self._take()
        except (AlreadyRunningError, LayoutError) as error:
            return f"{self._layout.marker} was made anew while sortd worked, and {error}"
        return None

    def release(self) -> None:
        """Give it back; doing it twice is no mistake."""
        self._taken = None
        self._lock.release()

    def _take(self) -> None:
        _lock(self._lock, self._layout)
        self._taken = identity_of(self._path, follow=False)


@contextmanager
def inspect_dataset(layout: Layout, state: Path) -> Iterator[OpenDataset]:
    """Open a dataset's journal to say what would be done: no lock is taken and nothing is recovered or moved.

    Raises:
        JournalError: its journal cannot be opened.
    """
    with Journal(layout.state_folder(state) / JOURNAL_FILE) as journal:
        yield OpenDataset(layout, journal, Mover(layout.root, journal, absence=_absence_of(layout, journal)))


@contextmanager
def open_dataset(
    layout: Layout,
    state: Path,
    *,
    run: str | None = None,
    companions: bool = True,
    submit: Submit = lambda job: [job()],
    interrupted: Callable[[], bool] = never,
) -> Iterator[OpenDataset]:
    """Hold a dataset whose folders are there, for as long as the block lasts; what a crash left is recovered first.

    Args:
        layout: the dataset.
        state: the state directory.
        run: a word for this run of sortd in the journal's records; one is made up otherwise.
        companions: whether sidecars travel with their image.
        submit: what to do with a copy to another file system; see ``Mover``.
        interrupted: whether such a copy is to end.

    Raises:
        AlreadyRunningError: another process works on it.
        LayoutError: it is not mounted, or its lock cannot be made.
        JournalError: its journal cannot be opened.
    """
    if layout.marker.is_symlink():
        raise LayoutError(f"{layout.marker} is a symbolic link: put a folder in its place (`sortd init {layout.root}`)")
    if not layout.is_present:
        raise LayoutError(f"{layout.marker} is missing: is the disk mounted? `sortd init {layout.root}` makes it anew")
    # The second lock holds where somebody deletes `.sortd/` and makes it anew, and the first one with it.
    with ExitStack() as held:
        lock = MarkerLock(layout)
        held.callback(lock.release)
        folder = claim_state_folder(layout, state)
        second = FileLock(folder / "lock", timeout=0)
        _lock(second, layout)
        held.callback(second.release)
        write_pointers(layout, folder)
        journal = held.enter_context(Journal(folder / JOURNAL_FILE, run=run or uuid.uuid4().hex[:8]))
        mover = Mover(
            layout.root,
            journal,
            companions=companions,
            submit=submit,
            interrupted=interrupted,
            absence=_absence_of(layout, journal),
        )
        yield OpenDataset(layout, journal, mover, tuple(mover.recover()), lock.problem)


def _absence_of(layout: Layout, journal: Journal) -> Callable[[], str | None]:
    """Return what says which disk of a dataset is not there."""
    return lambda: Presence(layout, journal, needs_marker=False).problem()


def _lock(lock: FileLock, layout: Layout) -> None:
    """Take a lock, or say who has it.

    Raises:
        AlreadyRunningError: another process has it.
        LayoutError: it cannot be locked.
    """
    try:
        lock.acquire()
    except Timeout as error:
        raise AlreadyRunningError(
            f"another sortd works on {layout.root}; stop it first (`sortd status` tells which, {layout.marker}/state"
            " names its state directory)"
        ) from error
    except OSError as error:
        raise LayoutError(
            f"{lock.lock_file} cannot be locked: {error.strerror}; mend its rights, or remove what stands under that "
            "name"
        ) from error


# ------------------------------------------------------------ the state folder


def claim_state_folder(layout: Layout, state: Path) -> Path:
    """Return the state folder of a dataset, which is there then; the one that it had under another name is renamed.

    Only a folder that was renamed is known again, by device and inode of its marker: a copy of a dataset has a journal
    of its own, and so has one on another disk.

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


def find_state_folder(layout: Layout, state: Path) -> Path:
    """Return the state folder of a dataset as ``claim_state_folder`` would find it; nothing is made or renamed."""
    folder = layout.state_folder(state)
    is_begun = folder.is_dir() and any(folder.iterdir())
    return folder if is_begun else _former(layout, state) or folder


def write_pointers(layout: Layout, folder: Path) -> None:
    """Let the dataset and its state folder name each other; where they do already nothing is written to either disk.

    A disk that is full must keep no sortd from starting: moves within a file system take no room.

    Raises:
        LayoutError: one of them cannot be written.
    """
    try:
        with open_folder(layout.marker) as marker:
            own = os.fstat(marker)
            owner = {"root": os.fspath(layout.root), "device": own.st_dev, "marker": own.st_ino}
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
        is_own = (owner["device"], owner["marker"]) == (own.st_dev, own.st_ino)
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None  # never written, or damaged: a journal of its own begins
    return former if is_own else None


def _rename(former: Path, folder: Path) -> None:
    """Give a state folder its new name, unless a sortd works in it."""
    with suppress(Timeout), FileLock(former / "lock", timeout=0):
        os.rename(former, folder)
        sync_folder_at(folder.parent)


def _write(path: Path, content: bytes, folder: int | None = None) -> None:
    """Give a file its content unless it has it; whatever else stands under its name is replaced."""
    with suppress(OSError):  # nothing there, or a link, a pipe or a large file that somebody put there
        if read_regular(path, limit=len(content), folder=folder) == content:
            return
    write_atomic(path, content, folder=folder)
