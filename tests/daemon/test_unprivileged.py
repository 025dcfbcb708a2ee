"""A real sortd that may not read everything, as root may: what it has no right to waits, is said, and ends nothing."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.daemon_process import DaemonProcess, picture, tree

Write = Callable[..., Path]

WITHOUT_PRIVILEGE = ("setpriv", "--bounding-set=-dac_override,-dac_read_search,-lease")
"""Root without these capabilities may do what the modes of files say: capabilities(7)."""


@pytest.fixture
def tiny_clip() -> str:
    """No model is loaded: the program of these tests has an encoder of its own."""
    return "packaged"


@contextmanager
def unprivileged(config: Path) -> Iterator[DaemonProcess]:
    """Run sortd without the right to read everything; skip where root cannot give it away."""
    under: tuple[str, ...] = ()
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("there is no setpriv(1) here, by which root would give its rights away")
        tried = subprocess.run([*WITHOUT_PRIVILEGE, "true"], capture_output=True, text=True, check=False)
        if tried.returncode:
            pytest.skip(f"root may not give its rights away here: {tried.stderr.strip()}")
        under = WITHOUT_PRIVILEGE
    with DaemonProcess(config, under=under) as daemon:
        daemon.wait_for("daemon.ready")
        yield daemon


def drop(folder: Path, name: str, mode: int) -> Path:
    """Put a picture into a folder under a hidden name, give it a mode, and let it appear."""
    folder.mkdir(exist_ok=True)
    hidden = folder / f".{name}"
    picture("red", 1001).save(hidden, format="PNG")
    hidden.chmod(mode)
    return hidden.rename(folder / name)


def test_run_dataset_that_may_not_be_written_is_held_until_it_may(colours: Path, write_config: Write) -> None:
    """The error is logged once, other datasets work, and the dataset is opened once it is writable."""
    bad = colours.parent / "Bad"
    shutil.copytree(colours / "Clases", bad / "Clases")
    bad.chmod(0o555)
    with unprivileged(write_config()) as daemon:
        line = daemon.wait_for("dataset.held", dataset="Bad")
        assert "cannot be created: Permission denied" in line["error"]
        drop(colours / "Images", "a.png", 0o644)
        daemon.wait_for("image.filed", dataset="Colours")
        bad.chmod(0o755)
        daemon.wait_for("dataset.added", dataset="Bad")
        assert len(daemon.events("dataset.held")) == 1


def test_run_image_without_read_permission_is_filed_once_it_has_it(colours: Path, write_config: Write) -> None:
    """It is logged once and tried after each scan, while other images are filed."""
    inbox = colours / "Images"
    with unprivileged(write_config(rescan_seconds=1)) as daemon:
        denied = drop(inbox, "denied.png", 0)
        line = daemon.wait_for("image.left", path=str(denied))
        assert line["refusal"] == "denied"
        assert "no permission" in line["reason"]
        for number in range(2):  # two more scans pass at least: what is dropped now settles longer than a second
            drop(inbox, f"{number}.png", 0o644)
            daemon.wait_for("image.filed", path=str(inbox / f"{number}.png"))
        assert len(daemon.events("image.left")) == 1
        denied.chmod(0o600)
        daemon.wait_for("image.filed", path=str(denied))
        assert daemon.stop() == 0
    assert set(tree(colours / "Dataset")) == {"red/0.png", "red/1.png", "red/denied.png"}


def test_run_class_folder_without_read_permission_is_logged(colours: Path, write_config: Write) -> None:
    """Its corrections are not seen, and images of other classes are filed."""
    secret = colours / "Dataset" / "green"
    secret.mkdir(parents=True)
    later = time.time() + 3600
    os.utime(secret, (later, later))  # changed, whenever a scan looks at it
    secret.chmod(0)
    inbox = colours / "Images"
    with unprivileged(write_config(rescan_seconds=1)) as daemon:
        daemon.wait_for("scan.unreadable", path=str(secret), count=2)
        drop(inbox, "a.png", 0o644)
        daemon.wait_for("image.filed", path=str(inbox / "a.png"))
        assert daemon.stop() == 0
    secret.chmod(0o755)


def test_run_inbox_without_write_permission_keeps_its_images(colours: Path, write_config: Write) -> None:
    """The move fails with its reason, and succeeds once the folder is writable."""
    inbox = colours / "Images"
    image = drop(inbox, "a.png", 0o644)
    inbox.chmod(0o555)
    with unprivileged(write_config()) as daemon:
        line = daemon.wait_for("move.failed", path=str(image))
        assert line["failure"] == "source"
        assert "files cannot be removed from Images: give sortd write permission for this folder" in line["error"]
        assert image.exists()
        inbox.chmod(0o755)
        daemon.wait_for("image.filed", path=str(image))
        assert daemon.stop() == 0
