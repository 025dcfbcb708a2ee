"""Notices reach people and hooks, at most as many as allowed, and nobody waits for them."""

import json
import os
import sys
import tempfile
import threading
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from datetime import datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr
from structlog.testing import capture_logs

from sortd.config_reporting import EVENT_NAMES, HookConfig, NotifyConfig, Target, TargetConfig
from sortd.daemon.metrics import Metrics
from sortd.daemon.notices import Notice
from sortd.daemon.sender import HeldBack, Pace, Receivers, Sender, address_of, deliver
from sortd.errors import ConfigError
from tests.daemon_process import PATIENCE_SECONDS

SECRET = "sesame"  # noqa: S105 -- what no message may contain
NOON = datetime(2026, 3, 1, 12)  # noqa: DTZ001 -- local time
HELD = Notice("dataset_held", "A is held", "A", {"reason": "why"})


class Received(ThreadingHTTPServer):
    """An HTTP server that keeps what is posted to it, and answers with the status in the path."""

    daemon_threads = True

    def __init__(self) -> None:
        """Listen on a free port of loopback."""
        super().__init__(("127.0.0.1", 0), _Receiver)
        self.bodies: list[dict[str, Any]] = []
        self.address = f"json://user:{SECRET}@127.0.0.1:{self.server_port}"


class _Receiver(BaseHTTPRequestHandler):
    server: Received

    def do_POST(self) -> None:
        """Keep the body."""
        self.server.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(int(self.path.rpartition("/")[2] or 200))
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- the library's name
        """Log nothing."""


@pytest.fixture(scope="module")
def service() -> Iterator[Received]:
    """A service on loopback."""
    with Received() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class Hook:
    """A hook that appends what it gets to a file."""

    def __init__(self, folder: Path) -> None:
        """Write the program."""
        self._out, self._program = folder / "out", folder / "hook"
        self._program.write_text(f"#!/bin/sh\ncat >> {self._out}\n")
        self._program.chmod(0o755)

    def config(self, **keys: Any) -> HookConfig:
        """Return its configuration."""
        return HookConfig(command=(str(self._program),), **keys)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """Return what it got."""
        return [json.loads(line) for line in self._out.read_text().splitlines()] if self._out.exists() else []

    @property
    def events(self) -> list[str]:
        """Return the events that it got."""
        return [message["event"] for message in self.messages]

    def wait_for(self, count: int) -> None:
        """Wait until it has got so many messages."""
        wait_until(lambda: len(self.events) >= count)


@pytest.fixture
def hook(tmp_path: Path) -> Hook:
    """A hook that works."""
    return Hook(tmp_path)


class Clock:
    """The time, which passes only if a test says so."""

    def __init__(self, seconds: float = 0.0) -> None:
        """Begin at noon, or so many seconds later."""
        self._began = self.seconds = seconds

    def now(self) -> float:
        """Return seconds since the machine was started."""
        return self.seconds - self._began

    def wall(self) -> float:
        """Return seconds since the epoch."""
        return 1e9 + self.seconds

    def local(self) -> datetime:
        """Return the local time."""
        return NOON + timedelta(seconds=self.seconds)


@contextmanager
def sending(
    receivers: Receivers, metrics: Metrics | None = None, clock: Clock | None = None, state: Path | None = None
) -> Iterator[Sender]:
    """Yield a sender that goes on from a state folder, by default an empty one, and stop it in the end."""
    clock, metrics = clock or Clock(), metrics or Metrics(is_on=False)
    with tempfile.TemporaryDirectory() as empty:
        sender = Sender(
            receivers, metrics, state=state or Path(empty), clock=clock.now, wall=clock.wall, local=clock.local
        )
        sender.resume()
        try:
            yield sender
        finally:
            sender.stop()


def hooks(*targets: Target, **settings: Any) -> Receivers:
    """Return receivers with their names."""
    return Receivers(NotifyConfig(**settings), {f"hooks.{at}": target for at, target in enumerate(targets)})


def wait_until(is_true: Callable[[], bool]) -> None:
    """Wait until something is true."""
    until = time.monotonic() + PATIENCE_SECONDS
    while not is_true():
        assert time.monotonic() < until
        time.sleep(0.01)


class TestPace:
    """When the next message may be sent."""

    @settings(deadline=None, max_examples=50)
    @given(st.lists(st.floats(0, 2000), max_size=20), st.integers(1, 5))
    def test_pace_never_lets_more_messages_pass_in_an_hour(self, pauses: list[float], most: int) -> None:
        """In any hour there are at most as many as allowed, and after the told time one may be sent."""
        pace, limits, now, sent = Pace(), NotifyConfig(messages_per_hour=most), 0.0, list[float]()
        for pause in pauses:
            now += pause
            wait = pace.wait_seconds(limits, now, NOON)
            if wait > 0:
                assert deepcopy(pace).wait_seconds(limits, now + wait + 1e-6, NOON) == 0
                continue
            pace.sent(now)
            sent.append(now)
            assert len([one for one in sent if one > now - 3600]) <= most

    @pytest.mark.parametrize(
        ("hours", "clock", "wait"),
        [
            ("22:00-07:00", "21:59:59", 0),
            ("22:00-07:00", "22:00:00", 9 * 3600),
            ("22:00-07:00", "06:59:00", 60),
            ("22:00-07:00", "07:00:00", 0),
            ("12:00-13:00", "12:30:00", 1800),
            ("12:00-13:00", "11:00:00", 0),
            ("12:00-13:00", "13:00:00", 0),
        ],
    )
    def test_quiet_hours_are_in_local_time(self, hours: str, clock: str, wait: float) -> None:
        """They may include midnight."""
        local = datetime.fromisoformat(f"2026-03-01T{clock}")
        assert Pace().wait_seconds(NotifyConfig(quiet_hours=hours), 0.0, local) == wait


def test_held_back_notices_are_summed_up_for_those_who_want_them() -> None:
    """A target hears of its own events only; texts are few, numbers complete."""
    held_back = HeldBack()
    for number in range(100):
        held_back.add(Notice("review_pile", f"pile {number}"))
    held_back.add(HELD)
    notice = held_back.notice(frozenset({"review_pile"}))
    assert notice is not None
    assert notice.facts["counts"] == {"review_pile": 100}
    assert notice.text.splitlines()[0] == "100 notifications were held back: 100 review_pile"
    assert notice.text.splitlines()[-1] == "pile 99"
    assert len(notice.text.splitlines()) == 11
    assert held_back.notice(frozenset({"daily_summary"})) is None


class TestSender:
    """The thread, with real hooks."""

    def test_hook_gets_each_event_that_it_asks_for_as_json(self, hook: Hook) -> None:
        """Others are not queued."""
        with sending(hooks(hook.config(events=("dataset_held",)))) as sender:
            sender.post(Notice("review_pile", "a pile", "A"))
            sender.post(Notice("dataset_held", "caf\udce9\x1b is held", "caf\udce9", {"reason": "why"}))
            wait_until(lambda: bool(hook.messages))
        (message,) = hook.messages
        assert datetime.fromisoformat(message.pop("at")).replace(tzinfo=None) == NOON
        assert message == {
            "event": "dataset_held",
            "dataset": "caf\udce9",
            "text": "caf\udce9\x1b is held",
            "facts": {"reason": "why"},
        }

    def test_burst_of_ten_thousand_events_sends_as_many_messages_as_allowed(self, hook: Hook) -> None:
        """Posting waits for nothing; later one message has the numbers of all others, dropped ones included."""
        clock, metrics = Clock(), Metrics()
        with sending(hooks(hook.config(), messages_per_hour=3), metrics, clock) as sender:
            for number in range(10_000):
                sender.post(Notice("review_pile", f"pile {number}", "A"))
            wait_until(lambda: sum(counts(metrics).values()) == 10_000)
            assert hook.events == ["review_pile"] * 3
            clock.seconds = 3601
            sender.post(Notice("dataset_held", "later", "A"))  # wakes the thread
            hook.wait_for(5)
        assert hook.events[3:] == ["held_back", "dataset_held"]
        facts = hook.messages[3]["facts"]
        assert facts["counts"]["review_pile"] + facts.get("dropped", 0) == 9_997

    def test_notices_of_quiet_hours_are_summed_up_afterwards(self, hook: Hook) -> None:
        """Nothing is sent meanwhile, and nothing needs to happen for the message afterwards."""
        clock, metrics = Clock(), Metrics()
        with sending(hooks(hook.config(), quiet_hours="11:00-12:30"), metrics, clock) as sender:
            sender.post(HELD)
            sender.post(HELD)
            wait_until(lambda: counts(metrics).get("held_back") == 2)
            assert hook.events == []
            clock.seconds = 1800
            sender.post(Notice("unwanted", ""))
            sender.post(Notice("review_pile", "a pile"))
            hook.wait_for(2)
        assert [message["text"].splitlines()[0] for message in hook.messages] == [
            "2 notifications were held back: 2 dataset_held",
            "a pile",
        ]

    @pytest.mark.parametrize("script", ["exit 1", "yes >&2", "sleep 1000", "trap '' TERM; while :; do sleep 1; done"])
    def test_hook_that_fails_is_logged_once_until_it_succeeds(self, tmp_path: Path, hook: Hook, script: str) -> None:
        """Others get each message all the same."""
        good = tmp_path / "good"
        bad = HookConfig(command=("sh", "-c", f"test -e {good} || {{ {script}; }}"), timeout_seconds=0.3)
        receivers = hooks(bad, hook.config())
        with capture_logs() as lines, sending(receivers) as sender:
            for number in range(3):
                sender.post(HELD)
                hook.wait_for(number + 1)
            assert [line["event"] for line in lines] == ["notification.failed"]
            assert lines[0]["target"] == "hooks.0"
            good.touch()
            sender.post(HELD)
            hook.wait_for(4)
            good.unlink()
            sender.post(HELD)
            hook.wait_for(5)
        assert len(lines) == 2

    def test_reload_changes_receivers_and_limits(self, tmp_path: Path, hook: Hook) -> None:
        """The next message goes to the new ones; counts of the past hour stay."""
        (other_folder := tmp_path / "other").mkdir()
        other = Hook(other_folder)
        with sending(hooks(hook.config(), messages_per_hour=2)) as sender:
            sender.post(HELD)
            hook.wait_for(1)
            sender.reload(hooks(other.config(), messages_per_hour=2))
            for _ in range(3):
                sender.post(HELD)
            other.wait_for(1)
            sender.reload(hooks())
            sender.post(HELD)
        assert (len(hook.events), len(other.events)) == (1, 1)

    def test_stop_ends_a_hook_that_hangs(self, tmp_path: Path) -> None:
        """What waits is not sent, and a later notice starts nothing."""
        started = tmp_path / "started"
        hanging = HookConfig(command=("sh", "-c", f"touch {started}; sleep 1000"), timeout_seconds=1000)
        with sending(hooks(hanging)) as sender:
            for _ in range(2000):
                sender.post(HELD)
            wait_until(started.exists)
            sender.stop()
            assert not [thread for thread in threading.enumerate() if thread.name == "sender"]
            started.unlink()
            sender.post(HELD)
        assert not started.exists()

    def test_sender_that_nobody_listens_to_starts_no_thread(self) -> None:
        """It costs nothing."""
        with sending(hooks()) as sender:
            sender.post(HELD)
            assert sender._thread is None


class TestRestart:
    """What the next run knows of the last one, also after the machine was started anew."""

    def test_limit_of_an_hour_counts_the_messages_of_the_last_run(self, tmp_path: Path, hook: Hook) -> None:
        """Without that, a sortd that is restarted again and again would send without limit."""
        receivers = hooks(hook.config(), messages_per_hour=2)
        for number in range(4):
            metrics = Metrics()
            with sending(receivers, metrics, Clock(600.0 * number), tmp_path) as sender:
                sender.post(HELD)
                wait_until(lambda: sum(counts(metrics).values()) == 1)  # noqa: B023 -- it is waited for here
        assert len(hook.events) == 2
        with sending(receivers, clock=Clock(3601), state=tmp_path):
            hook.wait_for(3)
        assert hook.messages[2]["text"].startswith("2 notifications were held back: 2 dataset_held\nA is held")

    def test_notices_of_quiet_hours_are_summed_up_by_the_next_run(self, tmp_path: Path, hook: Hook) -> None:
        """Nothing needs to happen for the message; it is sent once."""
        receivers, metrics = hooks(hook.config(), quiet_hours="11:00-12:30"), Metrics()
        with sending(receivers, metrics, state=tmp_path) as sender:
            sender.post(Notice("dataset_held", "caf\udce9 is held", "caf\udce9"))
            wait_until(lambda: counts(metrics).get("held_back") == 1)
        for seconds in (60.0, 1800.0, 1900.0):
            metrics = Metrics()
            with sending(receivers, metrics, Clock(seconds), tmp_path):
                if seconds == 1800:
                    wait_until(lambda: counts(metrics).get("sent") == 1)  # noqa: B023 -- it is waited for here
        assert [message["text"] for message in hook.messages] == [
            "1 notifications were held back: 1 dataset_held\ncaf\udce9 is held"
        ]

    def test_notices_that_a_stop_cuts_short_are_sent_by_the_next_run(self, tmp_path: Path, hook: Hook) -> None:
        """The one whose hook ran, and those behind it, also the message about what was held back."""
        started = tmp_path / "started"
        hanging = HookConfig(command=("sh", "-c", f"touch {started}; sleep 1000"), timeout_seconds=1000)
        for clock in (Clock(), Clock(10)):
            with sending(hooks(hanging), clock=clock, state=tmp_path) as sender:
                if clock.seconds == 0:
                    sender.post(HELD)
                    sender.post(Notice("review_pile", "a pile", "A"))
                wait_until(started.exists)
            started.unlink()
        with sending(hooks(hook.config()), clock=Clock(20), state=tmp_path):
            hook.wait_for(1)
        assert hook.messages[0]["facts"]["counts"] == {"dataset_held": 1, "review_pile": 1}

    def test_state_is_small_private_and_without_addresses(self, tmp_path: Path) -> None:
        """However many notices were held back, and however long they are."""
        target, metrics = TargetConfig(url=SecretStr(f"json://user:{SECRET}@host")), Metrics()
        with sending(hooks(target, quiet_hours="11:00-13:00"), metrics, state=tmp_path) as sender:
            for _ in range(50):
                for event in EVENT_NAMES:
                    sender.post(Notice(event, "\udce9" * 100_000, "A"))
            wait_until(lambda: sum(counts(metrics).values()) == 50 * len(EVENT_NAMES))
        (file,) = tmp_path.iterdir()
        assert file.stat().st_size < 2 << 20
        assert file.stat().st_mode & 0o777 == 0o600
        assert SECRET not in file.read_text()
        with capture_logs() as lines, sending(hooks(target), clock=Clock(10), state=tmp_path) as sender:
            assert sender._held_back
        assert not [line for line in lines if line["event"] == "daemon.hampered"]

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"\xff\x00",
            b"[]",
            b"[" * 100_000,
            b"null",
            b'{"sent": [], "dropped": 0}',
            b'{"sent": ["x"], "dropped": 0, "held_back": {}}',
            b'{"sent": [-1e999], "dropped": 0, "held_back": {}}',
            b'{"sent": [], "dropped": NaN, "held_back": {}}',
            b'{"sent": [], "dropped": 0, "held_back": {"review_pile": 3}}',
            b'{"sent": [], "dropped": 0, "held_back": {"review_pile": {"count": 1e9, "texts": []}}}',
            b'{"sent": [], "dropped": 0, "held_back": {"review_pile": {"count": -1, "texts": []}}}',
            b'{"sent": [], "dropped": 0, "held_back": {"review_pile": {"count": 1, "texts": [{}]}}}',
            b'"' + b"x" * (3 << 20) + b'"',
        ],
    )
    def test_damaged_state_is_logged_once_and_replaced(self, tmp_path: Path, hook: Hook, content: bytes) -> None:
        """Messages are sent as if there were none."""
        file = tmp_path / "notifications.json"
        file.write_bytes(content)
        for number in range(2):
            metrics = Metrics()
            with capture_logs() as lines, sending(hooks(hook.config()), metrics, state=tmp_path) as sender:
                sender.post(HELD)
                wait_until(lambda: counts(metrics).get("sent") == 1)  # noqa: B023 -- it is waited for here
            assert [line["event"] for line in lines] == ["daemon.hampered"] * (1 - number)
        assert len(json.loads(file.read_bytes())["sent"]) == 2

    def test_state_with_too_many_times_becomes_small(self, tmp_path: Path, hook: Hook) -> None:
        """Even if all of them are ahead of the clock; the next message waits for an hour at most."""
        file = tmp_path / "notifications.json"
        file.write_text(json.dumps({"sent": [9e99] * 100_000, "dropped": 0, "held_back": {}}))
        metrics = Metrics()
        with sending(hooks(hook.config()), metrics, state=tmp_path) as sender:
            sender.post(HELD)
            wait_until(lambda: counts(metrics).get("held_back") == 1)
        assert len(json.loads(file.read_bytes())["sent"]) == 3600

    @pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
    def test_state_that_is_no_file_hinders_no_message(
        self, tmp_path: Path, hook: Hook, make: Callable[[Path], None]
    ) -> None:
        """A folder cannot be replaced; that is logged once as well."""
        make(tmp_path / "notifications.json")
        with capture_logs() as lines, sending(hooks(hook.config()), state=tmp_path) as sender:
            for number in range(3):
                sender.post(HELD)
                hook.wait_for(number + 1)
        assert 1 <= len(lines) <= 2
        assert {line["event"] for line in lines} == {"daemon.hampered"}

    def test_state_that_nobody_waits_for_is_removed(self, tmp_path: Path) -> None:
        """Old messages are not sent to targets that are configured later."""
        (tmp_path / "notifications.json").touch()
        with sending(hooks(), state=tmp_path):
            assert not list(tmp_path.iterdir())

    def test_clock_that_went_back_delays_messages_by_an_hour_at_most(self, tmp_path: Path, hook: Hook) -> None:
        """The times of the last run may lie in the future."""
        receivers, clock = hooks(hook.config(), messages_per_hour=1), Clock()
        with sending(receivers, clock=Clock(1e6), state=tmp_path) as sender:
            sender.post(HELD)
            hook.wait_for(1)
        with sending(receivers, clock=clock, state=tmp_path) as sender:
            clock.seconds = 3601
            sender.post(HELD)
            hook.wait_for(2)


def counts(metrics: Metrics) -> dict[str, int]:
    """Return the number of notifications by outcome; one that is dropped or held back is not sent as well."""
    found = {}
    for line in metrics.text().splitlines():
        if line.startswith("sortd_notifications_total{"):
            name, _, value = line.partition("} ")
            found[name.partition('outcome="')[2].rstrip('"')] = int(float(value))
    return found


class TestApprise:
    """Messages to people, by a real process of Apprise to a real server."""

    def send(self, url: str, notice: Notice = HELD, **environment: str) -> str | None:
        """Send one notice."""
        target = TargetConfig(url=SecretStr(url))
        return deliver(target, notice, {**os.environ, **environment}, local=NOON)

    def test_message_arrives_with_a_title(self, service: Received) -> None:
        """Title and text are printable."""
        notice = Notice("dataset_held", "A\x1b\udce9 is held", "A")
        assert self.send(service.address, notice) is None
        body = service.bodies[-1]
        assert (body["title"], body["message"]) == ("sortd: dataset held: A", "A\ufffd\ufffd is held")

    @pytest.mark.parametrize(
        ("address", "problem"),
        [
            ("{service}/503", "exit code 1: the service answered 503"),
            (f"json://user:{SECRET}@127.0.0.1:1", "exit code 1: the service cannot be reached"),
            (f"tgram://{SECRET}", "exit code 1: the address is none that Apprise knows, or lacks a part"),
            (SECRET, "exit code 1: the address is none that Apprise knows, or lacks a part"),
            ("${SORTD_NO_SUCH_VARIABLE}", "the environment variable SORTD_NO_SUCH_VARIABLE is not set"),
        ],
    )
    def test_message_that_cannot_be_sent_says_why_without_the_secret(
        self, service: Received, address: str, problem: str
    ) -> None:
        """The reason is short."""
        found = self.send(address.format(service=service.address) if "{service}" in address else address)
        assert found is not None
        assert found.startswith(problem)
        assert SECRET not in found

    def test_address_is_read_from_a_file_or_a_variable_when_it_is_needed(self, tmp_path: Path) -> None:
        """A file may be a link, as those of Kubernetes; a changed one needs no reload."""
        (tmp_path / "real").write_text("json://host\n")
        (tmp_path / "link").symlink_to("real")
        filed = TargetConfig(url_file=tmp_path / "link")
        assert address_of(filed, {}) == "json://host"
        (tmp_path / "real").write_text("json://${USER}:${PASSWORD}@host")
        environment = {"USER": "a$1\\1${x}", "PASSWORD": SECRET}
        assert address_of(filed, environment) == f"json://a$1\\1${{x}}:{SECRET}@host"

    @pytest.mark.parametrize("content", [None, b"", b" \n", b"\xff", b"x" * 10_000])
    def test_file_without_an_address_is_an_error(self, tmp_path: Path, content: bytes | None) -> None:
        """The message names the file."""
        file = tmp_path / "url"
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(ConfigError, match=f"{file} (cannot be read|is empty)"):
            address_of(TargetConfig(url_file=file), {})

    def test_apprise_that_is_missing_is_said_so(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The extra is optional."""
        venv.create(tmp_path / "bare", symlinks=True)
        monkeypatch.setattr(sys, "executable", str(tmp_path / "bare/bin/python"))
        found = self.send("json://127.0.0.1:1")
        assert found == "exit code 1: Apprise is not installed: pip install 'sortd-images[notify]'"


def test_every_event_has_a_default_receiver() -> None:
    """A target without `events` gets all of them."""
    assert Receivers(NotifyConfig(), {"a": HookConfig(command=("a",))}).events == frozenset(EVENT_NAMES)
