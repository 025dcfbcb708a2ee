"""Which files are images: told by content and name, opened never through a link, and only in the version meant.

Pillow knows some fifty formats, and most of its security advisories are about formats that no camera writes. A decoder
is only handed bytes that begin as its format does.
"""

import errno
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass

from sortd.files import stamp_of
from sortd.messages import ImageRefused, Refusal, Stamp
from sortd.moving.companions import RAWS

SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".gif", ".webp", ".tif", ".tiff"),
        *(".avif", ".heic", ".heif", ".hif"),
    }
)
"""Suffixes of images, in lower case."""

HEAD_BYTES = 64
"""As much of a file's beginning as its format can be told by."""

RESOURCE_ERRORS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
"""This process or the machine has run out of something: no file is to blame for it."""


@dataclass(frozen=True, slots=True)
class Format:
    """An image format, as sortd and Pillow name it."""

    name: str
    plugin: str
    """The module that registers it with Pillow; imported one at a time, so that the others never see a byte."""
    mend: str = ""
    """How to get a decoder where this Python has none."""
    held_bytes: int = 4
    """Memory that decoding usually holds for each pixel; Pillow's own image takes 4."""
    peak_bytes: int = 12
    """Memory that decoding may take for each pixel at most, in the most costly kind of this format."""

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
    """Return the format of a file by its first ``HEAD_BYTES``; None for what sortd does not decode."""
    for beginning, image_format in _BEGINNINGS.items():
        if head.startswith(beginning):
            return image_format
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return _WEBP
    if head[4:8] == b"ftyp":
        return _format_by_brand(head)
    # "BM" alone begins many a text; a bitmap goes on with the size of a header that exists.
    if head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in _BMP_HEADER_SIZES:
        return _BMP
    return None


def _format_by_brand(head: bytes) -> Format | None:
    end = min(len(head), int.from_bytes(head[:4], "big"))
    brands = [head[8:12], *(head[at : at + 4] for at in range(16, end - 3, 4))]
    if brands[0] not in {*_BRANDS, b"mif1", b"msf1"}:
        return None
    return next((_BRANDS[brand] for brand in brands if brand in _BRANDS), _HEIF)


def looks_like_image(name: str, head: bytes) -> bool:
    """Tell whether a file is to be treated as an image, by its name in any letter case or its first ``HEAD_BYTES``.

    A camera's raw file is a TIFF by content and still no image here: it is a companion of one, or stays. So are the
    thumbnail of a film (``.thm``) and what exiftool keeps of an image that it changes (``.jpg_original``).
    """
    suffix = os.path.splitext(name)[1].lower()
    if suffix in RAWS or suffix == ".thm" or suffix.endswith("_original"):
        return False
    return suffix in SUFFIXES or format_of(head) is not None


# ------------------------------------------------------------ opening


def open_file(path: str) -> int:
    """Open a file for reading without following a link or waiting for a pipe's writer; return the descriptor."""
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def open_version(path: str, stamp: Stamp, max_bytes: int) -> int | ImageRefused:
    """Open a file that looks like an image and is the version meant; return its descriptor, or the refusal.

    Raises:
        OSError: this process is out of descriptors or memory, which is no fault of the file.
    """
    try:
        descriptor = open_file(path)
    except OSError as error:
        return ImageRefused(path, stamp, *_why_not_opened(error))
    try:
        refusal = _why_not_taken(path, descriptor, stamp, max_bytes)
    except OSError as error:
        refusal = Refusal.DENIED, f"it cannot be read: {error.strerror}; look at its disk"
    except BaseException:
        os.close(descriptor)
        raise
    if refusal is None:
        return descriptor
    os.close(descriptor)
    return ImageRefused(path, stamp, *refusal)


def _why_not_opened(error: OSError) -> tuple[Refusal, str]:
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR:
            return Refusal.VANISHED, "nothing stands under that name any more"
        case errno.ELOOP:
            return Refusal.NOT_AN_IMAGE, "it is a symbolic link, and those are not followed"
        case errno.ENXIO | errno.ENODEV:
            return Refusal.NOT_AN_IMAGE, "it is a socket or a device"
        case errno.EACCES | errno.EPERM:
            return Refusal.DENIED, "sortd has no right to read it; grant it, for instance by chmod g+r"
        case number if number in RESOURCE_ERRORS:
            raise error
        case _:
            return Refusal.DENIED, f"it cannot be opened: {error.strerror}; look at its disk"


def _why_not_taken(path: str, descriptor: int, stamp: Stamp, max_bytes: int) -> tuple[Refusal, str] | None:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        return Refusal.NOT_AN_IMAGE, "it is no regular file"
    if not stamp_of(status).agrees_with(stamp):
        return Refusal.CHANGED, "another version stands there by now"
    head = os.pread(descriptor, HEAD_BYTES, 0)
    if not looks_like_image(path, head):
        return Refusal.NOT_AN_IMAGE, "neither its name nor its content says image"
    if not head:
        return Refusal.EMPTY, "it is empty"
    if status.st_size > max_bytes:
        return Refusal.TOO_LARGE, f"{status.st_size:,} bytes are over the limit of {max_bytes:,}"
    return None
