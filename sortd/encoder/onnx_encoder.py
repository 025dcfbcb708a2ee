"""An exported CLIP: found in the cache, checked by content, and run by ONNX Runtime; torch is never imported.

    <cache_dir>/onnx/<model>/   manifest.json   what the files are and were made of, written last
                                image.onnx, text.onnx             float32
                                image.int8.onnx, text.int8.onnx   where int8 is quicker, see ``quantize.py``
                                tokenizer.json
                                int8-<root>.json                  whether int8 may serve the datasets below a root

An export that does not fit (another model, an older sortd or ONNX Runtime, another kind of processor, a byte that
changed) counts as none. The vision tower stays in memory. The text tower is opened for each call and let go: words are
embedded when a class appears and hardly ever again, and the tower would double the memory of an idle daemon.
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

from sortd.arrays import Pixels
from sortd.encoder import models
from sortd.encoder.base import Rows, check_pixels, normalise_rows, valid_utf8
from sortd.encoder.models import ModelFolder, first_line
from sortd.encoder.quantize import weight_range
from sortd.errors import ModelError
from sortd.files import read_regular, write_atomic
from sortd.messages import Preprocessing

FORMAT = 1
"""Raised when the same model would be exported in another way than before."""
OPSET = 17
"""The newest that ``quantize`` rewrites; every ONNX Runtime from 1.12 on has it."""
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
EXTRA = "pip install 'sortd-images[onnx]' (packages onnxruntime and onnx)"
IMAGES_A_RUN = 8
"""Activations of more images than this leave the processor's cache, and the arena grows with them."""
TEXTS_A_RUN = 32
CPU = "CPUExecutionProvider"

Tokens = npt.NDArray[np.int64]  # (texts, length)


class Precision(StrEnum):
    """The numbers that a model computes in."""

    FP32 = "fp32"
    INT8 = "int8"


@dataclass(frozen=True, slots=True)
class TextInputs:
    """How texts become the inputs of the text tower."""

    names: tuple[str, ...]  # of input_ids, attention_mask, token_type_ids
    padding: int  # the token that fills the rows of a batch to one length
    length: int | None  # of every row, where the model was taught with that; None fills to the longest


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an export holds, as it is written beside it."""

    identity: str
    dimensions: int
    preprocessing: Preprocessing
    text: TextInputs
    gain: float
    """How many times as quick int8 was as float32, image by image, when it was made; 0 where nothing can be int8."""
    weight_range: int
    """The largest quantized weight of the int8 files: a processor with a smaller range would overflow on them."""
    checksums: Mapping[str, str]
    """sha256 of each file by its name."""
    made_with: Mapping[str, str] = field(default_factory=dict)
    """Versions, for people."""


MANIFESTS = TypeAdapter(Manifest)
"""Reads (``validate_json``, which raises ValueError) and writes (``dump_json``) a manifest."""


def tower_file(name: str, precision: Precision) -> str:
    """Return the file name of a tower, ``image`` or ``text``."""
    return f"{name}.onnx" if precision is Precision.FP32 else f"{name}.{precision}.onnx"


@dataclass(frozen=True, slots=True)
class Exports:
    """The exports of one model, sound when they were looked at."""

    folder: Path
    model: ModelFolder
    words: ModelFolder | None
    manifest: Manifest

    def tower(self, name: str, precision: Precision) -> Path:
        """Return the file of a tower, ``image`` or ``text``."""
        return self.folder / tower_file(name, precision)

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """The precisions that the model is exported in, float32 always."""
        has_int8 = tower_file("image", Precision.INT8) in self.manifest.checksums
        return (Precision.FP32, Precision.INT8) if has_int8 else (Precision.FP32,)

    @property
    def size_bytes(self) -> int:
        """What the files take on the disk."""
        return sum((self.folder / name).stat().st_size for name in self.manifest.checksums)


# ------------------------------------------------------------ exports on the disk


def is_installed() -> bool:
    """Tell whether ONNX Runtime is here, without importing it."""
    return find_spec("onnxruntime") is not None


def available_providers() -> list[str]:
    """Return what ONNX Runtime was built with.

    Raises:
        ModelError: it is not installed.
    """
    if not is_installed():
        raise ModelError(f"`backend: onnx` needs ONNX Runtime, which is not installed: {EXTRA}")
    import onnxruntime

    return list(onnxruntime.get_available_providers())


def content_digests(model: ModelFolder, words: ModelFolder | None, *, cache_dir: Path | None) -> list[str]:
    """Return the digests of a model and of the other one for words, if any."""
    return [models.digest(part, cache_dir=cache_dir) for part in (model, words) if part is not None]


def export_identity(model: ModelFolder, words: ModelFolder | None, *, cache_dir: Path | None) -> str:
    """Return a hash of what an export is made of; raise ModelError where ONNX Runtime is not installed."""
    available_providers()
    import onnxruntime

    facts = (content_digests(model, words, cache_dir=cache_dir), FORMAT, OPSET, str(onnxruntime.__version__))
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def export_folder(model: ModelFolder, words: ModelFolder | None, *, cache_dir: Path) -> Path:
    """Return where a model's exports lie, whether there are any or not."""
    content = content_digests(model, words, cache_dir=cache_dir)
    return cache_dir / "onnx" / hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def has_exports(model: ModelFolder, words: ModelFolder | None, *, cache_dir: Path) -> bool:
    """Tell whether a model was exported before, soundly or not; where nothing ever was, no weight is hashed."""
    return (cache_dir / "onnx").is_dir() and export_folder(model, words, cache_dir=cache_dir).is_dir()


def find_exports(
    model: ModelFolder, words: ModelFolder | None, *, cache_dir: Path, largest: int | None = None
) -> Exports | None:
    """Return the exports of a model, or None where there are none that serve as they are.

    Exports made on another machine (a moved disk, a shared cache) serve if this processor multiplies their weights
    without overflow: ``largest`` is the largest quantized weight that it can; None asks ``weight_range``.

    Raises:
        ModelError: ONNX Runtime is not installed.
    """
    if not has_exports(model, words, cache_dir=cache_dir):
        return None
    folder = export_folder(model, words, cache_dir=cache_dir)
    try:
        manifest = MANIFESTS.validate_json(read_regular(folder / MANIFEST))
        if manifest.identity != export_identity(model, words, cache_dir=cache_dir):
            return None
        files = {name: folder / name for name in manifest.checksums}
        sums = models.checksums(files.values(), cache_dir=cache_dir)
    except (OSError, ValueError):
        return None
    found = Exports(folder, model, words, manifest)
    if Precision.INT8 in found.precisions and manifest.weight_range > (largest or weight_range()):
        return None
    is_sound = all(sums[files[name]] == checksum for name, checksum in manifest.checksums.items())
    return found if is_sound else None


def read_verdict(exported: Exports, root: Path) -> Mapping[str, Any] | None:
    """Return what was found about int8 of this very export and the datasets below a root; None where nothing was.

    Its ``refusal`` is why int8 may not serve; None where it may.
    """
    try:
        said = json.loads(read_regular(_verdict_file(exported, root)))
        is_whole = said["export"] == _fingerprint(exported) and isinstance(said["refusal"], str | None)
        return {**said} if is_whole and {"filed", "same", "mean_cosine"} <= said.keys() else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def write_verdict(exported: Exports, root: Path, facts: Mapping[str, Any]) -> None:
    """Keep a verdict beside its export; raises OSError."""
    text = json.dumps({**facts, "export": _fingerprint(exported)}, indent=1) + "\n"
    write_atomic(_verdict_file(exported, root), text.encode())


def _verdict_file(exported: Exports, root: Path) -> Path:
    """Return the file for one root: several configurations may share a cache."""
    return exported.folder / f"int8-{hashlib.sha256(os.fsencode(root)).hexdigest()[:12]}.json"


def _fingerprint(exported: Exports) -> str:
    """Identify an export by its files: int8 that is made again may come out another way."""
    return hashlib.sha256(json.dumps(dict(exported.manifest.checksums), sort_keys=True).encode()).hexdigest()


# ------------------------------------------------------------ devices


@dataclass(frozen=True, slots=True)
class Gpu:
    """One kind of GPU."""

    name: str
    provider: str
    device: Path
    """There wherever its driver has a device to offer."""
    options: Mapping[str, Any]


GPUS = (
    # TensorFloat-32, the default, keeps ten bits of each factor: other rows under the identity of the exact ones.
    Gpu("CUDA", "CUDAExecutionProvider", Path("/dev/nvidiactl"), {"use_tf32": 0}),
    Gpu("ROCm", "ROCMExecutionProvider", Path("/dev/kfd"), {}),
)


def provider_attempts(
    device: str, available: Sequence[str], *, is_there: Callable[[Path], bool] = Path.exists
) -> list[list[Any]]:
    """Return which providers to open a graph with (``providers`` of ``InferenceSession``), best first.

    Args:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1`` (torch's word for AMD's GPUs as well).
        available: what this ONNX Runtime was built with, which does not say that there is such a device.
        is_there: tells whether a device's file is there.

    Raises:
        ModelError: it was built without what the device needs.
    """
    kind, _, number = device.partition(":")
    if kind == "mps":
        raise ModelError("device 'mps' is torch's; set `backend: torch` or `device: cpu`")
    built = [gpu for gpu in GPUS if gpu.provider in available]
    if kind == "cuda" and not built:
        raise ModelError(
            f"device {device!r} cannot be used: this ONNX Runtime has no CUDA (pip install onnxruntime-gpu in place of "
            f"onnxruntime); set `backend: torch` or `device: cpu`"
        )
    wanted = built if kind == "cuda" else [gpu for gpu in built if kind == "auto" and is_there(gpu.device)]
    on_gpu = [[(gpu.provider, {"device_id": int(number or 0), **gpu.options}), CPU] for gpu in wanted]
    return on_gpu if kind == "cuda" else [*on_gpu, [CPU]]


def device_name(providers: Sequence[str]) -> str:
    """Return the common name of the best of the providers that a session has: ``CPU``, ``CUDA``, ``ROCm``."""
    return next((gpu.name for gpu in GPUS if gpu.provider in providers), "CPU")


def can_use_gpu(available: Sequence[str], *, is_there: Callable[[Path], bool] = Path.exists) -> bool:
    """Tell whether this ONNX Runtime was built for a GPU that is here."""
    return any(gpu.provider in available and is_there(gpu.device) for gpu in GPUS)


# ------------------------------------------------------------ running


class OnnxEncoder:
    """An exported CLIP; see ``Encoder``."""

    has_text = True

    def __init__(
        self,
        exports: Exports,
        precision: Precision,
        *,
        device: str = "auto",
        cache_dir: Path | None = None,
        threads: int | None = None,
        decoding: str = "draft",
    ) -> None:
        """Open the vision tower; the arguments are those of ``backends.load``.

        Raises:
            ModelError: there is no such precision or device, or ONNX Runtime does not take the files.
        """
        if precision not in exports.precisions:
            raise ModelError(
                f"model {exports.model.name!r} has no int8 export: int8 was {exports.manifest.gain:.2f} times as quick "
                f"as float32 on this machine, which is not worth it; take float32"
            )
        self.precision = precision
        self._exports, self._device, self._threads = exports, device, threads
        manifest = exports.manifest
        self.dimensions, self.preprocessing = manifest.dimensions, manifest.preprocessing
        content = content_digests(exports.model, exports.words, cache_dir=cache_dir)
        # What was rounded, and by which ranges, may come out another way when an export is made again.
        files = [tower_file(tower, precision) for tower in ("image", "text") if precision is Precision.INT8]
        rounded = [manifest.checksums[file] for file in files]
        facts = (content, self.preprocessing, decoding, FORMAT, precision.value, rounded or 0)
        whole = hashlib.sha256(repr(facts).encode()).hexdigest()
        self.encoder_id = f"{exports.model.kind}-{self.dimensions}-onnx-{precision}-{whole[:16]}"
        self._images = self._open("image")
        self.runs_on = device_name(self._images.get_providers())
        """``CPU``, ``CUDA`` or ``ROCm``."""

    def encode_images(self, pixels: Pixels) -> Rows:
        """See ``Encoder``; an image's row does not depend on the others of its batch, in int8 neither."""
        check_pixels(pixels, self.preprocessing)
        if len(pixels) == 0:
            return np.empty((0, self.dimensions), np.float32)
        whole = np.ascontiguousarray(pixels)
        parts = (whole[start : start + IMAGES_A_RUN] for start in range(0, len(whole), IMAGES_A_RUN))
        rows = [_run(self._images, {"pixels": part}, self.encoder_id) for part in parts]
        return normalise_rows(np.concatenate(rows), self.encoder_id)

    def encode_texts(self, texts: Sequence[str]) -> Rows:
        """See ``Encoder``; a text longer than the model reads is cut at its end."""
        if not texts:
            return np.empty((0, self.dimensions), np.float32)
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self._exports.folder / TOKENIZER))
        tower = self._open("text")
        encoded = tokenizer.encode_batch([valid_utf8(text) for text in texts])
        order = np.argsort([len(one.ids) for one in encoded], kind="stable")  # like lengths together: less padding
        rows = np.empty((len(texts), self.dimensions), np.float32)
        for start in range(0, len(order), TEXTS_A_RUN):
            chosen = order[start : start + TEXTS_A_RUN]
            inputs = text_inputs([encoded[index] for index in chosen], self._exports.manifest.text)
            rows[chosen] = _run(tower, inputs, self.encoder_id)
        del tower
        give_memory_back()
        return normalise_rows(rows, self.encoder_id)

    def _open(self, tower: str) -> Any:  # noqa: ANN401 -- ONNX Runtime publishes no types
        file = self._exports.tower(tower, self.precision)
        return open_tower(file, device=self._device, threads=self._threads)


def open_tower(file: Path, *, device: str = "cpu", threads: int | None = None) -> Any:  # noqa: ANN401 -- no types there
    """Open one ONNX file for running.

    Raises:
        ModelError: ONNX Runtime does not take it, or cannot use the device.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # Its own choice of threads pins them to cores, where the decoders work too.
    options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
    options.inter_op_num_threads = 1
    # Threads that spin for work between two products, or two images, burn the cores that decode.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    # A plan of the memory for each batch size that ever came would be kept for good.
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    ways = provider_attempts(device, onnxruntime.get_available_providers())
    for way in ways:
        try:
            opened = onnxruntime.InferenceSession(str(file), options, providers=way, enable_fallback=0)
        except Exception as error:  # whatever its C++ raises over a file or a device, it does not serve so
            if way is not ways[-1]:
                continue
            raise ModelError(
                f"ONNX Runtime does not open {file}: {first_line(error)}; delete its folder and run `sortd models "
                f"export`, or set `backend: torch`"
            ) from error
        break
    if device.startswith("cuda") and device_name(opened.get_providers()) == "CPU":  # it only warns, and takes the CPU
        raise ModelError(
            f"device {device!r} cannot be used by ONNX Runtime: its CUDA libraries, or the driver, do not load; set "
            f"`backend: torch` or `device: cpu`"
        )
    give_memory_back()
    return opened


def give_memory_back() -> None:
    """Return to the system what the C library keeps of freed memory: opening a file frees a copy of all its weights."""
    with suppress(OSError, AttributeError):  # another C library than GNU's has nothing of the kind; malloc_trim(3)
        ctypes.CDLL(None).malloc_trim(0)


def text_inputs(encoded: Sequence[Any], text: TextInputs) -> dict[str, Tokens]:
    """Return token rows of one length as the text tower takes them, by name.

    Args:
        encoded: what ``tokenizers`` made of each text, not filled up.
        text: how the model was taught to have them.
    """
    length = text.length or max(len(one.ids) for one in encoded)
    found = {name: np.zeros((len(encoded), length), np.int64) for name in ("attention_mask", "token_type_ids")}
    found["input_ids"] = np.full((len(encoded), length), text.padding, np.int64)
    for row, one in enumerate(encoded):
        found["input_ids"][row, : len(one.ids)] = one.ids
        found["attention_mask"][row, : len(one.ids)] = 1
        found["token_type_ids"][row, : len(one.ids)] = one.type_ids
    return {name: found[name] for name in text.names}


def _run(tower: Any, inputs: dict[str, Any], encoder_id: str) -> Rows:  # noqa: ANN401 -- ONNX Runtime publishes no types
    try:
        (rows,) = tower.run(None, inputs)
    except Exception as error:  # whatever its C++ raises: out of memory, a device that went away
        raise ModelError(f"model {encoder_id} does not run: {first_line(error)}; set `backend: torch`") from error
    return np.asarray(rows, np.float32)
