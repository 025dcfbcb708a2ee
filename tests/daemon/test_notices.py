"""A condition is reported when it begins, once."""

from datetime import datetime

from sortd.config_reporting import NotifyConfig
from sortd.daemon.notices import Condition, Notice, Notices

SETTINGS = NotifyConfig(review_above=10)


def begun(notices: Notices, *conditions: Condition, root_problem: str | None = None) -> list[tuple[str, str | None]]:
    """Return the event and dataset of what has begun."""
    return [(one.event, one.dataset) for one in notices.begun(conditions, SETTINGS, root_problem)]


def test_condition_that_lasts_is_reported_once_and_again_after_it_has_ended() -> None:
    """A changed reason is no new condition."""
    notices = Notices()
    assert begun(notices, Condition("A", held="the guard holds it")) == [("dataset_held", "A")]
    assert begun(notices, Condition("A", held="another reason"), Condition("B", held="x")) == [("dataset_held", "B")]
    assert begun(notices, Condition("A")) == []
    assert begun(notices, Condition("A", held="the guard holds it")) == [("dataset_held", "A")]


def test_review_pile_is_reported_above_the_limit_and_again_after_it_has_shrunk() -> None:
    """A pile around the limit does not cause a message for each image."""
    notices = Notices()
    assert begun(notices, Condition("A", review=10)) == []
    (notice,) = notices.begun([Condition("A", review=1234)], SETTINGS, None)
    assert notice == Notice(
        "review_pile", "A: 1,234 images wait in Review/, more than 10", "A", {"images": 1234, "limit": 10}
    )
    sizes = [10, 11, 9, 11, 8, 11]
    assert [begun(notices, Condition("A", review=size)) for size in sizes] == [[]] * 5 + [[("review_pile", "A")]]


def test_missing_root_is_reported_instead_of_each_dataset() -> None:
    """One disk is missing, not twenty."""
    notices = Notices()
    lost = [Condition(name, missing="is the disk mounted?") for name in "ABC"]
    assert begun(notices, *lost, root_problem="/srv is missing") == [("disk_missing", None)]
    assert begun(notices, *lost, root_problem="/srv is missing") == []
    assert begun(notices, *lost) == [("disk_missing", name) for name in "ABC"]


def test_condition_that_cannot_be_looked_at_has_not_ended() -> None:
    """A disk that comes back causes no second message about what lasted before; one that has ended meanwhile does."""
    notices = Notices()
    lasting = Condition("A", review=11, evidence={"audit": (30, 40)}, precision=0.95)
    assert begun(notices, lasting) == [("review_pile", "A"), ("accuracy_low", "A")]
    assert begun(notices, root_problem="/srv is missing") == [("disk_missing", None)]
    assert begun(notices, lasting) == []
    assert begun(notices, Condition("A", held="another sortd")) == [("dataset_held", "A")]
    assert begun(notices, Condition("A", review=11)) == []
    assert begun(notices, lasting) == []
    assert begun(notices, Condition("A", review=0, evidence={"audit": (40, 40)}, precision=0.95)) == []
    assert begun(notices, lasting) == [("review_pile", "A"), ("accuracy_low", "A")]


def test_accuracy_is_reported_if_the_interval_lies_below_the_promise() -> None:
    """Few checked images, or a share that may be chance, are no reason for a message."""
    for evidence, expected in [
        ({"audit": (5, 10)}, []),  # too few
        ({"audit": (37, 40)}, []),  # 92.5 %, at most 97.4 %
        ({"audit": (30, 40)}, [("accuracy_low", "A")]),
        ({"audit": (40, 40), "corrections": (30, 40)}, [("accuracy_low", "A")]),
        ({}, []),
    ]:
        assert begun(Notices(), Condition("A", evidence=evidence, precision=0.95)) == expected
        assert begun(Notices(), Condition("A", evidence=evidence, precision=None)) == []
    (notice,) = Notices().begun([Condition("A", evidence={"audit": (30, 40)}, precision=0.95)], SETTINGS, None)
    assert "30 of 40" in notice.text
    assert "wanted are 95 %" in notice.text


def test_summary_is_sent_once_a_day_and_counts_since_the_last_one() -> None:
    """Sent at its time, or later if sortd was busy; not on the day on which sortd starts after it."""
    notices, settings = Notices(), NotifyConfig(summary_at="08:00")

    def at(day: int, hour: int, **outcomes: int) -> str | None:
        condition = Condition("A", review=3, held="why" if day == 5 else None, outcomes=outcomes)
        found = notices.summary([condition], settings, datetime(2026, 3, day, hour, 30))  # noqa: DTZ001 -- local time
        return None if found is None else found.text

    assert at(1, 9, filed=5) is None
    assert at(2, 7, filed=6) is None
    assert at(2, 8, filed=7, sent_to_review=2) == "A: 7 filed, 2 sent to review; 3 in Review/"
    assert at(2, 8, filed=8) is None
    assert at(3, 23, filed=8, sent_to_review=2) == "A: 1 filed; 3 in Review/"
    assert at(4, 8, filed=2) == "A: 2 filed; 3 in Review/"  # the dataset was opened again: its counts are new
    assert at(5, 8, filed=2) == "A: nothing moved; 3 in Review/; why"


def test_summary_on_the_day_of_an_early_start_is_sent() -> None:
    """A sortd that starts before the time reports on that day."""
    notices, settings = Notices(), NotifyConfig(summary_at="08:00")
    assert notices.summary([], settings, datetime(2026, 3, 1, 7)) is None  # noqa: DTZ001 -- local time
    found = notices.summary([], settings, datetime(2026, 3, 1, 8))  # noqa: DTZ001 -- local time
    assert found == Notice("daily_summary", "there is no dataset", facts={"datasets": {}})
