"""A measurement: how fast this machine, this model and these files are, stage by stage, and what bounds them."""

import os
import random
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

from sortd.commands import stopwatch
from sortd.commands.model_facts import backend_facts
from sortd.commands.stopwatch import File
from sortd.config import Config
from sortd.encoder.base import Encoder
from sortd.encoder.onnx_encoder import EXTRA, OnnxEncoder, Precision
from sortd.encoder.torch_encoder import TorchEncoder
from sortd.errors import DataError, ModelError
from sortd.images.formats import SUFFIXES
from sortd.layout import Area, find_datasets
from sortd.messages import EmbeddedImage
from sortd.names import CLASS_AREAS, rule_for, rule_for_folder
from sortd.running.site import LoadEncoder, Site
from sortd.watching.scanning import scan

LOOKED_THROUGH = 20_000
"""Files that are listed before some are drawn: a folder of millions is not walked for it."""

PIPELINE_SECONDS = 15.0
"""How long the images may take through the pipeline, about; with the other stages it stays below a minute."""

LARGEST_BATCH = 128
"""A configured batch beyond this is not measured: it would take gigabytes to be no faster."""

LEAST_TIMED_SHARE = 6
"""One in so many images goes through the pipeline before the time is taken: the decoders have started then."""

MOVED = 32
"""Copies, of the smallest images, that are moved in the scratch folder as one group."""

Tell = Callable[[str], None]
LoadOther = Callable[[Config, str], Encoder]


@dataclass(frozen=True, slots=True)
class Stages:
    """Milliseconds an image, each stage by itself; None where there was nothing to measure."""

    read: float
    """From the disk, where the system lets go of what it has in memory."""
    decode: float
    """By one process, hashing included."""
    encode: float
    """By the model, at the batch that suits it best."""
    encode_alone: float
    """The same for a lone image."""
    decide: float | None
    move: float | None


@dataclass(frozen=True, slots=True)
class Backend:
    """How fast one backend runs this model."""

    backend: str
    encoder_id: str
    encode: float
    """Milliseconds an image at its best batch."""
    images_per_second: float
    """The bound with this backend."""
    serves: bool


@dataclass(frozen=True, slots=True)
class Measurement:
    """All that was measured."""

    model: str
    encoder_id: str
    configured: str
    """The ``backend:`` of the configuration."""
    int8_refusal: str | None
    """Why int8 may not serve these references; None where it may, or where there is none."""
    onnx_hint: str | None
    """What brings ONNX Runtime where nothing of it is ready; None where it is."""
    device: str
    cores: int
    files: int
    megabytes: float
    """Of an image, on the mean."""
    load_seconds: float
    best_batch: int
    stages: Stages
    embedded_per_second: float
    """Through the pipeline: decoding and encoding at once, as the daemon does."""
    filed_per_second: float
    """The same with deciding and moving after it."""
    bound_per_second: float
    """Were nothing but decoding on all cores and the forward: what the pipeline is held against."""
    limit: str
    """``decode`` or ``forward``: the larger share of the time."""
    backends: tuple[Backend, ...]

    def facts(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {**asdict(self), "share_of_bound": round(self.embedded_per_second / self.bound_per_second, 3)}


def measure(
    config: Config,
    folder: Path | None,
    *,
    images: int,
    others: Sequence[str] = (),
    load_encoder: LoadEncoder | None = None,
    load_other: LoadOther | None = None,
    tell: Tell = lambda _: None,
) -> Measurement:
    """Measure on copies and in memory; no file of the user's is moved or changed.

    Args:
        config: the model, the backend, the decoding, and where the datasets are.
        folder: whose images serve; None: those of the datasets.
        images: how many are drawn at most.
        others: further backends to compare with.
        load_encoder: stands in for the configured model.
        load_other: loads the configured model on another backend; None: one that is ready.
        tell: hears which stage begins.

    Raises:
        DataError: there is no image.
        ModelError: the model cannot be had.
    """
    files, cores = draw(config, folder, images), len(os.sched_getaffinity(0))
    most = min(config.batch_size, LARGEST_BATCH)
    with _scratch(config) as scratch:
        tell("loading the model")
        began = perf_counter()
        site = Site(config, load_encoder=load_encoder, scratch=scratch)
        try:
            embedder, _, description = site.load()
            load_seconds = perf_counter() - began
            encoder = embedder.encoder
            device = device_of(encoder)
            tell("reading")
            read = stopwatch.read_milliseconds(files)
            tell("decoding")
            decode, pixels = stopwatch.decode(config, encoder, files)
            tell("encoding")
            forward = stopwatch.forward_milliseconds(encoder, pixels, most=most)
            best = min(forward, key=lambda size: forward[size])
            bound = bound_per_second(decode, forward[best], cores, device)
            tell("decoding and encoding at once")
            first = len(files) // LEAST_TIMED_SHARE
            started = [one for one in embedder.embed(files[:first]) if isinstance(one, EmbeddedImage)]
            rows, seconds = stopwatch.embed(embedder, files[first:][: max(8, int(bound * PIPELINE_SECONDS))])
            tell("deciding")
            decide = stopwatch.decide_milliseconds(config, encoder, rows)
        finally:
            site.unload()
        tell("moving copies")
        move = stopwatch.move_milliseconds(scratch, sorted(files, key=lambda file: file[1].size)[:MOVED])
    embedded = len(rows) / seconds
    backends = [Backend(backend_of(encoder.encoder_id), encoder.encoder_id, forward[best], bound, serves=True)]
    for backend in others:
        if backend == backends[0].backend:
            continue
        tell(f"encoding by {backend}")
        try:
            other = (load_other or with_backend)(config, backend)
        except ModelError:
            continue  # not to be had here: what is not there is not chosen
        taken = min(stopwatch.forward_milliseconds(other, pixels, most=most).values())
        reachable = bound_per_second(decode, taken, cores, device_of(other))
        backends.append(Backend(backend, other.encoder_id, taken, reachable, serves=False))
    facts = backend_facts(config)
    return Measurement(
        model=description,
        encoder_id=encoder.encoder_id,
        configured=config.backend,
        int8_refusal=_int8_refusal(facts),
        onnx_hint=None if facts["export"] else _onnx_hint(facts),
        device=device,
        cores=cores,
        files=len(started) + len(rows),
        megabytes=statistics.fmean(mark.size for _, mark in files) / 1e6,
        load_seconds=load_seconds,
        best_batch=best,
        stages=Stages(read, decode, forward[best], forward[1], decide, move),
        embedded_per_second=embedded,
        filed_per_second=1.0 / (1.0 / embedded + 1e-3 * ((decide or 0.0) + (move or 0.0))),
        bound_per_second=bound,
        limit="decode" if decode / cores > forward[best] else "forward",
        backends=tuple(sorted(backends, key=lambda one: one.encode)),
    )


# ---------------------------------------------------------------- the files


def draw(config: Config, folder: Path | None, images: int) -> list[File]:
    """Draw images from a folder, or from the datasets: what waits, then what teaches, then what was filed.

    Raises:
        DataError: there is none.
    """
    if folder is not None:
        places = [folder.absolute()]
    else:
        areas = (Area.IMAGES, Area.CLASES, Area.DATASET, Area.REVIEW)
        places = [layout.area(area) for area in areas for layout in find_datasets(config.root)]
    found: list[File] = []
    for place in places:
        judge = rule_for_folder if place.name in CLASS_AREAS else rule_for
        listed = islice(scan(os.fspath(place), report=lambda _: None, rule_at_top=judge), LOOKED_THROUGH)
        found += [file for file in listed if os.path.splitext(file[0])[1].lower() in SUFFIXES]
        if len(found) >= images:
            break
    if not found:
        raise DataError(f"there is no image in {folder or config.root}: name a folder of images, `sortd bench FOLDER`")
    return random.Random(0).sample(sorted(found), min(images, len(found)))  # noqa: S311 -- a sample, no secret


@contextmanager
def _scratch(config: Config) -> Iterator[Path]:
    """Make a folder on the disk of the datasets, as hidden ones are not looked into, and remove it with all in it."""
    state, root = config.state_dir, config.root
    shares_disk = state.is_dir() and root.is_dir() and state.stat().st_dev == root.stat().st_dev
    place = state if shares_disk else root
    is_writable = place.is_dir() and os.access(place, os.W_OK)
    with tempfile.TemporaryDirectory(prefix=".sortd-bench-", dir=place if is_writable else None) as name:
        yield Path(name)


# ---------------------------------------------------------------- what follows from them


def bound_per_second(decode: float, forward: float, cores: int, device: str) -> float:
    """Return images a second, were nothing but these milliseconds: on one processor in turn, on two side by side."""
    return 1e3 / (forward + decode / cores if device == "cpu" else max(forward, decode / cores))


def _int8_refusal(facts: Mapping[str, Any]) -> str | None:
    """Return why int8 may not serve, by what ``backend_facts`` knows of its export and of the last verdict."""
    if facts["export"] is None or Precision.INT8.value not in facts["export"]["precisions"]:
        return None
    if facts["agreement"] is None:
        return "it has not been held against fp32 on your references yet; `sortd models export` does it"
    refusal: str | None = facts["agreement"]["refusal"]
    return refusal


def _onnx_hint(facts: Mapping[str, Any]) -> str:
    return "`sortd models export`" if facts["is_installed"] else f"{EXTRA} and `sortd models export`"


def device_of(encoder: Encoder) -> str:
    """Name what the forward runs on: ``cpu``, ``cuda``, ``rocm`` or ``mps``."""
    return encoder.runs_on.lower() if isinstance(encoder, OnnxEncoder | TorchEncoder) else "cpu"


def backend_of(encoder_id: str) -> str:
    """Read the backend off an encoder's id."""
    if "-onnx-" not in encoder_id:
        return "torch"
    return "onnx-int8" if "-onnx-int8-" in encoder_id else "onnx"


def with_backend(config: Config, backend: str) -> Encoder:
    """Load the configured model on a backend that is ready: an export is used, never made.

    Raises:
        ModelError: it cannot be had.
    """
    from sortd.encoder.backends import load_with_backend

    return load_with_backend(config, backend)
