"""What the benchmarks share: their command line, their JSON, a configuration, and what processes cost."""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

REPOSITORY = Path(__file__).parents[1]
TICKS = os.sysconf("SC_CLK_TCK")
INSTRUCTIONS = ("avx2", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
"""The ones that the speed of int8 depends on, as Linux names them (x86 and ARM)."""


def argument_parser(description: str | None, *, rounds: int | None = None) -> argparse.ArgumentParser:
    """Return a parser with the option ``--json``, and ``--rounds`` if there is a default number of them."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    if rounds is not None:
        parser.add_argument(
            "--rounds", type=int, default=rounds, help="of all sides; five are the fewest for a verdict"
        )
    return parser


def print_json(figures: object, *, n: int) -> None:
    """Print figures as JSON, with the machine and the number of measurements (rounds, draws, seeds) behind each."""
    print(json.dumps({"machine": machine(), "n": n, "figures": figures}, indent=2))


def machine() -> dict[str, object]:
    """Return what figures depend on: processors, their instructions, system, and the load of the last minute."""
    lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    flags = next((line.split() for line in lines if line.startswith(("flags", "Features"))), [])
    return {
        "processor": next(named, platform.machine()),
        "instructions": [name for name in INSTRUCTIONS if name in flags],
        "processors": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2),
    }


def write_config(folder: Path, **keys: object) -> Path:
    """Write ``config.yaml`` with everything below one folder; ``keys`` are added, or replace those."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"root": folder / "Data", "state_dir": folder / "state", "cache_dir": folder / "cache", **keys}
    path = folder / "config.yaml"
    path.write_text(
        "".join(f"{key}: {json.dumps(value, default=os.fspath)}\n" for key, value in values.items()), "utf-8"
    )
    return path


def resident_mebibytes(pid: int | str = "self", *, peak: bool = False) -> float:
    """Return the resident memory of a process or its peak; 0 if it has ended (proc_pid_status(5))."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:" if peak else "VmRSS:")), 0.0)


def used_seconds() -> float:
    """Return the processor time of this process and of its ended children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def process_tree(pid: int) -> list[int]:
    """Return a process and its living descendants."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            parents[int(entry.name)] = _stat(int(entry.name))[1]
    tree = [pid]
    for parent in tree:
        tree.extend(child for child, of in parents.items() if of == str(parent))
    return tree


def _stat(pid: int) -> list[str]:
    """Return the fields of proc_pid_stat(5) from the state on; zeros if the process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except OSError:
        return ["0"] * 50


def processor_seconds(pid: int) -> float:
    """Return the processor time of a process and its living descendants."""
    return sum((int(fields[11]) + int(fields[12])) / TICKS for fields in map(_stat, process_tree(pid)))


def peak_mebibytes(pid: int) -> float:
    """Return the peak of the resident memory of a process and its descendants; what they share counts for each."""
    return sum(resident_mebibytes(one, peak=True) for one in process_tree(pid))


def reset_peaks(pid: int) -> None:
    """Let the peaks of a process and its descendants be what is resident now (proc_pid_clear_refs(5))."""
    for one in process_tree(pid):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            Path(f"/proc/{one}/clear_refs").write_text("5", encoding="ascii")


class Helper:
    """A process of a module of benchmarks that answers requests: a line of JSON each, see ``answer_requests``."""

    def __init__(self, module: str, *arguments: str) -> None:
        """Start it."""
        command = [sys.executable, "-m", module, *arguments]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
        )
        self.pid = self._process.pid

    def ask(self, request: object) -> Any:  # noqa: ANN401 -- JSON
        """Return the answer to a request.

        Raises:
            RuntimeError: the process has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # its end is noticed below
            print(json.dumps(request, default=os.fspath), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self._process.args!r} has ended with {self._process.wait()}")
        return json.loads(answer)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self._process.communicate()


def answer_requests(answer: Callable[[Any], object]) -> None:
    """Answer each request on stdin until its end."""
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
