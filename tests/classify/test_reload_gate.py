"""The reload gate: a rebuild that decides much worse stays out, and what the user did is obeyed."""

from dataclasses import replace

import numpy as np
import pytest

from sortd.classify.build import build
from sortd.classify.held_out import refuse_reload, shared_recalls
from sortd.classify.prototypes import PrototypeSet
from sortd.classify.types import AbstainSettings, DecisionSettings, Evidence
from tests.made_features import Array, Blobs, IntArray, support_set

BLOBS = Blobs(10, spread=0.8)
CLASSES = np.repeat(np.arange(10), 12)
ROWS = BLOBS.draw(CLASSES)


def built(rows: Array, classes: IntArray, *, encoder_id: str = "made up") -> PrototypeSet:
    """Return prototypes of rows."""
    support = replace(support_set(rows, classes, labels=10), encoder_id=encoder_id)
    return build(support, DecisionSettings(), generation=1)


OLD = built(ROWS, CLASSES)


def test_refuse_reload_equal_rebuild_passes() -> None:
    """Nothing changed, nothing is refused."""
    assert refuse_reload(OLD, built(ROWS, CLASSES)) is None


def test_refuse_reload_shuffled_classes_are_refused() -> None:
    """References that were thrown into wrong folders fall in accuracy, and the sentence names a class."""
    wrong = np.random.default_rng(0).permutation(CLASSES)
    order = np.argsort(wrong, kind="stable")
    said = refuse_reload(OLD, built(ROWS[order], wrong[order]))
    assert said is not None
    assert "a00" in said


def test_refuse_reload_removed_class_passes() -> None:
    """Deleting a folder is no loss of accuracy, however well it was recognised."""
    kept = CLASSES != 4
    assert refuse_reload(OLD, built(ROWS[kept], CLASSES[kept])) is None


def test_refuse_reload_fewer_equal_references_pass() -> None:
    """Half of the references decide these easy classes nearly as well."""
    kept = np.arange(len(CLASSES)) % 2 == 0
    assert refuse_reload(OLD, built(ROWS[kept], CLASSES[kept])) is None


def test_refuse_reload_other_encoder_passes() -> None:
    """What was asked for is not judged by the old encoder's figures."""
    wrong = np.sort(np.random.default_rng(0).permutation(CLASSES))
    rows = ROWS[np.random.default_rng(0).permutation(len(ROWS))]
    assert refuse_reload(OLD, built(rows, wrong, encoder_id="another")) is None


def test_refuse_reload_other_settings_pass() -> None:
    """A stricter precision sends more to review, as was asked."""
    support = support_set(ROWS, CLASSES)
    assert refuse_reload(OLD, build(support, DecisionSettings(abstain=AbstainSettings(0.999)), generation=2)) is None


def test_refuse_reload_doubled_abstentions_are_refused() -> None:
    """When twice as many known images would go to review, and ten points more, the old ones stay."""
    before = replace(OLD, calibration=replace(OLD.calibration, filed_expected=0.8))
    much = replace(OLD, calibration=replace(OLD.calibration, filed_expected=0.55))
    little = replace(OLD, calibration=replace(OLD.calibration, filed_expected=0.65))
    assert "45.0 % of 120 (95 %: " in str(refuse_reload(before, much))
    assert refuse_reload(before, little) is None


def test_refuse_reload_few_references_pass() -> None:
    """With three references a class a loss of a few is within chance."""
    few = np.concatenate([np.flatnonzero(label == CLASSES)[:2] for label in range(2)])
    old = built(ROWS[few], CLASSES[few])
    new = replace(old, recall=old.recall - 0.5)
    assert refuse_reload(old, new) is None


@pytest.mark.parametrize("path", [((10, 1), (10, 2)), ((8, 8, 8, 1, 1), (8, 8, 8, 2, 2)), ((3, 3), (3, 3, 1))])
@pytest.mark.parametrize("spread", [0.8, 1.2, 1.8])
@pytest.mark.parametrize("seed", range(4))
def test_refuse_reload_another_image_of_a_new_class_passes(
    path: tuple[tuple[int, ...], ...], spread: float, seed: int
) -> None:
    """A class with its first two images counts in the shares for the first time, and few references say little."""
    blobs = Blobs(5, spread=spread, seed=seed)
    rows = [blobs.draw([label] * 8 + [label] * 4) for label in range(5)]
    old, new = (
        build(
            support_set(np.concatenate([one[:count] for one, count in zip(rows, counts, strict=False)]), index),
            DecisionSettings(),
            generation=1,
        )
        for counts in path
        for index in [np.repeat(np.arange(len(counts)), counts)]
    )
    assert refuse_reload(old, new) is None


def test_shared_recalls_returns_common_classes() -> None:
    """Labels decide what is the same class, not positions."""
    new = replace(OLD, labels=("other", *OLD.labels[1:]))
    assert [label for label, _, _ in shared_recalls(OLD, new)] == list(OLD.labels[1:])


def test_refuse_reload_threshold_of_checked_images_passes() -> None:
    """Checked images that are often wrong send more images to review, which is no fault of the references."""
    evidence = Evidence((0.99999,) * 120, (True, False) * 60, (1.0,) * 120, is_random=True)
    support = replace(support_set(ROWS, CLASSES, labels=10), evidence=evidence)
    followed = build(support, DecisionSettings(), generation=2)
    assert OLD.calibration.filed_expected is not None
    assert followed.calibration.filed_expected is not None
    assert followed.calibration.filed_expected < OLD.calibration.filed_expected - 0.5
    assert refuse_reload(OLD, followed) is None
    assert refuse_reload(OLD, replace(followed, calibration=replace(followed.calibration, checked=0))) is not None
