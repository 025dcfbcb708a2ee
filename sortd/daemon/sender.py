"""Sends notices to the addresses and hooks of the configuration, in a thread, with a limit per hour and quiet hours.

The loop only puts a notice into a bounded queue, so that it waits for nobody. Each delivery is a process with a time
limit. What may not be sent now is counted, and one message sums it up when it may. A file in the state folder has the
times of the last messages and what was held back, for the next run; it contains no address.
"""

import json
import math
import os
import queue
import re
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from sortd import errors, logs
from sortd.config_reporting import EVENT_NAMES, HookConfig, NotifyConfig, Target, TargetConfig
from sortd.daemon import apprise_process
from sortd.daemon.limited_process import INHERITED, run_limited
from sortd.daemon.metrics import Metrics
from sortd.daemon.notices import Notice
from sortd.files import read_regular, write_json

QUEUED_AT_MOST = 1000
KEPT_AT_MOST = 10
"""Texts of held-back notices that the message about them quotes."""
STOP_SECONDS = 3.0
APPRISE_SECONDS = 30.0
"""Time limit of a delivery by Apprise, which gives a service 4 s to connect and 4 s to answer."""
STATE_FILE = "notifications.json"
_HOUR_SECONDS = 3600.0
_MOST_TEXT = 4000  # characters; Apprise divides or cuts what is too long for a service
_MOST_COUNT = 10**9
_MOST_SENT = 3600  # the largest limit per hour
_MOST_STATE_BYTES = 2 << 20
_INVALID_STATE = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
"""Errors of a damaged state, whose values, nesting and types are arbitrary."""
_MOST_ADDRESS_BYTES = 8192
_PROXIES = ("http_proxy", "https_proxy", "no_proxy", "all_proxy")
_NETWORK = (
    *_PROXIES, *(name.upper() for name in _PROXIES), "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE",
)  # fmt: skip
_VARIABLE = re.compile(r"\$\{(\w+)\}")


class Pace:
    """Tells when the next message may be sent; all times are arguments."""

    def __init__(self, now: float = 0.0, ages: Iterable[float] = ()) -> None:
        """Begin with messages that were sent so many seconds before ``now``, the oldest first."""
        self._sent = deque(now - age for age in ages)

    def wait_seconds(self, settings: NotifyConfig, now: float, local: datetime) -> float:
        """Return how long to wait: 0 to send now. ``now`` is of a monotonic clock, ``local`` the local time."""
        return max(self._until_fewer(settings.messages_per_hour, now), _until_quiet_ends(settings, local))

    def _until_fewer(self, most: int, now: float) -> float:
        while self._sent and now - self._sent[0] >= _HOUR_SECONDS:
            self._sent.popleft()
        if len(self._sent) < most:
            return 0.0
        return self._sent[len(self._sent) - most] + _HOUR_SECONDS - now

    def sent(self, now: float) -> None:
        """Count one message."""
        self._sent.append(now)

    def ages(self, now: float) -> list[float]:
        """Return how many seconds ago the messages that still count were sent, the oldest first."""
        return [age for one in self._sent if (age := now - one) < _HOUR_SECONDS]


def _until_quiet_ends(settings: NotifyConfig, local: datetime) -> float:
    if settings.quiet is None:
        return 0.0
    begin, end = settings.quiet
    is_quiet = begin <= local.time() < end if begin < end else not end <= local.time() < begin
    if not is_quiet:
        return 0.0
    ends = datetime.combine(local.date(), end)
    return ((ends if ends > local else ends + timedelta(days=1)) - local).total_seconds()


class HeldBack:
    """The notices that were not sent: their number by event, and the newest texts."""

    def __init__(self) -> None:
        """Begin without any."""
        self._counts: Counter[str] = Counter()
        self._texts: dict[str, deque[str]] = {}

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._counts)

    def add(self, notice: Notice) -> None:
        """Add one notice."""
        self._counts[notice.event] += 1
        self._texts.setdefault(notice.event, deque(maxlen=KEPT_AT_MOST)).append(notice.text)

    def facts(self) -> dict[str, object]:
        """Return all as plain values, for ``restore``."""
        return {
            event: {"count": number, "texts": [text[:_MOST_TEXT] for text in self._texts[event]]}
            for event, number in self._counts.items()
        }

    @classmethod
    def restore(cls, facts: Mapping[str, Any]) -> "HeldBack":
        """Return what ``facts`` has returned; values of any other kind raise one of ``_INVALID_STATE``."""
        restored = cls()
        for event in [event for event in facts if event in EVENT_NAMES]:
            count, texts = facts[event]["count"], facts[event]["texts"]
            if not (isinstance(count, int) and 0 < count < _MOST_COUNT and all(isinstance(one, str) for one in texts)):
                raise ValueError(event)
            restored._counts[event] = count
            restored._texts[event] = deque((text[:_MOST_TEXT] for text in texts), maxlen=KEPT_AT_MOST)
        return restored

    def notice(self, wanted: frozenset[str]) -> Notice | None:
        """Return the notice about those of the wanted events; None if there are none."""
        counts = {event: number for event, number in self._counts.items() if event in wanted}
        if not counts:
            return None
        named = ", ".join(f"{number:,} {event}" for event, number in counts.items())
        texts = [text for event in counts for text in self._texts[event]]
        whole = f"{sum(counts.values()):,} notifications were held back: {named}"
        return Notice("held_back", "\n".join([whole, *texts]), facts={"counts": counts, "texts": texts})


@dataclass(frozen=True, slots=True)
class Receivers:
    """Where notices go, and the limits."""

    settings: NotifyConfig
    targets: Mapping[str, Target]

    @property
    def events(self) -> frozenset[str]:
        """The events that anybody wants."""
        return frozenset(event for target in self.targets.values() for event in target.events)


class Sender:
    """One thread and its queue; it starts with the first notice that somebody wants."""

    def __init__(
        self,
        receivers: Receivers,
        metrics: Metrics,
        *,
        state: Path,
        environment: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        local: Callable[[], datetime] = datetime.now,
    ) -> None:
        """Send to ``receivers``; the folder ``state`` keeps what the next run needs.

        ``clock`` is monotonic, ``wall`` returns seconds since the epoch, ``local`` the local time without a zone.
        """
        self._receivers, self._metrics, self._environment = receivers, metrics, environment
        self.events = receivers.events  # that anybody wants
        self._clock, self._wall, self._local = clock, wall, local
        self._file, self._saved, self._save_has_failed = state / STATE_FILE, dict[str, object](), False
        self._queue: queue.Queue[Notice | None] = queue.Queue(QUEUED_AT_MOST)
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._pace, self._held_back = Pace(), HeldBack()
        self._dropped = self._dropped_told = 0  # each is written by one thread: the loop, and this one
        self._failing: set[str] = set()
        self._log: structlog.stdlib.BoundLogger = structlog.get_logger()

    def reload(self, receivers: Receivers) -> None:
        """Use other receivers and limits from the next message on."""
        self._receivers, self.events = receivers, receivers.events
        self._failing &= receivers.targets.keys()

    def post(self, notice: Notice) -> None:
        """Queue a notice, or drop and count it if the queue is full; returns at once."""
        if notice.event not in self.events or self._stopping.is_set():
            return
        self._start()
        try:
            self._queue.put_nowait(notice)
        except queue.Full:
            self._dropped += 1
            self._metrics.count("sortd_notifications", "dropped")

    def resume(self) -> None:
        """Continue with the limit and what was held back of the last run, or forget it if nobody wants messages."""
        try:
            if not self.events:
                self._file.unlink(missing_ok=True)
                return
            self._restore(json.loads(read_regular(self._file, limit=_MOST_STATE_BYTES)))
        except FileNotFoundError:
            return
        except OSError as error:
            self._log.warning(logs.DAEMON_HAMPERED, path=error.filename, error=error.strerror)
        except _INVALID_STATE:
            damaged = "it is damaged; what was held back is not known, and the limit per hour begins anew"
            self._log.warning(logs.DAEMON_HAMPERED, path=str(self._file), error=damaged)
        if self._held_back:
            self._start()

    def _restore(self, facts: Mapping[str, Any]) -> None:
        newest = sorted(facts["sent"])[-_MOST_SENT:]
        ages = [max(0.0, self._wall() - sent) for sent in newest]
        if not all(map(math.isfinite, ages)) or not 0 <= facts["dropped"] < _MOST_COUNT:
            raise ValueError(ages)
        held_back = HeldBack.restore(facts["held_back"])
        self._pace, self._held_back, self._dropped = Pace(self._clock(), ages), held_back, int(facts["dropped"])

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="sender", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the process under way and the thread; what waits is kept for the next run."""
        self._stopping.set()
        with suppress(queue.Full):  # the thread looks at the event before each notice
            self._queue.put_nowait(None)
        if self._thread is not None:
            self._thread.join(STOP_SECONDS)

    def _run(self) -> None:
        while not self._stopping.is_set():
            if self._queue.empty():
                self._save()
            wait = self._wait_seconds() if self._held_back else None
            try:
                notice = self._queue.get(timeout=None if wait is None else min(max(wait, 0.01), 60.0))
            except queue.Empty:
                notice = None
            if self._held_back and self._may_send() and self._send(partial(self._about, self._held_back)):
                self._held_back, self._dropped_told = HeldBack(), self._dropped
            if notice is not None and not (self._may_send() and self._send(partial(_if_wanted, notice))):
                self._hold_back(notice)
        with suppress(queue.Empty):
            while True:
                if (notice := self._queue.get_nowait()) is not None:
                    self._hold_back(notice)
        self._save()

    def _hold_back(self, notice: Notice) -> None:
        self._held_back.add(notice)
        self._metrics.count("sortd_notifications", "held_back")

    def _save(self) -> None:
        """Write what the next run needs, if that has changed; log once that it cannot be written."""
        ages = self._pace.ages(self._clock())
        sent = [round(self._wall() - age, 1) for age in ages]
        facts = {"sent": sent, "dropped": self._dropped - self._dropped_told, "held_back": self._held_back.facts()}
        if facts == self._saved:
            return
        try:
            write_json(self._file, facts, mode=0o600, durable=False)
        except OSError as error:
            if not self._save_has_failed:
                self._log.warning(logs.DAEMON_HAMPERED, path=error.filename, error=error.strerror)
            self._save_has_failed = True
            return
        self._saved, self._save_has_failed = facts, False

    def _about(self, held_back: HeldBack, wanted: frozenset[str]) -> Notice | None:
        """Return the notice about what was held back, and dropped, since the last one."""
        notice, dropped = held_back.notice(wanted), self._dropped - self._dropped_told
        if notice is None or not dropped:
            return notice
        facts = {**notice.facts, "dropped": dropped}
        return replace(notice, text=f"{notice.text}\n{dropped:,} more were dropped, since too many waited", facts=facts)

    def _wait_seconds(self) -> float:
        return self._pace.wait_seconds(self._receivers.settings, self._clock(), self._local())

    def _may_send(self) -> bool:
        return not self._stopping.is_set() and self._wait_seconds() <= 0

    def _send(self, notice_for: Callable[[frozenset[str]], Notice | None]) -> bool:
        """Send to each target what ``notice_for`` returns for its events; return whether no stop prevented that."""
        self._pace.sent(self._clock())
        self._save()  # before the message, which a crash must not repeat without limit
        for name, target in self._receivers.targets.items():
            notice = notice_for(frozenset(target.events))
            if notice is None:
                continue
            if self._stopping.is_set():
                return False
            problem = deliver(target, notice, self._environment, local=self._local(), is_stopping=self._stopping.is_set)
            if problem is not None and self._stopping.is_set():
                return False
            self._note(name, notice, problem)
        return True

    def _note(self, name: str, notice: Notice, problem: str | None) -> None:
        """Count a delivery, and log the first failure of a target after a success."""
        self._metrics.count("sortd_notifications", "sent" if problem is None else "failed")
        if problem is None:
            self._failing.discard(name)
        elif name not in self._failing:
            self._failing.add(name)
            self._log.warning(logs.NOTIFICATION_FAILED, target=name, notification=notice.event, error=problem)


def _if_wanted(notice: Notice, wanted: frozenset[str]) -> Notice | None:
    return notice if notice.event in wanted else None


def deliver(
    target: Target,
    notice: Notice,
    environment: Mapping[str, str],
    *,
    local: datetime,
    is_stopping: Callable[[], bool] = lambda: False,
) -> str | None:
    """Send a notice to a target; return why that failed, without a secret, or None."""
    inherited = {name: environment[name] for name in INHERITED if name in environment}
    if isinstance(target, HookConfig):
        message = {
            "event": notice.event,
            "dataset": notice.dataset,
            "text": notice.text,
            "at": local.astimezone().isoformat(timespec="seconds"),
            "facts": dict(notice.facts),
        }
        return run_limited(
            target.command,
            _json(message),
            seconds=target.timeout_seconds,
            environment=inherited,
            is_stopping=is_stopping,
        )
    try:
        url = address_of(target, environment)
    except errors.ConfigError as error:
        return str(error)
    place = "" if notice.dataset is None else f": {notice.dataset}"
    title = _printable(f"sortd: {notice.event.replace('_', ' ')}{place}")
    return run_limited(
        [sys.executable, "-I", apprise_process.__file__],
        _json({"url": url, "title": title, "body": _printable(notice.text)[:_MOST_TEXT]}),
        seconds=APPRISE_SECONDS,
        environment=inherited | {name: environment[name] for name in _NETWORK if name in environment},
        is_stopping=is_stopping,
    )


def address_of(target: TargetConfig, environment: Mapping[str, str]) -> str:
    """Return the address of a target: a secret. Raises ConfigError, whose message does not contain it."""
    if target.url is not None:
        url = target.url.get_secret_value()
    else:
        file = target.url_file or Path()
        try:
            url = read_regular(file, limit=_MOST_ADDRESS_BYTES, follow=True).decode().strip()
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else "it is no short text"
            raise errors.ConfigError(f"{file} cannot be read: {why}") from None
        if not url:
            raise errors.ConfigError(f"{file} is empty; put the address into it")
    for name in _VARIABLE.findall(url):
        if name not in environment:
            raise errors.ConfigError(f"the environment variable {name} is not set")
    return _VARIABLE.sub(lambda found: environment[found[1]], url)


def _json(message: Mapping[str, object]) -> bytes:
    """Return one line of JSON; characters of names that are not UTF-8 are escaped as lone surrogates."""
    return json.dumps(message).encode() + b"\n"


def _printable(text: str) -> str:
    """Return a text for people: names need not be UTF-8 or printable."""
    return "".join(one if one.isprintable() or one == "\n" else "\N{REPLACEMENT CHARACTER}" for one in text)
