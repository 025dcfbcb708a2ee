"""Control does in the daemon what undo, release and rebuild ask for, and tells the core before any watcher can."""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from sortd.errors import AlreadyRunningError, DataError
from sortd.journaling.history import History
from sortd.layout import Layout
from sortd.messages import Event, ImageGone, ImageHeld, Released
from sortd.running.control import answer
from sortd.running.filing import Filing
from sortd.running.holding import Holding, hold
from sortd.running.requests import RequestError
from sortd.watching.scanning import stamp
from tests.daemon_process import make_dataset
from tests.filed_images import file_images


@dataclass
class AtWork:
    """A dataset of a daemon, with the real filing and journal, that writes down what its core is told."""

    holding: Holding
    told: list[Event] = field(default_factory=list)
    rebuilds: list[bool] = field(default_factory=list)
    name: str = "Colours"

    @property
    def layout(self) -> Layout:
        """Its folders."""
        return self.holding.layout

    @property
    def filing(self) -> Filing:
        """What moves its files."""
        return self.holding.filing

    @property
    def history(self) -> History:
        """What its journal can be asked."""
        return self.holding.journal.history

    def lock_problem(self) -> str | None:
        """Why another sortd has it now."""
        return self.holding.lock_problem()

    def receive(self, event: Event) -> None:
        """Write it down."""
        self.told.append(event)

    def rebuild(self, *, force: bool) -> None:
        """Write it down."""
        self.rebuilds.append(force)


@dataclass(frozen=True)
class Daemon:
    """As much of a daemon as control sees."""

    datasets: Mapping[str, AtWork]
    signs_of_life: list[int] = field(default_factory=list)

    def show_life(self) -> None:
        """Count."""
        self.signs_of_life.append(1)


@pytest.fixture
def dataset(tmp_path: Path) -> Iterator[AtWork]:
    """A dataset at work into which two images were filed."""
    folder = make_dataset(tmp_path / "Data")
    file_images(folder, tmp_path / "state", {"a.png": "red", "b.png": "blue"})
    with hold(Layout(folder), tmp_path / "state") as holding:
        yield AtWork(holding)


@pytest.fixture
def daemon(dataset: AtWork) -> Daemon:
    """A daemon with that dataset."""
    return Daemon({"Colours": dataset})


def undo(dataset: AtWork, *records: int, dry_run: bool = False) -> dict[str, object]:
    """Return a request to undo these records."""
    wanted = {"Colours": {"root": str(dataset.layout.root), "records": list(records)}}
    return {"do": "undo", "datasets": wanted, "dry_run": dry_run, "expires_at": 0}


def test_an_undone_image_is_held_before_it_can_be_seen(daemon: Daemon, dataset: AtWork) -> None:
    """The core hears that the file left its class and that its new place is not work."""
    root = dataset.layout.root
    reply = answer(daemon, undo(dataset, 1))
    (one,) = reply["undone"]
    assert (one["was"], one["restored"]) == (str(root / "Dataset/red/a.png"), str(root / "Images/a.png"))
    mark = stamp(str(root / "Images/a.png"))
    assert mark is not None
    held = ImageHeld(str(root / "Images/a.png"), replace(mark, ctime_ns=0))  # the journal does not know that time
    assert dataset.told == [ImageGone(str(root / "Dataset/red/a.png")), held]


def test_a_long_undo_shows_that_it_gets_on(daemon: Daemon, dataset: AtWork, monkeypatch: pytest.MonkeyPatch) -> None:
    """The watchdog is fed after each chunk, newest first, and all of it is told in one answer."""
    monkeypatch.setattr("sortd.running.control.CHUNK", 1)
    reply = answer(daemon, undo(dataset, 1, 2))
    assert [one["id"] for one in reply["undone"]] == [2, 1]
    assert len(daemon.signs_of_life) == 2


def test_a_dry_run_tells_the_core_nothing(daemon: Daemon, dataset: AtWork) -> None:
    """Nothing happened that it could hear of."""
    reply = answer(daemon, undo(dataset, 1, 2, dry_run=True))
    assert len(reply["undone"]) == 2
    assert dataset.told == []
    assert (dataset.layout.root / "Dataset/red/a.png").exists()


def test_what_stayed_is_not_told_as_moved(daemon: Daemon, dataset: AtWork) -> None:
    """A file that was changed since stays, and the reply says why."""
    (dataset.layout.root / "Dataset/red/a.png").write_bytes(b"retouched")
    (one,) = answer(daemon, undo(dataset, 1))["undone"]
    assert one["restored"] is None
    assert "changed since" in one["message"]
    assert dataset.told == []


def test_release_reaches_journal_and_core(daemon: Daemon, dataset: AtWork) -> None:
    """A released file is forgotten by the journal's holds and set free in the core."""
    answer(daemon, undo(dataset, 1, 2))
    dataset.told.clear()
    path = str(dataset.layout.root / "Images/a.png")
    assert answer(daemon, {"do": "release", "datasets": None, "path": path}) == {"released": {"Colours": 1}}
    assert answer(daemon, {"do": "release", "datasets": ["Colours"], "path": None}) == {"released": {"Colours": 1}}
    assert dataset.told == [Released(path), Released(None)]
    assert dataset.filing.held() == {}


def test_a_path_of_another_dataset_releases_nothing(daemon: Daemon, dataset: AtWork) -> None:
    """Only the dataset that it lies in is asked."""
    elsewhere = {"do": "release", "datasets": None, "path": "/elsewhere/a.png"}
    assert answer(daemon, elsewhere) == {"released": {"Colours": 0}}
    assert dataset.told == []


def test_rebuild_is_passed_on(daemon: Daemon, dataset: AtWork) -> None:
    """With and without force, for one dataset or all."""
    assert answer(daemon, {"do": "rebuild", "datasets": None, "force": False}) == {"rebuilding": ["Colours"]}
    answer(daemon, {"do": "rebuild", "datasets": ["Colours"], "force": True})
    assert dataset.rebuilds == [False, True]


def test_what_is_not_there_is_an_error(daemon: Daemon, dataset: AtWork, tmp_path: Path) -> None:
    """Another dataset, another place of it, or a record that the journal does not have."""
    with pytest.raises(DataError, match="has no dataset 'Other'"):
        answer(daemon, {"do": "rebuild", "datasets": ["Other"], "force": False})
    moved = {"Colours": {"root": str(tmp_path), "records": [1]}}
    with pytest.raises(DataError, match="works on"):
        answer(daemon, {"do": "undo", "datasets": moved, "dry_run": False})
    with pytest.raises(DataError, match="no record 99"):
        answer(daemon, undo(dataset, 99))


@pytest.mark.parametrize(
    "records", [[10**30], [0], [-1], [[1]], ["1"], [1.0], [None], [True], {"1": 1}, "1", None, [1, 10**30]]
)
def test_undo_of_what_is_no_record_is_refused(daemon: Daemon, dataset: AtWork, records: object) -> None:
    """Nothing is undone of a request of which a part makes no sense."""
    wanted = {"Colours": {"root": str(dataset.layout.root), "records": records}}
    with pytest.raises(RequestError):
        answer(daemon, {"do": "undo", "datasets": wanted, "dry_run": False})
    assert (dataset.layout.root / "Dataset/red/a.png").exists()


def test_undo_in_a_dataset_that_another_sortd_took_is_refused(daemon: Daemon, dataset: AtWork, tmp_path: Path) -> None:
    """Two processes would move files; a dry run moves none."""
    shutil.rmtree(dataset.layout.marker)
    dataset.layout.make()
    with hold(dataset.layout, tmp_path / "other"):
        with pytest.raises(AlreadyRunningError, match="another sortd works on"):
            answer(daemon, undo(dataset, 1))
        assert len(answer(daemon, undo(dataset, 1, dry_run=True))["undone"]) == 1
    assert len(answer(daemon, undo(dataset, 1))["undone"]) == 1


def test_undo_of_a_record_named_twice_undoes_it_once(daemon: Daemon, dataset: AtWork) -> None:
    """The second time there would be nothing to put back."""
    reply = answer(daemon, undo(dataset, 1, 1))
    assert [one["restored"] is not None for one in reply["undone"]] == [True]


@pytest.mark.parametrize("request_", [{}, {"do": "dance"}, {"do": "undo"}, {"do": "rebuild", "datasets": "all"}])
def test_nonsense_is_refused(daemon: Daemon, request_: dict[str, object]) -> None:
    """Only what is known is done."""
    with pytest.raises(RequestError):
        answer(daemon, request_)
