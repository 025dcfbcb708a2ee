"""Control does in the daemon what undo, release and rebuild ask for, and tells the core before any watcher can."""

import os
import shutil
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest

from sortd.daemon import control
from sortd.daemon.assign import image_facts
from sortd.daemon.control import Reply, Request, RequestError, Steps
from sortd.daemon.dataset_lock import OpenDataset, Presence, lock_dataset
from sortd.daemon.datasets import Datasets, Held
from sortd.errors import AlreadyRunningError, DataError, JournalError, LayoutError, StorageError
from sortd.events import Event, ImageGone, ImageHeld, Move, Released
from sortd.layout import Area, Layout
from sortd.moving.mover import MoveAnswer, Mover
from sortd.store.journal import Journal
from sortd.watch.scan import stamp
from tests.daemon_process import make_dataset, picture
from tests.filed_images import file_images


@dataclass
class AtWork:
    """A dataset of a daemon, with the real filing and journal, that writes down what its core is told."""

    opened: OpenDataset
    told: list[Event] = field(default_factory=list)
    rebuilds: list[bool] = field(default_factory=list)
    name: str = "Colours"
    held_because: str | None = None

    @property
    def layout(self) -> Layout:
        """Its folders."""
        return self.opened.layout

    @property
    def mover(self) -> Mover:
        """What moves its files."""
        return self.opened.mover

    @property
    def journal(self) -> Journal:
        """What its journal can be asked."""
        return self.opened.journal

    @property
    def presence(self) -> Presence:
        """Whether it is there."""
        return self.opened.presence

    def assign(self, moves: Sequence[Move]) -> list[MoveAnswer]:
        """Carry them out."""
        return self.mover.move_all(moves)

    def receive(self, event: Event) -> None:
        """Write it down."""
        self.told.append(event)

    def release(self) -> str | None:
        """Let the dataset go."""
        reason, self.held_because = self.held_because, None
        return reason

    def rebuild(self, *, force: bool) -> None:
        """Write it down."""
        self.rebuilds.append(force)


@dataclass(frozen=True)
class Daemon:
    """As much of the datasets of a daemon as control sees."""

    by_name: Mapping[str, AtWork]
    held: Mapping[str, Held] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[AtWork]:
        """Go through them."""
        return iter(self.by_name.values())

    @contextmanager
    def answering(self, dataset: AtWork) -> Iterator[None]:
        """Write down which one failed."""
        try:
            yield
        except StorageError:
            self.failed.append(dataset.name)
            raise


def answer(daemon: Daemon, request: Request) -> Reply | Steps:
    """Let control answer a request."""
    return control.answer(cast(Datasets, daemon), request)


@pytest.fixture
def dataset(tmp_path: Path) -> Iterator[AtWork]:
    """A dataset at work into which two images were filed."""
    folder = make_dataset(tmp_path / "Data")
    file_images(folder, tmp_path / "state", {"a.png": "red", "b.png": "blue"})
    with lock_dataset(Layout(folder), tmp_path / "state") as opened:
        yield AtWork(opened)


@pytest.fixture
def daemon(dataset: AtWork) -> Daemon:
    """A daemon with that dataset."""
    return Daemon({"Colours": dataset})


def done(answered: Reply | Steps) -> Reply:
    """Do all steps of an answer, as the loop does turn by turn."""
    if not isinstance(answered, Generator):
        return answered
    while True:
        try:
            next(answered)
        except StopIteration as ended:
            reply: Reply = ended.value
            return reply


def undo(dataset: AtWork, *records: int, dry_run: bool = False) -> dict[str, object]:
    """Return a request to undo these records."""
    wanted = {"Colours": {"root": str(dataset.layout.root), "records": list(records)}}
    return {"do": "undo", "datasets": wanted, "dry_run": dry_run, "expires_at": 0}


def test_undo_image_is_held_before_it_can_be_seen(daemon: Daemon, dataset: AtWork) -> None:
    """The core hears that the file left its class and that its new place is not work."""
    root = dataset.layout.root
    reply = done(answer(daemon, undo(dataset, 1)))
    (one,) = reply["undone"]
    assert (one["was"], one["restored"]) == (str(root / "Dataset/red/a.png"), str(root / "Images/a.png"))
    mark = stamp(str(root / "Images/a.png"))
    assert mark is not None
    held = ImageHeld(str(root / "Images/a.png"), mark._replace(ctime_ns=0))  # the journal does not know that time
    assert dataset.told == [ImageGone(str(root / "Dataset/red/a.png")), held]


def test_undo_of_many_is_done_in_steps_newest_first(
    daemon: Daemon, dataset: AtWork, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop has a turn after each chunk, in which the core knows of it already; all of it is told in one answer."""
    monkeypatch.setattr("sortd.daemon.control.CHUNK", 1)
    steps = answer(daemon, undo(dataset, 1, 2))
    assert isinstance(steps, Generator)
    next(steps)
    assert [type(event) for event in dataset.told] == [ImageGone, ImageHeld]
    assert (dataset.layout.root / "Dataset/red/a.png").exists()
    next(steps)
    with pytest.raises(StopIteration) as ended:
        next(steps)
    assert [one["id"] for one in ended.value.value["undone"]] == [2, 1]


def test_undo_dataset_that_is_let_go_meanwhile_ends_it(dataset: AtWork, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its journal is closed by then; whoever asked is told how far it came."""
    monkeypatch.setattr("sortd.daemon.control.CHUNK", 1)
    datasets = {"Colours": dataset}
    steps = answer(Daemon(datasets), undo(dataset, 1, 2))
    assert isinstance(steps, Generator)
    next(steps)
    datasets.clear()
    with pytest.raises(DataError, match="1 images were restored"):
        next(steps)


def test_undo_asks_the_journal_a_few_questions_for_many_records(daemon: Daemon, dataset: AtWork) -> None:
    """Not one for each record and one for what followed each."""
    asked: list[str] = []
    dataset.journal.history._connection.set_trace_callback(asked.append)
    done(answer(daemon, undo(dataset, *[1, 2] * 500, dry_run=True)))
    dataset.journal.history._connection.set_trace_callback(None)
    assert len([question for question in asked if "FROM moves" in question]) < 10


def test_undo_dry_run_tells_the_core_nothing(daemon: Daemon, dataset: AtWork) -> None:
    """Nothing happened that it could hear of."""
    reply = done(answer(daemon, undo(dataset, 1, 2, dry_run=True)))
    assert len(reply["undone"]) == 2
    assert dataset.told == []
    assert (dataset.layout.root / "Dataset/red/a.png").exists()


def test_undo_image_that_stayed_is_not_told_as_moved(daemon: Daemon, dataset: AtWork) -> None:
    """A file that was changed since stays, and the reply says why."""
    (dataset.layout.root / "Dataset/red/a.png").write_bytes(b"retouched")
    (one,) = done(answer(daemon, undo(dataset, 1)))["undone"]
    assert one["restored"] is None
    assert "changed since" in one["message"]
    assert dataset.told == []


def test_release_reaches_journal_and_core(daemon: Daemon, dataset: AtWork) -> None:
    """A released file is forgotten by the journal's holds and set free in the core."""
    done(answer(daemon, undo(dataset, 1, 2)))
    dataset.told.clear()
    path = str(dataset.layout.root / "Images/a.png")
    assert answer(daemon, {"do": "release", "datasets": None, "path": path}) == {"released": {"Colours": 1}}
    assert answer(daemon, {"do": "release", "datasets": ["Colours"], "path": None}) == {"released": {"Colours": 1}}
    assert dataset.told == [Released(path), Released(None)]
    assert dataset.journal.history.held() == {}


def test_control_release_of_a_file_leaves_the_dataset_held(daemon: Daemon, dataset: AtWork) -> None:
    """The reply says that nothing moves yet, and why."""
    done(answer(daemon, undo(dataset, 1)))
    dataset.told.clear()
    dataset.held_because = "all would go to review"
    path = str(dataset.layout.root / "Images/a.png")
    told = answer(daemon, {"do": "release", "datasets": None, "path": path})
    assert told == {"released": {"Colours": 1}, "still_held": {"Colours": "all would go to review"}}
    assert dataset.held_because is not None


@pytest.mark.parametrize("whole", [True, False])
def test_control_release_of_a_held_dataset_says_so(daemon: Daemon, dataset: AtWork, *, whole: bool) -> None:
    """By its folder it is let go alone, without a path with its held files."""
    done(answer(daemon, undo(dataset, 1)))
    dataset.told.clear()
    dataset.held_because = "all would go to review"
    path = str(dataset.layout.root) if whole else None
    told = answer(daemon, {"do": "release", "datasets": None, "path": path})
    assert told == {"released": {"Colours": 0 if whole else 1}, "lifted": {"Colours": "all would go to review"}}
    assert dataset.held_because is None
    assert len(dataset.journal.history.held()) == (1 if whole else 0)


def test_release_path_of_another_dataset_releases_nothing(daemon: Daemon, dataset: AtWork) -> None:
    """Only the dataset that it lies in is asked."""
    elsewhere = {"do": "release", "datasets": None, "path": "/elsewhere/a.png"}
    dataset.held_because = "all would go to review"
    assert answer(daemon, elsewhere) == {"released": {"Colours": 0}}
    assert dataset.told == []
    assert dataset.held_because is not None


def test_rebuild_is_passed_on(daemon: Daemon, dataset: AtWork) -> None:
    """With and without force, for one dataset or all."""
    assert answer(daemon, {"do": "rebuild", "datasets": None, "force": False}) == {"rebuilding": ["Colours"]}
    answer(daemon, {"do": "rebuild", "datasets": ["Colours"], "force": True})
    assert dataset.rebuilds == [False, True]


def test_answer_unknown_dataset_or_record_is_an_error(daemon: Daemon, dataset: AtWork, tmp_path: Path) -> None:
    """Another dataset, another place of it, or a record that the journal does not have."""
    with pytest.raises(DataError, match="has no dataset 'Other'"):
        answer(daemon, {"do": "rebuild", "datasets": ["Other"], "force": False})
    moved = {"Colours": {"root": str(tmp_path), "records": [1]}}
    with pytest.raises(DataError, match="works on"):
        done(answer(daemon, {"do": "undo", "datasets": moved, "dry_run": False}))
    with pytest.raises(DataError, match="no record 99"):
        done(answer(daemon, undo(dataset, 99)))
    with pytest.raises(DataError, match="no record"):
        done(answer(daemon, undo(dataset, 1, 10**6)))


def test_answer_about_a_held_dataset_says_why_it_is_held(daemon: Daemon) -> None:
    """Whoever asks hears the cause, not that there is no such dataset."""
    layout = Layout(Path("Bad"))
    held = Daemon(daemon.by_name, held={"Bad": Held(layout, JournalError(), "its journal is damaged", 0.0, 0.0)})
    with pytest.raises(StorageError, match="the dataset 'Bad' is held: its journal is damaged"):
        answer(held, {"do": "rebuild", "datasets": ["Bad"], "force": False})


@pytest.mark.parametrize("ask", ["undo", "release", "rebuild"])
def test_answer_journal_that_fails_holds_its_dataset(
    daemon: Daemon, dataset: AtWork, monkeypatch: pytest.MonkeyPatch, ask: str
) -> None:
    """Whatever is asked: the daemon learns which dataset failed, and whoever asks learns why."""
    journal = dataset.opened.journal
    monkeypatch.setattr(dataset, "rebuild", lambda *, force: journal.note("forced", str(force)))
    requests: dict[str, dict[str, object]] = {
        "undo": undo(dataset, 1),
        "release": {"do": "release", "datasets": None, "path": None},
        "rebuild": {"do": "rebuild", "datasets": None, "force": True},
    }
    journal.close()
    with pytest.raises(JournalError):
        done(answer(daemon, requests[ask]))
    assert daemon.failed == ["Colours"]


@pytest.mark.parametrize(
    "records", [[10**30], [0], [-1], [[1]], ["1"], [1.0], [None], [True], {"1": 1}, "1", None, [1, 10**30]]
)
def test_undo_of_what_is_no_record_is_refused(daemon: Daemon, dataset: AtWork, records: object) -> None:
    """Nothing is undone of a request of which a part makes no sense."""
    wanted = {"Colours": {"root": str(dataset.layout.root), "records": records}}
    with pytest.raises(ValueError, match=r"is not a record|requires root and records"):
        done(answer(daemon, {"do": "undo", "datasets": wanted, "dry_run": False}))
    assert (dataset.layout.root / "Dataset/red/a.png").exists()


def test_assign_ends_when_a_disk_of_the_dataset_is_gone(
    daemon: Daemon, dataset: AtWork, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be unmounted between two steps: nothing is moved into the empty folder below it."""
    monkeypatch.setattr("sortd.daemon.assign.AT_ONCE", 1)
    images = []
    for number in range(2):
        path = dataset.layout.area(Area.REVIEW) / f"{number}.png"
        picture("red", number).save(path)
        mark = stamp(str(path))
        assert mark is not None
        images.append(image_facts(str(path), mark))
    where = {"dataset": "Colours", "root": str(dataset.layout.root)}
    steps = answer(daemon, {"do": "assign", **where, "label": "red", "images": images})
    assert isinstance(steps, Generator)
    next(steps)
    next(steps)
    monkeypatch.setattr(Presence, "problem", lambda _: "is the disk mounted?")
    with pytest.raises(LayoutError, match=r"is the disk mounted\?; 1 images were assigned before"):
        next(steps)
    assert os.listdir(dataset.layout.area(Area.REVIEW)) == ["1.png"]


def test_undo_in_a_dataset_that_another_sortd_took_is_refused(daemon: Daemon, dataset: AtWork, tmp_path: Path) -> None:
    """Two processes would move files; a dry run moves none."""
    shutil.rmtree(dataset.layout.marker)
    dataset.layout.make()
    with lock_dataset(dataset.layout, tmp_path / "other"):
        with pytest.raises(AlreadyRunningError, match="another sortd works on"):
            done(answer(daemon, undo(dataset, 1)))
        assert len(done(answer(daemon, undo(dataset, 1, dry_run=True)))["undone"]) == 1
    assert len(done(answer(daemon, undo(dataset, 1)))["undone"]) == 1


def test_undo_of_a_record_named_twice_undoes_it_once(daemon: Daemon, dataset: AtWork) -> None:
    """The second time there would be nothing to put back."""
    reply = done(answer(daemon, undo(dataset, 1, 1)))
    assert [one["restored"] is not None for one in reply["undone"]] == [True]


@pytest.mark.parametrize("request_", [{}, {"do": "dance"}, {"do": "undo"}, {"do": "rebuild", "datasets": "all"}])
def test_nonsense_is_refused(daemon: Daemon, request_: dict[str, object]) -> None:
    """Only what is known is done."""
    with pytest.raises(RequestError):
        answer(daemon, request_)
