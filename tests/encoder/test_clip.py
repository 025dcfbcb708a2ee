"""The normalisation is to the bit what torch computed before: embeddings in caches were made by that."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from sortd.encoder.clip import normalisation

CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def by_torch(processor: Mapping[str, Any]) -> tuple[Any, Any]:
    """What torch makes of a number over a tensor, and of a tensor over another."""
    import torch

    factor = float(processor.get("rescale_factor", 1 / 255)) if processor.get("do_rescale", True) else 1.0
    normalised = bool(processor.get("do_normalize", True))
    mean = torch.tensor(processor["image_mean"] if normalised else 0.0).expand(3).view(1, 3, 1, 1)
    deviation = torch.tensor(processor["image_std"] if normalised else 1.0).expand(3).view(1, 3, 1, 1)
    return factor / deviation, mean / deviation


@pytest.mark.parametrize(
    "processor",
    [
        CLIP,
        IMAGENET,
        {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]},
        {"image_mean": 0.5, "image_std": 0.25},
        CLIP | {"rescale_factor": 0.00392156862745098},
        CLIP | {"rescale_factor": 1 / 127.5},
        CLIP | {"do_rescale": False},
        {"do_normalize": False},
        {"do_normalize": False, "do_rescale": False},
    ],
)
def test_normalisation_equals_that_of_torch(processor: dict[str, Any]) -> None:
    """To the last bit: another rounding would be another encoder with the same ID."""
    for ours, theirs in zip(normalisation(processor), by_torch(processor), strict=True):
        assert (ours.dtype, ours.shape) == (np.dtype(np.float32), (1, 3, 1, 1))
        assert np.array_equal(ours, theirs.numpy())


def test_normalisation_random_settings_equal_those_of_torch() -> None:
    """A thousand means and deviations."""
    chance = np.random.default_rng(0)
    for _ in range(1000):
        mean, deviation = chance.uniform(0, 1, 3).tolist(), chance.uniform(0.01, 2, 3).tolist()
        processor = {"image_mean": mean, "image_std": deviation, "rescale_factor": float(chance.uniform(0.001, 1))}
        for ours, theirs in zip(normalisation(processor), by_torch(processor), strict=True):
            assert np.array_equal(ours, theirs.numpy())


def test_normalisation_without_mean_raises() -> None:
    """There is no default."""
    with pytest.raises(KeyError, match="image_mean"):
        normalisation({"do_normalize": True})
