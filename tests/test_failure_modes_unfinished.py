"""What breaks on files that are not done, met by a real sortd on real files; docs/failure-modes.md is the table."""

import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path

import pytest

from sortd.layout import rule_for
from tests.daemon_process import PATIENCE_SECONDS, DaemonProcess, picture, running, tree

Write = Callable[..., Path]


@pytest.fixture
def tiny_clip() -> str:
    """No model is loaded: the program of these tests has an encoder of its own."""
    return "packaged"


def image_bytes(colour: str, kind: str = "PNG", seed: int = 1001, size: tuple[int, int] = (160, 120)) -> bytes:
    """Return an encoded picture of one colour."""
    encoded = BytesIO()
    picture(colour, seed, size).save(encoded, kind)
    return encoded.getvalue()


def drop_beside(folder: Path, daemon: DaemonProcess) -> None:
    """Drop another image and wait until it is filed: sortd has had its time by then."""
    path = str(folder / "beside.png")
    before = len(daemon.events("image.filed", path=path))
    (folder / "beside.png").write_bytes(image_bytes("blue", seed=9))
    daemon.wait_for("image.filed", path=path, count=before + 1)


class TestFilesThatGrow:
    """A copy is under way."""

    def test_a_slow_copy_with_pauses_arrives_whole(self, colours: Path, write_config: Write) -> None:
        """However long a writer pauses, the file is left alone while it is open; other files are filed meanwhile."""
        content = image_bytes("green", size=(400, 300))
        path = colours / "Images" / "slow.png"
        with running(write_config()) as daemon:
            with path.open("wb", buffering=0) as file:
                for start in range(0, len(content), len(content) // 3):
                    file.write(content[start : start + len(content) // 3])
                    drop_beside(colours / "Images", daemon)
            line = daemon.wait_for("image.filed", path=str(path))
            assert daemon.stop() == 0
            assert not daemon.events("image.rejected")
        assert Path(line["destination"]).read_bytes() == content

    def test_a_file_laid_out_in_full_and_filled_later_is_waited_for(self, colours: Path, write_config: Write) -> None:
        """The size is right from the first moment, as Explorer and torrent clients do it; the open file tells."""
        content = image_bytes("green", "JPEG", size=(400, 300))
        path = colours / "Images" / "laid out.jpg"
        with running(write_config()) as daemon:
            with path.open("wb", buffering=0) as file:
                os.posix_fallocate(file.fileno(), 0, len(content))
                for start in range(0, len(content), len(content) // 3):
                    drop_beside(colours / "Images", daemon)
                    file.write(content[start : start + len(content) // 3])
            line = daemon.wait_for("image.filed", path=str(path))
            assert not daemon.events("image.rejected")
        assert Path(line["destination"]).read_bytes() == content

    def test_a_file_laid_out_in_full_that_is_never_filled_is_set_aside(
        self, colours: Path, write_config: Write
    ) -> None:
        """A JPEG whose end is zeros decodes to grey, and grey is not what the user dropped."""
        content = image_bytes("red", "JPEG", size=(400, 300))
        with running(write_config()) as daemon:
            half = content[: len(content) // 2]
            (colours / "Images" / "half.jpg").write_bytes(half + bytes(len(content) - len(half)))
            assert "never written to its end" in daemon.wait_for("image.rejected")["reason"]

    def test_the_settle_time_is_the_users(self, colours: Path, write_config: Write) -> None:
        """Who copies over a slow link sets a longer one, and nothing moves before it has passed."""
        with running(write_config(settle_seconds=1.5)) as daemon:
            (colours / "Images" / "a.png").write_bytes(image_bytes("red"))
            assert daemon.wait_for("image.filed")["settle_ms"] >= 1500

    def test_a_file_that_stays_open_is_looked_at_again_until_it_is_closed(
        self, colours: Path, write_config: Write
    ) -> None:
        """Complete, still, and open for writing: not touched; closed without a byte more, it is filed."""
        content = image_bytes("red")
        path = colours / "Images" / "open.png"
        with running(write_config(settle_seconds=0.3)) as daemon:
            with path.open("wb") as file:
                file.write(content)
                file.flush()
                for _ in range(3):
                    drop_beside(colours / "Images", daemon)
                assert path.read_bytes() == content
            daemon.wait_for("image.filed", path=str(path))

    def test_a_growing_file_is_looked_at_again_without_another_event(self, colours: Path, write_config: Write) -> None:
        """It settles by sortd's own clock: no other file has to come for that."""
        content = image_bytes("red")
        with running(write_config()) as daemon, (colours / "Images" / "a.png").open("wb") as file:
            file.write(content[:50])
            file.flush()
            drop_beside(colours / "Images", daemon)
            file.write(content[50:])
            file.close()
            daemon.wait_for("image.filed", path=str(colours / "Images" / "a.png"))

    def test_the_copy_of_a_tree_by_another_program_disturbs_nobody(
        self, colours: Path, write_config: Write, tmp_path: Path
    ) -> None:
        """``cp`` ends well though sortd watches: what it writes stays under its name until it is whole."""
        source = tmp_path / "source"
        source.mkdir()
        for number in range(40):
            (source / f"{number}.png").write_bytes(image_bytes("green", seed=number, size=(300, 200)))
        with running(write_config()) as daemon:
            done = subprocess.run(
                ["cp", "-r", str(source), str(colours / "Images" / "copied")],
                capture_output=True,
                text=True,
                timeout=PATIENCE_SECONDS,
                check=False,
            )
            assert (done.returncode, done.stderr) == (0, "")
            daemon.wait_for("image.filed", count=40)
        assert set(tree(colours / "Dataset").values()) == set(tree(source).values())


class TestFilesThatAreNotThereYet:
    """What stands under the name is nothing, or not yet the thing."""

    def test_an_empty_file_is_left_until_something_is_in_it(self, colours: Path, write_config: Write) -> None:
        """Zero bytes are not an image and no error; once filled they are filed."""
        path = colours / "Images" / "a.png"
        with running(write_config()) as daemon:
            path.touch()
            assert daemon.wait_for("image.left")["refusal"] == "empty"
            path.write_bytes(image_bytes("green"))
            daemon.wait_for("image.filed")
            assert daemon.stop() == 0
            assert not daemon.events("image.rejected")

    @pytest.mark.parametrize(
        ("unfinished", "finished"),
        [
            ("photo.png.crdownload", "photo.png"),
            ("photo.png.part", "photo.png"),
            (".photo.png.Ab3dEf", "photo.png"),
            ("photo.png.filepart", "photo.png"),
            (".syncthing.photo.png.tmp", "photo.png"),
            ("photo.png~", "photo.png"),
            ("photo.PNG.TMP", "photo.PNG"),
        ],
    )
    def test_unfinished_names_are_told_by_their_ending(self, unfinished: str, finished: str) -> None:
        """The names under which browsers, rsync, scp and sync clients write; ``test_layout.py`` has all of them."""
        assert rule_for(unfinished) is not None
        assert rule_for(finished) is None

    def test_an_upload_under_a_temporary_name_is_filed_when_it_is_renamed(
        self, colours: Path, write_config: Write
    ) -> None:
        """Upload, then rename: the convention that every sync client follows works."""
        with running(write_config()) as daemon:
            for number, name in enumerate([".a.png.x7Gh2k", "b.png.part", "c.png.tmp"]):
                (colours / "Images" / name).write_bytes(image_bytes("green", seed=number))
            drop_beside(colours / "Images", daemon)
            assert len(tree(colours / "Images")) == 3
            for name, final in [(".a.png.x7Gh2k", "a.png"), ("b.png.part", "b.png"), ("c.png.tmp", "c.png")]:
                (colours / "Images" / name).rename(colours / "Images" / final)
            daemon.wait_for("image.filed", count=4)

    @pytest.mark.parametrize("control", ["photo.bmp.aria2", "photo.bmp.lftp-pget-status", "photo.bmp.st"])
    def test_daemon_files_a_stopped_download_only_when_its_control_file_is_gone(
        self, colours: Path, write_config: Write, control: str
    ) -> None:
        """Laid out in full, 60 % zeros, closed: it waits, the log says for what, and what is whole then is filed."""
        whole = image_bytes("red", "BMP")
        image = colours / "Images" / "photo.bmp"
        (colours / "Images" / control).touch()
        image.write_bytes(whole[: len(whole) // 5] + bytes(3 * len(whole) // 5) + whole[-(len(whole) // 5) :])
        with running(write_config()) as daemon:
            drop_beside(colours / "Images", daemon)
            line = daemon.wait_for("image.left", path=str(image))
            assert line["refusal"] == "unfinished"
            assert control in line["reason"]
            image.write_bytes(whole)
            (colours / "Images" / control).unlink()
            filed = daemon.wait_for("image.filed", path=str(image))
            assert len(daemon.events("image.filed")) == 2
            assert daemon.stop() == 0
        assert Path(filed["destination"]).read_bytes() == whole

    def test_a_file_that_vanishes_is_forgotten_without_a_word(self, colours: Path, write_config: Write) -> None:
        """Deleted while it settles: no error, no retry, the rest goes on."""
        with running(write_config(settle_seconds=1)) as daemon, ExitStack() as writers:
            for number in range(10):
                path = colours / "Images" / f"{number}.png"
                path.write_bytes(image_bytes("red", seed=number))
                if number % 2 == 0:
                    writers.enter_context(path.open("ab"))  # kept open, so that it is not filed
            for number in range(0, 10, 2):
                (colours / "Images" / f"{number}.png").unlink()
            writers.close()
            daemon.wait_for("image.filed", count=5)
            assert daemon.stop() == 0
            unexpected = {line["event"] for line in daemon.lines if line["level"] in {"warning", "error"}}
            assert not unexpected


class TestFilesThatChange:
    """The bytes that were looked at are not the bytes that are there."""

    def test_the_version_that_is_filed_is_the_last_one(self, colours: Path, write_config: Write) -> None:
        """Replaced again and again by rename, and by writing in place, from green to red: red it is, and whole."""
        path = colours / "Images" / "a.png"
        with running(write_config(), keeps_files=False) as daemon, ExitStack() as writers:
            for number in range(4):
                fresh = colours / "Images" / ".fresh"
                file = writers.enter_context(fresh.open("wb", buffering=0))
                file.write(image_bytes("green", seed=number))  # kept open, so that it is not filed
                fresh.rename(path)
                drop_beside(colours / "Images", daemon)
            last = image_bytes("red")
            file.seek(0)
            file.truncate()
            file.write(last)
            writers.close()
            line = daemon.wait_for("image.filed", path=str(path))
            assert daemon.stop() == 0
            assert len(daemon.events("image.filed", path=str(path))) == 1
        assert line["label"] == "red"
        assert Path(line["destination"]).read_bytes() == last

    def test_a_name_that_is_written_while_its_files_are_moved_loses_none(
        self, colours: Path, write_config: Write, tmp_path: Path
    ) -> None:
        """A camera re-uses one name for ever: at whatever moment, each file is replaced or filed, whole."""
        path = colours / "Images" / "DSC_0001.png"
        written: list[bytes] = []
        with running(write_config(settle_seconds=0.1), keeps_files=False) as daemon:
            for number in range(24):
                content = image_bytes("red", seed=number, size=(60, 50))
                fresh = tmp_path / "fresh"
                fresh.write_bytes(content)
                shutil.move(fresh, path)
                written.append(content)
                if number % 3 == 0:
                    daemon.wait_until(lambda: not path.exists(), "the name is free")
                elif number % 3 == 1:
                    drop_beside(colours / "Images", daemon)
            daemon.wait_until(lambda: not os.listdir(colours / "Images"), "the last one filed")
            assert daemon.stop() == 0
            lines = len(daemon.events("image.filed"))
        filed = list(tree(colours / "Dataset").values())
        assert len(filed) == lines
        assert Counter(filed) <= Counter([*written, *[image_bytes("blue", seed=9)] * len(written)])
        assert written[-1] in filed

    @pytest.mark.parametrize("rejected", ["leave", "move"])
    def test_a_broken_image_that_is_repaired_is_filed(self, colours: Path, write_config: Write, rejected: str) -> None:
        """Mended in place, or dropped again under its name: what was refused once is not refused for ever."""
        content = image_bytes("green", "JPEG", size=(300, 200))
        path = colours / "Images" / "photo.jpg"
        with running(write_config(rejected=rejected)) as daemon:
            path.write_bytes(content[: len(content) // 2])
            daemon.wait_for("image.left" if rejected == "leave" else "image.rejected")
            path.write_bytes(content)
            line = daemon.wait_for("image.filed")
            assert Path(line["destination"]).read_bytes() == content

    def test_a_copy_that_was_cut_short_is_set_aside_and_never_tried_again(
        self, colours: Path, write_config: Write
    ) -> None:
        """One line, one reason beside it, and nothing more at the next scans or the next start."""
        content = image_bytes("green", size=(300, 200))
        (colours / "Images" / "cut.png").write_bytes(content[: len(content) // 2])
        config = write_config(rescan_seconds=1)
        with running(config, SORTD_LOG__LEVEL="debug") as daemon:
            daemon.wait_for("image.rejected")
            daemon.wait_for_scans(2)
            assert daemon.stop() == 0
            assert len(daemon.events("image.rejected")) == 1
        with DaemonProcess(config, "once") as daemon:
            assert daemon.wait() == 0
            assert not daemon.events("image.rejected")
        assert sorted(tree(colours / "Rejected")) == ["cut.png", "cut.png.reason.json"]
