"""The precision that serves: int8 after it agreed on the references, float32 otherwise; neither imports torch."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog
from structlog.testing import capture_logs

from sortd import config as configuration
from sortd import logs
from sortd.commands.export import LARGEST_CLASS, LARGEST_SAMPLE, export, sample
from sortd.config import Config
from sortd.encoder import models
from sortd.encoder import onnx_encoder as exports
from sortd.encoder.backends import load_serving
from sortd.encoder.base import Encoder
from sortd.encoder.export import make as make_export
from sortd.encoder.onnx_encoder import Exports, OnnxEncoder, Precision, read_verdict
from sortd.encoder.quantize import quantize
from sortd.errors import ModelError
from sortd.references import ClassFolder
from tests.command_line import sortd
from tests.daemon_process import DaemonProcess, make_dataset, picture, tree

pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")


@pytest.fixture(scope="module")
def exported(tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the exports of the tiny model, int8 among them."""
    cache = tmp_path_factory.mktemp("exported")
    make_export(models.locate(str(tiny_clip)), None, cache_dir=cache, least_gain=0.0)
    return cache


@pytest.fixture
def make_config(exported: Path, tmp_path: Path, write_config: Callable[..., Path]) -> Callable[..., Config]:
    """Write a configuration whose cache holds the exports already, and load it."""

    def make(**keys: object) -> Config:
        if not (tmp_path / "cache").exists():
            shutil.copytree(exported / "onnx", tmp_path / "cache" / "onnx")
        return configuration.read_config(write_config(**{"backend": "onnx", **keys}), {"HOME": str(tmp_path)})

    return make


class World:
    """Exports, judges and loads as the commands and the daemon do, and remembers what was told."""

    def __init__(self, config: Config) -> None:
        """Begin with nothing told."""
        self.config = config
        self.told: list[str] = []
        self.lines: list[Any] = []

    def load(self) -> Encoder:
        """Load what serves."""
        with capture_logs() as lines:
            encoder = load_serving(self.config, tell=self.told.append)
        self.lines += lines
        return encoder

    def judge(self) -> Mapping[str, Any]:
        """Do as `sortd models export` does, and return the verdict."""
        export(self.config)
        verdict = read_verdict(self.exports(), self.config.root)
        assert verdict is not None
        return verdict

    def exports(self) -> Exports:
        """The exports that stand."""
        found = exports.find(models.locate(self.config.model), None, cache_dir=self.config.cache_dir)
        assert found is not None
        return found


def spoil_int8(found: Exports) -> None:
    """Put a vision tower in place whose weights have three values, and vouch for it."""
    tower = found.tower("image", Precision.INT8)
    quantize(found.tower("image", Precision.FP32), tower, largest=1)
    vouch_for(found, tower)


def vouch_for(found: Exports, tower: Path) -> None:
    """Write a tower as it is now into the manifest."""
    manifest = exports.MANIFESTS.validate_json((found.folder / exports.MANIFEST).read_bytes())
    sums = {**manifest.checksums, tower.name: models.checksums([tower])[tower]}
    fresh = replace(manifest, checksums=sums)
    (found.folder / exports.MANIFEST).write_bytes(exports.MANIFESTS.dump_json(fresh))


def damage(found: Exports, precision: Precision) -> None:
    """Put something in a vision tower's place that is no graph, and vouch for it."""
    tower = found.tower("image", precision)
    tower.write_bytes(b"no graph")
    vouch_for(found, tower)


class TestVerdict:
    """int8 has to earn it, on the user's own references, when the model is exported."""

    def test_int8_serves_where_the_references_agree(self, tmp_path: Path, make_config: Callable[..., Config]) -> None:
        """The figures are kept beside the export, and each start believes them without looking at a reference."""
        dataset = make_dataset(tmp_path / "Data", references=12)
        world = World(make_config())
        verdict = world.judge()
        assert (verdict["serves"], verdict["judged"], verdict["filed"], verdict["same"]) == ("int8", 36, 36, 36)
        assert verdict["mean_cosine"] > 0.99
        assert verdict["probe_cosine"] > 0.99
        assert verdict["datasets"]["Colours"]["references"] == 36
        shutil.rmtree(dataset)
        assert "-onnx-int8-" in world.load().encoder_id
        assert world.told == ["onnx int8; 36 of 36 references filed as by fp32"]
        assert not world.lines

    def test_few_references_are_served_exactly(self, tmp_path: Path, make_config: Callable[..., Config]) -> None:
        """Nothing can be told from twelve; with more, `sortd models export` judges again."""
        dataset = make_dataset(tmp_path / "Data", references=4)
        world = World(make_config())
        assert "12 references that are left out and filed by the others are too few" in world.judge()["refusal"]
        assert "-onnx-fp32-" in world.load().encoder_id
        assert "int8 does not serve: 12 references" in world.told[0]
        shutil.rmtree(dataset)
        make_dataset(tmp_path / "Data", references=12)
        assert world.judge()["serves"] == "int8"

    def test_without_a_dataset_it_is_float32(self, tmp_path: Path, make_config: Callable[..., Config]) -> None:
        """A root that is not mounted yet is no error of an export."""
        world = World(make_config(root=tmp_path / "nowhere"))
        assert world.judge()["serves"] == "fp32"
        assert "-onnx-fp32-" in world.load().encoder_id

    def test_int8_that_decides_otherwise_does_not_serve(
        self, tmp_path: Path, make_config: Callable[..., Config]
    ) -> None:
        """Weights of three values move every row; the verdict on the files before does not speak for them."""
        make_dataset(tmp_path / "Data", references=12)
        world = World(make_config())
        assert world.judge()["serves"] == "int8"
        spoil_int8(world.exports())
        assert read_verdict(world.exports(), world.config.root) is None
        assert "-onnx-fp32-" in world.load().encoder_id
        assert "moved too far" in world.judge()["refusal"]
        assert "-onnx-fp32-" in world.load().encoder_id

    def test_int8_that_does_not_run_is_refused(self, tmp_path: Path, make_config: Callable[..., Config]) -> None:
        """With what it said."""
        make_dataset(tmp_path / "Data", references=12)
        world = World(make_config())
        damage(world.exports(), Precision.INT8)
        assert "could not be held against fp32: ONNX Runtime does not open" in world.judge()["refusal"]

    def test_a_damaged_verdict_is_none(self, tmp_path: Path, make_config: Callable[..., Config]) -> None:
        """float32 serves; a verdict speaks for one root alone."""
        make_dataset(tmp_path / "Data", references=12)
        world = World(make_config())
        world.judge()
        assert read_verdict(world.exports(), tmp_path / "another") is None
        (file,) = world.exports().folder.glob("int8-*.json")
        for damaged in ("", "[]", '{"datasets": {"Colours": {}}}', '{"export": 1}'):
            file.write_text(damaged)
            assert read_verdict(world.exports(), world.config.root) is None
        assert "-onnx-fp32-" in world.load().encoder_id
        assert "not judged on these datasets; `sortd models export` does it" in world.told[-1]

    def test_a_start_takes_what_is_ready(self, tmp_path: Path, make_config: Callable[..., Config]) -> None:
        """It writes nothing: no verdict means float32, no export means torch with a warning."""
        make_dataset(tmp_path / "Data", references=12)
        world = World(make_config())
        world.exports()  # the hashes of the files are remembered from here on
        before = tree(tmp_path / "cache")
        assert "-onnx-fp32-" in world.load().encoder_id
        assert tree(tmp_path / "cache") == before
        for backend in ("auto", "onnx"):
            world.config = make_config(backend=backend)
            (world.exports().folder / "image.onnx").write_bytes(b"damaged")
            assert "-torch-" in world.load().encoder_id
            line = world.lines.pop()
            assert (line["event"], line["backend"], line["log_level"]) == (logs.MODEL_FELL_BACK, "torch", "warning")
            assert "`sortd models export` makes it" in line["error"]
            shutil.rmtree(tmp_path / "cache")


class TestBackend:
    """What runs the model is said, and so is what was wanted and cannot be."""

    def test_auto_without_an_export_is_torch(self, tmp_path: Path, make_config: Callable[..., Config]) -> None:
        """With the command that changes it."""
        config = make_config(backend="auto")
        shutil.rmtree(tmp_path / "cache" / "onnx")
        world = World(config)
        assert "-torch-" in world.load().encoder_id
        assert "`sortd models export`" in world.told[0]

    def test_an_export_that_cannot_be_written_is_an_error(self, make_config: Callable[..., Config]) -> None:
        """Of the command; what runs goes on with torch."""
        world = World(make_config(backend="onnx"))
        folder = world.exports().folder
        (folder / "image.onnx").write_bytes(b"damaged")
        lock = Path(f"{folder}.lock")
        lock.unlink(missing_ok=True)
        lock.mkdir()
        with pytest.raises(ModelError, match="cannot export"):
            export(world.config)

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
        verdict = world.judge()
        assert "-onnx-int8-" in world.load().encoder_id
        damage(world.exports(), Precision.INT8)
        exports.write_verdict(world.exports(), world.config.root, verdict)
        assert "-onnx-fp32-" in world.load().encoder_id
        assert "int8 does not serve: ONNX Runtime does not open" in world.told[-1]
        damage(world.exports(), Precision.FP32)
        assert "-torch-" in world.load().encoder_id
        fallen = [line["backend"] for line in world.lines if line["event"] == logs.MODEL_FELL_BACK]
        assert fallen == ["onnx fp32", "torch"]
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
    World(make_config()).judge()
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


def test_commands_keep_their_facts_on_stdout_alone(
    tmp_path: Path, make_config: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    """The verdict on int8 is a fact; a fall-back to torch is said on stderr, and `check` says what to do."""
    structlog.reset_defaults()  # a command runs in a process where no log was set up; capturing counts as setting up
    make_dataset(tmp_path / "Data", references=4)
    config = tmp_path / "config.yaml"
    make_config(mode="max")
    facts = sortd("models", "export", "-c", config, "--json").facts
    assert (facts["name"], facts["export"]["precisions"]) == ("onnx", ["fp32", "int8"])
    assert (facts["agreement"]["serves"], facts["agreement"]["filed"]) == ("fp32", 12)
    assert "fp32 serves and int8 does not: 12 references" in sortd("models", "-c", config).out
    assert "fp32 serves and int8 does not" in sortd("check", "-c", config, "--json").out
    shutil.rmtree(tmp_path / "cache" / "onnx")
    ran = sortd("eval", "-c", config, "--json")
    assert ran.facts["datasets"]["Colours"]["encoder_id"].count("-torch-") == 1
    assert "model.fell_back: the export to ONNX is missing" in caplog.text
    assert "sortd models export" in sortd("check", "-c", config, "--json").out
    assert "It is run by torch: the export to ONNX is missing" in sortd("models", "-c", config).out
