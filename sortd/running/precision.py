"""The precision that serves: int8 only after it filed the user's own references as float32 does, else float32.

The references of all datasets (an even sample of many) are embedded by both and compared: ``deciding/agreement.py``
says how. The verdict is kept beside the export under what it was found on, so that a start with the same references
costs one look at the folders. What is taught while sortd runs counts at the next start.
"""

import gc
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple, replace
from pathlib import Path
from time import monotonic
from typing import Any

import structlog

from sortd import logs
from sortd.cache import Cache
from sortd.config import Config, DatasetConfig
from sortd.deciding.agreement import Agreement, agreement, pooled, refuse_quick
from sortd.decoding.decoders import DecoderPool
from sortd.encoder import Encoder, load
from sortd.encoding import exports, models, onnx_encoder
from sortd.encoding.backends import choose
from sortd.encoding.exports import Exports
from sortd.encoding.manifest import Precision
from sortd.errors import LayoutError, ModelError
from sortd.images import Jpeg
from sortd.layout import Area, find_datasets
from sortd.messages import Preprocessing
from sortd.prototypes import SupportSet
from sortd.references import STRANGERS_FOLDER, ClassFolder, References, ReferencesAbsentError, Teaching, class_folders
from sortd.running.embedding import Embedder
from sortd.running.verdict import Verdict, read_verdict, write_verdict

LARGEST_SAMPLE = 1000
"""References that are compared: with so many, a share of 0.99 is known to 0.003, and a first start waits no longer."""
LARGEST_CLASS = 20
"""Of these, from one class: a comparison within few classes would be an easier one than what sortd does."""

Pool = Callable[[Preprocessing, Jpeg], DecoderPool]
Tell = Callable[[str], None]


# ---------------------------------------------------------------- what serves


def load_encoder(
    config: Config,
    *,
    pool: Pool,
    teaching_of: Callable[[DatasetConfig], Teaching],
    tell: Tell,
    may_prepare: bool = True,
) -> Encoder:
    """Load what the configuration means, exported and judged before where that has to be.

    Args:
        config: the model, the backend, and where the references are.
        pool: hands out the decoders for what an encoder sees.
        teaching_of: returns how a dataset decides.
        tell: hears in a few words what runs the model, and why not something better.
        may_prepare: may it export, judge, and write that down? Else what stands has to do.

    Raises:
        ModelError: the model cannot be had.
    """
    exported = _exported(config, tell, may_prepare=may_prepare)
    if exported is None:
        return _load(config, "torch")
    if onnx_encoder.runs_on_gpu(config.device):
        tell("onnx fp32 on the GPU")
        return _load(config, "onnx")
    if Precision.INT8 not in exported.precisions:
        tell(f"onnx fp32; int8 would be {exported.manifest.gain:.2f} times as quick, which is not worth it")
        return _load(config, "onnx")
    verdict = _verdict(config, exported, pool, teaching_of, may_prepare=may_prepare)
    if verdict is None or verdict.refusal:
        reason = "it has not been judged on these references" if verdict is None else verdict.refusal
        tell(f"onnx fp32; int8 does not serve: {reason}")
        return _load(config, "onnx")
    whole = pooled(verdict.datasets)
    tell(f"onnx int8; {whole.same} of {whole.filed} references filed as by fp32")
    return _load(config, "onnx-int8")


def _load(config: Config, backend: str) -> Encoder:
    return load(
        config.model,
        text_model=config.text_model,
        backend=backend,
        device=config.device,
        cache_dir=config.cache_dir,
        threads=config.threads,
        decoding=config.decoding.jpeg,
    )


def _exported(config: Config, tell: Tell, *, may_prepare: bool) -> Exports | None:
    """Return the exports of the configured model where ONNX Runtime is to run it; None where torch is."""
    model = models.locate(config.model, cache_dir=config.cache_dir)
    words = None if config.text_model is None else models.locate_text(config.text_model, cache_dir=config.cache_dir)
    chosen = choose(config.backend, model, words, device=config.device, cache_dir=config.cache_dir)
    if chosen.name == "torch":
        tell(f"torch; {chosen.why}" if config.backend == "auto" and exports.is_installed() else "torch")
        return None
    found = exports.find(model, words, cache_dir=config.cache_dir)
    if found is not None:
        return found
    try:
        if may_prepare:
            return export(config)
    except ModelError as error:
        if config.backend != "auto" or not exports.is_awaited():
            raise
        _warn(logs.MODEL_FELL_BACK, wanted="onnx", backend="torch", error=str(error))
        tell(f"torch; {error}")
        return None
    tell("torch; the export to ONNX is missing, damaged or old, and `sortd run` makes it")
    return None


def export(config: Config) -> Exports:
    """Export the configured model, unless a sound export stands, and log what that took.

    Raises:
        ModelError: it cannot be exported here.
    """
    model = models.locate(config.model, cache_dir=config.cache_dir)
    words = None if config.text_model is None else models.locate_text(config.text_model, cache_dir=config.cache_dir)
    began = monotonic()
    made = exports.make(model, words, cache_dir=config.cache_dir)
    _note(
        logs.MODEL_EXPORTED,
        model=model.name,
        folder=str(made.folder),
        megabytes=round(made.size_bytes / 1e6),
        precisions=[one.value for one in made.precisions],
        int8_gain=round(made.manifest.gain, 2),
        seconds=round(monotonic() - began, 1),
    )
    return made


def _note(event: str, **fields: Any) -> None:  # noqa: ANN401 -- the values of a log line
    """Log; commands that keep no log say nothing."""
    if structlog.is_configured():
        structlog.get_logger().info(event, **fields)


def _warn(event: str, **fields: Any) -> None:  # noqa: ANN401 -- the values of a log line
    """Log as a warning; commands that keep no log say it on stderr, for stdout is for facts."""
    if structlog.is_configured():
        structlog.get_logger().warning(event, **fields)
    else:
        logging.getLogger(__name__).warning("%s: %s", event, fields.get("refusal") or fields.get("error"))


# ---------------------------------------------------------------- the verdict


def _verdict(
    config: Config,
    exported: Exports,
    pool: Pool,
    teaching_of: Callable[[DatasetConfig], Teaching],
    *,
    may_prepare: bool,
) -> Verdict | None:
    """Return the verdict on the references as they stand, by memory where it was found on these very ones."""
    taught = dict(_taught(config, teaching_of))
    fingerprint = _fingerprint(exported, config, taught)
    known = read_verdict(exported, config.root)
    if known is not None and known.fingerprint == fingerprint:
        return known
    if not may_prepare:
        return None
    began = monotonic()
    try:
        parts = _compare(config, exported, pool, taught)
    except (ValueError, OSError) as error:  # somebody changes the references right now: the next start tells
        _warn(logs.MODEL_FELL_BACK, wanted="onnx int8", backend="onnx fp32", error=str(error))
        return None
    verdict = Verdict(fingerprint, refuse_quick(parts), parts)
    write_verdict(exported, config.root, verdict)
    say = _warn if verdict.refusal else _note
    say(logs.MODEL_JUDGED, seconds=round(monotonic() - began, 1), **verdict.facts())
    return verdict


Taught = tuple[Path, Teaching, tuple[ClassFolder, ...]]


def _taught(config: Config, teaching_of: Callable[[DatasetConfig], Teaching]) -> Iterator[tuple[str, Taught]]:
    """Yield by dataset: its ``Clases/``, how it decides, and the references that are compared."""
    with suppress(LayoutError, OSError):  # the root is not there: whoever opens the datasets says so, and mends it
        for layout in find_datasets(config.root):
            with suppress(ReferencesAbsentError, OSError):
                clases = layout.area(Area.CLASES)
                folders, _ = class_folders(clases, report=lambda _: None)
                yield layout.name, (clases, teaching_of(config.dataset(layout.name)), tuple(sample(folders)))


def sample(folders: Sequence[ClassFolder]) -> list[ClassFolder]:
    """Return classes and references to compare: all of a small library, an even choice of a large one.

    Examples of what belongs to no class are left out, for they have no label to agree on.
    """
    known = [folder for folder in folders if folder.label != STRANGERS_FOLDER]
    if sum(len(folder.files) for folder in known) <= LARGEST_SAMPLE:
        return known
    fewer = [replace(folder, files=tuple(_evenly(folder.files, LARGEST_CLASS))) for folder in known]
    size = sum(len(folder.files) for folder in fewer)
    return list(_evenly(fewer, max(2, len(fewer) * LARGEST_SAMPLE // max(size, LARGEST_SAMPLE))))


def _evenly(items: Sequence[Any], most: int) -> Sequence[Any]:
    if len(items) <= most:
        return items
    return [items[index * len(items) // most] for index in range(most)]


def _compare(config: Config, exported: Exports, pool: Pool, taught: Mapping[str, Taught]) -> dict[str, Agreement]:
    """Embed the references with both precisions and compare what they decide.

    Raises:
        ValueError: a reference changed between the two.
        OSError: a folder cannot be read.
    """
    decoders = pool(exported.manifest.preprocessing, config.decoding.jpeg)
    file, most = config.cache_dir / "embeddings.sqlite", config.cache_megabytes * 1_000_000
    supports: list[dict[str, SupportSet]] = []
    with Cache(file, max_bytes=most) as cache:
        for backend in ("onnx", "onnx-int8"):
            supports.append(_supports(_load(config, backend), decoders, cache, config.batch_size, taught))
            # An embedder and its pipeline know each other: the tower would stay in memory until some later collection.
            gc.collect()
            onnx_encoder.give_memory_back()
    return {name: agreement(supports[0][name], supports[1][name], one[1].settings) for name, one in taught.items()}


def _supports(
    encoder: Encoder, decoders: DecoderPool, cache: Cache, batch_size: int, taught: Mapping[str, Taught]
) -> dict[str, SupportSet]:
    """Return the support set of each dataset in the rows of one encoder."""
    embedder = Embedder(encoder, decoders, cache, batch_size=batch_size)
    embedder.attend_with(_see_that_sortd_goes_on, bell=None)
    return {name: _support(embedder, clases, teaching) for name, (clases, teaching, _) in taught.items()}


def _see_that_sortd_goes_on() -> None:
    """End a comparison that nobody waits for any more: the end of the program joins this thread.

    Raises:
        ModelError: the program has ended but for this.
    """
    if not exports.is_awaited():
        raise ModelError("sortd was stopped while int8 was judged; the next start does it")


def _support(embedder: Embedder, clases: Path, teaching: Teaching) -> SupportSet:
    try:
        return References(clases, choose=sample).support(embedder, teaching)[0]
    except ReferencesAbsentError as error:
        raise ValueError(str(error)) from error


def _fingerprint(exported: Exports, config: Config, taught: Mapping[str, Taught]) -> str:
    """Identify what a verdict rests on, by the stamps of the references: a look at the folders and no more."""
    facts = [
        [exported.manifest.identity, config.decoding.jpeg],
        *(
            [
                os.fspath(clases),
                repr(teaching.settings),
                list(teaching.templates),
                [
                    [one.label, one.descriptions, [(path, *astuple(stamp)) for path, stamp in one.files]]
                    for one in folders
                ],
            ]
            for clases, teaching, folders in taught.values()
        ),
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
