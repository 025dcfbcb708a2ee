"""Prototypes of a dataset on the disk, made with the encoder of the tests."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sortd.classify.build import build
from sortd.classify.prototypes import PrototypeSet
from sortd.classify.types import DecisionSettings, SupportSet
from tests.fake_encoder import SIDE, FakeEncoder


def make_prototypes(dataset: Path, settings: DecisionSettings | None = None, **changed: Any) -> PrototypeSet:
    """Return what a rebuild of the dataset gives, with these fields changed."""
    encoder = FakeEncoder()
    labels = tuple(sorted(folder.name for folder in (dataset / "Clases").iterdir()))
    files = [
        (index, file) for index, label in enumerate(labels) for file in sorted((dataset / "Clases" / label).iterdir())
    ]
    pixels = np.stack([np.asarray(Image.open(file).convert("RGB").resize((SIDE, SIDE))) for _, file in files])
    support = SupportSet(
        labels=labels,
        embeddings=encoder.encode_images(pixels),
        classes=np.asarray([index for index, _ in files], np.int64),
        sources=tuple(str(file) for _, file in files),
        text=encoder.encode_texts(labels),
        text_mean=encoder.encode_texts(["thing"])[0],
        encoder_id=encoder.encoder_id,
    )
    return replace(build(support, settings or DecisionSettings(), generation=1), **changed)
