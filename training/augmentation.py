"""Augmentation: random views of a batch of small photos, by tensor operations on the whole batch."""

import math
from dataclasses import dataclass

import torch
from torch.nn import functional

MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)
"""Channel statistics of ImageNet, as most image processors have them."""

GREY = (0.299, 0.587, 0.114)


@dataclass(frozen=True, slots=True)
class Strength:
    """The strength of the augmentation; shares are probabilities."""

    smallest_area: float = 0.4
    stretch: float = 1.33
    tilt_degrees: float = 20.0
    tilted_share: float = 0.25
    turned_share: float = 0.1
    jitter: float = 0.3
    hue: float = 0.15
    grey_share: float = 0.1
    inverted_share: float = 0.02
    blurred_share: float = 0.15
    noisy_share: float = 0.1
    erased_share: float = 0.1


STRONG = Strength()
CALM = Strength(
    smallest_area=0.55,
    tilted_share=0.15,
    turned_share=0.04,
    jitter=0.2,
    hue=0.08,
    grey_share=0.06,
    blurred_share=0.08,
    erased_share=0.05,
)
"""For the end of a run: closer to the photos of users."""

MILD = Strength(
    smallest_area=0.45,
    stretch=1.25,
    tilted_share=0.05,
    turned_share=0.02,
    jitter=0.2,
    hue=0.05,
    grey_share=0.04,
    inverted_share=0.0,
    blurred_share=0.04,
    noisy_share=0.03,
    erased_share=0.0,
)
"""For a run of few epochs, which does not overfit; stronger views only slow it down."""


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """Convert uint8 (b, h, w, 3) to the float32 (b, 3, h, w) that the image tower takes."""
    images = pixels.permute(0, 3, 1, 2).float().div_(255)
    mean = torch.tensor(MEAN, device=pixels.device).view(1, 3, 1, 1)
    deviation = torch.tensor(DEVIATION, device=pixels.device).view(1, 3, 1, 1)
    return images.sub_(mean).div_(deviation).contiguous(memory_format=torch.channels_last)


class Augmenter:
    """Draws views that depend only on the seed of the batch."""

    def __init__(self, device: torch.device) -> None:
        """Create the random generator on the device of the pixels."""
        self._device = device
        self._dice = torch.Generator(device=device)

    def views(self, pixels: torch.Tensor, *, side: int, strength: Strength, seed: int) -> torch.Tensor:
        """Return normalised float32 views (b, 3, side, side) of uint8 pixels (b, h, w, 3)."""
        self._dice.manual_seed(seed)
        images = pixels.permute(0, 3, 1, 2).float().div_(255)
        images = self._crop(images, side, strength)
        images = self._colour(images, strength)
        images = self._blur(images, strength)
        images = self._normalise(images)
        return self._erase(images, strength).contiguous(memory_format=torch.channels_last)

    def _uniform(self, count: int, low: float, high: float) -> torch.Tensor:
        return torch.empty(count, device=self._device).uniform_(low, high, generator=self._dice)

    def _chosen(self, count: int, share: float) -> torch.Tensor:
        return torch.rand(count, device=self._device, generator=self._dice) < share

    def _crop(self, images: torch.Tensor, side: int, strength: Strength) -> torch.Tensor:
        """Crop, stretch, flip, tilt and rotate in one resampling."""
        count = len(images)
        area = self._uniform(count, strength.smallest_area, 1.1)
        stretch = torch.exp(self._uniform(count, -math.log(strength.stretch), math.log(strength.stretch)))
        width, height = (area * stretch).sqrt(), (area / stretch).sqrt()
        left = self._uniform(count, -1, 1) * (1 - width).abs()
        top = self._uniform(count, -1, 1) * (1 - height).abs()
        flip = 1 - 2 * self._chosen(count, 0.5).float()
        tilt = math.radians(strength.tilt_degrees)
        angle = self._uniform(count, -tilt, tilt) * self._chosen(count, strength.tilted_share)
        quarter = torch.randint(1, 4, (count,), device=self._device, generator=self._dice) * (math.pi / 2)
        angle = angle + quarter * self._chosen(count, strength.turned_share)
        cosine, sine = angle.cos(), angle.sin()
        rows = [width * flip * cosine, -height * sine, left, width * flip * sine, height * cosine, top]
        affine = torch.stack(rows, dim=1).view(count, 2, 3)
        grid = functional.affine_grid(affine, [count, 3, side, side], align_corners=False)
        return functional.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)

    def _colour(self, images: torch.Tensor, strength: Strength) -> torch.Tensor:
        """Jitter brightness, contrast, saturation and hue; convert some images to grey and invert some."""
        count = len(images)
        jitter = strength.jitter

        def factor() -> torch.Tensor:
            return self._uniform(count, 1 - jitter, 1 + jitter).view(-1, 1, 1, 1)

        brightness, contrast, saturation = factor(), factor(), factor()
        saturation = torch.where(self._chosen(count, strength.grey_share).view(-1, 1, 1, 1), 0.0, saturation)
        mix = self._hue_matrix(count, strength.hue)
        grey = torch.tensor(GREY, device=self._device)
        mix = saturation.view(-1, 1, 1) * mix + (1 - saturation.view(-1, 1, 1)) * grey.expand(3, 3)
        mix = mix * (brightness * contrast).view(-1, 1, 1)
        mean = images.mean(dim=(2, 3), keepdim=True) * brightness
        middle = mean.mean(dim=1, keepdim=True)
        sign = 1 - 2 * self._chosen(count, strength.inverted_share).float().view(-1, 1, 1, 1)
        mix = mix * sign.view(-1, 1, 1)
        offset = (middle * (1 - contrast)) * sign + (1 - sign) / 2
        mixed = torch.bmm(mix, images.flatten(2)).view_as(images)
        return mixed.add_(offset).clamp_(0, 1)

    def _hue_matrix(self, count: int, hue: float) -> torch.Tensor:
        """Return rotations of colours about the grey axis by up to `hue` times pi radians, (count, 3, 3)."""
        angle = self._uniform(count, -hue, hue) * math.pi * self._chosen(count, 0.5)
        cosine, sine = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
        third = 1 / 3
        cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=self._device) * math.sqrt(third)
        return cosine * torch.eye(3, device=self._device) + sine * cross + (1 - cosine) * third

    def _blur(self, images: torch.Tensor, strength: Strength) -> torch.Tensor:
        """Blur some images by a random share, and add noise to some."""
        count = len(images)
        soft = self._uniform(count, 0.3, 1.0) * self._chosen(count, strength.blurred_share)
        chosen = soft.nonzero().squeeze(1)
        if len(chosen):
            picked = images[chosen]
            low = functional.avg_pool2d(functional.pad(picked, (1, 1, 1, 1), mode="replicate"), 3, 1)
            images[chosen] = torch.lerp(picked, low, soft[chosen].view(-1, 1, 1, 1))
        noisy = self._chosen(count, strength.noisy_share).nonzero().squeeze(1)
        if len(noisy):
            shape = (len(noisy), *images.shape[1:])
            images[noisy] += torch.randn(shape, device=self._device, generator=self._dice) * 0.04
        return images

    def _normalise(self, images: torch.Tensor) -> torch.Tensor:
        mean = torch.tensor(MEAN, device=self._device).view(1, 3, 1, 1)
        deviation = torch.tensor(DEVIATION, device=self._device).view(1, 3, 1, 1)
        return images.sub_(mean).div_(deviation)

    def _erase(self, images: torch.Tensor, strength: Strength) -> torch.Tensor:
        """Cover a random rectangle of some images with the mean colour."""
        count, side = len(images), images.shape[-1]
        chosen = self._chosen(count, strength.erased_share).view(-1, 1)
        place = torch.arange(side, device=self._device).view(1, -1)

        def span() -> torch.Tensor:
            length = self._uniform(count, 0.15, 0.45).view(-1, 1) * side
            start = self._uniform(count, 0, 1).view(-1, 1) * (side - length)
            return (place >= start) & (place < start + length) & chosen

        hole = span().unsqueeze(2) & span().unsqueeze(1)
        return images.masked_fill_(hole.unsqueeze(1), 0.0)
