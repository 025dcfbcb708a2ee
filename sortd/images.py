"""Bytes to upright RGB at the very size that an encoder sees, within limits on what may be asked of the machine.

The way of one image: its format told by content, its size held against the limits, frame 0 decoded (JPEG at the scale
that is needed), made opaque over white, eight bits deep, upright by EXIF, resized and cropped. Decoded in full, an
opaque image comes out bit for bit as from the image processors of transformers that work by Pillow.
"""

import errno
import importlib
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, Literal

import numpy as np
import numpy.typing as npt

from sortd.decoding.endings import is_unfinished
from sortd.decoding.files import open_file
from sortd.decoding.formats import HEAD_BYTES, READABLE, SUFFIXES, Format, format_of, looks_like_image
from sortd.decoding.pixels import fitted, least_side, opaque
from sortd.errors import CrowdedError, ImageError, NotAnImageError, TooLargeError, UnreadableError
from sortd.messages import Preprocessing

if TYPE_CHECKING:
    from PIL import Image
    from PIL.ImageFile import ImageFile

__all__ = [
    "SUFFIXES",
    "Jpeg",
    "Limits",
    "Pixels",
    "decode",
    "decode_file",
    "look_at_file",
    "looks_like_image",
]

Pixels = npt.NDArray[np.uint8]  # (height, width, 3): RGB
Jpeg = Literal["draft", "full"]

BYTES_OF_A_PIXEL = 4
"""What Pillow holds of a pixel that has colours."""

_ORIENTATION = 0x0112


@dataclass(frozen=True, slots=True)
class Limits:
    """What one image may cost; more is refused before it is decoded."""

    max_pixels: int = 50_000_000
    """Pixels to decode; of a JPEG those that are left at the scale it is decoded at."""
    max_side: int = 40_000
    max_bytes: int = 500_000_000

    @property
    def memory_bytes(self) -> int:
        """What decoding may take beside an idle process: a pixel takes 4 bytes, and a little is needed for the rest."""
        return (BYTES_OF_A_PIXEL + 1) * self.max_pixels + 30_000_000


def decode(
    file: BinaryIO | int,
    preprocessing: Preprocessing,
    limits: Limits,
    *,
    jpeg: Jpeg = "draft",
    room_pixels: int | None = None,
) -> Pixels:
    """Decode frame 0 of an image as the encoder sees it.

    Args:
        file: an open file or its descriptor; read from its beginning, left open. Never a path: what Pillow does with
            one depends on the suffix.
        preprocessing: the size, and the way to it.
        limits: what is refused.
        jpeg: ``draft`` decodes JPEG at a half, a quarter or an eighth where that is ample, ``full`` every pixel.
        room_pixels: what it may take in memory, as pixels that are held at a time; None: what ``limits`` allow.

    Returns:
        uint8 (crop_height, crop_width, 3), C-contiguous.

    Raises:
        CrowdedError: it takes more than ``room_pixels``; nothing was decoded.
        NotAnImageError: sortd has no decoder for it here; the message says how to come to one.
        TooLargeError: over a limit, or over the memory that the process may have.
        UnreadableError: no image, a broken one, or one that is not complete.
        OSError: with ``errno`` set: the disk could not be read. The image may be a good one.
    """
    with _opened(file, limits, jpeg) as image, _translated():
        pixels = _check_size(image, limits, preprocessing, jpeg)
        if room_pixels is not None and pixels > room_pixels:
            raise CrowdedError(pixels)
        image.load()
        if image.format in {"JPEG", "MPO"} and image.mode == "CMYK" and "adobe" not in image.info:
            image.info["jpeg_cmyk"] = "plain"  # Pillow takes every CMYK JPEG for Adobe's, which are inverted
        upright = opaque(image, _turn_of(image), preprocessing)
        return np.array(fitted(upright, preprocessing).convert("RGB"))


def decode_file(path: str, preprocessing: Preprocessing, limits: Limits, *, jpeg: Jpeg = "draft") -> Pixels:
    """Decode an image by its path; see ``decode`` for what is returned and raised."""
    with _file(path) as file:
        return decode(file, preprocessing, limits, jpeg=jpeg)


def look_at_file(path: str, limits: Limits, *, jpeg: Jpeg = "draft") -> None:
    """Read an image's header alone; raises what ``decode`` would raise because of it."""
    with _file(path) as file, _opened(file, limits, jpeg) as image, _translated():
        _check_size(image, limits, Preprocessing(1, 1, 1), jpeg)


def upright_size(path: str, limits: Limits) -> tuple[int, int]:
    """Return width and height of an image as people see it, from its header; raises what ``decode`` would."""
    with _file(path) as file, _opened(file, limits, "full") as image, _translated():
        turn, (width, height) = _turn_of(image), image.size
        return (height, width) if turn in _ON_ITS_SIDE else (width, height)


@contextmanager
def _file(path: str) -> Iterator[BinaryIO]:
    try:
        descriptor = open_file(path)
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.ENXIO}:
            raise NotAnImageError("it is a link, a socket or a device") from error
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise NotAnImageError("it is no regular file")
        with open(descriptor, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(descriptor)


@contextmanager
def _opened(file: BinaryIO | int, limits: Limits, jpeg: Jpeg) -> Iterator["ImageFile"]:
    """Open an image within the limits on bytes, by the one decoder that its beginning asks for."""
    with open(file if isinstance(file, int) else file.fileno(), "rb", closefd=False) as bytes_of_it:
        size = os.fstat(bytes_of_it.fileno()).st_size
        if size > limits.max_bytes:
            raise TooLargeError(f"{size:,} bytes are over the limit of {limits.max_bytes:,}; see decoding.max_bytes")
        bytes_of_it.seek(0)
        image_format = format_of(bytes_of_it.read(HEAD_BYTES))
        if image_format is None:
            raise UnreadableError(f"the content is no image that sortd reads: those are {READABLE}")
        if is_unfinished(bytes_of_it, image_format.name):
            raise UnreadableError(f"the {image_format.name} data end in zeros: it was never written to its end")
        _register(image_format)
        bytes_of_it.seek(0)
        drafts = image_format.name == "JPEG" and jpeg == "draft"
        with _guarded(64 * limits.max_pixels if drafts else limits.max_pixels):
            with _translated():
                from PIL import Image

                image = Image.open(bytes_of_it, formats=(image_format.name,))
            with image:
                yield image


def _register(image_format: Format) -> None:
    try:
        plugin = importlib.import_module(image_format.plugin)
    except ImportError as error:
        raise NotAnImageError(f"{image_format.name} cannot be decoded here; {image_format.mend}") from error
    if image_format.name == "HEIF":
        plugin.register_heif_opener(thumbnails=False)
        return
    from PIL import Image

    if image_format.name not in Image.OPEN or not getattr(plugin, "SUPPORTED", True):
        raise NotAnImageError(f"{image_format.name} cannot be decoded here; {image_format.mend}")


@contextmanager
def _guarded(max_pixels: int) -> Iterator[None]:
    """Make Pillow refuse what unpacks to too much, and what is cut short, whatever was set before."""
    from PIL import Image, ImageFile

    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = max_pixels, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = before


@contextmanager
def _translated() -> Iterator[None]:
    """Turn whatever a decoder raises over hostile bytes into the error of one image."""
    from PIL import Image, UnidentifiedImageError

    try:
        yield
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooLargeError(f"it unpacks to too many pixels; see decoding.max_pixels ({error})") from error
    except MemoryError as error:
        raise TooLargeError("decoding it takes more memory than a decoder may have; see decoding.max_pixels") from error
    except UnidentifiedImageError as error:
        raise UnreadableError("it begins like an image, but its header is broken") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise UnreadableError(f"it does not decode: {error}") from error
    except Exception as error:  # Pillow's decoders raise SyntaxError, KeyError, struct.error and more over broken bytes
        raise UnreadableError(f"it does not decode: {type(error).__name__}: {error}") from error


def _check_size(image: "ImageFile", limits: Limits, preprocessing: Preprocessing, jpeg: Jpeg) -> int:
    """Hold an image's sides and pixels against the limits, after JPEG's are chosen; return what it takes, in pixels.

    The coefficients of a progressive JPEG are all held until its last scan, at whatever scale it is decoded
    (libjpeg.txt, "Memory usage"), and some decoders hold the whole file.
    """
    width, height = image.size
    if max(width, height) > limits.max_side:
        raise TooLargeError(
            f"{width:,} x {height:,} pixels: a side is over the limit of {limits.max_side:,}; "
            "see decoding.max_side_pixels"
        )
    if image.format in {"JPEG", "MPO"} and jpeg == "draft":
        wanted = least_side(preprocessing)
        image.draft(None, (wanted, wanted))
    pixels = image.width * image.height
    if pixels > limits.max_pixels:
        raise TooLargeError(
            f"{width:,} x {height:,} pixels are over the limit of {limits.max_pixels:,}; see decoding.max_pixels"
        )
    held = width * height if "progressive" in image.info else pixels
    file_size = 0 if image.fp is None else os.fstat(image.fp.fileno()).st_size
    return min(max(held, file_size // BYTES_OF_A_PIXEL), limits.max_pixels)


_ON_ITS_SIDE = frozenset({2, 4, 5, 6})
"""Values of ``Image.Transpose`` that exchange width and height."""


def _turn_of(image: "ImageFile") -> "Image.Transpose | None":
    """Return what makes an image upright; None where it is, or where its EXIF is broken and says nothing."""
    from PIL import Image

    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    try:
        return turns.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # noqa: BLE001 -- a picture is as good as it was without its EXIF, and broken EXIF raises anything
        return None
