"""A real sortd says over HTTP and to hooks what becomes of its datasets."""

import json
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from sortd.config import read_config
from sortd.daemon.daemon import Daemon
from sortd.daemon.endpoint import Page
from sortd.daemon.metrics import Metrics
from sortd.daemon.observer import checked_images
from sortd.daemon.resources import Resources
from sortd.layout import Layout
from sortd.service import Notifier
from sortd.store.journal import Journal
from sortd.store.records import Selection
from tests.command_line import sortd
from tests.daemon_process import PATIENCE_SECONDS, DaemonProcess, draw_strangers, make_dataset, picture, running, teach
from tests.filed_images import file_images

KEYS = {
    "mode": "best",
    "settle_seconds": 0.3,
    "guard": "no",
    "abstain": "{precision: 0.9}",
}


class Place:
    """A running sortd with two datasets, a hook for all events, and an address."""

    def __init__(self, folder: Path) -> None:
        """Make the datasets and the hook, and write the configuration."""
        self.folder, self.heard = folder, folder / "heard"
        self.colours, self.other = (make_dataset(folder / "Data", name) for name in ("Colours", "Other"))
        teach(self.colours)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.config = folder / "config.yaml"
        self.write_hook("cat >> heard")

    def write_hook(self, script: str, *, review_above: int = 3) -> None:
        """Write the configuration with this script of sh as a hook."""
        hook = json.dumps([{"command": ["sh", "-c", f"cd {self.folder}; {script}"], "timeout_seconds": 1000}])
        keys = {
            "root": self.folder / "Data",
            "state_dir": self.folder / "state",
            "cache_dir": self.folder / "cache",
            **KEYS,
            "metrics": f"{{http: '127.0.0.1:{self.port}'}}",
            "notify": f"{{review_above: {review_above}}}",
            "hooks": hook,
        }
        self.config.write_text("".join(f"{key}: {value}\n" for key, value in keys.items()))

    def get(self, path: str) -> tuple[int, str]:
        """Return status and body of a page."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=PATIENCE_SECONDS) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as refused:
            with refused:
                return refused.code, refused.read().decode()

    def reasons(self) -> list[str]:
        """Return why it is not ready, and check that the status agrees."""
        status, text = self.get("/readyz")
        facts = json.loads(text)
        assert facts["ready"] == (status == 200) == (not facts["reasons"])
        return list(facts["reasons"])

    def metrics(self) -> dict[tuple[str, ...], float]:
        """Return each sample by its name and labels."""
        return {
            (sample.name, *sorted(sample.labels.values())): sample.value
            for family in text_string_to_metric_families(self.get("/metrics")[1])
            for sample in family.samples
        }

    def events(self) -> list[tuple[str, str | None]]:
        """Return event and dataset of each message that the hook got."""
        return [(one["event"], one["dataset"]) for one in self.messages()]

    def messages(self) -> list[dict[str, Any]]:
        """Return each message that the hook got."""
        return [json.loads(line) for line in self.heard.read_text().splitlines()] if self.heard.exists() else []


def test_checked_images_are_counted_by_kind_of_evidence(tmp_path: Path) -> None:
    """Random samples are kept apart: corrected images are not drawn at random."""
    dataset = make_dataset(tmp_path / "Data")
    file_images(dataset, tmp_path / "state", {f"{number}.png": "red" for number in range(5)})
    with Journal(Layout(dataset).state_folder(tmp_path / "state") / "journal.sqlite") as journal:
        assert checked_images(journal.history, "max") == {}
        moves = sorted(journal.history.moves(Selection(label="red")), key=lambda record: record.id)
        journal.record_checks([(moves[0].id, True), (moves[1].id, False)])
        journal.record_corrections([(moves[4], "green", "Dataset/green/4.png")])
        assert checked_images(journal.history, "max") == {"audit": (1, 2), "corrections": (2, 3)}
        assert checked_images(journal.history, "best") == {}


def test_health_of_a_loop_that_stands_still_is_503_with_the_reason(tmp_path: Path) -> None:
    """The time is that of the watchdog, or a minute without systemd; while journals are recovered, longer."""
    place = Place(tmp_path)
    config = read_config(place.config, {})
    daemon = Daemon(
        config,
        resources=Resources(config),
        reload=lambda: config,
        notifier=Notifier({}),
        metrics=Metrics(is_on=False),
    )
    daemon._turned_at -= 100
    assert daemon._health_page() == Page(HTTPStatus.OK, b"ok\n")
    daemon._served = 1
    reason = "the loop has made no progress for 60 s"
    assert daemon._health_page() == Page(HTTPStatus.SERVICE_UNAVAILABLE, f"{reason}\n".encode())
    assert json.loads(daemon._ready_page().body)["reasons"][0] == reason


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The place of the daemon."""
    return Place(tmp_path_factory.mktemp("observed"))


@pytest.fixture(scope="module")
def daemon(place: Place) -> Iterator[DaemonProcess]:
    """A daemon that is ready."""
    with running(place.config) as daemon:
        yield daemon


def test_ready_until_a_disk_is_missing_and_again_when_it_is_back(place: Place, daemon: DaemonProcess) -> None:
    """The reason names the dataset, its gauge follows, the hook gets one message; sortd is alive all the time."""
    assert place.reasons() == []
    (place.other / ".sortd").rename(place.folder / "aside")
    picture("red", 1).save(place.other / "Images" / "a.png")
    daemon.wait_until(lambda: bool(place.reasons()), "a reason")
    (reason,) = place.reasons()
    assert reason.startswith("Other: ")
    assert "is the disk mounted?" in reason
    daemon.wait_until(lambda: place.events() == [("disk_missing", "Other")], "the hook")
    found = place.metrics()
    assert (found["sortd_dataset_held", "Other"], found["sortd_dataset_held", "Colours"]) == (1, 0)
    assert found["sortd_ready",] == 0
    assert place.get("/healthz") == (200, "ok\n")
    (place.folder / "aside").rename(place.other / ".sortd")
    (place.other / "Clases" / "red" / "new.png").write_bytes((place.other / "Clases" / "red" / "0.png").read_bytes())
    daemon.wait_until(lambda: place.reasons() == [], "no reason")
    assert place.events() == [("disk_missing", "Other")]


def test_ready_until_a_dataset_is_held_and_again_when_it_is_served(place: Place, daemon: DaemonProcess) -> None:
    """A journal that cannot be read holds one dataset, as `sortd status` says."""
    bad = make_dataset(place.folder / "aside", "Bad")
    (bad / ".sortd").symlink_to(place.folder)
    bad.rename(place.folder / "Data" / "Bad")
    daemon.wait_for("dataset.held", dataset="Bad")
    daemon.wait_until(lambda: [one for one in place.reasons() if one.startswith("Bad: ")] != [], "a reason")
    daemon.wait_until(lambda: ("dataset_held", "Bad") in place.events(), "the hook")
    assert place.metrics()["sortd_dataset_held", "Bad"] == 1
    assert place.metrics()["sortd_last_error_timestamp_seconds",] > 0
    (place.folder / "Data" / "Bad" / ".sortd").unlink()
    daemon.wait_until(lambda: place.reasons() == [], "no reason")
    (place.folder / "Data" / "Bad").rename(place.folder / "gone")  # sortd may write into it meanwhile
    daemon.wait_for("dataset.missing", dataset="Bad")
    daemon.wait_until(lambda: place.reasons() != [], "a reason")
    reload(daemon)
    daemon.wait_until(lambda: place.reasons() == [], "no reason")
    daemon.wait_until(lambda: ("sortd_dataset_held", "Bad") not in place.metrics(), "its gauges to be removed")


def reload(daemon: DaemonProcess) -> None:
    """Let it read its configuration, and wait until it has."""
    count = len(daemon.events("config.reloaded"))
    daemon.send(signal.SIGHUP)
    daemon.wait_for("config.reloaded", count=count + 1)


def test_ready_again_only_when_a_dataset_that_was_moved_away_is_back(place: Place, daemon: DaemonProcess) -> None:
    """Nothing else happens; page, gauges, status and hook say which one is missing, and what to do."""
    told = place.events().count(("disk_missing", "Other"))
    place.other.rename(place.folder / "moved")
    daemon.wait_until(lambda: bool(place.reasons()), "a reason")
    (reason,) = place.reasons()
    assert reason.startswith(f"Other: {place.other} is missing")
    daemon.wait_until(lambda: place.metrics()["sortd_ready",] == 0, "the gauge")
    assert place.metrics()["sortd_dataset_held", "Other"] == 1
    daemon.wait_until(lambda: place.events().count(("disk_missing", "Other")) > told, "the hook")
    facts = sortd("status", "--json", "-c", place.config).facts["datasets"]["Other"]
    assert (facts["root"], f"Other: {facts['problem']}", facts["moving"]) == (None, reason, False)
    (place.folder / "moved").rename(place.other)
    daemon.wait_until(lambda: place.reasons() == [], "no reason")
    daemon.wait_until(lambda: place.metrics()["sortd_ready",] == 1, "the gauge")


@pytest.mark.parametrize(("name", "is_empty"), [("Clases", False), ("Images", False), (".sortd", False), ("", True)])
def test_ready_until_a_folder_of_a_dataset_is_missing(
    place: Place, daemon: DaemonProcess, name: str, *, is_empty: bool
) -> None:
    """Nothing else happens; the last is an empty mount point, which is what a disk leaves."""
    folder = place.other / name
    folder.rename(place.folder / "moved")
    if is_empty:
        folder.mkdir()
    daemon.wait_until(lambda: any(reason.startswith(f"Other: {folder}") for reason in place.reasons()), "a reason")
    assert place.metrics()["sortd_dataset_held", "Other"] == 1
    if is_empty:
        folder.rmdir()
    (place.folder / "moved").rename(folder)
    daemon.wait_until(lambda: place.reasons() == [], "no reason")


def test_review_pile_is_told_and_counted(place: Place, daemon: DaemonProcess) -> None:
    """The number in the message is that of the gauge."""
    draw_strangers(place.colours / "Images", 5)
    daemon.wait_for("image.sent_to_review", count=5)
    daemon.wait_until(lambda: ("review_pile", "Colours") in place.events(), "the hook")
    daemon.wait_until(lambda: place.metrics()["sortd_review_images", "Colours"] == 5, "the gauge")
    daemon.wait_until(lambda: place.metrics()["sortd_backlog", "Colours"] == 0, "no image to wait")
    assert place.metrics()["sortd_precision_wanted_ratio", "Colours"] == 0.9
    assert place.metrics()["sortd_prototypes_built_timestamp_seconds", "Colours"] > 0
    daemon.wait_until(lambda: place.metrics()["sortd_notifications_total", "sent"] == len(place.events()), "the count")


def test_metrics_of_a_daemon_pass_promtool(place: Place, daemon: DaemonProcess) -> None:
    """Names and help texts follow the conventions of Prometheus."""
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    text = place.get("/metrics")[1]
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    assert daemon.process.poll() is None


def test_reload_changes_a_hook_and_a_stop_ends_one_that_hangs(place: Place, daemon: DaemonProcess) -> None:
    """The new hook is used at once; images are filed while it hangs, and sortd stops as fast as ever."""
    place.write_hook("touch hanging; trap '' TERM; while :; do sleep 1000; done", review_above=1)
    reload(daemon)
    (place.other / ".sortd").rename(place.folder / "aside2")
    picture("red", 5).save(place.other / "Images" / "b.png")
    daemon.wait_until((place.folder / "hanging").exists, "the hook that hangs")
    (place.folder / "aside2").rename(place.other / ".sortd")
    picture("green", 3).save(place.colours / "Images" / "green.png")
    daemon.wait_for("image.filed", dataset="Colours")
    assert daemon.stop() == 0
    assert daemon.events("daemon.stopped", worker_ended=True)
    until = time.monotonic() + PATIENCE_SECONDS
    while processes_of_hooks(place):
        assert time.monotonic() < until
        time.sleep(0.02)


def processes_of_hooks(place: Place) -> list[str]:
    """Return the processes that the hook has left."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if str(place.folder) in (folder / "cmdline").read_text("utf-8", "replace"):
                found.append(folder.name)
        except OSError:
            continue
    return found
