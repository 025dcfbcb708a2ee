"""Checks of the folders: the root, each dataset's own, their rights, and what must not lie inside of what."""

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations
from pathlib import Path

from sortd.commands.console import counted
from sortd.commands.finding import Finding, Topic, error, note, warning
from sortd.layout import Area, Layout, enclosing_dataset
from sortd.names import rule_for_folder

NAMED_AT_MOST = 5
"""How many paths one finding names before it only counts the rest."""

_WRITTEN = (Area.IMAGES, Area.DATASET, Area.REVIEW, Area.REJECTED)


def root_findings(root: Path, layouts: Sequence[Layout]) -> Iterator[Finding]:
    """Check the folder that holds the datasets."""
    if not root.is_dir():
        what = "is there but is no folder" if root.exists() else "is missing"
        yield error(Topic.FOLDERS, root, what, "make it, mount its disk, or set `root` to the folder of your datasets")
        return
    if not os.access(root, os.R_OK | os.X_OK, effective_ids=True):
        yield error(Topic.FOLDERS, root, "cannot be listed", f"give {_who()} the rights to read and enter it")
        return
    is_dataset, around = Layout(root).is_dataset, enclosing_dataset(root)
    if is_dataset:
        mend = f"set `root` to {root.parent}"
        yield error(Topic.FOLDERS, root, "is itself a dataset; the root is the folder above the datasets", mend)
    if around is not None:
        mend = f"set `root` to {around.parent}, or to a folder outside of it"
        yield error(Topic.FOLDERS, root, f"lies inside the dataset {around}", mend)
    if not layouts and not is_dataset and around is None:
        mend = f"make one: sortd init {root}/NAME"
        yield warning(Topic.FOLDERS, root, "holds no dataset, which is a folder with a Clases/ in it", mend)
    for entry in os.scandir(root):
        if entry.is_symlink() and Layout(Path(entry.path)).is_dataset:
            mend = "move the folder itself below the root, or mount it there (mount --bind)"
            yield warning(Topic.FOLDERS, entry.path, "is a symbolic link, so it is not taken for a dataset", mend)


def dataset_findings(layout: Layout) -> Iterator[Finding]:
    """Check one dataset's folders and the rights that sortd needs in them."""
    for area in Area:
        yield from _area_findings(layout, area)
    if layout.marker.is_symlink():
        yield error(Topic.FOLDERS, layout.marker, "is a symbolic link: nothing is moved", "put a folder in its place")
    elif not layout.is_present:
        mend = f"it is made when sortd starts; to make it now: sortd init {layout.root}"
        yield note(Topic.FOLDERS, layout.marker, "is missing, by which sortd knows that the disk is mounted", mend)
    elif (refusal := _refusal_to_write(layout.marker)) is not None:
        yield error(Topic.FOLDERS, layout.marker, f"cannot be written: {refusal}", f"make it belong to {_who()}")
    lock = layout.marker / "lock"
    if os.path.lexists(lock) and (lock.is_symlink() or not lock.is_file()):
        yield error(Topic.FOLDERS, lock, "is no regular file: nothing is moved", "remove it; sortd makes it anew")
    yield from _class_folder_findings(layout)
    yield from _former_class_findings(layout)


def overlap_findings(layouts: Sequence[Layout], others: Mapping[str, Path]) -> Iterator[Finding]:
    """Check that nothing lies where its files would be sorted, or learnt from, a second time.

    Args:
        layouts: all datasets.
        others: by configuration key, the folders that sortd keeps its own things in.
    """
    areas = [(layout, area, os.path.realpath(layout.area(area))) for layout in layouts for area in Area]
    for (layout, area, real), (_, _, outer) in permutations(areas, 2):
        if _is_within(real, outer):
            mend = "give each dataset folders of its own"
            yield error(Topic.FOLDERS, layout.area(area), f"leads to {real}, which lies in {outer}", mend)
    yield from _twins(layouts)
    for key, folder in others.items():
        for layout, area, real in areas:
            if _is_within(os.path.realpath(folder), real):
                mend = f"set `{key}` to a folder outside of every dataset"
                yield error(Topic.FOLDERS, folder, f"`{key}` lies inside {layout.area(area)}", mend)
    for layout in layouts:
        yield from _nested(layout)


def own_folder_findings(key: str, folder: Path) -> Iterator[Finding]:
    """Check that sortd can keep its own things in a folder, or make that folder."""
    if folder.is_dir():
        refusal = _refusal_to_write(folder)
        if refusal is not None:
            yield error(Topic.FOLDERS, folder, f"`{key}` cannot be written: {refusal}", f"make it belong to {_who()}")
        return
    above = next(parent for parent in folder.parents if parent.exists())
    if folder.exists() or not above.is_dir():
        yield error(
            Topic.FOLDERS, folder, f"`{key}` cannot be a folder: a file is in the way", f"set `{key}` elsewhere"
        )
    elif not os.access(above, os.W_OK | os.X_OK, effective_ids=True):
        mend = f"make it and let it belong to {_who()}, or set `{key}` elsewhere"
        yield error(Topic.FOLDERS, folder, f"`{key}` is missing and cannot be made in {above}", mend)


def named(paths: Sequence[str]) -> str:
    """Return the first few of some names, and how many more there are."""
    more = len(paths) - NAMED_AT_MOST
    return ", ".join(paths[:NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")


def _area_findings(layout: Layout, area: Area) -> Iterator[Finding]:
    folder = layout.area(area)
    if folder.is_symlink():
        mend = "put a real folder in its place; to have it on another disk, mount it there"
        yield error(Topic.FOLDERS, folder, "is a symbolic link; sortd moves files only below real folders", mend)
    elif not folder.exists():
        if not os.access(layout.root, os.W_OK | os.X_OK, effective_ids=True):
            yield error(Topic.FOLDERS, folder, f"is missing and cannot be made in {layout.root}", "make it yourself")
    elif not folder.is_dir():
        yield error(Topic.FOLDERS, folder, "is there but is no folder", "move it away")
    else:
        yield from _right_findings(folder, os.R_OK | os.X_OK | (os.W_OK if area in _WRITTEN else 0))


def _right_findings(folder: Path, wanted: int) -> Iterator[Finding]:
    if not os.access(folder, wanted, effective_ids=True):
        needed = "read, write and enter" if wanted & os.W_OK else "read and enter"
        why = "its file system is mounted read-only" if _is_read_only(folder) else f"{_who()} may not {needed} it"
        yield error(Topic.FOLDERS, folder, why, f"chown or chmod it so that {_who()} may, or run sortd as its owner")
        return
    status = folder.stat()
    is_sticky = bool(status.st_mode & stat.S_ISVTX) and wanted & os.W_OK
    if is_sticky and os.geteuid() not in {0, status.st_uid}:
        mend = f"take the sticky bit away: chmod -t {folder}"
        yield warning(Topic.FOLDERS, folder, "has the sticky bit: files of other users cannot be moved out of it", mend)


def _class_folder_findings(layout: Layout) -> Iterator[Finding]:
    """Check the folders one level down: classes, and the folders that are filed into or taken from."""
    for area in (Area.CLASES, Area.DATASET, Area.REVIEW, Area.IMAGES):
        for entry in _entries(layout.area(area)):
            if rule_for_folder(entry.name) is not None:
                continue
            if entry.is_symlink() and os.path.isdir(entry.path) and area is not Area.IMAGES:
                what = (
                    "is a symbolic link, so it is no class"
                    if area is Area.CLASES
                    else "is a symbolic link: no file is moved through it"
                )
                yield warning(Topic.FOLDERS, entry.path, what, "put a real folder in its place")
            elif entry.is_dir(follow_symlinks=False):
                wanted = os.R_OK | os.X_OK | (os.W_OK if area in _WRITTEN else 0)
                yield from _right_findings(Path(entry.path), wanted)


def _former_class_findings(layout: Layout) -> Iterator[Finding]:
    """Name the folders that images were filed into, or are to be reviewed in, under a class that is no more."""
    classes = {entry.name for entry in _entries(layout.area(Area.CLASES))}
    for area in (Area.DATASET, Area.REVIEW) if classes else ():
        for entry in _entries(layout.area(area)):
            is_former = entry.is_dir(follow_symlinks=False) and entry.name not in classes and entry.name[0] != "."
            if is_former and (
                files := sum(1 for one in _entries(Path(entry.path)) if one.is_file(follow_symlinks=False))
            ):
                what = f"holds {counted(files, 'file')} of a class that Clases/ does not have (renamed or removed?)"
                mend = f"rename it like its class, or make {layout.area(Area.CLASES)}/{entry.name}"
                yield note(Topic.FOLDERS, entry.path, what, mend)


def _nested(layout: Layout) -> Iterator[Finding]:
    for area in (Area.IMAGES, Area.DATASET):
        for entry in _entries(layout.area(area)):
            if entry.is_dir(follow_symlinks=False) and Layout(Path(entry.path)).is_dataset:
                mend = f"move it up, beside {layout.root}, if it is meant to be one"
                yield warning(Topic.FOLDERS, entry.path, f"looks like a dataset but lies in {layout.area(area)}", mend)


def _twins(layouts: Sequence[Layout]) -> Iterator[Finding]:
    """Find one folder under two names, as a bind mount makes it."""
    first: dict[tuple[int, int], Path] = {}
    for folder in (place for layout in layouts for place in (layout.root, *map(layout.area, Area))):
        try:
            status = folder.stat()
        except OSError:
            continue
        known = first.setdefault((status.st_dev, status.st_ino), folder)
        if known != folder:
            yield error(Topic.FOLDERS, folder, f"is the same folder as {known}", "unmount or move one of them")


def _entries(folder: Path) -> list["os.DirEntry[str]"]:
    """List a folder; one that cannot be listed was reported as such already."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError:
        return []


def _refusal_to_write(folder: Path) -> str | None:
    """Try to make a file in a folder that is sortd's own; return why that failed."""
    trial = folder / f".sortd-check-{os.getpid()}"
    try:
        descriptor = os.open(trial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as refusal:
        return refusal.strerror
    os.close(descriptor)
    trial.unlink()
    return None


def _is_read_only(folder: Path) -> bool:
    return bool(os.statvfs(folder).f_flag & os.ST_RDONLY)


def _is_within(inner: str, outer: str) -> bool:
    return inner != outer and (inner + os.sep).startswith(outer.rstrip(os.sep) + os.sep)


def _who() -> str:
    """Name the user that sortd runs as now."""
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # a container's user need not have a name
        return f"user {os.geteuid()}"
