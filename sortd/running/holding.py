"""A holding: one dataset locked for this process, its journal open and recovered, so that files may be moved in it."""

import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from sortd.commands.journals import JOURNAL_FILE
from sortd.errors import AlreadyRunningError, LayoutError
from sortd.layout import Layout
from sortd.moving.copying import never
from sortd.running.filing import Filing
from sortd.running.relocating import Submit, inline
from sortd.running.residence import settled_folder, write_down
from sortd.store.journal import Journal
from sortd.store.records import MoveRecord


@dataclass(frozen=True, slots=True)
class Holding:
    """What is open while a dataset is held."""

    layout: Layout
    journal: Journal
    filing: Filing
    recovered: tuple[MoveRecord, ...] = ()  # what a crash had left open, as it is now
    lock_problem: Callable[[], str | None] = lambda: None  # why another sortd works here now; see MarkerLock


class MarkerLock:
    """The lock in the marker folder, which somebody may delete, and make anew, while a sortd works."""

    def __init__(self, layout: Layout) -> None:
        """Take it.

        Raises:
            AlreadyRunningError: another process has it.
            LayoutError: it cannot be locked.
        """
        self._layout, self._path = layout, layout.marker / "lock"
        self._lock = FileLock(self._path, timeout=0)
        self._taken: tuple[int, int] | None = None
        self._take()

    def problem(self) -> str | None:
        """Return why nothing may be moved: another sortd works here now. None: the lock at the path is ours.

        Where the one that was taken is not there any more, the one that is there is taken in its place.
        """
        is_ours = self._taken is not None and _identity(self._path) == self._taken
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
        self._taken = _identity(self._path)


@contextmanager
def look_at(layout: Layout, state: Path) -> Iterator[Holding]:
    """Open a dataset's journal to say what would be done: no lock is taken and nothing is recovered or moved.

    Raises:
        JournalError: its journal cannot be opened.
    """
    with Journal(layout.state_folder(state) / JOURNAL_FILE) as journal:
        yield Holding(layout, journal, Filing(layout.root, journal))


@contextmanager
def hold(
    layout: Layout,
    state: Path,
    *,
    run: str | None = None,
    companions: bool = True,
    submit: Submit = inline,
    interrupted: Callable[[], bool] = never,
) -> Iterator[Holding]:
    """Hold a dataset whose folders are there, for as long as the block lasts; what a crash left is recovered first.

    Args:
        layout: the dataset.
        state: the state directory.
        run: a word for this run of sortd in the journal's records; one is made up otherwise.
        companions: whether sidecars travel with their image.
        submit: what to do with a copy to another file system; see ``filing.Filing``.
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
        folder = settled_folder(layout, state)
        held.enter_context(_locked(folder, layout))
        write_down(layout, folder)
        journal = held.enter_context(Journal(folder / JOURNAL_FILE, run=run or uuid.uuid4().hex[:8]))
        filing = Filing(layout.root, journal, companions=companions, submit=submit, interrupted=interrupted)
        yield Holding(layout, journal, filing, tuple(filing.recover()), lock.problem)


@contextmanager
def _locked(folder: Path, layout: Layout) -> Iterator[None]:
    """Hold the lock in a folder; nobody waits for it."""
    lock = FileLock(folder / "lock", timeout=0)
    _lock(lock, layout)
    try:
        yield
    finally:
        lock.release()


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


def _identity(path: Path) -> tuple[int, int] | None:
    """Return device and inode of what stands under a path; None where nothing does."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
