"""Patrols: what the user did with handled images is noticed, a slice at a time, whatever stands in the way."""

import errno
import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import pytest

from sortd.journal import Journal
from sortd.layout import Area, Layout
from sortd.messages import Outcome
from sortd.running.corrections import SCANNED_FACT, Correction
from sortd.running.filing import Filing
from sortd.running.patrol import SLICE, Mended, Noticed, Patrol
from tests.filing_world import Dataset, moved, order


@pytest.fixture
def dataset() -> Iterator[Dataset]:
    """An empty dataset, in a folder that any user may enter: pytest's own are for one alone."""
    with tempfile.TemporaryDirectory(prefix="sortd-patrol-") as folder:
        Path(folder).chmod(0o755)
        yield Dataset.below(Path(folder))


def refuse(error: OSError) -> None:
    """Fail where everything can be looked at."""
    raise error


@pytest.fixture
def journal(dataset: Dataset) -> Iterator[Journal]:
    """Its journal."""
    with dataset.journal() as journal:
        yield journal


@pytest.fixture
def filing(dataset: Dataset, journal: Journal) -> Filing:
    """What moves its files."""
    return Filing(dataset.root, journal)


def correct(dataset: Dataset, filing: Filing, name: str, label: str = "dog") -> Path:
    """Let sortd file an image as a cat, and move it to another class as the user does."""
    filed = Path(moved(filing, order(dataset.put(f"Images/{name}", name))))
    target = dataset.root / "Dataset" / label / name
    target.parent.mkdir(exist_ok=True)
    return filed.rename(target)


class Clock:
    """A clock that stands still until it is set: a slice ends by its files alone."""

    def __init__(self) -> None:
        """Begin at some time."""
        self.now = 100.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


def look(patrol: Patrol, area: Area, path: Path) -> list[Noticed]:
    """Let a patrol look at one file, whatever pause it is in."""
    patrol.want(area, os.fspath(path))
    clock = patrol._clock
    assert isinstance(clock, Clock)
    clock.now = max(clock.now, patrol.deadline)
    patrol.begin_asked()
    return rest_of(patrol)


def rest_of(patrol: Patrol) -> list[Noticed]:
    """Carry out what is under way."""
    noticed: list[Noticed] = []
    while patrol.is_under_way:
        noticed += patrol.take()
    return noticed


def all_of(patrol: Patrol, now_ns: int) -> list[Noticed]:
    """Carry out a whole patrol."""
    patrol.begin(now_ns)
    return rest_of(patrol)


@contextmanager
def unprivileged() -> Iterator[None]:
    """Be nobody for a while: root may read everything."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become somebody who may not read everything")
    os.seteuid(65_534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_large_folder_is_looked_through_in_slices(dataset: Dataset, journal: Journal, filing: Filing) -> None:
    """No turn looks at more than a slice, between two of them others have theirs, and nothing is left out."""
    corrected = correct(dataset, filing, "a.jpg")
    for number in range(2 * SLICE):
        (corrected.parent / f"{number}.jpg").touch()
    patrol = Patrol(Layout(dataset.root), journal, refuse, clock=Clock())
    patrol.begin(time.time_ns())
    noticed, turns = [], 0
    while patrol.is_under_way:
        noticed += patrol.take()
        turns += 1
        assert (journal.history.fact(SCANNED_FACT) is None) == patrol.is_under_way
    assert turns > 2
    assert [one.path for one in noticed] == [str(corrected)]


def test_patrol_correction_is_noticed_by_what_is_a_class(dataset: Dataset, journal: Journal, filing: Filing) -> None:
    """A move into ``engine.part`` is one; into the waste of a server, or into a hidden folder, is none."""
    corrected = correct(dataset, filing, "a.jpg", "engine.part")
    thrown_away = [correct(dataset, filing, "b.jpg", "#recycle"), correct(dataset, filing, "c.jpg", ".old")]
    patrol = Patrol(Layout(dataset.root), journal, refuse, clock=Clock())
    assert [one.path for one in all_of(patrol, time.time_ns())] == [str(corrected)]
    assert [look(patrol, Area.DATASET, path) for path in thrown_away] == [[], []]


def test_what_is_wanted_while_one_is_under_way_follows_it(dataset: Dataset, journal: Journal, filing: Filing) -> None:
    """A correction in a folder that was passed already is noticed by the one that follows."""
    correct(dataset, filing, "a.jpg")
    patrol = Patrol(Layout(dataset.root), journal, refuse, clock=Clock())
    patrol.begin(time.time_ns())
    patrol.begin(time.time_ns())
    assert len(patrol.take()) == 1
    assert patrol.is_under_way
    later = correct(dataset, filing, "b.jpg")
    assert [one.path for one in patrol.take()] == [str(later)]
    assert not patrol.is_under_way


def test_one_that_was_ended_is_begun_where_it_began(dataset: Dataset, journal: Journal, filing: Filing) -> None:
    """Nothing is noted as looked at by it."""
    correct(dataset, filing, "a.jpg")
    patrol = Patrol(Layout(dataset.root), journal, refuse, clock=Clock())
    patrol.begin(time.time_ns())
    patrol.end()
    assert patrol.take() == []
    assert journal.history.fact(SCANNED_FACT) is None
    assert len(all_of(patrol, time.time_ns())) == 1


def test_only_what_changed_since_is_looked_up(dataset: Dataset, journal: Journal, filing: Filing) -> None:
    """And all of it where the clock was set back since: nothing is known of when it happened."""
    correct(dataset, filing, "a.jpg")
    patrol = Patrol(Layout(dataset.root), journal, refuse, clock=Clock())
    hour = 3_600 * 10**9
    assert len(all_of(patrol, time.time_ns() + 2 * hour)) == 1
    correct(dataset, filing, "b.jpg")
    assert all_of(patrol, time.time_ns() + 3 * hour) == []  # it happened before the last look, as far as can be told
    assert [one.path.rpartition("/")[2] for one in all_of(patrol, time.time_ns())] == ["b.jpg"]


def test_what_cannot_be_looked_at_is_said_and_ends_nothing(dataset: Dataset, journal: Journal, filing: Filing) -> None:
    """A class folder, an image's folder and a place in the journal that sortd may not read: the others are noticed."""
    corrected = correct(dataset, filing, "a.jpg")
    secret = correct(dataset, filing, "b.jpg", "secret")
    elsewhere = correct(dataset, filing, "c.jpg", "secret")
    elsewhere = elsewhere.rename(dataset.root / "Dataset/dog/c.jpg")
    secret.parent.chmod(0)
    told: list[OSError] = []
    patrol = Patrol(Layout(dataset.root), journal, told.append, clock=Clock())
    with unprivileged():
        assert look(patrol, Area.DATASET, secret) == []
        noticed = all_of(patrol, time.time_ns())
    assert {one.path for one in noticed} == {str(corrected), str(elsewhere)}
    assert {error.errno for error in told} == {errno.EACCES}
    assert {error.filename for error in told} == {str(secret), str(secret.parent)}


def test_a_copy_of_what_may_still_stand_is_no_correction(dataset: Dataset, journal: Journal, filing: Filing) -> None:
    """Where the place of the image itself cannot be looked at, nothing is learnt from a second link."""
    filed = Path(moved(filing, order(dataset.put("Images/a.jpg"))))
    (dataset.root / "Dataset/dog").mkdir()
    link = dataset.root / "Dataset/dog/a.jpg"
    os.link(filed, link)
    filed.parent.chmod(0)
    patrol = Patrol(Layout(dataset.root), journal, refuse, clock=Clock())
    with unprivileged():
        assert look(patrol, Area.DATASET, link) == []
    filed.parent.chmod(0o755)
    filed.unlink()
    assert [type(one) for one in look(patrol, Area.DATASET, link)] == [Correction]


def test_mended_images_are_noticed_too(dataset: Dataset, journal: Journal, filing: Filing) -> None:
    """By a look at one, and by the patrol; Review/ is nobody's concern here."""
    path = Path(moved(filing, order(dataset.put("Images/a.jpg"), "Rejected", Outcome.REJECTED)))
    patrol = Patrol(Layout(dataset.root), journal, refuse, clock=Clock())
    assert all_of(patrol, time.time_ns()) == []
    path.write_bytes(b"mended")
    assert [type(one) for one in look(patrol, Area.REJECTED, path)] == [Mended]
    assert look(patrol, Area.REVIEW, path) == []
    assert [type(one) for one in all_of(patrol, time.time_ns())] == [Mended]


def test_patrol_corrections_of_a_slice_are_recorded_in_one_commit(
    dataset: Dataset, journal: Journal, filing: Filing
) -> None:
    """Hundreds of images that are moved to another class at once are no hundreds of synced commits."""
    corrected = [correct(dataset, filing, f"{number}.jpg") for number in range(20)]
    statements: list[str] = []
    patrol = Patrol(Layout(dataset.root), journal, refuse, clock=Clock())
    for path in corrected:
        patrol.want(Area.DATASET, os.fspath(path))
    patrol.begin_asked()
    journal._connection.set_trace_callback(statements.append)
    noticed = rest_of(patrol)
    journal._connection.set_trace_callback(None)
    assert len(noticed) == 20
    assert statements.count("COMMIT") == 1


def test_patrol_events_in_a_storm_ask_for_one_look(dataset: Dataset, journal: Journal, filing: Filing) -> None:
    """Three thousand folders that are made are one look through all; the next one waits for the pause."""
    clock = Clock()
    patrol = Patrol(Layout(dataset.root), journal, refuse, clock=clock)
    correct(dataset, filing, "a.jpg")
    for _ in range(3000):
        patrol.ask()
    patrol.begin_asked()
    assert len(rest_of(patrol)) == 1
    correct(dataset, filing, "b.jpg")
    patrol.ask()
    patrol.begin_asked()
    assert not patrol.is_under_way
    assert patrol.deadline > clock.now
    clock.now = patrol.deadline
    patrol.begin_asked()
    assert len(rest_of(patrol)) == 1


def test_patrol_more_files_than_are_remembered_are_found_by_a_look_at_all(
    dataset: Dataset, journal: Journal, filing: Filing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What hints name is bounded, and nothing of it is lost."""
    monkeypatch.setattr("sortd.running.patrol.MOST_WANTED", 3)
    patrol = Patrol(Layout(dataset.root), journal, refuse, clock=Clock())
    for number in range(5):
        patrol.want(Area.DATASET, os.fspath(correct(dataset, filing, f"{number}.jpg")))
    patrol.begin_asked()
    assert len(rest_of(patrol)) == 5


def test_patrol_a_large_file_is_compared_in_chunks(
    dataset: Dataset, journal: Journal, filing: Filing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that was copied to another class and removed is known by its bytes, which are not read in one slice."""
    monkeypatch.setattr("sortd.running.corrections.CHUNK_BYTES", 1)
    filed = Path(moved(filing, order(dataset.put("Images/a.jpg", "bytes"), content=sha256(b"bytes").hexdigest())))
    copy = dataset.root / "Dataset/dog/a.jpg"
    copy.parent.mkdir()
    copy.write_bytes(filed.read_bytes())
    filed.unlink()
    patrol = Patrol(Layout(dataset.root), journal, refuse, clock=itertools.count().__next__)
    patrol.want(Area.DATASET, os.fspath(copy))
    patrol.begin_asked()
    slices = [patrol.take() for _ in range(5)]
    assert slices == [[]] * 5
    assert [type(one) for one in rest_of(patrol)] == [Correction]


def test_patrol_files_in_a_storm_are_looked_at_together_after_a_pause(
    dataset: Dataset, journal: Journal, filing: Filing
) -> None:
    """A file that is renamed again and again is looked at where it is in the end, not at each name that it had."""
    clock = Clock()
    patrol = Patrol(Layout(dataset.root), journal, refuse, clock=clock)
    path = correct(dataset, filing, "0.jpg")
    assert len(look(patrol, Area.DATASET, path)) == 1
    before = patrol.files_looked_at
    for number in range(1, 100):
        path = path.rename(path.with_name(f"{number % 10}.jpg"))
        patrol.want(Area.DATASET, os.fspath(path))
        patrol.begin_asked()
        assert not patrol.is_under_way
    clock.now = patrol.deadline
    patrol.begin_asked()
    rest_of(patrol)
    assert patrol.files_looked_at - before == 10
