"""The rules ``best`` and ``mixed``: a Gaussian and a kernel over the references, weighed by leave-one-out."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sortd.deciding.confidence import balanced_weights, fit_temperature
from sortd.deciding.gaussian import Gaussian, Space, fit_gaussian, fit_space, shrink_means, squared_distances
from sortd.deciding.kernel import Kernel, kernel_scores, make_kernel
from sortd.deciding.leaveoneout import LARGEST_ROWS, HeldOut, choose_held_out, gaussian_table, hold_out, kernel_table
from sortd.deciding.refitting import REFIT_UP_TO, Refitted, refit_tables
from sortd.deciding.text_prototypes import Names, place_names, placed_means

Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

SHARES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""How much the kernel may weigh against the Gaussian: little, unless leave-one-out says more by a standard error.
Leave-one-out flatters the kernel, since references resemble each other more than what arrives resembles them."""
TEXT_WEIGHTS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""How many references a name may count as (kT), besides none."""
UNTRIED_WEIGHT = 4.0
"""The same where no class has two images to try it on: the names were brought to the images by a slope that is small
where they know little, so that even poor names may count for much."""
TYPICAL_DIMENSIONS = 23.0
"""The Gaussian's scores, times this over the dimensions, are log probabilities before any reference says better: on the
four public sets the likeliest factor lay within 0.6 and 2 times this, from 1 to 16 references and 5 to 101 classes."""
TEMPERATURE_SPREAD = 0.5
LEAST_EVIDENCE = 2.0
"""Standard errors by which names must agree with their own images before they have a say."""


@dataclass(frozen=True, eq=False)
class Library:
    """References without near-duplicates, with the names where an encoder knows them; rows are float64."""

    rows: Array
    classes: IntArray
    counts: IntArray
    text: Array | None = None
    text_mean: Array | None = None


@dataclass(frozen=True, eq=False)
class Blend:
    """The fitted rule, and its leave-one-out table."""

    space: Space
    gaussian: Gaussian
    kernel: Kernel
    names: Names | None
    text_weight: float
    shrunk: Array
    """(C, d) whitened means."""
    share: float
    """The kernel's weight against the Gaussian's."""
    gaussian_weight: float
    kernel_weight: float
    competes: npt.NDArray[np.bool_]
    """(C,): classes that can be chosen."""
    held: HeldOut
    table: Array
    """(R, C): leave-one-out logits of the held-out references."""
    distances: Array
    """(R,): leave-one-out squared distance of each to its best class."""
    refitted: Refitted | None
    """What leave-one-out by brute force found, where it was that."""

    def logits(self, whitened: Array) -> Array:
        """Return (B, C) log probabilities up to a constant for whitened rows (B, d); -inf for absent classes."""
        result = -0.5 * self.gaussian_weight * squared_distances(whitened, self.shrunk)
        if self.kernel_weight:
            result += self.kernel_weight * kernel_scores(whitened, self.kernel)
        result[:, ~self.competes] = -np.inf
        return np.asarray(result, dtype=np.float64)


@dataclass(frozen=True, eq=False)
class _Trial:
    """Leave-one-out under one weight of the names."""

    text_weight: float
    share: float
    gaussian_weight: float
    kernel_weight: float
    table: Array
    distances: Array
    losses: Array
    """(R,): weighted log losses."""
    right: Array
    """(R,): weighted ones where the class was right."""


class _Fitter:
    """One library's fit, with the tables for any weight of the names."""

    def __init__(self, library: Library, largest: int) -> None:
        self.library = library
        rows, classes, counts = library.rows, library.classes, library.counts
        self.space = fit_space(rows, classes, counts)
        self.gaussian = fit_gaussian(self.space.place(rows), classes, counts)
        self.names: Names | None = None
        self.named: Array | None = None
        if library.text is not None:
            means = placed_means(self.space, rows, classes, counts)
            self.names = place_names(self.space, library.text, library.text_mean, means, counts)
            self.named = self.names.rows @ self.gaussian.whitener
        self.held = hold_out(self.gaussian, choose_held_out(counts, classes, largest=largest))

        own = self.held.own
        self.row_weights = balanced_weights(own, len(counts))
        self.refitted: Refitted | None = None
        if len(rows) <= REFIT_UP_TO:
            text = None if library.text is None else (library.text, library.text_mean)
            weights = (0.0,) if text is None else (0.0, *TEXT_WEIGHTS)
            self.refitted = refit_tables(rows, classes, counts, self.held.chosen, text, weights)
            self.kernel_table = self.refitted.kernel
        else:
            self.kernel_table = kernel_table(self.gaussian, self.held, make_kernel(self.gaussian))

    def try_weight(self, weight: float) -> _Trial:
        """Return leave-one-out with this weight of the names: by refitting where that is cheap, else by algebra."""
        present = self.gaussian.counts > 0
        if self.refitted is not None:
            table = self.refitted.gaussian[weight]
        else:
            named = self.named if weight else None
            shrunk = shrink_means(self.gaussian, named, weight)
            table = gaussian_table(self.gaussian, self.held, shrunk, named, weight)
        own, weights = self.held.own, self.row_weights
        scale = _scale(table[:, present]) / _scale(self.kernel_table[:, present])
        share = _choose_share(table, scale * self.kernel_table, present, own, weights)
        blended = np.where(present, table + share * scale * self.kernel_table, -np.inf)
        typical = TYPICAL_DIMENSIONS / self.gaussian.ambient / (1.0 + share)
        factor, losses = fit_temperature(blended, own, weights, typical=typical, spread=TEMPERATURE_SPREAD)
        best = blended.argmax(axis=1)
        return _Trial(
            text_weight=weight,
            share=share,
            gaussian_weight=factor,
            kernel_weight=factor * share * scale,
            table=factor * blended,
            distances=-2.0 * table[np.arange(len(best)), best],
            losses=losses * weights,
            right=weights * (best == own),
        )


def fit_blends(library: Library, *, largest: int = LARGEST_ROWS) -> tuple[Blend, Blend]:
    """Return the rules ``best`` and ``mixed`` of a library of at least one reference; without names they are one.

    At most ``largest`` references are left out, evenly from all classes.
    """
    fitter = _Fitter(library, largest)
    present = library.counts > 0
    has_voice = fitter.names is not None and fitter.names.evidence >= LEAST_EVIDENCE
    if not len(fitter.held.own) or present.sum() < 2:  # noqa: PLR2004 - nothing to choose between
        trial = _untried(fitter, 0.0)
        best = _assemble(fitter, present, trial)
        return best, _assemble(fitter, present | True, _untried(fitter, UNTRIED_WEIGHT)) if has_voice else best
    alone = fitter.try_weight(0.0)
    best = _assemble(fitter, present, alone)
    if not has_voice:
        return best, best
    trials = [fitter.try_weight(weight) for weight in TEXT_WEIGHTS]
    better = [trial for trial in trials if _is_better(alone, trial)]
    return best, _assemble(fitter, present | True, min([alone, *better], key=lambda trial: float(trial.losses.sum())))


def _untried(fitter: _Fitter, weight: float) -> _Trial:
    """Return what is assumed where nothing can be left out."""
    rows = len(fitter.held.own)
    return _Trial(
        text_weight=weight,
        share=0.0,
        gaussian_weight=TYPICAL_DIMENSIONS / fitter.gaussian.ambient,
        kernel_weight=0.0,
        table=np.where(fitter.gaussian.counts > 0, np.zeros((rows, 1)), -np.inf),
        distances=np.zeros(rows),
        losses=np.zeros(rows),
        right=np.zeros(rows),
    )


def _assemble(fitter: _Fitter, competes: npt.NDArray[np.bool_], trial: _Trial) -> Blend:
    voices = fitter.named if competes.all() else None
    shrunk = shrink_means(fitter.gaussian, voices, trial.text_weight)
    if voices is not None:
        silent = fitter.gaussian.counts == 0
        shrunk[silent] = voices[silent]
    return Blend(
        space=fitter.space,
        gaussian=fitter.gaussian,
        kernel=make_kernel(fitter.gaussian, voices),
        names=fitter.names,
        text_weight=trial.text_weight,
        shrunk=shrunk,
        share=trial.share,
        gaussian_weight=trial.gaussian_weight,
        kernel_weight=trial.kernel_weight,
        competes=competes,
        held=fitter.held,
        table=trial.table,
        distances=trial.distances,
        refitted=fitter.refitted,
    )


def _choose_share(table: Array, kernel: Array, present: npt.NDArray[np.bool_], own: IntArray, weights: Array) -> float:
    """Return the smallest share whose accuracy is within a standard error of the best share's."""
    rights = [weights * (np.where(present, table + share * kernel, -np.inf).argmax(axis=1) == own) for share in SHARES]
    best = max(rights, key=np.sum)
    for share, right in zip(SHARES, rights, strict=True):
        lost = best - right
        if float(lost.mean()) <= float(lost.std()) / np.sqrt(len(lost)):
            return share
    return SHARES[-1]


def _scale(table: Array) -> float:
    gaps = table.max(axis=1) - np.median(table, axis=1)
    return max(float(np.median(gaps)), 1e-9)


def _is_better(alone: _Trial, trial: _Trial) -> bool:
    """Return whether names lower the log loss by more than chance, and the accuracy not at all."""
    gains = alone.losses - trial.losses
    error = float(gains.std()) / np.sqrt(len(gains))
    return float(gains.mean()) > error and float(trial.right.sum()) >= float(alone.right.sum())
