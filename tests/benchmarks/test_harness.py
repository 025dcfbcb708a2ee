"""What the benchmarks share: the tree of a process, its peak memory, and helpers that answer requests."""

import os
import subprocess
import sys

import pytest

from benchmarks.harness import (
    REPOSITORY,
    Helper,
    machine,
    peak_mebibytes,
    process_tree,
    processor_seconds,
    reset_peaks,
    resident_mebibytes,
)

PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(\"here\", flush=True); input()'])"
GREEDY = "bytearray(64 << 20); print('freed', flush=True); input()"


def test_process_tree_has_descendants() -> None:
    """A child's child counts, and its processor time; a process that has ended has none."""
    command = [sys.executable, "-c", PARENT]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPOSITORY) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"here\n"
        tree = process_tree(parent.pid)
        assert len(tree) == 2
        assert set(tree) <= set(process_tree(os.getpid()))
        assert peak_mebibytes(parent.pid) >= sum(resident_mebibytes(pid) for pid in tree) > 0
        parent.communicate(b"\n")
    assert process_tree(parent.pid) == [parent.pid]
    assert processor_seconds(parent.pid) == peak_mebibytes(parent.pid) == 0


def test_reset_peaks_forgets_memory_that_was_freed() -> None:
    """A peak before the reset does not count."""
    command = [sys.executable, "-c", GREEDY]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"freed\n"
        before = peak_mebibytes(process.pid)
        assert before > 64
        reset_peaks(process.pid)
        assert peak_mebibytes(process.pid) < before - 32
        process.communicate(b"\n")


def test_helper_that_has_ended_says_how() -> None:
    """A request that nobody answers is an error."""
    with Helper("benchmarks.core", "--no-such-option") as ended, pytest.raises(RuntimeError, match="has ended with 2"):
        ended.ask("anything")


def test_machine_names_the_processor_and_its_instructions() -> None:
    """Figures state what they depend on."""
    facts = machine()
    assert facts["processor"]
    assert isinstance(facts["instructions"], list)
