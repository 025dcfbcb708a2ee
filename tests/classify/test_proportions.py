"""Proportions: intervals, bounds, and the words for them."""

import pytest

from sortd.classify.proportions import estimated, interval, lower_bound, out_of, proportion, proven, with_intervals


def test_interval_is_that_of_wilson() -> None:
    """Published values, with none and all right among them; it never leaves 0 to 1."""
    assert interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)


def test_lower_bound_is_the_one_sided_of_clopper_and_pearson() -> None:
    """All right: the nth root of 5 %; 59 are enough for 95 %, 58 are not."""
    assert lower_bound(60, 60) == pytest.approx(0.05 ** (1 / 60))
    assert lower_bound(59, 59) > 0.95 - 1e-4 > lower_bound(58, 58)
    assert lower_bound(0, 5) == 0.0
    assert lower_bound(9, 10) == pytest.approx(0.6058, abs=1e-4)


def test_words_follow_the_bound() -> None:
    """One image proves nothing, however it turned out; a bound is rounded down."""
    assert proven(0, 0) == "not checked"
    assert proven(1, 1) == "too few to say"
    assert proven(3, 10) == "too few to say"
    assert proven(60, 60) == "at least 95 % (95 % confidence)"
    assert proven(231, 240) == "at least 93 % (95 % confidence)"


def test_figures_carry_their_images_and_interval() -> None:
    """Counts, shares and values for programs say the same."""
    assert out_of(26, 37) == "26 of 37 (95 %: 54 to 83 %)"
    assert out_of(0, 0) == "0 of 0"
    assert estimated(1.0, 1) == "100.0 % of 1 (95 %: 21 to 100 %)"
    assert estimated(0.95, 40, "held-out images") == "95.0 % of 40 held-out images (95 %: 83 to 99 %)"
    assert estimated(None, 40) == estimated(1.0, 0) == "not known"
    assert proportion(0, 0) == {"right": 0, "judged": 0, "interval": None, "at_least": None, "words": "not checked"}
    assert proportion(60, 60)["at_least"] == pytest.approx(0.9513, abs=1e-4)
    facts = {"share": 0.5, "images": 2, "none": None, "empty": 0.0, "no": 0}
    added = with_intervals(facts, {"share": "images", "none": "images", "empty": "no"})
    assert added == {**facts, "share_interval": [0.0945, 0.9055], "none_interval": None, "empty_interval": None}
