"""A running sortd removes old moves and emptied folders while nothing else is to be done, once a day."""

import os
import time
from pathlib import Path

import pytest

from sortd.config import read_config
from sortd.daemon.upkeep import DAY_SECONDS, UPKEEP_FACT
from sortd.events import Moved
from sortd.layout import JOURNAL_FILE, Layout
from sortd.moving.mover import Mover
from sortd.store.history import History
from sortd.store.journal import Journal
from tests.command_line import sortd, write_config
from tests.daemon_process import make_dataset, running, tree
from tests.filing_world import order

LONG_AGO = time.time() - 40 * DAY_SECONDS


def file_long_ago(dataset: Path, state: Path, *names: str) -> list[Path]:
    """File images 40 days ago, as the journal and the folders say, and return where they are."""
    layout = Layout(dataset)
    layout.make()
    now = LONG_AGO

    def clock() -> float:
        nonlocal now
        now += 1
        return now

    places = []
    with Journal(layout.state_folder(state) / JOURNAL_FILE, clock=clock) as journal:
        mover = Mover(dataset, journal)
        for name in names:
            path = dataset / "Images" / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(name.encode())
            (answer,) = mover.move_all([order(path, "Dataset/red")])
            assert isinstance(answer, Moved)
            places.append(Path(answer.destination))
            if path.parent != dataset / "Images":
                os.utime(path.parent, (now, now))
    return places


def test_upkeep_removes_old_moves_and_emptied_folders(tmp_path: Path) -> None:
    """The daemon says so in its log; a moved image is a correction first; all files stay."""
    dataset = make_dataset(tmp_path / "Data")
    keys = {"journal": "{keep: 30d}", "emptied_folders": "remove", "settle_seconds": 0.2, "abstain": "off"}
    config = write_config(tmp_path, mode="max", **keys)
    gone, corrected, there, *_ = file_long_ago(
        dataset, tmp_path / "state", "gone.jpg", "moved.jpg", "day/there.jpg", "newest.jpg"
    )
    gone.unlink()
    (dataset / "Dataset" / "blue").mkdir()
    corrected.rename(dataset / "Dataset" / "blue" / "moved.jpg")
    files = tree(dataset)
    with running(config) as daemon:
        assert daemon.wait_for("journal.pruned")["records"] == 1
        assert daemon.wait_for("folder.removed")["path"] == str(dataset / "Images" / "day")
        daemon.wait_until(lambda: upkeep_at(dataset, tmp_path) > 0, "the end of the upkeep")
    assert not (dataset / "Images" / "day").exists()
    assert tree(dataset).items() >= {name: one for name, one in files.items() if not name.startswith(".")}.items()
    moves = sortd("history", "-c", config, "--json").facts["moves"]
    assert {Path(one["to"]).name for one in moves} == {"moved.jpg", "there.jpg", "newest.jpg"}
    assert there.exists()
    assert "corrected" in {one["outcome"] for one in moves}


def upkeep_at(dataset: Path, folder: Path) -> int:
    """Return when the last upkeep was completed."""
    config = read_config(folder / "config.yaml", {"HOME": "/nonexistent"})
    with History.open(Layout(dataset).state_folder(config.state_dir) / JOURNAL_FILE) as history:
        return history.number(UPKEEP_FACT)


def test_prune_command_counts_first_and_finds_corrections_before_it_removes(tmp_path: Path) -> None:
    """Without a daemon, what a person moved meanwhile is recorded, and only what is gone is forgotten."""
    dataset = make_dataset(tmp_path / "Data")
    config = write_config(tmp_path, journal="{keep: 30d}")
    gone, corrected, *_ = file_long_ago(dataset, tmp_path / "state", "gone.jpg", "moved.jpg", "there.jpg", "new.jpg")
    gone.unlink()
    (dataset / "Dataset" / "blue").mkdir()
    corrected.rename(dataset / "Dataset" / "blue" / "moved.jpg")
    listed = sortd("history", "--prune", "--dry-run", "-c", config, "--json").facts
    assert (listed["dry_run"], listed["datasets"]["Colours"]["records"]) == (True, 2)  # the correction is not known yet
    assert len(sortd("history", "-c", config, "--json").facts["moves"]) == 4
    done = sortd("history", "--prune", "-c", config, "--json").facts["datasets"]["Colours"]
    assert (done["records"], done["kept"]) == (1, 2)
    assert sortd("history", "-c", config, "--json", "--outcome", "corrected").facts["moves"][0]["label"] == "blue"
    status = sortd("status", "-c", config, "--json").facts["datasets"]["Colours"]
    assert status["total"] == {"filed": 4}
    assert "0 moves removed" in sortd("history", "--prune", "-c", config).out


def test_prune_command_is_refused_where_nothing_may_be_removed(tmp_path: Path) -> None:
    """``keep: forever`` and a missing disk are no reasons to forget."""
    dataset = make_dataset(tmp_path / "Data")
    config = write_config(tmp_path, journal="{keep: forever}")
    file_long_ago(dataset, tmp_path / "state", "a.jpg", "b.jpg")
    assert sortd("history", "--prune", "-c", config).code == 65
    config = write_config(tmp_path, journal="{keep: 30d}")
    (dataset / ".sortd").rename(tmp_path / "aside")
    refused = sortd("history", "--prune", "-c", config)
    assert refused.code != 0
    assert "is the disk mounted?" in refused.err
    assert sortd("history", "--dry-run", "-c", config).code == 2


def test_prune_command_removes_nothing_if_the_disk_goes_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The images of a missing disk are not gone; reading all places of a large dataset takes minutes."""
    dataset = make_dataset(tmp_path / "Data")
    config = write_config(tmp_path, journal="{keep: 30d}")
    file_long_ago(dataset, tmp_path / "state", "a.jpg", "b.jpg", "c.jpg")

    def unmount(*_: object) -> None:
        dataset.rename(tmp_path / "aside")
        dataset.mkdir()

    monkeypatch.setattr("sortd.commands.history.record_all_places", unmount)
    refused = sortd("history", "--prune", "-c", config)
    assert "is the disk mounted?" in refused.err
    dataset.rmdir()
    (tmp_path / "aside").rename(dataset)
    assert len(sortd("history", "-c", config, "--json").facts["moves"]) == 3
