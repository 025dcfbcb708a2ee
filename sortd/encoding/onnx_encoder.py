"""A CLIP run by ONNX Runtime from its exports; torch is never imported.

The vision tower stays in memory. The text tower is opened for each call and let go: words are embedded when a class
appears and hardly ever again, and the tower would double what an idle daemon holds.
"""

import ctypes
import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sortd.arrays import Pixels
from sortd.encoding import models
from sortd.encoding.exports import FORMAT, TOKENIZER, Exports
from sortd.encoding.manifest import Precision, TextInputs, tower_file
from sortd.encoding.model_folders import first_line
from sortd.encoding.providers import attempts, name_of
from sortd.encoding.rows import Rows, check_pixels, unit, writable
from sortd.errors import ModelError

IMAGES_A_RUN = 8
"""Activations of more images than this leave the processor's cache, and the arena grows with them."""
TEXTS_A_RUN = 32

Tokens = npt.NDArray[np.int64]  # (texts, length)


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
        """Open the vision tower.

        Args:
            exports: the files, sound.
            precision: which of them.
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
            cache_dir: where the hashes of weights are kept.
            threads: how many threads a forward may use; None or 0 takes as many as there are cores for this process.
            decoding: how the pixels that will come were decoded.

        Raises:
            ModelError: There is no such precision or device, or ONNX Runtime does not take the files.
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
        parts = (part for part in (exports.model, exports.words) if part is not None)
        content = [models.digest(part, cache_dir=cache_dir) for part in parts]
        # What was rounded, and by which ranges, may come out another way when an export is made again.
        files = [tower_file(tower, precision) for tower in ("image", "text") if precision is Precision.INT8]
        rounded = [manifest.checksums[file] for file in files]
        facts = (content, self.preprocessing, decoding, FORMAT, precision.value, rounded or 0)
        whole = hashlib.sha256(repr(facts).encode()).hexdigest()
        self.encoder_id = f"{exports.model.kind}-{self.dimensions}-onnx-{precision}-{whole[:16]}"
        self._images = self._open("image")
        self.runs_on = name_of(self._images.get_providers())
        """``CPU``, ``CUDA`` or ``ROCm``."""

    def encode_images(self, pixels: Pixels) -> Rows:
        """See ``Encoder``; an image's row does not depend on the others of its batch, in int8 neither."""
        check_pixels(pixels, self.preprocessing)
        if len(pixels) == 0:
            return np.empty((0, self.dimensions), np.float32)
        whole = np.ascontiguousarray(pixels)
        parts = (whole[start : start + IMAGES_A_RUN] for start in range(0, len(whole), IMAGES_A_RUN))
        rows = [_run(self._images, {"pixels": part}, self.encoder_id) for part in parts]
        return unit(np.concatenate(rows), self.encoder_id)

    def encode_texts(self, texts: Sequence[str]) -> Rows:
        """See ``Encoder``; a text longer than the model reads is cut at its end."""
        if not texts:
            return np.empty((0, self.dimensions), np.float32)
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self._exports.folder / TOKENIZER))
        tower = self._open("text")
        encoded = tokenizer.encode_batch([writable(text) for text in texts])
        order = np.argsort(
            [len(one.ids) for one in encoded], kind="stable"
        )  # like lengths go together: less to fill up
        rows = np.empty((len(texts), self.dimensions), np.float32)
        for start in range(0, len(order), TEXTS_A_RUN):
            chosen = order[start : start + TEXTS_A_RUN]
            inputs = text_inputs([encoded[index] for index in chosen], self._exports.manifest.text)
            rows[chosen] = _run(tower, inputs, self.encoder_id)
        del tower
        give_memory_back()
        return unit(rows, self.encoder_id)

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
    ways = attempts(device, onnxruntime.get_available_providers())
    for way in ways:
        try:
            opened = onnxruntime.InferenceSession(str(file), options, providers=way, enable_fallback=0)
        except Exception as error:  # whatever its C++ raises over a file or a device, it does not serve so
            if way is not ways[-1]:
                continue
            raise ModelError(
                f"ONNX Runtime does not open {file}: {first_line(error)}; delete its folder to have it made again, or "
                f"set `backend: torch`"
            ) from error
        break
    if device.startswith("cuda") and name_of(opened.get_providers()) == "CPU":  # it only warns, and takes the CPU
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
    found = {
        "input_ids": np.full((len(encoded), length), text.padding, np.int64),
        "attention_mask": np.zeros((len(encoded), length), np.int64),
        "token_type_ids": np.zeros((len(encoded), length), np.int64),
    }
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
