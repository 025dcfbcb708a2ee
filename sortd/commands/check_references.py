"""Checks of the references: can each be read, has each class enough, does one image teach two classes?"""

import hashlib
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter

from sortd import mends
from sortd.commands.check_folders import named
from sortd.commands.console import counted, printable
from sortd.commands.finding import Finding, Topic, error, note, warning
from sortd.deciding.prompts import written_name
from sortd.decoding.formats import HEAD_BYTES, looks_like_image
from sortd.errors import ImageError
from sortd.events import Stamp
from sortd.layout import Area, Layout
from sortd.names import Reason, Why, rule_for_folder
from sortd.prototypes import Mode
from sortd.references import STRANGERS_FOLDER, ClassFolder, ReferencesAbsentError, class_folders
from sortd.watch.scan import scan_all

FEW = 4
"""With fewer references than this, each further one is worth several points of accuracy: see docs/decisions.md."""

FEW_STRANGERS = 8
"""So few examples of what belongs nowhere say next to nothing about the rest of the world."""

DECODING_SECONDS = 0.2
"""How long references are decoded whole; then only their headers are read, so that a check stays quick."""

File = tuple[str, Stamp]
Reader = Callable[[str], None]
"""Reads one image and raises ``ImageError`` where it cannot."""


def reference_findings(
    layout: Layout,
    mode: Mode,
    *,
    known: Callable[[Sequence[File]], Mapping[File, str]],
    decode: Reader,
    look: Reader,
    decoding_seconds: float = DECODING_SECONDS,
) -> Iterator[Finding]:
    """Check what stands in a dataset's ``Clases/``.

    Args:
        layout: the dataset.
        mode: how it decides: some modes need images.
        known: the content (hexadecimal sha256) of each file that sortd has read before.
        decode: reads a whole image.
        look: reads an image's header alone.
        decoding_seconds: how long whole images are decoded before headers have to do.
    """
    clases = layout.area(Area.CLASES)
    unreadable: list[OSError] = []
    try:
        folders, misnamed = class_folders(clases, report=unreadable.append)
    except ReferencesAbsentError as absent:
        yield error(Topic.REFERENCES, clases, str(absent), "give sortd the right to read it, or mount its disk")
        return
    for refusal in [*unreadable, *(one.description_refusal for one in folders if one.description_refusal)]:
        yield error(Topic.REFERENCES, refusal.filename, f"cannot be read: {refusal.strerror}", mends.to_read(refusal))
    yield from _name_findings(clases, folders, misnamed)
    yield from _left_out_findings(clases)
    contents = known([file for folder in folders for file in folder.files])
    # A note beside the images is no reference and does no harm.
    folders = [replace(one, files=tuple(f for f in one.files if f in contents or _is_image(f[0]))) for one in folders]
    yield from _reading_findings(clases, folders, contents, decode, look, decoding_seconds)
    yield from _count_findings(clases, folders, mode)
    yield from _twin_findings(clases, folders, contents)


def _name_findings(clases: Path, folders: Sequence[ClassFolder], misnamed: Sequence[str]) -> Iterator[Finding]:
    if misnamed:
        shown = named([printable(name) for name in misnamed])
        yield warning(Topic.REFERENCES, clases, f"holds folders whose names cannot be classes: {shown}", "rename them")
    blanks = [written_name(folder.label) for folder in folders if written_name(folder.label) != folder.label]
    if blanks:
        what = f"holds classes with blanks in their names that nobody sees, at an end or two in a row: {named(blanks)}"
        yield warning(Topic.REFERENCES, clases, what, "rename them; some file systems drop a blank at the end")
    alike = defaultdict(list)
    for folder in folders:
        alike[" ".join(unicodedata.normalize("NFC", folder.label).casefold().split())].append(folder.label)
    for labels in alike.values():
        if len(labels) > 1:
            what = f"holds classes whose names look the same: {named([written_name(label) for label in labels])}"
            yield warning(Topic.REFERENCES, clases, what, "rename or merge them; on other systems they are one folder")


def _left_out_findings(clases: Path) -> Iterator[Finding]:
    """Name what lies in the class folders and is not learnt: links, hidden files, what a program has not finished."""
    left: dict[Reason, list[tuple[str, Why]]] = defaultdict(list)
    for path, found in scan_all(str(clases), report=lambda _: None, rule_at_top=rule_for_folder):
        if isinstance(found, Why) and found.reason is not Reason.SYSTEM and Path(path).parent != clases:
            left[found.reason].append((path, found))
    for reason, files in left.items():
        shown = named([printable(str(Path(path).relative_to(clases))) for path, _ in sorted(files)])
        what = f"leaves {counted(len(files), 'entry')} out, not learnt ({reason.value.replace('_', ' ')}): {shown}"
        yield warning(Topic.REFERENCES, clases, what, files[0][1].message)


def _reading_findings(
    clases: Path,
    folders: Sequence[ClassFolder],
    contents: Mapping[File, str],
    decode: Reader,
    look: Reader,
    decoding_seconds: float,
) -> Iterator[Finding]:
    """Read every reference that was not read before, as thoroughly as the time allows."""
    files = [file for folder in folders for file in folder.files]
    fresh = [path for path, stamp in files if (path, stamp) not in contents]
    began, decoded = perf_counter(), 0
    for path in fresh:
        is_whole = perf_counter() - began < decoding_seconds
        decoded += is_whole
        try:
            (decode if is_whole else look)(path)
        except ImageError as refusal:
            what = f"is a reference that cannot be read: {refusal}"
            yield warning(Topic.REFERENCES, path, what, "replace or remove it")
        except OSError as refusal:
            yield error(Topic.REFERENCES, path, f"cannot be read: {refusal.strerror}", "mend its rights or its disk")
    parts = [
        f"{counted(len(files) - len(fresh), 'reference')} known to the cache" if len(fresh) < len(files) else "",
        f"{decoded:,} decoded" if decoded else "",
        f"of {len(fresh) - decoded:,} the headers read (--thorough decodes them too)" if decoded < len(fresh) else "",
    ]
    if files:
        yield note(Topic.REFERENCES, clases, ", ".join(part for part in parts if part))


def _count_findings(clases: Path, folders: Sequence[ClassFolder], mode: Mode) -> Iterator[Finding]:
    counts = {folder.label: len(folder.files) for folder in folders}
    strangers = counts.pop(STRANGERS_FOLDER, None)
    if strangers is not None and strangers < FEW_STRANGERS:
        what = (
            f"holds {counted(strangers, 'image')} of what belongs nowhere, which says little of the rest of the world"
        )
        yield warning(
            Topic.REFERENCES, clases / STRANGERS_FOLDER, what, f"add more ({FEW_STRANGERS} or many more) or remove it"
        )
    if not counts:
        mend = f"make a folder for each class in it, with images: {clases}/CLASS/"
        yield error(Topic.REFERENCES, clases, "holds no class, so nothing can be decided", mend)
        return
    if len(counts) == 1:
        what = f"holds one class only ({named(list(counts))}): there is nothing to tell it from"
        yield warning(
            Topic.REFERENCES, clases, what, "add a second class, or examples of what belongs nowhere in _none/"
        )
    empty = [label for label, count in counts.items() if count == 0]
    if empty and mode is Mode.TEXT:
        yield note(Topic.REFERENCES, clases, f"{counted(len(empty), 'class')} known by name alone: {named(empty)}")
    elif empty and mode is Mode.MIXED:
        what = f"{counted(len(empty), 'class')} without an image, known by name alone: {named(empty)}"
        yield warning(Topic.REFERENCES, clases, what, "add images; a name alone is a weak teacher")
    elif empty:
        what = (
            f"{counted(len(empty), 'class')} without an image; `mode: {mode.value}` files nothing there: {named(empty)}"
        )
        yield warning(
            Topic.REFERENCES, clases, what, "add images, or set `mode: mixed`, which knows classes by name too"
        )
    few = [f"{label} ({count})" for label, count in counts.items() if 0 < count < FEW]
    if few and mode is not Mode.TEXT:
        what = f"{counted(len(few), 'class')} with fewer than {FEW} images: {named(few)}"
        yield warning(
            Topic.REFERENCES, clases, what, "add some: from 4 to 16 an image each, the more unlike the better"
        )


def _twin_findings(clases: Path, folders: Sequence[ClassFolder], contents: Mapping[File, str]) -> Iterator[Finding]:
    """Find one image in two classes; only files of one size can be equal, so few have to be read."""
    by_size: dict[int, list[tuple[str, File]]] = defaultdict(list)
    for folder in folders:
        for file in folder.files:
            by_size[file[1].size].append((folder.label, file))
    for same_size in by_size.values():
        if len({label for label, _ in same_size}) < 2:  # noqa: PLR2004 -- within one class a twin does no harm
            continue
        by_content = defaultdict(list)
        for label, file in same_size:
            if (content := contents.get(file) or _content(file[0])) is not None:
                by_content[content].append((label, file[0]))
        for twins in by_content.values():
            labels = sorted({label for label, _ in twins})
            if len(labels) > 1:
                paths = named([printable(str(Path(path).relative_to(clases))) for _, path in twins])
                what = f"is a reference of {len(labels)} classes ({named(labels)}): {paths}"
                yield warning(Topic.REFERENCES, twins[0][1], what, "leave it in the class to which it belongs")


def _is_image(path: str) -> bool:
    """Tell whether a file is meant as an image, by its name or else by its content."""
    if looks_like_image(path, b""):
        return True
    try:
        with open(path, "rb") as file:
            return looks_like_image(path, file.read(HEAD_BYTES))
    except OSError:
        return True  # reading it says why not


def _content(path: str) -> str | None:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None  # its reading was reported
