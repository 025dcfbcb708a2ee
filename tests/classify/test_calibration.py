"""Abstaining: calibrated on the references alone, it holds on images that were never seen."""

import json
from dataclasses import replace

import numpy as np
import pytest

from sortd.classify.build import build
from sortd.classify.calibration import (
    NEVER,
    Calibration,
    balanced_weights,
    choose_threshold,
    corrected_confidence,
    fit_temperature,
    log_softmax,
    precision_curve,
)
from sortd.classify.decide import decide
from sortd.classify.open_set import leave_classes_out, log_odds, nearest_cosines
from sortd.classify.types import AbstainSettings, DecisionSettings, Evidence, SupportSet
from sortd.events import Abstained, Assigned, Mode
from tests.made_features import Array, Blobs, load_world, support_set, unit, worlds


def shares(
    support: SupportSet, abstain: AbstainSettings, queries: Array, labels: list[int], mode: Mode = Mode.MIXED
) -> tuple[float, float]:
    """Return the share of queries filed, and of right ones among them."""
    prototypes = build(support, DecisionSettings(mode, abstain), generation=1)
    answers = zip(decide(prototypes, queries), labels, strict=True)
    right = [one.label == support.labels[label] for one, label in answers if isinstance(one, Assigned)]
    return len(right) / len(queries), float(np.mean(right)) if right else 1.0


def filed_share(support: SupportSet, queries: Array, abstain: AbstainSettings | None = None) -> float:
    """Return the share of queries filed, whatever they are."""
    settings = DecisionSettings() if abstain is None else DecisionSettings(abstain=abstain)
    decisions = decide(build(support, settings, generation=1), queries)
    return float(np.mean([isinstance(one, Assigned) for one in decisions]))


def hard_world(each: int = 12, spread: float = 2.0, seed: int = 0) -> tuple[SupportSet, Array, list[int], Blobs]:
    """Return a library in which a third of the images cannot be told apart."""
    blobs = Blobs(20, spread=spread, seed=seed)
    index = np.repeat(np.arange(20), each)
    asked = np.repeat(np.arange(20), 40)
    return support_set(blobs.draw(index), index), blobs.draw(asked), asked.tolist(), blobs


class TestConfidence:
    """Temperature and threshold."""

    def test_the_temperature_of_made_up_logits_is_found(self) -> None:
        """Labels drawn from a softmax of known temperature give it back within a tenth."""
        generator = np.random.default_rng(0)
        table = generator.standard_normal((4000, 10))
        chances = np.exp(log_softmax(3.0 * table))
        own = (chances.cumsum(axis=1) > generator.random((4000, 1))).argmax(axis=1)
        factor, losses = fit_temperature(table, own, np.ones(4000), typical=1.0, spread=1.0)
        assert factor == pytest.approx(3.0, rel=0.1)
        np.testing.assert_allclose(losses, -log_softmax(factor * table)[np.arange(4000), own], atol=1e-9)

    def test_few_rows_stay_near_the_typical_temperature(self) -> None:
        """Three right rows do not make anybody certain."""
        table = np.eye(3) * 5.0
        factor, _ = fit_temperature(table, np.arange(3), np.ones(3), typical=0.5, spread=0.5)
        assert factor < 2.0

    def test_many_classes_are_normalised_by_the_best_ones(self) -> None:
        """With 100 classes the log loss over the examined ones is that over all, where the rest is far below."""
        table = np.random.default_rng(0).standard_normal((50, 100)) * 8.0
        own = np.arange(50)
        factor, losses = fit_temperature(table, own, np.ones(50), typical=1.0, spread=0.1)
        np.testing.assert_allclose(losses, -log_softmax(factor * table)[own, own], atol=1e-2)

    def test_the_threshold_keeps_the_wanted_share_right(self) -> None:
        """Above the threshold of calibrated confidences enough are right, and no more are refused than needed."""
        generator = np.random.default_rng(1)
        confidence = generator.random(5000)
        right = generator.random(5000) < confidence
        corrected = corrected_confidence(confidence, right, np.ones(5000))
        found = choose_threshold(confidence, corrected, right, np.ones(5000), 0.9)
        assert found.is_attained
        assert right[confidence >= found.confidence].mean() == pytest.approx(0.9, abs=0.01)

    def test_corrected_confidence_few_outcomes_is_lower_than_with_many(self) -> None:
        """A few right outcomes do not raise the confidence, many do, and wrong ones lower it."""
        many, few = (corrected_confidence(np.full(n, 0.97), np.ones(n, bool), np.ones(n))[0] for n in (2000, 4))
        assert few < 0.97
        assert few < many
        assert corrected_confidence(np.full(12, 0.97), np.arange(12) % 3 == 0, np.ones(12))[0] < 0.6

    def test_choose_threshold_few_right_references_prove_little(self) -> None:
        """Eight right references do not prove 98 % however sure they are, nor two for 95 %."""
        for count, wanted in ((8, 0.98), (2, 0.95)):
            sure, right, weights = np.full(count, 0.99), np.ones(count, bool), np.ones(count)
            found = choose_threshold(sure, corrected_confidence(sure, right, weights), right, weights, wanted)
            assert found.confidence == NEVER

    def test_what_cannot_be_had_is_said(self) -> None:
        """Where half of the surest are wrong, nothing is filed and the attainable share is told."""
        confidence, right = np.linspace(0.5, 0.99, 100), np.arange(100) % 2 == 0
        corrected = corrected_confidence(confidence, right, np.ones(100))
        found = choose_threshold(confidence, corrected, right, np.ones(100), 0.95)
        assert not found.is_attained
        assert found.confidence == NEVER
        assert found.attainable < 0.95

    def test_classes_count_once(self) -> None:
        """The weights of each class sum to the same, and all to the number of rows."""
        own = np.array([0, 0, 0, 1, 2, 2])
        weights = balanced_weights(own, 4)
        assert [weights[own == label].sum() for label in range(3)] == pytest.approx([2.0, 2.0, 2.0])

    def test_the_curve_falls_from_few_to_all(self) -> None:
        """Coverage grows to one along the curve while the least confidence falls."""
        generator = np.random.default_rng(2)
        confidence = generator.random(300)
        curve = precision_curve(confidence, confidence, generator.random(300) < confidence, np.ones(300))
        least, filed, _ = zip(*curve, strict=True)
        assert list(least) == sorted(least, reverse=True)
        assert list(filed) == sorted(filed)
        assert filed[-1] == pytest.approx(1.0)


class TestKnownImages:
    """precision."""

    @pytest.mark.parametrize("precision", [0.8, 0.95])
    def test_the_wanted_precision_holds_on_new_images(self, precision: float) -> None:
        """Within two points, and not by filing nothing."""
        support, queries, labels, _ = hard_world()
        filed, right = shares(support, AbstainSettings(precision), queries, labels)
        assert right >= precision - 0.02
        assert filed > 0.25

    @pytest.mark.parametrize("mode", [Mode.AVG, Mode.MAX, Mode.MEAN])
    def test_it_holds_for_the_plain_modes_too(self, mode: Mode) -> None:
        """Each mode is calibrated by its own leave-one-out."""
        support, queries, labels, _ = hard_world(spread=1.6)
        assert shares(support, AbstainSettings(0.9), queries, labels, mode)[1] >= 0.88

    def test_easy_classes_are_filed(self) -> None:
        """Where the rule is nearly always right, nearly everything is filed."""
        support, queries, labels, _ = hard_world(spread=0.7)
        filed, right = shares(support, AbstainSettings(), queries, labels)
        assert filed > 0.85
        assert right > 0.98

    def test_what_is_expected_is_what_happens(self) -> None:
        """The share that leave-one-out foretells is filed of new images: no less, and at most a seventh more."""
        gaps = []
        for seed in range(6):
            support, queries, labels, _ = hard_world(seed=seed)
            expected = build(support, DecisionSettings(), generation=1).calibration.filed_expected
            assert expected is not None
            gaps.append(shares(support, AbstainSettings(), queries, labels)[0] - expected)
        assert -0.02 < np.mean(gaps) < 0.14
        assert np.min(gaps) > -0.06

    def test_a_higher_precision_files_less(self) -> None:
        """The trade-off goes one way."""
        support, queries, labels, _ = hard_world()
        filed = [shares(support, AbstainSettings(precision), queries, labels)[0] for precision in (0.7, 0.85, 0.95)]
        assert filed == sorted(filed, reverse=True)

    def test_without_two_images_in_any_class_it_says_so(self) -> None:
        """Nothing can be left out, so no precision can be estimated."""
        blobs = Blobs(5)
        facts = build(support_set(blobs.draw(range(5)), range(5)), DecisionSettings(), generation=1).calibration
        assert facts.held_out == 0
        assert facts.precision_attainable is None
        assert "no class has two different images" in facts.notes[0]


class TestStrangers:
    """Images of no class."""

    def test_far_strangers_are_not_filed(self) -> None:
        """Of images that share nothing with the library, at most one in fifty is filed at the defaults."""
        support, _, _, _ = hard_world(spread=0.8)
        far = unit(np.random.default_rng(9).standard_normal((300, 64)) + 0.5)
        assert filed_share(support, far) <= 0.02

    def test_a_wanted_share_of_strangers_holds(self) -> None:
        """Of near strangers not more than two and a half times the wanted share is filed."""
        support, _, _, blobs = hard_world(spread=0.9)
        assert filed_share(support, blobs.strangers(400), AbstainSettings(strangers=0.05)) <= 0.125

    def test_examples_of_nothing_are_heeded(self) -> None:
        """With examples in _none, what is like them is a stranger; without, it is filed into a class like it."""
        blobs = Blobs(8, spread=0.8)
        near = blobs.centres[3] + 1.2 * np.random.default_rng(0).standard_normal(64)

        def impostors(count: int) -> Array:
            return unit(blobs.common + near + 0.3 * blobs.generator.standard_normal((count, 64)))

        index = np.repeat(np.arange(8), 10)
        support = support_set(blobs.draw(index), index, strangers=impostors(8))
        queries = impostors(50)
        heeded = decide(build(support, DecisionSettings(), generation=1), queries)
        assert np.mean([isinstance(one, Abstained) and one.reason == "stranger" for one in heeded]) > 0.8
        own = blobs.draw([3] * 50)
        assert filed_share(support, own) > 0.6

    def test_strangers_few_classes_do_not_reach_a_small_share(self) -> None:
        """With five classes the attainable share is used, and a note says so."""
        blobs = Blobs(5)
        index = np.repeat(np.arange(5), 8)
        settings = DecisionSettings(abstain=AbstainSettings(strangers=0.01))
        facts = build(support_set(blobs.draw(index), index), settings, generation=1).calibration
        assert facts.strangers_attainable == pytest.approx(1 / 6)
        assert facts.strangers_used == facts.strangers_attainable
        assert any("strangers 0.01 is not reached" in note for note in facts.notes)

    @pytest.mark.parametrize("classes", [1, 2])
    def test_too_few_classes_to_leave_any_out(self, classes: int) -> None:
        """With one or two classes nothing is left out, nothing raises, and it is said."""
        index = np.repeat(np.arange(classes), 8)
        support = support_set(Blobs(classes).draw(index), index)
        prototypes = build(support, DecisionSettings(abstain=AbstainSettings(strangers=0.05)), generation=1)
        assert prototypes.calibration.strangers_attainable == 1.0
        assert len(decide(prototypes, Blobs(classes).draw([0]))) == 1

    def test_every_class_takes_its_turn(self) -> None:
        """All references are strangers once, and classes weigh the same."""
        index = np.repeat(np.arange(4), [2, 3, 4, 5])
        rows = Blobs(4).draw(index).astype(np.float64)
        null = leave_classes_out(rows, index, np.array([2, 3, 4, 5]))
        assert len(null.weights) == 14
        assert null.weights.sum() == pytest.approx(4.0)
        assert (null.margin >= 0).all()

    def test_nearest_cosines_leave_the_query_itself_out(self) -> None:
        """A reference is compared with the others of its class; a class without others gives -1."""
        rows = Blobs(2, width=8).draw([0, 0, 0, 1]).astype(np.float64)
        classes = np.array([0, 0, 0, 1])
        got = nearest_cosines(rows, classes, rows, classes, np.arange(4), neighbours=1)
        products = rows @ rows.T
        assert got[0] == pytest.approx(max(products[0, 1], products[0, 2]))
        assert got[3] == -1.0


class TestFacts:
    """What is stored."""

    @pytest.mark.parametrize("abstain", [None, AbstainSettings(), AbstainSettings(strangers=0.1)])
    def test_they_survive_json(self, abstain: AbstainSettings | None) -> None:
        """A calibration is the same after a journey through JSON."""
        support, _, _, _ = hard_world(each=5)
        facts = build(support, DecisionSettings(abstain=abstain), generation=1).calibration
        assert Calibration.from_json(json.loads(json.dumps(facts.to_json()))) == facts

    def test_log_odds_are_bounded(self) -> None:
        """Certainty is no infinity."""
        assert np.isfinite(log_odds(np.array([0.0, 0.5, 1.0]))).all()


class TestWorlds:
    """Whole worlds of classes at the shipped defaults: a made one, and files of real CLIP embeddings that are there."""

    @pytest.mark.parametrize("name", worlds("dtd", "oxford_pets"))
    def test_precision_and_coverage(self, name: str) -> None:
        """With 16 references at least 92 % of what is filed is right, and something is filed."""
        support, queries, labels = load_world(name, 16)
        filed, right = shares(support, AbstainSettings(), queries[::3], labels[::3].tolist())
        assert right >= 0.92
        assert filed > 0.25

    @pytest.mark.parametrize(
        ("name", "other"),
        [
            pair
            for pair in (("made", "made other"), ("dtd", "ucf101"), ("oxford_pets", "dtd"), ("caltech101", "dtd"))
            if pair[0] == "made" or worlds(*pair)[1:] == [*pair]
        ],
    )
    def test_far_strangers(self, name: str, other: str) -> None:
        """Of another file's queries at most 2 % are filed."""
        support, _, _ = load_world(name, 16)
        _, strangers, _ = load_world(other, 1)
        assert filed_share(support, strangers[::2]) <= 0.02

    def test_near_strangers_of_small_libraries(self) -> None:
        """Of images of other classes of the same file an eighth is filed at most; of the library's own half, or more.

        Six drawn classes are harder to tell from each other than those of the photos.
        """
        strange = []
        for names, least_known in (
            (("made too", *worlds()), 0.45),
            (worlds("caltech101", "oxford_pets", "ucf101")[1:], 0.6),
        ):
            known = []
            for name in names:
                whole, queries, labels = load_world(name, 4)
                for seed in range(10):
                    order = np.random.default_rng(seed).permutation(len(whole.labels))
                    taught, others = np.sort(order[:6]), order[6:9]
                    chosen = np.isin(whole.classes, taught)
                    support = support_set(whole.embeddings[chosen], np.searchsorted(taught, whole.classes[chosen]))
                    known.append(filed_share(support, queries[np.isin(labels, taught)][:200]))
                    strange.append(filed_share(support, queries[np.isin(labels, others)][:200]))
            assert not known or np.mean(known) > least_known
        assert np.mean(strange) < 0.125


class TestEvidence:
    """Filed images that a person has checked."""

    @staticmethod
    def drawn(support: SupportSet, queries: Array, labels: list[int], number: int, *, is_random: bool) -> Evidence:
        """Return evidence from a random sample of what is filed of the queries."""
        answers = zip(decide(build(support, DecisionSettings(), generation=1), queries), labels, strict=True)
        filed = [(one.score, one.label == support.labels[at]) for one, at in answers if isinstance(one, Assigned)]
        chosen = np.random.default_rng(3).choice(len(filed), number, replace=False)
        confidence, right = zip(*(filed[at] for at in chosen), strict=True)
        return Evidence(confidence, right, (1.0,) * number, is_random=is_random)

    def test_evidence_of_lower_precision_raises_the_threshold_until_it_holds(self) -> None:
        """New images lie between classes as no reference does: four fifths are right, after 200 checks over 90 %."""
        labels, index = np.repeat(np.arange(20), 100), np.repeat(np.arange(20), 12)
        before, after = [], []
        for seed in range(3):
            blobs = Blobs(20, spread=1.0, seed=seed)
            support = support_set(blobs.draw(index), index)

            def between(blobs: Blobs = blobs) -> Array:
                generator = blobs.generator
                share = 0.75 * generator.random((len(labels), 1))
                other = (labels + generator.integers(1, 20, len(labels))) % 20
                centres = (1.0 - share) * blobs.centres[labels] + share * blobs.centres[other]
                return unit(blobs.common + centres + generator.standard_normal((len(labels), 64)))

            evidence = self.drawn(support, between(), labels.tolist(), 200, is_random=True)
            followed = replace(support, evidence=evidence)
            first, then = (build(one, DecisionSettings(), generation=1).calibration for one in (support, followed))
            assert then.confidence > first.confidence
            assert (then.checked, then.right_checked) == (200, sum(evidence.right))
            before.append(shares(support, AbstainSettings(), between(), labels.tolist()))
            after.append(shares(followed, AbstainSettings(), between(), labels.tolist()))
        assert 0.75 < np.mean([right for _, right in before]) < 0.85
        assert sum(filed * right for filed, right in after) / sum(filed for filed, _ in after) > 0.9
        assert all(filed > 0.01 for filed, _ in after)

    def test_evidence_of_higher_precision_lowers_the_threshold_only_if_it_is_random(self) -> None:
        """Where 99 of 100 are right more is filed, and enough is right; images that nobody drew lower nothing."""
        support, queries, labels, _ = hard_world(spread=1.6)
        confidence = build(support, DecisionSettings(), generation=1).calibration.confidence
        sure = Evidence(tuple(np.linspace(0.9, 0.99, 200)), (True,) * 198 + (False,) * 2, (1.0,) * 200, is_random=True)
        lower = build(replace(support, evidence=sure), DecisionSettings(), generation=2).calibration.confidence
        assert lower <= confidence
        implied = replace(support, evidence=replace(sure, is_random=False))
        assert build(implied, DecisionSettings(), generation=2).calibration.confidence >= confidence - 1e-9
        drawn = replace(support, evidence=self.drawn(support, queries, labels, 200, is_random=True))
        assert shares(drawn, AbstainSettings(), queries, labels)[1] > 0.93

    def test_evidence_grows_in_steps(self) -> None:
        """One more check is no reason to build the prototypes again; a fifth more, or many errors, are."""

        def steps(checked: int, wrong: int) -> tuple[int, int, bool]:
            right = (True,) * (checked - wrong) + (False,) * wrong
            return Evidence((0.9,) * checked, right, (1.0,) * checked, is_random=True).steps

        assert steps(100, 0) == steps(104, 0)
        assert steps(100, 0) != steps(125, 0)
        assert steps(100, 0) != steps(100, 12)
