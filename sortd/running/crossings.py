"""The moves that wait for a copy to another file system: so many are handed over at a time, the others wait here.

What is handed over stands in the journal as intended. Few intents are looked through quickly before every batch and
ended quickly at a stop; a camera dump of a hundred thousand images may wait for weeks at no cost.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import chain

from sortd.events import Move

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
        self._waiting: dict[_Pair, deque[Move]] = {}
        """By pair, the one first whose turn is next."""
        self._renamed: deque[Move] = deque()
        """Those that waited because of a guess that was wrong."""
        self._crossed: set[_Pair] = set()
        self._count = 0
        """How many moves wait for a copy to end."""

    @property
    def waiting(self) -> int:
        """How many moves wait here."""
        return self._count + len(self._renamed)

    def admit(self, moves: Iterable[Move], handed_over: int) -> list[Move]:
        """Return the moves that may be tried now, of each pair the older ones first; the others wait.

        It takes as long as what comes in and goes out, however many wait.

        Args:
            moves: new ones.
            handed_over: how many copies have not ended yet.
        """
        admitted = list(self._renamed)
        self._renamed.clear()
        for move in moves:
            pair = _pair(move)
            if pair in self._crossed:
                self._waiting.setdefault(pair, deque()).append(move)
                self._count += 1
            else:
                admitted.append(move)
        for _ in range(min(self._most - handed_over, self._count)):
            pair = next(iter(self._waiting))
            queue = self._waiting.pop(pair)
            admitted.append(queue.popleft())
            self._count -= 1
            if queue:
                self._waiting[pair] = queue  # behind the others
        return admitted

    def learn(self, move: Move, *, crossed: bool) -> None:
        """Remember whether a move was handed over to be copied, or was renamed."""
        pair = _pair(move)
        if not crossed:
            self._crossed.discard(pair)
            released = self._waiting.pop(pair, ())
            self._renamed.extend(released)
            self._count -= len(released)
            return
        if len(self._crossed) >= MOST_GUESSES:
            self._crossed = set(self._waiting)
        self._crossed.add(pair)

    def give_up(self) -> Sequence[Move]:
        """Return all moves that wait, and keep none."""
        waiting = [*self._renamed, *chain.from_iterable(self._waiting.values())]
        self._renamed.clear()
        self._waiting.clear()
        self._count = 0
        return waiting


def _pair(move: Move) -> _Pair:
    """Return where from and where to, as finely as mounts are usual: the file's folder, and Dataset or Review."""
    return move.path.rpartition("/")[0], move.folder.partition("/")[0]
