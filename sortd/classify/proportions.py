"""Proportions with their uncertainty: how a figure of ``right`` out of ``judged`` images is stated."""

from collections.abc import Mapping
from math import floor, sqrt
from typing import Any

ERRORS_OF_95_PERCENT = 1.96
"""Standard deviations on either side of the mean that contain 95 % of a normal distribution."""
CONFIDENCE = 0.95
SAYS_SOMETHING = 0.5
"""A lower bound below this is no statement: guessing between two classes is right as often."""


def interval(right: float, judged: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of a proportion: Wilson (1927), "Probable inference"."""
    squared = ERRORS_OF_95_PERCENT**2
    share, whole = right / judged, judged + squared
    centre = (right + squared / 2) / whole
    half = ERRORS_OF_95_PERCENT * sqrt(share * (1 - share) * judged + squared / 4) / whole
    return max(0.0, centre - half), min(1.0, centre + half)


def lower_bound(right: float, judged: int) -> float:
    """Return the least proportion that 95 % confidence allows: Clopper and Pearson (1934), one-sided.

    60 of 60 prove 95 %.
    """
    from scipy.special import betaincinv  # 0.1 s, and few commands state a bound

    return float(betaincinv(right, judged - right + 1, 1.0 - CONFIDENCE)) if right else 0.0


def out_of(right: float, judged: int) -> str:
    """Return ``26 of 37 (95 %: 54 to 82 %)``, the counts and the confidence interval of their proportion."""
    if not judged:
        return "0 of 0"
    low, high = interval(right, judged)
    return f"{right:,.0f} of {judged:,} (95 %: {100 * low:.0f} to {100 * high:.0f} %)"


def estimated(share: float | None, judged: int, what: str = "") -> str:
    """Return ``95.0 % of 40 (95 %: 83 to 99 %)``, an estimate with the images behind it and its confidence interval.

    ``what`` names the images.
    """
    if share is None or not judged:
        return "not known"
    low, high = interval(share * judged, judged)
    images = f"{judged:,} {what}" if what else f"{judged:,}"
    return f"{100 * share:.1f} % of {images} (95 %: {100 * low:.0f} to {100 * high:.0f} %)"


def with_intervals(facts: Mapping[str, Any], counts: Mapping[str, str]) -> dict[str, Any]:
    """Return facts with the interval of each share; ``counts`` maps its key to that of the images behind it."""
    intervals = {
        f"{key}_interval": [round(bound, 4) for bound in interval(facts[key] * facts[count], facts[count])]
        if facts[key] is not None and facts[count]
        else None
        for key, count in counts.items()
    }
    return {**facts, **intervals}


def vouched(right: float, judged: int) -> str:
    """Return what the checked images say of all: ``not checked``, ``too few to say`` or ``at least 91 % (95 % …)``."""
    if not judged:
        return "not checked"
    bound = lower_bound(right, judged)
    if bound < SAYS_SOMETHING:
        return "too few to say"
    return f"at least {floor(100 * bound)} % (95 % confidence)"


def proportion(right: float, judged: int) -> dict[str, Any]:
    """Return the counts of a proportion as plain values, with its interval, its bound and what they say in words."""
    if not judged:
        return {"right": 0, "judged": 0, "interval": None, "at_least": None, "words": vouched(0, 0)}
    bounds, bound = (tuple(round(one, 4) for one in interval(right, judged)), round(lower_bound(right, judged), 4))
    return {"right": right, "judged": judged, "interval": bounds, "at_least": bound, "words": vouched(right, judged)}
