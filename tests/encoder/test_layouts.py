"""Folders as the hub has them give the rows of transformers, by torch and by their export to ONNX."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sortd.encoder.backends import load_encoder
from sortd.encoder.clip import Encoder
from sortd.encoder.export import make_exports
from sortd.encoder.models import locate_pair
from tests.hub_folders import build_siglip, build_siglip2
from tests.tiny_clip import TEXT_LENGTH, Layout, Tower, build_tiny_clip
from tests.tiny_words import build_tiny_words

TEXTS = ["Screw", "a photo of a rusty screw in a box of nails", "x"]
EXACT = 1 - 1e-5
"""The least cosine of two rows that are equal but for the order of additions."""


def build_clip(folder: Path) -> Path:
    """Write a CLIP in the layout of transformers."""
    return build_tiny_clip(folder, layout=Layout.PLAIN)


def build_dual(folder: Path) -> Path:
    """Write a ConvNeXtV2 beside a BERT, as the packaged model is."""
    return build_tiny_clip(folder, 0, Tower.DUAL, Layout.PLAIN)


READERS: dict[str, Callable[[Path], Path]] = {
    "clip": build_clip,
    "dual encoder": build_dual,
    "siglip": build_siglip,
    "siglip2": build_siglip2,
}
"""Models of every type that reads texts."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the models of this file and their exports are."""
    return tmp_path_factory.mktemp("layouts")


def built(name: str, build: Callable[[Path], Path], place: Path) -> Path:
    """Return the folder of a model that is written once."""
    folder = place / name.replace(" ", "-")
    return folder if folder.exists() else build(folder)


def encoders(folder: Path, place: Path) -> list[Encoder]:
    """Return the encoder of a folder by torch and by ONNX Runtime."""
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    cache = place / "cache"
    make_exports(locate_pair(str(folder), None, cache))
    return [load_encoder(str(folder), backend=backend, cache_dir=cache) for backend in ("torch", "onnx")]


def lowest_cosine(left: Any, right: Any) -> float:
    """The least cosine between paired unit rows."""
    return float((np.asarray(left) * np.asarray(right)).sum(axis=1).min())


def siglip_rows(folder: Path, texts: Sequence[str]) -> Any:
    """What transformers gives for texts in lower case, padded to the length of the model and without a mask."""
    import torch
    from transformers import AutoModel, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
    texts = [text.lower() for text in texts]
    tokens = tokenizer(texts, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        output = AutoModel.from_pretrained(str(folder)).eval().get_text_features(input_ids=tokens["input_ids"])
        rows = getattr(output, "pooler_output", output)
    return (rows / rows.norm(dim=1, keepdim=True)).numpy()


class TestTexts:
    """The row of a class's name does not depend on the names of other classes."""

    @pytest.mark.parametrize("name", READERS)
    def test_text_alone_and_in_company_has_one_row(self, place: Path, name: str) -> None:
        """Whatever the length of the others, by torch and by ONNX Runtime."""
        for encoder in encoders(built(name, READERS[name], place), place):
            together = encoder.encode_texts(TEXTS)
            alone = np.concatenate([encoder.encode_texts([text]) for text in TEXTS])
            assert lowest_cosine(alone, together) > EXACT

    def test_text_model_alone_and_in_company_has_one_row(self, place: Path) -> None:
        """A separate text model, too."""
        clip, words = built("clip", build_clip, place), built("words", build_tiny_words, place)
        encoder = load_encoder(str(clip), text_model=str(words), backend="torch")
        alone = np.concatenate([encoder.encode_texts([text]) for text in TEXTS])
        assert lowest_cosine(alone, encoder.encode_texts(TEXTS)) > EXACT

    @pytest.mark.parametrize("name", ["siglip", "siglip2"])
    def test_siglip_text_equals_that_of_transformers(self, place: Path, name: str) -> None:
        """Padded to the length of the model without a mask, in lower case."""
        folder = built(name, READERS[name], place)
        expected = siglip_rows(folder, TEXTS)
        for encoder in encoders(folder, place):
            assert lowest_cosine(expected, encoder.encode_texts(TEXTS)) > EXACT
