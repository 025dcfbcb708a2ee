"""The export of a model to ONNX: both towers traced by torch, held against its rows, and put into the cache whole.

Each tower is traced with what is left of its preprocessing inside, then held against torch on images and texts of
several batch sizes and lengths, since a trace can silently keep the size that it was made with. Where int8 is quicker
on this machine, both towers are written in int8 too. The files are made in a folder beside, which is renamed when it is
whole. This is the one module in which torch and ONNX meet.

The exporter is the one by tracing (``dynamo=False``): the newer one needs the package onnxscript.
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

import numpy as np

from sortd.arrays import Pixels
from sortd.encoder.base import Rows, normalise_rows
from sortd.encoder.models import ModelFolder, checksums, first_line
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
from sortd.encoder.torch_encoder import TorchEncoder
from sortd.errors import ModelError
from sortd.messages import Preprocessing

if TYPE_CHECKING:
    import torch

LEAST_COSINE = 0.9999
"""Between a row of torch and of its float32 export: what differs is the order of additions."""
LEAST_GAIN = 1.25
"""How many times as quick int8 must be for its files to be kept: less is not worth another set of embeddings."""
ROOM = 2.5
"""Times the model's size that an export takes: weights stored in half of float32, or a convolutional network."""
FULL_BYTES = 1_000_000
"""A disk with less free than this is full: the files of an export are larger."""
TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
TRIAL_TEXTS = ("a photo of a screw", "x", "itap of a " + "very " * 90 + "large thing", "ñandú ü 漢字", "two words")
TIMED_RUNS = 5
CALIBRATION_IMAGES = 64


def make_exports(
    model: ModelFolder,
    words: ModelFolder | None,
    *,
    cache_dir: Path,
    least_gain: float = LEAST_GAIN,
    tell: Callable[[str], None] = lambda _: None,
    write: Callable[[Path], None] | None = None,
) -> Exports:
    """Export a model, and maybe another for words, unless a sound export stands.

    Args:
        model: the CLIP.
        words: another model for words, or None.
        cache_dir: sortd's cache.
        least_gain: how many times as quick int8 must be to be kept.
        tell: hears each step as it begins.
        write: writes the files into an empty folder; ``write_export`` unless said.

    Raises:
        ModelError: the extra is not installed, the model cannot be exported faithfully, or there is no room.
    """
    from filelock import FileLock

    export_identity(model, words, cache_dir=cache_dir)  # raises where ONNX Runtime is missing
    folder = export_folder(model, words, cache_dir=cache_dir)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        tell("waiting for whoever exports the same model")
        with FileLock(f"{folder}.lock"):
            made = find_exports(model, words, cache_dir=cache_dir)
            if made is None:
                if find_spec("onnx") is None:
                    raise ModelError(f"exporting a model to ONNX needs the package onnx, not installed here: {EXTRA}")
                check_room(model, words, folder.parent)
                writing = partial(write_export, model, words, cache_dir=cache_dir, least_gain=least_gain, tell=tell)
                _replace(folder, model.name, write or writing)
                made = find_exports(model, words, cache_dir=cache_dir)
    except OSError as error:
        raise ModelError(
            f"cannot export {model.name!r} to {folder}: {error.strerror or error}; sortd has to be able to write "
            f"there, or set `cache_dir`"
        ) from error
    if made is None:
        raise ModelError(f"the export of {model.name!r} in {folder} changed as soon as it was made; check that disk")
    return made


def _replace(folder: Path, name: str, write: Callable[[Path], None]) -> None:
    """Write an export beside its folder, and put it in the folder's place when it is whole and on the disk."""
    into, aside = folder.with_name(f"{folder.name}.{os.getpid()}.part"), folder.with_name(f"{folder.name}.old")
    for left_over in (*folder.parent.glob(f"{folder.name}.*part"), aside):  # by processes that were killed
        shutil.rmtree(left_over, ignore_errors=True)
    into.mkdir()
    before = logging.root.manager.disable
    try:
        logging.disable(logging.WARNING)  # exporters warn of much that the trials below judge
        try:
            write(into)
        except Exception as error:  # exporters raise anything; whoever asked wants one line, not a trace
            raise ModelError(
                f"cannot export {name!r} to ONNX: {describe_failure(error, into)}; or set `backend: torch`"
            ) from error
        # Its files are on the disk before the folder gets its name: their sums are remembered by stamp from then on.
        for path in (*into.iterdir(), into):
            _sync(path)
        with suppress(FileNotFoundError):
            folder.rename(aside)
        into.rename(folder)
    finally:
        logging.disable(before)
        shutil.rmtree(into, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def describe_failure(error: Exception, into: Path, *, usage: Callable[[Path], Any] = shutil.disk_usage) -> str:
    """Return in a line what went wrong; libraries that write past a full disk complain of what they read later."""
    if isinstance(error, ModelError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename or into}: {error.strerror or error}; make room there"
    if usage(into).free < FULL_BYTES:
        return f"{into}: the disk is full; make room there"
    return f"{type(error).__name__}: {first_line(error)}"


def check_room(
    model: ModelFolder, words: ModelFolder | None, place: Path, *, usage: Callable[[Path], Any] = shutil.disk_usage
) -> None:
    """Raise ModelError before a minute of work that would end on a full disk."""
    room = ROOM * (model.size_bytes + (words.size_bytes if words is not None else 0))
    free = usage(place).free
    if free < room:
        raise ModelError(
            f"cannot export {model.name!r} to ONNX: that takes up to {room / 1e6:.0f} MB in {place}, where "
            f"{free / 1e6:.0f} MB are free; make room there, or set `cache_dir` to another disk"
        )


def write_export(
    model: ModelFolder,
    words: ModelFolder | None,
    into: Path,
    *,
    cache_dir: Path,
    least_gain: float,
    tell: Callable[[str], None],
) -> None:
    """Write the files of an export into an empty folder.

    Raises:
        ModelError: the model does not load, or its export does not give its rows.
    """
    tell("step 1 of 5, loading it in torch")
    encoder = TorchEncoder(model, words, device="cpu", cache_dir=None, threads=None, decoding="draft")
    tell("step 2 of 5, writing its text tower")
    text = _export_text(encoder, into)
    tell("step 3 of 5, writing its vision tower")
    _export_image(encoder, into)
    tell("step 4 of 5, holding both against torch")
    _try_images(encoder, into)
    _try_texts(encoder, into, text)
    tell("step 5 of 5, trying it in int8")
    gain = _reduce(into, least_gain, encoder.preprocessing)
    files = sorted(path for path in into.iterdir() if path.name != MANIFEST)
    manifest = Manifest(
        identity=export_identity(model, words, cache_dir=cache_dir),
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
    """Trace pixels, uint8 (B, H, W, 3), to rows; normalisation inside."""
    import torch

    class ImageTower(torch.nn.Module):
        """Inherits since torch traces modules only."""

        def __init__(self) -> None:
            super().__init__()
            self.clip = encoder.clip

        def forward(self, pixels: "torch.Tensor") -> "torch.Tensor":
            planes = pixels.permute(0, 3, 1, 2).to(torch.float32) * encoder.scale - encoder.shift
            rows: torch.Tensor = self.clip({"pixel_values": planes, "modality": "image"})["sentence_embedding"]
            return rows

    pixels = torch.from_numpy(_trial_images(encoder.preprocessing, 2))
    _trace(ImageTower(), (pixels,), into / tower_file("image", Precision.FP32), {"pixels": {0: "images"}})


def _export_text(encoder: TorchEncoder, into: Path) -> TextInputs:
    """Trace tokens, int64 (B, L), to rows, and write the tokenizer."""
    import torch

    features = _features(encoder, list(TRIAL_TEXTS))
    names = tuple(name for name in TEXT_INPUTS if name in features)
    foreign = sorted(name for name, value in features.items() if torch.is_tensor(value) and name not in TEXT_INPUTS)
    if foreign or "input_ids" not in names:
        raise ModelError(f"its text tower takes {', '.join(foreign) or 'no tokens'}, which sortd cannot export")

    class TextTower(torch.nn.Module):
        """Inherits since torch traces modules only."""

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
    widths = {_features(encoder, [text])["input_ids"].shape[1] for text in TRIAL_TEXTS[:2]}
    fixed = widths.pop() if len(widths) == 1 else None  # two texts of unlike length as wide: always filled up
    return TextInputs(names, int(encoder.words.tokenizer.pad_token_id or 0), fixed)


def _trace(
    tower: "torch.nn.Module", inputs: "tuple[torch.Tensor, ...]", file: Path, axes: dict[str, dict[int, str]]
) -> None:
    import torch

    tower.eval()
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns of every Python branch; the trials below judge the result
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
    """Return what sentence-transformers makes of texts."""
    prepare = getattr(encoder.words, "preprocess", None) or encoder.words.tokenize  # its name before version 5.4
    features: dict[str, Any] = prepare(texts)
    return features


def _write_tokenizer(encoder: TorchEncoder, into: Path) -> None:
    """Write the tokenizer as the package ``tokenizers`` reads it, cutting what is too long."""
    from tokenizers import Tokenizer

    backend = getattr(encoder.words.tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError("its tokenizer is written in Python, which only torch's side can run")
    tokenizer = Tokenizer.from_str(backend.to_str())
    if encoder.text_limit is None:
        tokenizer.no_truncation()
    else:
        tokenizer.enable_truncation(encoder.text_limit)
    tokenizer.no_padding()
    tokenizer.save(str(into / TOKENIZER))


# ---------------------------------------------------------------- trials


def _trial_images(seen: Preprocessing, count: int) -> Pixels:
    """Return noise on ramps, uint8 (count, H, W, 3)."""
    chance = np.random.default_rng(0)
    height, width = seen.crop_height, seen.crop_width
    ramp = np.linspace(0, 200, width)[None, None, :, None] * chance.random((count, 1, 1, 3))
    return (ramp + chance.integers(0, 56, (count, height, width, 3))).astype(np.uint8)


def _try_images(encoder: TorchEncoder, into: Path) -> None:
    tower = open_tower(into / tower_file("image", Precision.FP32))
    for count in (1, 5):
        pixels = _trial_images(encoder.preprocessing, count)
        (rows,) = tower.run(None, {"pixels": pixels})
        _compare(encoder.encode_images(pixels), normalise_rows(rows, "image.onnx"), f"{count} images")


def _try_texts(encoder: TorchEncoder, into: Path, text: TextInputs) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(into / TOKENIZER))
    tower = open_tower(into / tower_file("text", Precision.FP32))
    for texts in ([TRIAL_TEXTS[0]], list(TRIAL_TEXTS)):
        (rows,) = tower.run(None, text_inputs(tokenizer.encode_batch(texts), text))
        _compare(encoder.encode_texts(texts), normalise_rows(rows, "text.onnx"), f"{len(texts)} texts")


def _compare(wanted: Rows, got: Rows, what: str) -> None:
    lowest = float((wanted * got).sum(axis=1).min())
    if not lowest >= LEAST_COSINE:  # no number is not enough either
        raise ModelError(f"its export gives other rows than torch for {what} (cosine {lowest:.6f})")


# ---------------------------------------------------------------- int8


def _reduce(into: Path, least_gain: float, seen: Preprocessing) -> float:
    """Write both towers in int8 too, unless the vision tower gains too little by it; return what it gains."""
    exact, quick = (into / tower_file("image", precision) for precision in Precision)
    inputs = {"pixels": _trial_images(seen, 1)}
    seconds = _seconds(open_tower(exact, threads=1), inputs)
    gain = 0.0
    for candidate in _candidates(exact, seen):
        gained = seconds / _seconds(open_tower(candidate, threads=1), inputs)
        if gained > gain:
            candidate.replace(quick)
            gain = gained
        else:
            candidate.unlink()
    if gain < least_gain:
        quick.unlink(missing_ok=True)
        return gain
    exact, quick = (into / tower_file("text", precision) for precision in Precision)
    if not quantize(exact, quick, largest=weight_range()):
        quick.write_bytes(exact.read_bytes())
    return gain


def _candidates(exact: Path, seen: Preprocessing) -> Iterator[Path]:
    """Yield files of a vision tower in int8: with its products so, and where it has many, its convolutions as well."""
    candidate, between = exact.with_name("candidate.onnx"), exact.with_name("between.onnx")
    if quantize(exact, candidate, largest=weight_range()):
        yield candidate
    if convolutions(exact) > 1:
        quantize_convolutions(exact, between, photographic_noise(seen, CALIBRATION_IMAGES), largest=weight_range())
        if not quantize(between, candidate, largest=weight_range()):
            between.replace(candidate)
        between.unlink(missing_ok=True)
        yield candidate


def _seconds(tower: Any, inputs: dict[str, Any], clock: Callable[[], float] = time.process_time) -> float:  # noqa: ANN401
    """Return the shortest of some runs, in seconds of the processor, which other programs do not lengthen much."""
    tower.run(None, inputs)
    took: list[float] = []
    for _ in range(TIMED_RUNS):
        began = clock()
        tower.run(None, inputs)
        took.append(clock() - began)
    return max(min(took), 1e-9)
