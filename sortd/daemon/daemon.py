"""The daemon: the loop that feeds the cores of all datasets, its inbox, and the order of start and stop.

Four named threads: this one (cores, journals, moves), the watcher's (posts file events), the worker's (decodes,
encodes, rebuilds) and, for moves to other file systems, the copier's. They share only the inbox of this loop and frozen
values. The loop sleeps until a message or the nearest deadline. A turn is short: signals and the watchdog first, then
answers, file events, moves and scans, each for a limited time.

    start   lock and recover each dataset; begin to load the model; watch; scan; then READY
    stop    start nothing new; finish the moves under way, interrupt long copies; stop watcher, worker and copier; close
            the journals
"""

import os
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from http import HTTPStatus
from time import monotonic
from typing import TypeVar

import structlog

from sortd import __version__, errors, logs
from sortd.config import Config, restart_needed
from sortd.config_reporting import targets_of
from sortd.core.schedule import PeriodicTimer
from sortd.daemon.control import Requests, answer, apply_undo_results
from sortd.daemon.dataset import Dataset
from sortd.daemon.dataset_lock import ReportMove
from sortd.daemon.datasets import Datasets
from sortd.daemon.endpoint import Endpoint, Page, Pages
from sortd.daemon.inbox import Inbox, Reported
from sortd.daemon.metrics import CONTENT_TYPE, Metrics
from sortd.daemon.observer import DatasetObserver
from sortd.daemon.proposals import Proposals
from sortd.daemon.reporting import Decisions, log_availability
from sortd.daemon.resources import Resources
from sortd.daemon.sender import Receivers, Sender
from sortd.daemon.upkeep import Upkeep
from sortd.daemon.worker import Answer, EncoderAvailability, Worker, WorkerDied, WorkerLoading, WorkerReady
from sortd.encoder.remote import COMMAND_SECONDS
from sortd.files import readable_json
from sortd.layout import Area, nested_datasets
from sortd.moving.copy_queue import Copied, CopyFailed, CopyQueue, CopyQueueDied
from sortd.service import Notifier, Status, require_to_be_alone, signals_posted, started_ticks
from sortd.watch.watcher import CHECK_SECONDS, DropReason, EventsDropped, FileEvent, Watcher

STOP_SECONDS = 4.0  # for the last forward of the worker when the daemon stops
STATUS_SECONDS = 2.0  # between two writes of the status file
METRICS_SECONDS = 15.0  # between two writes of the metrics file; Prometheus scrapes as often by default
TURN_SECONDS = 0.05  # for each part of a turn: answers, file events, moves, scans

WATCHDOG_SECONDS = 60.0  # without systemd: the time in which the loop turns, or does not count as alive
JSON_TYPE = "application/json"

STUCK_SECONDS = 300.0
"""Without progress for this time the worker is stuck: the watchdog is no longer reset, and systemd restarts sortd."""

START_SECONDS = 120.0
"""The start timeout requested while the worker makes progress: reading thousands of references can take longer than
``TimeoutStartSec=`` of the unit."""

Progress = Callable[[str, int, int], None]

_T = TypeVar("_T")


class Daemon:
    """One run on all datasets below one root."""

    def __init__(  # noqa: PLR0913 -- the collaborators of the whole program
        self,
        config: Config,
        *,
        resources: Resources,
        reload: Callable[[], Config],
        notifier: Notifier,
        metrics: Metrics,
        once: bool = False,
        dry_run: ReportMove | None = None,
        groups_command: Sequence[str] = (),
    ) -> None:
        """Keep the collaborators; nothing is touched before ``run``.

        ``reload`` reads the configuration again, or raises ``ConfigError``; with ``once`` the run ends when nothing is
        left, and notifies nobody. So does a dry run: ``dry_run`` is called with each move instead of making it, nothing
        is written, and signals and requests are not taken. ``groups_command`` prints the groups in Review/ as JSON.
        """
        self.config = self._at_start = config
        self.inbox = Inbox()
        self.model: WorkerReady | None = None
        self._loading: str | None = None
        self.config_problem: str | None = None
        self._ended_by: str | None = None
        self._reload, self._notifier, self._metrics = reload, notifier, metrics
        self._is_dry_run = dry_run is not None
        self._once = once or self._is_dry_run
        patience_seconds = COMMAND_SECONDS if self._once else None
        self._worker = Worker(resources, self.inbox.put, patience_seconds=patience_seconds)
        self._encoder_problem: str | None = None  # why the encoder of another process is away
        self._copier = CopyQueue(self.inbox.put)
        self.datasets = Datasets(config, ask=self._worker.ask, copier=self._copier, metrics=metrics, dry_run=dry_run)
        self._sender = Sender(self._receivers(), metrics, state=config.state_dir)
        self._proposals = Proposals(groups_command, self._sender.post)
        self._observer = DatasetObserver(
            self.datasets, metrics, post=self._sender.post, look_for_classes=self._proposals.look
        )
        self._watcher: Watcher | None = None
        self._status = Status(config.state_dir)
        self._requests = Requests(config.state_dir, report=self._log_write_error)
        self._log: structlog.stdlib.BoundLogger = structlog.get_logger()
        self._pid = os.getpid()
        self._is_ready = False
        self._is_stopping = False
        self._turned_at = monotonic()
        self._timer = PeriodicTimer()
        self._upkeep = Upkeep()
        self._served = 0
        self._longest_turn_seconds = 0.0
        self._endpoint: Endpoint | None = None
        self._closing = ExitStack()

    def run(self, *, progress: Progress | None = None) -> None:
        """Run until SIGTERM or SIGINT, or with ``once`` until nothing is left to do.

        ``progress`` is called in each turn with what is done now, the number of decided images, and that of all.

        Raises:
            SortdError: The cause of the end: the state folder, the model; with ``once``, a held dataset.
        """
        is_cut_short = False
        if not self._is_dry_run:
            require_to_be_alone(self.config)
        with nullcontext() if self._is_dry_run else signals_posted(self.inbox.put_signal):
            try:
                self._start()
                while not self._is_done():
                    self._turn()
                    if progress is not None:
                        progress(*self._advance())
                is_cut_short = self._once and not self._is_drained()
            except Exception as error:
                self._ended_by = _reason(error)
                raise
            finally:
                self._stop()
        if is_cut_short:
            raise errors.StoppedError(
                "stopped before everything was done; no move is incomplete, and the next run continues"
            )
        if self._once and (held := self.datasets.held_error) is not None:
            raise held
        problems = [f"{dataset.name}: {dataset.problem}" for dataset in self.datasets if dataset.problem]
        if self._once and problems:
            raise errors.LayoutError("; ".join(problems))
        refused = {dataset.name: count for dataset in self.datasets if (count := dataset.sorter.refused_by_disks)}
        if self._once and refused:
            counted = ", ".join(f"{count} in {name}" for name, count in refused.items())
            raise errors.DestinationError(f"images that could not be moved stay where they are: {counted}; see the log")

    def _start(self) -> None:
        self._log.info(logs.DAEMON_STARTING, root=str(self.config.root), model=self.config.model)
        for nested in nested_datasets(self.config.root):
            self._log.warning(logs.DATASET_NESTED, path=str(nested.folder), error=nested.what, advice=nested.advice)
        if not self._is_dry_run:
            self._requests.open()
            if not self._once:
                self._sender.resume()
            self._closing.callback(self._metrics.watch_errors())
            if self._metrics.is_on:
                self._endpoint = Endpoint(self.config.metrics.address, self._pages())
                self._closing.callback(self._endpoint.close)
        self._worker.start()
        if not self._once:
            self._watcher = Watcher(self.inbox.put, polling=self.config.polling)
            self.datasets.watch_with(self._watcher)
        self.datasets.discover()
        if self._once and not self.datasets.by_name:
            raise self.datasets.held_error or errors.LayoutError(
                f"{self.config.root} holds no dataset (a folder with a Clases/); create one with `sortd init DIR`"
            )
        scan_seconds = float("inf") if self._is_dry_run else self.config.rescan_seconds  # its images stay in Images/
        self._timer.put_off("scan", monotonic() + scan_seconds)

    def _is_done(self) -> bool:
        if self._is_stopping:
            return all(dataset.sorter.is_stopped for dataset in self.datasets)
        return self._once and self._is_drained()

    def _is_drained(self) -> bool:
        """Return whether nothing is left that can be done now."""
        return self.model is not None and all(dataset.is_drained or dataset.is_stuck for dataset in self.datasets)

    def _stop(self) -> None:
        self._notifier.stopping()
        if not self._is_dry_run:
            self._requests.close()
        if self._watcher is not None:
            self._watcher.close()
        self._copier.interrupt()
        self._proposals.stop()
        self._sender.stop()
        ended = self._worker.stop(STOP_SECONDS)
        self._copier.stop()
        try:
            self.datasets.close()
        except Exception as error:
            self._ended_by = self._ended_by or _reason(error)
            raise
        finally:
            self._write_status(running=False)
            self._metrics.set("sortd_ready", 0)
            self._write_metrics()
            self._closing.close()
        outcomes = sum((Counter(dataset.log.outcomes) for dataset in self.datasets), Counter())
        self._log.info(logs.DAEMON_STOPPED, worker_ended=ended, **outcomes)

    def _turn(self) -> None:
        self.inbox.wait(self._sleep_seconds(monotonic()))
        began = self._turned_at = monotonic()
        for number in {signalled.number for signalled in self.inbox.signals()}:
            self._signalled(number)
        self._ping(began)
        _until_late(self._take, self.inbox.reported())
        _until_late(self._file_event, self.inbox.file_events())
        _until_late(self._move, self._in_turn())
        _until_late(self._look, self._in_turn())
        self._requests.advance(lambda request: answer(self.datasets, request))
        self._served += 1
        self._periodic(monotonic())
        self._longest_turn_seconds = max(self._longest_turn_seconds, monotonic() - began)

    def _advance(self) -> tuple[str, int, int]:
        now = "images" if self.model is not None else self._loading or "starting"
        done = sum(dataset.log.decisions.total() for dataset in self.datasets)
        return now, done, done + sum(dataset.sorter.images.waiting for dataset in self.datasets)

    def decisions(self) -> dict[str, Decisions]:
        """Return the moves of this run by dataset, counted by outcome and by class or reason."""
        return {dataset.name: dataset.log.decisions for dataset in self.datasets}

    def _in_turn(self) -> Iterator[Dataset]:
        """Return the datasets, rotated by one in each turn: a turn may be too short for all of them."""
        datasets = deque(self.datasets)
        datasets.rotate(-self._served)
        return iter(datasets)

    def _move(self, dataset: Dataset) -> None:
        with self.datasets.isolated(dataset):
            dataset.tick(monotonic())
            dataset.flush()

    def _look(self, dataset: Dataset) -> None:
        with self.datasets.isolated(dataset):
            dataset.continue_looking()

    def _sleep_seconds(self, now: float) -> float:
        if self._requests.is_due:
            return 0.0
        upkeep = self._upkeep.next_deadline(self.datasets) if self._keeps_up else float("inf")
        return max(0.0, min(self.datasets.next_deadline, self._timer.next_deadline(), upkeep) - now)

    @property
    def _keeps_up(self) -> bool:
        """Whether the daily upkeep may run."""
        return self._is_ready and not self._is_stopping and not self._once

    def _file_event(self, event: FileEvent | EventsDropped) -> None:
        if isinstance(event, FileEvent):
            self.datasets.file_event(event)
            return
        self._log.warning(f"watch.{event.reason.value}", root=event.root or str(self.config.root), why=event.why)
        if event.reason is DropReason.OVERFLOWED:
            self._metrics.count("sortd_watch_overflows")
        self.datasets.events_dropped(event)

    def _take(self, reported: Reported) -> None:
        match reported:
            case Answer(dataset=identity):
                self.datasets.tell(identity, lambda dataset: dataset.answer(reported))
            case Copied(dataset=identity, orders=orders):
                self.datasets.tell(identity, lambda dataset: apply_undo_results(dataset, dataset.copied(orders)))
            case CopyFailed(dataset=identity, error=refused):
                self.datasets.tell(identity, lambda dataset: self.datasets.hold(dataset, refused))
            case WorkerLoading(what=what):
                self._loading = what
                self._notifier.status(what)
            case EncoderAvailability(problem=problem):
                self._encoder_problem = problem
                log_availability(problem, self._metrics)
                self._notifier.status(self._condition())
            case WorkerReady():
                self.model, self._loading = reported, None
                self._metrics.model(reported.description, reported.encoder_id)
                self._log.info(logs.MODEL_LOADED, model=reported.description, encoder_id=reported.encoder_id)
            case WorkerDied(error=error) | CopyQueueDied(error=error):
                raise error

    def _periodic(self, now: float) -> None:
        due = self._timer.is_due
        self.datasets.catch_up()
        if due("scan", now, self.config.rescan_seconds):
            self.datasets.scan()
        if self._watcher is not None and due("health", now, CHECK_SECONDS):
            self._watcher.health(now)
            self.datasets.discover()  # a Clases/ that is created later causes no event
            for dataset in self.datasets:
                with self.datasets.isolated(dataset):
                    dataset.check_presence()
        if self._watcher is not None and due("poll", now, self.config.polling_seconds):
            self.datasets.poll(self._watcher.polled())
        if not self._is_ready and self.model is not None and self._all_answered():
            self._become_ready(self.model)
        if due("start", now, START_SECONDS / 3) and not self._is_ready and self._makes_progress(now):
            self._notifier.extend(START_SECONDS)
        for dataset in self.datasets if self._keeps_up else ():
            with self.datasets.isolated(dataset):
                self._upkeep.turn(dataset, self.config, now)
        if due("status", now, STATUS_SECONDS):
            self._write_status(running=True)
            self._observe(now)
        if due("metrics", now, METRICS_SECONDS):
            self._write_metrics()

    def _ping(self, now: float) -> None:
        """Reset the watchdog when it is due, but only while the worker makes progress."""
        seconds = self._notifier.watchdog_seconds
        if seconds and self._timer.is_due("ping", now, seconds / 2) and self._makes_progress(now):
            self._notifier.watchdog()

    def _makes_progress(self, now: float) -> bool:
        busy_since = self._worker.busy_since
        return busy_since is None or now - busy_since < STUCK_SECONDS

    def _receivers(self) -> Receivers:
        return Receivers(self.config.notify, {} if self._once else targets_of(self.config.notify, self.config.hooks))

    def _observe(self, now: float) -> None:
        if self._is_dry_run:
            return
        self._observer.observe(now, self._sender.events)
        self._metrics.set("sortd_ready", int(not self._unready()))

    def _pages(self) -> Pages:
        """Return what the endpoint serves, in its own thread."""
        return {
            "/healthz": self._health_page,
            "/readyz": self._ready_page,
            "/metrics": lambda: Page(HTTPStatus.OK, self._metrics.text().encode(), CONTENT_TYPE),
        }

    def _health_page(self) -> Page:
        if (problem := self._stuck()) is None:
            return Page(HTTPStatus.OK, b"ok\n")
        return Page(HTTPStatus.SERVICE_UNAVAILABLE, f"{problem}\n".encode())

    def _ready_page(self) -> Page:
        reasons = self._unready()
        status = HTTPStatus.SERVICE_UNAVAILABLE if reasons else HTTPStatus.OK
        return Page(status, readable_json({"ready": not reasons, "reasons": reasons}).encode() + b"\n", JSON_TYPE)

    def _stuck(self) -> str | None:
        """Return why systemd would restart sortd, or None."""
        now, seconds = monotonic(), self._notifier.watchdog_seconds or WATCHDOG_SECONDS
        if not self._served:  # the journals are recovered first
            seconds = STUCK_SECONDS
        if not self._makes_progress(now):
            return f"the worker has made no progress for {STUCK_SECONDS:.0f} s"
        if now - self._turned_at > seconds:
            return f"the loop has made no progress for {seconds:.0f} s"
        return None

    def _unready(self) -> list[str]:
        """Return why not all images are processed now, in sentences."""
        if self._is_stopping:
            return ["sortd is stopping"]
        reasons = [reason for reason in (self._stuck(), self._encoder_problem) if reason is not None]
        if not self._is_ready:
            reasons.append(self._loading or "sortd is starting: the model or the references are not loaded yet")
        return [*reasons, *self._observer.unserved]

    def _write_status(self, *, running: bool) -> None:
        if self._is_dry_run:
            return
        try:
            self._status.write(self.facts(running=running))
        except OSError as error:
            self._log_write_error(error)

    def _write_metrics(self) -> None:
        if self.config.metrics.textfile is None or self._is_dry_run or not self._metrics.is_on:
            return
        try:
            self._metrics.write_textfile(os.fspath(self.config.metrics.textfile))
        except OSError as error:
            self._log_write_error(error)

    def _log_write_error(self, error: OSError) -> None:
        """Log what could not be written; no image depends on it, and it is written again soon."""
        self._log.warning(logs.DAEMON_HAMPERED, path=error.filename, error=error.strerror)

    def _become_ready(self, model: WorkerReady) -> None:
        self._is_ready = True
        inboxes = [str(dataset.layout.area(Area.IMAGES)) for dataset in self.datasets]
        self._log.info(
            logs.DAEMON_READY, drop_images_into=inboxes, model=model.description, encoder_id=model.encoder_id
        )
        self._observe(monotonic())
        self._notifier.ready(self._condition())

    def _condition(self) -> str:
        """Return the status line for systemd."""
        if self._encoder_problem or not self._is_ready or self.model is None:
            return self._encoder_problem or self._loading or "starting"
        return f"{len(self.datasets.by_name)} datasets, {self.model.description}"

    def _all_answered(self) -> bool:
        """Return whether each dataset has been scanned once and has prototypes, or a known reason why not."""
        return all(
            not dataset.scans.is_under_way and (dataset.problem or not dataset.sorter.rebuilds.is_pending)
            for dataset in self.datasets
        )

    def facts(self, *, running: bool) -> dict[str, object]:
        """Return the content of ``sortd status``, as plain values."""
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
            "encoder_problem": self._encoder_problem,
            "endpoint": None if self._endpoint is None else self._endpoint.facts(),
            "longest_turn_seconds": round(self._longest_turn_seconds, 3),
            "ended_by": self._ended_by,
            "watching": [
                {"root": status.root, "mode": status.mode.value, "why": status.why}
                for status in (self._watcher.status() if self._watcher else ())
            ],
            "datasets": {
                **{name: dataset.facts() for name, dataset in sorted(self.datasets.by_name.items())},
                **{name: held.facts() for name, held in sorted(self.datasets.held.items())},
                **{name: {"problem": why, "moving": False} for name, why in self.datasets.missing.items()},
            },
        }

    def _signalled(self, number: int) -> None:
        if number == signal.SIGHUP:
            self.reload()
        elif number == signal.SIGUSR1:
            self._requests.wake()
        elif number in {signal.SIGTERM, signal.SIGINT}:
            self._is_stopping = True
            self._copier.interrupt()
            self.datasets.stop()

    def reload(self) -> None:
        """Read the configuration again and apply it; if it is invalid, log that and keep the old one."""
        self._notifier.reloading()
        try:
            config = self._reload()
        except errors.ConfigError as error:
            self.config_problem = str(error)
            self._log.error(logs.CONFIG_REFUSED, error=str(error))
        else:
            waits = restart_needed(self._at_start, config)
            self.config, self.config_problem = config, None
            self.datasets.reload(config)
            self._sender.reload(self._receivers())
            if self._endpoint is not None:
                self._endpoint.move(config.metrics.address)
            self._log.info(logs.CONFIG_RELOADED, restart_needed_for=waits)
        self._notifier.ready()


def _until_late(do: Callable[[_T], None], each: Iterable[_T]) -> None:
    """Process the items until this part of the turn is over."""
    until = monotonic() + TURN_SECONDS
    for one in each:
        do(one)
        if monotonic() >= until:
            return


def _reason(error: Exception) -> str:
    """Return the message of the error that ended the run, or its type if it has none for users."""
    return str(error) if isinstance(error, errors.SortdError) else repr(error)
