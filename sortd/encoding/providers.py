"""The providers of ONNX Runtime: which part of this machine may run a graph, best first, and which one does."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sortd.errors import ModelError

CPU = "CPUExecutionProvider"


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

Attempt = list[Any]
"""What ``InferenceSession`` takes as ``providers``."""


def attempts(device: str, available: Sequence[str], *, is_there: Callable[[Path], bool] = Path.exists) -> list[Attempt]:
    """Return which providers to open a graph with, the first that can be used serves.

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


def name_of(providers: Sequence[str]) -> str:
    """Return what people call the best of the providers that a session has: ``CPU``, ``CUDA``, ``ROCm``."""
    return next((gpu.name for gpu in GPUS if gpu.provider in providers), "CPU")


def can_use_gpu(available: Sequence[str], *, is_there: Callable[[Path], bool] = Path.exists) -> bool:
    """Tell whether this ONNX Runtime was built for a GPU that is here."""
    return any(gpu.provider in available and is_there(gpu.device) for gpu in GPUS)


def torch_can_use_gpu(*, torch: str | None = None, is_there: Callable[[Path], bool] = Path.exists) -> bool:
    """Tell, without importing torch, whether it would find a GPU: one is here, and its build is not that for CPUs.

    Args:
        torch: its version; None asks. The builds of its CPU index say ``+cpu`` there.
        is_there: tells whether a device's file is there.
    """
    try:
        built = version("torch") if torch is None else torch
    except PackageNotFoundError:
        return False
    return not built.endswith("+cpu") and any(is_there(gpu.device) for gpu in GPUS)
