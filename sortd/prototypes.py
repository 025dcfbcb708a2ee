"""Prototypes: a support set becomes a frozen ``PrototypeSet``, and ``decide`` turns embeddings into decisions."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from sortd.support import Abstain, DecisionSettings, FloatArray, IntArray, Mode, SupportSet

__all__ = [
    "Abstain",
    "Abstained",
    "Assigned",
    "Decision",
    "DecisionSettings",
    "Mode",
    "PrototypeSet",
    "SupportSet",
    "build",
    "decide",
    "scores",
]


@dataclass(frozen=True, slots=True)
class Assigned:
    """The image belongs to ``label``."""

    label: str
    score: float
    margin: float
    second_label: str | None
    mode: Mode
    precision: float | None = None
    """Estimated share of right ones among images with this margin or more; None where nothing was calibrated."""


@dataclass(frozen=True, slots=True)
class Abstained:
    """Not sure enough to file; ``reason`` is one of a few stable words."""

    reason: str
    best_label: str | None
    score: float
    margin: float
    second_label: str | None
    mode: Mode
    precision: float | None = None


Decision = Assigned | Abstained


@dataclass(frozen=True, eq=False)
class PrototypeSet:
    """All that a decision needs, frozen: one generation of a dataset's classes."""

    labels: tuple[str, ...]
    matrix: FloatArray
    """float32 (C, d): the unit mean of each class's references, or the text prototype of a name alone."""
    counts: IntArray
    """int64 (C,): references of each class."""
    generation: int
    encoder_id: str
    fingerprint: str
    settings: DecisionSettings
    calibration: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)

    def to_arrays(self) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any]]:
        """Return arrays and JSON-able metadata, enough for ``from_arrays``."""
        settings: dict[str, Any] = {"mode": self.settings.mode.value, "abstain": None}
        if self.settings.abstain is not None:
            settings["abstain"] = {
                "precision": self.settings.abstain.precision,
                "strangers": self.settings.abstain.strangers,
            }
        metadata = {
            "labels": list(self.labels),
            "generation": self.generation,
            "encoder_id": self.encoder_id,
            "fingerprint": self.fingerprint,
            "settings": settings,
            "calibration": self.calibration,
        }
        return {"matrix": self.matrix, "counts": self.counts, **self.arrays}, metadata

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray[Any, Any]], metadata: dict[str, Any]) -> "PrototypeSet":
        """Return the set that ``to_arrays`` took apart."""
        abstain = metadata["settings"]["abstain"]
        settings = DecisionSettings(
            mode=Mode(metadata["settings"]["mode"]),
            abstain=None if abstain is None else Abstain(**abstain),
        )
        return cls(
            labels=tuple(metadata["labels"]),
            matrix=arrays["matrix"],
            counts=arrays["counts"],
            generation=metadata["generation"],
            encoder_id=metadata["encoder_id"],
            fingerprint=metadata["fingerprint"],
            settings=settings,
            calibration=metadata["calibration"],
            arrays={name: array for name, array in arrays.items() if name not in {"matrix", "counts"}},
        )


def build(support: SupportSet, settings: DecisionSettings, *, generation: int) -> PrototypeSet:
    """Return the prototypes of a support set."""
    count, width = len(support.labels), support.embeddings.shape[1]
    counts = np.bincount(support.classes, minlength=count).astype(np.int64)
    sums = np.zeros((count, width))
    np.add.at(sums, support.classes, support.embeddings.astype(np.float64))
    means = sums / np.maximum(counts, 1)[:, None]
    matrix = means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
    if support.text is not None:
        matrix[counts == 0] = support.text[counts == 0]
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "means": means,
        "references": support.embeddings,
        "classes": support.classes,
    }
    if support.text is not None:
        arrays["text"] = support.text
    return PrototypeSet(
        labels=support.labels,
        matrix=matrix.astype(np.float32),
        counts=counts,
        generation=generation,
        encoder_id=support.encoder_id,
        fingerprint=support.fingerprint,
        settings=settings,
        arrays=arrays,
    )


def scores(prototypes: PrototypeSet, embeddings: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return (B, C) scores of the mode; -inf where a class cannot compete."""
    queries = np.asarray(embeddings, dtype=np.float64)
    width = prototypes.matrix.shape[1]
    if queries.ndim != 2 or queries.shape[1] != width:  # noqa: PLR2004 - a matrix
        raise ValueError(f"embeddings have shape {queries.shape}, not (B, {width})")
    broken = np.flatnonzero(~np.isfinite(queries).all(axis=1))
    if broken.size:
        raise ValueError(f"embedding {broken[0]} of the batch holds a value that is not finite")
    arrays = prototypes.arrays
    empty = prototypes.counts == 0
    match prototypes.settings.mode:
        case Mode.AVG:
            result = queries @ arrays["means"].T
            result[:, empty] = -np.inf
        case Mode.MAX:
            result = np.full((len(queries), len(prototypes.labels)), -np.inf)
            similarities = queries @ arrays["references"].T.astype(np.float64)
            for index in range(len(prototypes.labels)):
                if not empty[index]:
                    result[:, index] = similarities[:, arrays["classes"] == index].max(axis=1)
        case Mode.TEXT if "text" in arrays:
            result = queries @ arrays["text"].T.astype(np.float64)
        case _:
            result = queries @ prototypes.matrix.T.astype(np.float64)
            if "text" not in arrays:
                result[:, empty] = -np.inf
    return result


def decide(prototypes: PrototypeSet, embeddings: npt.ArrayLike) -> list[Decision]:
    """Return one decision for each row of ``embeddings`` (B, d)."""
    mode = prototypes.settings.mode
    table = scores(prototypes, embeddings)
    decisions: list[Decision] = []
    for row in table:
        order = np.argsort(-row, kind="stable")
        if not order.size or not np.isfinite(row[order[0]]):
            decisions.append(Abstained("no_classes", None, 0.0, 0.0, None, mode))
            continue
        best = int(order[0])
        second = int(order[1]) if order.size > 1 and np.isfinite(row[order[1]]) else None
        margin = float(row[best] - row[second]) if second is not None else float(row[best])
        name = None if second is None else prototypes.labels[second]
        decisions.append(Assigned(prototypes.labels[best], float(row[best]), margin, name, mode))
    return decisions
