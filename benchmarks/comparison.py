"""Comparison of programs on a machine that other programs use, too: alternating sides, and intervals of their ratios.

Every round runs each side once for a few seconds, every second round in reversed order, so that a load that comes and
goes, or a slow drift, falls on all sides alike. Ratios are formed within a round. From the ratios of all rounds follow
their median and an interval for it that assumes nothing about their distribution.

A claim states the limit of a ratio. It is held or missed if the whole interval lies on one side of the limit. If the
interval contains the limit, is wide, or comes of too few rounds, the rounds disagree, and there is no verdict: the
command exits with 3, and is run again on a quieter machine or with more rounds.
"""

import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from benchmarks.harness import print_json

CONFIDENCE = 0.9
"""Of an interval: the error is at most 5 % to each side. Five rounds are the fewest that reach it."""
MOST_WIDTH = 0.25
"""Of an interval with a verdict, as a share of its median."""
EXIT_MISSED, EXIT_UNDECIDED = 1, 3


@dataclass(frozen=True, slots=True)
class Piece:
    """Work that a side has done in one round."""

    count: float
    """Images, or other units of work."""
    seconds: float
    processor_seconds: float = 0.0
    """Of all its processes."""

    @property
    def rate(self) -> float:
        """Units of work each second."""
        return self.count / self.seconds


Side = Callable[[], Piece]
"""Does a piece of work, of a few seconds."""
Pieces = Mapping[str, Sequence[Piece]]
"""What each side has done, by its name and round."""


def timed(
    work: Callable[[], float],
    *,
    clock: Callable[[], float] = time.perf_counter,
    processor: Callable[[], float] = time.process_time,
) -> Side:
    """Return a side that times ``work``, which returns how many units of work it has done.

    ``processor`` returns the processor time of the processes that work; of this one by default.
    """

    def side() -> Piece:
        busy, began = processor(), clock()
        count = work()
        seconds = clock() - began
        return Piece(count, seconds, processor() - busy)

    return side


def say(line: str) -> None:
    """Print a line of progress to stderr."""
    print(line, file=sys.stderr, flush=True)


def alternate(sides: Mapping[str, Side], *, rounds: int, report: Callable[[str], None] = say) -> dict[str, list[Piece]]:
    """Run each side once a round, in reversed order every second round."""
    pieces: dict[str, list[Piece]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            pieces[name].append(sides[name]())
        rates = ", ".join(f"{name} {done[-1].rate:.3g}" for name, done in pieces.items())
        report(f"round {number + 1} of {rounds}, a second: {rates}; load {os.getloadavg()[0]:.1f}")
    return pieces


# ------------------------------------------------------------ intervals


@dataclass(frozen=True, slots=True)
class Interval:
    """An interval for the median of a distribution, from a sample."""

    median: float
    low: float
    high: float
    confidence: float
    """The least probability that such an interval contains the distribution's median."""
    rounds: int


def interval_of_median(sample: Iterable[float], *, confidence: float = CONFIDENCE) -> Interval:
    """Return the narrowest interval between order statistics that has the confidence, or the whole range.

    Of n independent values of any continuous distribution, the median lies between the k-th smallest and the k-th
    largest with probability 1 - 2 P(B < k), B being binomial with n and 1/2 (H. A. David and H. N. Nagaraja, Order
    Statistics, 3rd edition, section 7.1; J.-Y. Le Boudec, Performance Evaluation, theorem 2.1).
    """
    ordered = sorted(sample)
    n = len(ordered)

    def covered(k: int) -> float:
        return float(1 - 2 * sum(math.comb(n, i) for i in range(k)) / 2**n)

    k = max((k for k in range(1, (n + 1) // 2 + 1) if covered(k) >= confidence), default=1)
    return Interval(statistics.median(ordered), ordered[k - 1], ordered[n - k], covered(k), n)


def ratios(over: Sequence[Piece], under: Sequence[Piece], *, of_processor_time: bool = False) -> list[float]:
    """Return, by round, how many times as much work a side does as another in the same time."""
    if of_processor_time:
        return [
            (one.count / one.processor_seconds) / (other.count / other.processor_seconds)
            for one, other in zip(over, under, strict=True)
        ]
    return [one.rate / other.rate for one, other in zip(over, under, strict=True)]


# ------------------------------------------------------------ claims


class Verdict(StrEnum):
    """The result of a claim."""

    HELD = "held"
    MISSED = "MISSED"
    UNDECIDED = "no verdict, the rounds disagree"


@dataclass(frozen=True, slots=True)
class Claim:
    """A measured ratio or time, with its limit if it has one."""

    what: str
    interval: Interval
    least: float | None = None
    most: float | None = None

    @property
    def verdict(self) -> Verdict | None:
        """Whether the limit is met; None without a limit."""
        if self.least is None and self.most is None:
            return None
        least, most, found = self.least, self.most, self.interval
        if found.confidence < CONFIDENCE or found.high - found.low > MOST_WIDTH * abs(found.median):
            return Verdict.UNDECIDED
        if (least is not None and found.high < least) or (most is not None and found.low > most):
            return Verdict.MISSED
        is_held = (least is None or found.low >= least) and (most is None or found.high <= most)
        return Verdict.HELD if is_held else Verdict.UNDECIDED

    def __str__(self) -> str:
        """Return a line for people."""
        found = self.interval
        limits = [f"{name} {limit:.3g}" for name, limit in (("at least", self.least), ("at most", self.most)) if limit]
        text = f"{self.what}: {found.median:.3g} [{found.low:.3g}, {found.high:.3g}]"
        return text if self.verdict is None else f"{text}, {' and '.join(limits)}: {self.verdict}"


def claim_of_ratio(
    what: str,
    pieces: Pieces,
    over: str,
    under: str,
    *,
    least: float | None = None,
    most: float | None = None,
    of_processor_time: bool = False,
) -> Claim:
    """Return the claim that a side does so many times as much work as another in the same time."""
    by_round = ratios(pieces[over], pieces[under], of_processor_time=of_processor_time)
    return Claim(what, interval_of_median(by_round), least, most)


def exit_code(claims: Iterable[Claim]) -> int:
    """Return 1 if a claim is missed, 3 if one has no verdict, else 0."""
    verdicts = {claim.verdict for claim in claims}
    if Verdict.MISSED in verdicts:
        return EXIT_MISSED
    return EXIT_UNDECIDED if Verdict.UNDECIDED in verdicts else 0


# ------------------------------------------------------------ results


def summary(pieces: Pieces) -> dict[str, dict[str, Any]]:
    """Return each side's median and quartiles over the rounds: units a second, milliseconds of processors for each."""
    found = {}
    for name, done in pieces.items():
        rates = [piece.rate for piece in done]
        quartiles = statistics.quantiles(rates, n=4, method="inclusive") if len(rates) > 1 else rates * 3
        processor = statistics.median(1e3 * piece.processor_seconds / piece.count for piece in done)
        found[name] = {
            "per_second": round(quartiles[1], 3),
            "quartiles": [round(quartiles[0], 3), round(quartiles[2], 3)],
            "processor_ms_each": round(processor, 2),
        }
    return found


def conclude(
    sides: Mapping[str, Mapping[str, Any]],
    claims: Sequence[Claim],
    *,
    as_json: bool,
    rounds: int,
    more: Mapping[str, Any] | None = None,
) -> int:
    """Print summaries of sides, claims and further figures; return the exit code."""
    if as_json:
        stated = [{**asdict(claim), "verdict": claim.verdict} for claim in claims]
        print_json({"sides": sides, "claims": stated, **(more or {})}, n=rounds)
        return exit_code(claims)
    for name, side in sides.items():
        low, high = side["quartiles"]
        print(
            f"{name:32} {side['per_second']:9.4g} a second ({low:.4g} to {high:.4g}), "
            f"{side['processor_ms_each']:.4g} ms of processors each"
        )
    for line in (*claims, *(f"{name}: {figure}" for name, figure in (more or {}).items())):
        print(line)
    if exit_code(claims) == EXIT_UNDECIDED:
        print("the rounds disagree: measure again on an idle machine, or with more --rounds")
    return exit_code(claims)
