"""The mover of one dataset: moves in batches that are journaled, done, durable, journaled again; undo, holds, recovery.

A batch costs two commits of the journal and one sync of each folder, however many images are in it.
What writes the journal raises JournalError where it cannot be written; opening it anew recovers what was begun.
"""

import errno
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

from sortd import errors
from sortd.errors import BusyError, ChangedError, DestinationError, ImageError, SourceError, VanishedError
from sortd.events import Move, Moved, MoveFailed, MoveFailure, Outcome, Stamp
from sortd.files import sync_folder
from sortd.moving.copy import move_by_copy
from sortd.moving.copy_queue import MOST_HANDED_OVER, CopyAdmission, MoveOrder, Submit
from sortd.moving.fs import CANNOT_RENAME, Folders, Listings, rename_new
from sortd.moving.parts import never, remove_obsolete
from sortd.moving.plan import FreeNames, LateCompanions, new_token, with_companions
from sortd.moving.recovery import recover
from sortd.moving.rename import NO_STAMP, Renamer, close_files, open_files, sync_files
from sortd.moving.undo import UndoPlan, UndoResult, plan_undos, preview_undos
from sortd.store.journal import Journal
from sortd.store.records import (
    FolderNameError,
    MoveFile,
    MoveProgress,
    MoveReason,
    MoveRecord,
    Record,
    Role,
    checked_folder,
    checked_name,
)

MoveAnswer = Moved | MoveFailed

BATCH = 64  # moves that share commits and syncs; each holds a descriptor or a few until its bytes are synced
SYNC_THREADS = 16  # files of a batch that are synced at the same time; the threads end with the batch

_destination, _source = attrgetter("destination"), attrgetter("source")
_OF_THE_FILE = frozenset({errno.EPERM, errno.EINVAL, errno.EILSEQ, errno.ENAMETOOLONG})
"""What a disk answers about one file: it is immutable, or its name cannot be written there. The others go on."""

_FAILURES = {
    VanishedError: MoveFailure.VANISHED,
    ChangedError: MoveFailure.CHANGED,
    BusyError: MoveFailure.BUSY,
    SourceError: MoveFailure.SOURCE,
}
_ENDED = frozenset({MoveProgress.DONE, MoveProgress.FAILED})
_UNENDED = DestinationError("an earlier move of it has not ended: its disk refused; it is tried again")
_UNDER_WAY = BusyError("it, or an earlier version of it, is being copied to another file system")
_COPY_INTERRUPTED = BusyError("sortd stops, or lets this dataset go: it is copied to its other file system later")
_STOPPED = BusyError("sortd stops; it is moved at the next start")


class Mover:
    """Moves the files of one dataset; used in one thread, but for the copies that it submits."""

    def __init__(  # noqa: PLR0913 -- its collaborators, each named
        self,
        root: Path,
        journal: Journal,
        *,
        companions: bool = True,
        submit: Submit = lambda job: [job()],
        interrupted: Callable[[], bool] = never,
        absence: Callable[[], str | None] = lambda: None,
        rename: Callable[[int, str, int, str], None] = rename_new,
        sync_threads: int = SYNC_THREADS,
        listings: Listings | None = None,
    ) -> None:
        """Begin; call ``recover`` before the first move.

        Args:
            root: the dataset, as its paths are spelled in the moves.
            journal: this dataset's.
            companions: whether sidecars, Live Photo and RAW+JPEG pairs travel with their image.
            submit: what to do with a job that copies to another file system, which can be long: it may be run in
                another thread, and is to be run once; what it returns is to come to ``end``, in this thread.
            interrupted: asked by such a job between chunks; one that was interrupted begins anew later.
            absence: says which disk of the dataset is not there: into its mount point nothing may be put back.
            rename: renames without replacing.
            sync_threads: files that are synced at the same time; with 1, no thread is made.
            listings: what is in the folders.
        """
        self._root, self._journal, self._companions = root, journal, companions
        self._submit, self._interrupted, self._absence = submit, interrupted, absence
        self._renamer, self._sync_threads = Renamer(rename=rename), sync_threads
        self._listings, self._listings_of_jobs = listings or Listings(), listings or Listings()
        self._names_of_jobs = FreeNames()  # of the jobs alone: the renamer, in another thread, has its own
        self._admission = CopyAdmission()
        # By token; handed to ``submit`` and not yet ended. Only the thread that owns this object touches it, so that
        # a move is never recovered here while it is carried out there.
        self._copying: dict[str, MoveRecord] = {}
        self._moves: dict[str, Move] = {}  # by token; not answered yet
        self._undos: dict[str, UndoPlan] = {}  # by token; not told yet
        self._gives_up = False
        self.late = LateCompanions(root, journal, self._listings, are_companions_moved=companions)

    def recover(self) -> list[MoveRecord]:
        """Bring every move that did not end to its end or its beginning; doing it again is no mistake.

        Returns:
            What was found open, as it is now; one that is still open waits for a disk.
        """
        if self._journal.open_tokens <= self._copying.keys():
            return []
        unfinished = [record.move for record in self._journal.history.unfinished()]
        waiting = [one for one in unfinished if one.token not in self._copying]
        if waiting:
            try:
                with Folders(self._root) as folders:
                    waiting = [_recovered(folders, one, self._journal) for one in waiting]
            except OSError:
                return waiting  # the dataset is not there
            self._journal.settle(waiting)
        return waiting

    def move_all(self, moves: Sequence[Move]) -> list[MoveAnswer]:
        """Move these versions of these files, companions with them; durable when it returns.

        Images that must go to another file system are given to ``submit``, so many at a time; their answers come from
        ``end``, and asking again, with no move if need be, gives the next ones to it.

        Raises:
            ValueError: a path is not below the dataset.
        """
        answers: list[MoveAnswer] = []
        while admitted := self._admission.admit(moves, len(self._copying)):
            answers += self._move(admitted)
            moves = ()
        return [*answers, *self.give_up()] if self._gives_up else answers

    def end(self, orders: Sequence[MoveOrder]) -> list[MoveAnswer | UndoResult]:
        """Take note of what became of copies to another file system; return the answers that they were waited for."""
        self._end(orders)
        mine = [order for order in orders if order.move.token in self._moves]
        return [*map(self._answer, mine), *self._undone(orders)]

    @property
    def can_go_on(self) -> bool:
        """Whether moves wait that ``move_all`` would take up now."""
        return self._admission.waiting > 0 and len(self._copying) < MOST_HANDED_OVER

    def give_up(self) -> list[MoveAnswer]:
        """Take up no more copies: answer what waits for one, and from now on what would have to wait."""
        self._gives_up = True
        return [_failure(move, _STOPPED) for move in self.withdraw()]

    def withdraw(self) -> Sequence[Move]:
        """Return the moves that wait for a copy to end, and forget them: they are to be asked for again."""
        return self._admission.give_up()

    # ------------------------------------------------------------ undo and holds

    def undo(self, records: Sequence[Record]) -> list[UndoResult]:
        """Put the images of these records back where they were, newest first, and hold them there.

        Nothing is overwritten: where the old name is taken, another free one is given. Images on another file system
        are given to ``submit`` like moves.
        """
        if (problem := self._absence()) is not None:
            return [UndoResult(record, None, problem) for record in records]
        told: list[UndoResult] = []
        waiting = records
        while True:
            plans = plan_undos(self._root, waiting)
            made = [plan for plan in plans if isinstance(plan, UndoPlan)]
            refused = [plan for plan in plans if isinstance(plan, UndoResult)]
            if not made:
                return told + refused
            self._undos |= {plan.move.token: plan for plan in made}
            told += self._undone(self._relocate([MoveOrder(plan.move, plan.move_reason) for plan in made]))
            # An image that went on from Review/ stands where its first move put it once the second is undone.
            waiting = [one.record for one in refused]

    def preview_undo(self, records: Sequence[Record], back: set[str] | None = None) -> list[UndoResult]:
        """Say what ``undo`` would do, without doing it.

        Args:
            records: of the moves to be undone.
            back: what would stand where it was again; where that is asked in parts, the same set for each.
        """
        if (problem := self._absence()) is not None:
            return [UndoResult(record, None, problem) for record in records]
        return preview_undos(self._root, records, set() if back is None else back)

    def hold(self, path: str, stamp: Stamp, reason: str) -> None:
        """Note that this version of this file (an absolute path) is not to be moved."""
        self._journal.hold(self._relative(path), stamp, reason)

    def release(self, path: str | None = None) -> int:
        """Let a held file (an absolute path) go, or every one; return how many there were."""
        return self._journal.release(None if path is None else self._relative(path))

    def held(self) -> dict[str, Stamp]:
        """Return the versions that are not to be moved, by absolute path."""
        return {f"{os.fspath(self._root)}/{path}": stamp for path, stamp in self._journal.history.held().items()}

    def held_version(self, path: str) -> Stamp | None:
        """Return the version of this file (an absolute path) that is not to be moved, if there is one."""
        return self._journal.history.held_version(self._relative(path))

    # ------------------------------------------------------------ from a move to its record, and to its answer

    def _move(self, moves: Sequence[Move]) -> list[MoveAnswer]:
        answers: list[MoveAnswer] = []
        ordered: list[MoveOrder] = []
        try:
            folders = Folders(self._root, self._listings)
        except OSError as error:
            return [_failure(move, error) for move in moves]
        with folders:
            for move in moves:
                try:
                    record = self._record_of(folders, move)
                except FileNotFoundError:
                    answers.append(_failure(move, VanishedError("nothing stands there any more")))
                except OSError as error:  # nothing but the folder that it lies in was looked at yet
                    said = f"{os.path.dirname(move.path)}: {error.strerror}; {errors.advice_for(error)}"
                    answers.append(_failure(move, SourceError(said)))
                except (ImageError, FolderNameError) as error:
                    answers.append(_failure(move, error))
                else:
                    self._moves[record.token] = move
                    ordered.append(MoveOrder(record, _move_reason(move)))
        ended = self._relocate(ordered)
        by_token = {order.move.token: order for order in ended}
        for token in (order.move.token for order in ordered):
            if token not in by_token or by_token[token].is_done:  # one that failed teaches nothing
                self._admission.learn(self._moves[token], crossed=token not in by_token)
        return answers + [self._answer(order) for order in ended]

    def _record_of(self, folders: Folders, move: Move) -> MoveRecord:
        source, _, name = self._relative(move.path).rpartition("/")
        wanted = checked_name(move.wanted or name)
        image = MoveFile(Role.IMAGE, checked_name(name), wanted, move.stamp, content=move.content)
        record = MoveRecord(new_token(), checked_folder(source), checked_folder(move.folder), (image,))
        if move.outcome is Outcome.FOLLOWED:
            record = replace(record, joins=True)
        elif self._companions:
            record = with_companions(folders, record)
        if move.outcome is Outcome.REJECTED:
            record = record.with_file(_reason_file(move, source, name))
        return replace(record, obsolete=self._old_reason(source, name)) if source == "Rejected" else record

    def _old_reason(self, folder: str, name: str) -> tuple[MoveFile, ...]:
        """Return the reason that sortd wrote beside a rejected image, which goes once that image was mended."""
        record = self._journal.history.last_put(folder, name)
        return tuple(
            replace(file, name=file.final, stamp=file.moved_stamp)
            for file in (() if record is None else record.move.files)
            if file.role is Role.REASON and file.moved_stamp is not None
        )

    def _relative(self, path: str) -> str:
        root = f"{os.fspath(self._root)}/"
        if not path.startswith(root):
            raise ValueError(f"{path}: it is not below the dataset {self._root}")
        return path.removeprefix(root)

    def _answer(self, order: MoveOrder) -> MoveAnswer:
        move, record = self._moves.pop(order.move.token), order.move
        moved_stamp = record.image.moved_stamp
        if order.is_done and moved_stamp is not None:
            destination = f"{os.fspath(self._root)}/{record.destination}/{record.image.final}"
            return Moved(move.path, move.stamp, destination, move.outcome, moved_stamp, record.message)
        return _failure(move, order.error or OSError(record.message), record.message)

    def _undone(self, orders: Iterable[MoveOrder]) -> list[UndoResult]:
        """Say what became of orders in which ``undo`` had put its plans; others are not spoken of."""
        told = []
        for order in orders:
            if (plan := self._undos.pop(order.move.token, None)) is None:
                continue
            if order.is_done:
                told.append(plan.result(self._root, order.move.image.final))
            else:
                told.append(UndoResult(plan.record, None, str(order.error or order.move.message)))
        return told

    # ------------------------------------------------------------ a batch

    def _relocate(self, orders: Sequence[MoveOrder]) -> list[MoveOrder]:
        """Carry out orders, which are in progress INTENDED; those that are returned have ended, durably.

        Moves to another file system that ``submit`` does later are missing: they come to ``end``.
        """
        # A copy of a source whose move has not ended may stand already: moving it again would make a second one.
        unended: dict[tuple[str, str], Exception] = {
            _source_of(one): _UNENDED for one in self.recover() if one.progress not in _ENDED
        } | {_source_of(one): _UNDER_WAY for one in self._copying.values()}
        ended = [
            order.with_error(unended[_source_of(order.move)]) for order in orders if _source_of(order.move) in unended
        ]
        free = [order for order in orders if _source_of(order.move) not in unended]
        for start in range(0, len(free), BATCH):
            of_batch, crossing = self._relocate_batch(free[start : start + BATCH])
            ended += of_batch
            for order in crossing:
                ended += self._submit_copy(order.with_error(None))
        return ended

    def _relocate_batch(self, orders: Sequence[MoveOrder]) -> tuple[list[MoveOrder], list[MoveOrder]]:
        """Return the orders that have ended, and those that must be copied."""
        try:
            folders = Folders(self._root, self._listings)
        except OSError as error:
            return [order.with_error(error) for order in orders], []
        with folders:
            ready, refused = _ready(folders, orders, self._sync_threads)
            if not ready:
                return refused, []
            self._journal.intend([(order.move, order.move_reason) for order in ready])
            placed = [self._placed(folders, order) for order in ready]
            crossing = [order for order in placed if _must_cross(order)]
            synced = _synced(folders, [order for order in placed if not _must_cross(order)])
            ended = [_ended(folders, order, self._journal) for order in synced]
            self._journal.settle(order.move for order in ended)
        return refused + ended, crossing

    def _placed(self, folders: Folders, order: MoveOrder) -> MoveOrder:
        try:
            placed = self._renamer.place(folders, order.move)
            remove_obsolete(folders, placed)
        except (ImageError, OSError, DestinationError, SourceError) as error:
            return order.with_error(error)
        return order.at(placed)

    # ------------------------------------------------------------ copies to another file system

    def _submit_copy(self, order: MoveOrder) -> list[MoveOrder]:
        self._copying[order.move.token] = order.move
        ended = self._submit(lambda: self._copy(order))
        self._end(ended)
        return ended

    def _end(self, orders: Iterable[MoveOrder]) -> None:
        """Take note that submitted orders were run: what of them is still open is recovered like after a crash."""
        for order in orders:
            self._copying.pop(order.move.token, None)

    def _copy(self, order: MoveOrder) -> MoveOrder:
        """Copy to another file system, in whatever thread ``submit`` chose, with a connection of its own."""
        if self._interrupted():
            return order.with_error(_COPY_INTERRUPTED)
        with self._journal.second_connection() as journal:
            ended = self._copied(order, journal)
            journal.settle([ended.move])
        return ended

    def _copied(self, order: MoveOrder, journal: Journal) -> MoveOrder:
        reached = order.move

        def advance(record: MoveRecord) -> None:
            nonlocal reached
            journal.advance(record)
            reached = record

        try:
            with Folders(self._root, self._listings_of_jobs) as folders:
                try:
                    names = self._names_of_jobs
                    return order.at(move_by_copy(folders, order.move, advance, self._interrupted, names=names))
                except (ImageError, OSError, DestinationError, SourceError) as error:
                    return order.at(_recovered(folders, reached, journal)).with_error(error)
        except OSError as error:
            return order.with_error(error)


def _source_of(record: MoveRecord) -> tuple[str, str]:
    return record.source, record.image.name


def _recovered(folders: Folders, record: MoveRecord, journal: Journal) -> MoveRecord:
    try:
        return recover(folders, record, journal.advance)
    except (ImageError, DestinationError, OSError):
        return record  # still open: tried again before the next batch and at the next start


def _ready(folders: Folders, orders: Iterable[MoveOrder], sync_threads: int) -> tuple[list[MoveOrder], list[MoveOrder]]:
    """Look at the files and make their bytes durable, before anything is written or renamed."""
    opened: list[tuple[MoveOrder, list[int]]] = []
    ready: list[MoveOrder] = []
    refused: list[MoveOrder] = []
    for order in orders:
        try:
            opened.append((order, open_files(folders, order.move)))
        except ImageError as error:
            refused.append(order.with_error(error))
    everything = [file for _, files in opened for file in files]
    try:
        failures = sync_files(everything, sync_threads)
    finally:
        close_files(everything)
    for order, files in opened:
        failure = next((failures[file] for file in files if file in failures), None)
        if failure is None:
            ready.append(order)
        else:
            refused.append(order.with_error(failure))
    return ready, refused


def _synced(folders: Folders, orders: list[MoveOrder]) -> list[MoveOrder]:
    """Sync each folder once, all the destinations before any source: a new name must last before the old one goes."""
    for folder_of in (_destination, _source):
        failures: dict[str, Exception] = {}
        for folder in sorted({folder_of(order.move) for order in orders if order.error is None}):
            try:
                sync_folder(folders.open(folder))
            except OSError as error:
                failures[folder] = error if folder_of is _destination else SourceError(f"{folder}: {error.strerror}")
        orders = [
            order if order.error is not None else order.with_error(failures.get(folder_of(order.move)))
            for order in orders
        ]
    return orders


def _ended(folders: Folders, order: MoveOrder, journal: Journal) -> MoveOrder:
    if order.error is None:
        return order.at(replace(order.move, progress=MoveProgress.DONE))
    return order.at(_recovered(folders, order.move, journal))


def _must_cross(order: MoveOrder) -> bool:
    return isinstance(order.error, OSError) and order.error.errno in CANNOT_RENAME


def _move_reason(move: Move) -> MoveReason:
    decided = MoveReason.of(move.decision, move.outcome.value)
    return replace(
        decided,
        reason=move.reason or decided.reason,
        generation=move.generation,
        encoder_id=move.encoder_id,
        content=move.content,
    )


def _reason_file(move: Move, source: str, name: str) -> MoveFile:
    """Return the file that says why an image was set aside."""
    facts = {
        "name": name,
        "from": source,
        "reason": move.reason,
        "size": move.stamp.size,
        "mtime_ns": move.stamp.mtime_ns,
        "content": move.content or None,
    }
    text = json.dumps(facts, indent=2, ensure_ascii=False)
    body = text.encode("utf-8", "backslashreplace") + b"\n"  # bytes that are no UTF-8 become escapes
    return MoveFile(Role.REASON, name, f"{name}.reason.json", NO_STAMP, body=body)


def _failure(move: Move, error: Exception, outcome: str = "") -> MoveFailed:
    kinds = (kind for family, kind in _FAILURES.items() if isinstance(error, family))
    failure = next(kinds, MoveFailure.DESTINATION)
    if isinstance(error, OSError) and error.errno in _OF_THE_FILE:
        failure = MoveFailure.BUSY
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    mend = errors.advice_for_write(error) if isinstance(error, OSError) else ""
    then = (f" ({outcome})" if outcome not in said else "") + (f"; {mend}" if mend else "")
    return MoveFailed(move.path, move.stamp, failure, f"{move.path} -> {move.folder}: {said}{then}")
