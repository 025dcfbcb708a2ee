"""Check one dataset: its folders, references, calibration, journal and classifier.

The checks create a hidden test file in Images/ and in the marker, and remove it. Clases/ is only read. No check imports
torch.
"""

import os
import pwd
import stat
import tempfile
import time
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Final

from sortd import errors
from sortd.classify.evaluate import UNREAD_REMEDY, unread_names
from sortd.classify.prompts import written_name
from sortd.classify.proportions import estimated, out_of
from sortd.classify.prototypes import PrototypeSet
from sortd.commands.console import counted, printable
from sortd.commands.findings import Finding, Topic, error, note, warning
from sortd.commands.moves import journal_of
from sortd.commands.status import accuracy_comparison, promotable_model, serving_facts
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
from sortd.events import NO_CLASS, Preprocessing, Stamp, Writer
from sortd.files import sha256_of
from sortd.images.decode import DecodeLimits, check_header, decode_file
from sortd.images.formats import HEAD_BYTES, looks_like_image
from sortd.layout import JOURNAL_FILE, Area, Layout, Reason, Why, rule_for_folder
from sortd.moving.fs import CANNOT_RENAME, Folders, rename_new, writer_of
from sortd.store.cache import CACHE_FILE, Cache
from sortd.store.history import History
from sortd.watch.scan import scan_all

CLOCK_SECONDS = 5.0
"""Largest difference between this clock and the time of a new file; a file server's clock may differ by more."""

TARGETS = (Area.DATASET, Area.REVIEW, Area.REJECTED)
WRITTEN = (Area.IMAGES, *TARGETS)
READ_AND_ENTER, WRITE_AND_ENTER = os.R_OK | os.X_OK, os.W_OK | os.X_OK
TRIAL, CREATE = f".sortd-check-{os.getpid()}.part", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
Rename = Callable[[int, str, int, str], None]
FEW_REFERENCES = 4
"""Below this number each further reference adds several points of accuracy: see docs/decisions.md."""

FEW_STRANGERS = 8
NAMED_AT_MOST = 5
LOW_SHARE_FILED = 0.5
DECODING_SECONDS = 0.2
"""How long references are decoded whole; after that only headers are read, so that a check stays short."""

CHECKED_PIXELS = 224  # input size of most encoders

_File = tuple[str, Stamp]


# ---------------------------------------------------------------- folders and permissions


def folder_findings(_config: Config, layout: Layout) -> Iterator[Finding]:
    """Check the folders of one dataset, its marker, and the permissions that sortd needs."""
    for area in Area:
        folder = layout.area(area)
        if folder.is_symlink():
            advice = "replace it by a real folder; to keep it on another disk, mount that disk there"
            yield error(folder, "is a symbolic link; sortd moves files only below real folders", advice)
        elif folder.is_dir():
            yield from _permission_findings(folder, area)
        elif folder.exists():
            yield error(folder, "is no folder", "move it away")
        elif not os.access(layout.root, WRITE_AND_ENTER, effective_ids=True):
            yield error(folder, f"is missing and cannot be created in {layout.root}", "create it yourself")
    marker, lock = layout.marker, layout.marker / "lock"
    if marker.is_symlink():
        yield error(marker, "is a symbolic link: nothing is moved", "replace it by a folder")
    elif not layout.is_present:
        advice = f"sortd creates it when it starts; to create it now: sortd init {layout.root}"
        yield note(marker, "is missing; without it sortd assumes that the disk is not mounted", advice)
    elif problem := write_problem(marker):
        yield error(marker, f"cannot be written: {problem}", f"chown it to {user_name()}")
    if os.path.lexists(lock) and (lock.is_symlink() or not lock.is_file()):
        yield error(lock, "is no regular file: nothing is moved", "remove it; sortd creates a new one")


def class_folder_findings(_config: Config, layout: Layout) -> Iterator[Finding]:
    """Check the folders one level down: links, permissions, and folders of classes that no longer exist."""
    classes = {entry.name for entry in entries_of(layout.area(Area.CLASES))}
    for area in (Area.CLASES, Area.DATASET, Area.REVIEW, Area.IMAGES):
        for entry in entries_of(layout.area(area)):
            if rule_for_folder(entry.name) is not None:
                continue
            if entry.is_symlink() and os.path.isdir(entry.path) and area is not Area.IMAGES:
                effect = "it is no class" if area is Area.CLASES else "no file is moved through it"
                yield warning(entry.path, f"is a symbolic link, so {effect}", "replace it by a real folder")
            elif entry.is_dir(follow_symlinks=False):
                yield from _permission_findings(Path(entry.path), area)
                files = sum(one.is_file(follow_symlinks=False) for one in entries_of(Path(entry.path)))
                known = classes | {NO_CLASS}
                if area in {Area.DATASET, Area.REVIEW} and classes and entry.name not in known and files:
                    what = f"holds {counted(files, 'file')} of a class that Clases/ does not have (renamed or removed?)"
                    advice = f"rename it to the class's new name, or create {layout.area(Area.CLASES)}/{entry.name}"
                    yield note(entry.path, what, advice)


def _permission_findings(folder: Path, area: Area) -> Iterator[Finding]:
    is_written, status, user = area in WRITTEN, folder.stat(), user_name()
    if not os.access(folder, READ_AND_ENTER | (os.W_OK if is_written else 0), effective_ids=True):
        what = f"{user} may not {'read, write and enter' if is_written else 'read and enter'} it"
        if os.statvfs(folder).f_flag & os.ST_RDONLY:
            what = "its file system is mounted read-only"
        yield error(folder, what, f"chown or chmod it so that {user} may, or run sortd as its owner")
    elif is_written and status.st_mode & stat.S_ISVTX and os.geteuid() not in {0, status.st_uid}:
        what = "has the sticky bit: files of other users cannot be moved out of it"
        yield warning(folder, what, f"remove the sticky bit: chmod -t {folder}")


def entries_of(folder: Path) -> list["os.DirEntry[str]"]:
    """List a folder; empty if it cannot be listed, which another finding reports."""
    with suppress(OSError), os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)
    return []


def write_problem(folder: Path) -> str | None:
    """Create and remove a file in one of sortd's own folders; return why that failed."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as refusal:
        return refusal.strerror
    return None


def user_name() -> str:
    """Return the name of the effective user, or its number if it has none."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # a container's user need not have a name
        return f"user {os.geteuid()}"


def move_findings(_config: Config, layout: Layout, *, rename: Rename = rename_new) -> Iterator[Finding]:
    """Check with a test file whether moves from Images/ are renames, and what the file system reports of the file."""
    images = layout.area(Area.IMAGES)
    with Folders(layout.root) as folders:
        try:
            source = folders.open(Area.IMAGES)
            os.close(os.open(TRIAL, CREATE, 0o600, dir_fd=source))
        except OSError:
            return  # folder_findings reports it
        try:
            slow = [f"{area}/" for area in TARGETS if not _can_rename(folders, area, rename)]
            reports_writers = writer_of(os.fspath(images / TRIAL)) is not Writer.UNKNOWN
            ahead = os.stat(TRIAL, dir_fd=source).st_mtime - time.time()
        finally:
            with suppress(FileNotFoundError):
                os.unlink(TRIAL, dir_fd=source)
    if slow:
        what = f"a rename into {', '.join(slow)} is refused: moves are verified copies, slower and with twice the space"
        advice = "for renames, put both on one file system; in a systemd unit name one common ReadWritePaths="
        yield note(layout.root, what, advice)
    elif all(layout.area(area).is_dir() for area in TARGETS):
        yield note(layout.root, "moves are renames within one file system")
    if not reports_writers:
        yield note(images, "does not report open writers, so each file must stay unchanged for at least 5 s")
    if abs(ahead) > CLOCK_SECONDS:
        what = f"its file server's clock is {abs(ahead):.0f} s {'ahead' if ahead > 0 else 'behind'}"
        yield warning(images, what, "synchronise both clocks (NTP)", Topic.MACHINE)


def link_findings(config: Config, layout: Layout) -> Iterator[Finding]:
    """Check with a test file whether hard links from Images/ are possible, if the action of the dataset needs them."""
    if config.dataset(layout.name).action != "hardlink":
        return
    with suppress(OSError), Folders(layout.root) as folders:
        source = folders.open(Area.IMAGES)
        os.close(os.open(TRIAL, CREATE, 0o600, dir_fd=source))
        try:
            for area in (Area.DATASET, Area.REVIEW):
                try:
                    os.link(TRIAL, TRIAL, src_dir_fd=source, dst_dir_fd=(target := folders.open(area)))
                    os.unlink(TRIAL, dir_fd=target)
                except OSError as refusal:
                    what = f"a hard link from Images/ is impossible there: {refusal.strerror}"
                    yield error(layout.area(area), what, "set `action: copy` or `action: symlink`")
        finally:
            os.unlink(TRIAL, dir_fd=source)


def _can_rename(folders: Folders, area: Area, rename: Rename) -> bool:
    """Rename the test file into an area and back; return True also if permissions or the folder are missing."""
    source = folders.open(Area.IMAGES)
    try:
        target = folders.open(area)
        rename(source, TRIAL, target, TRIAL)
    except OSError as refusal:
        return refusal.errno not in CANNOT_RENAME
    try:
        rename(target, TRIAL, source, TRIAL)
    except OSError:
        os.unlink(TRIAL, dir_fd=target)
        raise
    return True


# ---------------------------------------------------------------- references


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
    with (
        suppress(JournalError),
        journal_of(config, layout).open() as history,
    ):  # another finding reports a damaged journal
        there = [label for label, path, _ in history.assigned() if os.path.isfile(layout.root / path)]
        return Counter(label for label in there if label is not None)
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
        yield warning(clases, f"holds folders whose names cannot be classes: {listed(misnamed)}", "rename them")
    if blanks := [written_name(label) for label in labels if written_name(label) != label]:
        what = f"holds class names with a blank at an end or two in a row: {listed(blanks)}"
        yield warning(clases, what, "rename them; some file systems remove a blank at the end")
    alike = defaultdict(list)
    for label in labels:
        alike[" ".join(unicodedata.normalize("NFC", label).casefold().split())].append(written_name(label))
    for same in (names for names in alike.values() if len(names) > 1):
        what = f"holds classes whose names look the same: {listed(same)}"
        yield warning(clases, what, "rename or merge them; on other systems they are one folder")


def _unused_findings(clases: Path) -> Iterator[Finding]:
    """Name the entries of class folders that are not used: links, hidden files, unfinished files."""
    unused: dict[Reason, list[tuple[str, str]]] = defaultdict(list)
    for path, found in scan_all(str(clases), report=lambda _: None, rule_at_top=rule_for_folder):
        if isinstance(found, Why) and found.reason is not Reason.SYSTEM and Path(path).parent != clases:
            unused[found.reason].append((os.path.relpath(path, clases), found.message))
    for reason, files in unused.items():
        shown, number = listed(sorted(path for path, _ in files)), counted(len(files), "entry")
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
        what = f"holds only one class ({listed(list(counts))}), so there is no other to compare with"
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
        yield severity(clases, f"{counted(len(empty), 'class')} {effect}: {listed(empty)}", advice)
    few = [f"{label} ({count})" for label, count in counts.items() if 0 < count < FEW_REFERENCES]
    if few and mode != "text":
        what = f"{counted(len(few), 'class')} with fewer than {FEW_REFERENCES} images: {listed(few)}"
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
            paths = listed([os.path.relpath(path, clases) for _, path in twins])
            what = f"is a reference of {len(labels)} classes ({listed(labels)}): {paths}"
            yield warning(twins[0][1], what, "keep it only in the class to which it belongs")


def _is_image(path: str) -> bool:
    """Tell whether a file is meant as an image, by its name or else by its content."""
    try:
        with open(path, "rb") as file:
            return looks_like_image(path, file.read(HEAD_BYTES))
    except OSError:
        return True  # _reading_findings reports it


def listed(names: Sequence[str]) -> str:
    """Return the first few names in printable form, and how many more there are."""
    more = len(names) - NAMED_AT_MOST
    return ", ".join(map(printable, names[:NAMED_AT_MOST])) + (f" and {more} more" if more > 0 else "")


# ---------------------------------------------------------------- calibration, journal and classifier


def stored_calibration_findings(config: Config, layout: Layout) -> Iterator[Finding]:
    """Report the calibration of the newest prototypes: those of a running sortd, or of ``sortd eval``."""
    served, evaluated = stored_prototypes(config, layout), evaluated_prototypes(config, layout)
    changed = None if served is None else changed_since(config, layout, served)
    if evaluated is not None and (served is None or changed is not None):
        since = changed_since(config, layout, evaluated, evaluated=True)
        if served is None or since is None:
            served, changed = evaluated, since
    yield from calibration_findings(layout, config.dataset(layout.name), served, changed=changed)
    if served is not None and changed is None:
        yield from name_findings(layout, served)


def name_findings(layout: Layout, prototypes: PrototypeSet) -> Iterator[Finding]:
    """Report class names that say nothing to the model."""
    unread = unread_names(prototypes)
    if unread is not None:
        yield warning(layout.area(Area.CLASES), unread, UNREAD_REMEDY)


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
    if facts.checked:
        followed = f"the threshold follows {counted(facts.checked, 'checked image')}, {facts.right_checked:,} right"
        yield note(clases, f"{by}: {followed}: {out_of(facts.right_checked, facts.checked)}")
    measured = f"{by}, measured on {counted(facts.held_out, 'reference')} held out in turn: "
    if not facts.held_out:
        what = f"{by}: no class has two different images, so its accuracy is not known"
        yield note(clases, what, "add references")
    elif prototypes.settings.abstain is None:
        yield note(clases, f"{measured}accuracy {estimated(facts.accuracy, facts.held_out)}; every image is filed")
    elif facts.filed_expected is not None:
        filed = f"{estimated(facts.filed_expected, facts.held_out, 'known images')} would be filed"
        precision = estimated(facts.precision_expected, facts.precision_judged)
        right = "" if facts.precision_expected is None else f", with a precision of {precision}"
        yield note(clases, f"{measured}{filed}{right}")
        if facts.filed_expected < LOW_SHARE_FILED:
            what = f"only {filed}, the others go to Review/"
            yield warning(clases, what, "add references (`sortd eval` names the classes), or lower `abstain.precision`")


def journal_findings(config: Config, layout: Layout) -> Iterator[Finding]:
    """Read a dataset's whole journal, and report whether the guard holds the dataset."""
    file = layout.state_folder(config.state_dir) / JOURNAL_FILE
    if not os.path.lexists(file):
        return
    with History.open(file) as history:
        history.verify()
        history.unfinished()
        history.held()
        reason = history.guard().reason
    if reason:
        what, advice = f"is held, so nothing in it is moved: {reason}", f"see `sortd eval`; sortd release {layout.root}"
        yield warning(layout.root, what, advice, Topic.CALIBRATION)


def classifier_findings(config: Config, layout: Layout) -> Iterator[Finding]:
    """Report which classifier would decide, its expected accuracy, and why a fine-tuned model is not used."""
    serving = serving_facts(config, layout)
    subject, prototypes = f"classifier: {serving['classifier']}", f"the prototypes decide {layout.name}"
    if serving["refusal"] is not None:
        advice = f"or use the prototypes from now on: sortd models demote --dataset {layout.name}"
        yield warning(subject, f"{prototypes}: {serving['refusal']}", advice)
    elif serving["deciding"] == "finetuned":
        expected = serving["expected"]
        what = f"{layout.name} is decided by the fine-tuned model in {serving['folder']} ({serving['model_id']})"
        if expected["filed"] is not None:
            what += f"; it would file {estimated(expected['filed'], expected['held_out'], 'held-out images')}"
        if expected["right"] is not None:
            what += f", with a precision of {estimated(expected['right'], expected['filed_held_out'])}"
        yield note(subject, what)
        for sentence in expected["notes"]:
            advice = "fine-tune with more images, or ask for less (`abstain` in config.yaml)"
            yield warning(layout.root, sentence, advice, Topic.CALIBRATION)
    elif serving["folder"] is not None:
        what = f"{prototypes}, although the model in {serving['folder']} was promoted"
        yield note(subject, what, "set `classifier: auto` to use it")
    elif (waiting := promotable_model(config, layout)) is not None:
        what = f"{prototypes}, and a fine-tuned model is better ({accuracy_comparison(waiting)})"
        yield note(subject, what, f"sortd models promote --dataset {layout.name}")


DATASET_CHECKS: Final[Mapping[Callable[[Config, Layout], Iterator[Finding]], Topic]] = {
    **dict.fromkeys((folder_findings, class_folder_findings), Topic.FOLDERS),
    move_findings: Topic.FILE_SYSTEM,
    link_findings: Topic.FILE_SYSTEM,
    journal_findings: Topic.PROCESS,
    classifier_findings: Topic.MODEL,
    stored_calibration_findings: Topic.CALIBRATION,
}
"""All checks with their topics, in order; ``reference_findings`` and ``label_findings`` are the last ones."""
