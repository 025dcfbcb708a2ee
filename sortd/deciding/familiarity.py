"""Familiarity: how much like the known images one looks, all respects in one number.

Formulas and evidence: docs/decisions.md, section "Abstaining".
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sortd.arrays import Array, BoolArray

Moments = tuple[float, float]
"""Mean and spread of one respect among known images."""

KNOWN_REFUSED = 0.10
"""Share of known images that the gate may refuse; many of them are too near to another class anyway."""
FEW_CLASSES = 5
"""With more classes than this the remoteness weighs less, by the root of their number: they fill the space around the
centre, so that a stranger is less and less often far from it."""
SHARE_OF_ODDS = 0.5
"""Weight of the log odds in the familiarity: strangers are mostly less sure, but not always."""
LEAST_COSINE_SPREAD = 0.01
LEAST_ODDS_SPREAD = 1.0
"""Spreads assumed at least: where all references are alike, or certain, a little less so is nothing strange."""
LEAST_RELATIVE_SPREAD = 0.03
"""The same for typicality and remoteness, in parts of their mean; real libraries have 0.1 to 0.5."""
LEAST_WHOLE_SPREAD = 1.0
FEW = 20
"""Held-out references below which a quantile means little, and that of a normal distribution is the gate. The least
value seen, of a dozen, filed 72 % of known images and 22 % of near strangers where this files 68 and 14."""
NORMAL_QUANTILE = -1.2816
"""Standard deviations below which a normal distribution has the share that may be refused."""
STRANGER_QUANTILE = 0.25
"""Without any class of two images the cosine gate is this quantile of what images of other classes reach."""
LOGISTIC = 1.702
"""With its argument times this the logistic function is the normal distribution within 0.01 (Camilli 1994)."""


@dataclass(frozen=True, eq=False)
class Looks:
    """What of an image tells whether it belongs to the library at all; float64 (B,)."""

    cosine: Array
    """To the nearest references of the best class, in the standardised space where the remoteness is known, else to
    the embeddings as they are."""
    typicality: Array | None
    """Relative Mahalanobis distance: how much nearer the best class is than images at large; None if not known."""
    remoteness: Array | None
    """Distance to the centre of the library, in the standardised space before it is brought to unit length."""


@dataclass(frozen=True)
class Gate:
    """How familiar an image must look: each respect in spreads of what known images have."""

    least: float
    """Least familiarity of a filed image."""
    cosine: Moments
    typicality: Moments | None
    """None where it is not known; the same below."""
    remoteness: Moments | None
    odds: Moments | None
    """Of the log odds of the class."""
    share_of_remoteness: float = 1.0
    """Weight of the remoteness."""
    whole: Moments = (0.0, 1.0)
    """Of all respects together."""

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> "Gate":
        """Return the gate of a mapping of its fields, also after a journey through JSON, which makes pairs lists."""
        return cls(
            least=facts["least"],
            cosine=tuple(facts["cosine"]),
            typicality=_pair(facts["typicality"]),
            remoteness=_pair(facts["remoteness"]),
            odds=_pair(facts["odds"]),
            share_of_remoteness=facts["share_of_remoteness"],
            whole=tuple(facts["whole"]),
        )

    def familiarity(self, looks: Looks, confidence: Array | None) -> Array:
        """Return (B,) how familiar images look: 0 as known images on average, negative if less so.

        What each respect says is the logarithm of the share of known images that look less familiar in it, and the
        sum counts (Fisher's method): so a stranger may give itself away in one respect alone, while to be better than
        most in another makes up for little.

        Args:
            looks: of B images.
            confidence: (B,) probability of the best class, or None to judge by looks alone.
        """
        total = log_share(looks.cosine, self.cosine)
        if self.typicality is not None and looks.typicality is not None:
            total = total + log_share(looks.typicality, self.typicality)
        if self.remoteness is not None and looks.remoteness is not None:
            less = log_share(-looks.remoteness, (-self.remoteness[0], self.remoteness[1]))
            total = total + self.share_of_remoteness * less
        if self.odds is not None:
            odds = np.full(len(total), self.odds[0]) if confidence is None else log_odds(confidence)
            total = total + SHARE_OF_ODDS * log_share(odds, self.odds)
        return np.asarray((total - self.whole[0]) / self.whole[1], dtype=np.float64)


def log_share(values: Array, moments: Moments) -> Array:
    """Return (B,) log of the share of known images that have less, as of a normal distribution of these moments.

    The logistic function stands in for it: tails of real images are nearer to its own.
    """
    return np.asarray(-np.logaddexp(0.0, -LOGISTIC * (values - moments[0]) / moments[1]), dtype=np.float64)


def log_odds(confidence: Array) -> Array:
    """Return log odds of probabilities, bounded above where more certainty means nothing."""
    return np.asarray(np.log(np.maximum(confidence, 1e-12) / (1.0 - confidence + 1e-4)), dtype=np.float64)


def known_gate(looks: Looks, confidence: Array, right: BoolArray, *, least_confidence: float, classes: int) -> Gate:
    """Return a gate that all but few of the known images which would be filed pass.

    Args:
        looks: of the R references, each left out.
        confidence: (R,) probability of the best class.
        right: (R,) whether the best class is the right one; at least once.
        least_confidence: of a filed image.
        classes: how many there are.
    """
    filed = right & (confidence >= least_confidence)
    filed = filed if filed.any() else right
    gate = Gate(
        least=0.0,
        cosine=_moments(looks.cosine[right], LEAST_COSINE_SPREAD),
        typicality=None if looks.typicality is None else _relative_moments(looks.typicality[right]),
        remoteness=None if looks.remoteness is None else _relative_moments(looks.remoteness[right]),
        odds=_moments(log_odds(confidence[right]), LEAST_ODDS_SPREAD),
        share_of_remoteness=float(np.sqrt(min(1.0, FEW_CLASSES / max(classes, 1)))),
    )
    gate = replace(gate, whole=_moments(gate.familiarity(looks, confidence)[right], LEAST_WHOLE_SPREAD))
    return replace(gate, least=_low(gate.familiarity(looks, confidence)[filed]))


def foreign_gate(cosines: Array) -> Gate:
    """Return the gate where no class has two images, from the cosine (N,) to the nearest image of another class."""
    gate = Gate(0.0, cosine=(0.0, 1.0), typicality=None, remoteness=None, odds=None)
    looks = Looks(np.quantile(cosines, [STRANGER_QUANTILE]), None, None)
    return replace(gate, least=float(gate.familiarity(looks, None)[0]))


def _moments(values: Array, least: float) -> Moments:
    return float(values.mean()), max(float(values.std()), least)


def _relative_moments(values: Array) -> Moments:
    return _moments(values, max(LEAST_RELATIVE_SPREAD * abs(float(values.mean())), 1e-6))


def _low(values: Array) -> float:
    if len(values) < FEW:
        return float(values.mean() + NORMAL_QUANTILE * values.std())
    return float(np.quantile(values, KNOWN_REFUSED))


def _pair(moments: Sequence[float] | None) -> Moments | None:
    return None if moments is None else (moments[0], moments[1])
