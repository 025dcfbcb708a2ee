"""The worker: the one thread that decodes, encodes, and builds prototypes, for all datasets.

It loads the model itself, so that loading overlaps the first scan, and shares nothing with the loop but queues of
frozen values. A job that fails is answered as failed; anything that the worker did not foresee ends it, and the loop
raises what it died of.
"""

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from sortd.deciding.reload_gate import refuse_reload
from sortd.errors import ModelError, SortdError
from sortd.messages import Embedded, EmbeddedImage, Event, ImageRefused, PrototypesBuilt, RebuildFailed, Stamp
from sortd.prototypes import PrototypeSet
from sortd.references import Rebuilt, References, ReferencesAbsentError, Teaching
from sortd.running.embedding import Embedder


@dataclass(frozen=True, slots=True)
class EmbedJob:
    """Embed these versions of these files for a dataset."""

    dataset: str
    images: tuple[tuple[str, Stamp], ...]


@dataclass(frozen=True, slots=True)
class RebuildJob:
    """Build a dataset's prototypes; ``generation`` is the last one that its journal knows.

    ``afresh`` forgets what emptied classes held; ``force`` passes the reload gate.
    """

    dataset: str
    clases: Path
    teaching: Teaching
    generation: int
    force: bool = False
    afresh: bool = False


@dataclass(frozen=True, slots=True)
class Forget:
    """A dataset is gone: drop what is remembered of its references."""

    dataset: str


Job = EmbedJob | RebuildJob | Forget


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

    dataset: str
    events: tuple[Event, ...]
    rebuilt: Rebuilt | None = None
    seconds: float = 0.0


Posted = WorkerReady | WorkerDied | Answer


class PrototypeStore:
    """Where the last prototypes of each dataset are kept between runs; see ``cache.py``."""

    def __init__(
        self,
        read: Callable[[str], PrototypeSet | None],
        write: Callable[[str, PrototypeSet], None],
    ) -> None:
        """Keep by the two functions given."""
        self.read, self.write = read, write


class Worker:
    """One named thread around a job queue."""

    def __init__(
        self,
        load: Callable[[], tuple[Embedder, PrototypeStore, str]],
        close: Callable[[], None],
        post: Callable[[Posted], None],
    ) -> None:
        """Prepare; ``load`` runs in the thread and makes the embedder, ``close`` runs in it at the end."""
        self._load, self._close, self._post = load, close, post
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="worker")
        self._references: dict[str, References] = {}
        self._serving: dict[str, PrototypeSet] = {}
        self._stopping = False
        self.busy_since: float | None = None
        """When the job at hand made its last progress, on the monotonic clock; None while idle."""

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def ask(self, job: Job) -> None:
        """Queue one job; answers come by ``post``."""
        self._jobs.put(job)

    def stop(self, timeout_seconds: float) -> bool:
        """End after the forward at hand, leaving what is queued; tell whether the thread ended in time."""
        self._stopping = True
        self._jobs.put(None)
        if self._thread.ident is not None:
            self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:  # noqa: BLE001 -- whatever ends this thread, the loop must hear of it and raise it
            self._post(WorkerDied(error))
        finally:
            self._close()

    def _serve(self) -> None:
        began = monotonic()
        self.busy_since = began
        embedder, store, description = self._load()
        self._post(WorkerReady(embedder.encoder.encoder_id, description, monotonic() - began))
        while True:
            self.busy_since = None
            job = self._jobs.get()
            self.busy_since = monotonic()
            match job:
                case _ if self._stopping or job is None:
                    return
                case EmbedJob():
                    self._embed(embedder, job)
                case RebuildJob():
                    self._rebuild(embedder, store, job)
                case Forget(dataset):
                    self._references.pop(dataset, None)
                    self._serving.pop(dataset, None)

    def _embed(self, embedder: Embedder, job: EmbedJob) -> None:
        images: list[EmbeddedImage] = []
        refused: list[ImageRefused] = []
        for answer in embedder.embed(job.images):
            self.busy_since = monotonic()
            if self._stopping:
                return
            (images if isinstance(answer, EmbeddedImage) else refused).append(answer)  # type: ignore[arg-type]  # sorted by type
        self._post(Answer(job.dataset, (*refused, Embedded(tuple(images), embedder.encoder.encoder_id))))

    def _rebuild(self, embedder: Embedder, store: PrototypeStore, job: RebuildJob) -> None:
        began = monotonic()
        if job.afresh:
            self._references.pop(job.dataset, None)
        references = self._references.setdefault(job.dataset, References(job.clases))
        previous = self._serving.get(job.dataset) or store.read(job.dataset)
        generation = 1 + max(job.generation, previous.generation if previous else 0)
        try:
            rebuilt = references.rebuild(embedder, job.teaching, previous=previous, generation=generation)
        except ReferencesAbsentError as error:
            event: Event = RebuildFailed(str(error), references_absent=True)
            self._post(Answer(job.dataset, (event,), seconds=monotonic() - began))
            return
        except ModelError:
            raise  # not the references are to blame: nothing that this encoder answers can be trusted
        except (SortdError, OSError, ValueError) as error:
            self._post(Answer(job.dataset, (RebuildFailed(f"{type(error).__name__}: {error}"),)))
            return
        refusal = None if previous is None or job.force else gate(previous, rebuilt.prototypes)
        if previous is not None and refusal is not None:
            self._keep(job.dataset, previous, refusal)
            return
        if rebuilt.changed:
            store.write(job.dataset, rebuilt.prototypes)
        self._serving[job.dataset] = rebuilt.prototypes
        built = PrototypesBuilt(rebuilt.prototypes)
        self._post(Answer(job.dataset, (built,), rebuilt, monotonic() - began))

    def _keep(self, dataset: str, previous: PrototypeSet, refusal: str) -> None:
        """Let the old generation serve on, or serve at all after a start, and say why the new one does not."""
        message = f"{refusal}; the old prototypes stay: mend the references, or `sortd rebuild --force {dataset}`"
        failed = RebuildFailed(message, is_lasting=True)
        is_serving = dataset in self._serving
        self._serving[dataset] = previous
        self._post(Answer(dataset, (failed,) if is_serving else (PrototypesBuilt(previous), failed)))


def gate(old: PrototypeSet, new: PrototypeSet) -> str | None:
    """Return why the old generation should stay; a class that was removed is obeyed whatever it costs."""
    return refuse_reload(old, new) if set(old.labels) <= set(new.labels) else None
