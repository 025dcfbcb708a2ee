"""Folders of Images/ that sortd emptied are removed a day later; all others stay."""

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from sortd.moving.emptied import AFTER_SECONDS, remove_emptied_folders
from sortd.moving.mover import Mover
from sortd.moving.recovery import UndoResult
from sortd.store.journal import Journal
from sortd.store.records import Selection
from tests.filing_world import Dataset, moved, order


@pytest.fixture
def filed(tmp_path: Path) -> Dataset:
    """A dataset whose journal has the time of the file system."""
    return Dataset.below(tmp_path)


def journal_of(dataset: Dataset) -> Journal:
    """Open the journal with the clock of this machine, as the file system has it."""
    return Journal(dataset.folder / "state" / "journal.db", clock=time.time)


def removed(dataset: Dataset, journal: Journal, *, later: float = AFTER_SECONDS + 1) -> list[str]:
    """Remove what is due after some seconds; return the folders, relative to the dataset."""
    found = remove_emptied_folders(dataset.root, journal.history, time.time() + later)
    return [os.path.relpath(one, dataset.root) for one in found if one is not None]


def test_emptied_folder_goes_a_day_later_with_its_parents(filed: Dataset) -> None:
    """A folder with a file, one that a person emptied or made, and Images/ itself stay."""
    paths = {name: filed.put(f"Images/{name}/a.jpg") for name in ("2026/05", "mixed", "by_person")}
    filed.put("Images/mixed/b.txt")
    (filed.root / "Images" / "made").mkdir()
    with journal_of(filed) as journal:
        mover = Mover(filed.root, journal)
        for path in (paths["2026/05"], paths["mixed"]):
            moved(mover, order(path))
        paths["by_person"].unlink()
        assert removed(filed, journal, later=AFTER_SECONDS - 60) == []
        assert removed(filed, journal) == ["Images/2026/05", "Images/2026"]
        assert {one.name for one in (filed.root / "Images").iterdir()} == {"mixed", "by_person", "made"}
        assert removed(filed, journal) == []


def test_emptied_folder_that_was_changed_since_stays(filed: Dataset) -> None:
    """A person or a program did something in it, even if nothing is left of that."""
    path = filed.put("Images/day/a.jpg")
    with journal_of(filed) as journal:
        moved(Mover(filed.root, journal), order(path))
        folder = path.parent
        later_ns = folder.stat().st_mtime_ns + 120 * 10**9
        (folder / "b.part").touch()
        (folder / "b.part").unlink()
        os.utime(folder, ns=(later_ns, later_ns))
        assert removed(filed, journal) == []
        assert folder.is_dir()


def test_emptied_folder_behind_a_link_stays(filed: Dataset) -> None:
    """Only folders of the dataset itself are looked into."""
    elsewhere = filed.folder / "elsewhere"
    (elsewhere / "inner").mkdir(parents=True)
    (filed.root / "Images" / "link").symlink_to(elsewhere)
    with journal_of(filed) as journal:
        assert removed(filed, journal) == []
    assert (elsewhere / "inner").is_dir()


def test_undo_makes_a_removed_folder_again(filed: Dataset) -> None:
    """The image is back where it was."""
    path = filed.put("Images/2026/05/a.jpg", b"one")
    with journal_of(filed) as journal:
        mover = Mover(filed.root, journal)
        moved(mover, order(path))
        assert len(removed(filed, journal)) == 2
        (result,) = mover.undo(journal.history.moves(Selection()))
        assert isinstance(result, UndoResult)
    assert path.read_bytes() == b"one"


def test_emptied_folders_that_are_too_deep_stay(filed: Dataset) -> None:
    """Whoever may write to Images/ can nest folders as deep as a path is long: a call for each overflows the stack."""
    with journal_of(filed) as journal, filed.deep(975) as deepest:
        (deepest / "a.jpg").write_bytes(b"image")
        there = moved(Mover(filed.root, journal), order(deepest / "a.jpg"))
        assert there == str(filed.root / "Dataset/cat/a.jpg")
        assert removed(filed, journal) == []
        assert deepest.is_dir()


def test_emptied_folder_of_images_that_stayed_stays(filed: Dataset) -> None:
    """A person took them away while sortd copied or linked them."""
    path = filed.put("Images/day/a.jpg")
    with journal_of(filed) as journal:
        moved(Mover(filed.root, journal), replace(order(path), action="copy"))
        path.unlink()
        ended = journal.history.moves(Selection())[0].ended_at
        assert ended is not None
        os.utime(path.parent, (ended, ended))
        assert removed(filed, journal) == []
