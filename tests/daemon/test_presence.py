"""Presence: a dataset whose disk, or one of whose disks, is not mounted is absent, not empty."""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sortd.daemon.control import undo_records
from sortd.daemon.dataset_lock import APART_FACT, Presence
from sortd.layout import Layout
from sortd.moving.mover import Mover
from sortd.store.journal import Journal
from tests.daemon_process import picture, running, tree
from tests.filing_world import Dataset, done, moved, order

Write = Callable[..., Path]


@contextmanager
def disk(place: Path) -> Iterator[None]:
    """Mount a file system of its own for a while; skip where that is not allowed."""
    if shutil.which("mount") is None:
        pytest.skip("there is no mount(8) here")
    place.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        pytest.skip(f"mounting is not allowed here: {run.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_presence_dataset_of_another_sortd_is_a_problem(dataset: Dataset, journal: Journal) -> None:
    """Nothing is moved where two would move it."""
    (dataset.root / ".sortd").mkdir()
    said: list[str | None] = ["another sortd works on it", None]
    presence = Presence(Layout(dataset.root), journal, lock_problem=said.pop)
    assert presence.problem() is None
    assert presence.problem() == "another sortd works on it"


def test_presence_dataset_without_marker_is_missing(dataset: Dataset, journal: Journal) -> None:
    """The sentence names the marker and what makes it; whoever only rehearses needs none."""
    presence = Presence(Layout(dataset.root), journal)
    said = presence.problem()
    assert said is not None
    assert f"{dataset.root}/.sortd is missing" in said
    assert "sortd init" in said
    (dataset.root / ".sortd").mkdir()
    assert presence.problem() is None
    assert Presence(Layout(dataset.folder), journal, needs_marker=False).problem() is None


def test_presence_unmounted_disk_of_a_folder_is_missing(dataset: Dataset, journal: Journal) -> None:
    """Also after a start, and with its mount point gone; until it is back, or something stands in its place."""
    layout, place = Layout(dataset.root), dataset.root / "Dataset"
    with disk(place):
        presence = Presence(layout, journal, needs_marker=False)
        assert presence.problem() is None
        assert journal.history.fact(APART_FACT) == "Dataset"
    for one in (presence, Presence(layout, journal, needs_marker=False)):
        said = one.problem()
        assert said is not None
        assert f"{place} was on another disk" in said
    place.rmdir()
    assert presence.problem() is not None
    with disk(place):
        assert presence.problem() is None
    (place / "cat").mkdir()
    assert presence.problem() is None
    assert journal.history.fact(APART_FACT) == ""


def test_undo_empty_mount_point_gets_no_file(dataset: Dataset, journal: Journal) -> None:
    """An inbox whose disk is away: the undo says so, and works when the disk is back."""
    (dataset.root / "Images").rmdir()
    filing = Mover(dataset.root, journal, absence=Presence(Layout(dataset.root), journal).absent_folder)
    with disk(dataset.root / "Images"):
        filed = moved(filing, order(dataset.put("Images/a.jpg")))
        assert filing.preview_undo(done(journal))[0].restored == f"{dataset.root}/Images/a.jpg"
    identifiers = [record.id for record in done(journal)]
    for is_dry in (True, False):
        (((told,), later),) = undo_records(filing, journal.history, identifiers, dry_run=is_dry)
        assert (told.restored, later) == (None, 0)
        assert "is the disk mounted" in told.message
    assert Path(filed).exists()
    with disk(dataset.root / "Images"):
        (((told,), _),) = undo_records(filing, journal.history, identifiers, dry_run=False)
        assert told.restored == f"{dataset.root}/Images/a.jpg"


@pytest.mark.parametrize("tiny_clip", ["packaged"])
def test_daemon_empty_mount_point_gets_no_file_until_mounted(
    tiny_clip: str, colours: Path, write_config: Write
) -> None:
    """Dataset/ on a disk that is away, while it runs and at a start: images wait, it says why, and files them later."""
    del tiny_clip
    inbox, place = colours / "Images", colours / "Dataset"
    inbox.mkdir(exist_ok=True)
    config = write_config()
    with disk(place), running(config, keeps_files=False) as daemon:
        picture("red", 1).save(inbox / "a.png")
        daemon.wait_for("image.filed")
        subprocess.run(["umount", "--lazy", str(place)], check=True)
        picture("red", 2).save(inbox / "b.png")
        line = daemon.wait_for("prototypes.rebuild_failed", moving=False)
        assert str(place) in line["error"]
        assert daemon.stop() == 0
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(place)], check=True)
    assert tree(place) == {}
    with running(config, keeps_files=False) as daemon:
        assert tree(place) == {}
        assert set(tree(inbox)) == {"b.png"}
        with disk(place):
            daemon.wait_for("image.filed", path=str(inbox / "b.png"))
            assert set(tree(place)) == {"red/b.png"}
            assert daemon.stop() == 0
    assert tree(place) == {}
