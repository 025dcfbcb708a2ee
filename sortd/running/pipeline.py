"""The pipeline: images of several lanes on their way to their embeddings, one batch encoded while the next is decoded.

The decoders are given work before a forward begins and are heard after it has ended, so they decode while the encoder
computes, and no thread is needed for it. What is on its way is bounded, whatever waits behind it; lanes take turns, an
image each, so that a full one keeps none waiting.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from time import monotonic

from sortd.images.pool import Batch, DecodedImage, DecoderPool
from sortd.messages import EmbeddedImage, ImageRefused, Stamp

PATIENCE_SECONDS = 0.2
"""How long a decoded image waits for company while others are being decoded; a lone one does not wait. Meanwhile the
decoders have the processor, so that only the latency is paid, and that is less than what a forward of thirty takes."""

BATCHES_ON_THE_WAY = 2
"""One that is encoded or about to be, and one that is decoded meanwhile."""

Deliver = Callable[[Sequence[EmbeddedImage | ImageRefused]], None]
Encode = Callable[[Sequence[DecodedImage]], list[EmbeddedImage]]


@dataclass(slots=True, eq=False)
class Lane:
    """The images of one asker: of a dataset's inbox, or of its references."""

    deliver: Deliver
    """Is given answers, some at a time, one for each image that was added."""
    waiting: deque[tuple[str, Stamp]] = field(default_factory=deque)
    batch: Batch = field(default_factory=Batch)


class Pipeline:
    """Lanes, decoders and an encoder; used by one thread, which calls ``advance`` while there is work."""

    def __init__(self, decoders: DecoderPool, encode: Encode, *, batch_size: int) -> None:
        """Begin empty; ``encode`` embeds up to ``batch_size`` decoded images at once."""
        self._decoders, self._encode, self._batch_size = decoders, encode, batch_size
        self._lanes: deque[Lane] = deque()
        self._decoded: deque[tuple[Lane, DecodedImage]] = deque()
        self._decoded_since = 0.0
        self._on_the_way = 0

    def open_lane(self, deliver: Deliver) -> Lane:
        """Return a new lane, whose answers go to ``deliver``."""
        lane = Lane(deliver)
        self._lanes.append(lane)
        return lane

    def close_lane(self, lane: Lane) -> None:
        """Drop a lane and what is left of its images: nothing more is delivered."""
        self._take_in()
        self._on_the_way -= len(lane.batch.waiting) + lane.batch.unanswered
        kept = deque(pair for pair in self._decoded if pair[0] is not lane)
        self._on_the_way -= len(self._decoded) - len(kept)
        self._decoded = kept
        self._decoders.drop(lane.batch)
        self._lanes.remove(lane)

    def add(self, lane: Lane, images: Iterable[tuple[str, Stamp]]) -> None:
        """Put images at the end of a lane."""
        lane.waiting.extend(images)

    @property
    def has_work(self) -> bool:
        """Is any image without its answer?"""
        return self._on_the_way > 0 or any(lane.waiting for lane in self._lanes)

    def advance(self, *, bell: int | None = None, at_most_seconds: float | None = None) -> None:
        """Take one step: wait for pixels if need be, and encode a batch if one is due.

        Args:
            bell: a descriptor that ends the wait as soon as it can be read.
            at_most_seconds: how long to wait at most: there is work elsewhere; None: as long as need be.

        Raises:
            StartupError: the decoding processes do not come up.
            OSError: this process is out of descriptors or memory.
        """
        self._feed()
        self._take_in()
        if not self._is_due(monotonic()):
            waits = [seconds for seconds in (self._patience(monotonic()), at_most_seconds) if seconds is not None]
            self._decoders.collect(min(waits, default=None), wake_descriptor=bell)
            self._take_in()
            self._feed()
        if self._is_due(monotonic()):
            self._encode_batch()

    # ------------------------------------------------------------ to the decoders

    def _feed(self) -> None:
        """Let as much be on its way as two batches and the processes hold, taking from the lanes in turn."""
        for lane in self._lanes:
            if lane.batch.waiting or lane.batch.unanswered:
                self._decoders.feed(lane.batch)  # what a process that died has left, too
        most = max(BATCHES_ON_THE_WAY * self._batch_size, 2 * self._decoders.workers)
        idle = 0
        while self._on_the_way < most and idle < len(self._lanes):
            lane = self._lanes[0]
            self._lanes.rotate(-1)
            if not lane.waiting:
                idle += 1
                continue
            idle = 0
            lane.batch.waiting.append(lane.waiting.popleft())
            self._on_the_way += 1
            self._decoders.feed(lane.batch)

    # ------------------------------------------------------------ from the decoders

    def _take_in(self) -> None:
        """Deliver refusals at once, and keep pixels for the next forward."""
        for lane in list(self._lanes):
            refused: list[ImageRefused] = []
            while lane.batch.answers:
                answer = lane.batch.answers.popleft()
                if isinstance(answer, ImageRefused):
                    refused.append(answer)
                    continue
                if not self._decoded:
                    self._decoded_since = monotonic()
                self._decoded.append((lane, answer))
            if refused:
                self._on_the_way -= len(refused)
                lane.deliver(refused)

    def _is_due(self, now: float) -> bool:
        """Is there a full batch, or one that nothing more will join in time?"""
        if not self._decoded:
            return False
        is_all = len(self._decoded) == self._on_the_way and not any(lane.waiting for lane in self._lanes)
        return is_all or len(self._decoded) >= self._batch_size or now >= self._decoded_since + PATIENCE_SECONDS

    def _patience(self, now: float) -> float | None:
        return max(0.0, self._decoded_since + PATIENCE_SECONDS - now) if self._decoded else None

    def _encode_batch(self) -> None:
        """Encode what is decoded; the processes have been given what they decode meanwhile."""
        taken = [self._decoded.popleft() for _ in range(min(self._batch_size, len(self._decoded)))]
        self._decoded_since = monotonic()
        self._on_the_way -= len(taken)
        self._feed()
        answers = self._encode([image for _, image in taken])
        by_lane: dict[int, tuple[Lane, list[EmbeddedImage | ImageRefused]]] = {}
        for (lane, _), answer in zip(taken, answers, strict=True):
            by_lane.setdefault(id(lane), (lane, []))[1].append(answer)
        for lane, own in by_lane.values():
            lane.deliver(own)
