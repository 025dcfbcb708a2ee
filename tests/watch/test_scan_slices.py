"""Scans taken slice by slice: a folder of any size is looked through a slice at a time, and nothing is left out."""

import itertools
import os
from pathlib import Path

import pytest

from sortd.watch.scan import SLICE, FolderComparison, FolderScans


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


def all_below(scans: FolderScans) -> list[str]:
    """Carry out the scans of the folders that were wanted; return the names of the files that were looked at."""
    taken: list[str] = []
    while scans.has_more:
        taken += [os.path.basename(path) for path, _, _ in scans.take_below()]
    return sorted(taken)


def looks(comparison: FolderComparison) -> list[bool]:
    """Carry out a whole look."""
    comparison.scan.begin()
    told = []
    while comparison.scan.is_under_way:
        told.append(comparison.differs())
    return told


def test_folder_scans_takes_slices_and_names_all(large: Path) -> None:
    """No slice is larger than it may be; what is wanted meanwhile is to follow."""
    scans = FolderScans(os.fspath(large), refuse, clock=stopped)
    assert scans.begin()
    assert not scans.begin()
    taken = scans.take()
    assert 0 < len(taken) <= SLICE
    assert (scans.whole.is_under_way, scans.whole.is_wanted_again) == (True, True)
    taken += scans.take()
    assert (len({path for path, *_ in taken}), scans.whole.is_under_way) == (SLICE + 10, False)


def test_folder_scans_slow_disk_ends_a_slice_by_its_time(large: Path) -> None:
    """Where each look takes as long as a slice may, a slice is one look, and no file is left out."""
    scans = FolderScans(os.fspath(large), refuse, clock=itertools.count().__next__)
    scans.begin()
    taken = []
    while scans.whole.is_under_way:
        slice_ = scans.take()
        assert len(slice_) <= 1
        taken += slice_
    assert len({path for path, *_ in taken}) == SLICE + 10


def test_folder_scans_folders_without_files_are_taken_in_slices(tmp_path: Path) -> None:
    """Thousands of empty folders and hidden files end a slice like as many files."""
    for number in range(6):
        (tmp_path / str(number)).mkdir()
        (tmp_path / f".{number}").touch()
    scans = FolderScans(os.fspath(tmp_path), refuse, clock=itertools.count().__next__)
    scans.begin()
    slices = 0
    while scans.whole.is_under_way:
        assert scans.take() == []
        slices += 1
    assert slices > 12


def test_folder_scans_wanted_folder_is_scanned_alone(tmp_path: Path) -> None:
    """One of four hundred folders costs a look at its own files."""
    for folder in range(4):
        (tmp_path / str(folder)).mkdir()
        (tmp_path / str(folder) / f"{folder}.png").touch()
    scans = FolderScans(os.fspath(tmp_path), refuse)
    scans.want(os.fspath(tmp_path / "2"))
    assert all_below(scans) == ["2.png"]
    assert not scans.whole.is_under_way


def test_folder_scans_events_of_each_folder_inspect_each_file_once(tmp_path: Path) -> None:
    """Whether the hints come before the first scan or after it; a folder that changed since is listed again."""
    folders = [tmp_path.joinpath(*"abcdefgh"[: depth + 1]) for depth in range(8)]
    for folder in folders:
        folder.mkdir()
        (folder / f"{folder.name}.png").touch()
    scans = FolderScans(os.fspath(tmp_path), refuse)
    for folder in folders[:4]:
        scans.want(os.fspath(folder))
    assert all_below(scans) == [f"{name}.png" for name in "abcdefgh"]
    for folder in folders:
        scans.want(os.fspath(folder))
    assert all_below(scans) == []
    (folders[5] / "new.png").touch()
    os.utime(folders[5], ns=(1, 1))  # another time, however coarse the clock of the file system is
    scans.want(os.fspath(folders[5]))
    assert all_below(scans) == ["f.png", "new.png"]


def test_folder_scans_wanted_folder_that_is_gone_is_noted_without_a_report(tmp_path: Path) -> None:
    """A folder that left, a link and a file in its place: all gone as folders; what came back unchanged is scanned."""
    folder = tmp_path / "album"
    folder.mkdir()
    (folder / "a.png").touch()
    scans = FolderScans(os.fspath(tmp_path), refuse)
    scans.want(os.fspath(folder))
    assert all_below(scans) == ["a.png"]
    aside = folder.rename(tmp_path / "aside")
    folder.symlink_to(aside)
    scans.want(os.fspath(folder))
    assert all_below(scans) == []
    assert scans.gone == {os.fspath(folder)}
    folder.unlink()
    aside.rename(folder)
    scans.want(os.fspath(folder))
    assert all_below(scans) == ["a.png"]


def test_folder_scans_too_many_wanted_folders_scan_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is remembered is bounded: beyond that the whole folder is to be scanned, as for a hint about itself."""
    monkeypatch.setattr("sortd.watch.scan.MOST_FOLDERS", 3)
    scans = FolderScans(os.fspath(tmp_path), refuse)
    for number in range(4):
        scans.want(os.fspath(tmp_path / str(number)))
    assert scans.whole.is_wanted_again
    assert scans.take_below() == []
    assert scans.begin()
    assert not scans.whole.is_wanted_again
    scans.want(os.fspath(tmp_path))
    assert scans.whole.is_wanted_again


def test_folder_comparison_last_slice_returns_the_difference(large: Path) -> None:
    """Not at the first look, nor for the same files; for another version, a file more and a file less."""
    comparison = FolderComparison(os.fspath(large), refuse, clock=stopped)
    assert looks(comparison) == looks(comparison) == [False, False]
    path = large / "1" / "1.png"
    path.write_bytes(b"another")
    assert looks(comparison) == [False, True]
    path.rename(large / "1" / "renamed.png")
    assert looks(comparison) == [False, True]
    (large / "1" / "renamed.png").unlink()
    assert looks(comparison) == [False, True]
    assert not comparison.differs()


def test_folder_comparison_sees_a_class_with_the_name_of_an_unfinished_file(tmp_path: Path) -> None:
    """Its references are learnt, so a change of theirs is no less a reason to learn."""
    (tmp_path / "engine.part").mkdir()
    comparison = FolderComparison(os.fspath(tmp_path), refuse, clock=stopped)
    assert looks(comparison) == [False]
    (tmp_path / "engine.part" / "0.png").touch()
    assert looks(comparison) == [True]


def test_folder_comparison_under_way_is_not_restarted(large: Path) -> None:
    """Whoever asks again and again does not keep it from its end."""
    comparison = FolderComparison(os.fspath(large), refuse, clock=stopped)
    looks(comparison)
    comparison.scan.begin()
    assert not comparison.differs()
    comparison.scan.begin()
    assert not comparison.differs()
    assert not comparison.scan.is_under_way
