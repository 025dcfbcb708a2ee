"""What is done once a day for each dataset while nothing else is to be done, in short steps of the loop.

Old moves are removed from the journal, and its free pages are returned to the disk; folders in Images/ that sortd
emptied are removed, if the configuration says so. A step takes some ten milliseconds.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from time import time

import structlog

from sortd import logs
from sortd.config import Config
from sortd.daemon.corrections import SCANNED_FACT, record_places
from sortd.daemon.dataset import Dataset
from sortd.errors import DataError
from sortd.events import DatasetId
from sortd.layout import Area, Layout, rule_for_folder
from sortd.moving.emptied import remove_emptied_folders
from sortd.store.journal import Journal
from sortd.store.prune import Pruning, free_pages
from sortd.watch.scan import scan

UPKEEP_FACT = "upkeep_at"  # when it was last completed, in whole seconds since the epoch
DAY_SECONDS = 86_400.0
STEP_SECONDS = 0.2  # between two steps, in which whatever else happens is served
AT_ONCE = 500  # files
WAIT_SECONDS = 2.0  # until a dataset that has other work is asked again

_END = object()


class Upkeep:
    """The daily upkeep of all open datasets."""

    def __init__(self, *, clock: Callable[[], float] = time) -> None:
        """Start with nothing due; ``clock`` gives seconds since the epoch."""
        self._clock = clock
        self._began = clock()
        self._steps: dict[DatasetId, tuple[Dataset, Iterator[None]]] = {}
        self._due: dict[DatasetId, float] = {}  # by the caller's clock

    def turn(self, dataset: Dataset, config: Config, now: float) -> None:
        """Make the next step for a dataset if it is due and the dataset has no other work; raises JournalError."""
        due = self._due.setdefault(dataset.identity, now)
        if now < due:
            return
        self._due[dataset.identity] = now + WAIT_SECONDS
        if not self._may_work(dataset):
            self._steps.pop(dataset.identity, None)  # begun again, since folders may be missing meanwhile
            return
        begun, steps = self._steps.get(dataset.identity, (None, iter(())))
        if begun is not dataset:  # none, or those of the journal that was open before an error
            left = dataset.journal.history.number(UPKEEP_FACT) + DAY_SECONDS - self._clock()
            if 0 < left <= DAY_SECONDS:
                self._due[dataset.identity] = now + left
                return
            steps = self._work(dataset, config)
            self._steps[dataset.identity] = dataset, steps
        if next(steps, _END) is _END:
            del self._steps[dataset.identity]
            dataset.journal.note(UPKEEP_FACT, str(int(self._clock())))
            self._due[dataset.identity] = now + DAY_SECONDS
        else:
            self._due[dataset.identity] = now + STEP_SECONDS

    def next_deadline(self, datasets: Iterable[Dataset]) -> float:
        """Return when the next step is due; infinity without datasets."""
        return min((self._due.get(dataset.identity, 0.0) for dataset in datasets), default=float("inf"))

    def _may_work(self, dataset: Dataset) -> bool:
        """Return whether a dataset has no other work, is complete, and was scanned for moves by a person."""
        scanned = dataset.journal.history.number(SCANNED_FACT) / 1e9
        return dataset.is_drained and scanned >= self._began and dataset.presence.problem() is None

    def _work(self, dataset: Dataset, config: Config) -> Iterator[None]:
        log = structlog.get_logger().bind(dataset=dataset.name)
        root, journal, keep_seconds = dataset.layout.root, dataset.journal, config.journal.keep_seconds
        if keep_seconds is not None:
            pruning = Pruning(journal, root, self._clock() - keep_seconds, removes=True)
            while pruning.step():
                yield
            if pruning.removed:
                log.info(logs.JOURNAL_PRUNED, records=pruning.removed, kept=pruning.kept)
        while free_pages(journal):
            yield
        if config.dataset(dataset.name).emptied_folders == "remove":
            for removed in remove_emptied_folders(root, journal.history, self._clock()):
                if removed is not None:
                    log.info(logs.FOLDER_REMOVED, path=removed)
                yield


def record_all_places(layout: Layout, journal: Journal) -> None:
    """Record what the places of all handled images say of their classes, before old moves are removed.

    Raises DataError if a folder cannot be read, and JournalError.
    """
    refused: list[OSError] = []
    for area in (Area.DATASET, Area.REVIEW):
        files = scan(os.fspath(layout.area(area)), report=refused.append, rule_at_top=rule_for_folder)
        while paths := [path for path, _ in islice(files, AT_ONCE)]:
            record_places(layout, journal, paths)
    for error in refused:
        if not isinstance(error, FileNotFoundError):
            raise DataError(f"{error.filename} cannot be read: {error.strerror}")
