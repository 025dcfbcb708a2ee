"""A split: which images are trained on, which choose between models, and which judge the chosen one; by seed alone."""

from dataclasses import dataclass

import numpy as np

from sortd.arrays import BoolArray, IntArray


@dataclass(frozen=True, eq=False)
class Split:
    """Three disjoint sets of image indices, int64 and ascending."""

    train: IntArray
    validation: IntArray
    """Decides when to stop, how far to average, and the temperature."""
    test: IntArray
    """Judges; nothing is chosen by it."""

    @property
    def taught(self) -> IntArray:
        """What a method that needs no validation may learn from."""
        return np.sort(np.concatenate([self.train, self.validation]))


def split_by_group(
    classes: IntArray,
    groups: IntArray,
    may_judge: BoolArray,
    *,
    test: float,
    validation: float,
    seed: int,
) -> Split:
    """Divide images by class, whole groups at a time.

    A class whose images are one group is trained on and judged by nothing; one of two groups gives one to the test.
    Groups that hold images of several classes, or one that may not judge, are trained on.

    Args:
        classes: int64 (N,).
        groups: int64 (N,): near-duplicates, which stay together.
        may_judge: (N,): whether a person vouches for the label, so that right and wrong mean something.
        test: share of each class for the test.
        validation: share of each class for validation.
        seed: equal seeds give equal splits.
    """
    dice = np.random.default_rng(seed)
    side = np.zeros(len(classes), np.int64)  # 0 train, 1 validation, 2 test
    for label in np.unique(classes):
        members = np.flatnonzero(classes == label)
        of_class = dice.permutation(np.unique(groups[members]))
        whole = [np.flatnonzero(groups == group) for group in of_class]
        free = [group for group in whole if (classes[group] == label).all() and may_judge[group].all()]
        spare = len(of_class) - 1  # one group at least is trained on
        for number, share, at_least in ((2, test, 1), (1, validation, 1)):
            taken = _take(free, round(share * len(members)), least=at_least, most=spare) if share > 0 else []
            for group in taken:
                side[group] = number
            spare -= len(taken)
            free = [group for group in free if side[group[0]] == 0]
    return Split(*(np.flatnonzero(side == number) for number in (0, 1, 2)))


def _take(free: list[IntArray], wanted: int, *, least: int, most: int) -> list[IntArray]:
    """Return groups of about ``wanted`` images in all, as they come; ``least`` to ``most`` groups."""
    taken: list[IntArray] = []
    images = 0
    for group in free:
        if len(taken) >= most or images >= wanted:
            break
        if images + len(group) - wanted <= wanted - images:  # no further beyond than it was short of
            taken.append(group)
            images += len(group)
    spare = sorted((group for group in free if not any(group is one for one in taken)), key=len)
    return [*taken, *spare[: max(0, min(least, most) - len(taken))]]
