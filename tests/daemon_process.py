"""A real sortd in a process of its own, on a temporary tree: started, listened to, signalled and waited for."""

import atexit
import ctypes
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image

from sortd.store.history import History
from sortd.store.records import Selection
from tests.launcher import PRELOADED, LaunchedProcess, Launcher

PATIENCE_SECONDS = 300.0
"""How long a test waits for what must happen; machines under load are slow, and a failure is rare."""


class DaemonProcess:
    """``sortd run`` (or ``once``) with JSON logs on stderr, which are collected as they come.

    ``program`` is ``tests.fast_sortd``, which is sortd but for its encoder: no model to load, so a test starts in a
    second; ``sortd`` itself loads the model that the configuration names.
    """

    def __init__(
        self,
        config: Path,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        program: str = "tests.fast_sortd",
        under: Sequence[str] = (),
        keeps_files: bool = True,
    ) -> None:
        """Start it.

        Args:
            config: its configuration, in the temporary folder that holds its state and its data.
            arguments: the command; ``run`` by default.
            environment: variables beside the ones of this process.
            program: the module that is run.
            under: a program, with its arguments, that becomes sortd: setpriv(1), say.
            keeps_files: whether each file that sortd moved still stands when the block ends; not so where the test
                removes or replaces some.
        """
        self._folder, self._keeps_files, self._was_killed = config.parent, keeps_files, False
        self.lines: list[dict[str, Any]] = []
        self.noise: list[str] = []
        self._heard = threading.Condition()
        self.process = _start(program, [*(arguments or ("run",)), "--config", str(config)], environment or {}, under)
        self._ears = threading.Thread(target=self._listen, name="ears")
        self._ears.start()

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._heard:
                try:
                    self.lines.append(json.loads(line))
                except ValueError:
                    self.noise.append(line)
                self._heard.notify_all()

    def events(self, name: str, **fields: object) -> list[dict[str, Any]]:
        """Return the lines of one event that carry these fields."""
        wanted = {"event": name, **fields}
        return [line for line in list(self.lines) if wanted.items() <= line.items()]

    def wait_for(
        self, name: str, *, count: int = 1, seconds: float = PATIENCE_SECONDS, **fields: object
    ) -> dict[str, Any]:
        """Wait until an event was logged so many times, and return the last of them."""
        self.wait_until(lambda: len(self.events(name, **fields)) >= count, f"{count} x {name} {fields}", seconds)
        return self.events(name, **fields)[-1]

    def wait_until(self, is_true: Callable[[], bool], what: str, seconds: float = PATIENCE_SECONDS) -> None:
        """Wait until something is true of the lines or of the tree."""
        until = time.monotonic() + seconds
        with self._heard:
            while not is_true():
                left = until - time.monotonic()
                if left <= 0 or (self.process.poll() is not None and not self._ears.is_alive()):
                    raise AssertionError(f"{what} did not come; exit {self.process.poll()}; log:\n{self.tail()}")
                self._heard.wait(min(left, 0.02))

    def wait_for_scans(self, count: int = 1) -> None:
        """Wait until so many scans have begun and ended from now on; sortd must log at level debug."""
        ended = len(self.events("scan.finished"))
        self.wait_for("scan.finished", count=ended + count + 1)  # the first may have begun before

    def tail(self, lines: int = 40) -> str:
        """Return the end of what was logged."""
        return "\n".join([*(json.dumps(line) for line in self.lines[-lines:]), *self.noise[-lines:]])

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        self._was_killed |= number == signal.SIGKILL
        self.process.send_signal(number)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and return the exit code."""
        if self.process.poll() is None:
            self.send(number)
        return self.wait()

    def wait(self, seconds: float = PATIENCE_SECONDS) -> int:
        """Wait for the end and return the exit code."""
        code = self.process.wait(seconds)
        self._ears.join(seconds)
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        return code

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Stop it by SIGTERM, and check how it ended; after a failed test, kill it."""
        if kind is not None:
            self.process.kill()
            self.wait()
            return
        if self.process.poll() is None and not self._was_killed:
            code = self.stop()
            assert code == 0, f"exit {code}; log:\n{self.tail()}"
        self.wait()
        if not self._was_killed:
            is_refused = bool(self.events("move.failed"))  # the move stays open until its folder serves
            check_journals(self._folder, keeps_files=self._keeps_files, may_be_open=is_refused)


def check_journals(folder: Path, *, keeps_files: bool, may_be_open: bool) -> None:
    """Check that no move below a temporary folder is open and, with ``keeps_files``, that each moved file is there.

    A file is there if its inode stands anywhere below the folder, or if a later move took it on.
    """
    inodes = {path.lstat().st_ino for path in folder.rglob("*")} if keeps_files else set()
    for journal in folder.glob("state/*/journal.sqlite"):
        with History.open(journal) as history:
            assert may_be_open or not history.unfinished()
            records = history.moves(Selection(limit=None)) if keeps_files else []
        sources = {f"{record.move.source}/{record.move.image.name}" for record in records}
        lost = [
            record.destination_path
            for record in records
            if record.move.image.moved_stamp is not None
            and record.move.image.moved_stamp.inode not in inodes
            and record.destination_path not in sources
        ]
        assert not lost, f"{journal}: {lost}"


@functools.cache
def launcher() -> Launcher:
    """Return the launcher of this process, which ends with it."""
    started = Launcher()
    atexit.register(started.close)
    return started


def _start(
    program: str, arguments: Sequence[str], changes: Mapping[str, str], under: Sequence[str]
) -> LaunchedProcess | subprocess.Popen[str]:
    environment = {**os.environ, "SORTD_LOG__FORMAT": "json", "OMP_NUM_THREADS": "1", **changes}
    environment.setdefault("SORTD_DECODING__WORKERS", "1")  # each takes as long to start as all else that is forked
    if program in PRELOADED and not under and all(name.startswith(("SORTD_", "BREAK_")) for name in changes):
        return launcher().start(program, arguments, environment)
    return subprocess.Popen(
        [*under, sys.executable, "-m", program, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="surrogateescape",
        cwd=Path(__file__).parents[1],
        env=environment,
    )


@contextmanager
def running(
    config: Path, *, program: str = "tests.fast_sortd", keeps_files: bool = True, **environment: str
) -> Iterator[DaemonProcess]:
    """Start ``sortd run``, wait until it is ready, and end it by a clean stop; see ``DaemonProcess``."""
    with DaemonProcess(config, environment=environment, program=program, keeps_files=keeps_files) as daemon:
        daemon.wait_for("daemon.ready")
        yield daemon


def exchange(first: Path, second: Path) -> None:
    """Swap what stands under two names, in one step: at no moment is either name free."""
    libc = ctypes.CDLL(None, use_errno=True)
    at_cwd, rename_exchange = -100, 2  # from fcntl.h and linux/fs.h
    if libc.renameat2(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), rename_exchange) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), os.fspath(first), None, os.fspath(second))


COLOURS = {"red": (200, 40, 40), "green": (40, 190, 60), "blue": (50, 60, 210)}


def picture(colour: str, seed: int, size: tuple[int, int] = (72, 64), *, patches: float = 0.0) -> Image.Image:
    """Return a noisy picture of one colour: what even a model of random weights tells apart.

    ``patches`` is how much the brightness of sixteen patches differs: pictures without them are near duplicates.
    """
    dice = np.random.default_rng(seed)
    noise = dice.normal(0, 18, (size[1], size[0], 3))
    pattern = np.asarray(
        Image.fromarray(dice.normal(0, patches, (4, 4)).astype(np.float32)).resize(size, Image.Resampling.NEAREST)
    )
    pixels = np.asarray(COLOURS[colour]) + noise + pattern[:, :, None]
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def make_dataset(root: Path, name: str = "Colours", references: int = 4) -> Path:
    """Make a dataset of three colours below ``root`` and return its folder."""
    dataset = root / name
    for index, colour in enumerate(COLOURS):
        folder = dataset / "Clases" / colour
        folder.mkdir(parents=True)
        for number in range(references):
            picture(colour, 100 * index + number).save(folder / f"{number}.png")
    (dataset / "Images").mkdir(exist_ok=True)  # a running sortd may have been faster
    return dataset


def teach(dataset: Path, references: int = 24) -> None:
    """Give each class so many varied references that a calibration tells strangers from what is known."""
    for index, colour in enumerate(COLOURS):
        for number in range(references):
            right = picture(colour, 1000 + 100 * index + number, patches=40)
            right.save(dataset / "Clases" / colour / f"varied{number}.png")


def draw_strangers(folder: Path, count: int) -> None:
    """Put images, all different, into a folder that belong to none of the classes."""
    for number in range(count):
        Image.new("RGB", (24, 24), (230, 220, number % 256)).save(folder / f"stranger{number:03}.png", compress_level=1)


def tree(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
