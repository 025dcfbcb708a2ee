"""Thumbnails: small square pictures inside of a page, so that it is one file that can be sent or kept."""

import base64
import io

from sortd.errors import ImageError
from sortd.images import Limits, decode_file
from sortd.messages import Preprocessing

SIDE_PIXELS = 160
QUALITY = 80


def thumbnail(path: str, *, side_pixels: int = SIDE_PIXELS, limits: Limits | None = None) -> str | None:
    """Return the middle of a picture, upright, as the ``data:`` address of a JPEG; None where it cannot be shown.

    It is the part that an encoder looks at, too.

    Args:
        path: the image.
        side_pixels: of the square.
        limits: what is refused.
    """
    from PIL import Image

    seen = Preprocessing(shortest_edge=side_pixels, crop_height=side_pixels, crop_width=side_pixels)
    try:
        pixels = decode_file(path, seen, limits or Limits())
    except (ImageError, OSError):
        return None  # the page says that it cannot be shown; what is wrong with it is told by `sortd check`
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
