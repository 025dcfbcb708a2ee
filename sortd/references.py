"""References: what stands in ``Clases/`` becomes a support set and then prototypes, encoding only what is new."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sortd import errors
from sortd.arrays import FloatArray
from sortd.classify.build import build
from sortd.classify.prompts import DEFAULT_TEMPLATES, GENERIC_NOUNS, prompts
from sortd.classify.prototypes import PrototypeSet
from sortd.classify.types import DecisionSettings, Mode, SupportSet
from sortd.daemon.embedder import Embedder
from sortd.events import EmbeddedImage, ImageRefused, Refusal, Stamp
from sortd.files import open_regular
from sortd.images.formats import OUR_OWN_TROUBLE
from sortd.names import rule_for_folder
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
class ReferenceSettings:
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
        """Take the references in ``clases``, or what ``choose`` leaves of its classes; nothing is read yet."""
        self._clases = clases
        self._choose = choose or (lambda folders: folders)
        self._held: _Held = {}

    def rebuild(
        self,
        embedder: Embedder,
        teaching: ReferenceSettings,
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
        forwards = embedder.forwards
        folders, misnamed = self._folders(embedder.give_way)
        held, refused = _read(embedder, folders, teaching.corrections)
        emptied = tuple(label for label in sorted(held) if not held[label] and self._held.get(label))
        held |= {label: self._held[label] for label in emptied}  # absent is not empty
        self._held = held
        counts = {label: len(one) for label, one in held.items()}
        fingerprint = _fingerprint(held, folders, teaching, embedder.encoder.encoder_id, decided_by)
        if previous is not None and previous.fingerprint == fingerprint:
            return Rebuilt(previous, refused, emptied, tuple(misnamed), changed=False, references=counts)
        support = _support(embedder, held, folders, teaching, fingerprint)
        prototypes = build(support, teaching.settings, generation=generation, pause=embedder.give_way)
        encoded = embedder.forwards - forwards
        return Rebuilt(prototypes, refused, emptied, tuple(misnamed), encoded=encoded, references=counts)

    def support(
        self, embedder: Embedder, teaching: ReferenceSettings, *, tell: Callable[[int, int], None] = lambda *_: None
    ) -> tuple[SupportSet, tuple[ImageRefused, ...]]:
        """Read the folder and return its support set, and what could not be read; for an evaluation.

        ``tell`` is called after each image with how many are read, and of how many.

        Raises:
            ReferencesAbsentError: there is no class folder to learn from.
        """
        folders, _ = self._folders(embedder.give_way)
        held, refused = _read(embedder, folders, teaching.corrections, tell)
        fingerprint = _fingerprint(held, folders, teaching, embedder.encoder.encoder_id)
        return _support(embedder, held, folders, teaching, fingerprint), refused

    def _folders(self, between: Callable[[], None]) -> tuple[list[ClassFolder], list[str]]:
        unreadable: list[OSError] = []
        folders, misnamed = class_folders(self._clases, report=unreadable.append, between=between)
        if unreadable:
            error = unreadable[0]
            if error.errno in OUR_OWN_TROUBLE:
                raise error
            raise ReferencesAbsentError(errors.unreadable(error))
        if not [folder for folder in folders if folder.label != STRANGERS_FOLDER]:
            raise ReferencesAbsentError(
                f"{self._clases} holds no class folder: make one for each class, with images in it"
            )
        return list(self._choose(folders)), misnamed


_Held = dict[str, dict[str, tuple[str, FloatArray]]]
"""By label and content: the path of a reference and its row."""


def _read(
    embedder: Embedder,
    folders: Sequence[ClassFolder],
    corrections: Sequence[tuple[str, str]],
    tell: Callable[[int, int], None] = lambda *_: None,
) -> tuple[_Held, tuple[ImageRefused, ...]]:
    """Embed the references and the corrected images that are still where the user put them."""
    held: _Held = {folder.label: {} for folder in folders}
    refused = [_undescribed(folder.description_refusal) for folder in folders if folder.description_refusal]
    files = [(folder.label, path, mark) for folder in folders for path, mark in folder.files]
    for label, path in corrections:
        with suppress(OSError):
            if (mark := stamp(path)) is not None:
                files.append((label, path, mark))
    answers: dict[tuple[str, Stamp], EmbeddedImage | ImageRefused] = {}
    for number, answer in enumerate(embedder.embed([(path, mark) for _, path, mark in files]), 1):
        answers[answer.path, answer.stamp] = answer
        tell(number, len(files))
    for label, path, mark in files:
        answer = answers[path, mark]
        if label not in held:
            continue
        if isinstance(answer, EmbeddedImage):
            held[label].setdefault(answer.content, (path, answer.embedding))
        elif answer.refusal not in {Refusal.NOT_AN_IMAGE, Refusal.VANISHED}:
            refused.append(answer)
    return held, tuple(refused)


def _fingerprint(
    held: _Held, folders: Sequence[ClassFolder], teaching: ReferenceSettings, encoder_id: str, decided_by: str = ""
) -> str:
    """Return the identity of contents, descriptions, templates, settings, encoder and the deciding model."""
    abstain = teaching.settings.abstain
    facts = {
        "version": SHAPE_VERSION,
        "encoder": encoder_id,
        "mode": teaching.settings.mode.value,
        "abstain": None if abstain is None else [abstain.precision, abstain.strangers],
        "templates": teaching.templates,
        "classes": {label: sorted(contents) for label, contents in held.items()},
        "descriptions": {folder.label: folder.descriptions for folder in folders},
    }
    if decided_by:
        facts["decided_by"] = decided_by
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _support(
    embedder: Embedder, held: _Held, folders: Sequence[ClassFolder], teaching: ReferenceSettings, fingerprint: str
) -> SupportSet:
    labels = tuple(folder.label for folder in folders if folder.label != STRANGERS_FOLDER)
    none = np.zeros((0, embedder.encoder.dimensions), np.float32)
    references = [one for label in labels for one in held[label].values()]
    strangers = [row for _, row in held.get(STRANGERS_FOLDER, {}).values()]
    text, text_mean = None, None
    wants_text = teaching.settings.mode in {Mode.TEXT, Mode.MIXED} or len(labels) <= TEXT_CLASSES_LIMIT
    if embedder.encoder.has_text and wants_text:
        named = {folder.label: prompts(folder.label, folder.descriptions, teaching.templates) for folder in folders}
        text = class_texts(embedder, [named[label] for label in labels])
        generic = [prompt for noun in GENERIC_NOUNS for prompt in prompts(noun, (), teaching.templates)]
        text_mean = embedder.embed_texts(generic).mean(axis=0).astype(np.float32)
    return SupportSet(
        labels=labels,
        embeddings=np.stack([row for _, row in references]) if references else none,
        classes=np.repeat(np.arange(len(labels)), [len(held[label]) for label in labels]),
        sources=tuple(path for path, _ in references),
        text=text,
        text_mean=text_mean,
        strangers=np.stack(strangers) if strangers else none,
        encoder_id=embedder.encoder.encoder_id,
        fingerprint=fingerprint,
    )


def class_texts(embedder: Embedder, sentences: Sequence[Sequence[str]]) -> FloatArray:
    """Return float32 (C, d) unit rows: for each class the unit mean of its prompts' unit embeddings."""
    rows = embedder.embed_texts([sentence for one_class in sentences for sentence in one_class])
    ends = np.cumsum([len(one_class) for one_class in sentences])
    means = np.stack([part.mean(axis=0) for part in np.split(rows, ends[:-1])])
    lengths = np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
    return np.asarray(means / lengths, dtype=np.float32)


def _undescribed(error: OSError) -> ImageRefused:
    """Return the refusal of a description file, which its class does without."""
    message = f"the class has no description: {error.strerror or error}; {errors.advice_for(error)}"
    return ImageRefused(error.filename, Stamp(0, 0, 0, 0), Refusal.DENIED, message)
