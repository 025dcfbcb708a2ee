"""Views: random crops, flips and colours of a batch of photos, as whole-batch tensor operations on any device."""

import math
from typing import TYPE_CHECKING

from sortd.finetuning.recipe import Recipe

if TYPE_CHECKING:
    import torch

LARGEST_STRETCH = 4 / 3
"""Of a crop's sides, as in torchvision's RandomResizedCrop."""


def random_views(pixels: "torch.Tensor", size: tuple[int, int], recipe: Recipe) -> "torch.Tensor":
    """Return one view of each photo, drawn with torch's own generator, which checkpoints keep.

    Args:
        pixels: uint8 (B, 3, h, w).
        size: height and width of a view.
        recipe: how far a view may be from its photo.

    Returns:
        float32 (B, 3, height, width), 0 to 255.
    """
    return _coloured(_cropped(pixels.float(), size, recipe), recipe)


def plain_views(pixels: "torch.Tensor", size: tuple[int, int]) -> "torch.Tensor":
    """Return the photos (uint8 (B, 3, h, w)) as they are, at another size; float32, 0 to 255."""
    from torch.nn import functional

    planes = pixels.float()
    if tuple(planes.shape[-2:]) == size:
        return planes
    return functional.interpolate(planes, size=size, mode="bicubic", antialias=True).clamp(0, 255)


def _cropped(planes: "torch.Tensor", size: tuple[int, int], recipe: Recipe) -> "torch.Tensor":
    """Crop, stretch and flip in one resampling."""
    import torch
    from torch.nn import functional

    count = len(planes)
    area = _uniform(planes, recipe.smallest_area, 1.0)
    stretch = _uniform(planes, -math.log(LARGEST_STRETCH), math.log(LARGEST_STRETCH)).exp()
    width, height = (area * stretch).sqrt().clamp(max=1), (area / stretch).sqrt().clamp(max=1)
    turn = torch.where(_uniform(planes, 0, 1) < (0.5 if recipe.flips else 0.0), -1.0, 1.0)
    affine = torch.zeros(count, 2, 3, device=planes.device)
    affine[:, 0, 0], affine[:, 0, 2] = width * turn, _uniform(planes, -1, 1) * (1 - width)
    affine[:, 1, 1], affine[:, 1, 2] = height, _uniform(planes, -1, 1) * (1 - height)
    grid = functional.affine_grid(affine, [count, 3, *size], align_corners=False)
    return functional.grid_sample(planes, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _coloured(planes: "torch.Tensor", recipe: Recipe) -> "torch.Tensor":
    """Change brightness, contrast and saturation."""

    def factor() -> "torch.Tensor":
        return _uniform(planes, 1 - recipe.jitter, 1 + recipe.jitter).view(-1, 1, 1, 1)

    planes = planes * factor()
    middle = planes.mean(dim=(1, 2, 3), keepdim=True)
    planes = (planes - middle) * factor() + middle
    grey = planes.mean(dim=1, keepdim=True)
    return ((planes - grey) * factor() + grey).clamp(0, 255)


def _uniform(planes: "torch.Tensor", low: float, high: float) -> "torch.Tensor":
    import torch

    return torch.empty(len(planes), device=planes.device).uniform_(low, high)
