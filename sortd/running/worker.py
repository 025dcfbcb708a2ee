"""The worker: the one thread that decodes, encodes, and builds prototypes, for all datasets.

It loads the model itself, so that loading overlaps the first scan, and shares nothing with the loop but queues of
frozen values. The images of all datasets, and the references of one that is built anew, go through one pipeline for
each encoder, which take turns; what is asked meanwhile is taken in between two steps. A job that fails is answered as
failed; anything that the worker did not foresee ends it, and the loop raises what it died of.
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

from sortd.classify.held_out import refuse_reload
from sortd.classify.prototypes import PrototypeSet
from sortd.errors import ModelError, SortdError
from sortd.images.formats import RESOURCE_ERRORS
from sortd.layout import Layout
from sortd.messages import (
    DatasetId,
    Embedded,
    EmbeddedImage,
    Event,
    ImageRefused,
    PrototypesBuilt,
    RebuildFailed,
    Stamp,
)
from sortd.references import Rebuilt, References, ReferencesAbsentError, Teaching, class_labels
from sortd.running.classifiers import Appointed, Classifiers
from sortd.running.embedding import Embedder
from sortd.running.lanes import Lanes


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
    teaching: Teaching
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


class PrototypeStore:
    """Where the last prototypes of each dataset are kept between runs; see ``cache.py``."""

    def __init__(
        self,
        read: Callable[[str], PrototypeSet | None],
        write: Callable[[str, PrototypeSet], None],
        forget: Callable[[str], None],
    ) -> None:
        """Keep by the three functions given, which are told a dataset's name."""
        self.read, self.write, self.forget = read, write, forget


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
        self._bell: int | None = None
        self._waits_for = ""
        self.busy_since: float | None = None
        """When the job at hand made its last progress, on the monotonic clock; None while idle."""

    def start(self) -> None:
        """Start the thread."""
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread.start()

    def ask(self, job: Job) -> None:
        """Queue one job; answers come by ``post``."""
        self._jobs.put(job)
        self._ring()

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
        self._ring()
        if self._thread.ident is not None:
            self._thread.join(timeout_seconds)
        if self._thread.is_alive():
            return False
        if self._bell is not None:
            os.close(self._bell)
            self._bell = None
        return True

    def _ring(self) -> None:
        """Wake the worker where it waits for pixels."""
        if self._bell is not None:
            os.eventfd_write(self._bell, 1)

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
        lanes = Lanes(embedder, self._classifiers, self._deliver)
        attend = partial(self._attend, lanes)
        assert self._bell is not None
        lanes.attend_with(attend, bell=self._bell)
        self._post(WorkerReady(embedder.encoder.encoder_id, description, monotonic() - began))
        while True:
            if not (self._later or lanes.has_work):
                self.busy_since = None
                self._take(lanes, self._jobs.get())
            attend()
            if self._later:
                self._carry_out(lanes, store, self._later.popleft())
            elif lanes.has_work:
                lanes.advance()

    def _attend(self, lanes: Lanes) -> None:
        """Take in what is asked, without waiting; called between two steps of whatever is under way.

        Raises:
            _StopAskedError: nothing more is to be done.
        """
        self.busy_since = monotonic()
        assert self._bell is not None
        with suppress(BlockingIOError):
            os.eventfd_read(self._bell)
        with suppress(queue.Empty):
            while not self._stopping:
                self._take(lanes, self._jobs.get_nowait())
        if self._stopping:
            raise _StopAskedError

    def _take(self, lanes: Lanes, job: Job | None) -> None:
        """Put images on their way at once, and the rest to what is to be done in order."""
        match job:
            case EmbedJob(dataset, images):
                lanes.add(dataset, images)
            case RebuildJob():
                self._later.append(job)
            case Forget(dataset, with_stored):
                if not with_stored:
                    lanes.forget(dataset)
                self._later.append(job)

    def _carry_out(self, lanes: Lanes, store: PrototypeStore, job: RebuildJob | Forget) -> None:
        match job:
            case RebuildJob():
                try:
                    self._rebuild(lanes, store, job)
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
                lanes.forget(dataset)  # a rebuild that was asked for before may have given it a model once more

    def _deliver(self, dataset: DatasetId, encoder_id: str, answers: Sequence[EmbeddedImage | ImageRefused]) -> None:
        refused = [answer for answer in answers if isinstance(answer, ImageRefused)]
        images = tuple(answer for answer in answers if isinstance(answer, EmbeddedImage))
        embedded = (Embedded(images, encoder_id),) if images else ()
        self._post(Answer(dataset, (*refused, *embedded)))

    def _rebuild(self, lanes: Lanes, store: PrototypeStore, job: RebuildJob) -> None:
        began = monotonic()
        if job.afresh:
            self._references.pop(job.dataset, None)
        references = self._references.setdefault(job.dataset, References(job.clases))
        previous = self._serving.get(job.dataset) or store.read(job.dataset.name)
        generation = 1 + max(job.generation, previous.generation if previous else 0)
        try:
            decider = self._appoint(lanes, job, class_labels(job.clases))
            rebuilt = references.rebuild(
                lanes.embedder,
                job.teaching,
                previous=previous,
                generation=generation,
                decided_by=decider.model_id,
            )
        except ReferencesAbsentError as error:
            event: Event = RebuildFailed(str(error), references_absent=True, job=job.job)
            self._post(Answer(job.dataset, (event,), seconds=monotonic() - began))
            return
        decider = self._appoint(lanes, job, rebuilt.prototypes.labels)  # a folder may have come or gone since
        refusal = None if previous is None or job.force else gate(previous, rebuilt.prototypes)
        if previous is not None and refusal is not None:
            failed = self._kept(job, refusal)
            if job.dataset in self._serving and decider.model_id != lanes.decided_by(job.dataset):
                previous = replace(previous, generation=generation)  # another one decides, so all is decided anew
                store.write(job.dataset.name, previous)
            self._serve_with(lanes, job, previous, decider, failed)
            return
        if rebuilt.changed:
            store.write(job.dataset.name, rebuilt.prototypes)
        self._serve_with(lanes, job, rebuilt.prototypes, decider, rebuilt=rebuilt, seconds=monotonic() - began)

    def _serve_with(
        self,
        lanes: Lanes,
        job: RebuildJob,
        prototypes: PrototypeSet,
        decider: Appointed,
        *others: Event,
        rebuilt: Rebuilt | None = None,
        seconds: float = 0.0,
    ) -> None:
        """Let these prototypes, or the model that is to decide in their place, serve from now on."""
        self._serving[job.dataset] = prototypes
        lanes.switch(job.dataset, decider.model_id)
        finetuned = decider.classifier(job.teaching.settings.abstain, generation=prototypes.generation)
        built = PrototypesBuilt(prototypes, finetuned, job=job.job)
        self._post(Answer(job.dataset, (built, *others), rebuilt, seconds, decider.refusal))

    @staticmethod
    def _appoint(lanes: Lanes, job: RebuildJob, labels: Sequence[str]) -> Appointed:
        return lanes.appoint(Layout(job.clases.parent), job.teaching.classifier, labels)

    @staticmethod
    def _kept(job: RebuildJob, refusal: str) -> RebuildFailed:
        """Say why the old generation serves on, or serves at all after a start."""
        message = (
            f"{refusal}; the old prototypes stay: mend the references, or `sortd rebuild --force {job.dataset.name}`"
        )
        return RebuildFailed(message, is_lasting=True, job=job.job)


def gate(old: PrototypeSet, new: PrototypeSet) -> str | None:
    """Return why the old generation should stay; a class that was removed is obeyed whatever it costs."""
    return refuse_reload(old, new) if set(old.labels) <= set(new.labels) else None
