"""The daemon: the loop that feeds the cores of all datasets, and the order in which everything starts and stops.

Four threads, named and joined: this one (cores, journals, moves), the watcher's (posts hints), the worker's (decodes,
encodes, rebuilds) and, where images go to another file system, the copier's. They share this loop's inbox and frozen
values. There is no polling: the loop sleeps until a message comes or the nearest deadline passes.

    start   lock and recover each dataset; begin to load the model; watch; scan; READY when all is true
    stop    begin nothing new; finish the moves at hand, interrupt long copies; stop watcher, worker and copier; close
            the journals
"""

import os
import queue
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from time import monotonic

import structlog

from sortd import __version__, logs
from sortd.config import Config, restart_needed
from sortd.errors import ConfigError, DestinationError, LayoutError, StoppedError
from sortd.layout import Area
from sortd.metrics import Metrics
from sortd.running.collection import Collection
from sortd.running.control import answer, tell_put_back
from sortd.running.copier import Copied, Copier, CopierDied
from sortd.running.dataset import Dataset
from sortd.running.requests import Requests
from sortd.running.site import Site
from sortd.running.worker import Answer, Posted, Worker, WorkerDied, WorkerLoading, WorkerReady
from sortd.sdnotify import Notifier
from sortd.signals import Signalled, signals_posted
from sortd.sorting.rounds import Rounds
from sortd.status import Status, started_ticks
from sortd.watch import CHECK_SECONDS, Hint, HintsLost, Loss, Watcher

STOP_SECONDS = 4.0
"""How long the worker may take to end its forward when the daemon stops."""

STUCK_SECONDS = 300.0
"""A worker that made no progress for so long is stuck: the watchdog is not fed any more, and systemd restarts us."""

START_SECONDS = 120.0
"""For so long a start may last yet, told anew while the worker gets on: an export of the model, or the first look at
thousands of references, can take longer than ``TimeoutStartSec=`` of the unit."""

STATUS_SECONDS = 2.0
"""The shortest pause between two writes of the status file."""

METRICS_SECONDS = 15.0
"""How often the metrics file is written; Prometheus scrapes as often by default."""

Message = Hint | HintsLost | Posted | Copied | CopierDied | Signalled


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
        self.inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.model: WorkerReady | None = None
        self._loading: str | None = None
        self.config_problem: str | None = None
        self._reload, self._notifier, self._metrics = reload, notifier, metrics
        self._once = once
        self._worker = Worker(site.load, site.unload, self.inbox.put, site.classifiers)
        site.attend = self._worker.loading
        self._copier = Copier(self.inbox.put)
        self.collection = Collection(config, site=site, ask=self._worker.ask, copier=self._copier, metrics=metrics)
        self._watcher: Watcher | None = None
        self._status = Status(site.state_folder)
        self._requests = Requests(site.state_folder, report=self._hampered)
        self._log: structlog.stdlib.BoundLogger = structlog.get_logger()
        self._pid = os.getpid()
        self._is_ready = False
        self._is_stopping = False
        self._rounds = Rounds()
        self._closing = ExitStack()

    @property
    def datasets(self) -> dict[str, Dataset]:
        """The datasets that it works on, by name."""
        return self.collection.datasets

    # ------------------------------------------------------------ life

    def run(self) -> None:
        """Work until SIGTERM or SIGINT, or with ``once`` until nothing is left to do.

        Raises:
            SortdError: what stopped it: the model, the layout, the journal.
        """
        is_cut_short = False
        with signals_posted(self.inbox.put):
            try:
                self._start()
                while not self._is_done():
                    self._turn()
                is_cut_short = self._once and not self._is_drained()
            finally:
                self._stop()
        if is_cut_short:
            raise StoppedError("stopped before all was done; nothing is half done, and the next run goes on from here")
        problems = [f"{dataset.name}: {dataset.problem}" for dataset in self.collection if dataset.problem]
        if self._once and problems:
            raise LayoutError("; ".join(problems))
        refused = {dataset.name: count for dataset in self.collection if (count := dataset.sorter.refused_by_disks)}
        if self._once and refused:
            counted = ", ".join(f"{count} in {name}" for name, count in refused.items())
            raise DestinationError(f"images that could not be moved stay where they were: {counted}; the log says why")

    def _start(self) -> None:
        self._log.info(logs.DAEMON_STARTING, root=str(self.config.root), model=self.config.model)
        self._requests.open()
        self._worker.start()
        if not self._once:
            self._watcher = Watcher(self.inbox.put, polling=self.config.polling)
            self.collection.watch_with(self._watcher)
        self.collection.discover()
        if self._once and not self.datasets:
            raise LayoutError(
                f"{self.config.root} holds no dataset: a folder with a Clases/ in it; `sortd init DIR` makes one"
            )
        self._rounds.put_off("scan", monotonic() + self.config.rescan_seconds)
        if self.config.metrics.http_port is not None:
            self._closing.callback(self._metrics.serve(self.config.metrics.http_port))

    def _is_done(self) -> bool:
        if self._is_stopping:
            return all(dataset.sorter.is_stopped for dataset in self.collection)
        return self._once and self._is_drained()

    def _is_drained(self) -> bool:
        """Tell whether nothing is left that can be done now."""
        return self.model is not None and all(dataset.is_drained or dataset.is_stuck for dataset in self.collection)

    def _stop(self) -> None:
        self._notifier.stopping()
        if self._watcher is not None:
            self._watcher.close()
        self._copier.interrupt()
        ended = self._worker.stop(STOP_SECONDS)
        self._copier.stop()
        self.collection.close()
        self._write_status(running=False)
        self._closing.close()
        self._log.info(logs.DAEMON_STOPPED, worker_ended=ended, **self._totals())

    def _totals(self) -> dict[str, int]:
        totals: dict[str, int] = {}
        for dataset in self.collection:
            for outcome, count in dataset.account.outcomes.items():
                totals[outcome] = totals.get(outcome, 0) + count
        return totals

    # ------------------------------------------------------------ one turn

    def _turn(self) -> None:
        for message in self._messages():
            self._take(message)
        if self._requests.is_due:
            self._requests.serve(lambda request: answer(self, request))
        now = monotonic()
        for dataset in self.collection:
            dataset.tick(now)
            dataset.continue_scan()
            dataset.continue_looking()
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
        if self._requests.is_due or any(one.has_more_to_look_at or one.has_moves for one in self.collection):
            return 0.0
        deadlines = [d for dataset in self.collection if (d := dataset.sorter.next_deadline()) is not None]
        return max(0.0, min([*deadlines, self._rounds.next_deadline()]) - now)

    def _take(self, message: Message) -> None:  # noqa: C901 -- the table of messages: one arm each
        match message:
            case Hint():
                self.collection.hint(message)
            case HintsLost(root=root, why=why, loss=loss):
                self._log.warning(f"watch.{loss.value}", root=root, why=why)
                if loss is Loss.OVERFLOWED:
                    self._metrics.watch_overflow()
                self.collection.scan()
            case Answer(dataset=name):
                if name in self.datasets:
                    self.datasets[name].answer(message)
            case Copied(dataset=name, orders=orders):
                if name in self.datasets:
                    tell_put_back(self.datasets[name], self.datasets[name].copied(orders))
            case WorkerLoading(what=what):
                self._loading = what
                self._notifier.status(what)
            case WorkerReady():
                self.model, self._loading = message, None
                self._log.info(logs.MODEL_LOADED, model=message.description, encoder_id=message.encoder_id)
            case WorkerDied(error=error) | CopierDied(error=error):
                raise error
            case Signalled(number=number):
                self._signalled(number)

    # ------------------------------------------------------------ what comes round

    def _periodic(self, now: float) -> None:
        due = self._rounds.is_due
        if due("scan", now, self.config.rescan_seconds):
            self.collection.scan()
        if self._watcher is not None and due("health", now, CHECK_SECONDS):
            self._watcher.health(now)
            self.collection.discover()  # a folder that gets its Clases/ later than its name raises no event
            for dataset in self.collection:
                dataset.check_lock()
        if self._watcher is not None and due("poll", now, self.config.polling_seconds):
            self.collection.poll(self._watcher.polled())
        if not self._is_ready and self.model is not None and self._all_answered():
            self._become_ready(self.model)
        if due("start", now, START_SECONDS / 3) and not self._is_ready and self._gets_on(now):
            self._notifier.extend(START_SECONDS)
        if self._notifier.watchdog_seconds and due("ping", now, self._notifier.watchdog_seconds / 2):
            self._ping(now)
        if due("status", now, STATUS_SECONDS):
            self._write_status(running=True)
        if due("metrics", now, METRICS_SECONDS):
            self._write_metrics()

    def _ping(self, now: float) -> None:
        """Feed the watchdog, but only while the worker gets on: alive means working."""
        if self._gets_on(now):
            self._notifier.watchdog()

    def _gets_on(self, now: float) -> bool:
        busy_since = self._worker.busy_since
        return busy_since is None or now - busy_since < STUCK_SECONDS

    def show_life(self) -> None:
        """Feed the watchdog in the middle of a long turn that gets on."""
        self._ping(monotonic())

    def _write_status(self, *, running: bool) -> None:
        try:
            self._status.write(self.facts(running=running))
        except OSError as error:
            self._hampered(error)

    def _write_metrics(self) -> None:
        for dataset in self.collection:
            dataset.account.waiting(dataset.sorter.waiting)
        if self.config.metrics.textfile is None:
            return
        try:
            self._metrics.write_textfile(os.fspath(self.config.metrics.textfile))
        except OSError as error:
            self._hampered(error)

    def _hampered(self, error: OSError) -> None:
        """Say what could not be written: nobody's image depends on it, and it is written again soon."""
        self._log.warning(logs.DAEMON_HAMPERED, path=error.filename, error=error.strerror)

    def _become_ready(self, model: WorkerReady) -> None:
        self._is_ready = True
        inboxes = [str(dataset.layout.area(Area.IMAGES)) for dataset in self.collection]
        self._log.info(
            logs.DAEMON_READY, drop_images_into=inboxes, model=model.description, encoder_id=model.encoder_id
        )
        self._notifier.ready(f"{len(self.datasets)} datasets, {model.description}")

    def _all_answered(self) -> bool:
        """Tell whether each dataset has scanned once and knows its prototypes, or why it has none."""
        return all(
            not dataset.is_scanning and (dataset.problem or not dataset.sorter.is_rebuilding)
            for dataset in self.collection
        )

    def facts(self, *, running: bool) -> dict[str, object]:
        """Return what ``sortd status`` shows of this run, as plain values."""
        return {
            "running": running,
            "pid": self._pid,
            "started_ticks": started_ticks(self._pid),
            "version": __version__,
            "root": str(self.config.root),
            "ready": self._is_ready,
            "loading": self._loading,
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
            self._requests.wake()
        elif number in {signal.SIGTERM, signal.SIGINT}:
            self._is_stopping = True
            self._copier.interrupt()
            for dataset in self.collection:
                dataset.stop()

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
            self.collection.reload(config)
            self._log.info(logs.CONFIG_RELOADED, restart_needed_for=waits)
        self._notifier.ready()
