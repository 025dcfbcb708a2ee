"""The meaning of an image processor's settings (transformers): size, resizing, and normalisation by channel."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from sortd.arrays import FloatArray
from sortd.errors import ModelError
from sortd.events import Fit, Preprocessing

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
