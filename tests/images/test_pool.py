"""The decoder pool: every file gets its answer, and no file affects more than its own process."""

import contextlib
import errno
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sortd.errors import StartupError
from sortd.events import Fit, ImageRefused, Preprocessing, Refusal, Stamp
from sortd.images import decoder_process
from sortd.images.decode import DecodeLimits, decode_file
from sortd.images.pool import DecodedImage, DecoderPool, _refusal_of
from tests.bombs import CORPUS, gif, one_bit_png, png, png_with_text, saved, write_hostile_files
from tests.daemon_process import PATIENCE_SECONDS

SMALL = Preprocessing(64, 64, 64)
REPLY = repr(decoder_process.REPLY.format)
CEILING_KB = 300_000
"""What a decoding process may take beyond an idle one."""


@pytest.fixture(scope="module")
def pool() -> Iterator[DecoderPool]:
    """Two processes with the usual limits, for tests that do not wear them out."""
    with DecoderPool(2, SMALL, DecodeLimits(), timeout_seconds=30) as pool:
        yield pool


def stamp(path: Path) -> Stamp:
    """Stamp what stands under a name, be it a link."""
    status = path.lstat()
    return Stamp(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def stamped(*paths: Path) -> list[tuple[str, Stamp]]:
    """Name files with their stamps, as the watcher does."""
    return [(os.fspath(path), stamp(path)) for path in paths]


def photo(path: Path, seed: int = 0, size: tuple[int, int] = (120, 90)) -> Path:
    """Write a picture of coloured noise."""
    values = np.random.default_rng(seed).integers(0, 256, (size[1] // 10, size[0] // 10, 3), dtype=np.uint8)
    Image.fromarray(values).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def only(pool: DecoderPool, path: Path, at: Stamp | None = None) -> DecodedImage | ImageRefused:
    """Decode one file."""
    answers = list(pool.decode_all([(os.fspath(path), at or stamp(path))]))
    assert len(answers) == 1
    return answers[0]


def refusal_of(answer: DecodedImage | ImageRefused) -> Refusal:
    """Return why a file was refused; it must have been."""
    assert isinstance(answer, ImageRefused)
    assert answer.message
    return answer.refusal


def open_files() -> int:
    """Count the descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


@contextlib.contextmanager
def no_free_descriptors() -> Iterator[None]:
    """Let this process open nothing more."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def memory_kb(process_id: int, what: str) -> int:
    """Read a figure of a process's memory: ``VmHWM`` is the most it ever had."""
    for line in Path(f"/proc/{process_id}/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1])
    raise AssertionError(f"no {what}")


class TestAnswers:
    """One answer for each image."""

    def test_pool_returns_pixels_and_hash_of_the_file(self, pool: DecoderPool, tmp_path: Path) -> None:
        """The pixels are those of ``decode_file``, and the hash is that of the file."""
        paths = [photo(tmp_path / f"{number}.png", number) for number in range(40)]
        answers = {answer.path: answer for answer in pool.decode_all(stamped(*paths))}
        assert len(answers) == len(paths)
        for path in paths:
            answer = answers[os.fspath(path)]
            assert isinstance(answer, DecodedImage)
            assert np.array_equal(answer.pixels, decode_file(os.fspath(path), SMALL, DecodeLimits()))
            assert answer.content == sha256(path.read_bytes()).hexdigest()
            assert answer.stamp == stamp(path)
            assert answer.decode_seconds > 0
            assert answer.pixels.flags["C_CONTIGUOUS"]

    def test_pool_whole_images_have_their_own_sizes(self, tmp_path: Path) -> None:
        """One after another in the same memory, each as ``decode_file`` gives it."""
        whole = Preprocessing(64, 64, 64, fit=Fit.WHOLE)
        sizes = [(200, 100), (100, 200), (300, 300), (30, 20), (900, 10)]
        paths = [photo(tmp_path / f"{number}.png", number, size) for number, size in enumerate(sizes)]
        with DecoderPool(1, whole, DecodeLimits()) as pool:
            for answer in pool.decode_all(stamped(*paths)):
                assert isinstance(answer, DecodedImage)
                assert np.array_equal(answer.pixels, decode_file(answer.path, whole, DecodeLimits()))

    def test_pool_answers_keep_their_pixels(self, pool: DecoderPool, tmp_path: Path) -> None:
        """Pixels stay valid when the shared memory is used again."""
        paths = [photo(tmp_path / f"{number}.png", number) for number in range(60)]
        answers = [answer for answer in pool.decode_all(stamped(*paths)) if isinstance(answer, DecodedImage)]
        assert len({answer.pixels.tobytes() for answer in answers}) == len(paths)

    def test_pool_empty_batch_has_no_answers(self, pool: DecoderPool) -> None:
        """An empty batch ends at once."""
        assert list(pool.decode_all([])) == []

    def test_pool_busy_caller_finds_the_next_images_decoded(self, pool: DecoderPool, tmp_path: Path) -> None:
        """The processes go on while the caller handles an answer."""
        paths = [photo(tmp_path / f"{number}.jpg", number, (900, 700)) for number in range(16)]
        answers = pool.decode_all(stamped(*paths))
        next(answers)
        taken_in = len(answers.gi_frame.f_locals["batch"].answers)  # type: ignore[attr-defined]  # it is a generator
        sockets = [handle.descriptors[0] for handle in pool._decoders]
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and sum(map(waiting, sockets)) + taken_in < 15:
            time.sleep(0.01)
        assert sum(map(waiting, sockets)) + taken_in == 15
        assert len(list(answers)) == 15

    def test_pool_caller_stops_early_files_are_closed(self, pool: DecoderPool, tmp_path: Path) -> None:
        """The rest of its batch is dropped, and later batches get their answers."""
        paths = [photo(tmp_path / f"{number}.png", number) for number in range(80)]
        before = open_files()
        answers = pool.decode_all(stamped(*paths[:50]))
        next(answers)
        assert open_files() > before
        answers.close()  # type: ignore[attr-defined]  # it is a generator
        assert open_files() == before
        later = [answer.path for answer in pool.decode_all(stamped(*paths[50:]))]
        assert sorted(later) == sorted(map(os.fspath, paths[50:]))
        assert open_files() == before

    def test_pool_two_batches_in_turns_get_their_own_answers(self, pool: DecoderPool, tmp_path: Path) -> None:
        """A second batch may begin before the first has ended."""
        first = stamped(*[photo(tmp_path / f"a{number}.png", number) for number in range(30)])
        second = stamped(*[photo(tmp_path / f"b{number}.png", number) for number in range(30)])
        got: tuple[list[str], list[str]] = ([], [])
        for one, other in zip(pool.decode_all(first), pool.decode_all(second), strict=True):
            got[0].append(one.path)
            got[1].append(other.path)
        assert [sorted(paths) for paths in got] == [[path for path, _ in sorted(images)] for images in (first, second)]


def waiting(descriptor: int) -> int:
    """Count the packets that wait in a socket, leaving them there."""
    with socket.socket(fileno=os.dup(descriptor)) as looked_into:
        looked_into.setsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF, 0)
        count = 0
        with contextlib.suppress(BlockingIOError):
            while looked_into.recv(4096, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                count += 1
        looked_into.setsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF, -1)
        return count


_SO_PEEK_OFF = 42


class TestRefusals:
    """Refusals of files that are not images, or another version."""

    def test_pool_other_version_is_refused(self, pool: DecoderPool, tmp_path: Path) -> None:
        """A changed file is refused as changed, a missing one as vanished."""
        path = photo(tmp_path / "a.png")
        old = stamp(path)
        photo(path, 1, (80, 80))
        assert refusal_of(only(pool, path, old)) is Refusal.CHANGED
        path.unlink()
        assert refusal_of(only(pool, path, old)) is Refusal.VANISHED
        assert refusal_of(only(pool, path / "below", old)) is Refusal.VANISHED

    def test_pool_file_written_to_during_decoding_has_changed(self, tmp_path: Path) -> None:
        """Its pixels belong to no version."""
        path = photo(tmp_path / "a.png")
        with DecoderPool(1, SMALL, DecodeLimits()) as pool:
            (process_id,) = warmed(pool, tmp_path)

            def write_and_go_on() -> None:
                with path.open("ab") as file:
                    file.write(b"more")
                os.kill(process_id, signal.SIGCONT)

            with while_stopped(process_id, write_and_go_on):
                assert refusal_of(only(pool, path)) is Refusal.CHANGED

    def test_pool_file_deleted_during_decoding_has_vanished(self, tmp_path: Path) -> None:
        """The deletion is reported, not the pixels."""
        path = photo(tmp_path / "a.png")
        with DecoderPool(1, SMALL, DecodeLimits()) as pool:
            (process_id,) = warmed(pool, tmp_path)

            def delete_and_go_on() -> None:
                path.unlink()
                os.kill(process_id, signal.SIGCONT)

            with while_stopped(process_id, delete_and_go_on):
                assert refusal_of(only(pool, path, stamp(path))) is Refusal.VANISHED

    def test_pool_special_files_are_not_images(self, pool: DecoderPool, tmp_path: Path) -> None:
        """Text, empty files, folders, links, sockets, pipes and devices are refused, whatever their names."""
        text, empty, empty_text = tmp_path / "a.txt", tmp_path / "b.jpg", tmp_path / "c.txt"
        text.write_text("hello")
        empty.touch()
        empty_text.touch()
        folder, link, pipe = tmp_path / "d.jpg", tmp_path / "e.jpg", tmp_path / "f.jpg"
        folder.mkdir()
        link.symlink_to(photo(tmp_path / "g.png"))
        os.mkfifo(pipe)
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(os.fspath(tmp_path / "h.jpg"))
            assert refusal_of(only(pool, tmp_path / "h.jpg")) is Refusal.NOT_AN_IMAGE
        assert [refusal_of(only(pool, path)) for path in (text, empty, empty_text)] == [
            Refusal.NOT_AN_IMAGE,
            Refusal.EMPTY,
            Refusal.NOT_AN_IMAGE,
        ]
        for special in (folder, link, pipe, Path("/dev/zero"), Path("/dev/null")):
            assert refusal_of(only(pool, special)) is Refusal.NOT_AN_IMAGE

    def test_pool_broken_links_are_not_images(self, pool: DecoderPool, tmp_path: Path) -> None:
        """Links are not followed."""
        dangling, circle = tmp_path / "a.jpg", tmp_path / "b.jpg"
        dangling.symlink_to("nowhere")
        circle.symlink_to(circle)
        assert {refusal_of(only(pool, path)) for path in (dangling, circle)} == {Refusal.NOT_AN_IMAGE}

    @pytest.mark.parametrize(
        ("number", "refusal", "mend"),
        [
            (errno.EACCES, Refusal.DENIED, "chmod"),
            (errno.EPERM, Refusal.DENIED, "chmod"),
            (errno.EIO, Refusal.DENIED, "disk"),
            (errno.ESTALE, Refusal.DENIED, "disk"),
            (errno.ENOENT, Refusal.VANISHED, "does not exist"),
            (errno.ELOOP, Refusal.NOT_AN_IMAGE, "link"),
            (errno.ENXIO, Refusal.NOT_AN_IMAGE, "socket"),
        ],
    )
    def test_open_error_has_its_refusal_and_remedy(self, number: int, refusal: Refusal, mend: str) -> None:
        """A file that cannot be opened may be intact, so it is not refused as broken."""
        told, message = _refusal_of(OSError(number, os.strerror(number)))
        assert told is refusal
        assert mend in message

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_pool_unreadable_file_is_denied_with_a_remedy(self, pool: DecoderPool, tmp_path: Path) -> None:
        """The message says how to grant the permission."""
        path = photo(tmp_path / "a.png")
        path.chmod(0)
        answer = only(pool, path)
        assert refusal_of(answer) is Refusal.DENIED
        assert "chmod" in getattr(answer, "message", "")

    def test_pool_broken_and_too_large_images_are_refused(self, pool: DecoderPool, tmp_path: Path) -> None:
        """Both are refused, with different reasons."""
        good = photo(tmp_path / "good.png").read_bytes()
        (tmp_path / "cut.png").write_bytes(good[: len(good) // 2])
        (tmp_path / "fake.jpg").write_text("I am a text")
        (tmp_path / "bomb.png").write_bytes(one_bit_png(14_000, 12_000))
        assert refusal_of(only(pool, tmp_path / "cut.png")) is Refusal.UNREADABLE
        assert refusal_of(only(pool, tmp_path / "fake.jpg")) is Refusal.UNREADABLE
        assert refusal_of(only(pool, tmp_path / "bomb.png")) is Refusal.TOO_LARGE
        with DecoderPool(1, SMALL, DecodeLimits(max_bytes=1000)) as strict:
            (tmp_path / "many.png").write_bytes(good + bytes(2000))
            assert refusal_of(only(strict, tmp_path / "many.png")) is Refusal.TOO_LARGE

    def test_pool_names_of_any_bytes_decode(self, pool: DecoderPool, tmp_path: Path) -> None:
        """Names may be no UTF-8, of maximum length, or contain a newline."""
        names = [b"caf\xe9.png", "\N{GRINNING FACE}".encode() * 62 + b".png", b"two\nlines.png", b"-rf *.png"]
        paths = [tmp_path / os.fsdecode(name) for name in names]
        assert {type(only(pool, photo(path))) for path in paths} == {DecodedImage}

    def test_pool_out_of_descriptors_raises(self, tmp_path: Path) -> None:
        """The error is raised, and no image is refused."""
        path = photo(tmp_path / "a.png")
        code = (
            "import os, resource, sys\n"
            "from sortd.images.pool import DecoderPool\n"
            "from sortd.files import stamp_of\n"
            "from sortd.images.decode import DecodeLimits\n"
            "from sortd.events import Preprocessing\n"
            "path = sys.argv[1]\n"
            "pool = DecoderPool(1, Preprocessing(8, 8, 8), DecodeLimits())\n"
            "stamp = stamp_of(os.stat(path))\n"
            "spare = os.open(path, os.O_RDONLY); os.close(spare)\n"
            "resource.setrlimit(resource.RLIMIT_NOFILE, (spare, 4096))\n"
            "try:\n    print(list(pool.decode_all([(path, stamp)])))\n"
            "except OSError as error:\n    print(error.errno)\n"
        )
        run = subprocess.run(
            [sys.executable, "-c", code, os.fspath(path)],
            capture_output=True,
            text=True,
            check=True,
            timeout=PATIENCE_SECONDS,
        )
        assert run.stdout.strip() == "24"


class TestProcesses:
    """What decodes is expendable; the daemon is not."""

    def test_pool_killed_process_loses_no_image(self, tmp_path: Path) -> None:
        """As by the out-of-memory killer; another process decodes its images."""
        paths = [photo(tmp_path / f"{number}.png", number) for number in range(20)]
        with DecoderPool(1, SMALL, DecodeLimits()) as pool:
            (process_id,) = warmed(pool, tmp_path)
            with while_stopped(process_id, lambda: os.kill(process_id, signal.SIGKILL)):
                answers = list(pool.decode_all(stamped(*paths)))
            assert {type(answer) for answer in answers} == {DecodedImage}
            assert len(answers) == len(paths)
            assert pool.process_ids != (process_id,)

    def test_pool_process_killed_while_idle_is_replaced(self, tmp_path: Path) -> None:
        """No image is blamed."""
        with DecoderPool(1, SMALL, DecodeLimits(), kills=1) as pool:
            (process_id,) = warmed(pool, tmp_path)
            os.kill(process_id, signal.SIGKILL)
            os.waitid(os.P_PID, process_id, os.WEXITED | os.WNOWAIT)
            assert isinstance(only(pool, photo(tmp_path / "a.png")), DecodedImage)

    def test_pool_image_that_kills_its_process_is_poison_until_it_changes(self, tmp_path: Path) -> None:
        """Images queued behind it are decoded."""
        path, behind = photo(tmp_path / "a.png"), photo(tmp_path / "b.png")
        with DecoderPool(1, SMALL, DecodeLimits(), kills=1) as pool:
            (process_id,) = warmed(pool, tmp_path)
            with while_stopped(process_id, lambda: os.kill(process_id, signal.SIGSEGV), also=signal.SIGCONT):
                answers = {answer.path: answer for answer in pool.decode_all(stamped(path, behind))}
            assert refusal_of(answers[os.fspath(path)]) is Refusal.POISON
            assert "SIGSEGV" in getattr(answers[os.fspath(path)], "message", "")
            assert isinstance(answers[os.fspath(behind)], DecodedImage)
            (second,) = pool.process_ids
            assert refusal_of(only(pool, path)) is Refusal.POISON
            assert pool.process_ids == (second,)
            os.utime(path, ns=(1, 1))
            assert isinstance(only(pool, path), DecodedImage)

    def test_pool_image_over_the_time_limit_is_poison(self, tmp_path: Path) -> None:
        """It is tried twice, and the message names the limit."""
        slow = tmp_path / "slow.png"
        slow.write_bytes(png(7000, 7000, depth=16, channels=4))
        with DecoderPool(1, SMALL, DecodeLimits(), timeout_seconds=0.1) as pool:
            answer = only(pool, slow)
            assert refusal_of(answer) is Refusal.POISON
            assert "longer than 0.1 s" in getattr(answer, "message", "")
            assert isinstance(only(pool, photo(tmp_path / "quick.png", size=(20, 20))), DecodedImage)

    def test_pool_stopped_process_is_killed(self, tmp_path: Path) -> None:
        """A process that cannot handle its own alarm is killed a little later."""
        path = photo(tmp_path / "a.png")
        with DecoderPool(1, SMALL, DecodeLimits(), timeout_seconds=0.1, kills=1) as pool:
            (process_id,) = warmed(pool, tmp_path)
            os.kill(process_id, signal.SIGSTOP)
            answer = only(pool, path)
            assert refusal_of(answer) is Refusal.POISON
            assert "longer than 0.1 s" in getattr(answer, "message", "")

    def test_decoder_process_has_limits(self, tmp_path: Path) -> None:
        """Files, core dumps, descriptors, privileges, time and memory are limited."""
        with DecoderPool(1, SMALL, DecodeLimits(max_pixels=1_000_000)) as pool:
            (process_id,) = warmed(pool, tmp_path)
            lines = Path(f"/proc/{process_id}/limits").read_text(encoding="ascii").splitlines()
            limits = {line[:26].strip(): line[26:].split()[0] for line in lines}
            assert limits["Max file size"] == "0"
            assert limits["Max core file size"] == "0"
            assert int(limits["Max open files"]) <= 64
            assert limits["Max cpu time"] != "unlimited"
            assert int(limits["Max address space"]) < 1_000_000_000
            assert "NoNewPrivs:\t1" in Path(f"/proc/{process_id}/status").read_text(encoding="ascii")

    def test_decoder_process_loads_no_torch_and_inherits_no_file(self, tmp_path: Path) -> None:
        """It starts quickly and has none of the daemon's files."""
        with (tmp_path / "journal").open("wb") as file, DecoderPool(1, SMALL, DecodeLimits()) as pool:
            os.set_inheritable(file.fileno(), True)
            (process_id,) = warmed(pool, tmp_path)
            loaded = Path(f"/proc/{process_id}/maps").read_text(encoding="utf-8")
            assert "torch" not in loaded
            held = [os.readlink(entry.path) for entry in os.scandir(f"/proc/{process_id}/fd")]
            assert len(held) == 5, held
            assert os.fspath(tmp_path / "journal") not in held

    def test_decoder_process_ignores_the_daemons_signals(self, tmp_path: Path) -> None:
        """The whole unit gets SIGTERM; the current image is decoded nevertheless."""
        with DecoderPool(1, SMALL, DecodeLimits()) as pool:
            (process_id,) = warmed(pool, tmp_path)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                os.kill(process_id, number)
            assert isinstance(only(pool, photo(tmp_path / "a.png")), DecodedImage)
            assert pool.process_ids == (process_id,)

    def test_decoder_process_ends_with_a_killed_daemon(self) -> None:
        """The socket is closed, which ends the process."""
        code = (
            "import os, signal\n"
            "from sortd.images.pool import DecoderPool\n"
            "from sortd.images.decode import DecodeLimits\n"
            "from sortd.events import Preprocessing\n"
            "pool = DecoderPool(1, Preprocessing(8, 8, 8), DecodeLimits())\n"
            "print(pool.process_ids[0], flush=True)\n"
            "os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS
        )
        status = Path(f"/proc/{int(run.stdout)}/stat")
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and _lives(status):
            time.sleep(0.02)
        assert not _lives(status)

    @pytest.mark.parametrize(
        "speak",
        ["s.send(b'nonsense')", f"s.send(struct.pack({REPLY}, 99, 0, b'', 0, 0, 0, 0, 0, b''))", "sys.exit(3)"],
    )
    def test_pool_processes_that_do_not_start_raise(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, speak: str
    ) -> None:
        """No image is refused; the error contains what the process printed."""
        code = (
            "import socket, struct, sys; print('no such thing', file=sys.stderr);"
            f"s = socket.socket(fileno=int(sys.argv[1])); {speak}; s.recv(9)"
        )
        monkeypatch.setattr(decoder_process, "_command", lambda control: [sys.executable, "-c", code, str(control)])
        path = photo(tmp_path / "a.png")
        with (
            DecoderPool(1, SMALL, DecodeLimits()) as pool,
            pytest.raises(StartupError, match=r"start: .*no such thing"),
        ):
            list(pool.decode_all(stamped(path)))

    @pytest.mark.parametrize(
        "lie",
        [
            "while s.recv(99): s.send(reply.pack(4000000, 0, b'', 0, 0, 64, 64, 60000, b''))",
            "while s.recv(99): s.send(reply.pack(31, 255, b'', 0, 5000000, 0, 0, 0, b''))",
            "while s.recv(99): s.send(reply.pack(31, 255, b'', 0, 2**63, 0, 0, 0, b''))",
            "while s.recv(99): s.send(reply.pack(31, 9, b'', 0, 0, 0, 0, 0, b''))",
            "while s.recv(99): s.send(reply.pack(31, 0, b'', 0, 0, 65535, 65535, 0, b''))",
            "while s.recv(99): s.send(reply.pack(31, 0, b'', 0, 0, 64, 63, 0, b''))",
        ],
        ids=["another slot", "more room for ever", "more room than there is", "no such status", "huge", "too narrow"],
    )
    def test_pool_invalid_reply_ends_the_process(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lie: str
    ) -> None:
        """A compromised process can neither make the daemon read elsewhere nor wait forever."""
        code = (
            "import socket, struct, sys; s = socket.socket(fileno=int(sys.argv[1]));"
            f"reply = struct.Struct({REPLY}); s.recv(9999);"
            "s.send(reply.pack(0xFFFFFFFF, 0, b'', 0, 0, 0, 0, 0, b''))\n" + lie
        )
        monkeypatch.setattr(decoder_process, "_command", lambda control: [sys.executable, "-c", code, str(control)])
        with DecoderPool(1, SMALL, DecodeLimits()) as pool:
            assert refusal_of(only(pool, photo(tmp_path / "a.png"))) is Refusal.POISON

    def test_decoder_process_cannot_shrink_the_shared_memory(self, tmp_path: Path) -> None:
        """Otherwise the daemon would be killed when it reads the memory."""
        with DecoderPool(1, SMALL, DecodeLimits()) as pool:
            (process_id,) = warmed(pool, tmp_path)
            held = [entry.path for entry in os.scandir(f"/proc/{process_id}/fd")]
            (entry,) = [path for path in held if "sortd-pixels" in os.readlink(path)]
            descriptor = os.open(entry, os.O_RDWR)
            try:
                with pytest.raises(PermissionError):
                    os.ftruncate(descriptor, 0)
            finally:
                os.close(descriptor)

    def test_pool_close_leaves_no_files_processes_or_threads(self, tmp_path: Path) -> None:
        """Closed twice, in the middle of a batch, or unused."""
        paths = stamped(*[photo(tmp_path / f"{number}.jpg", number, (600, 400)) for number in range(30)])
        before = open_files(), threading.active_count()
        for _ in range(3):
            pool = DecoderPool(2, SMALL, DecodeLimits())
            answers = pool.decode_all(paths)
            next(answers)
            process_ids = pool.process_ids
            pool.close()
            pool.close()
            assert not any(Path(f"/proc/{process_id}").exists() for process_id in process_ids)
            with pytest.raises(ValueError, match="closed"):
                list(answers)
            with pytest.raises(ValueError, match="closed"):
                list(pool.decode_all(paths))
            DecoderPool(1, SMALL, DecodeLimits()).close()
        assert (open_files(), threading.active_count()) == before

    def test_pool_that_cannot_start_leaves_no_process(self) -> None:
        """A process that was started before is ended, too, if there is no descriptor for its memory."""
        before = open_files()
        ends = decoder_process.start_process()
        with no_free_descriptors(), pytest.raises(OSError, match="Too many open files"):
            DecoderPool(1, SMALL, DecodeLimits(), started=[ends])
        assert ends.process.returncode == -signal.SIGKILL
        assert open_files() == before

    def test_grow_without_free_descriptors_goes_on_with_what_there_is(self, tmp_path: Path) -> None:
        """Another process is a matter of speed alone."""
        with DecoderPool(2, SMALL, DecodeLimits(), started=[decoder_process.start_process()]) as pool:
            with no_free_descriptors():
                pool.grow()
            assert isinstance(only(pool, photo(tmp_path / "a.png")), DecodedImage)
            assert len(pool.process_ids) == 1
            pool.grow()
            pool.grow()
            assert len(pool.process_ids) == 2


class TestHostile:
    """Hostile files do no harm."""

    def test_pool_decompression_bombs_stay_below_the_memory_limit(self, tmp_path: Path) -> None:
        """They are decoded in little memory or refused, and no process dies."""
        bombs = {
            "black.png": one_bit_png(7000, 7000),
            "deep.png": png(7000, 7000, depth=16, channels=4),
            "alpha.png": png(7000, 7000, depth=8, channels=4),
            "wide.png": one_bit_png(1_000_000, 49),
            "endless.png": one_bit_png(80_000_000, 1),
            "huge.png": one_bit_png(30_000, 30_000),
            "text.png": png_with_text(40_000_000),
            "canvas.gif": gif(60_000, 60_000),
            "canvas49.gif": gif(7000, 7000),
            "plain.bmp": saved(Image.new("1", (7000, 7000)), "BMP"),
            "grey16.tif": saved(Image.new("I;16", (7000, 7000)), "TIFF", compression="tiff_lzw"),
            "inks.tif": saved(Image.new("CMYK", (6000, 6000)), "TIFF", compression="tiff_lzw"),
            "slow.jpg": saved(Image.new("RGB", (7000, 7000)), "JPEG", progressive=True, subsampling=0),
            "empty.webp": saved(Image.new("RGB", (5000, 5000)), "WEBP"),
        }
        for name, content in bombs.items():
            (tmp_path / name).write_bytes(content)
        good = photo(tmp_path / "good.png")
        with DecoderPool(1, SMALL, DecodeLimits(), timeout_seconds=60) as pool:
            (process_id,) = warmed(pool, tmp_path)
            idle = memory_kb(process_id, "VmRSS")
            answers = {
                os.path.basename(answer.path): answer
                for answer in pool.decode_all(stamped(*(tmp_path / name for name in bombs), good))
            }
            assert pool.process_ids == (process_id,)
            assert memory_kb(process_id, "VmHWM") - idle < CEILING_KB
        assert isinstance(answers["good.png"], DecodedImage)
        assert isinstance(answers["alpha.png"], DecodedImage)
        refused = {name: answer.refusal for name, answer in answers.items() if isinstance(answer, ImageRefused)}
        assert set(refused.values()) <= {Refusal.TOO_LARGE, Refusal.UNREADABLE}
        assert {"wide.png", "endless.png", "huge.png", "canvas.gif"} <= set(refused)

    def test_pool_hostile_files_get_answers_without_harm(self, tmp_path: Path) -> None:
        """The same two processes answer for every damaged image, and for a corpus if there is one."""
        sound = write_hostile_files(tmp_path)
        files = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()]
        before = {path: sha256(path.read_bytes()).digest() for path in files}
        with DecoderPool(2, SMALL, DecodeLimits(), timeout_seconds=20) as pool:
            process_ids = warmed(pool, tmp_path)
            idle = {process_id: memory_kb(process_id, "VmRSS") for process_id in process_ids}
            answers = list(pool.decode_all(stamped(*files)))
            assert pool.process_ids == process_ids
            grown = [memory_kb(process_id, "VmHWM") - idle[process_id] for process_id in process_ids]
        assert sorted(answer.path for answer in answers) == sorted(map(os.fspath, files))
        outcomes = Counter(getattr(answer, "refusal", None) for answer in answers)
        assert set(outcomes) == {None, Refusal.UNREADABLE, Refusal.TOO_LARGE, Refusal.NOT_AN_IMAGE}
        decoded = {answer.path for answer in answers if isinstance(answer, DecodedImage)}
        assert decoded >= set(map(os.fspath, sound))
        assert not CORPUS.is_file() or outcomes[None] > 400
        assert max(grown) < CEILING_KB
        assert before == {path: sha256(path.read_bytes()).digest() for path in files}


# ---------------------------------------------------------------- helpers


def warmed(pool: DecoderPool, folder: Path) -> tuple[int, ...]:
    """Wait until every process of a pool has decoded something; return their numbers."""
    paths = [photo(folder / f"warm-{number}.png", number) for number in range(4 * len(pool.process_ids))]
    while not all(handle.is_ready for handle in pool._decoders):
        assert {type(answer) for answer in pool.decode_all(stamped(*paths))} == {DecodedImage}
    for path in paths:
        path.unlink()
    return pool.process_ids


def _lives(status: Path) -> bool:
    """Tell by its ``/proc/<number>/stat`` whether a process runs."""
    try:
        return status.read_text(encoding="ascii").rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextlib.contextmanager
def while_stopped(process_id: int, act: Callable[[], None], also: signal.Signals | None = None) -> Iterator[None]:
    """Stop a process, and act on it a moment after the block has begun to wait for it."""

    def do() -> None:
        act()
        if also is not None:
            os.kill(process_id, also)

    os.kill(process_id, signal.SIGSTOP)
    timer = threading.Timer(0.5, do)
    timer.start()
    try:
        yield
    finally:
        timer.join()
