"""The modes ``best`` and ``mixed``: a Gaussian and a kernel, weighted by leave-one-out; see docs/decisions.md."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from sortd.arrays import Array, BoolArray
from sortd.classify.calibration import balanced_weights, fit_temperature
from sortd.classify.gaussian import (
    ClassMoments,
    Gaussian,
    PlacedNames,
    Space,
    class_moments,
    fit_gaussian,
    place_names,
    shrink_means,
)
from sortd.classify.kernel import Kernel, make_kernel
from sortd.classify.leave_one_out import (
    LARGEST_ROWS,
    REFIT_UP_TO,
    HeldOut,
    HeldOutProducts,
    Refitted,
    choose_held_out,
    gaussian_table,
    hold_out,
    kernel_table,
    refit_tables,
)
from sortd.classify.library import Library, Pause, no_pause, parts, unit_rows

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
    moments: ClassMoments
    space: Space
    gaussian: Gaussian
    names: PlacedNames | None
    named: Array | None  # (C, d): whitened names
    held: HeldOut
    row_weights: Array  # (R,); classes have equal weight
    refitted: Refitted | None  # leave-one-out by refitting, for small libraries
    products: HeldOutProducts | None  # for the other libraries
    kernel: Kernel
    kernel_table: Array  # (R, C)
    kernel_gaps: Array  # (R,)

    def parts(self, pause: Pause) -> Iterator[slice]:
        """Yield row slices of the tables; pause after each."""
        return parts(len(self.held.own), len(self.present), pause=pause)


@dataclass(frozen=True, eq=False)
class Trial:
    """Leave-one-out with one weight of the names."""

    text_weight: float
    share: float  # weight of the kernel relative to the Gaussian
    gaussian_weight: float
    kernel_weight: float
    distances: Array  # (R,): squared distance of each to its best class
    losses: Array  # (R,): weighted log losses
    right: Array  # (R,): the weight if the class is correct, else 0


@dataclass(frozen=True, eq=False)
class Blend:
    """A fitted mode with its leave-one-out trial."""

    fit: LibraryFit
    trial: Trial
    kernel: Kernel
    shrunk: Array  # (C, d) whitened means
    competes: BoolArray  # (C,): classes that can be chosen

    def held_out_logits(self, *, pause: Pause = no_pause) -> Array:
        """Return (R, C) logits of the held-out references."""
        fit, trial = self.fit, self.trial
        if not trial.kernel_weight:
            return np.where(fit.present, np.zeros((len(fit.held.own), 1)), -np.inf)
        table = np.empty(fit.kernel_table.shape)
        _fill_gaussian(fit, trial.text_weight, table, pause)
        for part in fit.parts(pause):
            table[part] *= trial.gaussian_weight
            table[part] += trial.kernel_weight * fit.kernel_table[part]
            table[part, ~fit.present] = -np.inf
        return table


def fit_blends(library: Library, *, largest: int = LARGEST_ROWS, pause: Pause = no_pause) -> tuple[Blend, Blend]:
    """Return ``best`` and ``mixed`` of a library of at least one reference; if names are not used, both are one object.

    At most ``largest`` references are held out, evenly from all classes.
    """
    fit = _fit(library, largest, pause)
    uses_names = fit.names is not None and fit.names.evidence >= LEAST_EVIDENCE
    if not len(fit.held.own) or fit.present.sum() < 2:  # noqa: PLR2004 - nothing to choose between
        best = _assemble(fit, fit.present, _untried(fit, 0.0))
        return best, _assemble(fit, fit.present | True, _untried(fit, UNTRIED_WEIGHT)) if uses_names else best
    table = np.empty(fit.kernel_table.shape)
    alone = _try_weight(fit, 0.0, table, pause)
    best = _assemble(fit, fit.present, alone)
    pause()
    if not uses_names:
        return best, best
    chosen = alone
    for weight in TEXT_WEIGHTS:
        trial = _try_weight(fit, weight, table, pause)
        if _is_better(alone, trial) and float(trial.losses.sum()) < float(chosen.losses.sum()):
            chosen = trial
    return best, _assemble(fit, fit.present | True, chosen)


def _fit(library: Library, largest: int, pause: Pause) -> LibraryFit:
    rows, classes, counts = library.rows, library.classes, library.counts
    present = counts > 0
    moments = class_moments(rows, classes, counts, pause=pause)
    space = moments.space(counts)
    gaussian = fit_gaussian(space.place(rows, pause=pause), classes, counts, pause=pause)
    names: PlacedNames | None = None
    if library.text is not None:
        names = place_names(space, library.text, library.text_mean, gaussian.placed_means, counts, pause=pause)
        pause()
    named = None if names is None else names.rows @ gaussian.whitener
    pause()
    held = hold_out(gaussian, choose_held_out(counts, classes, largest=largest), pause=pause)
    pause()
    kernel = make_kernel(gaussian, pause=pause)
    pause()
    refitted: Refitted | None = None
    products: HeldOutProducts | None = None
    if len(rows) <= REFIT_UP_TO:
        weights = (0.0,) if names is None else (0.0, *TEXT_WEIGHTS)
        refitted = refit_tables(library, held.chosen, weights, pause=pause)
        table = refitted.kernel
    else:
        used = named if names is not None and names.evidence >= LEAST_EVIDENCE else None
        products = HeldOutProducts(gaussian, held, used, pause=pause)
        table = kernel_table(gaussian, held, kernel, pause=pause)
    return LibraryFit(
        present=present,
        moments=moments,
        space=space,
        gaussian=gaussian,
        names=names,
        named=named,
        held=held,
        row_weights=balanced_weights(held.own, len(counts)),
        refitted=refitted,
        products=products,
        kernel=kernel,
        kernel_table=table,
        kernel_gaps=_gaps(table, present, pause),
    )


def _gaps(table: Array, present: BoolArray, pause: Pause) -> Array:
    """Return (R,) the difference of the best and the median score of each row."""
    gaps, half = np.zeros(len(table)), int(present.sum()) // 2
    for part in parts(*table.shape, pause=pause):
        scores = table[part][:, present]
        if scores.size:
            best = scores.max(axis=1)
            scores.partition(half, axis=1)
            lower = scores[:, half] if 2 * half < scores.shape[1] else scores[:, :half].max(axis=1)
            gaps[part] = best - (lower + scores[:, half]) / 2.0
    return gaps


def _fill_gaussian(fit: LibraryFit, weight: float, table: Array, pause: Pause) -> None:
    """Write leave-one-out Gaussian scores into a table (R, C)."""
    named = fit.named if weight else None
    shrunk = shrink_means(fit.gaussian, named, weight)
    for part in fit.parts(pause):
        if fit.refitted is not None:
            table[part] = fit.refitted.gaussian[weight][part]
        else:
            assert fit.products is not None
            products = fit.products.of(weight, part)
            table[part] = gaussian_table(fit.gaussian, fit.held, shrunk, named, weight, part, products)


def _try_weight(fit: LibraryFit, weight: float, table: Array, pause: Pause) -> Trial:
    """Return the leave-one-out trial of one weight of the names; ``table`` (R, C) is overwritten."""
    own, weights, present = fit.held.own, fit.row_weights, fit.present
    _fill_gaussian(fit, weight, table, pause)
    scale = _scale(_gaps(table, present, pause)) / _scale(fit.kernel_gaps)
    chosen = np.empty((len(SHARES), len(own)), np.int64)
    for part in fit.parts(pause):
        table[part, ~present] = -np.inf
        kernel = scale * fit.kernel_table[part]
        blended = np.empty_like(kernel)
        for at, share in enumerate(SHARES):
            np.multiply(kernel, share, out=blended)
            blended += table[part]
            chosen[at, part] = blended.argmax(axis=1)
    share = _choose_share(chosen == own, weights)
    best = chosen[SHARES.index(share)]
    distances = -2.0 * table[np.arange(len(own)), best]
    for part in fit.parts(pause):
        table[part] += (share * scale) * fit.kernel_table[part]
    typical = TYPICAL_DIMENSIONS / fit.gaussian.ambient / (1.0 + share)
    factor, losses = fit_temperature(table, own, weights, typical=typical, spread=TEMPERATURE_SPREAD, pause=pause)
    return Trial(
        text_weight=weight,
        share=share,
        gaussian_weight=factor,
        kernel_weight=factor * share * scale,
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
        distances=np.zeros(rows),
        losses=np.zeros(rows),
        right=np.zeros(rows),
    )


def _assemble(fit: LibraryFit, competes: BoolArray, trial: Trial) -> Blend:
    named = fit.named if competes.all() else None
    shrunk = shrink_means(fit.gaussian, named, trial.text_weight)
    if named is not None:
        shrunk[~fit.present] = named[~fit.present]
    kernel = replace(fit.kernel, named=None if named is None else unit_rows(named).astype(np.float32))
    return Blend(fit, trial, kernel, shrunk, competes)


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
