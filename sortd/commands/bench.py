"""Measure the speed of each stage on this machine, and recommend a backend.

Images are decoded and encoded in memory; moves are timed on copies in a temporary folder.
"""

import os
import random
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from sortd.arrays import Pixels
from sortd.commands.console import counted, decimals, megabytes, print_line, print_table, printable
from sortd.commands.models import backend_facts
from sortd.companions import IMAGES
from sortd.config import Config
from sortd.daemon.dataset_lock import lock_dataset
from sortd.daemon.resources import LoadEncoder, Resources
from sortd.encoder import onnx_encoder
from sortd.encoder.backends import load_with_backend
from sortd.encoder.clip import Encoder
from sortd.encoder.models import locate_configured
from sortd.errors import DataError, ModelError
from sortd.events import EmbeddedImage, Move, Outcome, Stamp
from sortd.images.decode import DecodeLimits
from sortd.images.pool import DecodedImage, DecoderPool
from sortd.layout import CLASS_AREAS, Area, Layout, find_datasets, rule_for, rule_for_folder
from sortd.watch.scan import scan, stamp

INT8 = "onnx-int8"
BACKENDS = (INT8, "onnx", "torch")
SERVED = "socket"  # by another process
WORTH_A_CHANGE = 1.1
"""Ratio of images per second above which another backend is recommended."""

LISTED_AT_MOST = 20_000
STAGE_SECONDS = 6.0
"""Approximate time for which decoding, and the forward pass of each backend, are measured."""

PIPELINE_SECONDS = 15.0
LARGEST_BATCH = 128
MOVED_AT_MOST = 32

_File = tuple[str, Stamp]
LoadOther = Callable[[Config, str], Encoder]


def measure(
    config: Config,
    folder: Path | None,
    *,
    images: int,
    load_encoder: LoadEncoder | None = None,
    load_other: LoadOther | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Return the milliseconds of each stage, the images per second and the recommendations, as plain values.

    At most ``images`` are drawn from ``folder`` or the datasets. ``load_encoder`` and ``load_other`` replace the loader
    of the configured model, and its loader on another backend.

    Raises DataError: there is no image, or none can be decoded; ModelError.
    """
    files, cores = draw(config, folder, images), len(os.sched_getaffinity(0))
    most = min(config.batch_size, LARGEST_BATCH)
    with _scratch(config) as scratch:
        tell("loading the model")
        began = perf_counter()
        with Resources(config, load_encoder=load_encoder, scratch=scratch) as resources:
            embedder, _, description = resources.load()
            load_seconds = perf_counter() - began
            encoder = embedder.encoder
            tell("decoding")
            decode, pixels = _decode(config, encoder, files)
            tell("encoding")
            forward = _forward_milliseconds(encoder, pixels, most=most)
            best = min(forward, key=lambda size: forward[size])
            bound = _bound(decode, forward[best], cores, encoder)
            tell("decoding and encoding at once")
            first = len(files) // 6  # not timed, so that the decoders have started
            warm = [one for one in embedder.embed(files[:first]) if isinstance(one, EmbeddedImage)]
            began, timed = perf_counter(), files[first:][: max(8, int(bound * PIPELINE_SECONDS))]
            done = [one for one in embedder.embed(timed) if isinstance(one, EmbeddedImage)]
            embedded = len(done) / (perf_counter() - began)
            if not done:
                raise DataError(f"none of {len(timed)} images can be decoded; `sortd check` says more")
        tell("moving copies")
        moved = _move_milliseconds(scratch, sorted(files, key=lambda file: file[1].size)[:MOVED_AT_MOST])
    own = "torch" if "-onnx-" not in encoder.encoder_id else INT8 if f"-{INT8}-" in encoder.encoder_id else "onnx"
    own = own if config.encoder_socket is None else SERVED
    backends = [_backend(own, encoder, forward[best], bound, serves=True)]
    for name in BACKENDS if own != SERVED else ():  # the model here may be another one
        with suppress(ModelError):  # a missing backend is not recommended
            if name != own:
                tell(f"encoding by {name}")
                other = (load_other or _with_backend)(config, name)
                taken = min(_forward_milliseconds(other, pixels, most=most).values())
                backends.append(_backend(name, other, taken, _bound(decode, taken, cores, other), serves=False))
    backend = backend_facts(config)
    missing = [] if backend["is_installed"] else [onnx_encoder.EXTRA]
    facts = {
        "model": description,
        "encoder_id": encoder.encoder_id,
        "configured": config.backend,
        "int8_refusal": _int8_refusal(backend),
        "onnx_hint": None if backend["export"] else " and ".join([*missing, "`sortd models export`"]),
        "device": _device(encoder),
        "cores": cores,
        "files": len(warm) + len(done),
        "megabytes": statistics.fmean(mark.size for _, mark in files) / 1e6,
        "load_seconds": load_seconds,
        "best_batch": best,
        "stages": {
            "decode": decode,
            "encode": forward[best],
            "encode_alone": forward[1],
            "move": moved,
        },
        "embedded_per_second": embedded,
        "filed_per_second": 1.0 / (1.0 / embedded + 1e-3 * (moved or 0.0)),
        "bound_per_second": bound,
        "share_of_bound": round(embedded / bound, 3),
        "limit": "decode" if decode / cores > forward[best] else "forward",
        "backends": sorted(backends, key=lambda one: one["encode"]),
    }
    return facts | {"advice": [*backend_advice(facts)]}


def draw(config: Config, folder: Path | None, images: int) -> list[_File]:
    """Return random images of a folder, or of Images/, Clases/, Dataset/ and Review/; raise DataError without any."""
    areas = (Area.IMAGES, Area.CLASES, Area.DATASET, Area.REVIEW)
    layouts = find_datasets(config.root) if folder is None else []
    places = [layout.area(area) for area in areas for layout in layouts] if folder is None else [folder.absolute()]
    found: list[_File] = []
    for place in places:
        rule = rule_for_folder if place.name in CLASS_AREAS else rule_for
        listed = islice(scan(os.fspath(place), report=lambda _: None, rule_at_top=rule), LISTED_AT_MOST)
        found += [file for file in listed if os.path.splitext(file[0])[1].lower() in IMAGES]
        if len(found) >= images:
            break
    if not found:
        raise DataError(f"there is no image in {folder or config.root}: name a folder of images, `sortd bench FOLDER`")
    return random.Random(0).sample(sorted(found), min(images, len(found)))  # noqa: S311 -- a sample, no secret


def backend_advice(facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield the recommended backend, and the stage that limits the speed."""
    serving = next(one for one in facts["backends"] if one["serves"])

    def times(one: Mapping[str, Any]) -> float:
        return float(one["images_per_second"] / serving["images_per_second"])

    refusal = facts["int8_refusal"]
    allowed = [one for one in facts["backends"] if one["backend"] != INT8 or one["serves"] or not refusal]
    best = max(allowed, key=times)
    name = best["backend"].partition("-")[0]
    if times(best) < WORTH_A_CHANGE:
        yield f"keep the backend: no other usable one is faster than {serving['backend']}"
    elif name == serving["backend"].partition("-")[0]:  # the precision is chosen at a start
        yield f"restart sortd: {best['backend']} is usable now and {times(best):.1f} times as fast"
    else:
        yield f"set `backend: {name}`: {best['backend']} is {times(best):.1f} times as fast"
    for one in facts["backends"]:
        if one not in allowed and times(one) >= WORTH_A_CHANGE * times(best):
            yield f"{one['backend']} is {times(one):.1f} times as fast, but is not used: {refusal}"
    if facts["onnx_hint"] and serving["backend"] == "torch" and facts["device"] == "cpu":
        yield f"only torch is installed; ONNX Runtime may be faster: {facts['onnx_hint']}, then measure again"
    if facts["limit"] == "decode":
        yield "the bottleneck is decoding: more processor cores help, a faster model does not"
    elif facts["device"] == "cpu":
        yield "the bottleneck is the model: a faster backend, a smaller model or a GPU helps"
    else:
        yield "the bottleneck is the model: a smaller model helps, more processor cores do not"


def print_measured(facts: Mapping[str, Any]) -> None:
    """Print the figures and the recommendations as tables."""
    second, stages = facts["embedded_per_second"], facts["stages"]
    speed = f"{facts['filed_per_second']:.1f} images/s on {facts['device']}, {counted(facts['cores'], 'core')}"
    print_line(speed, style="bold green")
    print_line(f"model: {printable(facts['model'])}")
    print_line(
        f"decoding and encoding: {second:.1f} images/s, {facts['share_of_bound']:.0%} of the upper bound by the times"
        f" of both stages ({facts['bound_per_second']:.1f})"
    )
    size = megabytes(facts["megabytes"] * 1e6)
    print_line(f"measured on {counted(facts['files'], 'image')} with a mean size of {size}\n")
    notes = {
        "decode": "in one process, with reading and hashing; sortd uses one process per core",
        "encode": f"with the best batch size, {facts['best_batch']}",
        "encode_alone": "with batch size 1",
        "move": "of copies in a temporary folder, with the journal",
    }
    rows = [(name.replace("_", " "), decimals(stages[name], ".2f"), text) for name, text in notes.items()]
    print_table(("stage", "ms/image", ""), rows, right=("ms/image",))
    print_line("")
    backends = [
        ("->" if one["serves"] else "", one["backend"], f"{one['encode']:.2f}", f"{one['images_per_second']:.1f}")
        for one in facts["backends"]
    ]
    columns = ("", "backend", "ms/image", "images/s at most")
    print_table(columns, backends, right=columns[2:])
    print_line("\n" + "\n".join(facts["advice"]))


# ---------------------------------------------------------------- stages, in milliseconds per image


def _decode(config: Config, encoder: Encoder, files: Sequence[_File]) -> tuple[float, Pixels]:
    """Return the milliseconds of one process, including hashing, and the pixels (B, height, width, 3)."""
    decoding, decoded = config.decoding, list[DecodedImage]()
    limits = DecodeLimits.of(decoding)
    with DecoderPool(1, encoder.preprocessing, limits, decoding.timeout_seconds, jpeg=decoding.jpeg) as pool:
        list(pool.decode_all(files[:1]))  # starts the process
        until = perf_counter() + STAGE_SECONDS
        for answer in pool.decode_all(files):
            if isinstance(answer, DecodedImage):
                decoded.append(answer)
            if perf_counter() > until and len(decoded) > 3:  # noqa: PLR2004 -- a mean of a few at least
                break
    if not decoded:
        raise DataError(f"none of {len(files)} images can be decoded; `sortd check` says more")
    return 1e3 * statistics.fmean(one.decode_seconds for one in decoded), np.stack([one.pixels for one in decoded])


def _forward_milliseconds(encoder: Encoder, pixels: Pixels, *, most: int) -> dict[int, float]:
    """Return the median milliseconds per image by batch size."""
    batches = {size: np.resize(pixels, (size, *pixels.shape[1:])) for size in sorted({1, min(8, most), most})}
    times: dict[int, list[float]] = {size: [] for size in batches}
    encoder.encode_images(batches[most])
    until = perf_counter() + STAGE_SECONDS
    while len(times[most]) < 3 or perf_counter() < until:  # noqa: PLR2004 -- for a median
        for size, batch in batches.items():
            began = perf_counter()
            encoder.encode_images(batch)
            times[size].append(1e3 * (perf_counter() - began) / size)
    return {size: statistics.median(taken) for size, taken in times.items()}


def _move_milliseconds(scratch: Path, files: Sequence[_File]) -> float | None:
    """Return the milliseconds per move of copies in a temporary dataset, moved as one group."""
    layout = Layout(scratch / "Data" / "bench")
    layout.root.mkdir(parents=True)
    layout.make()
    moves = []
    for number, (path, _) in enumerate(files):
        copy = os.fspath(layout.area(Area.IMAGES) / f"{number}{os.path.splitext(path)[1]}")
        with suppress(FileNotFoundError):
            shutil.copyfile(path, copy)
            with open(copy, "rb") as file:
                os.fsync(file.fileno())  # real images are on the disk before they are moved
        if (mark := stamp(copy)) is not None:
            moves.append(Move(copy, mark, "Dataset/bench", Outcome.FILED))
    with lock_dataset(layout, scratch / "state", run="bench") as held:
        began = perf_counter()
        held.mover.move_all(moves)
        return 1e3 * (perf_counter() - began) / len(moves) if moves else None


@contextmanager
def _scratch(config: Config) -> Iterator[Path]:
    """Create a hidden folder, on the disk of the datasets if possible, and remove it afterwards."""
    state, root = config.state_dir, config.root
    place = state if state.is_dir() and root.is_dir() and state.stat().st_dev == root.stat().st_dev else root
    is_writable = place.is_dir() and os.access(place, os.W_OK)
    with tempfile.TemporaryDirectory(prefix=".sortd-bench-", dir=place if is_writable else None) as name:
        yield Path(name)


def _backend(name: str, encoder: Encoder, encode: float, bound: float, *, serves: bool) -> dict[str, Any]:
    figures = {"encode": encode, "images_per_second": bound}
    return {"backend": name, "encoder_id": encoder.encoder_id, **figures, "serves": serves}


def _bound(decode: float, forward: float, cores: int, encoder: Encoder) -> float:
    """Return the images per second by these times: decoding and a forward pass on the CPU exclude each other."""
    on_cores = decode / cores
    return 1e3 / (forward + on_cores if _device(encoder) == "cpu" else max(forward, on_cores))


def _device(encoder: Encoder) -> str:
    return str(getattr(encoder, "runs_on", "cpu")).lower()


def _int8_refusal(backend: Mapping[str, Any]) -> str | None:
    """Return why int8 may not be used; None if it may, or has not been exported."""
    if backend["export"] is None or "int8" not in backend["export"]["precisions"]:
        return None
    if backend["agreement"] is None:
        return "it has not been compared with fp32 on your references: run `sortd models export`"
    refusal: str | None = backend["agreement"]["refusal"]
    return refusal


def _with_backend(config: Config, backend: str) -> Encoder:
    """Load the configured model on another backend, without exporting it."""
    if backend != "torch":
        model = locate_configured(config)
        if onnx_encoder.find_exports(model) is None:
            raise ModelError(f"{model.clip.name} has not been exported to ONNX: run `sortd models export`")
    return load_with_backend(config, backend)
