"""What decides a dataset's images: a prototype set, or the fine-tuned model that was promoted."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np

from sortd.arrays import Array, BoolArray, FloatArray, IntArray
from sortd.classify.calibration import Calibration, HeldOutOutcomes, calibrate_outcomes
from sortd.classify.gaussian import Space, squared_norms
from sortd.classify.kernel import Kernel, Plain
from sortd.classify.open_set import Strangers
from sortd.classify.types import AbstainSettings, DecisionSettings, Mode

Arrays = dict[str, np.ndarray[Any, Any]]
NAMES_SAID = 5
"""Of classes that differ, how many a sentence names."""


@dataclass(frozen=True, eq=False)
class Whitening:
    """How an embedding becomes a point among the classes."""

    center: Array  # (d,)
    scale: Array  # (d,)
    whitener: Array  # (d, d)
    background: Array  # (d, d)
    background_middle: Array  # (d,)
    kernel_rows: FloatArray  # (R, d): whitened unit references that vote, sorted by class
    kernel_classes: IntArray  # (R,)
    kernel_counts: IntArray  # (C,): voters of each class
    strangers: FloatArray  # (M, d): whitened unit examples of what belongs to no class
    remoteness: FloatArray  # (N,): distance of each reference to the centre, in the standardised space

    @cached_property
    def space(self) -> Space:
        """The standardised space."""
        return Space(self.center, self.scale)


@dataclass(frozen=True, eq=False)
class BlendRule:
    """What tells ``best`` and ``mixed`` apart within one whitening."""

    shrunk: Array  # (C, d): whitened class means, shrunk to the common mean
    named: FloatArray  # (C, d) whitened unit names, or (0, d)
    competes: BoolArray  # (C,): classes that can be chosen
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


_OWN_ARRAYS = ("matrix", "means", "counts", "references", "classes", "text", "recall")
_PARTS = {"whitening": Whitening, "best": BlendRule, "mixed": BlendRule, "null": Strangers}


@dataclass(frozen=True, eq=False)
class PrototypeSet:
    """One generation of a dataset's classes; C classes, N references, d dimensions."""

    labels: tuple[str, ...]
    matrix: FloatArray  # (C, d): the unit mean of each class's references, or the prototype of a name alone, or zero
    means: Array  # (C, d): the mean of each class's references, not of unit length
    counts: IntArray  # (C,): references of each class
    generation: int
    encoder_id: str
    fingerprint: str
    settings: DecisionSettings
    calibration: Calibration
    sources: tuple[str, ...]  # N paths of the references, sorted by class
    references: FloatArray  # (N, d), sorted by class
    classes: IntArray  # (N,), ascending
    text: FloatArray  # (C, d), or (0, d) where names have no embedding
    temperature: float  # factor from a plain rule's cosines to log probabilities
    recall: Array  # (C,): leave-one-out recall of each class, NaN where none could be left out
    whitening: Whitening | None = None
    best: BlendRule | None = None
    mixed: BlendRule | None = None
    null: Strangers | None = None  # strangers by leaving classes out, where the setting is a number

    @cached_property
    def plain(self) -> Plain:
        """What the plain rules compare with, made once for all decisions."""
        text = self.text.astype(np.float64) if len(self.text) else None
        return Plain(self.references, self.classes, self.counts, self.means, text)

    def to_arrays(self) -> tuple[Arrays, dict[str, Any]]:
        """Return named arrays and JSON-able metadata, enough for ``from_arrays``."""
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
        """Return the set that ``to_arrays`` took apart.

        Raises:
            KeyError: an array or a fact is missing.
        """
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
    """What turns rows of logits into decisions for one dataset, by softmax(row / temperature) (Guo et al. 2017).

    Raises:
        ValueError: the temperature is not above zero, or there are no two classes.
    """

    labels: tuple[str, ...]  # the class of each logit, in the model's order
    temperature: float  # what logits are divided by before the softmax
    encoder_id: str  # the model's identity, by which its rows are cached and its decisions logged
    generation: int
    calibration: Calibration
    abstain: AbstainSettings | None  # None files everything

    def __post_init__(self) -> None:
        """Check temperature and labels."""
        if not self.temperature > 0 or not np.isfinite(self.temperature):
            raise ValueError(f"the temperature is {self.temperature}, but must be above zero")
        if len(set(self.labels)) != len(self.labels) or len(self.labels) < 2:  # noqa: PLR2004 -- a choice
            raise ValueError(f"{len(self.labels)} labels, but a classifier needs two or more, each once")

    def serving(self, generation: int) -> "FinetunedClassifier":
        """Return it under the number of the generation that it serves in."""
        return replace(self, generation=generation)


Classifier = PrototypeSet | FinetunedClassifier
"""Both have ``labels``, ``encoder_id`` (of the rows that they take), ``generation`` and ``calibration``."""


def build_classifier(
    labels: Sequence[str],
    *,
    temperature: float,
    encoder_id: str,
    outcomes: HeldOutOutcomes,
    abstain: AbstainSettings | None,
    generation: int,
) -> FinetunedClassifier:
    """Return a fine-tuned classifier that abstains as the held-out outcomes and the settings ask.

    Raises:
        ValueError: the labels or the temperature cannot serve.
    """
    calibration = calibrate_outcomes(outcomes, abstain, classes=len(labels))
    return FinetunedClassifier(tuple(labels), temperature, encoder_id, generation, calibration, abstain)


def describe_label_mismatch(known: Sequence[str], present: Sequence[str]) -> str | None:
    """Return how the labels of a model differ from the class folders that are present, or None where they do not."""
    added, removed = sorted(set(present) - set(known)), sorted(set(known) - set(present))
    said = []
    if added:
        said.append(f"Clases/ has {_named(added)}, which the model does not know")
    if removed:
        said.append(f"the model knows {_named(removed)}, which Clases/ has not")
    return "; ".join(said) or None


def _named(labels: Sequence[str]) -> str:
    shown = [repr(label) for label in labels[:NAMES_SAID]]
    if len(labels) > NAMES_SAID:
        shown.append(f"{len(labels) - NAMES_SAID} more")
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
