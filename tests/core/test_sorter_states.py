"""The states of an image and of a dataset in the core: what ends each, whatever else happens meanwhile."""

from collections.abc import Iterable
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sortd.classify.decide import decide_by
from sortd.core.sorter import Sorter, SorterSettings
from sortd.core.state import State
from sortd.events import (
    Command,
    DatasetAbsent,
    DatasetReleased,
    Embed,
    Event,
    ImageGone,
    ImageHeld,
    ImageSeen,
    Inspect,
    LookRefused,
    Move,
    Moved,
    MoveFailed,
    MoveFailure,
    Outcome,
    PrototypesBuilt,
    Rebuild,
    RebuildFailed,
    ReferencesTouched,
    Released,
    ReviewSeen,
    ScanFinished,
    ScanStarted,
    Stamp,
    Tick,
    Writer,
)
from tests.core.test_sorter import embedded, prototypes, ready_sorter, settle, stamp


def rebuild(sorter: Sorter, generation: int, now: float) -> list[Command]:
    """Let the references change and be built anew; return what the core asks for then."""
    sorter.receive(ReferencesTouched(), now)
    (job,) = (one.job for one in sorter.receive(Tick(), now + 10) if isinstance(one, Rebuild))
    return sorter.receive(PrototypesBuilt(prototypes(generation), job=job), now + 10)


def paths(commands: Iterable[Command]) -> list[str]:
    """Return the images that are to be embedded."""
    return [path for command in commands if isinstance(command, Embed) for path, _ in command.images]


# ---------------------------------------------------------------- MOVING


@pytest.mark.parametrize(
    "event",
    [
        ImageGone("Images/a.png"),
        LookRefused("Images/a.png"),
        ImageSeen("Images/a.png", stamp()),
        ImageSeen("Images/a.png", stamp(2)),
        ImageHeld("Images/a.png", stamp(2)),
        Released(),
        ScanFinished(),
    ],
)
def test_sorter_whatever_is_seen_during_a_move_keeps_waiting_for_its_answer(event: Event) -> None:
    """The copier removes the source before it answers: the image is known in Review/ and decided again later."""
    sorter, mark = ready_sorter(), stamp()
    settle(sorter, "Images/a.png", mark, 100)
    sorter.receive(embedded("Images/a.png", mark), 111)
    sorter.receive(event, 112)
    assert sorter.images.counts[State.MOVING] == 1
    sorter.receive(Moved("Images/a.png", mark, "Review/cross/a.png", Outcome.REVIEW, stamp(9)), 113)
    assert (sorter.images.counts[State.MOVING], sorter.images.counts[State.REVIEWED]) == (0, 1)
    assert "Review/cross/a.png" in paths(rebuild(sorter, 2, 200))


def test_sorter_file_that_takes_the_name_during_a_move_is_filed_too() -> None:
    """It is another image: it settles by itself and the end of the first move does not concern it."""
    sorter, first, second = ready_sorter(), stamp(), stamp(2)
    settle(sorter, "a.png", first, 100)
    sorter.receive(embedded("a.png", first), 111)
    sorter.receive(ImageGone("a.png"), 112)
    assert settle(sorter, "a.png", second, 113) == [Embed((("a.png", second),))]
    sorter.receive(Moved("a.png", first, "Dataset/cross/a.png", Outcome.FILED, first), 124)
    (move,) = sorter.receive(embedded("a.png", second), 125)
    assert isinstance(move, Move)
    assert move.stamp == second


@pytest.mark.parametrize("failure", [MoveFailure.DESTINATION, MoveFailure.BUSY, MoveFailure.VANISHED])
def test_sorter_failed_move_of_a_replaced_version_leaves_the_new_one(failure: MoveFailure) -> None:
    """What stands there now is known; the version that was to be moved is gone."""
    sorter = ready_sorter()
    settle(sorter, "a.png", stamp(), 100)
    sorter.receive(embedded("a.png", stamp()), 111)
    sorter.receive(ImageSeen("a.png", stamp(2)), 112)
    assert sorter.receive(MoveFailed("a.png", stamp(), failure, ""), 113) == []
    assert (len(sorter.images), sorter.images.counts[State.SETTLING]) == (1, 1)


def test_sorter_image_held_during_its_move_rests_if_the_move_fails() -> None:
    """A hold is not lost because it comes at a bad time."""
    sorter = ready_sorter()
    settle(sorter, "a.png", stamp(), 100)
    sorter.receive(embedded("a.png", stamp()), 111)
    sorter.receive(ImageHeld("a.png", stamp()), 112)
    sorter.receive(MoveFailed("a.png", stamp(), MoveFailure.BUSY, ""), 113)
    assert sorter.images.counts[State.HELD] == 1


def test_sorter_image_put_into_review_after_a_rebuild_is_decided_again_at_once() -> None:
    """Its move began under the generation before, which nothing would ever reconsider."""
    sorter, mark = ready_sorter(), stamp()
    settle(sorter, "a.png", mark, 100)
    sorter.receive(embedded("a.png", mark), 111)
    rebuild(sorter, 2, 120)
    commands = sorter.receive(Moved("a.png", mark, "Review/cross/a.png", Outcome.REVIEW, mark), 140)
    assert paths(commands) == ["Review/cross/a.png"]


# ---------------------------------------------------------------- EMBEDDED, and folders that refuse


def refused(count: int, failure: MoveFailure = MoveFailure.DESTINATION) -> Sorter:
    """Return a core with so many images of one class, of which the first could not be moved at second 200."""
    sorter = Sorter(SorterSettings(settle_seconds=10, batch_size=count), decide=decide_by)
    sorter.receive(Tick(), 0)
    sorter.receive(PrototypesBuilt(prototypes(), job=1), 0)
    for number in range(count):
        settle(sorter, f"Images/{number}.png", stamp(), 100)
    sorter.receive(embedded("Images/0.png", stamp()), 200)
    sorter.receive(MoveFailed("Images/0.png", stamp(), failure, ""), 200)
    for number in range(1, count):
        assert sorter.receive(embedded(f"Images/{number}.png", stamp()), 200) == []
    assert sorter.images.counts[State.EMBEDDED] == count
    return sorter


@pytest.mark.parametrize("failure", [MoveFailure.DESTINATION, MoveFailure.SOURCE])
def test_sorter_the_end_of_a_pause_wakes_one_image_and_its_success_the_rest(failure: MoveFailure) -> None:
    """Forty images that wait for one folder are not embedded again at each try."""
    sorter, now = refused(40, failure), 200.0
    for _ in range(5):
        now = sorter.next_deadline() or 0
        (path,) = paths(sorter.receive(Tick(), now))
        (move,) = sorter.receive(embedded(path, stamp()), now)
        assert isinstance(move, Move)
        assert sorter.receive(MoveFailed(path, stamp(), failure, ""), now) == []
    now = sorter.next_deadline() or 0
    (path,) = paths(sorter.receive(Tick(), now))
    sorter.receive(embedded(path, stamp()), now)
    rest = paths(sorter.receive(Moved(path, stamp(), "there", Outcome.FILED, stamp()), now))
    assert len(rest) == 39


@pytest.mark.parametrize(
    "event", [ImageGone("Images/0.png"), ImageSeen("Images/0.png", stamp(2)), ImageHeld("Images/0.png", stamp())]
)
def test_sorter_image_that_cannot_try_its_folder_lets_the_next_one_try(event: Event) -> None:
    """It was taken away, rewritten or held while it was on its way: the others wait for no image that is gone."""
    sorter = refused(3)
    assert paths(sorter.receive(Tick(), 201)) == ["Images/0.png"]
    assert paths(sorter.receive(event, 202)) == ["Images/1.png"]


def test_sorter_images_that_were_woken_and_whose_folder_refuses_again_are_not_embedded() -> None:
    """A full disk that has room for a small one now and then does not send all through the encoder each time."""
    sorter = refused(50)
    (path,) = paths(sorter.receive(Tick(), 201))
    sorter.receive(embedded(path, stamp()), 201)
    woken = paths(sorter.receive(Moved(path, stamp(), "there", Outcome.FILED, stamp()), 201))
    assert len(woken) == 49
    sorter.receive(embedded(woken[0], stamp()), 202)
    sorter.receive(embedded(woken[1], stamp()), 202)
    sorter.receive(MoveFailed(woken[0], stamp(), MoveFailure.DESTINATION, ""), 202)
    sorter.receive(Moved(woken[1], stamp(), "there", Outcome.FILED, stamp()), 202)
    for other in woken[2:]:
        assert sorter.receive(embedded(other, stamp()), 202) == []
    assert sorter.images.counts[State.EMBEDDED] == 48


def test_sorter_another_generation_decides_all_that_wait_for_a_folder_again() -> None:
    """They may belong elsewhere by now."""
    assert len(paths(rebuild(refused(20), 2, 300))) >= 20


def test_sorter_the_same_generation_leaves_what_waits_for_a_folder_waiting() -> None:
    """A rebuild that changes nothing is no reason to ask the folder before its time."""
    sorter = refused(20)
    sorter.receive(ReferencesTouched(), 200)
    woken = paths(sorter.receive(Tick(), 210))
    assert len(woken) == 0
    assert len(paths(sorter.receive(PrototypesBuilt(prototypes(), job=2), 210))) == 1


def test_sorter_failing_source_folder_delays_no_other_source() -> None:
    """The pause lies on the folder of the image, not on its class, and success elsewhere does not end it."""
    sorter, mark, now, pauses = ready_sorter(), stamp(), 200.0, []
    settle(sorter, "Images/old/a.png", mark, 100)
    for number in range(4):
        settle(sorter, f"Images/new/{number}.png", mark, 110 + number)
    for number in range(4):
        sorter.receive(embedded("Images/old/a.png", mark), now)
        sorter.receive(MoveFailed("Images/old/a.png", mark, MoveFailure.SOURCE, ""), now)
        pauses.append((sorter.next_deadline() or 0) - now)
        (move,) = sorter.receive(embedded(f"Images/new/{number}.png", mark), now)
        assert isinstance(move, Move)
        sorter.receive(Moved(move.path, mark, "Dataset/cross/x.png", Outcome.FILED, mark), now)
        now = sorter.next_deadline() or 0
        assert paths(sorter.receive(Tick(), now)) == ["Images/old/a.png"]
    assert pauses == [1, 2, 4, 8]


# ---------------------------------------------------------------- the dataset: rebuilds and absence


def test_sorter_absence_found_during_a_rebuild_does_not_end_it() -> None:
    """Nothing moves until a rebuild that began later ends well: what runs was begun by other files."""
    sorter, mark = ready_sorter(), stamp()
    sorter.receive(ReferencesTouched(), 100)
    assert sorter.receive(Tick(), 110) == [Rebuild(2)]
    settle(sorter, "a.png", mark, 111)
    sorter.receive(DatasetAbsent("the root is gone"), 122)
    assert sorter.receive(Tick(), 122) == []
    assert sorter.receive(embedded("a.png", mark), 123) == []
    sorter.receive(PrototypesBuilt(prototypes(2), job=2), 124)
    assert sorter.references_absent
    assert sorter.receive(Tick(), 124) == [Rebuild(3)]
    sorter.receive(PrototypesBuilt(prototypes(2), job=3), 125)
    assert not sorter.references_absent
    assert sorter.may_move


@pytest.mark.parametrize(
    "answer",
    [
        PrototypesBuilt(prototypes(7), job=1),
        PrototypesBuilt(prototypes(7), job=3),
        RebuildFailed("no", job=1),
        RebuildFailed("gone", references_absent=True, job=3),
    ],
)
def test_sorter_answer_about_another_rebuild_ends_none(answer: Event) -> None:
    """Only the answer with the number of the one that runs does; images stay where they are meanwhile."""
    sorter, mark = ready_sorter(), stamp()
    sorter.receive(ReferencesTouched(), 100)
    assert sorter.receive(Tick(), 110) == [Rebuild(2)]
    sorter.receive(answer, 111)
    settle(sorter, "a.png", mark, 112)
    assert sorter.receive(embedded("a.png", mark), 123) == []
    assert sorter.rebuilds.is_pending
    assert sorter.built is not None
    assert sorter.built.prototypes.generation == 1
    sorter.receive(PrototypesBuilt(prototypes(2), job=2), 124)
    assert not sorter.rebuilds.is_pending


def test_sorter_late_answer_without_a_rebuild_changes_nothing() -> None:
    """None runs, so that there is none to end, and no other prototypes to take."""
    sorter = ready_sorter()
    sorter.receive(PrototypesBuilt(prototypes(7), job=1), 10)
    assert sorter.built is not None
    assert sorter.built.prototypes.generation == 1


# ---------------------------------------------------------------- Review/


def test_sorter_images_taken_out_of_review_make_room_for_others() -> None:
    """A look through Review/ asks after those that it does not find; nothing is dropped without being told."""
    sorter = ready_sorter(backlog_limit=2)
    for name in "abc":
        sorter.receive(ReviewSeen(f"Review/{name}.png", stamp(), 1), 100)
    assert (sorter.images.counts[State.REVIEWED], sorter.images.is_review_full) == (2, True)
    sorter.receive(ScanStarted(in_review=True), 200)
    for name in "bc":
        sorter.receive(ReviewSeen(f"Review/{name}.png", stamp(), 1), 200)
    assert sorter.images.is_review_full
    assert sorter.receive(ScanFinished(in_review=True), 200) == [Inspect("Review/a.png")]
    sorter.receive(ImageGone("Review/a.png"), 200)
    assert "Review/a.png" not in sorter.images
    sorter.receive(ScanStarted(in_review=True), 300)
    for name in "bc":
        sorter.receive(ReviewSeen(f"Review/{name}.png", stamp(), 1), 300)
    assert not sorter.images.is_review_full
    assert sorter.receive(ScanFinished(in_review=True), 300) == []


def test_sorter_scan_of_images_inspects_no_image_of_review() -> None:
    """It does not name them, and they are no fewer for that."""
    sorter = ready_sorter()
    sorter.receive(ReviewSeen("Review/a.png", stamp(), 1), 100)
    sorter.receive(ScanStarted(), 200)
    assert sorter.receive(ScanFinished(), 200) == []


def test_sorter_image_held_in_review_since_an_earlier_run_stays_there_when_it_is_released() -> None:
    """A hold says nothing of the folder; the scan of Review/ does, and what is undecided again is not moved."""
    sorter = ready_sorter()
    sorter.receive(ImageHeld("Review/a/x.png", stamp()), 100)
    sorter.receive(ReviewSeen("Review/a/x.png", stamp(), 0), 100)
    assert sorter.images.counts[State.HELD] == 1
    sorter.receive(Released("Review/a/x.png"), 101)
    image = sorter.images.get("Review/a/x.png")
    assert image is not None
    assert image.in_review


# ---------------------------------------------------------------- whatever happens in whatever order


@dataclass(frozen=True)
class Asked:
    """A move that the core asked for and that was not answered yet."""

    path: str
    stamp: Stamp
    folder: str


NAMES = st.sampled_from([f"{folder}/{name}.png" for folder in ("Images/x", "Images/y") for name in "ab"])


class SorterMachine(RuleBasedStateMachine):
    """A disk, a worker and a mover that answer early, late or never, and a person who holds and releases."""

    def __init__(self) -> None:
        """Begin with prototypes."""
        super().__init__()
        self.sorter = Sorter(SorterSettings(settle_seconds=0, batch_size=2, guard_images=0), decide=decide_by)
        self.now, self.version, self.generation = 0.0, 0, 1
        self.disk: dict[str, Stamp] = {}
        self.encoding: list[tuple[str, Stamp]] = []
        self.moving: list[Asked] = []
        self.jobs: list[int] = []
        self.last_job = 0
        self.tell(Tick())
        self.a_rebuild_ends_well()

    def tell(self, event: Event) -> None:
        """Hand an event over, and note what is asked for."""
        may_move = self.may_move
        for command in self.sorter.receive(event, self.now):
            match command:
                case Inspect(path):
                    mark = self.disk.get(path)
                    self.tell(ImageGone(path) if mark is None else ImageSeen(path, mark, Writer.ABSENT))
                case Embed(images):
                    self.encoding += images
                case Rebuild(job):
                    assert job > self.last_job
                    self.last_job = job
                    self.jobs = [job]
                case Move(path, mark, folder):
                    assert may_move, "it moves while the dataset is being rebuilt or is absent"
                    self.moving.append(Asked(path, mark, folder))

    @property
    def may_move(self) -> bool:
        """Tell whether anything may move, by what the core was told."""
        return not (self.jobs or self.sorter.rebuilds.is_pending or self.sorter.references_absent)

    @rule(path=NAMES)
    def a_file_is_written(self, path: str) -> None:
        """Another version stands there."""
        self.version += 1
        self.disk[path] = stamp(self.version)
        self.tell(ImageSeen(path, self.disk[path], Writer.ABSENT))

    @rule(path=NAMES)
    def a_known_file_is_looked_at(self, path: str) -> None:
        """The version that stands there, which may be the one that is being moved."""
        if path in self.disk:
            self.tell(ImageSeen(path, self.disk[path], Writer.ABSENT))

    @rule(path=NAMES, axis=st.sampled_from([0, 1]))
    def a_file_is_written_and_embedded_at_once(self, path: str, axis: int) -> None:
        """It moves, if anything may."""
        self.a_file_is_written(path)
        asked = [one for one in self.encoding if one[0] == path]
        self.encoding = [one for one in self.encoding if one[0] != path]
        for _, mark in asked:
            self.tell(embedded(path, mark, axis))

    @rule(path=NAMES)
    def a_file_is_gone(self, path: str) -> None:
        """Somebody took it, or it was moved just now."""
        self.disk.pop(path, None)
        self.tell(ImageGone(path))

    @rule(path=NAMES)
    def a_file_is_held(self, path: str) -> None:
        """It was undone."""
        if path in self.disk:
            self.tell(ImageHeld(path, self.disk[path]))

    @rule(path=st.none() | NAMES)
    def a_file_is_released(self, path: str | None) -> None:
        """One or all."""
        self.tell(Released(path))
        self.tell(DatasetReleased())

    @rule(seconds=st.sampled_from([0.5, 1.0, 5.0, 90.0]))
    def time_passes(self, seconds: float) -> None:
        """Whatever is due is looked at."""
        self.now += seconds
        self.tell(Tick())

    @precondition(lambda self: self.encoding)
    @rule(data=st.data(), axis=st.sampled_from([0, 1]))
    def an_embedding_comes(self, data: st.DataObject, axis: int) -> None:
        """In any order."""
        path, mark = self.encoding.pop(data.draw(st.integers(0, len(self.encoding) - 1)))
        self.tell(embedded(path, mark, axis))

    @precondition(lambda self: self.moving)
    @rule(data=st.data(), outcome=st.sampled_from([*MoveFailure, Outcome.FILED, Outcome.REVIEW]))
    def a_move_ends(self, data: st.DataObject, outcome: MoveFailure | Outcome) -> None:
        """Well or not."""
        asked = self.moving.pop(data.draw(st.integers(0, len(self.moving) - 1)))
        if isinstance(outcome, MoveFailure):
            self.tell(MoveFailed(asked.path, asked.stamp, outcome, ""))
        else:
            if self.disk.get(asked.path) == asked.stamp:
                del self.disk[asked.path]
            self.version += 1
            there = f"Review/{self.version}.png"
            self.disk[there] = stamp(self.version)
            self.tell(Moved(asked.path, asked.stamp, there, outcome, stamp(self.version)))

    @rule(is_absent=st.sampled_from([False, False, False, True]))
    def references_are_touched(self, is_absent: bool) -> None:  # noqa: FBT001 -- drawn by hypothesis
        """A rebuild will be due; or the disk of the dataset was taken out."""
        self.tell(DatasetAbsent("gone") if is_absent else ReferencesTouched())
        assert self.sorter.references_absent or not is_absent

    @precondition(lambda self: self.jobs)
    @rule()
    def a_rebuild_ends_well(self) -> None:
        """The one that runs; the next one is begun if there is one to begin."""
        self.generation += 1
        job = self.jobs.pop()
        self.tell(PrototypesBuilt(prototypes(self.generation), job=job))

    @precondition(lambda self: self.jobs)
    @rule(is_absent=st.sampled_from([False, False, True]))
    def a_rebuild_fails(self, is_absent: bool) -> None:  # noqa: FBT001 -- drawn by hypothesis
        """The one that runs."""
        job = self.jobs.pop()
        self.tell(RebuildFailed("no", references_absent=is_absent, job=job))

    @precondition(lambda self: self.sorter.rebuilds.is_pending or self.sorter.references_absent)
    @rule()
    def all_is_well_again(self) -> None:
        """Time passes and rebuilds end well, until none is due."""
        for _ in range(3):
            self.time_passes(90.0)
            while self.jobs:
                self.a_rebuild_ends_well()
        assert self.may_move

    @rule(job=st.integers(0, 3))
    def an_answer_about_another_rebuild_comes(self, job: int) -> None:
        """It ends none."""
        before = self.sorter.built
        if job not in self.jobs:
            self.tell(PrototypesBuilt(prototypes(99), job=job))
            assert self.sorter.built is before

    @invariant()
    def no_image_leaves_moving_without_an_answer(self) -> None:
        """What moves is what was asked for and not answered."""
        moving = sorted((entry.path, entry.stamp.size) for entry in self.sorter.images.in_state(State.MOVING))
        assert moving == sorted((one.path, one.stamp.size) for one in self.moving)

    @invariant()
    def no_image_is_in_two_states(self) -> None:
        """Each known version is counted once."""
        assert sum(self.sorter.images.counts.values()) == len(self.sorter.images)
        entries = [entry for state in State for entry in self.sorter.images.in_state(state)]
        assert len({(entry.path, entry.stamp) for entry in entries}) == len(entries)

    @invariant()
    def a_job_that_runs_is_awaited(self) -> None:
        """Nothing but its own answer ends a rebuild."""
        assert not self.jobs or self.sorter.rebuilds.is_pending

    @invariant()
    def nothing_waits_for_ever(self) -> None:
        """An image that was decided and may not move has a deadline, an image on its way, or a rebuild to wait for."""
        if self.sorter.images.counts[State.EMBEDDED] and self.may_move:
            on_the_way = self.encoding or self.moving or self.sorter.images.counts[State.READY]
            assert on_the_way or self.sorter.next_deadline() is not None


SorterMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestSorter = SorterMachine.TestCase
