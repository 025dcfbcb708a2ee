"""The verdict: is a fine-tuned model weaker, level with or stronger than the best mode of the prototypes?"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Any

from sortd.arrays import IntArray
from sortd.finetuning.measures import Judged, figures, mcnemar

SIGNIFICANT = 0.05
"""A difference that chance brings about more seldom than this is taken for one."""


class Verdict(StrEnum):
    """What the comparison comes to; ``sortd models promote`` refuses a weaker one."""

    WEAKER = "weaker"
    LEVEL = "level"
    STRONGER = "stronger"


def compare(champions: Sequence[Judged], challenger: Judged, own: IntArray, labels: Sequence[str]) -> dict[str, Any]:
    """Return the comparison of the prototypes' modes with a fine-tuned model on the same images, as plain values.

    Stronger or weaker is what McNemar's exact test calls so against the most accurate mode; what it cannot tell apart
    is level. That mode is chosen on the test images themselves, which favours the prototypes, if anything.

    Args:
        champions: one for each mode.
        challenger: the fine-tuned model.
        own: int64 (N,): the right classes of the test images.
        labels: the names of the classes.
    """
    found = {champion.name: figures(champion, own, labels) for champion in champions}
    mine = figures(challenger, own, labels)
    best = max(champions, key=lambda one: found[one.name]["accuracy"] or 0.0)
    paired = mcnemar(challenger.best == own, best.best == own)
    return {
        "images": len(own),
        "prototypes": found,
        "finetuned": mine,
        "best_mode": best.name,
        "best_mode_accuracy": found[best.name]["accuracy"],
        "finetuned_accuracy": mine["accuracy"],
        "mcnemar": {
            "only_finetuned_right": paired["only_first_right"],
            "only_prototypes_right": paired["only_second_right"],
            "p_value": paired["p_value"],
        },
        "verdict": _verdict(paired).value,
    }


def _verdict(paired: dict[str, Any]) -> Verdict:
    if paired["p_value"] >= SIGNIFICANT:
        return Verdict.LEVEL
    return Verdict.STRONGER if paired["only_first_right"] > paired["only_second_right"] else Verdict.WEAKER
