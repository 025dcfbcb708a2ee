"""Filing of one dataset: the journal and the mover together, so that a move is written, done, durable and told.

A batch costs two commits of the journal and one sync of each folder, however many images are in it.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sortd.copying import never
from sortd.crossing import cross
from sortd.errors import BusyError, ChangedError, DestinationError, ImageError, VanishedError
from sortd.journal import Grounds, Journal
from sortd.journal_records import with_reason
from sortd.messages import Move, Moved, MoveFailed, MoveFailure, Outcome
from sortd.mover import (
    NO_STAMP,
    Mover,
    done,
    new_token,
    open_members,
    sync_members,
    with_companions,
)
from sortd.recovery import recover
from sortd.relocation import FolderNameError, Member, Progress, Relocation, Role, checked_folder, checked_name
from sortd.renaming import CANNOT_RENAME, Folders, sync_folder

BATCH = 64
"""Images whose renames share commits and syncs; each holds a descriptor or a few until its bytes are synced."""

_ENDED = frozenset({Progress.DONE, Progress.FAILED})

Answer = Moved | MoveFailed
Job = Callable[[], list[Answer]]
Submit = Callable[[Job], list[Answer]]


def inline(job: Job) -> list[Answer]:
    """Do a job at once, in this thread."""
    return job()


@dataclass(frozen=True, slots=True)
class _Order:
    """A relocation on its way, and what asked for it."""

    move: Move
    relocation: Relocation
    trouble: Exception | None = None

    def settled(self, relocation: Relocation) -> "_Order":
        return replace(self, relocation=relocation)

    def troubled(self, trouble: Exception) -> "_Order":
        return replace(self, trouble=trouble)


class Filing:
    """Moves the files of one dataset; used in one thread, but for the jobs that it submits."""

    def __init__(
        self,
        dataset_root: Path,
        journal: Journal,
        *,
        companions: bool = True,
        submit: Submit = inline,
        interrupted: Callable[[], bool] = never,
        mover: Mover | None = None,
    ) -> None:
        """Begin; call ``recover`` before the first move.

        Args:
            dataset_root: the dataset, as its paths are spelled in the moves.
            journal: this dataset's.
            companions: whether sidecars, Live Photo and RAW+JPEG pairs travel with their image.
            submit: what to do with a job that copies to another file system, which can be long: it may be run in
                another thread, and is to be run once; returns the answers that are there already.
            interrupted: asked by such a job between chunks.
            mover: puts files in their place.
        """
        self._root = dataset_root
        self._journal = journal
        self._companions = companions
        self._submit = submit
        self._interrupted = interrupted
        self._mover = mover or Mover()
        self._crossing: set[str] = set()
        self._unsettled = False

    def recover(self) -> list[Relocation]:
        """Bring every relocation that did not end to its end or its beginning; doing it again is no mistake.

        Returns:
            What was found open, as it is now; one that is still open waits for a disk.

        Raises:
            JournalError: the journal cannot be read or written.
        """
        open_ones = [
            record.relocation
            for record in self._journal.history.unfinished()
            if record.relocation.token not in self._crossing
        ]
        if not open_ones:
            return []
        try:
            with Folders(self._root) as folders:
                ended = [_recovered(folders, one, self._journal) for one in open_ones]
        except OSError:
            return open_ones  # the dataset is not there: its relocations wait
        self._journal.settle(ended)
        return ended

    def move_all(self, moves: Sequence[Move]) -> list[Answer]:
        """Move these versions of these files, companions with them; durable when it returns.

        Images that must go to another file system are given to ``submit``; their answers come from there.

        Raises:
            JournalError: the journal cannot be written; the daemon must stop, and recovers at its next start.
            ValueError: a path is not below the dataset.
        """
        answers: list[Answer] = []
        if self._unsettled:
            self._unsettled = any(one.progress not in _ENDED for one in self.recover())
        for start in range(0, len(moves), BATCH):
            answers += self._move_batch(moves[start : start + BATCH])
        return answers

    def _move_batch(self, moves: Sequence[Move]) -> list[Answer]:
        try:
            folders = Folders(self._root)
        except OSError as error:
            return [_failure(move, error) for move in moves]
        with folders:
            ready, answers = self._ready(folders, moves)
            if not ready:
                return answers
            self._journal.intend([(order.relocation, _grounds(order.move)) for order in ready])
            placed = [self._placed(folders, order) for order in ready]
            crossing = [order for order in placed if _must_cross(order)]
            staying = _synced(folders, [order for order in placed if not _must_cross(order)])
            ended = [self._ended(folders, order, self._journal) for order in staying]
            self._journal.settle(order.relocation for order in ended)
            self._unsettled |= any(order.relocation.progress not in _ENDED for order in ended)
        answers += [_answer(order, self._root) for order in ended]
        if crossing:
            answers += self._submit_crossing(crossing)
        return answers

    def _ready(self, folders: Folders, moves: Iterable[Move]) -> tuple[list[_Order], list[Answer]]:
        """Look at the files and make their bytes durable, before anything is written or renamed."""
        opened: list[tuple[_Order, list[int]]] = []
        orders: list[_Order] = []
        failures: list[Answer] = []
        for move in moves:
            try:
                relocation = self._relocation(folders, move)
                opened.append((_Order(move, relocation), open_members(folders, relocation)))
            except FileNotFoundError:
                failures.append(_failure(move, VanishedError("nothing stands there any more")))
            except (ImageError, OSError, FolderNameError) as error:
                failures.append(_failure(move, error))
        for order, files in opened:
            try:
                sync_members(files)
            except OSError as error:
                failures.append(_failure(order.move, error))
            else:
                orders.append(order)
        return orders, failures

    def _relocation(self, folders: Folders, move: Move) -> Relocation:
        source, name = self._split(move.path)
        image = Member(Role.IMAGE, name, name, move.stamp, content=move.content)
        relocation = Relocation(new_token(), source, checked_folder(move.folder), (image,))
        if self._companions:
            relocation = with_companions(folders, relocation)
        if move.outcome is Outcome.REJECTED:
            relocation = replace(relocation, members=(*relocation.members, _reason(move, source, name)))
        return relocation

    def _split(self, path: str) -> tuple[str, str]:
        root = f"{os.fspath(self._root)}/"
        if not path.startswith(root):
            raise ValueError(f"{path}: it is not below the dataset {self._root}")
        folder, _, name = path.removeprefix(root).rpartition("/")
        return checked_folder(folder), checked_name(name)

    def _placed(self, folders: Folders, order: _Order) -> _Order:
        try:
            return order.settled(self._mover.place(folders, order.relocation))
        except (ImageError, OSError, DestinationError) as error:
            return order.troubled(error)

    def _ended(self, folders: Folders, order: _Order, journal: Journal) -> _Order:
        if order.trouble is None:
            return order.settled(done(order.relocation))
        return order.settled(_recovered(folders, order.relocation, journal))

    def _submit_crossing(self, orders: list[_Order]) -> list[Answer]:
        tokens = {order.relocation.token for order in orders}
        self._crossing |= tokens
        return self._submit(lambda: self._cross_all(orders))

    def _cross_all(self, orders: list[_Order]) -> list[Answer]:
        """Copy to another file system; runs in whatever thread ``submit`` chose, with a connection of its own."""
        answers: list[Answer] = []
        with self._journal.beside() as journal:
            for order in orders:
                answers.append(self._cross(replace(order, trouble=None), journal))
                self._crossing.discard(order.relocation.token)
        return answers

    def _cross(self, order: _Order, journal: Journal) -> Answer:
        reached = order.relocation

        def advance(relocation: Relocation) -> None:
            nonlocal reached
            journal.advance(relocation)
            reached = relocation

        try:
            folders = Folders(self._root)
        except OSError as error:
            return _failure(order.move, error)
        with folders:
            try:
                ended = order.settled(cross(folders, order.relocation, advance, self._interrupted))
            except (ImageError, OSError, DestinationError) as error:
                ended = order.troubled(error).settled(_recovered(folders, reached, journal))
        journal.settle([ended.relocation])
        return _answer(ended, self._root)


def _recovered(folders: Folders, relocation: Relocation, journal: Journal) -> Relocation:
    try:
        return recover(folders, relocation, journal.advance)
    except (ImageError, DestinationError, OSError):
        return relocation  # still open: tried again before the next batch and at the next start


def _synced(folders: Folders, orders: list[_Order]) -> list[_Order]:
    """Sync each folder once, all the destinations before any source: a new name must last before the old one goes."""
    for folder_of in (_destination, _source):
        troubles: dict[str, OSError] = {}
        for folder in sorted({folder_of(order) for order in orders if order.trouble is None}):
            try:
                sync_folder(folders.open(folder))
            except OSError as error:
                troubles[folder] = error
        orders = [
            order.troubled(troubles[folder_of(order)])
            if order.trouble is None and folder_of(order) in troubles
            else order
            for order in orders
        ]
    return orders


def _destination(order: _Order) -> str:
    return order.relocation.destination


def _source(order: _Order) -> str:
    return order.relocation.source


def _must_cross(order: _Order) -> bool:
    return isinstance(order.trouble, OSError) and order.trouble.errno in CANNOT_RENAME


def _grounds(move: Move) -> Grounds:
    return with_reason(
        Grounds.of(move.decision, move.outcome.value),
        reason=move.reason,
        generation=move.generation,
        encoder_id=move.encoder_id,
        content=move.content,
    )


def _reason(move: Move, source: str, name: str) -> Member:
    """Return the file that says why an image was set aside."""
    facts = {
        "name": name,
        "from": source,
        "reason": move.reason,
        "size": move.stamp.size,
        "mtime_ns": move.stamp.mtime_ns,
        "content": move.content or None,
    }
    body = json.dumps(facts, indent=2).encode() + b"\n"
    own = f"{name}.reason.json"
    return Member(Role.REASON, name, own, NO_STAMP, body=body)


def _answer(order: _Order, root: Path) -> Answer:
    move, relocation = order.move, order.relocation
    image = relocation.image
    if relocation.progress is Progress.DONE and image.role is Role.IMAGE and image.moved_stamp is not None:
        destination = f"{os.fspath(root)}/{relocation.destination}/{image.final}"
        return Moved(move.path, move.stamp, destination, move.outcome, image.moved_stamp)
    trouble = order.trouble or OSError(relocation.message)
    return _failure(move, trouble)


def _failure(move: Move, trouble: Exception) -> MoveFailed:
    match trouble:
        case VanishedError():
            failure = MoveFailure.VANISHED
        case ChangedError():
            failure = MoveFailure.CHANGED
        case BusyError():
            failure = MoveFailure.BUSY
        case _:
            failure = MoveFailure.DESTINATION
    where = f"{move.path} -> {move.folder}"
    said = f"{trouble.strerror}" if isinstance(trouble, OSError) and trouble.strerror else str(trouble)
    return MoveFailed(move.path, move.stamp, failure, f"{where}: {said}; the file is where it was")
