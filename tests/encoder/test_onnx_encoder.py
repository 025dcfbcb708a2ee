"""ONNX Runtime gives torch's rows without torch, from verified exports, and in int8 with scales by row."""

import json
import resource
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from sortd.encoder import export as onnx_export
from sortd.encoder import models
from sortd.encoder import onnx_encoder as exports
from sortd.encoder.backends import choose_backend, load_model, torch_can_use_gpu
from sortd.encoder.models import LocatedModel, ModelFolder
from sortd.encoder.onnx_encoder import (
    Exports,
    OnnxEncoder,
    Precision,
    can_use_gpu,
    device_name,
    provider_attempts,
)
from sortd.encoder.quantize import FULL_RANGE, REDUCED_RANGE, quantize, weight_range
from sortd.errors import ModelError
from tests.tiny_clip import DIMENSIONS, SIDE
from tests.tiny_words import build_near_clip, build_roberta_words, build_tiny_words, distil, without_limit

pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

ROOT = Path(__file__).parents[2]
TEXTS = ["a photo of a screw", "x", "a " * 200, "ñandú ü 漢字", "two words", "torn\udcffillo"]
EXACT = 0.9999
"""The least cosine between a row of torch and one of ONNX Runtime in float32."""


def pixels(count: int, side: int = SIDE) -> npt.NDArray[np.uint8]:
    """Images that differ: noise on ramps of several colours."""
    chance = np.random.default_rng(5)
    ramp = np.linspace(0, 200, side)[None, None, :, None] * chance.random((count, 1, 1, 3))
    return (ramp + chance.integers(0, 56, (count, side, side, 3))).astype(np.uint8)


def lowest_cosine(left: npt.NDArray[np.float32], right: npt.NDArray[np.float32]) -> float:
    """The least cosine between paired unit rows."""
    return float((left * right).sum(axis=1).min())


def never(into: Path) -> None:
    """Nothing is to be exported."""
    raise AssertionError(into)


def open_export(exported: Exports, precision: Precision = Precision.FP32, **settings: Any) -> OnnxEncoder:
    """An encoder on one thread."""
    return OnnxEncoder(exported, precision, threads=1, **settings)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder that the tests of this file share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def clip(tiny_clip: Path) -> ModelFolder:
    """The tiny model."""
    return models.locate_clip(str(tiny_clip))


@pytest.fixture(scope="module")
def exported(clip: ModelFolder, cache: Path) -> Exports:
    """Its exports, made as sortd makes them; int8 is kept though it does not pay at this size."""
    return onnx_export.make_exports(LocatedModel(clip, None, cache), min_gain=0.0)


@pytest.fixture
def copied(exported: Exports, tmp_path: Path) -> Exports:
    """The exports in a cache that a test may spoil."""
    shutil.copytree(exported.folder, tmp_path / "onnx" / exported.folder.name)
    found = exports.find_exports(replace(exported.model, cache_dir=tmp_path))
    assert found is not None
    return found


class TestRows:
    """The rows are those of torch."""

    def test_onnx_fp32_gives_the_rows_of_torch(self, exported: Exports, tiny_clip: Path) -> None:
        """For one image, few, and more than a batch; for short, long and foreign texts."""
        torch, onnx = load_model(str(tiny_clip), backend="torch"), open_export(exported)
        for count in (1, 3, 19):
            seen = pixels(count)
            assert lowest_cosine(torch.encode_images(seen), onnx.encode_images(seen)) > EXACT
        for texts in (TEXTS[:1], TEXTS):
            assert lowest_cosine(torch.encode_texts(texts), onnx.encode_texts(texts)) > EXACT
        assert (onnx.dimensions, onnx.has_text) == (DIMENSIONS, True)
        assert onnx.preprocessing == torch.preprocessing

    def test_onnx_packaged_model_gives_the_rows_of_torch(self, cache: Path) -> None:
        """It is a convolutional network beside a BERT; its convolutions are in int8, too."""
        made = onnx_export.make_exports(models.locate_pair("packaged", None, cache), min_gain=0.0)
        onnx, quick = open_export(made), open_export(made, Precision.INT8)
        torch = load_model("packaged", backend="torch")
        seen = pixels(3, torch.preprocessing.crop_height)
        assert lowest_cosine(torch.encode_images(seen), onnx.encode_images(seen)) > EXACT
        assert lowest_cosine(torch.encode_texts(TEXTS), onnx.encode_texts(TEXTS)) > EXACT
        rounded = quick.encode_images(seen)
        assert lowest_cosine(torch.encode_images(seen), rounded) > 0.98
        assert np.array_equal(rounded[1:2], quick.encode_images(seen[1:2]))
        assert not list(made.folder.glob("*candidate*"))
        assert not list(made.folder.glob("*between*"))

    @pytest.mark.parametrize("shape", ["another CLIP", "several modules", "no limit"])
    def test_export_includes_the_text_model(self, clip: ModelFolder, tmp_path: Path, shape: str) -> None:
        """Long texts are cut where torch cuts them."""
        match shape:
            case "another CLIP":
                other = build_near_clip(tmp_path / "words", clip.folder)
            case "several modules":
                other = distil(build_tiny_words(tmp_path / "words"), clip.folder)
            case _:
                other = without_limit(distil(build_roberta_words(tmp_path / "words"), clip.folder))
        words = models.locate_text(str(other))
        onnx = open_export(onnx_export.make_exports(LocatedModel(clip, words, tmp_path / "cache")))
        torch = load_model(str(clip.folder), text_model=str(other), backend="torch")
        texts = [*TEXTS, "a b " * 50]
        assert lowest_cosine(torch.encode_texts(texts), onnx.encode_texts(texts)) > EXACT
        assert lowest_cosine(torch.encode_images(pixels(2)), onnx.encode_images(pixels(2))) > EXACT

    def test_onnx_int8_is_near_and_has_its_own_id(self, exported: Exports) -> None:
        """Its rows are never mixed with those of float32."""
        exact, quick = open_export(exported), open_export(exported, Precision.INT8)
        assert 0.98 < lowest_cosine(exact.encode_images(pixels(8)), quick.encode_images(pixels(8))) < 1 - 1e-7
        assert lowest_cosine(exact.encode_texts(TEXTS), quick.encode_texts(TEXTS)) > 0.98
        assert exact.encoder_id != quick.encoder_id
        assert "-onnx-fp32-" in exact.encoder_id
        assert "-onnx-int8-" in quick.encoder_id

    @pytest.mark.parametrize("precision", Precision)
    def test_onnx_row_is_independent_of_its_batch(self, exported: Exports, precision: Precision) -> None:
        """In int8, too: each row has its own scale."""
        encoder = open_export(exported, precision)
        seen = pixels(11)
        seen[3] = 255
        together = encoder.encode_images(seen)
        alone = np.concatenate([encoder.encode_images(seen[i : i + 1]) for i in range(len(seen))])
        assert np.abs(together - alone).max() < 1e-6
        words = encoder.encode_texts(TEXTS)
        assert np.abs(words - np.concatenate([encoder.encode_texts([text]) for text in TEXTS])).max() < 1e-5

    def test_onnx_encoder_id_includes_the_decoding(self, exported: Exports) -> None:
        """JPEGs decoded at 1/8 have slightly other pixels."""
        assert open_export(exported).encoder_id == open_export(exported, decoding="draft").encoder_id
        assert open_export(exported).encoder_id != open_export(exported, decoding="full").encoder_id

    def test_onnx_empty_batch_and_wrong_pixels(self, exported: Exports) -> None:
        """No rows of the right width, and a ValueError."""
        encoder = open_export(exported)
        assert encoder.encode_images(np.empty((0, SIDE, SIDE, 3), np.uint8)).shape == (0, DIMENSIONS)
        assert encoder.encode_texts([]).shape == (0, DIMENSIONS)
        with pytest.raises(ValueError, match="not uint8"):
            encoder.encode_images(np.zeros((1, SIDE, SIDE + 1, 3), np.uint8))


def test_onnx_imports_no_torch(exported: Exports, cache: Path, tiny_clip: Path) -> None:
    """A process that loads and encodes with ONNX Runtime imports no slow library."""
    program = (
        "import sys; from pathlib import Path; import numpy as np; from sortd.encoder.backends import load_model\n"
        "encoder = load_model(sys.argv[1], backend=sys.argv[3], cache_dir=Path(sys.argv[2]))\n"
        f"encoder.encode_images(np.zeros((2, {SIDE}, {SIDE}, 3), np.uint8)); encoder.encode_texts(['a photo'])\n"
        "slow = {'torch', 'transformers', 'sentence_transformers', 'sklearn', 'scipy', 'onnx', 'huggingface_hub'}\n"
        "print(encoder.encoder_id, sorted(slow & set(sys.modules)))"
    )
    for backend, precision in (("auto", "fp32"), ("onnx-int8", "int8")):
        command = [sys.executable, "-c", program, str(tiny_clip), str(cache), backend]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
        encoder_id, known = done.stdout.split(maxsplit=1)
        assert (encoder_id, known.strip()) == (open_export(exported, Precision(precision)).encoder_id, "[]")


def test_load_model_leaves_memory_settings_of_the_program(exported: Exports, tiny_clip: Path, cache: Path) -> None:
    """Arrays of a program that uses the library keep the memory that the C library reuses: no page fault for each."""
    program = (
        "import resource, sys; from pathlib import Path; import numpy as np\n"
        "from sortd.encoder.backends import load_model\n"
        "def faults():\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "encoder = load_model(sys.argv[1], backend='onnx', device='cpu', cache_dir=Path(sys.argv[2]))\n"
        "for _ in range(5): np.ones(500_000)\n"
        "before = faults()\n"
        "for _ in range(50): np.ones(500_000)\n"
        "print((faults() - before) // 50)"
    )
    command = [sys.executable, "-c", program, str(tiny_clip), str(cache)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert exported.folder.is_relative_to(cache)
    assert int(done.stdout) < 50


class TestExports:
    """An export is made once, and again if it is no longer valid."""

    def test_export_twice_makes_one(self, exported: Exports, cache: Path) -> None:
        """The existing export is found by content."""
        assert exports.find_exports(exported.model) == exported
        assert onnx_export.make_exports(exported.model, write=never) == exported
        assert exported.precisions == (Precision.FP32, Precision.INT8)
        assert not list(cache.glob("onnx/*.part"))
        assert not list(cache.glob("onnx/*.old"))

    def test_find_exports_depends_on_the_content_of_the_model(
        self, exported: Exports, cache: Path, tmp_path: Path
    ) -> None:
        """A renamed copy has the same export, a changed configuration has none."""
        place = Path(shutil.copytree(exported.model.clip.folder, tmp_path / "copy"))
        copy = exports.find_exports(models.locate_pair(str(place), None, cache))
        assert copy is not None
        assert copy.folder == exported.folder
        config = place / "config.json"
        config.write_text(config.read_text() + "\n")
        changed = models.locate_pair(str(place), None, cache)
        assert exports.find_exports(changed) is None
        assert choose_backend("auto", changed, device="cpu").name == "torch"

    @pytest.mark.parametrize("damage", ["a byte", "cut", "gone", "old", "no manifest", "garbage"])
    def test_export_damaged_or_outdated_is_made_again(self, copied: Exports, damage: str) -> None:
        """It is never used as it is."""
        image, manifest = copied.tower("image", Precision.FP32), copied.folder / exports.MANIFEST
        match damage:
            case "a byte":
                content = bytearray(image.read_bytes())
                content[len(content) // 2] ^= 1
                image.write_bytes(content)
            case "cut":
                image.write_bytes(image.read_bytes()[:1000])
            case "gone":
                image.unlink()
            case "old":
                said = json.loads(manifest.read_text())
                manifest.write_text(json.dumps(said | {"identity": "another version"}))
            case "no manifest":
                manifest.unlink()
            case "garbage":
                manifest.write_text('{"identity": []}')
        assert exports.find_exports(copied.model) is None
        again: list[Path] = []

        def put_back(into: Path) -> None:
            again.append(into)
            made = dict.fromkeys(("image.onnx", "text.onnx"), b"made again")
            for name, content in made.items():
                (into / name).write_bytes(content)
            sums = models.checksums([into / name for name in made])
            fresh = replace(
                copied.manifest,
                identity=exports.export_identity(copied.model),
                checksums={path.name: checksum for path, checksum in sums.items()},
            )
            (into / exports.MANIFEST).write_bytes(exports.MANIFESTS.dump_json(fresh))

        made = onnx_export.make_exports(copied.model, write=put_back)
        assert len(again) == 1
        assert made.tower("image", Precision.FP32).read_bytes() == b"made again"
        assert sorted(path.name for path in made.folder.iterdir()) == ["image.onnx", "manifest.json", "text.onnx"]

    @pytest.mark.parametrize(
        ("made_for", "here", "serves"),
        [
            (REDUCED_RANGE, REDUCED_RANGE, True),
            (REDUCED_RANGE, FULL_RANGE, True),
            (FULL_RANGE, FULL_RANGE, True),
            (FULL_RANGE, REDUCED_RANGE, False),
        ],
    )
    def test_find_exports_of_another_processor_is_valid_without_overflow(
        self, copied: Exports, made_for: int, here: int, *, serves: bool
    ) -> None:
        """The manifest has the range of the weights."""
        manifest = replace(copied.manifest, weight_range=made_for)
        (copied.folder / exports.MANIFEST).write_bytes(exports.MANIFESTS.dump_json(manifest))
        assert (exports.find_exports(copied.model, largest=here) is not None) == serves

    def test_export_failed_keeps_the_old_one(self, copied: Exports, tmp_path: Path) -> None:
        """The message says why, and no temporary file remains."""
        spoilt = tmp_path / "spoilt"
        shutil.copytree(copied.model.clip.folder, spoilt)
        (spoilt / "model.safetensors").write_bytes(b"\x00\xff" * 5000)
        model = models.locate_pair(str(spoilt), None, tmp_path)
        with pytest.raises(ModelError, match=r"cannot export .*does not load.*set `backend: torch`"):
            onnx_export.make_exports(model)
        assert exports.find_exports(copied.model) == copied
        assert [path.suffix for path in (tmp_path / "onnx").iterdir() if path.is_dir()] == [""]

    def test_export_two_at_once_make_one(self, exported: Exports, tmp_path: Path) -> None:
        """The second waits, reports it, and uses the export of the first."""
        made: list[Path] = []
        both_began = threading.Barrier(2)

        def copy_it(into: Path) -> None:
            made.append(into)
            shutil.copytree(exported.folder, into, dirs_exist_ok=True)

        def tell(what: str) -> None:
            assert "waiting for another export of the same model" in what
            both_began.wait(60)

        def make() -> Exports:
            here = replace(exported.model, cache_dir=tmp_path)
            return onnx_export.make_exports(here, on_progress=tell, write=copy_it)

        with ThreadPoolExecutor(2) as threads:
            first, second = [threads.submit(make) for _ in range(2)]
            assert first.result(60) == second.result(60)
        assert len(made) == 1

    def test_export_after_a_killed_process_succeeds(self, exported: Exports, tmp_path: Path) -> None:
        """Its folder is removed, and a child that still runs does not write into the new one."""
        model = replace(exported.model, cache_dir=tmp_path)
        folder = exports.export_folder(model)
        left = [folder.with_name(f"{folder.name}.{name}") for name in ("123.part", "part")]
        for place in left:
            place.mkdir(parents=True)
            (place / "image.onnx").write_bytes(b"half")

        def copy_it(into: Path) -> None:
            assert into not in left
            assert not any(place.exists() for place in left)
            shutil.copytree(exported.folder, into, dirs_exist_ok=True)

        onnx_export.make_exports(model, write=copy_it)
        assert [path.name for path in (tmp_path / "onnx").iterdir() if path.is_dir()] == [folder.name]

    def test_export_on_a_full_disk_names_the_disk(self, clip: ModelFolder, tmp_path: Path) -> None:
        """Nothing incomplete remains; here the kernel refuses files over 20 kB."""
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        try:
            with pytest.raises(ModelError, match=rf"{tmp_path}.*: File too large; make room there; or set `backend"):
                onnx_export.make_exports(LocatedModel(clip, None, tmp_path))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert not [path for path in (tmp_path / "onnx").iterdir() if path.is_dir()]

    def test_describe_failure_on_a_full_disk_names_it(self, tmp_path: Path) -> None:
        """Libraries raise unrelated errors then."""
        error = ValueError("Wire format was corrupt")
        assert onnx_export.describe_failure(error, tmp_path) == "ValueError: Wire format was corrupt"
        full = onnx_export.describe_failure(error, tmp_path, usage=lambda _: SimpleNamespace(free=4096))
        assert full == f"{tmp_path}: the disk is full; make room there"

    def test_check_disk_space_too_small_raises(self, clip: ModelFolder, tmp_path: Path) -> None:
        """Before the export begins."""
        model, plenty = LocatedModel(clip), SimpleNamespace(free=10 * clip.size_bytes)
        onnx_export.check_disk_space(model, tmp_path, usage=lambda _: plenty)
        with pytest.raises(ModelError, match=r"it takes up to 1 MB in .*, where 0 MB are free; make room there"):
            onnx_export.check_disk_space(model, tmp_path, usage=lambda _: SimpleNamespace(free=clip.size_bytes))

    def test_compare_images_other_rows_raise(self, copied: Exports) -> None:
        """The export is compared with torch."""
        from sortd.encoder.clip import TorchEncoder

        encoder = TorchEncoder(copied.model, device="cpu", threads=1)
        onnx_export._compare_images(encoder, copied.folder)
        encoder.shift += 1.0
        with pytest.raises(ModelError, match="gives other rows than torch for 1 images"):
            onnx_export._compare_images(encoder, copied.folder)

    def test_quantize_towers_small_gain_is_not_kept(self, copied: Exports) -> None:
        """The message of a request for int8 says so."""
        assert onnx_export._quantize_towers(copied.folder, 1e6, copied.manifest.preprocessing) < 1e6
        assert not copied.tower("image", Precision.INT8).exists()
        sums = {name: one for name, one in copied.manifest.checksums.items() if "int8" not in name}
        manifest = replace(copied.manifest, gain=1.1, checksums=sums)
        without = Exports(copied.folder, copied.model, manifest)
        assert without.precisions == (Precision.FP32,)
        with pytest.raises(ModelError, match=r"has no int8 export, since int8 was only 1\.10 times"):
            open_export(without, Precision.INT8)

    def test_onnx_invalid_file_is_refused(self, copied: Exports) -> None:
        """The message says what to do."""
        copied.tower("image", Precision.FP32).write_bytes(b"no graph")
        with pytest.raises(ModelError, match=r"ONNX Runtime does not open .*image.onnx"):
            open_export(copied)

    def test_load_without_onnx_runtime_says_what_to_install(self, tiny_clip: Path, cache: Path) -> None:
        """`onnx` fails, and `auto` selects torch."""
        program = (
            "import sys; sys.modules['onnxruntime'] = None\n"
            "from pathlib import Path; from sortd.encoder.backends import choose_backend, load_model\n"
            "from sortd.encoder import models; from sortd.errors import ModelError\n"
            "try: load_model(sys.argv[1], backend='onnx', cache_dir=Path(sys.argv[2]))\n"
            "except ModelError as error: print(error)\n"
            "model = models.locate_pair(sys.argv[1], None, Path(sys.argv[2]))\n"
            "print(choose_backend('auto', model, device='cpu').name)"
        )
        command = [sys.executable, "-c", program, str(tiny_clip), str(cache)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
        message, automatic = done.stdout.splitlines()
        assert "pip install 'sortd-images[onnx]'" in message
        assert automatic == "torch"


class TestBackends:
    """Which backend runs a model, and why."""

    @pytest.mark.parametrize(
        ("wanted", "expected"),
        [
            (("torch", "auto", "no GPU"), ("torch", "is configured")),
            (("onnx", "auto", "a GPU"), ("onnx", "is configured")),
            (("auto", "auto", "no GPU"), ("onnx", "exported before")),
            (("auto", "cpu", "a GPU"), ("onnx", "exported before")),
            (("auto", "auto", "a GPU"), ("torch", "this ONNX Runtime cannot")),
            (("auto", "auto", "torch without CUDA"), ("onnx", "exported before")),
            (("auto", "cuda", "no GPU"), ("torch", "this ONNX Runtime cannot")),
            (("auto", "mps", "no GPU"), ("torch", "this ONNX Runtime cannot")),
        ],
    )
    def test_choose_backend_with_an_export(
        self, exported: Exports, wanted: tuple[str, str, str], expected: tuple[str, str]
    ) -> None:
        """`auto` selects ONNX Runtime, unless only torch can use the device."""
        if can_use_gpu(exports.available_providers(), is_there=lambda _: True):
            pytest.skip("this ONNX Runtime has CUDA")
        backend, device, machine = wanted
        chosen = choose_backend(
            backend, exported.model, device=device,
            torch="2.13.0+cpu" if machine == "torch without CUDA" else "2.13.0",
            is_there=lambda _: machine != "no GPU",
        )  # fmt: skip
        assert chosen.name == expected[0]
        assert expected[1] in chosen.why

    def test_choose_backend_without_an_export_selects_torch(self, clip: ModelFolder, tmp_path: Path) -> None:
        """The reason names the command that exports."""
        chosen = choose_backend("auto", LocatedModel(clip, None, tmp_path), device="cpu")
        assert (chosen.name, "sortd models export" in chosen.why) == ("torch", True)
        assert choose_backend("auto", LocatedModel(clip), device="cpu").name == "torch"

    @pytest.mark.parametrize(
        ("device", "built", "there", "expected"),
        [
            ("auto", "CUDA", "/dev/nvidiactl", ["CUDA", "CPU"]),
            ("auto", "CUDA", "", ["CPU"]),
            ("auto", "ROCM", "/dev/kfd", ["ROCm", "CPU"]),
            ("auto", "Azure", "/dev/nvidiactl", ["CPU"]),
            ("cpu", "CUDA", "/dev/nvidiactl", ["CPU"]),
            ("cuda:1", "CUDA", "", ["CUDA"]),
        ],
    )
    def test_provider_attempts_existing_gpu_comes_first(
        self, device: str, built: str, there: str, expected: list[str]
    ) -> None:
        """A configured GPU is never skipped."""
        available = [f"{built}ExecutionProvider", "CPUExecutionProvider"]
        ways = provider_attempts(device, available, is_there=lambda path: str(path) == there)
        assert [device_name([way[0] if isinstance(way[0], str) else way[0][0]]) for way in ways] == expected
        assert all(way[-1] == "CPUExecutionProvider" for way in ways)
        if device == "cuda:1":
            assert ways[0][0][1]["device_id"] == 1

    def test_encoder_runs_on_names_the_used_device(self, exported: Exports, tiny_clip: Path) -> None:
        """Not the requested one."""
        assert open_export(exported, device="cpu").runs_on == "CPU"
        torch = load_model(str(tiny_clip), backend="torch", device="cpu")
        assert (getattr(torch, "runs_on", None), torch_can_use_gpu(torch="2.13.0+cpu")) == ("CPU", False)

    @pytest.mark.parametrize(("device", "complaint"), [("cuda:1", "has no CUDA"), ("mps", "works only with torch")])
    def test_onnx_unsupported_device_is_refused(self, exported: Exports, device: str, complaint: str) -> None:
        """The message says what to set."""
        with pytest.raises(ModelError, match=complaint):
            open_export(exported, device=device)


class TestQuantization:
    """Matrix products in int8 are the exact ones, up to the rounding."""

    @pytest.fixture
    def graph(self, tmp_path: Path) -> Path:
        """A product, and one that is stored transposed and has a bias, with activations of unlike size by row."""
        from onnx import TensorProto, checker, helper, numpy_helper, save

        chance = np.random.default_rng(0)
        weights = [
            numpy_helper.from_array(chance.normal(0, 1, shape).astype(np.float32), name)
            for name, shape in (("first", (16, 8)), ("second", (5, 8)), ("bias", (5,)))
        ]
        nodes = [
            helper.make_node("MatMul", ["x", "first"], ["middle"]),
            helper.make_node("Gemm", ["middle", "second", "bias"], ["y"], transB=1),
        ]
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 16])]
        outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 5])]
        model = helper.make_model(
            helper.make_graph(nodes, "small", inputs, outputs, weights),
            opset_imports=[helper.make_opsetid("", exports.OPSET)],
            ir_version=8,
        )
        checker.check_model(model)
        save(model, str(tmp_path / "exact.onnx"))
        return tmp_path / "exact.onnx"

    @pytest.mark.parametrize(
        ("largest", "engine"),
        [(FULL_RANGE, "reference"), (REDUCED_RANGE, "reference"), (REDUCED_RANGE, "ONNX Runtime")],
    )
    def test_quantize_any_range_rounds_each_row_by_itself(self, graph: Path, largest: int, engine: str) -> None:
        """A row a thousand times as large takes no precision from a small one, and a row of zeros stays zero.

        The full range is computed by the reference evaluator, whose products are exact on every processor; the reduced
        range is exact in ONNX Runtime on every processor too.
        """
        from onnx.reference import ReferenceEvaluator

        from sortd.encoder.onnx_encoder import open_tower

        quick = graph.with_name("quick.onnx")
        assert quantize(graph, quick, largest=largest) == 2
        rows = np.random.default_rng(1).normal(0, 1, (4, 16)).astype(np.float32)
        rows[1] *= 1000
        rows[2] = 0
        exact = open_tower(graph, threads=1).run(None, {"x": rows})[0]
        tower = open_tower(quick, threads=1) if engine == "ONNX Runtime" else ReferenceEvaluator(str(quick))
        rounded = tower.run(None, {"x": rows})[0]
        step = 0.03 * FULL_RANGE / largest
        assert np.abs(exact - rounded)[[0, 3]].max() < step * np.abs(exact[[0, 3]]).max()
        assert np.abs(exact - rounded)[1].max() < step * np.abs(exact[1]).max()
        assert np.allclose(exact[2], rounded[2])

    def test_quantize_without_products_writes_nothing(self, graph: Path) -> None:
        """A graph in int8 has no product left."""
        quick = graph.with_name("quick.onnx")
        quantize(graph, quick, largest=REDUCED_RANGE)
        assert quantize(quick, graph.with_name("twice.onnx"), largest=REDUCED_RANGE) == 0
        assert not graph.with_name("twice.onnx").exists()

    @pytest.mark.parametrize(
        ("machine", "flags", "expected"),
        [
            ("x86_64", "fpu avx2 avx512f", REDUCED_RANGE),
            ("x86_64", "fpu avx2 avx512_vnni", FULL_RANGE),
            ("x86_64", "fpu avx2 avx_vnni", FULL_RANGE),
            ("x86_64", None, REDUCED_RANGE),
            ("aarch64", None, FULL_RANGE),
        ],
    )
    def test_weight_range_without_vnni_is_reduced(
        self, tmp_path: Path, machine: str, flags: str | None, expected: int
    ) -> None:
        """On x86 without VNNI."""
        place = tmp_path / "cpuinfo"
        if flags is not None:
            place.write_text(f"flags\t\t: {flags}\n")
        assert weight_range(machine=machine, processor=place) == expected
