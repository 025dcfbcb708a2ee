"""The scoring rules: what they compute is what they say, and leaving one out is as good as fitting again."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sortd.arrays import Array, IntArray
from sortd.classify.blend import fit_blends
from sortd.classify.gaussian import fit_gaussian, fit_space, place_names, shrink_means, squared_distances
from sortd.classify.kernel import (
    LARGEST,
    SHARPNESS,
    Plain,
    choose_rows,
    first_best,
    kernel_scores,
    make_kernel,
    plain_held_out,
    plain_scores,
)
from sortd.classify.leave_one_out import choose_held_out, gaussian_table, hold_out, kernel_table
from sortd.classify.library import Library, class_means, make_library
from sortd.events import Mode
from tests.made_features import Blobs, unit


def plain_of(rows: npt.NDArray[np.float32], classes: IntArray, count: int) -> Plain:
    """Return what the plain rules compare with, for rows sorted by class."""
    counts = np.bincount(classes, minlength=count)
    means = np.zeros((count, rows.shape[1]))
    for label in np.flatnonzero(counts):
        means[label] = rows[classes == label].astype(np.float64).mean(axis=0)
    return Plain(rows, classes, counts, means, None)


def loop(mode: Mode, query: npt.NDArray[np.float32], rows: npt.NDArray[np.float32], classes: IntArray) -> int:
    """Return the class that a script with a loop chooses."""
    best, highest = -1, -np.inf
    for label in np.unique(classes):
        cosines = [float(np.dot(query.astype(np.float64), row.astype(np.float64))) for row in rows[classes == label]]
        score = sum(cosines) / len(cosines) if mode is Mode.AVG else max(cosines)
        if score > highest:
            best, highest = int(label), score
    return best


def placed_world(classes: IntArray, *, width: int = 24, seed: int = 0) -> tuple[Array, IntArray]:
    """Return unit rows of some blobs, as float64, with their counts."""
    count = int(classes.max()) + 1
    rows = Blobs(count, width=width, seed=seed).draw(classes).astype(np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True), np.bincount(classes, minlength=count)


class TestPlainRules:
    """avg, max and mean."""

    @pytest.mark.parametrize("mode", [Mode.AVG, Mode.MAX])
    def test_the_class_is_that_of_a_plain_loop(self, mode: Mode) -> None:
        """Uneven classes, many near ties: the same class as the loop, for every query."""
        blobs = Blobs(12, width=16, spread=3.0)
        classes = np.repeat(np.arange(12), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12])
        rows, queries = blobs.draw(classes), blobs.draw(np.arange(12).repeat(20))
        best = first_best(plain_scores(mode, queries.astype(np.float64), plain_of(rows, classes, 12)))
        assert best.tolist() == [loop(mode, query, rows, classes) for query in queries]

    @pytest.mark.parametrize("mode", [Mode.AVG, Mode.MAX])
    def test_of_equal_classes_the_first_wins(self, mode: Mode) -> None:
        """Seven classes with the same references: a tie is the first one's, whatever a matrix product rounds."""
        rows = np.tile(Blobs(1, width=37).draw([0, 0, 0]), (7, 1))
        classes = np.repeat(np.arange(7), 3)
        queries = Blobs(1, width=37, seed=3).draw([0] * 50).astype(np.float64)
        assert set(first_best(plain_scores(mode, queries, plain_of(rows, classes, 7))).tolist()) == {0}

    @pytest.mark.parametrize("mode", [Mode.AVG, Mode.MAX, Mode.MEAN])
    def test_leaving_out_is_the_rule_without_that_reference(self, mode: Mode) -> None:
        """Each held-out score equals the score of a library that never had the reference."""
        classes = np.repeat(np.arange(4), [1, 2, 3, 6])
        rows = Blobs(4, width=16).draw(classes)
        chosen = np.arange(len(rows))
        table = plain_held_out(mode, chosen, plain_of(rows, classes, 4))
        for row in chosen:
            others = chosen != row
            query = rows[row : row + 1].astype(np.float64)
            wanted = plain_scores(mode, query, plain_of(rows[others], classes[others], 4))
            np.testing.assert_allclose(table[row], wanted[0], atol=1e-6)

    def test_a_class_without_references_cannot_win(self) -> None:
        """Its score is minus infinity under every plain rule."""
        rows = Blobs(3, width=16).draw([0, 0, 2])
        plain = plain_of(rows, np.array([0, 0, 2]), 4)
        for mode in (Mode.AVG, Mode.MAX, Mode.MEAN):
            scores = plain_scores(mode, rows.astype(np.float64), plain)
            assert np.isneginf(scores[:, [1, 3]]).all()
            assert np.isfinite(scores[:, [0, 2]]).all()


class TestGaussian:
    """Centred, standardised, whitened."""

    def test_distances_are_those_of_the_formula(self) -> None:
        """The whitened distance is (z - M)' inverse(A) (z - M) with the shrunk covariance written out."""
        classes = np.repeat(np.arange(5), 6)
        rows, counts = placed_world(classes, width=12)
        placed = fit_space(rows, classes, counts).place(rows)
        gaussian = fit_gaussian(placed, classes, counts)
        means = np.array([placed[classes == label].mean(axis=0) for label in range(5)])
        residuals = placed - means[classes]
        within = residuals.T @ residuals / 25
        share = 12 / (12 + 25)
        precision = np.linalg.inv((1 - share) * within + share * np.trace(within) / 12 * np.eye(12))
        middle = means.mean(axis=0)
        shrunk = middle + 6 / 7 * (means - middle)
        wanted = [[(z - m) @ precision @ (z - m) for m in shrunk] for z in placed]
        got = squared_distances(placed @ gaussian.whitener, shrink_means(gaussian))
        np.testing.assert_allclose(got, wanted, rtol=1e-8)

    def test_one_reference_a_class_gives_an_isotropic_rule(self) -> None:
        """Without any degree of freedom the whitener is a multiple of the identity."""
        classes = np.arange(6)
        rows, counts = placed_world(classes, width=12)
        gaussian = fit_gaussian(fit_space(rows, classes, counts).place(rows), classes, counts)
        np.testing.assert_allclose(gaussian.whitener, gaussian.whitener[0, 0] * np.eye(12), atol=1e-9)

    @pytest.mark.parametrize("sizes", [[8] * 8, [2, 3, 5, 8, 13, 21]])
    def test_leaving_out_by_algebra_is_refitting(self, sizes: list[int]) -> None:
        """In a space that stays, every held-out score equals that of a fit without the reference, but for a constant.

        The trace of the covariance is not updated, so the scores agree to a percent of their spread.
        """
        classes = np.repeat(np.arange(len(sizes)), sizes)
        rows, counts = placed_world(classes)
        placed = fit_space(rows, classes, counts).place(rows)
        gaussian = fit_gaussian(placed, classes, counts)
        held = hold_out(gaussian, choose_held_out(counts, classes))
        table = gaussian_table(gaussian, held, shrink_means(gaussian))
        for at, row in enumerate(held.chosen):
            others = np.arange(len(rows)) != row
            fewer = counts - (np.arange(len(sizes)) == classes[row])
            again = fit_gaussian(placed[others], classes[others], fewer)
            wanted = -0.5 * squared_distances(placed[[row]] @ again.whitener, shrink_means(again))[0]
            difference = (table[at] - table[at].mean()) - (wanted - wanted.mean())
            assert np.abs(difference).max() < 0.03 * wanted.std() + 1e-9

    def test_a_class_of_one_competes_and_is_not_held_out(self) -> None:
        """Its only reference cannot be judged, but it stands in the way of others."""
        classes = np.array([0, 0, 0, 1, 2, 2])
        rows, counts = placed_world(classes)
        gaussian = fit_gaussian(fit_space(rows, classes, counts).place(rows), classes, counts)
        held = hold_out(gaussian, choose_held_out(counts, classes))
        assert held.own.tolist() == [0, 0, 0, 2, 2]
        assert np.isfinite(gaussian_table(gaussian, held, shrink_means(gaussian))).all()


class TestKernel:
    """Every reference votes by itself."""

    def test_scores_are_those_of_the_formula(self) -> None:
        """The logarithm of the mean of exp(-beta (1 - cosine)) over the references of a class, over beta."""
        classes = np.repeat(np.arange(3), [1, 4, 7])
        rows, counts = placed_world(classes)
        gaussian = fit_gaussian(fit_space(rows, classes, counts).place(rows), classes, counts)
        whitened = gaussian.whitened(np.arange(len(rows)))
        directions = whitened / np.linalg.norm(whitened, axis=1, keepdims=True)
        votes = np.exp(-SHARPNESS * (1 - directions @ directions.T))
        wanted = [[np.log(votes[row, classes == label].mean()) / SHARPNESS for label in range(3)] for row in range(12)]
        np.testing.assert_allclose(kernel_scores(whitened, make_kernel(gaussian)), wanted, atol=1e-5)

    def test_leaving_out_by_algebra_is_refitting(self) -> None:
        """In a space that stays, every held-out score equals that of a fit without the reference."""
        classes = np.repeat(np.arange(8), 8)
        rows, counts = placed_world(classes)
        placed = fit_space(rows, classes, counts).place(rows)
        gaussian = fit_gaussian(placed, classes, counts)
        held = hold_out(gaussian, choose_held_out(counts, classes))
        table = kernel_table(gaussian, held, make_kernel(gaussian))
        for row in range(0, len(rows), 5):
            others = np.arange(len(rows)) != row
            again = fit_gaussian(placed[others], classes[others], counts - (np.arange(8) == classes[row]))
            wanted = kernel_scores(placed[[row]] @ again.whitener, make_kernel(again))[0]
            np.testing.assert_allclose(table[row], wanted, atol=2e-3)

    def test_a_large_library_keeps_evenly_chosen_voters(self) -> None:
        """Small classes keep all of theirs, large ones are thinned, and no class is silenced."""
        counts = np.array([3, 10, 9000, 4000])
        classes = np.repeat(np.arange(4), counts)
        voters = np.bincount(classes[choose_rows(classes, counts)], minlength=4)
        assert voters[:2].tolist() == [3, 10]
        assert voters.sum() <= LARGEST
        assert abs(int(voters[2]) - int(voters[3])) <= 1


class TestNames:
    """Text prototypes among images."""

    def test_names_that_know_the_images_land_near_them(self) -> None:
        """Across a gap between text and images, each class mean is nearest to its own name."""
        blobs = Blobs(9, width=48, spread=0.5)
        classes = np.repeat(np.arange(9), 4)
        rows = blobs.draw(classes).astype(np.float64)
        counts = np.bincount(classes)
        space = fit_space(rows, classes, counts)
        text, mean = blobs.names(noise=0.5)
        means = class_means(space.place(rows), classes, counts)
        names = place_names(space, text.astype(np.float64), mean.astype(np.float64), means, counts)
        assert squared_distances(means, names.rows).argmin(axis=1).tolist() == list(range(9))
        assert names.evidence > 5
        assert names.gain > 0.3

    def test_names_that_know_nothing_have_no_evidence(self) -> None:
        """Random names agree with their classes no better than with others."""
        strengths = []
        for seed in range(12):
            blobs = Blobs(9, width=48, seed=seed)
            classes = np.repeat(np.arange(9), 4)
            rows, counts = blobs.draw(classes).astype(np.float64), np.full(9, 4)
            space = fit_space(rows, classes, counts)
            text = unit(np.random.default_rng(seed + 100).standard_normal((9, 48))).astype(np.float64)
            means = class_means(space.place(rows), classes, counts)
            strengths.append(place_names(space, text, None, means, counts).evidence)
        assert np.mean(np.array(strengths) >= 2.0) <= 0.1


class TestDuplicates:
    """A burst counts once."""

    def test_copies_become_one(self) -> None:
        """Ten shots of one thing are one row, and the others stay apart."""
        blobs = Blobs(3, width=64)
        classes = np.repeat(np.arange(3), 5)
        rows = blobs.draw(classes)
        burst = unit(rows[0] + 0.01 * np.random.default_rng(0).standard_normal((10, 64)) / 8)
        merged = make_library(np.concatenate([rows, burst]), np.concatenate([classes, np.zeros(10, np.int64)]), 3)
        assert len(merged.rows) == 15
        assert np.unique(merged.group[[0, *range(15, 25)]]).size == 1
        assert (np.diff(merged.classes) >= 0).all()

    def test_the_same_picture_in_two_classes_stays_in_both(self) -> None:
        """Only what the user put into one class is one piece of evidence."""
        rows = np.tile(Blobs(1, width=32).draw([0]), (4, 1))
        assert make_library(rows, np.array([0, 0, 1, 1]), 2).classes.tolist() == [0, 1]

    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.integers(0, 4), min_size=1, max_size=30))
    def test_every_reference_goes_into_a_row_of_its_class(self, labels: list[int]) -> None:
        """Whatever the order of classes, the group of a reference has its class."""
        classes = np.array(labels, dtype=np.int64)
        rows = Blobs(5, width=8, spread=0.1).draw(classes)
        merged = make_library(rows, classes, 5)
        assert (merged.classes[merged.group] == classes).all()
        np.testing.assert_allclose(np.linalg.norm(merged.rows, axis=1), 1.0)


class TestBlend:
    """best and mixed are chosen on the references."""

    def test_folders_of_unlike_things_make_the_kernel_weigh_more(self) -> None:
        """With five clouds a folder the kernel's share grows beyond the least."""
        blobs = Blobs(40, width=64, spread=1.2, seed=1)
        clouds = np.arange(40).repeat(6)
        library = Library(blobs.draw(clouds).astype(np.float64), np.sort(clouds // 5), np.full(8, 30))
        best, _ = fit_blends(library)
        assert best.trial.share > 0.25

    def test_refitting_and_algebra_agree(self) -> None:
        """One library just small enough for brute force, and one just too large, judge the references alike."""
        accuracies = []
        for each in (8, 9):  # 64 references are refitted, 72 are not
            classes = np.repeat(np.arange(8), each)
            rows, counts = placed_world(classes, seed=5)
            best, _ = fit_blends(Library(rows, classes, counts))
            accuracies.append(float((best.held_out_logits().argmax(axis=1) == best.fit.held.own).mean()))
        assert abs(accuracies[0] - accuracies[1]) < 0.08
