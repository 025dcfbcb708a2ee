"""Looks at all datasets every few seconds: sets gauges, says whether sortd is ready, and posts notices.

It runs in the loop. The endpoint asks in its own thread, and reads frozen values only.
"""

import os
from collections.abc import Callable, Mapping
from datetime import datetime

from sortd.core.schedule import PeriodicTimer
from sortd.core.state import State
from sortd.daemon.audit import NEWEST
from sortd.daemon.dataset import Dataset
from sortd.daemon.datasets import Datasets
from sortd.daemon.metrics import Metrics
from sortd.daemon.notices import Condition, Evidence, Notice, Notices
from sortd.layout import Area
from sortd.store.history import History

EVIDENCE_SECONDS = 15.0
"""Between two queries of a journal for checked images, each of another dataset: one can take tens of milliseconds."""


class DatasetObserver:
    """The conditions of all datasets, and what follows from them."""

    def __init__(
        self,
        datasets: Datasets,
        metrics: Metrics,
        *,
        post: Callable[[Notice], None],
        look_for_classes: Callable[[], None],
        local: Callable[[], datetime] = datetime.now,
    ) -> None:
        """Observe ``datasets``; ``look_for_classes`` is called once a day, ``local`` returns the local time."""
        self._datasets, self._metrics, self._post, self._local = datasets, metrics, post, local
        self._look_for_classes = look_for_classes
        self._notices, self._timer = Notices(), PeriodicTimer()
        self._evidence: dict[str, Evidence] = {}
        self._asked = 0
        self.unserved: tuple[str, ...] = ()  # why datasets are not served, in sentences

    def observe(self, now: float, wanted: frozenset[str]) -> None:
        """Look at all datasets; ``now`` is of the monotonic clock, ``wanted`` the events that anybody wants."""
        is_asked = self._metrics.is_on or "accuracy_low" in wanted
        if is_asked and self._timer.is_due("evidence", now, EVIDENCE_SECONDS):
            self._ask_for_evidence()
        conditions = []
        for dataset in self._datasets:
            with self._datasets.isolated(dataset):
                conditions.append(one := self._condition(dataset))
                self._set(dataset, one)
        held = sorted(self._datasets.held.items())
        conditions += [Condition(name, held=found.cause) for name, found in held]
        conditions += [Condition(name, missing=why) for name, why in self._datasets.missing.items()]
        root_problem = self._datasets.root_problem
        reasons = [f"{one.dataset}: {why}" for one in conditions if (why := one.missing or one.held) is not None]
        self.unserved = (*([root_problem] if root_problem else ()), *reasons)
        settings = self._datasets.config.notify
        for notice in self._notices.begun(conditions, settings, root_problem):
            self._post(notice)
        if (summary := self._notices.summary(conditions, settings, self._local())) is not None:
            self._post(summary)
            if "class_proposed" in wanted:
                self._look_for_classes()

    def _condition(self, dataset: Dataset) -> Condition:
        core, problem, is_missing = dataset.sorter, dataset.held_because, False
        if problem is None and (core.built is None or core.references_absent):
            problem = dataset.log.problem  # after any other failed rebuild, the last prototypes decide
            is_missing = core.references_absent and dataset.presence.lock_problem() is None
        if problem is None and not os.path.isdir(inbox := dataset.layout.area(Area.IMAGES)):
            problem, is_missing = f"{inbox} is missing or no folder: put it back, or create it", True
        abstain = self._datasets.config.dataset(dataset.name).abstain
        return Condition(
            dataset.name,
            held=None if is_missing else problem,
            missing=problem if is_missing else None,
            review=core.images.counts[State.REVIEWED],
            outcomes=dataset.log.outcomes,
            evidence=self._evidence.get(dataset.name, {}),
            precision=None if abstain is None else abstain.precision,
        )

    def _set(self, dataset: Dataset, one: Condition) -> None:
        images = dataset.sorter.images
        self._metrics.held(one.dataset, is_held=bool(one.held or one.missing))
        self._metrics.set("sortd_review_images", images.counts[State.REVIEWED], one.dataset)
        self._metrics.set("sortd_backlog", images.waiting, one.dataset)
        if one.precision is not None:
            self._metrics.set("sortd_precision_wanted_ratio", one.precision, one.dataset)
        for evidence, (right, judged) in one.evidence.items():
            self._metrics.set("sortd_checked_images", judged, one.dataset, evidence)
            self._metrics.set("sortd_precision_ratio", right / judged, one.dataset, evidence)

    def _ask_for_evidence(self) -> None:
        """Ask the journal of the next dataset which filed images a person has checked."""
        open_datasets = list(self._datasets)
        self._evidence = {one.name: found for one in open_datasets if (found := self._evidence.get(one.name))}
        if open_datasets:
            self._asked += 1
            dataset = open_datasets[self._asked % len(open_datasets)]
            with self._datasets.isolated(dataset):
                mode = self._datasets.config.dataset(dataset.name).mode
                self._evidence[dataset.name] = checked_images(dataset.journal.history, mode)


def checked_images(history: History, mode: str) -> Evidence:
    """Return the newest checked images of random samples, and those that other acts of a person have checked."""
    newest = history.newest_checked(mode, NEWEST)
    kinds: Mapping[str, list[bool]] = {
        "audit": [one.is_right for one in newest if one.is_audited],
        "corrections": [one.is_right for one in newest if not one.is_audited],
    }
    return {kind: (sum(right), len(right)) for kind, right in kinds.items() if right}
