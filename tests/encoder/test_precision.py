"""The precision in use: int8 if it agreed on the references, float32 otherwise; neither imports torch."""

import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
from structlog.testing import capture_logs

from sortd import config as configuration
from sortd import logs
from sortd.arrays import FloatArray, Pixels
from sortd.commands.models import export
from sortd.commands.precision import MAX_PER_CLASS, MAX_REFERENCES, PROBES, sample
from sortd.config import Config
from sortd.daemon.references import ClassFolder, References
from sortd.daemon.resources import Resources, reference_settings_of
from sortd.encoder import models
from sortd.encoder import onnx_encoder as exports
from sortd.encoder.backends import load_fastest
from sortd.encoder.clip import Encoder
from sortd.encoder.export import make_exports
from sortd.encoder.onnx_encoder import Exports, OnnxEncoder, Precision, read_verdict
from sortd.encoder.quantize import quantize
from sortd.errors import ModelError
from sortd.images.pool import Batch, DecoderPool
from sortd.layout import Area, Layout
from tests.command_line import sortd
from tests.daemon_process import DaemonProcess, make_dataset, picture, tree

pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")


@pytest.fixture(scope="module")
def exported(tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the exports of the tiny model, int8 among them."""
    cache = tmp_path_factory.mktemp("exported")
    make_exports(models.locate_pair(str(tiny_clip), None, cache), min_gain=0.0)
    return cache


@pytest.fixture
def make_config(exported: Path, tmp_path: Path, write_config: Callable[..., Path]) -> Callable[..., Config]:
    """Write a configuration whose cache holds the exports already, and load it."""

    def make(**keys: object) -> Config:
        if not (tmp_path / "cache").exists():
            shutil.copytree(exported / "onnx", tmp_path / "cache" / "onnx")
        return configuration.read_config(write_config(**{"backend": "onnx", **keys}), {"HOME": str(tmp_path)})

    return make


def count_images(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Return the number of images that ONNX Runtime encodes from here on, by precision."""
    encoded: Counter[str] = Counter()
    encode = OnnxEncoder.encode_images

    def counting(encoder: OnnxEncoder, pixels: Pixels) -> FloatArray:
        encoded[encoder.precision.value] += len(pixels)
        return encode(encoder, pixels)

    monkeypatch.setattr(OnnxEncoder, "encode_images", counting)
    return encoded


def embed_references(config: Config) -> None:
    """Embed the references of the made dataset as a start of the daemon does."""
    resources = Resources(config)
    try:
        embedder, _, _ = resources.load()
        layout = Layout(config.root / "Colours")
        References(layout.area(Area.CLASES)).support(embedder, reference_settings_of(config.dataset(layout.name)))
    finally:
        resources.unload()


class World:
    """Exports, compares and loads as the commands and the daemon do, and records the reports."""

    def __init__(self, config: Config) -> None:
        """Start without reports."""
        self.config = config
        self.reports: list[str] = []
        self.lines: list[Any] = []

    def load(self) -> Encoder:
        """Load what serves."""
        with capture_logs() as lines:
            encoder = load_fastest(self.config, report=self.reports.append)
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
        found = exports.find_exports(models.locate_configured(self.config))
        assert found is not None
        return found


def spoil_int8(found: Exports) -> None:
    """Replace the image tower by one whose weights have three values, and update the manifest."""
    tower = found.tower("image", Precision.INT8)
    quantize(found.tower("image", Precision.FP32), tower, largest=1)
    update_manifest(found, tower)


def spoil_red_images(found: Exports) -> None:
    """Let int8 give a red image the components of its row in reverse order; no synthetic image is so red."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    tower = found.tower("image", Precision.INT8)
    model = onnx.load(str(tower))
    width = found.manifest.dimensions
    constants = {
        "red": np.array(0), "green": np.array(1), "column": np.array([1]), "much": np.array(120.0, np.float32),
        "reversed": np.arange(width)[::-1].copy(),
    }  # fmt: skip
    for node in model.graph.node:
        node.output[:] = ["true_rows" if name == "rows" else name for name in node.output]
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    model.graph.node.extend(
        [
            helper.make_node("Cast", ["pixels"], ["levels"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["levels"], ["means"], axes=[1, 2], keepdims=0),
            helper.make_node("Gather", ["means", "red"], ["mean_red"], axis=1),
            helper.make_node("Gather", ["means", "green"], ["mean_green"], axis=1),
            helper.make_node("Sub", ["mean_red", "mean_green"], ["redness"]),
            helper.make_node("Greater", ["redness", "much"], ["is_red"]),
            helper.make_node("Unsqueeze", ["is_red", "column"], ["are_red"]),
            helper.make_node("Gather", ["true_rows", "reversed"], ["other_rows"], axis=1),
            helper.make_node("Where", ["are_red", "other_rows", "true_rows"], ["rows"]),
        ]
    )
    onnx.save(model, str(tower))
    update_manifest(found, tower)


def update_manifest(found: Exports, tower: Path) -> None:
    """Write the checksum of a tower to the manifest."""
    manifest = exports.MANIFESTS.validate_json((found.folder / exports.MANIFEST).read_bytes())
    sums = {**manifest.checksums, tower.name: models.checksums([tower])[tower]}
    fresh = replace(manifest, checksums=sums)
    (found.folder / exports.MANIFEST).write_bytes(exports.MANIFESTS.dump_json(fresh))


def damage(found: Exports, precision: Precision) -> None:
    """Replace an image tower by bytes that are no graph, and update the manifest."""
    tower = found.tower("image", precision)
    tower.write_bytes(b"no graph")
    update_manifest(found, tower)


class TestVerdict:
    """The verdict on int8, from the user's references at the export."""

    def test_verdict_references_agree_int8_is_used(self, tmp_path: Path, make_config: Callable[..., Config]) -> None:
        """The figures are stored with the export, and a start reads them without looking at references."""
        dataset = make_dataset(tmp_path / "Data", references=12)
        world = World(make_config())
        verdict = world.judge()
        assert (verdict["serves"], verdict["judged"], verdict["filed"], verdict["same"]) == ("int8", 36, 36, 36)
        assert verdict["mean_cosine"] > 0.99
        assert verdict["probe_cosine"] > 0.99
        assert verdict["datasets"]["Colours"]["references"] == 36
        shutil.rmtree(dataset)
        assert "-onnx-int8-" in world.load().encoder_id
        assert world.reports == ["onnx int8; 36 of 36 references filed as by fp32"]
        assert not world.lines

    def test_verdict_few_references_fp32_is_used(self, tmp_path: Path, make_config: Callable[..., Config]) -> None:
        """With more references, `sortd models export` compares again."""
        dataset = make_dataset(tmp_path / "Data", references=4)
        world = World(make_config())
        assert "only 12 left-out references are filed" in world.judge()["refusal"]
        assert "-onnx-fp32-" in world.load().encoder_id
        assert "int8 is not used: only 12 left-out references" in world.reports[0]
        shutil.rmtree(dataset)
        make_dataset(tmp_path / "Data", references=12)
        assert world.judge()["serves"] == "int8"

    def test_verdict_without_dataset_fp32_is_used(self, tmp_path: Path, make_config: Callable[..., Config]) -> None:
        """A root that is not mounted is no error of an export."""
        world = World(make_config(root=tmp_path / "nowhere"))
        assert world.judge()["serves"] == "fp32"
        assert "-onnx-fp32-" in world.load().encoder_id

    def test_verdict_references_differ_fp32_is_used(self, tmp_path: Path, make_config: Callable[..., Config]) -> None:
        """A verdict on other files does not count."""
        make_dataset(tmp_path / "Data", references=12)
        world = World(make_config())
        assert world.judge()["serves"] == "int8"
        spoil_int8(world.exports())
        assert read_verdict(world.exports(), world.config.root) is None
        assert "-onnx-fp32-" in world.load().encoder_id
        assert "synthetic images differ" in world.judge()["refusal"]
        assert "-onnx-fp32-" in world.load().encoder_id

    def test_verdict_int8_hurts_one_class_is_refused(self, tmp_path: Path, make_config: Callable[..., Config]) -> None:
        """Also if float32's rows, and int8's before the damage, are in the cache: its files identify its rows."""
        make_dataset(tmp_path / "Data", references=12)
        world = World(make_config())
        assert world.judge()["serves"] == "int8"
        spoil_red_images(world.exports())
        verdict = world.judge()
        assert "the embeddings of Colours differ: mean cosine" in verdict["refusal"]
        assert verdict["probe_cosine"] > 0.99
        assert "-onnx-fp32-" in world.load().encoder_id

    def test_verdict_encodes_nothing_that_is_cached(
        self, tmp_path: Path, make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """After torch only int8 sees the references, each decoded once; its first start encodes no image again."""
        make_dataset(tmp_path / "Data", references=12)
        encoded = count_images(monkeypatch)
        config = make_config(backend="torch")
        embed_references(config)
        world = World(make_config(backend="onnx"))
        assert world.judge()["serves"] == "int8"
        assert encoded == {"fp32": PROBES, "int8": PROBES + 36}
        embed_references(world.config)
        assert encoded["int8"] - PROBES - 36 == 3  # the images by which every start tests its model
        encoded.clear()
        assert world.judge()["serves"] == "int8"
        assert encoded == dict.fromkeys(("fp32", "int8"), PROBES)

    def test_verdict_without_cached_rows_decodes_each_image_once(
        self, tmp_path: Path, make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Both precisions encode the same pixels."""
        make_dataset(tmp_path / "Data", references=12)
        asked: list[str] = []
        feed = DecoderPool.feed

        def counting(pool: DecoderPool, batch: Batch) -> None:
            waiting = [path for path, _ in batch.waiting]
            feed(pool, batch)
            asked.extend(waiting[: len(waiting) - len(batch.waiting)])

        monkeypatch.setattr(DecoderPool, "feed", counting)
        encoded = count_images(monkeypatch)
        assert World(make_config()).judge()["serves"] == "int8"
        assert (len(asked), len(set(asked))) == (36, 36)
        assert encoded == dict.fromkeys(("fp32", "int8"), PROBES + 36)

    def test_verdict_int8_does_not_run_is_refused(self, tmp_path: Path, make_config: Callable[..., Config]) -> None:
        """The refusal contains the error."""
        make_dataset(tmp_path / "Data", references=12)
        world = World(make_config())
        damage(world.exports(), Precision.INT8)
        assert "could not be compared with fp32: ONNX Runtime does not open" in world.judge()["refusal"]

    def test_verdict_with_a_damaged_journal_is_refused(
        self, tmp_path: Path, make_config: Callable[..., Config]
    ) -> None:
        """The corrections in it are part of the references; the export stands, and other commands work."""
        dataset = make_dataset(tmp_path / "Data", references=4)
        world = World(make_config(learn_from_corrections=True))
        journal = Layout(dataset).state_folder(world.config.state_dir) / "journal.sqlite"
        journal.parent.mkdir(parents=True)
        journal.write_bytes(b"no database")
        assert "could not be compared with fp32" in world.judge()["refusal"]

    def test_verdict_damaged_is_ignored(self, tmp_path: Path, make_config: Callable[..., Config]) -> None:
        """float32 is used; a verdict counts for one root only."""
        make_dataset(tmp_path / "Data", references=12)
        world = World(make_config())
        world.judge()
        assert read_verdict(world.exports(), tmp_path / "another") is None
        (file,) = world.exports().folder.glob("int8-*.json")
        for damaged in ("", "[]", '{"datasets": {"Colours": {}}}', '{"export": 1}'):
            file.write_text(damaged)
            assert read_verdict(world.exports(), world.config.root) is None
        assert "-onnx-fp32-" in world.load().encoder_id
        assert "not compared on these datasets; run `sortd models export`" in world.reports[-1]

    def test_load_fastest_writes_nothing(self, tmp_path: Path, make_config: Callable[..., Config]) -> None:
        """Without a verdict float32 is used, without an export torch, with a warning."""
        make_dataset(tmp_path / "Data", references=12)
        world = World(make_config())
        world.exports()  # the hashes of the files are remembered from here on,
        world.load()  # and the rows of the probe images from the first start on
        before = tree(tmp_path / "cache")
        assert "-onnx-fp32-" in world.load().encoder_id
        assert tree(tmp_path / "cache") == before
        for backend in ("auto", "onnx"):
            world.config = make_config(backend=backend)
            (world.exports().folder / "image.onnx").write_bytes(b"damaged")
            assert "-torch-" in world.load().encoder_id
            line = world.lines.pop()
            assert (line["event"], line["backend"], line["log_level"]) == (logs.MODEL_FELL_BACK, "torch", "warning")
            assert "run `sortd models export`" in line["error"]
            shutil.rmtree(tmp_path / "cache")


class TestBackend:
    """The selection of a backend and its report."""

    def test_load_fastest_auto_without_export_is_torch(
        self, tmp_path: Path, make_config: Callable[..., Config]
    ) -> None:
        """The report names the command that exports."""
        config = make_config(backend="auto")
        shutil.rmtree(tmp_path / "cache" / "onnx")
        world = World(config)
        assert "-torch-" in world.load().encoder_id
        assert "`sortd models export`" in world.reports[0]

    def test_export_unwritable_cache_raises(self, make_config: Callable[..., Config]) -> None:
        """The command fails."""
        world = World(make_config(backend="onnx"))
        folder = world.exports().folder
        (folder / "image.onnx").write_bytes(b"damaged")
        lock = Path(f"{folder}.lock")
        lock.unlink(missing_ok=True)
        lock.mkdir()
        with pytest.raises(ModelError, match="cannot export"):
            export(world.config)

    def test_load_fastest_missing_model_raises(self, make_config: Callable[..., Config]) -> None:
        """Nothing is reported about the backend."""
        world = World(make_config(backend="auto", model="clip-ViT-L-14"))
        with pytest.raises(ModelError, match="is not on this machine"):
            world.load()
        assert not world.lines
        assert not world.reports

    def test_load_fastest_falls_back_with_a_warning(self, tmp_path: Path, make_config: Callable[..., Config]) -> None:
        """From int8 to float32, and with `auto` to torch; with `onnx` it is an error."""
        make_dataset(tmp_path / "Data", references=12)
        world = World(make_config(backend="auto"))
        verdict = world.judge()
        assert "-onnx-int8-" in world.load().encoder_id
        damage(world.exports(), Precision.INT8)
        exports.write_verdict(world.exports(), world.config.root, verdict)
        assert "-onnx-fp32-" in world.load().encoder_id
        assert "int8 is not used: ONNX Runtime does not open" in world.reports[-1]
        damage(world.exports(), Precision.FP32)
        assert "-torch-" in world.load().encoder_id
        fallen = [line["backend"] for line in world.lines if line["event"] == logs.MODEL_FELL_BACK]
        assert fallen == ["onnx fp32", "torch"]
        world.config = make_config(backend="onnx")
        with pytest.raises(ModelError, match="does not open"):
            world.load()

    def test_encoder_id_of_repeated_quantisation_differs(
        self, tmp_path: Path, make_config: Callable[..., Config]
    ) -> None:
        """Its measured ranges may differ, so embeddings are not mixed."""
        make_dataset(tmp_path / "Data", references=12)
        world = World(make_config())
        before = {one: OnnxEncoder(world.exports(), one, threads=1).encoder_id for one in Precision}
        spoil_int8(world.exports())
        after = {one: OnnxEncoder(world.exports(), one, threads=1).encoder_id for one in Precision}
        assert before[Precision.FP32] == after[Precision.FP32]
        assert before[Precision.INT8] != after[Precision.INT8]


class TestSample:
    """An even and repeatable sample of many references."""

    @staticmethod
    def folders(classes: int, each: int) -> list[ClassFolder]:
        """Classes of so many files, and one of strangers."""
        from sortd.events import Stamp

        files = tuple((f"{number:05d}.png", Stamp(1, number, 1, 1)) for number in range(each))
        return [ClassFolder(label, files, ()) for label in ("_none", *(f"c{one:05d}" for one in range(classes)))]

    def test_sample_small_library_is_complete(self) -> None:
        """Without the images that belong to no class."""
        assert sample(self.folders(10, 50)) == self.folders(10, 50)[1:]

    @pytest.mark.parametrize(("classes", "each"), [(2, 5000), (100, 30), (10_000, 3), (10_000, 100)])
    def test_sample_large_library_is_reduced(self, classes: int, each: int) -> None:
        """Enough references of each class remain to be left out."""
        chosen = sample(self.folders(classes, each))
        assert sum(len(folder.files) for folder in chosen) <= MAX_REFERENCES
        assert {len(folder.files) for folder in chosen} == {min(each, MAX_PER_CLASS)}
        assert len({folder.label for folder in chosen}) >= min(classes, 33)

    def test_sample_smaller_is_part_of_a_larger(self) -> None:
        """So that what the first step encoded is used in the second."""
        folders = self.folders(100, 30)
        first, second = (
            {(folder.label, path) for folder in sample(folders, most=most) for path, _ in folder.files}
            for most in (400, MAX_REFERENCES)
        )
        assert first < second
        assert len(first) == 400


def test_daemon_with_int8_never_loads_torch(tmp_path: Path, make_config: Callable[..., Config]) -> None:
    """The real program files an image, and its process never maps torch's library."""
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


def test_daemon_other_backend_rebuilds_the_prototypes(tmp_path: Path, make_config: Callable[..., Config]) -> None:
    """Embeddings of two backends are never mixed."""
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


def test_commands_print_facts_to_stdout_only(
    tmp_path: Path, make_config: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    """The verdict is a fact; a fallback to torch is reported on stderr, and `check` says what to do."""
    structlog.reset_defaults()  # a command runs in a process where no log was set up; capturing counts as setting up
    make_dataset(tmp_path / "Data", references=4)
    config = tmp_path / "config.yaml"
    make_config(mode="max")
    facts = sortd("models", "export", "-c", config, "--json").facts
    assert (facts["name"], facts["export"]["precisions"]) == ("onnx", ["fp32", "int8"])
    assert (facts["agreement"]["serves"], facts["agreement"]["filed"]) == ("fp32", 12)
    assert "fp32 is used, not int8: only 12 left-out references" in sortd("models", "-c", config).out
    with_torch = sortd("models", "-c", config, environment={"SORTD_BACKEND": "torch"}).out
    assert "Backend: torch" in with_torch
    assert "fp32 is used" not in with_torch
    assert "fp32 is used, not int8" in sortd("check", "-c", config, "--json").out
    shutil.rmtree(tmp_path / "cache" / "onnx")
    ran = sortd("eval", "-c", config, "--json")
    assert ran.facts["datasets"]["Colours"]["encoder_id"].count("-torch-") == 1
    assert "model.fell_back: the export to ONNX is missing" in caplog.text
    assert "sortd models export" in sortd("check", "-c", config, "--json").out
    assert "Backend: torch, since the export to ONNX is missing" in sortd("models", "-c", config).out
