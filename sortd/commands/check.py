"""Check a configuration and its folders, disks, model and datasets, and yield the findings.

The checks create hidden test files, in Images/ and in sortd's own folders, and remove them. Clases/ is only read.
No check imports torch. ``check_references``, ``model_facts`` and ``promotion`` have the checks of what they are about.
"""

import difflib
import errno
import os
import pwd
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Final

from sortd import errors
from sortd.commands.check_references import (
    DECODING_SECONDS,
    Finding,
    Topic,
    error,
    note,
    reference_findings,
    stored_calibration_findings,
    warning,
)
from sortd.commands.console import counted, megabytes
from sortd.commands.groups import label_findings
from sortd.commands.model_facts import model_findings
from sortd.commands.promotion import classifier_findings
from sortd.config import Config, read_config
from sortd.errors import ConfigError, JournalError, LayoutError, StartupError
from sortd.events import Writer
from sortd.files import identity_of
from sortd.images.decode import load_decoders
from sortd.layout import JOURNAL_FILE, Area, Layout, enclosing_dataset, find_datasets
from sortd.moving.fs import CANNOT_RENAME, Folders, rename_new, writer_of
from sortd.names import rule_for_folder
from sortd.status import lock_holder, read_status
from sortd.store.history import History
from sortd.watch import inotify

LITTLE_ROOM_BYTES = 1_000_000_000
NO_ROOM_BYTES = 50_000_000
LITTLE_ROOM_SHARE = 0.02
LEAST_INODES = 1000
CLOCK_SECONDS = 5.0
"""Largest difference between this clock and the time of a new file; a file server's clock may differ by more."""

EARLIEST_SECONDS = 1_735_689_600.0
"""2025-01-01: a clock that shows an earlier time is wrong."""

TARGETS = (Area.DATASET, Area.REVIEW, Area.REJECTED)
WRITTEN = (Area.IMAGES, *TARGETS)
READ_AND_ENTER, WRITE_AND_ENTER = os.R_OK | os.X_OK, os.W_OK | os.X_OK
TRIAL, CREATE = f".sortd-check-{os.getpid()}.part", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC

Rename = Callable[[int, str, int, str], None]


def check_all(
    path: Path | None, environment: Mapping[str, str], *, decoding_seconds: float = DECODING_SECONDS
) -> Iterator[Finding]:
    """Yield the mistakes of a configuration or, if it is valid, the findings of every check.

    An error of the system, the journal or the status file becomes a finding and stops no other check.
    """
    try:
        config = read_config(path, environment)
    except ConfigError as mistakes:
        yield from (error("configuration", line, "", Topic.CONFIGURATION) for line in str(mistakes).splitlines())
        return
    try:
        layouts = find_datasets(config.root)
    except LayoutError:
        layouts = []  # root_findings reports why
    checks = [(topic, check(config, layouts)) for check, topic in SITE_CHECKS.items()]
    for layout in layouts:
        checks += [(topic, check(config, layout)) for check, topic in DATASET_CHECKS.items()]
        checks.append((Topic.REFERENCES, reference_findings(config, layout, decoding_seconds=decoding_seconds)))
        checks.append((Topic.REFERENCES, label_findings(config, layout)))
    for topic, found in checks:
        try:
            yield from (replace(one, topic=one.topic or topic) for one in found)
        except (StartupError, JournalError) as refusal:
            yield error(config.state_dir, str(refusal), "", topic)
        except OSError as refusal:
            advice = errors.advice_for(refusal)
            if isinstance(refusal, PermissionError):
                advice = "correct its permissions, or check as the user that runs sortd: sudo -u USER sortd check"
            what = f"cannot be checked: {refusal.strerror or refusal}"
            yield error(refusal.filename, what, advice, Topic.FOLDERS)


# ---------------------------------------------------------------- folders and permissions


def root_findings(config: Config, layouts: Sequence[Layout]) -> Iterator[Finding]:
    """Check the folder that holds the datasets, and the dataset names in the configuration."""
    root, names = config.root, [layout.name for layout in layouts]
    for name in config.datasets.keys() - set(names):
        near = difflib.get_close_matches(name, names, n=1)
        advice = f"did you mean {near[0]}?" if near else f"create it (sortd init {root}/{name}) or remove the key"
        yield warning(f"datasets.{name}", f"{root} holds no dataset of that name", advice, Topic.CONFIGURATION)
    if not root.is_dir():
        what = "is no folder" if root.exists() else "is missing"
        yield error(root, what, "create it, mount its disk, or set `root` to the folder of your datasets")
        return
    if not os.access(root, READ_AND_ENTER, effective_ids=True):
        yield error(root, "cannot be listed", f"give {_user()} permission to read and enter it")
        return
    is_dataset, around = Layout(root).is_dataset, enclosing_dataset(root)
    if is_dataset:
        yield error(root, "is itself a dataset; the root is the folder above it", f"set `root` to {root.parent}")
    if around is not None:
        yield error(root, f"lies inside the dataset {around}", f"set `root` to {around.parent}, or outside it")
    if not layouts and not is_dataset and around is None:
        yield warning(root, "has no dataset, that is, no folder with a Clases/", f"create one: sortd init {root}/NAME")
    for entry in os.scandir(root):
        if entry.is_symlink() and Layout(Path(entry.path)).is_dataset:
            advice = "move the folder itself below the root, or mount it there (mount --bind)"
            yield warning(entry.path, "is a symbolic link, so it is not used as a dataset", advice)


def own_folder_findings(config: Config, layouts: Sequence[Layout]) -> Iterator[Finding]:
    """Check that sortd can write its own folders, and that none of them lies in a dataset."""
    folders = {"state_dir": config.state_dir, "cache_dir": config.cache_dir}
    for key, own in folders.items():
        for area in (layout.area(area) for layout in layouts for area in Area):
            if Path(os.path.realpath(area)) in Path(os.path.realpath(own)).parents:
                yield error(own, f"`{key}` lies inside {area}", f"set `{key}` to a folder outside every dataset")
    if config.metrics.textfile is not None:
        folders["metrics.textfile"] = config.metrics.textfile.parent
    for key, own in folders.items():
        above = next(parent for parent in own.parents if parent.exists())
        if own.is_dir():
            if problem := _write_problem(own):
                yield error(own, f"`{key}` cannot be written: {problem}", f"chown it to {_user()}")
        elif own.exists() or not above.is_dir():
            yield error(own, f"`{key}` cannot be a folder: a file is in the way", f"set `{key}` to another folder")
        elif not os.access(above, WRITE_AND_ENTER, effective_ids=True):
            advice = f"create it and chown it to {_user()}, or set `{key}` to another folder"
            yield error(own, f"`{key}` is missing and cannot be created in {above}", advice)


def overlap_findings(_config: Config, layouts: Sequence[Layout]) -> Iterator[Finding]:
    """Check that no folder belongs to two datasets or areas."""
    areas = [layout.area(area) for layout in layouts for area in Area]
    real = {area: Path(os.path.realpath(area)) for area in areas}
    for (folder, inner), (_, outer) in permutations(real.items(), 2):
        if outer in inner.parents:
            yield error(folder, f"leads to {inner}, which lies in {outer}", "give each dataset folders of its own")
    first: dict[tuple[int, int] | None, Path] = {}
    for folder in [*(layout.root for layout in layouts), *areas]:
        identity = identity_of(folder)  # a bind mount gives one folder two names
        if identity is not None and (known := first.setdefault(identity, folder)) != folder:
            yield error(folder, f"is the same folder as {known}", "unmount or move one of them")
    for layout in layouts:
        for entry in [*_entries(layout.area(Area.IMAGES)), *_entries(layout.area(Area.DATASET))]:
            if entry.is_dir(follow_symlinks=False) and Layout(Path(entry.path)).is_dataset:
                what = f"looks like a dataset but lies in {os.path.dirname(entry.path)}"
                yield warning(entry.path, what, f"if it is one, move it next to {layout.root}")


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
    elif problem := _write_problem(marker):
        yield error(marker, f"cannot be written: {problem}", f"chown it to {_user()}")
    if os.path.lexists(lock) and (lock.is_symlink() or not lock.is_file()):
        yield error(lock, "is no regular file: nothing is moved", "remove it; sortd creates a new one")


def class_folder_findings(_config: Config, layout: Layout) -> Iterator[Finding]:
    """Check the folders one level down: links, permissions, and folders of classes that no longer exist."""
    classes = {entry.name for entry in _entries(layout.area(Area.CLASES))}
    for area in (Area.CLASES, Area.DATASET, Area.REVIEW, Area.IMAGES):
        for entry in _entries(layout.area(area)):
            if rule_for_folder(entry.name) is not None:
                continue
            if entry.is_symlink() and os.path.isdir(entry.path) and area is not Area.IMAGES:
                effect = "it is no class" if area is Area.CLASES else "no file is moved through it"
                yield warning(entry.path, f"is a symbolic link, so {effect}", "replace it by a real folder")
            elif entry.is_dir(follow_symlinks=False):
                yield from _permission_findings(Path(entry.path), area)
                files = sum(one.is_file(follow_symlinks=False) for one in _entries(Path(entry.path)))
                if area in {Area.DATASET, Area.REVIEW} and classes and entry.name not in classes and files:
                    what = f"holds {counted(files, 'file')} of a class that Clases/ does not have (renamed or removed?)"
                    advice = f"rename it to the class's new name, or create {layout.area(Area.CLASES)}/{entry.name}"
                    yield note(entry.path, what, advice)


def _permission_findings(folder: Path, area: Area) -> Iterator[Finding]:
    is_written, status, user = area in WRITTEN, folder.stat(), _user()
    if not os.access(folder, READ_AND_ENTER | (os.W_OK if is_written else 0), effective_ids=True):
        what = f"{user} may not {'read, write and enter' if is_written else 'read and enter'} it"
        if os.statvfs(folder).f_flag & os.ST_RDONLY:
            what = "its file system is mounted read-only"
        yield error(folder, what, f"chown or chmod it so that {user} may, or run sortd as its owner")
    elif is_written and status.st_mode & stat.S_ISVTX and os.geteuid() not in {0, status.st_uid}:
        what = "has the sticky bit: files of other users cannot be moved out of it"
        yield warning(folder, what, f"remove the sticky bit: chmod -t {folder}")


def _entries(folder: Path) -> list["os.DirEntry[str]"]:
    """List a folder; empty if it cannot be listed, which another finding reports."""
    with suppress(OSError), os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)
    return []


def _write_problem(folder: Path) -> str | None:
    """Create and remove a file in one of sortd's own folders; return why that failed."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as refusal:
        return refusal.strerror
    return None


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # a container's user need not have a name
        return f"user {os.geteuid()}"


# ---------------------------------------------------------------- disks, clock, watching


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


def room_findings(config: Config, layouts: Sequence[Layout]) -> Iterator[Finding]:
    """Check the free space, once per file system; for a missing folder, that of the folder above it."""
    kept = {config.cache_dir: "the cache", config.state_dir: "the journal", **{one.root: "images" for one in layouts}}
    by_device = {}
    for folder, what in kept.items():
        there = next(place for place in (folder, *folder.parents) if place.exists())
        by_device[there.stat().st_dev] = there, what
    for there, what in by_device.values():
        facts = os.statvfs(there)
        free, whole = facts.f_bavail * facts.f_frsize, facts.f_blocks * facts.f_frsize
        if free < max(LITTLE_ROOM_BYTES, LITTLE_ROOM_SHARE * whole):
            found = error if free < NO_ROOM_BYTES else warning
            yield found(there, f"its disk has only {megabytes(free)} left for {what}", "free some space")
        if facts.f_files and facts.f_favail < LEAST_INODES:  # btrfs reports 0 files
            yield warning(there, f"its disk has only {facts.f_favail} inodes left", "remove small files")


def machine_findings(
    _config: Config, _layouts: Sequence[Layout], *, clock: Callable[[], float] = time.time
) -> Iterator[Finding]:
    """Check the clock, which dates the history, and the decoder of every image format."""
    if clock() < EARLIEST_SECONDS:
        what = f"says {time.strftime('%Y-%m-%d', time.gmtime(clock()))}: history and undo by time would be wrong"
        yield warning("clock", what, "set it (timedatectl)")
    for missing in load_decoders():
        what, _, advice = missing.partition("; ")
        yield error("decoding", what, advice)


def watching_findings(
    config: Config, layouts: Sequence[Layout], *, granted: inotify.Limits | None = None
) -> Iterator[Finding]:
    """Check whether changes can be watched or must be polled, and whether the kernel allows enough watches."""
    granted = granted or inotify.limits()
    watched = []
    for layout in layouts:
        kind = inotify.is_blind(os.fspath(layout.root))
        blind = f"lies on {kind}, where changes by other machines raise no event" if kind else ""
        if blind and config.polling == "never":
            yield warning(layout.root, f"{blind}, and polling is off", "set `polling: auto`")
        elif blind or config.polling == "always":
            yield note(layout.root, f"is polled: {blind or '`polling: always`'}")
        else:
            watched.append(layout)
    folders, most = sum(_count_folders(layout) for layout in watched), granted.max_user_watches
    if most is not None and folders > most // 2:
        problem = inotify.advice(OSError(errno.ENOSPC, ""), folders=folders, granted=granted)
        what, advice = f"{counted(folders, 'folder')} are to be watched; {problem}", "or set `polling: always`"
        yield (error if folders > most else warning)("fs.inotify.max_user_watches", what, advice)
    if watched and granted.max_user_instances is not None and len(watched) + 2 > granted.max_user_instances:
        problem = inotify.advice(OSError(errno.EMFILE, ""), granted=granted)
        yield error("fs.inotify.max_user_instances", problem)


def _count_folders(layout: Layout) -> int:
    """Count the folders that would be watched; Dataset/, Review/ and Rejected/ are one level deep."""
    deep = sum(1 for area in (Area.CLASES, Area.IMAGES) for _ in os.walk(layout.area(area)))
    below = [entry for area in TARGETS for entry in _entries(layout.area(area))]
    return deep + len(TARGETS) + sum(entry.is_dir(follow_symlinks=False) for entry in below)


# ---------------------------------------------------------------- running processes and the journal


def process_findings(config: Config, layouts: Sequence[Layout]) -> Iterator[Finding]:
    """Report a sortd that runs already, with this state directory or another, and the datasets that it holds."""
    status = read_status(config.state_dir) or {"alive": False}
    own = status["pid"] if status["alive"] else None
    if own is not None:
        yield note(config.state_dir, f"sortd runs already (pid {own}); see `sortd status`")
        for name, facts in status.get("datasets", {}).items():
            if facts.get("held_since"):
                what = f"is held, so nothing in it is moved: {facts['problem']}"
                yield error(name, what, "correct this; sortd then continues without a restart")
    for layout in layouts:
        holder = lock_holder(layout.marker / "lock")
        if holder is not None and holder != own:
            what = f"is in use by another sortd (pid {holder}) with another state directory"
            advice = f"stop that process, or use its configuration; {layout.marker}/state names its folder"
            yield warning(layout.root, what, advice)
    if os.geteuid() == 0 and {layout.root.stat().st_uid for layout in layouts} - {0}:
        what = "this check ran as root, whom no permission restricts; its findings on permissions hold for root only"
        yield note("user", what, "check as the user that runs sortd: sudo -u USER sortd check")


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


SITE_CHECKS: Final[Mapping[Callable[[Config, Sequence[Layout]], Iterator[Finding]], Topic]] = {
    **dict.fromkeys((root_findings, own_folder_findings, overlap_findings), Topic.FOLDERS),
    process_findings: Topic.PROCESS,
    lambda config, _layouts: model_findings(config): Topic.MODEL,
    watching_findings: Topic.WATCHING,
    **dict.fromkeys((machine_findings, room_findings), Topic.MACHINE),
}
DATASET_CHECKS: Final[Mapping[Callable[[Config, Layout], Iterator[Finding]], Topic]] = {
    **dict.fromkeys((folder_findings, class_folder_findings), Topic.FOLDERS),
    move_findings: Topic.FILE_SYSTEM,
    journal_findings: Topic.PROCESS,
    classifier_findings: Topic.MODEL,
    stored_calibration_findings: Topic.CALIBRATION,
}
"""All checks with their topics, in order; ``reference_findings`` and ``label_findings`` are the last ones."""
