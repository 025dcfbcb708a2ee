"""`sortd notify` lists where notifications go, and finds out whether they arrive."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sortd.commands.check import check_all
from sortd.commands.findings import Severity
from tests.command_line import sortd

SECRET = "sesame"  # noqa: S105 -- what no output may contain


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration with an address that nothing answers, a good hook and one that is missing."""
    (tmp_path / "Data").mkdir()
    path = tmp_path / "config.yaml"
    path.write_text(
        f"root: Data\nstate_dir: state\ncache_dir: cache\n"
        f"notify: {{urls: [json://user:{SECRET}@127.0.0.1:1], messages_per_hour: 7, quiet_hours: 22:00-07:00}}\n"
        f"hooks: [{{command: [tee, {tmp_path}/out], events: [dataset_held]}}, {{command: [./missing, {SECRET}]}}]\n"
    )
    return path


def test_notify_lists_targets_events_and_limits(config: Path) -> None:
    """Neither an address nor the arguments of a command are shown."""
    ran = sortd("notify", "-c", config)
    assert ran.code == 0
    assert "hooks.0 (tee)\tdataset_held\n" in ran.out
    assert "at most 7 messages an hour, none at 22:00-07:00" in ran.out
    assert SECRET not in ran.out + ran.err


def test_notify_test_sends_a_message_to_each_target_and_says_what_failed(config: Path) -> None:
    """It does so in quiet hours, too, whatever the events of a target; the exit code tells of a failure."""
    ran = sortd("notify", "--test", "--json", "-c", config)
    assert ran.code == 69
    assert {row["target"]: row["problem"] for row in ran.facts["targets"]} == {
        "notify.urls.0": "exit code 1: the service cannot be reached",
        "hooks.0 (tee)": None,
        f"hooks.1 ({config.parent}/missing)": "cannot be started: No such file or directory",
    }
    assert SECRET not in ran.out + ran.err
    assert json.loads((config.parent / "out").read_text())["event"] == "test"


def test_notify_test_under_a_parent_that_ignores_the_end_of_children_sees_failures(tmp_path: Path) -> None:
    """A program started so inherits it, and could not wait for its own children."""
    (tmp_path / "Data").mkdir()
    config = tmp_path / "config.yaml"
    config.write_text("root: Data\nstate_dir: state\ncache_dir: cache\nhooks: [{command: ['false']}]\n")
    script = f"trap '' CHLD; exec {shlex.join([sys.executable, '-m', 'sortd'])} notify --test --json -c {config}"
    ran = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (69, "")
    assert json.loads(ran.stdout)["targets"][0]["problem"] == "exit code 1"


def test_notify_test_without_a_target_is_an_error(tmp_path: Path) -> None:
    """The message says what to add."""
    (tmp_path / "config.yaml").write_text("root: .\nstate_dir: state\ncache_dir: cache\n")
    ran = sortd("notify", "--test", "-c", tmp_path / "config.yaml")
    assert (ran.code, ran.err) == (
        78,
        "no target is configured; add `notify.urls` or `hooks`, see config.example.yaml",
    )


def test_check_finds_what_keeps_notifications_from_being_sent(config: Path) -> None:
    """A program or a file that is missing is an error; a variable may be one of the service only."""
    text = config.read_text().replace("urls: [", "urls: [{url_file: nothing}, '${SORTD_NO_SUCH_VARIABLE}', ")
    config.write_text(text)
    found = {
        one.subject: (one.severity, one.what)
        for one in check_all(config, {"HOME": str(config.parent)})
        if one.subject.startswith(("notify.", "hooks."))
    }
    assert found == {
        "notify.urls.0": (Severity.ERROR, f"{config.parent}/nothing cannot be read: No such file or directory"),
        "notify.urls.1": (Severity.WARNING, "the environment variable SORTD_NO_SUCH_VARIABLE is not set"),
        f"hooks.1 ({config.parent}/missing)": (
            Severity.ERROR,
            f"{config.parent}/missing is missing or not executable",
        ),
    }
