"""Folders as the hub has them give the rows of transformers, by torch and by their export to ONNX."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sortd.encoder.backends import load_model
from sortd.encoder.clip import Encoder
from sortd.encoder.export import make_exports
from sortd.encoder.models import locate_pair
from sortd.encoder.pickles import convert_folder
from sortd.errors import ModelError
from tests.encoder.test_backends import batch, pictures
from tests.hub_folders import (
    build_align,
    build_altclip,
    build_blip,
    build_chinese_clip,
    build_dinov2,
    build_dinov3,
    build_half_clip,
    build_laion_clip,
    build_metaclip2,
    build_openai_clip,
    build_sentence_clip,
    build_sharded_clip,
    build_siglip,
    build_siglip2,
    build_swin,
    build_tinyclip,
    build_vit,
    write_json_files,
)
from tests.tiny_clip import TEXT_LENGTH, Layout, Tower, build_tiny_clip
from tests.tiny_words import build_tiny_words, distil

TEXTS = ["Screw", "a photo of a rusty screw in a box of nails", "x"]
EXACT = 1 - 1e-5
"""The least cosine of two rows that are equal but for the order of additions."""


def build_converted_clip(folder: Path) -> Path:
    """Write a copy of OpenAI's CLIP with its pickle, and convert it."""
    convert_folder("openai", build_openai_clip(folder))
    return folder


def build_dual(folder: Path) -> Path:
    """Write a ConvNeXtV2 beside a BERT, as the packaged model is."""
    return build_tiny_clip(folder, 0, Tower.DUAL, Layout.PLAIN)


READERS: dict[str, Callable[[Path], Path]] = {
    "openai": build_converted_clip,
    "tinyclip": build_tinyclip,
    "laion": build_laion_clip,
    "sentence-transformers": build_sentence_clip,
    "sharded": build_sharded_clip,
    "half": build_half_clip,
    "chinese": build_chinese_clip,
    "metaclip2": build_metaclip2,
    "altclip": build_altclip,
    "dual": build_dual,
    "siglip": build_siglip,
    "siglip2": build_siglip2,
}
"""Models that read texts, in every layout."""
SEERS: dict[str, Callable[[Path], Path]] = {
    "dinov2": build_dinov2,
    "dinov3": build_dinov3,
    "vit": build_vit,
    "swin": build_swin,
}
"""Encoders of images."""
BUILDERS = READERS | SEERS


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the models of this file and their exports are."""
    return tmp_path_factory.mktemp("layouts")


def built(name: str, place: Path) -> Path:
    """Return the folder of a model that is written once."""
    return place / name if (place / name).exists() else BUILDERS[name](place / name)


def encoders(folder: Path, place: Path) -> list[Encoder]:
    """Return the encoder of a folder by torch and by ONNX Runtime."""
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    cache = place / "cache"
    make_exports(locate_pair(str(folder), None, cache))
    return [load_model(str(folder), backend=backend, cache_dir=cache) for backend in ("torch", "onnx")]


def lowest_cosine(left: Any, right: Any) -> float:
    """The least cosine between paired unit rows."""
    return float((np.asarray(left) * np.asarray(right)).sum(axis=1).min())


def unit(rows: Any) -> Any:
    """Rows of a torch tensor, scaled to length 1, as numpy has them."""
    return (rows / rows.norm(dim=-1, keepdim=True)).numpy()


def siglip_rows(folder: Path, texts: Sequence[str]) -> Any:
    """What transformers gives for texts in lower case, padded to the length of the model and without a mask."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
    texts = [text.lower() for text in texts]
    tokens = tokenizer(texts, padding="max_length", max_length=TEXT_LENGTH, truncation=True)
    return rows_of_tokens(folder, tokens["input_ids"])


def text_rows(folder: Path, texts: Sequence[str]) -> Any:
    """What transformers gives for texts through its own tokenizer, in float32."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    at = next(folder.glob("0_*"), folder)
    cut = {"padding": True, "truncation": True, "max_length": TEXT_LENGTH}
    tokens = AutoTokenizer.from_pretrained(str(at))(list(texts), return_tensors="pt", **cut)
    with torch.inference_mode():
        output = AutoModel.from_pretrained(str(at), dtype=torch.float32).eval().get_text_features(**tokens)
    return unit(getattr(output, "pooler_output", output))


def trained_tokens(folder: Path, text: str) -> list[int]:
    """A text as SigLIP 2 was trained on it: lower case, cut with its end kept, and filled with zeros on the right."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    *words, end = tokenizer.encode(text.lower()).ids
    tokens = [*words[: TEXT_LENGTH - 1], end]
    return tokens + [0] * (TEXT_LENGTH - len(tokens))


def rows_of_tokens(folder: Path, tokens: Sequence[Sequence[int]]) -> Any:
    """What the network of transformers gives for tokens without a mask."""
    import torch
    from transformers import AutoModel

    with torch.inference_mode():
        output = AutoModel.from_pretrained(str(folder)).eval().get_text_features(input_ids=torch.tensor(tokens))
    return unit(getattr(output, "pooler_output", output))


def image_rows(folder: Path, images: Sequence[Image.Image]) -> Any:
    """What transformers gives for images through its own processor, in float32."""
    import torch
    from transformers import AutoImageProcessor, AutoModel

    at = next(folder.glob("0_*"), folder)
    settings = json.loads((at / "preprocessor_config.json").read_text()) if at.name == "dinov3" else None
    reader = (
        at
        if settings is None
        else write_json_files(
            at.with_name("reader"), preprocessor_config=settings | {"image_processor_type": "ViTImageProcessor"}
        )
    )  # its own one needs torchvision
    pixels = AutoImageProcessor.from_pretrained(str(reader))(images=list(images), return_tensors="pt")["pixel_values"]
    model = AutoModel.from_pretrained(str(at), dtype=torch.float32).eval()
    with torch.inference_mode():
        if hasattr(model, "get_image_features"):
            output = model.get_image_features(pixel_values=pixels)
            return unit(getattr(output, "pooler_output", output))
        output = model(pixel_values=pixels)
    return unit(output.pooler_output if model.config.model_type == "swin" else output.last_hidden_state[:, 0])


class TestImages:
    """Every layout loads as it was published."""

    @pytest.mark.parametrize("name", BUILDERS)
    def test_layout_gives_the_image_rows_of_transformers(self, place: Path, name: str) -> None:
        """By torch and by ONNX Runtime; half precision is computed in float32."""
        folder = built(name, place)
        images = pictures(4)
        expected = image_rows(folder, images)
        for encoder in encoders(folder, place):
            rows = encoder.encode_images(batch(encoder, images))
            assert rows.dtype == np.float32
            assert lowest_cosine(expected, rows) > EXACT
            assert encoder.has_text == (name in READERS)

    def test_encoder_of_images_with_modules_gives_their_rows(self, place: Path) -> None:
        """A folder of sentence-transformers says itself how the tokens become one row."""
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.base.modules import Transformer
        from sentence_transformers.sentence_transformer.modules import Pooling

        network = Transformer(str(built("dinov2", place)))
        model = SentenceTransformer(modules=[network, Pooling(network.get_embedding_dimension(), "mean")], device="cpu")
        folder = place / "dinov2-mean"
        model.save(str(folder), create_model_card=False)
        images = pictures(3)
        expected = model.encode(images, normalize_embeddings=True, show_progress_bar=False)
        for encoder in encoders(folder, place):
            rows = encoder.encode_images(batch(encoder, images))
            assert lowest_cosine(expected, rows) > EXACT
            assert not encoder.has_text

    @pytest.mark.parametrize("name", SEERS)
    def test_encoder_of_images_refuses_texts(self, place: Path, name: str) -> None:
        """Its space has no place for them, whatever the dimensions of a text model are."""
        folder = built(name, place)
        for encoder in encoders(folder, place):
            with pytest.raises(ModelError, match="takes images only"):
                encoder.encode_texts(["a photo"])
        words = build_tiny_words(place / "words")
        with pytest.raises(ModelError, match=r"does not fit model .* trained on images alone"):
            load_model(str(folder), text_model=str(words))


class TestRefusals:
    """Relatives of CLIP that sortd cannot use are refused with the reason."""

    @pytest.mark.parametrize(
        ("build", "reason"),
        [
            (build_align, "the EfficientNetImageProcessor of this model requires rescale_offset"),
            (build_blip, r"lacks weights of its network: .* it holds .*, which the network does not know"),
        ],
    )
    def test_layout_that_cannot_be_used_is_refused(
        self, tmp_path: Path, build: Callable[[Path], Path], reason: str
    ) -> None:
        """ALIGN has other preprocessing, and published BLIPs are other networks than the one with two towers."""
        folder = build(tmp_path / "model")
        with pytest.raises(ModelError, match=reason):
            load_model(str(folder), backend="torch")


class TestTexts:
    """The row of a class's name does not depend on the names of other classes."""

    @pytest.mark.parametrize("name", READERS)
    def test_text_alone_and_in_company_has_one_row(self, place: Path, name: str) -> None:
        """Whatever the length of the others, by torch and by ONNX Runtime."""
        for encoder in encoders(built(name, place), place):
            together = encoder.encode_texts(TEXTS)
            alone = np.concatenate([encoder.encode_texts([text]) for text in TEXTS])
            assert lowest_cosine(alone, together) > EXACT

    def test_text_model_alone_and_in_company_has_one_row(self, place: Path) -> None:
        """A separate text model, too."""
        clip = built("sentence-transformers", place)
        words = distil(build_tiny_words(place / "distilled"), clip)
        encoder = load_model(str(clip), text_model=str(words), backend="torch")
        alone = np.concatenate([encoder.encode_texts([text]) for text in TEXTS])
        assert lowest_cosine(alone, encoder.encode_texts(TEXTS)) > EXACT

    @pytest.mark.parametrize("name", [name for name in READERS if not name.startswith("siglip")])
    def test_layout_gives_the_text_rows_of_transformers(self, place: Path, name: str) -> None:
        """Cut at the length of the network, with the mask of the tokenizer."""
        folder = built(name, place)
        expected = text_rows(folder, TEXTS)
        assert lowest_cosine(expected[:1], expected[1:2]) < 1 - 1e-6
        for encoder in encoders(folder, place):
            assert lowest_cosine(expected, encoder.encode_texts(TEXTS)) > EXACT

    @pytest.mark.parametrize("name", ["siglip", "siglip2"])
    def test_siglip_text_equals_that_of_transformers(self, place: Path, name: str) -> None:
        """Padded to the length of the model without a mask, in lower case."""
        folder = built(name, place)
        expected = siglip_rows(folder, TEXTS)
        for encoder in encoders(folder, place):
            assert lowest_cosine(expected, encoder.encode_texts(TEXTS)) > EXACT

    @pytest.mark.parametrize("side", ["right", "left", None])
    def test_siglip2_pads_on_the_right_whatever_its_settings_say(self, place: Path, side: str | None) -> None:
        """As in its training; transformers' class for it pads on the left unless the settings say otherwise."""
        folder = built("siglip2", place)
        copied = Path(shutil.copytree(folder, place / f"siglip2-{side}"))
        file = copied / "tokenizer_config.json"
        settings = {key: value for key, value in json.loads(file.read_text()).items() if key != "padding_side"}
        file.write_text(json.dumps(settings if side is None else settings | {"padding_side": side}))
        expected = rows_of_tokens(folder, [trained_tokens(folder, text) for text in TEXTS])
        for encoder in encoders(copied, place):
            assert lowest_cosine(expected, encoder.encode_texts(TEXTS)) > EXACT

    @pytest.mark.parametrize("name", ["siglip", "siglip2"])
    def test_siglip_changes_no_table_of_transformers(self, place: Path, name: str) -> None:
        """Other code in the process gets the tokenizers that it asks for."""
        from transformers.models.auto import tokenization_auto

        before = dict(tokenization_auto.TOKENIZER_MAPPING_NAMES)
        load_model(str(built(name, place)), backend="torch")
        assert before == tokenization_auto.TOKENIZER_MAPPING_NAMES
