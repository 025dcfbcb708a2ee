"""Companions: which files travel with an image, by their names alone."""

import pytest

from sortd.companions import (
    NAMINGS,
    Companion,
    Naming,
    claim_on,
    claims,
    companions_of,
    fold,
    is_image,
    name_beside,
    near,
    owners_of,
    parts_beside,
    split_name,
    starts_of_images,
)


def found(image: str, *beside: str) -> dict[str, bool]:
    """Return the companions of an image among names, and whether each is shared."""
    return {one.name: one.shared for one in companions_of(image, {image, *beside})}


def mixed(name: str) -> str:
    """Return a name with its last suffix in mixed letter case."""
    stem, dot, suffix = name.rpartition(".")
    return stem + dot + suffix.capitalize()


every_rule = pytest.mark.parametrize("rule", NAMINGS, ids=lambda rule: f"{rule.program}: {rule.example[1]}")


class TestTable:
    """Each row of the table, by its own example."""

    @every_rule
    def test_rule_example_travels_with_its_image(self, rule: Naming) -> None:
        """The file of the example belongs to its image by this very rule, whatever the letter case of its suffix."""
        image, companion = rule.example
        assert found(image, companion) == {companion: False}
        assert found(image, mixed(companion)) == {mixed(companion): False}
        alone = [claim for claim in claims(companion) if claim.naming == rule]
        assert len(alone) == 1
        assert owners_of(companion, [image, "other.jpg"]) == (image,)

    @every_rule
    def test_rule_example_is_no_companion_of_another_image(self, rule: Naming) -> None:
        """Neither of an image with a longer or a shorter stem nor of one that it does not name at all."""
        image, companion = rule.example
        stem, suffix = split_name(image)
        for other in (
            f"{stem}9{suffix}",
            f"X{image}",
            f"{stem} (2){suffix}",
            "other.jpg",
            f"{stem[:-1] or 'b'}{suffix}",
        ):
            assert found(other, companion) == {}, other

    @every_rule
    def test_rule_example_is_found_without_reading_all_names(self, rule: Naming) -> None:
        """Image and companion are looked for by how their names begin, in a folder and in the journal."""
        image, companion = rule.example
        assert any(fold(companion).startswith(start) for start, _ in near(image))
        assert any(fold(image).startswith(start) for start, _ in near(companion))
        assert any(first <= image < beyond for first, beyond in starts_of_images(companion))

    @every_rule
    def test_rule_example_belongs_to_its_image_under_a_number(self, rule: Naming) -> None:
        """A name that is taken gives both of them a number, and they still belong together; so after a renaming."""
        image, companion = rule.example
        stem, suffix = split_name(image)
        numbered = f"{stem} (2){suffix}"
        assert claim_on(" (2)".join(parts_beside(companion, image)), numbered) is not None
        assert claim_on(name_beside(companion, image, numbered), numbered) is not None
        assert claim_on(name_beside(companion, image, f"new{suffix}"), f"new{suffix}") is not None

    @every_rule
    def test_rule_names_program_and_source(self, rule: Naming) -> None:
        """Whoever doubts a row can look it up."""
        assert rule.program
        assert rule.source
        assert is_image(rule.example[0])
        assert not is_image(rule.example[1])


@pytest.mark.parametrize(
    ("image", "note"),
    [
        *(("IMG_1.jpg", f"IMG_1.jpg.{'supplemental-metadata'[:length]}.json") for length in range(22)),
        *(("IMG_1(2).jpg", f"IMG_1.jpg.{'supplemental-metadata'[:length]}(2).json") for length in (0, 1, 9, 21)),
        ("IMG_1(1).jpg", "IMG_1.jpg(1).json"),
        ("IMG_1(1).jpg", "IMG_1(1).jpg.json"),
        ("IMG_1.HEIC", "IMG_1.HEIC.json"),
        ("IMG_1.HEIC", "IMG_1.json"),
        ("IMG_1.HEIC", "IMG_1.MP4.json"),
        ("IMG_1-edited.jpg", "IMG_1.jpg.supplemental-metadata.json"),
        ("IMG_1-edited(1).jpg", "IMG_1.jpg(1).json"),
        ("IMG_1-edited(1).jpg", "IMG_1.jpg.supple(1).json"),
        ("IMG_1-bearbeitet.jpg", "IMG_1.jpg.json"),
        ("IMG_1-modifié.jpg", "IMG_1.jpg.json"),
        ("IMG_1.edited-edited.jpg", "IMG_1.edited.jpg.json"),
        ("PXL_1.MP.jpg", "PXL_1.MP.jpg.supplemental-metadata.json"),
        ("PXL_1.MP.jpg", "PXL_1.MP.json"),
        ("Screenshot_20220207_102421_com.snapchat.android.jpg", "Screenshot_20220207_102421_com.snapchat.androi.json"),
        ("D7157814-D2D5-4A62-AFCE-9CF465CB7D66.jpeg", "D7157814-D2D5-4A62-AFCE-9CF465CB7D66.jpeg.supp.json"),
        (f"{'x' * 47}.jpg", f"{'x' * 46}.json"),
        (f"{'x' * 47}(3).jpg", f"{'x' * 46}(3).json"),
    ],
)
def test_takeout_sidecar_cut_or_numbered_belongs(image: str, note: str) -> None:
    """Google Takeout cuts the name to 46 characters, puts a number last, and gives edited images none of their own."""
    assert found(image, note) == {note: False}
    assert any(fold(note).startswith(start) for start, _ in near(image))
    assert any(fold(image).startswith(start) for start, _ in near(note))


@pytest.mark.parametrize(
    ("image", "note"),
    [
        ("IMG_1.jpg", "IMG_1.jpg(1).json"),
        ("IMG_1(1).jpg", "IMG_1.jpg.json"),
        ("IMG_1(1).jpg", "IMG_1.jpg(2).json"),
        ("IMG_1.jpg", "IMG_1.jpg.supplementary.json"),
        ("IMG_1.jpg", "IMG_1.png.json"),
        ("IMG_1.jpg", "IMG_1-edited.jpg.json"),
        (f"{'x' * 46}.jpg", f"{'x' * 45}.json"),
        (f"{'x' * 47}(3).jpg", f"{'x' * 46}(4).json"),
        ("metadata.jpg.jpg", "metadata.json"),
    ],
)
def test_takeout_sidecar_of_another_image_stays(image: str, note: str) -> None:
    """Another number, another suffix, another word, another length: not this image's."""
    assert found(image, note) == {}


@pytest.mark.parametrize(
    "mark",
    [
        *(" (conflicted copy)", " (conflicted copy 2025-04-10 093612)", " (Ann's conflicted copy 2020-01-01)"),
        *(".sync-conflict-20240101-120000-ABCDEFG", ".Conflict", " (SFConflict a@b.org 2015-03-07-11-30-28)"),
        *("(Conflict_other (Web browser)_2020-03-25-22-50-36)", "_Andy-PC_Jan-03-0901-2013_CaseConflict_1"),
        *("-DESKTOP-AB12CD3", " [conflicted]"),
    ],
)
def test_conflict_copy_of_a_sidecar_belongs(mark: str) -> None:
    """A second version that a synchroniser keeps goes with the first one's image, by stem and by whole name."""
    assert found("a.jpg", f"a{mark}.xmp", f"a.jpg{mark}.xmp") == {f"a{mark}.xmp": False, f"a.jpg{mark}.xmp": False}
    assert found("b.jpg", f"a{mark}.xmp") == {}
    own = f"a{mark}.jpg"
    assert f"a{mark}.xmp" not in found("a.jpg", own, f"a{mark}.xmp"), "it is that of the conflict copy of the image"
    assert found(own, "a.jpg", f"a{mark}.xmp") == {f"a{mark}.xmp": False}


@pytest.mark.parametrize(
    "other",
    [
        *("b.xmp", "a.doc", "aa.xmp", "ab.jpg.xmp", "a.png", "a.png.xmp", ".xmp", "a", "a.jpg", "a.lrcat", "a.LRV"),
        *("a (2).xmp", "a_1.jpg.xmp", "a_001.jpg.xmp", "a-1.xmp", "a.b.xmp", "b.jpg_original", "a_original"),
    ],
)
def test_companions_of_unrelated_files_are_not_included(other: str) -> None:
    """Another stem, another kind of file, another image and its own sidecar."""
    assert found("a.jpg", other) == {}


def test_sidecar_named_by_the_stem_of_two_images_is_shared() -> None:
    """It is copied as long as the other image is there; a sidecar with the full name has one image only."""
    assert found("a.jpg", "a.png", "a.xmp", "a.jpg.json") == {"a.xmp": True, "a.jpg.json": False}
    assert found("a.jpg", "a-edited.jpg", "a.jpg.json") == {"a.jpg.json": True}
    assert found("a-edited.jpg", "a.jpg", "a.jpg.json") == {"a.jpg.json": True}


def test_film_or_raw_of_two_images_waits_for_the_last() -> None:
    """The first image leaves without it, the last takes it along: it is never doubled."""
    assert found("a.jpg", "a.heic", "a.mov", "a.mov.xmp") == {}
    assert found("a.heic", "a.mov", "a.mov.xmp") == {"a.mov": False, "a.mov.xmp": False}


def test_raw_brings_its_own_sidecars() -> None:
    """What belongs to a companion belongs to the image too."""
    assert found("a.jpg", "a.CR2", "a.CR2.xmp", "a.xmp") == {"a.CR2": False, "a.CR2.xmp": False, "a.xmp": False}


def test_guess_yields_to_the_image_that_is_named() -> None:
    """``a_01.jpg.xmp`` is that of ``a_01.jpg`` where there is one, and else a duplicate's of ``a.jpg``."""
    assert found("a.jpg", "a_01.jpg", "a_01.jpg.xmp") == {}
    assert found("a_01.jpg", "a.jpg", "a_01.jpg.xmp") == {"a_01.jpg.xmp": False}


def test_image_is_not_its_own_companion() -> None:
    """A file whose own suffix is among the companions is not found twice."""
    assert companions_of("a.dng", {"a.dng"}) == ()
    assert companions_of("a.dng", {"a.dng", "a.xmp"}) == (Companion("a.xmp", shared=False),)


@pytest.mark.parametrize("name", ["a.doc", "a.jpg", "a", ".xmp", "a.xmp.doc", "jpg", "a.lrcat"])
def test_claims_other_file_has_none(name: str) -> None:
    """Nobody looks for the image of a document, or of an image."""
    assert claims(name) == ()


@pytest.mark.parametrize(
    ("companion", "image", "final", "expected"),
    [
        ("a.xmp", "a.jpg", "b (2).jpg", "b (2).xmp"),
        ("a.jpg.xmp", "a.jpg", "b.png", "b.png.xmp"),
        ("a_01.jpg.xmp", "a.jpg", "a (2).jpg", "a (2)_01.jpg.xmp"),
        ("a.jpg(1).json", "a(1).jpg", "a(1) (2).jpg", "a(1) (2).jpg.json"),
        ("a.jpg.json", "a-edited.jpg", "a-edited (2).jpg", "a (2).jpg.json"),
        ("PXL_1.MP", "PXL_1.MP.jpg", "PXL_1 (2).MP.jpg", "PXL_1 (2).MP"),
        ("IMG_0001.AAE", "IMG_E0001.JPG", "IMG_E0001 (2).JPG", "IMG_0001 (2).AAE"),
    ],
)
def test_name_beside_keeps_what_makes_it_a_companion(companion: str, image: str, final: str, expected: str) -> None:
    """The number or the new name stands where the rule looks for it."""
    assert name_beside(companion, image, final) == expected
