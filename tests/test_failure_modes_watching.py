"""What breaks the watching of folders, met by a real sortd on real files; see docs/failure-modes.md for the table."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from sortd.layout import JOURNAL_FILE, Layout
from sortd.store.history import History
from tests.command_line import sortd
from tests.daemon_process import COLOURS, exchange, make_dataset, picture, running, tree

Write = Callable[..., Path]

QUEUE_LIMIT = Path("/proc/sys/fs/inotify/max_queued_events")


@pytest.fixture
def tiny_clip() -> str:
    """No model is loaded: the program of these tests has an encoder of its own."""
    return "packaged"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder on the same file system that sortd does not look at."""
    folder = tmp_path / "outside"
    folder.mkdir()
    return folder


def drop(folder: Path, colour: str, name: str, seed: int = 1001) -> Path:
    """Write a picture of one colour into a folder."""
    picture(colour, seed).save(folder / name, format=None if Path(name).suffix else "PNG")
    return folder / name


def status(dataset: Path) -> dict[str, Any]:
    """Return the facts that ``sortd status`` tells, as they were written last."""
    facts: dict[str, Any] = json.loads((dataset.parents[1] / "state" / "status.json").read_text())
    return facts


def waiting(dataset: Path) -> int:
    """Count the images that wait to hold still."""
    images = status(dataset)["datasets"][dataset.name]["images"]
    return int(images["settling"])


def held(dataset: Path) -> int:
    """Count the images that are not to be moved."""
    return int(status(dataset)["datasets"][dataset.name]["images"]["held"])


class TestLostHints:
    """The watcher is deaf, or was for a while."""

    @pytest.mark.slow
    def test_what_a_flood_of_twenty_thousand_files_hides_is_filed(self, colours: Path, write_config: Write) -> None:
        """More happens than the kernel queues while sortd is stopped: that is told, and a scan finds what was lost."""
        if int(QUEUE_LIMIT.read_text()) >= 20_000:
            pytest.skip("the kernel queues more than 20,000 events here")
        with running(write_config()) as daemon:
            daemon.send(signal.SIGSTOP)
            for number in range(20_000):
                os.close(os.open(colours / "Images" / f"{number}.tmp", os.O_CREAT))
            for number in range(40):
                drop(colours / "Images", "red", f"{number}.png", number)
            daemon.send(signal.SIGCONT)
            daemon.wait_for("watch.overflowed")
            daemon.wait_for("image.filed", count=40)
            assert daemon.stop() == 0
            assert len(daemon.events("image.filed")) == 40
        assert len(tree(colours / "Dataset" / "red")) == 40

    def test_a_scan_finds_what_was_never_hinted_at(self, colours: Path, write_config: Write) -> None:
        """Without any watching, each file is filed all the same, and the status says how it was found."""
        with running(write_config(polling="always", polling_seconds=0.5)) as daemon:
            assert daemon.events("watch.degraded", why="polling is configured")
            for number in range(60):
                drop(colours / "Images", "green", f"{number}.png", number)
            daemon.wait_for("image.filed", count=60)
            daemon.wait_until(
                lambda: {entry["mode"] for entry in status(colours)["watching"]} == {"polling"},
                "the effective mode in the status",
            )

    def test_the_status_says_how_each_root_is_followed(self, colours: Path, write_config: Write) -> None:
        """Whoever asks learns that the watcher is alive and hears by events, or why it does not."""
        with running(write_config()) as daemon:
            daemon.wait_until(
                lambda: (
                    [(entry["root"], entry["mode"]) for entry in status(colours)["watching"]]
                    == [(str(colours.parent), "events"), (str(colours), "events")]
                ),
                "two roots that are heard",
            )


class TestFoldersThatComeAndGo:
    """The tree itself changes under the watcher."""

    def test_a_root_that_is_deleted_and_made_anew_is_served_again(
        self, colours: Path, write_config: Write, outside: Path
    ) -> None:
        """Deleted with all that is in it: sortd says so, stays alive, and takes up what appears there later."""
        with running(write_config(rescan_seconds=1)) as daemon:
            colours.parent.rename(outside / "Data")
            daemon.wait_for("root.absent")
            make_dataset(colours.parent)
            daemon.wait_for("prototypes.rebuilt", count=2)
            drop(colours / "Images", "red", "a.png")
            daemon.wait_for("image.filed")

    def test_a_root_that_comes_back_is_served_soon(self, colours: Path, write_config: Write, outside: Path) -> None:
        """An unmounted disk comes back with its marker: files that were put on it meanwhile are filed."""
        with running(write_config(rescan_seconds=1)) as daemon:
            colours.parent.rename(outside / "Data")
            daemon.wait_for("root.absent")
            drop(outside / "Data" / "Colours" / "Images", "blue", "meanwhile.png")
            (outside / "Data").rename(colours.parent)
            assert daemon.wait_for("image.filed")["label"] == "blue"
            drop(colours / "Images", "red", "later.png")
            daemon.wait_for("image.filed", count=2)

    def test_what_was_undone_stays_where_it_is_while_the_disk_comes_and_goes(
        self, colours: Path, write_config: Write, outside: Path
    ) -> None:
        """Absent is not gone: a file that the user took back is still held when its disk is mounted again."""
        config = write_config(rescan_seconds=1)
        with running(config, SORTD_LOG__LEVEL="debug") as daemon:
            drop(colours / "Images", "red", "undone.png")
            daemon.wait_for("image.filed")
            assert sortd("undo", "--last", 1, "-c", config).code == 0
            colours.parent.rename(outside / "Data")
            daemon.wait_for("root.absent")
            daemon.wait_for("scan.unreadable", count=4)  # what was known has been looked for, and was not there
            (outside / "Data").rename(colours.parent)
            drop(colours / "Images", "green", "other.png")
            daemon.wait_for("image.filed", label="green")
            daemon.wait_for_scans(2)
            assert daemon.stop() == 0
            assert held(colours) == 1
            assert len(daemon.events("image.filed")) == 2
        assert sorted(tree(colours / "Images")) == ["undone.png"]

    def test_a_dataset_without_its_marker_waits_until_it_is_back(
        self, colours: Path, write_config: Write, outside: Path
    ) -> None:
        """Without .sortd/ the disk is taken for not mounted: nothing moves; made anew, all is as before."""
        with running(write_config(rescan_seconds=1)) as daemon:
            (colours / ".sortd").rename(outside / ".sortd")
            drop(colours / "Images", "red", "a.png")
            assert "is the disk mounted?" in daemon.wait_for("prototypes.rebuild_failed")["error"]
            assert (colours / "Images" / "a.png").exists()
            assert sortd("init", colours, environment={"XDG_CONFIG_HOME": str(outside)}).code == 0
            daemon.wait_for("image.filed")

    def test_a_dataset_whose_disk_does_not_answer_is_awaited(
        self, colours: Path, write_config: Write, outside: Path
    ) -> None:
        """An error is no answer: the dataset is not let go, and served when its disk answers again."""
        with running(write_config(rescan_seconds=1)) as daemon:
            (outside / "away").symlink_to(colours)
            exchange(colours, outside / "away")  # each look at it ends with ELOOP, as with EIO or ESTALE
            daemon.wait_for("scan.unreadable", count=4)
            assert not daemon.events("dataset.gone")
            exchange(colours, outside / "away")
            drop(colours / "Images", "red", "a.png")
            daemon.wait_for("image.filed")
            assert daemon.stop() == 0
            assert not daemon.events("dataset.gone")

    def test_a_running_sortd_outlives_its_root_without_any_dataset(
        self, colours: Path, write_config: Write, outside: Path
    ) -> None:
        """The last dataset is deleted and then the root: nothing to work on is no reason to end."""
        with running(write_config(rescan_seconds=1)) as daemon:
            colours.rename(outside / "Colours")
            daemon.wait_for("dataset.gone")
            colours.parent.rename(outside / "Data")
            daemon.wait_for("root.absent")
            make_dataset(colours.parent)
            drop(colours / "Images", "red", "a.png")
            daemon.wait_for("image.filed")

    def test_a_new_dataset_that_cannot_serve_leaves_the_others_alone(self, colours: Path, write_config: Write) -> None:
        """A folder that sortd needs is a file there: that dataset is held with its reason, and taken up once mended."""
        with running(write_config(rescan_seconds=1)) as daemon:
            bad = colours.parent / "Bad"
            bad.mkdir()
            (bad / "Images").write_text("in the way")
            (bad / "Clases").mkdir()
            line = daemon.wait_for("dataset.held", dataset="Bad")
            assert "Bad/Images is not a folder" in line["error"]
            drop(colours / "Images", "red", "a.png")
            daemon.wait_for("image.filed", dataset="Colours")
            (bad / "Images").unlink()
            daemon.wait_for("dataset.added", dataset="Bad")
            assert len(daemon.events("dataset.held")) == 1

    def test_a_folder_that_becomes_a_dataset_later_is_taken_up_soon(self, colours: Path, write_config: Write) -> None:
        """Somebody makes a folder, thinks for a while, and makes Clases/ in it: no event tells of that."""
        with running(write_config()) as daemon:
            folder = colours.parent / "Later"
            folder.mkdir()
            drop(colours / "Images", "red", "a.png")
            daemon.wait_for("image.filed")
            assert not daemon.events("dataset.added", dataset="Later")
            make_dataset(colours.parent, "Later")
            daemon.wait_for("prototypes.rebuilt", dataset="Later", classes=3, references=12)

    def test_an_inbox_that_is_deleted_and_made_anew_is_heard(self, colours: Path, write_config: Write) -> None:
        """Images/ may go and come back."""
        with running(write_config()) as daemon:
            shutil.rmtree(colours / "Images")
            (colours / "Images").mkdir()
            drop(colours / "Images", "green", "a.png")
            daemon.wait_for("image.filed")

    def test_a_renamed_dataset_is_served_under_its_new_name(self, colours: Path, write_config: Write) -> None:
        """The old name is let go, the new one taken up with its journal, and nothing is written under the old one."""
        with running(write_config()) as daemon:
            drop(colours / "Images", "blue", "before.png")
            daemon.wait_for("image.filed")
            renamed = colours.rename(colours.parent / "Farben")
            daemon.wait_for("dataset.added", dataset="Farben")
            daemon.wait_for("prototypes.rebuilt", dataset="Farben")
            drop(renamed / "Images", "red", "a.png")
            line = daemon.wait_for("image.filed", count=2)
            assert line["destination"] == str(renamed / "Dataset" / "red" / "a.png")
            daemon.wait_for("dataset.gone", dataset="Colours")
            with History.open(Layout(renamed).state_folder(colours.parents[1] / "state") / JOURNAL_FILE) as history:
                assert history.counts() == {"filed": 2}
            assert not colours.exists()

    def test_a_deep_tree_that_is_moved_in_is_filed_whole(
        self, colours: Path, write_config: Write, outside: Path
    ) -> None:
        """One event for a tree of forty levels; what is added to it later is heard as well."""
        deep = outside / "album" / "/".join(f"level{number}" for number in range(40))
        deep.mkdir(parents=True)
        drop(outside / "album", "red", "top.png")
        drop(deep.parents[20], "green", "middle.png")
        drop(deep, "blue", "bottom.png")
        with running(write_config()) as daemon:
            (outside / "album").rename(colours / "Images" / "album")
            daemon.wait_for("image.filed", count=3)
            drop(colours / "Images" / deep.relative_to(outside), "red", "later.png", 2)
            daemon.wait_for("image.filed", count=4)
        assert sorted(tree(colours / "Dataset")) == [
            "blue/bottom.png",
            "green/middle.png",
            "red/later.png",
            "red/top.png",
        ]

    def test_a_tree_that_is_copied_in_is_filed_whole(self, colours: Path, write_config: Write, outside: Path) -> None:
        """``cp -r``: folders appear faster than they can be watched, and their files before that."""
        for number in range(30):
            folder = outside / f"day {number % 6}" / f"hour {number}"
            folder.mkdir(parents=True)
            drop(folder, list(COLOURS)[number % 3], "a.png", number)
        with running(write_config()) as daemon:
            shutil.copytree(outside, colours / "Images" / "trip")
            daemon.wait_for("image.filed", count=30)
        assert not tree(colours / "Images")

    def test_a_folder_renamed_from_a_hidden_name_is_filed(self, colours: Path, write_config: Write) -> None:
        """An upload goes into a hidden folder first, which is left alone and then renamed into sight."""
        with running(write_config()) as daemon:
            hidden = colours / "Images" / ".upload"
            hidden.mkdir()
            drop(hidden, "red", "a.png")
            drop(colours / "Images", "blue", "other.png")
            daemon.wait_for("image.filed")
            assert tree(hidden)
            hidden.rename(colours / "Images" / "upload")
            daemon.wait_for("image.filed", count=2)

    def test_a_tree_that_is_moved_out_again_is_forgotten(
        self, colours: Path, write_config: Write, outside: Path
    ) -> None:
        """Taken away before it was done: no error, nothing of it is moved, and the place is not looked at again."""
        with running(write_config()) as daemon, ExitStack() as writers:
            album = colours / "Images" / "album"
            album.mkdir()
            for number in range(5):
                file = writers.enter_context((album / f"{number}.png").open("wb"))
                picture("red", number).save(file, "PNG")  # kept open, so that it is not filed
            daemon.wait_until(lambda: waiting(colours) == 5, "the images are known")
            album.rename(outside / "album")
            writers.close()
            drop(colours / "Images", "green", "other.png")
            daemon.wait_for("image.filed")
            drop(outside / "album", "red", "later.png", 9)
            assert daemon.stop() == 0
            assert not daemon.events("move.failed")
        assert len(tree(outside / "album")) == 6


class TestWaysToAppear:
    """A file can come without being written."""

    @pytest.mark.parametrize("way", ["rename", "link", "exchange"])
    def test_a_file_that_was_never_written_here_is_filed(
        self, colours: Path, write_config: Write, outside: Path, way: str
    ) -> None:
        """``mv`` from the same file system, a hard link, or a rename over a name that was there."""
        source = drop(outside, "green", "a.png")
        content = source.read_bytes()
        target = colours / "Images" / "a.png"
        with running(write_config(settle_seconds=0.5)) as daemon:
            if way == "link":
                os.link(source, target)
            elif way == "rename":
                source.rename(target)
            else:
                drop(colours / "Images", "red", "a.png", 2)
                source.replace(target)
            assert daemon.wait_for("image.filed")["label"] == "green"
            assert daemon.stop() == 0
            assert len(daemon.events("image.filed")) == 1
        assert tree(colours / "Dataset") == {"green/a.png": content}
        assert source.exists() == (way == "link")

    def test_a_linked_file_is_left_alone(self, colours: Path, write_config: Write, outside: Path) -> None:
        """A symbolic link is not the user's image: neither it nor what it points to is touched."""
        target = drop(outside, "red", "a.png")
        with running(write_config()) as daemon:
            (colours / "Images" / "link.png").symlink_to(target)
            (colours / "Images" / "dangling.png").symlink_to(outside / "nothing.png")
            (colours / "Images" / "tree").symlink_to(outside)
            drop(colours / "Images", "blue", "other.png")
            daemon.wait_for("image.filed")
            assert daemon.stop() == 0
            assert len(daemon.events("image.filed")) == 1
        assert target.exists()
        assert (colours / "Images" / "link.png").is_symlink()
        assert sorted(tree(colours / "Dataset")) == ["blue/other.png"]

    def test_a_path_that_became_a_loop_of_links_ends_nothing(
        self, colours: Path, write_config: Write, outside: Path
    ) -> None:
        """Where a folder that held an image becomes a link to itself, the disk refuses the look: told, and no more."""
        album = colours / "Images" / "album"
        (outside / "loop").symlink_to(album)
        with running(write_config()) as daemon, ExitStack() as writers:
            album.mkdir()
            file = writers.enter_context((album / "a.png").open("wb"))
            picture("red", 1001).save(file, "PNG")  # kept open, so that it is not filed
            daemon.wait_until(lambda: waiting(colours) == 1, "the image is known")
            exchange(album, outside / "loop")
            assert daemon.wait_for("scan.unreadable")["path"] == str(album / "a.png")
            drop(colours / "Images", "blue", "other.png")
            daemon.wait_for("image.filed")
            daemon.wait_until(lambda: waiting(colours) == 0, "the image is forgotten")
            assert daemon.stop() == 0
