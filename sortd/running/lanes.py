"""The lanes of the worker: the images of each dataset on their way through whichever encoder decides it.

Prototypes need the embeddings of the configured model; a dataset on a fine-tuned model needs that one's logits and no
embedding. Each encoder has a pipeline of its own, and they take turns, a step each, so that no dataset waits for the
model of another.
"""

from collections.abc import Callable, Sequence
from functools import partial

from sortd.layout import Layout
from sortd.messages import DatasetId, EmbeddedImage, ImageRefused, Stamp
from sortd.running.classifiers import Appointed, Classifiers
from sortd.running.embedding import Attend, Embedder
from sortd.running.pipeline import Lane

SHARED_WAIT_SECONDS = 0.01
"""How long a step waits for pixels at most while another encoder has work too: short beside the forward of a batch,
and long enough that waiting costs next to nothing."""

Deliver = Callable[[DatasetId, str, Sequence[EmbeddedImage | ImageRefused]], None]
"""Is given a dataset, the id of the encoder, and answers."""


class Lanes:
    """Which encoder each dataset's images go through, and how far they are; used by one thread, the worker."""

    def __init__(self, embedder: Embedder, classifiers: Classifiers, deliver: Deliver) -> None:
        """Begin with every dataset on the configured model, ``embedder``."""
        self.embedder = embedder
        self._classifiers, self._deliver = classifiers, deliver
        self._lanes: dict[tuple[DatasetId, str], tuple[Embedder, Lane]] = {}  # by dataset and fine-tuned model
        self._deciding: dict[DatasetId, str] = {}
        self._attend: tuple[Attend, int] | None = None

    def attend_with(self, attend: Callable[[], None], *, bell: int) -> None:
        """Call ``attend`` between two steps of a rebuild, and wait no longer than until ``bell`` can be read."""

        def attend_to_all() -> float | None:
            attend()
            return self._advance_finetuned()

        self._attend = attend_to_all, bell
        self.embedder.attend_with(attend_to_all, bell=bell)

    # ------------------------------------------------------------ which encoder

    def appoint(self, layout: Layout, wanted: str, labels: Sequence[str]) -> Appointed:
        """Return what is to decide a dataset, its model loaded; it embeds from the next ``switch`` on."""
        found = self._classifiers.choose(layout, wanted, labels)
        if self._attend is not None and found.facts is not None:
            attend, bell = self._attend
            self._classifiers.loaded[found.model_id].attend_with(attend, bell=bell)
        return found

    def decided_by(self, dataset: DatasetId) -> str:
        """Return the fine-tuned model that a dataset's images go through; empty for none."""
        return self._deciding.get(dataset, "")

    def switch(self, dataset: DatasetId, model_id: str) -> None:
        """Let what is added from now on go through that fine-tuned model, or through the configured one if empty.

        What is under way comes out with the id of the old encoder, by which it is known.
        """
        self._deciding[dataset] = model_id
        self._retain()

    def _retain(self) -> None:
        """Let go of models that no dataset is on, and of their lanes."""
        self._classifiers.retain(set(self._deciding.values()))
        for key in [key for key in self._lanes if key[1] and key[1] not in self._classifiers.loaded]:
            embedder, lane = self._lanes.pop(key)
            embedder.close_lane(lane)

    # ------------------------------------------------------------ images

    def add(self, dataset: DatasetId, images: Sequence[tuple[str, Stamp]]) -> None:
        """Put images on their way; those that are known are answered at once."""
        model_id = self.decided_by(dataset)
        embedder = self._classifiers.loaded[model_id] if model_id else self.embedder
        if (dataset, model_id) not in self._lanes:
            deliver = partial(self._deliver, dataset, embedder.encoder.encoder_id)
            self._lanes[dataset, model_id] = embedder, embedder.open_lane(deliver)
        embedder.add(self._lanes[dataset, model_id][1], images)

    def forget(self, dataset: DatasetId) -> None:
        """Drop a dataset that is gone, and what is left of its images."""
        for key in [key for key in self._lanes if key[0] == dataset]:
            embedder, lane = self._lanes.pop(key)
            embedder.close_lane(lane)
        self._deciding.pop(dataset, None)
        self._retain()

    # ------------------------------------------------------------ turns

    @property
    def has_work(self) -> bool:
        """Is any image without its answer?"""
        return self.embedder.has_work or any(one.has_work for one in self._classifiers.loaded.values())

    def advance(self) -> None:
        """Take one step with every encoder that has work."""
        wait_seconds = self._advance_finetuned()
        if self.embedder.has_work:
            self.embedder.advance(at_most_seconds=wait_seconds)
        if self._classifiers.loaded.keys() - set(self._deciding.values()):
            self._retain()  # what another took over from may have ended just now

    def _advance_finetuned(self) -> float | None:
        """Take one step with every fine-tuned model that has work; return how long the next step may wait."""
        busy = [one for one in self._classifiers.loaded.values() if one.has_work]
        is_alone = len(busy) == 1 and not self.embedder.has_work
        for one in busy:
            one.advance(at_most_seconds=None if is_alone else SHARED_WAIT_SECONDS)
        return SHARED_WAIT_SECONDS if busy else None
