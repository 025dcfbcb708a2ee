"""A holding: one dataset locked for this process, its journal open and recovered, so that files may be moved in it."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from sortd.errors import AlreadyRunningError, LayoutError
from sortd.filing import Filing
from sortd.journal import Journal
from sortd.journals import JOURNAL_FILE
from sortd.layout import Layout


@dataclass(frozen=True, slots=True)
class Holding:
    """What is open while a dataset is held."""

    layout: Layout
    journal: Journal
    filing: Filing


@contextmanager
def look_at(layout: Layout, state: Path) -> Iterator[Holding]:
    """Open a dataset's journal to say what would be done: no lock is taken and nothing is recovered or moved.

    Raises:
        JournalError: its journal cannot be opened.
    """
    with Journal(layout.state_folder(state) / JOURNAL_FILE) as journal:
        yield Holding(layout, journal, Filing(layout.root, journal))


@contextmanager
def hold(layout: Layout, state: Path) -> Iterator[Holding]:
    """Hold a dataset that sortd has worked on before, for as long as the block lasts.

    Args:
        layout: the dataset.
        state: the state directory.

    Raises:
        AlreadyRunningError: another process works on it.
        LayoutError: it is not mounted, or its lock cannot be made.
        JournalError: its journal cannot be opened.
    """
    if not layout.is_present:
        raise LayoutError(f"{layout.marker} is missing: is the disk mounted? `sortd init {layout.root}` makes it anew")
    lock = FileLock(layout.marker / "lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise AlreadyRunningError(
            f"another sortd works on {layout.root}, with another state directory; {layout.marker}/state names it"
        ) from error
    except OSError as error:
        raise LayoutError(f"{layout.marker}/lock cannot be made: {error.strerror}; mend its rights") from error
    try:
        with Journal(layout.state_folder(state) / JOURNAL_FILE, run=uuid.uuid4().hex[:8]) as journal:
            filing = Filing(layout.root, journal)
            filing.recover()
            yield Holding(layout, journal, filing)
    finally:
        lock.release()
