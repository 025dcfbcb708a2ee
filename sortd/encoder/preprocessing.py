"""What the settings of an image processor of transformers mean: a size, a way to it, and one factor a channel."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from sortd.arrays import FloatArray
from sortd.errors import ModelError
from sortd.events import Fit, Preprocessing

CHANNELS = 3
EIGHT_BITS = 1 / 255
"""What image processors multiply pixels by where their settings do not say."""

_CONVNEXT_STRETCHES_FROM = 384
_UNKNOWN_STEPS = {
    "do_pad",
    "do_flip_channel_order",
    "do_image_splitting",
    "do_thumbnail",
    "do_align_long_axis",
    "do_reduce_labels",
    "include_top",
}


def preprocessing_of(processor: Mapping[str, Any]) -> Preprocessing:
    """Derive the size that a model sees from its image processor's settings (``to_dict()`` of transformers).

    Raises:
        ModelError: it asks for a step that sortd does not do; the message names it.
    """
    kind = processor.get("image_processor_type", "image processor")
    if not processor.get("do_resize", True):
        raise ModelError(f"the {kind} of this model takes images of any size, which cannot go in one batch")
    for step in _UNKNOWN_STEPS & {key for key, value in processor.items() if value}:
        raise ModelError(f"the {kind} of this model asks for {step}, which sortd cannot do; choose another model")
    if processor.get("do_convert_rgb") is False or processor.get("rescale_offset"):
        raise ModelError(f"the {kind} of this model does not take plain RGB; choose another model")
    size, crop = _sides(processor, "size"), _sides(processor, "crop_size")
    crop = crop if processor.get("do_center_crop") else {}
    resample = int(processor.get("resample", 3))
    share = processor.get("crop_pct")  # ConvNeXt's own way to say a crop; from 384 pixels up it stretches
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
        f"the {kind} of this model resizes to {size} and crops to {crop or 'nothing'}, which sortd cannot do; "
        f"choose a model that sees one fixed size"
    )


def _sides(processor: Mapping[str, Any], key: str) -> dict[str, int]:
    return {name: side for name, side in dict(processor.get(key) or {}).items() if side is not None}


def normalisation(processor: Mapping[str, Any]) -> tuple[FloatArray, FloatArray]:
    """Return a factor and a shift, float32 (1, 3, 1, 1) each: a network is taught on ``pixels * factor - shift``.

    Embeddings are kept under an identity that does not know how these numbers were rounded, so the order of the
    operations is part of the contract: the reciprocal of the deviation first, all in float32.

    Raises:
        KeyError: it normalises, and does not say by what.
    """
    rescale = float(processor.get("rescale_factor", EIGHT_BITS)) if processor.get("do_rescale", True) else 1.0
    normalises = bool(processor.get("do_normalize", True))
    mean = _by_channel(processor["image_mean"] if normalises else 0.0)
    deviation = _by_channel(processor["image_std"] if normalises else 1.0)
    return np.float32(1.0) / deviation * np.float32(rescale), mean / deviation


def _by_channel(said: Any) -> FloatArray:  # noqa: ANN401 -- a setting, as JSON has it
    return np.broadcast_to(np.asarray(said, np.float32), (CHANNELS,)).reshape(1, CHANNELS, 1, 1)
