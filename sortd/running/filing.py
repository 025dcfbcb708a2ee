"""Filing of one dataset: moves, undoing them, holds and corrections, in the words of the core."""

import errno
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from sortd import mends
from sortd.errors import BusyError, ChangedError, ImageError, SourceError, VanishedError
from sortd.events import Move, Moved, MoveFailed, MoveFailure, Outcome, Stamp
from sortd.journal import Grounds, Journal, Record
from sortd.journaling.records import with_reason
from sortd.layout import Layout
from sortd.mover import NO_STAMP, Mover, new_token, with_companions
from sortd.moving.copying import never
from sortd.moving.listing import Listings
from sortd.moving.relocation import FolderNameError, Member, Relocation, Role, checked_folder, checked_name
from sortd.moving.renaming import Folders
from sortd.running.crossings import MOST_HANDED_OVER, Crossings
from sortd.running.latecomers import PLACES_FACT, Latecomers, places_of
from sortd.running.presence import Presence
from sortd.running.relocating import SYNC_THREADS, Order, Relocator, Submit, inline
from sortd.running.undoing import PutBack, Undoing

Answer = Moved | MoveFailed

_OF_THE_FILE = frozenset({errno.EPERM, errno.EINVAL, errno.EILSEQ, errno.ENAMETOOLONG})
"""What a disk answers about one file: it is immutable, or its name cannot be written there. The others go on."""


class Filing:
    """Moves the files of one dataset; used in one thread, but for the jobs that it submits."""

    def __init__(  # noqa: PLR0913 -- its collaborators, each named
        self,
        dataset_root: Path,
        journal: Journal,
        *,
        companions: bool = True,
        submit: Submit = inline,
        interrupted: Callable[[], bool] = never,
        mover: Mover | None = None,
        sync_threads: int = SYNC_THREADS,
        listings: Listings | None = None,
    ) -> None:
        """Begin; call ``recover`` before the first move.

        Args:
            dataset_root: the dataset, as its paths are spelled in the moves.
            journal: this dataset's.
            companions: whether sidecars, Live Photo and RAW+JPEG pairs travel with their image.
            submit: what to do with a job that copies to another file system, which can be long: it may be run in
                another thread, and is to be run once; what it returns is to come to ``end``, in this thread.
            interrupted: asked by such a job between chunks; one that was interrupted begins anew later.
            mover: puts files in their place.
            sync_threads: files that are synced at the same time; with 1, no thread is made.
            listings: what is in the folders.
        """
        self._root = dataset_root
        self._journal = journal
        self._companions = companions
        self._relocator = Relocator(
            dataset_root,
            journal,
            submit=submit,
            interrupted=interrupted,
            mover=mover,
            sync_threads=sync_threads,
            listings=listings,
        )
        self._undoing = Undoing(dataset_root, self._relocator)
        self._crossings = Crossings()
        self._latecomers = Latecomers(dataset_root, journal.history, self._relocator.listings, clock=journal.clock)
        self._moves: dict[str, Move] = {}  # by token; not answered yet
        self._gives_up = False

    def recover(self) -> list[Relocation]:
        """Bring every relocation that did not end to its end or its beginning; doing it again is no mistake.

        Returns:
            What was found open, as it is now; one that is still open waits for a disk.

        Raises:
            JournalError: the journal cannot be read or written.
        """
        return self._relocator.recover()

    def move_all(self, moves: Sequence[Move]) -> list[Answer]:
        """Move these versions of these files, companions with them; durable when it returns.

        Images that must go to another file system are given to ``submit``, so many at a time; their answers come from
        ``end``, and asking again, with no move if need be, gives the next ones to it.

        Raises:
            JournalError: it cannot be written; opening it anew recovers what was begun.
            ValueError: a path is not below the dataset.
        """
        answers: list[Answer] = []
        while admitted := self._crossings.admit(moves, self._relocator.crossing):
            answers += self._move(admitted)
            moves = ()
        return [*answers, *self.give_up()] if self._gives_up else answers

    def end(self, orders: Sequence[Order]) -> list[Answer | PutBack]:
        """Take note of what became of copies to another file system; return the answers that they were waited for.

        Raises:
            JournalError: it cannot be written; opening it anew recovers what was begun.
        """
        self._relocator.end(orders)
        mine = [order for order in orders if order.relocation.token in self._moves]
        return [*map(self._answer, mine), *self._undoing.told(orders)]

    @property
    def can_go_on(self) -> bool:
        """Whether moves wait that ``move_all`` would take up now."""
        return self._crossings.waiting > 0 and self._relocator.crossing < MOST_HANDED_OVER

    def give_up(self) -> list[Answer]:
        """Take up no more copies: answer what waits for one, and from now on what would have to wait.

        Copies that are under way are interrupted by whoever runs them.
        """
        self._gives_up = True
        stopped = BusyError("sortd stops; it is moved at the next start")
        return [_failure(move, stopped) for move in self.withdraw()]

    def withdraw(self) -> Sequence[Move]:
        """Return the moves that wait for a copy to end, and forget them: they are to be asked for again."""
        return self._crossings.give_up()

    def _move(self, moves: Sequence[Move]) -> list[Answer]:
        answers: list[Answer] = []
        ordered: list[Order] = []
        try:
            folders = Folders(self._root, self._relocator.listings)
        except OSError as error:
            return [_failure(move, error) for move in moves]
        with folders:
            for move in moves:
                try:
                    relocation = self._relocation(folders, move)
                except FileNotFoundError:
                    answers.append(_failure(move, VanishedError("nothing stands there any more")))
                except OSError as error:  # nothing but the folder that it lies in was looked at yet
                    said = f"{os.path.dirname(move.path)}: {error.strerror}; {mends.to_read(error)}"
                    answers.append(_failure(move, SourceError(said)))
                except (ImageError, FolderNameError) as error:
                    answers.append(_failure(move, error))
                else:
                    self._moves[relocation.token] = move
                    ordered.append(Order(relocation, _grounds(move)))
        ended = self._relocator.relocate(ordered)
        by_token = {order.relocation.token: order for order in ended}
        for token in (order.relocation.token for order in ordered):
            if token not in by_token or by_token[token].is_done:  # one that failed teaches nothing
                self._crossings.learn(self._moves[token], crossed=token not in by_token)
        return answers + [self._answer(order) for order in ended]

    def late_companion(self, path: str) -> Move | None:
        """Return the move that brings a file that is no image (an absolute path) to its image, which was filed before.

        Raises:
            JournalError: the journal cannot be read.
        """
        return self._latecomers.order_for(path) if self._companions else None

    def left_companions(self, path: str) -> list[Move]:
        """Return the moves of companions that came while their image (an absolute path) was being copied.

        Raises:
            JournalError: the journal cannot be read.
        """
        return self._latecomers.left_by(path) if self._companions else []

    def awaits_image(self, path: str) -> bool:
        """Tell whether a file that is no image (an absolute path) goes with an image that stands beside it."""
        return self._companions and self._latecomers.is_awaiting(path)

    def follow_images(self, found: Sequence[tuple[Record, str]], former: Record | None = None) -> list[Move]:
        """Return the moves of companions that stand where their images are no more; note where the images are.

        Args:
            found: what put each image into its place, and where it is now, relative to the dataset.
            former: an earlier move of the one image.

        Raises:
            JournalError: the journal cannot be read or written.
        """
        orders: list[Move] = []
        facts: dict[str, str] = {}
        for record, place in found if self._companions else ():
            left, places = self._latecomers.follow(record, place, former)
            orders += left
            if places != places_of(self._journal.history, record):
                facts[f"{PLACES_FACT}{record.id}"] = json.dumps(places)
        if facts:
            self._journal.note_all(facts)
        return orders

    def parted_companions(self, moved: Moved) -> list[Move]:
        """Return the moves of companions that a person left where an image had been, before it came back and moved.

        Raises:
            JournalError: the journal cannot be read or written.
        """
        path, place = self._relative(moved.path), self._relative(moved.destination)
        earlier = [one for one in self._journal.history.known(moved.stamp, limit=2) if one.destination_path != place]
        record = self._journal.history.last_known(moved.moved_stamp) if earlier else None
        if record is None or earlier[0].destination_path == path:
            return []  # it comes from the inbox, or from where sortd had put it, and its companions with it
        return self.follow_images([(record, place)], earlier[0])

    def undo(self, records: Sequence[Record]) -> list[PutBack]:
        """Put the images of these records back where they were, newest first, and hold them there.

        Nothing is overwritten: where the old name is taken, another free one is given. Images on another file system
        are given to ``submit`` like moves.

        Raises:
            JournalError: it cannot be written; opening it anew recovers what was begun.
        """
        if (problem := self._absence()) is not None:
            return [PutBack(record, None, problem) for record in records]
        return self._undoing.undo(records)

    def rehearse_undo(self, records: Sequence[Record], back: set[str] | None = None) -> list[PutBack]:
        """Say what ``undo`` would do, without doing it.

        Args:
            records: of the moves to be undone.
            back: what would stand where it was again; where that is asked in parts, the same set for each.
        """
        if (problem := self._absence()) is not None:
            return [PutBack(record, None, problem) for record in records]
        return self._undoing.rehearse(records, set() if back is None else back)

    def _absence(self) -> str | None:
        """Say which disk of the dataset is not there: into its mount point nothing may be put back."""
        return Presence(Layout(self._root), self._journal, needs_marker=False).problem()

    def hold(self, path: str, stamp: Stamp, reason: str) -> None:
        """Note that this version of this file (an absolute path) is not to be moved.

        Raises:
            JournalError: it could not be made durable.
        """
        self._journal.hold(self._relative(path), stamp, reason)

    def hold_all(self, versions: Sequence[tuple[str, Stamp]], reason: str) -> None:
        """Like ``hold`` for many, in one commit.

        Raises:
            JournalError: it could not be made durable.
        """
        self._journal.hold_all([(self._relative(path), stamp) for path, stamp in versions], reason)

    def release(self, path: str | None = None) -> int:
        """Let a held file (an absolute path) go, or every one; return how many there were.

        Raises:
            JournalError: it could not be made durable.
        """
        return self._journal.release(None if path is None else self._relative(path))

    def held(self) -> dict[str, Stamp]:
        """Return the versions that are not to be moved, by absolute path.

        Raises:
            JournalError: the journal cannot be read.
        """
        return {f"{os.fspath(self._root)}/{path}": stamp for path, stamp in self._journal.history.held().items()}

    def held_version(self, path: str) -> Stamp | None:
        """Return the version of this file (an absolute path) that is not to be moved, if there is one.

        Raises:
            JournalError: the journal cannot be read.
        """
        return self._journal.history.held_version(self._relative(path))

    def _relocation(self, folders: Folders, move: Move) -> Relocation:
        source, _, name = self._relative(move.path).rpartition("/")
        wanted = checked_name(move.wanted or name)
        image = Member(Role.IMAGE, checked_name(name), wanted, move.stamp, content=move.content)
        relocation = Relocation(new_token(), checked_folder(source), checked_folder(move.folder), (image,))
        if move.outcome is Outcome.FOLLOWED:
            relocation = replace(relocation, joins=True)
        elif self._companions:
            relocation = with_companions(folders, relocation)
        if move.outcome is Outcome.REJECTED:
            relocation = relocation.with_member(_reason(move, source, name))
        return self._without_old_reason(relocation)

    def _without_old_reason(self, relocation: Relocation) -> Relocation:
        """Let the reason that sortd wrote beside a rejected image go, once that image was mended and leaves."""
        if relocation.source != "Rejected":
            return relocation
        record = self._journal.history.last_put(relocation.source, relocation.image.name)
        reasons = () if record is None else record.relocation.members
        spent = tuple(
            replace(member, name=member.final, stamp=member.moved_stamp)
            for member in reasons
            if member.role is Role.REASON and member.moved_stamp is not None
        )
        return replace(relocation, spent=spent)

    def _relative(self, path: str) -> str:
        root = f"{os.fspath(self._root)}/"
        if not path.startswith(root):
            raise ValueError(f"{path}: it is not below the dataset {self._root}")
        return path.removeprefix(root)

    def _answer(self, order: Order) -> Answer:
        move, relocation = self._moves.pop(order.relocation.token), order.relocation
        moved_stamp = relocation.image.moved_stamp
        if order.is_done and moved_stamp is not None:
            destination = f"{os.fspath(self._root)}/{relocation.destination}/{relocation.image.final}"
            return Moved(move.path, move.stamp, destination, move.outcome, moved_stamp, relocation.message)
        return _failure(move, order.trouble or OSError(relocation.message), relocation.message)


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
    text = json.dumps(facts, indent=2, ensure_ascii=False)
    body = text.encode("utf-8", "backslashreplace") + b"\n"  # bytes that are no UTF-8 become escapes
    return Member(Role.REASON, name, f"{name}.reason.json", NO_STAMP, body=body)


def _failure(move: Move, trouble: Exception, outcome: str = "") -> MoveFailed:
    match trouble:
        case VanishedError():
            failure = MoveFailure.VANISHED
        case ChangedError():
            failure = MoveFailure.CHANGED
        case BusyError():
            failure = MoveFailure.BUSY
        case SourceError():
            failure = MoveFailure.SOURCE
        case OSError() if trouble.errno in _OF_THE_FILE:
            failure = MoveFailure.BUSY
        case _:
            failure = MoveFailure.DESTINATION
    said = trouble.strerror if isinstance(trouble, OSError) and trouble.strerror else str(trouble)
    mend = mends.to_write(trouble) if isinstance(trouble, OSError) else ""
    then = (f" ({outcome})" if outcome not in said else "") + (f"; {mend}" if mend else "")
    return MoveFailed(move.path, move.stamp, failure, f"{move.path} -> {move.folder}: {said}{then}")
