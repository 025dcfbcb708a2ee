"""Sides of comparisons and their data: synthetic photos, a model, sortd as a daemon or once, and a bare forward pass.

The photos are noise of several scales, with a pattern for each class; no two are equal. A CLIP with the sizes of
ViT-B/32 and random weights replaces the real one, since speed does not depend on the weights.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.comparison import Piece, Side, say, timed
from benchmarks.encoder import build_reference
from benchmarks.harness import REPOSITORY, processor_seconds, resident_mebibytes, write_config
from sortd.encoder.clip import PASSIVE_WAIT
from sortd.encoder.models import locate_pair
from sortd.encoder.onnx_encoder import Exports, write_verdict
from tests.daemon_process import DaemonProcess

os.environ.setdefault(*PASSIVE_WAIT)  # the baseline waits as sortd does

SCALES = ((6, 55.0), (24, 35.0), (96, 20.0), (384, 12.0))
"""Cells along an edge, and the standard deviation of their brightness, which is large for large cells."""
JPEG_QUALITY = 90
BATCHES = (1, 2, 4, 8, 16, 32)
"""Batch sizes at which a bare forward pass is measured."""
BACKENDS = ("torch", "onnx", "onnx-int8")
"""By the names of ``sortd.encoder.backends.load_model``."""
SETTLE_SECONDS = 0.1
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


class Photos:
    """Photos of which each round takes copies with other contents, so that no embedding is in a cache."""

    def __init__(self, folder: Path, *, classes: int, photos: int, size: tuple[int, int]) -> None:
        """Draw so many photos of the classes of ``make_references`` that are not references."""
        self.folder = folder
        folder.mkdir(parents=True)
        photographer = Photographer(size)
        for number in range(photos):
            photographer.take(folder / f"photo {number:05}.jpg", label=number % classes, number=1_000_000 + number)
        self._files, self._copies = sorted(folder.iterdir()), 0
        self._taken: dict[Path, int] = defaultdict(int)

    def copy_next(self, target: Path, count: int) -> list[Path]:
        """Write copies of the next photos, each in turn, to the emptied folder, synced; see ``original_name``."""
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        copies = []
        for _ in range(count):
            original = self._files[self._taken[target] % len(self._files)]
            self._taken[target] += 1
            self._copies += 1
            copies.append(target / f"{original.stem} copy {self._copies}.jpg")
            with copies[-1].open("wb") as file:
                file.write(with_comment(original.read_bytes(), f"{target} {self._copies}"))
                os.fsync(file.fileno())  # writing it back later would disturb what is measured
        return copies


def original_name(copy: str) -> str:
    """Return the name of the photo that was copied."""
    return copy.partition(" copy ")[0]


def with_comment(jpeg: bytes, text: str) -> bytes:
    """Return a JPEG with a comment: other bytes, but the same pixels."""
    comment = text.encode()
    return jpeg[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + jpeg[2:]


def make_model(folder: Path) -> Path:
    """Write a CLIP of ViT-B/32's sizes and random weights, the same each time."""
    import torch

    folder.mkdir(parents=True)
    torch.manual_seed(0)
    return build_reference(folder)


# ------------------------------------------------------------ what the sides share


def add_options(
    parser: argparse.ArgumentParser,
    *,
    photos: int,
    piece: int,
    pixels: str | None = None,
    backends: Sequence[str] = ("torch", "onnx-int8"),
) -> None:
    """Add the options of a comparison with sortd, with their defaults."""
    if pixels is not None:
        parser.add_argument("--pixels", default=pixels, help="size of the photos")
    parser.add_argument("--photos", type=int, default=photos, help="photos that are drawn")
    parser.add_argument("--piece", type=int, default=piece, help="photos for each side and round")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=backends)
    parser.add_argument("--model", type=Path, help="model folder; default: a ViT-B/32 with random weights")
    parser.add_argument("--keep", type=Path, help="folder that keeps the model and its exports for the next time")
    parser.add_argument("--folder", type=Path, help="parent of the temporary folder")


def size_of(pixels: str) -> tuple[int, int]:
    """Return width and height of a text such as 640x480."""
    width, _, height = pixels.partition("x")
    return int(width), int(height)


class Material:
    """A model, references and photos, which the sides of a comparison share."""

    def __init__(self, folder: Path, options: argparse.Namespace, *, classes: int = 10, references: int = 40) -> None:
        """Draw the photos and references, and make or find the model."""
        width, height = size_of(options.pixels)
        self.folder, kept = folder.resolve(), (options.keep or folder).resolve()
        self.cache, self.model = kept / "cache", (options.model or kept / "model").resolve()
        if not self.model.is_dir():
            make_model(self.model)
        say(f"drawing {options.photos} photos of {options.pixels} pixels")
        small = (min(width, 1000), min(height, 750))
        self.clases = self.folder / "Clases"
        make_references(self.clases, classes=classes, references=references, size=small)
        self.photos = Photos(self.folder / "photos", classes=classes, photos=options.photos, size=(width, height))

    def export(self, root: Path | None = None) -> Path:
        """Export the model to ONNX unless that was done, allow int8 for the datasets of a root, and return the folder.

        int8 is kept whatever it gains.
        """
        from sortd.encoder.export import make_exports

        exported = make_exports(locate_pair(str(self.model), None, self.cache), min_gain=0.0, on_progress=say)
        if root is not None:
            allow_int8(exported, root)
        return exported.folder

    def config(self, name: str, backend: str, **keys: object) -> Path:
        """Write the configuration of a sortd with a dataset of its own, and return it."""
        place = self.folder / name
        dataset = place / "Data" / "Photos"
        put(self.clases, dataset / "Clases")
        (dataset / "Images").mkdir(exist_ok=True)
        if backend != "torch":
            self.export(place / "Data" if backend == "onnx-int8" else None)
        values = {"abstain": "off", "settle_seconds": SETTLE_SECONDS, "cache_dir": self.cache, "model": self.model}
        return write_config(place, **{**values, "backend": backend.partition("-")[0], **keys})


def allow_int8(exported: Exports, root: Path) -> None:
    """Let int8 serve the datasets of a root without a comparison of decisions, since the weights are random."""
    write_verdict(exported, root, {"refusal": None, "filed": 0, "same": 0, "mean_cosine": 1.0})


def put(photos: Path, target: Path) -> None:
    """Fill a folder with hard links of photos, which need no space and have the photos' stamps."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(photos, target, copy_function=os.link)


# ------------------------------------------------------------ sortd


def check_backend(encoder_id: str, backend: str) -> None:
    """Raise RuntimeError unless an encoder runs on the backend."""
    wanted = {"torch": "", "onnx": "-onnx-fp32-", "onnx-int8": "-onnx-int8-"}[backend]
    if wanted not in encoder_id or (backend == "torch" and "-onnx-" in encoder_id):
        raise RuntimeError(f"{backend} was to serve, but {encoder_id} does")


class Filing:
    """The side of ``sortd run``: photos are moved into Images/ at once, and all must be filed.

    The daemon runs all the time, so no start is counted, nor is the settle time, in which nothing is done.
    """

    def __init__(self, material: Material, backend: str, **keys: object) -> None:
        """Start the daemon, wait until it is ready, and file some photos first; ``keys`` are settings."""
        config = material.config(backend, backend, **keys)
        self._photos, self._folder = material.photos, config.parent
        self._stages: dict[str, list[float]] = defaultdict(list)
        workers, under = {"SORTD_DECODING__WORKERS": "0"}, ("env", "--unset=OMP_NUM_THREADS")  # tests run with one each
        self.daemon = DaemonProcess(config, program="sortd", environment=workers, under=under)
        try:
            check_backend(str(self.daemon.wait_for("model.loaded")["encoder_id"]), backend)
            self.daemon.wait_for("daemon.ready")
            self.piece(8)
        except BaseException:
            self.daemon.process.kill()
            self.daemon.wait()
            raise
        self._stages.clear()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Stop the daemon and check its journals."""
        self.daemon.__exit__(kind)

    @property
    def pid(self) -> int:
        """The daemon's process."""
        return self.daemon.process.pid

    def side(self, count: int) -> Side:
        """Return a side that files so many photos."""
        return lambda: self.piece(count)

    def piece(self, count: int) -> Piece:
        """File so many photos."""
        photos, inbox = (
            self._photos.copy_next(self._folder / "next", count),
            self._folder / "Data" / "Photos" / "Images",
        )
        done: list[dict[str, Any]] = []
        heard, busy = len(self.daemon.lines), processor_seconds(self.pid)

        def is_over() -> bool:
            nonlocal heard
            new = self.daemon.lines[heard:]
            heard += len(new)
            done.extend(line for line in new if line["event"] in IMAGE_EVENTS)
            if done and time.perf_counter() < began + SETTLE_SECONDS:
                raise RuntimeError("the settle time, which is not counted, was not waited for")
            if any(line["event"] == "dataset.held" for line in new):
                raise RuntimeError(f"the guard holds the photos: {new[-1]}")
            return len(done) >= count

        began = time.perf_counter()
        for photo in photos:
            photo.rename(inbox / photo.name)
        self.daemon.wait_until(is_over, f"{count} photos are filed")
        seconds = time.perf_counter() - began - SETTLE_SECONDS
        for line in done:
            for stage in ("decode", "encode", "move"):
                self._stages[stage].append(line[f"{stage}_ms"])
        return Piece(count, seconds, processor_seconds(self.pid) - busy)

    def stages_ms(self) -> dict[str, float]:
        """Return the mean milliseconds of each stage of an image, by the daemon's lines."""
        return {stage: round(statistics.fmean(taken), 1) for stage, taken in self._stages.items()}


@dataclass(frozen=True, slots=True)
class OnceRun:
    """The result of one ``sortd once``, by its log lines."""

    outcomes: dict[str, str]
    """Name of each photo: the label that it was given."""
    seconds: float
    """From the loaded model to the last image's line."""
    first_seconds: float
    """From the loaded model to the first image's line."""
    start_seconds: float
    """From the start of the process to the loaded model."""
    encoder_id: str
    resident_mebibytes: float
    """Peak memory of the process, without its decoders."""
    lines: list[dict[str, Any]] = field(repr=False)


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
    return OnceRun(
        outcomes={Path(line["path"]).name: str(line.get("label")) for _, line in images},
        seconds=max((at for at, _ in images), default=loaded[0]) - loaded[0],
        first_seconds=min((at for at, _ in images), default=loaded[0]) - loaded[0],
        start_seconds=loaded[0] - began,
        encoder_id=str(loaded[1]["encoder_id"]),
        resident_mebibytes=mebibytes,
        lines=[line for _, line in said],
    )


# ------------------------------------------------------------ the bare forward pass


def forward_side(material: Material, backend: str, count: int) -> Side:
    """Return a side that runs a bare forward pass, on tensors that are ready, in batches of the best size.

    The best size is measured first, in turns, so that other load affects all equally.
    """
    forward = bare_forward(material, backend)
    times: dict[int, list[float]] = {size: [] for size in BATCHES}
    for _ in range(4):  # the first one is not counted
        for size in BATCHES:
            began = time.perf_counter()
            forward(size)
            times[size].append((time.perf_counter() - began) / size)
    best = min(BATCHES, key=lambda size: statistics.median(times[size][1:]))
    say(f"{backend}: the best batch of the bare forward is {best}")

    def work() -> int:
        batches = -(-count // best)
        for _ in range(batches):
            forward(best)
        return batches * best

    return timed(work)


def bare_forward(material: Material, backend: str) -> Callable[[int], object]:
    """Return the forward of a CLIP's image tower on a batch of a size: by transformers on torch, or by ONNX Runtime."""
    if backend != "torch":
        from sortd.encoder.backends import load_model

        material.export()
        encoder = load_model(str(material.model), backend=backend, cache_dir=material.cache)
        seen = encoder.preprocessing
        shape = (max(BATCHES), seen.crop_height, seen.crop_width, 3)
        images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        return lambda size: encoder.encode_images(images[:size])
    import torch
    from transformers import CLIPModel

    clip = CLIPModel.from_pretrained(str(material.model), local_files_only=True).eval()
    edge = clip.config.vision_config.image_size
    pixels = torch.randn(max(BATCHES), 3, edge, edge)

    def forward(size: int) -> object:
        with torch.inference_mode():
            return clip.get_image_features(pixel_values=pixels[:size])

    return forward
