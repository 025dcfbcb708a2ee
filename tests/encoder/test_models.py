"""Models are found without the network, refused with a remedy, and identified by content."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sortd.config import read_config
from sortd.encoder import models
from sortd.encoder.models import ModelFolder, Use, check_modes, verify_clip
from sortd.encoder.published import PUBLISHED
from sortd.errors import ConfigError, ModelError
from tests.command_line import sortd, write_config
from tests.daemon_process import PATIENCE_SECONDS

CLIP = {"model_type": "clip", "architectures": ["CLIPModel"], "text_config": {}, "vision_config": {}}
VIT = {"model_type": "vit", "architectures": ["ViTModel"], "image_size": 224}
NAFLEX = CLIP | {"model_type": "siglip2", "architectures": ["Siglip2Model"]}
BERT = {"model_type": "bert", "architectures": ["BertModel"], "vocab_size": 30522}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_model(
    folder: Path, config: object = CLIP, *, weights: str = "model.safetensors", first: str = "Transformer"
) -> Path:
    """Write what says what a model is; the weights are not looked at before they are loaded."""
    module = folder / "0_CLIPModel"
    module.mkdir(parents=True)
    modules = [{"idx": 0, "name": "0", "path": "0_CLIPModel", "type": f"sentence_transformers.models.{first}"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    (module / "config.json").write_text(json.dumps(config))
    if weights:
        (module / weights).write_bytes(b"weights")
    return folder


def put_in_cache(cache: Path, name: str, config: object = CLIP) -> Path:
    """Lay a model out as the hub's client does, with its weights as a link to a blob."""
    folder = cache / f"models--{name.replace('/', '--')}"
    snapshot = write_model(folder / "snapshots" / COMMIT, config)
    weights = snapshot / "0_CLIPModel" / "model.safetensors"
    (folder / "blobs").mkdir()
    weights.rename(folder / "blobs" / "abc")
    weights.symlink_to("../../../blobs/abc")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    return snapshot


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A user whose caches are empty."""
    return {"HOME": str(tmp_path / "home")}


@pytest.fixture
def packaged(tmp_path: Path) -> Path:
    """A stand-in for the folder of the packaged model."""
    return write_model(tmp_path / "packaged")


class TestLocate:
    """A configured word becomes a folder on this disk, or an error that says what to do."""

    def test_locate_auto_prefers_the_better_model(
        self, tmp_path: Path, environment: dict[str, str], packaged: Path
    ) -> None:
        """Without it in a cache, the packaged model is selected."""
        assert models.locate_clip("auto", environment=environment, packaged=packaged).name == "packaged"
        cache = tmp_path / "home/.cache/huggingface/hub"
        snapshot = put_in_cache(cache, "sentence-transformers/clip-ViT-B-32")
        found = models.locate_clip("auto", environment=environment, packaged=packaged)
        assert (found.name, found.folder) == ("clip-ViT-B-32", snapshot)

    @pytest.mark.parametrize(
        ("variable", "below"),
        [
            ("HF_HUB_CACHE", ""),
            ("HUGGINGFACE_HUB_CACHE", ""),
            ("HF_HOME", "hub"),
            ("XDG_CACHE_HOME", "huggingface/hub"),
            ("SENTENCE_TRANSFORMERS_HOME", ""),
        ],
    )
    def test_locate_searches_the_caches_of_the_hub_client(
        self, tmp_path: Path, environment: dict[str, str], variable: str, below: str
    ) -> None:
        """Its environment variables are respected."""
        put_in_cache(tmp_path / "elsewhere" / below, "openai/clip-vit-base-patch32")
        environment[variable] = str(tmp_path / "elsewhere")
        found = models.locate_clip("openai/clip-vit-base-patch32", environment=environment)
        assert found.kind == "clip"

    def test_locate_searches_the_cache_of_sortd_first(self, tmp_path: Path, environment: dict[str, str]) -> None:
        """`sortd models fetch` writes there."""
        ours = put_in_cache(tmp_path / "cache/models", "sentence-transformers/clip-ViT-B-32")
        put_in_cache(tmp_path / "home/.cache/huggingface/hub", "sentence-transformers/clip-ViT-B-32")
        found = models.locate_clip("clip-ViT-B-32", cache_dir=tmp_path / "cache", environment=environment)
        assert found.folder == ours

    def test_locate_folder_with_or_without_modules_json_is_found(
        self, tmp_path: Path, environment: dict[str, str]
    ) -> None:
        """The second form is that of transformers."""
        folder = write_model(tmp_path / "clip")
        assert models.locate_clip(str(folder), environment=environment).folder == folder
        plain = folder / "0_CLIPModel"
        assert models.locate_clip(str(plain), environment=environment).folder == plain

    def test_locate_missing_model_says_what_to_do(
        self, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The network is not asked: the hub client's retries take 70 s."""
        asked: list[object] = []
        monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **_: asked.append(arguments))
        with pytest.raises(ModelError) as caught:
            models.locate_clip("clip-ViT-L-14", environment=environment)
        assert asked == []
        for part in ("clip-ViT-L-14", "sortd models fetch clip-ViT-L-14", "copy the model's folder", "packaged"):
            assert part in str(caught.value)

    def test_locate_missing_folder_is_named(self, tmp_path: Path, environment: dict[str, str]) -> None:
        """A path is never looked up as a name."""
        with pytest.raises(ModelError, match=r"the folder .*/nowhere does not exist"):
            models.locate_clip(str(tmp_path / "nowhere"), environment=environment)


class TestRefusals:
    """Unsuitable models are refused before anything is loaded."""

    @pytest.mark.parametrize(
        ("config", "complaint"),
        [
            (NAFLEX, r"is a siglip2, which takes images of any size.*siglip2-base-patch16-224"),
            (BERT, r"is not a CLIP: it is a BertModel \(bert\), which has no image tower"),
            ([], "is not a JSON object"),
        ],
    )
    def test_verify_other_model_is_refused(self, tmp_path: Path, config: object, complaint: str) -> None:
        """The message names its architecture."""
        with pytest.raises(ModelError, match=complaint):
            verify_clip("mine", write_model(tmp_path / "m", config))

    def test_verify_encoder_of_images_passes(self, tmp_path: Path) -> None:
        """It can decide by references alone."""
        assert verify_clip("mine", write_model(tmp_path / "m", VIT)).use is Use.IMAGES

    def test_check_modes_text_needs_a_model_that_reads(self, tmp_path: Path) -> None:
        """Of a dataset, too; all other modes do without."""
        model = verify_clip("mine", write_model(tmp_path / "m", VIT))
        reader = verify_clip("clip", write_model(tmp_path / "c"))
        for mode in ("avg", "max", "mean", "best", "mixed"):
            check_modes(read_config(write_config(tmp_path, mode=mode), os.environ), model)
        config = read_config(write_config(tmp_path, mode="text"), os.environ)
        check_modes(config, reader)
        with pytest.raises(ConfigError, match=r"`mode: text` decides by class names.*takes images only.*`best`"):
            check_modes(config, model)
        config = read_config(write_config(tmp_path, datasets={"Photos": {"mode": "text"}}), os.environ)
        with pytest.raises(ConfigError, match="`datasets: Photos: mode: text`"):
            check_modes(config, model)

    @pytest.mark.parametrize("weights", ["pytorch_model.bin", "model.pt", "model.ckpt", "weights.pkl"])
    def test_verify_pickled_weights_are_refused(self, tmp_path: Path, weights: str) -> None:
        """The message says how to convert them to safetensors."""
        with pytest.raises(ModelError, match=rf"only as {weights}.*can run code.*save it again") as caught:
            verify_clip("mine", write_model(tmp_path / "m", weights=weights))
        assert (f"sortd models convert {tmp_path / 'm'}" in str(caught.value)) == (weights == "pytorch_model.bin")

    def test_verify_safetensors_beside_a_pickle_passes(self, tmp_path: Path) -> None:
        """The pickle is ignored."""
        folder = write_model(tmp_path / "m")
        (folder / "0_CLIPModel" / "pytorch_model.bin").write_bytes(b"x")
        assert not any(path.suffix == ".bin" for path in verify_clip("mine", folder).files)

    def test_verify_pickled_dense_layer_is_refused(self, tmp_path: Path) -> None:
        """Every module is checked."""
        folder = write_model(tmp_path / "m")
        (folder / "1_Dense").mkdir()
        (folder / "1_Dense" / "pytorch_model.bin").write_bytes(b"x")
        rows = json.loads((folder / "modules.json").read_text())
        rows.append({"path": "1_Dense", "type": "sentence_transformers.models.Dense"})
        (folder / "modules.json").write_text(json.dumps(rows))
        with pytest.raises(ModelError, match=r"1_Dense has its weights only as pytorch_model\.bin"):
            verify_clip("mine", folder)

    @pytest.mark.parametrize(
        ("modules", "complaint"),
        [
            ([{"path": "", "type": "custom_clip.Model"}], r"its own code \(custom_clip.Model\)"),
            (
                [{"path": "", "type": "custom_st.Transformer"}],
                r"its own code \(custom_st.Transformer\)",
            ),  # jina-clip-v2
            ([{"path": "", "type": "sentence_transformers.models.Router"}], "first module is a Router"),
            ([{"path": "../../etc", "type": "sentence_transformers.models.Transformer"}], "outside its folder"),
            ([{"path": "/etc", "type": "sentence_transformers.models.Transformer"}], "outside its folder"),
            ({}, "not a list of modules"),
            ([], "not a list of modules"),
            (["x"], "not a list of modules"),
        ],
    )
    def test_verify_invalid_modules_are_refused(self, tmp_path: Path, modules: object, complaint: str) -> None:
        """A model's own code never runs, and no path leads out of the folder."""
        folder = write_model(tmp_path / "m")
        (folder / "modules.json").write_text(json.dumps(modules))
        with pytest.raises(ModelError, match=complaint):
            verify_clip("mine", folder)

    @pytest.mark.parametrize(
        ("file", "auto_map"),
        [
            ("config.json", {"AutoModel": "modeling_mine.MyCLIP"}),
            ("preprocessor_config.json", {"AutoImageProcessor": "modeling_mine.MyCLIP"}),
            ("tokenizer_config.json", {"AutoTokenizer": ["modeling_mine.MyCLIP", None]}),
            ("config.json", {"AutoModel": "nomic-ai/nomic-bert-2048--modeling_mine.MyCLIP"}),  # nomic-embed-vision
        ],
    )
    def test_verify_model_with_own_code_is_refused(
        self, tmp_path: Path, file: str, auto_map: dict[str, object]
    ) -> None:
        """Its type may be that of a stock model, which would run other code on the same weights."""
        folder = write_model(tmp_path / "m")
        settings = (CLIP if file == "config.json" else {}) | {"auto_map": auto_map}
        (folder / "0_CLIPModel" / file).write_text(json.dumps(settings))
        with pytest.raises(
            ModelError, match=rf"its own code \(auto_map in {file}: .*modeling_mine.MyCLIP.*does not run"
        ):
            verify_clip("mine", folder)

    @pytest.mark.parametrize(
        ("config", "file", "complaint"),
        [
            (None, "open_clip_config.json", r"a folder of open_clip.*such as laion/CLIP-ViT-B-32"),
            (None, "mobileclip2_s0.pt", "a folder of open_clip"),
            ({"embed_dim": 512, "image_cfg": {}, "text_cfg": {}}, "mobileclip_s0.pt", "a folder of open_clip"),
            (
                {"architecture": "vit_small", "pretrained_cfg": {}},
                "model.safetensors",
                "a folder of timm.*dinov2-small",
            ),
        ],
    )
    def test_verify_folder_of_another_library_is_named(
        self, tmp_path: Path, config: object, file: str, complaint: str
    ) -> None:
        """Nothing that sortd could do helps there, so other models are named."""
        (tmp_path / file).write_text("{}")
        if config is not None:
            (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelError, match=complaint):
            verify_clip("mine", tmp_path)

    def test_verify_weights_for_open_clip_do_not_count(self, tmp_path: Path) -> None:
        """Beside those for transformers they are neither hashed nor counted; alone they are no weights."""
        folder = write_model(tmp_path / "m")
        module = folder / "0_CLIPModel"
        (module / "open_clip_model.safetensors").write_bytes(b"x")
        (module / "open_clip_config.json").write_text("{}")
        assert module / "open_clip_model.safetensors" not in verify_clip("mine", folder).files
        (module / "model.safetensors").unlink()
        with pytest.raises(ModelError, match=r"has no weights \(model\.safetensors\)"):
            verify_clip("mine", folder)

    def test_verify_sharded_weights_are_those_of_the_index(self, tmp_path: Path) -> None:
        """A part that is missing is named, and no name leads out of the folder."""
        folder = write_model(tmp_path / "m", weights="model-00001-of-00002.safetensors")
        module = folder / "0_CLIPModel"
        index = module / "model.safetensors.index.json"
        names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
        index.write_text(json.dumps({"weight_map": names}))
        with pytest.raises(ModelError, match=r"incomplete: .*index\.json names model-00002-of-00002"):
            verify_clip("mine", folder)
        (module / names["b"]).write_bytes(b"weights")
        assert {module / name for name in names.values()} <= set(verify_clip("mine", folder).files)
        index.write_text(json.dumps({"weight_map": names | {"c": "../../modules.json"}}))
        with pytest.raises(ModelError, match=r"names \.\./\.\./modules\.json"):
            verify_clip("mine", folder)

    def test_verify_incomplete_folder_names_the_missing_file(self, tmp_path: Path) -> None:
        """Also folders without weights, and adapters."""
        empty = tmp_path / "empty"
        empty.mkdir()
        with pytest.raises(ModelError, match=r"neither modules\.json nor config\.json"):
            verify_clip("mine", empty)
        with pytest.raises(ModelError, match="has no weights"):
            verify_clip("mine", write_model(tmp_path / "a", weights=""))
        folder = write_model(tmp_path / "b")
        (folder / "0_CLIPModel" / "config.json").unlink()
        with pytest.raises(ModelError, match=r"incomplete: .*config\.json is missing"):
            verify_clip("mine", folder)
        (folder / "0_CLIPModel" / "config.json").write_text("{")
        with pytest.raises(ModelError, match=r"cannot read .*config\.json"):
            verify_clip("mine", folder)
        adapter = write_model(tmp_path / "c")
        (adapter / "0_CLIPModel" / "adapter_config.json").write_text("{}")
        with pytest.raises(ModelError, match="is an adapter"):
            verify_clip("mine", adapter)

    def test_locate_missing_blob_is_refused(self, tmp_path: Path, environment: dict[str, str]) -> None:
        """A broken link in the hub's cache is not a weight file."""
        cache = tmp_path / "cache/models"
        put_in_cache(cache, "org/clip")
        (cache / "models--org--clip" / "blobs" / "abc").unlink()
        with pytest.raises(ModelError, match="has no weights"):
            models.locate_clip("org/clip", cache_dir=tmp_path / "cache", environment=environment)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as somebody who has no rights")
class TestRights:
    """A model that the service's user may not read is not said to be missing."""

    @pytest.fixture
    def folder(self) -> Iterator[Path]:
        """A model in a folder that everybody can reach."""
        with tempfile.TemporaryDirectory() as made:
            Path(made).chmod(0o711)
            yield write_model(Path(made) / "home" / "clip")

    @pytest.mark.parametrize(
        ("closed", "mode", "verb"),
        [
            (".", 0o700, "enter"),
            ("..", 0o700, "enter"),
            (".", 0o711, "list"),
            ("0_CLIPModel", 0o700, "read"),
            ("0_CLIPModel/config.json", 0o600, "read"),
            ("0_CLIPModel/model.safetensors", 0o600, "read"),
        ],
    )
    def test_verify_without_permission_names_the_path(self, folder: Path, closed: str, mode: int, verb: str) -> None:
        """The message names the missing permission and the command that grants it."""
        at = (folder / closed).resolve()
        at.chmod(mode)
        os.seteuid(65_534)
        try:
            with pytest.raises(ModelError, match=rf"user 65534.*may not {verb} {at}.*chmod"):
                verify_clip("clip", folder)
        finally:
            os.seteuid(0)
        verify_clip("clip", folder)


class TestTextModels:
    """A separate model for words need not be a CLIP."""

    def test_locate_text_finds_a_text_model(self, tmp_path: Path, environment: dict[str, str]) -> None:
        """By name or folder."""
        folder = write_model(tmp_path / "words", BERT)
        assert models.locate_text(str(folder), environment=environment).kind == "bert"
        with pytest.raises(ModelError, match="sortd models fetch words"):
            models.locate_text("words", environment=environment)

    def test_locate_pair_of_published_models_that_do_not_fit_is_refused(self, tmp_path: Path) -> None:
        """By their names, before anything is loaded; an unknown model of the same space is not refused."""
        put_in_cache(tmp_path / "models", "sentence-transformers/clip-ViT-B-32-multilingual-v1", BERT)
        put_in_cache(tmp_path / "models", "openai/clip-vit-base-patch32")
        for name in ("clip-ViT-B-32-multilingual-v1", "sentence-transformers/clip-ViT-B-32-multilingual-v1"):
            with pytest.raises(ModelError, match="was trained for clip-ViT-B-32, and model 'packaged' is packaged"):
                models.locate_pair("packaged", name, tmp_path)
            assert models.locate_pair("openai/clip-vit-base-patch32", name, tmp_path).words is not None


class TestAvailable:
    """What `sortd models` lists."""

    def test_available_lists_every_usable_model(
        self, tmp_path: Path, environment: dict[str, str], packaged: Path
    ) -> None:
        """Other models of the cache are left out."""
        cache = tmp_path / "home/.cache/huggingface/hub"
        put_in_cache(cache, "sentence-transformers/clip-ViT-B-32")
        put_in_cache(cache, "openai/clip-vit-large-patch14")
        put_in_cache(cache, "facebook/dinov2-small", VIT)
        put_in_cache(cache, "google-bert/bert-base-uncased", BERT)
        listed = models.available(environment=environment, packaged=packaged)
        assert {row.name: row.kind for row in listed} == {
            "packaged": "clip",
            "clip-ViT-B-32": "clip",
            "openai/clip-vit-large-patch14": "clip",
            "facebook/dinov2-small": "vit",
        }
        assert all(row.size_bytes > 0 for row in listed)

    def test_available_without_models_is_empty(self, tmp_path: Path, environment: dict[str, str]) -> None:
        """Also without the packaged model."""
        assert models.available(environment=environment, packaged=tmp_path / "none") == ()


class TestDigest:
    """A model is identified by its content."""

    def test_digest_of_a_renamed_copy_is_equal(self, tmp_path: Path) -> None:
        """Name, place and model card are not included."""
        first = verify_clip("a", write_model(tmp_path / "a"))
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        (tmp_path / "b" / "README.md").write_text("another card")
        assert models.digest(first) == models.digest(verify_clip("b", tmp_path / "b"))

    @pytest.mark.parametrize("file", ["modules.json", "0_CLIPModel/config.json", "0_CLIPModel/model.safetensors"])
    def test_digest_of_changed_content_differs(self, tmp_path: Path, file: str) -> None:
        """Embeddings of the old model must not be used."""
        before = models.digest(verify_clip("a", write_model(tmp_path / "a")))
        path = tmp_path / "a" / file
        path.write_bytes(path.read_bytes() + b" ")
        assert models.digest(verify_clip("a", tmp_path / "a")) != before

    def test_digest_caches_hashes_by_stamp(self, tmp_path: Path) -> None:
        """A changed file is hashed again, and a damaged cache only costs time."""
        model = verify_clip("a", write_model(tmp_path / "a"))
        weights = tmp_path / "a/0_CLIPModel/model.safetensors"
        before = models.digest(model, cache_dir=tmp_path / "cache")
        memory = tmp_path / "cache/model-hashes.json"
        known = json.loads(memory.read_text())
        assert sha256(b"weights").hexdigest() in known.values()
        assert models.digest(model, cache_dir=tmp_path / "cache") == before
        weights.write_bytes(b"changed")
        after = models.digest(model, cache_dir=tmp_path / "cache")
        assert after != before
        for damaged in ("[", "[]", '{"a": 1}', ""):
            memory.write_text(damaged)
            assert models.digest(model, cache_dir=tmp_path / "cache") == after

    def test_digest_with_unwritable_cache_is_equal(self, tmp_path: Path) -> None:
        """The cache is optional."""
        model = verify_clip("a", write_model(tmp_path / "a"))
        (tmp_path / "cache").write_text("in the way")
        assert models.digest(model, cache_dir=tmp_path / "cache") == models.digest(model)


class _Hub(BaseHTTPRequestHandler):
    """A small honest hub: one repository, the two requests that its client makes of it."""

    folder: Path

    def do_GET(self) -> None:
        """Answer what is in the repository, or one of its files."""
        self._answer()

    def do_HEAD(self) -> None:
        """Answer the same without a body."""
        self._answer()

    def _answer(self) -> None:
        files = {path.relative_to(self.folder).as_posix(): path for path in self.folder.rglob("*") if path.is_file()}
        path, _, query = self.path.partition("?")
        repository, _, file = path.partition(f"/resolve/{COMMIT}/")
        if path.startswith("/api/models/sentence-transformers/tiny/"):
            rows = [
                {"type": "file", "path": name, "rfilename": name, "size": at.stat().st_size, "oid": _oid(at)}
                for name, at in files.items()
            ]
            answer = rows if "/tree/" in path else {"id": "t", "modelId": "t", "sha": COMMIT, "siblings": rows}
            self._send(json.dumps(answer).encode(), "application/json")
        elif repository == "/sentence-transformers/tiny" and file in files:
            self._send(files[file].read_bytes(), "application/octet-stream", _oid(files[file]))
        else:
            self.send_error(404)
        del query

    def _send(self, body: bytes, kind: str, oid: str = "") -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{oid}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name that the base class gave it
        """Say nothing."""


def _oid(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()[:40]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A hub on the loopback interface, and the folder that it offers."""
    folder = write_model(tmp_path / "offered")
    handler = type("Handler", (_Hub,), {"folder": folder})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, name="hub")
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", folder
        server.shutdown()
        thread.join()


class _Touch:
    """What a hostile pickle holds: whoever loads it without care makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        """Open the file for writing."""
        return open, (self.path, "w")


class TestFetch:
    """The only command that downloads."""

    PROGRAM = """
import sys
from pathlib import Path
from sortd.errors import ModelError
from sortd.encoder.fetch import fetch
try:
    print(fetch(sys.argv[1], cache_dir=Path(sys.argv[2])).folder)
except ModelError as error:
    print(error)
    sys.exit(69)
"""

    def fetch(self, name: str, cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """Fetch in a process of its own: the hub's client reads its environment when it is imported."""
        return subprocess.run(
            [sys.executable, "-c", self.PROGRAM, name, str(cache)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
            capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False,
        )  # fmt: skip

    def test_fetch_model_is_found_by_name(
        self, hub: tuple[str, Path], tmp_path: Path, environment: dict[str, str]
    ) -> None:
        """Pickles and exports are not downloaded, and no bar is drawn into a log."""
        address, folder = hub
        (folder / "0_CLIPModel" / "pytorch_model.bin").write_bytes(b"pickle")
        (folder / "onnx").mkdir()
        (folder / "onnx" / "model.onnx").write_bytes(b"export")
        done = self.fetch("tiny", tmp_path / "cache", HF_ENDPOINT=address)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "%|" not in done.stderr
        found = models.locate_clip("tiny", cache_dir=tmp_path / "cache", environment=environment)
        assert str(found.folder) == done.stdout.strip()
        names = {path.name for path in found.folder.rglob("*") if path.is_file()}
        assert names == {"modules.json", "config.json", "model.safetensors"}

    @pytest.mark.parametrize(
        ("config", "said"),
        [
            (CLIP, "to use it, set `model: tiny`"),
            ({"model_type": "vit", "image_size": 224}, "set `model: tiny`"),
            ({"model_type": "distilbert", "vocab_size": 9}, "`text_model: tiny`"),
        ],
    )
    def test_models_fetch_prints_what_a_model_is_for(
        self, hub: tuple[str, Path], tmp_path: Path, config: dict[str, object], said: str
    ) -> None:
        """Only what takes images can be `model:`."""
        address, folder = hub
        (folder / "0_CLIPModel" / "config.json").write_text(json.dumps(config))
        done = subprocess.run(
            [sys.executable, "-m", "sortd", "models", "fetch", "tiny", "-c", str(write_config(tmp_path))],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_ENDPOINT": address},
            capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert said in done.stdout.splitlines()[1]

    def test_fetch_converts_pickled_weights(
        self, hub: tuple[str, Path], tmp_path: Path, environment: dict[str, str]
    ) -> None:
        """Some of the first CLIPs were published only as pickles."""
        import torch
        from safetensors.torch import load_file

        address, folder = hub
        (folder / "0_CLIPModel/model.safetensors").unlink()
        shared = torch.arange(6.0).reshape(2, 3)
        torch.save({"a": shared, "b": shared.T}, folder / "0_CLIPModel/pytorch_model.bin")
        done = self.fetch("tiny", tmp_path / "cache", HF_ENDPOINT=address)
        assert done.returncode == 0, done.stdout + done.stderr
        found = models.locate_clip("tiny", cache_dir=tmp_path / "cache", environment=environment)
        tensors = load_file(found.folder / "0_CLIPModel/model.safetensors")
        assert torch.equal(tensors["a"], shared)
        assert torch.equal(tensors["b"], shared.T)

    def test_fetch_pickle_with_code_is_refused(self, hub: tuple[str, Path], tmp_path: Path) -> None:
        """Only tensors are read."""
        import torch

        address, folder = hub
        (folder / "0_CLIPModel/model.safetensors").unlink()
        torch.save({"a": _Touch(str(tmp_path / "owned"))}, folder / "0_CLIPModel/pytorch_model.bin")
        done = self.fetch("tiny", tmp_path / "cache", HF_ENDPOINT=address)
        assert done.returncode == 69, done.stderr
        assert "holds something other than weights, and was not run" in done.stdout
        assert not (tmp_path / "owned").exists()

    def test_fetch_takes_the_weights_for_transformers_only(self, hub: tuple[str, Path], tmp_path: Path) -> None:
        """Laion's repositories hold the same weights for open_clip, in two formats."""
        address, folder = hub
        for name in ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "pytorch_model.bin"):
            (folder / "0_CLIPModel" / name).write_bytes(b"x")
        done = self.fetch("tiny", tmp_path / "cache", HF_ENDPOINT=address)
        assert done.returncode == 0, done.stdout + done.stderr
        names = {path.name for path in Path(done.stdout.strip()).rglob("*") if path.is_file()}
        assert names == {"modules.json", "config.json", "model.safetensors"}

    def test_fetch_pickle_beside_weights_for_open_clip_is_converted(
        self, hub: tuple[str, Path], tmp_path: Path
    ) -> None:
        """The others are no replacement for the missing ones."""
        import torch
        from safetensors.torch import load_file

        address, folder = hub
        (folder / "0_CLIPModel/model.safetensors").rename(folder / "0_CLIPModel/open_clip_model.safetensors")
        torch.save({"a": torch.ones(2)}, folder / "0_CLIPModel/pytorch_model.bin")
        done = self.fetch("tiny", tmp_path / "cache", HF_ENDPOINT=address)
        assert done.returncode == 0, done.stdout + done.stderr
        module = Path(done.stdout.strip()) / "0_CLIPModel"
        assert load_file(module / "model.safetensors").keys() == {"a"}
        assert not (module / "open_clip_model.safetensors").exists()

    def test_fetch_unsupported_weights_are_refused(self, hub: tuple[str, Path], tmp_path: Path) -> None:
        """They are not downloaded."""
        address, folder = hub
        (folder / "0_CLIPModel/model.safetensors").rename(folder / "0_CLIPModel/model.ckpt")
        done = self.fetch("tiny", tmp_path / "cache", HF_ENDPOINT=address)
        assert done.returncode == 69
        assert "has no weights (model.safetensors)" in done.stdout

    @pytest.mark.parametrize("name", ["absent", "not/a/name", "a--b/c"])
    def test_fetch_unknown_name_is_refused(self, hub: tuple[str, Path], tmp_path: Path, name: str) -> None:
        """The message names it."""
        done = self.fetch(name, tmp_path / "cache", HF_ENDPOINT=hub[0])
        assert done.returncode == 69, done.stderr
        assert f"cannot fetch {name}" in done.stdout
        assert "check the name and the network" in done.stdout

    def test_fetch_without_network_fails(self, tmp_path: Path) -> None:
        """Nothing listens at this address."""
        done = self.fetch("tiny", tmp_path / "cache", HF_ENDPOINT="http://127.0.0.1:9")
        assert done.returncode == 69, done.stderr
        assert "check the name and the network" in done.stdout

    def test_fetch_offline_names_the_variable(self, tmp_path: Path) -> None:
        """HF_HUB_OFFLINE is respected."""
        done = self.fetch("tiny", tmp_path / "cache", HF_HUB_OFFLINE="1")
        assert done.returncode == 69, done.stderr
        assert "HF_HUB_OFFLINE" in done.stdout


def test_locate_packaged_is_a_clip() -> None:
    """The same rules apply to it."""
    if not models.PACKAGED.is_dir():
        pytest.skip("the packaged model is not in this checkout")
    found = models.locate_clip("packaged")
    assert isinstance(found, ModelFolder)
    assert found.size_bytes < 31_000_000


class TestPublished:
    """The table of published models is the same in the program and in the document."""

    def test_published_models_are_those_of_the_document(self) -> None:
        """Name, size, speed, languages, licence and figure; each source is named."""
        text = (Path(__file__).parents[2] / "docs" / "models.md").read_text("utf-8")
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "| [" in line]
        assert len(rows) == len(PUBLISHED)
        for row, model in zip(rows, PUBLISHED, strict=True):
            assert row[:5] == [f"`{model.name}`", f"{model.megabytes}", f"{model.speed:g}", model.reads, model.licence]
            assert row[5].startswith(f"[{model.published or 'card'}](")
            assert model.source in row[5]

    def test_models_available_lists_them(self, tmp_path: Path) -> None:
        """And which are on this machine."""
        put_in_cache(tmp_path / "cache/models", "facebook/dinov2-small", VIT)
        found = sortd("models", "--available", "-c", write_config(tmp_path), "--json").facts
        here = {model["name"] for model in found["models"] if model["is_here"]}
        assert here >= {"packaged", "facebook/dinov2-small"}
        printed = sortd("models", "--available", "-c", write_config(tmp_path)).out
        assert all(model.name in printed for model in PUBLISHED)
        assert "`text_model: clip-ViT-B-32-multilingual-v1`" in printed
