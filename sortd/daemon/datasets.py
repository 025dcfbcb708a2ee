"""The datasets below one root: opened when they appear, closed when they are gone.

A dataset that cannot be opened, or whose journal or disk fails while it is at work, is held: closed, so that nothing of
it moves, and opened again, which recovers it like after a crash, as soon as that works. The others go on.
"""

import errno
import os
import resource
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from stat import S_ISDIR
from time import monotonic

import structlog

from sortd import errors, logs
from sortd.config import Config
from sortd.core.schedule import RETRY_SECONDS, Throttle, doubled_seconds
from sortd.daemon.dataset import Dataset
from sortd.daemon.resources import Resources, sorter_settings, teaching_of
from sortd.daemon.worker import Forget, Job
from sortd.errors import AlreadyRunningError, JournalError, LayoutError, SortdError, StorageError
from sortd.events import DatasetAbsent, DatasetId
from sortd.layout import Layout, find_datasets
from sortd.metrics import Metrics
from sortd.moving.copy_queue import CopyQueue
from sortd.watch.observer import FileEvent
from sortd.watch.watcher import EventsDropped, Watcher

DISCOVERY_PAUSE_SECONDS = 0.2  # between two looks for datasets that events asked for
RECOVERY_PAUSE_SECONDS = 5.0  # between two scans because events were dropped, as in a storm again and again

OF_ONE_DATASET = (SortdError, OSError, sqlite3.Error)  # what a dataset's folders, journal and disk raise

ATTEMPTS_SHARE = 10  # a dataset is opened again after so many times as long as the last attempt took

SPARE_DESCRIPTORS = 256  # left free by datasets, for decoders and moves, which open each file of 64 images
DESCRIPTORS_OF_A_DATASET = 12  # two locks, three files of the journal, three of the watcher, some while it is opened


@dataclass(frozen=True, slots=True)
class Held:
    """Why nothing moves in a dataset, and when it is tried again."""

    layout: Layout
    error: Exception
    cause: str  # in a sentence, with what to do
    since: float  # seconds since the epoch
    retry_at: float  # seconds of the monotonic clock
    failures: int = 0  # how often it failed at work, each time soon after it was opened again

    def facts(self) -> dict[str, object]:
        """Return what ``sortd status`` shows of the dataset, as plain values."""
        return {"problem": self.cause, "held_since": round(self.since, 3), "moving": False}


class Datasets:
    """Every dataset that sortd works on now, by name."""

    def __init__(
        self,
        config: Config,
        *,
        resources: Resources,
        ask: Callable[[Job], None],
        copier: CopyQueue,
        metrics: Metrics,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        """Begin with none; ``discover`` finds them."""
        self.config, self._clock = config, clock
        self.by_name: dict[str, Dataset] = {}
        self.held: dict[str, Held] = {}  # those that it should work on and cannot now
        self._resources, self._ask, self._copier, self._metrics = resources, ask, copier, metrics
        self._watcher: Watcher | None = None
        self._root_is_present = True
        self._began = self._is_stopping = False
        self._numbers = count(1)
        self._folders: dict[str, tuple[int, int]] = {}
        self._taken_up_again: dict[str, tuple[Held, float]] = {}
        self._former: dict[str, int] = {}  # by name, the inode of a dataset's folder that was let go
        self._discovery = Throttle(DISCOVERY_PAUSE_SECONDS)
        self._recovery = Throttle(RECOVERY_PAUSE_SECONDS)
        self._lost: set[str] = set()  # names of the datasets of which events were dropped; "": any
        self._log: structlog.stdlib.BoundLogger = structlog.get_logger()

    def __iter__(self) -> Iterator[Dataset]:
        """Go through the datasets; one that is held meanwhile is no hindrance."""
        return iter(list(self.by_name.values()))

    def at_work(self, identity: DatasetId) -> Dataset | None:
        """Return the dataset that an answer is about; None: it was let go since."""
        dataset = self.by_name.get(identity.name)
        return dataset if dataset is not None and dataset.identity == identity else None

    def watch_with(self, watcher: Watcher) -> None:
        """Let a watcher follow the root, and every dataset that is found from now on."""
        self._watcher = watcher
        watcher.watch_root(os.fspath(self.config.root))

    def discover(self) -> None:
        """Take up datasets that appeared; let one go only when its folder is gone, or another, and the root is there.

        Raises:
            LayoutError: at the start, the root is missing.
            AlreadyRunningError: at the start, another sortd works on every dataset.
        """
        try:
            found = {layout.name: layout for layout in find_datasets(self.config.root)}
        except LayoutError as error:
            self._note_absent_root(error)
            return
        self._root_is_present = True
        for name in self._departed(found):
            self._let_go(name)
        for dataset in self:
            with self.isolated(dataset):
                dataset.require_journal()
        for name, layout in found.items():
            if name not in self.by_name:
                self._take_up(layout)
        errors = [held.error for held in self.held.values()]
        is_second = errors and all(isinstance(error, AlreadyRunningError) for error in errors)
        if is_second and not self._began and not self.by_name:
            raise errors[0]
        self._began = True

    def _departed(self, found: Mapping[str, Layout]) -> list[str]:
        """List the datasets whose folder is gone while the root is there, or was made anew with a Clases/ in it.

        Whoever deletes a dataset and puts another one under its name has a new one. An empty mount point under that
        name is none, nor is a disk that does not answer: what was there is awaited.
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

    def _note_absent_root(self, error: LayoutError) -> None:
        if not self._began:
            raise error
        if self._root_is_present:
            self._root_is_present = False
            self._log.error(logs.ROOT_ABSENT, error=str(error))
        for dataset in self:
            with self.isolated(dataset):
                dataset.receive(DatasetAbsent(str(error)))

    def _take_up(self, layout: Layout) -> None:
        """Begin to work on a dataset; one that cannot serve is held, and is tried again when its time has come."""
        name, began = layout.name, self._clock()
        held = self.held.get(name)
        if self._is_stopping or (held is not None and began < held.retry_at):
            return
        try:
            folder = _folder_at(layout.root)
        except OSError:
            return  # its disk does not answer: it is looked for again
        if folder is None:
            return
        # A disk that was mounted again has another device; a dataset that was made anew has no marker yet.
        is_another = not layout.is_present or self._former.get(layout.name, folder[1]) != folder[1]
        try:
            _require_descriptors()
            client = self._copier.client(DatasetId(name, next(self._numbers)))
            dataset = self._resources.open(layout, self.config, ask=self._ask, client=client, metrics=self._metrics)
            self.by_name[name], self._folders[name] = dataset, folder
            if self._watcher is not None:
                self._watcher.watch_dataset(os.fspath(layout.root))
            if is_another:
                self._ask(Forget(dataset.identity, with_stored=True))
            dataset.begin()
            dataset.scan_handled()
        except Exception as error:  # noqa: BLE001 -- whatever is wrong with one dataset, the others are served
            self._hold(layout, error, retry_at=self._clock() + ATTEMPTS_SHARE * (self._clock() - began))
            return
        if held is not None:
            self._taken_up_again[name] = self.held.pop(name), self._clock()
        self._metrics.held(name, is_held=False)
        self._log.info(logs.DATASET_ADDED, dataset=name, root=str(layout.root))

    def _let_go(self, name: str) -> None:
        self._taken_up_again.pop(name, None)
        self.held.pop(name, None)
        root = self.by_name[name].layout.root if name in self.by_name else self.config.root / name
        if name in self._folders:
            self._former[name] = self._folders[name][1]
        self._forget(name)
        self._metrics.held(name, is_held=False)
        self._log.warning(logs.DATASET_GONE, dataset=name, root=str(root))

    def _forget(self, name: str) -> None:
        """Work on a dataset no more, and close its journal."""
        if (dataset := self.by_name.pop(name, None)) is None:
            return
        self._folders.pop(name, None)
        if self._watcher is not None:
            self._watcher.forget(os.fspath(dataset.layout.root))
        self._ask(Forget(dataset.identity))
        with suppress(*OF_ONE_DATASET):  # what failed may fail to be closed, too; its journal may be gone with it
            self._resources.close(dataset)

    @contextmanager
    def isolated(self, dataset: Dataset) -> Iterator[None]:
        """Do what concerns one dataset; where that fails, hold it, so that the others are served."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 -- whatever is wrong with one dataset, the others are served
            self.hold(dataset, error)

    def tell(self, identity: DatasetId, act: Callable[[Dataset], None]) -> None:
        """Do something with the dataset that an answer is about, unless it was let go or held since."""
        if (dataset := self.at_work(identity)) is not None:
            with self.isolated(dataset):
                act(dataset)

    @contextmanager
    def answering(self, dataset: Dataset) -> Iterator[None]:
        """Do what was asked of one dataset; where its journal or disk fails, hold it, and let whoever asked know.

        Raises:
            StorageError: it failed.
        """
        try:
            yield
        except (StorageError, OSError, sqlite3.Error) as error:
            self.hold(dataset, error)
            raise StorageError(_sentence(error)) from error

    def hold(self, dataset: Dataset, error: Exception) -> None:
        """Hold a dataset that failed at work: close it, and open it again after a pause, which recovers its moves."""
        if self.by_name.get(dataset.name) is not dataset:
            return
        now = self._clock()
        before, at = self._taken_up_again.pop(dataset.name, (None, now))
        failures = 1
        if before is not None and now - at < RETRY_SECONDS[1]:
            self.held[dataset.name] = before
            failures += before.failures
        self._hold(dataset.layout, error, retry_at=now + doubled_seconds(failures), failures=failures)

    def _hold(self, layout: Layout, error: Exception, *, retry_at: float, failures: int | None = None) -> None:
        """Close a dataset and remember why; say so where the cause is another one than before."""
        name, cause, before = layout.name, _sentence(error), self.held.get(layout.name)
        self._forget(name)
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
        """The error of the datasets that are held, with all their causes and the exit code of the first; None: none."""
        errors = [held.error for _, held in sorted(self.held.items())]
        if not errors:
            return None
        causes = "; ".join(f"{name}: {held.cause}" for name, held in sorted(self.held.items()))
        return (type(errors[0]) if isinstance(errors[0], SortdError) else StorageError)(causes)

    def file_event(self, event: FileEvent) -> None:
        """Hand an event to the dataset that it is about; anything else may be a dataset that comes or goes."""
        dataset = self.by_name.get(self._name_in(event.path))
        if dataset is not None and dataset.layout.area_of(event.path) is not None:
            with self.isolated(dataset):
                dataset.file_event(event)
        else:
            self._discovery.ask()

    def _name_in(self, path: str) -> str:
        """Return the first name of a path below the root."""
        return path.removeprefix(os.path.join(self.config.root, "")).partition(os.sep)[0]

    def events_dropped(self, dropped: EventsDropped) -> None:
        """Take note that events of a dataset, or of anything below the root, were dropped: a scan finds the rest."""
        self._lost.add(self._name_in(dropped.root) if dropped.root else "")
        self._recovery.ask()

    @property
    def deadline(self) -> float:
        """When something is to be done here that events asked for; infinity: nothing."""
        return min(self._discovery.deadline, self._recovery.deadline)

    def catch_up(self) -> None:
        """Do what events asked for, and that some were dropped, once for all that did."""
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
        """Look at everything anew, whatever events told of."""
        self.discover()
        self._scan(list(self.by_name))

    def _scan(self, names: Iterable[str]) -> None:
        for name in names:
            dataset = self.by_name[name]
            with self.isolated(dataset):
                dataset.scan_all()
                dataset.scan_handled()

    def poll(self, roots: tuple[str, ...]) -> None:
        """Scan what cannot be watched; where the root itself is among it, look for new datasets."""
        if os.fspath(self.config.root) in roots:
            self.discover()
        for dataset in self:
            if os.fspath(dataset.layout.root) in roots:
                with self.isolated(dataset):
                    dataset.scan_all()

    def reload(self, config: Config) -> None:
        """Take a changed configuration over."""
        self.config = config
        for dataset in self:
            own = config.dataset(dataset.name)
            with self.isolated(dataset):
                dataset.reload(sorter_settings(own), teaching_of(own))

    def stop(self) -> None:
        """Take up no dataset any more: it would never hear that the daemon stops."""
        self._is_stopping = True

    def close(self) -> None:
        """Finish the moves at hand and close every dataset, be it that the journal of one cannot be written."""
        for dataset in self:
            with self.isolated(dataset):
                dataset.flush()
                dataset.scans.left_files.tell(at_once=True)
                self._resources.close(dataset)


def _sentence(error: Exception) -> str:
    """Say what is wrong with a dataset, and what to do."""
    if isinstance(error, OSError):
        mend = errors.advice_for_write(error)
        return f"{error.filename or 'its disk'}: {error.strerror or error}" + (f"; {mend}" if mend else "")
    if isinstance(error, SortdError):
        return str(error)
    return f"{type(error).__name__}: {error}; nobody foresaw this: please report it with the log"


def _kind(error: Exception) -> str:
    """Return what failed, in one word."""
    match error:
        case AlreadyRunningError():
            return "locked"
        case LayoutError():
            return "layout"
        case JournalError():
            return "journal"
        case SortdError() | OSError() | sqlite3.Error():
            return "storage"
        case _:
            return "unforeseen"


def _require_descriptors() -> None:
    """See that another dataset leaves enough descriptors for moves and decoders.

    Raises:
        StorageError: it would not.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = min(SPARE_DESCRIPTORS, limit // 4)
    if len(os.listdir("/proc/self/fd")) + DESCRIPTORS_OF_A_DATASET > limit - spare:
        full = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        advice = errors.advice_for_write(full)
        raise StorageError(f"no more datasets can be opened with a limit of {limit} open files a process; {advice}")


def _folder_at(path: Path) -> tuple[int, int] | None:
    """Identify the folder under a name; None where there is none.

    Raises:
        OSError: the disk does not tell.
    """
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return (found.st_dev, found.st_ino) if S_ISDIR(found.st_mode) else None
