"""Datasets: what is wrong with one dataset is held with its cause, and the others are served."""

import os
import queue
import re
import resource
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

import pytest
from structlog.testing import capture_logs

from sortd.config import read_config
from sortd.core.schedule import RETRY_SECONDS
from sortd.daemon.dataset_lock import lock_dataset
from sortd.daemon.datasets import (
    DESCRIPTORS_OF_A_DATASET,
    Datasets,
)
from sortd.daemon.metrics import Metrics
from sortd.daemon.worker import Forget, Job
from sortd.errors import AlreadyRunningError, JournalError, LayoutError, StorageError
from sortd.events import Move, Outcome, Stamp
from sortd.files import stamp_of
from sortd.layout import Layout
from sortd.moving.copy_queue import Copied, CopyFailed, CopyQueue, CopyQueueDied
from sortd.store.history import History
from sortd.store.journal import Journal
from sortd.store.records import MoveFile, MoveReason, MoveRecord, Record, Role
from sortd.watch.scan import stamp
from tests.command_line import write_config
from tests.daemon_process import make_dataset
from tests.filed_images import file_images

STAMP = Stamp(1, 2, 3, 4)


@dataclass
class Place:
    """A collection below a temporary folder, what it asked the worker for, and the time that it is told."""

    folder: Path
    now: float = 1000.0
    asked: list[Job] = field(default_factory=list)
    metrics: Metrics = field(default_factory=Metrics)
    posted: queue.SimpleQueue[Copied | CopyFailed | CopyQueueDied] = field(default_factory=queue.SimpleQueue)

    def __post_init__(self) -> None:
        """Make the collection; nothing is looked at yet."""
        config = read_config(write_config(self.folder), {})
        self.collection = Datasets(
            config,
            ask=self.asked.append,
            copier=CopyQueue(self.posted.put),
            metrics=self.metrics,
            clock=lambda: self.now,
        )

    @property
    def state(self) -> Path:
        """The state directory."""
        return self.folder / "state"

    def layout(self, name: str) -> Layout:
        """Return a dataset's folders."""
        return Layout(self.folder / "Data" / name)

    def journal(self, name: str) -> Path:
        """Return where a dataset's journal lies."""
        return self.layout(name).state_folder(self.state) / "journal.sqlite"

    def held_lines(self, *, rounds: int = 1) -> list[str]:
        """Look for datasets again and again; return what was logged of those that are held."""
        with capture_logs() as lines:
            for _ in range(rounds):
                self.now += RETRY_SECONDS[1]
                self.collection.discover()
        return [f"{line['dataset']}: {line['error']}" for line in lines if line["event"] == "dataset.held"]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """Two datasets, Bad and Good, of which each was worked on before."""
    for name in ("Bad", "Good"):
        dataset = make_dataset(tmp_path / "Data", name)
        file_images(dataset, tmp_path / "state", {"a.png": "red"})
        Layout(dataset).make()
    made = Place(tmp_path)
    yield made
    made.collection.close()


def execute(journal: Path, statement: str) -> None:
    """Change a journal by another hand than sortd's."""
    with closing(sqlite3.connect(journal)) as connection:
        connection.execute(statement)
        connection.commit()


Damage = Callable[[Place], Callable[[], object]]


def replaced(path: Path, put: Callable[[Path], object]) -> Callable[[], object]:
    """Put something else in the place of a file or folder; return what undoes that."""
    aside = path.with_name(f"{path.name}-aside")
    if os.path.lexists(path):
        path.rename(aside)
    put(path)

    def mend() -> None:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        if os.path.lexists(aside):
            aside.rename(path)

    return mend


def linked(path: Path) -> Callable[[], object]:
    """Put a link to what stood there in its place."""
    return replaced(path, lambda link: link.symlink_to(link.with_name(f"{link.name}-aside")))


def looped(path: Path) -> Callable[[], object]:
    """Put a link to itself in its place."""
    return replaced(path, lambda link: link.symlink_to(link))


def forged(journal: Path, statement: str, back: str) -> Callable[[], object]:
    """Change a journal; return what changes it back."""
    execute(journal, statement)
    return lambda: execute(journal, back)


def locked(journal: Path) -> Callable[[], object]:
    """Lock a journal as another program could."""
    other = sqlite3.connect(journal, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    return other.close


def taken(place: Place) -> Callable[[], object]:
    """Let another sortd, with another state directory, work on a dataset."""
    other = ExitStack()
    other.enter_context(lock_dataset(place.layout("Bad"), place.folder / "other"))
    return other.close


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda it: replaced(it.layout("Bad").root / "Images", Path.touch), "Images is not a folder"),
        (lambda it: linked(it.layout("Bad").root / "Images"), "Images is a symbolic link"),
        (lambda it: looped(it.layout("Bad").root / "Review"), "Review is not a folder|symbolic link"),
        (lambda it: linked(it.layout("Bad").marker), r"\.sortd is a symbolic link"),
        (lambda it: replaced(it.layout("Bad").marker, Path.touch), r"\.sortd is not a folder"),
        (lambda it: replaced(it.layout("Bad").marker / "lock", Path.mkdir), "lock cannot be"),
        (lambda it: looped(it.layout("Bad").marker / "lock"), "lock cannot be"),
        (taken, "another sortd works on"),
        (lambda it: replaced(it.journal("Bad").parent, Path.touch), "cannot be created"),
        (lambda it: replaced(it.journal("Bad"), Path.mkdir), "Is a directory"),
        (lambda it: replaced(it.journal("Bad"), lambda path: path.write_bytes(b"x" * 5000)), "the journal is damaged"),
        (lambda it: forged(it.journal("Bad"), "PRAGMA user_version = 9", "PRAGMA user_version = 2"), "has version 9"),
        (
            lambda it: forged(
                it.journal("Bad"), "UPDATE moves SET progress = 'flown'", "UPDATE moves SET progress = 'done'"
            ),
            "record 1 has the unknown value 'flown'",
        ),
        (
            lambda it: forged(
                it.journal("Bad"),
                "INSERT INTO facts VALUES ('generation', 'many')",
                "DELETE FROM facts WHERE key = 'generation'",
            ),
            "the fact generation is 'many'",
        ),
        (
            lambda it: forged(
                it.journal("Bad"),
                "INSERT INTO facts VALUES ('corrections_scanned_at', '')",
                "DELETE FROM facts WHERE key = 'corrections_scanned_at'",
            ),
            "the fact corrections_scanned_at is ''",
        ),
        (lambda it: locked(it.journal("Bad")), "another program has locked the journal"),
    ],
)
def test_discover_dataset_that_cannot_be_opened_is_held_and_the_rest_is_served(
    place: Place, damage: Damage, said: str
) -> None:
    """At the start: its cause is said once, in the log, the status and the metrics; mended, it is taken up."""
    mend = damage(place)
    (line,) = place.held_lines(rounds=3)
    assert set(place.collection.by_name) == {"Good"}
    assert re.search(f"^Bad: .*({said})", line)
    facts = place.collection.held["Bad"].facts()
    assert line == f"Bad: {facts['problem']}"
    assert facts["held_since"]
    assert 'sortd_dataset_held{dataset="Bad"} 1.0' in place.metrics.text()
    assert 'sortd_dataset_held{dataset="Good"} 0.0' in place.metrics.text()
    mend()
    assert place.held_lines() == []
    assert set(place.collection.by_name) == {"Bad", "Good"}
    assert not place.collection.held
    assert 'sortd_dataset_held{dataset="Bad"} 0.0' in place.metrics.text()
    with pytest.raises(AlreadyRunningError), lock_dataset(place.layout("Bad"), place.state):
        pass


def test_discover_another_cause_is_said_anew(place: Place) -> None:
    """Whoever mended one thing learns of the next."""
    mend = replaced(place.layout("Bad").root / "Images", Path.touch)
    linked(place.layout("Bad").root / "Review")
    (first,) = place.held_lines()
    mend()
    (second,) = place.held_lines(rounds=2)
    assert "Images" in first
    assert "Review" in second


def test_discover_every_dataset_taken_by_another_sortd_ends_the_start(place: Place) -> None:
    """There is nothing to wait for but the other one's end: it is said, with the exit code to try again."""
    with (
        lock_dataset(place.layout("Bad"), place.folder / "other"),
        lock_dataset(place.layout("Good"), place.folder / "other"),
        pytest.raises(AlreadyRunningError, match="another sortd works on"),
    ):
        place.collection.discover()


def test_discover_held_dataset_that_is_deleted_is_forgotten(place: Place) -> None:
    """It is missing, until a reload says that nobody waits for it."""
    replaced(place.layout("Bad").root / "Images", Path.touch)
    place.held_lines()
    shutil.rmtree(place.layout("Bad").root)
    assert place.held_lines() == []
    assert not place.collection.held
    assert set(place.collection.missing) == {"Bad"}
    place.collection.reload(place.collection.config)
    place.collection.discover()
    assert not place.collection.missing
    assert "Bad" not in place.metrics.text()


def missing_lines(place: Place, *, rounds: int = 1) -> list[str]:
    """Look for datasets again and again; return what was logged of those that are missing."""
    with capture_logs() as lines:
        for _ in range(rounds):
            place.collection.discover()
    return [f"{line['dataset']}: {line['error']}" for line in lines if line["event"] == "dataset.missing"]


@pytest.mark.parametrize("put", [lambda _: None, Path.touch, lambda path: path.symlink_to(path.with_name("gone"))])
def test_discover_dataset_that_is_away_is_missing_until_it_is_back(place: Place, put: Callable[[Path], None]) -> None:
    """Once, log, metrics and what the status shows say so; whatever is in its place."""
    place.collection.discover()
    root = place.layout("Bad").root
    root.rename(place.folder / "aside")
    put(root)
    (line,) = missing_lines(place, rounds=3)
    assert set(place.collection.by_name) == {"Good"}
    assert line == f"Bad: {place.collection.missing['Bad']}"
    assert f"{root} is missing" in line
    assert "reload sortd" in line
    assert 'sortd_dataset_held{dataset="Bad"} 1.0' in place.metrics.text()
    if os.path.lexists(root):
        root.unlink()
    (place.folder / "aside").rename(root)
    assert missing_lines(place) == []
    assert set(place.collection.by_name) == {"Bad", "Good"}
    assert not place.collection.missing
    assert 'sortd_dataset_held{dataset="Bad"} 0.0' in place.metrics.text()
    root.rename(place.folder / "aside")
    assert len(missing_lines(place)) == 1


def test_discover_dataset_that_was_renamed_is_not_missing(place: Place) -> None:
    """Nor one that was deleted and made anew."""
    place.collection.discover()
    place.layout("Bad").root.rename(place.layout("Better").root)
    shutil.rmtree(place.layout("Good").root)
    make_dataset(place.folder / "Data", "Good")
    assert missing_lines(place, rounds=2) == []
    assert set(place.collection.by_name) == {"Better", "Good"}
    assert not place.collection.missing


def test_discover_dataset_that_is_configured_is_missing_until_it_is_there(place: Place) -> None:
    """Also at the start and after a reload, and if its folder is an empty mount point; the advice names the key."""
    configured = read_config(write_config(place.folder, datasets="{Never: {mode: max}}"), {})
    place.layout("Never").root.mkdir()
    for config, lines in ((configured, 1), (configured, 0), (place.collection.config, 0), (configured, 1)):
        place.collection.reload(config)
        assert len(missing_lines(place)) == lines
        assert set(place.collection.missing) == ({"Never"} if config is configured else set())
    assert "remove datasets.Never from the configuration" in place.collection.missing["Never"]
    make_dataset(place.folder / "Data", "Never")
    assert missing_lines(place) == []
    assert not place.collection.missing


def test_held_error_has_all_causes_and_the_exit_code_of_the_first(place: Place) -> None:
    """What ``once`` ends by, by the family of the cause."""
    assert place.collection.held_error is None
    replaced(place.layout("Bad").root / "Images", Path.touch)
    replaced(place.journal("Good"), Path.mkdir)
    place.held_lines()
    error = place.collection.held_error
    assert isinstance(error, LayoutError)
    assert "Bad: " in str(error)
    assert "Good: " in str(error)


def test_isolated_journal_that_fails_in_the_middle_of_a_move_is_recovered_when_it_is_opened_anew(place: Place) -> None:
    """The image was renamed and its end could not be written: the dataset is held, the other one served, none lost."""
    place.collection.discover()
    bad, good = place.collection.by_name["Bad"], place.collection.by_name["Good"]
    path = bad.layout.root / "Images" / "b.png"
    path.write_bytes(b"image")
    mark = stamp(str(path))
    assert mark is not None
    execute(place.journal("Bad"), "CREATE TRIGGER fault BEFORE UPDATE ON moves BEGIN SELECT RAISE(ABORT, 'fault'); END")
    bad.move_queue.add(Move(str(path), mark, "Dataset/red", Outcome.FILED))
    with place.collection.isolated(bad):
        bad.move_queue.send()
    assert (bad.layout.root / "Dataset" / "red" / "b.png").read_bytes() == b"image"
    assert list(place.collection) == [good]
    assert "fault" in place.collection.held["Bad"].cause
    assert place.asked[-1] == Forget(bad.identity)
    with lock_dataset(place.layout("Bad"), place.folder / "other"):
        pass  # its locks were given back
    execute(place.journal("Bad"), "DROP TRIGGER fault")
    assert place.held_lines() == []
    history = place.collection.by_name["Bad"].journal.history
    assert history.unfinished() == []
    assert history.counts() == {"filed": 2}


def test_discover_more_datasets_than_descriptors_allow_are_held_and_the_rest_is_served(place: Place) -> None:
    """Some descriptors are left for moves and decoders; the cause names the limit, and a higher one mends it."""
    for number in range(4):
        (place.folder / "Data" / f"More{number}" / "Clases").mkdir(parents=True)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough_for_two = (len(os.listdir("/proc/self/fd")) + 5 + DESCRIPTORS_OF_A_DATASET) * 4 // 3 + 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (enough_for_two, before[1]))
    try:
        lines = place.held_lines(rounds=2)
        assert {"Bad", "Good"} <= set(place.collection.by_name)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert len(lines) == len(place.collection.held) == 6 - len(place.collection.by_name) > 0
    assert all(f"a limit of {enough_for_two} open files" in line and "RLIMIT_NOFILE" in line for line in lines)
    assert place.held_lines() == []
    assert len(place.collection.by_name) == 6


def test_hold_that_fails_again_and_again_waits_longer_and_is_said_once(place: Place) -> None:
    """A journal that can be opened and fails at work is tried ever more seldom, up to a minute."""
    place.collection.discover()
    fault = JournalError("fault")
    pauses: list[float] = []
    with capture_logs() as lines:
        for _ in range(9):
            with place.collection.isolated(place.collection.by_name["Bad"]):
                raise fault
            pauses.append(place.collection.held["Bad"].retry_at - place.now)
            place.collection.discover()
            assert "Bad" in place.collection.held
            place.now = place.collection.held["Bad"].retry_at
            place.collection.discover()
    assert pauses == [min(RETRY_SECONDS[0] * 2**number, RETRY_SECONDS[1]) for number in range(9)]
    assert len([line for line in lines if line["event"] == "dataset.held"]) == 1
    place.now += 2 * RETRY_SECONDS[1]
    with capture_logs() as lines, place.collection.isolated(place.collection.by_name["Bad"]):
        raise fault
    assert place.collection.held["Bad"].retry_at - place.now == RETRY_SECONDS[0]
    assert [line["event"] for line in lines] == ["dataset.held"]


def test_isolated_error_that_nobody_foresaw_holds_the_dataset_with_its_trace(place: Place) -> None:
    """A fault of sortd's own, over one dataset, keeps the others from nothing, and can be reported."""
    place.collection.discover()
    with capture_logs() as lines, place.collection.isolated(place.collection.by_name["Bad"]):
        raise ZeroDivisionError("by zero")
    (line,) = lines
    assert (line["event"], line["cause"]) == ("dataset.held", "unforeseen")
    assert isinstance(line["exc_info"], ZeroDivisionError)
    assert set(place.collection.by_name) == {"Good"}


@pytest.mark.parametrize("hurt", [Path.unlink, lambda path: shutil.rmtree(path.parent)])
def test_discover_journal_that_was_removed_is_begun_anew(place: Place, hurt: Callable[[Path], None]) -> None:
    """What is written to a file without a name is lost: the dataset is held, and taken up with a new journal."""
    place.collection.discover()
    hurt(place.journal("Bad"))
    (line,) = place.held_lines()
    assert "was removed or replaced while open" in line
    assert place.held_lines() == []
    place.collection.by_name["Bad"].journal.hold("Images/a.png", STAMP, "undone")
    with History.open(place.journal("Bad")) as history:
        assert history.held() == {"Images/a.png": STAMP}


def test_answering_journal_that_fails_is_told_and_held(place: Place) -> None:
    """Whoever asked hears of it, and the dataset is held."""
    place.collection.discover()
    bad = place.collection.by_name["Bad"]
    execute(place.journal("Bad"), "DROP TABLE holds")
    with pytest.raises(StorageError, match="the journal is damaged"), place.collection.answering(bad):
        bad.mover.release()
    assert set(place.collection.held) == {"Bad"}


def test_close_journal_that_fails_lets_the_others_be_closed(place: Place) -> None:
    """The lock of each is given back, whatever the journal of one says."""
    place.collection.discover()
    execute(place.journal("Bad"), "DROP TABLE facts")
    place.collection.close()
    for name in ("Bad", "Good"):
        with lock_dataset(place.layout(name), place.folder / "other"):
            pass


def test_discover_dataset_whose_recovery_cannot_be_reported_is_opened_later(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error between opening and reporting releases the locks: the next attempt takes them."""
    layout = place.layout("Bad")
    image, filed = layout.root / "Images" / "z.png", layout.root / "Dataset" / "red" / "z.png"
    image.write_bytes(b"z")
    filed.parent.mkdir(parents=True, exist_ok=True)
    file = MoveFile(Role.IMAGE, image.name, image.name, stamp_of(image.lstat()))
    with Journal(place.journal("Bad")) as journal:
        journal.intend([(MoveRecord("0123456789abcdef", "Images", "Dataset/red", (file,)), MoveReason("filed"))])
    image.rename(filed)
    last_known = History.last_known
    failed: list[bool] = []

    def fail_once(history: History, *arguments: object) -> Record | None:
        if not failed:
            failed.append(True)
            raise JournalError("the disk returned an error")
        return last_known(history, *arguments)  # type: ignore[arg-type]  # those of last_known

    monkeypatch.setattr(History, "last_known", fail_once)
    place.held_lines(rounds=3)
    assert failed
    assert "Bad" in place.collection.by_name


def test_discover_dataset_that_appears_later_is_rebuilt_when_its_references_have_settled(place: Place) -> None:
    """A tree that is copied in may have old images and only the first of its classes."""
    place.collection.discover()
    make_dataset(place.folder / "Data", "Later")
    before = monotonic()
    place.collection.discover()
    due = {dataset.name: dataset.sorter.rebuilds.deadlines[0] for dataset in place.collection}
    assert (due["Bad"], due["Good"]) == (0.0, 0.0)
    later = due["Later"]
    assert later is not None
    assert later >= before + place.collection.by_name["Later"].sorter.settle_seconds
