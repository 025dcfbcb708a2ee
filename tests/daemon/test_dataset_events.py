"""A dataset at work: what hints cost, by a real journal and real folders; what the worker is asked is only noted."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import time_ns
from typing import cast

import pytest

from sortd.classify.types import DecisionSettings
from sortd.core.sorter import SorterSettings
from sortd.core.state import State
from sortd.daemon.dataset import Dataset
from sortd.daemon.dataset_lock import OpenDataset, Presence, lock_dataset
from sortd.daemon.metrics import Metrics
from sortd.daemon.references import ReferenceSettings
from sortd.daemon.worker import EmbedJob, Job
from sortd.events import DatasetId, ImageHeld, Inspect, Mode
from sortd.layout import Layout
from sortd.watch.scan import stamp, still_seconds
from sortd.watch.watcher import FileEvent
from tests.daemon_process import make_dataset


@dataclass
class AtWork:
    """A dataset with its opened."""

    dataset: Dataset
    opened: OpenDataset

    @property
    def root(self) -> Path:
        """The dataset's folder."""
        return self.dataset.layout.root

    @property
    def looked_at(self) -> int:
        """How many files it has looked at."""
        return cast(int, self.dataset.facts()["files_looked_at"])

    def turns(self) -> None:
        """Give it turns until it has nothing to look at."""
        while self.dataset.has_more_to_look_at:
            self.dataset.tick(0.0)
            self.dataset.continue_looking()

    def looks_for(self, *hints: FileEvent) -> int:
        """Return how many files it looks at for some hints that came together."""
        before = self.looked_at
        for hint in hints:
            self.dataset.file_event(hint)
        self.turns()
        return self.looked_at - before


def new_dataset(layout: Layout, opened: OpenDataset, asked: list[Job], settle_seconds: float = 3600.0) -> Dataset:
    """Return a dataset in which, by default, nothing settles; its worker only takes notes."""
    return Dataset(
        DatasetId(layout.name, 1),
        opened,
        SorterSettings(settle_seconds=settle_seconds),
        ReferenceSettings(DecisionSettings(Mode.MAX, None)),
        ask=asked.append,
        metrics=Metrics(),
    )


@pytest.fixture
def at_work(tmp_path: Path) -> Iterator[AtWork]:
    """A dataset that has been scanned, with nothing to do."""
    layout, asked = Layout(make_dataset(tmp_path / "Data")), list[Job]()
    layout.make()
    with lock_dataset(layout, tmp_path / "state") as opened:
        dataset = new_dataset(layout, opened, asked)
        dataset.begin()
        at_work = AtWork(dataset, opened)
        at_work.turns()
        yield at_work


def folder_of_images(at_work: AtWork, name: str, files: int = 10) -> list[FileEvent]:
    """Make a folder in Images/; return the hints that moving it in would raise."""
    folder = at_work.root / "Images" / name
    folder.mkdir(parents=True)
    paths = [folder / f"{number}.png" for number in range(files)]
    for path in paths:
        path.write_bytes(b"an image")
    return [FileEvent(os.fspath(folder), directory=True), *(FileEvent(os.fspath(path)) for path in paths)]


def test_dataset_moved_in_folders_inspects_each_file_once(at_work: AtWork) -> None:
    """Not a scan of Images/ for each folder, nor a look for each of the hints that follow; nobody is left out."""
    hints = [hint for number in range(40) for hint in folder_of_images(at_work, str(number))]
    assert at_work.looks_for(*hints) == 400
    assert at_work.dataset.sorter.images.waiting == 400
    assert at_work.looks_for(*folder_of_images(at_work, "later")) == 10
    assert at_work.dataset.sorter.images.waiting == 410


def test_dataset_event_of_the_inbox_itself_scans_it(at_work: AtWork) -> None:
    """It was made anew, say."""
    folder_of_images(at_work, "unheard of")
    assert at_work.looks_for(FileEvent(os.fspath(at_work.root / "Images"), directory=True)) == 10


def test_dataset_closed_file_is_inspected_at_once(at_work: AtWork) -> None:
    """A close after writing sets the time from which it must hold still, and cannot wait for the look that is due."""
    path = at_work.root / "Images" / "a.png"
    path.write_bytes(b"an image")
    assert at_work.looks_for(FileEvent(os.fspath(path))) == 1
    assert at_work.looks_for(FileEvent(os.fspath(path))) == 0
    assert at_work.looks_for(FileEvent(os.fspath(path), closed=True)) == 1


def test_dataset_resting_images_of_a_removed_folder_are_forgotten(at_work: AtWork) -> None:
    """By one look at each of them, though a folder that leaves raises one event."""
    hints = folder_of_images(at_work, "album", files=3)
    for hint in hints[1:]:
        mark = stamp(hint.path)
        assert mark is not None
        at_work.dataset.receive(ImageHeld(hint.path, mark))
    (at_work.root / "Images" / "album").rename(at_work.root / "aside")
    at_work.looks_for(hints[0])
    assert len(at_work.dataset.sorter.images) == 0


def test_dataset_event_storm_in_filed_folders_costs_one_scan(at_work: AtWork) -> None:
    """Three thousand folders that are made in Dataset/ begin one look through it, which is noted once."""
    statements: list[str] = []
    at_work.opened.journal.connection.set_trace_callback(statements.append)
    at_work.looks_for(*(FileEvent(f"{at_work.root}/Dataset/{number}", directory=True) for number in range(3000)))
    at_work.opened.journal.connection.set_trace_callback(None)
    assert statements.count("COMMIT") < 5


def test_dataset_settled_files_are_inspected_in_slices(at_work: AtWork) -> None:
    """A turn looks at no more than a slice of them, and none is left out."""
    at_work.dataset.scans._looks.most = 10
    for hint in folder_of_images(at_work, "album", files=35):
        at_work.dataset.file_event(hint)
    at_work.turns()
    for path in list(at_work.dataset.sorter.images._images):
        at_work.dataset._carry_out(Inspect(path))
    before = at_work.looked_at
    at_work.dataset.tick(0.0)
    assert at_work.looked_at - before <= 10
    at_work.turns()
    assert at_work.looked_at - before == 35


def test_dataset_review_is_scanned_in_slices(at_work: AtWork) -> None:
    """Each image costs a question to the journal: a hundred thousand are not asked in one turn."""
    at_work.dataset.scans.review.most = 10
    review = at_work.root / "Review" / "red"
    review.mkdir()
    for number in range(25):
        (review / f"{number}.png").write_bytes(b"an image")
    at_work.dataset.scans.begin_review()
    turns = 0
    while at_work.dataset.has_more_to_look_at:
        at_work.dataset.continue_looking()
        turns += 1
    assert turns >= 3


def test_dataset_presence_is_checked_twice_for_all_missing_files(
    at_work: AtWork, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after they are looked for; not for each of ten thousand names, and not for names nobody knows."""
    hints = folder_of_images(at_work, "album", files=10)
    at_work.looks_for(*hints)
    for hint in hints[1:]:
        os.unlink(hint.path)
    asked: list[None] = []
    problem = Presence.problem

    def counted(presence: Presence) -> str | None:
        asked.append(None)
        return problem(presence)

    monkeypatch.setattr(Presence, "problem", counted)
    for hint in hints[1:]:
        at_work.dataset.file_event(FileEvent(hint.path, closed=True))
        at_work.dataset.file_event(FileEvent(f"{hint.path} unknown"))
    at_work.turns()
    assert len(asked) == 2
    assert len(at_work.dataset.sorter.images) == 0


def test_dataset_files_of_an_absent_dataset_are_not_forgotten(at_work: AtWork) -> None:
    """Absent is not gone; a file that is back before it was told of is not forgotten either."""
    hints = folder_of_images(at_work, "album", files=3)
    at_work.looks_for(*hints)
    away = at_work.root.rename(at_work.root.with_name("away"))
    for hint in hints[1:]:
        at_work.dataset.file_event(FileEvent(hint.path, closed=True))
    at_work.turns()
    assert len(at_work.dataset.sorter.images) == 3
    away.rename(at_work.root)
    first = Path(hints[1].path)
    first.rename(first.with_name("aside.png"))
    at_work.dataset.file_event(FileEvent(hints[1].path, closed=True))
    first.with_name("aside.png").rename(first)
    at_work.dataset.file_event(FileEvent(hints[1].path, closed=True))
    at_work.turns()
    assert len(at_work.dataset.sorter.images) == 3


def test_dataset_first_scan_inspects_still_files_once_and_later_scans_wait(tmp_path: Path) -> None:
    """What has not changed for the settle time at the start is embedded without a second look or a deadline."""
    layout, asked = Layout(make_dataset(tmp_path / "Data")), list[Job]()
    layout.make()
    settle_seconds = 0.05
    with lock_dataset(layout, tmp_path / "state") as opened:
        dataset = new_dataset(layout, opened, asked, settle_seconds)
        at_work = AtWork(dataset, opened)
        for name in ("a.png", "unfinished.png", "written.png"):
            (at_work.root / "Images" / name).write_bytes(b"an image")
        (at_work.root / "Images" / "unfinished.png.aria2").touch()
        wait_until_still(at_work.root / "Images" / "written.png", settle_seconds)
        with (at_work.root / "Images" / "written.png").open("ab"):
            dataset.begin()
            while dataset.scans.is_under_way:
                dataset.continue_looking()
        assert embedded(asked) == ["a.png"]
        assert at_work.looked_at == 3
        (at_work.root / "Images" / "later.png").write_bytes(b"an image")
        wait_until_still(at_work.root / "Images" / "later.png", settle_seconds)
        dataset.scan_all()
        while dataset.scans.is_under_way:
            dataset.continue_looking()
        assert embedded(asked) == ["a.png"]
        assert dataset.sorter.images.counts[State.SETTLING] == 3


def test_dataset_first_images_are_embedded_while_the_scan_goes_on(tmp_path: Path) -> None:
    """The first batch does not wait for the end of the scan."""
    layout, asked = Layout(make_dataset(tmp_path / "Data")), list[Job]()
    layout.make()
    with lock_dataset(layout, tmp_path / "state") as opened:
        dataset = new_dataset(layout, opened, asked, 0.0)
        for number in range(30):
            (layout.root / "Images" / f"{number}.png").write_bytes(b"an image")
        dataset.scans._inbox.whole.most = 10
        dataset.begin()
        while dataset.scans.is_under_way and not embedded(asked):
            dataset.continue_looking()  # a slice may be short: it ends by time, too
        assert embedded(asked)
        assert dataset.scans.is_under_way


def wait_until_still(path: Path, seconds: float) -> None:
    """Wait until the times of a file are so old."""
    mark = stamp(os.fspath(path))
    assert mark is not None
    while still_seconds(mark, time_ns()) < seconds:
        pass


def embedded(asked: list[Job]) -> list[str]:
    """Return the names of the images that the worker was asked to embed."""
    return [os.path.basename(path) for job in asked if isinstance(job, EmbedJob) for path, _ in job.images]
