"""What makes sorters do a thing twice, for ever or never, met by a real sortd; docs/failure-modes.md is the table."""

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.daemon_process import DaemonProcess, make_dataset, picture, running, tree

Write = Callable[..., Path]


@pytest.fixture
def tiny_clip() -> str:
    """No model is loaded: the program of these tests has an encoder of its own."""
    return "packaged"


def drop(folder: Path, colour: str, name: str, seed: int = 1001) -> Path:
    """Write a picture of one colour into a folder."""
    picture(colour, seed).save(folder / name)
    return folder / name


def outcomes(daemon: DaemonProcess) -> list[str]:
    """Return the events that were logged about images."""
    return [line["event"] for line in daemon.lines if line["event"].startswith("image.")]


@contextmanager
def mounted(place: Path, *arguments: str) -> Iterator[None]:
    """Mount something for a while; skip where that is not allowed."""
    if shutil.which("mount") is None:
        pytest.skip("there is no mount(8) here")
    done = subprocess.run(["mount", *arguments, str(place)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


class TestOneOutcome:
    """A version of a file has one outcome, however often it is hinted at."""

    def test_a_file_that_is_hinted_at_again_and_again_is_filed_once(self, colours: Path, write_config: Write) -> None:
        """Opened, touched, its mode changed and renamed while it settles: one move, one line, no noise."""
        with running(write_config(settle_seconds=1)) as daemon:
            path = drop(colours / "Images", "red", "a.png")
            for number in range(20):
                path.chmod(0o600 + 0o40 * (number % 2))
                path.open("ab").close()
                os.utime(path)
                renamed = path.with_name(f"{number}.png")
                path.rename(renamed)
                path = renamed
            daemon.wait_for("image.filed")
            drop(colours / "Images", "blue", "later.png")
            daemon.wait_for("image.filed", count=2)
            assert daemon.stop() == 0
            assert outcomes(daemon) == ["image.filed"] * 2
            assert not daemon.events("move.failed")
        assert sorted(tree(colours / "Dataset")) == ["blue/later.png", "red/19.png"]

    def test_a_restart_does_nothing_again(self, colours: Path, write_config: Write) -> None:
        """What is filed stays filed: the next start says nothing of it and changes no byte, name or time."""
        for number in range(20):
            drop(colours / "Images", "green", f"{number}.png", number)
        config = write_config()
        with DaemonProcess(config, "once") as daemon:
            assert daemon.wait() == 0
            assert len(daemon.events("image.filed")) == 20

        def filed() -> dict[str, tuple[int, int]]:
            return {str(p): (p.stat().st_ino, p.stat().st_mtime_ns) for p in sorted((colours / "Dataset").rglob("*"))}

        before = filed()
        with DaemonProcess(config, "once") as daemon:
            assert daemon.wait() == 0
            assert outcomes(daemon) == []
        assert filed() == before

    def test_what_sortd_wrote_is_never_its_input(self, colours: Path, write_config: Write) -> None:
        """Dataset/, Review/ and Rejected/ are no inbox, nor is anything that lies beside Images/."""
        for place in ("Dataset/red", "Review/red", "Rejected", "Photos", "."):
            (colours / place).mkdir(parents=True, exist_ok=True)
            drop(colours / place, "green", "stays.png")
        with running(write_config(rescan_seconds=1), SORTD_LOG__LEVEL="debug") as daemon:
            drop(colours / "Images", "green", "moves.png")
            daemon.wait_for("image.filed")
            daemon.wait_for_scans()
            assert daemon.stop() == 0
            assert outcomes(daemon) == ["image.filed"]
        assert len(tree(colours / "Dataset" / "green")) == 1
        for place in ("Dataset/red", "Review/red", "Rejected", "Photos", "."):
            assert (colours / place / "stays.png").exists()

    def test_the_same_content_twice_is_two_images(self, colours: Path, write_config: Write) -> None:
        """A duplicate is the user's: neither deleted nor left behind nor merged with the first."""
        with running(write_config()) as daemon:
            content = drop(colours / "Images", "red", "a.png").read_bytes()
            daemon.wait_for("image.filed")
            (colours / "Images" / "a.png").write_bytes(content)
            (colours / "Images" / "b.png").write_bytes(content)
            daemon.wait_for("image.filed", count=3)
        assert tree(colours / "Dataset") == dict.fromkeys(["red/a (2).png", "red/a.png", "red/b.png"], content)

    def test_a_name_that_was_used_before_serves_for_new_content(self, colours: Path, write_config: Write) -> None:
        """Nothing is known by its name alone: another image under an old name is another one, also after a restart."""
        config = write_config()
        for colour in ("red", "green"):
            drop(colours / "Images", colour, "a.png")
            with DaemonProcess(config, "once") as daemon:
                assert daemon.wait() == 0
        assert sorted(tree(colours / "Dataset")) == ["green/a.png", "red/a.png"]


class TestFailingDestinations:
    """The move cannot be done now."""

    def test_a_destination_in_the_way_is_tried_again_with_patience_and_heals(
        self, colours: Path, write_config: Write
    ) -> None:
        """A file stands where the class folder must be: few lines, hardly any work, and in the end all is filed."""
        (colours / "Dataset").mkdir()
        (colours / "Dataset" / "red").write_text("in the way")
        with running(write_config(settle_seconds=0.3)) as daemon:
            began = datetime.now(UTC)
            image = drop(colours / "Images", "red", "a.png")
            drop(colours / "Images", "green", "b.png")
            line = daemon.wait_for("move.failed")
            assert (line["path"], line["failure"]) == (str(image), "destination")
            daemon.wait_for("image.filed", label="green")
            daemon.wait_for("move.failed", count=3)
            times = [datetime.fromisoformat(line["timestamp"]) for line in daemon.events("move.failed")]
            # The pauses are 1 and 2 seconds at least, after 0.3 to settle; a busy machine writes any line late.
            assert times[1] - began >= timedelta(seconds=1.3)
            assert times[2] - began >= timedelta(seconds=3.3)
            assert image.exists()
            (colours / "Dataset" / "red").unlink()
            daemon.wait_for("image.filed", label="red")
        assert sorted(tree(colours / "Dataset")) == ["green/b.png", "red/a.png"]

    def test_once_waits_for_no_destination_for_ever(self, colours: Path, write_config: Write) -> None:
        """It files what can be filed, tries the rest for some seconds, and says that it stays, by its exit code too."""
        (colours / "Dataset").mkdir()
        (colours / "Dataset" / "red").write_text("in the way")
        for name, colour in (("a.png", "red"), ("b.png", "green"), ("c.png", "red")):
            drop(colours / "Images", colour, name)
        with DaemonProcess(write_config(), "once") as daemon:
            assert daemon.wait() == 73
            assert "2 in Colours" in daemon.wait_for("daemon.failed")["error"]
        assert sorted(tree(colours / "Images")) == ["a.png", "c.png"]
        assert sorted(tree(colours / "Dataset")) == ["green/b.png", "red"]

    def test_one_failing_class_does_not_starve_the_others(self, colours: Path, write_config: Write) -> None:
        """Two hundred images that cannot move lie before and after a few that can: these do not wait for ever."""
        (colours / "Dataset").mkdir()
        (colours / "Dataset" / "red").write_text("in the way")
        second = make_dataset(colours.parent, "Second")
        with running(write_config()) as daemon:
            for number in range(105):
                drop(colours / "Images", "green" if 50 <= number < 55 else "red", f"{number:03}.png", number)
            for number in range(105, 205):
                drop(colours / "Images", "red", f"{number:03}.png", number)
            drop(second / "Images", "red", "elsewhere.png")
            daemon.wait_for("image.filed", dataset="Second")
            daemon.wait_for("image.filed", dataset="Colours", count=5)
        assert len(tree(colours / "Images")) == 200

    def test_a_full_disk_loses_nothing_and_heals(self, colours: Path, write_config: Write) -> None:
        """Dataset/ on a disk of its own that is full: the image stays, no part of it is left, it is filed later."""
        (colours / "Dataset").mkdir()
        with mounted(colours / "Dataset", "-t", "tmpfs", "-o", "size=1m", "tmpfs"):
            stuffing = colours / "Dataset" / ".stuffing"
            with stuffing.open("wb") as file:
                file.write(bytes((1 << 20) - (64 << 10)))
            picture("red", 1, (300, 200)).save(colours / "Images" / "a.png")
            content = (colours / "Images" / "a.png").read_bytes()
            assert len(content) > 64 << 10
            with running(write_config()) as daemon:
                assert daemon.wait_for("move.failed")["failure"] == "destination"
                assert (colours / "Images" / "a.png").read_bytes() == content
                assert set(tree(colours / "Dataset")) == {".stuffing"}
                stuffing.unlink()
                daemon.wait_for("image.filed")
                assert daemon.stop() == 0
            assert tree(colours / "Dataset") == {"red/a.png": content}
        assert not tree(colours / "Images")

    def test_a_source_that_cannot_be_removed_is_not_copied_again_and_again(
        self, colours: Path, write_config: Write
    ) -> None:
        """An inbox mounted read-only: told, tried again with patience and without a copy, and filed in the end."""
        image = drop(colours / "Images", "red", "a.png")
        content = image.read_bytes()
        inbox = colours / "Images"
        with mounted(inbox, "--bind", str(inbox)):
            subprocess.run(["mount", "-o", "remount,ro,bind", str(inbox)], check=True)
            with running(write_config()) as daemon:
                daemon.wait_for("move.failed", count=3)
                assert image.read_bytes() == content
                assert "files cannot be removed from Images" in daemon.events("move.failed")[-1]["error"]
                assert not tree(colours / "Dataset")
                subprocess.run(["mount", "-o", "remount,rw,bind", str(inbox)], check=True)
                assert daemon.wait_for("image.filed")["label"] == "red"
                assert daemon.stop() == 0
        assert tree(colours / "Dataset") == {"red/a.png": content}
        assert not tree(inbox)


class TestConfirmedSuccess:
    """Nothing is remembered as done before it is."""

    def test_what_failed_before_a_restart_is_done_after_it(self, colours: Path, write_config: Write) -> None:
        """A move that failed leaves no mark that would make the next run pass the file by."""
        (colours / "Dataset").mkdir()
        (colours / "Dataset" / "red").write_text("in the way")
        config = write_config()
        drop(colours / "Images", "red", "a.png")
        with running(config) as daemon:
            daemon.wait_for("move.failed")
            daemon.stop(signal.SIGKILL)
        (colours / "Dataset" / "red").unlink()
        with DaemonProcess(config, "once") as daemon:
            assert daemon.wait() == 0
        assert sorted(tree(colours / "Dataset")) == ["red/a.png"]

    def test_a_file_that_came_while_nobody_watched_is_filed(self, colours: Path, write_config: Write) -> None:
        """Dropped between two runs: the start-up scan does not ask what was known before."""
        config = write_config()
        with running(config) as daemon:
            drop(colours / "Images", "red", "a.png")
            daemon.wait_for("image.filed")
            daemon.stop()
        drop(colours / "Images", "green", "b.png")
        with running(config) as daemon:
            assert daemon.wait_for("image.filed")["label"] == "green"
