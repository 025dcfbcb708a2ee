"""The moves that wait for a copy to another file system: so many are handed over at a time, the others wait here.

What is handed over stands in the journal as intended. Few intents are looked through quickly before every batch and
ended quickly at a stop; a camera dump of a hundred thousand images may wait for weeks at no cost.
"""

from collections import deque
from collections.abc import Iterable, Sequence

from sortd.messages import Move

MOST_HANDED_OVER = 64
"""Copies of one dataset that are under way or queued: like a batch of renames."""

MOST_GUESSES = 4096
"""Pairs of folders that are remembered: a camera's card has a folder for each day, and months pass."""

_Pair = tuple[str, str]


class Crossings:
    """Says which moves may go on to the disk now; knows from earlier tries which ones will have to be copied.

    A guess only says whether a move may have to wait: whether it is renamed or copied is found out by trying, each
    time, and a guess that was wrong is forgotten.
    """

    def __init__(self, most: int = MOST_HANDED_OVER) -> None:
        """Begin without any guess."""
        self._most = most
        self._waiting: deque[Move] = deque()
        self._crossed: set[_Pair] = set()

    @property
    def waiting(self) -> int:
        """How many moves wait here."""
        return len(self._waiting)

    def admit(self, moves: Iterable[Move], handed_over: int) -> list[Move]:
        """Return the moves that may be tried now, older ones first; the others wait.

        Args:
            moves: new ones.
            handed_over: how many copies have not ended yet.
        """
        room = self._most - handed_over
        admitted: list[Move] = []
        still: deque[Move] = deque()
        for move in (*self._waiting, *moves):
            crosses = _pair(move) in self._crossed
            if crosses and room <= 0:
                still.append(move)
                continue
            room -= crosses
            admitted.append(move)
        self._waiting = still
        return admitted

    def learn(self, move: Move, *, crossed: bool) -> None:
        """Remember whether a move was handed over to be copied, or was renamed."""
        if crossed:
            if len(self._crossed) >= MOST_GUESSES:
                self._crossed.clear()
            self._crossed.add(_pair(move))
        else:
            self._crossed.discard(_pair(move))

    def give_up(self) -> Sequence[Move]:
        """Return all moves that wait, and keep none."""
        waiting, self._waiting = self._waiting, deque()
        return waiting


def _pair(move: Move) -> _Pair:
    """Return where from and where to, as finely as mounts are usual: the file's folder, and Dataset or Review."""
    return move.path.rpartition("/")[0], move.folder.partition("/")[0]
