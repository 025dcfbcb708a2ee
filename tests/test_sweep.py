"""Sweeps and glances: a folder of any size is looked through a slice at a time, and nothing is left out."""

import itertools
import os
from pathlib import Path

import pytest

from sortd.names import rule_for_folder
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


def stopped() -> float:
    """Return the time of a clock that stands still: a slice ends by its files alone."""
    return 0.0


def all_below(sweep: Sweep) -> list[str]:
    """Carry out the scans of the folders that were wanted; return the names of the files that were looked at."""
    taken: list[str] = []
    while sweep.has_more:
        taken += [os.path.basename(path) for path, _, _ in sweep.take_below()]
    return sorted(taken)


def looks(glance: Glance) -> list[bool]:
    """Carry out a whole look."""
    glance.begin()
    told = []
    while glance.is_under_way:
        told.append(glance.differs())
    return told


def test_a_sweep_takes_slices_and_names_all(large: Path) -> None:
    """No slice is larger than it may be; what is wanted meanwhile is to follow."""
    sweep = Sweep(os.fspath(large), refuse, clock=stopped)
    assert sweep.begin()
    assert not sweep.begin()
    taken = sweep.take()
    assert 0 < len(taken) <= SLICE
    assert (sweep.is_under_way, sweep.is_wanted_again) == (True, True)
    taken += sweep.take()
    assert (len(dict(taken)), sweep.is_under_way) == (SLICE + 10, False)


def test_sweep_slow_disk_ends_a_slice_by_its_time(large: Path) -> None:
    """Where each look takes as long as a slice may, a slice is one look, and no file is left out."""
    sweep = Sweep(os.fspath(large), refuse, clock=itertools.count().__next__)
    sweep.begin()
    taken = []
    while sweep.is_under_way:
        slice_ = sweep.take()
        assert len(slice_) <= 1
        taken += slice_
    assert len(dict(taken)) == SLICE + 10


def test_sweep_folders_without_files_are_taken_in_slices(tmp_path: Path) -> None:
    """Thousands of empty folders and hidden files end a slice like as many files."""
    for number in range(6):
        (tmp_path / str(number)).mkdir()
        (tmp_path / f".{number}").touch()
    sweep = Sweep(os.fspath(tmp_path), refuse, clock=itertools.count().__next__)
    sweep.begin()
    slices = 0
    while sweep.is_under_way:
        assert sweep.take() == []
        slices += 1
    assert slices > 12


def test_sweep_wanted_folder_is_scanned_alone(tmp_path: Path) -> None:
    """One of four hundred folders costs a look at its own files."""
    for folder in range(4):
        (tmp_path / str(folder)).mkdir()
        (tmp_path / str(folder) / f"{folder}.png").touch()
    sweep = Sweep(os.fspath(tmp_path), refuse)
    sweep.want(os.fspath(tmp_path / "2"))
    assert all_below(sweep) == ["2.png"]
    assert not sweep.is_under_way


def test_sweep_deep_tree_hinted_at_each_folder_looks_once_at_each_file(tmp_path: Path) -> None:
    """Whether the hints come before the first scan or after it; a folder that changed since is listed again."""
    folders = [tmp_path.joinpath(*"abcdefgh"[: depth + 1]) for depth in range(8)]
    for folder in folders:
        folder.mkdir()
        (folder / f"{folder.name}.png").touch()
    sweep = Sweep(os.fspath(tmp_path), refuse)
    for folder in folders[:4]:
        sweep.want(os.fspath(folder))
    assert all_below(sweep) == [f"{name}.png" for name in "abcdefgh"]
    for folder in folders:
        sweep.want(os.fspath(folder))
    assert all_below(sweep) == []
    (folders[5] / "new.png").touch()
    os.utime(folders[5], ns=(1, 1))  # another time, however coarse the clock of the file system is
    sweep.want(os.fspath(folders[5]))
    assert all_below(sweep) == ["f.png", "new.png"]


def test_sweep_wanted_folder_that_is_gone_is_told_and_reported_by_nobody(tmp_path: Path) -> None:
    """A folder that left, a link and a file in its place: all gone as folders; what came back unchanged is scanned."""
    folder = tmp_path / "album"
    folder.mkdir()
    (folder / "a.png").touch()
    sweep = Sweep(os.fspath(tmp_path), refuse)
    sweep.want(os.fspath(folder))
    assert all_below(sweep) == ["a.png"]
    aside = folder.rename(tmp_path / "aside")
    folder.symlink_to(aside)
    sweep.want(os.fspath(folder))
    assert all_below(sweep) == []
    assert sweep.take_gone() == {os.fspath(folder)}
    assert not sweep.has_gone
    folder.unlink()
    aside.rename(folder)
    sweep.want(os.fspath(folder))
    assert all_below(sweep) == ["a.png"]


def test_sweep_too_many_wanted_folders_want_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is remembered is bounded: beyond that the whole folder is to be scanned, as for a hint about itself."""
    monkeypatch.setattr("sortd.running.sweep.MOST_FOLDERS", 3)
    sweep = Sweep(os.fspath(tmp_path), refuse)
    for number in range(4):
        sweep.want(os.fspath(tmp_path / str(number)))
    assert sweep.is_wanted_again
    assert sweep.take_below() == []
    assert sweep.begin()
    assert not sweep.is_wanted_again
    sweep.want(os.fspath(tmp_path))
    assert sweep.is_wanted_again


def test_a_glance_tells_what_differs_with_its_last_slice(large: Path) -> None:
    """Not at the first look, nor for the same files; for another version, a file more and a file less."""
    glance = Glance(os.fspath(large), refuse, clock=stopped)
    assert looks(glance) == looks(glance) == [False, False]
    path = large / "1" / "1.png"
    path.write_bytes(b"another")
    assert looks(glance) == [False, True]
    path.rename(large / "1" / "renamed.png")
    assert looks(glance) == [False, True]
    (large / "1" / "renamed.png").unlink()
    assert looks(glance) == [False, True]
    assert not glance.differs()


def test_sweep_of_class_folders_takes_any_class_name(tmp_path: Path) -> None:
    """What was put into ``Review/engine.part`` is decided again like the rest."""
    (tmp_path / "engine.part").mkdir()
    (tmp_path / "engine.part" / "a.png").touch()
    sweep = Sweep(os.fspath(tmp_path), refuse, rule_at_top=rule_for_folder)
    sweep.begin()
    assert [path for path, _ in sweep.take()] == [os.fspath(tmp_path / "engine.part" / "a.png")]


def test_glance_sees_a_class_with_the_name_of_an_unfinished_file(tmp_path: Path) -> None:
    """Its references are learnt, so a change of theirs is no less a reason to learn."""
    (tmp_path / "engine.part").mkdir()
    glance = Glance(os.fspath(tmp_path), refuse)
    assert looks(glance) == [False]
    (tmp_path / "engine.part" / "0.png").touch()
    assert looks(glance) == [True]


def test_a_glance_that_is_under_way_goes_on(large: Path) -> None:
    """Whoever asks again and again does not keep it from its end."""
    glance = Glance(os.fspath(large), refuse, clock=stopped)
    looks(glance)
    glance.begin()
    assert not glance.differs()
    glance.begin()
    assert not glance.differs()
    assert not glance.is_under_way
