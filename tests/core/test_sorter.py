"""The core by events and integer time: what goes in, what comes out."""

from collections.abc import Sequence

import numpy as np
import pytest

from sortd.classify.build import build
from sortd.classify.decide import decide_by
from sortd.classify.prototypes import PrototypeSet
from sortd.classify.types import DecisionSettings, SupportSet
from sortd.core.sorter import MOST_LOOKS, Sorter, SorterSettings, order_for
from sortd.core.state import State
from sortd.events import (
    Abstained,
    Action,
    Command,
    Decision,
    Embed,
    Embedded,
    EmbeddedImage,
    FoldersGone,
    ImageGone,
    ImageHeld,
    ImageRefused,
    ImageSeen,
    Inspect,
    Leave,
    Mode,
    Move,
    Moved,
    MoveFailed,
    MoveFailure,
    Outcome,
    PrototypesBuilt,
    Rebuild,
    RebuildFailed,
    ReferencesTouched,
    Refusal,
    Released,
    ReviewSeen,
    Scan,
    ScanFinished,
    ScanStarted,
    Stamp,
    StopRequested,
    Tick,
    Writer,
)

ENCODER = "test-encoder"


def stamp(version: int = 1, inode: int = 1) -> Stamp:
    """Return a stamp that differs by version."""
    return Stamp(device=1, inode=inode, size=100 + version, mtime_ns=version)


def prototypes(generation: int = 1, encoder_id: str = ENCODER) -> PrototypeSet:
    """Return two classes on two axes."""
    support = SupportSet(
        labels=("cross", "torx"),
        embeddings=np.eye(2, dtype=np.float32),
        classes=np.array([0, 1]),
        sources=("cross/1.png", "torx/1.png"),
        encoder_id=encoder_id,
        fingerprint=str(generation),
    )
    return build(support, DecisionSettings(mode=Mode.MAX, abstain=None), generation=generation)


def ready_sorter(**settings: object) -> Sorter:
    """Return a core that has its prototypes and nothing to do."""
    sorter = Sorter(SorterSettings(settle_seconds=10, **settings), decide=decide_by)  # type: ignore[arg-type]  # keywords of one test each
    assert sorter.receive(Tick(), 0) == [Rebuild(1)]
    assert sorter.receive(PrototypesBuilt(prototypes(), job=1), 0) == []
    return sorter


def embedded(path: str, mark: Stamp, axis: int = 0, encoder_id: str = ENCODER) -> Embedded:
    """Return the worker's answer for one image that lies on one class's axis."""
    return Embedded((EmbeddedImage(path, mark, np.eye(2, dtype=np.float32)[axis], "c0ffee"),), encoder_id)


def settle(sorter: Sorter, path: str, mark: Stamp, now: float) -> list[Command]:
    """Bring one file to READY and return what the core asks for then."""
    assert sorter.receive(ImageSeen(path, mark), now) == []
    assert sorter.receive(Tick(), now + 10) == [Inspect(path)]
    return sorter.receive(ImageSeen(path, mark, Writer.ABSENT), now + 10)


def test_sorter_image_is_embedded_decided_and_moved() -> None:
    """An image that holds still is embedded, decided and moved, and then forgotten."""
    sorter, mark = ready_sorter(), stamp()
    assert settle(sorter, "a.png", mark, 100) == [Embed((("a.png", mark),))]
    (move,) = sorter.receive(embedded("a.png", mark, axis=1), 111)
    assert isinstance(move, Move)
    assert (move.folder, move.outcome, move.generation) == ("Dataset/torx", Outcome.FILED, 1)
    assert move.milliseconds["settle"] == 10_000
    assert not sorter.is_drained
    assert sorter.receive(Moved("a.png", mark, "Dataset/torx/a.png", Outcome.FILED, mark), 112) == []
    assert sorter.is_drained


def doubt(sorter: Sorter) -> None:
    """Let every decision be an abstention."""
    verdict = Abstained("margin", "cross", 0.5, 0.0, "torx", Mode.MAX)
    sorter._decide = lambda _classifier, rows, _turned_away: [verdict] * len(rows)


@pytest.mark.parametrize("action", ["copy", "hardlink", "symlink", "keywords"])
def test_sorter_action_is_in_the_move_of_an_image_of_the_inbox_only(action: Action) -> None:
    """What sortd put into Review/ is moved on, whatever the action is."""
    sorter, mark = ready_sorter(action=action), stamp()
    settle(sorter, "Images/a.png", mark, 100)
    (move,) = sorter.receive(embedded("Images/a.png", mark), 111)
    assert isinstance(move, Move)
    assert move.action == action
    sorter.receive(ReviewSeen("Review/torx/b.png", mark, generation=0), 200)
    (move,) = sorter.receive(embedded("Review/torx/b.png", mark), 201)
    assert isinstance(move, Move)
    assert move.action == "move"


@pytest.mark.parametrize("action", ["symlink", "keywords"])
def test_sorter_abstained_image_stays_and_is_decided_again(action: Action) -> None:
    """It is told once, counts as at rest, is forgotten by no scan, and moves when other prototypes are sure."""
    sorter, mark = ready_sorter(action=action), stamp()
    decide = sorter._decide
    doubt(sorter)
    settle(sorter, "Images/a.png", mark, 100)
    left = [Leave("Images/a.png", Refusal.ABSTAINED, "margin, best guess: cross")]
    assert sorter.receive(embedded("Images/a.png", mark), 111) == left
    assert (sorter.images.counts[State.REVIEWED], sorter.is_drained) == (1, True)
    sorter.receive(ScanStarted(), 112)
    sorter.receive(ImageSeen("Images/a.png", mark), 112)
    assert sorter.receive(ScanFinished(), 112) == []
    for job in (2, 3):
        if job == 3:
            sorter._decide = decide
        sorter.receive(ReferencesTouched(), 100 * job)
        sorter.receive(Tick(), 100 * job + 10)
        answer = sorter.receive(PrototypesBuilt(prototypes(generation=job), job=job), 100 * job + 11)
        assert answer == [Embed((("Images/a.png", mark),))]
        answer = sorter.receive(embedded("Images/a.png", mark), 100 * job + 12)
        assert [type(one) for one in answer] == ([] if job == 2 else [Move])


def test_sorter_abstained_images_that_stay_are_no_part_of_a_later_trial() -> None:
    """Those that abstain again say nothing against new references."""
    sorter = ready_sorter(action="keywords", guard_images=2)
    marks = [stamp(inode=inode) for inode in (1, 2, 3)]
    doubt(sorter)
    for at, mark in enumerate(marks):
        settle(sorter, f"Images/{at}.png", mark, 100 + 20 * at)
        sorter.receive(embedded(f"Images/{at}.png", mark), 111 + 20 * at)
    sorter.receive(ReferencesTouched(), 200)
    sorter.receive(Tick(), 210)
    sorter.receive(PrototypesBuilt(prototypes(generation=2), job=2), 211)
    for at, mark in enumerate(marks):
        sorter.receive(embedded(f"Images/{at}.png", mark), 212)
    assert sorter.images.counts[State.REVIEWED] == 3
    assert sorter.guard.reason is None


def test_sorter_abstained_images_that_stay_beyond_the_limit_are_noted() -> None:
    """They are not decided again at each scan."""
    sorter = ready_sorter(action="keywords", backlog_limit=1)
    doubt(sorter)
    for at in (1, 2):
        settle(sorter, f"Images/{at}.png", stamp(inode=at), 100 * at)
        (left,) = sorter.receive(embedded(f"Images/{at}.png", stamp(inode=at)), 100 * at + 11)
        assert isinstance(left, Leave)
    assert len(sorter.images) == 1
    sorter.receive(ImageSeen("Images/2.png", stamp(inode=2)), 300)
    assert len(sorter.images) == 1


def test_sorter_growing_file_settles_again() -> None:
    """Every new stamp moves the deadline."""
    sorter = ready_sorter()
    sorter.receive(ImageSeen("a.png", stamp(1)), 100)
    sorter.receive(ImageSeen("a.png", stamp(2)), 108)
    assert sorter.receive(Tick(), 110) == []
    assert sorter.next_deadline() == 118
    assert sorter.receive(Tick(), 118) == [Inspect("a.png")]


def test_sorter_event_alone_embeds_nothing() -> None:
    """Only a look that asked for a writer does."""
    sorter, mark = ready_sorter(), stamp()
    sorter.receive(ImageSeen("a.png", mark), 100)
    assert sorter.receive(ImageSeen("a.png", mark, closed=True), 200) == []


def test_sorter_file_with_an_open_writer_waits() -> None:
    """A writer that holds the file open without writing keeps it from being moved."""
    sorter, mark = ready_sorter(), stamp()
    sorter.receive(ImageSeen("a.png", mark), 100)
    sorter.receive(Tick(), 110)
    assert sorter.receive(ImageSeen("a.png", mark, Writer.PRESENT), 110) == []
    assert sorter.next_deadline() == 120
    assert sorter.receive(Tick(), 120) == [Inspect("a.png")]
    assert sorter.receive(ImageSeen("a.png", mark, Writer.ABSENT), 120) == [Embed((("a.png", mark),))]


def test_sorter_file_without_a_lease_waits_five_seconds_unless_closed() -> None:
    """Where no lease tells of a writer, quiet time stands in; a close after writing shortens it."""
    sorter = Sorter(SorterSettings(settle_seconds=1), decide=decide_by)
    sorter.receive(ImageSeen("open.png", stamp()), 100)
    sorter.receive(ImageSeen("closed.png", stamp(), closed=True), 100)
    assert set(sorter.receive(Tick(), 101)) >= {Inspect("open.png"), Inspect("closed.png")}
    assert sorter.receive(ImageSeen("open.png", stamp(), Writer.UNKNOWN), 101) == []
    assert sorter.receive(ImageSeen("closed.png", stamp(), Writer.UNKNOWN), 101) != []
    assert sorter.receive(Tick(), 104) == []
    assert sorter.receive(Tick(), 105) == [Inspect("open.png")]


def test_sorter_close_during_a_long_wait_is_inspected_soon() -> None:
    """The pause after a busy file does not outlast the close that ends it."""
    sorter, mark = ready_sorter(), stamp()
    sorter.receive(ImageSeen("a.png", mark), 100)
    now = 110.0
    while now < 300:
        assert sorter.receive(Tick(), now) == [Inspect("a.png")]
        sorter.receive(ImageSeen("a.png", mark, Writer.PRESENT), now)
        now = sorter.next_deadline() or 0
    closed = stamp(2)
    sorter.receive(ImageSeen("a.png", closed, closed=True), 301)
    assert sorter.next_deadline() == 311


def test_sorter_rebuild_embeds_and_decides_afterwards() -> None:
    """While a rebuild is due or running, images are embedded but none is moved."""
    sorter, mark = ready_sorter(), stamp()
    sorter.receive(ReferencesTouched(), 105)
    assert settle(sorter, "a.png", mark, 100)[0] == Embed((("a.png", mark),))
    assert sorter.receive(embedded("a.png", mark), 112) == []
    assert sorter.receive(Tick(), 115) == [Rebuild(2)]
    assert sorter.receive(PrototypesBuilt(prototypes(2), job=2), 116) == [Embed((("a.png", mark),))]
    (move,) = sorter.receive(embedded("a.png", mark), 117)
    assert isinstance(move, Move)
    assert move.generation == 2


def test_sorter_bulk_copy_of_references_is_one_rebuild() -> None:
    """Each change moves the deadline, but not for ever."""
    sorter = ready_sorter()
    for now in range(100, 200):
        assert sorter.receive(ReferencesTouched(), now) == []
        if now < 130:
            assert sorter.receive(Tick(), now) == []
    assert sorter.next_deadline() == 130
    assert sorter.receive(Tick(), 200) == [Rebuild(2)]
    sorter.receive(ReferencesTouched(), 201)
    assert sorter.receive(Tick(), 230) == []
    sorter.receive(PrototypesBuilt(prototypes(2), job=2), 231)
    assert sorter.receive(Tick(), 231) == [Rebuild(3)]


def test_sorter_absent_references_stop_moves_until_they_are_back() -> None:
    """Embedding goes on, moving stops, and resumes with the next prototypes."""
    sorter, mark = ready_sorter(), stamp()
    sorter.receive(ReferencesTouched(), 100)
    sorter.receive(Tick(), 110)
    sorter.receive(RebuildFailed("Clases/ is gone", references_absent=True, job=2), 110)
    sorter.receive(ImageSeen("a.png", mark), 200)
    assert sorter.receive(Tick(), 210) == [Inspect("a.png"), Rebuild(3)]
    assert sorter.receive(ImageSeen("a.png", mark, Writer.ABSENT), 210) == [Embed((("a.png", mark),))]
    assert sorter.receive(embedded("a.png", mark), 211) == []
    sorter.receive(RebuildFailed("Clases/ is gone", references_absent=True, job=3), 212)
    assert not sorter.is_drained
    assert sorter.receive(Tick(), 214) == [Rebuild(4)]
    assert Embed((("a.png", mark),)) in sorter.receive(PrototypesBuilt(prototypes(2), job=4), 231)


def test_sorter_failed_rebuild_keeps_the_last_prototypes() -> None:
    """A failure that is no absence goes on serving, and is tried again later each time."""
    sorter = ready_sorter()
    sorter.receive(ReferencesTouched(), 100)
    assert sorter.receive(Tick(), 110) == [Rebuild(2)]
    sorter.receive(RebuildFailed("the encoder failed", job=2), 110)
    assert sorter.may_move
    assert sorter.next_deadline() == 111
    assert sorter.receive(Tick(), 111) == [Rebuild(3)]
    sorter.receive(RebuildFailed("the encoder failed", job=3), 112)
    assert sorter.next_deadline() == 114


def test_sorter_late_answer_about_an_older_version_is_dropped() -> None:
    """An image that changed while it was encoded is not moved by the old answer."""
    sorter, mark = ready_sorter(), stamp(1)
    settle(sorter, "a.png", mark, 100)
    sorter.receive(ImageSeen("a.png", stamp(2)), 111)
    assert sorter.receive(embedded("a.png", mark), 112) == []
    assert sorter.images.counts[State.SETTLING] == 1


def test_sorter_embeddings_of_another_encoder_are_not_decided() -> None:
    """They are not decided, but embedded again by the encoder that serves now."""
    sorter, mark = ready_sorter(), stamp()
    settle(sorter, "a.png", mark, 100)
    assert sorter.receive(embedded("a.png", mark, encoder_id="another"), 112) == [Embed((("a.png", mark),))]


def test_sorter_broken_image_is_set_aside_and_another_file_left() -> None:
    """Refusals go to Rejected/ or stay, by what they are."""
    sorter = ready_sorter()
    settle(sorter, "a.png", stamp(), 100)
    (move,) = sorter.receive(ImageRefused("a.png", stamp(), Refusal.UNREADABLE, "truncated"), 111)
    assert isinstance(move, Move)
    assert (move.folder, move.reason) == ("Rejected", "unreadable: truncated")
    sorter.receive(Embedded((), ENCODER), 111)
    settle(sorter, "b.txt", stamp(), 200)
    answer = sorter.receive(ImageRefused("b.txt", stamp(), Refusal.NOT_AN_IMAGE, "text"), 211)
    assert answer == [Leave("b.txt", Refusal.NOT_AN_IMAGE, "text", stamp())]
    assert sorter.receive(ImageSeen("b.txt", stamp()), 300) == []
    assert sorter.images.counts[State.REFUSED] == 1
    sorter.receive(ImageSeen("b.txt", stamp(2)), 400)
    assert sorter.images.counts[State.SETTLING] == 1


def test_sorter_unreadable_file_is_tried_after_each_scan_and_logged_once() -> None:
    """Granting a right changes no stamp, so that nothing else would ever show it."""
    sorter, mark = ready_sorter(), stamp()
    settle(sorter, "a.png", mark, 100)
    denied = ImageRefused("a.png", mark, Refusal.DENIED, "sortd may not read it")
    assert sorter.receive(denied, 111) == [Leave("a.png", Refusal.DENIED, "sortd may not read it", mark)]
    for now in (200, 300):
        sorter.receive(ScanStarted(), now)
        sorter.receive(ImageSeen("a.png", mark), now)
        sorter.receive(ScanFinished(), now)
        settle(sorter, "a.png", mark, now)
        assert sorter.images.counts[State.ENCODING] == 1
        assert sorter.receive(denied, now + 11) == []
    assert sorter.images.counts[State.REFUSED] == 1


def test_sorter_repaired_rejected_image_is_decided_and_a_broken_one_stays() -> None:
    """In Rejected/ it is not set aside a second time; its next version is tried again."""
    sorter = ready_sorter()
    sorter.receive(ImageSeen("Rejected/a.png", stamp(), is_aside=True), 100)
    settle(sorter, "Rejected/a.png", stamp(), 100)
    broken = ImageRefused("Rejected/a.png", stamp(), Refusal.UNREADABLE, "truncated")
    assert sorter.receive(broken, 111) == [Leave("Rejected/a.png", Refusal.UNREADABLE, "truncated", stamp())]
    settle(sorter, "Rejected/a.png", stamp(2), 200)
    (move,) = sorter.receive(embedded("Rejected/a.png", stamp(2)), 212)
    assert isinstance(move, Move)
    assert (move.path, move.folder) == ("Rejected/a.png", "Dataset/cross")


def test_sorter_failing_folder_waits_longer_each_time_alone() -> None:
    """While nothing can move into one class's folder, images that are found to be of another class move."""
    sorter, mark = ready_sorter(), stamp()
    for number, path in enumerate(("first.png", "second.png", "other.png")):
        settle(sorter, path, mark, 100 + 10 * number)
    now, pauses = 131.0, []
    for tried, waiting in (("first.png", "second.png"), ("first.png", "second.png"), ("second.png", "first.png")):
        (move,) = sorter.receive(embedded(tried, mark), now)
        assert isinstance(move, Move)
        assert move.folder == "Dataset/cross"
        sorter.receive(MoveFailed(tried, mark, MoveFailure.DESTINATION, "not a directory"), now)
        assert sorter.receive(embedded(waiting, mark), now) == []
        deadline = sorter.next_deadline()
        assert deadline is not None
        pauses.append(deadline - now)
        if now == 131:
            (other,) = sorter.receive(embedded("other.png", mark, axis=1), now)
            assert isinstance(other, Move)
            assert other.folder != "Dataset/cross"
            sorter.receive(Moved("other.png", mark, "there", Outcome.FILED, mark), now)
        now = deadline
        sorter.receive(Tick(), now)
    assert pauses == [1, 2, 4]


def test_sorter_failing_destination_is_tried_again() -> None:
    """No room is no reason to hammer the disk, nor to forget the image."""
    sorter, mark = ready_sorter(), stamp()
    settle(sorter, "a.png", mark, 100)
    sorter.receive(embedded("a.png", mark), 111)
    sorter.receive(MoveFailed("a.png", mark, MoveFailure.DESTINATION, "no space left"), 112)
    assert not sorter.may_move
    assert sorter.next_deadline() == 113
    assert sorter.receive(Tick(), 113) == [Embed((("a.png", mark),))]


def test_sorter_file_changed_or_gone_before_its_move_is_no_error() -> None:
    """A changed one is looked at again, a vanished one forgotten."""
    sorter = ready_sorter()
    for path, failure in (("a.png", MoveFailure.CHANGED), ("b.png", MoveFailure.VANISHED)):
        settle(sorter, path, stamp(), 100)
        sorter.receive(embedded(path, stamp()), 111)
        answer = sorter.receive(MoveFailed(path, stamp(), failure, ""), 112)
        assert answer == ([Inspect(path)] if failure is MoveFailure.CHANGED else [])
        sorter.receive(ImageGone(path), 113)
    assert sorter.is_drained


def test_sorter_busy_file_waits_longer_each_time() -> None:
    """An immutable one, say: up to five minutes; no drain waits for it, and a new version is taken as ever."""
    sorter = ready_sorter()
    settle(sorter, "a.png", stamp(), 100)
    now, waits = 110.0, []
    for _ in range(12):
        sorter.receive(embedded("a.png", stamp()), now)
        assert sorter.receive(MoveFailed("a.png", stamp(), MoveFailure.BUSY, ""), now) == [Inspect("a.png")]
        sorter.receive(ImageSeen("a.png", stamp(), Writer.ABSENT), now)
        due = sorter.next_deadline()
        assert due is not None
        waits.append(due - now)
        now = due
        assert sorter.is_drained == (len(waits) > 1)
        assert sorter.receive(Tick(), now) == [Inspect("a.png")]
        assert sorter.receive(ImageSeen("a.png", stamp(), Writer.ABSENT), now) == [Embed((("a.png", stamp()),))]
    assert waits == [10, 10, 10, 10, 16, 32, 64, 128, 256, 300, 300, 300]
    sorter.receive(ImageSeen("a.png", stamp(2)), now)
    assert sorter.next_deadline() == now + 10


def test_sorter_abstained_image_is_decided_again_by_new_prototypes() -> None:
    """What rests in Review/ is embedded again (from the cache) when the references change, and moves if it can."""
    sorter, mark = ready_sorter(), stamp()
    settle(sorter, "Images/a.png", mark, 100)
    sorter.receive(embedded("Images/a.png", mark), 111)
    sorter.receive(Moved("Images/a.png", mark, "Review/cross/a.png", Outcome.REVIEW, mark), 112)
    assert sorter.images.counts[State.REVIEWED] == 1
    assert sorter.is_drained
    sorter.receive(ReferencesTouched(), 200)
    sorter.receive(Tick(), 210)
    answer = sorter.receive(PrototypesBuilt(prototypes(2), job=2), 211)
    assert answer == [Embed((("Review/cross/a.png", mark),))]
    (move,) = sorter.receive(embedded("Review/cross/a.png", mark), 212)
    assert isinstance(move, Move)
    assert move.folder == "Dataset/cross"


@pytest.mark.parametrize(
    ("reason", "best_label", "folder"),
    [
        *(("typicality", "cross", "_none"), ("stranger", "cross", "_none"), ("no_classes", None, "_none")),
        *((reason, "cross", "cross") for reason in ("margin", "name_only", "too_few")),
    ],
)
def test_sorter_image_like_no_class_goes_to_review_none(reason: str, best_label: str | None, folder: str) -> None:
    """Only what is in doubt within a class goes to the folder of the best guess, which the decision keeps anyway."""
    decision = Abstained(reason, best_label, 0.5, 0.1, None, Mode.BEST)
    image = EmbeddedImage("Images/a.png", stamp(), np.ones(2, np.float32), "00")
    move = order_for(image, decision, prototypes(1), settle_seconds=1.0)
    assert (move.folder, move.reason, move.decision) == (f"Review/{folder}", reason, decision)


def test_sorter_image_that_stays_in_review_keeps_the_generation_that_turned_it_away() -> None:
    """References that two rebuilds added count together, as they do after a restart."""
    asked: list[list[int]] = []

    def turn_away(_classifier: object, _rows: object, turned_away: Sequence[int]) -> list[Decision]:
        asked.append(list(turned_away))
        return [Abstained("stranger", "cross", 0.5, 0.1, None, Mode.BEST) for _ in turned_away]

    sorter, mark = Sorter(SorterSettings(settle_seconds=10), decide=turn_away), stamp()
    sorter.receive(Tick(), 0)
    sorter.receive(PrototypesBuilt(prototypes(1), job=1), 0)
    settle(sorter, "Images/a.png", mark, 100)
    sorter.receive(embedded("Images/a.png", mark), 111)
    sorter.receive(Moved("Images/a.png", mark, "Review/_none/a.png", Outcome.REVIEW, mark), 112)
    for job in (2, 3):
        sorter.receive(ReferencesTouched(), 100 * job)
        sorter.receive(Tick(), 100 * job + 10)
        sorter.receive(PrototypesBuilt(prototypes(job), job=job), 100 * job + 11)
        sorter.receive(embedded("Review/_none/a.png", mark), 100 * job + 12)
    assert asked == [[0], [1], [1]]


def test_sorter_held_file_rests_until_it_changes_or_is_released() -> None:
    """An undone file is not filed again at once."""
    sorter, mark = ready_sorter(), stamp()
    sorter.receive(ImageHeld("a.png", mark), 100)
    sorter.receive(ImageSeen("a.png", mark), 101)
    assert sorter.is_drained
    sorter.receive(Released("a.png"), 102)
    assert sorter.receive(Tick(), 112) == [Inspect("a.png")]
    sorter.receive(ImageHeld("a.png", mark), 113)
    sorter.receive(ImageSeen("a.png", stamp(2)), 114)
    assert sorter.images.counts[State.SETTLING] == 1


def test_sorter_newest_images_are_first_and_the_oldest_not_starved() -> None:
    """A batch takes the newest, and every fourth the oldest."""
    sorter = ready_sorter(batch_size=4, batches_in_flight=1)
    settle(sorter, "first.png", stamp(), 100)
    for index in range(8):
        settle(sorter, f"{index}.png", stamp(inode=index), 200 + 20 * index)
    (embed,) = sorter.receive(embedded("first.png", stamp()), 400)[-1:]
    assert isinstance(embed, Embed)
    assert [path for path, _ in embed.images] == ["7.png", "6.png", "5.png", "0.png"]


def test_sorter_full_backlog_scans_for_the_rest() -> None:
    """What does not fit is not kept, and is asked for once there is room."""
    sorter = ready_sorter(backlog_limit=4)
    for index in range(10):
        sorter.receive(ImageSeen(f"{index}.png", stamp(inode=index)), 100)
    assert sorter.images.waiting == 4
    answers = [sorter.receive(ImageGone(f"{index}.png"), 101) for index in range(4)]
    assert [Scan()] in answers
    assert answers.count([Scan()]) == 1


def test_sorter_full_backlog_ends_the_scan() -> None:
    """The driver ends a scan that names more than fits; a scan that names only what is known goes on."""
    sorter = ready_sorter(backlog_limit=2)
    sorter.receive(ScanStarted(), 100)
    for index in (0, 1, 0, 1):
        sorter.receive(ImageSeen(f"{index}.png", stamp(inode=index)), 100)
        assert not sorter.images.overflowed
    sorter.receive(ImageSeen("2.png", stamp(inode=2)), 100)
    assert sorter.images.overflowed
    assert len(sorter.images) == 2


def test_sorter_scan_inspects_resting_images_that_it_did_not_find() -> None:
    """A held or refused file that was deleted is forgotten after the next scan."""
    sorter = ready_sorter()
    sorter.receive(ImageHeld("gone.png", stamp()), 100)
    sorter.receive(ImageHeld("here.png", stamp()), 100)
    sorter.receive(ScanStarted(), 110)
    sorter.receive(ImageSeen("here.png", stamp()), 110)
    assert sorter.receive(ScanFinished(), 110) == [Inspect("gone.png")]


def test_sorter_stop_starts_nothing_and_waits_for_moves() -> None:
    """After StopRequested no image is embedded or moved, but a move under way is awaited."""
    sorter, mark = ready_sorter(), stamp()
    settle(sorter, "a.png", mark, 100)
    settle(sorter, "b.png", mark, 100)
    sorter.receive(embedded("a.png", mark), 111)
    sorter.receive(StopRequested(), 112)
    assert not sorter.is_stopped
    assert sorter.receive(embedded("b.png", mark), 113) == []
    sorter.receive(Moved("a.png", mark, "Dataset/cross/a.png", Outcome.FILED, mark), 114)
    assert sorter.is_stopped
    assert sorter.next_deadline() is None


def test_sorter_file_that_is_never_closed_does_not_delay_a_drain() -> None:
    """``once`` waits for no writer that may keep a file open for days."""
    sorter, mark = ready_sorter(), stamp()
    sorter.receive(ImageSeen("open.png", mark), 100)
    assert not sorter.is_drained
    sorter.receive(Tick(), 110)
    sorter.receive(ImageSeen("open.png", mark, Writer.PRESENT), 110)
    assert sorter.is_drained
    sorter.receive(ImageSeen("open.png", stamp(2), closed=True), 111)
    assert not sorter.is_drained


def test_sorter_images_due_at_once_are_inspected_some_at_a_time() -> None:
    """A hundred thousand files that came together do not make one tick last for seconds; the next tick is due."""
    sorter = ready_sorter()
    for number in range(MOST_LOOKS + 5):
        sorter.receive(ImageSeen(f"{number}.png", stamp()), 100)
    assert len(sorter.receive(Tick(), 110)) == MOST_LOOKS
    deadline = sorter.next_deadline()
    assert deadline is not None
    assert deadline <= 110
    assert len(sorter.receive(Tick(), 110)) == 5


def test_sorter_removed_folder_has_its_resting_images_inspected() -> None:
    """What was held there is asked for, and forgotten once nothing stands there."""
    sorter = ready_sorter()
    sorter.receive(ImageHeld("/Images/a/1.png", stamp()), 100)
    sorter.receive(ImageHeld("/Images/b/2.png", stamp()), 100)
    assert sorter.receive(FoldersGone(frozenset({"/Images/a"})), 101) == [Inspect("/Images/a/1.png")]
    sorter.receive(ImageGone("/Images/a/1.png"), 101)
    assert len(sorter.images) == 1
