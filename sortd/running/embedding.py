"""Files to embeddings: what the cache knows is taken from it, the rest is decoded, encoded and remembered."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter

import numpy as np

from sortd.arrays import FloatArray
from sortd.encoder.base import Encoder
from sortd.errors import ModelError
from sortd.images.pool import DecodedImage, DecoderPool
from sortd.messages import EmbeddedImage, ImageRefused, Stamp
from sortd.running.pipeline import Deliver, Lane, Pipeline
from sortd.store.cache import Cache

UNIT_TOLERANCE = 1e-2
"""How far from one the length of an embedding may be: half precision errs by a tenth of that."""

AT_ONCE = 1_000
"""Files that are looked up in the cache in one step."""

TEXTS_AT_ONCE = 64
"""Texts that are encoded in one step: a thousand classes have eight thousand, which take a minute."""

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
        self._pipeline = Pipeline(decoders, self._encode, batch_size=batch_size)
        self._attend: Attend = _attend_to_nothing
        self._bell: int | None = None
        self.forwards = 0
        """Image batches that went through the encoder: what a cache hit saves."""

    def attend_with(self, attend: Attend, *, bell: int | None) -> None:
        """Let ``embed`` call ``attend`` between two steps, and wait no longer than until a ``bell`` can be read."""
        self._attend, self._bell = attend, bell

    # ------------------------------------------------------------ images

    def embed(self, images: Sequence[tuple[str, Stamp]]) -> Iterator[EmbeddedImage | ImageRefused]:
        """Yield exactly one answer for each image, in no order.

        Images of other lanes go on meanwhile, a turn each.

        Args:
            images: paths with the stamps of the versions that are meant.
        """
        answers: deque[EmbeddedImage | ImageRefused] = deque()
        lane = self.open_lane(answers.extend)
        left = len(images)
        try:
            for start in range(0, len(images), AT_ONCE):
                self.add(lane, images[start : start + AT_ONCE])
                self.give_way()
            while True:
                while answers:
                    left -= 1
                    yield answers.popleft()
                if not left:
                    return
                self.advance(at_most_seconds=self._attend())
        finally:
            self.close_lane(lane)

    def give_way(self) -> None:
        """Attend, and take one step with the images of all lanes, if there are any, without waiting for pixels."""
        self._attend()
        if self.has_work:
            self.advance(at_most_seconds=0.0)

    def open_lane(self, deliver: Deliver) -> Lane:
        """Return a lane for images that are embedded while others are; answers go to ``deliver``, some at a time."""
        return self._pipeline.open_lane(deliver)

    def close_lane(self, lane: Lane) -> None:
        """Drop what is left of a lane; nothing more is delivered."""
        self._pipeline.close_lane(lane)

    def add(self, lane: Lane, images: Sequence[tuple[str, Stamp]]) -> None:
        """Answer at once for those images that are known, and put the others into a lane."""
        contents = self._cache.contents(images)
        rows = self._cache.embeddings(set(contents.values()), self.encoder.encoder_id)
        known: list[EmbeddedImage] = []
        unknown: list[tuple[str, Stamp]] = []
        for path, stamp in images:
            content = contents.get((path, stamp), "")
            if content in rows:
                known.append(EmbeddedImage(path, stamp, rows[content], content))
            else:
                unknown.append((path, stamp))
        if known:
            lane.deliver(known)
        self._pipeline.add(lane, unknown)

    @property
    def has_work(self) -> bool:
        """Is any image of any lane without its answer?"""
        return self._pipeline.has_work

    def advance(self, *, at_most_seconds: float | None = None) -> None:
        """Take one step with the images of all lanes; see ``Pipeline.advance``."""
        self._pipeline.advance(bell=self._bell, at_most_seconds=at_most_seconds)

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
            new = dict(zip(fresh, self._sound(encoded), strict=True))
            self._cache.remember_embeddings(new, self.encoder.encoder_id)
            rows.update(new)
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

    # ------------------------------------------------------------ words

    def embed_texts(self, texts: Sequence[str]) -> FloatArray:
        """Return float32 (T, d) unit rows, one for each text; each text is encoded once in the cache's life."""
        keys = [hashlib.sha256(b"text\0" + text.encode("utf-8", "surrogateescape")).hexdigest() for text in texts]
        rows = self._cache.embeddings(set(keys), self.encoder.encoder_id)
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in rows}
        unknown = list(missing)
        for start in range(0, len(unknown), TEXTS_AT_ONCE):
            some = unknown[start : start + TEXTS_AT_ONCE]
            encoded = self.encoder.encode_texts([missing[key] for key in some])
            new = dict(zip(some, self._sound(encoded), strict=True))
            self._cache.remember_embeddings(new, self.encoder.encoder_id)
            rows.update(new)
            self.give_way()
        return np.stack([rows[key] for key in keys])

    def _sound(self, rows: FloatArray) -> FloatArray:
        """Return the rows, which must be sound.

        Raises:
            ModelError: they are not; nothing of the batch is remembered.
        """
        if not self._are_sound(rows):
            raise ModelError(
                f"the encoder {self.encoder.encoder_id} answered with embeddings that are none: its device may be in a "
                "bad state; start sortd again, with `device: cpu` if that does not help"
            )
        return rows


def _attend_to_nothing() -> None:
    """Stand in for a worker where there is none."""
