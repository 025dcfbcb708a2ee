"""The input of the classifiers: settings and the support set."""

from dataclasses import dataclass, field
from math import floor, log
from typing import Literal

import numpy as np

from sortd.arrays import FloatArray, IntArray
from sortd.events import ClassifierKind, Mode

BLENDED = frozenset({Mode.BEST, Mode.MIXED})
PROBABILISTIC = frozenset({Mode.BEST, Mode.MIXED, ClassifierKind.FINETUNED})
"""Modes whose scores are probabilities; the scores of the others are cosines."""


FEWEST_FOR_ONE_CLASS = 4
"""Least number of held-out references with which a library of one class files images."""


@dataclass(frozen=True)
class AbstainSettings:
    """Requirements for filing an image."""

    precision: float = 0.95  # wanted share of correct decisions among the filed images of known classes
    strangers: float | Literal["auto"] = "auto"  # auto: familiarity gate; a number: largest share of strangers filed

    def __post_init__(self) -> None:
        """Raise ValueError if a share lies outside (0, 1)."""
        if not 0.0 < self.precision < 1.0:
            raise ValueError(f"abstain.precision is {self.precision}, but must lie between 0 and 1")
        if isinstance(self.strangers, str):
            if self.strangers != "auto":
                raise ValueError(f"abstain.strangers is {self.strangers!r}, but must be auto or a number")
        elif not 0.0 < self.strangers < 1.0:
            raise ValueError(f"abstain.strangers is {self.strangers}, but must lie between 0 and 1")


@dataclass(frozen=True)
class DecisionSettings:
    """The mode, and when to abstain; ``abstain=None`` files everything."""

    mode: Mode = Mode.MIXED
    abstain: AbstainSettings | None = AbstainSettings()


ENOUGH_CHECKED = 100
"""Checked images from which on they decide the threshold."""
STEP_OF_EVIDENCE = 1.2
"""Growth of the checked images, or of the wrong ones, after which the prototypes are built again for it."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """Filed images that a person has checked, at least ENOUGH_CHECKED."""

    confidence: tuple[float, ...]
    right: tuple[bool, ...]
    weight: tuple[float, ...]
    is_random: bool  # from random samples; otherwise images that a person has not objected to count as right

    @property
    def steps(self) -> tuple[int, int, bool]:
        """The number of images and of wrong ones in coarse steps, for the fingerprint."""
        wrong = len(self.right) - sum(self.right)
        sizes = (len(self.right), wrong + 10)
        checked, wrong = (floor(log(size) / log(STEP_OF_EVIDENCE)) for size in sizes)
        return checked, wrong, self.is_random


@dataclass(frozen=True, eq=False)
class SupportSet:
    """The references of a dataset; a class may have images, a name, or both."""

    labels: tuple[str, ...]  # C class names, sorted; a class may have no reference
    embeddings: FloatArray  # (N, d), unit rows
    classes: IntArray  # (N,), indices into labels
    sources: tuple[str, ...]  # N paths
    encoder_id: str  # the encoder of all embeddings
    text: FloatArray | None = None  # (C, d) unit rows: the prototype of each class's name
    text_mean: FloatArray | None = None  # (d,): mean embedding of GENERIC_NOUNS, not of unit length
    strangers: FloatArray = field(default_factory=lambda: np.zeros((0, 0), np.float32))  # (M, d): images of no class
    fingerprint: str = ""  # hash of contents, encoder and settings
    evidence: Evidence | None = None  # filed images that a person has checked

    def __post_init__(self) -> None:
        """Raise ValueError for a wrong shape, an index out of range, or a value that is not finite."""
        if self.embeddings.ndim != 2:  # noqa: PLR2004 - a matrix
            raise ValueError(f"reference embeddings have shape {self.embeddings.shape}, not (N, d)")
        count, width = self.embeddings.shape
        if self.classes.shape != (count,) or len(self.sources) != count:
            raise ValueError(f"{count} embeddings have {self.classes.shape} classes and {len(self.sources)} sources")
        if count and not (self.classes.min() >= 0 and self.classes.max() < len(self.labels)):
            raise ValueError(f"a class index lies outside of the {len(self.labels)} labels")
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("a class label occurs twice")
        if not len(self.strangers):
            object.__setattr__(self, "strangers", np.zeros((0, width), np.float32))
        _check("strangers", self.strangers, (len(self.strangers), width))
        _check("text", self.text, (len(self.labels), width))
        _check("text_mean", self.text_mean, (width,))
        broken = np.flatnonzero(~np.isfinite(self.embeddings).all(axis=1))
        if broken.size:
            raise ValueError(f"the embedding of {self.sources[broken[0]]} holds a value that is not finite")


def _check(name: str, array: FloatArray | None, shape: tuple[int, ...]) -> None:
    if array is None:
        return
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}, not {shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds a value that is not finite")
