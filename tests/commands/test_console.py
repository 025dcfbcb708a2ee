"""Times as people write them, and lines of progress."""

from datetime import datetime, timedelta, timezone

import pytest

from sortd.commands.console import format_duration, format_time, parse_time, progress_lines

NOW = datetime(2026, 3, 15, 10, 30, tzinfo=timezone(timedelta(hours=1)))


@pytest.mark.parametrize(
    ("text", "ago"),
    [
        ("now", timedelta()),
        ("2h", timedelta(hours=2)),
        ("90 min", timedelta(minutes=90)),
        ("1.5d", timedelta(hours=36)),
        ("3 weeks ago", timedelta(weeks=3)),
        ("today", timedelta(hours=10, minutes=30)),
        ("Yesterday", timedelta(days=1, hours=10, minutes=30)),
    ],
)
def test_parse_time_of_ages_and_days_counts_back_from_now(text: str, ago: timedelta) -> None:
    """An age is subtracted; today and yesterday begin at local midnight."""
    assert parse_time(text, NOW) == (NOW - ago).timestamp()


def test_parse_time_is_local_without_a_zone() -> None:
    """A written zone is used; without one the machine's is."""
    assert parse_time("2026-03-15T10:30+01:00", NOW) == NOW.timestamp()
    assert parse_time("2026-03-01", NOW) == datetime(2026, 3, 1).astimezone().timestamp()
    assert parse_time("2026-03-01 14:30", NOW) == datetime(2026, 3, 1, 14, 30).astimezone().timestamp()


def test_parse_time_of_a_time_alone_is_today() -> None:
    """``8:05`` means this morning."""
    expected = datetime(2026, 3, 15, 8, 5).astimezone().timestamp()
    assert parse_time("8:05", NOW) == expected


@pytest.mark.parametrize("text", ["", "soon", "2026-13-01", "-2h", "25:00", "5 fortnights", "0001-01-01"])
def test_parse_time_of_another_text_is_refused_with_examples(text: str) -> None:
    """The message shows valid times."""
    with pytest.raises(ValueError, match="is not a time: write 2026-03-01"):
        parse_time(text, NOW)


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0 s"), (61, "1 min 1 s"), (3600, "1 h"), (90_061, "1 d 1 h"), (-5, "0 s")]
)
def test_format_duration_has_two_units_at_most(seconds: float, words: str) -> None:
    """A duration is shown in its two largest units."""
    assert format_duration(seconds) == words


@pytest.mark.parametrize("seconds", [1e300, float("inf"), -1e18, float("nan")])
def test_format_time_out_of_range_is_a_number(seconds: float) -> None:
    """A journal with an impossible time causes no traceback."""
    assert format_time(seconds) == f"{seconds:g} s"
    assert format_time(0.0).startswith("19")


def test_progress_lines_come_with_a_new_text_and_every_ten_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    """A log gets few lines, however often it is called."""
    now = 0.0
    tell = progress_lines(clock=lambda: now)
    for second in range(25):
        now = float(second)
        tell("loading\n" if second < 2 else "images", second, 0 if second < 2 else 2000)
    assert capsys.readouterr().err.splitlines() == [
        "sortd: loading\\n",
        "sortd: images: 2 of 2,000",
        "sortd: images: 12 of 2,000",
        "sortd: images: 22 of 2,000",
    ]
