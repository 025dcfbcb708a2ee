"""The classifiers of a dataset: a prototype set, or a fine-tuned model."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np

from sortd.arrays import Array, BoolArray, FloatArray, IntArray
from sortd.classify.calibration import Calibration
from sortd.classify.gaussian import Space, squared_norms
from sortd.classify.kernel import Kernel, Plain
from sortd.classify.open_set import Strangers
from sortd.classify.types import AbstainSettings, DecisionSettings
from sortd.events import Mode

Arrays = dict[str, np.ndarray[Any, Any]]
NAMES_SAID = 5
"""Largest number of classes that a message names."""


@dataclass(frozen=True, eq=False)
class Whitening:
    """The whitened space, and the references and strangers in it."""

    center: Array  # (d,)
    scale: Array  # (d,)
    whitener: Array  # (d, d)
    background: Array  # (d, d)
    background_middle: Array  # (d,)
    kernel_rows: FloatArray  # (R, d): whitened unit references of the kernel, sorted by class
    kernel_classes: IntArray  # (R,)
    kernel_counts: IntArray  # (C,): rows of each class
    strangers: FloatArray  # (M, d): whitened unit images of no class
    remoteness: FloatArray  # (N,): distance of each reference to the centre, in the standardised space

    @cached_property
    def space(self) -> Space:
        """The standardised space."""
        return Space(self.center, self.scale)


@dataclass(frozen=True, eq=False)
class BlendRule:
    """The parameters of ``best`` or ``mixed`` in a whitened space."""

    shrunk: Array  # (C, d): whitened, shrunk class means
    named: FloatArray  # (C, d) whitened unit names, or (0, d)
    competes: BoolArray  # (C,): classes that can be chosen
    text_weight: float
    gaussian_weight: float
    kernel_weight: float

    @cached_property
    def shrunk_norms(self) -> Array:
        """(C,): squared lengths of ``shrunk``; cached, since they take half of a decision among many classes."""
        return squared_norms(self.shrunk)

    def kernel(self, whitening: Whitening) -> Kernel:
        """Return the kernel of this rule."""
        return Kernel(
            rows=whitening.kernel_rows,
            chosen=np.arange(len(whitening.kernel_classes)),
            classes=whitening.kernel_classes,
            counts=whitening.kernel_counts,
            named=self.named if len(self.named) else None,
        )


_OWN_ARRAYS = ("matrix", "means", "counts", "references", "classes", "added", "text", "recall")
_PARTS = {"whitening": Whitening, "best": BlendRule, "mixed": BlendRule, "null": Strangers}


@dataclass(frozen=True, eq=False)
class PrototypeSet:
    """One generation of the prototypes of a dataset; C classes, N references, d dimensions."""

    labels: tuple[str, ...]
    matrix: FloatArray  # (C, d): unit mean of the references of each class; else the prototype of its name, or zero
    means: Array  # (C, d): mean of the references of each class
    counts: IntArray  # (C,): references of each class
    generation: int
    encoder_id: str
    fingerprint: str
    settings: DecisionSettings
    calibration: Calibration
    sources: tuple[str, ...]  # N paths of the references, sorted by class
    references: FloatArray  # (N, d), sorted by class
    classes: IntArray  # (N,), ascending
    added: IntArray  # (N,): generation that added each reference; 0 if it is not known
    text: FloatArray  # (C, d), or (0, d) without text embeddings
    temperature: float  # factor from the cosines of a plain mode to log probabilities
    recall: Array  # (C,): leave-one-out recall; NaN if no reference could be left out
    whitening: Whitening | None = None
    best: BlendRule | None = None
    mixed: BlendRule | None = None
    null: Strangers | None = None  # stranger scores, if the setting ``strangers`` is a number

    @cached_property
    def plain(self) -> Plain:
        """The references as the plain modes use them."""
        text = self.text.astype(np.float64) if len(self.text) else None
        return Plain(self.references, self.classes, self.counts, self.means, text)

    def with_history(self, previous: "PrototypeSet | None") -> "PrototypeSet":
        """Return the set with ``added`` from an earlier generation; a reference that it lacks is added by this one.

        A class under a new name, whose old one is gone, keeps its references.
        """
        if previous is None or previous.encoder_id != self.encoder_id:
            return self
        then = zip(previous.classes, previous.references, previous.added, strict=True)
        known = {(previous.labels[label], row.tobytes()): int(added) for label, row, added in then}
        gone, fresh = set(previous.labels) - set(self.labels), set(self.labels) - set(previous.labels)
        renamed = {row: added for (label, row), added in known.items() if label in gone}
        for label, row in zip(self.classes, self.references, strict=True) if renamed else ():
            if self.labels[label] in fresh and row.tobytes() in renamed:
                known[self.labels[label], row.tobytes()] = renamed[row.tobytes()]
        rows = zip(self.classes, self.references, strict=True)
        added = [known.get((self.labels[label], row.tobytes()), self.generation) for label, row in rows]
        return replace(self, added=np.array(added, np.int64))

    def to_arrays(self) -> tuple[Arrays, dict[str, Any]]:
        """Return named arrays and JSON-able metadata for ``from_arrays``."""
        arrays: Arrays = {name: getattr(self, name) for name in _OWN_ARRAYS}
        numbers: dict[str, float | int] = {"temperature": self.temperature}
        for prefix in _PARTS:
            part = None if prefix == "mixed" and self.mixed is self.best else getattr(self, prefix)
            for member in () if part is None else fields(part):
                value = getattr(part, member.name)
                (arrays if isinstance(value, np.ndarray) else numbers)[f"{prefix}.{member.name}"] = value
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
        """Return the set from the result of ``to_arrays``, or raise KeyError if an item is missing."""
        members: dict[str, dict[str, Any]] = {prefix: {} for prefix in _PARTS}
        for name, value in [*arrays.items(), *metadata["numbers"].items()]:
            prefix, _, member = name.partition(".")
            if member:
                members[prefix][member] = value
        made: dict[str, Any] = {name: arrays[name] for name in _OWN_ARRAYS}
        made |= {prefix: kind(**members[prefix]) for prefix, kind in _PARTS.items() if members[prefix]}
        if metadata["mixed_is_best"]:
            made["mixed"] = made.get("best")
        abstain = metadata["abstain"]
        return cls(
            labels=tuple(metadata["labels"]),
            generation=metadata["generation"],
            encoder_id=metadata["encoder_id"],
            fingerprint=metadata["fingerprint"],
            settings=DecisionSettings(Mode(metadata["mode"]), None if abstain is None else AbstainSettings(**abstain)),
            calibration=Calibration.from_json(metadata["calibration"]),
            sources=tuple(metadata["sources"]),
            temperature=metadata["numbers"]["temperature"],
            **made,
        )


@dataclass(frozen=True, eq=False)
class FinetunedClassifier:
    """A classifier of logits by softmax(logits / temperature) (Guo et al. 2017)."""

    labels: tuple[str, ...]  # the class of each logit
    temperature: float
    encoder_id: str  # identity of the model, in cache and log
    generation: int
    calibration: Calibration
    abstain: AbstainSettings | None  # None files everything

    def __post_init__(self) -> None:
        """Raise ValueError if the temperature is not positive or there are fewer than two different labels."""
        if not self.temperature > 0 or not np.isfinite(self.temperature):
            raise ValueError(f"the temperature is {self.temperature}, but must be above zero")
        if len(set(self.labels)) != len(self.labels) or len(self.labels) < 2:  # noqa: PLR2004 -- a choice
            raise ValueError(f"{len(self.labels)} labels, but a classifier needs two or more, each once")


Classifier = PrototypeSet | FinetunedClassifier
"""Both have ``labels``, ``encoder_id``, ``generation`` and ``calibration``."""


def describe_label_mismatch(known: Sequence[str], present: Sequence[str]) -> str | None:
    """Return the difference between the labels of a model and the class folders in words; None if they are equal."""
    added, removed = sorted(set(present) - set(known)), sorted(set(known) - set(present))
    parts = []
    if added:
        parts.append(f"Clases/ has {_named(added)}, which the model does not know")
    if removed:
        parts.append(f"the model knows {_named(removed)}, which Clases/ does not have")
    return "; ".join(parts) or None


def _named(labels: Sequence[str]) -> str:
    shown = [repr(label) for label in labels[:NAMES_SAID]]
    if len(labels) > NAMES_SAID:
        shown.append(f"{len(labels) - NAMES_SAID} more")
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
