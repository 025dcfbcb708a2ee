"""Gauges: what a process and its children hold, and whether that grows."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ALLOWED = {"files": 8.0, "threads": 4.0, "megabytes": 24.0, "children_megabytes": 24.0}
"""How much more there may be in the last third of a run than in the second: buffers and caches fill by and by."""


@dataclass(frozen=True, slots=True)
class Gauges:
    """What a process holds at one moment."""

    files: int
    threads: int
    megabytes: float  # of memory that is not shared with a file, see proc_pid_status(5)
    children_megabytes: float


def gauges_of(process: int) -> Gauges | None:
    """Look at a process and its children; None where it has ended."""
    try:
        return Gauges(
            files=len(os.listdir(f"/proc/{process}/fd")),
            threads=len(os.listdir(f"/proc/{process}/task")),
            megabytes=own_megabytes(process),
            children_megabytes=sum(own_megabytes(child) for child in children(process)),
        )
    except (FileNotFoundError, ProcessLookupError):
        return None


def own_megabytes(process: int) -> float:
    """Return the memory that is a process's own: anonymous and shared, in megabytes; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    facts = dict(line.split(":", 1) for line in lines)
    return sum(int(facts.get(name, "0 kB").split()[0]) for name in ("RssAnon", "RssShmem")) / 1024


def children(process: int) -> list[int]:
    """Return the processes that a process has started and that live, and theirs."""
    found = []
    for thread in Path(f"/proc/{process}/task").iterdir():
        try:
            found += [int(child) for child in (thread / "children").read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found + [grandchild for child in found for grandchild in _children_of_living(child)]


def _children_of_living(process: int) -> list[int]:
    try:
        return children(process)
    except (FileNotFoundError, ProcessLookupError):
        return []


def growth(samples: Sequence[Gauges]) -> dict[str, dict[str, float | bool]]:
    """Compare the last third of a run with its second third, gauge by gauge; the first third warms up."""
    third = len(samples) // 3
    if third == 0:
        return {}
    readings: dict[str, Callable[[Gauges], float]] = {
        "files": lambda one: one.files,
        "threads": lambda one: one.threads,
        "megabytes": lambda one: one.megabytes,
        "children_megabytes": lambda one: one.children_megabytes,
    }
    found: dict[str, dict[str, float | bool]] = {}
    for name, read in readings.items():
        before = median(read(one) for one in samples[third : 2 * third])
        after = median(read(one) for one in samples[2 * third :])
        found[name] = {
            "before": round(before, 1),
            "after": round(after, 1),
            "highest": round(max(read(one) for one in samples), 1),
            "grew": after - before > ALLOWED[name],
        }
    return found
