"""References: what stands in ``Clases/`` becomes a support set and then prototypes, encoding only what is new."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sortd import mends
from sortd.daemon.embedder import Embedder
from sortd.deciding.prompts import DEFAULT_TEMPLATES, GENERIC_NOUNS, prompts
from sortd.deciding.steps import finish
from sortd.decoding.files import OUR_OWN_TROUBLE
from sortd.events import EmbeddedImage, FloatArray, ImageRefused, Refusal, Stamp
from sortd.files import open_regular
from sortd.names import rule_for_folder
from sortd.prototypes import DecisionSettings, Mode, PrototypeSet, SupportSet, build_steps
from sortd.watch.scan import stamp, whole_files

STRANGERS_FOLDER = "_none"
"""A class folder of this name holds examples of what belongs to no class."""

DESCRIPTIONS_FILE = "class.txt"
"""A file of this name in a class folder holds one description of the class a line."""

DESCRIPTIONS_LIMIT_BYTES = 64 * 1024
"""A description file over this size is no description."""

TEXT_CLASSES_LIMIT = 500
"""With more classes than this, names are embedded only for the modes that need them: each costs eight forwards."""

SHAPE_VERSION = 2
"""Part of every fingerprint: raise it when the same folder would give another support set than before."""


class ReferencesAbsentError(Exception):
    """``Clases/`` is missing, unreadable or holds no class: absent is not empty, the last prototypes stay."""


@dataclass(frozen=True, slots=True)
class ClassFolder:
    """One class as it stands on the disk."""

    label: str
    files: tuple[tuple[str, Stamp], ...]
    descriptions: tuple[str, ...]
    description_refusal: OSError | None = None
    """Why the description file, which is there, cannot be read: the class does without."""


@dataclass(frozen=True, slots=True)
class Teaching:
    """What decides, beside the images, what the prototypes are."""

    settings: DecisionSettings
    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    learns_from_corrections: bool = False
    classifier: str = "auto"  # auto, prototypes or finetuned: who is to decide, see ``daemon/classifiers.py``
    corrections: tuple[tuple[str, str], ...] = ()  # label, path: images placed by hand in Dataset/


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """A rebuild's result: the prototypes and what the operator should know about the folder."""

    prototypes: PrototypeSet
    refused: tuple[ImageRefused, ...] = ()
    emptied: tuple[str, ...] = ()
    misnamed: tuple[str, ...] = ()
    changed: bool = True
    encoded: int = 0
    references: Mapping[str, int] = field(default_factory=dict)


def is_class_name(name: str) -> bool:
    """Tell whether a folder's name can be a class: not hidden, no system folder, not blank, no control character."""
    return name.isprintable() and name.strip() not in {"", ".."} and rule_for_folder(name) is None


def read_descriptions(folder: str) -> tuple[str, ...]:
    """Return the lines of a class's description file; none where there is no such file.

    Raises:
        OSError: the file is there and cannot be read.
    """
    try:
        with open(open_regular(os.path.join(folder, DESCRIPTIONS_FILE)), "rb") as file:
            content = file.read(DESCRIPTIONS_LIMIT_BYTES)
    except FileNotFoundError:
        return ()
    text = content.decode("utf-8-sig", "replace")
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def class_folders(
    clases: Path, *, report: Callable[[OSError], None], between: Callable[[], None] = lambda: None
) -> tuple[list[ClassFolder], list[str]]:
    """List the classes of a dataset, sorted by name, and the folder names that cannot be classes.

    ``between`` is called after each class.

    Raises:
        ReferencesAbsentError: ``Clases/`` is missing or cannot be listed.
    """
    entries, misnamed = _class_entries(clases)
    folders = []
    for entry in entries:
        found = whole_files(entry.path, report=report)
        files = tuple((path, mark) for path, mark in found if os.path.basename(path) != DESCRIPTIONS_FILE)
        folders.append(_described(entry, tuple(sorted(files))))
        between()
    return folders, misnamed


def _described(entry: os.DirEntry[str], files: tuple[tuple[str, Stamp], ...]) -> ClassFolder:
    try:
        return ClassFolder(entry.name, files, read_descriptions(entry.path))
    except OSError as error:
        if error.errno in OUR_OWN_TROUBLE:
            raise
        return ClassFolder(entry.name, files, (), error)


def class_labels(clases: Path) -> tuple[str, ...]:
    """List the classes that images can be filed into, sorted, by the names of their folders alone.

    Raises:
        ReferencesAbsentError: ``Clases/`` is missing or cannot be listed.
    """
    return tuple(entry.name for entry in _class_entries(clases)[0] if entry.name != STRANGERS_FOLDER)


def _class_entries(clases: Path) -> tuple[list[os.DirEntry[str]], list[str]]:
    """List the folders of classes, sorted, and the names of folders that cannot be classes."""
    try:
        with os.scandir(clases) as entries:
            found = sorted((e for e in entries if e.is_dir(follow_symlinks=False)), key=lambda entry: entry.name)
    except OSError as error:
        if error.errno in OUR_OWN_TROUBLE:
            raise
        raise ReferencesAbsentError(f"{clases} cannot be listed: {error.strerror}") from error
    seen = [entry for entry in found if rule_for_folder(entry.name) is None]
    return [e for e in seen if is_class_name(e.name)], [e.name for e in seen if not is_class_name(e.name)]


class References:
    """The references of one dataset; remembers what each class held, so that an emptied class keeps serving."""

    def __init__(
        self, clases: Path, *, choose: Callable[[Sequence[ClassFolder]], Sequence[ClassFolder]] | None = None
    ) -> None:
        """Watch over ``clases``, or what ``choose`` leaves of its classes; nothing is read yet."""
        self._clases = clases
        self._choose = choose or (lambda folders: folders)
        self._contents: dict[str, dict[str, str]] = {}
        self._kept_rows: dict[str, FloatArray] = {}

    def rebuild(
        self,
        embedder: Embedder,
        teaching: Teaching,
        *,
        previous: PrototypeSet | None,
        generation: int,
        decided_by: str = "",
    ) -> Rebuilt:
        """Read the folder and build the prototypes, or return the previous ones where nothing changed.

        Args:
            embedder: embeds files and texts, from its cache where it can.
            teaching: the settings, templates and corrections.
            previous: the prototypes that serve now, or the cached ones at the start.
            generation: the generation number of a new set.
            decided_by: the fine-tuned model that decides beside the new set; with another one a new generation begins.

        Raises:
            ReferencesAbsentError: there is no class folder to learn from.
        """
        folders, misnamed = self._folders(embedder.give_way)
        forwards = embedder.forwards
        corrections = _standing(teaching.corrections)
        answers = self._embed(embedder, folders, corrections)
        rows, contents, refused = self._sorted_out(folders, corrections, answers)
        emptied = self._keep_emptied(contents, rows, {folder.label for folder in folders})
        fingerprint = self._fingerprint(contents, folders, teaching, embedder.encoder.encoder_id, decided_by)
        counts = {label: len(row) for label, row in contents.items()}
        self._contents = contents
        self._kept_rows = {content: row for label in rows for content, row in rows[label].items()}
        if previous is not None and previous.fingerprint == fingerprint:
            return Rebuilt(previous, refused, emptied, tuple(misnamed), changed=False, references=counts)
        support = self._support(embedder, rows, contents, folders, teaching, fingerprint)
        steps = build_steps(support, teaching.settings, generation=generation)
        prototypes = finish(steps, between=embedder.give_way)
        encoded = embedder.forwards - forwards
        return Rebuilt(prototypes, refused, emptied, tuple(misnamed), encoded=encoded, references=counts)

    def support(
        self, embedder: Embedder, teaching: Teaching, *, tell: Callable[[int, int], None] = lambda *_: None
    ) -> tuple[SupportSet, tuple[ImageRefused, ...]]:
        """Read the folder and return what it teaches, and what could not be read; for whoever evaluates it.

        ``tell`` hears after each image how many are read, and of how many.

        Raises:
            ReferencesAbsentError: there is no class folder to learn from.
        """
        folders, _ = self._folders(embedder.give_way)
        corrections = _standing(teaching.corrections)
        answers = self._embed(embedder, folders, corrections, tell)
        rows, contents, refused = self._sorted_out(folders, corrections, answers)
        fingerprint = self._fingerprint(contents, folders, teaching, embedder.encoder.encoder_id)
        return self._support(embedder, rows, contents, folders, teaching, fingerprint), refused

    def _folders(self, between: Callable[[], None]) -> tuple[list[ClassFolder], list[str]]:
        unreadable: list[OSError] = []
        folders, misnamed = class_folders(self._clases, report=unreadable.append, between=between)
        if unreadable:
            error = unreadable[0]
            if error.errno in OUR_OWN_TROUBLE:
                raise error
            raise ReferencesAbsentError(mends.unreadable(error))
        if not [folder for folder in folders if folder.label != STRANGERS_FOLDER]:
            raise ReferencesAbsentError(
                f"{self._clases} holds no class folder: make one for each class, with images in it"
            )
        return list(self._choose(folders)), misnamed

    @staticmethod
    def _embed(
        embedder: Embedder,
        folders: Sequence[ClassFolder],
        corrections: Sequence[tuple[str, str, Stamp]],
        tell: Callable[[int, int], None] = lambda *_: None,
    ) -> dict[tuple[str, Stamp], EmbeddedImage | ImageRefused]:
        images = [file for folder in folders for file in folder.files] + [(p, s) for _, p, s in corrections]
        answers: dict[tuple[str, Stamp], EmbeddedImage | ImageRefused] = {}
        for number, answer in enumerate(embedder.embed(images), 1):
            answers[answer.path, answer.stamp] = answer
            tell(number, len(images))
        return answers

    @staticmethod
    def _sorted_out(
        folders: Sequence[ClassFolder],
        corrections: Sequence[tuple[str, str, Stamp]],
        answers: Mapping[tuple[str, Stamp], EmbeddedImage | ImageRefused],
    ) -> tuple[dict[str, dict[str, FloatArray]], dict[str, dict[str, str]], tuple[ImageRefused, ...]]:
        """Return by label: rows by content, source by content; and what could not be read."""
        rows: dict[str, dict[str, FloatArray]] = {folder.label: {} for folder in folders}
        sources: dict[str, dict[str, str]] = {folder.label: {} for folder in folders}
        refused = [_undescribed(folder.description_refusal) for folder in folders if folder.description_refusal]
        files = [(folder.label, path, mark) for folder in folders for path, mark in folder.files]
        for label, path, mark in [*files, *(c for c in corrections if c[0] in rows)]:
            answer = answers[path, mark]
            if isinstance(answer, EmbeddedImage):
                rows[label].setdefault(answer.content, answer.embedding)
                sources[label].setdefault(answer.content, path)
            elif answer.refusal not in {Refusal.NOT_AN_IMAGE, Refusal.VANISHED}:
                refused.append(answer)
        return rows, sources, tuple(refused)

    def _keep_emptied(
        self, contents: dict[str, dict[str, str]], rows: dict[str, dict[str, FloatArray]], present: set[str]
    ) -> tuple[str, ...]:
        """Give a class that is there but was emptied while running what it held before: absent is not empty."""
        emptied = [label for label in sorted(present) if not contents[label] and self._contents.get(label)]
        for label in emptied:
            contents[label] = dict(self._contents[label])
            rows[label] = {content: self._kept_rows[content] for content in contents[label]}
        return tuple(emptied)

    @staticmethod
    def _fingerprint(
        contents: Mapping[str, Mapping[str, str]],
        folders: Sequence[ClassFolder],
        teaching: Teaching,
        encoder_id: str,
        decided_by: str = "",
    ) -> str:
        """Identify contents, descriptions, templates, settings, encoder and whoever decides: equal means the same."""
        abstain = teaching.settings.abstain
        facts = {
            "version": SHAPE_VERSION,
            "encoder": encoder_id,
            "mode": teaching.settings.mode.value,
            "abstain": None if abstain is None else [abstain.precision, abstain.strangers],
            "templates": teaching.templates,
            "classes": {label: sorted(held) for label, held in contents.items()},
            "descriptions": {folder.label: folder.descriptions for folder in folders},
        }
        if decided_by:
            facts["decided_by"] = decided_by
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @staticmethod
    def _support(
        embedder: Embedder,
        rows: Mapping[str, Mapping[str, FloatArray]],
        sources: Mapping[str, Mapping[str, str]],
        folders: Sequence[ClassFolder],
        teaching: Teaching,
        fingerprint: str,
    ) -> SupportSet:
        labels = tuple(folder.label for folder in folders if folder.label != STRANGERS_FOLDER)
        dimensions = embedder.encoder.dimensions
        none = np.zeros((0, dimensions), np.float32)
        stacked = [row for label in labels for row in rows[label].values()]
        strangers = list(rows.get(STRANGERS_FOLDER, {}).values())
        text, text_mean = None, None
        wants_text = teaching.settings.mode in {Mode.TEXT, Mode.MIXED} or len(labels) <= TEXT_CLASSES_LIMIT
        if embedder.encoder.has_text and wants_text:
            named = {folder.label: prompts(folder.label, folder.descriptions, teaching.templates) for folder in folders}
            text = class_texts(embedder, [named[label] for label in labels])
            generic = [prompt for noun in GENERIC_NOUNS for prompt in prompts(noun, (), teaching.templates)]
            text_mean = embedder.embed_texts(generic).mean(axis=0).astype(np.float32)
        return SupportSet(
            labels=labels,
            embeddings=np.stack(stacked) if stacked else none,
            classes=np.repeat(np.arange(len(labels)), [len(rows[label]) for label in labels]),
            sources=tuple(path for label in labels for path in sources[label].values()),
            text=text,
            text_mean=text_mean,
            strangers=np.stack(strangers) if strangers else none,
            encoder_id=embedder.encoder.encoder_id,
            fingerprint=fingerprint,
        )


def _undescribed(error: OSError) -> ImageRefused:
    """Say of a description file that its class does without."""
    message = f"the class has no description: {error.strerror or error}; {mends.to_read(error)}"
    return ImageRefused(error.filename, Stamp(0, 0, 0, 0), Refusal.DENIED, message)


def _standing(corrections: Sequence[tuple[str, str]]) -> list[tuple[str, str, Stamp]]:
    """Stamp the corrected images that still stand where the user put them; what cannot be looked at teaches nothing."""
    found: list[tuple[str, str, Stamp]] = []
    for label, path in corrections:
        with suppress(OSError):
            if (mark := stamp(path)) is not None:
                found.append((label, path, mark))
    return found


def class_texts(embedder: Embedder, sentences: Sequence[Sequence[str]]) -> FloatArray:
    """Return float32 (C, d) unit rows: for each class the unit mean of its prompts' unit embeddings."""
    rows = embedder.embed_texts([sentence for one_class in sentences for sentence in one_class])
    ends = np.cumsum([len(one_class) for one_class in sentences])
    means = np.stack([part.mean(axis=0) for part in np.split(rows, ends[:-1])])
    lengths = np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
    return np.asarray(means / lengths, dtype=np.float32)
