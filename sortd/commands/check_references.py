"""Check a dataset's references, what they can honour of the settings, and which classifier decides by them."""

import hashlib
import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter

from sortd import errors
from sortd.classify.prompts import written_name
from sortd.classify.prototypes import PrototypeSet
from sortd.commands.console import counted, printable
from sortd.commands.finding import Finding, Topic, error, note, warning
from sortd.commands.promotion import accuracy_comparison, promotable_model, serving_facts
from sortd.config import Config, DatasetConfig
from sortd.daemon.references import STRANGERS_FOLDER, ClassFolder, ReferencesAbsentError, class_folders
from sortd.daemon.stored_prototypes import (
    SETTINGS,
    changed_since,
    evaluated_prototypes,
    settings_differ,
    stored_prototypes,
)
from sortd.errors import ImageError
from sortd.events import Preprocessing, Stamp
from sortd.images.decode import DecodeLimits, check_header, decode_file
from sortd.images.formats import HEAD_BYTES, looks_like_image
from sortd.layout import Area, Layout
from sortd.names import Reason, Why, rule_for_folder
from sortd.store.cache import Cache
from sortd.watch.scan import scan_all

FEW_REFERENCES = 4
"""With fewer references than this, each further one is worth several points of accuracy: see docs/decisions.md."""

FEW_STRANGERS = 8
NAMED_AT_MOST = 5
LOW_SHARE_FILED = 0.5

DECODING_SECONDS = 0.2
"""How long references are decoded whole; then only their headers are read, so that a check stays quick."""

CHECKED_PIXELS = 224
"""What most encoders see: references are decoded as far as it takes to come to this size."""

CACHE_FILE = "embeddings.sqlite"

_File = tuple[str, Stamp]


def reference_findings(
    config: Config, layout: Layout, *, decoding_seconds: float = DECODING_SECONDS
) -> Iterator[Finding]:
    """Check what stands in a dataset's ``Clases/``; whole images are decoded for ``decoding_seconds``, then headers."""
    clases = layout.area(Area.CLASES)
    unreadable: list[OSError] = []
    try:
        folders, misnamed = class_folders(clases, report=unreadable.append)
    except ReferencesAbsentError as absent:
        yield error(Topic.REFERENCES, clases, str(absent), "give sortd the right to read it, or mount its disk")
        return
    for refusal in [*unreadable, *(one.description_refusal for one in folders if one.description_refusal)]:
        yield error(
            Topic.REFERENCES, refusal.filename, f"cannot be read: {refusal.strerror}", errors.advice_for(refusal)
        )
    yield from _name_findings(clases, [folder.label for folder in folders], misnamed)
    yield from _left_out_findings(clases)
    contents = _known_contents(config, [file for folder in folders for file in folder.files])
    # A note beside the images is no reference and does no harm.
    folders = [replace(one, files=tuple(f for f in one.files if f in contents or _is_image(f[0]))) for one in folders]
    files = [file for folder in folders for file in folder.files]
    yield from _reading_findings(config, clases, files, contents, decoding_seconds)
    yield from _count_findings(clases, {one.label: len(one.files) for one in folders}, config.dataset(layout.name).mode)
    yield from _twin_findings(clases, folders, contents)


def _known_contents(config: Config, files: Sequence[_File]) -> Mapping[_File, str]:
    """Return the content (hexadecimal sha256) of the files that were read before; no cache is made for it."""
    file = config.cache_dir / CACHE_FILE
    if not os.path.isfile(file):  # False too where it may not be looked at, which another finding says
        return {}
    with Cache(file, report=lambda _: None) as cache:
        return cache.contents(files)


def _name_findings(clases: Path, labels: Sequence[str], misnamed: Sequence[str]) -> Iterator[Finding]:
    if misnamed:
        shown = _named([printable(name) for name in misnamed])
        yield warning(Topic.REFERENCES, clases, f"holds folders whose names cannot be classes: {shown}", "rename them")
    blanks = [written_name(label) for label in labels if written_name(label) != label]
    if blanks:
        what = f"holds classes with blanks in their names that nobody sees, at an end or two in a row: {_named(blanks)}"
        yield warning(Topic.REFERENCES, clases, what, "rename them; some file systems drop a blank at the end")
    alike = defaultdict(list)
    for label in labels:
        alike[" ".join(unicodedata.normalize("NFC", label).casefold().split())].append(written_name(label))
    for same in alike.values():
        if len(same) > 1:
            what = f"holds classes whose names look the same: {_named(same)}"
            yield warning(Topic.REFERENCES, clases, what, "rename or merge them; on other systems they are one folder")


def _left_out_findings(clases: Path) -> Iterator[Finding]:
    """Name what lies in the class folders and is not learnt: links, hidden files, what a program has not finished."""
    left: dict[Reason, list[tuple[str, Why]]] = defaultdict(list)
    for path, found in scan_all(str(clases), report=lambda _: None, rule_at_top=rule_for_folder):
        if isinstance(found, Why) and found.reason is not Reason.SYSTEM and Path(path).parent != clases:
            left[found.reason].append((path, found))
    for reason, files in left.items():
        shown = _named([printable(str(Path(path).relative_to(clases))) for path, _ in sorted(files)])
        what = f"leaves {counted(len(files), 'entry')} out, not learnt ({reason.value.replace('_', ' ')}): {shown}"
        yield warning(Topic.REFERENCES, clases, what, files[0][1].message)


def _reading_findings(
    config: Config, clases: Path, files: Sequence[_File], contents: Mapping[_File, str], decoding_seconds: float
) -> Iterator[Finding]:
    """Read every reference that was not read before, as thoroughly as the time allows."""
    allowed = config.decoding
    limits = DecodeLimits(max_pixels=allowed.max_pixels, max_side=allowed.max_side_pixels, max_bytes=allowed.max_bytes)
    seen = Preprocessing(shortest_edge=CHECKED_PIXELS, crop_height=CHECKED_PIXELS, crop_width=CHECKED_PIXELS)
    fresh = [path for path, mark in files if (path, mark) not in contents]
    began, decoded = perf_counter(), 0
    for path in fresh:
        try:
            if perf_counter() - began < decoding_seconds:
                decoded += 1
                decode_file(path, seen, limits)
            else:
                check_header(path, limits)
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


def _count_findings(clases: Path, counts: dict[str, int], mode: str) -> Iterator[Finding]:
    strangers = counts.pop(STRANGERS_FOLDER, FEW_STRANGERS)
    if strangers < FEW_STRANGERS:
        what = f"holds {counted(strangers, 'image')} of what belongs to no class, which is too few to learn from"
        mend = f"add at least {FEW_STRANGERS - strangers} more, better many more, or remove it"
        yield warning(Topic.REFERENCES, clases / STRANGERS_FOLDER, what, mend)
    if not counts:
        mend = f"make a folder for each class in it, with images: {clases}/CLASS/"
        yield error(Topic.REFERENCES, clases, "holds no class, so nothing can be decided", mend)
        return
    if len(counts) == 1:
        what = f"holds one class only ({_named(list(counts))}): there is nothing to tell it from"
        mend = "add a second class, or examples of what belongs to no class in _none/"
        yield warning(Topic.REFERENCES, clases, what, mend)
    if empty := [label for label, count in counts.items() if count == 0]:
        tell, effect, mend = {
            "text": (note, "known by name alone", ""),
            "mixed": (warning, "without an image, known by name alone", "add images; a name alone says little"),
        }.get(mode) or (
            warning,
            f"without an image; `mode: {mode}` files nothing there",
            "add images, or set `mode: mixed`, which knows classes by name too",
        )
        yield tell(Topic.REFERENCES, clases, f"{counted(len(empty), 'class')} {effect}: {_named(empty)}", mend)
    few = [f"{label} ({count})" for label, count in counts.items() if 0 < count < FEW_REFERENCES]
    if few and mode != "text":
        what = f"{counted(len(few), 'class')} with fewer than {FEW_REFERENCES} images: {_named(few)}"
        yield warning(
            Topic.REFERENCES, clases, what, f"add at least {FEW_REFERENCES} varied images per class, ideally 16"
        )


def _twin_findings(clases: Path, folders: Sequence[ClassFolder], contents: Mapping[_File, str]) -> Iterator[Finding]:
    """Find one image in two classes; only files of one size can be equal, so few have to be read."""
    by_size: dict[int, list[tuple[str, _File]]] = defaultdict(list)
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
                paths = _named([printable(str(Path(path).relative_to(clases))) for _, path in twins])
                what = f"is a reference of {len(labels)} classes ({_named(labels)}): {paths}"
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


def _named(names: Sequence[str]) -> str:
    """Return the first few of some names, and how many more there are."""
    more = len(names) - NAMED_AT_MOST
    return ", ".join(names[:NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")


# ---------------------------------------------------------------- what the references can honour, and who decides


def stored_calibration_findings(config: Config, layout: Layout) -> Iterator[Finding]:
    """Tell what was found out when the dataset was learnt last, by a sortd that serves or by ``sortd eval``."""
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
    """Tell what the library can honour of the settings, by the prototypes that were learnt last, if any.

    ``changed`` names what has changed since, so that their calibration no longer holds.
    """
    to_learn = "sortd eval tells it now; a sortd that runs, or starts, learns it by itself"
    if prototypes is None:
        what = "was not learnt yet, so what its references can honour is not known"
        yield note(Topic.CALIBRATION, layout.root, what, to_learn)
        return
    facts, clases = prototypes.calibration, layout.area(Area.CLASES)
    by = f"generation {prototypes.generation}" if prototypes.generation else "the last `sortd eval`"
    if changed is None and settings_differ(config, prototypes):
        changed = SETTINGS
    if changed is not None:
        what = f"the {changed} have changed since {by}, so what can be honoured is not known"
        yield note(Topic.CALIBRATION, layout.root, what, to_learn)
        return
    for sentence in facts.notes:
        yield warning(Topic.CALIBRATION, clases, sentence, "add references, or ask for less (`abstain` in config.yaml)")
    made = f"{by}, judged on {counted(facts.held_out, 'reference')} left out in turn: "
    if not facts.held_out:
        what = f"{by}: no class has two images that differ, so its accuracy is not known"
        yield note(Topic.CALIBRATION, clases, what, "add references")
    elif prototypes.settings.abstain is None:
        yield note(Topic.CALIBRATION, clases, f"{made}{facts.accuracy or 0.0:.1%} are right; every image is filed")
    elif facts.filed_expected is not None:
        right = "" if facts.precision_expected is None else f", {facts.precision_expected:.1%} of them right"
        yield note(Topic.CALIBRATION, clases, f"{made}{facts.filed_expected:.0%} of known images would be filed{right}")
        if facts.filed_expected < LOW_SHARE_FILED:
            what = f"only {facts.filed_expected:.0%} of known images would be filed, the others go to Review/"
            mend = "add references (sortd eval says of which classes), or lower `abstain.precision`"
            yield warning(Topic.CALIBRATION, clases, what, mend)


def classifier_findings(config: Config, layout: Layout) -> Iterator[Finding]:
    """Tell who would decide a dataset, what is expected of it, and why a fine-tuned model that is wanted may not."""
    serving = serving_facts(config, layout)
    subject, prototypes = f"classifier: {serving['classifier']}", f"the prototypes decide {layout.name}"
    if serving["refusal"] is not None:
        mend = f"or let the prototypes decide for good: sortd models demote --dataset {layout.name}"
        yield warning(Topic.MODEL, subject, f"{prototypes}: {serving['refusal']}", mend)
    elif serving["deciding"] == "finetuned":
        what = f"{layout.name} is decided by the fine-tuned model in {serving['folder']} ({serving['model_id']})"
        expected = serving["expected"]
        if expected["filed"] is not None:
            what += f"; of {counted(expected['held_out'], 'image')} held out it would file {expected['filed']:.0%}"
        if expected["right"] is not None:
            what += f", {expected['right']:.1%} of them right"
        yield note(Topic.MODEL, subject, what)
        for sentence in expected["notes"]:
            yield warning(Topic.CALIBRATION, layout.root, sentence, "fine-tune with more images, or ask for less")
    elif serving["folder"] is not None:
        what = f"{prototypes}, though the model in {serving['folder']} was promoted"
        yield note(Topic.MODEL, subject, what, "set `classifier: auto` to let it decide")
    elif (waiting := promotable_model(config, layout)) is not None:
        what = f"{prototypes}, and a fine-tuned model is stronger ({accuracy_comparison(waiting)})"
        yield note(Topic.MODEL, subject, what, f"sortd models promote --dataset {layout.name}")
