"""The worker: the one thread that decodes, encodes, and builds prototypes, for all datasets.

It loads the model itself and shares nothing with the loop but queues of frozen values. The images of all datasets, and
the references of one that is built anew, go through one pipeline for each encoder, which take turns; what is asked
meanwhile is taken in between two steps. A job that fails is answered as failed; any other error ends the worker, and
the loop raises it.
"""

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import NamedTuple

from sortd.classify.held_out import refuse_reload
from sortd.classify.prototypes import PrototypeSet
from sortd.daemon.classifiers import Appointed, Classifiers
from sortd.daemon.embedder import Attend, Embedder, EncoderQueue
from sortd.daemon.references import Rebuilt, References, ReferencesAbsentError, ReferenceSettings, class_labels
from sortd.errors import ModelError, SortdError
from sortd.events import (
    DatasetId,
    Embedded,
    EmbeddedImage,
    Event,
    ImageRefused,
    PrototypesBuilt,
    RebuildFailed,
    Stamp,
)
from sortd.images.formats import RESOURCE_ERRORS
from sortd.layout import Layout

SHARED_WAIT_SECONDS = 0.01  # that a step waits for pixels at most while another encoder has work too

DeliverTo = Callable[[DatasetId, str, Sequence[EmbeddedImage | ImageRefused]], None]
"""Is given a dataset, the id of the encoder, and answers."""


class EncoderQueues:
    """Which encoder each dataset's images go through, and how far they are; used by one thread, the worker."""

    def __init__(self, embedder: Embedder, classifiers: Classifiers, deliver: DeliverTo) -> None:
        """Begin with every dataset on the configured model, ``embedder``."""
        self.embedder = embedder
        self._classifiers, self._deliver = classifiers, deliver
        self._queues: dict[tuple[DatasetId, str], tuple[Embedder, EncoderQueue]] = {}  # by dataset and fine-tuned model
        self._deciding: dict[DatasetId, str] = {}
        self._attend: tuple[Attend, int] | None = None

    def attend_with(self, attend: Callable[[], None], *, bell: int) -> None:
        """Call ``attend`` between two steps of a rebuild, and wait no longer than until ``bell`` can be read."""

        def attend_to_all() -> float | None:
            attend()
            return self._advance_finetuned()

        self._attend = attend_to_all, bell
        self.embedder.attend_with(attend_to_all, bell=bell)

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
        """Let go of models that no dataset is on, and of their queues."""
        self._classifiers.retain(set(self._deciding.values()))
        for key in [key for key in self._queues if key[1] and key[1] not in self._classifiers.loaded]:
            embedder, queue = self._queues.pop(key)
            embedder.pipeline.close(queue)

    def add(self, dataset: DatasetId, images: Sequence[tuple[str, Stamp]]) -> None:
        """Put images on their way; those that are known are answered at once."""
        model_id = self.decided_by(dataset)
        embedder = self._classifiers.loaded[model_id] if model_id else self.embedder
        if (dataset, model_id) not in self._queues:
            deliver = partial(self._deliver, dataset, embedder.encoder.encoder_id)
            self._queues[dataset, model_id] = embedder, embedder.pipeline.open(deliver)
        embedder.add(self._queues[dataset, model_id][1], images)

    def forget(self, dataset: DatasetId) -> None:
        """Drop a dataset that is gone, and what is left of its images."""
        for key in [key for key in self._queues if key[0] == dataset]:
            embedder, queue = self._queues.pop(key)
            embedder.pipeline.close(queue)
        self._deciding.pop(dataset, None)
        self._retain()

    @property
    def has_work(self) -> bool:
        """Is any image without its answer?"""
        return self.embedder.pipeline.has_work or any(
            one.pipeline.has_work for one in self._classifiers.loaded.values()
        )

    def advance(self) -> None:
        """Take one step with every encoder that has work."""
        wait_seconds = self._advance_finetuned()
        if self.embedder.pipeline.has_work:
            self.embedder.advance(at_most_seconds=wait_seconds)
        if self._classifiers.loaded.keys() - set(self._deciding.values()):
            self._retain()  # what another took over from may have ended just now

    def _advance_finetuned(self) -> float | None:
        """Take one step with every fine-tuned model that has work; return how long the next step may wait."""
        busy = [one for one in self._classifiers.loaded.values() if one.pipeline.has_work]
        is_alone = len(busy) == 1 and not self.embedder.pipeline.has_work
        for one in busy:
            one.advance(at_most_seconds=None if is_alone else SHARED_WAIT_SECONDS)
        return SHARED_WAIT_SECONDS if busy else None


@dataclass(frozen=True, slots=True)
class EmbedJob:
    """Embed these versions of these files for a dataset; answers come some at a time, as they are done."""

    dataset: DatasetId
    images: tuple[tuple[str, Stamp], ...]


@dataclass(frozen=True, slots=True)
class RebuildJob:
    """Build a dataset's prototypes; ``generation`` is the last one that its journal knows.

    ``afresh`` forgets what emptied classes held; ``force`` passes the reload gate. The answer carries ``job``.
    """

    dataset: DatasetId
    clases: Path
    teaching: ReferenceSettings
    generation: int
    job: int
    force: bool = False
    afresh: bool = False


@dataclass(frozen=True, slots=True)
class Forget:
    """A dataset is gone: drop what is remembered of its references."""

    dataset: DatasetId
    with_stored: bool = False
    """Also the prototypes that are stored by its name: they are those of another one, which stood in its place."""


Job = EmbedJob | RebuildJob | Forget


@dataclass(frozen=True, slots=True)
class WorkerLoading:
    """The model is not there yet, and what it waits for takes long."""

    what: str


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """The model is loaded."""

    encoder_id: str
    description: str
    seconds: float


@dataclass(frozen=True, slots=True)
class WorkerDied:
    """The worker ended by an error; the loop raises it."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class Answer:
    """Events for one dataset's core, and what a rebuild has to tell the operator."""

    dataset: DatasetId
    events: tuple[Event, ...]
    rebuilt: Rebuilt | None = None
    seconds: float = 0.0
    refusal: str | None = None
    """With ``PrototypesBuilt``: why a fine-tuned model that is wanted does not decide, in a sentence."""


Posted = WorkerLoading | WorkerReady | WorkerDied | Answer


class PrototypeStore(NamedTuple):
    """How the last prototypes of each dataset, by its name, are kept between runs; see ``cache.py``."""

    read: Callable[[str], PrototypeSet | None]
    write: Callable[[str, PrototypeSet], None]
    forget: Callable[[str], None]


ODD_REFERENCES = (
    SortdError, OSError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RecursionError,
)  # fmt: skip
"""What a rebuild ends by where the references of one dataset are odd: the others are served."""


class _StopAskedError(Exception):
    """The worker is to end: what is under way is left."""


class Worker:
    """One named thread around a job queue."""

    def __init__(
        self,
        load: Callable[[], tuple[Embedder, PrototypeStore, str]],
        close: Callable[[], None],
        post: Callable[[Posted], None],
        classifiers: Classifiers,
    ) -> None:
        """Prepare; ``load`` runs in the thread and makes the embedder, ``close`` runs in it at the end."""
        self._load, self._close, self._post, self._classifiers = load, close, post, classifiers
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._later: deque[RebuildJob | Forget] = deque()
        self._thread = threading.Thread(target=self._run, name="worker")
        self._references: dict[DatasetId, References] = {}
        self._serving: dict[DatasetId, PrototypeSet] = {}
        self._stopping = False
        self._wake_descriptor: int | None = None
        self._waits_for = ""
        self.busy_since: float | None = None
        """When the job at hand made its last progress, on the monotonic clock; None while idle."""

    def start(self) -> None:
        """Start the thread."""
        self._wake_descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread.start()

    def ask(self, job: Job) -> None:
        """Queue one job; answers come by ``post``."""
        self._jobs.put(job)
        self._wake()

    def loading(self, what: str) -> None:
        """Hear from what loads the model, in the thread, that it gets on with something that takes long."""
        self.busy_since = monotonic()
        if what != self._waits_for:
            self._waits_for = what
            self._post(WorkerLoading(what))

    def stop(self, timeout_seconds: float) -> bool:
        """End after the forward at hand, leaving what is queued; tell whether the thread ended in time."""
        self._stopping = True
        self._jobs.put(None)
        self._wake()
        if self._thread.ident is not None:
            self._thread.join(timeout_seconds)
        if self._thread.is_alive():
            return False
        if self._wake_descriptor is not None:
            os.close(self._wake_descriptor)
            self._wake_descriptor = None
        return True

    def _wake(self) -> None:
        """Wake the worker where it waits for pixels."""
        if self._wake_descriptor is not None:
            os.eventfd_write(self._wake_descriptor, 1)

    # ------------------------------------------------------------ in the thread

    def _run(self) -> None:
        try:
            self._serve()
        except _StopAskedError:
            pass
        except BaseException as error:  # noqa: BLE001 -- whatever ends this thread, the loop must hear of it and raise it
            self._post(WorkerDied(error))
        finally:
            self._close()

    def _serve(self) -> None:
        began = monotonic()
        self.busy_since = began
        embedder, store, description = self._load()
        queues = EncoderQueues(embedder, self._classifiers, self._deliver)
        attend = partial(self._attend, queues)
        assert self._wake_descriptor is not None
        queues.attend_with(attend, bell=self._wake_descriptor)
        self._post(WorkerReady(embedder.encoder.encoder_id, description, monotonic() - began))
        while True:
            if not (self._later or queues.has_work):
                self.busy_since = None
                self._take(queues, self._jobs.get())
            attend()
            if self._later:
                self._carry_out(queues, store, self._later.popleft())
            elif queues.has_work:
                queues.advance()

    def _attend(self, queues: EncoderQueues) -> None:
        """Take in what is asked, without waiting; called between two steps of whatever is under way.

        Raises:
            _StopAskedError: nothing more is to be done.
        """
        self.busy_since = monotonic()
        assert self._wake_descriptor is not None
        with suppress(BlockingIOError):
            os.eventfd_read(self._wake_descriptor)
        with suppress(queue.Empty):
            while not self._stopping:
                self._take(queues, self._jobs.get_nowait())
        if self._stopping:
            raise _StopAskedError

    def _take(self, queues: EncoderQueues, job: Job | None) -> None:
        """Put images on their way at once, and the rest to what is to be done in order."""
        match job:
            case EmbedJob(dataset, images):
                queues.add(dataset, images)
            case RebuildJob():
                self._later.append(job)
            case Forget(dataset, with_stored):
                if not with_stored:
                    queues.forget(dataset)
                self._later.append(job)

    def _carry_out(self, queues: EncoderQueues, store: PrototypeStore, job: RebuildJob | Forget) -> None:
        match job:
            case RebuildJob():
                try:
                    self._rebuild(queues, store, job)
                except ModelError:
                    raise  # not the references are to blame: nothing that this encoder answers can be trusted
                except ODD_REFERENCES as error:
                    if isinstance(error, OSError) and error.errno in RESOURCE_ERRORS:
                        raise  # out of descriptors or memory, as it would be for any image: a new start has them again
                    self._post(Answer(job.dataset, (RebuildFailed(f"{type(error).__name__}: {error}", job=job.job),)))
            case Forget(dataset, with_stored):
                if with_stored:  # it begins: images of it may wait already, and nothing else is known of it
                    store.forget(dataset.name)
                    return
                self._references.pop(dataset, None)
                self._serving.pop(dataset, None)
                queues.forget(dataset)  # a rebuild that was asked for before may have given it a model once more

    def _deliver(self, dataset: DatasetId, encoder_id: str, answers: Sequence[EmbeddedImage | ImageRefused]) -> None:
        refused = [answer for answer in answers if isinstance(answer, ImageRefused)]
        images = tuple(answer for answer in answers if isinstance(answer, EmbeddedImage))
        embedded = (Embedded(images, encoder_id),) if images else ()
        self._post(Answer(dataset, (*refused, *embedded)))

    def _rebuild(self, queues: EncoderQueues, store: PrototypeStore, job: RebuildJob) -> None:
        began = monotonic()
        name, appoint = job.dataset.name, partial(queues.appoint, Layout(job.clases.parent), job.teaching.classifier)
        if job.afresh:
            self._references.pop(job.dataset, None)
        references = self._references.setdefault(job.dataset, References(job.clases))
        previous = self._serving.get(job.dataset) or store.read(name)
        generation = 1 + max(job.generation, previous.generation if previous else 0)
        try:
            decider = appoint(class_labels(job.clases))
            done = references.rebuild(
                queues.embedder, job.teaching, previous=previous, generation=generation, decided_by=decider.model_id
            )
        except ReferencesAbsentError as error:
            event = RebuildFailed(str(error), references_absent=True, job=job.job)
            self._post(Answer(job.dataset, (event,), seconds=monotonic() - began))
            return
        prototypes = done.prototypes
        rebuilt: Rebuilt | None = done
        decider = appoint(prototypes.labels)  # a folder may have come or gone since
        failed: tuple[RebuildFailed, ...] = ()
        if previous is not None and not job.force and (refusal := gate(previous, prototypes)) is not None:
            mend = f"mend the references, or `sortd rebuild --force {name}`"
            failed = (RebuildFailed(f"{refusal}; the old prototypes stay: {mend}", is_lasting=True, job=job.job),)
            prototypes, rebuilt = previous, None
            if job.dataset in self._serving and decider.model_id != queues.decided_by(job.dataset):
                prototypes = replace(previous, generation=generation)  # another one decides, so all is decided anew
                store.write(name, prototypes)
        elif done.changed:
            store.write(name, prototypes)
        self._serving[job.dataset] = prototypes
        queues.switch(job.dataset, decider.model_id)
        finetuned = decider.classifier(job.teaching.settings.abstain, generation=prototypes.generation)
        built = PrototypesBuilt(prototypes, finetuned, job=job.job)
        seconds = monotonic() - began if rebuilt else 0.0
        self._post(Answer(job.dataset, (built, *failed), rebuilt, seconds, decider.refusal))


def gate(old: PrototypeSet, new: PrototypeSet) -> str | None:
    """Return why the old generation should stay; a class that was removed is obeyed whatever it costs."""
    return refuse_reload(old, new) if set(old.labels) <= set(new.labels) else None
