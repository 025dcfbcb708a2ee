"""The daemon: the loop that feeds the cores of all datasets, and the order in which everything starts and stops.

Three threads, named and joined: this one (cores, journals, moves), the watcher's (posts hints) and the worker's
(decodes, encodes, rebuilds). They share this loop's inbox and frozen values. There is no polling: the loop sleeps until
a message comes or the nearest deadline passes.

    start   lock and recover each dataset; begin to load the model; watch; scan; READY when all is true
    stop    begin nothing new; finish the moves at hand; stop watcher and worker; close the journals
"""

import os
import queue
import signal
from collections.abc import Callable, Iterator
from time import monotonic

import structlog

from sortd import __version__, logs
from sortd.config import Config, restart_needed
from sortd.control import answer
from sortd.dataset import Dataset
from sortd.errors import ConfigError, LayoutError
from sortd.layout import Layout, find_datasets
from sortd.messages import RebuildFailed, StopRequested
from sortd.metrics import Metrics
from sortd.requests import Requests
from sortd.sdnotify import Notifier
from sortd.signals import Signalled, signals_posted
from sortd.site import Site, sorter_settings, teaching_of
from sortd.status import Status, started_ticks
from sortd.watch import Hint, HintsLost, Loss, Watcher
from sortd.worker import Answer, Forget, Posted, Worker, WorkerDied, WorkerReady

STOP_SECONDS = 4.0
"""How long the worker may take to end its forward when the daemon stops."""

STUCK_SECONDS = 300.0
"""A worker that made no progress for so long is stuck: the watchdog is not fed any more, and systemd restarts us."""

STATUS_SECONDS = 2.0
"""The shortest pause between two writes of the status file."""

HEALTH_SECONDS = 30.0
"""How often the watcher is asked whether it still hears."""


Message = Hint | HintsLost | Posted | Signalled


class Daemon:
    """One run: all datasets below one root, one worker, one watcher."""

    def __init__(
        self,
        config: Config,
        *,
        site: Site,
        reload: Callable[[], Config],
        notifier: Notifier,
        metrics: Metrics,
        once: bool = False,
    ) -> None:
        """Take the collaborators over; nothing is touched before ``run``.

        Args:
            config: what to do, valid.
            site: opens datasets and loads the model.
            reload: reads the configuration anew; raises ``ConfigError``.
            notifier: speaks to systemd.
            metrics: counts.
            once: stop when nothing is left to do.
        """
        self.config = config
        self.datasets: dict[str, Dataset] = {}
        self.inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.model: WorkerReady | None = None
        self.config_problem: str | None = None
        self._site, self._reload, self._notifier, self._metrics = site, reload, notifier, metrics
        self._once = once
        self._worker = Worker(site.load, site.unload, self.inbox.put)
        self._watcher: Watcher | None = None
        self._status = Status(site.state_folder)
        self._requests = Requests(site.state_folder)
        self._log: structlog.stdlib.BoundLogger = structlog.get_logger()
        self._pid = os.getpid()
        self._is_ready = False
        self._is_stopping = False
        self._root_is_present = True
        self._next = dict.fromkeys(("scan", "ping", "status", "health"), 0.0)

    # ------------------------------------------------------------ life

    def run(self) -> None:
        """Work until SIGTERM or SIGINT, or with ``once`` until nothing is left to do.

        Raises:
            SortdError: what stopped it: the model, the layout, the journal.
        """
        with signals_posted(self.inbox.put):
            try:
                self._start()
                while not self._is_done():
                    self._turn()
            finally:
                self._stop()

    def _start(self) -> None:
        self._log.info(logs.DAEMON_STARTING, root=str(self.config.root), model=self.config.model)
        self._worker.start()
        if not self._once:
            self._watcher = Watcher(self.inbox.put, polling=self.config.polling)
            self._watcher.watch_root(os.fspath(self.config.root))
        self._discover()
        if self._once and not self.datasets:
            raise LayoutError(
                f"{self.config.root} holds no dataset: a folder with a Clases/ in it; `sortd init DIR` makes one"
            )
        self._next["scan"] = monotonic() + self.config.rescan_seconds

    def _is_done(self) -> bool:
        if self._is_stopping:
            return all(dataset.sorter.is_stopped for dataset in self.datasets.values())
        if not self._once or self.model is None:
            return False
        return all(dataset.is_drained or dataset.problem for dataset in self.datasets.values())

    def _stop(self) -> None:
        self._notifier.stopping()
        if self._watcher is not None:
            self._watcher.close()
        ended = self._worker.stop(STOP_SECONDS)
        for dataset in self.datasets.values():
            dataset.flush()
            self._site.close(dataset)
        self._write_status(running=False)
        self._log.info(logs.DAEMON_STOPPED, worker_ended=ended, **self._totals())

    def _totals(self) -> dict[str, int]:
        totals: dict[str, int] = {}
        for dataset in self.datasets.values():
            for outcome, count in dataset.account.outcomes.items():
                totals[outcome] = totals.get(outcome, 0) + count
        return totals

    # ------------------------------------------------------------ one turn

    def _turn(self) -> None:
        for message in self._messages():
            self._take(message)
        now = monotonic()
        for dataset in self.datasets.values():
            dataset.tick(now)
            dataset.continue_scan()
            dataset.flush()
        self._periodic(now)

    def _messages(self) -> Iterator[Message]:
        """Yield what has arrived, waiting for the first until the nearest deadline."""
        try:
            yield self.inbox.get(timeout=self._patience(monotonic()))
            for _ in range(self.inbox.qsize()):
                yield self.inbox.get_nowait()
        except queue.Empty:
            return

    def _patience(self, now: float) -> float:
        if any(dataset.is_scanning or dataset.has_moves for dataset in self.datasets.values()):
            return 0.0
        deadlines = [d for dataset in self.datasets.values() if (d := dataset.sorter.next_deadline()) is not None]
        deadlines += [self._next["scan"], self._next["health"], self._next["ping"]]
        return max(0.0, min(deadline for deadline in deadlines if deadline) - now)

    def _take(self, message: Message) -> None:
        match message:
            case Hint(path=path):
                self._hint(path, message)
            case HintsLost(root=root, why=why, loss=loss):
                self._log.warning(f"watch.{loss.value}", root=root, why=why)
                if loss is Loss.OVERFLOWED:
                    self._metrics.watch_overflow()
                self._scan_all()
            case Answer(dataset=name):
                if name in self.datasets:
                    self.datasets[name].answer(message)
            case WorkerReady():
                self.model = message
                self._log.info(logs.MODEL_LOADED, model=message.description, encoder_id=message.encoder_id)
            case WorkerDied(error=error):
                raise error
            case Signalled(number=number):
                self._signalled(number)

    def _hint(self, path: str, hint: Hint) -> None:
        for dataset in self.datasets.values():
            if dataset.layout.area_of(path) is not None:
                dataset.hint(hint)
                return
        self._discover()

    # ------------------------------------------------------------ datasets

    def _discover(self) -> None:
        """Take up datasets that appeared; let one go only when its folder is gone and the root is there."""
        try:
            found = {layout.name: layout for layout in find_datasets(self.config.root)}
        except LayoutError as error:
            if self._root_is_present:
                self._root_is_present = False
                self._log.error(logs.ROOT_ABSENT, error=str(error))
            for dataset in self.datasets.values():
                dataset.receive(RebuildFailed(str(error), references_absent=True))
            if self._once or not self.datasets:
                raise
            return
        self._root_is_present = True
        for name in [name for name, dataset in self.datasets.items() if not dataset.layout.root.is_dir()]:
            self._let_go(name)
        for name, layout in found.items():
            if name not in self.datasets:
                self._take_up(layout)

    def _take_up(self, layout: Layout) -> None:
        dataset = self._site.open(layout, self.config, ask=self._worker.ask, metrics=self._metrics)
        if self._watcher is not None:
            self._watcher.watch_dataset(os.fspath(layout.root))
        self.datasets[layout.name] = dataset
        self._site.begin(dataset)
        self._log.info(logs.DATASET_ADDED, dataset=layout.name, root=str(layout.root))

    def _let_go(self, name: str) -> None:
        dataset = self.datasets.pop(name)
        if self._watcher is not None:
            self._watcher.forget(os.fspath(dataset.layout.root))
        self._worker.ask(Forget(name))
        self._site.close(dataset)
        self._log.warning(logs.DATASET_GONE, dataset=name, root=str(dataset.layout.root))

    def _scan_all(self) -> None:
        self._discover()
        for dataset in self.datasets.values():
            dataset.begin_scan()
            dataset.compare_references()
            dataset.scan_corrections()

    # ------------------------------------------------------------ what comes round

    def _periodic(self, now: float) -> None:
        if now >= self._next["scan"]:
            self._next["scan"] = now + self.config.rescan_seconds
            self._scan_all()
        if now >= self._next["health"]:
            self._next["health"] = now + HEALTH_SECONDS if self._watcher is None else self._watcher.health(now)
        if not self._is_ready and self.model is not None and self._all_answered():
            self._is_ready = True
            self._log.info(logs.DAEMON_READY, datasets=sorted(self.datasets), model=self.model.description)
            self._notifier.ready()
        if now >= self._next["ping"] and self._notifier.watchdog_seconds:
            self._next["ping"] = now + self._notifier.watchdog_seconds / 2
            busy = self._worker.busy_since
            if busy is None or now - busy < STUCK_SECONDS:
                self._notifier.watchdog()
        if now >= self._next["status"]:
            self._next["status"] = now + STATUS_SECONDS
            self._write_status(running=True)

    def _all_answered(self) -> bool:
        """Tell whether each dataset has scanned once and knows its prototypes, or why it has none."""
        return all(
            not dataset.is_scanning and (dataset.problem or not dataset.sorter.is_rebuilding)
            for dataset in self.datasets.values()
        )

    def _write_status(self, *, running: bool) -> bool:
        return self._status.write(self.facts(running=running))

    def facts(self, *, running: bool) -> dict[str, object]:
        """Return what ``sortd status`` shows of this run, as plain values."""
        return {
            "running": running,
            "pid": self._pid,
            "started_ticks": started_ticks(self._pid),
            "version": __version__,
            "root": str(self.config.root),
            "ready": self._is_ready,
            "model": None if self.model is None else self.model.description,
            "encoder_id": None if self.model is None else self.model.encoder_id,
            "config_problem": self.config_problem,
            "watching": []
            if self._watcher is None
            else [
                {"root": status.root, "mode": status.mode.value, "why": status.why} for status in self._watcher.status()
            ],
            "datasets": {name: dataset.facts() for name, dataset in sorted(self.datasets.items())},
        }

    # ------------------------------------------------------------ signals and reload

    def _signalled(self, number: int) -> None:
        if number == signal.SIGHUP:
            self.reload()
        elif number == signal.SIGUSR1:
            self._requests.serve(lambda request: answer(self, request))
        elif number in {signal.SIGTERM, signal.SIGINT}:
            self._is_stopping = True
            for dataset in self.datasets.values():
                dataset.receive(StopRequested())

    def reload(self) -> None:
        """Read the configuration anew: parse, validate, swap; a bad file keeps the old one and says so."""
        self._notifier.reloading()
        try:
            config = self._reload()
        except ConfigError as error:
            self.config_problem = str(error)
            self._log.error(logs.CONFIG_REFUSED, error=str(error))
        else:
            waits = restart_needed(self.config, config)
            self.config, self.config_problem = config, None
            for dataset in self.datasets.values():
                own = config.dataset(dataset.name)
                dataset.reload(sorter_settings(own), teaching_of(own))
            self._log.info(logs.CONFIG_RELOADED, restart_needed_for=waits)
        self._notifier.ready()
