"""The comparison: int8 is held against float32 on the user's own references, and what that gives is remembered.

The references of all datasets (an even sample of many) are embedded by both and compared: ``deciding/agreement.py``
says how. The verdict is kept beside the export under what it was found on, so that a start with the same references
costs one look at the folders. What is taught while sortd runs counts at the next start.
"""

import gc
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

from sortd import logs
from sortd.cache import Cache
from sortd.config import Config, DatasetConfig
from sortd.daemon.embedder import Embedder
from sortd.deciding.agreement import FEWEST_FILED, LEAST_COSINE, LEAST_SAME, Agreement, agreement, refuse_quick
from sortd.decoding.decoders import DecoderPool
from sortd.encoder import Encoder
from sortd.encoding.export_process import Tell, is_awaited
from sortd.encoding.exports import Exports
from sortd.encoding.manifest import Precision
from sortd.encoding.onnx_encoder import OnnxEncoder, give_memory_back
from sortd.errors import LayoutError, ModelError
from sortd.events import Preprocessing
from sortd.images import Jpeg
from sortd.layout import Area, find_datasets
from sortd.prototypes import SupportSet
from sortd.references import STRANGERS_FOLDER, ClassFolder, References, ReferencesAbsentError, Teaching, class_folders
from sortd.running.exporting import note, warn
from sortd.running.verdict import Verdict, read_verdict, write_verdict

LARGEST_SAMPLE = 1000
"""References that are compared: with so many, a share of 0.99 is known to 0.003, and a first start waits no longer."""
LARGEST_CLASS = 20
"""Of these, from one class: a comparison within few classes would be an easier one than what sortd does."""

Pool = Callable[[Preprocessing, Jpeg], DecoderPool]


def judge(
    config: Config,
    exported: Exports,
    *,
    pool: Pool,
    teaching_of: Callable[[DatasetConfig], Teaching],
    attend: Tell,
    may_prepare: bool,
) -> Verdict | None:
    """Return the verdict on the references as they stand, by memory where it was found on these very ones.

    Args:
        config: where the references and the verdicts are.
        exported: the model in both precisions.
        pool: hands out the decoders for what an encoder sees.
        teaching_of: returns how a dataset decides.
        attend: hears again and again what goes on.
        may_prepare: may it compare, and write down what that gave? Else None is the answer where nothing is known.

    Raises:
        ModelError: sortd was stopped meanwhile.
    """
    taught = dict(_taught(config, teaching_of))
    fingerprint = _fingerprint(exported, config, taught)
    known = read_verdict(exported, config.root)
    if known is not None and known.fingerprint == fingerprint:
        return known
    if not may_prepare:
        return None
    began, references = monotonic(), sum(len(one.files) for _, _, folders in taught.values() for one in folders)
    note(logs.MODEL_JUDGING, references=references)
    watched = partial(_attend, attend, f"holding int8 against fp32 on {references} references")
    try:
        parts = _compare(config, exported, pool, taught, watched)
    except (ValueError, OSError, ModelError) as error:
        # Somebody changes the references right now, or int8 does not run: the next start tries again.
        if not is_awaited():
            raise
        warn(logs.MODEL_FELL_BACK, wanted="onnx int8", backend="onnx fp32", error=str(error))
        return None
    verdict = Verdict(fingerprint, refuse_quick(parts), parts)
    write_verdict(exported, config.root, verdict)
    say = warn if verdict.refusal else note
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


def _compare(
    config: Config, exported: Exports, pool: Pool, taught: Mapping[str, Taught], watched: Callable[[], None]
) -> dict[str, Agreement]:
    """Embed the references with both precisions and compare what they decide.

    Raises:
        ValueError: a reference changed between the two.
        OSError: a folder cannot be read.
        ModelError: one of the two does not run, or nobody waits any more.
    """
    decoders = pool(exported.manifest.preprocessing, config.decoding.jpeg)
    file, most = config.cache_dir / "embeddings.sqlite", config.cache_megabytes * 1_000_000
    supports: list[dict[str, SupportSet]] = []
    with Cache(file, max_bytes=most) as cache:
        for precision in (Precision.FP32, Precision.INT8):
            encoder = OnnxEncoder(
                exported,
                precision,
                device="cpu",
                cache_dir=config.cache_dir,
                threads=config.threads,
                decoding=config.decoding.jpeg,
            )
            supports.append(_supports(encoder, decoders, cache, config.batch_size, taught, watched))
            del encoder
            # An embedder and its pipeline know each other: the tower would stay in memory until some later collection.
            gc.collect()
            give_memory_back()
    return {name: agreement(supports[0][name], supports[1][name], one[1].settings) for name, one in taught.items()}


def _supports(
    encoder: Encoder,
    decoders: DecoderPool,
    cache: Cache,
    batch_size: int,
    taught: Mapping[str, Taught],
    watched: Callable[[], None],
) -> dict[str, SupportSet]:
    """Return the support set of each dataset in the rows of one encoder."""
    embedder = Embedder(encoder, decoders, cache, batch_size=batch_size)
    embedder.attend_with(watched, bell=None)
    return {name: _support(embedder, clases, teaching) for name, (clases, teaching, _) in taught.items()}


def _attend(attend: Tell, what: str) -> None:
    """Tell what goes on, and end a comparison that nobody waits for any more: the end of the program joins this thread.

    Raises:
        ModelError: the program has ended but for this.
    """
    if not is_awaited():
        raise ModelError("sortd was stopped while int8 was judged; the next start does it")
    attend(what)


def _support(embedder: Embedder, clases: Path, teaching: Teaching) -> SupportSet:
    try:
        return References(clases, choose=sample).support(embedder, teaching)[0]
    except ReferencesAbsentError as error:
        raise ValueError(str(error)) from error


def _fingerprint(exported: Exports, config: Config, taught: Mapping[str, Taught]) -> str:
    """Identify what a verdict rests on, by the stamps of the references: a look at the folders and no more."""
    facts = [
        [exported.manifest.identity, config.decoding.jpeg, LEAST_SAME, LEAST_COSINE, FEWEST_FILED],
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
