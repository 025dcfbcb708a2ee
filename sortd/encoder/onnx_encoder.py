"""An exported CLIP, found in the cache, verified by content, and run by ONNX Runtime; torch is never imported.

    <cache_dir>/onnx/<model>/   manifest.json   what the files are and were made of, written last
                                image.onnx, text.onnx             float32
                                image.int8.onnx, text.int8.onnx   if int8 is faster, see ``quantize.py``
                                tokenizer.json
                                int8-<root>.json                  whether int8 may be used for the datasets below a root

An export of another model, sortd, ONNX Runtime or kind of processor, or with a changed byte, is ignored. The image
tower stays in memory. The text tower is opened for each call, since texts are embedded only when a class is added, and
the tower would double the memory of an idle daemon.
"""

import ctypes
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from sortd.arrays import FloatArray, Pixels
from sortd.encoder.clip import check_pixels, normalise_rows
from sortd.encoder.models import LocatedModel, checksums, first_line, repr_digest
from sortd.encoder.quantize import weight_range
from sortd.encoder.texts import valid_utf8
from sortd.errors import ModelError
from sortd.events import Preprocessing
from sortd.files import read_regular, write_json

FORMAT = 1  # increased when the same model is exported in another way than before
OPSET = 17  # the newest that ``quantize`` rewrites; every ONNX Runtime from 1.12 on has it
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
EXTRA = "pip install 'sortd-images[onnx]' (packages onnxruntime and onnx)"
_IMAGE_BATCH = 8  # activations of more images do not fit into the processor's cache
_TEXT_BATCH = 32
_M_MMAP_THRESHOLD = -3  # of malloc.h
_LARGE_BLOCK_BYTES = 1_000_000  # such as the pixels of a batch; ONNX Runtime keeps its own memory
_CPU = "CPUExecutionProvider"

Tokens = npt.NDArray[np.int64]  # (texts, length)


class Precision(StrEnum):
    """The number format of a model's arithmetic."""

    FP32 = "fp32"
    INT8 = "int8"


@dataclass(frozen=True, slots=True)
class TextInputs:
    """How texts become the inputs of the text tower."""

    names: tuple[str, ...]  # of input_ids, attention_mask, token_type_ids
    padding: int  # the padding token
    length: int | None  # of every row; None pads to the longest text


@dataclass(frozen=True, slots=True)
class Manifest:
    """The description of an export, which is stored with it."""

    identity: str
    dimensions: int
    preprocessing: Preprocessing
    text: TextInputs | None  # None: the model takes images only
    gain: float  # speed of int8 relative to float32 with one image, at the time of export; 0 without an int8 form
    weight_range: int  # the largest quantized weight; a processor with a smaller range would overflow
    checksums: Mapping[str, str]  # sha256 of each file, by its name
    made_with: Mapping[str, str] = field(default_factory=dict)  # versions, for information


MANIFESTS = TypeAdapter(Manifest)
"""Parses (``validate_json``, which raises ValueError) and writes (``dump_json``) a manifest."""


def tower_file(name: str, precision: Precision) -> str:
    """Return the file name of a tower, ``image`` or ``text``."""
    return f"{name}.onnx" if precision is Precision.FP32 else f"{name}.{precision}.onnx"


@dataclass(frozen=True, slots=True)
class Exports:
    """The verified exports of one model."""

    folder: Path
    model: LocatedModel
    manifest: Manifest

    def tower(self, name: str, precision: Precision) -> Path:
        """Return the file of a tower, ``image`` or ``text``."""
        return self.folder / tower_file(name, precision)

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """The precisions of the export; float32 always."""
        has_int8 = tower_file("image", Precision.INT8) in self.manifest.checksums
        return (Precision.FP32, Precision.INT8) if has_int8 else (Precision.FP32,)

    @property
    def size_bytes(self) -> int:
        """The size of the files."""
        return sum((self.folder / name).stat().st_size for name in self.manifest.checksums)


# ------------------------------------------------------------ exports on the disk


def is_installed() -> bool:
    """Tell whether ONNX Runtime is installed, without importing it."""
    return find_spec("onnxruntime") is not None


def available_providers() -> list[str]:
    """Return the execution providers of the installed ONNX Runtime; raise ModelError if it is not installed."""
    if not is_installed():
        raise ModelError(f"`backend: onnx` needs ONNX Runtime, which is not installed: {EXTRA}")
    import onnxruntime

    return list(onnxruntime.get_available_providers())


def export_identity(model: LocatedModel) -> str:
    """Return a hash of everything an export depends on; raise ModelError if ONNX Runtime is not installed."""
    available_providers()
    import onnxruntime

    # Earlier versions exported a text model without a comparison of its space with that of the CLIP.
    compared = () if model.words is None else ("compared",)
    return repr_digest((model.content_digests(), FORMAT, OPSET, str(onnxruntime.__version__), *compared))


def export_folder(model: LocatedModel) -> Path:
    """Return the folder for the exports of a model with a cache, whether it exists or not."""
    assert model.cache_dir is not None, "exports are stored in the cache"
    return model.cache_dir / "onnx" / repr_digest(model.content_digests())[:16]


def has_exports(model: LocatedModel) -> bool:
    """Tell whether a model was exported before, valid or not; without any export no weights are hashed."""
    return model.cache_dir is not None and (model.cache_dir / "onnx").is_dir() and export_folder(model).is_dir()


def find_exports(model: LocatedModel, *, largest: int | None = None) -> Exports | None:
    """Return the exports of a model; None if there are none, or they are damaged or outdated.

    Exports made on another machine are valid if this processor multiplies their weights without overflow: ``largest``
    is the largest quantized weight that it can multiply; None asks ``weight_range``.

    Raises:
        ModelError: ONNX Runtime is not installed.
    """
    if not has_exports(model):
        return None
    folder = export_folder(model)
    try:
        manifest = MANIFESTS.validate_json(read_regular(folder / MANIFEST))
        if manifest.identity != export_identity(model):
            return None
        sums = checksums((folder / name for name in manifest.checksums), cache_dir=model.cache_dir)
    except (OSError, ValueError):
        return None
    found = Exports(folder, model, manifest)
    if Precision.INT8 in found.precisions and manifest.weight_range > (largest or weight_range()):
        return None
    return found if {path.name: checksum for path, checksum in sums.items()} == manifest.checksums else None


def read_verdict(exported: Exports, root: Path) -> Mapping[str, Any] | None:
    """Return the verdict on int8 of an export for the datasets below a root; None if there is none.

    Its ``refusal`` says why int8 may not be used; None if it may.
    """
    try:
        verdict = json.loads(read_regular(_verdict_file(exported, root)))
        is_valid = verdict["export"] == _fingerprint(exported) and isinstance(verdict["refusal"], str | None)
        return {**verdict} if is_valid and {"filed", "same", "mean_cosine"} <= verdict.keys() else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def write_verdict(exported: Exports, root: Path, facts: Mapping[str, Any]) -> None:
    """Store a verdict with its export; raises OSError."""
    write_json(_verdict_file(exported, root), {**facts, "export": _fingerprint(exported)}, indent=1)


def _verdict_file(exported: Exports, root: Path) -> Path:
    """Return the file for one root: several configurations may share a cache."""
    return exported.folder / f"int8-{hashlib.sha256(os.fsencode(root)).hexdigest()[:12]}.json"


def _fingerprint(exported: Exports) -> str:
    """Identify an export by its files, since a repeated quantisation may give other weights."""
    return hashlib.sha256(json.dumps(dict(exported.manifest.checksums), sort_keys=True).encode()).hexdigest()


# ------------------------------------------------------------ devices


@dataclass(frozen=True, slots=True)
class Gpu:
    """One kind of GPU."""

    name: str
    provider: str
    device: Path  # exists if the driver has a device
    options: Mapping[str, Any]


GPUS = (
    # TensorFloat-32, the default, keeps ten bits of each factor: the rows would differ under the same encoder_id.
    Gpu("CUDA", "CUDAExecutionProvider", Path("/dev/nvidiactl"), {"use_tf32": 0}),
    Gpu("ROCm", "ROCMExecutionProvider", Path("/dev/kfd"), {}),
)


def provider_attempts(
    device: str, available: Sequence[str], *, is_there: Callable[[Path], bool] = Path.exists
) -> list[list[Any]]:
    """Return lists of providers to open a graph with (``providers`` of ``InferenceSession``), best first.

    ``device`` is ``auto``, ``cpu``, ``cuda`` or ``cuda:1`` (also for AMD's GPUs, as in torch), ``available`` lists the
    providers of this ONNX Runtime, whether their devices exist or not.

    Raises:
        ModelError: this ONNX Runtime does not support the device.
    """
    kind, _, number = device.partition(":")
    if kind == "mps":
        raise ModelError("device 'mps' works only with torch; set `backend: torch` or `device: cpu`")
    built = [gpu for gpu in GPUS if gpu.provider in available]
    if kind == "cuda" and not built:
        raise ModelError(
            f"device {device!r} cannot be used: this ONNX Runtime has no CUDA (pip install onnxruntime-gpu in place of "
            f"onnxruntime); set `backend: torch` or `device: cpu`"
        )
    wanted = built if kind == "cuda" else [gpu for gpu in built if kind == "auto" and is_there(gpu.device)]
    on_gpu = [[(gpu.provider, {"device_id": int(number or 0), **gpu.options}), _CPU] for gpu in wanted]
    return on_gpu if kind == "cuda" else [*on_gpu, [_CPU]]


def device_name(providers: Sequence[str]) -> str:
    """Return the name of the best device among a session's providers: ``CPU``, ``CUDA``, ``ROCm``."""
    return next((gpu.name for gpu in GPUS if gpu.provider in providers), "CPU")


def can_use_gpu(available: Sequence[str], *, is_there: Callable[[Path], bool] = Path.exists) -> bool:
    """Tell whether this ONNX Runtime supports a GPU of this machine."""
    return any(gpu.provider in available and is_there(gpu.device) for gpu in GPUS)


# ------------------------------------------------------------ inference


class OnnxEncoder:
    """An exported CLIP or encoder of images; see ``Encoder``."""

    def __init__(
        self,
        exports: Exports,
        precision: Precision,
        *,
        device: str = "auto",
        threads: int | None = None,
        decoding: str = "draft",
    ) -> None:
        """Open the image tower; the arguments are those of ``backends.load_model``.

        Raises:
            ModelError: the precision or device is missing, or ONNX Runtime rejects the files.
        """
        manifest = exports.manifest
        if precision not in exports.precisions:
            raise ModelError(
                f"model {exports.model.clip.name!r} has no int8 export, since int8 was only "
                f"{manifest.gain:.2f} times as fast as float32 on this machine; use float32"
            )
        self.precision = precision
        self._exports, self._device, self._threads = exports, device, threads
        self.dimensions, self.preprocessing = manifest.dimensions, manifest.preprocessing
        # Another quantisation of the same model may give other weights, so those files are part of the identity.
        self.has_text = manifest.text is not None
        towers = ("image", "text") if self.has_text else ("image",)
        files = [tower_file(tower, precision) for tower in towers if precision is Precision.INT8]
        quantized = [manifest.checksums[file] for file in files]
        content = exports.model.content_digests()
        identity = repr_digest((content, self.preprocessing, decoding, FORMAT, precision.value, quantized or 0))
        self.encoder_id = f"{exports.model.clip.kind}-{self.dimensions}-onnx-{precision}-{identity[:16]}"
        self._images = self._open("image")
        self.runs_on = device_name(self._images.get_providers())

    def encode_images(self, pixels: Pixels) -> FloatArray:
        """See ``Encoder``; an image's row does not depend on the other images of its batch, in int8 neither."""
        check_pixels(pixels, self.preprocessing)
        if len(pixels) == 0:
            return np.empty((0, self.dimensions), np.float32)
        whole = np.ascontiguousarray(pixels)
        parts = (whole[start : start + _IMAGE_BATCH] for start in range(0, len(whole), _IMAGE_BATCH))
        rows = [_run(self._images, {"pixels": part}, self.encoder_id) for part in parts]
        return normalise_rows(np.concatenate(rows), self.encoder_id)

    def encode_texts(self, texts: Sequence[str]) -> FloatArray:
        """See ``Encoder``; long texts are truncated."""
        text = self._exports.manifest.text
        if text is None:
            raise ModelError(f"model {self.encoder_id} takes images only; set `model:` to a CLIP")
        if not texts:
            return np.empty((0, self.dimensions), np.float32)
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self._exports.folder / TOKENIZER))
        tower = self._open("text")
        encoded = tokenizer.encode_batch([valid_utf8(text) for text in texts])
        order = np.argsort([len(one.ids) for one in encoded], kind="stable")  # similar lengths need less padding
        rows = np.empty((len(texts), self.dimensions), np.float32)
        for start in range(0, len(order), _TEXT_BATCH):
            chosen = order[start : start + _TEXT_BATCH]
            inputs = text_inputs([encoded[index] for index in chosen], text)
            rows[chosen] = _run(tower, inputs, self.encoder_id)
        del tower
        _trim_memory()
        return normalise_rows(rows, self.encoder_id)

    def _open(self, tower: str) -> Any:  # noqa: ANN401 -- ONNX Runtime publishes no types
        file = self._exports.tower(tower, self.precision)
        return open_tower(file, device=self._device, threads=self._threads)


def open_tower(file: Path, *, device: str = "cpu", threads: int | None = None) -> Any:  # noqa: ANN401 -- no types there
    """Open an ONNX file as an ``InferenceSession``; raise ModelError if the file or the device is rejected."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # By default it pins threads to cores, which the decoders use, too.
    options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
    options.inter_op_num_threads = 1
    # Threads that spin between two products, or two images, take cores from the decoders.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    # It would keep a memory plan for each batch size that ever occurred.
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    attempts = provider_attempts(device, onnxruntime.get_available_providers())
    for providers in attempts:
        try:
            opened = onnxruntime.InferenceSession(str(file), options, providers=providers, enable_fallback=0)
            break
        except Exception as error:  # its C++ code can raise anything over a file or a device
            if providers is attempts[-1]:
                raise ModelError(
                    f"ONNX Runtime does not open {file}: {first_line(error)}; delete its folder and run `sortd models "
                    f"export`, or set `backend: torch`"
                ) from error
    if device.startswith("cuda") and device_name(opened.get_providers()) == "CPU":  # it only warns and uses the CPU
        raise ModelError(
            f"device {device!r} cannot be used by ONNX Runtime: its CUDA libraries, or the driver, do not load; set "
            f"`backend: torch` or `device: cpu`"
        )
    _trim_memory()
    return opened


def _trim_memory() -> None:
    """Return freed memory to the system: opening a file frees a copy of all its weights."""
    with suppress(OSError, AttributeError):  # only GNU's C library has malloc_trim(3)
        ctypes.CDLL(None).malloc_trim(0)


def return_large_blocks() -> None:
    """Let this process return large blocks of freed memory at once; not for a library: it is slower for other code."""
    with suppress(OSError, AttributeError):  # only GNU's C library has mallopt(3)
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK_BYTES)


def text_inputs(encoded: Sequence[Any], text: TextInputs) -> dict[str, Tokens]:
    """Return the inputs of the text tower, by name, for encodings by ``tokenizers``, padded to one length."""
    length = text.length or max(len(one.ids) for one in encoded)
    found = {name: np.zeros((len(encoded), length), np.int64) for name in ("attention_mask", "token_type_ids")}
    found["input_ids"] = np.full((len(encoded), length), text.padding, np.int64)
    for row, one in enumerate(encoded):
        found["input_ids"][row, : len(one.ids)] = one.ids
        found["attention_mask"][row, : len(one.ids)] = 1
        found["token_type_ids"][row, : len(one.ids)] = one.type_ids
    return {name: found[name] for name in text.names}


def _run(tower: Any, inputs: dict[str, Any], encoder_id: str) -> FloatArray:  # noqa: ANN401 -- ONNX Runtime publishes no types
    try:
        (rows,) = tower.run(None, inputs)
    except Exception as error:  # its C++ code can raise anything: out of memory, a lost device
        raise ModelError(f"model {encoder_id} does not run: {first_line(error)}; set `backend: torch`") from error
    return np.asarray(rows, np.float32)
