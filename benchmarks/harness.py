"""What the benchmarks share: their command line, their JSON, a configuration, and what a process costs."""

import argparse
import json
import os
import platform
import resource
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the option ``--json``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    return parser


def print_json(figures: object, *, n: int) -> None:
    """Print figures as JSON, with the machine and the number of measurements (rounds, draws, seeds) behind each."""
    print(json.dumps({"machine": machine(), "n": n, "figures": figures}, indent=2))


def machine() -> dict[str, object]:
    """Return what figures depend on: processors, system, and the load of the last minute."""
    lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return {
        "processor": next(named, platform.machine()),
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


def processor_seconds(pid: int) -> float:
    """Return the processor time of a process and its living children."""
    total = 0.0
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(entry.name) == pid or int(fields[1]) == pid:
            total += (int(fields[11]) + int(fields[12])) / TICKS
    return total
