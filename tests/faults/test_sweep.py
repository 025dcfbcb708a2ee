"""A short sweep of faults on every run of the tests; the long one is ``make faults``, the cuts ``make powercuts``."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.mutants import ALL

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


def test_sweep_fault_at_any_system_call_loses_nothing(tmp_path: Path) -> None:
    """Some faults of each kind, on tmpfs and copied on a disk; every one of them struck."""
    found = found_by("sweep", "--thin", "53", "--doubles", "1", "--grounds", "memory", "--disk", str(tmp_path))
    assert (found["violations"], found["silent"]) == (0, 0), found
    assert found["killed"] > 10
    assert found["error"] > 10
    assert found["double"] > 0


@pytest.mark.parametrize(
    ("action", "thin"), [("copy", "467"), ("hardlink", "367"), ("symlink", "367"), ("keywords", "997")]
)
def test_sweep_fault_at_any_system_call_leaves_originals_intact(tmp_path: Path, action: str, thin: str) -> None:
    """Some faults of each kind for each action whose images stay; every one of them struck."""
    arguments = ("--thin", thin, "--doubles", "1", "--grounds", "memory", "--disk", str(tmp_path))
    found = found_by("sweep", "--action", action, *arguments)
    assert (found["violations"], found["silent"]) == (0, 0), found
    assert found["runs"] > 3


def test_mutants_each_text_occurs_once() -> None:
    """The text that a mutant replaces stands exactly once in its module: code that moves on takes its mutants along."""
    misplaced = [
        mutant.label
        for mutant in ALL
        if (REPOSITORY / "sortd" / f"{mutant.module}.py").read_text(encoding="utf-8").count(mutant.text) != 1
    ]
    assert misplaced == []


@pytest.mark.long
def test_soak_two_thousand_faults_lose_nothing(tmp_path: Path) -> None:
    """All grounds, single and double faults."""
    found = found_by("sweep", "--thin", "9", "--doubles", "25", "--disk", str(tmp_path))
    assert (found["violations"], found["silent"]) == (0, 0), found
    assert found["runs"] >= 2000


@pytest.mark.long
@pytest.mark.parametrize(("action", "thin"), [("copy", "9"), ("hardlink", "7"), ("symlink", "7"), ("keywords", "19")])
def test_soak_five_hundred_faults_leave_originals_intact(tmp_path: Path, action: str, thin: str) -> None:
    """On a disk and on tmpfs, single and double faults, for each action whose images stay."""
    arguments = ("--thin", thin, "--doubles", "10", "--grounds", "memory,disk", "--disk", str(tmp_path))
    found = found_by("sweep", "--action", action, *arguments)
    assert (found["violations"], found["silent"]) == (0, 0), found
    assert found["runs"] >= 500


@pytest.mark.long
def test_power_cuts_four_hundred_lose_nothing() -> None:
    """Two file systems, alone and across, any subset of the disks synced first."""
    found = found_by("powercuts")
    assert (found["violations"], found["silent"]) == (0, 0), found
    assert found["cuts"] >= 400


@pytest.mark.long
def test_arrivals_during_kills_are_filed_once(tmp_path: Path) -> None:
    """Four writers, all the ways in which files come, kill -9 all the time; then one daemon that does not grow."""
    found = found_by("soak", "--files", "5000", "--folder", str(tmp_path))
    assert (found["lost"], found["doubled"], found["drained"], found["crashes"]) == (0, 0, True, {}), found
    assert found["kills"] > 3
    assert not any(gauge["grew"] for gauge in found["growth"].values()), found


@pytest.mark.long
def test_overflow_of_fifty_thousand_files_is_filed(tmp_path: Path) -> None:
    """They arrive while the daemon is stopped; the overflow is told, and the next scan finds each."""
    found = found_by("overflow", "--folder", str(tmp_path))
    assert (found["left"], found["lost"], found["doubled"], found["exit"]) == (0, 0, 0, 0), found


@pytest.mark.long
def test_hostile_images_do_no_harm(tmp_path: Path) -> None:
    """Every one has its outcome, no process dies, and none takes more than 300 MB over what it held while idle."""
    found = found_by("hostile", "--folder", str(tmp_path))
    assert (found["without_outcome"], found["changed_or_lost"], found["lived_and_stopped_well"]) == (0, 0, True), found
    assert found["megabytes_over_idle"]["all_together"] <= 300
