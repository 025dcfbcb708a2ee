"""What runs a model, torch or ONNX Runtime, in float32 or int8: chosen, and loaded.

``auto`` takes ONNX Runtime only where this model has been exported before: an export takes a minute, some hundred
megabytes and other embeddings than torch's, so somebody has to have asked for it, by ``sortd models export``.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import structlog

from sortd import logs
from sortd.config import Config
from sortd.encoder import models
from sortd.encoder.base import TRIAL_TEXTS, Encoder, probe
from sortd.encoder.models import ModelFolder
from sortd.encoder.onnx_encoder import (
    EXTRA,
    GPUS,
    Exports,
    OnnxEncoder,
    Precision,
    available_providers,
    can_use_gpu,
    find_exports,
    has_exports,
    is_installed,
    read_verdict,
)
from sortd.errors import ModelError

EXPORT_IT = "`sortd models export` makes it"


@dataclass(frozen=True, slots=True)
class BackendChoice:
    """What is to run a model, and why, in a clause that can follow a colon."""

    name: Literal["torch", "onnx"]
    why: str


def choose_backend(
    backend: str,
    model: ModelFolder,
    words: ModelFolder | None,
    *,
    device: str,
    cache_dir: Path | None,
    torch: str | None = None,
    is_there: Callable[[Path], bool] = Path.exists,
) -> BackendChoice:
    """Return what a configured backend means for a model on this machine, without importing torch.

    Args:
        backend: ``auto``, ``torch`` or ``onnx``.
        model: the CLIP.
        words: another model for words, or None.
        device: as configured.
        cache_dir: where exports lie; with None ``auto`` means torch.
        torch: its version; None asks.
        is_there: tells whether the file of a GPU is there.

    Raises:
        ModelError: no such backend, or ``onnx`` without what it needs.
    """
    match backend:
        case "torch":
            return BackendChoice("torch", "`backend: torch` says so")
        case "onnx":
            available_providers()
            return BackendChoice("onnx", "`backend: onnx` says so")
        case "auto" if not is_installed():
            return BackendChoice("torch", f"ONNX Runtime, which is quicker and lighter, is not installed: {EXTRA}")
        case "auto" if cache_dir is None or not has_exports(model, words, cache_dir=cache_dir):
            return BackendChoice("torch", "this model has not been exported to ONNX; `sortd models export` does it")
        case "auto" if _only_torch_can_use(device, torch, is_there):
            return BackendChoice("torch", "this ONNX Runtime cannot use the device, torch can")
        case "auto":
            return BackendChoice("onnx", "this model has been exported before")
    raise ModelError(f"backend {backend!r} is not in this sortd; set `backend: auto`, `torch` or `onnx`")


def _only_torch_can_use(device: str, torch: str | None, is_there: Callable[[Path], bool]) -> bool:
    if device == "cpu" or (device != "mps" and can_use_gpu(available_providers(), is_there=is_there)):
        return False
    return device != "auto" or torch_can_use_gpu(torch=torch, is_there=is_there)


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


def load_encoder(
    model: str,
    *,
    text_model: str | None = None,
    backend: str = "auto",
    device: str = "auto",
    cache_dir: Path | None = None,
    threads: int | None = None,
    decoding: str = "draft",
) -> Encoder:
    """Load a CLIP from this disk, never from the network, and try it.

    Args:
        model: ``auto``, ``packaged``, a name or a folder; see ``models.locate``.
        text_model: a sentence-transformers text model taught into the same space, for words in other languages
            (``clip-ViT-B-32-multilingual-v1`` goes with ``clip-ViT-B-32``); None takes the CLIP's own text tower.
        backend: ``auto``, ``torch``, ``onnx`` or ``onnx-int8``; see ``choose``. Those of ONNX Runtime need an export.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        cache_dir: where fetched models, exports and the hashes of weights are kept.
        threads: how many threads a forward may use; None or 0 leaves it to the backend.
        decoding: how the pixels that will come were decoded (``draft`` or ``full``): embeddings of the one are not
            quite those of the other, so it is part of ``encoder_id``.

    Raises:
        ModelError: it cannot be had, is no CLIP, needs preprocessing that sortd does not do, or answers garbage.
    """
    folder = models.locate_clip(model, cache_dir=cache_dir)
    words = None if text_model is None else models.locate_text(text_model, cache_dir=cache_dir)
    kind, _, rounded = backend.partition("-")
    chosen = choose_backend(kind, folder, words, device=device, cache_dir=cache_dir)
    exported = None
    if chosen.name == "onnx" and cache_dir is not None:
        exported = find_exports(folder, words, cache_dir=cache_dir)
    if exported is None and kind == "onnx":
        raise ModelError(f"there is no export of {folder.name!r} to ONNX that serves: {EXPORT_IT}")
    encoder: Encoder
    if exported is not None:
        precision = Precision(rounded or "fp32")
        encoder = OnnxEncoder(
            exported, precision, device=device, cache_dir=cache_dir, threads=threads, decoding=decoding
        )
    else:
        from sortd.encoder.torch_encoder import TorchEncoder

        encoder = TorchEncoder(folder, words, device=device, cache_dir=cache_dir, threads=threads, decoding=decoding)
    # The text tower of an export was tried when that was made and is checked by content; opening it is half of a start.
    probe(encoder, texts=() if exported is not None else TRIAL_TEXTS)
    return encoder


# ------------------------------------------------------------ what a configuration means


def locate_models(config: Config) -> tuple[ModelFolder, ModelFolder | None]:
    """Return the configured model, and the one for words where that is another; raises ModelError."""
    model = models.locate_clip(config.model, cache_dir=config.cache_dir)
    words = None if config.text_model is None else models.locate_text(config.text_model, cache_dir=config.cache_dir)
    return model, words


def load_with_backend(config: Config, backend: str) -> Encoder:
    """Load the configured model on a backend; raises ModelError."""
    return load_encoder(
        config.model,
        text_model=config.text_model,
        backend=backend,
        device=config.device,
        cache_dir=config.cache_dir,
        threads=config.threads,
        decoding=config.decoding.jpeg,
    )


def load_fastest(config: Config, *, tell: Callable[[str], None]) -> Encoder:
    """Load the quickest of what the configuration allows and is ready: nothing is exported or judged here.

    int8 serves where the verdict beside its export says so. What does not run falls back, with a warning: int8 to
    float32, the GPU to the CPU, a missing or damaged export to torch, and with ``backend: auto`` ONNX Runtime to torch.

    Args:
        config: the model and the backend.
        tell: hears in a few words what runs the model, and why not something quicker.

    Raises:
        ModelError: the model cannot be had.
    """
    model, words = locate_models(config)
    chosen = choose_backend(config.backend, model, words, device=config.device, cache_dir=config.cache_dir)
    if chosen.name == "torch":
        tell(f"torch; {chosen.why}" if config.backend == "auto" and is_installed() else "torch")
        return load_with_backend(config, "torch")
    try:
        exported = find_exports(model, words, cache_dir=config.cache_dir)
        if exported is not None:
            return _load_exported(config, exported, tell)
        problem = f"the export to ONNX is missing, damaged or old; {EXPORT_IT}"
    except ModelError as error:
        if config.backend != "auto":
            raise
        problem = str(error)
    _fell_back("onnx", "torch", problem)
    tell(f"torch; {problem}")
    return load_with_backend(config, "torch")


def _load_exported(config: Config, exported: Exports, tell: Callable[[str], None]) -> Encoder:
    """Load the quickest that ONNX Runtime may serve with; raise ModelError where not even float32 loads."""
    if config.device != "cpu" and can_use_gpu(available_providers()):
        exact = load_with_backend(config, "onnx")
        if isinstance(exact, OnnxEncoder) and exact.runs_on != "CPU":
            tell(f"onnx fp32 on {exact.runs_on}")
            return exact
        _fell_back("onnx on the GPU", "onnx on the CPU", "its libraries, or the driver, do not load")
        del exact
    reason = f"int8 would be {exported.manifest.gain:.2f} times as quick, which is not worth it"
    if Precision.INT8 in exported.precisions:
        verdict = read_verdict(exported, config.root)
        refusal = "not judged on these datasets; `sortd models export` does it" if verdict is None else None
        if verdict is not None and (refusal := verdict["refusal"]) is None:
            try:
                encoder = load_with_backend(config, "onnx-int8")
            except ModelError as error:
                _fell_back("onnx int8", "onnx fp32", str(error))
                refusal = str(error)
            else:
                tell(f"onnx int8; {verdict['same']} of {verdict['filed']} references filed as by fp32")
                return encoder
        reason = f"int8 does not serve: {refusal}"
    encoder = load_with_backend(config, "onnx")
    tell(f"onnx fp32; {reason}")
    return encoder


def _fell_back(wanted: str, backend: str, error: str) -> None:
    """Log a warning; commands that keep no log say it on stderr, for stdout is for facts."""
    if structlog.is_configured():
        structlog.get_logger().warning(logs.MODEL_FELL_BACK, wanted=wanted, backend=backend, error=error)
    else:
        logging.getLogger(__name__).warning("%s: %s", logs.MODEL_FELL_BACK, error)
