"""An evaluation: what leave-one-out tells of a library, as frozen facts."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ModeReport:
    """How one mode does; shares are in 0 to 1."""

    mode: str
    judged: int
    """References that could be left out: those of classes with two or more."""
    right: int
    accuracy: float | None
    """Share of right ones, each reference left out by itself."""
    balanced_accuracy: float | None
    """The same with every class counting once."""
    distinct_accuracy: float | None
    """Balanced, with all near-duplicates of a reference left out together: what new images can expect."""
    distinct_judged: int
    """References that it was judged on: near-duplicates count as one."""
    curve: tuple[tuple[float, float, float], ...]
    """Coverage against precision: (least confidence, share filed, precision)."""


@dataclass(frozen=True)
class ClassReport:
    """One class under the mode in force."""

    label: str
    references: int
    distinct: int
    """References after near-duplicates became one."""
    recall: float | None
    """Share of its references that were recognised; None where none could be left out."""
    judged: int
    """References of it that could be left out."""
    precision: float | None
    """Share of its own among what was taken for it; None where nothing was."""
    confused_with: str | None
    """The class that takes most of its images."""
    needs_images: str | None
    """Why it needs more images, as a few words; None where it has enough."""


@dataclass(frozen=True)
class Suspect:
    """One reference worth a look."""

    kind: str
    """``mislabelled``, ``duplicate`` (one picture in two classes) or ``outlier`` (unlike the rest of its class)."""
    source: str
    label: str
    other_label: str | None
    """The class that it looks like, or that holds its double."""
    other_source: str | None
    """Its double."""
    score: float
    """Probability of the other class, cosine to the double, or cosine to its own class."""


@dataclass(frozen=True)
class TradeOff:
    """What a wanted precision costs."""

    precision: float
    filed: float
    expected: float | None
    is_attained: bool


@dataclass(frozen=True)
class Advice:
    """Which mode and settings to use, and why."""

    mode: str
    precision: float
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class EvaluationReport:
    """All of it."""

    encoder_id: str
    classes: int
    references: int
    distinct: int
    mode: str
    """The mode in force, of which classes, confusion and trade-offs tell."""
    modes: tuple[ModeReport, ...]
    class_reports: tuple[ClassReport, ...]
    confusion: tuple[tuple[str, str, int], ...]
    """(class, taken for, how many), the mistakes first, largest first."""
    trade_offs: tuple[TradeOff, ...]
    suspects: tuple[Suspect, ...]
    half_accuracy: float | None
    """Balanced accuracy on one half of the references when only the other half is there."""
    whole_accuracy: float | None
    """Distinct accuracy of the same rule with all of them."""
    is_labelled_enough: bool | None
    """Whether doubling the references still helped little."""
    advice: Advice
    calibration: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able mapping with every field."""
        return asdict(self)
