"""From a decoded image of any mode to opaque RGB at the size that an encoder sees; nothing here reads a file."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sortd.events import Fit, Preprocessing

if TYPE_CHECKING:
    from PIL import Image

AMPLE = 2
"""An image is decoded and compacted to no less than so many times the size that is wanted; the resize does the rest."""

COMPACT_FROM_PIXELS = 16_000_000
"""Larger images that must be turned or recoloured are made smaller on the way, a strip at a time."""

LONGEST_EXACT = 50
"""Of longer images (as a ratio of sides) only the part that stays is resized: the whole could fill the memory."""

_STRIP_ROWS = 128


def least_side(preprocessing: Preprocessing) -> int:
    """Return the shorter side, in pixels, below which an image is not to be decoded or compacted."""
    if preprocessing.fit is Fit.STRETCH:
        return AMPLE * max(preprocessing.crop_height, preprocessing.crop_width)
    return AMPLE * preprocessing.shortest_edge


def opaque(image: "Image.Image", turn: "Image.Transpose | None", preprocessing: Preprocessing) -> "Image.Image":
    """Make an image opaque (over white), eight bits deep and upright; its mode is ``L`` or ``RGB`` then.

    Args:
        image: loaded, of any mode.
        turn: what makes it upright.
        preprocessing: how small a large image may be made on the way.
    """
    if _is_plain(image) and turn is None:
        return image
    shallow = _eight_bits(image)
    factor = min(image.size) // least_side(preprocessing)
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


def fitted(image: "Image.Image", preprocessing: Preprocessing) -> "Image.Image":
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
