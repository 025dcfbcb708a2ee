"""A short form of ``make bulk-faults`` on every run of the tests, and a longer one."""

import pytest

from tests.faults.test_sweep import found_by


def test_bulk_apply_killed_at_any_step_loses_and_doubles_nothing() -> None:
    """Some kills of each kind, on files and on a store; every one of them struck."""
    found = found_by("bulk_apply", "--files", "5", "--objects", "6")
    assert (found["violations"], found["silent"], found["runs"]) == (0, 0, 11), found


@pytest.mark.long
def test_bulk_apply_eight_hundred_faults_lose_and_double_nothing() -> None:
    """Files and objects."""
    found = found_by("bulk_apply")
    assert (found["violations"], found["runs"]) == (0, 800), found
