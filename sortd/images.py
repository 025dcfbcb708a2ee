"""Bytes to upright RGB at the very size that an encoder sees, within limits on what may be asked of the machine.

The way of one image: its format told by content, its size held against the limits, frame 0 decoded (JPEG at the scale
that is needed), made opaque over white, eight bits deep, upright by EXIF, resized and cropped. Decoded in full, an
opaque image comes out bit for bit as from the image processors of transformers that work by Pillow.
"""

import errno
import importlib
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, Literal

import numpy as np
import numpy.typing as npt

from sortd.decoding.endings import is_unfinished
from sortd.decoding.files import open_file
from sortd.decoding.formats import FORMATS, HEAD_BYTES, READABLE, SUFFIXES, Format, format_of, looks_like_image
from sortd.decoding.pixels import fitted, least_side, opaque
from sortd.decoding.png_chunks import picture_of
from sortd.errors import CrowdedError, ImageError, NotAnImageError, TooLargeError, UnreadableError
from sortd.events import Preprocessing

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

DECODERS = 2
"""Is raised when sortd decodes images that it refused before: those that it set aside are tried again then."""

BYTES_OF_A_PIXEL = 4
"""What Pillow holds of a pixel that has colours."""

_ORIENTATION = 0x0112

_UNSUPPORTED = re.compile(
    "unsupported|not (yet )?supported|unknown (?!data)|cannot handle|not implemented|no (codec|decod)|plugin|samples",
    re.IGNORECASE,
)
"""What decoders say of an image that is not broken, but of a kind that they do not decode."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one image may cost; more is refused before it is decoded."""

    max_pixels: int = 50_000_000
    """Pixels to decode; of a JPEG those that are left at the scale it is decoded at."""
    max_side: int = 40_000
    max_bytes: int = 500_000_000

    def memory_bytes(self, image_format: Format | None) -> int:
        """Return what decoding may take beside an idle process, so that ``max_pixels`` pixels of the format fit.

        Args:
            image_format: None for the one that takes most.
        """
        asking = FORMATS if image_format is None else (image_format,)
        return max(one.peak_bytes for one in asking) * self.max_pixels + 30_000_000


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
    with _opened(file, limits, jpeg) as opened, _translated(opened.format, limits):
        image = opened.image
        pixels = _check_size(opened, limits, preprocessing, jpeg)
        if room_pixels is not None and pixels > room_pixels:
            raise CrowdedError(pixels)
        loaded = _loaded(image)
        if image.format in {"JPEG", "MPO"} and image.mode == "CMYK" and "adobe" not in image.info:
            loaded.info["jpeg_cmyk"] = "plain"  # Pillow takes every CMYK JPEG for Adobe's, which are inverted
        upright = opaque(loaded, _turn_of(image), preprocessing)
        return np.array(fitted(upright, preprocessing).convert("RGB"))


def decode_file(path: str, preprocessing: Preprocessing, limits: Limits, *, jpeg: Jpeg = "draft") -> Pixels:
    """Decode an image by its path; see ``decode`` for what is returned and raised."""
    with _file(path) as file:
        return decode(file, preprocessing, limits, jpeg=jpeg)


def look_at_file(path: str, limits: Limits, *, jpeg: Jpeg = "draft") -> None:
    """Read an image's header alone; raises what ``decode`` would raise because of it."""
    with _file(path) as file, _opened(file, limits, jpeg) as opened, _translated(opened.format, limits):
        _check_size(opened, limits, Preprocessing(1, 1, 1), jpeg)


def load_decoders() -> list[str]:
    """Import the decoders of all formats, so that no image is the first that asks for one.

    Returns:
        For each format that cannot be decoded here, a sentence on it and on what to install.
    """
    missing = []
    for image_format in FORMATS:
        try:
            _opener_of(image_format)
        except NotAnImageError as error:
            missing.append(str(error))
    return missing


def upright_size(path: str, limits: Limits) -> tuple[int, int]:
    """Return width and height of an image as people see it, from its header; raises what ``decode`` would."""
    with _file(path) as file, _opened(file, limits, "full") as opened, _translated(opened.format, limits):
        turn, (width, height) = _turn_of(opened.image), opened.image.size
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


@dataclass(frozen=True, slots=True)
class _Opened:
    """An image whose header was read."""

    image: "ImageFile"
    format: Format
    file_bytes: int


@contextmanager
def _opened(file: BinaryIO | int, limits: Limits, jpeg: Jpeg) -> Iterator[_Opened]:
    """Open an image within the limits on bytes, by the one decoder that its beginning asks for."""
    with open(file if isinstance(file, int) else file.fileno(), "rb", closefd=False) as bytes_of_it:
        size = os.fstat(bytes_of_it.fileno()).st_size
        if size > limits.max_bytes:
            raise TooLargeError(f"{size:,} bytes are over the limit of {limits.max_bytes:,}; see decoding.max_bytes")
        bytes_of_it.seek(0)
        image_format = format_of(bytes_of_it.read(HEAD_BYTES))
        if image_format is None:
            raise UnreadableError(f"the content is no image that sortd reads: those are {READABLE}")
        title = image_format.title
        if is_unfinished(bytes_of_it, image_format.name):
            raise UnreadableError(f"{title} is read, but this file is not complete: it was never written to its end")
        opener = _opener_of(image_format)
        content = picture_of(bytes_of_it) if image_format.name == "PNG" else bytes_of_it
        content.seek(0)
        drafts = image_format.name == "JPEG" and jpeg == "draft"
        with _guarded(64 * limits.max_pixels if drafts else limits.max_pixels):
            with _translated(image_format, limits):
                # Not by Image.open(), which says of any error in a header only that there was one.
                image = opener(content, "")
            with image:
                yield _Opened(image, image_format, size)


def _opener_of(image_format: Format) -> Callable[[BinaryIO, str], "ImageFile"]:
    """Return what opens images of a format, with no threads: each of them takes address space by the gigabyte.

    Raises:
        NotAnImageError: there is none here.
    """
    try:
        plugin = importlib.import_module(image_format.plugin)
    except ImportError as error:
        raise NotAnImageError(f"{image_format.title} cannot be decoded here; {image_format.mend}") from error
    from PIL import Image

    if image_format.name == "HEIF":
        plugin.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False, decode_threads=1)
    elif image_format.name == "AVIF":
        vars(plugin)["DEFAULT_MAX_THREADS"] = 1
    if image_format.name not in Image.OPEN or not getattr(plugin, "SUPPORTED", True):
        raise NotAnImageError(f"{image_format.title} cannot be decoded here; {image_format.mend}")
    opener, _ = Image.OPEN[image_format.name]
    return opener


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
def _translated(image_format: Format, limits: Limits) -> Iterator[None]:
    """Turn whatever a decoder raises over hostile bytes into the error of one image."""
    from PIL import Image

    title = image_format.title
    try:
        yield
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooLargeError(f"it unpacks to too many pixels; see decoding.max_pixels ({error})") from error
    except MemoryError as error:
        raise TooLargeError(_over_memory(image_format, limits)) from error
    except Exception as error:  # Pillow's decoders raise SyntaxError, KeyError, struct.error and more over broken bytes
        if isinstance(error, OSError) and error.errno is not None:
            raise
        said = " ".join(f"{error}".split()) or type(error).__name__
        if "memory" in said.lower():
            raise TooLargeError(_over_memory(image_format, limits)) from error
        if isinstance(error.__cause__ or error, KeyError):  # looked for among what Pillow can do
            said = f"unknown value {said} in its header"
        if _UNSUPPORTED.search(said):
            raise UnreadableError(
                f"{title} is read, but not this kind of {title} ({said}); save it in another way, for instance as PNG"
            ) from error
        raise UnreadableError(f"{title} is read, but this file is broken or not complete: {said}") from error


def _over_memory(image_format: Format, limits: Limits) -> str:
    megabytes = limits.memory_bytes(image_format) // 1_000_000
    return (
        f"decoding it takes more memory than the {megabytes:,} MB that one {image_format.title} may take here; "
        "see decoding.max_pixels"
    )


def _check_size(opened: _Opened, limits: Limits, preprocessing: Preprocessing, jpeg: Jpeg) -> int:
    """Hold an image's sides and pixels against the limits, after JPEG's are chosen; return what it takes, in pixels.

    The coefficients of a progressive JPEG are all held until its last scan, at whatever scale it is decoded
    (libjpeg.txt, "Memory usage"), and some decoders hold the whole file.
    """
    image = opened.image
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
    held_bytes = 4 * width * height if "progressive" in image.info else opened.format.held_bytes * pixels
    return min(max(held_bytes, opened.file_bytes) // BYTES_OF_A_PIXEL, limits.max_pixels)


def _loaded(image: "ImageFile") -> "Image.Image":
    """Load frame 0; of a WebP without libwebp's canvases beside it, which are twice as large as the image."""
    from PIL import Image

    decoder = getattr(image, "_decoder", None)
    if image.format != "WEBP" or decoder is None:
        image.load()
        return image
    frame = decoder.get_next()
    del decoder
    image._decoder = None  # type: ignore[attr-defined]  # noqa: SLF001 -- nothing public lets go of the canvases
    if frame is None:
        raise UnreadableError("WEBP is read, but this file is broken or not complete: its first frame does not decode")
    if image.mode == "RGBA":
        return Image.frombuffer("RGBA", image.size, frame[0], "raw", "RGBA", 0, 1)
    return Image.frombytes("RGB", image.size, frame[0], "raw", "RGBX")


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
