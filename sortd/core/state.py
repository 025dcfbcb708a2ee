"""The images of one dataset and their states: every transition is in ``TRANSITIONS``.

    SETTLING -> READY -> ENCODING -> EMBEDDED -> MOVING -> gone | REVIEWED;   any but MOVING -> REFUSED | HELD | gone

Only ``moved`` and ``move_failed`` end MOVING: a moving image is not looked up by its path, and a file seen under that
path meanwhile is another version. Times are seconds of a monotonic clock.
"""

import heapq
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate, chain

from sortd.core.refusals import Refusals
from sortd.core.schedule import doubled_seconds
from sortd.events import ImageSeen, Refusal, Stamp, Writer


class State(StrEnum):
    """What an image waits for; the value is the name in ``sortd status``."""

    SETTLING = "settling"  # for the file to stop changing
    READY = "ready"  # for a place in a batch
    ENCODING = "encoding"  # for the worker
    EMBEDDED = "embedded"  # for a decision, which may have to wait
    MOVING = "moving"  # for the end of its move
    REVIEWED = "abstained"  # in Review/, or in Images/ with some actions: for another generation
    REFUSED = "refused"  # for another version
    HELD = "held"  # undone by the operator: for another version or a release


RESTING = frozenset({State.REVIEWED, State.REFUSED, State.HELD})
"""States that an image leaves only by an event; these images do not count as backlog."""

_ON_THE_WAY = frozenset({State.READY, State.ENCODING, State.MOVING})

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
"""The next state by state and change; any other change is an error."""

LEASELESS_QUIET_SECONDS = 5.0
"""The settle time of files that cannot be leased and were not closed after writing (as in Syncthing and paperless)."""

BUSY_RECHECK_SECONDS = 30.0  # between two inspections of a file that a writer keeps open, at most
SETBACK_SECONDS = (1.0, 300.0)  # first and longest delay of a version that settled and then could not be read or moved

_NOT_YET = frozenset({Writer.PRESENT, Writer.UNFINISHED})

STALE_TICKETS = 1000  # obsolete entries of the queue, beyond as many as there are valid ones, at which it is rebuilt


@dataclass(slots=True, eq=False)
class Image:
    """One image: its version, its state, and the times for its log line."""

    path: str
    stamp: Stamp
    state: State
    first_seen: float
    still_since: float
    ready_at: float = 0.0
    recheck_at: float = 0.0
    closed: bool = False
    busy: bool = False
    is_unfinished: bool = False  # by a control file, at the last inspection
    heap_at: float | None = None
    ticket: int = 0
    generation: int = 0
    in_review: bool = False
    is_doubtful: bool = False  # abstained and stayed in Images/
    turned_away: int = 0  # the generation for which it looked like no class, in which it went to Review/; 0: none
    is_aside: bool = False
    refusal: Refusal | None = None  # why it stays where it is
    message: str = ""  # of the refusal
    folder: str = ""  # the destination of its last move
    place: str = ""  # the source or destination folder that failed and that it waits for
    is_held: bool = False  # while it was moving
    failures: int = 0
    setbacks: int = 0  # of this version after it had settled
    scan: int = 0

    @property
    def is_put_away(self) -> bool:
        """Whether it is in Review/ or Rejected/."""
        return self.in_review or self.is_aside

    @property
    def has_abstained(self) -> bool:
        """Whether this version abstained before: it is in Review/, or stayed in Images/."""
        return self.in_review or self.is_doubtful

    @property
    def settle_seconds(self) -> float:
        """The time from its first event until it was settled."""
        return max(0.0, self.ready_at - self.first_seen)


class Images:
    """The images of one dataset: at most ``limit`` waiting, and ``limit`` resting of each kind."""

    def __init__(self, *, settle_seconds: float, limit: int) -> None:
        """Start empty; a file is settled after ``settle_seconds`` without a change."""
        self._images: dict[str, Image] = {}
        self._moving: dict[tuple[str, Stamp], Image] = {}
        self._embedded: dict[str, dict[str, Image]] = {}  # by ``place``, then by path
        self._tries: dict[str, Image] = {}  # by place: the image that was queued to try it
        self.counts: dict[State, int] = dict.fromkeys(State, 0)
        self._ready: deque[tuple[str, int]] = deque()
        self._heap: list[tuple[float, str]] = []
        self._refusals = Refusals()
        self._ticket = 0
        self._scans = {False: 0, True: 0}  # of Images/, of Review/
        self.busy = 0  # settling images that a writer has open, perhaps for ever
        self.overflowed = False  # images did not fit since the last scan of Images/
        self.is_review_full = False  # images did not fit since the last scan of Review/
        self.configure(settle_seconds=settle_seconds, limit=limit)

    def configure(self, *, settle_seconds: float, limit: int) -> None:
        """Apply changed settings."""
        self._settle_seconds, self._limit = settle_seconds, limit

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._images) + len(self._moving)

    @property
    def waiting(self) -> int:
        """The number of images that are not resting."""
        return len(self) - sum(map(self.counts.__getitem__, RESTING))

    def __contains__(self, path: str) -> bool:
        """Return whether an image is known under this path."""
        return path in self._images

    def get(self, path: str) -> Image | None:
        """Return the image under a path, if any; a moving one is not."""
        return self._images.get(path)

    def in_state(self, state: State) -> list[Image]:
        """Return the images in one state."""
        known = chain(self._images.values(), self._moving.values()) if self.counts[state] else ()
        return [image for image in known if image.state is state]

    @property
    def next_deadline(self) -> float | None:
        """When the next settling image is to be inspected."""
        return self._heap[0][0] if self._heap else None

    @property
    def has_room_in_review(self) -> bool:
        """Whether one more image of Review/ can be added."""
        return self.counts[State.REVIEWED] < self._limit

    def see(self, seen: ImageSeen, now: float) -> None:
        """Process a sighting of a file: the only way into SETTLING and on to READY."""
        path, stamp = seen.path, seen.stamp
        if self._moving and (path, stamp) in self._moving:
            self.forget(path)  # a sighting of the moving version itself
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
            image.still_since = now - seen.still_seconds
        elif image.state is State.HELD and image.stamp.is_same_version(stamp):
            image.stamp = stamp  # permissions or links changed, or the hold is of an earlier run and has no ctime
        elif image.stamp != stamp:
            image.message, image.setbacks, image.failures = "", 0, 0
            self._restart(image, stamp, now)
        image.is_aside |= seen.is_aside
        image.scan = self._scans[image.in_review]
        if image.state is State.SETTLING:
            image.closed |= seen.closed
            self._settle(image, now, seen.writer)

    def _settle(self, image: Image, now: float, writer: Writer | None) -> None:
        """Make an image ready if ``writer`` is set and it is settled; else schedule an inspection."""
        if image.is_unfinished and writer not in {None, Writer.UNFINISHED}:
            image.is_unfinished, image.still_since = False, now  # it was just completed
        if writer not in {None, Writer.ABSENT}:
            image.still_since = max(image.still_since, image.first_seen)  # without a lease its times prove nothing
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
        """Return whether a settling image will be inspected within the settle time anyway."""
        image = self._images.get(path)
        if image is None or image.state is not State.SETTLING or image.heap_at is None:
            return False
        return image.recheck_at <= now + self._settle_seconds

    def due(self, now: float) -> Iterator[str]:
        """Yield the settling images whose inspection is due."""
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

    def rest_in_review(
        self, path: str, stamp: Stamp, now: float, *, generation: int, is_unfamiliar: bool = False
    ) -> None:
        """Add an image of Review/ that this generation could not decide."""
        image = self._images.get(path)
        if image is None:
            if not self.has_room_in_review:
                self.is_review_full = True
                return
            image = self._add(path, stamp, State.REVIEWED, now)
            image.generation, image.turned_away = generation, generation if is_unfamiliar else 0
        elif image.state is State.REVIEWED:
            image.stamp = stamp
        image.in_review = True  # one that is held since an earlier run was not known to be there
        image.scan = self._scans[True]

    def hold(self, path: str, stamp: Stamp, now: float) -> None:
        """Hold this version until it changes or is released; a moving one is held if its move fails."""
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
        """Remove the image under a path; a moving one stays until its move ends."""
        if (image := self._images.pop(path, None)) is not None:
            self._leave(image)

    def resting_below(self, folders: frozenset[str]) -> list[str]:
        """Return the paths of resting images at any depth below these folders."""
        resting = (path for path, image in self._images.items() if image.state in RESTING)
        return [path for path in resting if not folders.isdisjoint(accumulate(path.split("/")[:-1], "{}/{}".format))]

    def lose_sight(self, path: str) -> None:
        """Remove an image that is settling and cannot be read: a scan finds it again. Others keep their state."""
        if (image := self._images.get(path)) is not None and image.state is State.SETTLING:
            self.forget(path)

    def start_scan(self, *, in_review: bool = False) -> None:
        """Start to note which images a scan of Images/, or of Review/, finds."""
        self._scans[in_review] += 1
        if in_review:
            self.is_review_full = False
        else:
            self.overflowed = False

    def unseen_by_scan(self, *, in_review: bool = False) -> list[str]:
        """Return the paths of resting images that the last scan did not find."""
        known = (image for image in self._images.values() if image.in_review == in_review and image.state in RESTING)
        return [image.path for image in known if image.scan < self._scans[in_review]]

    def take_batch(self, size: int, *, is_paused: Callable[[str], bool] = lambda _: False) -> list[Image]:
        """Move up to ``size`` images from READY to ENCODING: the newest first, but every fourth time the oldest.

        Images that were decided for a folder whose delay is running wait for it instead.
        """
        batch: list[Image] = []
        while self._ready and len(batch) < size:
            path, ticket = self._ready.popleft() if len(batch) % 4 == 3 else self._ready.pop()  # noqa: PLR2004 -- every fourth
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
        """Return the image that an answer is about; None if its version or its state has changed since."""
        image = self._images.get(path)
        return image if image is not None and image.stamp == stamp and image.state is State.ENCODING else None

    def embedded(self, image: Image, place: str = "") -> None:
        """Let an answered image wait, for the folder ``place`` if that one failed."""
        self._go(image, "wait")
        image.place = place
        self._embedded.setdefault(place, {})[image.path] = image

    def moving(self, image: Image, folder: str) -> None:
        """Mark a decided image as being moved to ``folder``."""
        image.folder = folder
        self._go(image, "move")
        del self._images[image.path]
        self._moving[image.path, image.stamp] = image

    def refuse(self, image: Image, refusal: Refusal, message: str) -> bool:
        """Let an image stay where it is until it changes; return whether this is to be logged."""
        if self.counts[State.REFUSED] >= self._limit:
            self.forget(image.path)
            return self._refusals.note(image.path, image.stamp, message if refusal is Refusal.DENIED else "")
        self._go(image, "refuse")
        is_news, image.message, image.refusal = image.message != message, message, refusal
        return is_news

    def retry_denied(self, now: float) -> None:
        """Let images settle again that could not be read: no stamp shows that permissions changed."""
        for image in self.in_state(State.REFUSED):
            if image.refusal is Refusal.DENIED:
                self._restart(image, image.stamp, now)

    def abstain_again(self, image: Image, *, generation: int) -> None:
        """Let an image of Review/ rest that this generation cannot decide either."""
        image.generation = generation
        self._go(image, "abstain")

    def abstain_in_place(self, image: Image, message: str, *, generation: int) -> bool:
        """Let an image of Images/ that this generation could not decide rest there; return whether this is news."""
        if not self.has_room_in_review:
            self.forget(image.path)
            return self._refusals.note(image.path, image.stamp)
        self.abstain_again(image, generation=generation)
        is_news, image.message, image.refusal = image.message != message, message, Refusal.ABSTAINED
        image.is_doubtful = True
        return is_news

    def moved(self, path: str, stamp: Stamp) -> Image | None:
        """Remove and return the image whose move has ended; None if no such move is known."""
        image = self._moving.pop((path, stamp), None)
        if image is not None:
            self._leave(image)
        return image

    def move_failed(self, path: str, stamp: Stamp) -> Image | None:
        """Return the image of a failed move, if any; it is decided again unless another version has its path."""
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
        """Let a version settle again, with growing delays."""
        image.setbacks += 1
        self._restart(image, image.stamp, now)

    def resume(self) -> None:
        """Queue all images that wait for no folder, those with the most failures last."""
        for image in sorted(self._embedded.get("", {}).values(), key=lambda image: -image.failures):
            self._queue(image)

    @property
    def places(self) -> list[str]:
        """The folders that images wait for."""
        return [place for place in self._embedded if place]

    def try_place(self, place: str) -> None:
        """Queue one image that waits for a folder, unless the last one tried is still on its way."""
        waiting, tried = self._embedded.get(place), self._tries.get(place)
        if tried is not None and tried.place == place and tried.state in _ON_THE_WAY:
            is_known = self._images.get(tried.path) is tried or self._moving.get((tried.path, tried.stamp)) is tried
            waiting = None if is_known else waiting
        if waiting:
            image = self._tries[place] = next(iter(waiting.values()))
            self._queue(image)

    def wake(self, place: str) -> None:
        """Queue all images that wait for a folder: a move to it has succeeded."""
        self._tries.pop(place, None)
        for image in list(self._embedded.get(place, {}).values()):
            self._queue(image)

    def reconsider(self, generation: int) -> None:
        """Queue all images that another generation decided, or could not decide."""
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
        """Remove an image from the counts."""
        self._note_busy(image, is_busy=False)
        self.counts[image.state] -= 1
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
        image.place, image.is_doubtful = "", False
        self._settle(image, now, None)

    def _queue(self, image: Image, *, newest: bool = True) -> None:
        self._ticket += 1
        image.ticket = self._ticket
        self._go(image, "queue")
        if len(self._ready) > 2 * self.counts[State.READY] + STALE_TICKETS:
            known = self._images
            self._ready = deque((path, t) for path, t in self._ready if path in known and known[path].ticket == t)
        (self._ready.append if newest else self._ready.appendleft)((image.path, image.ticket))
