"""An encoder gives what sentence-transformers gives, from pixels alone, and refuses whatever it cannot give right."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from sortd.encoder import models
from sortd.encoder.backends import KNOWN_ROWS, load_model, torch_name
from sortd.encoder.clip import SAME_COSINE, Encoder, TorchEncoder, lowest_cosine, preprocessing_of, probe
from sortd.errors import ModelError
from sortd.events import Fit, Preprocessing
from tests.fake_encoder import FakeEncoder
from tests.hub_folders import build_dinov2
from tests.tiny_clip import DIMENSIONS, SIDE, Layout, Tower, build_tiny_clip
from tests.tiny_words import (
    PLACES,
    build_near_clip,
    build_roberta_words,
    build_tiny_words,
    distil,
    without_limit,
)

SHAPES = [(tower, layout) for tower in Tower for layout in Layout]
TEXTS = ["a photo of a screw", "tornillo", "a " * 200, "ñandú ü 漢字", "two words"]
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[Tower, Layout], Path]:
    """One tiny model of each shape."""
    place = tmp_path_factory.mktemp("models")
    return {shape: build_tiny_clip(place / "-".join(shape), 0, *shape) for shape in SHAPES}


@pytest.fixture(scope="module")
def clip(folders: dict[tuple[Tower, Layout], Path]) -> Path:
    """A tiny model of the commonest shape."""
    return folders[Tower.CLIP, Layout.CURRENT]


@pytest.fixture
def copied(clip: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(clip, tmp_path / "copied"))


def pictures(count: int = 6) -> list[Image.Image]:
    """Photographs of noise on ramps, in many sizes and shapes."""
    chance = np.random.default_rng(1)
    made = []
    for _ in range(count):
        height, width = (int(side) for side in chance.integers(20, 200, 2))
        ramp = np.linspace(0, 255, width)[None, :, None] * chance.random(3)
        noise = chance.integers(0, 60, (height, width, 3))
        made.append(Image.fromarray(np.clip(ramp + noise, 0, 255).astype(np.uint8)))
    return made


def seen(picture: Image.Image, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """What the encoder is handed: resized and cropped as it asks, by Pillow alone."""
    height, width = preprocessing.crop_height, preprocessing.crop_width
    resample = Image.Resampling(preprocessing.resample)
    if preprocessing.fit is Fit.STRETCH:
        return np.asarray(picture.resize((width, height), resample))
    short = min(picture.size)
    edge = preprocessing.shortest_edge
    resized = picture.resize((int(edge * picture.width / short), int(edge * picture.height / short)), resample)
    left, top = (resized.width - width) // 2, (resized.height - height) // 2
    return np.asarray(resized.crop((left, top, left + width, top + height)))


def batch(encoder: Encoder, images: Sequence[Image.Image]) -> npt.NDArray[np.uint8]:
    """Images as one batch."""
    return np.stack([seen(picture, encoder.preprocessing) for picture in images])


def reference(folder: Path, inputs: Sequence[Any]) -> npt.NDArray[np.float32]:
    """What sentence-transformers itself says, in unit rows."""
    import torch
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True, model_kwargs={"dtype": torch.float32})
    return np.asarray(model.encode(list(inputs), normalize_embeddings=True, show_progress_bar=False))


class TestAgreement:
    """Our shortcut past the image processor changes nothing."""

    @pytest.mark.parametrize("shape", SHAPES, ids="-".join)
    def test_torch_gives_the_rows_of_sentence_transformers(
        self, folders: dict[tuple[Tower, Layout], Path], shape: tuple[Tower, Layout]
    ) -> None:
        """In every layout of a folder, for images of many sizes and texts of many lengths and scripts."""
        encoder = load_model(str(folders[shape]))
        images = pictures()
        rows = encoder.encode_images(batch(encoder, images))
        words = encoder.encode_texts(TEXTS)
        assert np.abs(rows - reference(folders[shape], images)).max() < TOLERANCE
        assert np.abs(words - reference(folders[shape], TEXTS)).max() < TOLERANCE
        assert (encoder.dimensions, encoder.has_text) == (DIMENSIONS, True)
        for found in (rows, words):
            assert found.dtype == np.float32
            assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)

    def test_torch_packaged_model_gives_the_rows_of_sentence_transformers(self) -> None:
        """It is a convolutional network beside a BERT."""
        if not models.PACKAGED.is_dir():
            pytest.skip("the packaged model is not in this checkout")
        encoder = load_model("packaged")
        images = pictures(3)
        rows = encoder.encode_images(batch(encoder, images))
        assert np.abs(rows - reference(models.PACKAGED, images)).max() < TOLERANCE
        words = encoder.encode_texts(TEXTS)
        assert np.abs(words - reference(models.PACKAGED, TEXTS)).max() < TOLERANCE

    @pytest.mark.parametrize(
        "processor",
        [
            {"size": {"height": SIDE, "width": SIDE}, "do_center_crop": False},
            {"size": {"shortest_edge": SIDE + 8}, "resample": 2},
            {"do_normalize": False},
            {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3]},
            {"do_rescale": False},
            {"rescale_factor": 0.01},
        ],
    )
    def test_torch_follows_the_image_processor(self, copied: Path, processor: dict[str, Any]) -> None:
        """Stretching, an edge larger than the crop, another filter, mean, deviation or scale."""
        file = copied / "processor_config.json"
        config = json.loads(file.read_text())
        config["image_processor"] |= processor
        file.write_text(json.dumps(config))
        encoder = load_model(str(copied))
        images = pictures(3)
        rows = encoder.encode_images(batch(encoder, images))
        assert np.abs(rows - reference(copied, images)).max() < TOLERANCE

    def test_torch_half_precision_weights_compute_in_float32(self, copied: Path) -> None:
        """Float16 arithmetic is slow and imprecise on a CPU."""
        from safetensors.numpy import load_file, save_file

        file, config = copied / "model.safetensors", copied / "config.json"
        half = {name: tensor.astype(np.float16) for name, tensor in load_file(file).items()}
        save_file(half, file, {"format": "pt"})
        config.write_text(config.read_text().replace('"float32"', '"float16"'))
        assert '"float16"' in config.read_text()
        encoder = load_model(str(copied))
        images = pictures(3)
        rows = encoder.encode_images(batch(encoder, images))
        assert np.abs(rows - reference(copied, images)).max() < 1e-6

    def test_torch_row_is_independent_of_its_batch(self, clip: Path) -> None:
        """Alone and among others, an image has the same row."""
        encoder = load_model(str(clip))
        pixels = batch(encoder, pictures())
        together = encoder.encode_images(pixels)
        alone = np.concatenate([encoder.encode_images(pixels[i : i + 1]) for i in range(len(pixels))])
        assert np.abs(together - alone).max() < 1e-5

    def test_encode_empty_batch_has_no_rows(self, clip: Path) -> None:
        """The result has the right width."""
        encoder = load_model(str(clip))
        assert encoder.encode_images(np.empty((0, SIDE, SIDE, 3), np.uint8)).shape == (0, DIMENSIONS)
        assert encoder.encode_texts([]).shape == (0, DIMENSIONS)

    def test_encode_read_only_pixels_are_unchanged(self, clip: Path) -> None:
        """A read-only, strided view is accepted."""
        encoder = load_model(str(clip))
        pixels = batch(encoder, pictures(4))[::2]
        pixels.flags.writeable = False
        before = pixels.copy()
        encoder.encode_images(pixels)
        assert np.array_equal(pixels, before)

    @pytest.mark.parametrize(
        "pixels",
        [np.zeros((1, SIDE, SIDE + 1, 3), np.uint8), np.zeros((1, 3, SIDE, SIDE), np.uint8),
         np.zeros((1, SIDE, SIDE, 3), np.float32)],
    )  # fmt: skip
    def test_encode_wrong_pixels_raises(self, clip: Path, pixels: Any) -> None:
        """The message gives both shapes."""
        with pytest.raises(ValueError, match="not uint8"):
            load_model(str(clip)).encode_images(pixels)

    def test_encode_texts_invalid_utf8_is_embedded(self, clip: Path) -> None:
        """Class folders may have any name."""
        assert np.isfinite(load_model(str(clip)).encode_texts([os.fsdecode(b"torn\xffillo")])).all()


class TestIdentity:
    """encoder_id says what the embeddings depend on."""

    def test_encoder_id_of_a_renamed_copy_is_equal(self, clip: Path, copied: Path) -> None:
        """Nothing is embedded again because a folder was renamed."""
        assert load_model(str(clip)).encoder_id == load_model(str(copied)).encoder_id

    def test_encoder_id_of_other_weights_differs(self, clip: Path, tmp_path: Path) -> None:
        """Everything else is equal."""
        other = build_tiny_clip(tmp_path / "other", seed=1)
        assert load_model(str(clip)).encoder_id != load_model(str(other)).encoder_id

    def test_encoder_id_of_other_preprocessing_differs(self, clip: Path, copied: Path) -> None:
        """The weights are equal."""
        file = copied / "processor_config.json"
        file.write_text(file.read_text().replace("0.48145466", "0.5"))
        assert load_model(str(clip)).encoder_id != load_model(str(copied)).encoder_id

    def test_encoder_id_of_other_decoding_differs(self, clip: Path) -> None:
        """JPEGs decoded at 1/8 have slightly other pixels."""
        assert load_model(str(clip)).encoder_id == load_model(str(clip), decoding="draft").encoder_id
        assert load_model(str(clip)).encoder_id != load_model(str(clip), decoding="full").encoder_id

    def test_encoder_id_includes_the_text_model(self, clip: Path, tmp_path: Path) -> None:
        """Texts are embedded by the text model, images by the CLIP."""
        words = build_near_clip(tmp_path / "words", clip)
        encoder = load_model(str(clip), text_model=str(words))
        assert encoder.encoder_id != load_model(str(clip)).encoder_id
        assert np.abs(encoder.encode_texts(TEXTS) - reference(words, TEXTS)).max() < TOLERANCE
        pixels = batch(encoder, pictures(2))
        assert np.allclose(encoder.encode_images(pixels), load_model(str(clip)).encode_images(pixels), atol=1e-6)


class TestKnownRows:
    """The answer of a model is compared with that of its first start."""

    def test_load_twice_compares_with_the_first_start(self, clip: Path, tmp_path: Path) -> None:
        """The rows of two images are kept by encoder_id."""
        encoder = load_model(str(clip), backend="torch", cache_dir=tmp_path)
        known = json.loads((tmp_path / KNOWN_ROWS).read_text())
        assert np.shape(known[encoder.encoder_id]) == (2, DIMENSIONS)
        assert load_model(str(clip), backend="torch", cache_dir=tmp_path).encoder_id == encoder.encoder_id

    def test_load_with_other_rows_is_refused(self, clip: Path, tmp_path: Path) -> None:
        """Embeddings in the cache would not fit the new ones."""
        encoder_id = load_model(str(clip), backend="torch", cache_dir=tmp_path).encoder_id
        other = probe(load_model(str(build_tiny_clip(tmp_path / "other", seed=1)), backend="torch"))
        (tmp_path / KNOWN_ROWS).write_text(json.dumps({encoder_id: other.tolist()}))
        with pytest.raises(ModelError, match=rf"other embeddings than those in the cache.*delete .*{KNOWN_ROWS}"):
            load_model(str(clip), backend="torch", cache_dir=tmp_path)

    @pytest.mark.parametrize("content", ["[", "[]", "{}", '{"ID": [[1]]}', '{"ID": "x"}', '{"ID": [[NaN, 1]]}'])
    def test_load_with_damaged_known_rows_writes_them_again(self, clip: Path, tmp_path: Path, content: str) -> None:
        """The cache may be deleted at any time."""
        encoder = load_model(str(clip), backend="torch", cache_dir=tmp_path)
        (tmp_path / KNOWN_ROWS).write_text(content.replace("ID", encoder.encoder_id))
        load_model(str(clip), backend="torch", cache_dir=tmp_path)
        assert np.allclose(
            json.loads((tmp_path / KNOWN_ROWS).read_text())[encoder.encoder_id], probe(encoder), atol=1e-5
        )


class TestHalfPrecision:
    """A GPU computes in float16 if the rows of the probe agree; the comparison is made here on the CPU."""

    def encoder(self, folder: Path, words: Path | None = None) -> TorchEncoder:
        """A model in float32, as a GPU has it first."""
        encoder = load_model(
            str(folder), text_model=None if words is None else str(words), backend="torch", device="cpu"
        )
        assert isinstance(encoder, TorchEncoder)
        assert encoder.precision == "fp32"
        return encoder

    @pytest.mark.parametrize("tower", Tower)
    def test_half_precision_with_equal_rows_is_used(
        self, folders: dict[tuple[Tower, Layout], Path], tower: Tower
    ) -> None:
        """Its rows are near those of float32, and it has its own ID, which names the precision."""
        encoder = self.encoder(folders[tower, Layout.CURRENT])
        pixels, before = batch(encoder, pictures()), encoder.encoder_id
        images, texts = encoder.encode_images(pixels), encoder.encode_texts(TEXTS)
        assert encoder.use_half_precision()
        assert encoder.encoder_id == before.replace("-torch-", "-torch-fp16-") != before
        assert {str(value.dtype) for value in encoder.clip.parameters()} == {"torch.float16"}
        for exact, half in ((images, encoder.encode_images(pixels)), (texts, encoder.encode_texts(TEXTS))):
            assert half.dtype == np.float32
            assert SAME_COSINE <= lowest_cosine(exact, half) < 1 - 1e-7

    def test_torch_name_tells_the_precision_of_a_gpu(self, clip: Path) -> None:
        """On a CPU it is always float32, and not told."""
        encoder = self.encoder(clip)
        assert torch_name(encoder) == "torch"
        encoder.runs_on = "CUDA"
        assert torch_name(encoder) == "torch fp32 on CUDA"
        encoder.use_half_precision()
        assert torch_name(encoder) == "torch fp16 on CUDA"

    def test_half_precision_includes_the_text_model(self, clip: Path, tmp_path: Path) -> None:
        """A text model that does not agree keeps both in float32."""
        words = build_near_clip(tmp_path / "words", clip)
        encoder = self.encoder(clip, words)
        assert encoder.use_half_precision()
        assert {str(value.dtype) for value in encoder.words.parameters()} == {"torch.float16"}
        overflowing = self.encoder(clip, grow(words, "text_projection.weight", 1e6))
        assert not overflowing.use_half_precision()
        assert {str(value.dtype) for value in overflowing.clip.parameters()} == {"torch.float32"}

    @pytest.mark.parametrize("weight", ["visual_projection.weight", "text_projection.weight"])
    def test_half_precision_with_overflow_is_not_used(self, copied: Path, weight: str) -> None:
        """Rows of more than 65504 have no value in float16; the model goes on as it was."""
        encoder = self.encoder(grow(copied, weight, 1e6))
        pixels, before = batch(encoder, pictures(2)), encoder.encoder_id
        images, texts = encoder.encode_images(pixels), encoder.encode_texts(TEXTS)
        assert not encoder.use_half_precision()
        assert encoder.encoder_id == before
        assert np.array_equal(encoder.encode_images(pixels), images)
        assert np.array_equal(encoder.encode_texts(TEXTS), texts)

    def test_half_precision_with_other_rows_is_not_used(self, copied: Path) -> None:
        """Values that are finite but rounded to something else."""
        encoder = self.encoder(grow(copied, "visual_projection.weight", 1e-6))
        assert not encoder.use_half_precision()
        assert "-torch-fp16-" not in encoder.encoder_id

    def test_half_precision_of_an_encoder_of_images(self, tmp_path: Path) -> None:
        """Without texts, its images decide."""
        encoder = self.encoder(build_dinov2(tmp_path / "dinov2"))
        images = batch(encoder, pictures())
        exact = encoder.encode_images(images)
        assert encoder.use_half_precision()
        assert lowest_cosine(exact, encoder.encode_images(images)) >= SAME_COSINE


def grow(folder: Path, weight: str, factor: float) -> Path:
    """Multiply a weight of a model."""
    from safetensors.numpy import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights[weight] *= np.float32(factor)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


class TestWords:
    """Texts of any length are embedded, whatever text tower a model has."""

    def test_encode_texts_without_tokenizer_limit_truncates(self, tmp_path: Path) -> None:
        """Texts are cut at the limit of the network."""
        knows = build_tiny_clip(tmp_path / "knows", 0, Tower.DUAL)
        ignorant = without_limit(build_tiny_clip(tmp_path / "ignorant", 0, Tower.DUAL))
        encoder = load_model(str(ignorant))
        assert np.array_equal(encoder.encode_texts(TEXTS), load_model(str(knows)).encode_texts(TEXTS))

    def test_encode_texts_roberta_keeps_its_reserved_positions(self, clip: Path, tmp_path: Path) -> None:
        """RoBERTa reserves the first two positions."""
        words = without_limit(distil(build_roberta_words(tmp_path / "words"), clip))
        encoder = load_model(str(clip), text_model=str(words))
        exact = "a b " * (PLACES // 2 - 2)  # with the marks of begin and end, as many tokens as can be read
        cut, whole = encoder.encode_texts([exact + "c d e f", exact])
        assert np.allclose(whole, reference(words, [exact])[0], atol=TOLERANCE)
        assert not np.allclose(cut, encoder.encode_texts([exact[:-4]])[0], atol=TOLERANCE)

    def test_encode_texts_of_a_multi_module_model(self, clip: Path, tmp_path: Path) -> None:
        """As in the published multilingual model: tokens, their mean, and a dense layer."""
        words = distil(build_tiny_words(tmp_path / "words"), clip)
        encoder = load_model(str(clip), text_model=str(words))
        texts = ["una foto de un tornillo", "x", "a " * 200, "ñandú ü"]
        assert np.abs(encoder.encode_texts(texts) - reference(words, texts)).max() < TOLERANCE
        assert encoder.encoder_id != load_model(str(clip)).encoder_id


class TestRefusals:
    """Models that would give wrong embeddings are refused."""

    @pytest.mark.parametrize(
        ("settings", "complaint"),
        [
            ({"do_resize": False}, "takes images of any size"),
            ({"do_flip_channel_order": True}, "requires do_flip_channel_order"),
            ({"do_pad": True}, "requires do_pad"),
            ({"do_convert_rgb": False}, "does not take plain RGB"),
            ({"do_center_crop": False}, "crops to nothing"),
            ({"crop_size": {"height": 64, "width": 64}}, "resizes to"),
            ({"size": {"longest_edge": 32}}, "resizes to"),
            ({"size": None}, "resizes to"),
        ],
    )
    def test_preprocessing_unsupported_step_is_refused(self, settings: dict[str, Any], complaint: str) -> None:
        """The message names processor and step."""
        plain = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}
        kind = {"image_processor_type": "TinyImageProcessor"}
        with pytest.raises(ModelError, match=f"the TinyImageProcessor of this model .*{complaint}"):
            preprocessing_of(kind | plain | settings)

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({"size": {"shortest_edge": 64}, "crop_pct": 0.875}, Preprocessing(73, 64, 64)),
            ({"size": {"shortest_edge": 384}, "crop_pct": 0.875}, Preprocessing(384, 384, 384, fit=Fit.STRETCH)),
            ({"size": {"height": 64, "width": 48}}, Preprocessing(48, 64, 48, fit=Fit.STRETCH)),
        ],
    )
    def test_preprocessing_accepts_other_size_settings(self, settings: dict[str, Any], expected: Preprocessing) -> None:
        """ConvNeXt gives the crop as a share, SigLIP gives height and width."""
        assert preprocessing_of(settings) == expected

    @pytest.mark.parametrize("change", ["missing", "renamed", "beside"])
    def test_load_missing_weights_are_named(self, copied: Path, change: str) -> None:
        """Transformers would fill them at random; as many weights under other names, or elsewhere, do not help."""
        from safetensors.numpy import load_file, save_file

        file = copied / "model.safetensors"
        weights = load_file(file)
        if change == "beside":
            save_file(weights, copied / "open_clip_model.safetensors", {"format": "pt"})
        lost = weights.pop("visual_projection.weight")
        if change == "renamed":
            weights["visual.proj"] = lost
        save_file(weights, file, {"format": "pt"})
        with pytest.raises(ModelError, match=r"lacks weights of its network: visual_projection\.weight") as caught:
            load_model(str(copied))
        assert ("it holds visual.proj, which the network does not know" in str(caught.value)) == (change == "renamed")

    def test_load_weights_with_names_of_older_versions(self, copied: Path) -> None:
        """Old checkpoints hold indices that are no weights; a different order or an extra tensor is no loss."""
        from safetensors.numpy import load_file, save_file

        encoder = load_model(str(copied))
        file = copied / "model.safetensors"
        weights = load_file(file)
        weights["text_model.embeddings.position_ids"] = np.arange(16)[None]
        pixels = batch(encoder, pictures(2))
        rows = encoder.encode_images(pixels)  # before the file changes, which the encoder may have mapped
        save_file(weights, file, {"format": "pt"})
        assert np.array_equal(load_model(str(copied)).encode_images(pixels), rows)

    @pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "config", "tokenizer", "unknown type"])
    def test_load_damaged_folder_is_refused(self, copied: Path, damage: str) -> None:
        """The message names the folder and a remedy, whatever the libraries raise."""
        weights, config = copied / "model.safetensors", copied / "config.json"
        match damage:
            case "cut":
                weights.write_bytes(weights.read_bytes()[:-1000])
            case "garbage":
                weights.write_bytes(b"\x00\xff" * 5000)
            case "empty":
                weights.write_bytes(b"")
            case "config":
                config.write_text(config.read_text().replace('"hidden_size": 32', '"hidden_size": 48'))
            case "tokenizer":
                (copied / "tokenizer.json").write_text("{}")
            case "unknown type":
                config.write_text(config.read_text().replace('"clip"', '"no_such_type"'))
        with pytest.raises(ModelError, match=f"{copied}.*fetch or copy it again"):
            load_model(str(copied))

    @pytest.mark.parametrize(
        ("settings", "complaint"),
        [
            ({"modality_config": {"text": {"method": "get_text_features", "method_output_name": "pooler_output"}}},
             "it takes no image"),
            ({"modality_config": {"image": {"method": "get_image_features", "method_output_name": "pooler_output"}}},
             "it takes no text"),
            ({"module_output_name": "token_embeddings"}, "it gives several embeddings for one image"),
        ],
    )  # fmt: skip
    def test_load_clip_with_other_modalities_is_refused(
        self, copied: Path, settings: dict[str, Any], complaint: str
    ) -> None:
        """A published configuration may leave out a tower."""
        file = copied / "sentence_bert_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))
        with pytest.raises(ModelError, match=f"is not a CLIP: {complaint}"):
            load_model(str(copied))

    def test_load_nan_weights_is_refused(self, copied: Path) -> None:
        """The probe finds them."""
        from safetensors.numpy import load_file, save_file

        file = copied / "model.safetensors"
        weights = load_file(file)
        weights["visual_projection.weight"][:] = np.nan
        save_file(weights, file, {"format": "pt"})
        with pytest.raises(ModelError, match="returned zeros or values that are not finite"):
            load_model(str(copied))

    def test_load_text_model_of_other_dimensions_is_refused(self, clip: Path, tmp_path: Path) -> None:
        """The two do not share a space."""
        narrow = build_tiny_clip(tmp_path / "narrow", dimensions=16)
        with pytest.raises(ModelError, match=r"do not share a space, with 16 and 24 dimensions"):
            load_model(str(clip), text_model=str(narrow))

    @pytest.mark.parametrize("kind", ["another CLIP", "a dual encoder", "a text model"])
    def test_load_text_model_of_another_space_is_refused(self, clip: Path, tmp_path: Path, kind: str) -> None:
        """Equal dimensions do not make a common space: its rows for English words are elsewhere."""
        match kind:
            case "another CLIP":
                foreign = build_tiny_clip(tmp_path / "foreign", seed=1)
            case "a dual encoder":
                foreign = build_tiny_clip(tmp_path / "foreign", 0, Tower.DUAL)
            case _:
                foreign = build_tiny_words(tmp_path / "foreign")
        with pytest.raises(ModelError, match=r"do not share a space: for \d of 24 English words .* trained together"):
            load_model(str(clip), text_model=str(foreign))

    def test_load_text_model_of_another_clip_is_refused_for_that_clip(self, clip: Path, tmp_path: Path) -> None:
        """What was distilled from one CLIP does not fit another one."""
        words = distil(build_tiny_words(tmp_path / "words"), clip)
        load_model(str(clip), text_model=str(words))
        with pytest.raises(ModelError, match="do not share a space"):
            load_model(str(build_tiny_clip(tmp_path / "other", seed=1)), text_model=str(words))

    def test_load_unknown_backend_or_device_is_refused(self, clip: Path) -> None:
        """The message names it."""
        with pytest.raises(ModelError, match="unknown backend 'tensorflow'"):
            load_model(str(clip), backend="tensorflow")
        with pytest.raises(ModelError, match="device 'cuda:77' cannot be used"):
            load_model(str(clip), device="cuda:77")


@dataclass(frozen=True, slots=True)
class Broken:
    """An encoder on a device in a bad state: one way to be wrong for each field."""

    rows: tuple[tuple[float, float], ...]
    encoder_id: str = "broken"
    dimensions: int = 2
    preprocessing: Preprocessing = FakeEncoder().preprocessing
    has_text: bool = False

    def encode_images(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Answer the rows that it was made with."""
        return np.asarray(self.rows[: len(pixels)], np.float32)

    def encode_texts(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Never asked."""
        raise AssertionError(texts)


class TestProbe:
    """A device that returns garbage is detected at the start."""

    def test_probe_different_rows_for_one_image_raises(self) -> None:
        """The same pixels must give the same row."""
        with pytest.raises(ModelError, match="two embeddings for one image"):
            probe(Broken(((1, 0), (0, 1), (0, 1))))

    def test_probe_equal_rows_for_two_images_raises(self) -> None:
        """A ramp and noise must not give the same row."""
        with pytest.raises(ModelError, match="one embedding for two unlike images"):
            probe(Broken(((1, 0), (1, 0), (1, 0))))

    def test_probe_valid_encoder_passes(self) -> None:
        """For example the fake one."""
        probe(FakeEncoder())


class TestOffline:
    """Loading never touches the network, and says within two seconds that a model is not here."""

    def test_load_opens_no_connection(self, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Not even to look for a newer version."""
        tried: list[object] = []

        def refuse(_: socket.socket, address: object) -> None:
            tried.append(address)
            raise OSError("no network in this test")

        monkeypatch.setattr(socket.socket, "connect", refuse)
        load_model(str(clip)).encode_texts(["a photo"])
        assert tried == []

    def test_load_missing_model_fails_before_torch_is_imported(self, tmp_path: Path) -> None:
        """The message tells how to fetch it; it comes at once, since nothing large is imported before."""
        program = (
            "import sys\nfrom sortd.encoder.backends import load_model\n"
            "try: load_model('clip-ViT-L-14')\nexcept Exception as error: print(error)\n"
            "print({'torch', 'transformers'} & set(sys.modules))"
        )
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "HOME": str(tmp_path), "HF_HOME": str(tmp_path)},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert "sortd models fetch clip-ViT-L-14" in done.stdout
        assert done.stdout.splitlines()[-1] == "set()"

    def test_import_of_backends_imports_no_torch(self) -> None:
        """The command line imports this module."""
        program = "import sys, sortd.encoder.backends; print({'torch', 'transformers'} & set(sys.modules))"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "set()"


class TestFake:
    """The encoder of other tests keeps the promises of a real one."""

    def test_fake_encoder_embeds_colours_and_their_names(self) -> None:
        """Red pixels are nearer to red ones, and to the word, than to blue ones."""
        encoder: Encoder = FakeEncoder()
        pixels = np.zeros((3, 16, 16, 3), np.uint8)
        pixels[0, ..., 0], pixels[1, ..., 0], pixels[2, ..., 2] = 255, 220, 255
        red, reddish, blue = encoder.encode_images(pixels)
        (word,) = encoder.encode_texts(["a photo of a red thing"])
        assert red @ reddish > 0.9 > red @ blue
        assert red @ word > 0.9 > blue @ word
        assert encoder.encode_texts([]).shape == (0, encoder.dimensions)

    def test_fake_encoder_is_deterministic(self) -> None:
        """In every process."""
        chance = np.random.default_rng(0)
        pixels = chance.integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
        assert np.array_equal(FakeEncoder().encode_images(pixels), FakeEncoder().encode_images(pixels))
        assert np.array_equal(FakeEncoder().encode_texts(["x", "y"]), FakeEncoder().encode_texts(["x", "y"]))
