"""Daemons whose encoder is another process, killed and started again: no image is lost, skipped or moved twice.

Real processes: ``sortd encode`` with the encoder of the tests (or a real one), and ``sortd run``, which loads nothing.
"""

import json
import os
import signal
import socket
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from sortd.service import read_status
from tests.command_line import sortd
from tests.daemon_process import COLOURS, PATIENCE_SECONDS, DaemonProcess, make_dataset, picture, running

Outcomes = Mapping[str, tuple[object, ...]]
ROUNDING = 2e-4  # of a score with four decimals: the last bits of a row depend on its batch
FAST, REAL = "tests.fast_sortd", "sortd"
DECIDED = ("image.filed", "image.sent_to_review")


def configure(folder: Path, **keys: object) -> Path:
    """Write the configuration of a daemon, or of an encoder, with everything below a folder; return its path."""
    values = {
        "root": folder / "Data",
        "model": "packaged",
        "state_dir": folder / "state",
        "cache_dir": folder / "cache",
        "settle_seconds": 0.3,
        "mode": "max",
        "batch_size": 8,
        **keys,
    }
    folder.mkdir(exist_ok=True)
    path = folder / "config.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in values.items()), encoding="utf-8")
    return path


@contextmanager
def encoder_process(path: Path, *arguments: str, program: str = FAST) -> Iterator[DaemonProcess]:
    """Start ``sortd encode`` at a path and wait until it is ready."""
    config = configure(path.parent / "encoder")
    with DaemonProcess(config, "encode", "--socket", str(path), *arguments, program=program) as encoder:
        encoder.wait_for("encoder.ready")
        yield encoder


def client(tmp_path: Path, name: str, **keys: object) -> tuple[Path, Path]:
    """Make a dataset and the configuration of a daemon that uses the service; return both paths."""
    dataset = make_dataset(tmp_path / name / "Data", f"Colours{name}")
    return dataset, configure(tmp_path / name, backend=f"socket:{tmp_path}/encoder.sock", **keys)


def drop(dataset: Path, numbers: range) -> None:
    """Put pictures of all colours into the inbox."""
    for number in numbers:
        colour = [*COLOURS][number % len(COLOURS)]
        picture(colour, 10_000 + number, patches=30).save(dataset / "Images" / f"{colour}{number:04}.png")


def outcomes(daemon: DaemonProcess) -> Outcomes:
    """Return what was decided of each image, which must be once."""
    lines = [line for event in DECIDED for line in daemon.events(event)]
    assert max(Counter(line["path"] for line in lines).values(), default=1) == 1
    keys = ("event", "label", "second_label", "reason", "encoder_id")
    return {
        Path(line["path"]).name: (
            *(line.get(key) for key in keys),
            line["score"],
            line["margin"],
        )
        for line in lines
    }


def drop_all(datasets: Iterable[Path], numbers: range) -> None:
    """Put the same pictures into each inbox."""
    for dataset in datasets:
        drop(dataset, numbers)


def wait_for_all(daemons: Iterable[DaemonProcess], count: int) -> None:
    """Wait until each daemon has decided so many images."""
    for daemon in daemons:
        wait_for_images(daemon, count)


def wait_for_images(daemon: DaemonProcess, count: int) -> None:
    """Wait until so many images were decided."""
    daemon.wait_until(lambda: sum(len(daemon.events(event)) for event in DECIDED) >= count, f"{count} images")


def in_process(tmp_path: Path, count: int, program: str) -> Outcomes:
    """Return what a daemon decides that has its encoder in its own process."""
    dataset = make_dataset(tmp_path / "alone" / "Data", "ColoursA")
    drop(dataset, range(count))
    with running(configure(tmp_path / "alone"), program=program) as daemon:
        wait_for_images(daemon, count)
        return outcomes(daemon)


def check_equal(found: Outcomes, expected: Outcomes) -> None:
    """Check that two daemons decided alike."""
    assert {name: fact[:5] for name, fact in found.items()} == {name: fact[:5] for name, fact in expected.items()}
    for name, fact in found.items():
        assert fact[5:] == pytest.approx(expected[name][5:], abs=ROUNDING), name


def check_filed(daemon: DaemonProcess, dataset: Path, names: Iterable[str], kills: int) -> None:
    """Check that each image is in one place, and that the log names each time without the encoder."""
    assert len(daemon.events("encoder.away")) >= kills
    assert len(daemon.events("encoder.back")) == len(daemon.events("encoder.away"))
    assert not [line for line in daemon.lines if line["event"] in {"image.rejected", "image.left"}]
    assert not [*(dataset / "Images").iterdir()]
    assert not [*(dataset / "Rejected").glob("*")]
    assert Counter(names) == Counter(file.name for file in dataset.rglob("*.png") if file.parents[1].name != "Clases")


def check_kills(tmp_path: Path, *, count: int, kills: int, program: str) -> None:
    """Let two daemons file images with one encoder, which is killed under load, and compare with a daemon alone."""
    path = tmp_path / "encoder.sock"
    clients = [client(tmp_path, name) for name in "AB"]
    datasets, part = [dataset for dataset, _ in clients], count // (kills + 1)
    with ExitStack() as stack:
        daemons = [stack.enter_context(DaemonProcess(config, program=REAL)) for _, config in clients]
        for number in range(kills):
            with encoder_process(path, program=program) as encoder:
                drop_all(datasets, range(number * part, (number + 1) * part))
                wait_for_all(daemons, number * (part + 1) + part // 8)
                before = [len(daemon.events("encoder.away")) for daemon in daemons]
                encoder.send(signal.SIGKILL)
            drop_all(datasets, range(count + number, count + number + 1))  # which needs the encoder while it is away
            for daemon, times in zip(daemons, before, strict=True):
                daemon.wait_for("encoder.away", count=times + 1)
                assert daemon.process.poll() is None
        with encoder_process(path, program=program):
            drop_all(datasets, range(kills * part, count))
            wait_for_all(daemons, count + kills)
            for daemon in daemons:
                daemon.stop()
        found = [outcomes(daemon) for daemon in daemons]
        for daemon, dataset in zip(daemons, datasets, strict=True):
            check_filed(daemon, dataset, found[0].keys(), kills)
    alone = in_process(tmp_path, count + kills, program)
    for by_service in found:
        check_equal(by_service, alone)


def test_encoder_killed_under_load_loses_no_image(tmp_path: Path) -> None:
    """Two daemons, one encoder, kill -9 twice: each image is filed once, and as by an encoder in the process."""
    check_kills(tmp_path, count=60, kills=2, program=FAST)


@pytest.mark.parametrize("count", [pytest.param(80, marks=pytest.mark.slow), pytest.param(500, marks=pytest.mark.long)])
def test_encoder_killed_four_times_under_load_loses_no_image(tmp_path: Path, count: int) -> None:
    """The same with the packaged model."""
    check_kills(tmp_path, count=count, kills=4, program=REAL)


def test_daemon_without_an_encoder_starts_later_and_stops_at_once(tmp_path: Path) -> None:
    """It is not ready before it knows the model; it says why, answers signals, and the watchdog is reset."""
    notified = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(os.fspath(notified))
        manager.settimeout(PATIENCE_SECONDS)
        _, config = client(tmp_path, "A")
        variables = {"NOTIFY_SOCKET": os.fspath(notified), "WATCHDOG_USEC": "1000000"}
        with DaemonProcess(config, program=REAL, environment=variables) as daemon:
            away = daemon.wait_for("encoder.away")
            assert "No such file" in away["error"]
            said = [manager.recv(4096).decode()]
            while said.count("WATCHDOG=1") < 3:
                said.append(manager.recv(4096).decode())
            assert any("is away" in message for message in said if message.startswith("STATUS="))
            assert not daemon.events("daemon.ready")
            assert daemon.stop() == 0
            assert daemon.events("daemon.stopped", worker_ended=True)
            assert len(daemon.events("encoder.away")) == 1


def test_daemon_without_its_encoder_does_what_needs_none(tmp_path: Path) -> None:
    """Status and requests work, SIGTERM ends it at once, and the image stays where it is."""
    path = tmp_path / "encoder.sock"
    dataset, config = client(tmp_path, "A")
    with DaemonProcess(config, program=REAL) as daemon:
        with encoder_process(path) as encoder:
            drop(dataset, range(2))
            wait_for_images(daemon, 2)
            daemon.wait_for("daemon.ready")
            encoder.send(signal.SIGKILL)
        drop(dataset, range(2, 3))
        daemon.wait_for("encoder.away")
        state = tmp_path / "A" / "state"
        daemon.wait_until(lambda: bool((read_status(state) or {}).get("encoder_problem")), "the problem in the status")
        assert "is away" in sortd("status", "--config", config).out
        [filed] = dataset.rglob("red0000.png")
        undone = sortd("undo", filed, "--config", config, "--json")
        assert undone.code == 0, undone.err
        assert (dataset / "Images" / "red0000.png").exists()
        assert daemon.stop() == 0
        assert daemon.events("daemon.stopped", worker_ended=True)
    assert {file.name for file in (dataset / "Images").iterdir()} == {"red0000.png", "blue0002.png"}


def test_daemon_whose_encoder_is_suspended_stops_at_once_and_waits(tmp_path: Path) -> None:
    """Between any two bytes of an answer, and before the greeting; what it had asked for is asked again."""
    path = tmp_path / "encoder.sock"
    dataset, config = client(tmp_path, "A")
    with encoder_process(path) as encoder:
        with DaemonProcess(config, program=REAL) as daemon:
            drop(dataset, range(40))
            wait_for_images(daemon, 5)
            encoder.send(signal.SIGSTOP)
            drop(dataset, range(40, 48))
            assert daemon.stop() == 0
            assert daemon.events("daemon.stopped", worker_ended=True)
            first = outcomes(daemon)
        try:
            with DaemonProcess(config, program=REAL) as daemon:
                assert "has not answered" in daemon.wait_for("encoder.away")["error"]
                encoder.send(signal.SIGCONT)
                wait_for_images(daemon, 48 - len(first))
                daemon.wait_for("encoder.back")
                assert not first.keys() & outcomes(daemon).keys()
                assert daemon.stop() == 0
        finally:
            encoder.send(signal.SIGCONT)
    assert not [*(dataset / "Images").iterdir()]


def test_daemon_ends_if_the_encoder_comes_back_with_another_model(tmp_path: Path) -> None:
    """With the exit code of a model, after which systemd starts it again, and it embeds with that one."""
    path = tmp_path / "encoder.sock"
    dataset, config = client(tmp_path, "A")
    with DaemonProcess(config, program=REAL) as daemon:
        with encoder_process(path):
            daemon.wait_for("daemon.ready")
        with encoder_process(path, "--encoder-id", "fake-other"):
            drop(dataset, range(1))
            assert daemon.wait() == 69
            assert "another model" in daemon.wait_for("daemon.failed")["error"]
            assert [file.name for file in (dataset / "Images").iterdir()] == ["red0000.png"]
        daemon._was_killed = True  # it has ended
    with encoder_process(path, "--encoder-id", "fake-other"), running(config, program=REAL) as again:
        wait_for_images(again, 1)
        assert {fact[4] for fact in outcomes(again).values()} == {"fake-other"}


def test_daemon_with_an_encoder_service_loads_no_model(tmp_path: Path) -> None:
    """Neither torch nor ONNX Runtime is in its memory."""
    _, config = client(tmp_path, "A")
    with encoder_process(tmp_path / "encoder.sock"), running(config, program=REAL) as daemon:
        maps = Path(f"/proc/{daemon.process.pid}/maps").read_text()
    assert "numpy" in maps
    assert "torch" not in maps
    assert "onnxruntime" not in maps


@pytest.mark.parametrize("command", ["once", "eval"])
def test_command_without_an_encoder_fails_with_the_code_of_a_model(tmp_path: Path, command: str) -> None:
    """It waits for a short time only, and moves nothing."""
    dataset, config = client(tmp_path, "A")
    drop(dataset, range(1))
    ran = sortd(command, "--config", config)
    assert ran.code == 69
    assert "sortd encode --socket" in ran.err
    assert len([*(dataset / "Images").iterdir()]) == 1


def test_commands_use_the_encoder_service(tmp_path: Path) -> None:
    """``check``, ``models``, ``explain``, ``bench`` and ``once`` name it, and need no model here."""
    dataset, config = client(tmp_path, "A", model=tmp_path / "nowhere")
    drop(dataset, range(2))
    image = next((dataset / "Images").iterdir())
    with encoder_process(tmp_path / "encoder.sock"):
        assert "is an encoder service" in sortd("check", "--config", config).out
        models = json.loads(sortd("models", "--config", config, "--json").out)
        assert (models["problem"], models["backend"]["name"]) == (None, "socket")
        assert sortd("explain", image, "--config", config).code == 0
        bench = json.loads(sortd("bench", "--config", config, "--json", "--images", 4).out)
        assert [one["backend"] for one in bench["backends"]] == ["socket"]
        assert sortd("once", "--config", config).code == 0
    assert not [*(dataset / "Images").iterdir()]
