"""Which files are images, and in what format: told by content, and by name where the content does not say.

Pillow knows some fifty formats, and most of its security advisories sit in those that nobody photographs in. Here is
the list of what sortd decodes; a decoder is only ever handed bytes that begin as its format does.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from sortd.moving.companions import RAWS

SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".gif", ".webp", ".tif", ".tiff"),
        *(".avif", ".heic", ".heif", ".hif"),
    }
)
"""What says image in a name, in lower case."""

HEAD_BYTES = 64
"""As much of a file's beginning as its format can be told by."""


@dataclass(frozen=True, slots=True)
class Format:
    """An image format as sortd speaks of it, and as Pillow does."""

    name: str
    plugin: str
    """The module that registers it: imported one at a time, so that the others never see a byte."""
    mend: str = ""
    """How to come to a decoder, where this Python may have none."""
    held_bytes: int = 4
    """What decoding usually holds for each pixel; Pillow's own image takes 4."""
    peak_bytes: int = 12
    """What decoding may take for each pixel at most, in the most costly kind of this format."""

    @property
    def title(self) -> str:
        """The name that people know it by."""
        return "HEIC" if self.name == "HEIF" else self.name


_JPEG = Format("JPEG", "PIL.JpegImagePlugin")
_PNG = Format("PNG", "PIL.PngImagePlugin")
_GIF = Format("GIF", "PIL.GifImagePlugin")
_BMP = Format("BMP", "PIL.BmpImagePlugin")
# A strip may be the whole image, in 16 bits a channel, beside the file itself, which libtiff maps.
_TIFF = Format("TIFF", "PIL.TiffImagePlugin", peak_bytes=20)
# Two canvases of WebPAnimDecoder and a copy of one, beside all of the file, twice.
_WEBP = Format(
    "WEBP", "PIL.WebPImagePlugin", "install a Pillow that was built with libwebp", held_bytes=12, peak_bytes=20
)
# The planes in up to 16 bits a channel, once more for a grid or a rotation, RGB, a copy of it, and the image.
_AVIF = Format(
    "AVIF", "PIL.AvifImagePlugin", "install a Pillow that was built with libavif", held_bytes=12, peak_bytes=28
)
_HEIF = Format("HEIF", "pillow_heif", "install its decoder: pip install pillow-heif", held_bytes=12, peak_bytes=28)

FORMATS = (_JPEG, _PNG, _GIF, _BMP, _TIFF, _WEBP, _AVIF, _HEIF)

READABLE = "JPEG, PNG, GIF, BMP, WEBP, TIFF, AVIF and HEIC"

_BEGINNINGS: Mapping[bytes, Format] = {
    b"\xff\xd8\xff": _JPEG,
    b"\x89PNG\r\n\x1a\n": _PNG,
    b"GIF87a": _GIF,
    b"GIF89a": _GIF,
    b"II*\0": _TIFF,
    b"MM\0*": _TIFF,
    b"II+\0": _TIFF,  # BigTIFF
    b"MM\0+": _TIFF,
}

_BRANDS: Mapping[bytes, Format] = {
    **dict.fromkeys((b"avif", b"avis"), _AVIF),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"), _HEIF),
}
"""Brands of an ISO base media file that say still image; ``mif1`` and ``msf1`` leave it to the brands that follow."""

_BMP_HEADER_SIZES = frozenset({12, 16, 40, 52, 56, 64, 108, 124})


def format_of(head: bytes) -> Format | None:
    """Tell a file's format by its beginning, ``HEAD_BYTES`` of it; None for what sortd does not decode."""
    for beginning, image_format in _BEGINNINGS.items():
        if head.startswith(beginning):
            return image_format
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return _WEBP
    if head[4:8] == b"ftyp":
        return _brand_of(head)
    # "BM" alone begins many a text; a bitmap goes on with the size of a header that exists.
    if head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in _BMP_HEADER_SIZES:
        return _BMP
    return None


def _brand_of(head: bytes) -> Format | None:
    end = min(len(head), int.from_bytes(head[:4], "big"))
    brands = [head[8:12], *(head[at : at + 4] for at in range(16, end - 3, 4))]
    if brands[0] not in {*_BRANDS, b"mif1", b"msf1"}:
        return None
    return next((_BRANDS[brand] for brand in brands if brand in _BRANDS), _HEIF)


def looks_like_image(name: str, head: bytes) -> bool:
    """Tell whether a file is to be treated as an image: by its name in any letter case, or by its content.

    A camera's raw file is a TIFF by content and still none of ours: it is a companion of an image, or stays. So are
    its thumbnail of a film (``.thm``) and what exiftool keeps of an image that it changes (``.jpg_original``).

    Args:
        name: the file's name or path.
        head: its first ``HEAD_BYTES`` bytes.
    """
    suffix = os.path.splitext(name)[1].lower()
    if suffix in RAWS or suffix == ".thm" or suffix.endswith("_original"):
        return False
    return suffix in SUFFIXES or format_of(head) is not None
