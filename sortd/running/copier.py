"""The copier: the one thread that copies images to another file system, for all datasets, a copy of each in turn.

Such a copy takes as long as the slower disk takes, so that it must not be made in the loop. The thread shares nothing
with the loop but queues and frozen values; each copy writes the journal through a connection of its own. A copy that is
interrupted leaves what a crash would leave, and recovery takes it up.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from sortd.events import DatasetId
from sortd.running.relocating import Job, Order


@dataclass(frozen=True, slots=True)
class Copied:
    """What became of one copy of a dataset: for ``Filing.end``."""

    dataset: DatasetId
    orders: tuple[Order, ...]


@dataclass(frozen=True, slots=True)
class CopyFailed:
    """A copy ended by an error that is not about its file: its dataset's journal cannot be written, say."""

    dataset: DatasetId
    error: Exception


@dataclass(frozen=True, slots=True)
class CopierDied:
    """The copier ended by an error; the loop raises it."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class _Errand:
    seat: "Seat"
    job: Job
    done: threading.Event = field(default_factory=threading.Event)


class Seat:
    """One dataset's way to the copier."""

    def __init__(self, dataset: DatasetId, copier: "Copier") -> None:
        """Sit down; see ``Copier.seat``."""
        self.dataset = dataset
        self._copier = copier
        self._is_left = False

    def submit(self, job: Job) -> list[Order]:
        """Queue a copy; its order comes as ``Copied``. At a stop it is asked at once, and answers as interrupted."""
        if self._copier.is_stopping:
            return [job()]
        self._copier.queue(_Errand(self, job))
        return []

    @property
    def is_left(self) -> bool:
        """Whether its copies are to end at once: the dataset is let go, or sortd stops."""
        return self._is_left or self._copier.is_stopping

    def leave(self) -> None:
        """Interrupt this dataset's copy, if one is under way, and wait for its end; begin no other."""
        self._is_left = True
        # Either the thread sees the line above before it begins, or its errand is seen here: one of them came first.
        errand = self._copier.in_hand
        if errand is not None and errand.seat is self:
            errand.done.wait()


class Copier:
    """One named thread around a queue of copies; it starts with the first of them."""

    def __init__(self, post: Callable[[Copied | CopyFailed | CopierDied], None]) -> None:
        """Prepare; what is done is told by ``post``."""
        self._post = post
        self._arriving: queue.SimpleQueue[_Errand | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.in_hand: _Errand | None = None
        self.is_stopping = False

    def seat(self, dataset: DatasetId) -> Seat:
        """Return a dataset's way to this copier."""
        return Seat(dataset, self)

    def queue(self, errand: _Errand) -> None:
        """Take an errand in; used by seats."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="copier")
            self._thread.start()
        self._arriving.put(errand)

    def interrupt(self) -> None:
        """End every copy within moments: the one under way between two chunks, the others before they begin."""
        self.is_stopping = True

    def stop(self) -> None:
        """Interrupt, and wait for the end of the thread."""
        self.interrupt()
        if self._thread is not None:
            self._arriving.put(None)
            self._thread.join()

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:  # noqa: BLE001 -- whatever ends this thread, the loop must hear of it and raise it
            self._post(CopierDied(error))

    def _serve(self) -> None:
        waiting: dict[Seat, deque[_Errand]] = {}
        while self._take_in(waiting):
            seat = next(iter(waiting))  # the one that waited longest since its last turn
            errands = waiting.pop(seat)
            self._carry_out(errands.popleft())
            if errands:
                waiting[seat] = errands

    def _take_in(self, waiting: dict[Seat, deque[_Errand]]) -> bool:
        """Sort what has arrived by seats, waiting for it where there is nothing else to do; False: stop."""
        while not waiting or not self._arriving.empty():
            errand = self._arriving.get()
            if errand is None:
                return False
            waiting.setdefault(errand.seat, deque()).append(errand)
        return True

    def _carry_out(self, errand: _Errand) -> None:
        self.in_hand = errand
        try:
            ended: Copied | CopyFailed = Copied(errand.seat.dataset, (errand.job(),))
        except Exception as error:  # noqa: BLE001 -- whatever is wrong with one dataset, the others' images are copied
            ended = CopyFailed(errand.seat.dataset, error)
        finally:
            self.in_hand = None
            errand.done.set()
        if isinstance(ended, Copied) or not errand.seat.is_left:
            self._post(ended)
