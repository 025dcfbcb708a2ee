"""The copier: long copies in a thread of their own, each dataset in its turn, interrupted within moments."""

import queue
import threading
from collections.abc import Iterator

import pytest

from sortd.errors import BusyError, JournalError
from sortd.events import DatasetId, Stamp
from sortd.moving.copy_queue import Copied, CopyFailed, CopyQueue, CopyQueueClient, CopyQueueDied, MoveOrder
from sortd.store.records import MoveFile, MoveReason, MoveRecord, Role
from tests.daemon_process import PATIENCE_SECONDS

Inbox = queue.SimpleQueue[Copied | CopyFailed | CopyQueueDied]


@pytest.fixture
def inbox() -> Inbox:
    """Where the copier posts to."""
    return queue.SimpleQueue()


@pytest.fixture
def copier(inbox: Inbox) -> Iterator[CopyQueue]:
    """A copier that is stopped in the end."""
    made = CopyQueue(inbox.put)
    yield made
    made.stop()


def order(name: str) -> MoveOrder:
    """Return an order for an image of that name."""
    member = MoveFile(Role.IMAGE, name, name, Stamp(1, 2, 3, 4))
    return MoveOrder(MoveRecord(name, "Images", "Dataset/cat", (member,)), MoveReason("filed"))


def name_of(message: Copied | CopyFailed | CopyQueueDied) -> str:
    """Return the name of the image that was copied."""
    assert isinstance(message, Copied)
    return message.orders[0].move.token


def test_copy_queue_copy_runs_in_its_own_thread(copier: CopyQueue, inbox: Inbox) -> None:
    """Nothing is answered at once; the thread has a name, and the dataset's stands in what it tells."""
    threads: list[str] = []
    asked = order("a.jpg")

    def job() -> MoveOrder:
        threads.append(threading.current_thread().name)
        return asked

    assert CopyQueueClient(DatasetId("Cats"), copier).submit(job) == []
    assert inbox.get(timeout=PATIENCE_SECONDS) == Copied(DatasetId("Cats"), (asked,))
    assert threads == ["copier"]


def test_copy_queue_datasets_take_turns(copier: CopyQueue, inbox: Inbox) -> None:
    """A dump of a hundred films into one dataset makes another wait for one of them."""
    gate = threading.Event()
    many, few = CopyQueueClient(DatasetId("Many"), copier), CopyQueueClient(DatasetId("Few"), copier)

    def first() -> MoveOrder:
        gate.wait(60)
        return order("many 0")

    many.submit(first)
    for number in range(1, 100):
        many.submit(lambda number=number: order(f"many {number}"))  # type: ignore[misc]
    few.submit(lambda: order("few"))
    gate.set()
    told = [name_of(inbox.get(timeout=PATIENCE_SECONDS)) for _ in range(101)]
    assert told.index("few") <= 2
    assert [name for name in told if name != "few"] == [f"many {number}" for number in range(100)]


def test_copy_queue_closed_client_waits_for_its_own_copy_only(copier: CopyQueue, inbox: Inbox) -> None:
    """Afterwards its journal may be closed: nothing of it is under way; another dataset's copies go on."""
    begun = threading.Event()
    going, staying = CopyQueueClient(DatasetId("Going"), copier), CopyQueueClient(DatasetId("Staying"), copier)

    def long() -> MoveOrder:
        begun.set()
        while not going.is_interrupted:
            pass
        return order("interrupted")

    going.submit(long)
    staying.submit(lambda: order("staying"))
    assert begun.wait(60)
    going.close()
    assert copier.current is None or copier.current.client is staying
    assert {name_of(inbox.get(timeout=PATIENCE_SECONDS)) for _ in range(2)} == {"interrupted", "staying"}
    assert (going.is_interrupted, staying.is_interrupted) == (True, False)
    staying.close()


def test_copy_queue_stop_interrupts_every_client(copier: CopyQueue, inbox: Inbox) -> None:
    """What comes later is answered at once, as interrupted, and starts no thread."""
    client = CopyQueueClient(DatasetId("Cats"), copier)
    copier.interrupt()
    (told,) = client.submit(lambda: order("b.jpg").with_error(BusyError(str(client.is_interrupted))))
    assert str(told.error) == "True"
    assert inbox.empty()


def test_copy_queue_failed_copy_is_posted_and_others_continue(copier: CopyQueue, inbox: Inbox) -> None:
    """A journal that cannot be written is told with its dataset; an image of another one is copied after it."""
    refused = JournalError("the journal's disk is full")

    def job() -> MoveOrder:
        raise refused

    CopyQueueClient(DatasetId("Cats"), copier).submit(job)
    CopyQueueClient(DatasetId("Dogs"), copier).submit(lambda: order("b.jpg"))
    assert inbox.get(timeout=PATIENCE_SECONDS) == CopyFailed(DatasetId("Cats"), refused)
    assert name_of(inbox.get(timeout=PATIENCE_SECONDS)) == "b.jpg"


def test_copy_queue_death_of_the_thread_is_posted(copier: CopyQueue, inbox: Inbox) -> None:
    """The loop raises what ended the thread."""

    def job() -> MoveOrder:
        raise SystemExit

    CopyQueueClient(DatasetId("Cats"), copier).submit(job)
    told = inbox.get(timeout=PATIENCE_SECONDS)
    assert isinstance(told, CopyQueueDied)
    assert isinstance(told.error, SystemExit)


def test_copy_queue_without_copies_has_no_thread(inbox: Inbox) -> None:
    """Whoever has one disk runs three threads; stopping twice is no mistake."""
    copier = CopyQueue(inbox.put)
    copier.stop()
    copier.stop()
    assert "copier" not in {thread.name for thread in threading.enumerate()}
