"""The comparison of alternating sides: order, intervals, verdicts and exit codes, with made-up clocks."""

import json
import math

import pytest

from benchmarks.comparison import (
    EXIT_MISSED,
    EXIT_UNDECIDED,
    Claim,
    Interval,
    Piece,
    Verdict,
    alternate,
    claim_of_ratio,
    conclude,
    exit_code,
    interval_of_median,
    ratios,
    summary,
    timed,
)

SEEN = Interval(1.0, 0.98, 1.02, 0.97, 6)


def test_timed_work_counts_by_both_clocks() -> None:
    """A side returns what was done, and the time that both clocks showed meanwhile."""
    side = timed(lambda: 10, clock=iter((100.0, 104.0)).__next__, processor=iter((7.0, 13.0)).__next__)
    assert side() == Piece(10, 4.0, 6.0)
    assert Piece(10, 4.0).rate == 2.5


def test_alternate_reverses_every_second_round() -> None:
    """No side is always the first of a round, and each runs once a round."""
    order: list[str] = []

    def side(name: str) -> Piece:
        order.append(name)
        return Piece(len(order), 1.0)

    lines: list[str] = []
    pieces = alternate({name: lambda name=name: side(name) for name in "abc"}, rounds=3, report=lines.append)  # type: ignore[misc]
    assert "".join(order) == "abccbaabc"
    assert [piece.count for piece in pieces["a"]] == [1, 6, 7]
    assert len(lines) == 3


def test_ratios_of_a_load_that_comes_and_goes_stay_the_same() -> None:
    """What slows a whole round changes no ratio."""
    slowness = [1.0, 3.0, 1.5, 2.0, 8.0]
    fast = [Piece(20, 1.0 * factor, 2.0) for factor in slowness]
    slow = [Piece(10, 1.0 * factor, 2.0) for factor in slowness]
    assert ratios(fast, slow) == [2.0] * 5
    assert ratios(fast, slow, of_processor_time=True) == [2.0] * 5
    claim = claim_of_ratio("fast over slow", {"fast": fast, "slow": slow}, "fast", "slow", least=1.5)
    assert claim.verdict is Verdict.HELD


@pytest.mark.parametrize(
    ("n", "rank", "confidence"),
    [(1, 1, 0.0), (4, 1, 0.875), (5, 1, 0.9375), (6, 1, 0.96875), (7, 1, 0.984375), (8, 2, 0.9296875), (11, 3, 0.9346)],
)
def test_interval_of_median_takes_the_published_ranks(n: int, rank: int, confidence: float) -> None:
    """Ranks and confidence agree with the tables of the sign test."""
    sample = [float(value) for value in range(n, 0, -1)]
    found = interval_of_median(sample)
    assert (found.low, found.high) == (rank, n + 1 - rank)
    assert found.median == (n + 1) / 2
    assert math.isclose(found.confidence, confidence, abs_tol=1e-4)
    assert found.rounds == n


def test_interval_of_median_of_many_rounds_ignores_an_outlier() -> None:
    """From eight rounds on, one disturbed round does not widen the interval."""
    found = interval_of_median([1.0, 1.01, 0.99, 1.0, 1.02, 0.98, 1.0, 50.0])
    assert found.high == 1.02


@pytest.mark.parametrize(
    ("interval", "least", "most", "verdict"),
    [
        (SEEN, 0.95, None, Verdict.HELD),
        (SEEN, 1.05, None, Verdict.MISSED),
        (SEEN, 1.0, None, Verdict.UNDECIDED),
        (SEEN, None, 1.05, Verdict.HELD),
        (SEEN, None, 0.95, Verdict.MISSED),
        (SEEN, None, 1.0, Verdict.UNDECIDED),
        (SEEN, None, None, None),
        (Interval(2.0, 1.5, 2.1, 0.97, 6), 1.0, None, Verdict.UNDECIDED),  # far above the limit, but wide
        (Interval(2.0, 1.98, 2.02, 0.875, 4), 1.0, None, Verdict.UNDECIDED),  # of too few rounds
    ],
)
def test_claim_gives_a_verdict_only_where_rounds_agree(
    interval: Interval, least: float | None, most: float | None, verdict: Verdict | None
) -> None:
    """A limit within the interval, a wide interval and too few rounds give no verdict."""
    assert Claim("ratio", interval, least, most).verdict is verdict


def test_exit_code_of_claims_puts_missed_before_undecided() -> None:
    """0 if all are held, 1 if one is missed, 3 if one has no verdict."""
    held, missed, undecided = (Claim("ratio", SEEN, least) for least in (0.9, 1.1, 1.0))
    assert exit_code([]) == exit_code([held, Claim("ratio", SEEN)]) == 0
    assert exit_code([held, undecided]) == EXIT_UNDECIDED
    assert exit_code([undecided, missed]) == EXIT_MISSED


def test_conclude_prints_no_verdict_where_rounds_disagree(capsys: pytest.CaptureFixture[str]) -> None:
    """The text and the JSON both say that there is no verdict, and which machine it was."""
    pieces = {"a": [Piece(4, 2.0, 1.0)] * 6, "b": [Piece(4, seconds, 1.0) for seconds in (1, 2, 3, 1, 2, 3)]}
    claims = [claim_of_ratio("a over b", pieces, "a", "b", least=1.0)]
    assert conclude(summary(pieces), claims, as_json=False, rounds=6) == EXIT_UNDECIDED
    shown = capsys.readouterr().out
    assert "a over b: 1 [0.5, 1.5], at least 1: no verdict, the rounds disagree" in shown
    assert "held" not in shown
    assert conclude(summary(pieces), claims, as_json=True, rounds=6, more={"photos": 4}) == EXIT_UNDECIDED
    printed = json.loads(capsys.readouterr().out)
    assert printed["n"] == 6
    assert {"processor", "instructions", "load"} <= printed["machine"].keys()
    assert printed["figures"]["claims"][0]["verdict"] == Verdict.UNDECIDED
    assert printed["figures"]["sides"]["a"] == {"per_second": 2.0, "quartiles": [2.0, 2.0], "processor_ms_each": 250.0}
    assert printed["figures"]["photos"] == 4


def test_summary_states_median_and_quartiles() -> None:
    """The spread of a side is that of its rates over the rounds."""
    rates = summary({"side": [Piece(1, 1 / rate, 0.01) for rate in (1, 2, 3, 4, 5)]})["side"]
    assert rates == {"per_second": 3.0, "quartiles": [2.0, 4.0], "processor_ms_each": 10.0}
    assert summary({"side": [Piece(1, 0.5)]})["side"]["quartiles"] == [2.0, 2.0]
