"""Copies to another file system: which may begin, and the one thread that makes them, for all datasets in turn.

Such a copy takes as long as the slower disk takes, so that it must not be made in the loop. The thread shares nothing
with the loop but queues and frozen values; each copy writes the journal through a connection of its own. A copy that is
interrupted leaves what a crash would leave, and recovery takes it up.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

from sortd.events import DatasetId, Move
from sortd.store.records import MoveProgress, MoveReason, MoveRecord

MOST_HANDED_OVER = 64  # copies of one dataset that are under way or queued: like a batch of renames
MOST_GUESSES = 4096  # pairs of folders that are remembered: a camera's card has a folder for each day, and months pass


@dataclass(frozen=True, slots=True)
class MoveOrder:
    """A move on its way: why, and what went wrong if something did."""

    move: MoveRecord
    move_reason: MoveReason
    error: Exception | None = None

    def at(self, move: MoveRecord) -> "MoveOrder":
        """Return the order with its move further on."""
        return replace(self, move=move)

    def with_error(self, error: Exception | None) -> "MoveOrder":
        """Return the order with what went wrong; None: it begins anew."""
        return replace(self, error=error)

    @property
    def is_done(self) -> bool:
        """Whether its image stands durably where it was to go."""
        return self.move.progress is MoveProgress.DONE and self.move.image.moved_stamp is not None


CopyJob = Callable[[], MoveOrder]
"""One copy to another file system: to be run once, in any thread; what it returns goes to ``Mover.end``."""

Submit = Callable[[CopyJob], list[MoveOrder]]
"""Takes a job that can be long; returns its order if it was run at once, and nothing if it is run later."""


@dataclass(frozen=True, slots=True)
class Copied:
    """What became of one copy of a dataset: for ``Mover.end``."""

    dataset: DatasetId
    orders: tuple[MoveOrder, ...]


@dataclass(frozen=True, slots=True)
class CopyFailed:
    """A copy ended by an error that is not about its file: its dataset's journal cannot be written, say."""

    dataset: DatasetId
    error: Exception


@dataclass(frozen=True, slots=True)
class CopyQueueDied:
    """The thread of the copies ended by an error; the loop raises it."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class CopyTask:
    """One copy that waits for its turn."""

    client: "CopyQueueClient"
    job: CopyJob
    done: threading.Event = field(default_factory=threading.Event)


class CopyQueueClient:
    """One dataset's way to the queue."""

    def __init__(self, dataset: DatasetId, copies: "CopyQueue") -> None:
        """Begin; see ``CopyQueue.client``."""
        self.dataset = dataset
        self._copies = copies
        self._is_closed = False

    def submit(self, job: CopyJob) -> list[MoveOrder]:
        """Queue a copy; its order comes as ``Copied``. At a stop it is asked at once, and answers as interrupted."""
        if self._copies.is_stopping:
            return [job()]
        self._copies.queue(CopyTask(self, job))
        return []

    @property
    def is_interrupted(self) -> bool:
        """Whether its copies are to end at once: the dataset is let go, or sortd stops."""
        return self._is_closed or self._copies.is_stopping

    def close(self) -> None:
        """Interrupt this dataset's copy, if one is under way, and wait for its end; begin no other."""
        self._is_closed = True
        # Either the thread sees the line above before it begins, or its task is seen here: one of them came first.
        task = self._copies.current
        if task is not None and task.client is self:
            task.done.wait()


class CopyQueue:
    """One named thread around a queue of copies; it starts with the first of them."""

    def __init__(self, post: Callable[[Copied | CopyFailed | CopyQueueDied], None]) -> None:
        """Prepare; what is done is told by ``post``."""
        self._post = post
        self._arriving: queue.SimpleQueue[CopyTask | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.current: CopyTask | None = None
        self.is_stopping = False

    def client(self, dataset: DatasetId) -> CopyQueueClient:
        """Return a dataset's way to this queue."""
        return CopyQueueClient(dataset, self)

    def queue(self, task: CopyTask) -> None:
        """Take a task in; used by seats."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="copier")
            self._thread.start()
        self._arriving.put(task)

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
            waiting: dict[CopyQueueClient, deque[CopyTask]] = {}
            while self._take_in(waiting):
                client = next(iter(waiting))  # the one that waited longest since its last turn
                tasks = waiting.pop(client)
                self._carry_out(tasks.popleft())
                if tasks:
                    waiting[client] = tasks
        except BaseException as error:  # noqa: BLE001 -- whatever ends this thread, the loop must hear of it and raise it
            self._post(CopyQueueDied(error))

    def _take_in(self, waiting: dict[CopyQueueClient, deque[CopyTask]]) -> bool:
        """Sort what has arrived by seats, waiting for it where there is nothing else to do; False: stop."""
        while not waiting or not self._arriving.empty():
            task = self._arriving.get()
            if task is None:
                return False
            waiting.setdefault(task.client, deque()).append(task)
        return True

    def _carry_out(self, task: CopyTask) -> None:
        self.current = task
        try:
            ended: Copied | CopyFailed = Copied(task.client.dataset, (task.job(),))
        except Exception as error:  # noqa: BLE001 -- whatever is wrong with one dataset, the others' images are copied
            ended = CopyFailed(task.client.dataset, error)
        finally:
            self.current = None
            task.done.set()
        if isinstance(ended, Copied) or not task.client.is_interrupted:
            self._post(ended)


class CopyAdmission:
    """Says which moves may go on to the disk now; knows from earlier tries which ones will have to be copied.

    What is handed over stands in the journal as intended. Few intents are looked through quickly before every batch and
    ended quickly at a stop; a camera dump of a hundred thousand images may wait for weeks at no cost. A guess only says
    whether a move may have to wait: whether it is renamed or copied is found out by trying, each time, and a guess that
    was wrong is forgotten.
    """

    def __init__(self, most: int = MOST_HANDED_OVER) -> None:
        """Begin without any guess."""
        self._most = most
        self._waiting: dict[tuple[str, str], deque[Move]] = {}  # by pair of folders, the one first whose turn is next
        self._renamed: deque[Move] = deque()  # those that waited because of a guess that was wrong
        self._crossed: set[tuple[str, str]] = set()
        self._count = 0  # how many moves wait for a copy to end

    @property
    def waiting(self) -> int:
        """How many moves wait here."""
        return self._count + len(self._renamed)

    def admit(self, moves: Iterable[Move], handed_over: int) -> list[Move]:
        """Return the moves that may be tried now, of each pair the older ones first; the others wait.

        It takes as long as what comes in and goes out, however many wait.

        Args:
            moves: new ones.
            handed_over: how many copies have not ended yet.
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
        """Remember whether a move was handed over to be copied, or was renamed."""
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
        """Return all moves that wait, and keep none."""
        waiting = [*self._renamed, *chain.from_iterable(self._waiting.values())]
        self._renamed.clear()
        self._waiting.clear()
        self._count = 0
        return waiting


def _pair(move: Move) -> tuple[str, str]:
    """Return where from and where to, as finely as mounts are usual: the file's folder, and Dataset or Review."""
    return move.path.rpartition("/")[0], move.folder.partition("/")[0]
