"""The modes ``best`` and ``mixed``: a Gaussian and a kernel, weighted by leave-one-out; see docs/decisions.md."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sortd.arrays import Array, BoolArray
from sortd.classify.calibration import balanced_weights, fit_temperature
from sortd.classify.gaussian import Gaussian, PlacedNames, Space, fit_gaussian, fit_space, place_names, shrink_means
from sortd.classify.kernel import Kernel, make_kernel
from sortd.classify.leave_one_out import (
    LARGEST_ROWS,
    REFIT_UP_TO,
    HeldOut,
    Refitted,
    choose_held_out,
    gaussian_table,
    hold_out,
    kernel_table,
    refit_tables,
)
from sortd.classify.library import Library, Pause, class_means, no_pause, parts

SHARES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Weights of the kernel that are tried, relative to the Gaussian. The smallest is taken unless a larger one is better
by a standard error: leave-one-out favours the kernel, since references resemble each other more than new images do."""
TEXT_WEIGHTS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Weights of a name (kT) that are tried, in references, besides 0."""
UNTRIED_WEIGHT = 4.0
"""The weight if no class has two images; names that predict little have a small slope already."""
TYPICAL_DIMENSIONS = 23.0
"""Prior median of the factor from Gaussian scores to log probabilities, times the dimensions. On four public sets the
best factor was 0.6 to 2 times this, from 1 to 16 references and 5 to 101 classes."""
TEMPERATURE_SPREAD = 0.5
LEAST_EVIDENCE = 2.0
"""Least ``PlacedNames.evidence`` with which names are used."""


@dataclass(frozen=True, eq=False)
class LibraryFit:
    """The parts of a fit that do not depend on the weight of the names; R references are held out."""

    present: BoolArray  # (C,): classes with a reference
    space: Space
    gaussian: Gaussian
    names: PlacedNames | None
    named: Array | None  # (C, d): whitened names
    held: HeldOut
    row_weights: Array  # (R,); classes have equal weight
    refitted: Refitted | None  # leave-one-out by refitting, for small libraries
    kernel_table: Array  # (R, C)
    kernel_gaps: Array  # (R,)

    @property
    def parts(self) -> Iterator[slice]:
        """Row slices of the tables."""
        return parts(len(self.held.own), len(self.present))


@dataclass(frozen=True, eq=False)
class Trial:
    """Leave-one-out with one weight of the names."""

    text_weight: float
    share: float  # weight of the kernel relative to the Gaussian
    gaussian_weight: float
    kernel_weight: float
    table: Array  # (R, C): logits of the held-out references
    distances: Array  # (R,): squared distance of each to its best class
    losses: Array  # (R,): weighted log losses
    right: Array  # (R,): the weight if the class is correct, else 0


@dataclass(frozen=True, eq=False)
class Blend:
    """A fitted mode with its leave-one-out table."""

    fit: LibraryFit
    trial: Trial
    kernel: Kernel
    shrunk: Array  # (C, d) whitened means
    competes: BoolArray  # (C,): classes that can be chosen


def fit_blends(library: Library, *, largest: int = LARGEST_ROWS, pause: Pause = no_pause) -> tuple[Blend, Blend]:
    """Return ``best`` and ``mixed`` of a library of at least one reference; if names are not used, both are one object.

    At most ``largest`` references are held out, evenly from all classes.
    """
    fit = _fit(library, largest, pause)
    uses_names = fit.names is not None and fit.names.evidence >= LEAST_EVIDENCE
    if not len(fit.held.own) or fit.present.sum() < 2:  # noqa: PLR2004 - nothing to choose between
        best = _assemble(fit, fit.present, _untried(fit, 0.0))
        return best, _assemble(fit, fit.present | True, _untried(fit, UNTRIED_WEIGHT)) if uses_names else best
    alone = _try_weight(fit, 0.0, pause)
    best = _assemble(fit, fit.present, alone)
    pause()
    if not uses_names:
        return best, best
    chosen = alone
    for weight in TEXT_WEIGHTS:
        trial = _try_weight(fit, weight, pause)
        if _is_better(alone, trial) and float(trial.losses.sum()) < float(chosen.losses.sum()):
            chosen = trial
    return best, _assemble(fit, fit.present | True, chosen)


def _fit(library: Library, largest: int, pause: Pause) -> LibraryFit:
    rows, classes, counts = library.rows, library.classes, library.counts
    present = counts > 0
    space = fit_space(rows, classes, counts)
    pause()
    placed = space.place(rows)
    pause()
    gaussian = fit_gaussian(placed, classes, counts, pause=pause)
    names: PlacedNames | None = None
    if library.text is not None:
        names = place_names(space, library.text, library.text_mean, class_means(placed, classes, counts), counts)
    named = None if names is None else names.rows @ gaussian.whitener
    held = hold_out(gaussian, choose_held_out(counts, classes, largest=largest))
    pause()
    refitted: Refitted | None = None
    if len(rows) <= REFIT_UP_TO:
        weights = (0.0,) if names is None else (0.0, *TEXT_WEIGHTS)
        refitted = refit_tables(library, held.chosen, weights, pause=pause)
        table = refitted.kernel
    else:
        table = kernel_table(gaussian, held, make_kernel(gaussian), pause=pause)
    return LibraryFit(
        present=present,
        space=space,
        gaussian=gaussian,
        names=names,
        named=named,
        held=held,
        row_weights=balanced_weights(held.own, len(counts)),
        refitted=refitted,
        kernel_table=table,
        kernel_gaps=_gaps(table, present, pause),
    )


def _gaps(table: Array, present: BoolArray, pause: Pause) -> Array:
    """Return (R,) the difference of the best and the median score of each row."""
    gaps = np.empty(len(table))
    for part in parts(*table.shape):
        scores = table[part][:, present]
        if scores.size:
            gaps[part] = scores.max(axis=1) - np.median(scores, axis=1)
        pause()
    return gaps


def _gaussian_table(fit: LibraryFit, weight: float, pause: Pause) -> Array:
    """Return leave-one-out Gaussian scores (R, C)."""
    table = np.empty((len(fit.held.own), len(fit.present)))
    named = fit.named if weight else None
    shrunk = shrink_means(fit.gaussian, named, weight)
    for part in fit.parts:
        if fit.refitted is not None:
            table[part] = fit.refitted.gaussian[weight][part]
        else:
            table[part] = gaussian_table(fit.gaussian, fit.held, shrunk, named, weight, part)
        pause()
    return table


def _try_weight(fit: LibraryFit, weight: float, pause: Pause) -> Trial:
    """Return the leave-one-out trial of one weight of the names."""
    own, weights, present = fit.held.own, fit.row_weights, fit.present
    table = _gaussian_table(fit, weight, pause)
    scale = _scale(_gaps(table, present, pause)) / _scale(fit.kernel_gaps)
    chosen = np.empty((len(SHARES), len(own)), np.int64)
    for part in fit.parts:
        kernel = scale * fit.kernel_table[part]
        for at, share in enumerate(SHARES):
            chosen[at, part] = np.where(present, table[part] + share * kernel, -np.inf).argmax(axis=1)
        pause()
    share = _choose_share(chosen == own, weights)
    best, distances = np.empty(len(own), np.int64), np.empty(len(own))
    for part in fit.parts:
        blended = np.where(present, table[part] + share * scale * fit.kernel_table[part], -np.inf)
        best[part] = blended.argmax(axis=1)
        distances[part] = -2.0 * table[part][np.arange(len(blended)), best[part]]
        table[part] = blended
        pause()
    typical = TYPICAL_DIMENSIONS / fit.gaussian.ambient / (1.0 + share)
    factor, losses = fit_temperature(table, own, weights, typical=typical, spread=TEMPERATURE_SPREAD, pause=pause)
    table *= factor
    pause()
    return Trial(
        text_weight=weight,
        share=share,
        gaussian_weight=factor,
        kernel_weight=factor * share * scale,
        table=table,
        distances=distances,
        losses=losses * weights,
        right=weights * (best == own),
    )


def _untried(fit: LibraryFit, weight: float) -> Trial:
    """Return the trial that is assumed if nothing can be left out."""
    rows = len(fit.held.own)
    return Trial(
        text_weight=weight,
        share=0.0,
        gaussian_weight=TYPICAL_DIMENSIONS / fit.gaussian.ambient,
        kernel_weight=0.0,
        table=np.where(fit.present, np.zeros((rows, 1)), -np.inf),
        distances=np.zeros(rows),
        losses=np.zeros(rows),
        right=np.zeros(rows),
    )


def _assemble(fit: LibraryFit, competes: BoolArray, trial: Trial) -> Blend:
    named = fit.named if competes.all() else None
    shrunk = shrink_means(fit.gaussian, named, trial.text_weight)
    if named is not None:
        shrunk[~fit.present] = named[~fit.present]
    return Blend(fit, trial, make_kernel(fit.gaussian, named), shrunk, competes)


def _choose_share(right: BoolArray, weights: Array) -> float:
    """Return the smallest share whose accuracy is within a standard error of the best share's; ``right`` is (S, R)."""
    rights = [weights * row for row in right]
    best = max(rights, key=np.sum)
    for share, right_ones in zip(SHARES, rights, strict=True):
        lost = best - right_ones
        if float(lost.mean()) <= float(lost.std()) / np.sqrt(len(lost)):
            return share
    return SHARES[-1]


def _scale(gaps: Array) -> float:
    return max(float(np.median(gaps)), 1e-9)


def _is_better(alone: Trial, trial: Trial) -> bool:
    """Return whether names lower the log loss by more than a standard error without loss of accuracy."""
    gains = alone.losses - trial.losses
    error = float(gains.std()) / np.sqrt(len(gains))
    return float(gains.mean()) > error and float(trial.right.sum()) >= float(alone.right.sum())
