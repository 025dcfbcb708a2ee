"""The precision that serves: int8 after it agreed on the references, float32 else, and torch nowhere on that path."""

import os
import shutil
import socket
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog
from filelock import FileLock
from structlog.testing import capture_logs

from sortd import config as configuration
from sortd import logs
from sortd.config import Config
from sortd.daemon.resources import teaching_of
from sortd.decoding.decoders import DecoderPool
from sortd.encoder import Encoder
from sortd.encoding import exports, models
from sortd.encoding.export_process import Request, Tell
from sortd.encoding.exports import Exports
from sortd.encoding.manifest import Manifest, Precision
from sortd.encoding.onnx_encoder import OnnxEncoder
from sortd.encoding.onnx_int8 import quantize
from sortd.errors import ModelError
from sortd.images import Limits
from sortd.references import ClassFolder
from sortd.running.comparison import LARGEST_CLASS, LARGEST_SAMPLE, sample
from sortd.running.precision import load_encoder
from sortd.running.verdict import read_verdict
from tests.command_line import sortd
from tests.daemon_process import PATIENCE_SECONDS, DaemonProcess, make_dataset, picture, tree

pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")


@pytest.fixture(scope="module")
def exported(tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the exports of the tiny model, int8 among them."""
    from sortd.encoding.onnx_export import export

    def here(request: Request, tell: Tell) -> None:
        export(request, tell)

    cache = tmp_path_factory.mktemp("exported")
    exports.make(models.locate(str(tiny_clip)), None, cache_dir=cache, least_gain=0.0, run=here)
    return cache


@pytest.fixture
def make_config(exported: Path, tmp_path: Path, write_config: Callable[..., Path]) -> Callable[..., Config]:
    """Write a configuration whose cache holds the exports already, and load it."""

    def make(**keys: object) -> Config:
        if not (tmp_path / "cache").exists():
            shutil.copytree(exported / "onnx", tmp_path / "cache" / "onnx")
        return configuration.load(write_config(**{"backend": "onnx", **keys}), {"HOME": str(tmp_path)})

    return make


class World:
    """Loads encoders as a site does, and remembers what was told."""

    def __init__(self, config: Config) -> None:
        """Begin with nothing told."""
        self.config = config
        self.told: list[str] = []
        self.pools = 0
        self.lines: list[Any] = []

    def load(self, *, may_prepare: bool = True) -> Encoder:
        """Load, with decoders of this process."""
        with ExitStack() as opened, capture_logs() as lines:

            def pool(*seen: Any) -> DecoderPool:
                self.pools += 1
                return opened.enter_context(DecoderPool(0, seen[0], Limits(), jpeg=seen[1]))

            encoder = load_encoder(
                self.config, pool=pool, teaching_of=teaching_of, tell=self.told.append, may_prepare=may_prepare
            )
        self.lines += lines
        return encoder

    def exports(self) -> Exports:
        """The exports that stand."""
        found = exports.find(models.locate(self.config.model), None, cache_dir=self.config.cache_dir)
        assert found is not None
        return found

    def judged(self) -> list[Any]:
        """The lines about verdicts."""
        return [line for line in self.lines if line["event"] == logs.MODEL_JUDGED]


def spoil_int8(found: Exports) -> None:
    """Put a vision tower in place whose weights have three values, and vouch for it."""
    tower = found.tower("image", Precision.INT8)
    quantize(found.tower("image", Precision.FP32), tower, largest=1)
    vouch_for(found, tower)


def vouch_for(found: Exports, tower: Path) -> None:
    """Write a tower as it is now into the manifest."""
    manifest = Manifest.from_json((found.folder / exports.MANIFEST).read_text())
    sums = {**manifest.checksums, tower.name: models.checksums([tower])[tower]}
    fresh = replace(manifest, checksums=sums)
    (found.folder / exports.MANIFEST).write_text(fresh.to_json())


def damage(found: Exports, precision: Precision) -> None:
    """Put something in a vision tower's place that is no graph, and vouch for it."""
    tower = found.tower("image", precision)
    tower.write_bytes(b"no graph")
    vouch_for(found, tower)


class TestVerdict:
    """int8 has to earn it, on the user's own references."""

    def test_int8_serves_where_the_references_agree(self, tmp_path: Path, make_config: Callable[..., Config]) -> None:
        """The figures are logged, told and kept; the next start believes them without a forward."""
        make_dataset(tmp_path / "Data", references=12)
        world = World(make_config())
        first = world.load()
        assert "-onnx-int8-" in first.encoder_id
        (line,) = world.judged()
        assert (line["serves"], line["judged"], line["filed"], line["same"], line["share"]) == ("int8", 36, 36, 36, 1.0)
        assert line["mean_cosine"] > 0.99
        assert line["datasets"]["Colours"]["references"] == 36
        assert world.told == ["onnx int8; 36 of 36 references filed as by fp32"]
        assert world.load().encoder_id == first.encoder_id
        assert len(world.judged()) == 1
        assert world.pools == 1

    def test_another_reference_is_judged_anew(self, tmp_path: Path, make_config: Callable[..., Config]) -> None:
        """As are other settings; a remembered verdict holds for what it was found on."""
        dataset = make_dataset(tmp_path / "Data", references=12)
        world = World(make_config())
        world.load()
        picture("red", 99).save(dataset / "Clases" / "red" / "another.png")
        world.load()
        assert [line["judged"] for line in world.judged()] == [36, 37]
        world.config = make_config(mode="avg")
        world.load()
        assert len(world.judged()) == 3

    def test_few_references_are_served_exactly(self, tmp_path: Path, make_config: Callable[..., Config]) -> None:
        """Nothing can be told from twelve, and that is said as a warning."""
        make_dataset(tmp_path / "Data", references=4)
        world = World(make_config())
        assert "-onnx-fp32-" in world.load().encoder_id
        (line,) = world.judged()
        assert (line["serves"], line["log_level"]) == ("fp32", "warning")
        assert "12 references that are left out and filed by the others are too few" in line["refusal"]
        assert "int8 does not serve: 12 references" in world.told[0]

    def test_without_a_dataset_it_is_float32(self, tmp_path: Path, make_config: Callable[..., Config]) -> None:
        """A root that is not mounted yet is nobody's mistake here."""
        world = World(make_config(root=tmp_path / "nowhere"))
        assert "-onnx-fp32-" in world.load().encoder_id

    def test_int8_that_decides_otherwise_does_not_serve(
        self, tmp_path: Path, make_config: Callable[..., Config]
    ) -> None:
        """Weights of three values move every row."""
        make_dataset(tmp_path / "Data", references=12)
        world = World(make_config())
        spoil_int8(world.exports())
        assert "-onnx-fp32-" in world.load().encoder_id
        (line,) = world.judged()
        assert line["serves"] == "fp32"
        assert line["refusal"].startswith(
            ("the rows of Colours moved too far", f"{line['filed'] - line['same']} of the {line['filed']}")
        )
        verdict = read_verdict(world.exports(), world.config.root)
        assert verdict is not None
        assert verdict.facts()["refusal"] == line["refusal"]

    def test_a_damaged_verdict_is_none(self, tmp_path: Path, make_config: Callable[..., Config]) -> None:
        """It is judged again."""
        make_dataset(tmp_path / "Data", references=12)
        world = World(make_config())
        world.load()
        (file,) = world.exports().folder.glob("agreement-*.json")
        for damage in ("", "[]", '{"datasets": {"Colours": {}}}', '{"fingerprint": 1}'):
            file.write_text(damage)
            assert read_verdict(world.exports(), world.config.root) is None
        world.load()
        assert len(world.judged()) == 2

    def test_a_rehearsal_takes_what_stands(self, tmp_path: Path, make_config: Callable[..., Config]) -> None:
        """It writes nothing: no verdict means float32, no export means torch."""
        make_dataset(tmp_path / "Data", references=12)
        world = World(make_config())
        world.exports()  # the hashes of the files are remembered from here on
        before = tree(tmp_path / "cache")
        assert "-onnx-fp32-" in world.load(may_prepare=False).encoder_id
        assert "it has not been judged on these references" in world.told[-1]
        assert tree(tmp_path / "cache") == before
        shutil.rmtree(tmp_path / "cache" / "onnx")
        assert "-torch-" in world.load(may_prepare=False).encoder_id


class TestBackend:
    """What runs the model is said, and so is what was wanted and cannot be."""

    def test_auto_without_an_export_is_torch(self, tmp_path: Path, make_config: Callable[..., Config]) -> None:
        """With the command that changes it."""
        config = make_config(backend="auto")
        shutil.rmtree(tmp_path / "cache" / "onnx")
        world = World(config)
        assert "-torch-" in world.load().encoder_id
        assert "`sortd models export`" in world.told[0]

    def test_auto_falls_back_loudly_where_the_export_cannot_be_made_again(
        self, make_config: Callable[..., Config]
    ) -> None:
        """A place that cannot be written, for example; asked for by name it is an error."""
        world = World(make_config(backend="auto"))
        folder = world.exports().folder
        (folder / "image.onnx").write_bytes(b"damaged")
        lock = Path(f"{folder}.lock")
        lock.unlink(missing_ok=True)
        lock.mkdir()
        assert "-torch-" in world.load().encoder_id
        (line,) = [line for line in world.lines if line["event"] == logs.MODEL_FELL_BACK]
        assert (line["wanted"], line["backend"], line["log_level"]) == ("onnx", "torch", "warning")
        world.config = make_config(backend="onnx")
        with pytest.raises(ModelError, match="cannot export"):
            world.load()

    def test_a_model_that_is_nowhere_is_no_matter_of_the_backend(self, make_config: Callable[..., Config]) -> None:
        """It is said once, and torch is not praised for it."""
        world = World(make_config(backend="auto", model="clip-ViT-L-14"))
        with pytest.raises(ModelError, match="is not on this machine"):
            world.load()
        assert not world.lines
        assert not world.told

    def test_what_does_not_run_falls_back(self, tmp_path: Path, make_config: Callable[..., Config]) -> None:
        """From int8 to float32, and with `auto` from there to torch, with a warning each; by name it is an error."""
        make_dataset(tmp_path / "Data", references=12)
        world = World(make_config(backend="auto"))
        first = world.load()
        assert "-onnx-int8-" in first.encoder_id
        damage(world.exports(), Precision.INT8)
        assert "-onnx-fp32-" in world.load().encoder_id
        assert "int8 does not serve: ONNX Runtime does not open" in world.told[-1]
        (tmp_path / "Data" / "Colours" / "Clases" / "red" / "00.png").touch()  # it would have to be judged anew
        assert "-onnx-fp32-" in world.load().encoder_id
        assert "it has not been judged on these references" in world.told[-1]
        damage(world.exports(), Precision.FP32)
        assert "-torch-" in world.load().encoder_id
        fallen = [line["backend"] for line in world.lines if line["event"] == logs.MODEL_FELL_BACK]
        assert fallen == ["onnx fp32", "onnx fp32", "onnx fp32", "torch"]
        world.config = make_config(backend="onnx")
        with pytest.raises(ModelError, match="does not open"):
            world.load()

    def test_int8_that_was_made_anew_is_another_encoder(
        self, tmp_path: Path, make_config: Callable[..., Config]
    ) -> None:
        """Its ranges are measured, so the same model may round another way: no row of the one serves the other."""
        make_dataset(tmp_path / "Data", references=12)
        world = World(make_config())
        before = {one: OnnxEncoder(world.exports(), one, threads=1).encoder_id for one in Precision}
        spoil_int8(world.exports())
        after = {one: OnnxEncoder(world.exports(), one, threads=1).encoder_id for one in Precision}
        assert before[Precision.FP32] == after[Precision.FP32]
        assert before[Precision.INT8] != after[Precision.INT8]


class TestSample:
    """Many references are thinned evenly, and the same way each time."""

    @staticmethod
    def folders(classes: int, each: int) -> list[ClassFolder]:
        """Classes of so many files, and one of strangers."""
        from sortd.events import Stamp

        files = tuple((f"{number:05d}.png", Stamp(1, number, 1, 1)) for number in range(each))
        return [ClassFolder(label, files, ()) for label in ("_none", *(f"c{one:05d}" for one in range(classes)))]

    def test_a_small_library_is_compared_whole(self) -> None:
        """Without the examples of what belongs to no class."""
        assert sample(self.folders(10, 50)) == self.folders(10, 50)[1:]

    @pytest.mark.parametrize(("classes", "each"), [(2, 5000), (100, 30), (10_000, 3), (10_000, 100)])
    def test_a_large_one_is_thinned(self, classes: int, each: int) -> None:
        """To a size that a start can wait for, with classes that keep enough to be left out."""
        chosen = sample(self.folders(classes, each))
        assert sum(len(folder.files) for folder in chosen) <= LARGEST_SAMPLE
        assert {len(folder.files) for folder in chosen} == {min(each, LARGEST_CLASS)}
        assert len({folder.label for folder in chosen}) >= min(classes, 33)


def test_the_daemon_runs_without_torch(tmp_path: Path, make_config: Callable[..., Config]) -> None:
    """The real program files an image by int8, and its process never maps torch's library."""
    dataset = make_dataset(tmp_path / "Data", references=12)
    make_config()
    with DaemonProcess(tmp_path / "config.yaml", program="sortd") as daemon:
        ready = daemon.wait_for("daemon.ready")
        assert "-onnx-int8-" in ready["encoder_id"]
        assert "onnx int8; 36 of 36 references filed as by fp32" in ready["model"]
        picture("green", 1000).save(dataset / "Images" / "new.png")
        filed = daemon.wait_for("image.filed")
        assert (filed["label"], filed["encoder_id"]) == ("green", ready["encoder_id"])
        mapped = Path(f"/proc/{daemon.process.pid}/maps").read_text()
        assert "onnxruntime" in mapped
        assert "libtorch" not in mapped
        assert daemon.stop() == 0


def test_another_backend_learns_the_references_anew(tmp_path: Path, make_config: Callable[..., Config]) -> None:
    """Its rows are other ones, so no prototype of the one ever decides about an image of the other."""
    dataset = make_dataset(tmp_path / "Data", references=12)
    generations = []
    for number, backend in enumerate(("torch", "onnx", "onnx")):
        make_config(backend=backend)
        picture("green", 1000 + number).save(dataset / "Images" / f"{number}.png")
        with DaemonProcess(tmp_path / "config.yaml", "once", program="sortd") as ran:
            assert ran.wait() == 0
            (filed,) = ran.events("image.filed")
            (rebuilt,) = ran.events("prototypes.rebuilt")
        assert (filed["label"], f"-{backend}-" in filed["encoder_id"]) == ("green", True)
        assert rebuilt["encoder_id"] == filed["encoder_id"]
        generations.append((filed["generation"], rebuilt["changed"]))
    assert generations == [(1, True), (2, True), (2, False)]


def test_a_stop_does_not_wait_for_the_export_of_another(
    tmp_path: Path, tiny_clip: Path, write_config: Callable[..., Path]
) -> None:
    """Whoever exports the same model may take long; sortd ends when it is told to."""
    make_dataset(tmp_path / "Data")
    folder = exports.folder_of(models.locate(str(tiny_clip)), None, cache_dir=tmp_path / "cache")
    folder.parent.mkdir(parents=True)
    config = write_config(backend="onnx")
    with FileLock(f"{folder}.lock"), DaemonProcess(config, program="sortd") as daemon:
        daemon.wait_for("dataset.added")
        assert daemon.stop() == 0
    assert not folder.exists()


def test_commands_keep_their_facts_on_stdout_alone(
    tmp_path: Path, make_config: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    """What is said about the model, by whoever has to judge it first, goes another way; then it is shown as a fact."""
    structlog.reset_defaults()  # a command runs in a process where no log was set up; capturing counts as setting up
    make_dataset(tmp_path / "Data", references=4)
    make_config(mode="max")
    ran = sortd("eval", "-c", tmp_path / "config.yaml", "--json")
    assert ran.facts["datasets"]["Colours"]["encoder_id"].count("-onnx-fp32-") == 1
    assert "model.judged: 12 references" in caplog.text
    listed = sortd("models", "-c", tmp_path / "config.yaml")
    assert "fp32 serves and int8 does not: 12 references" in listed.out
    facts = sortd("models", "-c", tmp_path / "config.yaml", "--json").facts["backend"]
    assert (facts["name"], facts["export"]["precisions"]) == ("onnx", ["fp32", "int8"])
    assert (facts["agreement"]["serves"], facts["agreement"]["filed"]) == ("fp32", 12)
    checked = sortd("check", "-c", tmp_path / "config.yaml", "--json")
    assert "fp32 serves and int8 does not" in checked.out


def test_a_start_that_exports_asks_systemd_for_time_and_says_why(
    tmp_path: Path, tiny_clip: Path, write_config: Callable[..., Path]
) -> None:
    """READY waits for the model, so the time that the unit gives to a start must not run out over an export."""
    make_dataset(tmp_path / "Data")
    address = tmp_path / "notify"
    folder = exports.folder_of(models.locate(str(tiny_clip)), None, cache_dir=tmp_path / "cache")
    folder.parent.mkdir(parents=True)
    config, told = write_config(backend="onnx"), ""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, FileLock(f"{folder}.lock"):
        manager.bind(os.fspath(address))
        manager.settimeout(PATIENCE_SECONDS)
        environment = {"NOTIFY_SOCKET": os.fspath(address), "WATCHDOG_USEC": "60000000"}
        with DaemonProcess(config, program="sortd", environment=environment) as daemon:
            line = daemon.wait_for("model.exporting")
            assert (line["model"], line["about_seconds"] > 0) == (str(tiny_clip), True)
            assert line["step"] == "waiting for another process that exports the same model"
            while not all(one in told for one in ("EXTEND_TIMEOUT_USEC=", "STATUS=exporting", "WATCHDOG=1")):
                told += manager.recv(1000).decode() + "\n"
            daemon.wait_until(lambda: "exporting" in sortd("status", "-c", config).out, "sortd status says it")
            assert daemon.stop() == 0
    assert "waiting for another process that exports the same model" in told
    assert "READY=1" not in told
