"""The moves of one dataset: collected, executed in groups, and reported, also those that end later.

One pair of directory syncs for fifty moves is eighty times as fast as one for each.
"""

import os
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from time import monotonic

from sortd.daemon.dataset_log import DatasetLog
from sortd.events import ImageGone, Leave, Move, Moved, MoveFailed, MoveFailure, Outcome, Refusal, Stamp
from sortd.moving.copy_queue import MoveOrder
from sortd.moving.mover import MoveAnswer, Mover
from sortd.moving.undo import UndoResult
from sortd.store.history import History
from sortd.store.records import MoveProgress, MoveRecord, Record

GROUP = 32
"""Moves of one turn of the loop: on a busy disk each takes some five milliseconds, in which nothing else happens."""

Heard = MoveAnswer | ImageGone


class MoveQueue:
    """Carries out the moves of one dataset and writes a line about each."""

    def __init__(self, mover: Mover, log: DatasetLog, *, history: History, root: Path) -> None:
        """Begin with nothing to move; ``log`` writes the lines."""
        self._mover, self._log, self._history, self._root = mover, log, history, root
        self._moves: list[Move] = []
        # Sent and not answered yet, and since when; one version can be asked for again before it was answered.
        self._asked: dict[tuple[str, Stamp], deque[tuple[Move, float]]] = {}

    def add(self, move: Move) -> None:
        """Take a move in; it waits for ``send``."""
        self._moves.append(move)

    @property
    def is_due(self) -> bool:
        """Whether there is something to send: moves that were gathered, or some that waited for a copy to end."""
        return bool(self._moves) or self._mover.can_go_on

    def send(self) -> list[Heard]:
        """Carry out the next group of what was gathered; return what has ended, a line written about each."""
        moves, self._moves = self._moves[:GROUP], self._moves[GROUP:]
        began = monotonic()
        for move in moves:
            self._asked.setdefault((move.path, move.stamp), deque()).append((move, began))
        self.tell_recovered(self._mover.recover())
        results = self._mover.move_all(moves)
        share = (monotonic() - began) / max(1, len(results))
        return [self._told(result, share) for result in results]

    def end(self, orders: Sequence[MoveOrder]) -> list[Heard | UndoResult]:
        """Take note of copies to another file system that have ended; return what became of them."""
        heard: list[Heard | UndoResult] = []
        for answer in self._mover.end(orders):
            if isinstance(answer, UndoResult):
                heard.append(answer)
                continue
            heard.append(self._told(answer, None))
            if isinstance(answer, Moved):
                self._add_new(self._mover.late.left_by(answer.path))
            elif answer.failure is MoveFailure.DESTINATION:
                heard += self._withdraw(answer.message)  # a full disk is not asked again for each that waits
        return heard

    def follow(self, leave: Leave) -> bool:
        """Take in the move of a file that stays, if it is a companion of an image that left before it; tell whether."""
        if leave.refusal not in {Refusal.NOT_AN_IMAGE, Refusal.EMPTY}:
            return False
        move = self._mover.late.move_for(leave.path)
        self._add_new([] if move is None else [move])
        return move is not None

    def awaits_image(self, leave: Leave) -> bool:
        """Tell whether a file stays only until the image goes that it belongs to: nothing is to be said of it."""
        return self._mover.late.awaits_image(leave.path)

    def follow_images(self, found: Sequence[tuple[Record, str]]) -> None:
        """Take the companions in that are to follow images which a person moved."""
        self._add_new(self._mover.late.follow_images(found))

    def _add_new(self, followers: Iterable[Move]) -> None:
        """Take companions in that are to follow, but for those that do so already: they are found in two ways."""
        gathered = {(move.path, move.stamp) for move in self._moves}
        for move in followers:
            if (move.path, move.stamp) not in gathered and (move.path, move.stamp) not in self._asked:
                self._moves.append(move)

    def refuse(self, message: str) -> list[MoveAnswer]:
        """Answer what was gathered, or waits for a copy to end, as failed: the dataset is not there."""
        moves, self._moves = self._moves, []
        return [*(_failed(move, message) for move in moves), *self._withdraw(message)]

    def give_up(self) -> list[MoveAnswer]:
        """Answer what waits for a copy to another file system: sortd stops. The next start moves it."""
        given_up = self._mover.give_up()
        for result in given_up:
            self._taken(result)
        return given_up

    def tell_recovered(self, moves: Iterable[MoveRecord]) -> None:
        """Write the lines of images whose moves had been cut short, by a crash or a disk, and have ended now.

        Of those that were taken back nothing is to be said, unless the image is not where it was: whoever looks for it
        is told what is known, the hidden name of a copy that cannot be proven whole, say.
        """
        for move in moves:
            if move.progress is MoveProgress.DONE:
                mark = move.image.moved_stamp
                record = None if mark is None else self._history.last_known(mark)
                if record is not None:
                    self._log.recovered(record, self._root)
            elif move.progress is MoveProgress.FAILED:
                place = self._root / move.source / move.image.name
                if not os.path.lexists(place):
                    self._log.taken_back(move, self._root)

    def _withdraw(self, message: str) -> list[MoveAnswer]:
        """Answer what waits for a copy to end as failed, without a line for each: the core asks for it again."""
        withdrawn = [_failed(move, message) for move in self._mover.withdraw()]
        for result in withdrawn:
            self._taken(result)
        return withdrawn

    def _told(self, result: MoveAnswer, seconds: float | None) -> Heard:
        """Write the line of a result; return what the core is to hear of it.

        It never asked for a companion to follow: one that did is gone, one that could not is found by the next scan.
        """
        move, began = self._taken(result)
        self._log.moved(move, result, 1e3 * (monotonic() - began if seconds is None else seconds))
        if move.outcome is Outcome.FOLLOWED:
            return ImageGone(move.path)
        if isinstance(result, Moved):
            self._add_new(self._mover.late.parted_from(result))
        return result

    def _taken(self, result: MoveAnswer) -> tuple[Move, float]:
        key = (result.path, result.stamp)
        asked = self._asked[key]
        taken = asked.popleft()
        if not asked:
            del self._asked[key]
        return taken


def _failed(move: Move, message: str) -> MoveAnswer:
    return MoveFailed(move.path, move.stamp, MoveFailure.DESTINATION, message)
