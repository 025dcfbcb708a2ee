"""A command of the operator ends within its time, whatever it does, and says why it failed."""

import os
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sortd.daemon.limited_process import INHERITED, run_limited
from tests.daemon_process import PATIENCE_SECONDS

ENVIRONMENT = {"PATH": os.environ["PATH"]}


def shell(script: str, *, message: bytes = b"", seconds: float = PATIENCE_SECONDS) -> str | None:
    """Run a script of sh."""
    return run_limited(["sh", "-c", script], message, seconds=seconds, environment=ENVIRONMENT)


def has_ended(pid: int) -> bool:
    """Tell whether a process has ended, or is a zombie of its new parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until(is_true: Callable[[], bool]) -> None:
    """Wait until something is true."""
    until = time.monotonic() + PATIENCE_SECONDS
    while not is_true():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_command_gets_the_message_on_stdin(tmp_path: Path) -> None:
    """Arguments are no words of a shell, and no other variable is in its environment."""
    out, odd = tmp_path / "out", "a; rm -rf $HOME"
    program = "import os, sys; open(sys.argv[1], 'w').write(repr((sys.stdin.read(), sys.argv[2], sorted(os.environ))))"
    command = [sys.executable, "-c", program, str(out), odd]
    environment = {"PATH": "/usr/bin", "LC_ALL": "C"}
    assert run_limited(command, b"{}\n", seconds=PATIENCE_SECONDS, environment=environment) is None
    message, given, names = eval(out.read_text())  # noqa: S307 -- what the program above wrote
    assert (message, given) == ("{}\n", odd)
    assert {"PATH", "LC_ALL"} <= set(names) <= {"PATH", "LC_ALL", "LC_CTYPE"}  # Python sets LC_CTYPE itself
    assert "LD_PRELOAD" not in INHERITED


def test_command_that_does_not_read_a_large_message_is_no_failure() -> None:
    """The message is a file in memory: nobody waits for a reader."""
    assert shell("exit 0", message=b"x" * 10_000_000) is None


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("echo first >&2; echo last >&2; exit 3", "exit code 3: last"),
        ("exit 4", "exit code 4"),
        ("kill -9 $$", "ended by signal 9"),
        (r"printf '\033[31mred\n' >&2; exit 1", "exit code 1: ?[31mred"),
        ("yes >&2; exit 5", None),
        ("while :; do printf 0123456789; done >&2", None),
    ],
)
def test_command_that_fails_says_why(script: str, problem: str | None) -> None:
    """The last line on stderr is quoted, printable and short; a flood ends by the closed pipe."""
    found = shell(script)
    assert found is not None
    assert found == problem if problem else len(found) < 300


def test_command_that_floods_stdout_is_no_failure() -> None:
    """Its output is dropped."""
    assert shell("yes | head -c 50000000") is None


def test_command_that_is_missing_or_not_executable_says_so(tmp_path: Path) -> None:
    """The reason is that of the system."""
    plain = tmp_path / "plain"
    plain.write_text("#!/bin/sh\n")
    for program, reason in [
        ("/nonexistent/program", "No such file or directory"),
        (str(plain), "Permission denied"),
        (str(tmp_path), "Permission denied"),
    ]:
        found = run_limited([program], b"", seconds=1, environment=ENVIRONMENT)
        assert found == f"cannot be started: {reason}"


@pytest.mark.parametrize(
    "script", ["sleep 1000", "trap '' TERM INT HUP; while :; do sleep 1000; done", "exec 2>&-; sleep 1000"]
)
def test_command_that_hangs_is_killed(script: str) -> None:
    """Signals that it ignores, or a closed stderr, change nothing."""
    assert shell(script, seconds=0.3) == "killed, because it did not end within 0.3 s"


@pytest.mark.parametrize("end", ["wait", "exit 0"])
def test_children_of_a_command_are_killed_with_it(tmp_path: Path, end: str) -> None:
    """The whole process group ends, also if the command itself has ended in time and its child holds stderr."""
    pid = tmp_path / "pid"
    command = ["sh", "-c", f"sleep 1000 & echo $! > {pid}.part; mv {pid}.part {pid}; {end}"]
    run_limited(command, b"", seconds=PATIENCE_SECONDS, environment=ENVIRONMENT, is_stopping=pid.exists)
    wait_until(lambda: has_ended(int(pid.read_text())))


def test_command_is_killed_when_sortd_stops(tmp_path: Path) -> None:
    """The caller returns at once."""
    stopping, found = threading.Event(), list[str | None]()
    started = tmp_path / "started"

    def run() -> None:
        command = ["sh", "-c", f"touch {started}; sleep 1000"]
        found.append(run_limited(command, b"", seconds=1000, environment=ENVIRONMENT, is_stopping=stopping.is_set))

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(started.exists)
    stopping.set()
    thread.join(PATIENCE_SECONDS)
    assert found == ["killed, because sortd stops"]


def test_commands_leave_no_descriptor_open() -> None:
    """A daemon runs for months."""
    before = len(os.listdir("/proc/self/fd"))
    for script in ["exit 0", "exit 1", "yes >&2"]:
        shell(script)
    run_limited(["/nonexistent"], b"", seconds=1, environment=ENVIRONMENT)
    assert len(os.listdir("/proc/self/fd")) == before


def test_output_is_written_to_a_file(tmp_path: Path) -> None:
    """A caller that wants it gives a file."""
    with (tmp_path / "out").open("w+b") as out:
        assert run_limited(["echo", "a"], b"", seconds=PATIENCE_SECONDS, environment=ENVIRONMENT, output=out) is None
        out.seek(0)
        assert re.fullmatch(rb"a\n", out.read())
