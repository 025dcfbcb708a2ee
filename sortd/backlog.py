"""Every image that waits, and for what: all transitions of an image's state live in this file.

The rule:

    SETTLING -> READY -> ENCODING -> EMBEDDED -> MOVING -> (gone, or ABSTAINED in Review/)
       ^          ^          |           |          |
       |          |          +-> REFUSED |          |      REFUSED: stays where it is until it changes
       |          +----------------------+          |      EMBEDDED: answered, but nothing may move yet, or not there
       +--------------------------------------------+      any but MOVING -> HELD (undone) until changed or released

A file that shows another stamp than the one known starts again at SETTLING, from any state but MOVING. MOVING is ended
by ``moved`` or ``move_failed`` alone: such an image is kept apart from the paths, and what is seen under its path
meanwhile is about another version. An answer about a stamp that is not the known one is dropped by ``answered``, and
only there. Nothing here knows a clock: ``now`` is handed in, in seconds of any monotonic clock.
"""

import heapq
from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain

from sortd.messages import Refusal, Stamp, Writer
from sortd.sorting.entry import ON_THE_WAY, RESTING, Entry, State
from sortd.sorting.refusals import Refusals

LEASELESS_QUIET_SECONDS = 5.0
"""How long a file must hold still where no lease can tell whether a writer has it open (Syncthing and paperless
use the same order of magnitude); a close after writing makes the ordinary settle time enough."""

BUSY_RECHECK_SECONDS = 30.0
"""The longest pause between two looks at a file that a writer keeps open without writing."""

SETBACK_SECONDS = (1.0, 300.0)
"""First and longest wait of a version that settled and could not be taken for a reason of its own (it is immutable,
say, or changes whenever it is opened); it doubles between, so that months of trying cost next to nothing."""

_NOT_YET = frozenset({Writer.PRESENT, Writer.UNFINISHED})

STALE_TICKETS = 1000
"""So many places in the queue may be of images that are not there any more, beside as many as are."""


class Backlog:
    """The images of one dataset, each in one state; bounded by ``limit`` waiting and as many resting of each kind."""

    def __init__(self, *, settle_seconds: float, limit: int) -> None:
        """Begin empty; ``settle_seconds`` is how long a file must hold still."""
        self._settle_seconds = settle_seconds
        self._limit = limit
        self._entries: dict[str, Entry] = {}
        self._moving: dict[tuple[str, Stamp], Entry] = {}
        self._embedded: dict[str, dict[str, Entry]] = {}  # by the folder that each waits for, then by path
        self._tries: dict[str, Entry] = {}  # by folder: the image that was woken to try it
        self._counts: dict[State, int] = dict.fromkeys(State, 0)
        self._ready: deque[tuple[str, int]] = deque()
        self._heap: list[tuple[float, str]] = []
        self._refusals = Refusals()
        self._busy = 0
        self._ticket = 0
        self._scans = {False: 0, True: 0}  # of Images/, of Review/
        self.overflowed = False
        self.is_review_full = False
        """Whether an image in Review/ is not remembered for want of room: a later look through Review/ takes it up."""

    def configure(self, *, settle_seconds: float, limit: int) -> None:
        """Take over changed settings, for what is seen from now on."""
        self._settle_seconds, self._limit = settle_seconds, limit

    # ------------------------------------------------------------ questions

    def __len__(self) -> int:
        """Count the images known."""
        return len(self._entries) + len(self._moving)

    def count(self, state: State) -> int:
        """Count the images in one state."""
        return self._counts[state]

    @property
    def waiting(self) -> int:
        """Count the images that are work: everything but the resting ones."""
        counts = self._counts
        return len(self) - counts[State.ABSTAINED] - counts[State.REFUSED] - counts[State.HELD]

    @property
    def busy(self) -> int:
        """Count the settling images that cannot be taken, since a writer has them open, say; maybe for ever."""
        return self._busy

    def get(self, path: str) -> Entry | None:
        """Return what is known of the version that stands under a path, if anything."""
        return self._entries.get(path)

    def in_state(self, state: State) -> list[Entry]:
        """List the images in one state."""
        known = chain(self._entries.values(), self._moving.values()) if self._counts[state] else ()
        return [entry for entry in known if entry.state is state]

    def next_deadline(self) -> float | None:
        """Return when the next settling image wants to be looked at again."""
        return self._heap[0][0] if self._heap else None

    # ------------------------------------------------------------ what was seen

    def see(
        self,
        path: str,
        stamp: Stamp,
        now: float,
        *,
        writer: Writer | None,
        closed: bool,
        is_aside: bool = False,
        since: float | None = None,
    ) -> None:
        """Take in that ``path`` stands there with ``stamp``: the one way into SETTLING and on to READY."""
        if (path, stamp) in self._moving:
            self.forget(path)  # it is that version, and no other one
            return
        entry = self._entries.get(path)
        if entry is None:
            if self._refusals.has(path, stamp):
                return
            if self.waiting >= self._limit:
                self.overflowed = True
                return
            entry = self._add(path, stamp, State.SETTLING, now)
            entry.first_seen = now if since is None else min(since, now)
        elif entry.state is State.HELD and entry.stamp.is_same_version(stamp):
            entry.stamp = stamp  # new rights or links, or a hold of an earlier run, which does not tell of them
        elif entry.stamp != stamp:
            entry.told, entry.setbacks, entry.failures = "", 0, 0
            self._restart(entry, stamp, now)
        entry.is_aside |= is_aside
        entry.scan = self._scans[entry.in_review]
        if entry.state is State.SETTLING:
            entry.closed |= closed
            self._settle(entry, now, writer)

    def _settle(self, entry: Entry, now: float, writer: Writer | None) -> None:
        """Only a look that asked for a writer makes an image ready; all others set when to look."""
        if entry.is_unfinished and writer not in {None, Writer.UNFINISHED}:
            entry.is_unfinished, entry.still_since = False, now  # the last bytes may have come just now
        quiet = self._settle_seconds
        if writer is Writer.UNKNOWN and not entry.closed:
            quiet = max(quiet, LEASELESS_QUIET_SECONDS)
        due = entry.still_since + max(quiet, _patience(entry.setbacks))
        if writer is not None:
            entry.is_unfinished = writer is Writer.UNFINISHED
            self._note_writer(entry, present=writer in _NOT_YET or entry.setbacks > 1)
        if writer in _NOT_YET:
            still = now - entry.still_since
            due = now + min(max(self._settle_seconds, still / 2), BUSY_RECHECK_SECONDS)
        elif writer is not None and now >= due:
            self._make_ready(entry, now)
            return
        entry.recheck_at = max(due, now)
        if entry.heap_at is None or entry.recheck_at < entry.heap_at:
            entry.heap_at = entry.recheck_at
            heapq.heappush(self._heap, (entry.recheck_at, entry.path))

    def is_due_soon(self, path: str, now: float) -> bool:
        """Tell whether a settling image will be looked at within the settle time anyway."""
        entry = self._entries.get(path)
        if entry is None or entry.state is not State.SETTLING or entry.heap_at is None:
            return False
        return entry.recheck_at <= now + self._settle_seconds

    def due(self, now: float) -> Iterator[str]:
        """Yield the settling images whose time has come: each wants one look, which ``see`` takes in."""
        while self._heap and self._heap[0][0] <= now:
            at, path = heapq.heappop(self._heap)
            entry = self._entries.get(path)
            if entry is None or entry.heap_at != at:
                continue
            entry.heap_at = None
            if entry.state is not State.SETTLING:
                continue
            if entry.recheck_at > now:
                entry.heap_at = entry.recheck_at
                heapq.heappush(self._heap, (entry.recheck_at, path))
                continue
            yield path

    def rest_in_review(self, path: str, stamp: Stamp, now: float, *, generation: int) -> None:
        """Take in an image that sortd put into Review/, where that generation could not decide it."""
        entry = self._entries.get(path)
        if entry is None:
            if not self.has_room_in_review:
                self.is_review_full = True
                return
            entry = self._add(path, stamp, State.ABSTAINED, now)
            entry.generation, entry.in_review = generation, True
        elif entry.state is State.ABSTAINED:
            entry.stamp = stamp
        if entry.in_review:
            entry.scan = self._scans[True]

    def hold(self, path: str, stamp: Stamp, now: float) -> None:
        """Let this version rest until it changes or is released; one that moves rests if its move fails."""
        if (moving := self._moving.get((path, stamp))) is not None:
            moving.is_held = True
            return
        entry = self._entries.get(path) or self._add(path, stamp, State.HELD, now)
        entry.stamp = stamp
        self._go(entry, State.HELD)

    def release(self, path: str | None, now: float) -> None:
        """Let one held image, or all of them, settle again."""
        for entry in self._moving.values():
            entry.is_held = entry.is_held and path is not None and entry.path != path
        for entry in self.in_state(State.HELD):
            if path is None or entry.path == path:
                self._restart(entry, entry.stamp, now)

    def forget(self, path: str) -> None:
        """Drop what is known of a path: nothing stands there any more. A move that is under way is awaited."""
        entry = self._entries.pop(path, None)
        if entry is not None:
            self._leave(entry)

    def resting_below(self, folders: frozenset[str]) -> list[str]:
        """List the resting images that were seen in these folders, at any depth."""
        return [e.path for e in self._entries.values() if e.state in RESTING and _is_below(e.path, folders)]

    def lose_sight(self, path: str) -> None:
        """Drop an image that settles but cannot be looked at: a scan finds it again. Others keep their state."""
        entry = self._entries.get(path)
        if entry is not None and entry.state is State.SETTLING:
            self.forget(path)

    def start_scan(self, *, in_review: bool = False) -> None:
        """Begin to note which images a scan of Images/, or of Review/, names."""
        self._scans[in_review] += 1
        if in_review:
            self.is_review_full = False
        else:
            self.overflowed = False

    def unseen_by_scan(self, *, in_review: bool = False) -> list[str]:
        """List the resting images that the last scan did not name: each wants a look whether it is still there."""
        last = self._scans[in_review]
        known = self._entries.values()
        return [e.path for e in known if e.in_review == in_review and e.state in RESTING and e.scan < last]

    @property
    def has_room_in_review(self) -> bool:
        """Tell whether one more image of Review/ would be remembered."""
        return self._counts[State.ABSTAINED] < self._limit

    # ------------------------------------------------------------ the way to the encoder and back

    def take_batch(self, size: int, *, is_paused: Callable[[str], bool] = lambda _: False) -> list[Entry]:
        """Move up to ``size`` images from READY to ENCODING: newest first, every fourth the oldest.

        Newest first serves the person who drops a file now; the oldest quarter keeps a long inflow from starving
        what came first. What was decided already, for a folder that is paused again, waits for it and is not embedded.
        """
        batch: list[Entry] = []
        while self._ready and len(batch) < size:
            path, ticket = self._ready.popleft() if len(batch) % 4 == 3 else self._ready.pop()  # noqa: PLR2004 -- every fourth, as said
            entry = self._entries.get(path)
            if entry is None or entry.ticket != ticket or entry.state is not State.READY:
                continue
            if entry.place and is_paused(entry.place):
                self.embedded(entry, entry.place)
                continue
            self._go(entry, State.ENCODING)
            batch.append(entry)
        return batch

    def answered(self, path: str, stamp: Stamp) -> Entry | None:
        """Return the image that an answer is about, or None for a late answer about another version."""
        entry = self._entries.get(path)
        return entry if entry is not None and entry.stamp == stamp and entry.state is State.ENCODING else None

    def embedded(self, entry: Entry, place: str = "") -> None:
        """Any -> EMBEDDED: it was answered, but may not move yet; ``place`` is the folder that refuses, if one does."""
        self._go(entry, State.EMBEDDED)
        entry.place = place
        self._embedded.setdefault(place, {})[entry.path] = entry

    def moving(self, entry: Entry, folder: str) -> None:
        """ENCODING -> MOVING: decided."""
        entry.folder = folder
        self._go(entry, State.MOVING)
        del self._entries[entry.path]
        self._moving[entry.path, entry.stamp] = entry

    def refuse(self, entry: Entry, refusal: Refusal, message: str) -> bool:
        """ENCODING -> REFUSED: it stays where it is until it changes; tell whether this is to be said.

        What could not be read for want of rights is tried again after each scan: no stamp shows that rights changed.
        """
        if self._counts[State.REFUSED] >= self._limit:
            self.forget(entry.path)
            return self._refusals.note(entry.path, entry.stamp, message if refusal is Refusal.DENIED else "")
        self._go(entry, State.REFUSED)
        is_news, entry.told, entry.refusal = entry.told != message, message, refusal
        return is_news

    def retry_denied(self, now: float) -> None:
        """REFUSED -> SETTLING for all that could not be read for want of rights."""
        for entry in self.in_state(State.REFUSED):
            if entry.refusal is Refusal.DENIED:
                self._restart(entry, entry.stamp, now)

    def abstain_again(self, entry: Entry, *, generation: int) -> None:
        """ENCODING -> ABSTAINED: an image of Review/ that the new generation cannot decide either."""
        entry.generation = generation
        self._go(entry, State.ABSTAINED)

    def moved(self, path: str, stamp: Stamp) -> Entry | None:
        """MOVING -> gone; return what is gone, or None where this move was not awaited."""
        entry = self._moving.pop((path, stamp), None)
        if entry is not None:
            self._leave(entry)
        return entry

    def move_failed(self, path: str, stamp: Stamp) -> Entry | None:
        """MOVING -> EMBEDDED: it will be decided again; None where this move was not awaited.

        Where another version was seen under its path meanwhile, that one is known from now on, and this one is gone.
        """
        entry = self._moving.pop((path, stamp), None)
        if entry is None:
            return None
        entry.failures += 1
        if path in self._entries:
            self._leave(entry)
            return entry
        self._entries[path] = entry
        if entry.is_held:
            self._go(entry, State.HELD)
        else:
            self.embedded(entry)
        return entry

    def settle_again(self, entry: Entry, now: float) -> None:
        """Any -> SETTLING: this version has to hold still anew, longer each time."""
        entry.setbacks += 1
        self._restart(entry, entry.stamp, now)

    def resume(self) -> None:
        """EMBEDDED -> READY for all that wait for no folder: what kept them from moving is over.

        What failed most often comes last, lest one folder that refuses starve the images of all others.
        """
        for entry in sorted(self._embedded.get("", {}).values(), key=lambda entry: -entry.failures):
            self._queue(entry)

    @property
    def places(self) -> list[str]:
        """List the folders that images wait for."""
        return [place for place in self._embedded if place]

    def try_place(self, place: str) -> None:
        """EMBEDDED -> READY for one image that waits for a folder, unless the one woken before is still on its way."""
        waiting, tried = self._embedded.get(place), self._tries.get(place)
        if not waiting or (tried is not None and self._tries_still(tried, place)):
            return
        entry = self._tries[place] = next(iter(waiting.values()))
        self._queue(entry)

    def wake(self, place: str) -> None:
        """EMBEDDED -> READY for all that wait for a folder: something was moved there."""
        self._tries.pop(place, None)
        for entry in list(self._embedded.get(place, {}).values()):
            self._queue(entry)

    def reconsider(self, generation: int) -> None:
        """ABSTAINED, EMBEDDED -> READY for all that another generation decided, or could not decide."""
        for entry in list(self._entries.values()):
            if entry.state is State.EMBEDDED:
                self.embedded(entry)
            elif entry.state is State.ABSTAINED and entry.generation != generation:
                self._queue(entry, newest=False)
            entry.place = ""
        self.resume()

    def reconsider_one(self, path: str, generation: int) -> None:
        """ABSTAINED -> READY for an image of Review/ that another generation could not decide."""
        entry = self._entries.get(path)
        if entry is not None and entry.state is State.ABSTAINED and entry.generation != generation:
            self._queue(entry, newest=False)

    # ------------------------------------------------------------ the moving parts

    def _add(self, path: str, stamp: Stamp, state: State, now: float) -> Entry:
        entry = Entry(path=path, stamp=stamp, state=state, first_seen=now, still_since=now, scan=self._scans[False])
        self._entries[path] = entry
        self._counts[state] += 1
        return entry

    def _tries_still(self, entry: Entry, place: str) -> bool:
        is_known = self._entries.get(entry.path) is entry or self._moving.get((entry.path, entry.stamp)) is entry
        return is_known and entry.place == place and entry.state in ON_THE_WAY

    def _leave(self, entry: Entry) -> None:
        """Take an entry that is in no table any more out of the counts."""
        self._note_writer(entry, present=False)
        self._counts[entry.state] -= 1
        self._unplace(entry)

    def _unplace(self, entry: Entry) -> None:
        if entry.state is State.EMBEDDED:
            waiting = self._embedded[entry.place]
            del waiting[entry.path]
            if not waiting:
                del self._embedded[entry.place]

    def _note_writer(self, entry: Entry, *, present: bool) -> None:
        self._busy += present - entry.busy
        entry.busy = present

    def _go(self, entry: Entry, state: State) -> None:
        if entry.busy:  # that is asked of settling images alone
            self._note_writer(entry, present=False)
        self._unplace(entry)
        self._counts[entry.state] -= 1
        self._counts[state] += 1
        entry.state = state

    def _restart(self, entry: Entry, stamp: Stamp, now: float) -> None:
        entry.stamp, entry.still_since, entry.recheck_at, entry.closed = stamp, now, 0.0, False
        self._go(entry, State.SETTLING)
        entry.place = ""
        self._settle(entry, now, None)

    def _make_ready(self, entry: Entry, now: float) -> None:
        entry.ready_at = now
        self._queue(entry, newest=entry.first_seen >= self._newest_ready)

    @property
    def _newest_ready(self) -> float:
        """When the image at the newest end of the queue came."""
        newest = self._entries.get(self._ready[-1][0]) if self._ready else None
        return float("-inf") if newest is None else newest.first_seen

    def _queue(self, entry: Entry, *, newest: bool = True) -> None:
        self._ticket += 1
        entry.ticket = self._ticket
        self._go(entry, State.READY)
        if len(self._ready) > 2 * self._counts[State.READY] + STALE_TICKETS:
            self._drop_stale_tickets()
        if newest:
            self._ready.append((entry.path, entry.ticket))
        else:
            self._ready.appendleft((entry.path, entry.ticket))

    def _drop_stale_tickets(self) -> None:
        """Forget the places in the queue of images that went back to settling: a file may do so for months."""
        entries = self._entries
        self._ready = deque((path, t) for path, t in self._ready if path in entries and entries[path].ticket == t)


def _patience(setbacks: int) -> float:
    """Return how many seconds a version waits that could not be taken so many times."""
    first, longest = SETBACK_SECONDS
    return min(first * 2.0 ** min(setbacks - 1, 60), longest) if setbacks else 0.0


def _is_below(path: str, folders: frozenset[str]) -> bool:
    """Tell whether any folder that a path lies in is one of these."""
    end = path.rfind("/")
    while end > 0:
        if path[:end] in folders:
            return True
        end = path.rfind("/", 0, end)
    return False
