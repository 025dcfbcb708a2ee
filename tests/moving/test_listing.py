"""Listings: what stands near a name, and which names a file must not get, from one look at a folder."""

import os
from pathlib import Path

import pytest

from sortd.moving.fs import FOLDER_FLAGS, FRESH_NAMES, SECONDS_A_NAME, FolderNames, Listings


def test_near_returns_names_with_the_same_beginning() -> None:
    """Letter case does not count; hidden names are not there."""
    names = FolderNames(["IMG_1.JPG", "img_1.xmp", "IMG_1.jpg.json", "IMG_2.xmp", ".IMG_1.jpg.swp", "IMG_12.xmp"])
    assert {"IMG_1.JPG", "img_1.xmp", "IMG_1.jpg.json"} <= set(names.near("IMG_1.JPG"))
    assert not {"IMG_2.xmp", ".IMG_1.jpg.swp"} & set(names.near("IMG_1.JPG"))
    assert FolderNames(["x", "straße.xmp", "STRASSE.xmp"]).near("STRASSE.jpg") == ["STRASSE.xmp", "straße.xmp"]


def test_folder_names_added_and_discarded_names_count() -> None:
    """A name that is discarded is gone, one spelled otherwise is not, and one that never was there is no mistake."""
    names = FolderNames(["a.xmp", "A.xmp"])
    names.discard("a.xmp")
    names.discard("nothing")
    assert names.near("a.jpg") == ["A.xmp"]
    names.add("a.MOV")
    assert names.near("a.jpg") == ["a.MOV", "A.xmp"]


@pytest.mark.parametrize(
    "standing",
    [
        *("IMG_1.xmp", "img_1.XMP", "IMG_1.psd", "IMG_1", "IMG_1.JPG.xmp", "IMG_1.heic.pp3", "IMG_1.MOV", "IMG_1.png"),
        *("IMG_1 (conflicted copy).xmp", "IMG_1_01.JPG.xmp", "IMG_1.JPG.bak", "IMG_1.JPG_original", "IMG_1.jpg..json"),
        "IMG_1.JPG.reason.json",
    ],
)
def test_is_taken_equal_stem_is_taken(standing: str) -> None:
    """Anything of the stem, with whatever suffix and letter case: an image would stand beside another's edits."""
    assert FolderNames([standing]).is_taken("IMG_1.JPG")


@pytest.mark.parametrize("standing", ["IMG_10.xmp", "IMG_1.b.jpg", "IMG_1 (2).JPG", "IMG_1-edited.jpg", "AIMG_1.xmp"])
def test_is_taken_other_stem_is_free(standing: str) -> None:
    """A longer stem, another number, the edited version: none of them is in the way."""
    assert not FolderNames([standing]).is_taken("IMG_1.JPG")


@pytest.mark.parametrize(
    ("standing", "coming"),
    [
        ("IMG_0001.AAE", "IMG_E0001.JPG"),
        ("IMG_E0001.JPG", "IMG_0001.AAE"),
        ("a.jpg.json", "a-edited.jpg"),
        ("a-edited.jpg", "a.jpg.json"),
        ("a.jpg(1).json", "a(1).jpg"),
        ("a(1).jpg", "a.jpg(1).json"),
        ("a.jpg", "a_01.jpg.xmp"),
        (f"{'x' * 46}.json", f"{'x' * 47}.jpg"),
        (f"{'x' * 47}.jpg", f"{'x' * 46}.json"),
        ("SND_0001.WAV", "IMG_0001.JPG"),
        ("a (2).xmp", "a (2).jpg"),
    ],
)
def test_is_taken_name_of_a_companion_is_taken(standing: str, coming: str) -> None:
    """A companion is not put where it would be taken for another image's, nor an image beside such a companion."""
    assert FolderNames([standing]).is_taken(coming)


def test_has_relatives_companion_in_either_direction_is_true() -> None:
    """A sidecar without its image, and an image beside a sidecar that comes; not two images and their own sidecars."""
    assert FolderNames(["A.XMP"]).has_relatives("a.jpg")
    assert FolderNames(["A.jpg"]).has_relatives("a.xmp")
    assert not FolderNames(["a.png", "a.png.xmp", "a.png.reason.json", "b.xmp"]).has_relatives("a.jpg")


def test_is_taken_numbered_names_are_distinct() -> None:
    """The next free number is free of everything of its stem."""
    names = FolderNames(["a.jpg", "a (2).xmp", "A (3).Mov"])
    assert [number for number in range(2, 6) if not names.is_taken(f"a ({number}).jpg")] == [4, 5]


def listed(folder: Path, listings: Listings) -> FolderNames:
    """Return the names in a folder by these listings."""
    descriptor = os.open(folder, FOLDER_FLAGS)
    try:
        return listings.names(descriptor)
    finally:
        os.close(descriptor)


def test_listings_small_folder_is_read_for_every_batch(tmp_path: Path) -> None:
    """What somebody put there a moment ago is seen."""
    listings = Listings(clock=lambda: 0.0)
    assert len(listed(tmp_path, listings)) == 0
    (tmp_path / "a.xmp").touch()
    assert len(listed(tmp_path, listings)) == 1


def test_listings_large_folder_is_read_once(tmp_path: Path) -> None:
    """Until it has served for a hundred times of what it took."""
    now = 0.0
    listings = Listings(clock=lambda: now)
    for number in range(FRESH_NAMES + 1):
        (tmp_path / f"{number}.jpg").touch()
    first = listed(tmp_path, listings)
    now = 0.9 * SECONDS_A_NAME * len(first)
    assert listed(tmp_path, listings) is first
    now = 1.1 * SECONDS_A_NAME * len(first)
    assert listed(tmp_path, listings) is not first


def test_listings_number_of_names_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder that was asked for least lately is forgotten."""
    monkeypatch.setattr("sortd.moving.fs.MOST_KEPT", 2 * (FRESH_NAMES + 1))
    listings, folders = Listings(clock=lambda: 0.0), [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
        for number in range(FRESH_NAMES + 1):
            (folder / f"{number}.jpg").touch()
    first, second, _ = [listed(folder, listings) for folder in folders]
    assert listed(folders[1], listings) is second
    assert listed(folders[0], listings) is not first
