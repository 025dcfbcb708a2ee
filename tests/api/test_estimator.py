"""The estimator follows scikit-learn."""

import numpy as np
import pytest
from sklearn.exceptions import SkipTestWarning
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

import sortd


@pytest.mark.filterwarnings(f"ignore::{SkipTestWarning.__module__}.{SkipTestWarning.__name__}")
def test_estimator_passes_the_checks_of_scikit_learn() -> None:
    """Every check of ``check_estimator`` passes; those of libraries that are not installed are skipped."""
    results = check_estimator(sortd.SortdClassifier(), on_fail=None)
    assert [one["check_name"] for one in results if one["status"] in {"failed", "xfail"}] == []
    assert len(results) > 40


def test_estimator_decides_as_the_classifier() -> None:
    """On unit rows it gives the probabilities and the decisions of ``Classifier.fit``."""
    dice = np.random.default_rng(0)
    rows = np.repeat(np.eye(3, 16), 12, axis=0) + dice.normal(0, 0.15, (36, 16))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    labels = np.repeat(["a", "b", "c"], 12)
    estimator = sortd.SortdClassifier().fit(rows, labels)
    classifier = sortd.Classifier.fit(rows, list(labels))
    assert np.allclose(estimator.predict_proba(rows), classifier.probabilities(rows), atol=1e-6)
    filed = [decision.label is not None for decision in classifier.classify_rows(rows)]
    assert [decision.label is not None for decision in estimator.decisions(rows)] == filed


def test_abstention_can_have_a_value_of_its_own() -> None:
    """``abstained`` is predicted where sortd abstains, and nowhere else."""
    dice = np.random.default_rng(0)
    rows = np.repeat(np.eye(2, 16), 12, axis=0) + dice.normal(0, 0.1, (24, 16))
    estimator = sortd.SortdClassifier(abstained="unsure").fit(rows, np.repeat(["a", "b"], 12))
    assert set(estimator.predict(rows)) <= {"a", "b", "unsure"}
    assert estimator.predict(-rows[:1] * 3).tolist() == ["unsure"]


def test_estimator_works_in_a_pipeline() -> None:
    """It is the last step of a pipeline, with labels that are numbers."""
    dice = np.random.default_rng(0)
    rows = np.repeat(np.eye(2, 4), 12, axis=0) * 5 + dice.normal(0, 0.5, (24, 4))
    pipeline = make_pipeline(StandardScaler(), sortd.SortdClassifier())
    assert pipeline.fit(rows, np.repeat([7, 9], 12)).score(rows, np.repeat([7, 9], 12)) == 1.0
