"""A sweep: scans of a folder taken slice by slice, so that a million files do not keep the loop from its work.

A folder that an event names is scanned alone. A tree that is moved in raises an event for each of its folders: what was
listed already and has not changed since is not listed again.
"""

import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from stat import S_ISDIR
from time import monotonic
from typing import TypeVar

from sortd.messages import Stamp
from sortd.names import Rule, Why, rule_for, rule_for_folder
from sortd.watching.scanning import scan_steps

SLICE = 2000
"""Files taken in one turn of the loop, at most: about ten milliseconds."""

SLICE_SECONDS = 0.02
"""How long one slice may take: a disk that must be read, or is across a network, answers fewer looks."""

MOST_FOLDERS = 20_000
"""Folders of which it is remembered that they are to be scanned, or how they looked when they were."""

Clock = Callable[[], float]
Step = tuple[str, Stamp | Why] | None
Found = tuple[str, Stamp]
FoundBelow = tuple[str, Stamp, float]
_T = TypeVar("_T")


def next_slice(looks: Iterator[_T], most: int, clock: Clock = monotonic) -> tuple[list[_T], bool]:
    """Take what one slice holds; tell too whether that was the last.

    Args:
        looks: what is to be looked at.
        most: how many, at most.
        clock: seconds; what is left after ``SLICE_SECONDS`` waits for another slice.
    """
    until = clock() + SLICE_SECONDS
    taken: list[_T] = []
    for look in looks:
        taken.append(look)
        if len(taken) >= most or clock() >= until:
            return taken, False
    return taken, True


class Sweep:
    """The scans of one folder, and of folders below it alone, that are under way."""

    def __init__(
        self,
        folder: str,
        report: Callable[[OSError], None],
        *,
        left: Callable[[str, Why], None] = lambda *_: None,
        rule_at_top: Callable[[str], Rule | None] = rule_for,
        clock: Clock = monotonic,
    ) -> None:
        """Prepare to scan ``folder``.

        Args:
            folder: its path.
            report: told what cannot be looked at.
            left: told what is left out, and why.
            rule_at_top: judges the folders directly in ``folder``; ``rule_for_folder`` where they are classes.
            clock: seconds.
        """
        self._folder, self._report, self._clock = folder, report, clock
        self._left, self._rule_at_top = left, rule_at_top
        self._found: Iterator[Step] | None = None
        self._is_wanted_again = False
        self._wanted: OrderedDict[str, float] = OrderedDict()
        self._below: Iterator[FoundBelow | None] | None = None
        self._listed: dict[str, tuple[int, int]] = {}  # inode and mtime of a folder when it was listed
        self._gone: set[str] = set()

    @property
    def is_under_way(self) -> bool:
        """Tell whether the scan of the whole folder has files left to take."""
        return self._found is not None

    @property
    def has_more(self) -> bool:
        """Tell whether any scan has files left to take."""
        return self.is_under_way or self._is_wanted_again or self._below is not None or bool(self._wanted)

    def begin(self) -> bool:
        """Begin to scan the whole folder, and tell so; where that is under way another one is to follow it instead."""
        if self._found is not None:
            self._is_wanted_again = True
            return False
        self._found = scan_steps(self._folder, report=self._report, rule_at_top=self._rule_at_top)
        self._is_wanted_again = False
        self._wanted.clear()
        self._listed.clear()
        return True

    def want(self, folder: str, at: float = 0.0) -> None:
        """Scan a folder below, at any depth of it, before the rest; nothing happens where it is about to be.

        Args:
            folder: its path.
            at: when it was asked for; ``take_below`` tells it with what is found there.
        """
        if folder == self._folder or len(self._wanted) >= MOST_FOLDERS:
            self._is_wanted_again = True
            self._wanted.clear()
        elif not self.will_list(os.path.dirname(folder)):
            self._wanted[folder] = at

    def will_list(self, folder: str) -> bool:
        """Tell whether a folder is about to be listed, or one that it lies in."""
        while self._wanted and len(folder) > len(self._folder):
            if folder in self._wanted:
                return True
            folder = os.path.dirname(folder)
        return False

    def end(self) -> None:
        """Take no more: what is left does not fit into the backlog, and is found by another sweep."""
        self._found, self._below, self._is_wanted_again = None, None, False
        self._wanted.clear()
        self._listed.clear()

    def take(self, most: int = SLICE) -> list[Found]:
        """Take the next slice of the whole folder, ``most`` files; after the last nothing of it is under way."""
        if self._found is None:
            return []
        taken, is_last = next_slice(self._found, most, self._clock)
        if is_last:
            self._found = None
        return list(self._files_of(taken))

    def _files_of(self, steps: Iterable[Step]) -> Iterator[Found]:
        """Yield the files among what was looked at, and tell of what is left out."""
        for step in steps:
            match step:
                case (path, Stamp() as mark):
                    yield path, mark
                case (path, Why() as why):
                    self._left(path, why)

    def take_below(self) -> list[FoundBelow]:
        """Take the next slice of the folders that were wanted: path, stamp, and when the folder was asked for."""
        if self._below is None:
            if not self._wanted:
                return []
            self._below = self._scans_below()
        taken, is_last = next_slice(self._below, SLICE, self._clock)
        if is_last:
            self._below = None
        return [found for found in taken if found is not None]

    def take_gone(self) -> frozenset[str]:
        """Return the folders that were wanted and are not there any more."""
        gone, self._gone = frozenset(self._gone), set()
        return gone

    @property
    def has_gone(self) -> bool:
        """Tell whether ``take_gone`` would return any."""
        return bool(self._gone)

    @property
    def is_wanted_again(self) -> bool:
        """Tell whether another sweep was asked for while this one was under way, or since."""
        return self._is_wanted_again

    def _scans_below(self) -> Iterator[FoundBelow | None]:
        while self._wanted:
            folder, at = self._wanted.popitem(last=False)
            for step in scan_steps(folder, report=self._report_below, scandir=self._list_changed):
                yield next(((*found, at) for found in self._files_of((step,))), None)

    def _report_below(self, error: OSError) -> None:
        """Take note of a folder that is gone, which is no trouble; tell of any other."""
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            self._report(error)
            return
        self._listed.clear()  # it may come back as it was, and what was known of its files is forgotten meanwhile
        if len(self._gone) < MOST_FOLDERS:
            self._gone.add(os.fsdecode(error.filename))

    def _list_changed(self, folder: str) -> "AbstractContextManager[Iterator[os.DirEntry[str]]]":
        """List a folder, or nothing where it has not changed since it was listed."""
        found = os.lstat(folder)
        if not S_ISDIR(found.st_mode):
            raise NotADirectoryError(0, "no folder", folder)
        looks = found.st_ino, found.st_mtime_ns
        if self._listed.get(folder) == looks:
            return nullcontext(iter(()))
        if len(self._listed) >= MOST_FOLDERS:
            self._listed.clear()
        self._listed[folder] = looks
        return os.scandir(folder)


class Glance:
    """A look at all of a folder of classes, slice by slice, to tell whether it differs from the last one."""

    def __init__(self, folder: str, report: Callable[[OSError], None], *, clock: Clock = monotonic) -> None:
        """Prepare to look at ``folder``; ``report`` is told what cannot be looked at."""
        self._folder, self._report, self._clock = folder, report, clock
        self._found: Iterator[Step] | None = None
        self._sum = 0
        self._seen: int | None = None

    @property
    def is_under_way(self) -> bool:
        """Tell whether files are left to look at."""
        return self._found is not None

    def begin(self) -> None:
        """Begin, unless one is under way: what it has passed already the next one sees."""
        if self._found is None:
            self._found = scan_steps(self._folder, report=self._report, rule_at_top=rule_for_folder)
            self._sum = 0

    def differs(self) -> bool:
        """Look at the next slice; with the last, tell whether other versions stand there than at the last look.

        The first look tells of no difference.
        """
        if self._found is None:
            return False
        taken, is_last = next_slice(self._found, SLICE, self._clock)
        found = (step for step in taken if step is not None and isinstance(step[1], Stamp))
        self._sum = (self._sum + sum(map(hash, found))) % 2**64  # in whatever order they are named
        if not is_last:
            return False
        self._found = None
        before, self._seen = self._seen, self._sum
        return before is not None and before != self._seen
