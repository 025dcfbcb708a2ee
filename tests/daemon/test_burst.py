"""A burst: a second process drops hundreds of files into four datasets in every way at once; each ends in one place."""

import hashlib
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.daemon_process import COLOURS, DaemonProcess, make_dataset, picture, running

Write = Callable[..., Path]

FILES = 80
"""Dropped into each of the four datasets."""

DROPPER = '''
"""Drop the files of argv[1] into the inboxes below argv[2], in every way that files come."""
import os, shutil, sys, threading, time
from pathlib import Path

def slowly(source, inbox):
    content = source.read_bytes()
    with open(inbox / source.name, "wb", buffering=0) as file:
        for start in range(0, len(content), 1 + len(content) // 4):
            file.write(content[start : start + 1 + len(content) // 4])
            time.sleep(0.15)

def by_rename(source, inbox):
    temporary = inbox / f".{source.name}.Ab3xYz"
    shutil.copyfile(source, temporary)
    temporary.rename(inbox / source.name)

def as_download(source, inbox):
    temporary = inbox / f"{source.name}.crdownload"
    shutil.copyfile(source, temporary)
    time.sleep(0.02)
    temporary.rename(inbox / source.name)

def by_move(source, inbox):
    other = source.with_name(f"moved {source.name}")
    shutil.copyfile(source, other)
    other.rename(inbox / source.name)

def by_link(source, inbox):
    os.link(source, inbox / source.name)

def plainly(source, inbox):
    shutil.copyfile(source, inbox / source.name)

def laid_out(source, inbox):
    content = source.read_bytes()
    with open(inbox / source.name, "wb", buffering=0) as file:
        os.posix_fallocate(file.fileno(), 0, len(content))
        time.sleep(0.1)
        file.write(content)

WAYS = [slowly, by_rename, as_download, by_move, by_link, plainly, laid_out]

def drop(folder, inbox):
    files = sorted(folder.iterdir())
    threads = []
    for number, source in enumerate(files[: len(files) // 2]):
        way = WAYS[number % len(WAYS)]
        if way in (slowly, laid_out):
            threads.append(threading.Thread(target=way, args=(source, inbox)))
            threads[-1].start()
        else:
            way(source, inbox)
    rest = files[len(files) // 2 :]
    copied, moved = rest[: len(rest) // 2], rest[len(rest) // 2 :]
    album = folder.with_name(f"{folder.name} album")
    (album / "deep" / "er").mkdir(parents=True)
    for number, source in enumerate(moved):
        shutil.copyfile(source, album / ("deep/er" if number % 2 else ".") / source.name)
    album.rename(inbox / "album")
    for number, source in enumerate(copied):
        into = inbox / "copied" / str(number % 5)
        into.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, into / source.name)
    for thread in threads:
        thread.join()

droppers = [
    threading.Thread(target=drop, args=(folder, Path(sys.argv[2]) / folder.name / "Images"))
    for folder in sorted(Path(sys.argv[1]).iterdir())
]
for dropper in droppers:
    dropper.start()
for dropper in droppers:
    dropper.join()
'''


@pytest.fixture
def tiny_clip() -> str:
    """No model is loaded: the program of these tests has an encoder of its own."""
    return "packaged"


def contents(folder: Path) -> Counter[str]:
    """Count the files below a folder by the sha256 of their bytes."""
    return Counter(hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file())


def make_source(folder: Path, dataset: int) -> None:
    """Make the files for one dataset: mostly images of the classes, some equal, one in ten broken."""
    folder.mkdir(parents=True)
    for number in range(FILES):
        seed = 1000 * (dataset + 1) + number - (number % 8 == 7)  # each eighth has the content of the one before it
        colour = list(COLOURS)[(number - (number % 8 == 7)) % 3]
        path = folder / f"{number:03}.png"
        picture(colour, seed, (120, 90)).save(path)
        if number % 10 == 5:
            path.write_bytes(path.read_bytes()[:1500])


def outcomes(daemon: DaemonProcess) -> list[str]:
    """Return the paths that canonical lines were written about."""
    names = {"image.filed", "image.sent_to_review", "image.rejected", "move.recovered"}
    return [line["path"] for line in daemon.lines if line["event"] in names]


@pytest.mark.parametrize("kill", [False, True], ids=["undisturbed", "killed in the midst of it"])
def test_daemon_file_of_a_burst_ends_in_exactly_one_place(tmp_path: Path, write_config: Write, *, kill: bool) -> None:
    """Written slowly, renamed, linked, moved, as folders, all at once: nothing lost, doubled, changed or told twice."""
    names = ["Anillos", "Bujes", "Clavos", "Discos"]
    for number, name in enumerate(names):
        make_dataset(tmp_path / "Data", name)
        make_source(tmp_path / "source" / name, number)
    before = {name: contents(tmp_path / "source" / name) for name in names}
    config = write_config(settle_seconds=0.5)
    with running(config) as daemon:
        dropper = subprocess.Popen([sys.executable, "-c", DROPPER, str(tmp_path / "source"), str(tmp_path / "Data")])
        if kill:
            daemon.wait_until(lambda: len(outcomes(daemon)) >= 30, "the burst is under way")
            daemon.send(signal.SIGKILL)
        assert dropper.wait() == 0
        if not kill:
            daemon.wait_until(lambda: len(outcomes(daemon)) >= FILES * len(names), "an outcome for each")
            assert daemon.stop() == 0
            assert not daemon.events("move.failed", failure="destination")
            assert len(outcomes(daemon)) == len(set(outcomes(daemon))) == FILES * len(names)
            rejected = daemon.events("image.rejected")
            assert len(rejected) == FILES * len(names) // 10
    if kill:
        with DaemonProcess(config, "once") as again:
            assert again.wait() == 0
            told = outcomes(daemon) + outcomes(again)
            assert len(told) == len(set(told))  # one line may have been lost with the process, none is written twice
    for name in names:
        dataset = tmp_path / "Data" / name
        assert contents(dataset / "Images") == Counter()
        for reason in (dataset / "Rejected").glob("*.reason.json"):
            reason.unlink()
        after = contents(dataset / "Dataset") + contents(dataset / "Review") + contents(dataset / "Rejected")
        assert after == before[name]
        assert {path.parent.name for path in (dataset / "Dataset").rglob("*.png")} == set(COLOURS)
