"""Pictures for people: whole images, reduced by the decoding processes and encoded as JPEG."""

import io

from PIL import Image

from sortd.arrays import Pixels
from sortd.events import Fit, Preprocessing

_QUALITY = 80


def whole_image(side_pixels: int) -> Preprocessing:
    """Return the preprocessing for whole images of at most that longer side."""
    return Preprocessing(side_pixels, side_pixels, side_pixels, fit=Fit.WHOLE)


def jpeg_of(pixels: Pixels) -> bytes:
    """Encode pixels (height, width, 3) as JPEG without metadata."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()
