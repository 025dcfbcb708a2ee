"""Pictures for people: whole images, reduced by the decoding processes and encoded as JPEG."""

import base64
import io
import os
from collections.abc import Iterable
from contextlib import suppress

from PIL import Image

from sortd.arrays import Pixels
from sortd.events import Fit, Preprocessing
from sortd.files import stamp_of
from sortd.images.decode import DecodeLimits
from sortd.images.pool import DecodedImage, DecoderPool

_SIDE_PIXELS = 160
_QUALITY = 80
_PROCESSES = 2


def thumbnails(paths: Iterable[str], *, side_pixels: int = _SIDE_PIXELS) -> dict[str, str]:
    """Return images as ``data:`` URLs of JPEGs of at most that longer side, by path, without those that are unreadable.

    Raises StartupError.
    """
    files = []
    for path in dict.fromkeys(paths):
        with suppress(OSError):  # `sortd check` reports it
            files.append((path, stamp_of(os.lstat(path))))
    if not files:
        return {}
    with DecoderPool(min(_PROCESSES, len(files)), whole_image(side_pixels), DecodeLimits()) as pool:
        return {
            answer.path: f"data:image/jpeg;base64,{base64.b64encode(jpeg_of(answer.pixels)).decode('ascii')}"
            for answer in pool.decode_all(files)
            if isinstance(answer, DecodedImage)
        }


def whole_image(side_pixels: int) -> Preprocessing:
    """Return the preprocessing for whole images of at most that longer side."""
    return Preprocessing(side_pixels, side_pixels, side_pixels, fit=Fit.WHOLE)


def jpeg_of(pixels: Pixels) -> bytes:
    """Encode pixels (height, width, 3) as JPEG without metadata."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()
