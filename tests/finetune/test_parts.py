"""The parts of fine-tuning that think: groups, splits, the Gaussian head, metrics and verdicts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sortd.finetune.data import Predictions, near_duplicate_groups, split_by_group
from sortd.finetune.model import gaussian_head
from sortd.finetune.report import (
    calibration_error,
    class_metrics,
    compare,
    confusion_matrix,
    mcnemar,
    metrics_of,
    open_set,
)


def unit_rows(count: int, width: int = 16, seed: int = 0) -> np.ndarray:
    """Return random unit rows, float32."""
    rows = np.random.default_rng(seed).normal(size=(count, width))
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float32)


def test_groups_chain_of_near_duplicates_is_one() -> None:
    """Frames of a film are one group though its ends are unlike, and the rest stand alone."""
    others = unit_rows(40, 64)
    angle = np.linspace(0, 0.6, 5)
    chain = np.zeros((5, 64), np.float32)
    chain[:, 0], chain[:, 1] = np.cos(angle), np.sin(angle)
    groups = near_duplicate_groups(np.concatenate([chain, others]), np.zeros(45, np.int64))
    assert len(set(groups[:5])) == 1
    assert len(set(groups)) == 41


def test_groups_copies_in_two_classes_are_one() -> None:
    """The same picture in two classes cannot be on two sides."""
    rows = unit_rows(20)
    rows[13] = rows[4]
    groups = near_duplicate_groups(rows, np.repeat([0, 1], 10))
    assert groups[13] == groups[4]


def test_groups_class_of_similar_images_is_divided() -> None:
    """Where all images of a class are near each other, they are no burst, and can be split."""
    tight = unit_rows(1, 64) + 0.015 * unit_rows(40, 64, seed=1)
    rows = np.concatenate([tight, unit_rows(40, 64, seed=2)]).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    groups = near_duplicate_groups(rows, np.repeat([0, 1], 40))
    assert len(set(groups[:40])) > 10


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=2, max_size=6),
    bursts=st.integers(1, 6),
    seed=st.integers(0, 5),
)
def test_split_contains_all_images_and_divides_no_group(sizes: list[int], bursts: int, seed: int) -> None:
    """Every image is on one side, every group whole, every class is trained on, and one of three groups is tested."""
    classes = np.repeat(np.arange(len(sizes)), sizes)
    groups = np.arange(len(classes)) // bursts
    split = split_by_group(classes, groups, np.ones(len(classes), bool), test=0.2, validation=0.2, seed=seed)
    sides = [split["train"], split["validation"], split["test"]]
    assert sorted(np.concatenate(sides).tolist()) == list(range(len(classes)))
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert not set(groups[sides[first]]) & set(groups[sides[second]])
    assert set(classes[split["train"]]) == set(classes)
    for label in range(len(sizes)):
        pure = [g for g in set(groups[classes == label]) if len(set(classes[groups == g])) == 1]
        if len(pure) >= 3:
            assert label in classes[split["test"]]
            assert label in classes[split["validation"]]


def test_split_images_placed_by_no_person_are_only_trained_on() -> None:
    """Images that sortd filed itself are trained on, all of them."""
    classes, groups = np.repeat([0, 1], 20), np.arange(40)
    vouched = np.arange(40) % 2 == 0
    split = split_by_group(classes, groups, vouched, test=0.2, validation=0.2, seed=0)
    assert vouched[split["test"]].all()
    assert vouched[split["validation"]].all()
    assert len(split["test"]) == 8


def test_split_depends_on_the_seed() -> None:
    """Equal seeds split alike, others do not."""
    classes, groups = np.repeat([0, 1], 20), np.arange(40)
    first, again, other = (
        split_by_group(classes, groups, np.ones(40, bool), test=0.2, validation=0.2, seed=seed)["test"].tolist()
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_head_gaussian_classes_is_their_discriminant() -> None:
    """On Gaussian classes with a common covariance it decides almost as the true means and covariance would."""
    dice = np.random.default_rng(0)
    mix, means = dice.normal(size=(8, 8)), 2.0 * dice.normal(size=(3, 8))
    classes = np.repeat([0, 1, 2], 300)
    rows = means[classes] + dice.normal(size=(900, 8)) @ mix.T
    weight, bias = gaussian_head(rows[::2], classes[::2], np.ones(450), count=3)
    precision = np.linalg.inv(mix @ mix.T)
    truth = rows @ precision @ means.T - 0.5 * np.einsum("cd,de,ce->c", means, precision, means)
    mine = (rows @ weight.T + bias)[1::2].argmax(axis=1)
    assert (mine == classes[1::2]).mean() > (truth[1::2].argmax(axis=1) == classes[1::2]).mean() - 0.02


def test_head_two_halves_count_as_one_image() -> None:
    """Two copies of an image at half a weight are one image."""
    dice = np.random.default_rng(1)
    rows, classes = dice.normal(size=(20, 4)), np.repeat([0, 1], 10)
    once = gaussian_head(rows, classes, np.ones(20), count=2)
    doubled = np.concatenate([rows, rows])
    twice = gaussian_head(doubled, np.tile(classes, 2), np.full(40, 0.5), count=2)
    assert np.allclose(once[0], twice[0], atol=0.15 * np.abs(once[0]).max())


def test_head_class_without_images_is_finite() -> None:
    """Its logits are numbers, and lower than those of the class that an image is in."""
    rows = unit_rows(10).astype(np.float64)
    weight, bias = gaussian_head(rows, np.repeat([0, 2], 5), np.ones(10), count=3)
    logits = rows @ weight.T + bias
    assert np.isfinite(logits).all()
    assert (logits.argmax(axis=1) == np.repeat([0, 2], 5)).all()


def test_mcnemar_returns_the_exact_binomial_test() -> None:
    """Of ten images that one alone gets right, one to nine has p = 2 * 11 / 1024; no difference has p = 1."""
    first = np.array([True] * 9 + [False] + [True] * 5)
    second = np.array([False] * 9 + [True] + [True] * 5)
    assert mcnemar(first, second) == {"only_first_right": 9, "only_second_right": 1, "p_value": 22 / 1024}
    assert mcnemar(first, first)["p_value"] == 1.0


def test_calibration_error_is_confidence_minus_accuracy() -> None:
    """Nine of ten right at 0.9 is perfect, half right at 0.9 is wrong by 0.4."""
    confidence = np.full(10, 0.9)
    assert calibration_error(confidence, np.arange(10) > 0) == pytest.approx(0.0)
    assert calibration_error(confidence, np.arange(10) > 4) == pytest.approx(0.4)
    assert calibration_error(np.zeros(0), np.zeros(0, bool)) is None


def test_open_set_strangers_below_all_known_are_separated() -> None:
    """Strangers below all known ones are told apart wholly, equal ones by chance."""
    known = np.linspace(0.5, 1.0, 20)
    apart = open_set(known, np.linspace(0.0, 0.4, 10))
    assert apart == {"strangers": 10, "auroc": 1.0, "accepted": 0.0}
    same = open_set(known, known)
    assert same is not None
    assert same["auroc"] == pytest.approx(0.5)
    assert open_set(known, np.zeros(0)) is None


def predictions(name: str, best: np.ndarray, *, classes: int = 2) -> Predictions:
    """Return a classifier that is 90 % sure of each of its answers."""
    probabilities = np.full((len(best), classes), 0.1 / (classes - 1))
    probabilities[np.arange(len(best)), best] = 0.9
    return Predictions(name, probabilities, np.zeros(0))


def test_metrics_balanced_ones_weigh_classes_equally() -> None:
    """Accuracy counts images; balanced accuracy and macro F1 count classes."""
    own = np.array([0] * 8 + [1] * 2)
    found = metrics_of(predictions("all zero", np.zeros(10, np.int64)), own, ("a", "b"))
    assert found["accuracy"] == pytest.approx(0.8)
    assert found["balanced_accuracy"] == pytest.approx(0.5)
    assert found["macro_f1"] == pytest.approx((16 / 18) / 2)
    table = confusion_matrix(np.zeros(10, np.int64), own, 2)
    assert table.tolist() == [[8, 0], [2, 0]]
    assert class_metrics(table, ("a", "b"))[1]["precision"] is None


@pytest.mark.parametrize(("mistakes", "verdict"), [(0, "stronger"), (18, "level"), (40, "weaker")])
def test_compare_verdict_follows_the_paired_test(mistakes: int, verdict: str) -> None:
    """Against a mode with twenty mistakes: none is stronger, about as many is level, twice as many is weaker."""
    own = np.zeros(100, np.int64)
    baseline = predictions("max", (np.arange(100) < 20).astype(np.int64))
    worse = predictions("avg", (np.arange(100) < 60).astype(np.int64))
    challenger = predictions("finetuned", (np.arange(100) >= 100 - mistakes).astype(np.int64))
    found = compare([worse, baseline], challenger, own, ("a", "b"))
    assert found["verdict"] == verdict
    assert (found["best_mode"], found["best_mode_accuracy"]) == ("max", 0.8)
    assert set(found["prototypes"]) == {"max", "avg"}
