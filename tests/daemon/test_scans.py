"""What lies in Images/ and is not handled, or not yet: what a dataset looks at, asks for and says of it."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic

import pytest
from structlog.testing import capture_logs

from sortd.classify.types import DecisionSettings
from sortd.core.sorter import SorterSettings
from sortd.core.state import State
from sortd.daemon.dataset import Dataset
from sortd.daemon.dataset_lock import DryRunMover, OpenDataset, Presence
from sortd.daemon.metrics import Metrics
from sortd.daemon.references import ReferenceSettings
from sortd.daemon.reporting import DatasetLog
from sortd.daemon.scans import LEFT_SECONDS, LeftFiles
from sortd.daemon.worker import Answer, EmbedJob, Job
from sortd.events import DatasetId, ImageHeld, ImageRefused, Refusal
from sortd.files import stamp_of
from sortd.layout import Layout
from sortd.store.journal import Journal
from sortd.watch.watcher import FileEvent, path_meant


class World:
    """A dataset that settles at once, and what was asked of its worker."""

    def __init__(self, root: Path, journal: Journal) -> None:
        """Make the folders of a dataset below ``root``."""
        self.root = root
        self.asked: list[Job] = []
        (root / "Clases" / "red").mkdir(parents=True)
        Layout(root).make()
        self.dataset = Dataset(
            DatasetId("Cars"),
            OpenDataset(
                Layout(root),
                journal,
                DryRunMover(root, journal, lambda *_: None),
                Presence(Layout(root), journal),
            ),
            SorterSettings(settle_seconds=0.0),
            ReferenceSettings(DecisionSettings()),
            ask=self.asked.append,
            metrics=Metrics(),
        )

    def scan(self) -> None:
        """Carry out a whole scan, and all looks that are due."""
        self.dataset.scans.begin()
        while self.dataset.scans.is_under_way:
            self.dataset.scans.continue_inbox()
        self.pass_time()

    def hint(self, path: Path) -> None:
        """Hand on what the watcher would say of a path."""
        about = path_meant(os.fspath(path), os.fspath(self.root), is_folder=path.is_dir())
        if about is not None:
            self.dataset.file_event(FileEvent(about, closed=False, directory=path.is_dir()))
        self.pass_time()

    def pass_time(self) -> None:
        """Let what is due be done, and what is left out be told of."""
        self.dataset.tick(monotonic())
        self.dataset.scans.left_files.tell(at_once=True)

    def embedded(self) -> set[str]:
        """Return the names of the images that were to be embedded."""
        return {os.path.basename(path) for job in self.asked if isinstance(job, EmbedJob) for path, _ in job.images}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """An empty dataset."""
    with Journal(tmp_path / "journal.sqlite", run="run") as journal:
        yield World(tmp_path / "Cars", journal)


LEFT: dict[str, Callable[[Path], None]] = {
    "symbolic_link": lambda path: path.symlink_to("/nowhere"),
    "special_file": os.mkfifo,
    "hidden": Path.touch,
    "unfinished": Path.mkdir,
    "backup": Path.touch,
}
NAMES = {
    "symbolic_link": "link.png",
    "special_file": "pipe.png",
    "hidden": ".facebook_1.jpg",
    "unfinished": "2019.temp",
    "backup": "mine~",
}


@pytest.mark.parametrize(
    ("reason", "how"),
    [*((reason, "scan") for reason in LEFT), *((reason, "hint") for reason in LEFT if reason != "unfinished")],
)
def test_dataset_file_that_is_left_out_is_logged_once(world: World, reason: str, how: str) -> None:
    """Whether a scan or the watcher names it: one line at level info, with the path and the reason."""
    path = world.root / "Images" / NAMES[reason]
    LEFT[reason](path)
    with capture_logs() as lines:
        for _ in range(2):
            world.scan() if how == "scan" else world.hint(path)
    left = [line for line in lines if line["event"] == "image.left"]
    assert [(line["path"], line["refusal"], line["log_level"]) for line in left] == [(str(path), reason, "info")]
    assert left[0]["reason"]
    assert not world.embedded()


def test_dataset_facts_of_files_that_were_looked_into_are_of_those_that_stand_there(world: World) -> None:
    """What is no image is counted and listed while it stands in the inbox, with what was said of it."""
    path = world.root / "Images" / "notes.txt"
    path.touch()
    world.scan()
    refused = ImageRefused(str(path), stamp_of(path.lstat()), Refusal.NOT_AN_IMAGE, "it is a text")
    world.dataset.answer(Answer(DatasetId("Cars"), (refused,)))
    file = {"path": str(path), "reason": "not_an_image", "message": "it is a text"}
    assert world.dataset.facts()["left"] == {"reasons": {"not_an_image": 1}, "files": [file]}
    path.unlink()
    world.hint(path)
    assert world.dataset.facts()["left"] == {"reasons": {}, "files": []}


def test_dataset_unfinished_download_waits_until_its_control_file_is_gone(world: World) -> None:
    """An image of full size with holes is not looked into while its control file stands beside it."""
    image, control = world.root / "Images" / "a.png", world.root / "Images" / "a.png.aria2"
    image.write_bytes(b"\x89PNG" + bytes(5000))
    control.touch()
    with capture_logs() as lines:
        world.scan()
        world.hint(image)
        world.hint(control)
    assert not world.embedded()
    assert [line["refusal"] for line in lines if line.get("path") == str(image)] == ["unfinished"]
    assert world.dataset.sorter.is_drained or world.dataset.sorter.rebuilds.is_pending
    control.unlink()
    world.hint(control)
    assert world.embedded() == {"a.png"}


def test_dataset_unfinished_download_of_a_folder_waits(world: World) -> None:
    """A torrent has one control file beside its folder, for all files in it."""
    folder = world.root / "Images" / "holiday"
    (folder / "day").mkdir(parents=True)
    (folder / "day" / "a.png").write_bytes(b"\x89PNG")
    (world.root / "Images" / "holiday.aria2").touch()
    world.scan()
    assert not world.embedded()


def test_left_files_that_are_renamed_soon_are_not_told_of(tmp_path: Path) -> None:
    """Many programs write under a hidden name and rename: that is no line in the log."""
    hidden, stays = tmp_path / "Images" / ".a.png", tmp_path / "Images" / ".b.png"
    hidden.parent.mkdir()
    now = [100.0]
    with capture_logs() as lines:
        left = LeftFiles(str(tmp_path), DatasetLog("Cars", Metrics()), clock=lambda: now[0])
        assert left.deadline == float("inf")
        for path in (hidden, stays):
            path.touch()
            assert left.takes(str(path))
        left.tell()
        assert left.deadline == 100.0 + LEFT_SECONDS
        assert not lines
        hidden.rename(hidden.with_name("a.png"))
        now[0] += LEFT_SECONDS
        left.tell()
    assert [line["path"] for line in lines] == [str(stays)]


def test_tell_missing_file_that_is_back_with_its_disk_stays_held(world: World, tmp_path: Path) -> None:
    """A file that was looked for while the dataset was away, which is back when that is told, is not forgotten."""
    path = world.root / "Images" / "undone.png"
    path.write_bytes(b"an image")
    world.dataset.receive(ImageHeld(os.fspath(path), stamp_of(path.lstat())))
    world.root.rename(tmp_path / "away")
    world.dataset.scans.look(os.fspath(path), closed=False)
    (tmp_path / "away").rename(world.root)
    for _ in range(2):
        world.pass_time()
    assert [image.path for image in world.dataset.sorter.images.in_state(State.HELD)] == [os.fspath(path)]
    path.unlink()
    world.dataset.scans.look(os.fspath(path), closed=False)
    world.pass_time()
    assert len(world.dataset.sorter.images) == 0
