"""What people are notified of: which conditions of the datasets have begun since they were last looked at."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, time
from typing import Any

from sortd.classify.proportions import interval, out_of
from sortd.config_reporting import NotifyConfig

ENOUGH_FOR_ACCURACY = 20
"""Checked images; fewer say too little, whatever their interval."""
_REARMED = 0.8
"""Share of ``review_above`` to which a pile must sink before it is reported again."""

Evidence = Mapping[str, tuple[int, int]]
"""Checked images by kind of evidence: how many are right, of how many."""


@dataclass(frozen=True, slots=True)
class Notice:
    """One event for people and hooks; ``text`` is one line, or more."""

    event: str
    text: str
    dataset: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Condition:
    """The condition of one dataset."""

    dataset: str
    held: str | None = None  # why nothing is moved
    missing: str | None = None  # which folder or disk is missing
    review: int | None = None  # images in Review/; None while the dataset is not open
    outcomes: Mapping[str, int] = field(default_factory=dict)  # since the dataset was opened
    evidence: Evidence = field(default_factory=dict)
    precision: float | None = None  # the wanted share of right images


class Notices:
    """Finds what has begun. A condition that lasts is reported once, and again after it has ended.

    One that cannot be looked at, since the dataset or the root is away, has not ended.
    """

    def __init__(self) -> None:
        """Begin without any condition."""
        self._lasting: set[tuple[str, str]] = set()
        self._summed_up: date | None = None
        self._counted: dict[str, Mapping[str, int]] = {}

    def begun(self, conditions: Iterable[Condition], settings: NotifyConfig, root_problem: str | None) -> list[Notice]:
        """Return a notice for each condition that has begun; while the root is missing, only for that."""
        before, conditions = self._lasting, list(conditions)
        if root_problem is not None:
            now, unknown = {("disk_missing", ""): Notice("disk_missing", root_problem)}, before
        else:
            now = {(one.event, one.dataset or ""): one for found in conditions for one in self._of(found, settings)}
            unknown = {("review_pile", one.dataset) for one in conditions if one.review is None}
            unknown |= {("accuracy_low", one.dataset) for one in conditions if not one.evidence}
        self._lasting = set(now) | (before & unknown)
        return [notice for key, notice in now.items() if key not in before]

    def _of(self, found: Condition, settings: NotifyConfig) -> Iterable[Notice]:
        name = found.dataset
        if found.missing is not None:
            yield Notice("disk_missing", f"{name}: {found.missing}", name, {"reason": found.missing})
        if found.held is not None:
            text = f"{name} is held, so nothing in it is moved: {found.held}"
            yield Notice("dataset_held", text, name, {"reason": found.held})
        limit = settings.review_above * (_REARMED if ("review_pile", name) in self._lasting else 1)
        if found.review is not None and found.review > limit:
            text = f"{name}: {found.review:,} images wait in Review/, more than {settings.review_above:,}"
            yield Notice("review_pile", text, name, {"images": found.review, "limit": settings.review_above})
        for evidence, (right, judged) in found.evidence.items():
            if found.precision is None or judged < ENOUGH_FOR_ACCURACY:
                continue
            if interval(right, judged)[1] < found.precision:
                wanted = f"{100 * found.precision:g} %"
                text = f"{name}: {out_of(right, judged)} of the newest checked images are right; wanted are {wanted}"
                facts = {"evidence": evidence, "right": right, "judged": judged, "wanted": found.precision}
                yield Notice("accuracy_low", text, name, facts)
                return

    def summary(self, conditions: Sequence[Condition], settings: NotifyConfig, local: datetime) -> Notice | None:
        """Return the summary once a day, from the configured time on; None at any other time.

        It counts what was moved since the last summary or, for the first one, since the start.
        """
        is_due = local.time() >= time.fromisoformat(settings.summary_at)
        if self._summed_up is None:  # a sortd that starts later begins with the next day
            self._summed_up = local.date() if is_due else date.min
        if not is_due or self._summed_up == local.date():
            return None
        self._summed_up = local.date()
        counts = {one.dataset: _since(self._counted.get(one.dataset, {}), one.outcomes) for one in conditions}
        self._counted = {one.dataset: dict(one.outcomes) for one in conditions}
        facts = {
            one.dataset: {
                "moved": counts[one.dataset],
                "in_review": one.review,
                "problem": one.held or one.missing,
            }
            for one in conditions
        }
        lines = [_line(one, counts[one.dataset]) for one in conditions]
        return Notice("daily_summary", "\n".join(lines) or "there is no dataset", facts={"datasets": facts})


def _since(before: Mapping[str, int], now: Mapping[str, int]) -> dict[str, int]:
    """Return the increase of counts, which start again when a dataset is opened again."""
    is_same = all(now.get(key, 0) >= number for key, number in before.items())
    return {key: number - (before.get(key, 0) if is_same else 0) for key, number in now.items()}


def _line(found: Condition, moved: Mapping[str, int]) -> str:
    counts = [f"{number:,} {outcome.replace('_', ' ')}" for outcome, number in sorted(moved.items()) if number]
    parts = [", ".join(counts) or "nothing moved"]
    if found.review:
        parts.append(f"{found.review:,} in Review/")
    if problem := found.held or found.missing:
        parts.append(problem)
    return f"{found.dataset}: {'; '.join(parts)}"
