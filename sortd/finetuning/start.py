"""The start of training: a base whose head is taught in closed form, on frozen features of several views.

It is the first half of "linear probing, then fine-tuning" (Kumar et al. 2022), which keeps what the base knows where a
head of random numbers would tear it up in the first steps; the closed form makes it cost no more than a few forwards.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sortd.arrays import FloatArray, Pixels
from sortd.classify.calibration import balanced_weights, fit_temperature
from sortd.finetuning.gaussian_head import gaussian_head
from sortd.finetuning.network import Network, head_of
from sortd.finetuning.recipe import Recipe
from sortd.finetuning.training import Lesson
from sortd.finetuning.views import plain_views, random_views

if TYPE_CHECKING:
    import torch


RANDOM_VIEWS = 1
"""Beside the plain and the flipped one."""
BATCH = 64
TYPICAL_FACTOR, FACTOR_SPREAD = 1.0, 0.7
"""What logits are multiplied by before anything is known, and the standard deviation of its logarithm."""


def teach_head(network: Network, lesson: Lesson, validation: Lesson, recipe: Recipe) -> None:
    """Give a network's head the Gaussian rule over the features of its training images.

    Args:
        network: its head is overwritten.
        lesson: the training images, larger than what the network sees.
        validation: tells by which factor the rule's log likelihoods become probabilities.
        recipe: the views.
    """
    import torch

    size = (validation.pixels.shape[1], validation.pixels.shape[2])
    views: list[Callable[[torch.Tensor], torch.Tensor]] = [lambda pixels: plain_views(pixels, size)]
    if recipe.flips:
        views.append(lambda pixels: plain_views(pixels, size).flip(-1))
    views += RANDOM_VIEWS * [lambda pixels: random_views(pixels, size, recipe)]
    torch.manual_seed(recipe.seed)
    rows = np.concatenate([_features(network, lesson.pixels, view) for view in views]).astype(np.float64)
    classes, weights = np.tile(lesson.classes, len(views)), np.tile(lesson.weights, len(views)).astype(np.float64)
    weight, bias = gaussian_head(rows, classes, weights / len(views), count=network.classes)
    held = _features(network, validation.pixels, views[0]).astype(np.float64) @ weight.T + bias
    factor = 1.0 / temperature_of(held.astype(np.float32), validation.classes)
    head = head_of(network.module)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(factor * weight))
        if head.bias is not None:
            head.bias.copy_(torch.from_numpy(factor * bias))


def temperature_of(logits: FloatArray, own: npt.NDArray[np.int64]) -> float:
    """Return the temperature that makes the softmax of logits (V, C) the likeliest for the right classes (V,).

    Temperature scaling (Guo et al. 2017) with a log-normal prior around 1, for validation sets of few images.
    """
    table = logits.astype(np.float64)
    weights = balanced_weights(own, table.shape[1])
    factor, _ = fit_temperature(table, own, weights, typical=TYPICAL_FACTOR, spread=FACTOR_SPREAD)
    return 1.0 / factor


def logits_of_all(network: Network, pixels: Pixels) -> FloatArray:
    """Return float32 (N, C) logits of images uint8 (N, H, W, 3) that are mapped from a file, batch by batch."""
    found = [network.logits(np.asarray(part)) for part in _batches(pixels)]
    return np.concatenate(found) if found else np.zeros((0, network.classes), np.float32)


def _features(network: Network, pixels: Pixels, view: "Callable[[torch.Tensor], torch.Tensor]") -> FloatArray:
    """Return float32 (N, d): what the head is given for a view of each image."""
    import torch

    seen: list[torch.Tensor] = []
    hook = head_of(network.module).register_forward_pre_hook(lambda _, given: seen.append(given[0].float().cpu()))
    try:
        with torch.inference_mode():
            for part in _batches(pixels):
                planes = torch.from_numpy(np.array(part)).permute(0, 3, 1, 2).to(network.device)
                network.module(pixel_values=network.values(view(planes)))
    finally:
        hook.remove()
    return np.asarray(torch.cat(seen).numpy(), dtype=np.float32)


def _batches(pixels: Pixels) -> Iterator[Pixels]:
    return (pixels[start : start + BATCH] for start in range(0, len(pixels), BATCH))
