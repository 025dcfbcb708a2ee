"""Explain: the reasons for the decision on one image, as values and as sentences."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sortd.arrays import Array
from sortd.classify.calibration import NEVER
from sortd.classify.decide import (
    ScoredBatch,
    decide,
    decide_by,
    familiarity,
    score_batch,
    score_logits,
    stranger_shares,
)
from sortd.classify.gaussian import MEAN_SHRINKAGE
from sortd.classify.prompts import written_name
from sortd.classify.proportions import estimated
from sortd.classify.prototypes import FinetunedClassifier, PrototypeSet
from sortd.classify.types import PROBABILISTIC
from sortd.events import Abstained, Assigned, ClassifierKind, Decision, Mode

NEIGHBOURS_SHOWN = 5

REASONS = {
    "no_classes": "there are no classes",
    "name_only": "the best class has no reference images",
    "too_few": "there is only one class, with too few references to detect other images",
    "stranger": "images of no class resemble the best class as much",
    "typicality": "it is unlike the references of the best class",
    "margin": "the probability of the best class is too low",
}
"""Reasons of ``Abstained``."""


@dataclass(frozen=True, slots=True)
class ClassScore:
    """The score of one class."""

    label: str
    score: float  # probability for the modes in PROBABILISTIC, else cosine
    references: int
    nearest: float | None  # cosine to its nearest reference


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A reference near the image."""

    path: str
    label: str
    similarity: float  # cosine


@dataclass(frozen=True, slots=True)
class Check:
    """One condition for filing."""

    name: str  # confidence, familiarity, strangers
    value: float
    asked: float
    passed: bool


@dataclass(frozen=True, slots=True)
class OtherMode:
    """The best class under another mode, which has no thresholds since it is not calibrated."""

    mode: str
    label: str | None
    score: float
    margin: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """The reasons for one decision."""

    decision: Decision
    scores: tuple[ClassScore, ...]  # the best first, without classes that cannot be chosen
    neighbours: tuple[Neighbour, ...]
    thresholds: tuple[Check, ...]
    text_share: float  # share of the name in the prototype of the best class
    others: tuple[OtherMode, ...]
    generation: int
    encoder_id: str
    mode: str
    held_out: int  # number of held-out, or of checked, images behind decision.precision
    is_checked: bool = False  # whether these are new images that a person has checked
    turned_away: int = 0  # generation for which the image, which is in Review/, looked like no class; 0: none

    @property
    def is_filed(self) -> bool:
        """Whether the image is filed."""
        return isinstance(self.decision, Assigned)

    @property
    def label(self) -> str | None:
        """The best class."""
        return self.decision.best_label


def explain(prototypes: PrototypeSet, embedding: npt.ArrayLike, *, turned_away: int = 0) -> Explanation:
    """Return the explanation of the decision on one unit embedding (d,); arguments and errors as ``decide``."""
    row = np.asarray(embedding, np.float64)[None]
    (decision,) = decide(prototypes, row, [turned_away])
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
        turned_away=turned_away,
        held_out=prototypes.calibration.images_at(float(judged[mode].confidence[0])) if judged else 0,
        is_checked=prototypes.calibration.checked > 0,
    )


def explain_finetuned(
    classifier: FinetunedClassifier,
    row: npt.ArrayLike,
    *,
    prototypes: PrototypeSet,
    embedding: npt.ArrayLike | None,
) -> Explanation:
    """Return the explanation of the decision on one row of logits (C,).

    ``prototypes`` are those of the same dataset; with ``embedding`` (d,), neighbours and modes are explained too.
    """
    logits = np.asarray(row, np.float64)[None]
    (decision,) = decide_by(classifier, logits)
    neighbours: tuple[Neighbour, ...] = ()
    others: tuple[OtherMode, ...] = ()
    nearest: dict[str, float | None] = {}
    if embedding is not None:
        other = explain(prototypes, embedding)
        neighbours, nearest = other.neighbours, {one.label: one.nearest for one in other.scores}
        others = (OtherMode(other.mode, other.label, other.decision.score, other.decision.margin), *other.others)
    probabilities = score_logits(classifier, logits).probabilities[0]
    counts = dict(zip(prototypes.labels, prototypes.counts.tolist(), strict=True))
    ranked = [(classifier.labels[at], float(probabilities[at])) for at in np.argsort(-probabilities, kind="stable")]
    least = classifier.calibration.confidence
    check = Check("confidence", decision.confidence, least, decision.confidence >= least)
    return Explanation(
        decision=decision,
        scores=tuple(ClassScore(label, one, int(counts.get(label, 0)), nearest.get(label)) for label, one in ranked),
        neighbours=neighbours,
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
            float(judged.reported[0, index]),
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
    """Return the weight of the name in the shrunk mean of a class: kT / (n + kappa + kT), see docs/decisions.md."""
    match prototypes.settings.mode:
        case Mode.TEXT:
            return 1.0
        case Mode.MIXED if label is not None and prototypes.mixed is not None:
            weight = prototypes.mixed.text_weight
            references = int(prototypes.counts[prototypes.labels.index(label)])
            return 1.0 if not references else weight / (references + MEAN_SHRINKAGE + weight)
    return 0.0


def _other(prototypes: PrototypeSet, mode: Mode, judged: ScoredBatch) -> OtherMode:
    best = int(judged.best[0])
    if not np.isfinite(judged.scores[0, best]):
        return OtherMode(mode.value, None, 0.0, 0.0)
    return OtherMode(mode.value, prototypes.labels[best], float(judged.reported[0, best]), judged.margin(0))


def explanation_sentences(explanation: Explanation) -> list[str]:
    """Return the explanation in sentences, the decision first."""
    decision, label = explanation.decision, explanation.label
    if label is None:
        return [f"It is not decided: {REASONS['no_classes']}."]
    name = written_name(label)
    if isinstance(decision, Abstained):
        passes = all(check.passed for check in explanation.thresholds)
        why = REASONS.get(decision.reason, decision.reason)
        if decision.reason == "margin" and any(check.asked >= NEVER for check in explanation.thresholds):
            why = "no confidence suffices, since the references do not support the wanted precision"
        if decision.reason == "stranger" and explanation.turned_away and passes:
            since = f"and no reference that {name} has gained since generation {explanation.turned_away} is near enough"
            why = f"it looked like no class, {since}"
        said = [f"It is sent to Review/{written_name(decision.review_folder)}: {why}."]
    else:
        said = [f"It is filed into {name}."]
    unit = "probability" if explanation.mode in PROBABILISTIC else "cosine"
    second = "" if decision.second_label is None else f"; second: {written_name(decision.second_label)}"
    said.append(f"{name} has a {unit} of {decision.score:.3f}, a margin of {decision.margin:.3f}{second}.")
    said += [_check_sentence(check) for check in explanation.thresholds]
    is_finetuned = explanation.mode == ClassifierKind.FINETUNED.value
    if decision.precision is not None and explanation.is_filed:  # an image that is not filed has a lower precision
        held_out = "held-out images" if is_finetuned else "references left out in turn"
        images = "new images that a person has checked" if explanation.is_checked else held_out
        precision = estimated(decision.precision, explanation.held_out, images)
        said.append(f"Precision of decisions with at least this confidence: {precision}.")
    if explanation.text_share > 0:
        said.append(f"The name {label!r} contributes {explanation.text_share:.0%} to its prototype.")
    if explanation.others or not is_finetuned:
        said.append(_others_sentence(explanation, label))
    said.append(f"Generation {explanation.generation}, encoder {explanation.encoder_id}, mode {explanation.mode}.")
    return said


def _check_sentence(check: Check) -> str:
    verdict = "passed" if check.passed else "not passed"
    match check.name:
        case "confidence" if check.asked >= NEVER:
            return f"Confidence {check.value:.3f}; the references support the wanted precision with none: {verdict}."
        case "confidence":
            return f"Confidence {check.value:.3f}, minimum {check.asked:.3f}: {verdict}."
        case "familiarity":
            return f"Familiarity {check.value:+.2f} (mean of known images: 0), minimum {check.asked:+.2f}: {verdict}."
    return f"Share of strangers that resemble a class as much {check.value:.1%}, maximum {check.asked:.1%}: {verdict}."


def _others_sentence(explanation: Explanation, label: str) -> str:
    agreeing = [other.mode for other in explanation.others if other.label == label]
    differing = [
        f"{other.mode} chooses {written_name(other.label)}"
        for other in explanation.others
        if other.label is not None and other.label != label
    ]
    parts = [f"{', '.join(agreeing)} agree"] if agreeing else []
    return f"Other modes: {'; '.join([*parts, *differing]) or 'no decision'}."
