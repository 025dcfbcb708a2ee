"""Decisions on the images of one part of a manifest: read, decode, encode, decide; the same in every engine.

A row does not depend on which process decides it: batches are those of the manifest, and have always the same number
of rows, with blank images in the place of those that are unreadable. So embedding and probability do not depend on
whether the neighbours of an image could be read, either; the familiarity does in its last digits.
"""

import errno
import hashlib
import json
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from threadpoolctl import threadpool_limits

from sortd.api.classifier import FACTS_FILE, Classifier
from sortd.api.images import LoadedEncoder
from sortd.arrays import FloatArray
from sortd.bulk.plan import DECISIONS, DECISIONS_SCHEMA, MANIFEST, MANIFEST_SCHEMA, part_name, write_table
from sortd.bulk.storage import local_path, read_blocks
from sortd.companions import IMAGES
from sortd.config import Config
from sortd.encoder.backends import load_fastest
from sortd.encoder.clip import Encoder, are_of_unit_length
from sortd.errors import ConfigError, DataError, DestinationError, ModelError
from sortd.events import Decision, ImageRefused, Stamp
from sortd.files import read_regular, text_of, write_json
from sortd.images.decode import DecodeLimits
from sortd.images.pool import RESOURCE_ERRORS, Answer, Batch, DecoderPool
from sortd.watch.scan import stamp

SETTINGS_FILE = "decide.json"
"""In a run: what its decisions depend on."""
UNREADABLE = "unreadable: "
"""Begins the reason of an image that was not decided on."""
STAGES = ("read", "decode", "encode", "decide", "write")
READERS = 16  # objects that are read at the same time
_FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT})

Load = Callable[[Config], Encoder]
Row = Mapping[str, Any]
Result = dict[str, Any]
"""Counts of a part, when it began and ended, and the seconds of each stage."""


@dataclass(frozen=True, slots=True)
class DecideSettings:
    """What decisions depend on, beside the images."""

    config: Config  # the model, its backend and device, and the limits of decoding
    classifier: Path  # a folder that ``sortd.Classifier.save`` wrote
    batch_size: int = 32

    @classmethod
    def of(cls, config: Config, classifier: Path, *, model: str | None, processors: int, batch_size: int) -> Self:
        """Return the settings of a configuration, maybe with another model; raise ConfigError if it has none."""
        if config.encoder_socket is not None:
            raise ConfigError("an encoder service forms batches of its own; set `backend: auto` for sortd bulk")
        changes = {
            "model": model or config.model,
            "threads": processors,
            "decoding": config.decoding.model_copy(update={"workers": processors}),
        }
        return cls(config.model_copy(update=changes), classifier, batch_size)

    def facts(self) -> dict[str, Any]:
        """Return what is equal for all decisions of a run, as plain values; raise DataError without a classifier."""
        file = self.classifier / FACTS_FILE  # it has the hash of the arrays
        try:
            content = read_regular(file)
        except OSError as error:
            raise DataError(f"{self.classifier} has no classifier: {file}: {error.strerror}") from error
        return {
            "classifier": hashlib.sha256(content).hexdigest(),
            "model": self.config.model,
            "threads": self.config.threads,
            "batch_size": self.batch_size,
            "decoding": self.config.decoding.model_dump(),
        }


def require_equal_settings(run: Path, settings: DecideSettings) -> None:
    """Record the settings of the first decisions of a run, and require equal ones from all later ones.

    Raises DataError: a setting, which the message names, differs; DestinationError.
    """
    facts, file = settings.facts(), run / SETTINGS_FILE
    try:
        known = json.loads(read_regular(file))
    except FileNotFoundError:
        try:
            (run / DECISIONS).mkdir(exist_ok=True)
            write_json(file, facts)
        except OSError as error:
            raise DestinationError(f"{file} cannot be written: {error.strerror}") from error
        return
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    if not isinstance(known, dict):
        raise DataError(f"{file} is damaged; plan another run")
    if other := [key for key in facts if known.get(key) != facts[key]]:
        raise DataError(
            f"{run} has decisions with another {' and '.join(other)}; repeat those options, or plan another run"
        )


class PartDecider:
    """A loaded model with its classifier and decoding processes; used by one thread at a time."""

    def __init__(self, settings: DecideSettings, *, load: Load | None = None) -> None:
        """Load the model; ``load`` replaces the loader of the configured one.

        Raises ModelError; DataError: the classifier is damaged, or of another encoder.
        """
        config, self._batch_size = settings.config, settings.batch_size
        self._encoder = load(config) if load else load_fastest(config, report=lambda _: None)
        self._classifier = Classifier.load(settings.classifier, encoder=LoadedEncoder(self._encoder))
        self._limits = DecodeLimits.of(config.decoding)
        self._pool = DecoderPool(
            config.decoding.workers,
            self._encoder.preprocessing,
            self._limits,
            config.decoding.timeout_seconds,
            jpeg=config.decoding.jpeg,
        )
        self._scratch = tempfile.TemporaryDirectory(prefix="sortd-bulk-", ignore_cleanup_errors=True)
        self.seconds = dict.fromkeys(STAGES, 0.0)  # that each stage was busy, in all processes and threads together

    def __enter__(self) -> Self:
        """Return the decider."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the decoding processes."""
        self._pool.close()
        self._scratch.cleanup()

    def decide_part(self, run: Path, number: int) -> Result | None:
        """Write the decisions of a part of the manifest; return counts and seconds, None if they are there already.

        Raises DataError: the manifest is damaged; DestinationError.
        """
        target = run / DECISIONS / part_name(number)
        if target.exists():
            return None
        source = run / MANIFEST / part_name(number)
        try:
            manifest = pq.read_table(source, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{source} cannot be read: {error}; plan the run again") from error
        if not manifest.schema.equals(MANIFEST_SCHEMA):
            raise DataError(f"{source} has other columns than a manifest; plan the run again")
        self.seconds, began = dict.fromkeys(STAGES, 0.0), time.time()
        table = self.decide(manifest.to_pylist())
        decided = time.perf_counter()
        write_table(target, table)
        self.seconds["write"] += time.perf_counter() - decided
        unreadable = table.num_rows - table["sha256"].drop_null().length()
        filed = table["label"].drop_null().length()
        return {
            "images": table.num_rows,
            "filed": filed,
            "unreadable": unreadable,
            "began": began,
            "ended": time.time(),
            **self.seconds,
        }

    def decide(self, rows: Sequence[Row]) -> pa.Table:
        """Return the decisions on rows of a manifest, sorted by id; an image that is unreadable has the reason."""
        batches = [rows[start : start + self._batch_size] for start in range(0, len(rows), self._batch_size)]
        decided: list[dict[str, Any]] = []
        begun: deque[tuple[Sequence[Row], list[_Read], Batch]] = deque()
        for batch, reads in self._read_ahead(batches):
            images = dict.fromkeys((one.path, one.stamp) for one in reads if isinstance(one, _Image))
            pixels = Batch(deque(images))
            self._pool.feed(pixels)  # decoded while the batch before it is encoded
            begun.append((batch, reads, pixels))
            if len(begun) > 1:
                decided += self._finish(*begun.popleft())
        for waiting in begun:
            decided += self._finish(*waiting)
        return pa.Table.from_pylist(decided, schema=DECISIONS_SCHEMA).sort_by("id")

    def _read_ahead(self, batches: Sequence[Sequence[Row]]) -> Iterator[tuple[Sequence[Row], list["_Read"]]]:
        """Yield each batch with its files, while the files of the next one are read."""
        waiting: deque[tuple[Sequence[Row], list[Future[_Read]]]] = deque()
        with ThreadPoolExecutor(READERS, "reader") as readers:
            for batch in batches:
                waiting.append((batch, [readers.submit(self._read, row) for row in batch]))
                if len(waiting) > 1:
                    yield self._wait(*waiting.popleft())
            for one in waiting:
                yield self._wait(*one)

    def _wait(self, batch: Sequence[Row], files: Sequence["Future[_Read]"]) -> tuple[Sequence[Row], list["_Read"]]:
        reads = [file.result() for file in files]
        self.seconds["read"] += sum(one.seconds for one in reads)
        return batch, reads

    def _read(self, row: Row) -> "_Read":
        """Return the file of a row: on this disk, or a copy of an object; or why it cannot be read."""
        began = time.perf_counter()
        path, is_copy = local_path(row["uri"]), False
        try:
            if path is None:
                path, is_copy = self._copied(row), True
            version = stamp(path)
        except OSError as error:
            if error.errno in RESOURCE_ERRORS | _FULL_DISK:
                raise
            return _Unread(text_of(error.strerror or str(error)), time.perf_counter() - began)
        except ValueError as error:  # of a name with a null byte, and pyarrow's own errors
            return _Unread(text_of(str(error)), time.perf_counter() - began)
        seconds = time.perf_counter() - began
        if version is None:
            return _Unread("it does not exist any more", seconds)
        if version.size == row["size"] and (is_copy or version.mtime_ns == row["mtime_ns"]):
            return _Image(path, version, is_copy, seconds)
        if is_copy:
            os.unlink(path)
        return _Unread("it has changed since it was planned", seconds)

    def _copied(self, row: Row) -> str:
        """Copy an object to a file, and return its path."""
        if row["size"] > self._limits.max_bytes:
            raise OSError(errno.EFBIG, f"{row['size']:,} bytes are over the limit of {self._limits.max_bytes:,}")
        suffix = os.path.splitext(row["uri"])[1].lower()
        descriptor, path = tempfile.mkstemp(suffix if suffix in IMAGES else "", dir=self._scratch.name)
        try:
            with open(descriptor, "wb") as file:
                file.writelines(read_blocks(row["uri"], limit=self._limits.max_bytes))
        except (OSError, ValueError):
            os.unlink(path)
            raise
        return path

    def _finish(self, batch: Sequence[Row], reads: Sequence["_Read"], pixels: Batch) -> list[dict[str, Any]]:
        """Return the decisions on a batch that is being decoded."""
        answers = self._decoded(pixels)
        for one in reads:
            if isinstance(one, _Image) and one.is_copy:
                os.unlink(one.path)
        found = [one if isinstance(one, _Unread) else answers[one.path] for one in reads]
        is_image = [not isinstance(one, _Unread | ImageRefused) for one in found]
        if not any(is_image):
            return [_row(row, one) for row, one in zip(batch, found, strict=True)]
        began = time.perf_counter()
        rows = self._encoded([None if isinstance(one, _Unread | ImageRefused) else one.pixels for one in found])
        encoded = time.perf_counter()
        with threadpool_limits(limits=1):  # a product may be rounded otherwise by more threads
            decisions = self._classifier.classify_rows(rows)
        self.seconds["encode"] += encoded - began
        self.seconds["decide"] += time.perf_counter() - encoded
        facts = zip(batch, found, decisions[: len(batch)], rows[: len(batch)], strict=True)
        return [_row(row, one, decision, vector, self._encoder.encoder_id) for row, one, decision, vector in facts]

    def _decoded(self, pixels: Batch) -> dict[str, Answer]:
        answers: dict[str, Answer] = {}
        while not pixels.is_done:
            self._pool.feed(pixels)
            self._pool.collect(0 if pixels.answers else None)
            while pixels.answers:
                answer = pixels.answers.popleft()
                answers[answer.path] = answer
                self.seconds["decode"] += 0.0 if isinstance(answer, ImageRefused) else answer.decode_seconds
        return answers

    def _encoded(self, images: Sequence[Any]) -> FloatArray:
        """Return the embeddings (batch size, d) of pixels, with a blank image for each None and up to the batch size.

        Raises:
            ModelError: the encoder returned no embeddings.
        """
        size = self._encoder.preprocessing
        batch = np.zeros((self._batch_size, size.crop_height, size.crop_width, 3), np.uint8)
        for at, pixels in enumerate(images):
            if pixels is not None:
                batch[at] = pixels
        rows = self._encoder.encode_images(batch)
        if not are_of_unit_length(rows):
            raise ModelError(f"the encoder {self._encoder.encoder_id} returned invalid embeddings; check its device")
        return rows


@dataclass(frozen=True, slots=True)
class _Image:
    """A file with one version of an image."""

    path: str
    stamp: Stamp
    is_copy: bool  # of an object: to be deleted when it is decoded
    seconds: float


@dataclass(frozen=True, slots=True)
class _Unread:
    """Why an image cannot be read."""

    message: str
    seconds: float


_Read = _Image | _Unread


def _row(
    row: Row,
    found: Any,  # noqa: ANN401 -- _Unread or the answer of a decoder
    decision: Decision | None = None,
    embedding: FloatArray | None = None,
    encoder_id: str = "",
) -> dict[str, Any]:
    """Return a row of decisions."""
    facts = {"id": row["id"], "uri": row["uri"]}
    if isinstance(found, _Unread | ImageRefused):
        return {**facts, "reason": UNREADABLE + text_of(found.message)}
    assert decision is not None
    assert embedding is not None
    return {
        **facts,
        "label": decision.label,
        "probability": decision.probability,
        "margin": decision.margin,
        "familiarity": decision.familiarity,
        "reason": decision.reason,
        "mode": str(decision.mode),
        "encoder_id": encoder_id,
        "embedding": embedding.astype(np.float16),
        "sha256": found.content,
    }
