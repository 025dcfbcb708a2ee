"""The mover of one dataset: moves files in batches, undoes moves, holds versions, and recovers moves that did not end.

A batch of any size needs two commits of the journal and one sync of each folder. Methods that write the journal raise
JournalError if that fails; opening the journal again then recovers the moves that were begun.
"""

import errno
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

from sortd import errors
from sortd.errors import BusyError, ChangedError, DestinationError, ImageError, SourceError, VanishedError
from sortd.events import Move, Moved, MoveFailed, MoveFailure, Outcome, Stamp
from sortd.files import stamp_of, sync_folder
from sortd.moving.actions import act
from sortd.moving.copy import make_part, move_by_copy, never, remove_obsolete
from sortd.moving.copy_queue import MOST_HANDED_OVER, CopyAdmission, MoveOrder, Submit
from sortd.moving.fs import (
    CANNOT_RENAME,
    Folders,
    Listings,
    check_source,
    check_unchanged,
    is_version,
    lstat_at,
    open_files,
    rename_new,
    sync_files,
)
from sortd.moving.plan import (
    NO_STAMP,
    FreeNames,
    LateCompanions,
    image_file,
    move_reason_of,
    new_token,
    reason_file,
    with_companions,
)
from sortd.moving.recovery import UndoPlan, UndoResult, plan_undos, preview_undos, recover
from sortd.store.journal import Journal
from sortd.store.records import (
    FolderNameError,
    MoveFile,
    MoveProgress,
    MoveRecord,
    Record,
    Role,
    checked_folder,
)

MoveAnswer = Moved | MoveFailed

BATCH = 64  # moves that share commits and syncs; each holds one or more descriptors until its bytes are synced
SYNC_THREADS = 16  # files of a batch synced at the same time; the threads end with the batch

_NO_RIGHTS = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_destination, _source = attrgetter("destination"), attrgetter("source")
_OF_THE_FILE = frozenset({errno.EPERM, errno.EINVAL, errno.EILSEQ, errno.ENAMETOOLONG})
"""Errors that concern one file only: it is immutable, or its name is not allowed there. Other files are still moved."""

_FAILURES = {
    VanishedError: MoveFailure.VANISHED,
    ChangedError: MoveFailure.CHANGED,
    BusyError: MoveFailure.BUSY,
    SourceError: MoveFailure.SOURCE,
}
_ENDED = frozenset({MoveProgress.DONE, MoveProgress.FAILED})
_UNENDED = DestinationError("an earlier move of this file has not ended, because of a disk error; sortd will try again")
_UNDER_WAY = BusyError("this file, or an earlier version of it, is being copied to another file system")
_COPY_INTERRUPTED = BusyError("sortd stops or closes this dataset; the file will be copied later")
_STOPPED = BusyError("sortd stops; the file will be moved at the next start")


class Mover:
    """Moves the files of one dataset; not thread-safe, except that the jobs it submits may run in another thread."""

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
        """Create a mover; call ``recover`` before the first move.

        Args:
            root: the dataset, spelled as in the paths of the moves.
            journal: the dataset's journal.
            companions: whether companions move with their image.
            submit: accepts a copy to another file system; the job may be called once in any thread, and its result
                must be given to ``end`` in this thread.
            interrupted: called by such a job between chunks; an interrupted copy is made again later.
            absence: returns why a disk of the dataset is missing; nothing is moved back into an empty mount point.
            rename: renames without replacing.
            sync_threads: files synced at the same time; with 1, no thread is started.
            listings: cached listings of folders.
        """
        self._root, self._journal, self._companions = root, journal, companions
        self._submit, self._interrupted, self._absence = submit, interrupted, absence
        self._rename, self._names, self._sync_threads = rename, FreeNames(), sync_threads
        self._listings, self._listings_of_jobs = listings or Listings(), listings or Listings()
        self._names_of_jobs = FreeNames()  # the jobs may run in another thread than this object
        self._admission = CopyAdmission()
        # By token: submitted copies that have not ended. Used in the thread of this object only, so that a move is
        # never recovered here while it is made there.
        self._copying: dict[str, MoveRecord] = {}
        self._moves: dict[str, Move] = {}  # by token: not answered yet
        self._undos: dict[str, UndoPlan] = {}  # by token: not answered yet
        self._gives_up = False
        self.late = LateCompanions(root, journal, self._listings, are_companions_moved=companions)

    def recover(self) -> list[MoveRecord]:
        """Complete or reverse every move that did not end, and return them; those still open wait for a disk."""
        if self._journal.open_tokens <= self._copying.keys():
            return []
        waiting = [one for one in self._journal.unfinished() if one.token not in self._copying]
        if waiting:
            try:
                with Folders(self._root) as folders:
                    waiting = [_recovered(folders, one, self._journal) for one in waiting]
            except OSError:
                return waiting  # the dataset is missing
            self._journal.settle(waiting)
        return waiting

    def move_all(self, moves: Sequence[Move]) -> list[MoveAnswer]:
        """Move these versions of these files with their companions; the answers returned are durable.

        A limited number of copies to another file system is given to ``submit``; ``end`` returns their answers. Each
        call, also without moves, submits the next ones.

        Raises:
            ValueError: a path is not below the dataset.
        """
        answers: list[MoveAnswer] = []
        while admitted := self._admission.admit(moves, len(self._copying)):
            answers += self._move(admitted)
            moves = ()
        return [*answers, *self.give_up()] if self._gives_up else answers

    def end(self, orders: Sequence[MoveOrder]) -> list[MoveAnswer | UndoResult]:
        """Accept the results of submitted copies; return the answers to their moves and undos."""
        self._end(orders)
        mine = [order for order in orders if order.move.token in self._moves]
        return [*map(self._answer, mine), *self._undone(orders)]

    @property
    def can_go_on(self) -> bool:
        """Whether moves wait that ``move_all`` would try now."""
        return self._admission.waiting > 0 and len(self._copying) < MOST_HANDED_OVER

    def give_up(self) -> list[MoveAnswer]:
        """Answer the moves that wait for a copy, and from now on those that would have to wait: sortd stops."""
        self._gives_up = True
        return [_failure(move, _STOPPED) for move in self.withdraw()]

    def withdraw(self) -> Sequence[Move]:
        """Remove and return the moves that wait for a copy to end; the caller must ask for them again."""
        return self._admission.give_up()

    # ------------------------------------------------------------ undo and holds

    def undo(self, records: Sequence[Record]) -> list[UndoResult]:
        """Move the images of these records back, newest first, and hold them there.

        Nothing is overwritten: if the old name is taken, the next free one is used. Copies to another file system are
        given to ``submit``, like moves.
        """
        if (problem := self._absence()) is not None:
            return [UndoResult(record, None, problem) for record in records]
        results: list[UndoResult] = []
        waiting = records
        while True:
            plans = plan_undos(self._root, waiting)
            made = [plan for plan in plans if isinstance(plan, UndoPlan)]
            refused = [plan for plan in plans if isinstance(plan, UndoResult)]
            if not made:
                return results + refused
            self._undos |= {plan.move.token: plan for plan in made}
            results += self._undone(self._run([MoveOrder(plan.move, plan.move_reason) for plan in made]))
            # After an image's second move is undone, the image is where its first move put it: try that record again.
            waiting = [one.record for one in refused]

    def preview_undo(self, records: Sequence[Record], back: set[str] | None = None) -> list[UndoResult]:
        """Return what ``undo`` would do; see ``preview_undos`` for ``back``, which several calls may share."""
        if (problem := self._absence()) is not None:
            return [UndoResult(record, None, problem) for record in records]
        return preview_undos(self._root, records, set() if back is None else back)

    def release(self, path: str | None = None) -> int:
        """Release a held file (an absolute path), or all; return their number."""
        return self._journal.release(None if path is None else self._relative(path))

    def held_version(self, path: str) -> Stamp | None:
        """Return the held version of a file (an absolute path), if any."""
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
                    answers.append(_failure(move, VanishedError("the file is gone")))
                except OSError as error:  # only the source folder was read so far
                    said = f"{os.path.dirname(move.path)}: {error.strerror}; {errors.advice_for(error)}"
                    answers.append(_failure(move, SourceError(said)))
                except (ImageError, FolderNameError) as error:
                    answers.append(_failure(move, error))
                else:
                    self._moves[record.token] = move
                    ordered.append(MoveOrder(record, move_reason_of(move)))
        ended = self._run(ordered)
        by_token = {order.move.token: order for order in ended}
        for token in (order.move.token for order in ordered):
            if token not in by_token or by_token[token].is_done:  # a failed move does not show whether it needs a copy
                self._admission.learn(self._moves[token], crossed=token not in by_token)
        return answers + [self._answer(order) for order in ended]

    def _record_of(self, folders: Folders, move: Move) -> MoveRecord:
        source, _, name = self._relative(move.path).rpartition("/")
        image = image_file(folders, move, checked_folder(source), name)
        destination = source if image.role is Role.KEYWORDS else checked_folder(move.folder)
        record = MoveRecord(new_token(), source, destination, (image,))
        if move.outcome is Outcome.FOLLOWED:
            record = replace(record, joins=True)
        elif self._companions:
            record = with_companions(folders, record)
        if move.outcome is Outcome.REJECTED:
            record = record.with_file(reason_file(move, source, name))
        return replace(record, obsolete=self._old_reason(source, name)) if source == "Rejected" else record

    def _old_reason(self, folder: str, name: str) -> tuple[MoveFile, ...]:
        """Return the reason file beside a rejected image, which is removed when a corrected image leaves."""
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
        """Return the results of the orders that belong to undos."""
        results = []
        for order in orders:
            if (plan := self._undos.pop(order.move.token, None)) is None:
                continue
            if order.is_done:
                results.append(plan.result(self._root, order.move.image.final))
            else:
                results.append(UndoResult(plan.record, None, str(order.error or order.move.message)))
        return results

    # ------------------------------------------------------------ a batch

    def _run(self, orders: Sequence[MoveOrder]) -> list[MoveOrder]:
        """Carry out orders with progress INTENDED; return those that have ended, durably.

        The others are copies that ``submit`` makes later; their results come to ``end``.
        """
        # A copy of a file whose move has not ended may exist already: another move would make a second one.
        unended: dict[tuple[str, str], Exception] = {
            _source_of(one): _UNENDED for one in self.recover() if one.progress not in _ENDED
        } | {_source_of(one): _UNDER_WAY for one in self._copying.values()}
        ended: list[MoveOrder] = []
        free: list[MoveOrder] = []
        for order in orders:
            error = unended.get(_source_of(order.move))
            (free if error is None else ended).append(order.with_error(error))
        for start in range(0, len(free), BATCH):
            of_batch, to_copy = self._run_batch(free[start : start + BATCH])
            ended += of_batch
            for order in to_copy:
                ended += self._submit_copy(order.with_error(None))
        return ended

    def _run_batch(self, orders: Sequence[MoveOrder]) -> tuple[list[MoveOrder], list[MoveOrder]]:
        """Return the orders that have ended, and those that need a copy."""
        try:
            folders = Folders(self._root, self._listings)
        except OSError as error:
            return [order.with_error(error) for order in orders], []
        with folders:
            ready, refused = _ready(folders, orders, self._sync_threads)
            if not ready:
                return refused, []
            self._journal.intend([(order.move, order.move_reason) for order in ready])
            placed = [order if order.move.stays else self._placed(folders, order) for order in ready]
            to_copy = [order for order in placed if _needs_copy(order)]
            synced = _synced(folders, [order for order in placed if not _needs_copy(order)])
            ended = [_ended(folders, order, self._journal) for order in synced]
            self._journal.settle(order.move for order in ended)
        return refused + ended, to_copy

    def _placed(self, folders: Folders, order: MoveOrder) -> MoveOrder:
        """Rename every file into the destination folder; the caller syncs both folders, and recovers after an error."""
        move = order.move
        try:
            source, destination = folders.open(move.source), folders.make(move.destination)
            for position, file in enumerate(move.files):
                if not file.leaves:
                    make_part(source, destination, move, position)
            placed = self._names.place(folders, move, lambda names: self._try_names(source, destination, move, names))
            remove_obsolete(folders, placed)
        except (ImageError, OSError, DestinationError, SourceError) as error:
            return order.with_error(error)
        return order.at(placed)

    def _try_names(self, source: int, destination: int, move: MoveRecord, names: tuple[str, ...]) -> MoveRecord | None:
        """Rename all files to these names; rename none and return None if a name is taken."""
        placed = list(move.files)
        done: list[tuple[int, str, str]] = []
        for position in sorted(range(len(names)), key=lambda position: not move.files[position].leaves):
            file, final = move.files[position], names[position]
            path = f"{move.source}/{file.name}"
            origin = (source, file.name) if file.leaves else (destination, move.part_name(position))
            if file.leaves:
                check_unchanged(source, file.name, file.stamp, path)
            try:
                self._rename(*origin, destination, final)
            except FileExistsError:
                self._rename_back(done, destination)
                return None
            except OSError as error:
                if error.errno in _NO_RIGHTS:
                    check_source(source, move.source)
                raise
            done.append((*origin, final))
            status = lstat_at(destination, final)
            if file.leaves and (status is None or not is_version(status, file.stamp)):
                self._rename_back(done, destination)
                raise ChangedError(f"{path}: the file was replaced while it was moved")
            moved = NO_STAMP if status is None else stamp_of(status)
            placed[position] = replace(file, final=final, moved_stamp=moved)
        return replace(move, files=tuple(placed))

    def _rename_back(self, done: list[tuple[int, str, str]], destination: int) -> None:
        for folder, name, final in reversed(done):
            try:
                self._rename(destination, final, folder, name)
            except FileExistsError as error:
                raise ChangedError(f"{name}: its name was taken while it was moved") from error

    # ------------------------------------------------------------ copies to another file system

    def _submit_copy(self, order: MoveOrder) -> list[MoveOrder]:
        self._copying[order.move.token] = order.move
        ended = self._submit(lambda: self._copy(order))
        self._end(ended)
        return ended

    def _end(self, orders: Iterable[MoveOrder]) -> None:
        """Forget submitted copies that ran: those still open are recovered as after a crash."""
        for order in orders:
            self._copying.pop(order.move.token, None)

    def _copy(self, order: MoveOrder) -> MoveOrder:
        """Copy to another file system, in any thread, with a separate connection to the journal."""
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
                names = self._names_of_jobs
                try:
                    if order.move.stays:
                        return order.at(act(folders, order, advance, journal.history, names, self._interrupted))
                    return order.at(move_by_copy(folders, order.move, advance, self._interrupted, names=names))
                except (ImageError, OSError, DestinationError, SourceError) as error:
                    return order.at(_recovered(folders, reached, journal)).with_error(error)
        except OSError as error:
            return order.with_error(error)


def _source_of(move: MoveRecord) -> tuple[str, str]:
    return move.source, move.image.name


def _recovered(folders: Folders, move: MoveRecord, journal: Journal) -> MoveRecord:
    try:
        return recover(folders, move, journal.advance)
    except (ImageError, DestinationError, OSError):
        return move  # still open: recovered again before the next batch and at the next start


def _ready(folders: Folders, orders: Iterable[MoveOrder], sync_threads: int) -> tuple[list[MoveOrder], list[MoveOrder]]:
    """Check and sync the files of each order; return the orders that may go on, and those with an error."""
    opened: list[tuple[MoveOrder, list[int]]] = []
    refused: list[MoveOrder] = []
    for order in orders:
        try:
            opened.append((order, open_files(folders, order.move)))
        except ImageError as error:
            refused.append(order.with_error(error))
    descriptors = [descriptor for _, of_order in opened for descriptor in of_order]
    try:
        failures = sync_files(descriptors, sync_threads)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    ready: list[MoveOrder] = []
    for order, of_order in opened:
        failure = next((failures[one] for one in of_order if one in failures), None)
        (ready if failure is None else refused).append(order.with_error(failure))
    return ready, refused


def _synced(folders: Folders, orders: list[MoveOrder]) -> list[MoveOrder]:
    """Sync each folder once, destinations before sources: the new name must be durable before the old one is gone."""
    for folder_of in (_destination, _source):
        failures: dict[str, Exception] = {}
        for folder in sorted({folder_of(order.move) for order in orders if order.error is None}):
            try:
                sync_folder(folders.open(folder))
            except OSError as error:
                failures[folder] = error if folder_of is _destination else SourceError(f"{folder}: {error.strerror}")
        orders = [order.with_error(order.error or failures.get(folder_of(order.move))) for order in orders]
    return orders


def _ended(folders: Folders, order: MoveOrder, journal: Journal) -> MoveOrder:
    if order.error is None:
        return order.at(replace(order.move, progress=MoveProgress.DONE))
    return order.at(_recovered(folders, order.move, journal))


def _needs_copy(order: MoveOrder) -> bool:
    return order.move.stays or (isinstance(order.error, OSError) and order.error.errno in CANNOT_RENAME)


def _failure(move: Move, error: Exception, outcome: str = "") -> MoveFailed:
    kinds = (kind for family, kind in _FAILURES.items() if isinstance(error, family))
    failure = next(kinds, MoveFailure.DESTINATION)
    if isinstance(error, OSError) and error.errno in _OF_THE_FILE:
        failure = MoveFailure.BUSY
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    advice = errors.advice_for_write(error) if isinstance(error, OSError) else ""
    then = (f" ({outcome})" if outcome not in said else "") + (f"; {advice}" if advice else "")
    return MoveFailed(move.path, move.stamp, failure, f"{move.path} -> {move.folder}: {said}{then}")
