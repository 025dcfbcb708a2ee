"""Thumbnails: small pictures inside of a page, so that it is one file that can be sent or kept."""

import base64
import io

from sortd.errors import ImageError
from sortd.events import Fit, Preprocessing
from sortd.images import Limits, decode_file, upright_size

SIDE_PIXELS = 160
QUALITY = 80


def thumbnail(path: str, *, side_pixels: int = SIDE_PIXELS, limits: Limits | None = None) -> str | None:
    """Return the whole picture, upright and small, as the ``data:`` address of a JPEG; None where it cannot be shown.

    Args:
        path: the image.
        side_pixels: of its longer side.
        limits: what is refused.
    """
    from PIL import Image

    limits = limits or Limits()
    try:
        width, height = upright_size(path, limits)
        scale = side_pixels / max(width, height)
        width, height = max(1, round(width * scale)), max(1, round(height * scale))
        seen = Preprocessing(shortest_edge=side_pixels, crop_height=height, crop_width=width, fit=Fit.STRETCH)
        pixels = decode_file(path, seen, limits)
    except (ImageError, OSError):
        return None  # the page says that it cannot be shown; what is wrong with it is told by `sortd check`
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
