"""Embeddings of files: from the cache if known; otherwise decoded, encoded and cached."""

import hashlib
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from time import monotonic, perf_counter

import numpy as np

from sortd.arrays import FloatArray
from sortd.encoder.clip import Encoder, are_of_unit_length
from sortd.errors import ModelError
from sortd.events import EmbeddedImage, ImageRefused, Stamp
from sortd.images.pool import Batch, DecodedImage, DecoderPool
from sortd.store.cache import Cache

PATIENCE_SECONDS = 0.2  # for which a decoded image waits for others, to be encoded with them: less than a forward
AHEAD_OF_A_PROCESS = 2  # images that a process has beyond the next batch, so that it does not wait for a forward
STARVED_SECONDS = 1.0  # for which the encoder waits for pixels, in all, before another decoding process is started
FIRST_BATCH = 1  # images of the first forward after a pause, so that their answers do not wait; then it doubles

Deliver = Callable[[Sequence[EmbeddedImage | ImageRefused]], None]
Encode = Callable[[Sequence[DecodedImage]], list[EmbeddedImage]]


@dataclass(slots=True, eq=False)
class EncoderQueue:
    """The images of one client: the inbox of a dataset, or its references."""

    deliver: Deliver  # receives one answer for each image, some at a time
    waiting: deque[tuple[str, Stamp]] = field(default_factory=deque)
    batch: Batch = field(default_factory=Batch)


class Pipeline:
    """The images of several queues on their way to their embeddings; one thread calls ``advance`` while there is work.

    The decoders receive work before a forward and are read after it, so they decode while the encoder computes. The
    number of images under way is limited; queues take turns, one image each.
    """

    def __init__(self, decoders: DecoderPool, encode: Encode, *, batch_size: int) -> None:
        """Start empty; ``encode`` embeds up to ``batch_size`` decoded images."""
        self._decoders, self._encode, self._batch_size = decoders, encode, batch_size
        self._queues: deque[EncoderQueue] = deque()
        self._decoded: deque[tuple[EncoderQueue, DecodedImage]] = deque()
        self._decoded_since = 0.0
        self._next_batch = FIRST_BATCH
        self._starved_seconds = 0.0  # since the last pause
        self._on_the_way = 0
        self.wake_descriptor: int | None = None  # when it is readable, a wait ends

    def open(self, deliver: Deliver) -> EncoderQueue:
        """Return a new queue whose answers go to ``deliver``."""
        queue = EncoderQueue(deliver)
        self._queues.append(queue)
        return queue

    def close(self, queue: EncoderQueue) -> None:
        """Drop a queue with its images; nothing more is delivered."""
        self._take_in()
        self._on_the_way -= len(queue.batch.waiting) + queue.batch.unanswered
        kept = deque(pair for pair in self._decoded if pair[0] is not queue)
        self._on_the_way -= len(self._decoded) - len(kept)
        self._decoded = kept
        self._decoders.drop(queue.batch)
        self._queues.remove(queue)

    def add(self, queue: EncoderQueue, images: Sequence[tuple[str, Stamp]]) -> None:
        """Append images to a queue."""
        queue.waiting.extend(images)

    @property
    def has_work(self) -> bool:
        """Whether any image has no answer yet."""
        return self._on_the_way > 0 or any(queue.waiting for queue in self._queues)

    def advance(self, *, at_most_seconds: float | None = None) -> None:
        """Do one step: wait for pixels if necessary, at most this long, and encode a batch if one is due.

        Raises StartupError: the decoding processes do not start; OSError: this process is out of descriptors or memory.
        """
        self._feed()
        self._take_in()
        if not self._is_due(now := monotonic()):
            patience = max(0.0, self._decoded_since + PATIENCE_SECONDS - now) if self._decoded else None
            is_starved = self._on_the_way - len(self._decoded) > 1  # another process could decode one of them
            starved = STARVED_SECONDS - self._starved_seconds if is_starved else None
            waits = [seconds for seconds in (patience, starved, at_most_seconds) if seconds is not None]
            self._decoders.collect(min(waits, default=None), wake_descriptor=self.wake_descriptor)
            if is_starved:
                self._note_starved(monotonic() - now)
            self._take_in()
            self._feed()
        if self._is_due(monotonic()):
            self._encode_batch()

    def _feed(self) -> None:
        """Give the processes the next batch, and a few more, from the queues in turn."""
        for queue in self._queues:
            if queue.batch.waiting or queue.batch.unanswered:
                self._decoders.feed(queue.batch)  # including images of a process that died
        most = self._batch_size + AHEAD_OF_A_PROCESS * self._decoders.workers
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
        """Deliver refusals, and keep pixels for the next forward."""
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

    def _note_starved(self, seconds: float) -> None:
        """Add up how long the encoder waited, and start another decoding process if that is too long."""
        self._starved_seconds += seconds
        if self._starved_seconds >= STARVED_SECONDS:
            self._starved_seconds = 0.0
            self._decoders.grow()

    def _is_due(self, now: float) -> bool:
        """Return whether there is a batch of the wanted size, or one that has waited long enough."""
        if not self._decoded:
            return False
        is_all = len(self._decoded) == self._on_the_way and not any(queue.waiting for queue in self._queues)
        return is_all or len(self._decoded) >= self._next_batch or now >= self._decoded_since + PATIENCE_SECONDS

    def _encode_batch(self) -> None:
        """Encode the decoded images, while the processes decode the next ones."""
        taken = [self._decoded.popleft() for _ in range(min(self._next_batch, len(self._decoded)))]
        self._decoded_since = monotonic()
        self._on_the_way -= len(taken)
        self._next_batch = min(2 * self._next_batch, self._batch_size)
        if not self.has_work:
            self._next_batch, self._starved_seconds = FIRST_BATCH, 0.0
        self._feed()
        answers = self._encode([image for _, image in taken])
        by_queue: dict[int, tuple[EncoderQueue, list[EmbeddedImage | ImageRefused]]] = {}
        for (queue, _), answer in zip(taken, answers, strict=True):
            by_queue.setdefault(id(queue), (queue, []))[1].append(answer)
        for queue, own in by_queue.values():
            if queue in self._queues:  # not closed while the encoder was waited for
                queue.deliver(own)


AT_ONCE = 1_000  # files looked up in the cache in one step
TEXTS_AT_ONCE = 64  # texts encoded in one step: a thousand classes have eight thousand, which take a minute

OnProgress = Callable[[], float | None]  # called between two steps; returns how long the next one may wait, if limited


class Embedder(Pipeline):
    """Embeds files and texts with one encoder; used by one thread, the worker."""

    def __init__(
        self,
        encoder: Encoder,
        decoders: DecoderPool,
        cache: Cache,
        *,
        batch_size: int = 16,
        are_sound: Callable[[FloatArray], bool] = are_of_unit_length,
        equal_ids: Sequence[str] = (),
        beside: Sequence["Embedder"] = (),
    ) -> None:
        """Keep the parts, which the caller closes; rows that are not ``are_sound`` are not cached.

        Cached rows of the encoders with ``equal_ids`` are used as if they were its own. The embedders ``beside`` embed
        the same images, so that each is decoded once for all.
        """
        super().__init__(decoders, self._encode_or_recall, batch_size=batch_size)
        self.encoder = encoder
        self._cache = cache
        self._are_sound = are_sound
        self._ids, self._beside = (*equal_ids, encoder.encoder_id), beside
        self._on_progress: OnProgress = lambda: None
        self.forwards = 0  # encoded batches of images

    def on_progress(self, callback: OnProgress, *, wake_descriptor: int | None) -> None:
        """Let ``embed`` call ``callback`` between two steps; a readable ``wake_descriptor`` ends its wait."""
        self._on_progress, self.wake_descriptor = callback, wake_descriptor

    def embed(self, images: Sequence[tuple[str, Stamp]]) -> Iterator[EmbeddedImage | ImageRefused]:
        """Yield one answer for each image, in no order; the images of other queues continue in turn."""
        answers: deque[EmbeddedImage | ImageRefused] = deque()
        queue = self.open(answers.extend)
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
                self.advance(at_most_seconds=self._on_progress())
        finally:
            self.close(queue)

    def give_way(self) -> None:
        """Call the callback, and do one step for all queues without waiting for pixels."""
        self._on_progress()
        if self.has_work:
            self.advance(at_most_seconds=0.0)

    def add(self, queue: EncoderQueue, images: Sequence[tuple[str, Stamp]]) -> None:
        """Answer cached images, and append the others to a queue."""
        contents = self._cache.contents(images)
        rows = self._cached(set(contents.values()))
        complete = set(rows).intersection(*(one._cached(rows) for one in self._beside))  # noqa: SLF001 - of this class
        known = [image for image in images if contents.get(image, "") in complete]
        if known:
            queue.deliver([EmbeddedImage(*image, rows[contents[image]], contents[image]) for image in known])
        super().add(queue, [image for image in images if contents.get(image, "") not in complete])

    def _cached(self, contents: Collection[str]) -> dict[str, FloatArray]:
        """Return the cached rows of contents, of this encoder or an equal one."""
        rows: dict[str, FloatArray] = {}
        for encoder_id in self._ids:
            rows |= self._cache.embeddings(contents, encoder_id)
        return rows

    def _encode_or_recall(self, batch: Sequence[DecodedImage]) -> list[EmbeddedImage]:
        """Encode one batch; each content is encoded once, unless it is cached."""
        for one in self._beside:
            one._encode_or_recall(batch)  # noqa: SLF001 - of this class
        rows = self._cached({image.content for image in batch})
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
        """Return float32 (T, d) unit rows, one for each text; each text is encoded once and then cached."""
        keys = [hashlib.sha256(b"text\0" + text.encode("utf-8", "surrogateescape")).hexdigest() for text in texts]
        rows = self._cached(set(keys))
        missing = list({key: text for key, text in zip(keys, texts, strict=True) if key not in rows}.items())
        for start in range(0, len(missing), TEXTS_AT_ONCE):
            some, unknown = zip(*missing[start : start + TEXTS_AT_ONCE], strict=True)
            encoded = self.encoder.encode_texts(unknown)
            rows.update(self._remembered(some, encoded))
            self.give_way()
        return np.stack([rows[key] for key in keys])

    def _remembered(self, contents: Iterable[str], rows: FloatArray) -> dict[str, FloatArray]:
        """Cache rows and return them by content; raise ``ModelError`` if they are not sound."""
        if not self._are_sound(rows):
            raise ModelError(
                f"the encoder {self.encoder.encoder_id} returned invalid embeddings: its device may be in a bad state; "
                "restart sortd, with `device: cpu` if that does not help"
            )
        new = dict(zip(contents, rows, strict=True))
        self._cache.remember_embeddings(new, self.encoder.encoder_id)
        return new
