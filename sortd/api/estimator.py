"""The classifier as an estimator of scikit-learn, for pipelines and cross-validation."""

from typing import Any, Self

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets, unique_labels
from sklearn.utils.validation import check_is_fitted, validate_data

from sortd.api.classifier import Classifier
from sortd.arrays import Array
from sortd.encoder.clip import are_of_unit_length
from sortd.events import Abstained


class SortdClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn publishes no types
    """Classifies rows as sortd decides images, without class names.

    Rows of unit length are embeddings and used as they are. Others get a column of ones before they are scaled to unit
    length, so that length counts as well as direction.

    >>> import numpy as np, sortd
    >>> from sklearn.model_selection import cross_val_score
    >>> dice = np.random.default_rng(0)
    >>> rows = np.repeat(np.eye(2, 8), 10, axis=0) + dice.normal(0, 0.1, (20, 8))
    >>> float(cross_val_score(sortd.SortdClassifier(), rows, [0] * 10 + [1] * 10, cv=5).mean())
    1.0
    """

    def __init__(self, mode: str = "best", precision: float = 0.95, abstained: object = None) -> None:
        """Keep the parameters.

        Args:
            mode: ``best``, ``avg``, ``max`` or ``mean``.
            precision: the wanted share of correct decisions among those that are not abstained from.
            abstained: what ``predict`` returns where sortd abstains; None: the best guess.
        """
        self.mode = mode
        self.precision = precision
        self.abstained = abstained

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike) -> Self:  # noqa: N803 -- scikit-learn's names
        """Learn from rows (n, d) and their classes (n,)."""
        rows, targets = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(targets)
        self.classes_ = unique_labels(targets)
        self.is_unit_ = are_of_unit_length(rows)
        numbers = np.searchsorted(self.classes_, targets)
        width = len(str(len(self.classes_)))  # labels of equal width sort as their classes do
        self.classifier_ = Classifier.fit(
            self._lifted(rows), [f"{number:0{width}d}" for number in numbers], mode=self.mode, precision=self.precision
        )
        return self

    def predict(self, X: npt.ArrayLike) -> npt.NDArray[Any]:  # noqa: N803 -- as above
        """Return the class of each row (n, d); where sortd abstains, the best guess or ``abstained``."""
        check_is_fitted(self)
        best = self.classes_[self.predict_proba(X).argmax(axis=1)]
        if self.abstained is None:
            return np.asarray(best)
        is_abstained = [isinstance(one, Abstained) for one in self.decisions(X)]
        return np.where(is_abstained, self.abstained, best)  # type: ignore[call-overload,no-any-return]

    def predict_proba(self, X: npt.ArrayLike) -> Array:  # noqa: N803 -- as above
        """Return (n, C): the probability of each class, in the order of ``classes_``."""
        check_is_fitted(self)
        return np.asarray(self.classifier_.probabilities(self._checked(X)), np.float64)

    def decisions(self, X: npt.ArrayLike) -> list[Any]:  # noqa: N803 -- as above
        """Return the decision of each row, ``Assigned`` or ``Abstained``; labels are indices into ``classes_``."""
        return list(self.classifier_.classify_rows(self._checked(X)))

    def _checked(self, rows: npt.ArrayLike) -> Array:
        check_is_fitted(self)
        return self._lifted(validate_data(self, rows, dtype=np.float64, reset=False))

    def _lifted(self, rows: Array) -> Array:
        return rows if self.is_unit_ else np.hstack([rows, np.ones((len(rows), 1))])
