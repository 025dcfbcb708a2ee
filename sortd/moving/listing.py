"""The names in a folder, listed once for many questions about what stands beside a file or is in the way of one."""

import os
import re
import time
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator

from sortd.moving.companions import base_of, claim_on, fold, is_image, near, reach

_MARKS = "\0 (-.[_~"
"""What a stem may be followed by: an end, a suffix, a number, a mark of a duplicate, of an edit or of a conflict."""

_NUMBER = re.compile(r" ?\(\d+\)")

FRESH_NAMES = 1000
"""Folders of no more names than this are listed for every batch: that takes a millisecond."""

SECONDS_A_NAME = 1e-4
"""How long the listing of a larger folder serves, for each name in it: that is a hundred times what it takes."""

MOST_KEPT = 300_000
"""Names that are kept between two batches, in all folders together: some 40 MB."""


class Names:
    """The visible names in one folder, as they were when it was listed and as sortd changed them since."""

    def __init__(self, names: Iterable[str]) -> None:
        """Take the names of a folder."""
        self._keys = sorted(_key(name) for name in names if not name.startswith("."))

    def __len__(self) -> int:
        """Count them."""
        return len(self._keys)

    def near(self, name: str) -> list[str]:
        """Return the names of all that may belong to the same image as a file, itself included if it is there."""
        return list(dict.fromkeys(found for start, whole in near(name) for found in self._from(start, whole=whole)))

    def is_taken(self, name: str) -> bool:
        """Tell whether something stands there that shares a name's stem, or would belong to it, or it to that."""
        stem = fold(base_of(name))
        reached = reach(name)
        for other in self.near(name):
            stem_of_other = fold(base_of(other))
            if stem_of_other == stem:
                return True
            if not (is_image(name) and is_image(other)) and (stem in reach(other) or stem_of_other in reached):
                return True
        return False

    def has_relatives(self, name: str) -> bool:
        """Tell whether something stands there that would belong to a file of this name, or to which that would."""
        own = fold(name)
        folded = (fold(other) for other in self.near(name))
        return any(claim_on(other, own) is not None or claim_on(own, other) is not None for other in folded)

    def add(self, name: str) -> None:
        """Take a name in that sortd gave."""
        insort(self._keys, _key(name))

    def discard(self, name: str) -> None:
        """Forget a name that sortd took away."""
        at = bisect_left(self._keys, _key(name))
        if at < len(self._keys) and self._keys[at] == _key(name):
            del self._keys[at]

    def _from(self, start: str, *, whole: bool) -> Iterator[str]:
        """Yield the names with this folded beginning; of a whole stem, those that are not of its next number."""
        for mark in _MARKS if whole else ("",):
            begun = start + mark
            for at in range(bisect_left(self._keys, begun), len(self._keys)):
                key = self._keys[at]
                if not key.startswith(begun):
                    break
                if not (whole and _NUMBER.match(key, len(start))):
                    yield key.partition("\0")[2]


def _key(name: str) -> str:
    return f"{fold(name)}\0{name}"


class Listings:
    """The listings of folders that serve for a while: a large one is not read for each image that comes into it.

    What somebody else puts into a large folder meanwhile is not seen; no file is overwritten for that, and a companion
    that is missed follows its image later.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with nothing listed; ``clock`` gives seconds."""
        self._clock = clock
        self._kept: OrderedDict[tuple[int, int], tuple[float, Names]] = OrderedDict()

    def names(self, folder: int) -> Names:
        """Return the names in an open folder.

        Raises:
            OSError: it cannot be read.
        """
        status = os.fstat(folder)
        key, now = (status.st_dev, status.st_ino), self._clock()
        listed_at, names = self._kept.get(key, (0.0, None))
        if names is not None and now - listed_at < SECONDS_A_NAME * len(names):
            self._kept.move_to_end(key)
            return names
        names = Names(os.listdir(folder))
        self._kept.pop(key, None)
        if len(names) > FRESH_NAMES:
            self._kept[key] = (now, names)
            while sum(len(kept) for _, kept in self._kept.values()) > MOST_KEPT:
                self._kept.popitem(last=False)
        return names
