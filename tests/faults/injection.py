"""Runs of one function in a child process, with faults that strace injects into chosen system calls of it.

strace counts per name of a system call, so that each fault names one call and one count. Whether a fault struck is
read from strace's own log, never assumed.
"""

import os
import re
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MUTATING = frozenset(
    {
        "openat",
        "write",
        "pwrite64",
        "fsync",
        "fdatasync",
        "renameat2",
        "rename",
        "renameat",
        "link",
        "linkat",
        "symlinkat",
    }
    | {"unlink", "unlinkat", "mkdir", "mkdirat", "fchmod", "fchown", "utimensat", "fsetxattr", "ftruncate"}
)
READING = frozenset(
    {"read", "pread64", "newfstatat", "fstat", "getdents64", "lseek", "fcntl", "close", "flistxattr", "fgetxattr"}
    | {"access", "readlink", "getcwd", "stat", "lstat", "sync_file_range"}
)
CALLS = MUTATING | READING
_CALL = re.compile(r"^(?:\[pid +\d+\] )?(?:\d+ +)?(\w+)\(", re.MULTILINE)
PATIENCE_SECONDS = 60.0


@dataclass(frozen=True)
class Fault:
    """One fault: at the ``count``-th call of that name, killed or answered with an error."""

    call: str
    count: int
    error: str = ""  # empty: SIGKILL
    lasting: bool = False  # every later call of that name fails too

    @property
    def injection(self) -> str:
        """The fault as strace's option spells it."""
        what = f"error={self.error}" if self.error else "signal=KILL"
        return f"inject={self.call}:{what}:when={self.count}{'+' if self.lasting else ''}"


@dataclass(frozen=True)
class Run:
    """How a child ended."""

    status: int  # as os.waitpid gives it
    log: str

    @property
    def has_struck(self) -> bool:
        """Whether the fault was injected, and, where it was to kill, killed."""
        return "(INJECTED)" in self.log or "+++ killed by SIGKILL +++" in self.log

    @property
    def was_killed(self) -> bool:
        """Whether the child was killed."""
        return os.WIFSIGNALED(self.status) and os.WTERMSIG(self.status) == signal.SIGKILL

    def calls(self) -> Counter[str]:
        """Return how often each system call was made."""
        return Counter(name for name in _CALL.findall(self.log) if name in CALLS)


def run_child(act: Callable[[], object], faults: tuple[Fault, ...] = (), *, traced: bool = True) -> Run:
    """Run a function in a child of this process; errors that it raises end the child with status 1."""
    child = be_child(act)
    if not traced:
        os.kill(child, signal.SIGCONT)
        return Run(os.waitpid(child, 0)[1], "")
    with tempfile.NamedTemporaryFile("r", suffix=".strace") as log:
        options = [option for fault in faults for option in ("-e", fault.injection)]
        names = ",".join(sorted({fault.call for fault in faults} or CALLS))
        tracer = attached(child, log.name, ["-e", f"trace={names}", *options])
        os.kill(child, signal.SIGCONT)
        status = os.waitpid(child, 0)[1]
        tracer.wait(PATIENCE_SECONDS)
        if tracer.stderr:
            tracer.stderr.close()
        return Run(status, Path(log.name).read_text())


def can_trace() -> str:
    """Return why faults cannot be injected here; empty if they can."""
    try:
        run = run_child(lambda: os.stat("/"), (Fault("newfstatat", 1, "EIO"),))
    except (OSError, RuntimeError) as error:
        return f"strace cannot attach to a child here: {error}"
    return "" if run.has_struck else "strace does not inject here"


def attached(child: int, log: str, options: list[str]) -> "subprocess.Popen[str]":
    """Return a strace that has taken hold of a child which stands still."""
    command = ["strace", "-p", str(child), "-o", log, *options]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while tracer.stderr is not None and time.monotonic() < deadline:
        line = tracer.stderr.readline()
        if "attached" in line:
            return tracer
        if not line:
            break
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise RuntimeError("strace did not attach")


def be_child(act: Callable[[], object]) -> int:
    """Fork a child that stands still before it runs the function; SIGCONT lets it go on."""
    child = os.fork()
    if child != 0:
        os.waitpid(child, os.WUNTRACED)
        return child
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what it raises is told by its status and the tally
        os.kill(os.getpid(), signal.SIGSTOP)
        act()
    except BaseException:  # noqa: BLE001 - a child must never return into the caller's code
        os._exit(1)
    os._exit(0)
