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


def test_daemon_late_film_follows_its_photo(colours: Path, write_config: Write) -> None:
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


def test_daemon_note_that_waits_for_its_image_is_not_logged(colours: Path, write_config: Write) -> None:
    """Neither a line nor a count says that they were left; what belongs to no image here is told of."""
    inbox, filed = colours / "Images", colours / "Dataset" / "red"
    for name in ("a.txt", "a.png.Xmp", "a.png.supplemental-met.json", "b.txt"):
        (inbox / name).write_text("a note")
    (inbox / "a.json").touch()
    drop(inbox, "a.png")
    with running(write_config()) as daemon:
        daemon.wait_for("image.filed", path=str(inbox / "a.png"))
        daemon.wait_for("image.left", path=str(inbox / "b.txt"))
        assert daemon.stop() == 0
        assert [line["path"] for line in daemon.events("image.left")] == [str(inbox / "b.txt")]
    assert {path.name for path in filed.iterdir()} == {
        *("a.json", "a.png", "a.png.Xmp", "a.png.supplemental-met.json", "a.txt")
    }


def test_daemon_companions_follow_an_image_moved_by_a_person(colours: Path, write_config: Write) -> None:
    """While sortd runs, and by the next run where it did not."""
    inbox, red, blue = colours / "Images", colours / "Dataset" / "red", colours / "Dataset" / "blue"
    blue.mkdir(parents=True)
    (inbox / "a.mov").write_text("the film")
    drop(inbox, "a.png")
    with running(write_config()) as daemon:
        daemon.wait_for("image.filed")
        (red / "a.png").rename(blue / "a.png")
        line = daemon.wait_for("companion.followed", path=str(red / "a.mov"))
        assert line["destination"] == str(blue / "a.mov")
        assert daemon.stop() == 0
    (blue / "a.png").rename(red / "b.png")
    with DaemonProcess(write_config(), "once") as again:
        assert again.wait() == 0
        assert again.events("companion.followed", destination=str(red / "b.mov"))
    assert (red / "b.mov").read_text() == "the film"


def test_daemon_rejected_image_repaired_in_place_is_filed(colours: Path, write_config: Write) -> None:
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
