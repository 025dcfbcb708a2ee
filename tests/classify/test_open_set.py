"""Familiarity: one number that a stranger falls short in, whichever respect gives it away."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from sortd.classify.build import build
from sortd.classify.decide import open_set_scores, score_batch
from sortd.classify.explain import explain
from sortd.classify.gaussian import class_moments, fit_gaussian, fit_space
from sortd.classify.leave_one_out import REFIT_UP_TO, refit_tables, remoteness_left_out
from sortd.classify.library import Library, unit_rows
from sortd.classify.open_set import Gate, OpenSetScores, foreign_gate, known_gate, log_share, nearest_cosines
from sortd.classify.prototypes import PrototypeSet
from sortd.classify.types import DecisionSettings
from sortd.events import Mode
from tests.made_features import Array, Blobs, support_set, unit

GATE = Gate(-1.0, cosine=(0.5, 0.1), typicality=(10.0, 4.0), remoteness=(2.0, 0.5), odds=(3.0, 1.0))


def looks(cosine: float = 0.5, typicality: float = 10.0, remoteness: float = 2.0) -> OpenSetScores:
    """Return the looks of one image, by default those of a known one on average."""
    return OpenSetScores(np.array([cosine]), np.array([typicality]), np.array([remoteness]))


def familiarity(one: OpenSetScores, confidence: float | None = None) -> float:
    """Return how familiar one image looks."""
    return float(GATE.familiarity(one, None if confidence is None else np.array([confidence]))[0])


def library(classes: int = 6, each: int = 8) -> PrototypeSet:
    """Return the prototypes of made-up classes."""
    blobs, index = Blobs(classes, spread=0.8), np.repeat(np.arange(classes), each)
    return build(support_set(blobs.draw(index), index), DecisionSettings(), generation=1)


class TestTheNumber:
    """Gate.familiarity."""

    def test_each_respect_alone_gives_a_stranger_away(self) -> None:
        """An image that is far off in one respect is less familiar than one a little off in all."""
        usual = familiarity(looks(0.45, 8.0, 2.25))
        assert familiarity(looks(cosine=-0.5)) < usual
        assert familiarity(looks(typicality=-40.0)) < usual
        assert familiarity(looks(remoteness=7.0)) < usual

    def test_excellence_in_one_respect_makes_up_for_little(self) -> None:
        """Ten spreads of remoteness are not made good by ten spreads of cosine."""
        assert familiarity(looks(cosine=1.5, remoteness=7.0)) < familiarity(looks()) - 5.0

    def test_more_is_never_less_familiar(self) -> None:
        """It rises with cosine, typicality and confidence, and falls with remoteness."""
        assert familiarity(looks(0.6)) > familiarity(looks())
        assert familiarity(looks(typicality=12.0)) > familiarity(looks())
        assert familiarity(looks(remoteness=2.5)) < familiarity(looks())
        assert familiarity(looks(), 0.99) > familiarity(looks(), 0.5)

    def test_without_confidence_an_image_counts_as_average_in_it(self) -> None:
        """By looks alone is as with the mean log odds."""
        confidence = 1.0 / (1.0 + np.exp(-3.0))
        assert familiarity(looks(), confidence) == pytest.approx(familiarity(looks()), abs=1e-2)

    def test_the_logistic_is_near_the_normal_distribution(self) -> None:
        """Half of the known images have less than the mean, a sixth less than a spread below it."""
        shares = np.exp(log_share(np.array([0.0, -1.0]), (0.0, 1.0)))
        np.testing.assert_allclose(shares, [0.5, 0.159], atol=0.01)

    def test_a_gate_survives_json(self) -> None:
        """Pairs come back as pairs, and what is not known as None."""
        for gate in (GATE, foreign_gate(np.linspace(0.1, 0.9, 50))):
            assert Gate.from_json(json.loads(json.dumps(asdict(gate)))) == gate


class TestTheGate:
    """known_gate and foreign_gate."""

    @pytest.mark.parametrize(("count", "tolerance"), [(12, 0.12), (400, 0.02)])
    def test_a_tenth_of_the_known_is_refused(self, count: int, tolerance: float) -> None:
        """On images like those that it was made from, with many of them and, on average, with few."""
        generator = np.random.default_rng(0)

        def drawn(size: int) -> OpenSetScores:
            return OpenSetScores(
                *(generator.normal(mean, spread, size) for mean, spread in ((0.5, 0.1), (10, 4), (2, 0.5)))
            )

        refused = []
        for _ in range(40):
            sure = np.full(count, 0.9)
            gate = known_gate(drawn(count), sure, np.ones(count, bool), classes=4)
            refused.append(np.mean(gate.familiarity(drawn(500), np.full(500, 0.9)) < gate.least))
        assert np.mean(refused) == pytest.approx(0.1, abs=tolerance)

    def test_remoteness_weighs_less_among_many_classes(self) -> None:
        """Up to five classes it counts in full, with twenty by a quarter."""
        arguments = looks(), np.array([0.9]), np.array([True])
        shares = [known_gate(*arguments, classes=classes).share_of_remoteness for classes in (2, 5, 20)]
        assert shares == [1.0, 1.0, 0.25]

    def test_one_reference_that_was_recognised_makes_a_gate(self) -> None:
        """Spreads that nobody saw are assumed, so that it is finite and its own image passes."""
        gate = known_gate(looks(), np.array([0.9]), np.array([True]), classes=2)
        assert gate.familiarity(looks(), np.array([0.9]))[0] >= gate.least
        assert np.isfinite(gate.familiarity(looks(0.4, 9.0, 2.1), np.array([0.8]))).all()

    def test_without_pairs_the_cosine_decides(self) -> None:
        """A quarter of what images of other classes reach is asked."""
        gate = foreign_gate(np.linspace(0.0, 1.0, 101))
        bare = OpenSetScores(np.array([0.24, 0.26]), None, None)
        assert (gate.familiarity(bare, None) >= gate.least).tolist() == [False, True]


class TestLeavingOut:
    """What known images have is seen without them."""

    def test_remoteness_by_algebra_is_refitting(self) -> None:
        """Centre and spread without a reference are those of a fit without it, within half of a per cent."""
        index = np.repeat(np.arange(6), [3, 8, 12, 12, 20, 25])
        rows = Blobs(6).draw(index).astype(np.float64)
        counts = np.bincount(index)
        moments = class_moments(rows, index, counts)
        got = remoteness_left_out(rows, index, counts, np.arange(len(rows)), moments)
        for at in range(0, len(rows), 7):
            others = np.arange(len(rows)) != at
            space = fit_space(rows[others], index[others], np.bincount(index[others], minlength=6))
            assert got[at] == pytest.approx(space.remoteness(rows[at : at + 1])[0], rel=5e-3)

    def test_refitting_tells_the_looks_too(self) -> None:
        """Cosine, remoteness and distance to all images are those of a fit without the reference."""
        index = np.repeat(np.arange(4), 4)
        rows, counts = Blobs(4).draw(index).astype(np.float64), np.full(4, 4)
        assert len(rows) <= REFIT_UP_TO
        found = refit_tables(Library(rows, index, counts), np.arange(len(rows)), (0.0,))
        at, others = 5, np.arange(len(rows)) != 5
        fewer = np.array([4, 3, 4, 4])
        space = fit_space(rows[others], index[others], fewer)
        placed, alone = space.place(rows[others]), space.place(rows[at : at + 1])
        gaussian = fit_gaussian(placed, index[others], fewer)
        offset = alone @ gaussian.background - gaussian.background_middle
        assert found.background[at] == pytest.approx(float(np.square(offset).sum()), rel=1e-6)
        assert found.remoteness[at] == pytest.approx(space.remoteness(rows[at : at + 1])[0])
        nearest = nearest_cosines(alone, np.array([2]), placed, index[others])
        assert found.cosine[at, 2] == pytest.approx(nearest[0])


class TestDecisions:
    """What a prototype set says of an image."""

    def test_the_cosine_is_that_of_placed_rows(self) -> None:
        """Not a single reference is placed for a decision, and the cosine is as if all had been."""
        prototypes = library()
        assert prototypes.whitening is not None
        assert prototypes.calibration.gate is not None
        queries = Blobs(6, seed=3).draw([0, 1, 2]).astype(np.float64)
        judged = score_batch(prototypes, queries, Mode.MIXED)
        found = open_set_scores(prototypes, queries, judged, prototypes.calibration.gate)
        rows = (prototypes.references - prototypes.whitening.center) * prototypes.whitening.scale
        placed = unit_rows((queries - prototypes.whitening.center) * prototypes.whitening.scale)
        wanted = nearest_cosines(placed, judged.best, unit_rows(rows), prototypes.classes)
        np.testing.assert_allclose(found.cosine, wanted, atol=1e-5)

    @pytest.mark.parametrize("mode", [Mode.AVG, Mode.MAX, Mode.MEAN, Mode.BEST, Mode.MIXED])
    def test_what_lies_outside_of_the_library_is_turned_away(self, mode: Mode) -> None:
        """Images on the far side of a class, as near to it as to no other, are no images of it."""
        blobs, index = Blobs(4, spread=0.5), np.repeat(np.arange(4), 6)
        prototypes = build(support_set(blobs.draw(index), index), DecisionSettings(mode), generation=1)
        outside = _beyond(blobs)
        explained = [explain(prototypes, row) for row in outside]
        assert np.mean([one.is_filed for one in explained]) <= 0.05
        own = [explain(prototypes, row).is_filed for row in blobs.draw(np.repeat(np.arange(4), 25))]
        assert np.mean(own) > 0.6

    def test_an_explanation_tells_the_number_that_decided(self) -> None:
        """A turned-away image has the reason typicality and a familiarity under the one asked."""
        blobs, index = Blobs(4, spread=0.5), np.repeat(np.arange(4), 6)
        prototypes = build(support_set(blobs.draw(index), index), DecisionSettings(), generation=1)
        told = [explain(prototypes, row) for row in _beyond(blobs)]
        refused = [one for one in told if getattr(one.decision, "reason", "") == "typicality"]
        assert refused
        for one in refused:
            (asked,) = [threshold for threshold in one.thresholds if threshold.name == "familiarity"]
            assert not asked.passed
            assert asked.value < asked.asked


def _beyond(blobs: Blobs) -> Array:
    """Return images that have a class's own features and as much again of something new."""
    new = 2.0 * blobs.generator.standard_normal((40, blobs.centres.shape[1]))
    return unit(blobs.common + blobs.centres[np.arange(40) % len(blobs.centres)] + new)
