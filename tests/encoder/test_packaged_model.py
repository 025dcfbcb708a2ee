"""The model in the package: loads offline, means something, fits its size, names nothing of where it came from."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests.daemon_process import PATIENCE_SECONDS

MODEL = Path(__file__).parents[2] / "sortd" / "model"
SAMPLE = Path(__file__).parents[2] / "Data" / "Tornillos" / "Clases"
"""Drawn screws, which ship."""
PHOTOS = Path(__file__).parents[2] / "shared" / "data" / "photos" / "tornillos"
"""Photos of screws: tried too where they are there."""
MEGABYTE = 1_000_000

pytestmark = pytest.mark.skipif(not (MODEL / "model.safetensors").exists(), reason="the packaged model is not there")


@pytest.fixture(scope="module")
def clip() -> Any:
    """Load the packaged model as sortd does, without the network."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(MODEL), device="cpu", local_files_only=True)


def disc(colour: tuple[int, int, int], size: tuple[int, int] = (90, 140)) -> Image.Image:
    """Draw a disc on white."""
    image = Image.new("RGB", size, (255, 255, 255))
    ImageDraw.Draw(image).ellipse((15, 15, 75, 75), fill=colour)
    return image


def test_packaged_model_is_below_thirty_megabytes() -> None:
    """The limit of the package."""
    assert sum(file.stat().st_size for file in MODEL.iterdir()) <= 30 * MEGABYTE


def test_packaged_model_has_no_code_or_pickle() -> None:
    """Only safetensors, JSON and the card."""
    assert {file.suffix for file in MODEL.iterdir()} <= {".safetensors", ".json", ".md"}


def test_packaged_model_contains_no_machine_path() -> None:
    """The files do not depend on where they were made."""
    for file in MODEL.glob("*.json"):
        assert not re.search(r"/(work|tmp|home|root|Users)/", file.read_text(encoding="utf-8")), file.name


@pytest.mark.slow
def test_packaged_model_loads_offline() -> None:
    """A new interpreter loads it, and embeds a text and an image."""
    program = (
        "import sys; from PIL import Image; from sentence_transformers import SentenceTransformer\n"
        "m = SentenceTransformer(sys.argv[1], device='cpu')\n"
        "print(m.encode(['a dog']).shape[1] == m.encode([Image.new('RGB', (70, 50))]).shape[1])\n"
    )
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", program, str(MODEL)],
        env=offline,
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE_SECONDS,
    )
    assert done.stdout.strip() == "True"


def test_packaged_model_computes_in_float32(clip: Any) -> None:
    """Float16 arithmetic is slow on most processors."""
    assert {str(weight.dtype) for weight in clip.parameters()} == {"torch.float32"}


def test_packaged_model_images_of_any_shape_have_finite_rows(clip: Any) -> None:
    """Wide, tall, tiny and large."""
    images = [Image.new("RGB", size, (120, 60, 30)) for size in ((900, 30), (20, 400), (1, 1), (64, 64))]
    rows = clip.encode(images)
    assert rows.shape == (4, clip.encode(["a dog"]).shape[1])
    assert bool(np.isfinite(rows).all())


def test_packaged_model_similar_images_are_near(clip: Any) -> None:
    """A disc of nearly the same red, compared with a blue one."""
    red, reddish, blue = clip.encode([disc((210, 30, 30)), disc((190, 40, 35), (100, 150)), disc((30, 40, 200))])
    assert cosine(red, reddish) > cosine(red, blue)


def test_packaged_model_row_is_independent_of_its_batch(clip: Any) -> None:
    """Statistics of a batch must have no influence."""
    images = [disc((10 * i, 90, 200 - 10 * i)) for i in range(8)]
    assert np.allclose(clip.encode(images)[3], clip.encode([images[3]])[0], atol=1e-4)


def test_packaged_model_tokenises_every_printable_word(clip: Any) -> None:
    """No class name becomes the unknown token."""
    tokenizer = clip.tokenizer
    words = ["tornillo", "qwxzk", "M3x10", "under_score", "50%", "a-b", "#9", "Ñandú"]
    for word in words:
        assert tokenizer.unk_token_id not in tokenizer(word)["input_ids"], word


def test_packaged_model_image_size_is_that_of_the_processor() -> None:
    """The image tower refuses other sizes."""
    towers = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    processor = json.loads((MODEL / "preprocessor_config.json").read_text(encoding="utf-8"))
    assert processor["crop_size"] == {"height": towers["vision_config"]["image_size"]} | {
        "width": towers["vision_config"]["image_size"]
    }


@pytest.mark.parametrize(("screws", "examples"), [one for one in ((SAMPLE, 3), (PHOTOS, 5)) if one[0].is_dir()])
def test_packaged_model_classifies_screws_from_few_examples(clip: Any, screws: Path, examples: int) -> None:
    """By the nearest of two class means."""
    rows, truth = [], []
    for label, folder in enumerate(sorted(path for path in screws.iterdir() if path.is_dir())[:2]):
        files = sorted(folder.iterdir())
        rows += list(clip.encode([Image.open(file).convert("RGB") for file in files]))
        truth += [label] * len(files)
    unit = np.array(rows) / np.linalg.norm(rows, axis=1, keepdims=True)
    labels = np.array(truth)
    support = np.concatenate([np.flatnonzero(labels == label)[:examples] for label in (0, 1)])
    query = np.setdiff1d(np.arange(len(labels)), support)
    means = np.stack([unit[support[:examples]].mean(axis=0), unit[support[examples:]].mean(axis=0)])
    right = (unit[query] @ means.T).argmax(axis=1) == labels[query]
    assert right.mean() >= 0.7


def cosine(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> float:
    """Give the cosine of two rows."""
    return float(first @ second / np.linalg.norm(first) / np.linalg.norm(second))
