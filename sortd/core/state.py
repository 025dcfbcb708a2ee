"""The images of one dataset and their states: every transition is in ``TRANSITIONS``.

    SETTLING -> READY -> ENCODING -> EMBEDDED -> MOVING -> gone | REVIEWED;   any but MOVING -> REFUSED | HELD | gone

MOVING is ended by ``moved`` or ``move_failed`` alone: such an image is kept apart from the paths, and what is seen
under its path meanwhile is another version. ``answered`` drops an answer about another stamp than the known one.
Times are seconds of a monotonic clock, handed in.
"""

import heapq
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain

from sortd.core.schedule import doubled_seconds
from sortd.events import ImageSeen, Refusal, Stamp, Writer


class State(StrEnum):
    """What an image waits for; the value is the name in ``sortd status``."""

    SETTLING = "settling"  # to hold still
    READY = "ready"  # for the encoder
    ENCODING = "encoding"  # for the worker's answer
    EMBEDDED = "embedded"  # answered, and may not move yet
    MOVING = "moving"  # for the end of its move
    REVIEWED = "abstained"  # in Review/, for another generation
    REFUSED = "refused"  # for another version
    HELD = "held"  # undone: for another version or a release


RESTING = frozenset({State.REVIEWED, State.REFUSED, State.HELD})
"""States that an image leaves only when something else happens: they are no work."""

_ON_THE_WAY = frozenset({State.READY, State.ENCODING, State.MOVING})  # to be moved soon

TRANSITIONS: dict[tuple[State, str], State] = {
    (state, change): after
    for change, before, after in (
        ("restart", frozenset(State) - {State.MOVING}, State.SETTLING),  # another version, or a setback
        ("queue", {State.SETTLING, State.EMBEDDED, State.REVIEWED}, State.READY),
        ("take", {State.READY}, State.ENCODING),
        ("wait", {State.READY, State.ENCODING, State.EMBEDDED, State.MOVING}, State.EMBEDDED),
        ("move", {State.ENCODING}, State.MOVING),
        ("abstain", {State.ENCODING}, State.REVIEWED),
        ("refuse", {State.ENCODING}, State.REFUSED),
        ("hold", frozenset(State), State.HELD),  # from MOVING: when the move has failed
    )
    for state in before
}
"""By state and change: the next state. Any other change of state is an error."""

LEASELESS_QUIET_SECONDS = 5.0
"""How long a file must hold still where no lease tells whether a writer has it open (as in Syncthing and paperless);
a close after writing makes the ordinary settle time enough."""

BUSY_RECHECK_SECONDS = 30.0  # between two looks at a file that a writer keeps open without writing, at most
SETBACK_SECONDS = (1.0, 300.0)  # first and longest wait of a version that settled and could not be taken

_NOT_YET = frozenset({Writer.PRESENT, Writer.UNFINISHED})

STALE_TICKETS = 1000  # of the queue may be obsolete, beside as many as are valid
MOST_REFUSALS = 1_000_000
"""Numbers that ``Refusals`` keeps: some 70 MB. Beyond, all are forgotten, and those files are looked into once more."""


@dataclass(slots=True, eq=False)
class Image:
    """One image: its known version, its state, and the times that its log line will want."""

    path: str
    stamp: Stamp
    state: State
    first_seen: float
    still_since: float
    ready_at: float = 0.0
    recheck_at: float = 0.0
    closed: bool = False
    busy: bool = False
    is_unfinished: bool = False  # a file beside it said so when it was last asked for
    heap_at: float | None = None
    ticket: int = 0
    generation: int = 0
    in_review: bool = False
    is_aside: bool = False  # it stands in Rejected/ already
    refusal: Refusal | None = None  # why it stays where it is
    told: str = ""  # why this version was refused: said once
    folder: str = ""  # where it was last to be moved
    place: str = ""  # the folder, of those that it is moved from and to, that refused and that it waits for
    is_held: bool = False  # it was held while it moved
    failures: int = 0
    setbacks: int = 0  # how often this version settled and could not be taken
    scan: int = 0

    @property
    def settle_seconds(self) -> float:
        """How long it took from its first sight to standing still, in seconds."""
        return max(0.0, self.ready_at - self.first_seen)


class Refusals:
    """Versions of files that stay where they are, 64 bits each, for those that no ``Image`` is kept of."""

    def __init__(self, most: int = MOST_REFUSALS) -> None:
        """Begin with none."""
        self._most = most
        self._known: set[int] = set()

    def has(self, path: str, stamp: Stamp, why: str = "") -> bool:
        """Tell whether this version was noted."""
        return hash((path, stamp, why)) in self._known

    def note(self, path: str, stamp: Stamp, why: str = "") -> bool:
        """Note a version, with why it was refused where that may change; tell whether it is news."""
        if self.has(path, stamp, why):
            return False
        if len(self._known) >= self._most:
            self._known.clear()
        self._known.add(hash((path, stamp, why)))
        return True


class Images:
    """The images of one dataset, each in one state; bounded by ``limit`` waiting and as many resting of each kind."""

    def __init__(self, *, settle_seconds: float, limit: int) -> None:
        """Begin empty; ``settle_seconds`` is how long a file must hold still."""
        self._images: dict[str, Image] = {}
        self._moving: dict[tuple[str, Stamp], Image] = {}
        self._embedded: dict[str, dict[str, Image]] = {}  # by the folder that each waits for, then by path
        self._tries: dict[str, Image] = {}  # by folder: the image that was woken to try it
        self.counts: dict[State, int] = dict.fromkeys(State, 0)
        self._ready: deque[tuple[str, int]] = deque()
        self._heap: list[tuple[float, str]] = []
        self._refusals = Refusals()
        self._ticket = 0
        self._scans = {False: 0, True: 0}  # of Images/, of Review/
        self.busy = 0  # settling images that cannot be taken, since a writer has them open, say; maybe for ever
        self.overflowed = False
        """Whether the scan under way, or an event since, named more than fits: the rest is asked for in time."""
        self.is_review_full = False
        """Whether an image in Review/ is not remembered for want of room: the next scan of it tries again."""
        self.configure(settle_seconds=settle_seconds, limit=limit)

    def configure(self, *, settle_seconds: float, limit: int) -> None:
        """Take over changed settings, for what is seen from now on."""
        self._settle_seconds, self._limit = settle_seconds, limit

    def __len__(self) -> int:
        """Count the images known."""
        return len(self._images) + len(self._moving)

    @property
    def waiting(self) -> int:
        """Count the images that are work: everything but the resting ones."""
        return len(self) - sum(self.counts[state] for state in RESTING)

    def __contains__(self, path: str) -> bool:
        """Tell whether a version that stands under this path is known."""
        return path in self._images

    def get(self, path: str) -> Image | None:
        """Return what is known of the version that stands under a path, if anything."""
        return self._images.get(path)

    def in_state(self, state: State) -> list[Image]:
        """List the images in one state."""
        known = chain(self._images.values(), self._moving.values()) if self.counts[state] else ()
        return [image for image in known if image.state is state]

    @property
    def next_deadline(self) -> float | None:
        """When the next settling image wants to be looked at again."""
        return self._heap[0][0] if self._heap else None

    @property
    def has_room_in_review(self) -> bool:
        """Tell whether one more image of Review/ would be remembered."""
        return self.counts[State.REVIEWED] < self._limit

    def see(self, seen: ImageSeen, now: float) -> None:
        """Take in that a version of a file stands there: the one way into SETTLING and on to READY."""
        path, stamp = seen.path, seen.stamp
        if (path, stamp) in self._moving:
            self.forget(path)  # it is that version, and no other one
            return
        image = self._images.get(path)
        if image is None:
            if self._refusals.has(path, stamp):
                return
            if self.waiting >= self._limit:
                self.overflowed = True
                return
            image = self._add(path, stamp, State.SETTLING, now)
            image.first_seen = now if seen.since is None else min(seen.since, now)
        elif image.state is State.HELD and image.stamp.is_same_version(stamp):
            image.stamp = stamp  # new rights or links, or a hold of an earlier run, which does not tell of them
        elif image.stamp != stamp:
            image.told, image.setbacks, image.failures = "", 0, 0
            self._restart(image, stamp, now)
        image.is_aside |= seen.is_aside
        image.scan = self._scans[image.in_review]
        if image.state is State.SETTLING:
            image.closed |= seen.closed
            self._settle(image, now, seen.writer)

    def _settle(self, image: Image, now: float, writer: Writer | None) -> None:
        """Only a look that asked for a writer makes an image ready; all others set when to look."""
        if image.is_unfinished and writer not in {None, Writer.UNFINISHED}:
            image.is_unfinished, image.still_since = False, now  # the last bytes may have come just now
        quiet = self._settle_seconds
        if writer is Writer.UNKNOWN and not image.closed:
            quiet = max(quiet, LEASELESS_QUIET_SECONDS)
        due = image.still_since + max(quiet, doubled_seconds(image.setbacks, SETBACK_SECONDS))
        if writer is not None:
            image.is_unfinished = writer is Writer.UNFINISHED
            self._note_busy(image, is_busy=writer in _NOT_YET or image.setbacks > 1)
        if writer in _NOT_YET:
            still = now - image.still_since
            due = now + min(max(self._settle_seconds, still / 2), BUSY_RECHECK_SECONDS)
        elif writer is not None and now >= due:
            image.ready_at = now
            last = self._images.get(self._ready[-1][0]) if self._ready else None
            self._queue(image, newest=last is None or image.first_seen >= last.first_seen)
            return
        self._look_at(image, max(due, now))

    def _look_at(self, image: Image, at: float) -> None:
        image.recheck_at = at
        if image.heap_at is None or at < image.heap_at:
            image.heap_at = at
            heapq.heappush(self._heap, (at, image.path))

    def is_due_soon(self, path: str, now: float) -> bool:
        """Tell whether a settling image will be looked at within the settle time anyway."""
        image = self._images.get(path)
        if image is None or image.state is not State.SETTLING or image.heap_at is None:
            return False
        return image.recheck_at <= now + self._settle_seconds

    def due(self, now: float) -> Iterator[str]:
        """Yield the settling images whose time has come: each wants one look, which ``see`` takes in."""
        while self._heap and self._heap[0][0] <= now:
            at, path = heapq.heappop(self._heap)
            image = self._images.get(path)
            if image is None or image.heap_at != at:
                continue
            image.heap_at = None
            if image.state is not State.SETTLING:
                continue
            if image.recheck_at <= now:
                yield path
            else:
                self._look_at(image, image.recheck_at)

    def rest_in_review(self, path: str, stamp: Stamp, now: float, *, generation: int) -> None:
        """Take in an image that sortd put into Review/, since that generation could not decide it."""
        image = self._images.get(path)
        if image is None:
            if not self.has_room_in_review:
                self.is_review_full = True
                return
            image = self._add(path, stamp, State.REVIEWED, now)
            image.generation, image.in_review = generation, True
        elif image.state is State.REVIEWED:
            image.stamp = stamp
        if image.in_review:
            image.scan = self._scans[True]

    def hold(self, path: str, stamp: Stamp, now: float) -> None:
        """Let this version rest until it changes or is released; one that moves rests if its move fails."""
        if (moving := self._moving.get((path, stamp))) is not None:
            moving.is_held = True
            return
        image = self._images.get(path) or self._add(path, stamp, State.HELD, now)
        image.stamp = stamp
        self._go(image, "hold")

    def release(self, path: str | None, now: float) -> None:
        """Let one held image, or all of them, settle again."""
        for image in self._moving.values():
            image.is_held = image.is_held and path is not None and image.path != path
        for image in self.in_state(State.HELD):
            if path is None or image.path == path:
                self._restart(image, image.stamp, now)

    def forget(self, path: str) -> None:
        """Drop what is known of a path: nothing stands there any more. A move that is under way is awaited."""
        if (image := self._images.pop(path, None)) is not None:
            self._leave(image)

    def resting_below(self, folders: frozenset[str]) -> list[str]:
        """List the resting images that were seen in these folders, at any depth."""
        return [one.path for one in self._images.values() if one.state in RESTING and _is_below(one.path, folders)]

    def lose_sight(self, path: str) -> None:
        """Drop an image that settles but cannot be looked at: a scan finds it again. Others keep their state."""
        if (image := self._images.get(path)) is not None and image.state is State.SETTLING:
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
        known = (image for image in self._images.values() if image.in_review == in_review and image.state in RESTING)
        return [image.path for image in known if image.scan < self._scans[in_review]]

    def take_batch(self, size: int, *, is_paused: Callable[[str], bool] = lambda _: False) -> list[Image]:
        """Move up to ``size`` images from READY to ENCODING: newest first, every fourth the oldest.

        The oldest quarter keeps a long inflow from starving what came first. What was decided already, for a folder
        that is paused again, waits for it and is not embedded.
        """
        batch: list[Image] = []
        while self._ready and len(batch) < size:
            path, ticket = self._ready.popleft() if len(batch) % 4 == 3 else self._ready.pop()  # noqa: PLR2004 -- every fourth, as said
            image = self._images.get(path)
            if image is None or image.ticket != ticket or image.state is not State.READY:
                continue
            if image.place and is_paused(image.place):
                self.embedded(image, image.place)
                continue
            self._go(image, "take")
            batch.append(image)
        return batch

    def answered(self, path: str, stamp: Stamp) -> Image | None:
        """Return the image that an answer is about, or None for a late answer about another version."""
        image = self._images.get(path)
        return image if image is not None and image.stamp == stamp and image.state is State.ENCODING else None

    def embedded(self, image: Image, place: str = "") -> None:
        """Note that it was answered, but may not move yet; ``place`` is the folder that refuses, if one does."""
        self._go(image, "wait")
        image.place = place
        self._embedded.setdefault(place, {})[image.path] = image

    def moving(self, image: Image, folder: str) -> None:
        """Note that it was decided, and is being moved to ``folder``."""
        image.folder = folder
        self._go(image, "move")
        del self._images[image.path]
        self._moving[image.path, image.stamp] = image

    def refuse(self, image: Image, refusal: Refusal, message: str) -> bool:
        """Let it stay where it is until it changes; tell whether this is to be said."""
        if self.counts[State.REFUSED] >= self._limit:
            self.forget(image.path)
            return self._refusals.note(image.path, image.stamp, message if refusal is Refusal.DENIED else "")
        self._go(image, "refuse")
        is_news, image.told, image.refusal = image.told != message, message, refusal
        return is_news

    def retry_denied(self, now: float) -> None:
        """Let all settle again that could not be read for want of rights: no stamp shows that rights changed."""
        for image in self.in_state(State.REFUSED):
            if image.refusal is Refusal.DENIED:
                self._restart(image, image.stamp, now)

    def abstain_again(self, image: Image, *, generation: int) -> None:
        """Let an image of Review/ rest that the new generation cannot decide either."""
        image.generation = generation
        self._go(image, "abstain")

    def moved(self, path: str, stamp: Stamp) -> Image | None:
        """Forget an image whose move is done; None where this move was not awaited."""
        image = self._moving.pop((path, stamp), None)
        if image is not None:
            self._leave(image)
        return image

    def move_failed(self, path: str, stamp: Stamp) -> Image | None:
        """Let an image be decided again whose move failed, unless another version stands under its path now.

        Returns None where this move was not awaited.
        """
        image = self._moving.pop((path, stamp), None)
        if image is None:
            return None
        image.failures += 1
        if path in self._images:
            self._leave(image)
            return image
        self._images[path] = image
        if image.is_held:
            self._go(image, "hold")
        else:
            self.embedded(image)
        return image

    def settle_again(self, image: Image, now: float) -> None:
        """Let this version hold still anew, longer each time."""
        image.setbacks += 1
        self._restart(image, image.stamp, now)

    def resume(self) -> None:
        """Queue all that wait for no folder: what kept them from moving is over. What failed most often comes last."""
        for image in sorted(self._embedded.get("", {}).values(), key=lambda image: -image.failures):
            self._queue(image)

    @property
    def places(self) -> list[str]:
        """List the folders that images wait for."""
        return [place for place in self._embedded if place]

    def try_place(self, place: str) -> None:
        """Queue one image that waits for a folder, unless the one woken before is still on its way."""
        waiting, tried = self._embedded.get(place), self._tries.get(place)
        is_tried = tried is not None and tried.place == place and tried.state in _ON_THE_WAY and self._knows(tried)
        if waiting and not is_tried:
            image = self._tries[place] = next(iter(waiting.values()))
            self._queue(image)

    def _knows(self, image: Image) -> bool:
        return self._images.get(image.path) is image or self._moving.get((image.path, image.stamp)) is image

    def wake(self, place: str) -> None:
        """Queue all that wait for a folder: something was moved there."""
        self._tries.pop(place, None)
        for image in list(self._embedded.get(place, {}).values()):
            self._queue(image)

    def reconsider(self, generation: int) -> None:
        """Queue all that another generation decided, or could not decide."""
        for image in list(self._images.values()):
            if image.state is State.EMBEDDED:
                self.embedded(image)
            self.reconsider_one(image.path, generation)
            image.place = ""
        self.resume()

    def reconsider_one(self, path: str, generation: int) -> None:
        """Queue an image of Review/ that another generation could not decide."""
        image = self._images.get(path)
        if image is not None and image.state is State.REVIEWED and image.generation != generation:
            self._queue(image, newest=False)

    def _add(self, path: str, stamp: Stamp, state: State, now: float) -> Image:
        image = Image(path=path, stamp=stamp, state=state, first_seen=now, still_since=now, scan=self._scans[False])
        self._images[path] = image
        self.counts[state] += 1
        return image

    def _leave(self, image: Image) -> None:
        """Take an image that is in no table any more out of the counts."""
        self._note_busy(image, is_busy=False)
        self.counts[image.state] -= 1
        self._unplace(image)

    def _unplace(self, image: Image) -> None:
        if image.state is State.EMBEDDED:
            waiting = self._embedded[image.place]
            del waiting[image.path]
            if not waiting:
                del self._embedded[image.place]

    def _note_busy(self, image: Image, *, is_busy: bool) -> None:
        self.busy += is_busy - image.busy
        image.busy = is_busy

    def _go(self, image: Image, change: str) -> None:
        after = TRANSITIONS[image.state, change]
        self._leave(image)
        self.counts[after] += 1
        image.state = after

    def _restart(self, image: Image, stamp: Stamp, now: float) -> None:
        image.stamp, image.still_since, image.recheck_at, image.closed = stamp, now, 0.0, False
        self._go(image, "restart")
        image.place = ""
        self._settle(image, now, None)

    def _queue(self, image: Image, *, newest: bool = True) -> None:
        self._ticket += 1
        image.ticket = self._ticket
        self._go(image, "queue")
        if len(self._ready) > 2 * self.counts[State.READY] + STALE_TICKETS:
            # A file may go back to settling for months.
            known = self._images
            self._ready = deque((path, t) for path, t in self._ready if path in known and known[path].ticket == t)
        (self._ready.append if newest else self._ready.appendleft)((image.path, image.ticket))


def _is_below(path: str, folders: frozenset[str]) -> bool:
    """Tell whether any folder that a path lies in is one of these."""
    end = path.rfind("/")
    while end > 0:
        if path[:end] in folders:
            return True
        end = path.rfind("/", 0, end)
    return False
