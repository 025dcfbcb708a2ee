"""Open-set detection: the familiarity gate, and stranger scores by leaving classes out; see docs/decisions.md."""

from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from sortd.arrays import Array, BoolArray, FloatArray, IntArray
from sortd.classify.gaussian import ClassMoments, class_moments, fit_gaussian, shrink_means, squared_distances
from sortd.classify.library import Pause, no_pause, parts

Moments = tuple[float, float]
"""Mean and standard deviation of one statistic among known images."""
Rows = npt.NDArray[np.floating]

KNOWN_REFUSED = np.linspace(0.10, 0.35, 26)
"""Shares of known images that the gate may refuse. The least of them is taken that keeps STRANGERS_KEPT out, since what
strangers of the classes look like differs between libraries: at 0.10, 5 to 60 % of them were filed."""
STRANGERS_KEPT = 0.14
"""Share of the references of left-out classes that may be as typical of another class as known images are."""
FEW_CLASSES = 5
"""With more classes than this, the weight of the remoteness falls by their number: they fill the space around the
centre, so that strangers are seldom far from it."""
SHARE_OF_ODDS = 0.8
"""Weight of the log odds in the familiarity: strangers mostly have lower odds, but not always."""
LEAST_COSINE_SPREAD = 0.01
LEAST_ODDS_SPREAD = 1.0
"""Least standard deviations assumed, since references that are all alike or certain would have almost none."""
LEAST_RELATIVE_SPREAD = 0.03
"""The same for typicality and remoteness, in parts of their mean; real libraries have 0.1 to 0.5."""
LEAST_WHOLE_SPREAD = 1.0
FEW = 20
"""With fewer held-out references, the gate is a quantile of a normal distribution. The least of a dozen observed values
filed 72 % of known images and 22 % of near strangers; this files 68 and 14 %."""
STRANGER_QUANTILE = 0.25
"""If no class has two images, the cosine gate is this quantile of the cosines between classes."""
LOGISTIC = 1.702
"""The logistic function of this times x is the normal distribution within 0.01 (Camilli 1994)."""
FOLDS = 10
COSINE_GATE = 0.15
"""An image resembles a class only if its cosine is in this top share of the strangers' cosines."""
LARGEST_LIBRARY = 6000
LEAST_LENGTH = 1e-6
"""Least length of a row: the centre itself has no direction."""
NEIGHBOURS = 3
"""References that an image is compared with; more than one, so that an outlier has little effect."""


@dataclass(frozen=True, eq=False)
class OpenSetScores:
    """The familiarity statistics of B images for their best classes."""

    cosine: Array  # to the nearest references: in the standardised space if remoteness is known, else of embeddings
    typicality: Array | None  # relative Mahalanobis distance: to the Gaussian of all images less to the best class
    remoteness: Array | None  # distance to the centre of the library, in the standardised space


@dataclass(frozen=True)
class Gate:
    """The familiarity gate: moments of each statistic among known images; None if not used."""

    least: float  # least familiarity of a filed image
    cosine: Moments
    typicality: Moments | None
    remoteness: Moments | None
    odds: Moments | None  # log odds of the class
    share_of_remoteness: float = 1.0  # weight of the remoteness
    whole: Moments = (0.0, 1.0)  # sum of all statistics

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> "Gate":
        """Return the gate from its fields as JSON holds them."""
        fields: dict[str, Any] = {name: tuple(one) if isinstance(one, list) else one for name, one in facts.items()}
        return cls(**fields)

    def familiarity(self, open_set: OpenSetScores, confidence: Array | None) -> Array:
        """Return (B,) familiarity in standard deviations of known images; their mean is 0.

        Each statistic adds the logarithm of the share of known images that have less of it (Fisher's method). Without
        ``confidence``, (B,) probability of the best class, the odds are those of known images on average.
        """
        total = log_share(open_set.cosine, self.cosine)
        if self.typicality is not None and open_set.typicality is not None:
            total = total + log_share(open_set.typicality, self.typicality)
        if self.remoteness is not None and open_set.remoteness is not None:
            less = log_share(-open_set.remoteness, (-self.remoteness[0], self.remoteness[1]))
            total = total + self.share_of_remoteness * less
        if self.odds is not None:
            odds = np.full(len(total), self.odds[0]) if confidence is None else log_odds(confidence)
            total = total + SHARE_OF_ODDS * log_share(odds, self.odds)
        return np.asarray((total - self.whole[0]) / self.whole[1], dtype=np.float64)


def log_share(values: Array, moments: Moments) -> Array:
    """Return (B,) log of the share of smaller values in a logistic distribution with these moments."""
    return np.asarray(-np.logaddexp(0.0, -LOGISTIC * (values - moments[0]) / moments[1]), dtype=np.float64)


def log_odds(confidence: Array) -> Array:
    """Return log odds of probabilities, bounded above by about 9."""
    return np.asarray(np.log(np.maximum(confidence, 1e-12) / (1.0 - confidence + 1e-4)), dtype=np.float64)


def known_gate(
    open_set: OpenSetScores, confidence: Array, right: BoolArray, *, classes: int, null: "Strangers | None" = None
) -> Gate:
    """Return a gate that refuses a share of KNOWN_REFUSED of the held-out references whose best class is correct.

    Args:
        open_set: of R held-out references.
        confidence: (R,) probability of the best class.
        right: (R,) whether the best class is correct; at least one is.
        classes: number of classes.
        null: scores of references whose class is left out; None refuses the smallest share.
    """
    gate = Gate(
        least=0.0,
        cosine=_moments(open_set.cosine[right], LEAST_COSINE_SPREAD),
        typicality=None if open_set.typicality is None else _relative_moments(open_set.typicality[right]),
        remoteness=None if open_set.remoteness is None else _relative_moments(open_set.remoteness[right]),
        odds=_moments(log_odds(confidence[right]), LEAST_ODDS_SPREAD),
        share_of_remoteness=min(1.0, FEW_CLASSES / max(classes, 1)),
    )
    gate = replace(gate, whole=_moments(gate.familiarity(open_set, confidence)[right], LEAST_WHOLE_SPREAD))
    refused = float(KNOWN_REFUSED[0])
    if null is not None and len(null.weights) and open_set.typicality is not None:
        refused = _share_to_refuse(open_set.typicality[right], null)
    return replace(gate, least=_low(gate.familiarity(open_set, confidence)[right], refused))


def foreign_gate(cosines: Array) -> Gate:
    """Return the gate from the cosines (N,) of references to the nearest one of another class."""
    gate = Gate(0.0, cosine=(0.0, 1.0), typicality=None, remoteness=None, odds=None)
    open_set = OpenSetScores(np.quantile(cosines, [STRANGER_QUANTILE]), None, None)
    return replace(gate, least=float(gate.familiarity(open_set, None)[0]))


def _moments(values: Array, least: float) -> Moments:
    return float(values.mean()), max(float(values.std()), least)


def _relative_moments(values: Array) -> Moments:
    return _moments(values, max(LEAST_RELATIVE_SPREAD * abs(float(values.mean())), 1e-6))


def _low(values: Array, share: float) -> float:
    """Return the quantile of known values; of a normal distribution if they are few."""
    if len(values) < FEW:
        return float(values.mean() + NormalDist().inv_cdf(share) * values.std())
    return float(np.quantile(values, share))


def _share_to_refuse(known: Array, null: "Strangers") -> float:
    weights, shares = null.weights / null.weights.sum(), KNOWN_REFUSED.tolist()
    fits = (one for one in shares if weights @ (null.typicality >= _low(known, one)) <= STRANGERS_KEPT)
    return float(next(fits, shares[-1]))


@dataclass(frozen=True, eq=False)
class Strangers:
    """Scores of S references against the other classes, with their own class left out."""

    typicality: Array
    margin: Array
    cosine: Array
    likeness: Array  # combination of the three
    weights: Array
    classes: int  # number of classes that were left out

    @property
    def attainable(self) -> float:
        """The smallest share of filed strangers that these scores can guarantee."""
        if not len(self.weights):
            return 1.0
        return max(1.0 / (self.classes + 1.0), 2.0 / (len(self.weights) + 1.0))

    def shares(self, typicality: Array, margin: Array, cosine: Array) -> Array:
        """Return (B,) the share of strangers that resemble a class at least as much as each image."""
        return _share(self.likeness_of(typicality, margin, cosine), self.likeness, self.weights)

    def likeness_of(self, typicality: Array, margin: Array, cosine: Array) -> Array:
        """Return (B,) resemblance to a class: minus the sum of the log shares, or 0 below COSINE_GATE."""
        likeness = -np.log(_share(typicality, self.typicality, self.weights))
        likeness -= np.log(_share(margin, self.margin, self.weights))
        likeness[_share(cosine, self.cosine, self.weights) > COSINE_GATE] = 0.0
        return likeness


def leave_classes_out(rows: Array, classes: IntArray, counts: IntArray, *, pause: Pause = no_pause) -> Strangers:
    """Return the stranger scores of unit rows (N, d) that are sorted by class.

    Classes are divided into at most FOLDS folds; the model is refitted without each fold. Classes have equal weight.
    """
    present = np.flatnonzero(counts)
    if present.size < 3:  # noqa: PLR2004 - one to leave out, two to choose between
        empty = np.zeros(0)
        return Strangers(empty, empty, empty, empty, empty, 0)
    rows, classes, counts = _thin(rows, classes, counts)
    moments = class_moments(rows, classes, counts, pause=pause)
    folds = np.full(len(counts), -1)
    folds[present] = np.random.default_rng(0).permutation(present.size) % min(FOLDS, present.size)
    single = rows.astype(np.float32)
    scored = [_fold(single, classes, counts, moments, folds == fold, pause) for fold in range(int(folds.max()) + 1)]
    asked, best, typicality, margin = (np.concatenate(column) for column in zip(*scored, strict=True))
    cosine = nearest_cosines(rows[asked], best, rows, classes, pause=pause)
    cosine = np.round(cosine, 12)  # the cosine of a pair occurs at both ends, and rounding must not order them
    weights = 1.0 / counts[classes[asked]]
    null = Strangers(typicality, margin, cosine, np.zeros(0), weights, int(present.size))
    return replace(null, likeness=null.likeness_of(typicality, margin, cosine))


def _fold(
    rows: FloatArray, classes: IntArray, counts: IntArray, moments: ClassMoments, left_out: BoolArray, pause: Pause
) -> tuple[IntArray, IntArray, Array, Array]:
    """Return the rows (B,) of the classes that are left out, their best other class, typicality and margin."""
    kept_counts, gone = np.where(left_out, 0, counts), np.flatnonzero(left_out[classes])
    all_placed = moments.space(kept_counts).place_in_single(rows, pause=pause)
    gaussian = fit_gaussian(all_placed, classes, kept_counts, pause=pause)
    shrunk = shrink_means(gaussian)[kept_counts > 0]
    best, first, second, background = np.empty(len(gone), np.int64), *np.empty((3, len(gone)))
    for part in parts(len(gone), max(len(shrunk), rows.shape[1]), pause=pause):
        placed = all_placed[gone[part]].astype(np.float64)
        distances = squared_distances(placed @ gaussian.whitener, shrunk)
        at, each = distances.argmin(axis=1), np.arange(len(distances))
        best[part], first[part] = at, distances[each, at]
        distances[each, at] = np.inf
        second[part] = distances.min(axis=1)
        background[part] = np.square(placed @ gaussian.background - gaussian.background_middle).sum(axis=1)
    return gone, np.flatnonzero(kept_counts)[best], background - first, second - first


def nearest_cosines(  # noqa: PLR0913 -- all but four are seldom given
    queries: Rows,
    best: IntArray,
    rows: Rows,
    classes: IntArray,
    itself: IntArray | None = None,
    *,
    neighbours: int = NEIGHBOURS,
    centred: tuple[Rows, Rows] | None = None,
    pause: Pause = no_pause,
) -> Array:
    """Return (B,) the mean cosine of each query to the nearest rows of its best class; -1 for a class without rows.

    Args:
        queries: (B, d) unit rows.
        best: (B,) the class of each query.
        rows: (N, d) unit rows, sorted by class.
        classes: (N,), ascending.
        itself: (B,) the row that is not compared with each query.
        neighbours: largest number of rows that enter the mean.
        centred: for rows that are not centred: (B,) subtrahends of the products of each query, and (N,) divisors of the
            products of each row.
        pause: called between the parts.
    """
    result = np.full(len(queries), -1.0)
    asked, order = np.unique(best), best.argsort(kind="stable")
    bounds = [*best[order].searchsorted(asked), len(best)]
    for index, (first, last) in zip(asked, pairwise(bounds), strict=True):
        start, stop = classes.searchsorted([index, index + 1])
        if stop <= start:
            continue
        of_class, width = order[first:last], int(stop - start)
        for part in parts(len(of_class), width, pause=pause):
            asking = of_class[part]
            similarities = queries[asking] @ rows[start:stop].T
            if centred is not None:
                shift, lengths = centred[0][asking][:, None], np.maximum(centred[1][start:stop], LEAST_LENGTH)
                similarities = np.clip((similarities - shift) / lengths, -1.0, 1.0)
            if itself is not None:
                similarities[itself[asking][:, None] == np.arange(start, stop)] = -np.inf
            if width > neighbours:
                similarities.partition(width - neighbours, axis=1)
                similarities = similarities[:, width - neighbours :]
            used = np.isfinite(similarities)
            count = np.count_nonzero(used, axis=1)
            mean = np.where(used, similarities, 0.0).sum(axis=1) / np.maximum(count, 1)
            result[asking] = np.where(count > 0, mean, -1.0)
    return result


def _thin(rows: Array, classes: IntArray, counts: IntArray) -> tuple[Array, IntArray, IntArray]:
    if len(rows) <= LARGEST_LIBRARY:
        return rows, classes, counts
    order = np.argsort(classes, kind="stable")
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    rank = np.arange(len(rows)) - starts[classes[order]]
    limit = max(2, LARGEST_LIBRARY // int(np.count_nonzero(counts)))
    kept = order[rank < limit]
    return rows[kept], classes[kept], np.minimum(counts, limit)


def _share(values: Array, null: Array, weights: Array) -> Array:
    mean = float(weights.mean())
    if len(values) == 1:  # one pass is faster than sorting
        reached = np.asarray([float(weights @ (null >= values[0]))])
    else:
        order = np.argsort(null)
        above = np.concatenate([np.cumsum(weights[order][::-1])[::-1], [0.0]])
        reached = above[np.searchsorted(null[order], values, side="left")]
    return np.asarray((reached + mean) / (float(weights.sum()) + mean), dtype=np.float64)
