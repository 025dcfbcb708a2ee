"""A fine-tuned model's rows become decisions, purely: by calibrated probabilities and what its training held out."""

from dataclasses import replace

import numpy as np
import pytest

from sortd.classify.calibration import NEVER, HeldOutOutcomes, calibrate_outcomes
from sortd.classify.decide import decide_by
from sortd.classify.prototypes import FinetunedClassifier, describe_label_mismatch
from sortd.classify.types import AbstainSettings
from sortd.core.sorter import Sorter
from sortd.events import (
    Abstained,
    Assigned,
    Command,
    Embed,
    Embedded,
    EmbeddedImage,
    Move,
    Outcome,
    PrototypesBuilt,
    Rebuild,
    ReferencesTouched,
    ReviewSeen,
    Tick,
)
from tests.core.test_sorter import prototypes, ready_sorter, settle, stamp

LABELS = ("bolt", "nut", "screw")
MODEL = "finetuned-3-torch-0123"
SURE = AbstainSettings()


def outcomes(count: int = 200, *, wrong_below: float = 0.8) -> HeldOutOutcomes:
    """Return held-out images of which every second one is wrong below a confidence, and none above."""
    confidence = np.linspace(0.4, 0.9999, count)
    right = (confidence >= wrong_below) | (np.arange(count) % 2 == 0)
    return HeldOutOutcomes(confidence, right, np.arange(count) % len(LABELS))


def classifier(
    abstain: AbstainSettings | None = SURE, held_out: HeldOutOutcomes | None = None, *, generation: int = 4
) -> FinetunedClassifier:
    """Return a classifier of three classes with temperature 2."""
    calibration = calibrate_outcomes(held_out or outcomes(), abstain, classes=len(LABELS))
    return FinetunedClassifier(LABELS, 2.0, MODEL, generation, calibration, abstain)


def test_decide_by_logits_uses_softmax_with_temperature() -> None:
    """Score, confidence, margin and the second class are those of softmax(row / temperature)."""
    row = np.array([[6.0, 0.0, 2.0]], np.float32)
    expected = np.exp(row[0] / 2) / np.exp(row[0] / 2).sum()
    (decision,) = decide_by(classifier(abstain=None), row)
    assert isinstance(decision, Assigned)
    assert (decision.label, decision.second_label, decision.mode.value) == ("bolt", "screw", "finetuned")
    assert decision.score == decision.confidence == pytest.approx(expected[0])
    assert decision.margin == pytest.approx(expected[0] - expected[2])


def test_decide_by_logits_below_threshold_abstains() -> None:
    """The threshold lies where the wanted precision is reached: all above are filed, all below go to review."""
    made = classifier(AbstainSettings(precision=0.95))
    least = made.calibration.confidence
    assert 0.7 < least < 0.99
    sure, unsure = (2.0 * np.log([[p, (1 - p) / 2, (1 - p) / 2]]) for p in (least + 0.01, least - 0.01))
    assert isinstance(decide_by(made, sure)[0], Assigned)
    (decision,) = decide_by(made, unsure)
    assert isinstance(decision, Abstained)
    assert (decision.reason, decision.best_label) == ("margin", "bolt")


def test_calibrate_outcomes_higher_precision_raises_threshold() -> None:
    """Whoever wants fewer errors gets fewer images filed."""
    low, high = (classifier(AbstainSettings(precision=wanted)).calibration for wanted in (0.8, 0.97))
    assert low.confidence < high.confidence
    assert low.filed_expected is not None
    assert high.filed_expected is not None
    assert low.filed_expected > high.filed_expected


def test_calibrate_outcomes_unreachable_settings_add_notes() -> None:
    """Few or bad outcomes, none at all, and a share of strangers are each answered with a sentence."""
    random = HeldOutOutcomes(np.linspace(0.3, 1.0, 60), np.arange(60) % 2 == 0, np.arange(60) % 3)
    assert "is not reached" in classifier(AbstainSettings(precision=0.99), random).calibration.notes[0]
    none = HeldOutOutcomes(np.zeros(0), np.zeros(0, bool), np.zeros(0, np.int64))
    empty = classifier(AbstainSettings(precision=0.9), none).calibration
    assert (empty.confidence, empty.notes) == (
        NEVER,
        ("the training has no held-out image, so no precision can be expected",),
    )
    assert "has no effect" in classifier(AbstainSettings(strangers=0.05)).calibration.notes[-1]


def test_decide_by_logits_without_abstain_files_all() -> None:
    """Even what is a toss-up."""
    (decision,) = decide_by(classifier(abstain=None), np.zeros((1, 3)))
    assert isinstance(decision, Assigned)


def test_calibrate_outcomes_uneven_classes_have_equal_weight() -> None:
    """A class of a thousand held-out images does not drown one of ten."""
    own = np.repeat([0, 1, 2], [980, 10, 10])
    uneven = HeldOutOutcomes(np.full(1000, 0.9), own == 0, own)
    accuracy = classifier(held_out=uneven).calibration.accuracy
    assert accuracy == pytest.approx(1 / 3)


@pytest.mark.parametrize("rows", [np.zeros((1, 4)), np.zeros(3), np.full((1, 3), np.nan)])
def test_decide_by_logits_invalid_rows_raise(rows: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> None:
    """Another width, no matrix, or no numbers: an error, not a decision."""
    with pytest.raises(ValueError, match="row"):
        decide_by(classifier(), rows)


def test_classifier_invalid_values_raise() -> None:
    """Lengths, probabilities, labels and the temperature are looked at in the constructor."""
    good = outcomes(6)
    with pytest.raises(ValueError, match="shapes"):
        replace(good, right=good.right[:5])
    with pytest.raises(ValueError, match="outside of 0 to 1"):
        replace(good, confidence=good.confidence + 1)
    with pytest.raises(ValueError, match="temperature"):
        replace(classifier(), temperature=0.0)
    with pytest.raises(ValueError, match="needs two"):
        replace(classifier(), labels=("bolt",))


def test_describe_label_mismatch_names_classes() -> None:
    """What was added and what was removed, so a renamed class is both; the order does not count."""
    assert describe_label_mismatch(("b", "a"), ("a", "b")) is None
    assert describe_label_mismatch(("a", "b"), ("a", "b", "c")) == "Clases/ has 'c', which the model does not know"
    said = describe_label_mismatch(("a", "b"), ("a", "c"))
    assert said == "Clases/ has 'c', which the model does not know; the model knows 'b', which Clases/ does not have"
    assert "'e' and 3 more, which" in str(describe_label_mismatch(("x",), ("x", *"abcdefgh")))


STAMP = stamp()


def serve(sorter: Sorter, generation: int, made: FinetunedClassifier | None = None) -> list[Command]:
    """Let another generation decide, and a model if one is given; return what the core asks for then."""
    sorter.receive(ReferencesTouched(), 1)
    (job,) = (one.job for one in sorter.receive(Tick(), 50) if isinstance(one, Rebuild))
    return sorter.receive(PrototypesBuilt(prototypes(generation), made, job=job), 50)


def deciding_sorter(made: FinetunedClassifier) -> Sorter:
    """Return a core on a fine-tuned model, with one image handed to the encoder."""
    sorter = ready_sorter()
    serve(sorter, made.generation, made)
    settle(sorter, "a.png", STAMP, 100)
    return sorter


def answered(row: list[float], encoder_id: str = MODEL) -> Embedded:
    """Return the worker's answer for the image."""
    return Embedded((EmbeddedImage("a.png", STAMP, np.asarray(row, np.float32), "00"),), encoder_id)


def test_sorter_with_model_names_it_in_the_move() -> None:
    """The order carries the model's identity, by which the log line says who decided."""
    sorter = deciding_sorter(classifier(abstain=None))
    moves = [one for one in sorter.receive(answered([9.0, 0.0, 0.0]), 200) if isinstance(one, Move)]
    assert [(one.folder, one.outcome, one.encoder_id, one.generation) for one in moves] == [
        ("Dataset/bolt", Outcome.FILED, MODEL, 4)
    ]


def test_sorter_after_demotion_ignores_rows_of_the_model() -> None:
    """What was on its way when the classifier changed is embedded again by the one that serves now."""
    sorter = deciding_sorter(classifier(abstain=None))
    serve(sorter, 5)
    assert sorter.receive(answered([9.0, 0.0, 0.0]), 200) == [Embed((("a.png", STAMP),))]


def test_sorter_after_promotion_decides_review_again() -> None:
    """Another classifier is another generation: the image leaves Review/ when the model is sure, and stays else."""
    for row, folder in (([9.0, 0.0, 0.0], "Dataset/bolt"), ([0.0, 0.0, 0.0], None)):
        sorter = ready_sorter()
        sorter.receive(ReviewSeen("Review/torx/a.png", STAMP, generation=1), 1)
        commands = serve(sorter, 2, classifier(generation=2))
        assert commands == [Embed((("Review/torx/a.png", STAMP),))]
        image = EmbeddedImage("Review/torx/a.png", STAMP, np.asarray(row, np.float32), "00")
        moves = [one for one in sorter.receive(Embedded((image,), MODEL), 3) if isinstance(one, Move)]
        assert [move.folder for move in moves] == ([folder] if folder else [])
