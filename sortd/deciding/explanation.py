"""An explanation: why one image is decided the way it is, as plain facts and as sentences."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sortd.deciding.decision import Abstained, Assigned, Decision, closeness, decide, judge, looks_of, stranger_shares
from sortd.deciding.gaussian import MEAN_SHRINKAGE
from sortd.deciding.prompts import written_name
from sortd.deciding.support import ClassifierKind, Mode
from sortd.prototypes import PrototypeSet

NEIGHBOURS = 5
"""How many of the nearest references are told."""

REASONS = {
    "no_classes": "there is no class to choose from",
    "name_only": "the likeliest class is known by its name alone, which is not enough to file by",
    "too_few": "there is one class only, with too few references to tell what does not belong to it",
    "stranger": "it looks as much like what belongs to no class",
    "typicality": "it is unlike the references of the likeliest class: maybe it belongs to none",
    "margin": "another class is too near to be sure",
}


PROBABLE = frozenset({Mode.BEST.value, Mode.MIXED.value, ClassifierKind.FINETUNED.value})
"""What scores by probabilities, not by cosines."""


@dataclass(frozen=True, slots=True)
class ClassScore:
    """How one class fares."""

    label: str
    score: float
    """Cosine, or for best, mixed and a fine-tuned model the probability."""
    references: int
    nearest: float | None
    """Cosine to its nearest reference; None where it has none."""


@dataclass(frozen=True, slots=True)
class Neighbour:
    """One reference near the image."""

    path: str
    label: str
    similarity: float
    """Cosine."""


@dataclass(frozen=True, slots=True)
class Threshold:
    """One condition for filing: what was reached and what is asked."""

    name: str  # confidence, familiarity, strangers
    value: float
    asked: float
    passed: bool


@dataclass(frozen=True, slots=True)
class OtherMode:
    """What another mode would have chosen; it is not calibrated, so whether it would have filed is not known."""

    mode: str
    label: str | None
    score: float
    margin: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """Everything about one decision."""

    decision: Decision
    scores: tuple[ClassScore, ...]
    """The likeliest first; classes that cannot win are left out."""
    neighbours: tuple[Neighbour, ...]
    thresholds: tuple[Threshold, ...]
    text_share: float
    """How much of the winner's prototype comes from its name, from 0 to 1."""
    others: tuple[OtherMode, ...]
    generation: int
    encoder_id: str
    mode: str
    held_out: int
    """Images that were left out of what was learnt, by which ``decision.precision`` was judged."""

    @property
    def is_filed(self) -> bool:
        """Tell whether the image is sure enough to be filed."""
        return isinstance(self.decision, Assigned)

    @property
    def label(self) -> str | None:
        """The class chosen, or the best guess."""
        return self.decision.label if isinstance(self.decision, Assigned) else self.decision.best_label


def explain(prototypes: PrototypeSet, embedding: npt.ArrayLike) -> Explanation:
    """Explain the decision on one embedding, a unit row (d,).

    Raises:
        ValueError: it has another shape, or a value that is not finite.
    """
    row = np.asarray(embedding, np.float64)[None]
    (decision,) = decide(prototypes, row)
    return Explanation(
        decision=decision,
        scores=_scores(prototypes, row),
        neighbours=_neighbours(prototypes, row[0]),
        thresholds=_thresholds(prototypes, row),
        text_share=_text_share(prototypes, decision),
        others=_others(prototypes, row),
        generation=prototypes.generation,
        encoder_id=prototypes.encoder_id,
        mode=prototypes.settings.mode.value,
        held_out=prototypes.calibration.held_out,
    )


def sentences(explanation: Explanation) -> list[str]:
    """Say it in sentences, the decision first."""
    decision, label = explanation.decision, explanation.label
    if label is None:
        return [f"It would stay undecided: {REASONS['no_classes']}."]
    said = [_verdict(explanation, label)]
    unit = "probability" if explanation.mode in PROBABLE else "cosine"
    second = "" if decision.second_label is None else f", {written_name(decision.second_label)} comes second"
    said.append(f"{written_name(label)} has a {unit} of {decision.score:.3f}{second}, {decision.margin:.3f} behind.")
    said += [_said(threshold) for threshold in explanation.thresholds]
    # Of what is not filed it would be beside the point: the share counts those that are much surer, too.
    if decision.precision is not None and explanation.is_filed:
        said.append(_judged(explanation, decision.precision))
    if explanation.text_share > 0:
        said.append(f"The name {label!r} makes up {explanation.text_share:.0%} of its prototype, images the rest.")
    if explanation.others or explanation.mode != ClassifierKind.FINETUNED.value:
        said.append(_others_said(explanation, label))
    said.append(
        f"Decided with generation {explanation.generation} by {explanation.encoder_id}, mode {explanation.mode}."
    )
    return said


def _verdict(explanation: Explanation, label: str) -> str:
    if isinstance(explanation.decision, Abstained):
        why = REASONS.get(explanation.decision.reason, explanation.decision.reason)
        return f"It goes to Review/{written_name(label)}, the best guess: {why}."
    return f"It is filed into {written_name(label)}."


def _judged(explanation: Explanation, precision: float) -> str:
    if explanation.mode == ClassifierKind.FINETUNED.value:
        judged = f"Of the {explanation.held_out:,} images that its training held out"
    else:
        judged = f"Of the {explanation.held_out:,} references, each left out in turn"
    return f"{judged}, {precision:.0%} of those at least as sure as this were right."


def _said(threshold: Threshold) -> str:
    verb = "enough" if threshold.passed else "not enough"
    match threshold.name:
        case "confidence":
            return f"Its confidence is {threshold.value:.3f}; at least {threshold.asked:.3f} is asked: {verb}."
        case "familiarity":
            return (
                f"It looks as familiar as {threshold.value:+.2f} on a scale where known images have 0 on average; "
                f"at least {threshold.asked:+.2f} is asked: {verb}."
            )
    return (
        f"{threshold.value:.1%} of images of no class would look as much like one; "
        f"at most {threshold.asked:.1%} may be filed: {verb}."
    )


def _others_said(explanation: Explanation, label: str) -> str:
    agreeing = [other.mode for other in explanation.others if other.label == label]
    differing = [
        f"{other.mode} says {written_name(other.label)}"
        for other in explanation.others
        if other.label is not None and other.label != label
    ]
    parts = [f"{' and '.join(filter(None, [', '.join(agreeing[:-1]), agreeing[-1]]))} agree"] if agreeing else []
    return f"Of the other modes, {'; '.join([*parts, *differing])}." if parts or differing else "No other mode can say."


def _scores(prototypes: PrototypeSet, row: npt.NDArray[np.float64]) -> tuple[ClassScore, ...]:
    if not prototypes.labels:
        return ()
    judged = judge(prototypes, row, prototypes.settings.mode)
    table = (judged.scores if judged.whitened is None else judged.probabilities)[0]
    similarities = prototypes.references @ row[0].astype(np.float32)
    nearest = np.full(len(prototypes.labels), -np.inf)
    np.maximum.at(nearest, prototypes.classes, similarities)
    order = [
        int(index) for index in np.argsort(-judged.scores[0], kind="stable") if np.isfinite(judged.scores[0, index])
    ]
    return tuple(
        ClassScore(
            prototypes.labels[index],
            float(table[index]),
            int(prototypes.counts[index]),
            float(nearest[index]) if np.isfinite(nearest[index]) else None,
        )
        for index in order
    )


def _neighbours(prototypes: PrototypeSet, row: npt.NDArray[np.float64]) -> tuple[Neighbour, ...]:
    similarities = prototypes.references @ row.astype(np.float32)
    nearest = np.argsort(-similarities, kind="stable")[:NEIGHBOURS]
    return tuple(
        Neighbour(prototypes.sources[at], prototypes.labels[prototypes.classes[at]], float(similarities[at]))
        for at in nearest
    )


def _thresholds(prototypes: PrototypeSet, row: npt.NDArray[np.float64]) -> tuple[Threshold, ...]:
    abstain, facts = prototypes.settings.abstain, prototypes.calibration
    if abstain is None or not prototypes.labels:
        return ()
    judged = judge(prototypes, row, prototypes.settings.mode)
    confidence = float(judged.probabilities[0, judged.best[0]])
    found = [Threshold("confidence", confidence, facts.confidence, confidence >= facts.confidence)]
    if not prototypes.counts[judged.best[0]]:
        return tuple(found)
    if facts.gate is not None:
        # Whoever is unsure is asked for its looks alone, as ``decide`` does.
        certainty = None if confidence < facts.confidence else np.asarray([confidence])
        familiarity = float(facts.gate.familiarity(looks_of(prototypes, row, judged, facts.gate), certainty)[0])
        found.append(Threshold("familiarity", familiarity, facts.gate.least, familiarity >= facts.gate.least))
    if prototypes.null is not None and facts.strangers_cut is not None:
        share = float(stranger_shares(prototypes, row, judged, closeness(prototypes, row, judged))[0])
        found.append(Threshold("strangers", share, facts.strangers_cut, share <= facts.strangers_cut))
    return tuple(found)


def _text_share(prototypes: PrototypeSet, decision: Decision) -> float:
    """Return the weight of the name in the winner's shrunken mean: kT / (n + kappa + kT), see docs/decisions.md."""
    label = decision.label if isinstance(decision, Assigned) else decision.best_label
    match prototypes.settings.mode:
        case Mode.TEXT:
            return 1.0
        case Mode.MIXED if label is not None and prototypes.mixed is not None:
            weight = prototypes.mixed.text_weight
            references = int(prototypes.counts[prototypes.labels.index(label)])
            return 1.0 if not references else weight / (references + MEAN_SHRINKAGE + weight)
    return 0.0


def _others(prototypes: PrototypeSet, row: npt.NDArray[np.float64]) -> tuple[OtherMode, ...]:
    found = []
    for mode in Mode:
        if mode is prototypes.settings.mode or not prototypes.labels:
            continue
        judged = judge(prototypes, row, mode)
        table = (judged.scores if judged.whitened is None else judged.probabilities)[0]
        order = np.argsort(-judged.scores[0], kind="stable")
        if not np.isfinite(judged.scores[0, order[0]]):
            found.append(OtherMode(mode.value, None, 0.0, 0.0))
            continue
        second = float(table[order[1]]) if len(order) > 1 and np.isfinite(judged.scores[0, order[1]]) else 0.0
        best = float(table[order[0]])
        found.append(OtherMode(mode.value, prototypes.labels[int(order[0])], best, best - second))
    return tuple(found)
