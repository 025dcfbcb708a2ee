"""An encoder: what sortd asks of a CLIP, and what goes into it and comes out of it."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sortd.arrays import Pixels
from sortd.errors import ModelError
from sortd.messages import Preprocessing

Rows = npt.NDArray[np.float32]  # (images or texts, dimensions): each of length 1

SHORTEST_ROW = 1e-6  # a shorter row has no direction
SAME_ROW = 1e-3  # two runs on one image: a GPU may add in another order, but not differ by more
ONE_ROW = 1e-6  # two unlike images: nearer than this, the model does not look at them
TRIAL_TEXTS = ("a photo",)
BROKEN = "its weights are damaged or the device is in a bad state; fetch the model again or set `device: cpu`"


class Encoder(Protocol):
    """A function from pixels, or words, to rows of length one in one space. One thread at a time."""

    @property
    def encoder_id(self) -> str:
        """What embeddings depend on: weights, decoding, preprocessing, backend; equal ids mean equal embeddings."""

    @property
    def dimensions(self) -> int:
        """The length of an embedding."""

    @property
    def preprocessing(self) -> Preprocessing:
        """The size, and the way to it, at which images are handed over."""

    @property
    def has_text(self) -> bool:
        """Can it embed words?"""

    def encode_images(self, pixels: Pixels) -> Rows:
        """Embed RGB pixels (B, H, W, 3) of the size that ``preprocessing`` names, as unit rows (B, d)."""

    def encode_texts(self, texts: Sequence[str]) -> Rows:
        """Embed texts as unit rows (T, d) in the space of the images."""


def check_pixels(pixels: Pixels, seen: Preprocessing) -> None:
    """Raise ValueError where pixels are not of the type and size that the encoder sees."""
    if pixels.dtype != np.uint8 or pixels.shape[1:] != (seen.crop_height, seen.crop_width, 3):
        raise ValueError(
            f"pixels are {pixels.dtype} {pixels.shape}, not uint8 (B, {seen.crop_height}, {seen.crop_width}, 3)"
        )


def normalise_rows(rows: Rows, encoder_id: str) -> Rows:
    """Return (B, d) float32 rows of a model at length 1.

    Raises:
        ModelError: a row has no direction: it is no number, or all zeros.
    """
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if not bool(np.isfinite(lengths).all()) or float(lengths.min()) < SHORTEST_ROW:
        raise ModelError(f"model {encoder_id} answered with no number or all zeros: {BROKEN}")
    scaled: Rows = rows / lengths
    return scaled


def valid_utf8(text: str) -> str:
    """Return a text that every tokenizer takes: the names of folders may hold bytes that are no UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")


def probe(encoder: Encoder, *, texts: Sequence[str] = TRIAL_TEXTS) -> None:
    """Try a model on known images: a device in a bad state returns zeros or noise and calls it success.

    Raises:
        ModelError: rows that are not finite, the same for unlike images, or different for the same image.
    """
    height, width = encoder.preprocessing.crop_height, encoder.preprocessing.crop_width
    ramp = np.linspace(0, 255, width, dtype=np.uint8)
    smooth = np.broadcast_to(ramp[None, :, None], (height, width, 3))
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    first, second, again = encoder.encode_images(np.stack([smooth, noise, smooth]))
    if float(np.abs(first - again).max()) > SAME_ROW:
        raise ModelError(f"model {encoder.encoder_id} embeds one image in two ways: {BROKEN}")
    if float(np.dot(first, second)) > 1 - ONE_ROW:
        raise ModelError(f"model {encoder.encoder_id} embeds two unlike images as one: {BROKEN}")
    if encoder.has_text and texts:
        encoder.encode_texts(texts)
