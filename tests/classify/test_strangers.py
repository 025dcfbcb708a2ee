"""Images that looked like no class, decided again: by the references that were added since."""

from dataclasses import replace

import numpy as np
import pytest

from sortd.classify.build import build
from sortd.classify.decide import decide_by
from sortd.classify.types import DecisionSettings, SupportSet
from sortd.events import LIKE_NO_CLASS, Abstained, Assigned
from tests.made_features import Blobs, load_world, support_set, worlds


def production_line(name: str, seed: int) -> tuple[int, int, int]:
    """Return (left in Review/, filed wrongly, filed rightly) of strangers that are decided again.

    Two classes have 12 references each; 150 strangers are of five other classes, one of which is then taught by 10.
    """
    whole, queries, labels = load_world(name, 16)
    dice = np.random.default_rng(seed)
    order = dice.permutation(len(whole.labels))
    taught, kinds = order[:2], order[2:7]

    def library(*parts: tuple[int, int]) -> SupportSet:
        drawn = [dice.permutation(np.flatnonzero(whole.classes == label))[:count] for label, count in parts]
        rows = whole.embeddings[np.concatenate(drawn)]
        return support_set(rows, np.repeat(np.arange(len(parts)), [len(one) for one in drawn]))

    dice_state = dice.bit_generator.state
    first = build(library(*((int(label), 12) for label in taught)), DecisionSettings(), generation=1)
    dice.bit_generator.state = dice_state
    second = build(library(*((int(one), 12) for one in taught), (int(kinds[0]), 10)), DecisionSettings(), generation=2)
    second = second.with_history(first)
    asked = np.concatenate([np.flatnonzero(np.asarray(labels) == kind)[:30] for kind in kinds])
    rows, own = queries[asked], np.asarray(labels)[asked]
    before = decide_by(first, rows)
    left = np.array([isinstance(one, Abstained) and one.reason in LIKE_NO_CLASS for one in before])
    again = decide_by(second, rows[left], [1] * int(left.sum()))
    filed = [(one.label, kind) for one, kind in zip(again, own[left], strict=True) if isinstance(one, Assigned)]
    right = sum(label == "a002" and kind == kinds[0] for label, kind in filed)
    return int(left.sum()), len(filed) - right, right


@pytest.mark.parametrize("name", worlds("caltech101", "dtd", "oxford_pets", "ucf101"))
def test_decide_strangers_after_a_class_was_taught_at_most_one_per_cent_is_filed_wrongly(name: str) -> None:
    """Of the strangers that remain, those of the taught class are filed, and of the others hardly any."""
    left, wrong, right = np.sum([production_line(name, seed) for seed in range(16)], axis=0)
    assert left > 400
    assert wrong <= 0.01 * left
    assert right > 5 * wrong


def test_decide_turned_away_image_is_filed_only_by_new_references_near_it() -> None:
    """Without a new reference it stays, whatever the decision; with one like it, it is filed."""
    blobs = Blobs(4, spread=0.4)
    index = np.repeat(np.arange(4), 12)
    rows, asked = blobs.draw(index), blobs.draw([2] * 20)
    old = build(support_set(rows, index), DecisionSettings(), generation=1)
    assert [type(one) for one in decide_by(old, asked)].count(Assigned) > 10
    assert {one.reason for one in decide_by(old, asked, [1] * 20) if isinstance(one, Abstained)} >= {"stranger"}
    assert not any(isinstance(one, Assigned) for one in decide_by(old, asked, [1] * 20))
    more = np.concatenate([index, [2] * 6])
    new = build(support_set(np.concatenate([rows, blobs.draw([2] * 6)]), more), DecisionSettings(), generation=2)
    new = new.with_history(old)
    assert new.added.tolist().count(2) == 6
    assert [type(one) for one in decide_by(new, asked, [1] * 20)].count(Assigned) > 5
    assert not any(isinstance(one, Assigned) for one in decide_by(new, asked, [2] * 20))


def test_with_history_renamed_class_has_no_new_references() -> None:
    """Only what a class has gained is new: not what it had under another name, but what another class had."""
    blobs, index = Blobs(3, spread=0.4), np.repeat(np.arange(3), 4)
    support = support_set(blobs.draw(index), index)
    old = build(support, DecisionSettings(), generation=1)
    renamed = replace(support, labels=("a000", "a001", "b"))
    assert not build(renamed, DecisionSettings(), generation=2).with_history(old).added.any()
    moved = replace(support, classes=np.repeat([0, 1, 2], [5, 3, 4]))
    assert build(moved, DecisionSettings(), generation=2).with_history(old).added.tolist() == [0] * 4 + [2] + [0] * 7
