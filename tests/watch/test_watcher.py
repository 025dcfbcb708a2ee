"""The watcher hints, notices when it is deaf, and heals: a test for each way in which watchers are known to fail."""

import ctypes
import gc
import itertools
import logging
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from watchdog.observers.api import BaseObserver
from watchdog.observers.inotify_move_event_grouper import InotifyMoveEventGrouper

from sortd.watch import inotify
from sortd.watch.inotify import Place, places_of_dataset
from sortd.watch.scan import scan
from sortd.watch.watcher import (
    CHECK_SECONDS,
    DropReason,
    EventsDropped,
    FileEvent,
    RootObserver,
    Watcher,
    WatchMode,
    WatchStatus,
)
from tests.daemon_process import PATIENCE_SECONDS

PATIENCE = PATIENCE_SECONDS


class Heard:
    """What a watcher posted."""

    def __init__(self) -> None:
        """Begin with silence."""
        self.said: list[FileEvent | EventsDropped] = []
        self._new: queue.SimpleQueue[FileEvent | EventsDropped] = queue.SimpleQueue()

    def __call__(self, said: FileEvent | EventsDropped) -> None:
        """Take one."""
        self._new.put(said)

    def until(self, claim: Callable[["Heard"], bool], patience: float = PATIENCE) -> bool:
        """Listen until the claim holds; tell whether it did in time."""
        deadline = time.monotonic() + patience
        while not claim(self):
            left = deadline - time.monotonic()
            try:
                self.said.append(self._new.get(timeout=max(0.0, min(left, 0.02))))
            except queue.Empty:
                if left <= 0:
                    return claim(self)
        return True

    def paths(self) -> set[str]:
        """Return every path hinted at."""
        return {said.path for said in self.said if isinstance(said, FileEvent)}

    def of(self, path: Path) -> bool:
        """Wait for a hint of this path."""
        return self.until(lambda heard: os.fspath(path) in heard.paths())

    def losses(self, loss: DropReason | None = None) -> list[EventsDropped]:
        """Return the losses told so far, without waiting."""
        self.until(lambda _: self._new.empty(), patience=0.0)
        return [said for said in self.said if isinstance(said, EventsDropped) and loss in {None, said.reason}]


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """No test leaves a thread or a descriptor of inotify behind."""
    threads, descriptors = set(threading.enumerate()), inotify.instances()
    yield
    gc.collect()
    assert set(threading.enumerate()) == threads
    assert inotify.instances() == descriptors


@pytest.fixture
def heard() -> Heard:
    """What the watcher of this test posts."""
    return Heard()


@pytest.fixture
def watcher(heard: Heard) -> Iterator[Watcher]:
    """A watcher that is closed in any case."""
    watcher = Watcher(heard)
    yield watcher
    watcher.close()


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A dataset with all its folders."""
    return make(tmp_path / "Data" / "Tornillos")


def unexpected(error: OSError) -> None:
    """Fail: nothing was to be reported."""
    raise AssertionError(error)


def make(root: Path) -> Path:
    """Make the folders of a dataset."""
    for name in ("Images", "Clases/hex", "Clases/torx", "Dataset/hex", "Dataset/torx", "Review", ".sortd"):
        (root / name).mkdir(parents=True)
    return root


def mode_of(watcher: Watcher, root: Path) -> WatchMode:
    """Return how a root is followed."""
    return next(status.mode for status in watcher.status() if status.root == os.fspath(root))


def hears(heard: Heard, folder: Path, name: str) -> bool:
    """Tell whether a file dropped into the folder is hinted at."""
    (folder / name).write_text(name)
    return heard.of(folder / name)


# ---------------------------------------------------------------- what is hinted at


def test_watcher_written_file_is_posted_with_its_close(watcher: Watcher, heard: Heard, dataset: Path) -> None:
    """A close after writing says that the file may be whole."""
    watcher.watch_dataset(dataset)
    (dataset / "Images" / "a.jpg").write_text("a")
    assert heard.until(lambda h: FileEvent(os.fspath(dataset / "Images" / "a.jpg"), closed=True) in h.said)


def test_watcher_appearing_file_is_posted(watcher: Watcher, heard: Heard, dataset: Path, tmp_path: Path) -> None:
    """Moved in, hard-linked, renamed by rsync or a browser: none of them is written and closed under its name."""
    watcher.watch_dataset(dataset)
    images = dataset / "Images"
    for name in ("moved", "linked"):
        (tmp_path / name).write_text(name)
    (tmp_path / "moved").rename(images / "moved.jpg")
    (images / "linked.jpg").hardlink_to(tmp_path / "linked")
    (images / ".rsynced.jpg.Ab12Cd").write_text("r")
    (images / ".rsynced.jpg.Ab12Cd").rename(images / "rsynced.jpg")
    (images / "fetched.jpg.crdownload").write_text("f")
    (images / "fetched.jpg.crdownload").rename(images / "fetched.jpg")
    for name in ("moved.jpg", "linked.jpg", "rsynced.jpg", "fetched.jpg"):
        assert heard.of(images / name), name
    assert not {path for path in heard.paths() if "crdownload" in path or ".rsynced" in path}


def test_watcher_class_with_the_name_of_an_unfinished_file_is_posted(
    watcher: Watcher, heard: Heard, dataset: Path
) -> None:
    """What is learnt is watched, and so is where it is filed."""
    for folder in ("Clases/engine.part", "Dataset/door.lock", "Review/x~"):
        (dataset / folder).mkdir()
    watcher.watch_dataset(dataset)
    for folder in ("Clases/engine.part", "Dataset/door.lock", "Review/x~"):
        assert hears(heard, dataset / folder, "a.jpg")


def test_watcher_removed_control_file_posts_its_file(watcher: Watcher, heard: Heard, dataset: Path) -> None:
    """The download is whole then; of the control file itself, and of other unfinished files, nothing is said."""
    images = dataset / "Images"
    (images / "a.jpg.aria2").touch()
    (images / "b.jpg.part").touch()
    watcher.watch_dataset(dataset)
    (images / "b.jpg.part").unlink()
    (images / "a.jpg.aria2").unlink()
    assert heard.of(images / "a.jpg")
    assert heard.paths() <= {os.fspath(images), os.fspath(images / "a.jpg")}


def test_watcher_file_that_a_person_may_miss_is_posted(watcher: Watcher, heard: Heard, dataset: Path) -> None:
    """A hidden photo, a backup: the log is to say that they stay."""
    watcher.watch_dataset(dataset)
    images = dataset / "Images"
    for name in (".facebook_1.jpg", "mine~"):
        assert hears(heard, images, name)


def test_watcher_removed_file_is_posted(watcher: Watcher, heard: Heard, dataset: Path, tmp_path: Path) -> None:
    """A file deleted, and one taken away, are looked for and found gone."""
    for name in ("deleted.jpg", "taken.jpg"):
        (dataset / "Clases" / "hex" / name).write_text(name)
    watcher.watch_dataset(dataset)
    (dataset / "Clases" / "hex" / "deleted.jpg").unlink()
    (dataset / "Clases" / "hex" / "taken.jpg").rename(tmp_path / "taken.jpg")
    assert heard.of(dataset / "Clases" / "hex" / "deleted.jpg")
    assert heard.of(dataset / "Clases" / "hex" / "taken.jpg")


def test_watcher_read_file_is_not_posted(watcher: Watcher, heard: Heard, dataset: Path) -> None:
    """Reading, listing, stamping and slow writing do not fill the queue."""
    path = dataset / "Images" / "a.jpg"
    path.write_text("a")
    watcher.watch_dataset(dataset)
    with path.open("ab") as file:
        for _ in range(100):
            file.write(b"more")
            file.flush()
            path.read_bytes()
            list((dataset / "Images").iterdir())
        path.chmod(0o600)
        assert hears(heard, dataset / "Images", "last.jpg")
        assert heard.paths() == {os.fspath(dataset / "Images" / "last.jpg")}


def test_watcher_folder_moved_in_is_posted_and_watched(
    watcher: Watcher, heard: Heard, dataset: Path, tmp_path: Path
) -> None:
    """A whole folder arrives by one rename; what is dropped into it later is heard too."""
    watcher.watch_dataset(dataset)
    (tmp_path / "trip" / "day1").mkdir(parents=True)
    (tmp_path / "trip" / "day1" / "a.jpg").write_text("a")
    (tmp_path / "trip").rename(dataset / "Images" / "trip")
    assert heard.until(lambda h: FileEvent(os.fspath(dataset / "Images" / "trip"), directory=True) in h.said)
    assert hears(heard, dataset / "Images" / "trip" / "day1", "b.jpg")


def test_watcher_fast_copy_posts_every_folder(watcher: Watcher, heard: Heard, dataset: Path) -> None:
    """A mkdir and a write outrun the watch; the folder's hint brings the scan that finds the files."""
    watcher.watch_dataset(dataset)
    for number in range(200):
        folder = dataset / "Images" / f"d{number}" / "deep"
        folder.mkdir(parents=True)
        (folder / "x.jpg").write_text("x")
    for number in range(200):
        assert heard.of(dataset / "Images" / f"d{number}")


def test_watcher_hidden_folder_made_visible_is_posted(watcher: Watcher, heard: Heard, dataset: Path) -> None:
    """FTP servers write into .name and rename: silent before, watched after."""
    watcher.watch_dataset(dataset)
    hidden = dataset / "Images" / ".upload"
    hidden.mkdir()
    (hidden / "a.jpg").write_text("a")
    assert hears(heard, dataset / "Images", "between.jpg")
    assert not {path for path in heard.paths() if ".upload" in path}
    hidden.rename(dataset / "Images" / "upload")
    assert heard.of(dataset / "Images" / "upload")
    assert hears(heard, dataset / "Images" / "upload", "b.jpg")


def test_watcher_folder_moved_out_posts_no_other_path(
    watcher: Watcher, heard: Heard, dataset: Path, tmp_path: Path
) -> None:
    """Watchdog goes on telling of it under the old path; nothing stands there, so nothing comes of it."""
    (dataset / "Images" / "trip").mkdir()
    watcher.watch_dataset(dataset)
    (dataset / "Images" / "trip").rename(tmp_path / "trip")
    assert heard.of(dataset / "Images" / "trip")
    (tmp_path / "trip" / "ghost.jpg").write_text("g")
    assert hears(heard, dataset / "Images", "real.jpg")
    assert {path for path in heard.paths() if os.path.isfile(path)} == {os.fspath(dataset / "Images" / "real.jpg")}


def test_watcher_names_that_are_not_utf8_are_posted(watcher: Watcher, heard: Heard, dataset: Path) -> None:
    """Any bytes make a name; the watcher's thread survives them."""
    watcher.watch_dataset(dataset)
    path = Path(os.fsdecode(os.fsencode(dataset) + b"/Images/caf\xe9.jpg"))
    path.write_text("c")
    assert heard.of(path)


def test_watcher_correction_in_dataset_and_review_is_posted(watcher: Watcher, heard: Heard, dataset: Path) -> None:
    """The user corrects by moving from class to class: both ends are told."""
    (dataset / "Dataset" / "hex" / "a.jpg").write_text("a")
    watcher.watch_dataset(dataset)
    (dataset / "Dataset" / "hex" / "a.jpg").rename(dataset / "Dataset" / "torx" / "a.jpg")
    assert heard.of(dataset / "Dataset" / "hex" / "a.jpg")
    assert heard.of(dataset / "Dataset" / "torx" / "a.jpg")
    assert hears(heard, dataset / "Review", "b.jpg")


def test_watcher_move_within_the_dataset_delays_no_event(
    watcher: Watcher, heard: Heard, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our own moves out of Images/ are paired, so that the next file need not wait for the other half of a move."""
    monkeypatch.setattr(InotifyMoveEventGrouper, "delay", 1e6)  # seconds that watchdog waits for it; 0.5 by default
    for number in range(20):
        (dataset / "Images" / f"{number}.jpg").write_text("x")
    watcher.watch_dataset(dataset)
    for number in range(20):
        (dataset / "Images" / f"{number}.jpg").rename(dataset / "Dataset" / "hex" / f"{number}.jpg")
        assert hears(heard, dataset / "Images", f"next{number}.jpg")


def test_watcher_new_dataset_is_posted_and_watched(watcher: Watcher, heard: Heard, dataset: Path) -> None:
    """Datasets appear while sortd runs; watching one twice changes nothing."""
    watcher.watch_root(dataset.parent)
    other = make(dataset.parent / "Flores")
    assert heard.of(other)
    watcher.watch_dataset(other)
    watcher.watch_dataset(other)
    assert hears(heard, other / "Images", "a.jpg")


def test_forget_dataset_posts_nothing_more(watcher: Watcher, heard: Heard, dataset: Path) -> None:
    """What was let go is not heard; the others are."""
    other = make(dataset.parent / "Flores")
    watcher.watch_dataset(dataset)
    watcher.watch_dataset(other)
    watcher.forget(other)
    watcher.forget(other)
    (other / "Images" / "silent.jpg").write_text("s")
    assert hears(heard, dataset / "Images", "a.jpg")
    assert os.fspath(other / "Images" / "silent.jpg") not in heard.paths()


def test_watcher_linked_root_posts_paths_with_its_own_name(watcher: Watcher, heard: Heard, tmp_path: Path) -> None:
    """Inotify does not follow links, and watchdog says nothing of it."""
    real = make(tmp_path / "disk" / "Tornillos")
    link = tmp_path / "link"
    link.symlink_to(real)
    watcher.watch_dataset(link)
    assert hears(heard, link / "Clases" / "hex", "a.jpg")
    assert hears(heard, link / "Images", "b.jpg")


# ---------------------------------------------------------------- what is noticed and healed


def test_watcher_post_that_raises_does_not_end_the_watching(dataset: Path) -> None:
    """Whatever taking a hint raises, the next is heard, and the loss is told at the next check."""
    heard = Heard()
    full = threading.Event()
    full.set()

    def taking(said: FileEvent | EventsDropped) -> None:
        if full.is_set():
            raise queue.Full
        heard(said)

    watcher = Watcher(taking)
    try:
        watcher.watch_dataset(dataset)
        (dataset / "Images" / "lost.jpg").write_text("l")
        deadline = time.monotonic() + PATIENCE
        while not observers(watcher)[0].lost and time.monotonic() < deadline:
            time.sleep(0.01)
        watcher.health(0.0)
        assert heard.losses() == []  # still full: kept for the check after
        full.clear()
        watcher.health(2.0)
        assert {lost.reason for lost in heard.losses()} == {DropReason.OVERFLOWED}
        assert hears(heard, dataset / "Images", "next.jpg")
    finally:
        watcher.close()


def observers(watcher: Watcher) -> list[RootObserver]:
    """Return the observers that are open."""
    return [watched.observer for watched in watcher._watched.values() if watched.observer is not None]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_health_dead_observer_is_replaced(watcher: Watcher, heard: Heard, dataset: Path, tmp_path: Path) -> None:
    """Move a class out, make it anew, delete the new one, delete the old one: watchdog's reader ends by KeyError."""
    watcher.watch_dataset(dataset)
    old = dataset / "Clases" / "hex"
    old.rename(tmp_path / "hex")
    assert heard.of(old)
    old.mkdir()
    assert hears(heard, old, "a.jpg")
    shutil.rmtree(old)
    assert hears(heard, dataset / "Images", "b.jpg")
    shutil.rmtree(tmp_path / "hex")
    now, deadline = 0.0, time.monotonic() + PATIENCE
    while not heard.losses(DropReason.RESTARTED) and time.monotonic() < deadline:
        watcher.health(now)
        now += CHECK_SECONDS
        time.sleep(0.01)
    assert "a thread of the watcher ended" in heard.losses(DropReason.RESTARTED)[0].why
    assert hears(heard, dataset / "Images", "healed.jpg")


def test_health_watch_dropped_by_the_kernel_is_detected(watcher: Watcher, heard: Heard, dataset: Path) -> None:
    """Every thread lives and every folder is the same, yet nothing is heard: only the probe tells."""
    watcher.watch_dataset(dataset)
    watcher.health(0.0)
    assert heard.until(lambda _: observers(watcher)[0]._answered.is_set())
    libc = ctypes.CDLL(None, use_errno=True)
    for descriptor in inotify.instances():
        for number in range(1, 100):
            libc.inotify_rm_watch(descriptor, number)
    (dataset / "Images" / "unheard.jpg").write_text("u")
    watcher.health(15.0)
    watcher.health(17.0)
    assert heard.losses() == []
    watcher.health(20.0)
    assert "no event came back" in heard.losses(DropReason.RESTARTED)[0].why
    assert hears(heard, dataset / "Images", "healed.jpg")


def test_health_probe_writes_nothing(watcher: Watcher, heard: Heard, dataset: Path) -> None:
    """It is opened and closed in .sortd/; no disk is woken, no folder of the user's touched, no hint posted."""
    watcher.watch_dataset(dataset)
    watcher.health(0.0)
    assert heard.until(lambda _: observers(watcher)[0]._answered.is_set())
    before = {path: path.stat().st_mtime_ns for path in (dataset, *dataset.rglob("*"))}
    for turn in range(1, 10):
        watcher.health(turn * 15.0)
        assert heard.until(lambda _: observers(watcher)[0]._answered.is_set())
    assert {path: path.stat().st_mtime_ns for path in (dataset, *dataset.rglob("*"))} == before
    assert heard.losses() == []
    assert heard.paths() == set()


def test_health_missing_marker_is_not_created(watcher: Watcher, dataset: Path) -> None:
    """No .sortd/ means not mounted: the probe must not say otherwise."""
    (dataset / ".sortd").rmdir()
    watcher.watch_dataset(dataset)
    for turn in range(4):
        watcher.health(turn * 15.0)
    assert not (dataset / ".sortd").exists()
    assert mode_of(watcher, dataset) is WatchMode.EVENTS


@pytest.mark.timeout(60)
def test_health_with_pipe_as_probe_file_waits_for_nobody(watcher: Watcher, dataset: Path) -> None:
    """A pipe that nobody reads would hold the loop until somebody does."""
    os.mkfifo(dataset / ".sortd" / "canary")
    watcher.watch_dataset(dataset)
    for now in (0.0, 20.0, 40.0):
        watcher.health(now)
    assert mode_of(watcher, dataset) is WatchMode.EVENTS


def test_health_with_linked_marker_makes_nothing_elsewhere(watcher: Watcher, dataset: Path, tmp_path: Path) -> None:
    """The probe file is made in the dataset's own folder or nowhere."""
    (tmp_path / "elsewhere").mkdir()
    (dataset / ".sortd").rmdir()
    (dataset / ".sortd").symlink_to(tmp_path / "elsewhere")
    watcher.watch_dataset(dataset)
    watcher.health(0.0)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_health_recreated_root_is_watched_again(watcher: Watcher, heard: Heard, dataset: Path) -> None:
    """A gone root is waited for, told once, and taken up at the first check that finds it."""
    watcher.watch_dataset(dataset)
    shutil.rmtree(dataset)
    for turn in range(5):
        watcher.health(turn * 2.0)
    assert mode_of(watcher, dataset) is WatchMode.WAITING
    assert [lost.reason for lost in heard.losses()] == [DropReason.DEGRADED]
    make(dataset)
    watcher.health(10.0)
    assert [lost.reason for lost in heard.losses()] == [DropReason.DEGRADED, DropReason.RESTARTED]
    assert hears(heard, dataset / "Images", "a.jpg")


def test_health_replaced_root_is_detected(watcher: Watcher, heard: Heard, dataset: Path) -> None:
    """A root renamed away and made anew, between two checks, is watched where it is now."""
    watcher.watch_dataset(dataset)
    dataset.rename(dataset.with_name("old"))
    make(dataset)
    watcher.health(0.0)
    assert "is another folder now" in heard.losses(DropReason.RESTARTED)[0].why
    assert hears(heard, dataset / "Images", "a.jpg")


def test_health_recreated_inbox_is_watched_again(watcher: Watcher, heard: Heard, dataset: Path) -> None:
    """Images/ may be deleted and made again at any time."""
    watcher.watch_dataset(dataset)
    shutil.rmtree(dataset / "Images")
    watcher.health(0.0)
    (dataset / "Images").mkdir()
    watcher.health(2.0)
    assert hears(heard, dataset / "Images", "a.jpg")


def test_health_failing_start_is_retried_with_growing_delays(dataset: Path, heard: Heard) -> None:
    """The pauses double up to a minute; the reason is told once, not at each attempt."""
    attempts = []
    now = 0.0

    def failing(*, timeout: float = 1.0) -> BaseObserver:  # noqa: ARG001 - what watchdog's own class takes
        attempts.append(now)
        raise OSError(24, "inotify instance limit reached")

    watcher = Watcher(heard, make_observer=failing)
    watcher.watch_dataset(dataset)
    for _ in range(300):
        watcher.health(now)
        now += CHECK_SECONDS
    watcher.close()
    pauses = [later - earlier for earlier, later in itertools.pairwise(attempts[1:])]
    assert pauses == sorted(pauses)
    assert pauses[-1] == 60.0
    assert len(heard.losses()) == 1
    assert "fs.inotify.max_user_instances=1024" in heard.losses()[0].why


def test_watcher_thirty_failed_starts_leak_nothing(watcher: Watcher, heard: Heard, tmp_path: Path) -> None:
    """Neither a missing root, nor one that is a file, nor an observer that fails half-way leaves anything behind."""
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    (tmp_path / "file").touch()
    watcher.watch_dataset(tmp_path / "missing")
    watcher.watch_dataset(tmp_path / "file")
    for turn in range(30):
        watcher.health(turn * 100.0)
    for _ in range(30):
        with pytest.raises(FileNotFoundError):
            RootObserver("/nowhere", (Place("/nowhere", recursive=True),), heard)
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert {mode_of(watcher, tmp_path / "missing"), mode_of(watcher, tmp_path / "file")} == {WatchMode.WAITING}


def test_close_called_twice_joins_the_threads_once(heard: Heard, dataset: Path) -> None:
    """After close nothing runs, nothing is open, and watchdog's logger is as it was."""
    handlers = list(logging.getLogger("watchdog.observers").handlers)
    watcher = Watcher(heard)
    watcher.watch_root(dataset.parent)
    watcher.watch_dataset(dataset)
    watcher.close()
    watcher.close()
    assert observers(watcher) == []
    assert logging.getLogger("watchdog.observers").handlers == handlers


def test_health_dead_root_does_not_affect_another(watcher: Watcher, heard: Heard, dataset: Path) -> None:
    """Each root has an ear of its own: only the broken one is replaced."""
    other = make(dataset.parent / "Flores")
    watcher.watch_dataset(dataset)
    watcher.watch_dataset(other)
    kept = observers(watcher)[1]
    observers(watcher)[0]._observer.stop()
    watcher.health(0.0)
    assert [lost.root for lost in heard.losses()] == [os.fspath(dataset)]
    assert observers(watcher)[1] is kept


# ---------------------------------------------------------------- where events cannot be trusted


def test_polled_file_system_without_events_is_named(heard: Heard, dataset: Path) -> None:
    """On a network mount the loop scans more often, and status and log say why."""
    watcher = Watcher(heard, is_blind=lambda path: "nfs4" if path.endswith("Images") else None)
    watcher.watch_dataset(dataset)
    watcher.health(0.0)
    watcher.close()
    assert "nfs4" in heard.losses(DropReason.DEGRADED)[0].why
    assert len(heard.losses()) == 1


def test_status_returns_the_effective_mode(heard: Heard, dataset: Path) -> None:
    """Configured and effective may differ: status names the effective mode."""
    root = os.fspath(dataset)
    expected = {"always": (root,), "auto": (root,), "never": ()}
    for polling, polled in expected.items():
        watcher = Watcher(heard, polling=polling, is_blind=lambda _: "cifs")  # type: ignore[arg-type]  # a literal each
        watcher.watch_dataset(dataset)
        status, roots = watcher.status(), watcher.polled()
        watcher.close()
        assert roots == polled
        assert status[0].mode is (WatchMode.POLLING if polled else WatchMode.EVENTS)
        assert bool(status[0].why) is bool(polled)


def test_polled_local_disk_is_not_polled(watcher: Watcher, dataset: Path) -> None:
    """Polling costs system calls: it is for those who need it."""
    watcher.watch_dataset(dataset)
    assert watcher.polled() == ()
    assert watcher.status() == (WatchStatus(os.fspath(dataset), WatchMode.EVENTS),)


def test_places_of_dataset_large_tree_is_not_watched_whole(dataset: Path) -> None:
    """900,000 folders below Dataset/ cost gigabytes and hours; Images/ and Clases/ are watched deep in any case."""
    whole = places_of_dataset(os.fspath(dataset))
    assert [(place.path, place.recursive) for place in whole] == [(os.fspath(dataset), True)]
    for large in (
        places_of_dataset(os.fspath(dataset), max_folders=3),
        places_of_dataset(os.fspath(dataset), max_entries=3),
    ):
        deep = {os.path.relpath(place.path, dataset) for place in large if place.recursive}
        flat = {os.path.relpath(place.path, dataset) for place in large if not place.recursive}
        assert deep == {"Images", "Clases"}
        assert flat == {".", "Dataset", "Review", ".sortd"}


def test_watcher_large_dataset_is_watched_where_it_matters(
    watcher: Watcher, heard: Heard, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thinner watch hears the inbox, the references, new class folders, its probe, and an inbox made anew."""
    monkeypatch.setattr("sortd.watch.inotify.places_of_dataset", lambda root: places_of_dataset(root, max_folders=1))
    watcher.watch_dataset(dataset)
    assert hears(heard, dataset / "Images", "a.jpg")
    assert hears(heard, dataset / "Clases" / "hex", "b.jpg")
    (dataset / "Dataset" / "pozidriv").mkdir()
    assert heard.of(dataset / "Dataset" / "pozidriv")
    watcher.health(0.0)
    assert heard.until(lambda _: observers(watcher)[0]._answered.is_set())
    shutil.rmtree(dataset / "Images")
    watcher.health(2.0)
    (dataset / "Images").mkdir()
    watcher.health(4.0)
    assert hears(heard, dataset / "Images", "c.jpg")


# ---------------------------------------------------------------- in a process, or a namespace, of its own

PROGRAM = """
import json, os, queue, shutil, subprocess, sys, time
from sortd.watch.watcher import EventsDropped, Watcher
root = sys.argv[1]
inbox = queue.SimpleQueue()
watcher = Watcher(inbox.put)
def say(**facts):
    print(json.dumps(facts), flush=True)
losses = []
def listen(until, seconds=300.0):
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        try:
            said = inbox.get(timeout=left)
        except queue.Empty:
            return False
        if isinstance(said, EventsDropped):
            losses.append([said.reason, said.why])
        if until(said):
            return True
    return False
def hears(path):
    open(path, "w").close()
    return listen(lambda said: getattr(said, "path", None) == path)
def told():
    listen(lambda said: False, 0.1)
    return losses
"""


def run_in_namespace(script: str, *arguments: str, before: str = ":") -> subprocess.CompletedProcess[str]:
    """Run PROGRAM and a script as root of a user and mount namespace of its own; skip where that is not allowed."""
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("user namespaces are not allowed here")
    program = PROGRAM + textwrap.dedent(script)
    environment = {**os.environ, "PYTHONPATH": os.fspath(Path(__file__).parents[2])}
    shell = [*unshare, "sh", "-c", f'{before} && exec "$@"', "sh", sys.executable, "-c", program, *arguments]
    done = subprocess.run(shell, capture_output=True, text=True, timeout=PATIENCE, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture
def in_memory(tmp_path: Path) -> Iterator[Path]:
    """A dataset on a file system in memory, where there is one: making many files is then quick."""
    memory = "/dev/shm"  # noqa: S108 - the folder below it is made by tempfile
    with tempfile.TemporaryDirectory(dir=memory if os.path.isdir(memory) else tmp_path) as folder:
        yield make(Path(folder) / "Tornillos")


def test_watcher_overflow_is_posted_and_a_scan_finds_what_was_lost(in_memory: Path) -> None:
    """A stopped process misses what overflows the kernel's queue, even where all logs are off; then it is told."""
    dataset = in_memory
    script = """
    import logging
    logging.basicConfig(level=logging.CRITICAL)
    watcher.watch_dataset(root)
    say(ready=True)
    sys.stdin.readline()
    listen(lambda said: isinstance(said, EventsDropped))
    say(losses=losses)
    watcher.close()
    """
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM + textwrap.dedent(script), os.fspath(dataset)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.fspath(Path(__file__).parents[2])},
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert "ready" in process.stdout.readline()
        process.send_signal(signal.SIGSTOP)
        for number in range(20_000):
            os.close(os.open(dataset / "Images" / f"{number}.jpg", os.O_CREAT))
        process.send_signal(signal.SIGCONT)
        process.stdin.write("\n")
        process.stdin.flush()
        told = process.stdout.readline()
    assert '"overflowed"' in told
    assert sum(1 for _ in scan(os.fspath(dataset / "Images"), report=unexpected)) == 20_000


def test_health_root_mounted_again_or_over_is_watched_again(tmp_path: Path) -> None:
    """Mounts raise no event at all: each change is noticed at the next check, and what is there now is heard."""
    script = """
    os.makedirs(root)
    def mount():
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", root], check=True)
        for name in ("Images", "Clases", ".sortd"):
            os.makedirs(os.path.join(root, name))
    mount()
    watcher.watch_dataset(root)
    say(step="mounted", hears=hears(root + "/Images/a.jpg"))
    subprocess.run(["umount", "--lazy", root], check=True)
    os.makedirs(root + "/Images")
    watcher.health(0.0)
    say(step="unmounted", hears=hears(root + "/Images/b.jpg"), losses=told())
    mount()
    watcher.health(2.0)
    say(step="mounted over", hears=hears(root + "/Images/c.jpg"))
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", root + "/Images"], check=True)
    watcher.health(10.0)
    say(step="inbox mounted over", hears=hears(root + "/Images/d.jpg"))
    watcher.close()
    """
    done = run_in_namespace(script, os.fspath(tmp_path / "Tornillos"))
    lines = done.stdout.splitlines()
    assert len(lines) == 4, done.stdout
    assert all('"hears": true' in line for line in lines), done.stdout


def test_health_folders_beyond_the_limit_of_watches_name_the_setting(dataset: Path) -> None:
    """Watchdog leaves them unwatched without a word; the root is polled until the limit is raised, then healed."""
    for number in range(20):
        (dataset / "Images" / f"d{number}").mkdir()
    script = """
    watcher.watch_dataset(root)
    watcher.health(0.0)
    now = 2.0
    watcher.health(now)
    now += 2.0
    say(polled=watcher.polled() == (root,), losses=told())
    with open("/proc/sys/user/max_inotify_watches", "w") as limit:
        limit.write("1000")
    watcher.health(now + 300.0)
    now += 302.0
    watcher.health(now)
    now += 2.0
    say(polled=watcher.polled(), hears=all(hears(f"{root}/Images/d{number}/x.jpg") for number in (0, 7, 13)))
    watcher.close()
    """
    done = run_in_namespace(script, os.fspath(dataset), before="echo 15 > /proc/sys/user/max_inotify_watches")
    limited, raised = done.stdout.splitlines()
    assert '"polled": true' in limited
    assert "degraded" in limited
    assert "sysctl -w fs.inotify.max_user_watches=" in limited
    assert "space" not in limited
    assert '"polled": [], "hears": true' in raised


def test_watcher_root_without_a_free_watch_is_polled_and_names_the_setting(dataset: Path) -> None:
    """No watch and no instance left: each says which limit it was; neither is taken for success."""
    script = """
    watcher.watch_dataset(root)
    say(modes=[status.mode for status in watcher.status()], losses=told(), fds=len(os.listdir("/proc/self/fd")))
    before = len(os.listdir("/proc/self/fd"))
    for turn in range(30):
        watcher.health(turn * 100.0)
    say(leaked=len(os.listdir("/proc/self/fd")) - before)
    watcher.close()
    """
    for limit in ("watches", "instances"):
        done = run_in_namespace(script, os.fspath(dataset), before=f"echo 0 > /proc/sys/user/max_inotify_{limit}")
        first, second = done.stdout.splitlines()
        assert '"polling"' in first
        assert f"sysctl -w fs.inotify.max_user_{limit}=" in first
        assert '"leaked": 0' in second


def test_watcher_without_spare_descriptors_leaks_none(dataset: Path) -> None:
    """At the limit of open files a start fails whole: the observer's constructor alone would lose one at each try."""
    script = """
    import resource
    spare = [os.open("/", os.O_RDONLY) for _ in range(20)]
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(spare) + 3, 4096))
    watcher.watch_dataset(root)
    for turn in range(30):
        watcher.health(turn * 100.0)
    for descriptor in spare:
        os.close(descriptor)
    say(leaked=len(os.listdir("/proc/self/fd")) + 20 - used, losses=told())
    watcher.health(10_000.0)
    say(hears=hears(root + "/Images/a.jpg"))
    watcher.close()
    """
    program = [sys.executable, "-c", PROGRAM + textwrap.dedent(script), os.fspath(dataset)]
    environment = {**os.environ, "PYTHONPATH": os.fspath(Path(__file__).parents[2])}
    done = subprocess.run(program, capture_output=True, text=True, timeout=PATIENCE, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert '"leaked": 0' in first
    assert "LimitNOFILE" in first
    assert '"hears": true' in second


def test_document_names_only_tests_that_exist() -> None:
    """The table of docs/watching.md is a list of promises: each has its test."""
    document = (Path(__file__).parents[2] / "docs" / "watching.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", document))
    assert len(named) >= 20
    assert named <= set(globals())


def test_observer_event_that_comes_while_watching_stops_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    """Watchdog tells of it at level error; whatever else it tells of is kept."""
    logger = logging.getLogger("watchdog.observers.inotify")
    logger.error("InotifyEmitter.queue_events() called when the thread is inactive")
    logger.error("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]
