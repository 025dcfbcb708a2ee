"""The data of the benchmarks: photos and their copies."""

from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.peer_programs import decode_in_full
from benchmarks.workload import Photos, original_name, size_of


def test_copies_of_photos_have_other_contents_but_the_same_pixels(tmp_path: Path) -> None:
    """No embedding of an earlier round fits a copy, and each caller takes the photos in turn."""
    photos = Photos(tmp_path / "photos", classes=2, photos=3, size=(64, 48))
    first = [path.read_bytes() for path in photos.copy_next(tmp_path / "one", 3)]
    second = photos.copy_next(tmp_path / "one", 4)
    contents = {path.read_bytes() for path in second}
    assert len({*first, *contents}) == 7
    assert [original_name(path.name) for path in second] == [f"photo {number:05}" for number in (0, 1, 2, 0)]
    assert [original_name(path.name) for path in photos.copy_next(tmp_path / "other", 1)] == ["photo 00000"]
    for path in second:
        original = Image.open(tmp_path / "photos" / f"{original_name(path.name)}.jpg")
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(original))


def test_decode_in_full_returns_the_centre(tmp_path: Path) -> None:
    """The shorter side fits, whatever the shape."""
    for size in ((64, 48), (30, 300), (224, 224)):
        Image.new("RGB", size, (200, 40, 40)).save(tmp_path / "photo.png")
        pixels = decode_in_full(tmp_path / "photo.png", 224)
        assert pixels.shape == (224, 224, 3)
        assert (pixels == (200, 40, 40)).all()


def test_size_of_reads_width_and_height() -> None:
    """Sizes are written as in 640x480."""
    assert size_of("4000x3000") == (4000, 3000)
