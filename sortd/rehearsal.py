"""A rehearsal: answers moves as if they had happened, and touches nothing; what ``once --dry-run`` files with."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from sortd.messages import Move, Moved, MoveFailed


class Rehearsal:
    """Carries out no move, but tells of each what it would be."""

    def __init__(self, root: Path, tell: Callable[[Move, str], None]) -> None:
        """Rehearse for the dataset at ``root``; ``tell`` hears of each move and its destination."""
        self._root, self._tell = root, tell

    def move_all(self, moves: Sequence[Move]) -> list[Moved | MoveFailed]:
        """Answer each move as done, at the place where it would stand if its name is free."""
        done: list[Moved | MoveFailed] = []
        for move in moves:
            destination = os.path.join(self._root, move.folder, os.path.basename(move.path))
            self._tell(move, destination)
            done.append(Moved(move.path, move.stamp, destination, move.outcome, move.stamp))
        return done
