"""A short sweep of faults on every run of the tests; the long one is ``make faults``, the cuts ``make powercuts``."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]


def found_by(module: str, *arguments: str) -> dict[str, Any]:
    """Run a module of faults and return what it found; skip where it cannot run."""
    run = subprocess.run(
        [sys.executable, "-m", f"tests.faults.{module}", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    found: dict[str, Any] = json.loads(run.stdout or json.dumps({"failed": run.stderr}))
    if "skipped" in found:
        pytest.skip(found["skipped"])
    return found


def test_no_fault_at_any_system_call_loses_or_doubles_anything(tmp_path: Path) -> None:
    """Some faults of each kind, on tmpfs and copied on a disk; every one of them struck."""
    found = found_by("sweep", "--thin", "53", "--doubles", "1", "--grounds", "memory", "--disk", str(tmp_path))
    assert (found["violations"], found["silent"]) == (0, 0), found
    assert found["killed"] > 10
    assert found["error"] > 10
    assert found["double"] > 0


@pytest.mark.slow
def test_two_thousand_faults_lose_nothing(tmp_path: Path) -> None:
    """All grounds, single and double faults."""
    found = found_by("sweep", "--thin", "9", "--doubles", "25", "--disk", str(tmp_path))
    assert (found["violations"], found["silent"]) == (0, 0), found
    assert found["runs"] >= 2000


@pytest.mark.slow
def test_four_hundred_power_cuts_lose_nothing() -> None:
    """Two file systems, alone and across, any subset of the disks synced first."""
    found = found_by("powercuts")
    assert (found["violations"], found["silent"]) == (0, 0), found
    assert found["cuts"] >= 400
