"""The export of a model to ONNX, in a process of its own: ``python -m sortd.encoding.onnx_export REQUEST``.

This is the one place where torch and ONNX meet; ``export_process.py`` starts it, ``exports.py`` says what it writes.
Each tower is traced with what is left of its preprocessing inside, then held against torch on images and texts of
several batch sizes and lengths, since a trace can silently keep the size that it was made with.

The exporter is the one by tracing (``dynamo=False``): the newer one needs the package onnxscript.
"""

import json
import logging
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sortd.encoding.export_process import STEPS, Request, Tell
from sortd.encoding.exports import MANIFEST, OPSET, TOKENIZER
from sortd.encoding.manifest import Manifest, Precision, TextInputs, tower_file
from sortd.encoding.model_folders import first_line
from sortd.encoding.models import checksums
from sortd.encoding.onnx_encoder import open_tower, text_inputs
from sortd.encoding.onnx_int8 import convolutions, quantize, quantize_convolutions, weight_range
from sortd.encoding.rows import Pixels, Rows, unit
from sortd.encoding.torch_encoder import TorchEncoder
from sortd.errors import ModelError
from sortd.events import Preprocessing

if TYPE_CHECKING:
    import torch

LEAST_COSINE = 0.9999
"""Between a row of torch and of its float32 export: what differs is the order of additions."""
TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
TRIAL_TEXTS = ("a photo of a screw", "x", "itap of a " + "very " * 90 + "large thing", "ñandú ü 漢字", "two words")
TIMED_RUNS = 5
FULL_BYTES = 1_000_000
"""A disk with less free than this is full: the files of an export are larger."""
CALIBRATION_IMAGES = 64


def main(argument: str) -> int:
    """Export as asked; what goes wrong is the last line on stderr."""
    logging.disable(logging.WARNING)
    try:
        export(Request.from_json(argument), lambda step: print(step, flush=True))
    except ModelError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except Exception as error:  # noqa: BLE001 -- exporters raise anything; whoever asked wants one line, not a trace
        print(complaint(error, Path(json.loads(argument)["into"])), file=sys.stderr)
        return 1
    return 0


def complaint(error: Exception, into: Path, *, usage: Callable[[Path], Any] = shutil.disk_usage) -> str:
    """Return in a line what went wrong; libraries that write past a full disk complain of what they read later."""
    if isinstance(error, OSError):
        return f"{error.filename or into}: {error.strerror or error}; make room there"
    if usage(into).free < FULL_BYTES:
        return f"{into}: the disk is full; make room there"
    return f"{type(error).__name__}: {first_line(error)}"


def export(request: Request, tell: Tell) -> None:
    """Write the exports that ``exports.make`` asks for, and tell each of ``STEPS`` as it begins.

    Raises:
        ModelError: The model does not load, or its export does not give its rows.
    """
    into, steps = request.into, iter(STEPS)
    tell(next(steps))
    torch_encoder = TorchEncoder(
        request.model, request.words, device="cpu", cache_dir=None, threads=None, decoding="draft"
    )
    tell(next(steps))
    text = _export_text(torch_encoder, into)
    tell(next(steps))
    _export_image(torch_encoder, into)
    tell(next(steps))
    _try_images(torch_encoder, into)
    _try_texts(torch_encoder, into, text)
    tell(next(steps))
    gain = _reduce(into, request.least_gain, torch_encoder.preprocessing)
    files = sorted(path for path in into.iterdir() if path.name != MANIFEST)
    manifest = Manifest(
        identity=request.identity,
        dimensions=torch_encoder.dimensions,
        preprocessing=torch_encoder.preprocessing,
        text=text,
        gain=gain,
        weight_range=weight_range(),
        checksums={path.name: checksum for path, checksum in checksums(files).items()},
        made_with={name: version(name) for name in ("onnx", "torch", "transformers", "sentence-transformers")},
    )
    (into / MANIFEST).write_text(manifest.to_json(), "utf-8")


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
        _compare(encoder.encode_images(pixels), unit(rows, "image.onnx"), f"{count} images")


def _try_texts(encoder: TorchEncoder, into: Path, text: TextInputs) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(into / TOKENIZER))
    tower = open_tower(into / tower_file("text", Precision.FP32))
    for texts in ([TRIAL_TEXTS[0]], list(TRIAL_TEXTS)):
        (rows,) = tower.run(None, text_inputs(tokenizer.encode_batch(texts), text))
        _compare(encoder.encode_texts(texts), unit(rows, "text.onnx"), f"{len(texts)} texts")


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


def photographic_noise(seen: Preprocessing, count: int) -> Pixels:
    """Return images, uint8 (count, H, W, 3), that move a network's activations about as far as photographs do.

    Noise whose amplitude falls with frequency as that of natural scenes does, by a power around 1 (Field, Relations
    between the statistics of natural images and the response properties of cortical cells, 1987), in mixed colours, of
    any brightness and contrast.
    """
    chance = np.random.default_rng(0)
    height, width = seen.crop_height, seen.crop_width
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None, :])
    frequency[0, 0] = 1 / max(height, width)
    images = np.empty((count, height, width, 3), np.uint8)
    for image in images:
        waves = chance.normal(size=(height, width, 3)) + 1j * chance.normal(size=(height, width, 3))
        plain = np.fft.ifft2(waves / frequency[:, :, None] ** chance.uniform(0.5, 2.0), axes=(0, 1)).real
        mixed = plain @ (np.eye(3) + chance.uniform(-0.5, 1.0, (3, 3)))
        scaled = (mixed - mixed.mean()) / mixed.std() * chance.uniform(10, 90)
        image[:] = np.clip(scaled + chance.uniform(30, 225) + chance.uniform(-40, 40, 3), 0, 255)
    return images


def _seconds(tower: Any, inputs: dict[str, Any], clock: Callable[[], float] = time.process_time) -> float:  # noqa: ANN401
    """Return the shortest of some runs, in seconds of the processor, which other programs do not lengthen much."""
    tower.run(None, inputs)
    took: list[float] = []
    for _ in range(TIMED_RUNS):
        began = clock()
        tower.run(None, inputs)
        took.append(clock() - began)
    return max(min(took), 1e-9)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
