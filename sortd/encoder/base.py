"""The interface of an encoder, the checks of its input and output, and the meaning of an image processor's settings."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from sortd.arrays import FloatArray, Pixels
from sortd.errors import ModelError
from sortd.events import Fit, Preprocessing

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


_CHANNELS = 3
_RESCALE_FACTOR = 1 / 255  # the default of image processors
_CONVNEXT_STRETCHES_FROM = 384
_UNSUPPORTED_STEPS = {
    *("do_pad", "do_flip_channel_order", "do_image_splitting", "do_thumbnail", "do_align_long_axis"),
    *("do_reduce_labels", "include_top"),
}


def preprocessing_of(processor: Mapping[str, Any]) -> Preprocessing:
    """Return the input size of a model from its image processor's settings (``to_dict()`` of transformers).

    Raises:
        ModelError: the settings contain a step that sortd does not implement.
    """
    kind = f"the {processor.get('image_processor_type', 'image processor')} of this model"
    if not processor.get("do_resize", True):
        raise ModelError(f"{kind} takes images of any size, which cannot form a batch")
    for step in _UNSUPPORTED_STEPS & {key for key, value in processor.items() if value}:
        raise ModelError(f"{kind} requires {step}, which sortd does not implement; choose another model")
    if processor.get("do_convert_rgb") is False or processor.get("rescale_offset"):
        raise ModelError(f"{kind} does not take plain RGB; choose another model")
    size, crop = _sides(processor, "size"), _sides(processor, "crop_size")
    crop = crop if processor.get("do_center_crop") else {}
    resample = int(processor.get("resample", 3))
    share = processor.get("crop_pct")  # ConvNeXt's parameter of the crop; from 384 pixels on it stretches instead
    match size:
        case {"height": int(height), "width": int(width)} if crop in ({}, size):
            return Preprocessing(min(height, width), height, width, resample, Fit.STRETCH)
        case {"shortest_edge": int(edge)} if share and edge >= _CONVNEXT_STRETCHES_FROM:
            return Preprocessing(edge, edge, edge, resample, Fit.STRETCH)
        case {"shortest_edge": int(edge)} if share:
            return Preprocessing(int(edge / share), edge, edge, resample)
        case {"shortest_edge": int(edge)} if crop.keys() == {"height", "width"} and edge >= max(crop.values()):
            return Preprocessing(edge, crop["height"], crop["width"], resample)
    raise ModelError(
        f"{kind} resizes to {size} and crops to {crop or 'nothing'}, which sortd does not implement; choose a model "
        f"with one fixed input size"
    )


def _sides(processor: Mapping[str, Any], key: str) -> dict[str, int]:
    return {name: side for name, side in dict(processor.get(key) or {}).items() if side is not None}


def normalisation(processor: Mapping[str, Any]) -> tuple[FloatArray, FloatArray]:
    """Return factor and shift, float32 (1, 3, 1, 1) each: the network takes ``pixels * factor - shift``.

    The ``encoder_id`` of cached embeddings does not include the rounding of these numbers. The order of the operations
    must therefore not change: the reciprocal of the deviation first, all in float32.

    Raises:
        KeyError: mean or deviation is missing.
    """
    rescale = float(processor.get("rescale_factor", _RESCALE_FACTOR)) if processor.get("do_rescale", True) else 1.0
    normalises = bool(processor.get("do_normalize", True))
    mean = _by_channel(processor["image_mean"] if normalises else 0.0)
    deviation = _by_channel(processor["image_std"] if normalises else 1.0)
    return np.float32(1.0) / deviation * np.float32(rescale), mean / deviation


def _by_channel(value: Any) -> FloatArray:  # noqa: ANN401 -- a setting, as JSON has it
    return np.broadcast_to(np.asarray(value, np.float32), (_CHANNELS,)).reshape(1, _CHANNELS, 1, 1)
