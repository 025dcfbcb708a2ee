"""Groups of unfiled images: what belongs together, what is proposed as a class, and what to label next."""

import numpy as np
import pytest

from sortd.arrays import Array, IntArray
from sortd.classify import groups
from sortd.classify.build import build
from sortd.classify.groups import (
    USUAL_DISTANCE,
    find_groups,
    group_distance,
    link_rows,
    next_to_label,
    whitened_rows,
)
from sortd.classify.prototypes import PrototypeSet
from sortd.classify.types import AbstainSettings, DecisionSettings
from tests.made_features import Blobs, support_set, unit


def made_pile(known: int = 8, new: int = 3, each: int = 9) -> tuple[PrototypeSet, Array, IntArray]:
    """Return prototypes of some classes, and images of new classes, with the labels of these."""
    blobs = Blobs(known + new, spread=0.5)
    references = np.repeat(np.arange(known), 6)
    prototypes = build(support_set(blobs.draw(references), references), DecisionSettings(), generation=1)
    labels = np.tile(np.arange(known, known + new), each)
    return prototypes, blobs.draw(labels).astype(np.float64), labels


def contents_of(number: int) -> list[str]:
    """Return a hash for each image, not in the order of the images."""
    return [f"{(7919 * at) % 10_007:064x}" for at in range(number)]


class TestFindGroups:
    """Groups of a pile."""

    def test_find_groups_new_classes_are_found_and_proposed(self) -> None:
        """Each class without references becomes one group, which looks unfamiliar."""
        prototypes, rows, labels = made_pile()
        found = find_groups(prototypes, rows, contents_of(len(rows)))
        assert sorted(tuple(sorted(group.members)) for group in found) == sorted(
            tuple(np.flatnonzero(labels == label).tolist()) for label in np.unique(labels)
        )
        assert all(group.is_new and group.size == 9 and group.nearest_label in prototypes.labels for group in found)
        assert prototypes.calibration.gate is not None
        assert all(group.familiarity is not None and group.familiarity < 0 for group in found)

    def test_find_groups_order_of_the_pile_changes_nothing(self) -> None:
        """The identifiers depend on the contents of the members only."""
        prototypes, rows, _ = made_pile()
        contents = contents_of(len(rows))
        order = np.random.default_rng(1).permutation(len(rows))
        before = find_groups(prototypes, rows, contents)
        after = find_groups(prototypes, rows[order], [contents[at] for at in order])
        assert [group.id for group in before] == [group.id for group in after]
        assert [[contents[at] for at in group.members] for group in before] == [
            [contents[order[at]] for at in group.members] for group in after
        ]

    def test_find_groups_without_one_member_another_identifier(self) -> None:
        """A group that changed cannot be taken for the one that was shown."""
        prototypes, rows, _ = made_pile()
        contents = contents_of(len(rows))
        before = {group.id for group in find_groups(prototypes, rows, contents)}
        after = {group.id for group in find_groups(prototypes, rows[1:], contents[1:])}
        assert len(before & after) == 2

    def test_find_groups_familiar_images_are_no_new_class(self) -> None:
        """A group of a known class names it as the nearest one and is not proposed."""
        blobs = Blobs(6, spread=0.5)
        references = np.repeat(np.arange(6), 6)
        prototypes = build(support_set(blobs.draw(references), references), DecisionSettings(), generation=1)
        (group,) = find_groups(prototypes, blobs.draw([2] * 8).astype(np.float64), contents_of(8))
        assert (group.nearest_label, group.is_new, group.size) == ("a002", False, 8)

    def test_find_groups_few_images_are_not_proposed(self) -> None:
        """Four images are shown as a group, but not as a class."""
        prototypes, rows, _ = made_pile(new=1, each=4)
        (group,) = find_groups(prototypes, rows, contents_of(4))
        assert (group.size, group.is_new) == (4, False)

    @pytest.mark.parametrize("known", [0, 1, 2, 3])
    @pytest.mark.parametrize("pile", [0, 1, 2, 12])
    def test_find_groups_small_library_or_pile_is_grouped(self, known: int, pile: int) -> None:
        """Few classes, none, or hardly an image are no error."""
        blobs = Blobs(5, spread=0.3)
        references = np.repeat(np.arange(known), 4)
        prototypes = build(support_set(blobs.draw(references), references, known), DecisionSettings(), generation=1)
        found = find_groups(prototypes, blobs.draw([4] * pile).astype(np.float64), contents_of(pile))
        assert len(found) <= max(pile - 1, 0)

    def test_find_groups_without_abstention_proposes_nothing(self) -> None:
        """Nothing says then what looks unfamiliar."""
        blobs = Blobs(9, spread=0.5)
        references = np.repeat(np.arange(8), 6)
        prototypes = build(
            support_set(blobs.draw(references), references), DecisionSettings(abstain=None), generation=1
        )
        (group,) = find_groups(prototypes, blobs.draw([8] * 8).astype(np.float64), contents_of(8))
        assert (group.familiarity, group.is_new) == (None, False)


class TestLinkage:
    """Average linkage of a pile, and of one that is too large for a table of distances."""

    def test_link_rows_large_pile_joins_the_groups_of_a_sample(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What is not in the sample joins its group, or stays alone."""
        prototypes, rows, labels = made_pile(each=30)
        rows = whitened_rows(prototypes, np.concatenate([rows, Blobs(1, seed=9).strangers(1)]))
        whole = link_rows(rows, group_distance(prototypes))
        monkeypatch.setattr(groups, "LARGEST_PILE", 40)
        sampled = link_rows(rows, group_distance(prototypes))
        assert sorted(np.concatenate(sampled).tolist()) == list(range(len(rows)))
        assert sum(len(one) for one in sampled if len(set(labels[one[one < len(labels)]])) <= 1) == len(rows)
        assert abs(len(sampled) - len(whole)) <= 2

    def test_group_distance_depends_on_the_references(self) -> None:
        """Classes that lie close together allow less distance than usual."""
        blobs = Blobs(8, spread=0.5)
        blobs.centres[1::2] = blobs.centres[::2] + 0.1
        references = np.repeat(np.arange(8), 6)
        settings = DecisionSettings(abstain=AbstainSettings())
        close = build(support_set(blobs.draw(references), references), settings, generation=1)
        assert group_distance(close) < group_distance(made_pile()[0])
        assert 0.5 * USUAL_DISTANCE < group_distance(close) < USUAL_DISTANCE


class TestNextToLabel:
    """Which images to label next."""

    def test_next_to_label_takes_one_of_each_cluster(self) -> None:
        """As many images as there are classes are one of each, the largest class first."""
        blobs = Blobs(4, spread=0.2)
        labels = np.repeat(np.arange(4), [3, 9, 5, 7])
        chosen = next_to_label(unit(blobs.draw(labels) - blobs.draw(labels).mean(axis=0)).astype(np.float64), 4)
        assert labels[chosen].tolist() == [1, 3, 2, 0]

    @pytest.mark.parametrize("number", [0, 1, 3])
    def test_next_to_label_of_a_small_pile_is_all_of_it(self, number: int) -> None:
        """There is no more to ask for."""
        assert next_to_label(np.eye(4)[:number], 3) == list(range(number))
