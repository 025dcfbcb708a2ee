"""The backlog's state machine: whatever happens in whatever order, its rule holds."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sortd.core.refusals import Refusals
from sortd.core.state import LEASELESS_QUIET_SECONDS, RESTING, SETBACK_SECONDS, STALE_TICKETS, Images, State
from sortd.events import ImageSeen, Refusal, Stamp, Writer

SETTLE = 2.0
PATHS = st.sampled_from([f"Images/{name}.png" for name in "abcdef"])
LIMIT = 4


def stamp(version: int) -> Stamp:
    """Return the stamp of a file's version."""
    return Stamp(1, version, version, version)


class BacklogMachine(RuleBasedStateMachine):
    """A disk with files that come, change and go, and a worker and a mover that answer early, late or wrongly."""

    def __init__(self) -> None:
        """Begin with an empty disk."""
        super().__init__()
        self.now = 0.0
        self.images = Images(settle_seconds=SETTLE, limit=LIMIT)
        self.disk: dict[str, tuple[int, float]] = {}
        self.version = 0
        self.asked: list[tuple[str, Stamp]] = []
        self.moving: list[tuple[str, Stamp]] = []

    def _write(self, path: str) -> None:
        self.version += 1
        self.disk[path] = (self.version, self.now)

    @rule(path=PATHS, closed=st.booleans())
    def a_file_is_written(self, path: str, closed: bool) -> None:  # noqa: FBT001 -- drawn by hypothesis
        """A hint follows the write."""
        self._write(path)
        self.images.see(ImageSeen(path, stamp(self.version), closed=closed), self.now)

    @rule(path=PATHS)
    def a_file_is_written_without_a_hint(self, path: str) -> None:
        """The queue overflowed."""
        self._write(path)

    @rule()
    def a_scan_finds_all(self) -> None:
        """The truth."""
        self.images.start_scan()
        for path, (version, _) in self.disk.items():
            self.images.see(ImageSeen(path, stamp(version)), self.now)

    @rule(path=PATHS)
    def a_file_is_deleted(self, path: str) -> None:
        """Nobody says so."""
        self.disk.pop(path, None)

    @rule(seconds=st.sampled_from([0.5, 1.0, 2.0, 5.0, 40.0]), writer=st.sampled_from(list(Writer)))
    def time_passes(self, seconds: float, writer: Writer) -> None:
        """Every image that is due gets one look; a ready one has held still for its time, without a writer."""
        self.now += seconds
        for path in list(self.images.due(self.now)):
            on_disk = self.disk.get(path)
            if on_disk is None:
                self.images.forget(path)
                continue
            version, written_at = on_disk
            self.images.see(ImageSeen(path, stamp(version), writer=writer), self.now)
            entry = self.images.get(path)
            if entry is None:
                assert (path, stamp(version)) in self.moving
                continue
            if entry.state is State.READY:
                quiet = LEASELESS_QUIET_SECONDS if writer is Writer.UNKNOWN and not entry.closed else SETTLE
                assert self.now - written_at >= quiet
                assert writer not in {Writer.PRESENT, Writer.UNFINISHED}

    @rule(size=st.integers(1, 5))
    def a_batch_is_taken(self, size: int) -> None:
        """What is taken is being encoded, once each."""
        batch = self.images.take_batch(size)
        assert len({entry.path for entry in batch}) == len(batch) <= size
        for entry in batch:
            assert entry.state is State.ENCODING
            self.asked.append((entry.path, entry.stamp))

    @precondition(lambda self: self.asked)
    @rule(data=st.data(), what=st.sampled_from(["embedded", "waits", "moving", "refused", "changed"]))
    def an_answer_comes(self, data: st.DataObject, what: str) -> None:
        """An answer is taken only for the very version that is being encoded."""
        path, mark = self.asked.pop(data.draw(st.integers(0, len(self.asked) - 1)))
        entry = self.images.answered(path, mark)
        if entry is None:
            return
        assert (entry.stamp, entry.state) == (mark, State.ENCODING)
        match what:
            case "embedded":
                self.images.embedded(entry)
            case "waits":
                self.images.embedded(entry, "Dataset/a")
            case "moving":
                self.images.moving(entry, "Dataset/a")
                self.moving.append((path, mark))
            case "refused":
                self.images.refuse(entry, Refusal.UNREADABLE, "broken")
            case "changed":
                self.images.settle_again(entry, self.now)

    @precondition(lambda self: self.moving)
    @rule(data=st.data(), worked=st.booleans())
    def a_move_ends(self, data: st.DataObject, worked: bool) -> None:  # noqa: FBT001 -- drawn by hypothesis
        """A move that was awaited ends in gone or in EMBEDDED, one that was not changes nothing."""
        path, mark = self.moving.pop(data.draw(st.integers(0, len(self.moving) - 1)))
        before = self.images.get(path)
        ended = self.images.moved(path, mark) if worked else self.images.move_failed(path, mark)
        assert ended is not None
        assert ended.stamp == mark
        if worked and self.disk.get(path, (0, 0.0))[0] == mark.size:
            self.disk.pop(path)
        if worked or before is not None:
            assert before is self.images.get(path)

    @rule(path=PATHS)
    def a_move_that_nobody_awaits_ends(self, path: str) -> None:
        """Nothing changes."""
        assert self.images.moved(path, stamp(-1)) is None
        assert self.images.move_failed(path, stamp(-1)) is None

    @rule(path=PATHS)
    def a_file_is_said_to_be_gone(self, path: str) -> None:
        """It may be on its way to another file system, and its source removed."""
        self.images.forget(path)

    @rule()
    def moving_is_allowed_again(self) -> None:
        """Only what waits for a folder stays EMBEDDED then."""
        self.images.resume()
        assert all(entry.place for entry in self.images.in_state(State.EMBEDDED))

    @rule()
    def a_folder_is_tried(self) -> None:
        """At most one image at a time is on its way there."""
        before = self.images.counts[State.EMBEDDED]
        self.images.try_place("Dataset/a")
        self.images.try_place("Dataset/a")
        assert before - self.images.counts[State.EMBEDDED] in {0, 1}

    @rule()
    def a_folder_lets_all_in(self) -> None:
        """Nothing waits for it any more."""
        self.images.wake("Dataset/a")
        assert "Dataset/a" not in self.images.places

    @rule(generation=st.integers(1, 3))
    def another_generation_decides(self, generation: int) -> None:
        """Nothing stays EMBEDDED."""
        self.images.reconsider(generation)
        assert self.images.counts[State.EMBEDDED] == 0

    @rule(path=PATHS)
    def a_file_is_held(self, path: str) -> None:
        """It was undone."""
        if path in self.disk:
            self.images.hold(path, stamp(self.disk[path][0]), self.now)

    @rule(path=st.none() | PATHS)
    def a_file_is_released(self, path: str | None) -> None:
        """The operator lets go."""
        self.images.release(path, self.now)

    @invariant()
    def counts_agree(self) -> None:
        """The counts are those of the entries, and the waiting ones are bounded."""
        entries = [self.images.get(path) for path in [f"Images/{name}.png" for name in "abcdef"]]
        moving = self.images.in_state(State.MOVING)
        known = [entry for entry in entries if entry is not None] + moving
        assert sorted((entry.path, entry.stamp.size) for entry in moving) == sorted((p, s.size) for p, s in self.moving)
        for state in State:
            assert self.images.counts[state] == sum(entry.state is state for entry in known)
        assert len(self.images) == len(known)
        assert self.images.waiting == sum(entry.state not in RESTING for entry in known)
        settling = self.images.in_state(State.SETTLING)
        assert self.images.busy == sum(entry.busy for entry in settling)

    @invariant()
    def every_settling_image_has_a_deadline(self) -> None:
        """Nothing is forgotten: a settling image is looked at again within the longest pause."""
        deadline = self.images.next_deadline
        if self.images.counts[State.SETTLING]:
            assert deadline is not None
            assert deadline <= self.now + SETBACK_SECONDS[1]


BacklogMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestBacklog = BacklogMachine.TestCase


def test_backlog_file_written_for_months_does_not_grow_the_queue() -> None:
    """Images that wait keep their places, and places of versions that are gone are dropped in time."""
    images = Images(settle_seconds=0.0, limit=LIMIT)
    images.see(ImageSeen("waits.png", stamp(0), writer=Writer.ABSENT, closed=True), 0.0)
    for version in range(1, 10 * STALE_TICKETS):
        images.see(ImageSeen("changes.png", stamp(version), writer=Writer.ABSENT, closed=True), float(version))
        assert images.counts[State.READY] == 2
    assert len(images._ready) < 3 * STALE_TICKETS
    assert [entry.path for entry in images.take_batch(4)] == ["changes.png", "waits.png"]


def refused(images: Images, path: str, mark: Stamp, now: float, refusal: Refusal = Refusal.NOT_AN_IMAGE) -> bool:
    """Bring a file to its refusal; tell whether that is news."""
    images.see(ImageSeen(path, mark, writer=Writer.ABSENT, closed=True), now)
    (entry,) = images.take_batch(1)
    return images.refuse(entry, refusal, "no image")


def test_backlog_refusals_beyond_its_limit_take_few_bytes() -> None:
    """No entry is kept for it, no scan looks into it again, a new version of it is one; it is told once."""
    images = Images(settle_seconds=0.0, limit=LIMIT)
    for number in range(3 * LIMIT):
        assert refused(images, f"{number}.txt", stamp(1), 0.0)
    assert (len(images), images.counts[State.REFUSED], images.waiting) == (LIMIT, LIMIT, 0)
    images.start_scan()
    for number in range(3 * LIMIT):
        images.see(ImageSeen(f"{number}.txt", stamp(1)), 1.0)
    assert (len(images), images.waiting) == (LIMIT, 0)
    assert images.unseen_by_scan() == []
    assert refused(images, f"{2 * LIMIT}.txt", stamp(2), 2.0)


def test_backlog_unreadable_files_beyond_its_limit_are_tried_again() -> None:
    """Its stamp would not show that it may be read now; it is told once all the same."""
    images = Images(settle_seconds=0.0, limit=1)
    assert refused(images, "a.txt", stamp(1), 0.0)
    assert [refused(images, "b.png", stamp(1), now, Refusal.DENIED) for now in (0.0, 1.0, 2.0)] == [True, False, False]


def test_refusals_beyond_their_limit_are_dropped() -> None:
    """Beyond the most of them all are forgotten: those files are looked into once more."""
    refusals = Refusals(most=2)
    assert [refusals.note(name, stamp(1)) for name in "aab"] == [True, False, True]
    assert refusals.note("c", stamp(1))
    assert len(refusals._known) == 1
    assert [refusals.has(name, stamp(1)) for name in "abc"] == [False, False, True]


def test_backlog_newest_by_arrival_is_taken_first_whenever_it_was_looked_at() -> None:
    """An image that came after four thousand others passes them, though it was looked at before most of them."""
    images = Images(settle_seconds=SETTLE, limit=10_000)
    images.see(ImageSeen("newest", stamp(1), since=99.0), 100.0)
    for number in range(100):
        images.see(ImageSeen(f"older {number}", stamp(1), since=90.0), 101.0)
    for path in list(images.due(200.0)):
        images.see(ImageSeen(path, stamp(1), writer=Writer.ABSENT), 200.0)
    assert [entry.path for entry in images.take_batch(1)] == ["newest"]


def test_backlog_file_that_is_looked_at_soon_is_told_and_no_other() -> None:
    """Not one that nobody knows, that waits long after setbacks, or that has settled."""
    images = Images(settle_seconds=SETTLE, limit=10)
    assert not images.is_due_soon("a", 0.0)
    images.see(ImageSeen("a", stamp(1)), 0.0)
    assert images.is_due_soon("a", 0.0)
    (path,) = images.due(SETTLE)
    assert not images.is_due_soon("a", SETTLE)
    images.see(ImageSeen(path, stamp(1), writer=Writer.ABSENT), SETTLE)
    assert not images.is_due_soon("a", SETTLE)
    (entry,) = images.take_batch(1)
    for _ in range(8):
        images.settle_again(entry, SETTLE)
    assert not images.is_due_soon("a", SETTLE)


def test_backlog_resting_images_below_folders_are_listed() -> None:
    """At any depth of one of the folders; not beside them, and not those that are work."""
    images = Images(settle_seconds=SETTLE, limit=10)
    for path in ("/Images/a/b/1.png", "/Images/a/2.png", "/Images/ab/3.png"):
        images.hold(path, stamp(1), 0.0)
    images.see(ImageSeen("/Images/a/4.png", stamp(1)), 0.0)
    assert sorted(images.resting_below(frozenset({"/Images/a", "/Images/c"}))) == [
        "/Images/a/2.png",
        "/Images/a/b/1.png",
    ]


def test_see_of_a_held_file_with_new_rights_or_links_keeps_it_held() -> None:
    """A hold of the journal does not know when its file last changed, and a backup may add a link to it."""
    images = Images(settle_seconds=SETTLE, limit=LIMIT)
    images.hold("Images/a.png", Stamp(1, 2, 3, 4), 0.0)
    for ctime_ns in (10, 11):
        images.see(ImageSeen("Images/a.png", Stamp(1, 2, 3, 4, ctime_ns), closed=True), 1.0)
        assert images.counts[State.HELD] == 1
    images.see(ImageSeen("Images/a.png", Stamp(7, 2, 3, 4, 12), closed=True), 2.0)
    assert images.counts[State.HELD] == 1  # its disk was mounted again, under another number
    images.see(ImageSeen("Images/a.png", Stamp(1, 2, 3, 5, 12), closed=True), 3.0)
    assert images.counts[State.HELD] == 0


def test_see_of_a_file_that_was_rewritten_settles_again() -> None:
    """Its time of change alone tells."""
    images = Images(settle_seconds=SETTLE, limit=LIMIT)
    for now, ctime_ns in ((0.0, 10), (10.0, 11)):
        images.see(ImageSeen("Images/a.png", Stamp(1, 2, 3, 4, ctime_ns)), now)
    assert images.get("Images/a.png").still_since == 10.0  # type: ignore[union-attr]  # it was seen just now


def test_backlog_unfinished_file_settles_anew_when_it_is_finished() -> None:
    """As long as a file beside it says so it waits, and is no work; then it must hold still for its time again."""
    images = Images(settle_seconds=SETTLE, limit=LIMIT)
    images.see(ImageSeen("a.png", stamp(1), closed=True), 0.0)
    now = 100.0
    assert list(images.due(now)) == ["a.png"]
    images.see(ImageSeen("a.png", stamp(1), writer=Writer.UNFINISHED), now)
    assert (images.counts[State.SETTLING], images.busy, images.waiting) == (1, 1, 1)
    deadline = images.next_deadline
    assert deadline is not None
    assert now < deadline <= now + 30.0
    assert list(images.due(deadline)) == ["a.png"]
    images.see(ImageSeen("a.png", stamp(1), writer=Writer.ABSENT), deadline)
    assert (images.counts[State.SETTLING], images.busy) == (1, 0)
    assert images.next_deadline == deadline + SETTLE
    images.see(ImageSeen("a.png", stamp(1), writer=Writer.ABSENT), deadline + SETTLE)
    assert images.counts[State.READY] == 1


def test_see_of_a_file_that_was_still_before_it_was_seen_is_ready_at_once() -> None:
    """A lease and old times: nothing is left to wait for."""
    images = Images(settle_seconds=SETTLE, limit=LIMIT)
    images.see(ImageSeen("Images/a.png", stamp(1), Writer.ABSENT, still_seconds=SETTLE), 10.0)
    assert (images.counts[State.READY], images.next_deadline) == (1, None)


def test_see_of_a_still_file_without_an_inspection_is_inspected_when_it_has_settled() -> None:
    """What it waited before it was seen counts."""
    images = Images(settle_seconds=SETTLE, limit=LIMIT)
    images.see(ImageSeen("Images/a.png", stamp(1), still_seconds=SETTLE - 0.5), 10.0)
    images.see(ImageSeen("Images/b.png", stamp(2), still_seconds=SETTLE + 9), 10.0)
    assert list(images.due(10.0)) == ["Images/b.png"]
    assert list(images.due(10.5)) == ["Images/a.png"]


def test_see_of_a_still_file_without_a_lease_waits_from_when_it_was_seen() -> None:
    """Old times prove nothing while a writer may have it open, or while a control file marks it as unfinished."""
    for writer in (Writer.PRESENT, Writer.UNKNOWN, Writer.UNFINISHED):
        images = Images(settle_seconds=SETTLE, limit=LIMIT)
        images.see(ImageSeen("Images/a.png", stamp(1), writer, still_seconds=1000.0), 10.0)
        assert images.counts[State.READY] == 0
        assert images.next_deadline is not None
        assert images.next_deadline >= 10.0 + SETTLE


def test_see_of_a_still_file_that_changes_after_it_was_seen_waits_in_full() -> None:
    """The times of a version that was seen to appear prove nothing."""
    images = Images(settle_seconds=SETTLE, limit=LIMIT)
    images.see(ImageSeen("Images/a.png", stamp(1), still_seconds=1.0), 10.0)
    images.see(ImageSeen("Images/a.png", stamp(2), Writer.ABSENT, still_seconds=1000.0), 10.5)
    assert list(images.due(12.4)) == []
    assert list(images.due(12.5)) == ["Images/a.png"]
