"""Decoding of one image to upright RGB pixels of the encoder's size, within limits.

Steps: detect the format by content, check the limits, decode frame 0 (JPEG at a reduced scale), blend onto white,
convert to eight bits, apply the EXIF orientation, resize and crop. An opaque image that is decoded at full scale gives
the same pixels, bit for bit, as the Pillow image processors of transformers.
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
from PIL import Image, ImageChops, ImageFile

from sortd.arrays import Pixels
from sortd.errors import CrowdedError, ImageError, NotAnImageError, TooLargeError, UnreadableError
from sortd.events import Fit, Preprocessing
from sortd.images.formats import FORMATS, HEAD_BYTES, SUPPORTED, Format, format_of, is_truncated, strip_png

if TYPE_CHECKING:
    from sortd.config import Decoding  # pydantic, which the decoding process does not need

Jpeg = Literal["draft", "full"]

DECODER_VERSION = 2
"""Increased when sortd decodes images that it refused before: rejected images are then tried again."""
_PIXEL_BYTES = 4  # memory that Pillow uses for a pixel of a colour image
_OVERSAMPLING = 2  # reduced decoding keeps at least this many times the target size; the resize does the rest
_REDUCE_FROM_PIXELS = 16_000_000  # larger images that must be rotated or converted are reduced strip by strip
_MAX_FULL_RESIZE_RATIO = (
    50  # of longer images (ratio of sides) only the crop is resized: the whole could fill the memory
)
_STRIP_ROWS = 128
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The operation that makes an image upright, by the orientation in its EXIF."""
_UNSUPPORTED = re.compile(
    "unsupported|not (yet )?supported|unknown (?!data)|cannot handle|not implemented|no (codec|decod)|plugin|samples",
    re.IGNORECASE,
)  # decoder messages for a file that is intact but of an unsupported kind


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """The largest image that is decoded."""

    max_pixels: int = 50_000_000
    """Pixels to decode; for JPEG, those at the scale of decoding."""
    max_side: int = 40_000
    max_bytes: int = 500_000_000

    @staticmethod
    def of(decoding: "Decoding") -> "DecodeLimits":
        """Return the configured limits."""
        return DecodeLimits(decoding.max_pixels, decoding.max_side_pixels, decoding.max_bytes)

    def memory_bytes(self, image_format: Format | None) -> int:
        """Return the memory, above that of an idle process, for decoding ``max_pixels`` pixels of a format (or any)."""
        formats = FORMATS if image_format is None else (image_format,)
        return max(one.peak_bytes for one in formats) * self.max_pixels + 30_000_000


def decode_image(
    file: BinaryIO | int,
    preprocessing: Preprocessing,
    limits: DecodeLimits,
    *,
    jpeg: Jpeg = "draft",
    budget_pixels: int | None = None,
) -> Pixels:
    """Decode frame 0 of an image to the pixels that the encoder takes.

    Args:
        file: an open file or its descriptor; read from its beginning and left open.
        preprocessing: the size and the way of resizing.
        limits: larger images are refused.
        jpeg: ``draft`` decodes JPEG at 1/2, 1/4 or 1/8 scale where that is large enough, ``full`` every pixel.
        budget_pixels: pixels that it may hold in memory; None: as many as ``limits`` allow.

    Returns:
        uint8 (crop_height, crop_width, 3), C-contiguous; at most that high and wide with ``Fit.WHOLE``.

    Raises:
        CrowdedError: it needs more than ``budget_pixels``; nothing was decoded.
        NotAnImageError: its decoder is not installed; the message says how to install it.
        TooLargeError: it exceeds a limit, or the memory of this process.
        UnreadableError: it is not an image, broken, or incomplete.
        OSError: the disk could not be read (``errno`` is set); the image may be intact.
    """
    with _open_image(file, limits, jpeg) as opened:
        image = opened.image
        pixels = _check_size(opened, limits, preprocessing, jpeg)
        if budget_pixels is not None and pixels > budget_pixels:
            raise CrowdedError(pixels)
        loaded = _load(image)
        if image.format in {"JPEG", "MPO"} and image.mode == "CMYK" and "adobe" not in image.info:
            loaded.info["jpeg_cmyk"] = "plain"  # Pillow inverts every CMYK JPEG, as Adobe's need; others do not
        return _fit(loaded, _transpose_of(image), preprocessing)


def fit_image(image: Image.Image, preprocessing: Preprocessing) -> Pixels:
    """Return the pixels that the encoder takes of an image of Pillow, as ``decode_image`` does at full scale."""
    return _fit(image, _transpose_of(image), preprocessing)


def decode_file(path: str, preprocessing: Preprocessing, limits: DecodeLimits, *, jpeg: Jpeg = "draft") -> Pixels:
    """Decode an image by its path; see ``decode_image``."""
    with _open_path(path) as file:
        return decode_image(file, preprocessing, limits, jpeg=jpeg)


def check_header(path: str, limits: DecodeLimits) -> None:
    """Read only the header of an image; raise what ``decode_image`` would raise because of it."""
    with _open_path(path) as file, _open_image(file, limits, "draft") as opened:
        _check_size(opened, limits, Preprocessing(1, 1, 1), "draft")


def image_size(path: str, limits: DecodeLimits) -> tuple[int, int]:
    """Return width and height of an image from its header, not turned by its EXIF; raise as ``check_header``."""
    with _open_path(path) as file, _open_image(file, limits, "full") as opened:
        return opened.image.size


def load_decoders() -> list[str]:
    """Import the decoders of all formats; return for each missing one a message that says what to install."""
    missing = []
    for image_format in FORMATS:
        try:
            _opener_of(image_format)
        except NotAnImageError as error:
            missing.append(str(error))
    return missing


# ------------------------------------------------------------ opening


def open_file(path: str) -> int:
    """Open a file for reading and return its descriptor; links are not followed, and a pipe does not block."""
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


@contextmanager
def _open_path(path: str) -> Iterator[BinaryIO]:
    try:
        descriptor = open_file(path)
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.ENXIO}:
            raise NotAnImageError("it is a link, a socket or a device") from error
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise NotAnImageError("it is not a regular file")
        with open(descriptor, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class _Opened:
    """An image whose header was read."""

    image: ImageFile.ImageFile
    format: Format
    file_bytes: int


@contextmanager
def _open_image(file: BinaryIO | int, limits: DecodeLimits, jpeg: Jpeg) -> Iterator[_Opened]:
    """Open an image with the decoder of its format; errors of the decoder in the block become those of an image."""
    with open(file if isinstance(file, int) else file.fileno(), "rb", closefd=False) as source:
        size = os.fstat(source.fileno()).st_size
        if size > limits.max_bytes:
            raise TooLargeError(f"{size:,} bytes are over the limit of {limits.max_bytes:,}; see decoding.max_bytes")
        source.seek(0)
        image_format = format_of(source.read(HEAD_BYTES))
        if image_format is None:
            raise UnreadableError(f"not an image in a supported format ({SUPPORTED})")
        if is_truncated(source, image_format.name):
            raise UnreadableError(f"incomplete {image_format.title} file: it was never written to its end")
        opener = _opener_of(image_format)
        content = strip_png(source) if image_format.name == "PNG" else source
        content.seek(0)
        is_draft = image_format.name == "JPEG" and jpeg == "draft"
        with (
            _pillow_limits(64 * limits.max_pixels if is_draft else limits.max_pixels),
            _translate_errors(image_format, limits),
            opener(content, "") as image,  # Image.open() hides what is wrong with a header
        ):
            yield _Opened(image, image_format, size)


def _opener_of(image_format: Format) -> Callable[[BinaryIO, str], ImageFile.ImageFile]:
    """Return Pillow's function that opens a format, set to one thread: each thread takes gigabytes of address space.

    Raises:
        NotAnImageError: the decoder is not installed.
    """
    missing = f"{image_format.title} cannot be decoded here; {image_format.remedy}"
    try:
        plugin = importlib.import_module(image_format.plugin)
    except ImportError as error:
        raise NotAnImageError(missing) from error
    if image_format.name == "HEIF":
        plugin.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False, decode_threads=1)
    elif image_format.name == "AVIF":
        vars(plugin)["DEFAULT_MAX_THREADS"] = 1
    if image_format.name not in Image.OPEN or not getattr(plugin, "SUPPORTED", True):
        raise NotAnImageError(missing)
    opener, _ = Image.OPEN[image_format.name]
    return opener


@contextmanager
def _pillow_limits(max_pixels: int) -> Iterator[None]:
    """Make Pillow refuse images of more pixels and truncated ones; restore its settings afterwards."""
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
def _translate_errors(image_format: Format, limits: DecodeLimits) -> Iterator[None]:
    """Raise whatever a decoder raises as an ``ImageError``."""
    title = image_format.title
    try:
        yield
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooLargeError(f"it has too many pixels; see decoding.max_pixels ({error})") from error
    except Exception as error:  # Pillow's decoders raise SyntaxError, KeyError, struct.error and more over broken bytes
        if isinstance(error, OSError) and error.errno is not None:
            raise
        text = " ".join(f"{error}".split()) or type(error).__name__
        if isinstance(error, MemoryError) or "memory" in text.lower():
            megabytes = limits.memory_bytes(image_format) // 1_000_000
            raise TooLargeError(
                f"decoding needs more than the {megabytes:,} MB of memory that one {title} may use; "
                "see decoding.max_pixels"
            ) from error
        if isinstance(error.__cause__ or error, KeyError):  # a lookup in Pillow's tables failed
            text = f"unknown value {text} in its header"
        if _UNSUPPORTED.search(text):
            raise UnreadableError(
                f"unsupported kind of {title} ({text}); save it in another way, for example as PNG"
            ) from error
        raise UnreadableError(f"broken or incomplete {title} file: {text}") from error


def _check_size(opened: _Opened, limits: DecodeLimits, preprocessing: Preprocessing, jpeg: Jpeg) -> int:
    """Choose the scale of a JPEG, check sides and pixels, and return the memory for decoding, in pixels.

    All coefficients of a progressive JPEG are held until its last scan, at whatever scale it is decoded (libjpeg.txt,
    "Memory usage"), and some decoders hold the whole file.
    """
    image = opened.image
    width, height = image.size
    if max(width, height) > limits.max_side:
        raise TooLargeError(
            f"{width:,} x {height:,} pixels: a side is over the limit of {limits.max_side:,}; "
            "see decoding.max_side_pixels"
        )
    if image.format in {"JPEG", "MPO"} and jpeg == "draft":
        image.draft(None, _min_size(image.size, preprocessing))
    pixels = image.width * image.height
    if pixels > limits.max_pixels:
        raise TooLargeError(
            f"{width:,} x {height:,} pixels are over the limit of {limits.max_pixels:,}; see decoding.max_pixels"
        )
    held_bytes = 4 * width * height if "progressive" in image.info else opened.format.held_bytes * pixels
    return min(max(held_bytes, opened.file_bytes) // _PIXEL_BYTES, limits.max_pixels)


def _load(image: ImageFile.ImageFile) -> Image.Image:
    """Load frame 0; a WebP without libwebp's canvases, which take twice the memory of the image."""
    decoder = getattr(image, "_decoder", None)
    if image.format != "WEBP" or decoder is None:
        image.load()
        return image
    frame = decoder.get_next()
    del decoder
    image._decoder = None  # type: ignore[attr-defined]  # noqa: SLF001 -- no public way frees the canvases
    if frame is None:
        raise UnreadableError("broken or incomplete WEBP file: its first frame does not decode")
    if image.mode == "RGBA":
        return Image.frombuffer("RGBA", image.size, frame[0], "raw", "RGBA", 0, 1)
    return Image.frombytes("RGB", image.size, frame[0], "raw", "RGBX")


def _transpose_of(image: Image.Image) -> Image.Transpose | None:
    """Return the operation that makes an image upright; None where it is upright or its EXIF is broken."""
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # noqa: BLE001 -- broken EXIF raises anything, and the picture does not depend on it
        return None


# ------------------------------------------------------------ conversion and resizing


def _fit(loaded: Image.Image, turn: Image.Transpose | None, preprocessing: Preprocessing) -> Pixels:
    """Return a loaded image as uint8 (crop_height, crop_width, 3), upright and blended onto white."""
    return np.array(_resize(_to_opaque(loaded, turn, preprocessing), preprocessing).convert("RGB"))


def _min_size(size: tuple[int, int], preprocessing: Preprocessing) -> tuple[int, int]:
    """Return the width and height below which an image of this size is not reduced before the resize."""
    if preprocessing.fit is Fit.WHOLE:
        width, height = _whole_size(size, preprocessing)
        return _OVERSAMPLING * width, _OVERSAMPLING * height
    side = preprocessing.shortest_edge
    if preprocessing.fit is Fit.STRETCH:
        side = max(preprocessing.crop_height, preprocessing.crop_width)
    return _OVERSAMPLING * side, _OVERSAMPLING * side


def _whole_size(size: tuple[int, int], preprocessing: Preprocessing) -> tuple[int, int]:
    """Return the width and height of all of an image within the crop; no side is less than one pixel."""
    width, height = size
    scale = min(1.0, preprocessing.crop_width / width, preprocessing.crop_height / height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _to_opaque(image: Image.Image, turn: Image.Transpose | None, preprocessing: Preprocessing) -> Image.Image:
    """Return a loaded image blended onto white and upright, of mode ``L`` or ``RGB``; large ones are reduced."""
    if _is_plain(image) and turn is None:
        return image
    shallow = _to_eight_bits(image)
    least_width, least_height = _min_size(image.size, preprocessing)
    factor = min(image.width // least_width, image.height // least_height)
    if image.width * image.height < _REDUCE_FROM_PIXELS or factor < _OVERSAMPLING:
        factor = 1
    small = shallow if factor == 1 and _is_plain(shallow) else _reduce_by_strips(shallow, factor)
    return small if turn is None else small.transpose(turn)


def _reduce_by_strips(image: Image.Image, factor: int) -> Image.Image:
    """Blend an image onto white and reduce it by a whole factor, with only the result held beside it."""
    rows = max(1, _STRIP_ROWS // factor) * factor
    small = Image.new("RGB", (-(-image.width // factor), -(-image.height // factor)))
    for top in range(0, image.height, rows):
        strip = _over_white(image.crop((0, top, image.width, min(top + rows, image.height))))
        small.paste(strip if factor == 1 else strip.reduce(factor), (0, top // factor))
    return small


def _is_plain(image: Image.Image) -> bool:
    return image.mode in {"L", "RGB"} and not image.has_transparency_data


def _over_white(image: Image.Image) -> Image.Image:
    """Return an image of mode ``L`` or ``RGB``; transparent pixels become white."""
    if _is_plain(image):
        return image
    if image.has_transparency_data:
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")
    if image.mode == "CMYK" and image.info.get("jpeg_cmyk") == "plain":
        return ImageChops.invert(image).convert("RGB")
    return image.convert("L" if image.mode == "1" else "RGB")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale grey of 16 or 32 bits, or of floats, to ``L``; Pillow's own conversion clips at 255.

    16 bits are scaled by their full range. Wider values within 0 to 65,535 (floats: 0 to 1) are scaled by that range,
    others by their minimum and maximum.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    # Pillow crops only the native 16-bit mode; the values of the others take little memory.
    whole = np.asarray(image) if ";" in image.mode else None
    grey = np.empty((image.height, image.width), np.uint8)

    def strips() -> Iterator[tuple[slice, npt.NDArray[np.float64]]]:
        for top in range(0, image.height, _STRIP_ROWS):
            rows = slice(top, min(top + _STRIP_ROWS, image.height))
            strip = np.asarray(image.crop((0, rows.start, image.width, rows.stop))) if whole is None else whole[rows]
            values = strip.astype(np.float64)
            values[~np.isfinite(values)] = np.nan
            yield rows, values

    low, high = 0.0, 65_535.0
    if whole is None:
        finite = (strip[~np.isnan(strip)] for _, strip in strips())
        ends = [(float(values.min()), float(values.max())) for values in finite if values.size] or [(0.0, 0.0)]
        smallest, largest = min(low for low, _ in ends), max(high for _, high in ends)
        usual = 1.0 if image.mode == "F" else 65_535.0
        low, high = (0.0, usual) if smallest >= 0 and largest <= usual else (smallest, largest)
    scale = 255 / (high - low) if high > low else 0.0
    for rows, strip in strips():
        grey[rows] = np.rint((np.nan_to_num(strip, nan=low) - low) * scale)
    return Image.fromarray(grey)


def _resize(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """Resize and crop an image as the Pillow image processors of transformers do.

    The longer side is truncated and the corner of the crop floored as in ``get_resize_output_image_size`` and
    ``center_crop`` of transformers/image_transforms.py; a crop is padded with black, as there.
    """
    resample = Image.Resampling(preprocessing.resample)
    crop_width, crop_height = preprocessing.crop_width, preprocessing.crop_height
    if preprocessing.fit is Fit.STRETCH:
        return image.resize((crop_width, crop_height), resample)
    if preprocessing.fit is Fit.WHOLE:
        return image.resize(_whole_size(image.size, preprocessing), resample)
    edge = preprocessing.shortest_edge
    short, long = sorted(image.size)
    long_after = int(edge * long / short)
    width, height = (edge, long_after) if image.width <= image.height else (long_after, edge)
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    if long > _MAX_FULL_RESIZE_RATIO * short:
        scale = short / edge
        box = (left * scale, top * scale, (left + crop_width) * scale, (top + crop_height) * scale)
        return image.resize((crop_width, crop_height), resample, box=box)
    return image.resize((width, height), resample).crop((left, top, left + crop_width, top + crop_height))
