"""The worker: the one thread that decodes, encodes, and builds prototypes, for all datasets.

It loads the model itself, so that loading overlaps the first scan, and shares nothing with the loop but queues of
frozen values. The images of all datasets, and the references of one that is built anew, go through one pipeline; what
is asked meanwhile is taken in between two of its steps. A job that fails is answered as failed; anything that the
worker did not foresee ends it, and the loop raises what it died of.
"""

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic

from sortd.deciding.reload_gate import refuse_reload
from sortd.errors import ModelError, SortdError
from sortd.messages import Embedded, EmbeddedImage, Event, ImageRefused, PrototypesBuilt, RebuildFailed, Stamp
from sortd.prototypes import PrototypeSet
from sortd.references import Rebuilt, References, ReferencesAbsentError, Teaching
from sortd.running.embedding import Embedder
from sortd.running.pipeline import Lane


@dataclass(frozen=True, slots=True)
class EmbedJob:
    """Embed these versions of these files for a dataset; answers come some at a time, as they are done."""

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


class _StopAskedError(Exception):
    """The worker is to end: what is under way is left."""


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
        self._later: deque[RebuildJob | Forget] = deque()
        self._lanes: dict[str, Lane] = {}
        self._thread = threading.Thread(target=self._run, name="worker")
        self._references: dict[str, References] = {}
        self._serving: dict[str, PrototypeSet] = {}
        self._stopping = False
        self._bell: int | None = None
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
        attend = partial(self._attend, embedder)
        assert self._bell is not None
        embedder.attend_with(attend, bell=self._bell)
        self._post(WorkerReady(embedder.encoder.encoder_id, description, monotonic() - began))
        while True:
            if not (self._later or embedder.has_work):
                self.busy_since = None
                self._take(embedder, self._jobs.get())
            attend()
            if self._later:
                self._carry_out(embedder, store, self._later.popleft())
            elif embedder.has_work:
                embedder.advance()

    def _attend(self, embedder: Embedder) -> None:
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
                self._take(embedder, self._jobs.get_nowait())
        if self._stopping:
            raise _StopAskedError

    def _take(self, embedder: Embedder, job: Job | None) -> None:
        """Put images on their way at once, and the rest to what is to be done in order."""
        match job:
            case EmbedJob(dataset, images):
                if dataset not in self._lanes:
                    self._lanes[dataset] = embedder.open_lane(partial(self._deliver, embedder, dataset))
                embedder.add(self._lanes[dataset], images)
            case RebuildJob():
                self._later.append(job)
            case Forget(dataset):
                if dataset in self._lanes:
                    embedder.close_lane(self._lanes.pop(dataset))
                self._later.append(job)

    def _carry_out(self, embedder: Embedder, store: PrototypeStore, job: RebuildJob | Forget) -> None:
        match job:
            case RebuildJob():
                self._rebuild(embedder, store, job)
            case Forget(dataset):
                self._references.pop(dataset, None)
                self._serving.pop(dataset, None)

    def _deliver(self, embedder: Embedder, dataset: str, answers: Sequence[EmbeddedImage | ImageRefused]) -> None:
        refused = [answer for answer in answers if isinstance(answer, ImageRefused)]
        images = tuple(answer for answer in answers if isinstance(answer, EmbeddedImage))
        embedded = (Embedded(images, embedder.encoder.encoder_id),) if images else ()
        self._post(Answer(dataset, (*refused, *embedded)))

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
