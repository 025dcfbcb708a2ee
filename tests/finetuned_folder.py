"""Fine-tuned models made without training: a small ViT of random weights whose head tells the three colours apart."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sortd.encoder.finetuned import (
    CONFIG_FILE,
    FACTS_FILE,
    METRICS_FILE,
    PROCESSOR_FILE,
    WEIGHTS_FILE,
    FinetunedFacts,
    facts_json,
    read_facts,
)
from sortd.events import Fit, Preprocessing
from tests.daemon_process import COLOURS, picture

SIDE = 32
SEEN = Preprocessing(SIDE, SIDE, SIDE, 3, Fit.STRETCH)
PROCESSOR = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3}
HELD_OUT = 40


def write_folder(
    folder: Path,
    labels: Sequence[str] = tuple(COLOURS),
    *,
    verdict: str = "stronger",
    config: dict[str, Any] | None = None,
    weights: bytes = b"not looked at before it is loaded",
) -> FinetunedFacts:
    """Write all that is read without torch, with 40 held-out images of which 38 were right and the sure ones all."""
    folder.mkdir(parents=True)
    names = {str(index): label for index, label in enumerate(labels)}
    (folder / CONFIG_FILE).write_text(json.dumps({**(config or {"model_type": "vit"}), "id2label": names}))
    (folder / PROCESSOR_FILE).write_text(json.dumps({**PROCESSOR, "image_std": [0.5] * 3}))
    (folder / WEIGHTS_FILE).write_bytes(weights)
    comparison = {
        "images": 40,
        "verdict": verdict,
        "finetuned_accuracy": 0.95,
        "best_mode_accuracy": 0.9,
        "best_mode": "mixed",
    }
    facts = FinetunedFacts(
        folder=folder,
        dataset="Colours",
        labels=tuple(labels),
        temperature=1.0,
        base="a made one",
        model_id="",
        preprocessing=SEEN,
        decoding="draft",
        created="2026-01-01T00:00:00Z",
        confidence=np.linspace(0.5, 0.999, HELD_OUT),
        is_right=np.arange(HELD_OUT) > 1,
        classes=np.arange(HELD_OUT) % len(labels),
        metrics={"comparison": comparison},
    )
    (folder / METRICS_FILE).write_text(json.dumps(facts.metrics))
    (folder / FACTS_FILE).write_text(facts_json(facts))
    return replace(read_facts(folder))


def make_vit(folder: Path, labels: Sequence[str] = tuple(COLOURS)) -> FinetunedFacts:
    """Write a working model: the real ``ViTForImageClassification``, its head fitted in closed form."""
    import torch
    from safetensors.torch import save
    from transformers import ViTConfig, ViTForImageClassification

    from sortd.finetune.model import gaussian_head

    config = ViTConfig(
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=SIDE,
        patch_size=16,
        num_labels=len(labels),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ViTForImageClassification(config).eval()
    own = np.repeat(np.arange(len(labels)), 8)
    shown = [picture(labels[at], 1000 + index).resize((SIDE, SIDE)) for index, at in enumerate(own.tolist())]
    with torch.inference_mode():
        values = torch.from_numpy(np.stack([_values(one) for one in shown]))
        features = model.vit(pixel_values=values).last_hidden_state[:, 0].double().numpy()
    weight, bias = gaussian_head(features, own, np.ones(len(own)), count=len(labels))
    with torch.no_grad():
        model.classifier.weight.copy_(torch.from_numpy(weight))
        model.classifier.bias.copy_(torch.from_numpy(bias))
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    said = {**config.to_dict(), "architectures": ["ViTForImageClassification"]}
    said.pop("label2id", None)
    return write_folder(folder, labels, config=said, weights=save(tensors))


def _values(image: Image.Image) -> np.ndarray[Any, np.dtype[np.float32]]:
    return ((np.asarray(image) / 255 - 0.5) / 0.5).astype(np.float32).transpose(2, 0, 1)
