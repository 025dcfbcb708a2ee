"""The move_queue: moves carried out as a group, told once each, those that end later too."""

import errno
import os
from dataclasses import replace

import pytest
from structlog.testing import capture_logs

from sortd.daemon.dataset import GROUP, MoveQueue
from sortd.daemon.metrics import Metrics
from sortd.daemon.reporting import DatasetLog
from sortd.events import ImageGone, Leave, Move, Moved, MoveFailed, MoveFailure, Outcome, Refusal, Stamp
from sortd.moving import copy_queue
from sortd.moving.copy_queue import MOST_GUESSES, MOST_HANDED_OVER, CopyAdmission, CopyJob, MoveOrder
from sortd.moving.mover import Mover
from sortd.store.journal import Journal
from sortd.store.records import MoveFile, MoveReason, MoveRecord, Role, Selection
from tests.filing_world import Dataset, order


def crossing(*names: int | str) -> None:
    """Be a rename between file systems."""
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), *names[1:2])


class Copies:
    """What was submitted and not run yet."""

    def __init__(self) -> None:
        """Begin with none."""
        self.jobs: list[CopyJob] = []

    def submit(self, job: CopyJob) -> list[MoveOrder]:
        """Keep a job for later."""
        self.jobs.append(job)
        return []

    def run(self, count: int) -> list[MoveOrder]:
        """Run the first so many."""
        now, self.jobs = self.jobs[:count], self.jobs[count:]
        return [job() for job in now]


@pytest.fixture
def copies() -> Copies:
    """Where copies to another file system wait."""
    return Copies()


@pytest.fixture
def move_queue(dataset: Dataset, journal: Journal, copies: Copies) -> MoveQueue:
    """An move_queue whose every move is a copy."""
    filing = Mover(dataset.root, journal, rename=crossing, submit=copies.submit)
    return MoveQueue(filing, DatasetLog("Set", Metrics()), history=journal.history, root=dataset.root)


def fill(move_queue: MoveQueue, dataset: Dataset, count: int) -> list[Move]:
    """Ask for moves, the first of them alone so that it is known that they are copies."""
    moves = [order(dataset.put(f"Images/{number}.jpg", str(number))) for number in range(count)]
    move_queue.add(moves[0])
    assert move_queue.send() == []
    for move in moves[1:]:
        move_queue.add(move)
    for _ in range(-(-count // GROUP)):
        assert move_queue.send() == []
    return moves


def test_move_queue_copy_is_logged_when_it_has_ended(dataset: Dataset, move_queue: MoveQueue, copies: Copies) -> None:
    """One line each, with how long it took; nothing is due meanwhile, so that the loop can sleep."""
    with capture_logs() as lines:
        fill(move_queue, dataset, 2)
        assert (move_queue.is_due, lines) == (False, [])
        ended = move_queue.end(copies.run(2))
    assert [type(result) for result in ended] == [Moved, Moved]
    assert [(line["event"], line["move_ms"] >= 0) for line in lines] == [("image.filed", True)] * 2


def test_move_queue_move_that_waits_is_due_when_a_copy_has_ended(
    dataset: Dataset, move_queue: MoveQueue, copies: Copies
) -> None:
    """So many at a time; the next one is handed over, and all come to their end."""
    fill(move_queue, dataset, MOST_HANDED_OVER + 2)
    assert (len(copies.jobs), move_queue.is_due) == (MOST_HANDED_OVER, False)
    move_queue.end(copies.run(1))
    assert move_queue.is_due
    move_queue.send()
    assert (len(copies.jobs), move_queue.is_due) == (MOST_HANDED_OVER, False)


def test_move_queue_disk_that_refuses_is_not_asked_for_each_that_waits(
    dataset: Dataset, move_queue: MoveQueue, copies: Copies
) -> None:
    """Those go back to the core without a line each; they are asked for again after its pause."""
    fill(move_queue, dataset, MOST_HANDED_OVER + 20)
    (dataset.root / "Dataset/cat").rmdir()
    dataset.put("Dataset/cat", "a file in the way")
    with capture_logs() as lines:
        ended = move_queue.end(copies.run(1))
    failures = [result.failure for result in ended if isinstance(result, MoveFailed)]
    assert failures == [MoveFailure.DESTINATION] * 21
    assert [line["event"] for line in lines] == ["move.failed"]
    assert not move_queue.is_due


def test_move_queue_absent_dataset_leaves_nothing_due(dataset: Dataset, move_queue: MoveQueue, copies: Copies) -> None:
    """What was gathered and what waits is answered at once: the loop must not spin until the disk is back."""
    fill(move_queue, dataset, MOST_HANDED_OVER + 5)
    move_queue.end(copies.run(2))
    move_queue.add(order(dataset.put("Images/late.jpg")))
    assert move_queue.is_due
    assert len(move_queue.refuse("not mounted")) == 6
    assert not move_queue.is_due


def test_move_queue_stop_gives_up_what_waits(dataset: Dataset, move_queue: MoveQueue, copies: Copies) -> None:
    """Without a line each; what is under way is told when it was interrupted."""
    fill(move_queue, dataset, MOST_HANDED_OVER + 5)
    assert {type(result) for result in move_queue.give_up()} == {MoveFailed}
    assert len(move_queue.end(copies.run(MOST_HANDED_OVER))) == MOST_HANDED_OVER


def test_move_queue_version_asked_for_again_meanwhile_is_answered_twice(
    dataset: Dataset, move_queue: MoveQueue, copies: Copies
) -> None:
    """The second time it is said that the first move has not ended; the first one is told in the end."""
    (move,) = fill(move_queue, dataset, 1)
    move_queue.add(move)
    with capture_logs() as lines:
        assert [type(result) for result in move_queue.send()] == [MoveFailed]
        assert [type(result) for result in move_queue.end(copies.run(1))] == [Moved]
    assert [line["event"] for line in lines] == ["move.failed", "image.filed"]


def test_move_queue_companion_that_follows_or_cannot_is_unknown_to_the_core(
    dataset: Dataset, move_queue: MoveQueue, copies: Copies
) -> None:
    """It never asked for that move: what could not follow is found again by the next scan."""
    fill(move_queue, dataset, 1)
    move_queue.end(copies.run(1))
    films = [dataset.put(f"Images/0.{suffix}", "a film") for suffix in ("mov", "mp4")]
    for film in films:
        assert move_queue.follow(Leave(str(film), Refusal.NOT_AN_IMAGE, "a film"))
    films[1].unlink()
    heard = move_queue.send() + move_queue.end(copies.run(2))
    assert sorted(result.path for result in heard if isinstance(result, ImageGone)) == sorted(map(str, films))


def test_move_queue_companion_follows_once(dataset: Dataset, move_queue: MoveQueue, copies: Copies) -> None:
    """It is found when it is looked at, and again when its image's copy ends."""
    fill(move_queue, dataset, 2)
    film = dataset.put("Images/1.mov", "a film")
    move_queue.end(copies.run(1))
    move_queue.end(copies.run(1))
    assert move_queue.follow(Leave(str(film), Refusal.NOT_AN_IMAGE, "a film"))
    move_queue.send()
    assert move_queue.follow(Leave(str(film), Refusal.NOT_AN_IMAGE, "a film"))
    assert move_queue.send() == []
    assert len(copies.jobs) == 1


def test_only_what_is_no_image_can_be_a_companion(dataset: Dataset, move_queue: MoveQueue) -> None:
    """A broken image of a companion's name stays an image; a companion that is gone by now is nobody's."""
    path = str(dataset.root / "Images" / "a.mov")
    assert not move_queue.follow(Leave(path, Refusal.UNREADABLE, "broken"))
    assert not move_queue.follow(Leave(path, Refusal.NOT_AN_IMAGE, "a film"))


def test_move_queue_failed_recovery_is_logged(dataset: Dataset, journal: Journal, move_queue: MoveQueue) -> None:
    """A source that is gone and a copy that may be torn: its hidden name is in the log; of the others no word."""
    gone, standing = (
        MoveRecord(token * 16, "Images", "Dataset/cat", (MoveFile(Role.IMAGE, name, name, Stamp(1, 2, 3, 4)),))
        for token, name in (("0", "gone.jpg"), ("1", "standing.jpg"))
    )
    journal.intend([(gone, MoveReason("filed")), (standing, MoveReason("filed"))])
    dataset.put("Images/standing.jpg")
    for one in (gone, standing):
        dataset.put(f"Dataset/cat/{one.part_name(0)}", "to")
    with capture_logs() as lines:
        move_queue.send()
    (line,) = lines
    assert (line["event"], line["log_level"]) == ("move.failed", "warning")
    assert line["path"] == f"{dataset.root}/Images/gone.jpg"
    assert gone.part_name(0) in line["error"]
    assert dataset.tree() == {"Images/standing.jpg": b"image", f"Dataset/cat/{gone.part_name(0)}": b"to"}


def test_move_queue_two_copies_are_logged() -> None:
    """Where an image had to be kept in its old place too, its line warns of it."""
    move = Move("/set/Images/a.jpg", Stamp(1, 2, 3, 4), "Rejected", Outcome.FOLLOWED)
    moved = Moved(move.path, move.stamp, "/set/Rejected/a.jpg", move.outcome, move.stamp)
    with capture_logs() as lines:
        for note in ("", "also kept in Images"):
            DatasetLog("Set", Metrics()).moved(move, replace(moved, note=note), 1.0)
    assert [(line["log_level"], line.get("note")) for line in lines] == [
        ("info", None),
        ("warning", "also kept in Images"),
    ]


def between(folder: str, number: int, destination: str = "Dataset") -> Move:
    """Return a move from a folder of Images/."""
    path = f"/set/Images/{folder}/{number}.jpg"
    return Move(path, Stamp(1, number, 3, 4), f"{destination}/cat", Outcome.FILED)


def test_admit_after_a_finished_copy_looks_at_one_move_of_a_hundred_thousand(monkeypatch: pytest.MonkeyPatch) -> None:
    """A camera dump waits for weeks: what one copy costs must not grow with what waits behind it."""
    looked_at = 0
    pair_of = copy_queue._pair

    def counting(move: Move) -> tuple[str, str]:
        nonlocal looked_at
        looked_at += 1
        return pair_of(move)

    waiting = CopyAdmission()
    waiting.learn(between("a", 0), crossed=True)
    monkeypatch.setattr(copy_queue, "_pair", counting)
    moves = [between("a", number) for number in range(100_000)]
    assert waiting.admit(moves, 0) == moves[:MOST_HANDED_OVER]
    assert looked_at == len(moves)
    for number in range(MOST_HANDED_OVER, MOST_HANDED_OVER + 100):
        assert waiting.admit((), MOST_HANDED_OVER - 1) == [moves[number]]
        waiting.learn(moves[number], crossed=True)
        assert waiting.admit((), MOST_HANDED_OVER) == []
    assert looked_at == len(moves) + 100
    assert waiting.waiting == len(moves) - MOST_HANDED_OVER - 100


def test_admit_of_several_pairs_of_disks_takes_turns() -> None:
    """No pair waits for the other's last; a pair that turns out to be renamed waits for nothing any more."""
    waiting = CopyAdmission(most=4)
    for folder in "ab":
        waiting.learn(between(folder, 0), crossed=True)
    first, second = ([between(folder, number) for number in range(6)] for folder in "ab")
    other = between("c", 0)
    assert waiting.admit([*first, *second, other], 0) == [other, first[0], second[0], first[1], second[1]]
    assert waiting.admit((), 2) == [first[2], second[2]]
    waiting.learn(second[0], crossed=False)
    assert waiting.waiting == 6
    assert waiting.admit((), 4) == second[3:]
    assert waiting.admit((), 4) == []
    assert list(waiting.give_up()) == first[3:]
    assert waiting.waiting == 0
    assert list(waiting.give_up()) == []


def test_admission_forgotten_guesses_leave_waiting_what_waits() -> None:
    """To forget them all must not hand a hundred thousand copies over at once."""
    waiting = CopyAdmission(most=1)
    waiting.learn(between("a", 0), crossed=True)
    moves = [between("a", number) for number in range(3)]
    assert waiting.admit(moves, 0) == moves[:1]
    for number in range(MOST_GUESSES + 1):
        waiting.learn(between(f"b{number}", 0), crossed=True)
    assert waiting.admit((), 1) == []
    assert waiting.admit((), 0) == moves[1:2]


def test_admission_guesses_about_folders_are_bounded() -> None:
    """A folder a day for years: all guesses are forgotten at once, and made again by trying."""
    crossings = CopyAdmission()
    for day in range(MOST_GUESSES + 10):
        crossings.learn(Move(f"/set/Images/{day}/a.jpg", Stamp(1, 2, 3, 4), "Dataset/cat", Outcome.FILED), crossed=True)
        assert len(crossings._crossed) <= MOST_GUESSES


def test_move_queue_more_moves_than_a_group_wait_for_the_next_turn(dataset: Dataset, journal: Journal) -> None:
    """A turn of the loop is short, however many images were decided at once; the rest is due, and none is lost."""
    move_queue = MoveQueue(
        Mover(dataset.root, journal), DatasetLog("Set", Metrics()), history=journal.history, root=dataset.root
    )
    for number in range(2 * GROUP + 1):
        move_queue.add(order(dataset.put(f"Images/{number}.jpg", str(number))))
    groups = []
    while move_queue.is_due:
        groups.append(len(move_queue.send()))
    assert groups == [GROUP, GROUP, 1]
    assert len(journal.history.moves(Selection())) == 2 * GROUP + 1
