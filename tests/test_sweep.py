"""Sweeps and glances: a folder of any size is looked through a slice at a time, and nothing is left out."""

import os
from pathlib import Path

import pytest

from sortd.running.sweep import SLICE, Glance, Sweep


def refuse(error: OSError) -> None:
    """Fail where everything can be looked at."""
    raise error


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of more files than a slice holds, in two folders."""
    folder = tmp_path_factory.mktemp("large")
    for number in range(SLICE + 10):
        path = folder / str(number % 2) / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    return folder


def looks(glance: Glance) -> list[bool]:
    """Carry out a whole look."""
    glance.begin()
    told = []
    while glance.is_under_way:
        told.append(glance.differs())
    return told


def test_a_sweep_takes_slices_and_names_all(large: Path) -> None:
    """A short slice is the last; what is wanted meanwhile is to follow."""
    sweep = Sweep(os.fspath(large), refuse)
    assert sweep.begin()
    assert not sweep.begin()
    taken = sweep.take()
    assert (len(taken), sweep.is_under_way, sweep.is_wanted_again) == (SLICE, True, True)
    taken += sweep.take()
    assert (len(dict(taken)), sweep.is_under_way) == (SLICE + 10, False)


def test_a_glance_tells_what_differs_with_its_last_slice(large: Path) -> None:
    """Not at the first look, nor for the same files; for another version, a file more and a file less."""
    glance = Glance(os.fspath(large), refuse)
    assert looks(glance) == looks(glance) == [False, False]
    path = large / "1" / "1.png"
    path.write_bytes(b"another")
    assert looks(glance) == [False, True]
    path.rename(large / "1" / "renamed.png")
    assert looks(glance) == [False, True]
    (large / "1" / "renamed.png").unlink()
    assert looks(glance) == [False, True]
    assert not glance.differs()


def test_a_glance_that_is_under_way_goes_on(large: Path) -> None:
    """Whoever asks again and again does not keep it from its end."""
    glance = Glance(os.fspath(large), refuse)
    looks(glance)
    glance.begin()
    assert not glance.differs()
    glance.begin()
    assert not glance.differs()
    assert not glance.is_under_way
