"""References: read ``Clases/`` into a support set and build prototypes; only new images are encoded.

Also the stored prototypes, those of the last ``sortd eval`` (used by ``sortd check`` only), and what changed since.
"""

import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sortd import errors
from sortd.arrays import FloatArray
from sortd.classify.build import build
from sortd.classify.prompts import GENERIC_NOUNS, prompts, written_name
from sortd.classify.prototypes import PrototypeSet
from sortd.classify.types import DecisionSettings, Evidence, SupportSet
from sortd.config import DEFAULT_TEMPLATES, Config, DatasetConfig
from sortd.daemon.embedder import Embedder
from sortd.errors import DataError, ImageError
from sortd.events import NO_CLASS, EmbeddedImage, ImageRefused, Mode, Refusal, Stamp
from sortd.files import open_regular, sha256_of
from sortd.images.decode import DecodeLimits, check_header
from sortd.images.pool import RESOURCE_ERRORS
from sortd.layout import Area, Layout, rule_for_folder
from sortd.store.cache import PROTOTYPES_FOLDER, PrototypeFiles
from sortd.watch.scan import stamp, whole_files

STRANGERS_FOLDER = NO_CLASS
"""The folder of images of no class, in Clases/ and in Dataset/."""
DESCRIPTIONS_FILE = "class.txt"
"""The file in a class folder with one description of the class per line."""
DESCRIPTIONS_LIMIT_BYTES = 64 * 1024
"""The part of a description file that is read."""
TEXT_CLASSES_LIMIT = 500
"""With more classes, names are embedded only for the modes that need them: each takes eight forward passes."""
SHAPE_VERSION = 3
"""Part of every fingerprint: increase it when the same folder gives another support set than before."""

NAME_BYTES = 255
"""The longest name of a folder on Linux (NAME_MAX)."""


class ReferencesAbsentError(DataError):
    """``Clases/`` is missing, unreadable or has no class; the last prototypes stay in use."""


@dataclass(frozen=True, slots=True)
class ClassFolder:
    """One class on disk."""

    label: str
    files: tuple[tuple[str, Stamp], ...]
    descriptions: tuple[str, ...]
    description_refusal: OSError | None = None
    """The error of a description file that cannot be read; the class has no descriptions then."""


@dataclass(frozen=True, slots=True)
class ReferenceSettings:
    """The settings that the prototypes depend on, besides the images."""

    settings: DecisionSettings
    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    learns_from_corrections: bool = False
    classifier: str = "auto"  # auto, prototypes or finetuned; see ``select_classifier``
    corrections: tuple[tuple[str, str], ...] = ()  # label, path: images placed by hand in Dataset/
    evidence: Evidence | None = None  # filed images that a person has checked


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """The result of a rebuild: the prototypes, and problems of the folder."""

    prototypes: PrototypeSet
    refused: tuple[ImageRefused, ...] = ()
    emptied: tuple[str, ...] = ()
    misnamed: tuple[str, ...] = ()
    changed: bool = True
    encoded: int = 0


def is_class_name(name: str) -> bool:
    """Return whether a folder name can be a class: printable, not blank, not hidden, no system folder."""
    return name.isprintable() and name.strip() not in {"", ".."} and rule_for_folder(name) is None


def class_name_problem(name: str) -> str | None:
    """Return why a name cannot be given to a new class; None if it can."""
    if "/" in name or not is_class_name(name) or written_name(name) != name:
        return "it must be a visible folder name without /, control characters, and blanks at an end or in a row"
    if len(os.fsencode(name)) > NAME_BYTES:
        return f"it must have at most {NAME_BYTES} bytes"
    if name == STRANGERS_FOLDER:
        return "this folder is for images of no class"
    return None


def read_descriptions(folder: str) -> tuple[str, ...]:
    """Return the lines of a class's description file, none if it is missing; raise OSError if it cannot be read."""
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
    """Return the classes, sorted, and the names of folders that cannot be classes; ``between`` is called after each.

    Raises ReferencesAbsentError: ``Clases/`` is missing or cannot be listed.
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
        if error.errno in RESOURCE_ERRORS:
            raise
        return ClassFolder(entry.name, files, (), error)


def class_labels(clases: Path) -> tuple[str, ...]:
    """Return the sorted names of the class folders; raise ReferencesAbsentError if they cannot be listed."""
    return tuple(entry.name for entry in _class_entries(clases)[0] if entry.name != STRANGERS_FOLDER)


def _class_entries(clases: Path) -> tuple[list[os.DirEntry[str]], list[str]]:
    """Return the class folders, sorted, and the folder names that cannot be classes."""
    try:
        with os.scandir(clases) as entries:
            found = sorted((e for e in entries if e.is_dir(follow_symlinks=False)), key=lambda entry: entry.name)
    except OSError as error:
        if error.errno in RESOURCE_ERRORS:
            raise
        raise ReferencesAbsentError(f"{clases} cannot be listed: {error.strerror}") from error
    seen = [entry for entry in found if rule_for_folder(entry.name) is None]
    return [e for e in seen if is_class_name(e.name)], [e.name for e in seen if not is_class_name(e.name)]


class References:
    """The references of one dataset; an emptied class keeps the references that it had before."""

    def __init__(
        self, clases: Path, *, choose: Callable[[Sequence[ClassFolder]], Sequence[ClassFolder]] | None = None
    ) -> None:
        """Use the classes in ``clases`` that ``choose`` returns; default: all."""
        self._clases = clases
        self._choose = choose or (lambda folders: folders)
        self._held: _Held = {}

    def rebuild(
        self,
        embedder: Embedder,
        settings: ReferenceSettings,
        *,
        previous: PrototypeSet | None,
        generation: int,
        decided_by: str = "",
    ) -> Rebuilt:
        """Read the folder and build prototypes of this generation, or return ``previous``, if nothing changed.

        ``decided_by`` is the identity of the fine-tuned model in use; a change of it starts a new generation.

        Raises:
            ReferencesAbsentError: there is no class folder.
        """
        forwards = embedder.forwards
        folders, misnamed = self._folders(embedder.give_way, settings)
        held, refused = _read(embedder, folders, settings.corrections)
        emptied = tuple(label for label in sorted(held) if not held[label] and self._held.get(label))
        held |= {label: self._held[label] for label in emptied}
        self._held = held
        fingerprint = _fingerprint(held, folders, settings, embedder.encoder.encoder_id, decided_by)
        if previous is not None and previous.fingerprint == fingerprint:
            return Rebuilt(previous, refused, emptied, tuple(misnamed), changed=False)
        support = _support(embedder, held, folders, settings, fingerprint)
        built = build(support, settings.settings, generation=generation, pause=embedder.give_way)
        prototypes = built.with_history(previous)
        encoded = embedder.forwards - forwards
        return Rebuilt(prototypes, refused, emptied, tuple(misnamed), encoded=encoded)

    def support(
        self, embedder: Embedder, settings: ReferenceSettings, *, tell: Callable[[int, int], None] = lambda *_: None
    ) -> tuple[SupportSet, tuple[ImageRefused, ...]]:
        """Return the support set of the folder, and unreadable images; call ``tell(done, total)`` after each image.

        Raises ReferencesAbsentError: there is no class folder.
        """
        folders, _ = self._folders(embedder.give_way, settings)
        held, refused = _read(embedder, folders, settings.corrections, tell)
        fingerprint = _fingerprint(held, folders, settings, embedder.encoder.encoder_id)
        return _support(embedder, held, folders, settings, fingerprint), refused

    def _folders(self, between: Callable[[], None], settings: ReferenceSettings) -> tuple[list[ClassFolder], list[str]]:
        unreadable: list[OSError] = []
        folders, misnamed = class_folders(self._clases, report=unreadable.append, between=between)
        if unreadable:
            error = unreadable[0]
            if error.errno in RESOURCE_ERRORS:
                raise error
            raise ReferencesAbsentError(errors.unreadable(error))
        strangers = [folder for folder in folders if folder.label == STRANGERS_FOLDER]
        if len(folders) == len(strangers):
            raise ReferencesAbsentError(f"{self._clases} has no class folder: create one per class, with images in it")
        if not strangers and any(label == STRANGERS_FOLDER for label, _ in settings.corrections):
            folders.append(ClassFolder(STRANGERS_FOLDER, (), ()))  # its images are all in Dataset/
        return list(self._choose(folders)), misnamed


_Held = dict[str, dict[str, tuple[str, FloatArray]]]
"""By label and content: path and embedding of a reference."""


def _read(
    embedder: Embedder,
    folders: Sequence[ClassFolder],
    corrections: Sequence[tuple[str, str]],
    tell: Callable[[int, int], None] = lambda *_: None,
) -> tuple[_Held, tuple[ImageRefused, ...]]:
    """Embed the references, and the corrections that still exist."""
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
    held: _Held, folders: Sequence[ClassFolder], settings: ReferenceSettings, encoder_id: str, decided_by: str = ""
) -> str:
    """Return a hash of contents, descriptions, templates, settings, encoder and fine-tuned model."""
    abstain = settings.settings.abstain
    facts = {
        "version": SHAPE_VERSION,
        "encoder": encoder_id,
        "mode": settings.settings.mode.value,
        "abstain": None if abstain is None else [abstain.precision, abstain.strangers],
        "templates": settings.templates,
        "classes": {label: sorted(contents) for label, contents in held.items()},
        "descriptions": {folder.label: folder.descriptions for folder in folders},
    }
    if decided_by:
        facts["decided_by"] = decided_by
    if settings.evidence is not None and abstain is not None:
        facts["evidence"] = settings.evidence.steps
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _support(
    embedder: Embedder, held: _Held, folders: Sequence[ClassFolder], settings: ReferenceSettings, fingerprint: str
) -> SupportSet:
    labels = tuple(folder.label for folder in folders if folder.label != STRANGERS_FOLDER)
    none = np.zeros((0, embedder.encoder.dimensions), np.float32)
    references = [one for label in labels for one in held[label].values()]
    strangers = [row for _, row in held.get(STRANGERS_FOLDER, {}).values()]
    text, text_mean = None, None
    wants_text = settings.settings.mode in {Mode.TEXT, Mode.MIXED} or len(labels) <= TEXT_CLASSES_LIMIT
    if embedder.encoder.has_text and wants_text:
        named = {folder.label: prompts(folder.label, folder.descriptions, settings.templates) for folder in folders}
        text = class_texts(embedder, [named[label] for label in labels])
        text_mean = generic_text_mean(embedder, settings.templates)
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
        evidence=settings.evidence,
    )


def class_texts(embedder: Embedder, sentences: Sequence[Sequence[str]]) -> FloatArray:
    """Return float32 (C, d): for each class the unit mean of the unit embeddings of its prompts."""
    rows = embedder.embed_texts([sentence for one_class in sentences for sentence in one_class])
    ends = np.cumsum([len(one_class) for one_class in sentences])
    means = np.stack([part.mean(axis=0) for part in np.split(rows, ends[:-1])])
    lengths = np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
    return np.asarray(means / lengths, dtype=np.float32)


def generic_text_mean(embedder: Embedder, templates: Sequence[str]) -> FloatArray:
    """Return float32 (d,): the mean embedding of the prompts of GENERIC_NOUNS."""
    generic = [prompt for noun in GENERIC_NOUNS for prompt in prompts(noun, (), templates)]
    return np.asarray(embedder.embed_texts(generic).mean(axis=0), dtype=np.float32)


def _undescribed(error: OSError) -> ImageRefused:
    """Return the refusal of a description file."""
    message = f"the description of the class cannot be read: {error.strerror or error}; {errors.advice_for(error)}"
    return ImageRefused(error.filename, Stamp(0, 0, 0, 0), Refusal.DENIED, message)


EVALUATED = "evaluated"
SETTINGS = "settings (mode or abstain)"


def stored_prototypes(config: Config, layout: Layout) -> PrototypeSet | None:
    """Return the last prototypes of a dataset, or None."""
    return _files(config).read(layout.key)


def evaluated_prototypes(config: Config, layout: Layout) -> PrototypeSet | None:
    """Return the prototypes of the last ``sortd eval`` of a dataset, or None."""
    return _files(config).read(f"{layout.key}/{EVALUATED}")


def keep_evaluated(config: Config, layout: Layout, prototypes: PrototypeSet) -> None:
    """Store the prototypes of ``sortd eval``, if the cache is writable."""
    _files(config).write(f"{layout.key}/{EVALUATED}", prototypes)


def changed_since(config: Config, layout: Layout, prototypes: PrototypeSet, *, evaluated: bool = False) -> str | None:
    """Return what changed since the prototypes were built, SETTINGS or ``references``, or None.

    ``evaluated``: the prototypes are those of ``sortd eval``.
    """
    if settings_differ(config.dataset(layout.name), prototypes):
        return SETTINGS
    built_at = _files(config).written_at_ns(f"{layout.key}/{EVALUATED}" if evaluated else layout.key)
    return "references" if _references_differ(layout, prototypes, built_at) else None


def settings_differ(config: DatasetConfig, prototypes: PrototypeSet) -> bool:
    """Return whether mode or abstain of a dataset differ from those of its prototypes."""
    old, new = (
        None if one is None else (one.precision, one.strangers) for one in (prototypes.settings.abstain, config.abstain)
    )
    return (config.mode, new) != (prototypes.settings.mode.value, old)


def _references_differ(layout: Layout, prototypes: PrototypeSet, built_at_ns: int) -> bool:
    """Return whether a class or a readable image was added, removed or modified since."""
    try:
        folders, _ = class_folders(layout.area(Area.CLASES), report=lambda _: None)
    except ReferencesAbsentError:
        return False  # reported by another check
    classes = [folder for folder in folders if folder.label != STRANGERS_FOLDER]
    if tuple(folder.label for folder in classes) != prototypes.labels:
        return True
    files = {path: (folder.label, mark) for folder in classes for path, mark in folder.files}
    clases = os.fspath(layout.area(Area.CLASES))
    known = {path for path in prototypes.sources if path.startswith(f"{clases}/")}  # corrections are in Dataset/
    strangers = [mark for folder in folders if folder.label == STRANGERS_FOLDER for _, mark in folder.files]
    marks = [*strangers, *(files[path][1] for path in known & files.keys())]
    described = (Path(clases, folder.label, DESCRIPTIONS_FILE) for folder in classes if folder.descriptions)
    return (
        not known <= files.keys()
        or any(mark.mtime_ns > built_at_ns for mark in marks)
        or any(file.stat().st_mtime_ns > built_at_ns for file in described)
        or any(_is_new(path, files, known) for path in files.keys() - known)
    )


def _is_new(path: str, files: Mapping[str, tuple[str, Stamp]], known: Collection[str]) -> bool:
    """Return whether an unknown file is a readable image and not a copy of a known one."""
    label, mark = files[path]
    copies = [other for other in known if files[other][0] == label and files[other][1].size == mark.size]
    try:
        check_header(path, DecodeLimits())
        return all(sha256_of(other) != sha256_of(path) for other in copies)
    except (ImageError, OSError):
        return False


def _files(config: Config) -> PrototypeFiles:
    return PrototypeFiles(config.cache_dir / PROTOTYPES_FOLDER, lambda _: None)  # damaged files are none
