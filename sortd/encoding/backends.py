"""Which backend runs a model, torch or ONNX Runtime, and why; found out without importing either.

``auto`` takes ONNX Runtime only where this model has been exported before. Exporting takes a minute, some hundred
megabytes and other embeddings than torch's, so somebody has to have asked for it, once.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sortd.encoding.exports import EXTRA, has_any, is_installed
from sortd.encoding.model_folders import ModelFolder
from sortd.errors import ModelError

Name = Literal["torch", "onnx"]

GPU = Path("/dev/nvidiactl")
"""There wherever NVIDIA's driver has a device to offer."""


@dataclass(frozen=True, slots=True)
class Backend:
    """What runs a model, and why, in a clause that can follow a colon."""

    name: Name
    why: str


def choose(
    backend: str,
    model: ModelFolder,
    words: ModelFolder | None,
    *,
    device: str,
    cache_dir: Path | None,
    gpu: Path = GPU,
) -> Backend:
    """Return what a configured backend means for a model on this machine.

    Args:
        backend: ``auto``, ``torch`` or ``onnx``.
        model: the CLIP.
        words: another model for words, or None.
        device: as configured.
        cache_dir: where exports lie; None: nowhere, so ``auto`` means torch.
        gpu: is there where an NVIDIA device is.

    Raises:
        ModelError: no such backend, or ``onnx`` without what it needs.
    """
    match backend:
        case "torch":
            return Backend("torch", "`backend: torch` says so")
        case "onnx":
            if not is_installed():
                raise ModelError(f"`backend: onnx` needs ONNX Runtime, which is not installed: {EXTRA}")
            return Backend("onnx", "`backend: onnx` says so")
        case "auto":
            against = _against_onnx(model, words, device, cache_dir, gpu)
            return Backend("torch", against) if against else Backend("onnx", "this model has been exported before")
    raise ModelError(f"backend {backend!r} is not in this sortd; set `backend: auto`, `torch` or `onnx`")


def _against_onnx(
    model: ModelFolder, words: ModelFolder | None, device: str, cache_dir: Path | None, gpu: Path
) -> str | None:
    """Return what keeps ``auto`` from ONNX Runtime, if anything does."""
    if not is_installed():
        return f"ONNX Runtime, which is quicker and lighter, is not installed: {EXTRA}"
    if cache_dir is None or not has_any(model, words, cache_dir=cache_dir):
        return "this model has not been exported to ONNX; `sortd models export` does it"
    if device != "cpu" and (device != "auto" or gpu.exists()) and not _has_cuda():
        return "this ONNX Runtime cannot use the device, torch can"
    return None


def _has_cuda() -> bool:
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()
