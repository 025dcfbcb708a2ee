"""The findings of `sortd check`, and the checks of a dataset's references and their calibration."""

import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from time import perf_counter

from sortd import errors
from sortd.classify.prompts import written_name
from sortd.classify.prototypes import PrototypeSet
from sortd.commands.console import counted, printable
from sortd.config import Config, DatasetConfig
from sortd.daemon.references import (
    SETTINGS,
    STRANGERS_FOLDER,
    ClassFolder,
    ReferencesAbsentError,
    changed_since,
    class_folders,
    evaluated_prototypes,
    settings_differ,
    stored_prototypes,
)
from sortd.errors import ImageError, JournalError
from sortd.events import Preprocessing, Stamp
from sortd.files import sha256_of
from sortd.images.decode import DecodeLimits, check_header, decode_file
from sortd.images.formats import HEAD_BYTES, looks_like_image
from sortd.layout import JOURNAL_FILE, Area, Layout
from sortd.names import Reason, Why, rule_for_folder
from sortd.store.cache import Cache
from sortd.store.history import History
from sortd.watch.scan import scan_all


class Severity(StrEnum):
    """How bad a finding is."""

    NOTE = "note"  # nothing to do
    WARNING = "warning"  # sortd works, but not as well as it could
    ERROR = "error"  # sortd does not start, or part of it cannot work


class Topic(StrEnum):
    """What a finding is about; the exit code depends on it."""

    CONFIGURATION = "configuration"
    FOLDERS = "folders"
    FILE_SYSTEM = "file_system"
    WATCHING = "watching"
    REFERENCES = "references"
    CALIBRATION = "calibration"
    MODEL = "model"
    PROCESS = "process"
    MACHINE = "machine"


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact about ``subject``, a path or a key; a ``topic`` of None is replaced by that of the check."""

    severity: Severity
    topic: Topic | None
    subject: str
    what: str
    mend: str = ""


def _finding(severity: Severity, subject: object, what: str, mend: str = "", topic: Topic | None = None) -> Finding:
    return Finding(severity, topic, str(subject), what, mend)


note, warning, error = (partial(_finding, severity) for severity in Severity)


def exit_code(findings: Iterable[Finding]) -> int:
    """Return the exit code of the command (sysexits(3)): 78 configuration, 69 model, 65 references, 0 no error."""
    topics = {finding.topic for finding in findings if finding.severity is Severity.ERROR}
    if topics - {Topic.REFERENCES, Topic.CALIBRATION, Topic.MODEL}:
        return 78
    return 69 if Topic.MODEL in topics else 65 if topics else 0


FEW_REFERENCES = 4
"""Below this number each further reference adds several points of accuracy: see docs/decisions.md."""

FEW_STRANGERS = 8
NAMED_AT_MOST = 5
LOW_SHARE_FILED = 0.5

DECODING_SECONDS = 0.2
"""How long references are decoded whole; after that only headers are read, so that a check stays short."""

CHECKED_PIXELS = 224  # input size of most encoders

CACHE_FILE = "embeddings.sqlite"

_File = tuple[str, Stamp]


def reference_findings(
    config: Config, layout: Layout, *, decoding_seconds: float = DECODING_SECONDS
) -> Iterator[Finding]:
    """Check a dataset's ``Clases/``; decode whole images for ``decoding_seconds``, then read headers only."""
    clases = layout.area(Area.CLASES)
    unreadable: list[OSError] = []
    try:
        folders, misnamed = class_folders(clases, report=unreadable.append)
    except ReferencesAbsentError as absent:
        yield error(clases, str(absent), "give sortd permission to read it, or mount its disk")
        return
    for refusal in [*unreadable, *(one.description_refusal for one in folders if one.description_refusal)]:
        yield error(refusal.filename, f"cannot be read: {refusal.strerror}", errors.advice_for(refusal))
    yield from _name_findings(clases, [folder.label for folder in folders], misnamed)
    yield from _unused_findings(clases)
    contents = _known_contents(config, [file for folder in folders for file in folder.files])
    # A text file next to the images is no reference and does no harm.
    folders = [replace(one, files=tuple(f for f in one.files if f in contents or _is_image(f[0]))) for one in folders]
    files = [file for folder in folders for file in folder.files]
    yield from _reading_findings(config, clases, files, contents, decoding_seconds)
    assigned = _assigned_counts(config, layout)
    counts = {one.label: len(one.files) + assigned[one.label] for one in folders}
    yield from _count_findings(clases, counts, config.dataset(layout.name).mode)
    yield from _duplicate_findings(clases, folders, contents)


def _assigned_counts(config: Config, layout: Layout) -> Counter[str]:
    """Return the number of images in Dataset/ that a person assigned to each class, which are references as well."""
    file = layout.state_folder(config.state_dir) / JOURNAL_FILE
    if not file.is_file():
        return Counter()
    with suppress(JournalError), History.open(file) as history:  # another finding reports a damaged journal
        return Counter(label for label, path in history.assigned() if os.path.isfile(layout.root / path))
    return Counter()


def _known_contents(config: Config, files: Sequence[_File]) -> Mapping[_File, str]:
    """Return the sha256, in hexadecimal, of the files that the cache has; create no cache for it."""
    file = config.cache_dir / CACHE_FILE
    if not os.path.isfile(file):  # False also if it may not be looked at, which another finding reports
        return {}
    with Cache(file, report=lambda _: None) as cache:
        return cache.contents(files)


def _name_findings(clases: Path, labels: Sequence[str], misnamed: Sequence[str]) -> Iterator[Finding]:
    if misnamed:
        yield warning(clases, f"holds folders whose names cannot be classes: {_listed(misnamed)}", "rename them")
    if blanks := [written_name(label) for label in labels if written_name(label) != label]:
        what = f"holds class names with a blank at an end or two in a row: {_listed(blanks)}"
        yield warning(clases, what, "rename them; some file systems remove a blank at the end")
    alike = defaultdict(list)
    for label in labels:
        alike[" ".join(unicodedata.normalize("NFC", label).casefold().split())].append(written_name(label))
    for same in (names for names in alike.values() if len(names) > 1):
        what = f"holds classes whose names look the same: {_listed(same)}"
        yield warning(clases, what, "rename or merge them; on other systems they are one folder")


def _unused_findings(clases: Path) -> Iterator[Finding]:
    """Name the entries of class folders that are not used: links, hidden files, unfinished files."""
    unused: dict[Reason, list[tuple[str, str]]] = defaultdict(list)
    for path, found in scan_all(str(clases), report=lambda _: None, rule_at_top=rule_for_folder):
        if isinstance(found, Why) and found.reason is not Reason.SYSTEM and Path(path).parent != clases:
            unused[found.reason].append((os.path.relpath(path, clases), found.message))
    for reason, files in unused.items():
        shown, number = _listed(sorted(path for path, _ in files)), counted(len(files), "entry")
        yield warning(clases, f"{number} not used as references ({reason.replace('_', ' ')}): {shown}", files[0][1])


def _reading_findings(
    config: Config, clases: Path, files: Sequence[_File], contents: Mapping[_File, str], decoding_seconds: float
) -> Iterator[Finding]:
    """Read every reference that the cache does not have, whole or only its header as the time allows."""
    limits = DecodeLimits.of(config.decoding)
    size = Preprocessing(shortest_edge=CHECKED_PIXELS, crop_height=CHECKED_PIXELS, crop_width=CHECKED_PIXELS)
    fresh = [path for path, mark in files if (path, mark) not in contents]
    began, decoded = perf_counter(), 0
    for path in fresh:
        try:
            if perf_counter() - began < decoding_seconds:
                decoded += 1
                decode_file(path, size, limits)
            else:
                check_header(path, limits)
        except ImageError as refusal:
            yield warning(path, f"is a reference that cannot be read: {refusal}", "replace or remove it")
        except OSError as refusal:
            yield error(path, f"cannot be read: {refusal.strerror}", "correct its permissions, or check its disk")
    parts = (
        (len(files) - len(fresh), f"{counted(len(files) - len(fresh), 'reference')} in the cache"),
        (decoded, f"{decoded:,} decoded"),
        (len(fresh) - decoded, f"of {len(fresh) - decoded:,} the headers read (--thorough decodes them too)"),
    )
    if files:
        yield note(clases, ", ".join(text for number, text in parts if number))


def _count_findings(clases: Path, counts: dict[str, int], mode: str) -> Iterator[Finding]:
    strangers = counts.pop(STRANGERS_FOLDER, FEW_STRANGERS)
    if strangers < FEW_STRANGERS:
        what = f"holds only {counted(strangers, 'image')} of what belongs to no class"
        yield warning(clases / STRANGERS_FOLDER, what, f"add at least {FEW_STRANGERS - strangers} more, or remove it")
    if not counts:
        yield error(clases, "holds no class, so nothing can be decided", f"put images into {clases}/CLASS/")
        return
    if len(counts) == 1:
        what = f"holds only one class ({_listed(list(counts))}), so there is no other to compare with"
        yield warning(clases, what, "add a second class, or examples of what belongs to no class in _none/")
    if empty := [label for label, count in counts.items() if count == 0]:
        severity, effect, advice = {
            "text": (note, "known only by name", ""),
            "mixed": (warning, "without an image, known only by name", "add images; a name alone decides poorly"),
        }.get(mode) or (
            warning,
            f"without an image; `mode: {mode}` files nothing there",
            "add images, or set `mode: mixed`, which also uses the names of classes",
        )
        yield severity(clases, f"{counted(len(empty), 'class')} {effect}: {_listed(empty)}", advice)
    few = [f"{label} ({count})" for label, count in counts.items() if 0 < count < FEW_REFERENCES]
    if few and mode != "text":
        what = f"{counted(len(few), 'class')} with fewer than {FEW_REFERENCES} images: {_listed(few)}"
        yield warning(clases, what, f"add at least {FEW_REFERENCES} varied images per class, ideally 16")


def _duplicate_findings(
    clases: Path, folders: Sequence[ClassFolder], contents: Mapping[_File, str]
) -> Iterator[Finding]:
    """Find images that are references of two classes; only files of equal size are read."""
    by_size: dict[int, list[tuple[str, _File]]] = defaultdict(list)
    for folder in folders:
        for file in folder.files:
            by_size[file[1].size].append((folder.label, file))
    by_content: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for same_size in by_size.values():
        if len({label for label, _ in same_size}) > 1:  # within one class a duplicate does no harm
            for label, file in same_size:
                with suppress(OSError):  # _reading_findings reports it
                    by_content[contents.get(file) or sha256_of(file[0])].append((label, file[0]))
    for twins in by_content.values():
        if len(labels := sorted({label for label, _ in twins})) > 1:
            paths = _listed([os.path.relpath(path, clases) for _, path in twins])
            what = f"is a reference of {len(labels)} classes ({_listed(labels)}): {paths}"
            yield warning(twins[0][1], what, "keep it only in the class to which it belongs")


def _is_image(path: str) -> bool:
    """Tell whether a file is meant as an image, by its name or else by its content."""
    try:
        with open(path, "rb") as file:
            return looks_like_image(path, file.read(HEAD_BYTES))
    except OSError:
        return True  # _reading_findings reports it


def _listed(names: Sequence[str]) -> str:
    """Return the first few names in printable form, and how many more there are."""
    more = len(names) - NAMED_AT_MOST
    return ", ".join(map(printable, names[:NAMED_AT_MOST])) + (f" and {more} more" if more > 0 else "")


# ---------------------------------------------------------------- calibration


def stored_calibration_findings(config: Config, layout: Layout) -> Iterator[Finding]:
    """Report the calibration of the newest prototypes: those of a running sortd, or of ``sortd eval``."""
    served, evaluated = stored_prototypes(config, layout), evaluated_prototypes(config, layout)
    changed = None if served is None else changed_since(config, layout, served)
    if evaluated is not None and (served is None or changed is not None):
        since = changed_since(config, layout, evaluated, evaluated=True)
        if served is None or since is None:
            served, changed = evaluated, since
    yield from calibration_findings(layout, config.dataset(layout.name), served, changed=changed)


def calibration_findings(
    layout: Layout, config: DatasetConfig, prototypes: PrototypeSet | None, *, changed: str | None = None
) -> Iterator[Finding]:
    """Report the accuracy to expect of stored prototypes.

    ``changed`` names what has changed since they were built: their calibration is not valid then.
    """
    advice, clases = "run `sortd eval`, or start sortd, which measures it", layout.area(Area.CLASES)
    if prototypes is None:
        yield note(layout.root, "has not been calibrated yet: its accuracy is not known", advice)
        return
    facts = prototypes.calibration
    by = f"generation {prototypes.generation}" if prototypes.generation else "the last `sortd eval`"
    if changed is None and settings_differ(config, prototypes):
        changed = SETTINGS
    if changed is not None:
        yield note(layout.root, f"the {changed} have changed since {by}: the accuracy is not known", advice)
        return
    for sentence in facts.notes:
        yield warning(clases, sentence, "add references, or ask for less (`abstain` in config.yaml)")
    measured = f"{by}, measured on {counted(facts.held_out, 'reference')} held out in turn: "
    if not facts.held_out:
        what = f"{by}: no class has two different images, so its accuracy is not known"
        yield note(clases, what, "add references")
    elif prototypes.settings.abstain is None:
        yield note(clases, f"{measured}accuracy {facts.accuracy or 0.0:.1%}; every image is filed")
    elif facts.filed_expected is not None:
        right = "" if facts.precision_expected is None else f", with a precision of {facts.precision_expected:.1%}"
        yield note(clases, f"{measured}{facts.filed_expected:.0%} of known images would be filed{right}")
        if facts.filed_expected < LOW_SHARE_FILED:
            what = f"only {facts.filed_expected:.0%} of known images would be filed, the others go to Review/"
            yield warning(clases, what, "add references (`sortd eval` names the classes), or lower `abstain.precision`")
