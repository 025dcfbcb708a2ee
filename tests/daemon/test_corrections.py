"""Corrections: what the user did with handled images is noticed, a slice at a time, whatever stands in the way."""

import errno
import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from sortd.daemon.control import undo_records
from sortd.daemon.corrections import FOLLOW_NS, HANDLED_SLICE, SCANNED_FACT, Correction, CorrectionScanner, Repaired
from sortd.daemon.learnt import labelled_images, learnt_counts
from sortd.events import Abstained, Mode, Moved, Outcome
from sortd.files import stamp_of
from sortd.layout import Area, Layout
from sortd.moving.mover import Mover
from sortd.moving.plan import images_apart
from sortd.store.journal import Journal
from sortd.store.records import Selection
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
def mover(dataset: Dataset, journal: Journal) -> Mover:
    """What moves its files."""
    return Mover(dataset.root, journal)


def correct(dataset: Dataset, mover: Mover, name: str, label: str = "dog") -> Path:
    """Let sortd file an image as a cat, and move it to another class as the user does."""
    filed = Path(moved(mover, order(dataset.put(f"Images/{name}", name))))
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


def look(scanner: CorrectionScanner, area: Area, path: Path) -> list[Correction | Repaired]:
    """Let a patrol look at one file, whatever pause it is in."""
    scanner.want(area, os.fspath(path))
    clock = scanner._all._clock
    assert isinstance(clock, Clock)
    clock.now = max(clock.now, scanner.deadline)
    scanner.begin_asked()
    return rest_of(scanner)


def rest_of(scanner: CorrectionScanner) -> list[Correction | Repaired]:
    """Carry out what is under way."""
    noticed: list[Correction | Repaired] = []
    while scanner.is_under_way:
        noticed += scanner.take()
    return noticed


def all_of(scanner: CorrectionScanner, now_ns: int) -> list[Correction | Repaired]:
    """Carry out a whole scanner."""
    scanner.begin(now_ns)
    return rest_of(scanner)


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


def test_scanner_large_folder_is_scanned_in_slices(dataset: Dataset, journal: Journal, mover: Mover) -> None:
    """No turn looks at more than a slice, between two of them others have theirs, and nothing is left out."""
    corrected = correct(dataset, mover, "a.jpg")
    for number in range(2 * HANDLED_SLICE):
        (corrected.parent / f"{number}.jpg").touch()
    scanner = CorrectionScanner(Layout(dataset.root), journal, refuse, clock=Clock())
    scanner.begin(time.time_ns())
    noticed, turns = [], 0
    while scanner.is_under_way:
        noticed += scanner.take()
        turns += 1
        assert (journal.history.fact(SCANNED_FACT) is None) == scanner.is_under_way
    assert turns > 2
    assert [one.path for one in noticed] == [str(corrected)]


def test_correction_scanner_correction_is_noticed_by_what_is_a_class(
    dataset: Dataset, journal: Journal, mover: Mover
) -> None:
    """A move into ``engine.part`` is one; into the waste of a server, or into a hidden folder, is none."""
    corrected = correct(dataset, mover, "a.jpg", "engine.part")
    thrown_away = [correct(dataset, mover, "b.jpg", "#recycle"), correct(dataset, mover, "c.jpg", ".old")]
    scanner = CorrectionScanner(Layout(dataset.root), journal, refuse, clock=Clock())
    assert [one.path for one in all_of(scanner, time.time_ns())] == [str(corrected)]
    assert [look(scanner, Area.DATASET, path) for path in thrown_away] == [[], []]


def test_scanner_scan_wanted_while_one_is_under_way_follows_it(
    dataset: Dataset, journal: Journal, mover: Mover
) -> None:
    """A correction in a folder that was passed already is noticed by the one that follows."""
    correct(dataset, mover, "a.jpg")
    scanner = CorrectionScanner(Layout(dataset.root), journal, refuse, clock=Clock())
    scanner.begin(time.time_ns())
    scanner.begin(time.time_ns())
    assert len(scanner.take()) == 1
    assert scanner.is_under_way
    later = correct(dataset, mover, "b.jpg")
    assert [one.path for one in scanner.take()] == [str(later)]
    assert not scanner.is_under_way


def test_scanner_scan_that_was_ended_begins_where_it_began(dataset: Dataset, journal: Journal, mover: Mover) -> None:
    """Nothing is noted as looked at by it."""
    correct(dataset, mover, "a.jpg")
    scanner = CorrectionScanner(Layout(dataset.root), journal, refuse, clock=Clock())
    scanner.begin(time.time_ns())
    scanner.end()
    assert scanner.take() == []
    assert journal.history.fact(SCANNED_FACT) is None
    assert len(all_of(scanner, time.time_ns())) == 1


def test_only_what_changed_since_is_looked_up(dataset: Dataset, journal: Journal, mover: Mover) -> None:
    """And all of it where the clock was set back since: nothing is known of when it happened."""
    correct(dataset, mover, "a.jpg")
    scanner = CorrectionScanner(Layout(dataset.root), journal, refuse, clock=Clock())
    hour = 3_600 * 10**9
    assert len(all_of(scanner, time.time_ns() + 2 * hour)) == 1
    correct(dataset, mover, "b.jpg")
    assert all_of(scanner, time.time_ns() + 3 * hour) == []  # it happened before the last look, as far as can be told
    assert [one.path.rpartition("/")[2] for one in all_of(scanner, time.time_ns())] == ["b.jpg"]


def put_group(dataset: Dataset, mover: Mover, folder: str = "Dataset/cat", outcome: Outcome = Outcome.FILED) -> Path:
    """Let sortd file an image with a sidecar and a film, and return where the image went."""
    for name in ("IMG_1.JPG.xmp", "IMG_1.MOV"):
        dataset.put(f"Images/{name}", f"{name} of the first")
    return Path(moved(mover, order(dataset.put("Images/IMG_1.JPG", "the first"), folder, outcome)))


def follow(scanner: CorrectionScanner, mover: Mover) -> int:
    """Look through everything, and move what follows images that a person moved long enough ago; return how much."""
    later = time.time_ns() + 2 * FOLLOW_NS
    all_of(scanner, time.time_ns())
    followers = mover.late.follow_images(scanner.take_moved(later))
    return sum(isinstance(answer, Moved) for answer in mover.move_all(followers))


@pytest.mark.parametrize(
    ("filed", "outcome", "to"),
    [
        ("Dataset/cat", Outcome.FILED, "Dataset/dog/IMG_1.JPG"),
        ("Dataset/cat", Outcome.FILED, "Dataset/dog/another name.JPG"),
        ("Dataset/cat", Outcome.FILED, "Dataset/cat/another name.JPG"),
        ("Review/cat", Outcome.REVIEW, "Dataset/cat/IMG_1.JPG"),
        ("Review/cat", Outcome.REVIEW, "Review/dog/IMG_1.JPG"),
        ("Dataset/cat", Outcome.FILED, "Review/dog/IMG_1.JPG"),
        ("Rejected", Outcome.REJECTED, "Rejected/another name.JPG"),
        ("Rejected", Outcome.REJECTED, "Dataset/cat/IMG_1.JPG"),
    ],
)
def test_companions_of_an_image_that_a_person_moved_follow_it(
    dataset: Dataset, journal: Journal, mover: Mover, filed: str, outcome: Outcome, to: str
) -> None:
    """From class to class, out of Review/, within Rejected/, under another name; what was edited since goes too."""
    image = put_group(dataset, mover, filed, outcome)
    dataset.put(f"{filed}/IMG_1.JPG.xmp", "edited since")
    dataset.put(f"{filed}/IMG_1.JPG.pp3", "written since")
    target = dataset.root / to
    target.parent.mkdir(exist_ok=True, parents=True)
    image.rename(target)
    assert follow(CorrectionScanner(Layout(dataset.root), journal, refuse), mover) >= 3
    stem = to.removesuffix(".JPG")
    assert dataset.tree() == {
        to: b"the first",
        f"{stem}.JPG.xmp": b"edited since",
        f"{stem}.JPG.pp3": b"written since",
        f"{stem}.MOV": b"IMG_1.MOV of the first",
    }
    reason = dataset.root / f"{to}.reason.json"
    assert reason.exists() == (outcome is Outcome.REJECTED and to.startswith("Rejected/"))
    assert follow(CorrectionScanner(Layout(dataset.root), journal, refuse), mover) == 0


def test_name_stays_taken_until_the_companions_have_followed(dataset: Dataset, journal: Journal, mover: Mover) -> None:
    """The next image of that name is not filed between them, and none of its companions goes with the first."""
    image = put_group(dataset, mover)
    (dataset.root / "Dataset/dog").mkdir()
    image.rename(dataset.root / "Dataset/dog/IMG_1.JPG")
    for name in ("IMG_1.JPG", "IMG_1.MOV"):
        dataset.put(f"Images/{name}", f"{name} of the second")
    moved(mover, order(dataset.root / "Images/IMG_1.JPG"))
    assert follow(CorrectionScanner(Layout(dataset.root), journal, refuse), mover) == 2
    assert dataset.tree() == {
        "Dataset/cat/IMG_1 (2).JPG": b"IMG_1.JPG of the second",
        "Dataset/cat/IMG_1 (2).MOV": b"IMG_1.MOV of the second",
        "Dataset/dog/IMG_1.JPG": b"the first",
        "Dataset/dog/IMG_1.JPG.xmp": b"IMG_1.JPG.xmp of the first",
        "Dataset/dog/IMG_1.MOV": b"IMG_1.MOV of the first",
    }


def test_companions_follow_an_image_that_is_moved_again_and_back(
    dataset: Dataset, journal: Journal, mover: Mover
) -> None:
    """The journal notes where the image was seen last, also once it is home again; then it is no correction."""
    image = put_group(dataset, mover)
    scanner = CorrectionScanner(Layout(dataset.root), journal, refuse)
    for target in ("dog/IMG_1.JPG", "bird/b.JPG", "cat/IMG_1.JPG"):
        (dataset.root / "Dataset" / target).parent.mkdir(exist_ok=True)
        image = image.rename(dataset.root / "Dataset" / target)
        assert follow(scanner, mover) == 2
        assert {path.name for path in image.parent.iterdir()} == {
            *(image.name, f"{image.stem}.MOV", f"{image.name}.xmp")
        }
    assert journal.history.corrections() == []


def test_companions_that_could_not_follow_are_tried_again(dataset: Dataset, journal: Journal, mover: Mover) -> None:
    """One that is open in an editor, say: by the next look, also of the next start, and the name stays taken."""
    image = put_group(dataset, mover)
    (dataset.root / "Dataset/dog").mkdir()
    image.rename(dataset.root / "Dataset/dog/IMG_1.JPG")
    with (dataset.root / "Dataset/cat/IMG_1.JPG.xmp").open("r+b"):
        assert follow(CorrectionScanner(Layout(dataset.root), journal, refuse), mover) == 1
    moved(mover, order(dataset.put("Images/IMG_1.JPG", "the second")))
    assert "Dataset/cat/IMG_1 (2).JPG" in dataset.tree()
    assert follow(CorrectionScanner(Layout(dataset.root), journal, refuse), mover) == 1
    assert "Dataset/dog/IMG_1.JPG.xmp" in dataset.tree()
    assert images_apart(journal.history) != []
    assert follow(CorrectionScanner(Layout(dataset.root), journal, refuse), mover) == 0
    assert images_apart(journal.history) == []


def test_companions_wait_while_a_person_moves_files(dataset: Dataset, journal: Journal, mover: Mover) -> None:
    """A file manager takes them along one after the other: what it moves itself is left to it."""
    image = put_group(dataset, mover)
    (dataset.root / "Dataset/dog").mkdir()
    image.rename(dataset.root / "Dataset/dog/IMG_1.JPG")
    scanner = CorrectionScanner(Layout(dataset.root), journal, refuse)
    scanner.want(Area.DATASET, f"{dataset.root}/Dataset/dog/IMG_1.JPG")
    scanner.begin_asked()
    rest_of(scanner)
    changed_ns = (dataset.root / "Dataset/dog/IMG_1.JPG").stat().st_ctime_ns
    assert scanner.take_moved(changed_ns + FOLLOW_NS // 2) == []
    assert scanner.has_moved
    assert len(scanner.take_moved(changed_ns + FOLLOW_NS)) == 1
    assert not scanner.has_moved


def test_companions_of_another_image_stay(dataset: Dataset, journal: Journal, mover: Mover) -> None:
    """What an image that still stands there needs, and what stands beside a new file of the name, follows nobody."""
    image = put_group(dataset, mover)
    for name in ("IMG_1.png", "IMG_1.xmp"):
        dataset.put(f"Dataset/cat/{name}", "of another image, which needs the film too")
    (dataset.root / "Dataset/dog").mkdir()
    image = image.rename(dataset.root / "Dataset/dog/IMG_1.JPG")
    scanner = CorrectionScanner(Layout(dataset.root), journal, refuse)
    assert follow(scanner, mover) == 1
    assert sorted(dataset.tree()) == [
        *("Dataset/cat/IMG_1.MOV", "Dataset/cat/IMG_1.png", "Dataset/cat/IMG_1.xmp"),
        *("Dataset/dog/IMG_1.JPG", "Dataset/dog/IMG_1.JPG.xmp"),
    ]
    (dataset.root / "Dataset/bird").mkdir()
    image.rename(dataset.root / "Dataset/bird/IMG_1.JPG")
    dataset.put("Dataset/dog/IMG_1.JPG", "another image in its place")
    assert follow(scanner, mover) == 0
    assert "Dataset/dog/IMG_1.JPG.xmp" in dataset.tree()


def test_companions_follow_an_image_that_went_back_to_the_inbox(dataset: Dataset, mover: Mover) -> None:
    """It is filed anew, and what the person left where it was filed first comes after it."""
    image = put_group(dataset, mover, "Review/cat", Outcome.REVIEW)
    image.rename(dataset.root / "Images/IMG_1.JPG")
    (answer,) = mover.move_all([order(dataset.root / "Images/IMG_1.JPG", "Dataset/dog")])
    assert isinstance(answer, Moved)
    mover.move_all(mover.late.parted_from(answer))
    assert sorted(dataset.tree()) == [f"Dataset/dog/{name}" for name in ("IMG_1.JPG", "IMG_1.JPG.xmp", "IMG_1.MOV")]


def test_undo_takes_no_companion_from_an_image_that_stays(dataset: Dataset, journal: Journal, mover: Mover) -> None:
    """An image that a person moved cannot be put back by its record, and then what followed it stays with it."""
    image = put_group(dataset, mover)
    late = mover.late.move_for(str(dataset.put("Images/IMG_1.aae", "late")))
    assert late is not None
    moved(mover, late)
    (dataset.root / "Dataset/dog").mkdir()
    image = image.rename(dataset.root / "Dataset/dog/IMG_1.JPG")
    assert follow(CorrectionScanner(Layout(dataset.root), journal, refuse), mover) == 3
    before = dataset.tree()
    (record,) = journal.history.moves(Selection(outcome="filed"))
    ((told, _),) = undo_records(mover, journal.history, [record.id], dry_run=False)
    assert [one.restored for one in told] == [None]
    assert dataset.tree() == before


def test_undo_puts_followers_back_beside_no_other_image(dataset: Dataset, journal: Journal, mover: Mover) -> None:
    """They go where they were left, each by its own record, unless an image of their name stands there now."""
    image = put_group(dataset, mover)
    (dataset.root / "Dataset/dog").mkdir()
    image.rename(dataset.root / "Dataset/dog/IMG_1.JPG")
    assert follow(CorrectionScanner(Layout(dataset.root), journal, refuse), mover) == 2
    followed = [record.id for record in journal.history.moves(Selection(outcome="followed"))]
    stranger = dataset.put("Dataset/cat/IMG_1.JPG", "another camera's")
    ((told, _),) = undo_records(mover, journal.history, followed, dry_run=False)
    assert [one.restored for one in told] == [None, None]
    assert all("another image" in one.message for one in told)
    stranger.unlink()
    assert len(list(undo_records(mover, journal.history, followed, dry_run=False))) == 1
    assert sorted(dataset.tree()) == [*("Dataset/cat/IMG_1.JPG.xmp", "Dataset/cat/IMG_1.MOV", "Dataset/dog/IMG_1.JPG")]


def test_companions_that_are_switched_off_stay_behind(dataset: Dataset, journal: Journal, mover: Mover) -> None:
    """Then they are files like others, and nothing is noted of them."""
    image = put_group(dataset, mover)
    (dataset.root / "Dataset/dog").mkdir()
    image.rename(dataset.root / "Dataset/dog/IMG_1.JPG")
    assert (
        follow(CorrectionScanner(Layout(dataset.root), journal, refuse), Mover(dataset.root, journal, companions=False))
        == 0
    )
    assert journal.history.facts_like("places:") == {}


def test_scanner_unreadable_file_is_reported_and_ends_nothing(dataset: Dataset, journal: Journal, mover: Mover) -> None:
    """A class folder, an image's folder and a place in the journal that sortd may not read: the others are noticed."""
    corrected = correct(dataset, mover, "a.jpg")
    secret = correct(dataset, mover, "b.jpg", "secret")
    elsewhere = correct(dataset, mover, "c.jpg", "secret")
    elsewhere = elsewhere.rename(dataset.root / "Dataset/dog/c.jpg")
    secret.parent.chmod(0)
    told: list[OSError] = []
    scanner = CorrectionScanner(Layout(dataset.root), journal, told.append, clock=Clock())
    with unprivileged():
        assert look(scanner, Area.DATASET, secret) == []
        noticed = all_of(scanner, time.time_ns())
    assert {one.path for one in noticed} == {str(corrected), str(elsewhere)}
    assert {error.errno for error in told} == {errno.EACCES}
    assert {error.filename for error in told} == {str(secret), str(secret.parent)}


def test_scanner_copy_of_an_image_that_may_still_exist_is_no_correction(
    dataset: Dataset, journal: Journal, mover: Mover
) -> None:
    """Where the place of the image itself cannot be looked at, nothing is learnt from a second link."""
    filed = Path(moved(mover, order(dataset.put("Images/a.jpg"))))
    (dataset.root / "Dataset/dog").mkdir()
    link = dataset.root / "Dataset/dog/a.jpg"
    os.link(filed, link)
    filed.parent.chmod(0)
    scanner = CorrectionScanner(Layout(dataset.root), journal, refuse, clock=Clock())
    with unprivileged():
        assert look(scanner, Area.DATASET, link) == []
    filed.parent.chmod(0o755)
    filed.unlink()
    assert [type(one) for one in look(scanner, Area.DATASET, link)] == [Correction]


def test_mended_images_are_noticed_too(dataset: Dataset, journal: Journal, mover: Mover) -> None:
    """By a look at one, and by the patrol; Review/ is nobody's concern here."""
    path = Path(moved(mover, order(dataset.put("Images/a.jpg"), "Rejected", Outcome.REJECTED)))
    scanner = CorrectionScanner(Layout(dataset.root), journal, refuse, clock=Clock())
    assert all_of(scanner, time.time_ns()) == []
    path.write_bytes(b"mended")
    assert [type(one) for one in look(scanner, Area.REJECTED, path)] == [Repaired]
    assert look(scanner, Area.REVIEW, path) == []
    assert [type(one) for one in all_of(scanner, time.time_ns())] == [Repaired]


def test_correction_scanner_own_move_needs_no_search(dataset: Dataset, journal: Journal, mover: Mover) -> None:
    """The event of a file that sortd has just put there costs no statement; one that is moved later is looked up."""
    filed = Path(moved(mover, order(dataset.put("Images/a.jpg", "a"))))
    scanner = CorrectionScanner(Layout(dataset.root), journal, refuse, clock=Clock())
    scanner.note_placed(os.fspath(filed), stamp_of(filed.lstat()))
    statements: list[str] = []
    journal.history._connection.set_trace_callback(statements.append)
    assert look(scanner, Area.DATASET, filed) == []
    assert statements == []
    scanner.note_placed(os.fspath(filed), stamp_of(filed.lstat()))
    dog = dataset.root / "Dataset" / "dog" / "a.jpg"
    dog.parent.mkdir()
    (correction,) = look(scanner, Area.DATASET, filed.rename(dog))
    (taken_back,) = look(scanner, Area.DATASET, dog.rename(filed))
    journal.history._connection.set_trace_callback(None)
    assert isinstance(correction, Correction)
    assert correction.corrected == "dog"
    assert isinstance(taken_back, Correction)
    assert taken_back.is_taken_back


def test_correction_scanner_corrections_of_a_slice_are_recorded_in_one_commit(
    dataset: Dataset, journal: Journal, mover: Mover
) -> None:
    """Hundreds of images that are moved to another class at once are no hundreds of synced commits."""
    corrected = [correct(dataset, mover, f"{number}.jpg") for number in range(20)]
    statements: list[str] = []
    scanner = CorrectionScanner(Layout(dataset.root), journal, refuse, clock=Clock())
    for path in corrected:
        scanner.want(Area.DATASET, os.fspath(path))
    scanner.begin_asked()
    journal.connection.set_trace_callback(statements.append)
    noticed = rest_of(scanner)
    journal.connection.set_trace_callback(None)
    assert len(noticed) == 20
    assert statements.count("COMMIT") == 1


def test_correction_scanner_events_in_a_storm_ask_for_one_look(
    dataset: Dataset, journal: Journal, mover: Mover
) -> None:
    """Three thousand folders that are made are one look through all; the next one waits for the pause."""
    clock = Clock()
    scanner = CorrectionScanner(Layout(dataset.root), journal, refuse, clock=clock)
    correct(dataset, mover, "a.jpg")
    for _ in range(3000):
        scanner.ask()
    scanner.begin_asked()
    assert len(rest_of(scanner)) == 1
    correct(dataset, mover, "b.jpg")
    scanner.ask()
    scanner.begin_asked()
    assert not scanner.is_under_way
    assert scanner.deadline > clock.now
    clock.now = scanner.deadline
    scanner.begin_asked()
    assert len(rest_of(scanner)) == 1


def test_correction_scanner_more_files_than_are_remembered_are_found_by_a_look_at_all(
    dataset: Dataset, journal: Journal, mover: Mover, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What hints name is bounded, and nothing of it is lost."""
    monkeypatch.setattr("sortd.daemon.corrections.MOST_WANTED", 3)
    scanner = CorrectionScanner(Layout(dataset.root), journal, refuse, clock=Clock())
    for number in range(5):
        scanner.want(Area.DATASET, os.fspath(correct(dataset, mover, f"{number}.jpg")))
    scanner.begin_asked()
    assert len(rest_of(scanner)) == 5


def test_correction_scanner_a_large_file_is_compared_in_chunks(
    dataset: Dataset, journal: Journal, mover: Mover, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that was copied to another class and removed is known by its bytes, which are not read in one slice."""
    monkeypatch.setattr("sortd.daemon.corrections.CHUNK_BYTES", 1)
    filed = Path(moved(mover, order(dataset.put("Images/a.jpg", "bytes"), content=sha256(b"bytes").hexdigest())))
    copy = dataset.root / "Dataset/dog/a.jpg"
    copy.parent.mkdir()
    copy.write_bytes(filed.read_bytes())
    filed.unlink()
    scanner = CorrectionScanner(Layout(dataset.root), journal, refuse, clock=itertools.count().__next__)
    scanner.want(Area.DATASET, os.fspath(copy))
    scanner.begin_asked()
    slices = [scanner.take() for _ in range(5)]
    assert slices == [[]] * 5
    assert [type(one) for one in rest_of(scanner)] == [Correction]


def test_correction_scanner_files_in_a_storm_are_looked_at_together_after_a_pause(
    dataset: Dataset, journal: Journal, mover: Mover
) -> None:
    """A file that is renamed again and again is looked at where it is in the end, not at each name that it had."""
    clock = Clock()
    scanner = CorrectionScanner(Layout(dataset.root), journal, refuse, clock=clock)
    path = correct(dataset, mover, "0.jpg")
    assert len(look(scanner, Area.DATASET, path)) == 1
    before = scanner.files_looked_at
    for number in range(1, 100):
        path = path.rename(path.with_name(f"{number % 10}.jpg"))
        scanner.want(Area.DATASET, os.fspath(path))
        scanner.begin_asked()
        assert not scanner.is_under_way
    clock.now = scanner.deadline
    scanner.begin_asked()
    rest_of(scanner)
    assert scanner.files_looked_at - before == 10


def reviewed(dataset: Dataset, mover: Mover, name: str = "a.jpg", content: str = "content") -> Path:
    """Let sortd put an image into Review/ that is most probably a cat, and return where it lies."""
    image, guess = dataset.put(f"Images/{name}", content), Abstained("typicality", "cat", 0.5, 0.1, "dog", Mode.BEST)
    for label in ("cat", "dog"):
        (dataset.root / "Dataset" / label).mkdir(parents=True, exist_ok=True)
    asked = order(image, "Review/_none", Outcome.REVIEW, content=sha256(content.encode()).hexdigest())
    return Path(moved(mover, replace(asked, decision=guess)))


@pytest.mark.parametrize("target", ["cat/a.jpg", "dog/a.jpg", "cat/another name.jpg", "dog/another name.jpg"])
@pytest.mark.parametrize("found_by", ["event", "scan"])
def test_scanner_image_moved_out_of_review_is_learnt_whether_guessed_or_not(
    dataset: Dataset, journal: Journal, mover: Mover, target: str, found_by: str
) -> None:
    """By its event or by the scan at the start, under any name; a second look finds nothing new."""
    image = reviewed(dataset, mover).rename(dataset.root / "Dataset" / target)
    scanner, label = CorrectionScanner(Layout(dataset.root), journal, refuse, clock=Clock()), target[:3]
    found = look(scanner, Area.DATASET, image) if found_by == "event" else all_of(scanner, time.time_ns())
    assert found == [Correction(str(image), "cat", label)]
    assert labelled_images(Layout(dataset.root), journal.history, with_corrections=True) == ((label, str(image)),)
    assert labelled_images(Layout(dataset.root), journal.history, with_corrections=False) == ()
    again = CorrectionScanner(Layout(dataset.root), journal, refuse, clock=Clock())
    assert all_of(again, time.time_ns()) == []
    assert learnt_counts(Layout(dataset.root), journal.history, with_corrections=True) == {}
    (dataset.root / "Clases" / label).mkdir(parents=True)
    ways = {"corrected": int(label == "dog"), "confirmed": int(label == "cat"), "assigned": 0}
    assert learnt_counts(Layout(dataset.root), journal.history, with_corrections=True) == {label: ways}
    assert journal.history.accuracy() == {}


def test_scanner_image_copied_out_of_review_is_learnt_once_the_original_is_gone(
    dataset: Dataset, journal: Journal, mover: Mover
) -> None:
    """A copy alone says nothing; the event of the removal, in Review/, leads to the copy."""
    image, copy = reviewed(dataset, mover), dataset.root / "Dataset/cat/a.jpg"
    copy.write_bytes(image.read_bytes())
    scanner = CorrectionScanner(Layout(dataset.root), journal, refuse, clock=Clock())
    assert look(scanner, Area.DATASET, copy) == []
    image.unlink()
    assert look(scanner, Area.REVIEW, image) == [Correction(str(copy), "cat", "cat")]


@pytest.mark.parametrize("back", ["Review/_none/a.jpg", "Review/cat/a.jpg"])
@pytest.mark.parametrize("label", ["cat", "dog"])
def test_scanner_image_moved_back_to_review_is_not_learnt_any_more(
    dataset: Dataset, journal: Journal, mover: Mover, label: str, back: str
) -> None:
    """Moved on to another class, or renamed in its class, it stays learnt; back in Review/ it is not."""
    scanner = CorrectionScanner(Layout(dataset.root), journal, refuse, clock=Clock())
    image = reviewed(dataset, mover).rename(dataset.root / "Dataset" / label / "a.jpg")
    assert len(look(scanner, Area.DATASET, image)) == 1
    image = image.rename(image.with_name("b.jpg"))
    assert look(scanner, Area.DATASET, image) == []
    assert labelled_images(Layout(dataset.root), journal.history, with_corrections=True) == ((label, str(image)),)
    (dataset.root / back).parent.mkdir(exist_ok=True)
    image = image.rename(dataset.root / back)
    (found,) = look(scanner, Area.REVIEW, image)
    assert isinstance(found, Correction)
    assert found.is_taken_back
    assert journal.history.corrections() == []
