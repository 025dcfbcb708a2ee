"""Image formats, recognised by content, and the safe opening of image files.

Pillow knows some fifty formats, and most of its security advisories are about formats that no camera writes. A decoder
gets only files whose first bytes are of its format.
"""

import errno
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass

from sortd.companions import RAWS
from sortd.events import ImageRefused, Refusal, Stamp
from sortd.files import stamp_of

SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".gif", ".webp", ".tif", ".tiff"),
        *(".avif", ".heic", ".heif", ".hif"),
    }
)
"""Suffixes of images, in lower case."""
HEAD_BYTES = 64  # enough to recognise every format
RESOURCE_ERRORS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
"""This process or the machine is out of a resource; the file is not the cause."""


@dataclass(frozen=True, slots=True)
class Format:
    """An image format."""

    name: str  # Pillow's
    plugin: str
    """The module that registers it with Pillow; only that of the file's format is imported for a file."""
    remedy: str = ""  # how to install a missing decoder
    held_bytes: int = 4  # memory for each pixel during a usual decoding; Pillow's image itself takes 4
    peak_bytes: int = 12  # the same for the most costly kind of this format

    @property
    def title(self) -> str:
        """The name that users know."""
        return "HEIC" if self.name == "HEIF" else self.name


_JPEG = Format("JPEG", "PIL.JpegImagePlugin")
_PNG = Format("PNG", "PIL.PngImagePlugin")
_GIF = Format("GIF", "PIL.GifImagePlugin")
_BMP = Format("BMP", "PIL.BmpImagePlugin")
# A strip may be the whole image, in 16 bits a channel, beside the file itself, which libtiff maps.
_TIFF = Format("TIFF", "PIL.TiffImagePlugin", peak_bytes=20)
# Two canvases of WebPAnimDecoder and a copy of one, and the whole file twice.
_WEBP = Format("WEBP", "PIL.WebPImagePlugin", "install a Pillow that was built with libwebp", 12, 20)
# The planes in up to 16 bits a channel, once more for a grid or a rotation, RGB, a copy of it, and the image.
_AVIF = Format("AVIF", "PIL.AvifImagePlugin", "install a Pillow that was built with libavif", 12, 28)
_HEIF = Format("HEIF", "pillow_heif", "install its decoder: pip install pillow-heif", 12, 28)

FORMATS = (_JPEG, _PNG, _GIF, _BMP, _TIFF, _WEBP, _AVIF, _HEIF)
SUPPORTED = "JPEG, PNG, GIF, BMP, WEBP, TIFF, AVIF or HEIC"

_MAGIC: Mapping[bytes, Format] = {
    b"\xff\xd8\xff": _JPEG,
    b"\x89PNG\r\n\x1a\n": _PNG,
    **dict.fromkeys((b"GIF87a", b"GIF89a"), _GIF),
    **dict.fromkeys((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), _TIFF),  # with +: BigTIFF
}
_BRANDS: Mapping[bytes, Format] = {
    **dict.fromkeys((b"avif", b"avis"), _AVIF),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"), _HEIF),
}
"""Brands of still images in an ISO base media file; after ``mif1`` and ``msf1`` the next brands name the codec."""
_BMP_HEADER_SIZES = frozenset({12, 16, 40, 52, 56, 64, 108, 124})


def format_of(head: bytes) -> Format | None:
    """Return the format of a file by its first ``HEAD_BYTES``; None if sortd does not decode it."""
    for magic, image_format in _MAGIC.items():
        if head.startswith(magic):
            return image_format
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return _WEBP
    # Texts may begin with "BM", too; a bitmap has a valid header size in addition.
    if head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in _BMP_HEADER_SIZES:
        return _BMP
    if head[4:8] != b"ftyp":
        return None
    end = min(len(head), int.from_bytes(head[:4], "big"))
    brands = [head[8:12], *(head[at : at + 4] for at in range(16, end - 3, 4))]
    if brands[0] not in {*_BRANDS, b"mif1", b"msf1"}:
        return None
    return next((_BRANDS[brand] for brand in brands if brand in _BRANDS), _HEIF)


def looks_like_image(name: str, head: bytes) -> bool:
    """Tell whether a file is treated as an image, by its name in any letter case or its first ``HEAD_BYTES``.

    Raw files of cameras, which are TIFF by content, thumbnails of films (``.thm``) and originals that exiftool keeps
    (``.jpg_original``) are not images but companions of images.
    """
    suffix = os.path.splitext(name)[1].lower()
    if suffix in RAWS or suffix == ".thm" or suffix.endswith("_original"):
        return False
    return suffix in SUFFIXES or format_of(head) is not None


# ------------------------------------------------------------ opening


def open_file(path: str) -> int:
    """Open a file for reading and return its descriptor; links are not followed, and a pipe does not block."""
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def open_version(path: str, stamp: Stamp, max_bytes: int) -> int | ImageRefused:
    """Open one version of a file that looks like an image; return its descriptor or the refusal.

    Raises:
        OSError: this process is out of descriptors or memory.
    """
    try:
        descriptor = open_file(path)
    except OSError as error:
        return ImageRefused(path, stamp, *_refusal_of(error))
    try:
        refusal = _check_version(path, descriptor, stamp, max_bytes)
    except OSError as error:
        refusal = Refusal.DENIED, f"it cannot be read: {error.strerror}; check its disk"
    except BaseException:
        os.close(descriptor)
        raise
    if refusal is None:
        return descriptor
    os.close(descriptor)
    return ImageRefused(path, stamp, *refusal)


def _refusal_of(error: OSError) -> tuple[Refusal, str]:
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR:
            return Refusal.VANISHED, "the file does not exist any more"
        case errno.ELOOP:
            return Refusal.NOT_AN_IMAGE, "it is a symbolic link, which sortd does not follow"
        case errno.ENXIO | errno.ENODEV:
            return Refusal.NOT_AN_IMAGE, "it is a socket or a device"
        case errno.EACCES | errno.EPERM:
            return Refusal.DENIED, "sortd has no permission to read it; grant it, for example by chmod g+r"
        case number if number in RESOURCE_ERRORS:
            raise error
        case _:
            return Refusal.DENIED, f"it cannot be opened: {error.strerror}; check its disk"


def _check_version(path: str, descriptor: int, stamp: Stamp, max_bytes: int) -> tuple[Refusal, str] | None:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        return Refusal.NOT_AN_IMAGE, "it is not a regular file"
    if not stamp_of(status).agrees_with(stamp):
        return Refusal.CHANGED, "the file has changed"
    head = os.pread(descriptor, HEAD_BYTES, 0)
    if not looks_like_image(path, head):
        return Refusal.NOT_AN_IMAGE, "neither its name nor its content is that of an image"
    if not head:
        return Refusal.EMPTY, "it is empty"
    if status.st_size > max_bytes:
        return Refusal.TOO_LARGE, f"{status.st_size:,} bytes are over the limit of {max_bytes:,}"
    return None
