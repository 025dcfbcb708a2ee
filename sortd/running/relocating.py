"""Relocations in batches: written, done, durable, written again; the journal and the mover together.

A batch costs two commits of the journal and one sync of each folder, however many images are in it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sortd.errors import BusyError, DestinationError, ImageError, SourceError
from sortd.mover import Mover, TakenNumbers, close_files, done, open_members, remove_obsolete, sync_files
from sortd.moving.copying import never
from sortd.moving.crossing import cross
from sortd.moving.listing import Listings
from sortd.moving.recovery import recover
from sortd.moving.renaming import CANNOT_RENAME, Folders, sync_folder
from sortd.store.journal import Journal
from sortd.store.records import MoveReason, MoveRecord, Progress

BATCH = 64
"""Relocations that share commits and syncs; each holds a descriptor or a few until its bytes are synced."""

SYNC_THREADS = 16
"""Files of a batch that are synced at the same time; the threads end with the batch."""

_ENDED = frozenset({Progress.DONE, Progress.FAILED})
_UNENDED = DestinationError("an earlier move of it has not ended: its disk refused; it is tried again")
_UNDER_WAY = BusyError("it, or an earlier version of it, is being copied to another file system")
_INTERRUPTED = BusyError("sortd stops, or lets this dataset go: it is copied to its other file system later")


@dataclass(frozen=True, slots=True)
class Order:
    """A relocation on its way: why, and what went wrong if something did."""

    relocation: MoveRecord
    grounds: MoveReason
    trouble: Exception | None = None

    def at(self, relocation: MoveRecord) -> "Order":
        """Return the order with its relocation further on."""
        return replace(self, relocation=relocation)

    def troubled(self, trouble: Exception) -> "Order":
        """Return the order with what went wrong."""
        return replace(self, trouble=trouble)

    def untroubled(self) -> "Order":
        """Return the order as one that begins anew."""
        return replace(self, trouble=None)

    @property
    def is_done(self) -> bool:
        """Whether its image stands durably where it was to go."""
        return self.relocation.progress is Progress.DONE and self.relocation.image.moved_stamp is not None


Job = Callable[[], Order]
"""One copy to another file system: to be run once, in any thread; what it returns goes to ``Relocator.end``."""

Submit = Callable[[Job], list[Order]]
"""Takes a job that can be long; returns its order if it was run at once, and nothing if it is run later."""


def inline(job: Job) -> list[Order]:
    """Run a job at once, in this thread."""
    return [job()]


class Relocator:
    """Carries out the relocations of one dataset; used in one thread, but for the jobs that it submits."""

    def __init__(
        self,
        root: Path,
        journal: Journal,
        *,
        submit: Submit = inline,
        interrupted: Callable[[], bool] = never,
        mover: Mover | None = None,
        sync_threads: int = SYNC_THREADS,
        listings: Listings | None = None,
    ) -> None:
        """Begin; see ``filing.Filing`` for the arguments."""
        self._root = root
        self._journal = journal
        self._submit = submit
        self._interrupted = interrupted
        self._mover = mover or Mover()
        self._sync_threads = sync_threads
        self.listings, self._listings_of_jobs = listings or Listings(), listings or Listings()
        self._numbers = TakenNumbers()  # of the jobs alone: the mover, in another thread, has its own
        # By token; handed to ``submit`` and not yet ended. Only the thread that owns this object touches it, so that
        # a relocation is never recovered here while it is carried out there.
        self._crossing: dict[str, MoveRecord] = {}

    @property
    def crossing(self) -> int:
        """How many relocations were handed to ``submit`` and have not come to ``end``."""
        return len(self._crossing)

    def recover(self) -> list[MoveRecord]:
        """Bring every relocation that did not end to its end or its beginning; doing it again is no mistake.

        Returns:
            What was found open, as it is now; one that is still open waits for a disk.

        Raises:
            JournalError: the journal cannot be read or written.
        """
        unfinished = [record.relocation for record in self._journal.history.unfinished()]
        waiting = [one for one in unfinished if one.token not in self._crossing]
        if waiting:
            try:
                with Folders(self._root) as folders:
                    waiting = [_recovered(folders, one, self._journal) for one in waiting]
            except OSError:
                return waiting  # the dataset is not there
            self._journal.settle(waiting)
        return waiting

    def relocate(self, orders: Sequence[Order]) -> list[Order]:
        """Carry out orders, which are in progress INTENDED; those that are returned have ended, durably.

        Relocations to another file system that ``submit`` does later are missing: they come to ``end``.

        Raises:
            JournalError: it cannot be written; opening it anew recovers what was begun.
        """
        # A copy of a source whose move has not ended may stand already: moving it again would make a second one.
        unended: dict[tuple[str, str], Exception] = {
            _source_of(one): _UNENDED for one in self.recover() if one.progress not in _ENDED
        } | {_source_of(one): _UNDER_WAY for one in self._crossing.values()}
        ended = [
            order.troubled(unended[_source_of(order.relocation)])
            for order in orders
            if _source_of(order.relocation) in unended
        ]
        free = [order for order in orders if _source_of(order.relocation) not in unended]
        for start in range(0, len(free), BATCH):
            of_batch, crossing = self._relocate_batch(free[start : start + BATCH])
            ended += of_batch
            for order in crossing:
                ended += self._submit_crossing(order.untroubled())
        return ended

    def end(self, orders: Iterable[Order]) -> None:
        """Take note that submitted orders were run: what of them is still open is recovered like after a crash."""
        for order in orders:
            self._crossing.pop(order.relocation.token, None)

    def _relocate_batch(self, orders: Sequence[Order]) -> tuple[list[Order], list[Order]]:
        try:
            folders = Folders(self._root, self.listings)
        except OSError as error:
            return [order.troubled(error) for order in orders], []
        with folders:
            ready, refused = _ready(folders, orders, self._sync_threads)
            if not ready:
                return refused, []
            self._journal.intend([(order.relocation, order.grounds) for order in ready])
            placed = [self._placed(folders, order) for order in ready]
            crossing = [order for order in placed if _must_cross(order)]
            synced = _synced(folders, [order for order in placed if not _must_cross(order)])
            ended = [_ended(folders, order, self._journal) for order in synced]
            self._journal.settle(order.relocation for order in ended)
        return refused + ended, crossing

    def _placed(self, folders: Folders, order: Order) -> Order:
        try:
            placed = self._mover.place(folders, order.relocation)
            remove_obsolete(folders, placed)
        except (ImageError, OSError, DestinationError, SourceError) as error:
            return order.troubled(error)
        return order.at(placed)

    def _submit_crossing(self, order: Order) -> list[Order]:
        self._crossing[order.relocation.token] = order.relocation
        ended = self._submit(lambda: self._cross(order))
        self.end(ended)
        return ended

    def _cross(self, order: Order) -> Order:
        """Copy to another file system, in whatever thread ``submit`` chose, with a connection of its own."""
        if self._interrupted():
            return order.troubled(_INTERRUPTED)
        with self._journal.beside() as journal:
            ended = self._crossed(order, journal)
            journal.settle([ended.relocation])
        return ended

    def _crossed(self, order: Order, journal: Journal) -> Order:
        reached = order.relocation

        def advance(relocation: MoveRecord) -> None:
            nonlocal reached
            journal.advance(relocation)
            reached = relocation

        try:
            with Folders(self._root, self._listings_of_jobs) as folders:
                try:
                    return order.at(cross(folders, order.relocation, advance, self._interrupted, numbers=self._numbers))
                except (ImageError, OSError, DestinationError, SourceError) as error:
                    return order.at(_recovered(folders, reached, journal)).troubled(error)
        except OSError as error:
            return order.troubled(error)


def _source_of(relocation: MoveRecord) -> tuple[str, str]:
    return relocation.source, relocation.image.name


def _recovered(folders: Folders, relocation: MoveRecord, journal: Journal) -> MoveRecord:
    try:
        return recover(folders, relocation, journal.advance)
    except (ImageError, DestinationError, OSError):
        return relocation  # still open: tried again before the next batch and at the next start


def _ready(folders: Folders, orders: Iterable[Order], sync_threads: int) -> tuple[list[Order], list[Order]]:
    """Look at the files and make their bytes durable, before anything is written or renamed."""
    opened: list[tuple[Order, list[int]]] = []
    ready: list[Order] = []
    refused: list[Order] = []
    for order in orders:
        try:
            opened.append((order, open_members(folders, order.relocation)))
        except ImageError as error:
            refused.append(order.troubled(error))
    everything = [file for _, files in opened for file in files]
    try:
        troubles = sync_files(everything, sync_threads)
    finally:
        close_files(everything)
    for order, files in opened:
        trouble = next((troubles[file] for file in files if file in troubles), None)
        if trouble is None:
            ready.append(order)
        else:
            refused.append(order.troubled(trouble))
    return ready, refused


def _synced(folders: Folders, orders: list[Order]) -> list[Order]:
    """Sync each folder once, all the destinations before any source: a new name must last before the old one goes."""
    for folder_of in (_destination, _source):
        troubles: dict[str, Exception] = {}
        for folder in sorted({folder_of(order) for order in orders if order.trouble is None}):
            try:
                sync_folder(folders.open(folder))
            except OSError as error:
                is_source = folder_of is _source
                troubles[folder] = SourceError(f"{folder}: {error.strerror}") if is_source else error
        orders = [
            order.troubled(troubles[folder_of(order)])
            if order.trouble is None and folder_of(order) in troubles
            else order
            for order in orders
        ]
    return orders


def _ended(folders: Folders, order: Order, journal: Journal) -> Order:
    if order.trouble is None:
        return order.at(done(order.relocation))
    return order.at(_recovered(folders, order.relocation, journal))


def _destination(order: Order) -> str:
    return order.relocation.destination


def _source(order: Order) -> str:
    return order.relocation.source


def _must_cross(order: Order) -> bool:
    return isinstance(order.trouble, OSError) and order.trouble.errno in CANNOT_RENAME
