"""Files to embeddings: what the cache knows is taken from it, the rest is decoded, encoded and remembered."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from time import monotonic, perf_counter

import numpy as np

from sortd.arrays import FloatArray
from sortd.encoder.base import Encoder
from sortd.errors import ModelError
from sortd.events import EmbeddedImage, ImageRefused, Stamp
from sortd.images.pool import Batch, DecodedImage, DecoderPool
from sortd.store.cache import Cache

PATIENCE_SECONDS = 0.2
"""How long a decoded image waits for others that are being decoded, to be encoded with them: less than a forward."""

BATCHES_ON_THE_WAY = 2  # one that is encoded or about to be, and one that is decoded meanwhile

Deliver = Callable[[Sequence[EmbeddedImage | ImageRefused]], None]
Encode = Callable[[Sequence[DecodedImage]], list[EmbeddedImage]]


@dataclass(slots=True, eq=False)
class EncoderQueue:
    """The images of one asker: of a dataset's inbox, or of its references."""

    deliver: Deliver  # is given answers, some at a time, one for each image that was added
    waiting: deque[tuple[str, Stamp]] = field(default_factory=deque)
    batch: Batch = field(default_factory=Batch)


class Pipeline:
    """Images of several queues on their way to their embeddings; one thread calls ``advance`` while there is work.

    The decoders are given work before a forward begins and are asked after it has ended, so they decode while the
    encoder computes. What is on its way is bounded; queues take turns, an image each, so that a full one keeps none
    waiting.
    """

    def __init__(self, decoders: DecoderPool, encode: Encode, *, batch_size: int) -> None:
        """Begin empty; ``encode`` embeds up to ``batch_size`` decoded images at once."""
        self._decoders, self._encode, self._batch_size = decoders, encode, batch_size
        self._queues: deque[EncoderQueue] = deque()
        self._decoded: deque[tuple[EncoderQueue, DecodedImage]] = deque()
        self._decoded_since = 0.0
        self._on_the_way = 0

    def open(self, deliver: Deliver) -> EncoderQueue:
        """Return a new queue, whose answers go to ``deliver``."""
        queue = EncoderQueue(deliver)
        self._queues.append(queue)
        return queue

    def close(self, queue: EncoderQueue) -> None:
        """Drop a queue and what is left of its images: nothing more is delivered."""
        self._take_in()
        self._on_the_way -= len(queue.batch.waiting) + queue.batch.unanswered
        kept = deque(pair for pair in self._decoded if pair[0] is not queue)
        self._on_the_way -= len(self._decoded) - len(kept)
        self._decoded = kept
        self._decoders.drop(queue.batch)
        self._queues.remove(queue)

    def add(self, queue: EncoderQueue, images: Iterable[tuple[str, Stamp]]) -> None:
        """Put images at the end of a queue."""
        queue.waiting.extend(images)

    @property
    def has_work(self) -> bool:
        """Is any image without its answer?"""
        return self._on_the_way > 0 or any(queue.waiting for queue in self._queues)

    def advance(self, *, bell: int | None = None, at_most_seconds: float | None = None) -> None:
        """Take one step: wait for pixels if need be, and encode a batch if one is due.

        The wait ends when the descriptor ``bell`` can be read, and after ``at_most_seconds``.

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

    def _feed(self) -> None:
        """Let as much be on its way as two batches and the processes hold, taking from the queues in turn."""
        for queue in self._queues:
            if queue.batch.waiting or queue.batch.unanswered:
                self._decoders.feed(queue.batch)  # what a process that died has left, too
        most = max(BATCHES_ON_THE_WAY * self._batch_size, 2 * self._decoders.workers)
        idle = 0
        while self._on_the_way < most and idle < len(self._queues):
            queue = self._queues[0]
            self._queues.rotate(-1)
            if not queue.waiting:
                idle += 1
                continue
            idle = 0
            queue.batch.waiting.append(queue.waiting.popleft())
            self._on_the_way += 1
            self._decoders.feed(queue.batch)

    def _take_in(self) -> None:
        """Deliver refusals at once, and keep pixels for the next forward."""
        for queue in list(self._queues):
            refused: list[ImageRefused] = []
            while queue.batch.answers:
                answer = queue.batch.answers.popleft()
                if isinstance(answer, ImageRefused):
                    refused.append(answer)
                    continue
                if not self._decoded:
                    self._decoded_since = monotonic()
                self._decoded.append((queue, answer))
            if refused:
                self._on_the_way -= len(refused)
                queue.deliver(refused)

    def _is_due(self, now: float) -> bool:
        """Is there a full batch, or one that nothing more will join in time?"""
        if not self._decoded:
            return False
        is_all = len(self._decoded) == self._on_the_way and not any(queue.waiting for queue in self._queues)
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
        by_queue: dict[int, tuple[EncoderQueue, list[EmbeddedImage | ImageRefused]]] = {}
        for (queue, _), answer in zip(taken, answers, strict=True):
            by_queue.setdefault(id(queue), (queue, []))[1].append(answer)
        for queue, own in by_queue.values():
            queue.deliver(own)


UNIT_TOLERANCE = 1e-2  # by which the length of an embedding may differ from one: half precision errs by a tenth of that
AT_ONCE = 1_000  # files that are looked up in the cache in one step
TEXTS_AT_ONCE = 64  # texts that are encoded in one step: a thousand classes have eight thousand, which take a minute

Attend = Callable[[], float | None]
"""Is called between two steps; returns how many seconds the next one may wait at most, None: as long as need be."""


def are_of_unit_length(rows: FloatArray) -> bool:
    """Tell whether rows (B, d) are embeddings: a device in a bad state answers zeros or no numbers at all."""
    lengths = np.linalg.norm(rows, axis=1)
    return bool((np.abs(lengths - 1) < UNIT_TOLERANCE).all())  # false for what is no number, too


class Embedder:
    """Embeds files and texts with one encoder; used by one thread, the worker."""

    def __init__(
        self,
        encoder: Encoder,
        decoders: DecoderPool,
        cache: Cache,
        *,
        batch_size: int = 32,
        are_sound: Callable[[FloatArray], bool] = are_of_unit_length,
    ) -> None:
        """Take the parts over; whoever made them closes them. Rows that are not sound are not remembered."""
        self.encoder = encoder
        self._cache = cache
        self._are_sound = are_sound
        self.pipeline = Pipeline(decoders, self._encode, batch_size=batch_size)
        """Where images that are not known wait for their embeddings, in queues."""
        self._attend: Attend = _nothing
        self._bell: int | None = None
        self.forwards = 0  # image batches that went through the encoder: what a cache hit saves

    def attend_with(self, attend: Attend, *, bell: int | None) -> None:
        """Let ``embed`` call ``attend`` between two steps, and wait no longer than until a ``bell`` can be read."""
        self._attend, self._bell = attend, bell

    def embed(self, images: Sequence[tuple[str, Stamp]]) -> Iterator[EmbeddedImage | ImageRefused]:
        """Yield exactly one answer for each image, in no order; images of other queues go on meanwhile, a turn each."""
        answers: deque[EmbeddedImage | ImageRefused] = deque()
        queue = self.pipeline.open(answers.extend)
        left = len(images)
        try:
            for start in range(0, len(images), AT_ONCE):
                self.add(queue, images[start : start + AT_ONCE])
                self.give_way()
            while True:
                while answers:
                    left -= 1
                    yield answers.popleft()
                if not left:
                    return
                self.advance(at_most_seconds=self._attend())
        finally:
            self.pipeline.close(queue)

    def give_way(self) -> None:
        """Attend, and take one step with the images of all queues, if there are any, without waiting for pixels."""
        self._attend()
        if self.pipeline.has_work:
            self.advance(at_most_seconds=0.0)

    def add(self, queue: EncoderQueue, images: Sequence[tuple[str, Stamp]]) -> None:
        """Answer at once for those images that are known, and put the others into a queue."""
        contents = self._cache.contents(images)
        rows = self._cache.embeddings(set(contents.values()), self.encoder.encoder_id)
        known = [image for image in images if contents.get(image, "") in rows]
        if known:
            queue.deliver([EmbeddedImage(*image, rows[contents[image]], contents[image]) for image in known])
        self.pipeline.add(queue, [image for image in images if contents.get(image, "") not in rows])

    def advance(self, *, at_most_seconds: float | None = None) -> None:
        """Take one step with the images of all queues; see ``Pipeline.advance``."""
        self.pipeline.advance(bell=self._bell, at_most_seconds=at_most_seconds)

    def _encode(self, batch: Sequence[DecodedImage]) -> list[EmbeddedImage]:
        """Encode one batch, equal contents once; a content that is known under another name is not encoded."""
        rows = self._cache.embeddings({image.content for image in batch}, self.encoder.encoder_id)
        fresh = {image.content: image.pixels for image in batch if image.content not in rows}
        seconds = 0.0
        if fresh:
            began = perf_counter()
            encoded = self.encoder.encode_images(np.stack(list(fresh.values())))
            seconds = (perf_counter() - began) / len(fresh)
            self.forwards += 1
            rows.update(self._remembered(fresh, encoded))
        self._cache.remember_contents({(image.path, image.stamp): image.content for image in batch})
        return [
            EmbeddedImage(
                image.path,
                image.stamp,
                rows[image.content],
                image.content,
                decode_seconds=image.decode_seconds,
                encode_seconds=seconds if image.content in fresh else 0.0,
            )
            for image in batch
        ]

    def embed_texts(self, texts: Sequence[str]) -> FloatArray:
        """Return float32 (T, d) unit rows, one for each text; each text is encoded once in the cache's life."""
        keys = [hashlib.sha256(b"text\0" + text.encode("utf-8", "surrogateescape")).hexdigest() for text in texts]
        rows = self._cache.embeddings(set(keys), self.encoder.encoder_id)
        missing = list({key: text for key, text in zip(keys, texts, strict=True) if key not in rows}.items())
        for start in range(0, len(missing), TEXTS_AT_ONCE):
            some, unknown = zip(*missing[start : start + TEXTS_AT_ONCE], strict=True)
            encoded = self.encoder.encode_texts(unknown)
            rows.update(self._remembered(some, encoded))
            self.give_way()
        return np.stack([rows[key] for key in keys])

    def _remembered(self, contents: Iterable[str], rows: FloatArray) -> dict[str, FloatArray]:
        """Remember rows, which must be sound, and return them by content.

        Raises:
            ModelError: they are not; nothing of the batch is remembered.
        """
        if not self._are_sound(rows):
            raise ModelError(
                f"the encoder {self.encoder.encoder_id} answered with embeddings that are none: its device may be in a "
                "bad state; start sortd again, with `device: cpu` if that does not help"
            )
        new = dict(zip(contents, rows, strict=True))
        self._cache.remember_embeddings(new, self.encoder.encoder_id)
        return new


def _nothing() -> None:
    """Stand in for a worker where there is none."""
