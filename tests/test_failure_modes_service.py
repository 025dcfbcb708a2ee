"""What breaks long-running services and their models, met by a real sortd; docs/failure-modes.md is the table."""

import json
import os
import select
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import sortd
from tests.daemon_process import COLOURS, PATIENCE_SECONDS, DaemonProcess, make_dataset, picture, running, tree

Write = Callable[..., Path]


@pytest.fixture
def tiny_clip() -> str:
    """No model is loaded: the programs of these tests have encoders of their own."""
    return "packaged"


@pytest.fixture
def break_file(tmp_path: Path) -> Path:
    """Write a word into it and the encoder breaks that way."""
    return tmp_path / "break"


UNLIKE_REFERENCES = 1000
"""From this seed on no picture is one of the references, whose content the cache knows: it waits for the encoder."""


def drop(folder: Path, colour: str, name: str, seed: int = 1001) -> Path:
    """Write a picture of one colour into a folder."""
    picture(colour, seed).save(folder / name)
    return folder / name


def status(config: Path) -> dict[str, Any]:
    """Return what ``sortd status`` says."""
    facts: dict[str, Any] = sortd("status", "--json", "-c", config).facts
    return facts


def queued(config: Path, dataset: str) -> int:
    """Count the images of a dataset that wait for the encoder or are there, as the status file says."""
    images = json.loads((config.parent / "state" / "status.json").read_text())["datasets"][dataset]["images"]
    return int(images["ready"]) + int(images["encoding"])


def children(process: int) -> list[int]:
    """Return the processes that a process has started and that live."""
    found: list[int] = []
    for thread in Path(f"/proc/{process}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended
            found += map(int, (thread / "children").read_text().split())
    return found


class TestDying:
    """What ends, ends at once, says why, and is taken up again."""

    def test_a_worker_that_fails_ends_the_daemon_with_its_reason(
        self, colours: Path, write_config: Write, break_file: Path
    ) -> None:
        """After an error of the card nothing works any more: no half-alive process, the next start does the work."""
        config = write_config()
        with running(config, program="tests.broken_sortd", BREAK_FILE=str(break_file)) as daemon:
            break_file.write_text("raise")
            image = drop(colours / "Images", "red", "a.png")
            assert daemon.wait() == 1
            (last,) = daemon.events("daemon.failed", exit_code=1)
            assert "CUDA error" in last["error"]
            assert "Traceback" in last["exception"]
            assert not daemon.noise
        assert "CUDA error" in status(config)["ended_by"]
        assert image.exists()
        break_file.unlink()
        with running(config, program="tests.broken_sortd", BREAK_FILE=str(break_file)) as daemon:
            assert daemon.wait_for("image.filed")["label"] == "red"

    @pytest.mark.parametrize("garbage", ["nan", "zero"])
    def test_embeddings_that_are_garbage_file_nothing(
        self, colours: Path, write_config: Write, break_file: Path, garbage: str
    ) -> None:
        """A card in a bad state answers without an error: what is no embedding decides nothing, now or later."""
        config = write_config()
        with running(config, program="tests.broken_sortd", BREAK_FILE=str(break_file)) as daemon:
            break_file.write_text(garbage)
            image = drop(colours / "Images", "red", "a.png")
            assert daemon.wait() != 0
            assert not [line for line in daemon.lines if line["event"].startswith("image.")]
        assert image.exists()
        break_file.unlink()
        with running(config, program="tests.broken_sortd", BREAK_FILE=str(break_file)) as daemon:
            assert daemon.wait_for("image.filed")["label"] == "red"

    def test_a_decoder_that_is_killed_costs_nothing(self, colours: Path, write_config: Write) -> None:
        """As the kernel does when memory is short: the process that decodes is started again, each image is filed."""
        with running(write_config()) as daemon:
            for number in range(60):
                drop(colours / "Images", list(COLOURS)[number % 3], f"{number}.png", number)
                if number % 20 == 10:
                    daemon.wait_until(lambda: children(daemon.process.pid) != [], "a process that decodes")
                    for child in children(daemon.process.pid):
                        with suppress(ProcessLookupError):  # one killed before may only now be waited for
                            os.kill(child, signal.SIGKILL)
            daemon.wait_for("image.filed", count=60)
            assert daemon.stop() == 0
            assert not daemon.events("image.rejected")

    def test_no_process_outlives_a_killed_daemon(self, colours: Path, write_config: Write) -> None:
        """SIGKILL leaves nobody behind who holds the lock or the memory."""
        with running(write_config()) as daemon:
            drop(colours / "Images", "red", "a.png")
            daemon.wait_for("image.filed")
            left = children(daemon.process.pid)
            assert left
            daemon.stop(signal.SIGKILL)
            for child in left:
                with suppress(ProcessLookupError):
                    descriptor = os.pidfd_open(child)
                    assert select.select([descriptor], [], [], PATIENCE_SECONDS)[0], f"process {child} lives on"
                    os.close(descriptor)


class TestConfiguration:
    """What was right at the start is changed while sortd runs."""

    def test_a_configuration_that_vanished_is_refused_and_the_old_one_stays(
        self, colours: Path, write_config: Write
    ) -> None:
        """A missing file is no request for the defaults; ``sortd status`` shows what is wrong until it is mended."""
        config = write_config(mode="avg")
        with running(config) as daemon:
            config.rename(config.with_name("away.yaml"))
            daemon.send(signal.SIGHUP)
            assert "cannot be read" in daemon.wait_for("config.refused")["error"]
            drop(colours / "Images", "red", "a.png")
            assert daemon.wait_for("image.filed")["mode"] == "avg"
            config.with_name("away.yaml").rename(config)
            daemon.wait_until(
                lambda: "cannot be read" in (status(config)["config_problem"] or ""), "told by the status"
            )
            daemon.send(signal.SIGHUP)
            daemon.wait_for("config.reloaded")
            daemon.wait_until(lambda: status(config)["config_problem"] is None, "no more told by the status")

    def test_every_mistake_of_a_reloaded_file_is_told_at_its_place(self, colours: Path, write_config: Write) -> None:
        """Two mistakes, two lines, with file, line and column; the daemon goes on as before."""
        with running(write_config()) as daemon:
            config = write_config(settle_seconds="soon", mode="guess")
            daemon.send(signal.SIGHUP)
            error = daemon.wait_for("config.refused")["error"]
            assert f"{config}:" in error
            assert "settle_seconds" in error
            assert "mode" in error
            drop(colours / "Images", "red", "a.png")
            daemon.wait_for("image.filed")

    def test_without_its_configuration_it_does_not_start(self, colours: Path, tmp_path: Path) -> None:
        """A file that was named and is not there ends the start with a sentence, never with defaults."""
        drop(colours / "Images", "red", "a.png")
        with DaemonProcess(tmp_path / "nothing.yaml") as daemon:
            assert daemon.wait() == 78
            assert "nothing.yaml: cannot be read" in daemon.wait_for("daemon.failed", exit_code=78)["error"]
        assert tree(colours / "Images")


class TestReferences:
    """Clases/ changes in ways that may be meant or may be an accident."""

    def test_an_emptied_class_keeps_its_prototype_until_it_is_removed(self, colours: Path, write_config: Write) -> None:
        """Absent is not empty: images are filed into it as before, loudly; removing the folder removes the class."""
        with running(write_config()) as daemon:
            for reference in (colours / "Clases" / "red").iterdir():
                reference.unlink()
            assert daemon.wait_for("references.emptied")["classes"] == ["red"]
            drop(colours / "Images", "red", "a.png")
            assert daemon.wait_for("image.filed")["label"] == "red"
            (colours / "Clases" / "red").rmdir()
            daemon.wait_for("prototypes.rebuilt", classes=2)
            drop(colours / "Images", "red", "b.png")
            assert daemon.wait_for("image.filed", count=2)["label"] != "red"

    def test_a_reference_that_is_no_image_is_named_and_the_others_count(
        self, colours: Path, write_config: Write
    ) -> None:
        """A broken reference spoils neither its class nor the others; in place of the old one it is learnt anew."""
        with running(write_config()) as daemon:
            broken = colours / "Clases" / "red" / "0.png"
            content = broken.read_bytes()
            broken.write_bytes(content[: len(content) // 2])
            assert daemon.wait_for("references.unreadable")["path"] == str(broken)
            daemon.wait_for("prototypes.rebuilt", references=11)
            drop(colours / "Images", "red", "a.png")
            assert daemon.wait_for("image.filed")["label"] == "red"
            broken.write_bytes(content)
            daemon.wait_for("prototypes.rebuilt", references=12, count=2)

    def test_a_reference_that_changes_within_its_size_and_time_is_noticed(
        self, colours: Path, write_config: Write
    ) -> None:
        """Another image under an old name, of the same size and with the old time put back: the inode tells."""
        one, other = (colours / "Clases" / colour / "0.png" for colour in ("red", "green"))
        size = max(one.stat().st_size, other.stat().st_size)
        for reference in (one, other):
            with reference.open("ab") as file:
                file.write(bytes(size - reference.stat().st_size))  # PNG decoders stop at its end mark
        with running(write_config()) as daemon:
            first = daemon.wait_for("prototypes.rebuilt")
            before = one.stat()
            fresh = colours / "Clases" / "red" / ".fresh"
            fresh.write_bytes(other.read_bytes())
            os.utime(fresh, ns=(before.st_atime_ns, before.st_mtime_ns))
            fresh.rename(one)
            second = daemon.wait_for("prototypes.rebuilt", count=2)
            assert (second["changed"], second["generation"]) == (True, first["generation"] + 1)


class TestFairness:
    """Much to do is no reason to let anybody wait for ever."""

    def test_a_new_image_passes_the_backlog(self, colours: Path, write_config: Write, break_file: Path) -> None:
        """Whoever drops a file now is served now, though hundreds lie there from before."""
        config = write_config()
        with running(config, program="tests.broken_sortd", BREAK_FILE=str(break_file)) as daemon:
            break_file.write_text("wait")
            for number in range(200):
                drop(colours / "Images", "red", f"old {number}.png", UNLIKE_REFERENCES + number)
            daemon.wait_until(lambda: queued(config, "Colours") == 200, "the old ones wait for the encoder")
            new = drop(colours / "Images", "blue", "new.png")
            daemon.wait_until(lambda: queued(config, "Colours") == 201, "the new one waits for the encoder")
            break_file.unlink()
            daemon.wait_for("image.filed", path=str(new))
            order = [line["path"] for line in daemon.events("image.filed")]
            assert order.index(str(new)) < 100

    def test_a_busy_dataset_does_not_hold_up_another(
        self, colours: Path, write_config: Write, break_file: Path
    ) -> None:
        """One worker serves all of them in turn."""
        second = make_dataset(colours.parent, "Second")
        config = write_config()
        with running(config, program="tests.broken_sortd", BREAK_FILE=str(break_file)) as daemon:
            break_file.write_text("wait")
            for number in range(200):
                drop(colours / "Images", "red", f"{number}.png", UNLIKE_REFERENCES + number)
            daemon.wait_until(lambda: queued(config, "Colours") == 200, "the first dataset is busy")
            new = drop(second / "Images", "blue", "a.png")
            daemon.wait_until(lambda: queued(config, "Second") == 1, "the second one has an image")
            break_file.unlink()
            daemon.wait_for("image.filed", dataset="Second")
            order = [line["path"] for line in daemon.events("image.filed")]
            assert order.index(str(new)) < 100

    def test_more_files_than_the_backlog_holds_are_all_filed(self, colours: Path, write_config: Write) -> None:
        """What is not remembered is found by the next scan, which comes as soon as there is room."""
        for number in range(350):
            drop(colours / "Images", "green", f"{number}.png", number)
        with running(write_config(backlog_limit=100)) as daemon:
            daemon.wait_for("image.filed", count=350)
        assert not tree(colours / "Images")
