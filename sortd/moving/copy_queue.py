"""Copies to another file system: which may start, and the one thread that makes them, for all datasets in turn.

A copy takes as long as the slower disk, so the loop must not make it. The thread shares only queues and frozen values
with the loop; each copy writes the journal through its own connection. An interrupted copy leaves what a crash would
leave, and recovery handles it.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

from sortd.events import DatasetId, Move
from sortd.store.records import MoveProgress, MoveReason, MoveRecord

MOST_HANDED_OVER = 64  # copies of one dataset under way or queued: as many as a batch of renames
MOST_GUESSES = 4096  # pairs of folders remembered: a camera's card has a folder for each day


@dataclass(frozen=True, slots=True)
class MoveOrder:
    """A move in progress, its reason, and its error if there was one."""

    move: MoveRecord
    move_reason: MoveReason
    error: Exception | None = None

    def at(self, move: MoveRecord) -> "MoveOrder":
        """Return the order with a later state of its move."""
        return replace(self, move=move)

    def with_error(self, error: Exception | None) -> "MoveOrder":
        """Return the order with this error; None: without one."""
        return replace(self, error=error)

    @property
    def is_done(self) -> bool:
        """Whether the image is durably in its destination."""
        return self.move.progress is MoveProgress.DONE and self.move.image.moved_stamp is not None


CopyJob = Callable[[], MoveOrder]
"""One copy to another file system: to be called once, in any thread; its result goes to ``Mover.end``."""

Submit = Callable[[CopyJob], list[MoveOrder]]
"""Accepts a job that can take long; returns its order if it was run immediately, and nothing if it is run later."""


@dataclass(frozen=True, slots=True)
class Copied:
    """The orders of copies that ended, for ``Mover.end``."""

    dataset: DatasetId
    orders: tuple[MoveOrder, ...]


@dataclass(frozen=True, slots=True)
class CopyFailed:
    """A copy ended by an error that does not concern its file, for example of the dataset's journal."""

    dataset: DatasetId
    error: Exception


@dataclass(frozen=True, slots=True)
class CopyQueueDied:
    """The thread of the copies ended by an error; the loop raises it."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class CopyTask:
    """One queued copy."""

    client: "CopyQueueClient"
    job: CopyJob
    done: threading.Event = field(default_factory=threading.Event)


class CopyQueueClient:
    """The queue as one dataset uses it."""

    def __init__(self, dataset: DatasetId, copies: "CopyQueue") -> None:
        """Use a queue."""
        self.dataset = dataset
        self._copies = copies
        self._is_closed = False

    def submit(self, job: CopyJob) -> list[MoveOrder]:
        """Queue a copy, whose order arrives as ``Copied``; during a stop, call it, so that it ends as interrupted."""
        if self._copies.is_stopping:
            return [job()]
        self._copies.queue(CopyTask(self, job))
        return []

    @property
    def is_interrupted(self) -> bool:
        """Whether its copies must end soon: the dataset is closed or sortd stops."""
        return self._is_closed or self._copies.is_stopping

    def close(self) -> None:
        """Interrupt this dataset's current copy, if any, and wait for its end; no other starts."""
        self._is_closed = True
        # Either the thread sees this flag before it starts a task, or that task is seen here.
        task = self._copies.current
        if task is not None and task.client is self:
            task.done.wait()


class CopyQueue:
    """A queue of copies and the thread that makes them, which starts with the first copy."""

    def __init__(self, post: Callable[[Copied | CopyFailed | CopyQueueDied], None]) -> None:
        """Create an empty queue; ``post`` is called in its thread with each result."""
        self._post = post
        self._arriving: queue.SimpleQueue[CopyTask | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.current: CopyTask | None = None
        self.is_stopping = False

    def queue(self, task: CopyTask) -> None:
        """Add a task; used by clients."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="copier")
            self._thread.start()
        self._arriving.put(task)

    def interrupt(self) -> None:
        """Let every copy end soon: the current one between two chunks, the others before they start."""
        self.is_stopping = True

    def stop(self) -> None:
        """Interrupt the copies and wait for the end of the thread."""
        self.interrupt()
        if self._thread is not None:
            self._arriving.put(None)
            self._thread.join()

    def _run(self) -> None:
        try:
            waiting: dict[CopyQueueClient, deque[CopyTask]] = {}
            while self._receive(waiting):
                client = next(iter(waiting))  # the one whose last turn is longest ago
                tasks = waiting.pop(client)
                self._execute(tasks.popleft())
                if tasks:
                    waiting[client] = tasks
        except BaseException as error:  # noqa: BLE001 -- the loop must raise whatever ends this thread
            self._post(CopyQueueDied(error))

    def _receive(self, waiting: dict[CopyQueueClient, deque[CopyTask]]) -> bool:
        """Add the tasks that arrived, after waiting for one if there is none; return False at the stop mark."""
        while not waiting or not self._arriving.empty():
            task = self._arriving.get()
            if task is None:
                return False
            waiting.setdefault(task.client, deque()).append(task)
        return True

    def _execute(self, task: CopyTask) -> None:
        self.current = task
        try:
            ended: Copied | CopyFailed = Copied(task.client.dataset, (task.job(),))
        except Exception as error:  # noqa: BLE001 -- an error of one dataset must not stop the copies of the others
            ended = CopyFailed(task.client.dataset, error)
        finally:
            self.current = None
            task.done.set()
        if isinstance(ended, Copied) or not task.client.is_interrupted:
            self._post(ended)


class CopyAdmission:
    """Limits how many copies are under way, by guessing from earlier moves which moves need a copy.

    Copies under way are intents in the journal: with few of them, each batch and a stop are quick, while a hundred
    thousand images from a camera can wait at no cost. A guess only makes a move wait: each move is tried as a rename
    first, and a wrong guess is removed.
    """

    def __init__(self, most: int = MOST_HANDED_OVER) -> None:
        """Begin without guesses."""
        self._most = most
        self._waiting: dict[tuple[str, str], deque[Move]] = {}  # by pair of folders, the pair whose turn is next first
        self._renamed: deque[Move] = deque()  # moves that waited because of a wrong guess
        self._crossed: set[tuple[str, str]] = set()
        self._count = 0  # moves in _waiting

    @property
    def waiting(self) -> int:
        """The number of moves that wait here."""
        return self._count + len(self._renamed)

    def admit(self, moves: Iterable[Move], handed_over: int) -> list[Move]:
        """Add new moves; return those that may be tried now, of each pair of folders the oldest first.

        Takes time proportional to what enters and leaves. ``handed_over`` is the number of copies under way.
        """
        admitted = list(self._renamed)
        self._renamed.clear()
        for move in moves:
            pair = _pair(move)
            if pair in self._crossed:
                self._waiting.setdefault(pair, deque()).append(move)
                self._count += 1
            else:
                admitted.append(move)
        for _ in range(min(self._most - handed_over, self._count)):
            pair = next(iter(self._waiting))
            waiting = self._waiting.pop(pair)
            admitted.append(waiting.popleft())
            self._count -= 1
            if waiting:
                self._waiting[pair] = waiting  # behind the others
        return admitted

    def learn(self, move: Move, *, crossed: bool) -> None:
        """Remember whether a move needed a copy or was renamed."""
        pair = _pair(move)
        if not crossed:
            self._crossed.discard(pair)
            released = self._waiting.pop(pair, ())
            self._renamed.extend(released)
            self._count -= len(released)
            return
        if len(self._crossed) >= MOST_GUESSES:
            self._crossed = set(self._waiting)
        self._crossed.add(pair)

    def give_up(self) -> Sequence[Move]:
        """Remove and return all moves that wait."""
        waiting = [*self._renamed, *chain.from_iterable(self._waiting.values())]
        self._renamed.clear()
        self._waiting.clear()
        self._count = 0
        return waiting


def _pair(move: Move) -> tuple[str, str]:
    """Return the file's folder and the top destination folder (Dataset or Review): as fine as mounts usually are."""
    return move.path.rpartition("/")[0], move.folder.partition("/")[0]
