"""A classifier learnt from folders of reference images, or from rows of embeddings."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from sortd.api.images import ImageLike, LoadedEncoder, check_images
from sortd.arrays import FloatArray
from sortd.classify.build import build
from sortd.classify.decide import checked_rows, decide, score_batch
from sortd.classify.explain import Explanation
from sortd.classify.explain import explain as explain_row
from sortd.classify.library import unit_rows
from sortd.classify.prompts import prompts
from sortd.classify.prototypes import PrototypeSet
from sortd.classify.types import AbstainSettings, DecisionSettings, SupportSet
from sortd.config import DEFAULT_TEMPLATES
from sortd.daemon.references import References, ReferenceSettings, class_texts, generic_text_mean
from sortd.errors import DataError, DestinationError
from sortd.events import Decision, Mode
from sortd.files import read_regular, write_atomic

FORMAT = 1
"""Version of the saved form."""
ARRAYS_FILE, FACTS_FILE = "classifier.safetensors", "classifier.json"
MOST_BYTES = 4_000_000_000
UNKNOWN_ENCODER = "rows"
"""The encoder of a classifier that was fitted on rows without naming one."""


class Classifier:
    """Decides the class of an image by its likeness to references, or abstains.

    >>> import numpy as np, sortd
    >>> dice = np.random.default_rng(0)
    >>> rows = np.repeat(np.eye(2, 8), 10, axis=0) + dice.normal(0, 0.1, (20, 8))
    >>> classifier = sortd.Classifier.fit(rows, ["cat"] * 10 + ["dog"] * 10)
    >>> decision, = classifier.classify_rows(rows[:1])
    >>> decision.label, decision.reason
    ('cat', None)
    """

    def __init__(self, prototypes: PrototypeSet, *, encoder: LoadedEncoder | None = None) -> None:
        """Use prototypes; without an encoder only rows can be classified.

        Raises:
            DataError: the prototypes are of another encoder.
        """
        _check_width(encoder, prototypes.matrix.shape[1])
        if encoder is not None and prototypes.encoder_id not in {encoder.id, UNKNOWN_ENCODER}:
            raise DataError(
                f"the classifier is of the encoder {prototypes.encoder_id}, and this one is {encoder.id}; load that "
                "encoder, or build the classifier again from its references"
            )
        self.prototypes, self.encoder = prototypes, encoder

    @classmethod
    def from_folder(
        cls,
        folder: str | os.PathLike[str],
        *,
        encoder: LoadedEncoder,
        mode: str = "mixed",
        precision: float | None = 0.95,
        strangers: float | str = "auto",
    ) -> Self:
        """Return the classifier of a folder that has a folder of reference images for each class.

        The folder is read as the daemon reads ``Clases/``: ``class.txt`` describes a class in words, ``_none`` has
        images of no class; files that are no images are ignored.

        Args:
            folder: with one folder for each class.
            encoder: embeds the references and the names of the classes.
            mode: ``mixed``, ``best``, ``avg``, ``max``, ``mean`` or ``text``.
            precision: the wanted share of correct decisions; None: it never abstains.
            strangers: ``auto``, or the largest share of images of no class that may be decided.

        Raises:
            DataError: there is no class, or the encoder has no texts and the mode needs them.
            UnreadableError: a reference is broken or too large; the message names it.
        """
        settings = ReferenceSettings(_settings(mode, precision, strangers))
        if settings.settings.mode is Mode.TEXT and not encoder.has_text:
            raise DataError(f"`mode: text` decides by class names, and {encoder.id} is an encoder of images")
        support, refused = References(Path(os.path.abspath(folder))).support(encoder.embedder(), settings)
        if refused:
            raise DataError(f"{refused[0].path}: {refused[0].message}; correct it or move it away")
        return cls(build(support, settings.settings, generation=1), encoder=encoder)

    @classmethod
    def fit(
        cls,
        rows: npt.ArrayLike,
        labels: Sequence[str],
        *,
        encoder: LoadedEncoder | None = None,
        mode: str = "best",
        precision: float | None = 0.95,
        strangers: float | str = "auto",
        sources: Sequence[str] | None = None,
    ) -> Self:
        """Return the classifier of embeddings and their classes.

        Args:
            rows: (n, d) embeddings; each is scaled to unit length.
            labels: the class of each row.
            encoder: made the rows; it is needed for ``classify`` and for the names of classes in ``mixed``.
            mode: as for ``from_folder``; without an encoder of texts, ``mixed`` is ``best``.
            precision: as for ``from_folder``.
            strangers: as for ``from_folder``.
            sources: a name of each row, for ``explain``; default: ``row 0``, ``row 1``, …

        Raises:
            DataError: there is no row, a value is not finite, or rows, labels and sources are not equally many.
        """
        table = np.asarray(rows, np.float64)
        if table.ndim != 2 or not table.size or not np.isfinite(table).all():  # noqa: PLR2004 -- a matrix
            raise DataError(f"rows have shape {table.shape}; they must be (n, d), not empty, and finite")
        named = tuple(f"row {number}" for number in range(len(table))) if sources is None else tuple(map(str, sources))
        if not len(labels) == len(named) == len(table):
            raise DataError(f"there are {len(table)} rows, {len(labels)} labels and {len(named)} sources")
        settings = _settings(mode, precision, strangers)
        unique, classes = np.unique(np.asarray([str(label) for label in labels]), return_inverse=True)
        embeddings = unit_rows(table).astype(np.float32)
        _check_width(encoder, table.shape[1])
        text, text_mean = _texts(encoder, [str(label) for label in unique], settings.mode)
        support = SupportSet(
            labels=tuple(str(label) for label in unique),
            embeddings=embeddings,
            classes=classes.astype(np.int64),
            sources=named,
            text=text,
            text_mean=text_mean,
            encoder_id=UNKNOWN_ENCODER if encoder is None else encoder.id,
            fingerprint=hashlib.sha256(embeddings.tobytes() + classes.tobytes()).hexdigest(),
        )
        return cls(build(support, settings, generation=1), encoder=encoder)

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes, sorted."""
        return self.prototypes.labels

    @property
    def encoder_id(self) -> str:
        """The identity of the encoder of the references."""
        return self.prototypes.encoder_id

    def classify(self, images: Sequence[ImageLike]) -> list[Decision]:
        """Return a decision, ``Assigned`` or ``Abstained``, for each path, Pillow image or array.

        Raises:
            DataError: the classifier has no encoder.
            UnreadableError: a file is missing, no image, broken or too large; the message names it.
        """
        check_images(images)
        return self.classify_rows(self._encoder().encode_images(images))

    def classify_rows(self, rows: npt.ArrayLike) -> list[Decision]:
        """Return a decision for each embedding (n, d); raise ValueError for another shape or values not finite."""
        return decide(self.prototypes, rows)

    def probabilities(self, rows: npt.ArrayLike) -> FloatArray:
        """Return float32 (n, C): the probability of each class, also where it abstains; raises as ``classify_rows``."""
        queries = checked_rows(rows, self.prototypes.matrix.shape[1])
        batch = score_batch(self.prototypes, queries, self.prototypes.settings.mode)
        return np.asarray(batch.probabilities, np.float32)

    def explain(self, image: ImageLike) -> Explanation:
        """Return why an image is decided as it is: scores, nearest references, thresholds; raises as ``classify``."""
        (row,) = self._encoder().encode_images([image])
        return explain_row(self.prototypes, row)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the classifier into a folder, which is made: arrays as safetensors, the rest as JSON.

        The paths of the references are part of it.

        Raises:
            DestinationError: the folder cannot be written.
        """
        from safetensors.numpy import save

        arrays, facts = self.prototypes.to_arrays()
        target = Path(folder)
        content = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
        facts = {"format": FORMAT, "sha256": hashlib.sha256(content).hexdigest(), **facts}
        try:
            target.mkdir(parents=True, exist_ok=True)
            write_atomic(target / ARRAYS_FILE, content)
            write_atomic(target / FACTS_FILE, json.dumps(facts, indent=1).encode())
        except OSError as error:
            raise DestinationError(f"{target} cannot be written: {error.strerror}; name another folder") from error

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, encoder: LoadedEncoder | None = None) -> Self:
        """Return the classifier that ``save`` wrote.

        Raises:
            DataError: it is missing, damaged, of another version, or of another encoder.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        source = Path(folder)
        try:
            facts: dict[str, Any] = json.loads(read_regular(source / FACTS_FILE))
            content = read_regular(source / ARRAYS_FILE, limit=MOST_BYTES)
            if facts["format"] != FORMAT:
                raise DataError(f"{source} is of another version of sortd; build the classifier again")
            if hashlib.sha256(content).hexdigest() != facts["sha256"]:
                raise DataError(f"{source} is damaged: {ARRAYS_FILE} is not the file that {FACTS_FILE} names")
            prototypes = PrototypeSet.from_arrays(load(content), facts)
        except OSError as error:
            raise DataError(f"{source} has no classifier: {error.filename}: {error.strerror}") from error
        except (
            SafetensorError,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ) as error:
            raise DataError(f"{source} is damaged: {error}") from error
        return cls(prototypes, encoder=encoder)

    def _encoder(self) -> LoadedEncoder:
        if self.encoder is None:
            raise DataError("this classifier has no encoder; pass `encoder=`, or use `classify_rows`")
        return self.encoder


def _settings(mode: str, precision: float | None, strangers: float | str) -> DecisionSettings:
    """Return settings; raise DataError for an unknown mode or a share outside of (0, 1)."""
    try:
        abstain = None if precision is None else AbstainSettings(precision, strangers)  # type: ignore[arg-type]
        return DecisionSettings(Mode(mode), abstain)
    except ValueError as error:
        raise DataError(str(error)) from error


def _check_width(encoder: LoadedEncoder | None, width: int) -> None:
    if encoder is not None and encoder.dimension != width:
        raise DataError(f"rows have {width} columns, and embeddings of {encoder.id} {encoder.dimension}")


def _texts(
    encoder: LoadedEncoder | None, labels: Sequence[str], mode: Mode
) -> tuple[FloatArray | None, FloatArray | None]:
    """Return the rows (C, d) of class names and the mean row (d,) of generic nouns, where a mode uses them."""
    has_text = encoder is not None and encoder.has_text
    if mode is Mode.TEXT and not has_text:
        raise DataError("`mode: text` decides by class names; pass an encoder that embeds texts")
    if encoder is None or not has_text or mode not in {Mode.TEXT, Mode.MIXED}:
        return None, None
    embedder = encoder.embedder()
    sentences = [prompts(label, (), DEFAULT_TEMPLATES) for label in labels]
    return class_texts(embedder, sentences), generic_text_mean(embedder, DEFAULT_TEMPLATES)
