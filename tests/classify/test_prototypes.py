"""Building prototypes and deciding: every library has an answer, and the answer is a good one."""

import json
import tracemalloc
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import numpy.typing as npt
import pytest

from sortd.classify import library
from sortd.classify.build import build
from sortd.classify.decide import decide, score_batch
from sortd.classify.library import make_library, parts
from sortd.classify.prototypes import PrototypeSet
from sortd.classify.types import AbstainSettings, DecisionSettings, SupportSet
from sortd.events import Abstained, Assigned, Mode
from tests.made_features import NAMES, Array, Blobs, load_world, support_set, unit, worlds

OFF = DecisionSettings(abstain=None)


def right_share(support: SupportSet, mode: Mode, queries: Array, labels: npt.ArrayLike) -> float:
    """Return the share of queries that a mode decides right when it never abstains."""
    prototypes = build(support, DecisionSettings(mode, None), generation=1)
    names = [one.label if isinstance(one, Assigned) else None for one in decide(prototypes, queries)]
    return float(
        np.mean([name == support.labels[label] for name, label in zip(names, np.asarray(labels), strict=True)])
    )


def scores_of(prototypes: PrototypeSet, queries: Array) -> npt.NDArray[np.float64]:
    """Return the scores under the mode of the settings."""
    return score_batch(prototypes, queries.astype(np.float64), prototypes.settings.mode).reported


def named(decision: Assigned | Abstained) -> tuple[str | None, str | None]:
    """Return the class of a decision, and why it was not filed."""
    return (decision.label, None) if isinstance(decision, Assigned) else (decision.best_label, decision.reason)


def world(classes: int = 6, each: int = 6, **shape: float) -> tuple[SupportSet, Array, npt.NDArray[np.int64]]:
    """Return a support set of blobs, and queries with their classes."""
    blobs = Blobs(classes, **shape)  # type: ignore[arg-type]
    index = np.repeat(np.arange(classes), each)
    queries = np.repeat(np.arange(classes), 20)
    return support_set(blobs.draw(index), index), blobs.draw(queries), queries


class TestSteps:
    """A library of a thousand classes takes many seconds, in which its worker has something else to do."""

    @pytest.mark.parametrize("mode", list(Mode))
    @pytest.mark.parametrize(
        "abstain", [None, AbstainSettings(), AbstainSettings(strangers=0.1)], ids=["off", "knowns", "strangers"]
    )
    def test_build_in_small_steps_makes_the_same_prototypes(
        self, monkeypatch: pytest.MonkeyPatch, mode: Mode, abstain: AbstainSettings | None
    ) -> None:
        """However small the steps are, nothing but the rounding of the last digit may differ.

        The stranger scores are computed in single precision.
        """
        blobs = Blobs(20)
        index = np.repeat(np.arange(20), 8)
        text, text_mean = blobs.names(0.5)
        support = support_set(blobs.draw(index), index, text=text, text_mean=text_mean)
        settings = DecisionSettings(mode, abstain)
        whole = build(support, settings, generation=3)
        monkeypatch.setattr(library, "CELLS", 400)
        taken = 0

        def count() -> None:
            nonlocal taken
            taken += 1

        small = build(support, settings, generation=3, pause=count)
        assert taken > 7 * 3 * len(index) * 20 / 400  # the tables of seven weights of the names, three times each
        for (name, array), other in zip(whole.to_arrays()[0].items(), small.to_arrays()[0].values(), strict=True):
            tolerance = {"rtol": 1e-4, "atol": 1e-4} if name.startswith("null.") else {"rtol": 1e-6, "atol": 1e-9}
            assert np.allclose(array, other, **tolerance, equal_nan=True), name
        queries = blobs.draw(np.arange(20))
        assert [named(one) for one in decide(whole, queries)] == [named(one) for one in decide(small, queries)]

    def test_build_pauses_grow_with_the_rows_of_a_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """With three times the rows there are twice the pauses or more: the time between two of them is limited."""
        monkeypatch.setattr(library, "CELLS", 3_200)
        taken = []
        for each in (40, 120):
            index = np.repeat(np.arange(10), each)
            pause = Mock()
            settings = DecisionSettings(Mode.BEST, AbstainSettings(strangers=0.1))
            build(support_set(Blobs(10).draw(index), index), settings, generation=1, pause=pause)
            taken.append(pause.call_count)
        assert taken[1] > 2 * taken[0]

    def test_build_step_computes_no_more_than_some_cells(self) -> None:
        """No table of many classes, or of many references in one class, is computed at a stretch."""
        for rows, columns in ((4_000, 1_000), (20_000, 20_000), (3, 5_000_000), (0, 7), (7, 0)):
            taken = list(parts(rows, columns))
            assert [row for part in taken for row in range(rows)[part]] == list(range(rows))
            assert all((part.stop - part.start) * columns <= max(library.CELLS, columns) for part in taken)

    def test_merge_of_many_references_in_a_class_holds_no_square_of_them(self) -> None:
        """Twenty thousand photos in one folder would have taken three gigabytes."""
        blobs = Blobs(1, width=8)
        rows = blobs.draw(np.zeros(5_000, np.int64))
        tracemalloc.start()
        try:
            make_library(rows, np.zeros(5_000, np.int64), 1)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 5_000 * 5_000 * 8 / 4


class TestEveryLibraryHasAnAnswer:
    """Empty, tiny, uneven: nothing raises, and the reason is a stable word."""

    @pytest.mark.parametrize("mode", list(Mode))
    def test_no_class_at_all(self, mode: Mode) -> None:
        """An empty library abstains with no_classes."""
        prototypes = build(support_set(np.zeros((0, 16), np.float32), []), DecisionSettings(mode), generation=1)
        (decision,) = decide(prototypes, Blobs(1, width=16).draw([0]))
        assert decision == Abstained("no_classes", None, 0.0, 0.0, None, mode)

    def test_classes_far_apart_are_filed_from_few_references(self) -> None:
        """With four references of each of five easy classes nearly every image is filed, and rightly."""
        support, queries, labels = world(5, 4, spread=0.4)
        found = decide(build(support, DecisionSettings(), generation=1), queries)
        filed = [
            (one.label, support.labels[label])
            for one, label in zip(found, labels, strict=True)
            if isinstance(one, Assigned)
        ]
        assert len(filed) > 0.85 * len(queries)
        assert all(label == wanted for label, wanted in filed)

    @pytest.mark.parametrize("mode", [Mode.AVG, Mode.MAX, Mode.MEAN, Mode.BEST, Mode.MIXED])
    def test_classes_without_reference_or_name(self, mode: Mode) -> None:
        """Classes of which nothing is known cannot be chosen."""
        prototypes = build(support_set(np.zeros((0, 16), np.float32), [], labels=3), OFF, generation=1)
        prototypes = replace(prototypes, settings=DecisionSettings(mode, None))
        (decision,) = decide(prototypes, Blobs(1, width=16).draw([0]))
        assert isinstance(decision, Abstained)
        assert decision.reason == "no_classes"

    @pytest.mark.parametrize("mode", [Mode.AVG, Mode.MAX, Mode.MEAN, Mode.BEST, Mode.MIXED])
    def test_one_class_files_everything_when_abstaining_is_off(self, mode: Mode) -> None:
        """There is nothing else to choose."""
        blobs = Blobs(1, width=16)
        prototypes = build(support_set(blobs.draw([0, 0]), [0, 0]), DecisionSettings(mode, None), generation=1)
        (decision,) = decide(prototypes, blobs.draw([0]))
        assert isinstance(decision, Assigned)
        assert decision.label == "a000"
        assert decision.second_label is None

    def test_one_class_with_two_references_files_nothing_by_itself(self) -> None:
        """Two references cannot tell what does not belong to the only class."""
        blobs = Blobs(1, width=16)
        prototypes = build(support_set(blobs.draw([0, 0]), [0, 0]), DecisionSettings(), generation=1)
        assert [getattr(one, "reason", None) for one in decide(prototypes, blobs.draw([0]))] == ["too_few"]

    def test_one_class_with_many_references_files_what_is_like_them(self) -> None:
        """Most images of the class pass, and nothing far from it does."""
        blobs = Blobs(1, width=64, spread=0.4)
        prototypes = build(support_set(blobs.draw([0] * 40), [0] * 40), DecisionSettings(), generation=1)
        own = [isinstance(one, Assigned) for one in decide(prototypes, blobs.draw([0] * 100))]
        other = unit(np.random.default_rng(5).standard_normal((50, 64)))
        assert np.mean(own) > 0.8
        assert not any(isinstance(one, Assigned) for one in decide(prototypes, other))

    @pytest.mark.parametrize("mode", [Mode.AVG, Mode.MAX, Mode.MEAN, Mode.BEST, Mode.MIXED])
    def test_one_reference_a_class(self, mode: Mode) -> None:
        """One image a class decides well where classes are far apart."""
        blobs = Blobs(8, spread=0.4)
        support = support_set(blobs.draw(range(8)), range(8))
        labels = np.repeat(np.arange(8), 10)
        assert right_share(support, mode, blobs.draw(labels), labels) > 0.9

    def test_ten_thousand_copies_of_one_picture(self) -> None:
        """A class that is one picture many times is a class of one."""
        blobs = Blobs(3)
        rows = np.concatenate([np.tile(blobs.draw([0]), (2000, 1)), blobs.draw([1, 1, 2, 2])])
        prototypes = build(support_set(rows, [0] * 2000 + [1, 1, 2, 2]), DecisionSettings(), generation=1)
        assert np.isfinite(scores_of(prototypes, blobs.draw([0, 1, 2]))).all()

    def test_many_classes(self) -> None:
        """Two thousand classes of one and two references are built and decided."""
        blobs = Blobs(2000, spread=0.3)
        index = np.sort(np.concatenate([np.arange(2000), np.arange(0, 2000, 2)]))
        prototypes = build(support_set(blobs.draw(index), index), OFF, generation=1)
        decisions = decide(prototypes, blobs.draw(np.arange(0, 2000, 40)))
        names = [one.label for one in decisions if isinstance(one, Assigned)]
        assert np.mean([name == f"a{label:03d}" for name, label in zip(names, range(0, 2000, 40), strict=True)]) > 0.8


class TestWhatIsRefused:
    """Bad numbers never become decisions."""

    def test_an_embedding_that_is_not_finite_is_named(self) -> None:
        """The message says which row."""
        support, queries, _ = world()
        queries[3, 5] = np.nan
        with pytest.raises(ValueError, match="row 3 of the batch"):
            decide(build(support, OFF, generation=1), queries)

    def test_another_width_is_refused(self) -> None:
        """The message says both shapes."""
        support, _, _ = world()
        with pytest.raises(ValueError, match=r"\(2, 7\).*64"):
            decide(build(support, OFF, generation=1), np.zeros((2, 7)))

    def test_a_reference_that_is_not_finite_is_named(self) -> None:
        """The message says which file."""
        rows = Blobs(2, width=8).draw([0, 1])
        rows[1, 0] = np.inf
        with pytest.raises(ValueError, match=r"Clases/a001/1\.png"):
            support_set(rows, [0, 1])

    @pytest.mark.parametrize("classes", [[0, 2], [-1, 0]])
    def test_a_class_index_out_of_range_is_refused(self, classes: list[int]) -> None:
        """An index without a label is a mistake of the caller."""
        with pytest.raises(ValueError, match="outside of the 2 labels"):
            support_set(Blobs(2, width=8).draw([0, 1]), classes, labels=2)

    @pytest.mark.parametrize("settings", [{"precision": 1.0}, {"strangers": 0.0}, {"strangers": "never"}])
    def test_settings_that_are_no_shares_are_refused(self, settings: dict[str, float]) -> None:
        """The message names the key."""
        with pytest.raises(ValueError, match=f"abstain.{next(iter(settings))}"):
            AbstainSettings(**settings)


class TestDecisions:
    """What comes out."""

    @pytest.mark.parametrize("mode", [Mode.AVG, Mode.MAX, Mode.MEAN, Mode.BEST, Mode.MIXED])
    def test_a_decision_tells_the_two_best_classes(self, mode: Mode) -> None:
        """Score, margin and second label are those of the table of scores."""
        support, queries, _ = world()
        prototypes = build(support, DecisionSettings(mode, None), generation=1)
        table = scores_of(prototypes, queries)
        for row, decision in zip(table, decide(prototypes, queries), strict=True):
            first, second = np.argsort(-row)[:2]
            assert isinstance(decision, Assigned)
            assert (decision.label, decision.second_label) == (support.labels[first], support.labels[second])
            assert decision.score == pytest.approx(row[first])
            assert decision.margin == pytest.approx(row[first] - row[second], abs=1e-12)

    @pytest.mark.parametrize("mode", list(Mode))
    def test_equal_arguments_give_equal_decisions(self, mode: Mode) -> None:
        """Building and deciding are pure, also when the order of references differs between classes."""
        support, queries, _ = world()
        first, second = (build(support, DecisionSettings(mode), generation=1) for _ in range(2))
        assert decide(first, queries) == decide(second, queries)

    @pytest.mark.parametrize("mode", [Mode.AVG, Mode.MAX, Mode.MIXED])
    def test_one_at_a_time_is_the_same_as_a_batch(self, mode: Mode) -> None:
        """Neighbours in a batch change nothing but the last digits."""
        support, queries, _ = world()
        prototypes = build(support, DecisionSettings(mode), generation=1)
        for query, together in zip(queries, decide(prototypes, queries), strict=True):
            (alone,) = decide(prototypes, query[None])
            assert type(alone) is type(together)
            assert alone.score == pytest.approx(together.score, abs=1e-5)

    @pytest.mark.parametrize(
        "settings", [OFF, DecisionSettings(), DecisionSettings(Mode.MAX, AbstainSettings(0.9, strangers=0.1))]
    )
    def test_a_set_survives_the_cache(self, settings: DecisionSettings) -> None:
        """Arrays and JSON make the same set again: equal decisions, equal facts."""
        support, queries, _ = world()
        text, mean = Blobs(6).names(noise=1.0)
        support = replace(support, text=text, text_mean=mean, strangers=Blobs(6).strangers(3))
        prototypes = build(support, settings, generation=7)
        arrays, metadata = prototypes.to_arrays()
        again = PrototypeSet.from_arrays(
            {name: array.copy() for name, array in arrays.items()}, json.loads(json.dumps(metadata))
        )
        assert decide(again, queries) == decide(prototypes, queries)
        assert (again.labels, again.generation, again.settings) == (support.labels, 7, settings)
        assert (again.calibration, again.sources) == (prototypes.calibration, prototypes.sources)


class TestBest:
    """best is worth having."""

    @pytest.mark.parametrize("each", [2, 5, 12])
    def test_it_is_not_under_avg_and_max_where_dimensions_differ(self, each: int) -> None:
        """With clouds that are long in a few directions, best is ahead of both."""
        generator = np.random.default_rng(each)
        stretch = np.where(np.arange(64) < 8, 6.0, 1.0)
        centres = generator.standard_normal((20, 64))
        index, asked = np.repeat(np.arange(20), each), np.repeat(np.arange(20), 15)

        def images(labels: npt.NDArray[np.int64]) -> Array:
            return unit(5.0 + centres[labels] + 0.6 * stretch * generator.standard_normal((len(labels), 64)))

        support, queries = support_set(images(index), index), images(asked)
        shares = {mode: right_share(support, mode, queries, asked) for mode in (Mode.AVG, Mode.MAX, Mode.BEST)}
        assert shares[Mode.BEST] > max(shares[Mode.AVG], shares[Mode.MAX])

    @pytest.mark.parametrize("mode", [Mode.BEST, Mode.MIXED])
    def test_a_burst_does_not_vote_twice(self, mode: Mode) -> None:
        """Thirty shots of one odd reference move the decisions as little as one does."""
        blobs = Blobs(8, spread=1.3)
        index, asked = np.repeat(np.arange(8), 5), np.repeat(np.arange(8), 40)
        rows, queries = blobs.draw(index), blobs.draw(asked)
        shots = unit(rows[[0]] + 0.002 * np.random.default_rng(1).standard_normal((30, 64)))
        calm = build(support_set(rows, index), DecisionSettings(mode, None), generation=1)
        loud = build(
            support_set(np.concatenate([rows, shots]), [*index, *[0] * 30]), DecisionSettings(mode, None), generation=1
        )
        np.testing.assert_allclose(scores_of(loud, queries), scores_of(calm, queries), atol=0.02)


class TestMixed:
    """Images and names together."""

    def test_names_help_where_images_are_few(self) -> None:
        """With one image a class, good names raise the accuracy by ten points or more."""
        blobs = Blobs(20, spread=1.5)
        text, mean = blobs.names(noise=0.7)
        support = support_set(blobs.draw(range(20)), range(20), text=text, text_mean=mean)
        labels = np.repeat(np.arange(20), 20)
        queries = blobs.draw(labels)
        assert (
            right_share(support, Mode.MIXED, queries, labels) > right_share(support, Mode.BEST, queries, labels) + 0.1
        )

    @pytest.mark.parametrize("each", [1, 3, 8])
    def test_names_that_know_nothing_do_no_harm(self, each: int) -> None:
        """With a text tower of noise, mixed is best, image by image."""
        blobs = Blobs(20, spread=1.2)
        index = np.repeat(np.arange(20), each)
        noise = unit(np.random.default_rng(7).standard_normal((20, 64)))
        support = support_set(blobs.draw(index), index, text=noise)
        prototypes = build(support, OFF, generation=1)
        queries = blobs.draw(np.repeat(np.arange(20), 10)).astype(np.float64)
        mixed, best = (score_batch(prototypes, queries, mode).best for mode in (Mode.MIXED, Mode.BEST))
        assert (mixed == best).all()

    def test_a_class_with_a_name_only_competes(self) -> None:
        """Its images find it, are not filed by themselves, and are filed when abstaining is off."""
        blobs = Blobs(6, spread=0.6)
        text, mean = blobs.names(noise=0.3)
        index = np.repeat(np.arange(5), 6)
        support = support_set(blobs.draw(index), index, labels=6, text=text, text_mean=mean)
        queries = blobs.draw([5] * 30)
        found = decide(build(support, DecisionSettings(), generation=1), queries)
        nameless = [one for one in found if isinstance(one, Abstained) and one.best_label == "a005"]
        assert len(nameless) > 24
        assert {one.reason for one in nameless} == {"name_only"}
        assert right_share(support, Mode.MIXED, queries, [5] * 30) > 0.8

    def test_names_alone_decide_when_there_is_no_image(self) -> None:
        """A library of empty folders abstains with a best guess; mode text files by names."""
        blobs = Blobs(5, spread=0.3)
        text, mean = blobs.names(noise=0.3)
        support = support_set(np.zeros((0, 64), np.float32), [], labels=5, text=text, text_mean=mean)
        queries = unit(text[[0, 1, 2, 3, 4]])
        reasons = [
            getattr(one, "reason", None) for one in decide(build(support, DecisionSettings(), generation=1), queries)
        ]
        assert reasons == ["name_only"] * 5
        assert right_share(support, Mode.TEXT, queries, range(5)) == 1.0


class TestWorlds:
    """Whole worlds of classes: a made one, and files of real CLIP ViT-B/32 embeddings that are there."""

    @pytest.mark.parametrize("name", worlds(*NAMES))
    @pytest.mark.parametrize("each", [2, 16])
    def test_best_is_ahead_of_avg_and_max(self, name: str, each: int) -> None:
        """By two points in every world."""
        support, queries, labels = load_world(name, each)
        prototypes = build(support, OFF, generation=1)
        asked = queries[::4].astype(np.float64)
        right = {
            mode: (score_batch(prototypes, asked, mode).best == labels[::4]).mean()
            for mode in (Mode.AVG, Mode.MAX, Mode.BEST)
        }
        assert right[Mode.BEST] > max(right[Mode.AVG], right[Mode.MAX]) + 0.02

    def test_mean_accuracy_reaches_the_floor(self) -> None:
        """With 4 references a class, 72 % and more on the mean of all worlds."""
        shares = []
        for name in worlds(*NAMES):
            support, queries, labels = load_world(name, 4)
            prototypes = build(support, OFF, generation=1)
            shares.append((score_batch(prototypes, queries.astype(np.float64), Mode.BEST).best == labels).mean())
        assert np.mean(shares) > 0.72

    @pytest.mark.parametrize("name", worlds("caltech101", "ucf101"))
    def test_folders_of_five_unlike_classes(self, name: str) -> None:
        """Best is not under max where a folder holds five unlike things."""
        support, queries, labels = load_world(name, 4)
        dealt = np.random.default_rng(0).permutation(50)
        kept, asked = support.classes < 50, labels < 50
        mixed = support_set(support.embeddings[kept], dealt[support.classes[kept]] // 5)
        prototypes = build(mixed, OFF, generation=1)
        rows = queries[asked].astype(np.float64)
        right = {
            mode: (score_batch(prototypes, rows, mode).best == dealt[labels[asked]] // 5).mean()
            for mode in (Mode.MAX, Mode.BEST)
        }
        assert right[Mode.BEST] >= right[Mode.MAX]
