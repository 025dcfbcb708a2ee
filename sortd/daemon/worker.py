"""The worker: the one thread that decodes, encodes and rebuilds prototypes, for all datasets.

It loads the model and shares only queues of frozen values with the loop. The images of all datasets, and the references
of a rebuild, take turns in one pipeline for each encoder; new jobs are accepted between two steps. A job that fails is
answered as failed; any other error ends the worker, and the loop raises it.
"""

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import monotonic

from sortd.classify.held_out import refuse_reload
from sortd.classify.prototypes import PrototypeSet
from sortd.daemon.embedder import Embedder, EncoderQueue
from sortd.daemon.references import Rebuilt, References, ReferencesAbsentError, ReferenceSettings, class_labels
from sortd.daemon.resources import ActiveClassifier, PrototypeStore, Resources
from sortd.encoder.remote import Waiting
from sortd.errors import ModelError, SortdError
from sortd.events import DatasetId, Embedded, EmbeddedImage, Event, ImageRefused, PrototypesBuilt, RebuildFailed, Stamp
from sortd.images.pool import RESOURCE_ERRORS
from sortd.layout import Layout

SHARED_WAIT_SECONDS = 0.01  # for pixels, in a step while another encoder has work too

DeliverTo = Callable[[DatasetId, str, Sequence[EmbeddedImage | ImageRefused]], None]  # dataset, encoder id, answers


class EncoderQueues:
    """The encoder and the queue of each dataset; used by one thread, the worker."""

    def __init__(
        self,
        embedder: Embedder,
        resources: Resources,
        deliver: DeliverTo,
        *,
        between: Callable[[], None],
        wake_descriptor: int,
    ) -> None:
        """Start with every dataset on the configured model, ``embedder``.

        ``between`` is called between two steps of a rebuild; a readable ``wake_descriptor`` ends a wait.
        """
        self.embedder = embedder
        self._resources, self._deliver = resources, deliver
        self._queues: dict[tuple[DatasetId, str], tuple[Embedder, EncoderQueue]] = {}  # by dataset and fine-tuned model
        self._deciding: dict[DatasetId, str] = {}
        self._between, self._wake_descriptor = between, wake_descriptor
        embedder.on_progress(self._give_way, wake_descriptor=wake_descriptor)

    def _give_way(self) -> float | None:
        self._between()
        return self._advance_finetuned()

    def select(self, layout: Layout, wanted: str, labels: Sequence[str]) -> ActiveClassifier:
        """Return what decides in a dataset, with its model loaded; ``switch`` puts it into use."""
        found = self._resources.select(layout, wanted, labels)
        if found.facts is not None:
            model = self._resources.finetuned[found.model_id]
            model.on_progress(self._give_way, wake_descriptor=self._wake_descriptor)
        return found

    def decided_by(self, dataset: DatasetId) -> str:
        """Return the fine-tuned model that a dataset uses; empty for none."""
        return self._deciding.get(dataset, "")

    def switch(self, dataset: DatasetId, model_id: str) -> None:
        """Use this fine-tuned model for the next images, or the configured one if empty.

        The answers for images under way carry the id of their old encoder.
        """
        self._deciding[dataset] = model_id
        self._retain()

    def _retain(self) -> None:
        """Unload models that no dataset uses, and drop their queues."""
        self._resources.retain(set(self._deciding.values()))
        self._close(key for key in self._queues if key[1] and key[1] not in self._resources.finetuned)

    def _close(self, keys: Iterable[tuple[DatasetId, str]]) -> None:
        for key in list(keys):
            embedder, queue = self._queues.pop(key)
            embedder.close(queue)

    def add(self, dataset: DatasetId, images: Sequence[tuple[str, Stamp]]) -> None:
        """Queue images; cached ones are answered at once."""
        model_id = self.decided_by(dataset)
        embedder = self._resources.finetuned[model_id] if model_id else self.embedder
        if (dataset, model_id) not in self._queues:
            deliver = partial(self._deliver, dataset, embedder.encoder.encoder_id)
            self._queues[dataset, model_id] = embedder, embedder.open(deliver)
        embedder.add(self._queues[dataset, model_id][1], images)

    def forget(self, dataset: DatasetId) -> None:
        """Drop a dataset and its images."""
        self._close(key for key in self._queues if key[0] == dataset)
        self._deciding.pop(dataset, None)
        self._retain()

    @property
    def has_work(self) -> bool:
        """Whether any image has no answer yet."""
        return any(one.has_work for one in (self.embedder, *self._resources.finetuned.values()))

    def advance(self) -> None:
        """Do one step with every encoder that has work."""
        wait_seconds = self._advance_finetuned()
        if self.embedder.has_work:
            self.embedder.advance(at_most_seconds=wait_seconds)
        if self._resources.finetuned.keys() - set(self._deciding.values()):
            self._retain()  # a replaced model may have finished its last image

    def _advance_finetuned(self) -> float | None:
        """Do one step with every fine-tuned model that has work; return how long the next step may wait."""
        busy = [one for one in self._resources.finetuned.values() if one.has_work]
        is_alone = len(busy) == 1 and not self.embedder.has_work
        for one in busy:
            one.advance(at_most_seconds=None if is_alone else SHARED_WAIT_SECONDS)
        return SHARED_WAIT_SECONDS if busy else None


@dataclass(frozen=True, slots=True)
class EmbedJob:
    """Embed these versions of these files; answers arrive some at a time."""

    dataset: DatasetId
    images: tuple[tuple[str, Stamp], ...]


@dataclass(frozen=True, slots=True)
class RebuildJob:
    """Rebuild the prototypes of a dataset; ``generation`` is the last one in its journal.

    ``afresh`` forgets what emptied classes held; ``force`` skips the reload gate. The answer contains ``job``.
    """

    dataset: DatasetId
    clases: Path
    settings: ReferenceSettings
    generation: int
    job: int
    force: bool = False
    afresh: bool = False


@dataclass(frozen=True, slots=True)
class Forget:
    """Drop the memory of a closed dataset, or, ``with_stored``, the stored prototypes of another one of its name."""

    dataset: DatasetId
    with_stored: bool = False


Job = EmbedJob | RebuildJob | Forget


@dataclass(frozen=True, slots=True)
class WorkerLoading:
    """The model is being loaded; ``what`` takes long."""

    what: str


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """The model is loaded."""

    encoder_id: str
    description: str


@dataclass(frozen=True, slots=True)
class WorkerDied:
    """The worker ended with an error, which the loop raises."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class Answer:
    """Events for the core of one dataset, and what a rebuild reports to the operator."""

    dataset: DatasetId
    events: tuple[Event, ...]
    rebuilt: Rebuilt | None = None
    seconds: float = 0.0
    refusal: str | None = None  # with ``PrototypesBuilt``: why the wanted fine-tuned model is not used, in a sentence


@dataclass(frozen=True, slots=True)
class EncoderAvailability:
    """The encoder of another process went away, for this reason, or is back (None)."""

    problem: str | None


Posted = WorkerLoading | WorkerReady | WorkerDied | EncoderAvailability | Answer


ODD_REFERENCES = (
    SortdError, OSError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RecursionError,
)  # fmt: skip
"""Errors of a rebuild that concern the references of one dataset: the others continue."""


class _StopAskedError(Exception):
    """The worker must stop."""


class Worker:
    """One thread and its queue of jobs."""

    def __init__(
        self, resources: Resources, post: Callable[[Posted], None], *, patience_seconds: float | None = None
    ) -> None:
        """Prepare; ``resources`` are loaded and unloaded in the thread.

        ``patience_seconds`` is how long an encoder of another process may be away (None: for ever).
        """
        self._resources, self._post = resources, post
        self._waiting = Waiting(self._wait, patience_seconds)
        self._problem: str | None = None  # why the encoder is away
        self._queues: EncoderQueues | None = None
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._later: deque[RebuildJob | Forget] = deque()
        self._thread = threading.Thread(target=self._run, name="worker")
        self._references: dict[DatasetId, References] = {}
        self._serving: dict[DatasetId, PrototypeSet] = {}
        self._stopping = False
        self._wake_descriptor: int | None = None
        self.busy_since: float | None = None  # the time of the last progress, on the monotonic clock; None while idle

    def start(self) -> None:
        """Start the thread."""
        self._wake_descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread.start()

    def ask(self, job: Job) -> None:
        """Queue one job; answers arrive by ``post``."""
        self._jobs.put(job)
        self._wake()

    def stop(self, timeout_seconds: float) -> bool:
        """Stop after the current forward, dropping what is queued; return whether the thread ended in time."""
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
        if self._wake_descriptor is not None:
            os.eventfd_write(self._wake_descriptor, 1)

    def _run(self) -> None:
        try:
            self._serve()
        except _StopAskedError:
            pass
        except BaseException as error:  # noqa: BLE001 -- the loop raises it
            self._post(WorkerDied(error))
        finally:
            self._resources.unload()

    def _serve(self) -> None:
        self.busy_since = monotonic()
        self._post(WorkerLoading(f"loading {self._resources.config.model}"))
        embedder, store, description = self._resources.load(self._waiting)
        assert self._wake_descriptor is not None
        self._queues = queues = EncoderQueues(
            embedder,
            self._resources,
            self._deliver,
            between=lambda: self._take_jobs(queues),
            wake_descriptor=self._wake_descriptor,
        )
        self._post(WorkerReady(embedder.encoder.encoder_id, description))
        while True:
            if not (self._later or queues.has_work):
                self.busy_since = None
                self._take(queues, self._jobs.get())
            self._take_jobs(queues)
            if self._later:
                self._carry_out(queues, store, self._later.popleft())
            elif queues.has_work:
                queues.advance()

    def _wait(self, problem: str | None) -> None:
        """Go on with what needs no encoder while one in another process is waited for; raise to stop."""
        if (problem is None) != (self._problem is None):
            self._post(EncoderAvailability(problem))
        self._problem = problem
        if self._queues is not None:
            self._take_jobs(self._queues)
        self.busy_since = monotonic()
        if self._stopping:
            raise _StopAskedError

    def _take_jobs(self, queues: EncoderQueues) -> None:
        """Accept new jobs without waiting, between two steps of any work; raise ``_StopAskedError`` to stop."""
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
        """Queue images at once, and other jobs in order."""
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
                    raise  # the fault of the encoder, not of the references
                except ODD_REFERENCES as error:
                    if isinstance(error, OSError) and error.errno in RESOURCE_ERRORS:
                        raise  # out of descriptors or memory: a restart helps
                    self._post(Answer(job.dataset, (RebuildFailed(f"{type(error).__name__}: {error}", job=job.job),)))
            case Forget(dataset, with_stored):
                if with_stored:  # a new dataset, whose images may be queued already
                    store.forget(dataset.name)
                    return
                self._references.pop(dataset, None)
                self._serving.pop(dataset, None)
                queues.forget(dataset)  # an earlier rebuild may have selected a model again

    def _deliver(self, dataset: DatasetId, encoder_id: str, answers: Sequence[EmbeddedImage | ImageRefused]) -> None:
        refused = [answer for answer in answers if isinstance(answer, ImageRefused)]
        images = tuple(answer for answer in answers if isinstance(answer, EmbeddedImage))
        embedded = (Embedded(images, encoder_id),) if images else ()
        self._post(Answer(dataset, (*refused, *embedded)))

    def _rebuild(self, queues: EncoderQueues, store: PrototypeStore, job: RebuildJob) -> None:
        began = monotonic()
        name, select = (job.dataset.name, partial(queues.select, Layout(job.clases.parent), job.settings.classifier))
        if job.afresh:
            self._references.pop(job.dataset, None)
        references = self._references.setdefault(job.dataset, References(job.clases))
        previous = self._serving.get(job.dataset) or store.read(name)
        generation = 1 + max(job.generation, previous.generation if previous else 0)
        try:
            decider = select(class_labels(job.clases))
            done = references.rebuild(
                queues.embedder, job.settings, previous=previous, generation=generation, decided_by=decider.model_id
            )
        except ReferencesAbsentError as error:
            event = RebuildFailed(str(error), references_absent=True, job=job.job)
            self._post(Answer(job.dataset, (event,), seconds=monotonic() - began))
            return
        prototypes = done.prototypes
        rebuilt: Rebuilt | None = done
        decider = select(prototypes.labels)  # the class folders may have changed since
        failed: tuple[RebuildFailed, ...] = ()
        is_gated = previous is not None and not job.force and set(previous.labels) <= set(prototypes.labels)
        if previous is not None and is_gated and (refusal := refuse_reload(previous, prototypes)) is not None:
            advice = f"correct the references, or run `sortd rebuild --force {name}`"
            failed = (RebuildFailed(f"{refusal}; the old prototypes stay: {advice}", is_lasting=True, job=job.job),)
            prototypes, rebuilt = previous, None
            if job.dataset in self._serving and decider.model_id != queues.decided_by(job.dataset):
                prototypes = replace(
                    previous, generation=generation
                )  # with another classifier everything is decided again
                store.write(name, prototypes)
        elif done.changed:
            store.write(name, prototypes)
        self._serving[job.dataset] = prototypes
        queues.switch(job.dataset, decider.model_id)
        finetuned = decider.classifier(job.settings.settings.abstain, generation=prototypes.generation)
        built = PrototypesBuilt(prototypes, finetuned, job=job.job)
        seconds = monotonic() - began if rebuilt else 0.0
        self._post(Answer(job.dataset, (built, *failed), rebuilt, seconds, decider.refusal))
