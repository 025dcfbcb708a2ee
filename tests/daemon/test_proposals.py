"""Once a day sortd says which images in Review/ could be a class."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from sortd.commands.run import _groups_command
from sortd.daemon.notices import Notice
from sortd.daemon.proposals import Proposals
from tests.daemon_process import PATIENCE_SECONDS


def group(number: int, *members: str, is_new: bool = True) -> dict[str, object]:
    """Return a group as ``sortd groups --json`` prints it."""
    return {"id": f"g{number}", "size": len(members), "is_new": is_new, "nearest_label": "red", "members": members}


def command(file: Path) -> list[str]:
    """Return a command that prints a file."""
    return ["cat", str(file)]


def wait_until(is_true: Callable[[], bool]) -> None:
    """Wait until something is true."""
    until = time.monotonic() + PATIENCE_SECONDS
    while not is_true():
        assert time.monotonic() < until
        time.sleep(0.01)


def look(proposals: Proposals) -> None:
    """Look, and wait until that is over."""
    proposals.look()
    assert proposals._thread is not None
    proposals._thread.join(PATIENCE_SECONDS)
    assert not proposals._thread.is_alive()


def test_groups_that_may_be_classes_are_told_once(tmp_path: Path) -> None:
    """A group that has grown, whose id differs then, is the same; one that resembles a class is none."""
    file, told = tmp_path / "groups", list[Notice]()
    proposals = Proposals(command(file), told.append)
    file.write_text(json.dumps({"datasets": {"A": {"groups": [group(1, "a", "b"), group(2, "c", is_new=False)]}}}))
    look(proposals)
    assert [(one.event, one.dataset, one.facts["image"], one.facts["size"]) for one in told] == [
        ("class_proposed", "A", "a", 2)
    ]
    assert told[0].text == (
        "A: 2 images in Review/ resemble each other and no class; `sortd groups` shows the group g1"
    )
    file.write_text(json.dumps({"datasets": {"A": {"groups": [group(3, "z", "b", "a"), group(4, "x", "y")]}}}))
    look(proposals)
    assert [one.facts["id"] for one in told] == ["g1", "g4"]
    proposals.stop()


def test_command_runs_in_the_folder_of_sortd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration that was found there is found again."""
    (tmp_path / "groups").write_text(json.dumps({"datasets": {"A": {"groups": [group(1, "a")]}}}))
    monkeypatch.chdir(tmp_path)
    told = list[Notice]()
    look(Proposals(["cat", "groups"], told.append))
    assert [one.facts["id"] for one in told] == ["g1"]


def test_groups_that_cannot_be_found_are_logged(tmp_path: Path) -> None:
    """The line has the reason."""
    proposals = Proposals(command(tmp_path / "missing"), lambda _: None)
    with capture_logs() as lines:
        look(proposals)
    (line,) = lines
    assert (line["event"], line["notification"]) == ("notification.failed", "class_proposed")
    assert line["error"].endswith("No such file or directory")


def test_stop_ends_the_search(tmp_path: Path) -> None:
    """A second search does not begin beside the first, and nothing is told after the stop."""
    started, told = tmp_path / "started", list[Notice]()
    proposals = Proposals(["sh", "-c", f"echo x >> {started}; sleep 1000"], told.append)
    proposals.look()
    wait_until(started.exists)
    proposals.look()
    with capture_logs() as lines:
        proposals.stop()
    assert not [thread for thread in threading.enumerate() if thread.name == "proposals"]
    assert (lines, told, started.read_text()) == ([], [], "x\n")


def test_command_of_the_daemon_prints_groups_as_json(tmp_path: Path) -> None:
    """It is the program that runs, with the same configuration, from any folder."""
    (tmp_path / "Data" / "A" / "Clases").mkdir(parents=True)
    config = tmp_path / "config.yaml"
    config.write_text("root: Data\nstate_dir: state\ncache_dir: cache\n")
    made = _groups_command(config)
    assert made[-2:] == ["-c", str(config)]
    done = subprocess.run(
        [sys.executable, "-m", "sortd", *made[made.index("groups") :]], capture_output=True, check=True, cwd="/"
    )
    assert json.loads(done.stdout)["datasets"]["A"]["groups"] == []
