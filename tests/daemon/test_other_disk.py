"""A real sortd with folders on another file system: long copies hold up nobody and end at once at a stop."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.command_line import sortd
from tests.daemon_process import DaemonProcess, draw_strangers, make_dataset, picture, running, teach, tree

Write = Callable[..., Path]

LONG_BYTES = 400 << 30
"""Of a film that is one hole: it takes no room, and longer to hash than any test waits."""


@pytest.fixture
def tiny_clip() -> str:
    """No model is loaded: the program of these tests has an encoder of its own."""
    return "packaged"


@pytest.fixture
def other_disk(colours: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """``Dataset/``, or the area that a test names, on a file system of its own."""
    place = colours / getattr(request, "param", "Dataset")
    place.mkdir(exist_ok=True)
    if shutil.which("mount") is None:
        pytest.skip("there is no mount(8) here")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def drop(folder: Path, name: str, colour: str = "red", seed: int = 1001) -> Path:
    """Write a picture of one colour into a folder."""
    picture(colour, seed).save(folder / name)
    return folder / name


def drop_long(folder: Path, name: str = "long") -> tuple[Path, Path]:
    """Put a Live Photo into a folder: a picture and a film that takes very long to copy."""
    with (folder / f"{name}.mov").open("wb") as film:
        film.truncate(LONG_BYTES)
    return drop(folder, f"{name}.png"), folder / f"{name}.mov"


def parts(place: Path) -> list[Path]:
    """Return the copies that are not published."""
    return [path for path in place.rglob(".sortd-*.part") if path.exists()]


@contextlib.contextmanager
def manager(tmp_path: Path) -> Iterator[tuple[socket.socket, dict[str, str]]]:
    """Listen as systemd does; the environment makes sortd feed a watchdog of two seconds."""
    address = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(os.fspath(address))
        listener.setblocking(False)
        yield listener, {"NOTIFY_SOCKET": os.fspath(address), "WATCHDOG_USEC": "2000000"}


def pings(listener: socket.socket) -> int:
    """Count the pings that have come since."""
    count = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            count += listener.recv(4096) == b"WATCHDOG=1"
    return count


@pytest.mark.usefixtures("other_disk")
def test_daemon_images_are_copied_and_undone_across_disks(colours: Path, write_config: Write) -> None:
    """Filed on the other disk with a line each, nothing left behind; companions travel; names are not overwritten."""
    taken = colours / "Dataset" / "red" / "0.png"
    taken.parent.mkdir()
    taken.write_bytes(b"the user's own")
    with running(write_config()) as daemon:
        for number in range(90):
            drop(colours / "Images", f"{number}.png", seed=number)
        (colours / "Images" / "7.png.xmp").write_text("note")
        daemon.wait_for("image.filed", count=90)
        assert daemon.events("image.filed")[0]["move_ms"] > 0
        assert daemon.stop() == 0
        assert daemon.events("move.failed") == []
    assert taken.read_bytes() == b"the user's own"
    names = {path.name for path in (colours / "Dataset").rglob("*") if path.is_file()}
    assert names == {*(f"{number}.png" for number in range(90)), "0 (2).png", "7.png.xmp"}
    assert not any((colours / "Images").iterdir())


@pytest.mark.parametrize("other_disk", ["Images", "Dataset", "Review", "Rejected"], indirect=True)
@pytest.mark.usefixtures("other_disk")
def test_daemon_with_any_folder_on_another_disk_moves_and_undoes_all_kinds(
    colours: Path, write_config: Write, tmp_path: Path
) -> None:
    """Filed, sent to Review/ and rejected, with a companion, and put back: whichever folder has a disk of its own."""
    teach(colours)
    made = tmp_path / "made"
    made.mkdir()
    (made / "a.png.xmp").write_text("note")
    broken = drop(made, "a.png").read_bytes()[:2000]
    (made / "broken.png").write_bytes(broken)
    draw_strangers(made, 2)
    config = write_config(mode="best", abstain="{precision: 0.95}")
    with running(config) as daemon:
        for path in sorted(made.iterdir(), key=lambda path: path.suffix != ".xmp"):
            # `copy` would change the file once more after it was closed, and a move of it may fail then.
            shutil.copyfile(path, colours / "Images" / path.name)
        for event, count in (("image.filed", 1), ("image.sent_to_review", 2), ("image.rejected", 1)):
            daemon.wait_for(event, count=count)
        assert tree(colours / "Images") == {}
        moved = {folder: tree(colours / folder) for folder in ("Dataset", "Review", "Rejected")}
        assert moved["Dataset"] == {f"red/{name}": (made / name).read_bytes() for name in ("a.png", "a.png.xmp")}
        assert sorted(moved["Review"].values()) == sorted(path.read_bytes() for path in made.glob("stranger*"))
        assert sorted(moved["Rejected"]) == ["broken.png", "broken.png.reason.json"]
        assert sortd("undo", "--last", "4", "-c", config).code == 0
        daemon.wait_for("move.undone", count=4)
        assert daemon.stop() == 0
        assert daemon.events("move.failed") == []
    assert tree(colours / "Images") == tree(made)
    assert not any(tree(colours / folder) for folder in ("Dataset", "Review", "Rejected"))


@pytest.mark.parametrize("other_disk", ["Review"], indirect=True)
@pytest.mark.usefixtures("other_disk")
def test_daemon_decides_an_image_in_review_on_another_disk_again(colours: Path, write_config: Write) -> None:
    """The source is seen to be gone before its copy has been told of; the image is not forgotten for that."""
    teach(colours)
    config = write_config(mode="best", abstain="{precision: 0.95}")
    with running(config) as daemon:
        draw_strangers(colours / "Images", 5)
        daemon.wait_for("image.sent_to_review", count=5)
        write_config()
        daemon.send(signal.SIGHUP)
        daemon.wait_for("image.filed", count=5)
        assert daemon.stop() == 0
    assert len([path for path in (colours / "Dataset").rglob("*") if path.is_file()]) == 5
    assert not [path for path in (colours / "Review").rglob("*") if path.is_file()]


def test_daemon_long_copy_delays_nothing_and_ends_at_a_stop(
    colours: Path, other_disk: Path, write_config: Write, tmp_path: Path
) -> None:
    """Another dataset's images are filed and the watchdog is fed meanwhile; at a stop all is where it was."""
    beside = make_dataset(tmp_path / "Data", "Beside")
    with (
        manager(tmp_path) as (listener, environment),
        running(
            write_config(), NOTIFY_SOCKET=environment["NOTIFY_SOCKET"], WATCHDOG_USEC=environment["WATCHDOG_USEC"]
        ) as daemon,
    ):
        long = drop_long(colours / "Images")
        daemon.wait_until(lambda: bool(parts(other_disk)), "the copy is under way")
        pings(listener)
        drop(beside / "Images", "a.png", "blue")
        daemon.wait_for("image.filed", dataset="Beside")
        daemon.wait_until(lambda: pings(listener) > 0, "the watchdog is fed")
        daemon.wait_until(lambda: pings(listener) > 0, "the watchdog is fed again")
        assert parts(other_disk)
        assert daemon.stop() == 0
        assert daemon.events("move.failed", failure="busy")
        assert not daemon.events("thread.died")
    assert [path.exists() for path in long] == [True, True]
    assert [path.name for path in other_disk.rglob("*.png")] == []
    assert parts(other_disk) == []


def test_daemon_copy_interrupted_by_a_kill_is_recovered_at_the_next_start(
    colours: Path, other_disk: Path, write_config: Write
) -> None:
    """The part of the copy is thrown away, and the image goes where it belongs once its film can go too."""
    config = write_config()
    with running(config) as daemon:
        picture_of_it, film = drop_long(colours / "Images")
        daemon.wait_until(lambda: bool(parts(other_disk)), "the copy is under way")
        daemon.send(signal.SIGKILL)
        daemon.wait()
    left = parts(other_disk)
    assert left
    os.truncate(film, 5_000)
    with DaemonProcess(config, "once") as again:
        assert again.wait() == 0, again.tail()
        assert again.events("image.filed", path=str(picture_of_it))
    assert parts(other_disk) == []
    assert sorted(path.name for path in other_disk.rglob("*") if path.is_file()) == ["long.mov", "long.png"]
    assert (other_disk / "red" / "long.mov").stat().st_size == 5_000
    assert list((colours / "Images").iterdir()) == []


def test_daemon_dataset_that_disappears_during_a_copy_is_closed(
    colours: Path, other_disk: Path, write_config: Write, tmp_path: Path
) -> None:
    """Its copy is interrupted, the others are served, and back again it is taken up."""
    beside = make_dataset(tmp_path / "Data", "Beside")
    with running(write_config()) as daemon:
        drop_long(colours / "Images")
        daemon.wait_until(lambda: bool(parts(other_disk)), "the copy is under way")
        away = tmp_path / "away"
        colours.rename(away)
        daemon.wait_for("dataset.gone", dataset="Colours")
        drop(beside / "Images", "a.png", "blue")
        daemon.wait_for("image.filed", dataset="Beside")
        away.rename(colours)
        daemon.wait_for("dataset.added", count=3)
        daemon.wait_until(lambda: bool(parts(other_disk)), "the copy begins anew")
        assert daemon.stop() == 0
    assert parts(other_disk) == []
    assert (colours / "Images" / "long.png").exists()
