"""What goes into an encoder and what may come out of it: pixels of its size, rows of length one."""

import numpy as np
import numpy.typing as npt

from sortd.errors import ModelError
from sortd.events import Preprocessing

Pixels = npt.NDArray[np.uint8]  # (images, height, width, 3): RGB
Rows = npt.NDArray[np.float32]  # (images or texts, dimensions): each of length 1

SHORTEST_ROW = 1e-6  # below it there is no direction to speak of

BROKEN = "its weights are damaged or the device is in a bad state; fetch the model again or set `device: cpu`"


def check_pixels(pixels: Pixels, seen: Preprocessing) -> None:
    """See that pixels are of the type and size that the encoder sees.

    Raises:
        ValueError: a mistake of the caller, with both shapes.
    """
    if pixels.dtype != np.uint8 or pixels.shape[1:] != (seen.crop_height, seen.crop_width, 3):
        raise ValueError(
            f"pixels are {pixels.dtype} {pixels.shape}, not uint8 (B, {seen.crop_height}, {seen.crop_width}, 3)"
        )


def unit(rows: Rows, encoder_id: str) -> Rows:
    """Return (B, d) float32 rows of a model at length 1.

    Raises:
        ModelError: a row has no direction: it is no number, or all zeros.
    """
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if not bool(np.isfinite(lengths).all()) or float(lengths.min()) < SHORTEST_ROW:
        raise ModelError(f"model {encoder_id} answered with no number or all zeros: {BROKEN}")
    scaled: Rows = rows / lengths
    return scaled


def writable(text: str) -> str:
    """Return a text that every tokenizer takes: the names of folders may hold bytes that are no UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")
