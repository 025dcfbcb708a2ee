"""Names that a move tries: whole characters, 255 bytes, one stem for all members."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sortd.events import Stamp
from sortd.moving.plan import cut, final_names
from sortd.store.records import MoveFile, MoveRecord, Role

NO_STAMP = Stamp(0, 0, 0, 0)


def names(attempt: int, image: str, *others: str) -> list[str]:
    """Return the names of an attempt for an image and its companions."""
    members = [MoveFile(Role.COMPANION, other, other, NO_STAMP) for other in others]
    image_member = MoveFile(Role.IMAGE, image, image, NO_STAMP)
    reason = MoveFile(Role.REASON, image, f"{image}.reason.json", NO_STAMP)
    return list(final_names(MoveRecord("t", "Images", "Rejected", (image_member, *members, reason)), attempt))


def test_final_names_first_attempt_keeps_names() -> None:
    """Nothing is changed where nothing has to be."""
    assert names(1, "a.jpg", "a.xmp", "a.jpg.json") == ["a.jpg", "a.xmp", "a.jpg.json", "a.jpg.reason.json"]


def test_final_names_further_attempt_numbers_all_files() -> None:
    """Companions get the same stem as their image, by both habits."""
    assert names(2, "a.jpg", "a.xmp", "a.jpg.json") == [
        *("a (2).jpg", "a (2).xmp", "a (2).jpg.json", "a (2).jpg.reason.json")
    ]


@pytest.mark.parametrize("name", [".hidden", "noend", "a.b.c.jpg", "a" + "." * 30 + "jpg", "x." + "y" * 40])
def test_final_names_unusual_names_are_kept(name: str) -> None:
    """Without a suffix, or with one too long to be one, the number stands at the end."""
    (final, *_) = names(3, name)
    assert final.replace(" (3)", "") == name


@given(
    stem=st.binary(min_size=1, max_size=251).filter(lambda raw: not set(raw) & {0, 0x2E, 0x2F}),
    attempt=st.integers(2, 10_000),
)
def test_final_names_long_names_fit_and_keep_their_endings(stem: bytes, attempt: int) -> None:
    """Whatever the bytes, no name has more than 255, the suffix stays, and the stems stay the same for all."""
    image, sidecar, reason = names(attempt, os.fsdecode(stem + b".jpg"), os.fsdecode(stem + b".xmp"))
    assert max(len(os.fsencode(one)) for one in (image, sidecar, reason)) <= 255
    assert image.endswith(f" ({attempt}).jpg")
    assert image.removesuffix(".jpg") == sidecar.removesuffix(".xmp")
    assert reason.endswith(f" ({attempt}).jpg.reason.json")


def test_final_names_name_of_255_bytes_is_kept() -> None:
    """A reason's longer name is cut; the image's own is not."""
    name = "€" * 83 + "aa.jpg"
    assert len(name.encode()) == 255
    image, reason = names(1, name)
    assert image == name
    assert len(os.fsencode(reason)) <= 255
    assert reason.endswith(".reason.json")


@given(
    st.text(min_size=1).filter(lambda text: not any("\ud800" <= one <= "\udfff" for one in text)), st.integers(4, 60)
)
def test_cut_ends_after_a_whole_character(text: str, room: int) -> None:
    """What is cut is still text, and no more is cut than must be."""
    raw = text.encode()
    short = cut(raw, room)
    assert text.startswith(short.decode())
    assert len(short) <= room
    assert len(short) > room - 4 or short == raw
