"""The backends of a model, torch, ONNX Runtime in float32 or int8, or another process: their selection and loading.

``auto`` uses ONNX Runtime only if this model was exported before: an export takes a minute, some hundred megabytes, and
gives other embeddings than torch, so the user must request it by ``sortd models export``.
"""

import json
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import numpy as np
import structlog

from sortd import logs
from sortd.arrays import FloatArray
from sortd.config import SOCKET, Config
from sortd.encoder.clip import SAME_COSINE, Encoder, TorchEncoder, lowest_cosine, probe
from sortd.encoder.models import LocatedModel, locate_configured, locate_pair, refuse_text_mode
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
    return_large_blocks,
)
from sortd.encoder.remote import AS_COMMAND, Greeting, RemoteEncoder, Waiting
from sortd.errors import ConfigError, ModelError
from sortd.files import read_regular, write_json

KNOWN_ROWS = "known-rows.json"
"""In the cache: the rows of two probe images by ``encoder_id``."""

_REMEDY = "run `sortd models export`"
_MAX_KNOWN_ROWS = 31  # encoders besides the present one, of some kilobytes each


@dataclass(frozen=True, slots=True)
class BackendChoice:
    """The backend of a model, and the reason as a clause that can follow a colon."""

    name: Literal["torch", "onnx"]
    why: str


def choose_backend(
    backend: str,
    model: LocatedModel,
    *,
    device: str,
    torch: str | None = None,
    is_there: Callable[[Path], bool] = Path.exists,
) -> BackendChoice:
    """Return the backend that ``auto``, ``torch`` or ``onnx`` selects on this machine, without importing torch.

    ``torch`` is its version (None: the installed one); ``is_there`` tells whether the device file of a GPU exists.

    Raises:
        ModelError: the backend is unknown, or ``onnx`` is not installed.
    """
    match backend:
        case "torch":
            return BackendChoice("torch", "`backend: torch` is configured")
        case "onnx":
            available_providers()
            return BackendChoice("onnx", "`backend: onnx` is configured")
        case "auto" if not is_installed():
            return BackendChoice("torch", f"ONNX Runtime, which is faster and smaller, is not installed: {EXTRA}")
        case "auto" if not has_exports(model):
            return BackendChoice("torch", "this model has not been exported to ONNX; `sortd models export` does it")
        case "auto" if _only_torch_can_use(device, torch, is_there):
            return BackendChoice("torch", "torch can use the device and this ONNX Runtime cannot")
        case "auto":
            return BackendChoice("onnx", "this model has been exported before")
    raise ModelError(f"unknown backend {backend!r}; set `backend: auto`, `torch`, `onnx` or `{SOCKET}PATH`")


def _only_torch_can_use(device: str, torch: str | None, is_there: Callable[[Path], bool]) -> bool:
    if device == "cpu" or (device != "mps" and can_use_gpu(available_providers(), is_there=is_there)):
        return False
    return device != "auto" or torch_can_use_gpu(torch=torch, is_there=is_there)


def torch_can_use_gpu(*, torch: str | None = None, is_there: Callable[[Path], bool] = Path.exists) -> bool:
    """Tell, without importing torch, whether it can use a GPU: one exists, and the build is not for CPUs (``+cpu``)."""
    try:
        build = version("torch") if torch is None else torch
    except PackageNotFoundError:
        return False
    return not build.endswith("+cpu") and any(is_there(gpu.device) for gpu in GPUS)


def load_model(
    model: str,
    *,
    text_model: str | None = None,
    backend: str = "auto",
    device: str = "auto",
    cache_dir: Path | None = None,
    threads: int | None = None,
    decoding: str = "draft",
) -> Encoder:
    """Load a CLIP from this disk, never from the network, and test it.

    Args:
        model: ``auto``, ``packaged``, a name or a folder; see ``models.locate_clip``.
        text_model: a sentence-transformers text model trained into the same space, for other languages
            (``clip-ViT-B-32-multilingual-v1`` goes with ``clip-ViT-B-32``); None uses the CLIP's own text tower.
        backend: ``auto``, ``torch``, ``onnx`` or ``onnx-int8``; those of ONNX Runtime need an export.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        cache_dir: the cache of fetched models, exports and hashes of weights.
        threads: number of threads of a forward pass; None or 0: the backend's choice.
        decoding: how JPEGs are decoded (``draft`` or ``full``); part of ``encoder_id``, since embeddings differ.

    Raises:
        ModelError: the model is missing, not a CLIP, needs unsupported preprocessing, or fails the test.
    """
    located = locate_pair(model, text_model, cache_dir)
    kind, _, precision = backend.partition("-")
    chosen = choose_backend(kind, located, device=device)
    exported = find_exports(located) if chosen.name == "onnx" else None
    if exported is not None:
        number = Precision(precision or "fp32")
        onnx = OnnxEncoder(exported, number, device=device, threads=threads, decoding=decoding)
        # The text tower was tested at the export and is verified by content; opening it takes half of a start.
        check_known_rows(onnx.encoder_id, probe(onnx, texts=()), cache_dir)
        return onnx
    if kind == "onnx":
        raise ModelError(f"there is no valid export of {located.clip.name!r} to ONNX; {_REMEDY}")
    encoder = TorchEncoder(located, device=device, threads=threads, decoding=decoding)
    check_known_rows(encoder.encoder_id, probe(encoder), cache_dir)
    return encoder


def check_known_rows(encoder_id: str, rows: FloatArray, cache_dir: Path | None) -> None:
    """Compare the rows of the probe images with those of the first start under the same ``encoder_id``; keep these.

    Raises:
        ModelError: they differ: cached embeddings and prototypes would not fit the ones made from now on.
    """
    if cache_dir is None:
        return
    file, known = cache_dir / KNOWN_ROWS, {}
    with suppress(OSError, ValueError):  # without the file this start counts as the first
        loaded = json.loads(read_regular(file))
        known = loaded if isinstance(loaded, dict) else {}
    before = np.zeros(0, np.float32)
    with suppress(ValueError, TypeError):  # a damaged entry is written again
        before = np.asarray(known.get(encoder_id), np.float32)
    if before.shape == rows.shape and np.isfinite(before).all():
        cosine = lowest_cosine(before, rows)
        if cosine < SAME_COSINE:  # the order of additions, by device and number of threads, makes much less
            raise ModelError(
                f"model {encoder_id} gives other embeddings than those in the cache (cosine {cosine:.4f}): its "
                f"libraries or its device changed; return to them, or have everything embedded again: stop sortd and "
                f"delete {file}, embeddings.sqlite and prototypes there"
            )
        return
    kept = dict(list(known.items())[-_MAX_KNOWN_ROWS:]) | {encoder_id: np.round(rows, 6).tolist()}
    with suppress(OSError):  # a full disk or a read-only cache: the next start counts as the first
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, kept, durable=False)


# ------------------------------------------------------------ the configured model


def load_with_backend(config: Config, backend: str) -> Encoder:
    """Load the configured model with a backend; raises ModelError."""
    return load_model(
        config.model,
        text_model=config.text_model,
        backend=backend,
        device=config.device,
        cache_dir=config.cache_dir,
        threads=config.threads,
        decoding=config.decoding.jpeg,
    )


def load_fastest(config: Config, *, report: Callable[[str], None], waiting: Waiting = AS_COMMAND) -> Encoder:
    """Load the configured model with the fastest backend that is allowed and ready; nothing is exported or measured.

    int8 is used if the verdict stored with its export allows it. On an error the next backend is used, with a warning:
    float32 for int8, the CPU for the GPU, torch for a missing or damaged export, and with ``backend: auto`` torch for
    ONNX Runtime. ``report`` is called with the backend and the reason why it is not a faster one. With ``backend:
    socket:PATH`` nothing is loaded here: the encoder is that of another process, for which this one waits.

    Raises:
        ModelError: the model cannot be loaded.
        ConfigError: it does not fit the configuration.
    """
    if config.encoder_socket is not None:
        return connect(config, config.encoder_socket, waiting)
    model = locate_configured(config)
    chosen = choose_backend(config.backend, model, device=config.device)
    if chosen.name == "torch":
        return _load_torch(config, report, chosen.why if config.backend == "auto" and is_installed() else "")
    try:
        exported = find_exports(model)
        if exported is not None:
            return _load_exported(config, exported, report)
        problem = f"the export to ONNX is missing, damaged or outdated; {_REMEDY}"
    except ModelError as error:
        if config.backend != "auto":
            raise
        problem = str(error)
    _warn_of_fallback("onnx", "torch", problem)
    return _load_torch(config, report, problem)


def _load_torch(config: Config, report: Callable[[str], None], why: str) -> Encoder:
    """Load with torch, and report the precision on a GPU."""
    encoder = load_with_backend(config, "torch")
    assert isinstance(encoder, TorchEncoder)
    report(f"{torch_name(encoder)}; {why}" if why else torch_name(encoder))
    return encoder


def torch_name(encoder: TorchEncoder) -> str:
    """Return the backend, and on a GPU its precision and the device."""
    return "torch" if encoder.runs_on == "CPU" else f"torch {encoder.precision} on {encoder.runs_on}"


def connect(config: Config, path: Path, waiting: Waiting = AS_COMMAND) -> RemoteEncoder:
    """Return the encoder of another process, with the checks of one that is loaded here.

    Raises:
        ModelError: the service is away for too long, or its rows differ from those in the cache.
        ConfigError: the configuration needs another model, or other decoding.
    """
    encoder = RemoteEncoder(path, waiting)
    try:
        _check_greeting(config, path, encoder.greeting)
    except (ConfigError, ModelError):
        encoder.close()
        raise
    return encoder


def _check_greeting(config: Config, path: Path, greeting: Greeting) -> None:
    if greeting.decoding != config.decoding.jpeg:
        raise ConfigError(
            f"`decoding: jpeg` is {config.decoding.jpeg} here and {greeting.decoding} for the encoder service at "
            f"{path}, and embeddings depend on it: set both alike"
        )
    if not greeting.has_text:
        refuse_text_mode(config, f"the encoder service at {path} ({greeting.description})")
    check_known_rows(greeting.encoder_id, greeting.known_rows, config.cache_dir)


def _load_exported(config: Config, exported: Exports, report: Callable[[str], None]) -> Encoder:
    """Load the fastest form of an export: on the GPU, in int8, or in float32."""
    return_large_blocks()
    if config.device != "cpu" and can_use_gpu(available_providers()):
        exact = load_with_backend(config, "onnx")
        if isinstance(exact, OnnxEncoder) and exact.runs_on != "CPU":
            report(f"onnx fp32 on {exact.runs_on}")
            return exact
        _warn_of_fallback("onnx on the GPU", "onnx on the CPU", "its libraries, or the driver, do not load")
        del exact
    reason = f"int8 is only {exported.manifest.gain:.2f} times as fast"
    if Precision.INT8 in exported.precisions:
        verdict = read_verdict(exported, config.root)
        refusal = f"it was not compared on these datasets; {_REMEDY}" if verdict is None else verdict["refusal"]
        if verdict is not None and refusal is None:
            try:
                encoder = load_with_backend(config, "onnx-int8")
                report(f"onnx int8; {verdict['same']} of {verdict['filed']} references filed as by fp32")
            except ModelError as error:
                refusal = str(error)
                _warn_of_fallback("onnx int8", "onnx fp32", refusal)
            else:
                return encoder
        reason = f"int8 is not used: {refusal}"
    encoder = load_with_backend(config, "onnx")
    report(f"onnx fp32; {reason}")
    return encoder


def _warn_of_fallback(wanted: str, backend: str, error: str) -> None:
    """Log a warning; commands without a log print it to stderr."""
    if structlog.is_configured():
        structlog.get_logger().warning(logs.MODEL_FELL_BACK, wanted=wanted, backend=backend, error=error)
    else:
        logging.getLogger(__name__).warning("%s: %s", logs.MODEL_FELL_BACK, error)
