"""The figures of a dataset for its pages: accuracy by class, moves by day, and references that look misplaced."""

import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from typing import Any

from sortd.classify.evaluate import evaluate
from sortd.classify.proportions import interval, out_of, proportion
from sortd.classify.types import SupportSet
from sortd.commands.evaluation import precision_plot
from sortd.commands.moves import journal_of
from sortd.config import Config
from sortd.daemon.references import stored_prototypes
from sortd.events import Mode, Outcome
from sortd.layout import Layout
from sortd.review.activity import Activity
from sortd.review.index import Background, Index, dataset_key
from sortd.store.checks import FiledImages

DAYS = 30
"""Days of the plot."""
WEEKS = 26
"""Weeks of the plot of what audits found right."""
SERIES = {
    "filed": (Outcome.FILED, Outcome.REFILED),
    "review": (Outcome.REVIEW,),
    "assigned": (Outcome.ASSIGNED,),
}
"""The series of the plot, from bottom to top, and the outcomes that each of them counts."""
KINDS = ("mislabelled", "duplicate", "outlier")
"""The kinds of suspects, in the order of the page."""
SUSPECTS_SHOWN = 24
CONFUSIONS_SHOWN = 20
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 640.0, 190.0, 44.0, 160.0, 10.0
"""Size and margins of the plot, in SVG units."""
_GAP = 0.2
"""Share of the width of a day that is left empty between two bars."""


def dataset_figures(index: Index, layout: Layout) -> dict[str, Any]:
    """Return the figures of a dataset.

    ``classes``: label, references, filed, checked, and right in words, or None; ``audit`` and ``guesses``: see
    ``proportion``; ``weeks``: see ``_weeks``; ``plot``: see ``_plot``. Raises JournalError.
    """
    prototypes = stored_prototypes(index.config, layout)
    counts = {} if prototypes is None else dict(zip(prototypes.labels, prototypes.counts.tolist(), strict=True))
    first = (datetime.now().astimezone() - timedelta(days=DAYS - 1)).replace(hour=0, minute=0, second=0, microsecond=0)
    with journal_of(index.config, layout).open() as history:
        accuracy, guesses = history.accuracy(), history.guesses()
        by_day = history.counts_by_day(first.timestamp())
    classes = []
    for label in sorted({*index.labels(layout), *accuracy, *counts}):
        one = accuracy.get(label, FiledImages(filed=0, checked=0, corrected=0, undone=0))
        right = out_of(one.right, one.checked) if one.checked else None
        numbers = {"references": counts.get(label, 0), "filed": one.filed, "checked": one.checked}
        classes.append({"label": label, **numbers, "right": right})
    audited = sum(one.audited for one in accuracy.values())
    return {
        "classes": classes,
        "audit": proportion(sum(one.audited_right for one in accuracy.values()), audited),
        "guesses": proportion(*guesses),
        "weeks": _weeks(Activity(index.config.state_dir, layout).checked_by_week(WEEKS)),
        "plot": _plot(by_day, [(first + timedelta(days=day)).date().isoformat() for day in range(DAYS)]),
    }


def _weeks(checked: Sequence[tuple[str, int, int]]) -> list[dict[str, Any]]:
    """Return for each week its ``day``, ``judged`` images, and the share ``right`` with its interval, low and high."""
    bounds = [(day, right, judged, *interval(right, judged)) for day, right, judged in checked]
    return [
        {"day": day, "judged": n, "right": right / n, "low": low, "high": high} for day, right, n, low, high in bounds
    ]


def _plot(by_day: list[tuple[str, str, int]], days: list[str]) -> dict[str, Any] | None:
    """Return the stacked bars of the moves of each day; None without any.

    ``bars``: series, x, y, width, height; ``rows`` and ``columns``: places and texts of the axes; ``table``: day and
    number of each series, for those who read instead.
    """
    numbers: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(SERIES, 0))
    series_of = {str(outcome): name for name, outcomes in SERIES.items() for outcome in outcomes}
    for day, outcome, number in by_day:
        if outcome in series_of and day in days:
            numbers[day][series_of[outcome]] += number
    largest = max((sum(one.values()) for one in numbers.values()), default=0)
    if not largest:
        return None
    top = _round_up(largest)
    step, unit = (_WIDTH - _LEFT) / len(days), (_BOTTOM - _TOP) / top
    bars = []
    for at, day in enumerate(days):
        below = 0
        for name, number in numbers.get(day, {}).items():
            if number:
                place = {
                    "x": round(_LEFT + step * (at + _GAP / 2), 1),
                    "y": round(_BOTTOM - unit * (below + number), 1),
                }
                size = {"width": round(step * (1 - _GAP), 1), "height": round(max(unit * number, 0.5), 1)}
                bars.append({"series": name, "day": day, "number": number, **place, **size})
                below += number
    return {
        "width": _WIDTH,
        "height": _HEIGHT,
        "left": _LEFT,
        "bottom": _BOTTOM,
        "bars": bars,
        "rows": [{"y": round(_BOTTOM - unit * part, 1), "text": f"{part:,}"} for part in sorted({0, top // 2, top})],
        "columns": [{"x": round(_LEFT + step * (at + 0.5), 1), "text": days[at][5:]} for at in range(0, len(days), 7)],
        "table": [{"day": day, **numbers[day]} for day in days if day in numbers],
    }


def _round_up(number: int) -> int:
    """Return the least of 1, 2, 5, 10, 20, 50 … that is not smaller."""
    power = 1
    while True:
        for factor in (1, 2, 5):
            if factor * power >= number:
                return factor * power
        power *= 10


class Evaluations:
    """Evaluations of the references, by dataset: made in another process, again when the prototypes change."""

    def __init__(self, config: Config) -> None:
        """Compute nothing yet."""
        self._config, self._lock = config, threading.Lock()
        self._found: dict[str, tuple[str, dict[str, Any]]] = {}
        self._work: dict[str, tuple[str, Background]] = {}

    def close(self) -> None:
        """End the processes."""
        with self._lock:
            for _, work in self._work.values():
                work.close()
            self._work.clear()

    def find(self, layout: Layout) -> dict[str, Any] | None:
        """Return the evaluation of a dataset as ``_evaluation`` does, {} if there is none; None while it is made."""
        prototypes, key = stored_prototypes(self._config, layout), dataset_key(layout)
        if prototypes is None:
            return {}
        state = f"{prototypes.generation} {prototypes.fingerprint}"
        with self._lock:
            if key in self._work and self._work[key][1].is_done:
                computed, work = self._work.pop(key)
                self._found[key] = computed, work.result() or {}
            if key in self._found and self._found[key][0] == state:
                return self._found[key][1]
            if key not in self._work:
                self._work[key] = state, Background(_evaluation, self._config, layout)
            return None


def suspects_by_kind(index: Index, layout: Layout, found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the suspects that are still there by ``kind``, with ``image`` and, of a duplicate, ``other``."""
    groups = []
    for kind in KINDS:
        members = []
        for one in found:
            image = index.image_at(layout, one["source"]) if one["kind"] == kind else None
            other = None if one["other_source"] is None else index.image_at(layout, one["other_source"])
            if image is not None and (other is not None or kind != "duplicate"):
                members.append({**one, "image": image, "other": other})
        if members:
            groups.append({"kind": kind, "members": members[:SUSPECTS_SHOWN], "hidden": len(members[SUSPECTS_SHOWN:])})
    return groups


def _evaluation(config: Config, layout: Layout) -> dict[str, Any]:
    """Return the leave-one-out evaluation of the stored prototypes, by their images alone; {} if there are none.

    ``accuracy`` and ``judged``; ``classes``: the class reports, the lowest recall first; ``confusions``: class, decided
    class and number, the most frequent first; ``curve``: see ``precision_plot``; ``suspects``.
    """
    prototypes = stored_prototypes(config, layout)
    if prototypes is None or not len(prototypes.references):
        return {}
    support = SupportSet(
        labels=prototypes.labels,
        embeddings=prototypes.references,
        classes=prototypes.classes,
        sources=prototypes.sources,
        encoder_id=prototypes.encoder_id,
        fingerprint=prototypes.fingerprint,
    )
    mode = Mode.BEST if prototypes.settings.mode in {Mode.MIXED, Mode.TEXT} else prototypes.settings.mode
    report = evaluate(support, replace(prototypes.settings, mode=mode))
    mine = next((one for one in report.modes if one.mode == report.mode), None)
    wrong = sorted((one for one in report.confusion if one[0] != one[1]), key=lambda one: -one[2])
    return {
        "accuracy": None if mine is None else mine.distinct_accuracy,
        "judged": 0 if mine is None else mine.distinct_judged,
        "classes": [
            {
                **asdict(one),
                "interval": interval(one.recall * one.judged, one.judged) if one.recall is not None else None,
            }
            for one in sorted(report.class_reports, key=lambda one: (one.recall is None, one.recall or 0.0))
        ],
        "confusions": wrong[:CONFUSIONS_SHOWN],
        "curve": None if mine is None else precision_plot(mine.curve, report.calibration),
        "suspects": [asdict(one) for one in report.suspects],
    }
