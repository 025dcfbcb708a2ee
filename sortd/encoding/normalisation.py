"""The normalisation of pixels: what an image processor does to their values, as one factor and one shift a channel."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from sortd.arrays import FloatArray

CHANNELS = 3
EIGHT_BITS = 1 / 255
"""What image processors of transformers multiply pixels by where their settings do not say."""


def normalisation(processor: Mapping[str, Any]) -> tuple[FloatArray, FloatArray]:
    """Return a factor and a shift, so that ``pixels * factor - shift`` is what a network was taught on.

    Embeddings are kept under an identity that does not know how these numbers were rounded, so the order of the
    operations is part of what is promised: the reciprocal of the deviation first, all in float32.

    Args:
        processor: the settings of an image processor of transformers: ``do_rescale`` and ``rescale_factor``,
            ``do_normalize``, ``image_mean`` and ``image_std`` (a number each, or one for each channel).

    Returns:
        Two float32 arrays (1, 3, 1, 1), for planes (B, 3, H, W).

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
