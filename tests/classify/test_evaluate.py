"""Evaluation: leave-one-out is what fitting again gives, and what is wrong with a library comes out."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from sortd.classify.build import build
from sortd.classify.decide import score_batch
from sortd.classify.evaluate import evaluate, unread_names
from sortd.classify.types import AbstainSettings, DecisionSettings, SupportSet
from sortd.events import Mode
from tests.made_features import Blobs, load_world, support_set, unit, worlds

OFF = DecisionSettings(abstain=None)


def brute_force(support: SupportSet, mode: Mode, rows: range) -> list[bool]:
    """Return for some references whether a library without each one decides it right."""
    right = []
    for row in rows:
        others = np.arange(len(support.classes)) != row
        fewer = replace(
            support,
            embeddings=support.embeddings[others],
            classes=support.classes[others],
            sources=tuple(source for at, source in enumerate(support.sources) if at != row),
        )
        judged = score_batch(build(fewer, OFF, generation=1), support.embeddings[[row]].astype(np.float64), mode)
        right.append(bool(judged.best[0] == support.classes[row]))
    return right


def accuracy_of(support: SupportSet, mode: Mode) -> float:
    """Return the accuracy that the report tells of a mode."""
    (report,) = [one for one in evaluate(support).modes if one.mode == mode.value]
    assert report.accuracy is not None
    return report.accuracy


def library(classes: int = 8, each: int = 8, spread: float = 1.6) -> SupportSet:
    """Return blobs that overlap."""
    index = np.repeat(np.arange(classes), each)
    return support_set(Blobs(classes, spread=spread).draw(index), index)


class TestModes:
    """Accuracy of every mode."""

    @pytest.mark.slow
    @pytest.mark.parametrize("mode", [Mode.AVG, Mode.MAX, Mode.MEAN])
    def test_plain_modes_are_exact(self, mode: Mode) -> None:
        """The accuracy is that of brute force, to the last reference."""
        support = library(each=5)
        assert accuracy_of(support, mode) == pytest.approx(np.mean(brute_force(support, mode, range(40))))

    def test_text_is_judged_without_leaving_anything_out(self) -> None:
        """Names do not know the references, so every one of them counts."""
        blobs = Blobs(6, spread=1.0)
        text, mean = blobs.names(noise=0.5)
        index = np.arange(6).repeat(3)
        support = support_set(blobs.draw(index), index, text=text, text_mean=mean)
        right = (support.embeddings.astype(np.float64) @ text.T.astype(np.float64)).argmax(axis=1) == index
        assert accuracy_of(support, Mode.TEXT) == pytest.approx(right.mean())

    def test_best_is_near_brute_force(self) -> None:
        """Over 120 references the two differ by a point at most."""
        support = library(each=15)
        assert abs(accuracy_of(support, Mode.BEST) - np.mean(brute_force(support, Mode.BEST, range(120)))) <= 0.01

    def test_best_is_near_brute_force_with_doubles(self) -> None:
        """A reference whose double stays is recognised, as fitting again would have it; apart they are told too."""
        support = library(each=9)
        doubled = support_set(
            np.concatenate([support.embeddings, support.embeddings]), np.concatenate([support.classes] * 2)
        )
        (report,) = [one for one in evaluate(doubled).modes if one.mode == "best"]
        assert report.accuracy is not None
        assert report.distinct_accuracy is not None
        assert report.accuracy > report.distinct_accuracy
        rows = range(0, 144, 6)
        assert abs(report.accuracy - np.mean(brute_force(doubled, Mode.BEST, rows))) < 0.1
        assert report.distinct_accuracy == pytest.approx(accuracy_of(support, Mode.BEST), abs=0.02)

    def test_references_of_a_class_of_one_are_not_judged(self) -> None:
        """They cannot be left out without taking their class away."""
        blobs = Blobs(3)
        report = evaluate(support_set(blobs.draw([0, 1, 1, 2, 2]), [0, 1, 1, 2, 2]))
        assert {one.judged for one in report.modes} == {4}
        assert report.class_reports[0].recall is None
        assert report.class_reports[0].needs_images == "only one image"


class TestSuspects:
    """References worth a look."""

    def test_a_mislabelled_reference_is_named_first(self) -> None:
        """One image in the wrong folder is the top_classes of the suspects, with the class that it looks like."""
        support = library(spread=0.7)
        classes = support.classes.copy()
        classes[11] = 5
        report = evaluate(support_set(support.embeddings, classes))
        first = next(one for one in report.suspects if one.kind == "mislabelled")
        assert (first.source, first.label, first.other_label) == ("Clases/a005/11.png", "a005", "a001")

    def test_the_same_picture_in_two_classes_is_named(self) -> None:
        """With both paths and a cosine of one."""
        support = library()
        rows = np.concatenate([support.embeddings, support.embeddings[[0]]])
        report = evaluate(support_set(rows, np.append(support.classes, 3)))
        (double,) = [one for one in report.suspects if one.kind == "duplicate"]
        assert {double.source, double.other_source} == {"Clases/a000/0.png", "Clases/a003/64.png"}
        assert double.score == pytest.approx(1.0, abs=1e-5)

    def test_an_outlier_is_named(self) -> None:
        """An image of something else altogether is far from its class."""
        support = library(spread=0.5, each=12)
        odd = unit(np.random.default_rng(1).standard_normal((1, 64)))
        report = evaluate(support_set(np.concatenate([support.embeddings, odd]), np.append(support.classes, 2)))
        assert "Clases/a002/96.png" in [one.source for one in report.suspects if one.kind == "outlier"]

    def test_a_clean_library_has_hardly_any(self) -> None:
        """Of 96 clean references at most five are suspected."""
        assert len(evaluate(library(spread=0.5, each=12)).suspects) <= 5


class TestReport:
    """The rest of it."""

    def test_recall_confusion_and_counts_agree(self) -> None:
        """Every judged reference stands in the confusion, and recall is its diagonal."""
        support = library()
        report = evaluate(support)
        assert sum(number for _, _, number in report.confusion) == 64
        for one in report.class_reports:
            diagonal = sum(number for own, best, number in report.confusion if own == best == one.label)
            decided = sum(number for _, best, number in report.confusion if best == one.label)
            assert one.recall == pytest.approx(diagonal / 8)
            assert one.f1 == pytest.approx(2 * diagonal / (8 + decided))
        assert report.macro_f1 == pytest.approx(np.mean([one.f1 for one in report.class_reports]))

    def test_it_is_json(self) -> None:
        """Every field survives JSON as it is."""
        report = evaluate(library(each=4)).to_json()
        assert json.loads(json.dumps(report)) == json.loads(json.dumps(report, sort_keys=True))

    def test_the_trade_off_goes_one_way(self) -> None:
        """A higher precision files no more."""
        filed = [one.filed for one in evaluate(library(each=12)).trade_offs]
        assert filed == sorted(filed, reverse=True)
        assert len(filed) == 5

    def test_more_images_are_asked_for_where_they_help(self) -> None:
        """Hard classes with few images are not labelled enough; easy ones with many are."""
        assert evaluate(library(each=4, spread=1.6)).is_labelled_enough is False
        assert evaluate(library(each=24, spread=0.5)).is_labelled_enough is True

    def test_the_advice_follows_the_figures(self) -> None:
        """Of modes that do equally well mixed is advised, with its accuracy."""
        advice = evaluate(library(spread=0.5)).advice
        assert advice.mode == "mixed"
        assert "100.0 % of" in advice.sentences[0]

    def test_advice_where_no_mode_is_better_keeps_the_one_in_force(self) -> None:
        """A change that only chance speaks for is not advised, and every share comes with its count."""
        advice = evaluate(library(spread=0.5), DecisionSettings(Mode.MEAN, AbstainSettings())).advice
        assert advice.mode == "mean"
        assert advice.sentences[0].startswith(
            "keep mode mean: leave-one-out accuracy 100.0 % of 62 references (95 %: 94 to 100 %)"
        )

    def test_advice_where_another_mode_is_better_names_both(self) -> None:
        """Names that say nothing are no way to decide; the mode in force is told with its own figure."""
        blobs = Blobs(6, spread=0.5)
        text, mean = blobs.names(noise=30.0)
        index = np.arange(6).repeat(8)
        support = support_set(blobs.draw(index), index, text=text, text_mean=mean)
        report = evaluate(support, DecisionSettings(Mode.TEXT, AbstainSettings()))
        assert report.advice.mode == "mixed"
        assert re.match(r"use mode mixed: .* of 46 references.*, text: \d", report.advice.sentences[0])

    @pytest.mark.parametrize("precision", [0.93, 0.95])
    def test_advice_on_a_precision_tells_the_share_of_that_precision(self, precision: float) -> None:
        """The wanted one is among the trade-offs, so that no other's share is told for it."""
        report = evaluate(library(each=5, spread=2.5), DecisionSettings(abstain=AbstainSettings(precision=precision)))
        (wanted,) = [one for one in report.trade_offs if one.precision == precision]
        (said,) = [one for one in report.advice.sentences if one.startswith(f"precision {precision:g} files")]
        assert f"files {100 * wanted.filed:.1f} % of {wanted.held_out} known images (95 %: " in said

    def test_advice_without_abstaining_says_nothing_of_a_precision(self) -> None:
        """Nothing is turned away, whatever the share above a confidence would be."""
        assert len(evaluate(library(each=5, spread=2.5), OFF).advice.sentences) == 1

    @pytest.mark.parametrize("labels", [0, 1, 3])
    def test_a_library_without_references_is_reported(self, labels: int) -> None:
        """There is nothing to judge, and it says what to do."""
        report = evaluate(support_set(np.zeros((0, 16), np.float32), [], labels=labels))
        assert report.modes == ()
        assert "add images" in report.advice.sentences[0]

    def test_one_class_is_reported(self) -> None:
        """Everything is right when there is one class."""
        report = evaluate(support_set(Blobs(1).draw([0] * 5), [0] * 5))
        assert {one.accuracy for one in report.modes} == {1.0}


@pytest.mark.parametrize("name", worlds("dtd"))
def test_leave_one_out_foretells_new_images(name: str) -> None:
    """The accuracy of references apart is within three points of that of queries."""
    support, queries, labels = load_world(name, 12)
    (report,) = [one for one in evaluate(support).modes if one.mode == "best"]
    judged = score_batch(build(support, OFF, generation=1), queries.astype(np.float64), Mode.BEST)
    assert report.distinct_accuracy == pytest.approx((judged.best == labels).mean(), abs=0.03)


class TestNames:
    """Class names that the model does not read are no better than chance."""

    def support(self, shift: int) -> SupportSet:
        """Return eight classes, each with the name of the one ``shift`` places on."""
        blobs, index = Blobs(8, spread=1.0), np.repeat(np.arange(8), 6)
        names = blobs.draw(np.arange(8))
        return support_set(blobs.draw(index), index, text=np.roll(names, shift, axis=0), text_mean=names.mean(axis=0))

    def test_evaluate_names_no_better_than_chance_are_reported(self) -> None:
        """With the figures and the remedy; names that are read are not, nor names that are not used."""
        unread, read = self.support(1), self.support(0)
        mixed = DecisionSettings(Mode.MIXED)
        (said,) = [one for one in evaluate(unread, mixed).advice.sentences if "does not read" in one]
        assert re.search(
            r"0\.0 % of 48 references.*by chance 12\.5%; describe the classes in English \(class\.txt\)", said
        )
        assert not any("does not read" in one for one in evaluate(read, mixed).advice.sentences)
        assert not any("does not read" in one for one in evaluate(unread, DecisionSettings(Mode.BEST)).advice.sentences)

    def test_unread_names_of_few_references_are_unknown(self) -> None:
        """Nineteen prove nothing."""
        assert unread_names(build(self.support(1), DecisionSettings(Mode.TEXT), generation=1)) is not None
        support = self.support(1)
        few = replace(
            support, embeddings=support.embeddings[:19], classes=support.classes[:19], sources=support.sources[:19]
        )
        assert unread_names(build(few, DecisionSettings(Mode.TEXT), generation=1)) is None
