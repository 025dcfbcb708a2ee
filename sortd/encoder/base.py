"""The interface of an encoder, the checks of its input and output, and a self-test."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sortd.arrays import Pixels
from sortd.errors import ModelError
from sortd.events import Preprocessing

Rows = npt.NDArray[np.float32]  # (images or texts, dimensions), each of length 1

_MIN_LENGTH = 1e-6  # a shorter row has no direction
_MAX_DIFFERENCE = 1e-3  # between two runs on one image: GPUs may add in another order
_MIN_DISTANCE = 1e-6  # 1 - cosine of two unlike images; less means that the model ignores its input
_REMEDY = "its weights are damaged or the device is in a bad state; fetch the model again or set `device: cpu`"


class Encoder(Protocol):
    """Embeds pixels, or texts, as unit-length rows in one space. Used by one thread at a time."""

    @property
    def encoder_id(self) -> str:
        """Identifies weights, decoding, preprocessing and backend; equal IDs mean equal embeddings."""

    @property
    def dimensions(self) -> int:
        """The length of an embedding."""

    @property
    def preprocessing(self) -> Preprocessing:
        """The size of the images, and the way of resizing."""

    @property
    def has_text(self) -> bool:
        """Whether it can embed texts."""

    def encode_images(self, pixels: Pixels) -> Rows:
        """Embed RGB pixels (B, H, W, 3) of the size in ``preprocessing`` as unit rows (B, d)."""

    def encode_texts(self, texts: Sequence[str]) -> Rows:
        """Embed texts as unit rows (T, d) in the space of the images."""


def check_pixels(pixels: Pixels, preprocessing: Preprocessing) -> None:
    """Raise ValueError unless pixels have the type and size that the encoder takes."""
    height, width = preprocessing.crop_height, preprocessing.crop_width
    if pixels.dtype != np.uint8 or pixels.shape[1:] != (height, width, 3):
        raise ValueError(f"pixels are {pixels.dtype} {pixels.shape}, not uint8 (B, {height}, {width}, 3)")


def normalise_rows(rows: Rows, encoder_id: str) -> Rows:
    """Return float32 rows (B, d) scaled to length 1; raise ModelError if one is zero or not finite."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if not bool(np.isfinite(lengths).all()) or float(lengths.min()) < _MIN_LENGTH:
        raise ModelError(f"model {encoder_id} returned zeros or values that are not finite: {_REMEDY}")
    scaled: Rows = rows / lengths
    return scaled


def valid_utf8(text: str) -> str:
    """Return a text with invalid UTF-8 replaced, which tokenizers reject; folder names may contain it."""
    return text.encode("utf-8", "replace").decode("utf-8")


def probe(encoder: Encoder, *, texts: Sequence[str] = ("a photo",)) -> None:
    """Test an encoder on known images: a device in a bad state returns zeros or noise without an error.

    Raises:
        ModelError: rows are not finite, equal for unlike images, or different for the same image.
    """
    height, width = encoder.preprocessing.crop_height, encoder.preprocessing.crop_width
    ramp = np.linspace(0, 255, width, dtype=np.uint8)
    smooth = np.broadcast_to(ramp[None, :, None], (height, width, 3))
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    first, second, again = encoder.encode_images(np.stack([smooth, noise, smooth]))
    if float(np.abs(first - again).max()) > _MAX_DIFFERENCE:
        raise ModelError(f"model {encoder.encoder_id} gives two embeddings for one image: {_REMEDY}")
    if float(np.dot(first, second)) > 1 - _MIN_DISTANCE:
        raise ModelError(f"model {encoder.encoder_id} gives one embedding for two unlike images: {_REMEDY}")
    if encoder.has_text and texts:
        encoder.encode_texts(texts)
