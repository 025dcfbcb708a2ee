"""Bytes to upright RGB at the very size that an encoder sees, within limits on what may be asked of the machine.

The steps of one image: its format told by content, its size held against the limits, frame 0 decoded (JPEG at the scale
that is needed), made opaque over white, eight bits deep, upright by EXIF, resized and cropped. Decoded in full, an
opaque image comes out bit for bit as from the image processors of transformers that work by Pillow.
"""

import base64
import errno
import importlib
import io
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

from sortd.arrays import Pixels
from sortd.errors import CrowdedError, ImageError, NotAnImageError, TooLargeError, UnreadableError
from sortd.images.formats import FORMATS, HEAD_BYTES, READABLE, Format, format_of, open_file
from sortd.images.structure import is_truncated, png_picture
from sortd.messages import Fit, Preprocessing

if TYPE_CHECKING:
    from PIL import Image
    from PIL.ImageFile import ImageFile

Jpeg = Literal["draft", "full"]

DECODER_VERSION = 2
"""Is raised when sortd decodes images that it refused before: those that it set aside are tried again then."""
BYTES_OF_A_PIXEL = 4
"""Memory that Pillow holds for a pixel that has colours."""
AMPLE = 2
"""An image is decoded and compacted to no less than so many times the size that is wanted; the resize does the rest."""
COMPACT_FROM_PIXELS = 16_000_000
"""Larger images that must be turned or recoloured are made smaller on the way, a strip at a time."""
LONGEST_EXACT = 50
"""Of longer images (as a ratio of sides) only the part that stays is resized: the whole could fill the memory."""
THUMBNAIL_PIXELS = 160
THUMBNAIL_QUALITY = 80

_STRIP_ROWS = 128
_ORIENTATION = 0x0112
_ON_ITS_SIDE = frozenset({2, 4, 5, 6})
"""Values of ``Image.Transpose`` that exchange width and height."""
_UNSUPPORTED = re.compile(
    "unsupported|not (yet )?supported|unknown (?!data)|cannot handle|not implemented|no (codec|decod)|plugin|samples",
    re.IGNORECASE,
)
"""What decoders say of an image that is not broken, but of a kind that they do not decode."""


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """What one image may cost; more is refused before it is decoded."""

    max_pixels: int = 50_000_000
    """Pixels to decode; of a JPEG those that are left at the scale it is decoded at."""
    max_side: int = 40_000
    max_bytes: int = 500_000_000

    def memory_bytes(self, image_format: Format | None) -> int:
        """Return what decoding may take beside an idle process, so that ``max_pixels`` pixels of the format fit.

        Args:
            image_format: None takes the most costly one.
        """
        asking = FORMATS if image_format is None else (image_format,)
        return max(one.peak_bytes for one in asking) * self.max_pixels + 30_000_000


def decode_image(
    file: BinaryIO | int,
    preprocessing: Preprocessing,
    limits: DecodeLimits,
    *,
    jpeg: Jpeg = "draft",
    room_pixels: int | None = None,
) -> Pixels:
    """Decode frame 0 of an image as the encoder sees it.

    Args:
        file: an open file or its descriptor; read from its beginning, left open.
        preprocessing: the size, and the way to it.
        limits: what is refused.
        jpeg: ``draft`` decodes JPEG at a half, a quarter or an eighth where that is ample, ``full`` every pixel.
        room_pixels: pixels that it may hold in memory at a time; None: what ``limits`` allow.

    Returns:
        uint8 (crop_height, crop_width, 3), C-contiguous.

    Raises:
        CrowdedError: it takes more than ``room_pixels``; nothing was decoded.
        NotAnImageError: sortd has no decoder for it here; the message says how to come to one.
        TooLargeError: over a limit, or over the memory that the process may have.
        UnreadableError: no image, a broken one, or one that is not complete.
        OSError: the disk could not be read (``errno`` is set); the image may be a good one.
    """
    with _opened(file, limits, jpeg) as opened, _translated(opened.format, limits):
        image = opened.image
        pixels = _check_size(opened, limits, preprocessing, jpeg)
        if room_pixels is not None and pixels > room_pixels:
            raise CrowdedError(pixels)
        loaded = _loaded(image)
        if image.format in {"JPEG", "MPO"} and image.mode == "CMYK" and "adobe" not in image.info:
            loaded.info["jpeg_cmyk"] = "plain"  # Pillow takes every CMYK JPEG for Adobe's, which are inverted
        upright = _opaque(loaded, _turn_of(image), preprocessing)
        return np.array(_fitted(upright, preprocessing).convert("RGB"))


def decode_file(path: str, preprocessing: Preprocessing, limits: DecodeLimits, *, jpeg: Jpeg = "draft") -> Pixels:
    """Decode an image by its path; see ``decode`` for what is returned and raised."""
    with _file(path) as file:
        return decode_image(file, preprocessing, limits, jpeg=jpeg)


def check_header(path: str, limits: DecodeLimits, *, jpeg: Jpeg = "draft") -> None:
    """Read an image's header alone; raises what ``decode`` would raise because of it."""
    with _file(path) as file, _opened(file, limits, jpeg) as opened, _translated(opened.format, limits):
        _check_size(opened, limits, Preprocessing(1, 1, 1), jpeg)


def load_decoders() -> list[str]:
    """Import the decoders of all formats; return what to install for each format that cannot be decoded here."""
    missing = []
    for image_format in FORMATS:
        try:
            _opener_of(image_format)
        except NotAnImageError as error:
            missing.append(str(error))
    return missing


def thumbnail(path: str, *, side_pixels: int = THUMBNAIL_PIXELS, limits: DecodeLimits | None = None) -> str | None:
    """Return the whole picture, upright and small, as the ``data:`` address of a JPEG; None where it is not readable.

    Args:
        path: the image.
        side_pixels: length of its longer side.
        limits: what is refused.
    """
    from PIL import Image

    limits = limits or DecodeLimits()
    try:
        width, height = _upright_size(path, limits)
        scale = side_pixels / max(width, height)
        width, height = max(1, round(width * scale)), max(1, round(height * scale))
        seen = Preprocessing(shortest_edge=side_pixels, crop_height=height, crop_width=width, fit=Fit.STRETCH)
        pixels = decode_file(path, seen, limits)
    except (ImageError, OSError):
        return None  # `sortd check` says what is wrong with it
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=THUMBNAIL_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _upright_size(path: str, limits: DecodeLimits) -> tuple[int, int]:
    """Return width and height of an image as people see it, from its header."""
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
def _opened(file: BinaryIO | int, limits: DecodeLimits, jpeg: Jpeg) -> Iterator[_Opened]:
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
        if is_truncated(bytes_of_it, image_format.name):
            raise UnreadableError(f"{title} is read, but this file is not complete: it was never written to its end")
        opener = _opener_of(image_format)
        content = png_picture(bytes_of_it) if image_format.name == "PNG" else bytes_of_it
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
def _translated(image_format: Format, limits: DecodeLimits) -> Iterator[None]:
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


def _over_memory(image_format: Format, limits: DecodeLimits) -> str:
    megabytes = limits.memory_bytes(image_format) // 1_000_000
    return (
        f"decoding it takes more memory than the {megabytes:,} MB that one {image_format.title} may take here; "
        "see decoding.max_pixels"
    )


def _check_size(opened: _Opened, limits: DecodeLimits, preprocessing: Preprocessing, jpeg: Jpeg) -> int:
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
        wanted = _least_side(preprocessing)
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


# ------------------------------------------------------------ to opaque RGB at the size that is seen


def _least_side(preprocessing: Preprocessing) -> int:
    """Return the shorter side, in pixels, below which an image is not to be decoded or compacted."""
    if preprocessing.fit is Fit.STRETCH:
        return AMPLE * max(preprocessing.crop_height, preprocessing.crop_width)
    return AMPLE * preprocessing.shortest_edge


def _opaque(image: "Image.Image", turn: "Image.Transpose | None", preprocessing: Preprocessing) -> "Image.Image":
    """Make an image opaque (over white), eight bits deep and upright; its mode is ``L`` or ``RGB`` then.

    Args:
        image: loaded, of any mode.
        turn: what makes it upright.
        preprocessing: how small a large image may be made on the way.
    """
    if _is_plain(image) and turn is None:
        return image
    shallow = _eight_bits(image)
    factor = min(image.size) // _least_side(preprocessing)
    if image.width * image.height < COMPACT_FROM_PIXELS or factor < AMPLE:
        factor = 1
    small = shallow if factor == 1 and _is_plain(shallow) else _by_strips(shallow, factor)
    return small if turn is None else small.transpose(turn)


def _by_strips(image: "Image.Image", factor: int) -> "Image.Image":
    """Make an image opaque and smaller by a whole factor; only the result is held whole beside the image."""
    from PIL import Image

    rows = max(1, _STRIP_ROWS // factor) * factor
    small = Image.new("RGB", (-(-image.width // factor), -(-image.height // factor)))
    for top in range(0, image.height, rows):
        strip = _over_white(image.crop((0, top, image.width, min(top + rows, image.height))))
        small.paste(strip if factor == 1 else strip.reduce(factor), (0, top // factor))
    return small


def _is_plain(image: "Image.Image") -> bool:
    return image.mode in {"L", "RGB"} and not image.has_transparency_data


def _over_white(image: "Image.Image") -> "Image.Image":
    """Return an image of mode ``L`` or ``RGB``: what is transparent shows white."""
    from PIL import Image, ImageChops

    if _is_plain(image):
        return image
    if image.has_transparency_data:
        coloured = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, coloured).convert("RGB")
    if image.mode == "CMYK" and image.info.get("jpeg_cmyk") == "plain":
        return ImageChops.invert(image).convert("RGB")
    return image.convert("L" if image.mode == "1" else "RGB")


def _eight_bits(image: "Image.Image") -> "Image.Image":
    """Scale grey of 16 or 32 bits, or of floats, to ``L``; Pillow's own conversion would cut it off at 255.

    16 bits are scaled by their whole range. Wider ones have no range that all writers agree on: what lies within 16
    bits, or within 0 to 1 for floats, is taken to be meant so, anything else is stretched from its ends to 0 and 255.
    """
    from PIL import Image

    if not image.mode.startswith(("I", "F")):
        return image
    # Of the 16-bit modes only the native one can be cropped; their values take little room anyway.
    whole = np.asarray(image) if ";" in image.mode else None
    grey = np.empty((image.height, image.width), np.uint8)

    def strips() -> Iterator[tuple[slice, npt.NDArray[np.float64]]]:
        for top in range(0, image.height, _STRIP_ROWS):
            rows = slice(top, min(top + _STRIP_ROWS, image.height))
            strip = np.asarray(image.crop((0, rows.start, image.width, rows.stop))) if whole is None else whole[rows]
            values = strip.astype(np.float64)
            values[~np.isfinite(values)] = np.nan
            yield rows, values

    low, high = (0.0, 65_535.0) if whole is not None else _range_of(image.mode, strips())
    scale = 255 / (high - low) if high > low else 0.0
    for rows, strip in strips():
        grey[rows] = np.rint((np.nan_to_num(strip, nan=low) - low) * scale)
    return Image.fromarray(grey)


def _range_of(mode: str, strips: Iterator[tuple[slice, npt.NDArray[np.float64]]]) -> tuple[float, float]:
    """Return the values that stand for black and for white."""
    ends = [(float(np.nanmin(strip)), float(np.nanmax(strip))) for _, strip in strips if not np.isnan(strip).all()]
    low, high = min((low for low, _ in ends), default=0.0), max((high for _, high in ends), default=0.0)
    usual = 1.0 if mode == "F" else 65_535.0
    return (0.0, usual) if low >= 0 and high <= usual else (low, high)


def _fitted(image: "Image.Image", preprocessing: Preprocessing) -> "Image.Image":
    """Resize and crop an image as the image processors of transformers do that work by Pillow.

    The longer side is truncated and the crop's corner floored as in ``get_resize_output_image_size`` and
    ``center_crop`` of transformers/image_transforms.py; what a crop lacks is black, as there.
    """
    from PIL import Image

    resample = Image.Resampling(preprocessing.resample)
    crop_width, crop_height = preprocessing.crop_width, preprocessing.crop_height
    if preprocessing.fit is Fit.STRETCH:
        return image.resize((crop_width, crop_height), resample)
    edge = preprocessing.shortest_edge
    short, long = sorted(image.size)
    long_after = int(edge * long / short)
    width, height = (edge, long_after) if image.width <= image.height else (long_after, edge)
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    if long > LONGEST_EXACT * short:
        scale = short / edge
        box = (left * scale, top * scale, (left + crop_width) * scale, (top + crop_height) * scale)
        return image.resize((crop_width, crop_height), resample, box=box)
    return image.resize((width, height), resample).crop((left, top, left + crop_width, top + crop_height))
