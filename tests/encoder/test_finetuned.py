"""The folder of a fine-tuned model: what is read, what is refused, and what the facts say of a decision."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sortd.encoder.finetuned import (
    FinetunedFacts,
    build_image_classifier,
    calibrated,
    facts_json,
    load_finetuned,
    read_facts,
)
from sortd.errors import ModelError
from sortd.events import Fit, Preprocessing
from sortd.files import sha256_of
from tests.tiny_vit import SIDE, build_tiny_vit

LABELS = ("cats", "dogs", "weißes \udcff")
"""The last one is no UTF-8."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole folder, its network of random weights."""
    import torch
    from safetensors.torch import save_file

    folder = build_tiny_vit(tmp_path_factory.mktemp("finetuned") / "model")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config |= {"architectures": ["ViTForImageClassification"], "id2label": dict(enumerate(LABELS))}
    config["label2id"] = {label: index for index, label in enumerate(LABELS)}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    torch.manual_seed(0)
    save_file(build_image_classifier(folder).state_dict(), folder / "model.safetensors")
    confidence = np.linspace(0.4, 1.0, 60)
    facts = FinetunedFacts(
        folder=folder,
        dataset="Pets",
        labels=LABELS,
        temperature=1.5,
        base="tiny",
        model_id="",
        preprocessing=Preprocessing(SIDE, SIDE, SIDE, 2, Fit.STRETCH),
        decoding="draft",
        created="2026-01-01T00:00:00Z",
        confidence=confidence,
        is_right=confidence > 0.6,
        classes=np.arange(60) % 3,
        metrics={"comparison": {"verdict": "level"}},
    )
    (folder / "metrics.json").write_text(json.dumps(facts.metrics), "utf-8")
    (folder / "sortd.json").write_text(facts_json(facts), "utf-8", "backslashreplace")
    return folder


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    import shutil

    return Path(shutil.copytree(written, tmp_path / "model"))


def test_facts_written_are_read_back(written: Path) -> None:
    """Names that are no UTF-8, the preprocessing and the held-out answers survive."""
    facts = read_facts(written)
    assert facts.labels == LABELS
    assert facts.preprocessing == Preprocessing(SIDE, SIDE, SIDE, 2, Fit.STRETCH)
    assert facts.verdict == "level"
    assert facts.is_right.tolist() == (np.linspace(0.4, 1.0, 60) > 0.6).tolist()
    assert facts.model_id.startswith("finetuned-3-torch-")


def test_facts_of_a_folder_are_read_without_torch(written: Path) -> None:
    """What only looks at a model is not to pay for loading one."""
    import subprocess
    import sys

    asked = (
        "import sys; from pathlib import Path; from sortd.encoder.finetuned import read_facts; "
        f"read_facts(Path({str(written)!r})); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", asked], check=False).returncode == 0


def test_load_finetuned_gives_the_logits_of_its_network(written: Path) -> None:
    """Logits are those of the module on pixels normalised by the processor, in float32."""
    import torch

    model = load_finetuned(written, device="cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (5, SIDE, SIDE, 3), dtype=np.uint8)
    with torch.inference_mode():
        values = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 / 0.5 - 1
        expected = model._network.module(pixel_values=values).logits.numpy()
    logits = model.encode_images(pixels)
    assert logits.dtype == np.float32
    assert np.allclose(logits, expected, atol=1e-4)
    assert model.encode_images(pixels[:0]).shape == (0, 3)
    with pytest.raises(ValueError, match="uint8"):
        model.encode_images(pixels[:, :-1])


def test_calibrated_with_a_temperature_softens_probabilities() -> None:
    """Logits are divided by it, and rows sum to one."""
    logits = np.array([[3.0, 0.0, -3.0]], np.float32)
    expected = np.exp(logits / 1.5) / np.exp(logits / 1.5).sum()
    assert np.allclose(calibrated(logits, 1.5), expected)


def test_facts_what_decides_is_part_of_the_identity(copied: Path) -> None:
    """Another temperature is another model; a retold metric is not."""
    before = read_facts(copied).model_id
    retold = {"comparison": {"verdict": "weaker"}}
    (copied / "metrics.json").write_text(json.dumps(retold), "utf-8")
    assert read_facts(copied).model_id == before
    change(copied / "sortd.json", temperature=2.0)
    assert read_facts(copied).model_id != before


def change(file: Path, **values: Any) -> None:
    """Change keys of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | values), "utf-8")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda folder: folder.rename(folder.with_name("away")), "no fine-tuned model"),
    "no facts": (lambda folder: (folder / "sortd.json").unlink(), "sortd.json is missing"),
    "nested": (lambda folder: (folder / "sortd.json").write_text("[" * 200_000), "sortd.json is damaged"),
    "no JSON": (lambda folder: (folder / "sortd.json").write_text("{"), "sortd.json is damaged"),
    "no object": (lambda folder: (folder / "sortd.json").write_text("[]"), "not a JSON object"),
    "other format": (lambda folder: change(folder / "sortd.json", format=2), "format 2"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
    "cut weights": (lambda folder: (folder / "model.safetensors").write_bytes(b"short"), "has 5 bytes instead of"),
    "no processor": (lambda folder: (folder / "preprocessor_config.json").unlink(), "preprocessor_config.json is"),
    "one label": (lambda folder: change(folder / "sortd.json", labels=["cats"]), "two or more"),
    "label twice": (lambda folder: change(folder / "sortd.json", labels=["a", "a", "b"]), "two or more"),
    "no temperature": (lambda folder: change(folder / "sortd.json", temperature=0), "temperature is 0"),
    "other classes": (lambda folder: change(folder / "config.json", id2label={"0": "x"}), "names other classes"),
    "any size": (
        lambda folder: change(
            folder / "sortd.json",
            preprocessing={"shortest_edge": 9, "crop_height": 9, "crop_width": 9, "resample": 3, "fit": "whole"},
        ),
        "its images have different sizes",
    ),
    "no preprocessing": (lambda folder: change(folder / "sortd.json", preprocessing=7), "sortd.json is damaged"),
    "too large a number": (
        lambda folder: change(folder / "sortd.json", weights={"bytes": 1e400}),
        "sortd.json is damaged",
    ),
    "no verdict": (lambda folder: change(folder / "metrics.json", comparison={"verdict": "good"}), "the verdict is"),
    "uneven columns": (
        lambda folder: change(folder / "sortd.json", held_out={"confidence": [1], "is_right": [], "classes": []}),
        "different lengths",
    ),
    "not a probability": (
        lambda folder: change(folder / "sortd.json", held_out={"confidence": [7], "is_right": [1], "classes": [0]}),
        "not a probability",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_read_facts_damaged_folder_is_refused_with_the_cause(copied: Path, damage: str) -> None:
    """Every kind of damage is a sentence that names it, and never an answer."""
    hurt, said = DAMAGE[damage]
    hurt(copied)
    with pytest.raises(ModelError, match=said):
        read_facts(copied)


def test_load_finetuned_changed_weights_are_refused(copied: Path) -> None:
    """The same size is not enough: one flipped bit is found when the weights are loaded."""
    file = copied / "model.safetensors"
    held = bytearray(file.read_bytes())
    held[-1] ^= 1
    file.write_bytes(held)
    assert read_facts(copied)
    with pytest.raises(ModelError, match="was changed"):
        load_finetuned(copied, device="cpu")


def test_load_finetuned_weights_of_another_network_are_refused(copied: Path) -> None:
    """A whole file that does not fit the configuration is said to be that."""
    change(copied / "config.json", hidden_size=64)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_finetuned(copied, device="cpu")


def test_load_finetuned_network_without_finite_logits_is_refused(copied: Path) -> None:
    """It fails when it is loaded, not on somebody's image."""
    import torch
    from safetensors.torch import load_file, save_file

    file = copied / "model.safetensors"
    tensors = load_file(file)
    tensors["classifier.bias"] = torch.full_like(tensors["classifier.bias"], float("nan"))
    save_file(tensors, file)
    weights = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    change(copied / "sortd.json", weights=weights)
    with pytest.raises(ModelError, match="not finite"):
        load_finetuned(copied, device="cpu")
