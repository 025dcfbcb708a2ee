"""The support set: what the user taught, as arrays, and the settings by which it decides."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

import numpy as np

from sortd.arrays import FloatArray, IntArray


class Mode(StrEnum):
    """The rule that turns similarities into one score for each class."""

    AVG = "avg"  # mean cosine to the references of a class
    MAX = "max"  # largest cosine to a reference of a class
    MEAN = "mean"  # cosine to the unit mean of the references
    TEXT = "text"  # cosine to the prototype of the class's name
    BEST = "best"  # whitened Gaussians or kernels over the references, chosen on the references
    MIXED = "mixed"  # best, with the class's name as the prior mean


class ClassifierKind(StrEnum):
    """What decides a dataset's images."""

    PROTOTYPES = "prototypes"  # by one of the modes above
    FINETUNED = "finetuned"  # by the logits of a model that was trained on the dataset's own folders


@dataclass(frozen=True)
class Abstain:
    """How sure a decision must be before an image is filed."""

    precision: float = 0.95
    """The wanted share of right ones among the filed images of known classes, in (0, 1)."""
    strangers: float | Literal["auto"] = "auto"
    """``auto``: gates that known images pass; a number: the share of images of no class that may be filed."""

    def __post_init__(self) -> None:
        """Refuse shares outside of (0, 1).

        Raises:
            ValueError: a share is no share.
        """
        if not 0.0 < self.precision < 1.0:
            raise ValueError(f"abstain.precision is {self.precision}, but must lie between 0 and 1")
        if isinstance(self.strangers, str):
            if self.strangers != "auto":
                raise ValueError(f"abstain.strangers is {self.strangers!r}, but must be auto or a number")
        elif not 0.0 < self.strangers < 1.0:
            raise ValueError(f"abstain.strangers is {self.strangers}, but must lie between 0 and 1")


@dataclass(frozen=True)
class DecisionSettings:
    """By which rule to score and when to abstain; ``abstain=None`` files everything."""

    mode: Mode = Mode.MIXED
    abstain: Abstain | None = Abstain()


@dataclass(frozen=True, eq=False)
class SupportSet:
    """Every reference of a dataset; a class may have images, a name, or both.

    Raises:
        ValueError: an array has a wrong shape, an index out of range, or a value that is not finite.
    """

    labels: tuple[str, ...]
    """The C class names, sorted; a class may have no reference."""
    embeddings: FloatArray
    """float32 (N, d), unit rows."""
    classes: IntArray
    """int64 (N,), indices into ``labels``."""
    sources: tuple[str, ...]
    """N paths, for reports."""
    text: FloatArray | None
    """float32 (C, d) unit rows: the prototype of each class's name; or None."""
    text_mean: FloatArray | None
    """float32 (d,): the mean text embedding of a fixed list of generic nouns, not of unit length; or None."""
    strangers: FloatArray
    """float32 (M, d): examples of what belongs to no class; M may be 0."""
    encoder_id: str
    """The encoder that made every row above."""
    fingerprint: str
    """Identity of contents, encoder and settings."""

    def __post_init__(self) -> None:
        """Check shapes, ranges and finiteness, so that nothing below has to."""
        if self.embeddings.ndim != 2:  # noqa: PLR2004 - a matrix
            raise ValueError(f"reference embeddings have shape {self.embeddings.shape}, not (N, d)")
        count, width = self.embeddings.shape
        if self.classes.shape != (count,) or len(self.sources) != count:
            raise ValueError(f"{count} embeddings have {self.classes.shape} classes and {len(self.sources)} sources")
        if count and not (self.classes.min() >= 0 and self.classes.max() < len(self.labels)):
            raise ValueError(f"a class index lies outside of the {len(self.labels)} labels")
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("a class label occurs twice")
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
