"""The export of a model to ONNX: both towers are traced by torch, compared with torch, and stored in the cache.

Each tower is traced with its part of the preprocessing inside, and compared with torch for several batch sizes and text
lengths, since a trace can silently fix the size with which it was made. If int8 is faster on this machine, both towers
are also written in int8. The files are made in a temporary folder, which is renamed when it is complete. Only this
module uses both torch and ONNX.

The exporter is torch's by tracing (``dynamo=False``): the newer one needs the package onnxscript.
"""

import logging
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from sortd.arrays import FloatArray
from sortd.encoder.clip import TorchEncoder, lowest_cosine, normalise_rows
from sortd.encoder.models import LocatedModel, checksums, first_line
from sortd.encoder.onnx_encoder import (
    EXTRA,
    MANIFEST,
    MANIFESTS,
    OPSET,
    TOKENIZER,
    Exports,
    Manifest,
    Precision,
    TextInputs,
    export_folder,
    export_identity,
    find_exports,
    open_tower,
    text_inputs,
    tower_file,
)
from sortd.encoder.quantize import convolutions, photographic_noise, quantize, quantize_convolutions, weight_range
from sortd.errors import ModelError
from sortd.events import Preprocessing
from sortd.files import open_descriptor

if TYPE_CHECKING:
    import torch

CALIBRATION_IMAGES = 64
_MIN_COSINE = 0.9999  # between a row of torch and of its float32 export, which differ by the order of additions
_MIN_GAIN = 1.25  # speed of int8 relative to float32 from which its files are kept
_DISK_FACTOR = 2.5  # of the model's size: float16 weights become float32, or the network is convolutional
_FULL_DISK_BYTES = 1_000_000  # a disk with less free space is full: the files of an export are larger
_TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_TRIAL_TEXTS = ("a photo of a screw", "x", "itap of a " + "very " * 90 + "large thing", "ñandú ü 漢字", "two words")
_TIMED_RUNS = 5

Progress = Callable[[str], None]


def make_exports(
    model: LocatedModel,
    *,
    min_gain: float = _MIN_GAIN,
    on_progress: Progress = lambda _: None,
    write: Callable[[Path], None] | None = None,
) -> Exports:
    """Export a model, and a separate text model if there is one, unless a valid export exists.

    int8 is kept if it is ``min_gain`` times as fast as float32. ``on_progress`` is called with each step as it begins,
    ``write`` (default: ``write_export``) writes the files into an empty folder.

    Raises:
        ModelError: the extra is not installed, the export is not faithful, or there is no disk space.
    """
    export_identity(model)  # raises where ONNX Runtime is missing
    name, folder = model.clip.name, export_folder(model)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        on_progress("waiting for another export of the same model")
        with FileLock(f"{folder}.lock"):
            made = find_exports(model)
            if made is None:
                if find_spec("onnx") is None:
                    raise ModelError(f"the export to ONNX needs the package onnx, which is not installed: {EXTRA}")
                check_disk_space(model, folder.parent)
                _replace(folder, name, write or partial(write_export, model, min_gain, on_progress))
                made = find_exports(model)
    except OSError as error:
        raise ModelError(
            f"cannot export {name!r} to {folder}: {error.strerror or error}; make that folder writable, or set "
            f"`cache_dir`"
        ) from error
    if made is None:
        raise ModelError(f"the export of {name!r} in {folder} changed right after it was made; check that disk")
    return made


def _replace(folder: Path, name: str, write: Callable[[Path], None]) -> None:
    """Write an export to a temporary folder, sync it to the disk, and rename it to its place."""
    into, aside = folder.with_name(f"{folder.name}.{os.getpid()}.part"), folder.with_name(f"{folder.name}.old")
    for left_over in (*folder.parent.glob(f"{folder.name}.*part"), aside):  # of killed processes
        shutil.rmtree(left_over, ignore_errors=True)
    into.mkdir()
    before = logging.root.manager.disable
    try:
        logging.disable(logging.WARNING)  # exporters warn of much that the comparison with torch covers
        try:
            write(into)
        except Exception as error:  # exporters can raise anything
            raise ModelError(
                f"cannot export {name!r} to ONNX: {describe_failure(error, into)}; or set `backend: torch`"
            ) from error
        # The files are synced before the folder gets its name: from then on their checksums are cached by stamp.
        for path in (*into.iterdir(), into):
            with open_descriptor(path, os.O_RDONLY | os.O_CLOEXEC) as descriptor:
                os.fsync(descriptor)
        with suppress(FileNotFoundError):
            folder.rename(aside)
        into.rename(folder)
    finally:
        logging.disable(before)
        shutil.rmtree(into, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


def describe_failure(error: Exception, into: Path, *, usage: Callable[[Path], Any] = shutil.disk_usage) -> str:
    """Return the cause of a failed export in one line; on a full disk, libraries raise unrelated errors."""
    if isinstance(error, ModelError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename or into}: {error.strerror or error}; make room there"
    if usage(into).free < _FULL_DISK_BYTES:
        return f"{into}: the disk is full; make room there"
    return f"{type(error).__name__}: {first_line(error)}"


def check_disk_space(model: LocatedModel, place: Path, *, usage: Callable[[Path], Any] = shutil.disk_usage) -> None:
    """Raise ModelError if an export may not fit on its disk."""
    needed = _DISK_FACTOR * model.size_bytes
    free = usage(place).free
    if free < needed:
        raise ModelError(
            f"cannot export {model.clip.name!r} to ONNX: it takes up to {needed / 1e6:.0f} MB in {place}, where "
            f"{free / 1e6:.0f} MB are free; make room there, or set `cache_dir` to another disk"
        )


def write_export(model: LocatedModel, min_gain: float, on_progress: Progress, into: Path) -> None:
    """Write the files of an export into an empty folder.

    Raises:
        ModelError: the model does not load, or its export gives other rows.
    """
    on_progress("step 1 of 5, loading the model in torch")
    encoder = TorchEncoder(model, device="cpu")
    on_progress("step 2 of 5, writing its text tower")
    text = _export_text(encoder, into) if encoder.has_text else None
    on_progress("step 3 of 5, writing its image tower")
    _export_image(encoder, into)
    on_progress("step 4 of 5, comparing both with torch")
    _compare_images(encoder, into)
    if text is not None:
        _compare_texts(encoder, into, text)
    on_progress("step 5 of 5, measuring int8")
    gain = _quantize_towers(into, min_gain, encoder.preprocessing)
    files = sorted(path for path in into.iterdir() if path.name != MANIFEST)
    manifest = Manifest(
        identity=export_identity(model),
        dimensions=encoder.dimensions,
        preprocessing=encoder.preprocessing,
        text=text,
        gain=gain,
        weight_range=weight_range(),
        checksums={path.name: checksum for path, checksum in checksums(files).items()},
        made_with={name: version(name) for name in ("onnx", "torch", "transformers", "sentence-transformers")},
    )
    (into / MANIFEST).write_bytes(MANIFESTS.dump_json(manifest, indent=1))


# ---------------------------------------------------------------- towers


def _export_image(encoder: TorchEncoder, into: Path) -> None:
    """Trace the image tower, from pixels, uint8 (B, H, W, 3), to rows, with normalisation."""
    import torch

    class ImageTower(torch.nn.Module):
        """A module, since torch traces nothing else."""

        def __init__(self) -> None:
            super().__init__()
            self.clip = encoder.clip

        def forward(self, pixels: "torch.Tensor") -> "torch.Tensor":
            planes = pixels.permute(0, 3, 1, 2).to(torch.float32) * encoder.scale - encoder.shift
            rows: torch.Tensor = self.clip({"pixel_values": planes, "modality": "image"})["sentence_embedding"]
            return rows

    pixels = torch.from_numpy(photographic_noise(encoder.preprocessing, 2))
    _trace(ImageTower(), (pixels,), into / tower_file("image", Precision.FP32), {"pixels": {0: "images"}})


def _export_text(encoder: TorchEncoder, into: Path) -> TextInputs:
    """Trace the text tower, from tokens, int64 (B, L), to rows, and write the tokenizer."""
    import torch

    features = _features(encoder, list(_TRIAL_TEXTS))
    names = tuple(name for name in _TEXT_INPUTS if name in features)
    others = sorted(name for name, value in features.items() if torch.is_tensor(value) and name not in _TEXT_INPUTS)
    if others or "input_ids" not in names:
        raise ModelError(f"its text tower takes {', '.join(others) or 'no tokens'}, which sortd cannot export")

    class TextTower(torch.nn.Module):
        """A module, since torch traces nothing else."""

        def __init__(self) -> None:
            super().__init__()
            self.words = encoder.words

        def forward(self, *tokens: "torch.Tensor") -> "torch.Tensor":
            inputs = dict(zip(names, tokens, strict=True)) | {"modality": "text"}
            rows: torch.Tensor = self.words(inputs)["sentence_embedding"]
            return rows

    axes = {name: {0: "texts", 1: "tokens"} for name in names}
    tokens = tuple(features[name] for name in names)
    _trace(TextTower(), tokens, into / tower_file("text", Precision.FP32), axes)
    _write_tokenizer(encoder, into)
    lengths = {_features(encoder, [text])["input_ids"].shape[1] for text in _TRIAL_TEXTS[:2]}
    fixed = lengths.pop() if len(lengths) == 1 else None  # two different texts of equal length: always padded
    return TextInputs(names, int(encoder.words.tokenizer.pad_token_id or 0), fixed)


def _trace(
    tower: "torch.nn.Module", inputs: "tuple[torch.Tensor, ...]", file: Path, axes: dict[str, dict[int, str]]
) -> None:
    import torch

    tower.eval()
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns of every Python branch; the result is compared with torch
        torch.onnx.export(
            tower,
            inputs,
            str(file),
            input_names=list(axes),
            output_names=["rows"],
            dynamic_axes={**axes, "rows": {0: next(iter(axes.values()))[0]}},
            opset_version=OPSET,
            dynamo=False,
        )


# sentence-transformers publishes no types, hence Any.
def _features(encoder: TorchEncoder, texts: list[str]) -> dict[str, Any]:
    prepare = getattr(encoder.words, "preprocess", None) or encoder.words.tokenize  # its name before version 5.4
    features: dict[str, Any] = prepare(texts)
    return features


def _write_tokenizer(encoder: TorchEncoder, into: Path) -> None:
    """Write the tokenizer, with its truncation, in the format of the package ``tokenizers``."""
    from tokenizers import Tokenizer

    backend = getattr(encoder.words.tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError("its tokenizer is written in Python, which needs torch")
    tokenizer = Tokenizer.from_str(backend.to_str())
    if encoder.text_limit is None:
        tokenizer.no_truncation()
    else:
        tokenizer.enable_truncation(encoder.text_limit)
    tokenizer.no_padding()
    tokenizer.save(str(into / TOKENIZER))


# ---------------------------------------------------------------- comparison with torch


def _compare_images(encoder: TorchEncoder, into: Path) -> None:
    """Raise ModelError if the exported image tower gives other rows than torch."""
    tower = open_tower(into / tower_file("image", Precision.FP32))
    for count in (1, 5):
        pixels = photographic_noise(encoder.preprocessing, count)
        (rows,) = tower.run(None, {"pixels": pixels})
        _compare(encoder.encode_images(pixels), normalise_rows(rows, "image.onnx"), f"{count} images")


def _compare_texts(encoder: TorchEncoder, into: Path, text: TextInputs) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(into / TOKENIZER))
    tower = open_tower(into / tower_file("text", Precision.FP32))
    for texts in ([_TRIAL_TEXTS[0]], list(_TRIAL_TEXTS)):
        (rows,) = tower.run(None, text_inputs(tokenizer.encode_batch(texts), text))
        _compare(encoder.encode_texts(texts), normalise_rows(rows, "text.onnx"), f"{len(texts)} texts")


def _compare(expected: FloatArray, rows: FloatArray, what: str) -> None:
    lowest = lowest_cosine(expected, rows)
    if not lowest >= _MIN_COSINE:  # also for NaN
        raise ModelError(f"its export gives other rows than torch for {what} (cosine {lowest:.6f})")


# ---------------------------------------------------------------- int8


def _quantize_towers(into: Path, min_gain: float, preprocessing: Preprocessing) -> float:
    """Write both towers in int8 if the image tower gains enough speed; return its gain."""
    exact, fast = (into / tower_file("image", precision) for precision in Precision)
    inputs = {"pixels": photographic_noise(preprocessing, 1)}
    seconds = _run_seconds(exact, inputs)
    gain = 0.0
    for candidate in _int8_candidates(exact, preprocessing):
        candidate_gain = seconds / _run_seconds(candidate, inputs)
        if candidate_gain > gain:
            candidate.replace(fast)
            gain = candidate_gain
        else:
            candidate.unlink()
    if gain < min_gain:
        fast.unlink(missing_ok=True)
        return gain
    exact, fast = (into / tower_file("text", precision) for precision in Precision)
    if exact.exists() and not quantize(exact, fast, largest=weight_range()):
        fast.write_bytes(exact.read_bytes())
    return gain


def _int8_candidates(exact: Path, preprocessing: Preprocessing) -> Iterator[Path]:
    """Yield files of an image tower in int8: its matrix products, then (if it has several) also its convolutions."""
    candidate, between = exact.with_name("candidate.onnx"), exact.with_name("between.onnx")
    if quantize(exact, candidate, largest=weight_range()):
        yield candidate
    if convolutions(exact) > 1:
        images = photographic_noise(preprocessing, CALIBRATION_IMAGES)
        quantize_convolutions(exact, between, images, largest=weight_range())
        if not quantize(between, candidate, largest=weight_range()):
            between.replace(candidate)
        between.unlink(missing_ok=True)
        yield candidate


def _run_seconds(file: Path, inputs: dict[str, Any]) -> float:
    """Return the shortest processor time of several runs, in seconds; other programs hardly change it."""
    tower = open_tower(file, threads=1)
    tower.run(None, inputs)
    seconds: list[float] = []
    for _ in range(_TIMED_RUNS):
        began = time.process_time()
        tower.run(None, inputs)
        seconds.append(time.process_time() - began)
    return max(min(seconds), 1e-9)
