"""The datasets below one root: opened when they appear, closed when they are gone.

A dataset that cannot be opened, or whose journal or disk fails, is held: it is closed, and opened again with growing
delays, which recovers it as after a crash. The others continue.
"""

import errno
import os
import resource
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from stat import S_ISDIR
from time import monotonic

import structlog

from sortd import errors, logs
from sortd.config import Config
from sortd.core.schedule import RETRY_SECONDS, Throttle, doubled_seconds
from sortd.daemon.corrections import limits_of
from sortd.daemon.dataset import Dataset
from sortd.daemon.dataset_lock import OpenDataset, ReportMove, lock_dataset, simulate_dataset
from sortd.daemon.metrics import Metrics
from sortd.daemon.resources import reference_settings_of, sorter_settings
from sortd.daemon.worker import Forget, Job
from sortd.errors import AlreadyRunningError, JournalError, LayoutError, SortdError, StorageError
from sortd.events import DatasetAbsent, DatasetId, ReferencesTouched
from sortd.layout import Layout, find_datasets
from sortd.moving.copy_queue import CopyQueue, CopyQueueClient
from sortd.watch.watcher import EventsDropped, FileEvent, Watcher

DISCOVERY_PAUSE_SECONDS = 0.2  # between two searches for datasets because of events
RECOVERY_PAUSE_SECONDS = 5.0  # between two scans because of dropped events

OF_ONE_DATASET = (SortdError, OSError, sqlite3.Error)  # errors of the folders, journal and disk of a dataset

ATTEMPTS_SHARE = 10  # delay before a dataset is opened again, by the duration of the last attempt

SPARE_DESCRIPTORS = 256  # left for decoders and moves, which open each file of 64 images
DESCRIPTORS_OF_A_DATASET = 12  # two locks, three files of the journal, three of the watcher, some while it is opened


@dataclass(frozen=True, slots=True)
class Held:
    """A dataset in which nothing moves because of an error."""

    layout: Layout
    error: Exception
    cause: str  # in a sentence, with what to do
    since: float  # seconds since the epoch
    retry_at: float  # seconds of the monotonic clock
    failures: int = 0  # in succession, each soon after it was reopened

    def facts(self) -> dict[str, object]:
        """Return the entry of the dataset in ``sortd status``, as plain values."""
        return {"problem": self.cause, "held_since": round(self.since, 3), "moving": False}


class Datasets:
    """All open and held datasets, by name."""

    def __init__(
        self,
        config: Config,
        *,
        ask: Callable[[Job], None],
        copier: CopyQueue,
        metrics: Metrics,
        clock: Callable[[], float] = monotonic,
        dry_run: ReportMove | None = None,
    ) -> None:
        """Start without datasets; ``discover`` finds them. ``dry_run`` is called with each move that is not made."""
        self.config, self._clock = config, clock
        self.by_name: dict[str, Dataset] = {}
        self.held: dict[str, Held] = {}
        self.missing: dict[str, str] = {}  # why a dataset is neither, though configured or served before
        self._ask, self._copier, self._metrics, self._dry_run = ask, copier, metrics, dry_run
        self._run = uuid.uuid4().hex[:8]
        self._state, self._limits = config.state_dir, limits_of(config.decoding)  # as at the start, also after a reload
        self._watcher: Watcher | None = None
        self.root_problem: str | None = None  # why the root cannot be listed
        self._began = self._is_stopping = False
        self._numbers = count(1)
        self._folders: dict[str, tuple[int, int]] = {}
        self._reopened: dict[str, tuple[Held, float]] = {}
        self._former: dict[str, int] = {}  # by name: the inode of the folder of a closed dataset
        # By name: the folder of a dataset that was removed since the start, or the last reload; None: it was held.
        self._gone: dict[str, tuple[int, int] | None] = {}
        self._discovery = Throttle(DISCOVERY_PAUSE_SECONDS)
        self._recovery = Throttle(RECOVERY_PAUSE_SECONDS)
        self._lost: set[str] = set()  # datasets with dropped events; "": all
        self._log: structlog.stdlib.BoundLogger = structlog.get_logger()

    def __iter__(self) -> Iterator[Dataset]:
        """Iterate over a copy of the open datasets."""
        return iter(list(self.by_name.values()))

    def watch_with(self, watcher: Watcher) -> None:
        """Watch the root, and every dataset that is opened from now on."""
        self._watcher = watcher
        watcher.watch_root(os.fspath(self.config.root))

    def discover(self) -> None:
        """Open datasets that appeared, and close those whose folder is gone, or replaced, while the root is there.

        Raises:
            LayoutError: At the start, the root is missing.
            AlreadyRunningError: At the start, another sortd has every dataset.
        """
        try:
            found = {layout.name: layout for layout in find_datasets(self.config.root)}
        except LayoutError as error:
            self._note_absent_root(error)
            return
        self.root_problem = None
        for name in self._departed(found):
            self._gone[name] = self._folders.get(name)
            self._remove(name)
        for dataset in self:
            with self.isolated(dataset):
                dataset.journal.require_in_place()
        for name, layout in found.items():
            if name not in self.by_name:
                self._open(layout)
        self._note_missing(found.keys())
        errors = [held.error for held in self.held.values()]
        is_second = errors and all(isinstance(error, AlreadyRunningError) for error in errors)
        if is_second and not self._began and not self.by_name:
            raise errors[0]
        self._began = True

    def _departed(self, found: Mapping[str, Layout]) -> list[str]:
        """Return the datasets whose folder is gone while the root is there, or was recreated with a Clases/ in it.

        An empty mount point under that name, or a disk that does not respond, does not count: the dataset may come
        back.
        """
        departed = []
        known = {dataset.name: dataset.layout for dataset in self} | {n: held.layout for n, held in self.held.items()}
        for name, layout in known.items():
            try:
                folder = _folder_at(layout.root)
            except OSError:
                continue
            is_another = folder != self._folders.get(name, folder) and name in found
            if is_another or (folder is None and os.path.isdir(self.config.root)):
                departed.append(name)
        return departed

    def _note_missing(self, found: AbstractSet[str]) -> None:
        """Note which datasets are not served, though configured, found or served before, unless they were renamed."""
        if self._is_stopping or self._dry_run is not None:
            return
        renamed = set(self._folders.values())
        self._gone = {name: folder for name, folder in self._gone.items() if folder not in renamed}
        wanted = (self.config.datasets.keys() | self._gone.keys() | found) - self.by_name.keys() - self.held.keys()
        for name in self.missing.keys() - wanted - self.by_name.keys() - self.held.keys():
            self._metrics.forget(name)
        before, self.missing = self.missing, {name: self._why_missing(name) for name in sorted(wanted)}
        for name in self.missing.keys() - before.keys():
            self._metrics.held(name, is_held=True)
            self._log.error(logs.DATASET_MISSING, dataset=name, error=self.missing[name])

    def _why_missing(self, name: str) -> str:
        end = f"remove datasets.{name} from the configuration and " if name in self.config.datasets else ""
        return (
            f"{self.config.root / name} is missing, or its disk does not respond: mount it, or put the folder back; "
            f"if it was removed on purpose, {end}reload sortd"
        )

    def _note_absent_root(self, error: LayoutError) -> None:
        if not self._began:
            raise error
        if self.root_problem is None:
            self.root_problem = str(error)
            self._log.error(logs.ROOT_ABSENT, error=str(error))
        for dataset in self:
            with self.isolated(dataset):
                dataset.receive(DatasetAbsent(str(error)))

    def _open(self, layout: Layout) -> None:
        """Open a dataset; hold it if that fails."""
        name, began = layout.name, self._clock()
        held = self.held.get(name)
        if self._is_stopping or (held is not None and began < held.retry_at):
            return
        try:
            folder = _folder_at(layout.root)
        except OSError:
            return  # its disk does not respond: retried by the next search
        if folder is None:
            return
        # A remounted disk has another device number; a recreated dataset has no marker yet.
        is_another = not layout.is_present or self._former.get(layout.name, folder[1]) != folder[1]
        try:
            _require_descriptors()
            client = CopyQueueClient(DatasetId(name, next(self._numbers)), self._copier)
            dataset = self.by_name[name] = self._lock_and_recover(layout, client)
            self._folders[name] = folder
            if self._watcher is not None:
                self._watcher.watch_dataset(os.fspath(layout.root))
            if is_another:
                self._ask(Forget(dataset.identity, with_stored=True))
            if self._began:  # its references may still be arriving
                dataset.receive(ReferencesTouched())
            dataset.begin()
            dataset.scan_handled()
        except Exception as error:  # noqa: BLE001 -- the others continue, whatever the error
            self._hold(layout, error, retry_at=self._clock() + ATTEMPTS_SHARE * (self._clock() - began))
            return
        if held is not None:
            self._reopened[name] = self.held.pop(name), self._clock()
        self._metrics.held(name, is_held=False)
        self._log.info(logs.DATASET_ADDED, dataset=name, root=str(layout.root))

    def _lock_and_recover(self, layout: Layout, client: CopyQueueClient) -> Dataset:
        """Lock, recover and open a dataset; ``client`` makes its long copies."""
        own = self.config.dataset(layout.name)
        with ExitStack() as stack:
            opened = stack.enter_context(self._opening(layout, client, companions=own.companions))
            stack.callback(client.close)  # before the journal is closed and the lock released
            dataset = Dataset(
                client.dataset,
                opened,
                sorter_settings(own),
                reference_settings_of(own),
                ask=self._ask,
                metrics=self._metrics,
                limits=self._limits if self._dry_run is None else None,
            )
            dataset.move_queue.tell_recovered(opened.recovered)  # may fail, and the locks are released then
            dataset.closing = stack.pop_all()
        return dataset

    def _opening(
        self, layout: Layout, client: CopyQueueClient, *, companions: bool
    ) -> AbstractContextManager[OpenDataset]:
        if self._dry_run is not None:
            return simulate_dataset(layout, self._state, self._dry_run)
        layout.make()
        return lock_dataset(
            layout,
            self._state,
            run=self._run,
            companions=companions,
            submit=client.submit,
            interrupted=lambda: client.is_interrupted,
        )

    def _remove(self, name: str) -> None:
        self._reopened.pop(name, None)
        self.held.pop(name, None)
        root = self.by_name[name].layout.root if name in self.by_name else self.config.root / name
        if name in self._folders:
            self._former[name] = self._folders[name][1]
        self._forget(name)
        self._metrics.forget(name)
        self._log.warning(logs.DATASET_GONE, dataset=name, root=str(root))

    def _forget(self, name: str) -> None:
        """Close a dataset and drop its jobs."""
        if (dataset := self.by_name.pop(name, None)) is None:
            return
        self._folders.pop(name, None)
        if self._watcher is not None:
            self._watcher.forget(os.fspath(dataset.layout.root))
        self._ask(Forget(dataset.identity))
        with suppress(*OF_ONE_DATASET):  # what failed may fail to close, too
            dataset.closing.close()

    @contextmanager
    def isolated(self, dataset: Dataset) -> Iterator[None]:
        """Hold this dataset if the body raises, so that the others continue."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 -- the others continue, whatever the error
            self.hold(dataset, error)

    def tell(self, identity: DatasetId, act: Callable[[Dataset], None]) -> None:
        """Call ``act`` with the dataset of an answer, unless it was closed since."""
        dataset = self.by_name.get(identity.name)
        if dataset is not None and dataset.identity == identity:
            with self.isolated(dataset):
                act(dataset)

    @contextmanager
    def answering(self, dataset: Dataset) -> Iterator[None]:
        """Hold this dataset if its journal or disk fails in the body, and raise ``StorageError`` for the requester."""
        try:
            yield
        except (StorageError, OSError, sqlite3.Error) as error:
            self.hold(dataset, error)
            raise StorageError(_sentence(error)) from error

    def hold(self, dataset: Dataset, error: Exception) -> None:
        """Hold a dataset that failed: close it, and open it again after a delay, which recovers its moves."""
        if self.by_name.get(dataset.name) is not dataset:
            return
        now = self._clock()
        before, at = self._reopened.pop(dataset.name, (None, now))
        failures = 1
        if before is not None and now - at < RETRY_SECONDS[1]:
            self.held[dataset.name] = before
            failures += before.failures
        self._hold(dataset.layout, error, retry_at=now + doubled_seconds(failures), failures=failures)

    def _hold(self, layout: Layout, error: Exception, *, retry_at: float, failures: int | None = None) -> None:
        """Close a dataset and note why; log a new cause. A dry run ends by the error instead."""
        name, cause, before = layout.name, _sentence(error), self.held.get(layout.name)
        self._forget(name)
        if self._dry_run is not None:
            raise error
        if failures is None:
            failures = 0 if before is None else before.failures
        is_new = before is None or before.cause != cause
        since = time.time() if before is None or is_new else before.since
        self.held[name] = Held(layout, error, cause, since, retry_at, failures)
        self._metrics.held(name, is_held=True)
        if is_new:
            trace = None if isinstance(error, OF_ONE_DATASET) else error
            self._log.error(logs.DATASET_HELD, dataset=name, cause=_kind(error), error=cause, exc_info=trace)

    @property
    def held_error(self) -> SortdError | None:
        """The causes of all held datasets, as an error with the exit code of the first; None without held datasets."""
        errors = [held.error for _, held in sorted(self.held.items())]
        if not errors:
            return None
        causes = "; ".join(f"{name}: {held.cause}" for name, held in sorted(self.held.items()))
        return (type(errors[0]) if isinstance(errors[0], SortdError) else StorageError)(causes)

    def file_event(self, event: FileEvent) -> None:
        """Pass an event to its dataset; any other event may concern a new or a removed dataset."""
        dataset = self.by_name.get(self._name_in(event.path))
        if dataset is not None and dataset.layout.area_of(event.path) is not None:
            with self.isolated(dataset):
                dataset.file_event(event)
        else:
            self._discovery.ask()

    def _name_in(self, path: str) -> str:
        return path.removeprefix(os.path.join(self.config.root, "")).partition(os.sep)[0]

    def events_dropped(self, dropped: EventsDropped) -> None:
        """Schedule a scan of a dataset, or of all, whose events were dropped."""
        self._lost.add(self._name_in(dropped.root) if dropped.root else "")
        self._recovery.ask()

    @property
    def next_deadline(self) -> float:
        """When the next work without an event is due; infinity without any."""
        deadlines = [dataset.next_deadline for dataset in self.by_name.values()]
        return min([self._discovery.deadline, self._recovery.deadline, *deadlines])

    def catch_up(self) -> None:
        """Do the scheduled work that is due, once for all events that asked for it."""
        if self._discovery.is_due(now := monotonic()):
            self._discovery.begin(now)
            self.discover()
            self._discovery.end(monotonic())
        if self._recovery.is_due(now):
            self._recovery.begin(now)
            lost, self._lost = self._lost, set()
            if lost <= self.by_name.keys():
                self._scan(lost)
            else:
                self.scan()
            self._recovery.end(monotonic())

    def scan(self) -> None:
        """Scan everything."""
        self.discover()
        self._scan(list(self.by_name))

    def _scan(self, names: Iterable[str]) -> None:
        for name in names:
            dataset = self.by_name[name]
            with self.isolated(dataset):
                dataset.scan_all()
                dataset.scan_handled()

    def poll(self, roots: tuple[str, ...]) -> None:
        """Scan these roots, which are not watched; for the root itself, look for datasets."""
        if os.fspath(self.config.root) in roots:
            self.discover()
        for dataset in self:
            if os.fspath(dataset.layout.root) in roots:
                with self.isolated(dataset):
                    dataset.scan_all()

    def reload(self, config: Config) -> None:
        """Apply a changed configuration; datasets that are gone are not waited for any longer, unless it names them."""
        self.config = config
        self._gone.clear()
        for dataset in self:
            own = config.dataset(dataset.name)
            with self.isolated(dataset):
                dataset.reload(sorter_settings(own), reference_settings_of(own))

    def stop(self) -> None:
        """Open no further dataset; let each finish its moves."""
        self._is_stopping = True
        for dataset in self:
            with self.isolated(dataset):
                dataset.stop()

    def close(self) -> None:
        """Finish the moves under way and close every dataset, even if one fails."""
        for dataset in self:
            with self.isolated(dataset):
                dataset.flush()
                dataset.scans.left_files.tell(at_once=True)
                dataset.closing.close()


def _sentence(error: Exception) -> str:
    """Return what is wrong with a dataset, and what to do."""
    if isinstance(error, OSError):
        parts = [f"{error.filename or 'its disk'}: {error.strerror or error}", errors.advice_for_write(error)]
        return "; ".join(filter(None, parts))
    if isinstance(error, SortdError):
        return str(error)
    return f"{type(error).__name__}: {error}; unexpected error: please report it with the log"


def _kind(error: Exception) -> str:
    """Return the kind of an error, in one word."""
    kinds = {AlreadyRunningError: "locked", LayoutError: "layout", JournalError: "journal"}
    other = "storage" if isinstance(error, OF_ONE_DATASET) else "unforeseen"
    return next((word for kind, word in kinds.items() if isinstance(error, kind)), other)


def _require_descriptors() -> None:
    """Raise ``StorageError`` if another dataset would leave too few descriptors for moves and decoders."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = min(SPARE_DESCRIPTORS, limit // 4)
    if len(os.listdir("/proc/self/fd")) + DESCRIPTORS_OF_A_DATASET > limit - spare:
        advice = errors.advice_for_write(OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
        raise StorageError(f"cannot open more datasets with a limit of {limit} open files per process; {advice}")


def _folder_at(path: Path) -> tuple[int, int] | None:
    """Return device and inode of a folder, None if there is none; raise ``OSError`` if the disk fails."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return (found.st_dev, found.st_ino) if S_ISDIR(found.st_mode) else None
