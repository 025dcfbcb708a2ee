"""The rules ``best`` and ``mixed``: a Gaussian and a kernel over the references, weighed by leave-one-out."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sortd.confidence import balanced_weights, fit_temperature
from sortd.gaussian import Gaussian, Space, fit_gaussian, fit_space, shrink_means, squared_distances
from sortd.kernel import Kernel, kernel_scores, make_kernel
from sortd.leaveoneout import LARGEST_ROWS, HeldOut, choose_held_out, gaussian_table, hold_out, kernel_table
from sortd.refitting import REFIT_UP_TO, refit_tables
from sortd.text_prototypes import Names, place_names, placed_means

Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

SHARES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""How much the kernel may weigh against the Gaussian: little, unless leave-one-out says more by a standard error.
Leave-one-out flatters the kernel, since references resemble each other more than what arrives resembles them."""
TEXT_WEIGHTS = (0.5, 1.0, 2.0, 4.0)
"""How many references a name may count as (kT), besides none."""
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
    is_refitted: bool
    """Whether leave-one-out was brute force, of which no background distances are known."""

    def logits(self, whitened: Array) -> Array:
        """Return (B, C) log probabilities up to a constant for whitened rows (B, d); -inf for absent classes."""
        result = -0.5 * self.gaussian_weight * squared_distances(whitened, self.shrunk)
        if self.kernel_weight:
            result += self.kernel_weight * kernel_scores(whitened, self.kernel)
        result[:, ~self.competes] = -np.inf
        return np.asarray(result, dtype=np.float64)


@dataclass(frozen=True, eq=False)
class _Tables:
    gaussian: Array
    kernel: Array


@dataclass(frozen=True, eq=False)
class _Scored:
    table: Array
    distances: Array


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

    def tables(self, weight: float) -> _Tables:
        """Return leave-one-out tables: by refitting where that is cheap, else by algebra."""
        library = self.library
        if len(library.rows) <= REFIT_UP_TO:
            text = (library.text, library.text_mean) if library.text is not None and weight else None
            return _Tables(*refit_tables(library.rows, library.classes, library.counts, self.held.chosen, text, weight))
        named = self.named if weight else None
        shrunk = shrink_means(self.gaussian, named, weight)
        kernel = make_kernel(self.gaussian, named=named, weight=weight)
        return _Tables(
            gaussian_table(self.gaussian, self.held, shrunk, named, weight),
            kernel_table(self.gaussian, self.held, kernel),
        )


def fit_blends(library: Library, *, largest: int = LARGEST_ROWS) -> tuple[Blend, Blend]:
    """Return the rules ``best`` and ``mixed`` of a library of at least one reference; without names they are one.

    At most ``largest`` references are left out, evenly from all classes.
    """
    fitter = _Fitter(library, largest)
    present = library.counts > 0
    has_voice = fitter.names is not None and fitter.names.evidence >= LEAST_EVIDENCE
    own = fitter.held.own
    typical = TYPICAL_DIMENSIONS / fitter.gaussian.ambient
    if not len(own) or present.sum() < 2:  # noqa: PLR2004 - nothing to choose between
        scores = _Scored(np.where(present, np.zeros((len(own), 1)), -np.inf), np.zeros(len(own)))
        best = _assemble(fitter, present, 0.0, 0.0, (typical, 0.0), scores)
        if not has_voice:
            return best, best
        return best, _assemble(fitter, present | True, 1.0, 0.0, (typical, 0.0), scores)
    weights = balanced_weights(own, len(present))
    tables = fitter.tables(0.0)
    unit_scale = _scale(tables.gaussian[:, present]) / _scale(tables.kernel[:, present])
    share = _choose_share(tables, unit_scale, present, own, weights)
    mixture = share * unit_scale
    typical /= 1.0 + share

    def weigh(found: _Tables) -> tuple[Array, float, Array]:
        table = _absent(found.gaussian + mixture * found.kernel, present)
        return table, *fit_temperature(table, own, weights, typical=typical, spread=TEMPERATURE_SPREAD)

    table, factor, losses = weigh(tables)
    best = _assemble(fitter, present, 0.0, share, (factor, factor * mixture), _score(table, factor, tables))
    if not has_voice:
        return best, best
    right, least, text_weight = table.argmax(axis=1) == own, float(losses @ weights), 0.0
    for weight in TEXT_WEIGHTS:
        found = fitter.tables(weight)
        other, tried, other_losses = weigh(found)
        better = _is_better(losses, other_losses, right, other.argmax(axis=1) == own, weights)
        if better and float(other_losses @ weights) < least:
            least, text_weight, factor, table, tables = float(other_losses @ weights), weight, tried, other, found
    scores = _score(table, factor, tables)
    return best, _assemble(fitter, present | True, text_weight, share, (factor, factor * mixture), scores)


def _assemble(
    fitter: _Fitter,
    competes: npt.NDArray[np.bool_],
    text_weight: float,
    share: float,
    weights: tuple[float, float],
    scores: _Scored,
) -> Blend:
    voices = fitter.named if competes.all() else None
    shrunk = shrink_means(fitter.gaussian, voices, text_weight)
    if voices is not None:
        absent = fitter.gaussian.counts == 0
        shrunk[absent] = voices[absent]
    return Blend(
        space=fitter.space,
        gaussian=fitter.gaussian,
        kernel=make_kernel(fitter.gaussian, named=fitter.named, weight=text_weight),
        names=fitter.names,
        text_weight=text_weight,
        shrunk=shrunk,
        share=share,
        gaussian_weight=weights[0],
        kernel_weight=weights[1],
        competes=competes,
        held=fitter.held,
        table=scores.table,
        distances=scores.distances,
        is_refitted=len(fitter.library.rows) <= REFIT_UP_TO,
    )


def _choose_share(
    tables: _Tables, unit_scale: float, present: npt.NDArray[np.bool_], own: IntArray, weights: Array
) -> float:
    """Return the smallest share whose accuracy is within a standard error of the best share's."""
    rights = [
        weights * (_absent(tables.gaussian + share * unit_scale * tables.kernel, present).argmax(axis=1) == own)
        for share in SHARES
    ]
    best = max(rights, key=np.sum)
    for share, right in zip(SHARES, rights, strict=True):
        lost = best - right
        if float(lost.mean()) <= float(lost.std()) / np.sqrt(len(lost)):
            return share
    return SHARES[-1]


def _score(table: Array, factor: float, tables: _Tables) -> _Scored:
    best = table.argmax(axis=1)
    return _Scored(factor * table, -2.0 * tables.gaussian[np.arange(len(best)), best])


def _absent(table: Array, present: npt.NDArray[np.bool_]) -> Array:
    return np.where(present, table, -np.inf)


def _scale(table: Array) -> float:
    gaps = table.max(axis=1) - np.median(table, axis=1)
    return max(float(np.median(gaps)), 1e-9)


def _is_better(
    losses: Array,
    others: Array,
    right: npt.NDArray[np.bool_],
    rights: npt.NDArray[np.bool_],
    weights: Array,
) -> bool:
    """Return whether the names lower the log loss by more than chance, and the accuracy not at all."""
    gains = (losses - others) * weights
    error = float(gains.std()) / np.sqrt(len(gains))
    return float(gains.mean()) > error and float(weights @ rights) >= float(weights @ right)
