"""Data and runs for the benchmarks: synthetic photos, datasets of them, one run of ``sortd once``, and a bare model.

The photos are noise of several scales, with a pattern for each class; no two are equal. A CLIP with the sizes of
ViT-B/32 and random weights replaces the real one, since speed does not depend on the weights.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.encoder import build_reference
from benchmarks.harness import resident_mebibytes
from sortd.encoder.clip import PASSIVE_WAIT

os.environ.setdefault(*PASSIVE_WAIT)  # the baseline waits as sortd does

REPOSITORY = Path(__file__).parents[1]
SCALES = ((6, 55.0), (24, 35.0), (96, 20.0), (384, 12.0))
"""Cells along an edge, and the standard deviation of their brightness, which is large for large cells."""
JPEG_QUALITY = 90
BATCHES = (1, 2, 4, 8, 16, 32)
"""Batch sizes at which a bare forward pass is measured."""
IMAGE_EVENTS = {"image.filed", "image.sent_to_review", "image.rejected"}


class Photographer:
    """Draws photos of one size; those of a class share a pattern with random shifts, brightness and grain."""

    def __init__(self, size: tuple[int, int]) -> None:
        """Make photos of ``size`` (width, height), in pixels."""
        self._size = size
        dice = np.random.default_rng(0)
        self._grain = dice.normal(0, 7, (size[1], size[0], 1)).astype(np.int16)
        self._forms: dict[int, npt.NDArray[np.int16]] = {}

    def take(self, path: Path, *, label: int, number: int) -> None:
        """Write one photo of a class as JPEG."""
        dice = np.random.default_rng([label, number, *self._size])
        forms = np.roll(self._look_of(label), dice.integers(0, self._size[0] // 8), axis=1)
        grain = np.roll(self._grain, dice.integers(0, self._size[1]), axis=0)
        pixels = np.clip(forms + grain + np.int16(dice.integers(-20, 20)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(path, quality=JPEG_QUALITY)

    def _look_of(self, label: int) -> npt.NDArray[np.int16]:
        if label not in self._forms:
            dice = np.random.default_rng(label)
            width, height = self._size
            total = np.tile(dice.integers(60, 200, 3).astype(np.float32), (height, width, 1))
            for cells, deviation in SCALES:
                noise = dice.normal(0, deviation, (cells * 3 // 4, cells, 3)).astype(np.float32)
                for channel in range(3):
                    plane = Image.fromarray(noise[:, :, channel]).resize(self._size, Image.Resampling.BILINEAR)
                    total[:, :, channel] += np.asarray(plane)
            self._forms[label] = total.astype(np.int16)
        return self._forms[label]


def label_of(number: int, classes: int) -> str:
    """Return the class of a photo by its number."""
    return f"class {number % classes:02}"


def make_references(clases: Path, *, classes: int, references: int, size: tuple[int, int]) -> None:
    """Write references of some classes in turn."""
    photographer = Photographer(size)
    for number in range(references):
        folder = clases / label_of(number, classes)
        folder.mkdir(parents=True, exist_ok=True)
        photographer.take(folder / f"reference {number:03}.jpg", label=number % classes, number=number)


def make_photos(folder: Path, *, classes: int, photos: int, size: tuple[int, int]) -> None:
    """Write photos of the same classes that are not references."""
    folder.mkdir(parents=True, exist_ok=True)
    photographer = Photographer(size)
    for number in range(photos):
        photographer.take(folder / f"photo {number:05}.jpg", label=number % classes, number=1_000_000 + number)


def make_model(folder: Path) -> Path:
    """Write a CLIP of ViT-B/32's sizes and random weights, the same each time."""
    import torch

    folder.mkdir(parents=True)
    torch.manual_seed(0)
    return build_reference(folder)


@dataclass(frozen=True, slots=True)
class OnceRun:
    """The result of one ``sortd once``, by its log lines."""

    outcomes: dict[str, str]
    """Name of each photo: the label that it was given."""
    seconds: float
    """From the loaded model to the last image's line."""
    start_seconds: float
    """From the start of the process to the loaded model."""
    encoder_id: str
    stages: dict[str, float]
    """Mean milliseconds per image and stage, from the lines of the images."""
    resident_mebibytes: float
    """Peak memory of the process, without its decoders."""
    lines: list[dict[str, Any]] = field(repr=False)

    @property
    def images_per_second(self) -> float:
        """Images filed each second."""
        return len(self.outcomes) / self.seconds


def run_once(config: Path, *, threads: int | None = None) -> OnceRun:
    """Run ``sortd once`` in a new process and return its result.

    Raises:
        RuntimeError: it failed; the message ends with what it said last.
    """
    environment = {**os.environ, "SORTD_LOG__FORMAT": "json", "HF_HUB_OFFLINE": "1"}
    environment.pop("OMP_NUM_THREADS", None)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "sortd", "once", "--config", str(config)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env=environment,
    )
    assert process.stderr is not None
    heard, mebibytes = [], 0.0
    for line in process.stderr:
        heard.append((time.perf_counter(), line))
        mebibytes = max(mebibytes, resident_mebibytes(process.pid, peak=True))  # ru_maxrss has the parent's, too
    process.wait()
    process.stderr.close()
    said = [(at, json.loads(line)) for at, line in heard if line.startswith("{")]
    if process.returncode:
        raise RuntimeError("".join(line for _, line in heard[-10:]))
    images = [(at, line) for at, line in said if line["event"] in IMAGE_EVENTS]
    loaded = next((at, line) for at, line in said if line["event"] == "model.loaded")
    stages = ("decode", "encode", "move")
    return OnceRun(
        outcomes={Path(line["path"]).name: str(line.get("label")) for _, line in images},
        seconds=max((at for at, _ in images), default=loaded[0]) - loaded[0],
        start_seconds=loaded[0] - began,
        encoder_id=str(loaded[1]["encoder_id"]),
        stages={name: statistics.fmean(line[f"{name}_ms"] for _, line in images) for name in stages if images},
        resident_mebibytes=mebibytes,
        lines=[line for _, line in said],
    )


def put(photos: Path, inbox: Path) -> None:
    """Fill an inbox with hard links of photos, which need no space and have the photos' stamps."""
    shutil.rmtree(inbox, ignore_errors=True)
    shutil.copytree(photos, inbox, copy_function=os.link)


def forward_seconds(forward: Callable[[int], object], *, seconds: float = 4.0) -> dict[int, float]:
    """Time a bare forward pass at several batch sizes, in turns, so that other load affects all equally.

    Args:
        forward: embeds a batch of the size that it is given, on tensors that are ready.
        seconds: how long to measure, about.

    Returns:
        By batch size: seconds an image, the median of the turns.
    """
    for size in BATCHES:
        forward(size)
    times: dict[int, list[float]] = {size: [] for size in BATCHES}
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(times[BATCHES[0]]) < 3:
        for size in BATCHES:
            began = time.perf_counter()
            forward(size)
            times[size].append((time.perf_counter() - began) / size)
    return {size: statistics.median(taken) for size, taken in times.items()}


def torch_forward(model: Path) -> Callable[[int], object]:
    """Return the bare forward of a CLIP's image tower on tensors that are ready, by transformers on torch."""
    import torch
    from transformers import CLIPModel

    clip = CLIPModel.from_pretrained(str(model), local_files_only=True).eval()
    side = clip.config.vision_config.image_size
    pixels = torch.randn(max(BATCHES), 3, side, side)

    def forward(size: int) -> object:
        with torch.inference_mode():
            return clip.get_image_features(pixel_values=pixels[:size])

    return forward


def onnx_forward(model: Path, cache: Path) -> Callable[[int], object]:
    """Return the forward of the int8 image tower by ONNX Runtime, on pixels that are ready."""
    from sortd.encoder.backends import load_encoder

    encoder = load_encoder(str(model), backend="onnx-int8", cache_dir=cache)
    seen = encoder.preprocessing
    shape = (max(BATCHES), seen.crop_height, seen.crop_width, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return lambda size: encoder.encode_images(pixels[:size])
