"""Companions: which files travel with an image, by their names alone."""

import pytest

from sortd.moving.companions import Companion, companions_of, images_with


def found(image: str, *beside: str) -> dict[str, bool]:
    """Return the companions of an image among names, and whether each is shared."""
    names = {image, *beside}
    return {one.name: one.shared for one in companions_of(image, names.__contains__)}


@pytest.mark.parametrize(
    "companion",
    [
        *("a.xmp", "a.XMP", "a.json", "a.aae", "a.AAE", "a.thm", "a.jpg.xmp", "a.jpg.XMP", "a.jpg.json", "a.MOV"),
        *("a.mp4", "a.CR2", "a.nef", "a.dng", "a.jpg.supplemental-metadata.json"),
    ],
)
def test_what_belongs_to_an_image_travels_with_it(companion: str) -> None:
    """Sidecars by both habits, films and raws, in small and in capital letters."""
    assert found("a.jpg", companion) == {companion: False}


@pytest.mark.parametrize("other", ["b.xmp", "a.txt", "aa.xmp", "a.jpg.txt", "ab.jpg.xmp", "a.png", "a.png.xmp", ".xmp"])
def test_what_does_not_belong_stays(other: str) -> None:
    """Another stem, another kind of file, another image and its own sidecar."""
    assert found("a.jpg", other) == {}


def test_a_sidecar_named_by_the_stem_is_shared_by_two_images() -> None:
    """It is copied as long as the other image is there; a sidecar with the full name has one image only."""
    assert found("a.jpg", "a.png", "a.xmp", "a.jpg.json") == {"a.xmp": True, "a.jpg.json": False}


def test_a_film_or_raw_that_two_images_share_waits_for_the_last() -> None:
    """The first image leaves without it, the last takes it along: it is never doubled."""
    assert found("a.jpg", "a.heic", "a.mov", "a.mov.xmp") == {}
    assert found("a.heic", "a.mov", "a.mov.xmp") == {"a.mov": False, "a.mov.xmp": False}


def test_a_raw_brings_its_own_sidecars() -> None:
    """What belongs to a companion belongs to the image too."""
    assert found("a.jpg", "a.CR2", "a.CR2.xmp", "a.xmp") == {"a.CR2": False, "a.CR2.xmp": False, "a.xmp": False}


def test_an_image_is_not_its_own_companion() -> None:
    """A file whose own suffix is among the companions is not found twice."""
    assert companions_of("a.dng", {"a.dng"}.__contains__) == ()
    assert companions_of("a.dng", {"a.dng", "a.xmp"}.__contains__) == (Companion("a.xmp", shared=False),)


@pytest.mark.parametrize(
    "companion",
    [
        *("a.xmp", "a.XMP", "a.json", "a.AAE", "a.thm", "a.jpg.xmp", "a.jpg.XMP", "a.jpg.json", "a.MOV", "a.mp4"),
        *("a.CR2", "a.dng", "a.jpg.supplemental-metadata.json", "a.dng.xmp", "a.MOV.json"),
    ],
)
def test_the_image_of_a_companion_is_known_by_its_name(companion: str) -> None:
    """Whatever would travel with an image names that image, so that it can follow it later."""
    beside = {companion, companion.rpartition(".")[0]}
    assert companion in {one.name for one in companions_of("a.jpg", beside.__contains__)}
    assert "a.jpg" in images_with(companion)
    assert companion not in images_with(companion)


@pytest.mark.parametrize("name", ["a.txt", "a.jpg", "a", ".xmp", "a.xmp.txt", "jpg"])
def test_what_is_no_companion_names_no_image(name: str) -> None:
    """Nobody looks for the image of a text, or of an image."""
    assert images_with(name) == ()


def test_a_sidecar_of_one_image_names_no_other() -> None:
    """``a.jpg.xmp`` is about ``a.jpg`` alone, unless that stem is an image's, as in ``a.jpg.jpg``."""
    assert images_with("a.jpg.xmp")[0] == "a.jpg"
    assert "a.png" not in images_with("a.jpg.xmp")
