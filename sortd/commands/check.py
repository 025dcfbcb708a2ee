"""Check a configuration, its folders, disks, model and datasets before sortd runs, and return what was found.

Only hidden trial files are made, in Images/ and in folders of sortd's own, and removed again. Clases/ is only read.
Nothing here imports torch. ``check_references`` has the checks of the references and of what decides by them.
"""

import difflib
import errno
import os
import pwd
import re
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import permutations
from pathlib import Path
from typing import Final

from sortd import errors
from sortd.commands.check_references import (
    DECODING_SECONDS,
    classifier_findings,
    reference_findings,
    stored_calibration_findings,
)
from sortd.commands.console import counted, megabytes
from sortd.commands.finding import Finding, Topic, error, note, warning
from sortd.commands.model_facts import backend_findings
from sortd.config import Config, read_config
from sortd.encoder import models
from sortd.encoder.models import STRONGER
from sortd.errors import ConfigError, JournalError, LayoutError, ModelError, StartupError
from sortd.events import Writer
from sortd.images.decode import load_decoders
from sortd.layout import JOURNAL_FILE, Area, Layout, enclosing_dataset, find_datasets
from sortd.moving.fs import CANNOT_RENAME, Folders, rename_new, writer_of
from sortd.names import rule_for_folder
from sortd.status import read_status
from sortd.store.history import History
from sortd.watch import inotify

LITTLE_ROOM_BYTES = 1_000_000_000
NO_ROOM_BYTES = 50_000_000
LITTLE_ROOM_SHARE = 0.02
LEAST_INODES = 1000
CLOCK_SECONDS = 5.0
"""A file made now whose time differs by more has its time from another machine's clock."""

EARLIEST_SECONDS = 1_735_689_600.0
"""2025-01-01: a clock that shows an earlier time is wrong."""

WRITTEN = (Area.IMAGES, Area.DATASET, Area.REVIEW, Area.REJECTED)
TARGETS = (Area.DATASET, Area.REVIEW, Area.REJECTED)
READ_AND_ENTER = os.R_OK | os.X_OK

Rename = Callable[[int, str, int, str], None]


def check_all(path: Path | None, environment: Mapping[str, str], *, thorough: bool = False) -> Iterator[Finding]:
    """Yield the mistakes of a configuration, or what is found about all that a valid one points at."""
    try:
        config = read_config(path, environment)
    except ConfigError as mistakes:
        yield from (error(Topic.CONFIGURATION, "configuration", line) for line in str(mistakes).splitlines())
        return
    yield from site_findings(config, decoding_seconds=float("inf") if thorough else DECODING_SECONDS)


def site_findings(config: Config, *, decoding_seconds: float = DECODING_SECONDS) -> Iterator[Finding]:
    """Yield what each check finds; a refusal of the system is one more finding and stops no other check."""
    try:
        layouts = find_datasets(config.root)
    except LayoutError:
        layouts = []  # root_findings says why
    checks = [check(config, layouts) for check in SITE_CHECKS]
    for layout in layouts:
        checks += [check(config, layout) for check in DATASET_CHECKS]
        checks.append(reference_findings(config, layout, decoding_seconds=decoding_seconds))
    for found in checks:
        try:
            yield from found
        except OSError as refusal:
            mend = errors.advice_for(refusal)
            if isinstance(refusal, PermissionError):
                mend = "mend its rights, or check as the user that sortd runs as: sudo -u USER sortd check"
            what = f"cannot be looked at: {refusal.strerror or refusal}"
            yield error(Topic.FOLDERS, refusal.filename, what, mend)


# ---------------------------------------------------------------- folders and rights


def root_findings(config: Config, layouts: Sequence[Layout]) -> Iterator[Finding]:
    """Check the folder that holds the datasets, and the names that the configuration expects in it."""
    root = config.root
    there = [layout.name for layout in layouts]
    for name in config.datasets.keys() - set(there):
        near = difflib.get_close_matches(name, there, n=1)
        mend = f"did you mean {near[0]}?" if near else f"make it (sortd init {root}/{name}) or take it out"
        yield warning(Topic.CONFIGURATION, f"datasets.{name}", f"there is no dataset of that name in {root}", mend)
    if not root.is_dir():
        what = "is there but is no folder" if root.exists() else "is missing"
        yield error(Topic.FOLDERS, root, what, "make it, mount its disk, or set `root` to the folder of your datasets")
        return
    if not os.access(root, READ_AND_ENTER, effective_ids=True):
        yield error(Topic.FOLDERS, root, "cannot be listed", f"give {_user()} the rights to read and enter it")
        return
    is_dataset, around = Layout(root).is_dataset, enclosing_dataset(root)
    if is_dataset:
        what = "is itself a dataset; the root is the folder above the datasets"
        yield error(Topic.FOLDERS, root, what, f"set `root` to {root.parent}")
    if around is not None:
        mend = f"set `root` to {around.parent}, or to a folder outside of it"
        yield error(Topic.FOLDERS, root, f"lies inside the dataset {around}", mend)
    if not layouts and not is_dataset and around is None:
        what = "holds no dataset, which is a folder with a Clases/ in it"
        yield warning(Topic.FOLDERS, root, what, f"make one: sortd init {root}/NAME")
    for entry in os.scandir(root):
        if entry.is_symlink() and Layout(Path(entry.path)).is_dataset:
            mend = "move the folder itself below the root, or mount it there (mount --bind)"
            yield warning(Topic.FOLDERS, entry.path, "is a symbolic link, so it is not taken for a dataset", mend)


def own_folder_findings(config: Config, layouts: Sequence[Layout]) -> Iterator[Finding]:
    """Check that sortd can write the folders of its own, and that none of them lies in a dataset."""
    folders = {"state_dir": config.state_dir, "cache_dir": config.cache_dir}
    for key, own in folders.items():
        for area in (layout.area(area) for layout in layouts for area in Area):
            if _is_within(os.path.realpath(own), os.path.realpath(area)):
                mend = f"set `{key}` to a folder outside of every dataset"
                yield error(Topic.FOLDERS, own, f"`{key}` lies inside {area}", mend)
    if config.metrics.textfile is not None:
        folders["metrics.textfile"] = config.metrics.textfile.parent
    for key, own in folders.items():
        above = next(parent for parent in own.parents if parent.exists())
        if own.is_dir():
            if refusal := _refusal_to_write(own):
                what = f"`{key}` cannot be written: {refusal}"
                yield error(Topic.FOLDERS, own, what, f"make it belong to {_user()}")
        elif own.exists() or not above.is_dir():
            what = f"`{key}` cannot be a folder: a file is in the way"
            yield error(Topic.FOLDERS, own, what, f"set `{key}` elsewhere")
        elif not os.access(above, os.W_OK | os.X_OK, effective_ids=True):
            mend = f"make it and let it belong to {_user()}, or set `{key}` elsewhere"
            yield error(Topic.FOLDERS, own, f"`{key}` is missing and cannot be made in {above}", mend)


def overlap_findings(_config: Config, layouts: Sequence[Layout]) -> Iterator[Finding]:
    """Check that no folder is sorted, or learnt from, a second time."""
    real = {layout.area(area): os.path.realpath(layout.area(area)) for layout in layouts for area in Area}
    for (folder, inner), (_, outer) in permutations(real.items(), 2):
        if _is_within(inner, outer):
            what = f"leads to {inner}, which lies in {outer}"
            yield error(Topic.FOLDERS, folder, what, "give each dataset folders of its own")
    first: dict[tuple[int, int], Path] = {}
    for folder in [*(layout.root for layout in layouts), *real]:
        if folder.exists():  # a bind mount gives one folder two names
            status = folder.stat()
            known = first.setdefault((status.st_dev, status.st_ino), folder)
            if known != folder:
                yield error(Topic.FOLDERS, folder, f"is the same folder as {known}", "unmount or move one of them")
    for layout in layouts:
        for area in (Area.IMAGES, Area.DATASET):
            for entry in _entries(layout.area(area)):
                if entry.is_dir(follow_symlinks=False) and Layout(Path(entry.path)).is_dataset:
                    what = f"looks like a dataset but lies in {layout.area(area)}"
                    mend = f"move it up, beside {layout.root}, if it is meant to be one"
                    yield warning(Topic.FOLDERS, entry.path, what, mend)


def folder_findings(_config: Config, layout: Layout) -> Iterator[Finding]:
    """Check one dataset's folders, its marker, and the rights that sortd needs in them."""
    for area in Area:
        folder = layout.area(area)
        if folder.is_symlink():
            mend = "put a real folder in its place; to have it on another disk, mount it there"
            yield error(Topic.FOLDERS, folder, "is a symbolic link; sortd moves files only below real folders", mend)
        elif not folder.exists():
            if not os.access(layout.root, os.W_OK | os.X_OK, effective_ids=True):
                what = f"is missing and cannot be made in {layout.root}"
                yield error(Topic.FOLDERS, folder, what, "make it yourself")
        elif not folder.is_dir():
            yield error(Topic.FOLDERS, folder, "is there but is no folder", "move it away")
        else:
            yield from _right_findings(folder, area)
    if layout.marker.is_symlink():
        yield error(Topic.FOLDERS, layout.marker, "is a symbolic link: nothing is moved", "put a folder in its place")
    elif not layout.is_present:
        mend = f"it is made when sortd starts; to make it now: sortd init {layout.root}"
        yield note(Topic.FOLDERS, layout.marker, "is missing, by which sortd knows that the disk is mounted", mend)
    elif refusal := _refusal_to_write(layout.marker):
        yield error(Topic.FOLDERS, layout.marker, f"cannot be written: {refusal}", f"make it belong to {_user()}")
    lock = layout.marker / "lock"
    if os.path.lexists(lock) and (lock.is_symlink() or not lock.is_file()):
        yield error(Topic.FOLDERS, lock, "is no regular file: nothing is moved", "remove it; sortd makes it anew")


def class_folder_findings(_config: Config, layout: Layout) -> Iterator[Finding]:
    """Check the folders one level down: links, rights, and those of classes that are no more."""
    classes = {entry.name for entry in _entries(layout.area(Area.CLASES))}
    for area in (Area.CLASES, Area.DATASET, Area.REVIEW, Area.IMAGES):
        for entry in _entries(layout.area(area)):
            if rule_for_folder(entry.name) is not None:
                continue
            if entry.is_symlink() and os.path.isdir(entry.path) and area is not Area.IMAGES:
                effect = "it is no class" if area is Area.CLASES else "no file is moved through it"
                what = f"is a symbolic link, so {effect}"
                yield warning(Topic.FOLDERS, entry.path, what, "put a real folder in its place")
            elif entry.is_dir(follow_symlinks=False):
                yield from _right_findings(Path(entry.path), area)
                files = sum(one.is_file(follow_symlinks=False) for one in _entries(Path(entry.path)))
                if area in {Area.DATASET, Area.REVIEW} and classes and entry.name not in classes and files:
                    what = f"holds {counted(files, 'file')} of a class that Clases/ does not have (renamed or removed?)"
                    mend = f"rename it like its class, or make {layout.area(Area.CLASES)}/{entry.name}"
                    yield note(Topic.FOLDERS, entry.path, what, mend)


def _right_findings(folder: Path, area: Area) -> Iterator[Finding]:
    is_written = area in WRITTEN
    status = folder.stat()
    if not os.access(folder, READ_AND_ENTER | (os.W_OK if is_written else 0), effective_ids=True):
        needed = "read, write and enter" if is_written else "read and enter"
        is_read_only = os.statvfs(folder).f_flag & os.ST_RDONLY
        what = "its file system is mounted read-only" if is_read_only else f"{_user()} may not {needed} it"
        yield error(Topic.FOLDERS, folder, what, f"chown or chmod it so that {_user()} may, or run sortd as its owner")
    elif is_written and status.st_mode & stat.S_ISVTX and os.geteuid() not in {0, status.st_uid}:
        what = "has the sticky bit: files of other users cannot be moved out of it"
        yield warning(Topic.FOLDERS, folder, what, f"take the sticky bit away: chmod -t {folder}")


def _entries(folder: Path) -> list["os.DirEntry[str]"]:
    """List a folder; empty where it cannot be listed, which is a finding of its own."""
    with suppress(OSError), os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)
    return []


def _refusal_to_write(folder: Path) -> str | None:
    """Make and remove a file in a folder of sortd's own; return why that failed."""
    trial = folder / f".sortd-check-{os.getpid()}"
    try:
        os.close(os.open(trial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except OSError as refusal:
        return refusal.strerror
    trial.unlink()
    return None


def _is_within(inner: str, outer: str) -> bool:
    return inner != outer and (inner + os.sep).startswith(outer.rstrip(os.sep) + os.sep)


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # a container's user need not have a name
        return f"user {os.geteuid()}"


# ---------------------------------------------------------------- disks, clock, watching


def move_findings(_config: Config, layout: Layout, *, rename: Rename = rename_new) -> Iterator[Finding]:
    """Try with a file of our own whether moves from Images/ are renames, and what the file system tells of it."""
    images, name = layout.area(Area.IMAGES), f".sortd-check-{os.getpid()}.part"
    with Folders(layout.root) as folders:
        try:
            source = folders.open(Area.IMAGES)
            os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=source))
        except OSError:
            return  # folder_findings says so
        try:
            slow = [f"{area}/" for area in TARGETS if not _moves(folders, area, name, rename)]
            is_told_of_writers = writer_of(os.fspath(images / name)) is not Writer.UNKNOWN
            ahead = os.stat(name, dir_fd=source).st_mtime - time.time()
        finally:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=source)
    if slow:
        what = (
            f"a rename from Images/ into {', '.join(slow)} is refused: each move there is a copy that is verified and "
            "synced before the original goes, so it takes longer and needs the room twice"
        )
        mend = "to have renames, put both on one file system; in a systemd unit name one common ReadWritePaths="
        yield note(Topic.FILE_SYSTEM, layout.root, what, mend)
    elif all(layout.area(area).is_dir() for area in TARGETS):
        yield note(Topic.FILE_SYSTEM, layout.root, "moves are renames within one file system")
    if not is_told_of_writers:
        what = "tells nobody whether a file is still being written, so each one must hold still for 5 s at least"
        yield note(Topic.FILE_SYSTEM, images, what)
    if abs(ahead) > CLOCK_SECONDS:
        what = f"its file server's clock is {abs(ahead):.0f} s {'ahead' if ahead > 0 else 'behind'}"
        yield warning(Topic.MACHINE, images, what, "synchronise both clocks (NTP)")


def _moves(folders: Folders, area: Area, name: str, rename: Rename) -> bool:
    """Rename the trial file into an area and back; True also where rights or the folder are missing."""
    source = folders.open(Area.IMAGES)
    try:
        target = folders.open(area)
        rename(source, name, target, name)
    except OSError as refusal:
        return refusal.errno not in CANNOT_RENAME
    try:
        rename(target, name, source, name)
    except OSError:
        os.unlink(name, dir_fd=target)
        raise
    return True


def room_findings(config: Config, layouts: Sequence[Layout]) -> Iterator[Finding]:
    """Check how much room is left, once for each file system; a folder that is missing counts as the one above it."""
    kept = [*(("images", layout.root) for layout in layouts)]
    kept += [("the journal", config.state_dir), ("the cache", config.cache_dir)]
    seen: set[int] = set()
    for what, folder in kept:
        there = next(place for place in (folder, *folder.parents) if place.exists())
        if (device := there.stat().st_dev) in seen:
            continue
        seen.add(device)
        facts = os.statvfs(there)
        free, whole = facts.f_bavail * facts.f_frsize, facts.f_blocks * facts.f_frsize
        left = f"{megabytes(free)} left for {what}"
        if free < NO_ROOM_BYTES:
            yield error(Topic.MACHINE, there, f"its disk is full: {left}", "make room")
        elif free < LITTLE_ROOM_BYTES or free < LITTLE_ROOM_SHARE * whole:
            yield warning(Topic.MACHINE, there, f"its disk is nearly full: {left}", "make room")
        if facts.f_files and facts.f_favail < LEAST_INODES:  # btrfs counts none
            yield warning(Topic.MACHINE, there, f"its disk has only {facts.f_favail} inodes left", "remove small files")


def machine_findings(
    _config: Config, _layouts: Sequence[Layout], *, clock: Callable[[], float] = time.time
) -> Iterator[Finding]:
    """Check the clock, by which the history is told, and that every image format can be decoded."""
    if clock() < EARLIEST_SECONDS:
        what = f"says {time.strftime('%Y-%m-%d', time.gmtime(clock()))}: history and undo by time would be wrong"
        yield warning(Topic.MACHINE, "clock", what, "set it (timedatectl)")
    for missing in load_decoders():
        what, _, mend = missing.partition("; ")
        yield error(Topic.MACHINE, "decoding", what, mend)


def watching_findings(
    config: Config, layouts: Sequence[Layout], *, granted: inotify.Limits | None = None
) -> Iterator[Finding]:
    """Check whether changes can be watched or must be polled for, and whether the kernel grants enough watches."""
    granted = granted or inotify.limits()
    watched = []
    for layout in layouts:
        kind = inotify.is_blind(os.fspath(layout.root))
        blind = f"lies on {kind}, where changes by other machines raise no event" if kind else ""
        if blind and config.polling == "never":
            yield warning(Topic.WATCHING, layout.root, f"{blind}, and polling is off", "set `polling: auto`")
        elif blind or config.polling == "always":
            yield note(Topic.WATCHING, layout.root, f"is polled: {blind or '`polling: always`'}")
        else:
            watched.append(layout)
    folders = sum(_count_folders(layout) for layout in watched)
    if granted.max_user_watches is not None and folders > granted.max_user_watches // 2:
        tell = error if folders > granted.max_user_watches else warning
        advice = inotify.advice(OSError(errno.ENOSPC, ""), folders=folders, granted=granted)
        what = f"{counted(folders, 'folder')} are to be watched; {advice}"
        yield tell(Topic.WATCHING, "fs.inotify.max_user_watches", what, "or set `polling: always`")
    if watched and granted.max_user_instances is not None and len(watched) + 2 > granted.max_user_instances:
        what = inotify.advice(OSError(errno.EMFILE, ""), granted=granted)
        yield error(Topic.WATCHING, "fs.inotify.max_user_instances", what)


def _count_folders(layout: Layout) -> int:
    """Count the folders that would be watched; Dataset/, Review/ and Rejected/ are one level deep."""
    deep = sum(1 for area in (Area.CLASES, Area.IMAGES) for _ in os.walk(layout.area(area)))
    below = [entry for area in TARGETS for entry in _entries(layout.area(area))]
    return deep + len(TARGETS) + sum(entry.is_dir(follow_symlinks=False) for entry in below)


# ---------------------------------------------------------------- what runs, and the model


def process_findings(config: Config, layouts: Sequence[Layout]) -> Iterator[Finding]:
    """Tell whether a sortd runs already, with this state directory or another, and what it holds."""
    try:
        status = read_status(config.state_dir) or {"alive": False}
    except StartupError as refusal:
        yield error(Topic.PROCESS, config.state_dir, str(refusal))
        return
    own = status["pid"] if status["alive"] else None
    if own is not None:
        yield note(Topic.PROCESS, config.state_dir, f"sortd runs already (pid {own}); see `sortd status`")
        for name, facts in status.get("datasets", {}).items():
            if facts.get("held_since"):
                what = f"is held, nothing in it is moved: {facts['problem']}"
                yield error(Topic.PROCESS, name, what, "sortd takes it up again by itself once this is mended")
    for layout in layouts:
        holder = lock_holder(layout.marker / "lock")
        if holder is not None and holder != own:
            what = f"is worked on by another process (pid {holder}), which keeps its state elsewhere"
            mend = f"stop that one, or use its configuration; {layout.marker}/state names its folder"
            yield warning(Topic.PROCESS, layout.root, what, mend)
    if os.geteuid() == 0 and {layout.root.stat().st_uid for layout in layouts} - {0}:
        what = "this check ran as root, who may do everything; what it says of rights holds for root alone"
        yield note(Topic.PROCESS, "user", what, "run it as the user that sortd runs as: sudo -u USER sortd check")


def lock_holder(lock: Path) -> int | None:
    """Return the process that holds a lock file, by /proc/locks (see proc(5)); None if nobody does.

    The lock itself is not tried: taking it for a moment could make a sortd that starts just then give up.
    """
    try:
        inode = lock.stat().st_ino
        locks = Path("/proc/locks").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    held = re.findall(r"WRITE\s+(\d+) [0-9a-f]+:[0-9a-f]+:(\d+) ", locks)
    return next((int(pid) for pid, number in held if int(number) == inode and _has_open(pid, lock)), None)


def _has_open(pid: str, path: Path) -> bool:
    """Tell whether a process has a file open; True where it is another user's, since equal inodes are rare."""
    folder, real = f"/proc/{pid}/fd", os.path.realpath(path)
    try:
        return any(os.path.realpath(f"{folder}/{name}") == real for name in os.listdir(folder))
    except OSError as refusal:
        return isinstance(refusal, PermissionError)


def journal_findings(config: Config, layout: Layout) -> Iterator[Finding]:
    """Read a dataset's journal, all of it, and tell whether the guard holds the dataset."""
    file = layout.state_folder(config.state_dir) / JOURNAL_FILE
    if not os.path.lexists(file):
        return
    try:
        with History.open(file) as history:
            history.verify()
            history.unfinished()
            history.held()
            reason = history.guard().reason
    except JournalError as refusal:
        yield error(Topic.PROCESS, layout.root, str(refusal))
        return
    if reason:
        mend = f"look at `sortd eval`, then `sortd release {layout.root}`"
        yield warning(Topic.CALIBRATION, layout.root, f"is held, so that nothing moves: {reason}", mend)


def model_findings(config: Config, _layouts: Sequence[Layout]) -> Iterator[Finding]:
    """Tell which model would be used, or how to get the one that is wanted."""
    subject = f"model: {config.model}"
    try:
        model = models.locate(config.model, cache_dir=config.cache_dir)
    except ModelError as refusal:
        yield error(Topic.MODEL, subject, str(refusal))
        return
    what = f"is {model.name}, a {model.kind} of {megabytes(model.size_bytes)} in {model.folder}"
    yield note(Topic.MODEL, subject, what)
    if config.model == "auto" and model.name == "packaged":
        what = f"{STRONGER}, which is stronger, is not on this machine"
        yield note(Topic.MODEL, subject, what, f"sortd models fetch {STRONGER}")
    if config.text_model is not None:
        try:
            models.locate_text(config.text_model, cache_dir=config.cache_dir)
        except ModelError as refusal:
            yield error(Topic.MODEL, f"text_model: {config.text_model}", str(refusal))


def _backend(config: Config, _layouts: Sequence[Layout]) -> Iterator[Finding]:
    return backend_findings(config)


SITE_CHECKS: Final[Sequence[Callable[[Config, Sequence[Layout]], Iterator[Finding]]]] = (
    root_findings, own_folder_findings, overlap_findings, process_findings, model_findings, _backend,
    watching_findings, machine_findings, room_findings,
)  # fmt: skip
DATASET_CHECKS: Final[Sequence[Callable[[Config, Layout], Iterator[Finding]]]] = (
    folder_findings, class_folder_findings, move_findings, journal_findings, classifier_findings,
    stored_calibration_findings,
)  # fmt: skip
"""All checks, in the order in which they are told; the references of a dataset come last."""
