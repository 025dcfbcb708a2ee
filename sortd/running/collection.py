"""The collection: the datasets below one root, taken up when they appear and let go when they are gone."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from stat import S_ISDIR
from time import monotonic

import structlog

from sortd import logs
from sortd.config import Config
from sortd.errors import LayoutError, StartupError
from sortd.layout import Layout, find_datasets
from sortd.messages import RebuildFailed
from sortd.metrics import Metrics
from sortd.running.copier import Copier
from sortd.running.dataset import Dataset
from sortd.running.site import Site, sorter_settings, teaching_of
from sortd.running.worker import Forget, Job
from sortd.sorting.rounds import Throttle
from sortd.watch import Hint, HintsLost, Watcher

DISCOVERY_PAUSE_SECONDS = 0.2
"""Between two looks for datasets that hints asked for."""

RECOVERY_PAUSE_SECONDS = 5.0
"""Between two scans because hints were lost: in a storm they are lost again and again."""


class Collection:
    """Every dataset that sortd works on now, by name."""

    def __init__(
        self, config: Config, *, site: Site, ask: Callable[[Job], None], copier: Copier, metrics: Metrics
    ) -> None:
        """Begin with none; ``discover`` finds them."""
        self.config = config
        self.datasets: dict[str, Dataset] = {}
        self._site, self._ask, self._copier, self._metrics = site, ask, copier, metrics
        self._watcher: Watcher | None = None
        self._root_is_present = True
        self._began = False
        self._folders: dict[str, tuple[int, int]] = {}
        self._refused: dict[str, str] = {}
        self._discovery = Throttle(DISCOVERY_PAUSE_SECONDS)
        self._recovery = Throttle(RECOVERY_PAUSE_SECONDS)
        self._lost: set[str] = set()  # names of the datasets about which hints were lost; "": any
        self._log: structlog.stdlib.BoundLogger = structlog.get_logger()

    def __iter__(self) -> Iterator[Dataset]:
        """Go through the datasets."""
        return iter(self.datasets.values())

    def watch_with(self, watcher: Watcher) -> None:
        """Let a watcher follow the root, and every dataset that is found from now on."""
        self._watcher = watcher
        watcher.watch_root(os.fspath(self.config.root))

    def discover(self) -> None:
        """Take up datasets that appeared; let one go only when its folder is gone, or another, and the root is there.

        Raises:
            LayoutError: at the start, the root is missing or a dataset's folders cannot serve.
            AlreadyRunningError: at the start, another sortd works on a dataset.
            JournalError: a journal cannot be opened.
        """
        try:
            found = {layout.name: layout for layout in find_datasets(self.config.root)}
        except LayoutError as error:
            self._note_absent_root(error)
            return
        self._root_is_present = True
        for name in self._departed(found):
            self._let_go(name)
        for name, layout in found.items():
            if name not in self.datasets:
                self._take_up(layout)
        self._began = True

    def _departed(self, found: Mapping[str, Layout]) -> list[str]:
        """List the datasets whose folder is gone while the root is there, or was made anew with a Clases/ in it.

        Whoever deletes a dataset and puts another one under its name has a new one. An empty mount point under that
        name is none, nor is a disk that does not answer: what was there is awaited.
        """
        departed = []
        for name, dataset in self.datasets.items():
            try:
                folder = _folder_at(dataset.layout.root)
            except OSError:
                continue
            is_another = folder != self._folders[name] and name in found
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
            dataset.receive(RebuildFailed(str(error), references_absent=True))

    def _take_up(self, layout: Layout) -> None:
        """Begin to work on a dataset; one that cannot serve stops the start, but not the others that run already."""
        try:
            folder = _folder_at(layout.root)
        except OSError:
            return  # its disk does not answer: it is looked for again
        if folder is None:
            return
        try:
            seat = self._copier.seat(layout.name)
            dataset = self._site.open(layout, self.config, ask=self._ask, seat=seat, metrics=self._metrics)
        except StartupError as error:
            if not self._began:
                raise
            if self._refused.get(layout.name) != str(error):
                self._refused[layout.name] = str(error)
                self._log.error(logs.DATASET_HELD, dataset=layout.name, cause="layout", error=str(error))
            return
        self._refused.pop(layout.name, None)
        if self._watcher is not None:
            self._watcher.watch_dataset(os.fspath(layout.root))
        self.datasets[layout.name], self._folders[layout.name] = dataset, folder
        self._site.begin(dataset)
        dataset.scan_handled()
        self._log.info(logs.DATASET_ADDED, dataset=layout.name, root=str(layout.root))

    def _let_go(self, name: str) -> None:
        dataset = self.datasets.pop(name)
        if self._watcher is not None:
            self._watcher.forget(os.fspath(dataset.layout.root))
        self._ask(Forget(name))
        self._site.close(dataset)
        self._log.warning(logs.DATASET_GONE, dataset=name, root=str(dataset.layout.root))

    def hint(self, hint: Hint) -> None:
        """Hand a hint to the dataset that it is about; anything else may be a dataset that comes or goes."""
        dataset = self.datasets.get(self._name_in(hint.path))
        if dataset is not None and dataset.layout.area_of(hint.path) is not None:
            dataset.hint(hint)
        else:
            self._discovery.ask()

    def _name_in(self, path: str) -> str:
        """Return the first name of a path below the root."""
        return path.removeprefix(os.path.join(self.config.root, "")).partition(os.sep)[0]

    def lost(self, lost: HintsLost) -> None:
        """Take note that hints about a dataset, or about anything below the root, were lost: a scan finds the rest."""
        self._lost.add(self._name_in(lost.root) if lost.root else "")
        self._recovery.ask()

    @property
    def deadline(self) -> float:
        """When something is to be done here that a hint or its loss asked for; infinity: nothing."""
        return min(self._discovery.deadline, self._recovery.deadline)

    def catch_up(self) -> None:
        """Do what hints and their loss asked for, once for all that did, and not again and again."""
        if self._discovery.is_due(now := monotonic()):
            self._discovery.begin(now)
            self.discover()
            self._discovery.end(monotonic())
        if self._recovery.is_due(now):
            self._recovery.begin(now)
            lost, self._lost = self._lost, set()
            if lost <= self.datasets.keys():
                self._scan(lost)
            else:
                self.scan()
            self._recovery.end(monotonic())

    def scan(self) -> None:
        """Look at everything anew: the truth, whatever was hinted or not."""
        self.discover()
        self._scan(self.datasets)

    def _scan(self, names: Iterable[str]) -> None:
        for name in names:
            dataset = self.datasets[name]
            dataset.begin_scan()
            dataset.compare_references()
            dataset.scan_handled()

    def poll(self, roots: tuple[str, ...]) -> None:
        """Scan what cannot be watched; where the root itself is among it, new datasets are looked for."""
        if os.fspath(self.config.root) in roots:
            self.discover()
        for dataset in self:
            if os.fspath(dataset.layout.root) in roots:
                dataset.begin_scan()
                dataset.compare_references()

    def reload(self, config: Config) -> None:
        """Take a changed configuration over."""
        self.config = config
        for dataset in self:
            own = config.dataset(dataset.name)
            dataset.reload(sorter_settings(own), teaching_of(own))

    def close(self) -> None:
        """Finish the moves at hand and close every dataset, be it that the journal of one cannot be written."""
        with ExitStack() as closing:
            for dataset in self:
                closing.callback(self._site.close, dataset)
                closing.callback(dataset.flush)


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
