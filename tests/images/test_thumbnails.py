"""The pictures in the pages of the commands: whole, decoded in the sandbox, and absent if that fails."""

import base64
import io
import os
from pathlib import Path

import pytest
from PIL import Image

from sortd.images.thumbnails import thumbnails
from tests.bombs import one_bit_png


@pytest.mark.parametrize(("size", "orientation", "small"), [
    ((300, 200), 1, (64, 43)), ((200, 300), 1, (43, 64)), ((300, 200), 6, (43, 64)), ((900, 4), 1, (64, 1)),
    ((30, 20), 1, (30, 20)),
])  # fmt: skip
def test_thumbnails_show_all_of_an_image(
    tmp_path: Path, size: tuple[int, int], orientation: int, small: tuple[int, int]
) -> None:
    """Upright and in its own shape: what is cut off may be what it is doubted for."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    drawn = Image.new("RGB", size, "red")
    drawn.paste((0, 0, 255), (0, 0, max(8, size[0] // 8), size[1]))  # at one edge, which a square would cut off
    path = os.fspath(tmp_path / "a.png")
    drawn.save(path, exif=exif)
    (address,) = thumbnails([path, path], side_pixels=64).values()
    with Image.open(io.BytesIO(base64.b64decode(address.removeprefix("data:image/jpeg;base64,")))) as shown:
        assert (shown.format, shown.size) == ("JPEG", small)
        corner = shown.convert("RGB").getpixel((0, 0))
    assert isinstance(corner, tuple)
    assert corner[2] > corner[0]


def test_thumbnails_of_what_is_no_image_are_absent(tmp_path: Path) -> None:
    """Missing, broken and foreign files leave a gap and no error."""
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "bomb.png").write_bytes(one_bit_png(30_000, 30_000))
    Image.new("RGB", (9, 9)).save(tmp_path / "sound.png")
    (tmp_path / "link.png").symlink_to("sound.png")
    os.mkfifo(tmp_path / "pipe.png")
    paths = [os.fspath(path) for path in (*tmp_path.iterdir(), tmp_path / "gone.png")]
    assert list(thumbnails(paths)) == [os.fspath(tmp_path / "sound.png")]
    assert thumbnails([]) == {}
