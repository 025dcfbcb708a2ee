"""A real sortd with a dataset for each action: originals stay, none is decided twice, and people still correct it."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sortd.api.dataset import open_dataset
from tests.command_line import sortd, write_config
from tests.daemon_process import DaemonProcess, draw_strangers, make_dataset, picture, running, teach

ACTIONS = ("copy", "hardlink", "symlink", "keywords")
FOLDERS = ("copy", "hardlink")  # with a copy or a link in Review/
BROKEN = b"\x89PNG\r\n\x1a\n broken"


def names(dataset: Path, area: str) -> list[str]:
    """Return the files below a folder of a dataset."""
    return sorted(str(path.relative_to(dataset / area)) for path in (dataset / area).rglob("*") if not path.is_dir())


def moves(config: Path, path: Path) -> list[dict[str, Any]]:
    """Return the moves of an image of Images/, newest first."""
    with open_dataset(path.parents[1], config=config) as dataset:
        return dataset.history(path=path)


def put(dataset: Path, name: str, colour: str = "red", seed: int = 9001) -> Path:
    """Put a picture into Images/ in one step."""
    path = dataset / "Images" / name
    path.parent.mkdir(exist_ok=True)
    beside = dataset / f"{path.stem}.new.png"
    picture(colour, seed, patches=40).save(beside)
    beside.replace(path)
    return path


def facts_of(config: Path, dataset: str) -> dict[str, Any]:
    """Return a dataset's entry in the status."""
    facts: dict[str, Any] = json.loads(sortd("status", "--json", "-c", str(config)).out)["datasets"][dataset]
    return facts


def wait_for_rescan(daemon: DaemonProcess, config: Path, dataset: Path) -> None:
    """Wait until each file was inspected by another scan."""
    wanted = facts_of(config, dataset.name)["files_looked_at"] + 2 * len(names(dataset, "Images"))
    daemon.wait_until(lambda: facts_of(config, dataset.name)["files_looked_at"] >= wanted, "a scan")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets with references, one for each action, with what does not become filed: a stranger and a broken image."""
    folder = tmp_path_factory.mktemp("actions")
    for action in ACTIONS:
        dataset = make_dataset(folder / "Data", action)
        teach(dataset)
        draw_strangers(dataset / "Images", 1)
        (dataset / "Images/broken.png").write_bytes(BROKEN)
    datasets = {action: {"action": action} for action in ACTIONS}
    write_config(folder, settle_seconds=0.1, rescan_seconds=1, datasets=datasets)
    return folder / "Data"


@pytest.fixture(scope="module")
def config(root: Path) -> Path:
    """The configuration of all."""
    return root.parent / "config.yaml"


@pytest.fixture(scope="module")
def daemon(config: Path) -> Iterator[DaemonProcess]:
    """One sortd that all tests share."""
    with running(config, keeps_files=False) as process:
        yield process


@pytest.mark.parametrize("action", ACTIONS)
def test_daemon_action_files_an_image_once(root: Path, config: Path, daemon: DaemonProcess, action: str) -> None:
    """Not again after a rescan, a change of the references or a reload; a new version is decided anew."""
    dataset = root / action
    path = put(dataset, "once.png")
    (dataset / "Images/once.txt").write_text("notes")
    daemon.wait_for("image.filed", path=str(path), action=action)
    generations = len(daemon.events("prototypes.rebuilt", dataset=action))
    picture("green", 77, patches=40).save(dataset / "Clases/green/new.png")
    daemon.wait_for("prototypes.rebuilt", count=generations + 1, dataset=action)
    daemon.send(signal.SIGHUP)
    daemon.wait_for("prototypes.rebuilt", count=generations + 2, dataset=action)
    wait_for_rescan(daemon, config, dataset)
    assert len(moves(config, path)) == 1
    assert "once.png" in names(dataset, "Images")
    assert ("red/once.png" in names(dataset, "Dataset")) == (action != "keywords")
    assert ("once.png.xmp" in names(dataset, "Images")) == (action == "keywords")
    put(dataset, "once.png", seed=9002)
    daemon.wait_for("image.filed", count=2, path=str(path))
    filed = [name for name in names(dataset, "Dataset") if name.startswith("red/once") and name.endswith(".png")]
    # A symbolic link shows the new version; a hard link and a copy keep the former one.
    assert len(filed) == {"copy": 2, "hardlink": 2, "symlink": 1, "keywords": 0}[action]


@pytest.mark.parametrize("action", ACTIONS)
def test_daemon_image_without_class_stays(root: Path, config: Path, daemon: DaemonProcess, action: str) -> None:
    """A stranger gets a file in Review/ if the action makes files; a broken image is left; the status says why."""
    dataset, stranger = root / action, root / action / "Images/stranger000.png"
    event = "image.sent_to_review" if action in FOLDERS else "image.left"
    daemon.wait_for(event, path=str(stranger))
    daemon.wait_for("image.left", path=str(dataset / "Images/broken.png"), refusal="unreadable")
    assert stranger.exists()
    assert (dataset / "Images/broken.png").read_bytes() == BROKEN
    assert names(dataset, "Review") == (["_none/stranger000.png"] if action in FOLDERS else [])
    assert names(dataset, "Rejected") == []

    def reasons() -> dict[str, int]:
        found: dict[str, int] = facts_of(config, action)["left"]["reasons"]  # of other tests, too
        return {reason: found.get(reason, 0) for reason in ("unreadable", "abstained")}

    expected = {"unreadable": 1, "abstained": int(action not in FOLDERS)}
    daemon.wait_until(lambda: reasons() == expected, "the status")


@pytest.mark.parametrize("action", FOLDERS)
def test_daemon_copy_moved_by_a_person_is_a_correction(root: Path, daemon: DaemonProcess, action: str) -> None:
    """A copy or a hard link is known at its new place; the original stays."""
    dataset = root / action
    path = put(dataset, "moved.png", "blue", 9010)
    daemon.wait_for("image.filed", path=str(path))
    there = dataset / "Dataset/green/moved.png"
    there.parent.mkdir(exist_ok=True)
    (dataset / "Dataset/blue/moved.png").rename(there)
    daemon.wait_for("image.corrected", path=str(there), label="blue", corrected_label="green")
    assert path.exists()


@pytest.mark.parametrize("action", FOLDERS)
def test_daemon_copy_in_review_can_be_assigned(root: Path, config: Path, daemon: DaemonProcess, action: str) -> None:
    """What is in Review/ is sortd's own file: it moves to the class, and back; the original stays."""
    dataset = root / action
    daemon.wait_for("image.sent_to_review", path=str(dataset / "Images/stranger000.png"))
    copy = dataset / "Review/_none/stranger000.png"
    assert sortd("assign", str(copy), "red", "-c", str(config)).code == 0
    assert "red/stranger000.png" in names(dataset, "Dataset")
    assert sortd("undo", str(dataset / "Dataset/red/stranger000.png"), "-c", str(config)).code == 0
    assert copy.exists()
    assert (dataset / "Images/stranger000.png").exists()


@pytest.mark.parametrize("action", ACTIONS)
def test_daemon_undo_holds_the_original(root: Path, config: Path, daemon: DaemonProcess, action: str) -> None:
    """The copy, the link or the keywords are gone, and it is not filed again until it is released."""
    dataset = root / action
    path = put(dataset, "undone.png", "blue", 9020)
    there = Path(daemon.wait_for("image.filed", path=str(path))["destination"])
    reply = json.loads(sortd("undo", str(there), "--json", "-c", str(config)).out)
    wait_for_rescan(daemon, config, dataset)
    daemon.wait_until(lambda: bool(moves(config, path)[-1]["undone_by"]), f"the undo {reply}")
    assert os.path.lexists(there) == (action == "keywords")
    assert path.exists()
    assert not (dataset / "Images/undone.png.xmp").exists()
    assert len(daemon.events("image.filed", path=str(path))) == 1
    assert sortd("release", str(path), "-c", str(config)).code == 0
    daemon.wait_for("image.filed", count=2, path=str(path))


def test_once_other_action_leaves_what_was_filed(tmp_path: Path) -> None:
    """After a change of the action, images that were filed in place stay, and others get the new action."""
    dataset = make_dataset(tmp_path / "Data")
    first, second = put(dataset, "first.png"), dataset / "Images/second.png"
    for action in ("copy", "move"):
        config = write_config(tmp_path, settle_seconds=0.1, abstain="off", action=action)
        with DaemonProcess(config, "once") as process:
            assert process.wait() == 0
        assert first.exists()
        put(dataset, "second.png", "green", 9030)
    assert names(dataset, "Images") == ["first.png", "second.png"]
    with DaemonProcess(config, "once") as process:
        assert process.wait() == 0
    assert (first.exists(), second.exists()) == (True, False)
    assert names(dataset, "Dataset") == ["green/second (2).png", "green/second.png", "red/first.png"]
