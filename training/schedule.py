"""The schedule: learning rate, views and averaging as functions of the progress of a run."""

import math
from dataclasses import dataclass

from training.augmentation import Strength
from training.settings import Settings


@dataclass(frozen=True, slots=True)
class Clock:
    """The length of a run: a number of steps or a budget of seconds, whichever ends first."""

    steps: int
    budget_seconds: float | None

    def share(self, step: int, seconds: float) -> float:
        """Return the progress, 0 to 1."""
        spent = step / max(self.steps, 1)
        if self.budget_seconds is not None:
            spent = max(spent, seconds / self.budget_seconds)
        return min(spent, 1.0)


def rate(settings: Settings, share: float) -> float:
    """Return the learning rate: a linear warm-up, then a cosine decay."""
    if share < settings.warmup_share:
        return settings.peak_rate * (0.02 + 0.98 * share / settings.warmup_share)
    rest = (share - settings.warmup_share) / (1 - settings.warmup_share)
    cosine = 0.5 * (1 + math.cos(math.pi * rest))
    return settings.peak_rate * (settings.final_rate_share + (1 - settings.final_rate_share) * cosine)


def side(settings: Settings, share: float) -> int:
    """Return the side of a view in pixels."""
    return [pixels for start, pixels in settings.sides if share >= start][-1]


def strength(settings: Settings, share: float) -> Strength:
    """Return the strength of the augmentation, which is lower at the end."""
    return settings.calm_strength if share >= 1 - settings.calm_share else settings.strength


def averaging(settings: Settings, updates: int) -> float:
    """Return the decay of the average, which increases with the updates."""
    return min(settings.average_decay**settings.average_every, (1 + updates) / (10 + updates))
