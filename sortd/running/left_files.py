"""Left files: what stands in Images/ and is not looked at, named in the log once with the reason."""

from collections.abc import Callable
from itertools import islice
from time import monotonic

from sortd.messages import Writer
from sortd.moving.fs import writer_of
from sortd.names import Why, rule_below
from sortd.running.account import Account
from sortd.watching.scanning import why_left, why_unfinished

LEFT_SECONDS = 5.0
"""So long a file must have had a name that is not looked at before it is told of: most are renamed by then."""

SLICE = 500
"""Files that are told of in one turn of the loop."""

MOST = 100_000
"""Files that wait to be told of; the next scan finds the others."""


class LeftFiles:
    """What a scan or a hint named and nobody looks at, until that is told."""

    def __init__(self, root: str, account: Account, *, clock: Callable[[], float] = monotonic) -> None:
        """Begin with nothing to tell.

        Args:
            root: the dataset.
            account: says it.
            clock: seconds.
        """
        self._root, self._account, self._clock = root, account, clock
        self._seen: dict[str, float] = {}  # path, by when it was seen first

    @property
    def deadline(self) -> float:
        """When there is something to tell; infinity: nothing waits."""
        return next(iter(self._seen.values()), float("inf")) + LEFT_SECONDS

    def takes(self, path: str) -> bool:
        """Tell whether what a hint names is left out by its name; if so, take note of it."""
        if rule_below(path, self._root) is None:
            return False
        self.note(path)
        return True

    def writer_of(self, path: str) -> Writer:
        """Tell whether a file that has held still may be taken for finished; say so of one that is not."""
        why = why_unfinished(path, self._root)
        if why is None:
            return writer_of(path)
        self._account.stays(path, why)
        return Writer.UNFINISHED

    def note(self, path: str, why: Why | None = None) -> None:
        """Take note of a path, if it was not told of before for this reason."""
        if len(self._seen) < MOST and not (why is not None and self._account.has_told(path, why)):
            self._seen.setdefault(path, self._clock())

    def tell(self, *, at_once: bool = False) -> None:
        """Say why each that waited for its time stays, if it still stands there; ``at_once``: all of them."""
        if not at_once and self._clock() < self.deadline:
            return
        until = float("inf") if at_once else self._clock() - LEFT_SECONDS
        due = [path for path, seen in islice(self._seen.items(), None if at_once else SLICE) if seen <= until]
        for path in due:
            del self._seen[path]
            try:
                why = why_left(path, self._root)
            except OSError as error:
                self._account.unreadable(error)
                continue
            if why is not None:
                self._account.stays(path, why)
