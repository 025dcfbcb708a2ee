"""The daemon as it is used: a real process, a real model, real files, real signals; whole trees compared."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from sortd.daemon.control import ask
from sortd.layout import Layout
from tests.command_line import sortd
from tests.daemon.test_endpoint import is_refused
from tests.daemon_process import (
    PATIENCE_SECONDS,
    DaemonProcess,
    draw_strangers,
    make_dataset,
    picture,
    running,
    teach,
    tree,
)
from tests.hostile_files import HOSTILE

Write = Callable[..., Path]

REPOSITORY = Path(__file__).parents[2]


def test_daemon_real_program_files_with_a_real_model(colours: Path, write_config: Write) -> None:
    """The whole chain, sentence-transformers included: a CLIP of random weights tells plain colours apart."""
    with running(write_config(), program="sortd") as daemon:
        for number, colour in enumerate(["red", "green", "blue"]):
            picture(colour, number).save(colours / "Images" / f"{colour}.png")
        daemon.wait_for("image.filed", count=3)
        assert daemon.stop() == 0
        assert not daemon.noise
    assert sorted(tree(colours / "Dataset")) == ["blue/blue.png", "green/green.png", "red/red.png"]


def test_daemon_dropped_image_is_filed_with_its_reason(colours: Path, write_config: Write) -> None:
    """One image, one move, one canonical line; the bytes and the inode are the same."""
    with running(write_config()) as daemon:
        path = colours / "Images" / "new.png"
        picture("green", 7).save(path)
        before, inode = path.read_bytes(), path.stat().st_ino
        line = daemon.wait_for("image.filed")
        assert line["label"] == "green"
        assert line["path"] == str(path)
        assert line["destination"] == str(colours / "Dataset" / "green" / "new.png")
        assert line["dataset"] == "Colours"
        assert {"score", "margin", "second_label", "mode", "generation", "encoder_id"} <= line.keys()
        assert {"settle_ms", "decode_ms", "encode_ms", "move_ms"} <= line.keys()
        filed = Path(line["destination"])
        assert (filed.read_bytes(), filed.stat().st_ino) == (before, inode)
        assert not path.exists()
        assert daemon.stop() == 0
        assert not daemon.noise
        assert len(daemon.events("image.filed")) == 1


def test_daemon_files_present_before_the_start_are_filed(colours: Path, write_config: Write) -> None:
    """A start-up scan finds what nobody will ever hint at."""
    for number, colour in enumerate(["red", "green", "blue", "red"]):
        picture(colour, number).save(colours / "Images" / f"{number}.png")
    with running(write_config()) as daemon:
        daemon.wait_for("image.filed", count=4)
        daemon.stop()
    assert sorted(tree(colours / "Dataset")) == ["blue/2.png", "green/1.png", "red/0.png", "red/3.png"]
    assert not tree(colours / "Images")


def test_daemon_moved_in_folder_is_filed_whole(colours: Path, write_config: Write, tmp_path: Path) -> None:
    """A folder renamed into the inbox gives one hint at best; every image in it is found."""
    outside = tmp_path / "outside" / "deep"
    outside.mkdir(parents=True)
    for number in range(5):
        picture("blue", number).save(outside / f"{number}.jpg", quality=95)
    with running(write_config()) as daemon:
        (tmp_path / "outside").rename(colours / "Images" / "album")
        daemon.wait_for("image.filed", count=5)
    assert len(tree(colours / "Dataset" / "blue")) == 5


def test_daemon_slow_writer_is_waited_for(colours: Path, write_config: Write, tmp_path: Path) -> None:
    """A file that grows is not moved before its last byte, and arrives whole."""
    picture("red", 3, (300, 300)).save(tmp_path / "slow.png")
    content = (tmp_path / "slow.png").read_bytes()
    with running(write_config()) as daemon:
        path = colours / "Images" / "slow.png"
        with path.open("wb", buffering=0) as file:
            for start in range(0, len(content), len(content) // 3):
                file.write(content[start : start + len(content) // 3])
                picture("blue", start).save(colours / "Images" / f"{start}.png")
                daemon.wait_for("image.filed", path=str(colours / "Images" / f"{start}.png"))
        line = daemon.wait_for("image.filed", path=str(path))
        assert Path(line["destination"]).read_bytes() == content
        assert not daemon.events("image.rejected")


def test_temporary_names_are_left_until_renamed(colours: Path, write_config: Write) -> None:
    """A download is not touched under its temporary name and is filed once it has its own."""
    with running(write_config()) as daemon:
        part = colours / "Images" / "photo.png.crdownload"
        picture("green", 1).save(part, format="png")
        picture("red", 2).save(colours / "Images" / "other.png")
        daemon.wait_for("image.filed")
        assert part.exists()
        part.rename(colours / "Images" / "photo.png")
        assert daemon.wait_for("image.filed", count=2)["label"] == "green"


def test_daemon_broken_image_is_set_aside_and_a_text_left(colours: Path, write_config: Write) -> None:
    """Rejected/ gets what cannot be decoded, with its reason; what is no image stays; the images beside are filed."""
    picture("red", 1, (200, 200)).save(colours / "Images" / "whole.jpg")
    content = (colours / "Images" / "whole.jpg").read_bytes()
    (colours / "Images" / "half.jpg").write_bytes(content[: len(content) // 2])
    (colours / "Images" / "notes.txt").write_text("buy screws")
    with running(write_config()) as daemon:
        daemon.wait_for("image.filed")
        line = daemon.wait_for("image.rejected")
        daemon.wait_for("image.left")
        assert "unreadable" in line["reason"]
    assert sorted(tree(colours / "Rejected")) == ["half.jpg", "half.jpg.reason.json"]
    assert sorted(tree(colours / "Images")) == ["notes.txt"]


def test_equal_names_never_overwrite(colours: Path, write_config: Write) -> None:
    """Two files of one name stand side by side in the end."""
    with running(write_config()) as daemon:
        for number in range(3):
            picture("red", number).save(colours / "Images" / "DSC_0001.png")
            daemon.wait_for("image.filed", count=number + 1)
    assert sorted(tree(colours / "Dataset")) == ["red/DSC_0001 (2).png", "red/DSC_0001 (3).png", "red/DSC_0001.png"]


def test_daemon_class_that_appears_grows_and_vanishes_is_right_at_once(colours: Path, write_config: Write) -> None:
    """The prototypes follow the folder while sortd runs."""
    with running(write_config()) as daemon:
        shutil.rmtree(colours / "Clases" / "red")
        daemon.wait_for("prototypes.rebuilt", classes=2)
        folder = colours / "Clases" / "crimson"
        folder.mkdir()
        for number in range(3):
            picture("red", 50 + number).save(folder / f"{number}.png")
        daemon.wait_for("prototypes.rebuilt", classes=3, references=11)
        picture("red", 9).save(colours / "Images" / "new.png")
        assert daemon.wait_for("image.filed")["label"] == "crimson"
        folder.rename(colours / "Clases" / "scarlet")
        daemon.wait_until(
            lambda: "scarlet" in (colours.parent.parent / "state" / "status.json").read_text(), "the renamed class"
        )
        picture("red", 10).save(colours / "Images" / "newer.png")
        assert daemon.wait_for("image.filed", count=2)["label"] == "scarlet"


def test_datasets_come_and_go_while_running(colours: Path, write_config: Write) -> None:
    """A new dataset is taken up, a vanished one let go, the other goes on."""
    with running(write_config(), keeps_files=False) as daemon:
        second = make_dataset(colours.parent, "Second")
        daemon.wait_for("dataset.added", dataset="Second")
        daemon.wait_for("prototypes.rebuilt", dataset="Second", classes=3, references=12)
        picture("blue", 1).save(second / "Images" / "a.png")
        daemon.wait_for("image.filed", dataset="Second")
        shutil.rmtree(second)
        daemon.wait_for("dataset.gone", dataset="Second")
        picture("blue", 2).save(colours / "Images" / "b.png")
        daemon.wait_for("image.filed", dataset="Colours")
        assert daemon.stop() == 0


def test_absent_references_stop_the_moves_until_they_are_back(colours: Path, write_config: Write) -> None:
    """Absent is not empty: nothing moves, nothing is lost, and it heals by itself."""
    with running(write_config(rescan_seconds=1), SORTD_LOG__LEVEL="debug") as daemon:
        clases = colours / "Clases"
        clases.rename(colours / "elsewhere")
        daemon.wait_for("prototypes.rebuild_failed")
        picture("red", 1).save(colours / "Images" / "waits.png")
        daemon.wait_for_scans(2)
        assert not daemon.events("image.filed")
        (colours / "elsewhere").rename(clases)
        daemon.wait_for("image.filed")


@pytest.mark.usefixtures("colours")
def test_daemon_unchanged_folder_serves_without_any_embedding(write_config: Write) -> None:
    """The last prototype set is cached: a second start encodes nothing and keeps the generation."""
    config = write_config()
    with running(config) as daemon:
        first = daemon.wait_for("prototypes.rebuilt")
        daemon.stop()
    assert (first["changed"], first["generation"]) == (True, 1)
    with running(config) as daemon:
        second = daemon.wait_for("prototypes.rebuilt")
    assert (second["changed"], second["generation"], second["encoded_batches"]) == (False, 1, 0)


def test_reload_takes_changes_and_refuses_mistakes(colours: Path, write_config: Write) -> None:
    """SIGHUP: a changed mode serves; a bad file keeps the old one and says so."""
    config = write_config()
    with running(config) as daemon:
        write_config(mode="avg")
        daemon.send(signal.SIGHUP)
        daemon.wait_for("config.reloaded")
        daemon.wait_for("prototypes.rebuilt", mode="avg")
        write_config(mode="mode-that-is-not")
        daemon.send(signal.SIGHUP)
        assert "mode" in daemon.wait_for("config.refused")["error"]
        picture("red", 1).save(colours / "Images" / "a.png")
        assert daemon.wait_for("image.filed")["mode"] == "avg"


def test_daemon_status_and_metrics_that_cannot_be_written_end_nothing(
    colours: Path, write_config: Write, tmp_path: Path
) -> None:
    """A status and metrics that cannot be written are said, and images are filed as ever."""
    (tmp_path / "state" / "status.json" / "in the way").mkdir(parents=True)
    with running(write_config(metrics=f"{{textfile: {tmp_path}/absent/sortd.prom}}")) as daemon:
        daemon.wait_for("daemon.hampered", path=f"{tmp_path}/state/status.json")
        daemon.wait_until(lambda: len({line["path"] for line in daemon.events("daemon.hampered")}) > 1, "the metrics")
        picture("red", 1001).save(colours / "Images" / "a.png")
        daemon.wait_for("image.filed")
        assert daemon.stop() == 0


def test_daemon_address_of_the_metrics_that_is_taken_ends_nothing(colours: Path, write_config: Write) -> None:
    """`check` finds it, log and status say it, images are filed; a reload takes another address, and none."""
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.create_server(("127.0.0.1", 0)) as free:
        port, other = taken.getsockname()[1], free.getsockname()[1]
        free.close()
        config = write_config(metrics=f"{{http: {port}}}")
        checked = sortd("check", "-c", config, "--json")
        assert checked.code == 78
        (found,) = [one for one in checked.facts["findings"] if one["subject"] == "metrics.http"]
        assert (found["severity"], found["topic"]) == ("error", "configuration")
        with running(config) as daemon:
            line = daemon.wait_for("endpoint.failed", address=f"127.0.0.1:{port}")
            assert line["error"] == f"metrics.http: {found['what']}; {found['mend']}"
            picture("red", 1001).save(colours / "Images" / "a.png")
            daemon.wait_for("image.filed")
            facts = sortd("status", "-c", config, "--json").facts
            assert facts["endpoint"] == {"address": f"127.0.0.1:{port}", "problem": line["error"]}
            assert "Address already in use" in sortd("status", "-c", config).out
            assert found in sortd("check", "-c", config, "--json").facts["findings"]
            write_config(metrics=f"{{http: {other}}}")
            daemon.send(signal.SIGHUP)
            daemon.wait_for("endpoint.listening", address=f"127.0.0.1:{other}")
            assert daemon.wait_for("config.reloaded")["restart_needed_for"] == []
            with urllib.request.urlopen(f"http://127.0.0.1:{other}/metrics", timeout=PATIENCE_SECONDS) as answer:
                assert b"sortd_images_total" in answer.read()
            daemon.wait_until(
                lambda: sortd("status", "-c", config, "--json").facts["endpoint"]["problem"] is None, "the status"
            )
            assert "metrics.http" not in sortd("check", "-c", config).out
            write_config()
            daemon.send(signal.SIGHUP)
            daemon.wait_for("config.reloaded", count=2)
            daemon.wait_until(lambda: sortd("status", "-c", config, "--json").facts["endpoint"] is None, "the status")
            daemon.wait_until(lambda: is_refused(("127.0.0.1", other)), "the end of the endpoint")
            assert daemon.stop() == 0
        assert len(daemon.events("endpoint.failed")) == 1


def test_daemon_reload_names_each_key_that_still_waits_for_a_restart(colours: Path, write_config: Write) -> None:
    """Also those of an earlier reload, and metrics, if none were on at the start."""
    assert colours.is_dir()
    with running(write_config()) as daemon:
        for count, keys in enumerate(({"metrics": "{http: 9001}"}, {"metrics": "{http: 9002}"}, {}), 1):
            write_config(**keys)
            daemon.send(signal.SIGHUP)
            waits = daemon.wait_for("config.reloaded", count=count)["restart_needed_for"]
            assert waits == (["metrics.http"] if keys else [])


def test_daemon_limit_of_messages_continues_after_a_restart(colours: Path, write_config: Write) -> None:
    """What two runs report of two missing datasets: one message, and the others wait for the next hour."""
    folder = colours.parent.parent
    config = write_config(
        datasets="{First: {mode: max}, Second: {mode: max}}",
        notify="{messages_per_hour: 1}",
        hooks=json.dumps([{"command": ["sh", "-c", f"cat >> {folder}/heard"], "timeout_seconds": 1000}]),
    )
    state = folder / "state" / "notifications.json"

    def held_back() -> int:
        found = json.loads(state.read_bytes())["held_back"] if state.exists() else {}
        return int(found.get("disk_missing", {}).get("count", 0))

    for run in (1, 2):
        with running(config) as daemon:
            daemon.wait_until((folder / "heard").exists, "the message")
            daemon.wait_until(lambda: held_back() >= 2 * run - 1, "what is held back")  # noqa: B023 -- waited for here
            assert daemon.stop() == 0
    (message,) = (folder / "heard").read_text().splitlines()
    assert json.loads(message)["event"] == "disk_missing"


def test_dataset_that_a_second_sortd_took_is_held_until_that_ends(
    colours: Path, write_config: Write, tmp_path: Path
) -> None:
    """The marker is made anew under a sortd, and one with another state folder begins: only that one files."""
    with running(write_config()) as first:
        first.send(signal.SIGSTOP)  # or it would take the new lock before the second one does
        shutil.rmtree(colours / ".sortd")
        with running(write_config(state_dir=tmp_path / "other")) as second:
            first.send(signal.SIGCONT)
            assert "another sortd works on" in first.wait_for("prototypes.rebuild_failed")["error"]
            picture("red", 1001).save(colours / "Images" / "a.png")
            second.wait_for("image.filed", path=str(colours / "Images" / "a.png"))
            assert second.stop() == 0
        first.wait_for("prototypes.rebuilt", count=2)
        picture("red", 1002).save(colours / "Images" / "b.png")
        first.wait_for("image.filed", path=str(colours / "Images" / "b.png"))
        assert first.stop() == 0
        assert len(first.events("image.filed")) == 1


def test_requests_of_any_kind_neither_stop_nor_hang_the_daemon(
    colours: Path, write_config: Write, tmp_path: Path
) -> None:
    """What is behind them is answered, a stop is obeyed, and the next start works."""
    config, state = write_config(), tmp_path / "state"
    with running(config) as daemon:
        for kind, make in HOSTILE.items():
            make(state / "requests" / f"{kind}.request")
        (state / "requests" / "deep.request").write_text("[" * 200_000)
        daemon.send(signal.SIGUSR1)
        request = {"do": "rebuild", "datasets": None, "force": False}
        assert ask(state, request, seconds=PATIENCE_SECONDS) == {"rebuilding": [colours.name]}
        assert daemon.stop() == 0
    with running(config) as daemon:
        assert daemon.stop() == 0


def test_daemon_second_start_on_the_same_data_is_refused(colours: Path, write_config: Write) -> None:
    """Exit 75 and a sentence; the first goes on."""
    config = write_config()
    with running(config) as daemon:
        daemon.wait_until(lambda: "pid" in sortd("status", "-c", config, "--json").facts, "the status")
        second = subprocess.run(
            [sys.executable, "-m", "tests.fast_sortd", "run", "-c", str(config)],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
        assert second.returncode == 75
        assert "another sortd works on" in second.stderr
        assert sortd("status", "-c", config, "--json").facts["pid"] == daemon.process.pid
        assert "Traceback" not in second.stderr
        picture("red", 1).save(colours / "Images" / "a.png")
        daemon.wait_for("image.filed")


def test_run_dataset_with_a_damaged_journal_is_held_until_it_is_mended(
    colours: Path, write_config: Write, tmp_path: Path
) -> None:
    """The others are served; log, status, check and metrics have the cause; once it is gone the dataset is taken up."""
    bad = make_dataset(colours.parent, "Bad")
    journal = Layout(bad).state_folder(tmp_path / "state") / "journal.sqlite"
    journal.parent.mkdir(parents=True)
    journal.write_bytes(b"garbage" * 1000)
    picture("red", 1).save(bad / "Images" / "a.png")
    picture("red", 2).save(colours / "Images" / "a.png")
    config, metrics = write_config(metrics=f"{{textfile: {tmp_path}/sortd.prom}}"), tmp_path / "sortd.prom"
    with running(config) as daemon:
        line = daemon.wait_for("dataset.held", dataset="Bad", cause="journal")
        assert f"{journal}: the journal is damaged" in line["error"]
        assert "move it aside" in line["error"]
        daemon.wait_for("image.filed", dataset="Colours")
        daemon.wait_until(lambda: "Bad" in sortd("status", "-c", config, "--json").out, "the status")
        facts = sortd("status", "-c", config, "--json").facts["datasets"]["Bad"]
        assert (facts["problem"], facts["moving"]) == (line["error"], False)
        assert facts["held_since"]
        assert "nothing in it is moved" in sortd("status", "-c", config).out
        checked = sortd("check", "-c", config)
        assert checked.code == 78
        assert f"is held, so nothing in it is moved: {line['error']}" in checked.out
        daemon.wait_until(
            lambda: metrics.exists() and 'sortd_dataset_held{dataset="Bad"} 1.0' in metrics.read_text(), "the metrics"
        )
        assert sortd("rebuild", "Bad", "-c", config).err.startswith("the dataset 'Bad' is held: ")
        journal.rename(tmp_path / "aside")
        daemon.wait_for("image.filed", dataset="Bad")
        assert daemon.stop() == 0
        assert len(daemon.events("dataset.held")) == 1


def test_once_dataset_that_is_held_ends_it_by_its_cause_after_the_others(
    colours: Path, write_config: Write, tmp_path: Path
) -> None:
    """Images of the others are filed; the exit code is that of the storage, and the sentence says which dataset."""
    bad = make_dataset(colours.parent, "Bad")
    journal = Layout(bad).state_folder(tmp_path / "state") / "journal.sqlite"
    journal.mkdir(parents=True)
    picture("red", 2).save(colours / "Images" / "a.png")
    with DaemonProcess(write_config(), "once") as daemon:
        assert daemon.wait() == 74
        journal.rmdir()
    assert list(tree(colours / "Dataset")) == ["red/a.png"]
    (line,) = daemon.events("daemon.failed", exit_code=74)
    assert line["error"].startswith("Bad: ")
    assert "Is a directory" in line["error"]


def test_sigterm_under_work_ends_soon_with_nothing_half_done(colours: Path, write_config: Write) -> None:
    """Every file stands in exactly one place; the next start files the rest."""
    for number in range(200):
        picture("red", number, (400, 300)).save(colours / "Images" / f"{number}.png")
    contents = set(tree(colours / "Images").values())
    config = write_config()
    with running(config) as daemon:
        daemon.wait_for("image.filed", count=5)
        assert daemon.stop() == 0
    left, filed = tree(colours / "Images"), tree(colours / "Dataset")
    assert len(left) + len(filed) == 200
    assert set(left.values()) | set(filed.values()) == contents
    with DaemonProcess(config, "once") as again:
        assert again.wait() == 0
    assert set(tree(colours / "Dataset").values()) == contents


def wait_for_a_move(daemon: DaemonProcess, inbox: Path) -> None:
    """Wait until something was filed, or nothing is left to be."""
    daemon.wait_until(lambda: bool(daemon.events("image.filed")) or not os.listdir(inbox), "a move")


def test_kill_minus_nine_loses_nothing(colours: Path, write_config: Write) -> None:
    """Killed in the middle of moves and started again: every file once, none changed."""
    for number in range(60):
        picture("blue", number).save(colours / "Images" / f"{number}.png")
    contents = set(tree(colours / "Images").values())
    config = write_config()
    for _ in range(3):
        with running(config) as daemon:
            wait_for_a_move(daemon, colours / "Images")
            daemon.stop(signal.SIGKILL)
    with DaemonProcess(config, "once") as daemon:
        assert daemon.wait() == 0
    filed = tree(colours / "Dataset")
    assert len(filed) == 60
    assert set(filed.values()) == contents


def test_once_files_what_is_there_and_stops(colours: Path, write_config: Write) -> None:
    """Exit 0 when nothing is left to do."""
    picture("green", 1).save(colours / "Images" / "a.png")
    with DaemonProcess(write_config(), "once") as daemon:
        assert daemon.wait() == 0
    assert list(tree(colours / "Dataset")) == ["green/a.png"]


def test_once_times_beyond_64_bits_of_nanoseconds_are_files_like_others(colours: Path, write_config: Write) -> None:
    """Images, sidecars, references and folders of the year 2445: all is learnt, filed, checked and told."""
    picture("green", 1).save(colours / "Images" / "a.png")
    (colours / "Images" / "a.xmp").write_text("notes")
    (colours / "Clases" / "green" / "class.txt").write_text("a green thing")
    for path in [*colours.rglob("*"), colours]:
        os.utime(path, ns=(15_000_000_000 * 10**9, 15_000_000_000 * 10**9))
    config = write_config()
    with DaemonProcess(config, "once") as daemon:
        assert daemon.wait() == 0, daemon.tail()
    assert sorted(tree(colours / "Dataset")) == ["green/a.png", "green/a.xmp"]
    assert sortd("check", "-c", config).code == 0
    assert sortd("status", "-c", config, "--json").facts["datasets"]["Colours"]["total"] == {"filed": 1}


def test_once_with_a_dataset_inside_another_logs_it(colours: Path, write_config: Write) -> None:
    """The inner one is ignored, the outer one is served; each line of the log is JSON."""
    (colours / "Inner" / "Clases").mkdir(parents=True)
    with DaemonProcess(write_config(), "once") as daemon:
        assert daemon.wait() == 0
    (line,) = daemon.events("dataset.nested")
    assert (line["path"], line["error"]) == (str(colours / "Inner"), f"lies inside the dataset {colours}")
    assert line["advice"].startswith(f"set `root` to {colours.parent}")
    assert daemon.noise == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_once_that_is_stopped_says_that_something_is_left(
    colours: Path, write_config: Write, number: signal.Signals
) -> None:
    """A script can tell by its exit code that it must run again, and the next run does the rest."""
    picture("green", 1).save(colours / "Images" / "a.png")
    with DaemonProcess(write_config(settle_seconds=3600), "once") as daemon:
        daemon.wait_for("daemon.ready")
        assert daemon.stop(number) == 75
    assert (colours / "Images" / "a.png").is_file()
    with DaemonProcess(write_config(), "once") as daemon:
        assert daemon.wait() == 0
    assert list(tree(colours / "Dataset")) == ["green/a.png"]


def test_daemon_dry_run_touches_nothing(colours: Path, write_config: Write, tmp_path: Path) -> None:
    """It says where the image would go and leaves every byte, name and time as they were."""
    picture("green", 1).save(colours / "Images" / "a.png")
    config = write_config()

    def snapshot() -> dict[str, tuple[int, int]]:
        return {str(p): (p.lstat().st_mtime_ns, p.lstat().st_size) for p in sorted(tmp_path.rglob("*"))}

    before = snapshot()
    with DaemonProcess(config, "once", "--dry-run", "-v") as daemon:
        assert daemon.process.stdout is not None
        said = daemon.process.stdout.read()
        assert daemon.wait() == 0
    assert snapshot() == before
    assert "Colours/Images/a.png\tColours/Dataset/green/\t" in said
    assert "Colours: 1 would be filed, 0 would go to Review" in said
    assert not (colours / ".sortd").exists()


def test_daemon_hold_of_the_guard_outlives_a_kill_and_ends_by_release_alone(colours: Path, write_config: Write) -> None:
    """Held images stay where they are run after run, a dry run promises no move, and release tells what it did."""
    teach(colours)
    config = write_config(mode="best", abstain="{precision: 0.95}")
    with DaemonProcess(config, "once") as daemon:
        assert daemon.wait() == 0
    picture("red", 4000, patches=40).save(colours / "Clases" / "red" / "another.png")
    draw_strangers(colours / "Images", 220)
    with running(config) as daemon:
        daemon.wait_for("dataset.held")
        assert daemon.stop(signal.SIGKILL) == -signal.SIGKILL
    with DaemonProcess(config, "once", "--dry-run") as daemon:
        assert daemon.process.stdout is not None
        assert daemon.process.stdout.read() == ""
        assert daemon.wait() == 78
        assert "images would go to review" in daemon.tail()
    with running(config) as daemon:
        daemon.wait_for("dataset.held")
        one = sortd("release", colours / "Images" / "stranger007.png", "-c", config)
        assert (one.code, "is not held" in one.err) == (65, True)
        daemon.send(signal.SIGHUP)
        daemon.wait_for("prototypes.rebuilt", count=2)
        assert not daemon.events("image.sent_to_review")
        released = sortd("release", "--all", "-c", config)
        assert "the dataset is released" in released.out
        assert "nothing is held" not in released.err
        daemon.wait_for("image.sent_to_review", count=220)
        assert daemon.stop() == 0
    assert len(tree(colours / "Review")) == 220


def test_daemon_dry_run_tells_what_once_does(colours: Path, write_config: Write) -> None:
    """Undone images that are held, and images in Review/ that are decided again, are told as they are treated."""
    teach(colours)
    config = write_config(mode="best", abstain="{precision: 0.95}")
    draw_strangers(colours / "Images", 1)
    picture("red", 5000, patches=40).save(colours / "Images" / "a.png")
    with DaemonProcess(config, "once") as daemon:
        assert daemon.wait() == 0
        assert daemon.events("image.sent_to_review")
    assert sortd("undo", colours / "Dataset" / "red" / "a.png", "-c", config).code == 0
    config = write_config()
    with DaemonProcess(config, "once", "--dry-run", "--json") as daemon:
        assert daemon.process.stdout is not None
        said = daemon.process.stdout.read()
        assert daemon.wait() == 0
    with DaemonProcess(config, "once") as daemon:
        assert daemon.wait() == 0
        done = [(line["path"], line["destination"]) for line in daemon.events("image.filed")]
    assert [(line["path"], line["destination"]) for line in map(json.loads, said.splitlines())] == done
    assert [Path(source).name for source, _ in done] == ["stranger000.png"]
    assert (colours / "Images" / "a.png").exists()


def test_daemon_correction_is_noticed_and_learnt(colours: Path, write_config: Write) -> None:
    """A file that the user moves to another class is told, and becomes a reference where it lies."""
    with running(write_config(learn_from_corrections="true")) as daemon:
        picture("red", 1).save(colours / "Images" / "a.png")
        filed = Path(daemon.wait_for("image.filed")["destination"])
        (colours / "Dataset" / "green").mkdir()
        filed.rename(colours / "Dataset" / "green" / "a.png")
        line = daemon.wait_for("image.corrected")
        assert (line["label"], line["corrected_label"]) == ("red", "green")
        daemon.wait_for("prototypes.rebuilt", references=13)
    assert len(tree(colours / "Clases")) == 12


def test_daemon_confirmation_is_noticed_and_learnt(colours: Path, write_config: Write) -> None:
    """Images of Review/ that a person moves to their class while sortd runs, or while it is stopped, are references.

    A copy teaches nothing while the image itself is still there.
    """
    config = write_config(learn_from_corrections="true", mode="best", abstain="{precision: 0.95}")
    teach(colours)
    draw_strangers(colours / "Images", 4)
    with running(config) as daemon:
        daemon.wait_for("image.sent_to_review", count=4)
        lines = {Path(line["path"]).name: line for line in daemon.events("image.sent_to_review")}
        first, second, third, copied = (lines[name] for name in sorted(lines))
        classes = colours / "Dataset"
        for label in ("red", "green", "blue"):
            (classes / label).mkdir(exist_ok=True)
        shutil.copyfile(copied["destination"], classes / copied["label"] / "copied.png")
        Path(first["destination"]).rename(classes / first["label"] / "first.png")
        assert daemon.wait_for("image.confirmed")["label"] == first["label"]
        daemon.wait_for("prototypes.rebuilt", references=85)
    Path(second["destination"]).rename(classes / second["label"] / "second.png")
    other = next(label for label in ("red", "green", "blue") if label != third["label"])
    Path(third["destination"]).rename(classes / other / Path(third["destination"]).name)
    with running(config) as daemon:
        assert daemon.wait_for("image.confirmed")["path"] == str(classes / second["label"] / "second.png")
        assert daemon.wait_for("image.corrected")["corrected_label"] == other
        daemon.wait_for("prototypes.rebuilt", references=87)
        (facts,) = sortd("status", "-c", config, "--json").facts["datasets"].values()
        assert "learnt" in sortd("status", "-c", config).out
    ways = {"corrected": 0, "confirmed": 0}
    for one in facts["learnt"].values():
        ways = {how: ways[how] + one[how] for how in ways}
    assert ways == {"corrected": 1, "confirmed": 2}
    rows = sortd("history", "-c", config, "--json").facts["moves"]
    given = {Path(row["to"]).name: row for row in rows if row["outcome"] in {"confirmed", "corrected"}}
    assert {name: (row["outcome"], row["label"], row["learnt"]) for name, row in given.items()} == {
        "first.png": ("confirmed", first["label"], True),
        "second.png": ("confirmed", second["label"], True),
        Path(third["destination"]).name: ("corrected", other, True),
    }
    found = sortd("history", "-c", config, "--outcome", "confirmed", "--label", first["label"]).out
    assert "first.png" in found
    assert f"best guess: {first['label']}" in sortd("history", "-c", config, "--outcome", "sent_to_review").out
    assert "corrected" not in found
    assert len(sortd("history", "-c", config, "--path", first["destination"], "--json").facts["moves"]) == 2
    assert len(tree(colours / "Clases")) == 84


def test_names_that_are_not_utf8_are_filed_and_logged(colours: Path, write_config: Write) -> None:
    """A name of raw bytes survives the log, the journal and the move."""
    name = os.fsdecode(b"caf\xe9\nnew line.png")
    picture("red", 1).save(colours / "Images" / "plain.png")
    os.rename(colours / "Images" / "plain.png", os.path.join(colours, "Images", name))
    with running(write_config()) as daemon:
        daemon.wait_for("image.filed")
        assert daemon.stop() == 0
    assert os.path.exists(os.path.join(colours, "Dataset", "red", name))


def test_daemon_ruined_references_do_not_replace_good_ones_unless_forced(colours: Path, write_config: Write) -> None:
    """The reload gate keeps the old generation, says so and how to force it; force is obeyed."""
    for index, colour in enumerate(["red", "green", "blue"]):
        for number in range(12):
            picture(colour, 1000 + 100 * index + number, patches=40).save(
                colours / "Clases" / colour / f"more{number}.png"
            )
    config = write_config(mode="best")
    with running(config) as daemon:
        daemon.wait_for("prototypes.rebuilt", references=48)
        for index, wrong in enumerate(["green", "blue", "red"]):
            folder = colours / "Clases" / ["red", "green", "blue"][index]
            for number in range(16):
                picture(wrong, 5000 + 100 * index + number, patches=40).save(folder / f"wrong{number}.png")
        line = daemon.wait_for("prototypes.rebuild_failed")
        assert "sortd rebuild --force Colours" in line["error"]
        picture("red", 1).save(colours / "Images" / "a.png")
        assert daemon.wait_for("image.filed")["generation"] == 1
        forced = subprocess.run(
            [sys.executable, "-m", "sortd", "rebuild", "--force", "-c", str(config)],
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
        assert forced.returncode == 0, forced.stderr
        daemon.wait_for("prototypes.rebuilt", references=96)


def test_daemon_before_the_model_is_loaded_is_alive_but_not_ready(colours: Path, write_config: Write) -> None:
    """``/healthz`` answers 200 at once, ``/readyz`` when images are processed, and until then 503 with the reason."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    os.mkfifo(gate := colours.parent.parent / "gate")

    def got(path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=PATIENCE_SECONDS) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as refused:
            with refused:
                return refused.code, refused.read().decode()
        except urllib.error.URLError:
            return 0, ""  # it does not listen yet

    environment = {"LOAD_GATE": str(gate), "BREAK_FILE": str(gate.with_name("break"))}
    config = write_config(metrics=f"{{http: '{port}'}}")
    with DaemonProcess(config, program="tests.broken_sortd", environment=environment) as daemon:
        daemon.wait_until(lambda: got("/readyz")[0] == 503, "an answer while the model is not loaded")
        assert not daemon.events("model.loaded")
        status, text = got("/readyz")
        assert status == 503
        assert json.loads(text)["ready"] is False
        assert "load" in json.loads(text)["reasons"][0]
        assert got("/healthz") == (200, "ok\n")
        assert "sortd_ready 0.0" in got("/metrics")[1]
        gate.write_bytes(b"")
        daemon.wait_for("daemon.ready")
        assert (got("/readyz")[0], json.loads(got("/readyz")[1])) == (200, {"ready": True, "reasons": []})
        assert got("/")[0] == 404
        assert daemon.stop() == 0
