"""The looks at single files: asked for by the core or by hints, and taken in slices."""

from collections import OrderedDict
from collections.abc import Callable, Iterator

from sortd.messages import Event, ImageSeen, LookRefused
from sortd.running.left_files import LeftFiles
from sortd.running.sweep import SLICE, next_slice
from sortd.watching.scanning import stamp


class Looks:
    """Looks at files and tells the core what it saw; files that are not there are told of by whoever asks for them."""

    def __init__(
        self,
        tell: Callable[[Event], None],
        knows: Callable[[str], bool],
        left_files: LeftFiles,
        report: Callable[[OSError], None],
    ) -> None:
        """Begin with nothing to look at.

        Args:
            tell: hands an event to the core.
            knows: tells whether the core remembers a path.
            left_files: takes note of what stays in Images/.
            report: told what cannot be looked at.
        """
        self._tell, self._knows, self._left_files, self._report = tell, knows, left_files, report
        self._wanted: OrderedDict[str, None] = OrderedDict()
        self._missing: set[str] = set()
        self.count = 0
        """Files that were looked at since the start."""

    @property
    def has_more(self) -> bool:
        """Tell whether files are to be looked at, or to be told of as missing."""
        return bool(self._wanted or self._missing)

    def want(self, path: str) -> None:
        """Ask for a look that tells the core whether a file may be taken."""
        self._wanted[path] = None

    def take(self) -> None:
        """Take the next slice of the looks that were asked for."""
        next_slice(self._take(), SLICE)

    def _take(self) -> Iterator[None]:
        """Look at what was asked for: newest first, every other the oldest, as images are encoded."""
        while self._wanted:
            path, _ = self._wanted.popitem(last=len(self._wanted) % 2 == 0)
            self.look(path, closed=False, inspect=True)
            yield None

    def look(self, path: str, *, closed: bool, inspect: bool = False, since: float | None = None) -> None:
        """Look at one file and tell the core of it.

        Args:
            path: the file.
            closed: whether a writer has just closed it.
            inspect: whether to look for a writer that has it open.
            since: when it came, on the monotonic clock, where that is known.
        """
        try:
            mark = stamp(path)
        except OSError as error:
            self._report(error)
            self._tell(LookRefused(path))
            return
        if mark is None:
            if self._knows(path):
                self._missing.add(path)
            self._left_files.note(path)
            return
        self.count += 1
        self._missing.discard(path)
        writer = self._left_files.writer_of(path) if inspect else None
        self._tell(ImageSeen(path, mark, writer, closed, since=since))

    def take_missing(self) -> set[str]:
        """Return the remembered files that were not there when they were looked at."""
        missing, self._missing = self._missing, set()
        return missing
