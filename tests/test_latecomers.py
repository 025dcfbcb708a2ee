"""A real sortd, and what comes or changes after its image was handled: late companions, mended images."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.daemon_process import DaemonProcess, picture, running

Write = Callable[..., Path]


@pytest.fixture
def tiny_clip() -> str:
    """No model is loaded: the program of these tests has an encoder of its own."""
    return "packaged"


def drop(folder: Path, name: str, colour: str = "red", seed: int = 1001) -> Path:
    """Write a picture of one colour into a folder."""
    picture(colour, seed).save(folder / name)
    return folder / name


def test_a_film_that_comes_after_its_photo_follows_it(colours: Path, write_config: Write) -> None:
    """Moved to its image with a line of its own, now and after a restart; what belongs to nobody stays."""
    inbox, filed = colours / "Images", colours / "Dataset" / "red"
    with running(write_config()) as daemon:
        drop(inbox, "live.png")
        daemon.wait_for("image.filed")
        (inbox / "live.mov").write_bytes(b"the film")
        (inbox / "other.mov").write_bytes(b"another film")
        line = daemon.wait_for("companion.followed", path=str(inbox / "live.mov"))
        assert line["reason"] == "belongs to Dataset/red/live.png"
        daemon.wait_for("image.left", path=str(inbox / "other.mov"))
        assert daemon.stop() == 0
    assert (filed / "live.mov").read_bytes() == b"the film"
    (inbox / "live.png.xmp").write_bytes(b"a note")
    with DaemonProcess(write_config(), "once") as again:
        assert again.wait() == 0
        assert again.events("companion.followed", destination=str(filed / "live.png.xmp"))
    assert sorted(path.name for path in inbox.iterdir()) == ["other.mov"]


def test_a_rejected_image_that_is_mended_where_it_lies_is_filed(colours: Path, write_config: Write) -> None:
    """Heard of while sortd runs, found when it did not; each broken version is tried once; its reason goes with it."""
    inbox, rejected = colours / "Images", colours / "Rejected"
    for name in ("a.png", "b.png"):
        whole = drop(inbox, name).read_bytes()
        (inbox / name).write_bytes(whole[: len(whole) // 2])
    with running(write_config()) as daemon:
        daemon.wait_for("image.rejected", count=2)
        (rejected / "a.png").write_bytes(whole[: len(whole) // 3])
        daemon.wait_for("image.left", path=str(rejected / "a.png"), refusal="unreadable")
        drop(rejected, "a.png")
        assert daemon.wait_for("image.filed")["path"] == str(rejected / "a.png")
        (rejected / "b.png").write_bytes(whole[: len(whole) // 4])
        daemon.wait_for("image.left", path=str(rejected / "b.png"))
        assert daemon.stop() == 0
        assert len(daemon.events("image.rejected")) == 2
    assert sorted(path.name for path in rejected.iterdir()) == ["b.png", "b.png.reason.json"]
    with DaemonProcess(write_config(), "once") as again:
        assert again.wait() == 0
        assert not again.events("image.left")
    drop(rejected, "b.png", "blue")
    with DaemonProcess(write_config(), "once") as again:
        assert again.wait() == 0
        assert again.events("image.filed", label="blue")
    assert list(rejected.iterdir()) == []
