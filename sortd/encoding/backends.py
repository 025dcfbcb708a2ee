"""Which backend runs a model, torch or ONNX Runtime, and why; found out without importing either.

``auto`` takes ONNX Runtime only where this model has been exported before. Exporting takes a minute, some hundred
megabytes and other embeddings than torch's, so somebody has to have asked for it, once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sortd.encoding.exports import EXTRA, has_any, is_installed
from sortd.encoding.model_folders import ModelFolder
from sortd.encoding.providers import can_use_gpu, torch_can_use_gpu
from sortd.errors import ModelError

Name = Literal["torch", "onnx"]


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
    torch: str | None = None,
    is_there: Callable[[Path], bool] = Path.exists,
) -> Backend:
    """Return what a configured backend means for a model on this machine.

    Args:
        backend: ``auto``, ``torch`` or ``onnx``.
        model: the CLIP.
        words: another model for words, or None.
        device: as configured.
        cache_dir: where exports lie; None: nowhere, so ``auto`` means torch.
        torch: its version; None asks.
        is_there: tells whether the file of a GPU is there.

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
            against = _against_onnx(model, words, cache_dir) or _device_against_onnx(device, torch, is_there)
            return Backend("torch", against) if against else Backend("onnx", "this model has been exported before")
    raise ModelError(f"backend {backend!r} is not in this sortd; set `backend: auto`, `torch` or `onnx`")


def _against_onnx(model: ModelFolder, words: ModelFolder | None, cache_dir: Path | None) -> str | None:
    """Return what keeps ``auto`` from ONNX Runtime, if anything does."""
    if not is_installed():
        return f"ONNX Runtime, which is quicker and lighter, is not installed: {EXTRA}"
    if cache_dir is None or not has_any(model, words, cache_dir=cache_dir):
        return "this model has not been exported to ONNX; `sortd models export` does it"
    return None


def _device_against_onnx(device: str, torch: str | None, is_there: Callable[[Path], bool]) -> str | None:
    """Return the same of the device: where torch could use a GPU and ONNX Runtime could not, torch is quicker."""
    import onnxruntime

    if device == "cpu":
        return None
    if device != "mps" and can_use_gpu(onnxruntime.get_available_providers(), is_there=is_there):
        return None
    if device == "auto" and not torch_can_use_gpu(torch=torch, is_there=is_there):
        return None
    return "this ONNX Runtime cannot use the device, torch can"
