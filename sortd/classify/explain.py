"""Explain: why one image is decided the way it is, as plain facts and as sentences."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sortd.arrays import Array
from sortd.classify.decide import (
    ScoredBatch,
    class_probabilities,
    decide,
    decide_rows,
    familiarity,
    score_batch,
    stranger_shares,
)
from sortd.classify.gaussian import MEAN_SHRINKAGE
from sortd.classify.prompts import written_name
from sortd.classify.prototypes import FinetunedClassifier, PrototypeSet
from sortd.classify.types import PROBABILISTIC, Abstained, Assigned, ClassifierKind, Decision, Mode

NEIGHBOURS_SHOWN = 5

REASONS = {
    "no_classes": "there is no class to choose from",
    "name_only": "the likeliest class is known by its name alone, which is not enough to file by",
    "too_few": "there is one class only, with too few references to tell what does not belong to it",
    "stranger": "it looks as much like what belongs to no class",
    "typicality": "it is unlike the references of the likeliest class: maybe it belongs to none",
    "margin": "another class is too near to be sure",
}


@dataclass(frozen=True, slots=True)
class ClassScore:
    """How one class fares."""

    label: str
    score: float  # cosine, or for best, mixed and a fine-tuned model the probability
    references: int
    nearest: float | None  # cosine to its nearest reference; None where it has none


@dataclass(frozen=True, slots=True)
class Neighbour:
    """One reference near the image."""

    path: str
    label: str
    similarity: float  # cosine


@dataclass(frozen=True, slots=True)
class Check:
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
    scores: tuple[ClassScore, ...]  # the likeliest first; classes that cannot win are left out
    neighbours: tuple[Neighbour, ...]
    thresholds: tuple[Check, ...]
    text_share: float  # how much of the winner's prototype comes from its name, from 0 to 1
    others: tuple[OtherMode, ...]
    generation: int
    encoder_id: str
    mode: str
    held_out: int  # held-out images by which decision.precision was judged

    @property
    def is_filed(self) -> bool:
        """Whether the image is sure enough to be filed."""
        return isinstance(self.decision, Assigned)

    @property
    def label(self) -> str | None:
        """The class chosen, or the best guess."""
        return self.decision.best_label


def explain(prototypes: PrototypeSet, embedding: npt.ArrayLike) -> Explanation:
    """Explain the decision on one embedding, a unit row (d,).

    Raises:
        ValueError: it has another shape, or a value that is not finite.
    """
    row = np.asarray(embedding, np.float64)[None]
    (decision,) = decide(prototypes, row)
    judged = {mode: score_batch(prototypes, row, mode) for mode in Mode} if prototypes.labels else {}
    mode = prototypes.settings.mode
    similarities = prototypes.references @ row[0].astype(np.float32)
    nearest = np.argsort(-similarities, kind="stable")[:NEIGHBOURS_SHOWN]
    return Explanation(
        decision=decision,
        scores=_scores(prototypes, judged[mode], similarities) if judged else (),
        neighbours=tuple(
            Neighbour(prototypes.sources[at], prototypes.labels[prototypes.classes[at]], float(similarities[at]))
            for at in nearest
        ),
        thresholds=_checks(prototypes, row, judged[mode]) if judged else (),
        text_share=_text_share(prototypes, decision.best_label),
        others=tuple(_other(prototypes, one, judged[one]) for one in judged if one is not mode),
        generation=prototypes.generation,
        encoder_id=prototypes.encoder_id,
        mode=mode.value,
        held_out=prototypes.calibration.held_out,
    )


def explain_finetuned(
    classifier: FinetunedClassifier,
    row: npt.ArrayLike,
    *,
    prototypes: PrototypeSet,
    embedding: npt.ArrayLike | None,
) -> Explanation:
    """Explain the decision on one row of logits (classes,).

    Args:
        classifier: what decides.
        row: the logits of the image.
        prototypes: what would decide without it, of the same folders.
        embedding: the image as the prototypes see it, a unit row (d,); without it nothing is said of neighbours and of
            the modes.

    Raises:
        ValueError: a row has another shape, or a value that is not finite.
    """
    logits = np.asarray(row, np.float64)[None]
    (decision,) = decide_rows(classifier, logits)
    beside = None if embedding is None else explain(prototypes, embedding)
    others: tuple[OtherMode, ...] = ()
    if beside is not None:
        own = OtherMode(beside.mode, beside.label, beside.decision.score, beside.decision.margin)
        others = (own, *beside.others)
    probabilities = class_probabilities(classifier, logits)[0]
    counts = dict(zip(prototypes.labels, prototypes.counts.tolist(), strict=True))
    nearest = {} if beside is None else {one.label: one.nearest for one in beside.scores}
    ranked = [(classifier.labels[at], float(probabilities[at])) for at in np.argsort(-probabilities, kind="stable")]
    least = classifier.calibration.confidence
    check = Check("confidence", decision.confidence, least, decision.confidence >= least)
    return Explanation(
        decision=decision,
        scores=tuple(ClassScore(label, one, int(counts.get(label, 0)), nearest.get(label)) for label, one in ranked),
        neighbours=() if beside is None else beside.neighbours,
        thresholds=() if classifier.abstain is None else (check,),
        text_share=0.0,
        others=others,
        generation=classifier.generation,
        encoder_id=classifier.encoder_id,
        mode=ClassifierKind.FINETUNED.value,
        held_out=classifier.calibration.held_out,
    )


def _scores(
    prototypes: PrototypeSet, judged: ScoredBatch, similarities: npt.NDArray[np.floating]
) -> tuple[ClassScore, ...]:
    nearest = np.full(len(prototypes.labels), -np.inf)
    np.maximum.at(nearest, prototypes.classes, similarities)
    row = judged.scores[0]
    return tuple(
        ClassScore(
            prototypes.labels[index],
            float(judged.shown[0, index]),
            int(prototypes.counts[index]),
            float(nearest[index]) if np.isfinite(nearest[index]) else None,
        )
        for index in np.argsort(-row, kind="stable")
        if np.isfinite(row[index])
    )


def _checks(prototypes: PrototypeSet, row: Array, judged: ScoredBatch) -> tuple[Check, ...]:
    abstain, facts = prototypes.settings.abstain, prototypes.calibration
    if abstain is None:
        return ()
    confidence = float(judged.confidence[0])
    found = [Check("confidence", confidence, facts.confidence, confidence >= facts.confidence)]
    if not prototypes.counts[judged.best[0]]:
        return tuple(found)
    familiar = familiarity(prototypes, row, judged)
    if familiar is not None and facts.gate is not None:
        value = float(familiar[0])
        found.append(Check("familiarity", value, facts.gate.least, value >= facts.gate.least))
    shares = stranger_shares(prototypes, row, judged)
    if shares is not None and facts.strangers_cut is not None:
        share = float(shares[0])
        found.append(Check("strangers", share, facts.strangers_cut, share <= facts.strangers_cut))
    return tuple(found)


def _text_share(prototypes: PrototypeSet, label: str | None) -> float:
    """Return the weight of the name in the winner's shrunken mean: kT / (n + kappa + kT), see docs/decisions.md."""
    match prototypes.settings.mode:
        case Mode.TEXT:
            return 1.0
        case Mode.MIXED if label is not None and prototypes.mixed is not None:
            weight = prototypes.mixed.text_weight
            references = int(prototypes.counts[prototypes.labels.index(label)])
            return 1.0 if not references else weight / (references + MEAN_SHRINKAGE + weight)
    return 0.0


def _other(prototypes: PrototypeSet, mode: Mode, judged: ScoredBatch) -> OtherMode:
    row, shown = judged.scores[0], judged.shown[0]
    best, *others = np.argsort(-row, kind="stable").tolist()
    if not np.isfinite(row[best]):
        return OtherMode(mode.value, None, 0.0, 0.0)
    second = float(shown[others[0]]) if others and np.isfinite(row[others[0]]) else 0.0
    return OtherMode(mode.value, prototypes.labels[best], float(shown[best]), float(shown[best]) - second)


def explanation_sentences(explanation: Explanation) -> list[str]:
    """Return the explanation in sentences, the decision first."""
    decision, label = explanation.decision, explanation.label
    if label is None:
        return [f"It would stay undecided: {REASONS['no_classes']}."]
    name = written_name(label)
    if isinstance(decision, Abstained):
        why = REASONS.get(decision.reason, decision.reason)
        said = [f"It goes to Review/{name}, the best guess: {why}."]
    else:
        said = [f"It is filed into {name}."]
    unit = "probability" if explanation.mode in PROBABILISTIC else "cosine"
    second = "" if decision.second_label is None else f", {written_name(decision.second_label)} comes second"
    said.append(f"{name} has a {unit} of {decision.score:.3f}{second}, {decision.margin:.3f} behind.")
    said += [_check_sentence(check) for check in explanation.thresholds]
    # Of what is not filed it would be beside the point: the share counts those that are much surer, too.
    is_finetuned = explanation.mode == ClassifierKind.FINETUNED.value
    if decision.precision is not None and explanation.is_filed:
        held_out = "images that its training held out" if is_finetuned else "references, each left out in turn"
        sure = f"{decision.precision:.0%} of those at least as sure as this were right"
        said.append(f"Of the {explanation.held_out:,} {held_out}, {sure}.")
    if explanation.text_share > 0:
        said.append(f"The name {label!r} makes up {explanation.text_share:.0%} of its prototype, images the rest.")
    if explanation.others or not is_finetuned:
        said.append(_others_sentence(explanation, label))
    said.append(
        f"Decided with generation {explanation.generation} by {explanation.encoder_id}, mode {explanation.mode}."
    )
    return said


def _check_sentence(check: Check) -> str:
    verb = "enough" if check.passed else "not enough"
    match check.name:
        case "confidence":
            return f"Its confidence is {check.value:.3f}; at least {check.asked:.3f} is asked: {verb}."
        case "familiarity":
            scale = "known images have 0 on average"
            return f"Its familiarity is {check.value:+.2f} ({scale}); at least {check.asked:+.2f} is asked: {verb}."
    return (
        f"{check.value:.1%} of images of no class would look as much like one; "
        f"at most {check.asked:.1%} may be filed: {verb}."
    )


def _others_sentence(explanation: Explanation, label: str) -> str:
    agreeing = [other.mode for other in explanation.others if other.label == label]
    differing = [
        f"{other.mode} says {written_name(other.label)}"
        for other in explanation.others
        if other.label is not None and other.label != label
    ]
    parts = [f"{' and '.join(filter(None, [', '.join(agreeing[:-1]), agreeing[-1]]))} agree"] if agreeing else []
    return f"Of the other modes, {'; '.join([*parts, *differing])}." if parts or differing else "No other mode can say."
