"""The prototype set: all that a decision needs, frozen, and as named arrays for the cache."""

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from sortd.arrays import Array, FloatArray, IntArray
from sortd.deciding.calibration import Calibration
from sortd.deciding.gaussian import squared_norms
from sortd.deciding.kernel import Kernel
from sortd.deciding.plain import Plain
from sortd.deciding.strangers import Strangers
from sortd.deciding.support import Abstain, DecisionSettings, Mode

Arrays = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True, eq=False)
class Whitening:
    """How an embedding becomes a point among the classes; float64 but for the kernel."""

    center: Array
    """(d,)"""
    scale: Array
    """(d,)"""
    whitener: Array
    """(d, d)"""
    background: Array
    """(d, d)"""
    background_middle: Array
    """(d,)"""
    kernel_rows: FloatArray
    """float32 (R, d): whitened unit references that vote, sorted by class."""
    kernel_classes: IntArray
    """(R,)"""
    kernel_counts: IntArray
    """(C,): voters of each class."""
    strangers: FloatArray
    """float32 (M, d): whitened unit examples of what belongs to no class."""
    remoteness: FloatArray
    """float32 (N,): distance of each reference to the centre, in the standardised space."""


@dataclass(frozen=True, eq=False)
class Rule:
    """What tells ``best`` and ``mixed`` apart within one whitening."""

    shrunk: Array
    """(C, d): whitened class means, drawn together."""
    named: FloatArray
    """float32 (C, d) whitened unit names, or (0, d)."""
    competes: npt.NDArray[np.bool_]
    """(C,): classes that can be chosen."""
    text_weight: float
    gaussian_weight: float
    kernel_weight: float

    @cached_property
    def shrunk_norms(self) -> Array:
        """(C,): squared lengths of ``shrunk``, without which a decision among many classes takes twice as long."""
        return squared_norms(self.shrunk)

    def kernel(self, whitening: Whitening) -> Kernel:
        """Return the kernel that votes under this rule."""
        return Kernel(
            rows=whitening.kernel_rows,
            chosen=np.arange(len(whitening.kernel_classes)),
            classes=whitening.kernel_classes,
            counts=whitening.kernel_counts,
            named=self.named if len(self.named) else None,
        )


@dataclass(frozen=True, eq=False)
class PrototypeSet:
    """One generation of a dataset's classes; C classes, N references, d dimensions."""

    labels: tuple[str, ...]
    matrix: FloatArray
    """float32 (C, d): the unit mean of each class's references, or the prototype of a name alone, or zero."""
    means: Array
    """float64 (C, d): the mean of each class's references, not of unit length."""
    counts: IntArray
    """int64 (C,): references of each class."""
    generation: int
    encoder_id: str
    fingerprint: str
    settings: DecisionSettings
    calibration: Calibration
    sources: tuple[str, ...]
    """N paths of the references, sorted by class."""
    references: FloatArray
    """float32 (N, d), sorted by class."""
    classes: IntArray
    """int64 (N,), ascending."""
    text: FloatArray
    """float32 (C, d), or (0, d) where names have no embedding."""
    temperature: float
    """Factor from a plain rule's cosines to log probabilities."""
    recall: Array
    """float64 (C,): leave-one-out recall of each class, NaN where none could be left out."""
    whitening: Whitening | None = None
    best: Rule | None = None
    mixed: Rule | None = None
    null: Strangers | None = None
    """Strangers by leaving classes out, where ``strangers`` is a number."""

    @cached_property
    def plain(self) -> Plain:
        """What the plain rules compare with, made once for all decisions."""
        return Plain(
            rows=self.references,
            classes=self.classes,
            counts=self.counts,
            means=self.means,
            text=self.text.astype(np.float64) if len(self.text) else None,
        )

    def to_arrays(self) -> tuple[Arrays, dict[str, Any]]:
        """Return named arrays and JSON-able metadata, enough for ``from_arrays``."""
        arrays: Arrays = {name: getattr(self, name) for name in _OWN_ARRAYS}
        numbers: dict[str, float | int] = {"temperature": self.temperature}
        for prefix, part in (
            ("whitening", self.whitening),
            ("best", self.best),
            ("mixed", None if self.mixed is self.best else self.mixed),
            ("null", self.null),
        ):
            for member in () if part is None else fields(part):
                value = getattr(part, member.name)
                if isinstance(value, np.ndarray):
                    arrays[f"{prefix}.{member.name}"] = value
                else:
                    numbers[f"{prefix}.{member.name}"] = value
        abstain = self.settings.abstain
        metadata: dict[str, Any] = {
            "labels": list(self.labels),
            "sources": list(self.sources),
            "generation": self.generation,
            "encoder_id": self.encoder_id,
            "fingerprint": self.fingerprint,
            "mode": self.settings.mode.value,
            "abstain": None if abstain is None else {"precision": abstain.precision, "strangers": abstain.strangers},
            "calibration": self.calibration.to_json(),
            "numbers": numbers,
            "mixed_is_best": self.mixed is self.best,
        }
        return arrays, metadata

    @classmethod
    def from_arrays(cls, arrays: Arrays, metadata: dict[str, Any]) -> "PrototypeSet":
        """Return the set that ``to_arrays`` took apart.

        Raises:
            KeyError: an array or a fact is missing.
        """
        parts: dict[str, dict[str, Any]] = {"whitening": {}, "best": {}, "mixed": {}, "null": {}}
        for name, value in [*arrays.items(), *metadata["numbers"].items()]:
            prefix, _, member = name.partition(".")
            if member:
                parts[prefix][member] = value
        best = Rule(**parts["best"]) if parts["best"] else None
        mixed = Rule(**parts["mixed"]) if parts["mixed"] else None
        abstain = metadata["abstain"]
        return cls(
            labels=tuple(metadata["labels"]),
            generation=metadata["generation"],
            encoder_id=metadata["encoder_id"],
            fingerprint=metadata["fingerprint"],
            settings=DecisionSettings(Mode(metadata["mode"]), None if abstain is None else Abstain(**abstain)),
            calibration=Calibration.from_json(metadata["calibration"]),
            sources=tuple(metadata["sources"]),
            temperature=metadata["numbers"]["temperature"],
            whitening=Whitening(**parts["whitening"]) if parts["whitening"] else None,
            best=best,
            mixed=best if metadata["mixed_is_best"] else mixed,
            null=Strangers(**parts["null"]) if parts["null"] else None,
            **{name: arrays[name] for name in _OWN_ARRAYS},
        )


_OWN_ARRAYS = ("matrix", "means", "counts", "references", "classes", "text", "recall")
