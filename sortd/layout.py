"""The layout: which folders a dataset has, where datasets are found, and how absent is told from empty."""

import hashlib
import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from sortd.errors import LayoutError
from sortd.names import rule_for_folder

JOURNAL_FILE = "journal.sqlite"  # in the state folder of a dataset

MARKER = ".sortd"
"""The folder by which a dataset is known to be mounted; its lock and the pointer to its state live in it."""


class Area(StrEnum):
    """The folders of a dataset, by their names on the disk."""

    CLASES = "Clases"
    IMAGES = "Images"
    DATASET = "Dataset"
    REVIEW = "Review"
    REJECTED = "Rejected"


_AREAS = {area.value: area for area in Area}


@dataclass(frozen=True, slots=True)
class Layout:
    """The folders of one dataset."""

    root: Path

    @property
    def name(self) -> str:
        """The dataset's name: its folder's."""
        return self.root.name

    def area(self, area: Area) -> Path:
        """Return the path of one of its folders."""
        return self.root / area.value

    @property
    def marker(self) -> Path:
        """The marker folder."""
        return self.root / MARKER

    @property
    def is_dataset(self) -> bool:
        """Tell whether the folder is one: it has a ``Clases/``."""
        return os.path.isdir(self.area(Area.CLASES))

    @property
    def is_present(self) -> bool:
        """Tell whether its marker is there, a real folder: without it the disk is taken for not mounted."""
        # False too where the disk answers with an error: as good as absent.
        return os.path.isdir(self.marker) and not os.path.islink(self.marker)

    @property
    def key(self) -> str:
        """What it is known by among the datasets of all roots: its name, and its place since names may repeat."""
        place = hashlib.sha256(os.fsencode(os.path.realpath(self.root))).hexdigest()[:8]
        return f"{self.name}-{place}"

    def state_folder(self, state: Path) -> Path:
        """Return the folder of its journal below ``state``."""
        return state / self.key

    def make(self) -> None:
        """Make the folders that are missing, and the marker.

        Raises:
            LayoutError: one of them is a link or a file, or cannot be made.
        """
        for folder in (*(self.area(area) for area in Area), self.marker):
            try:
                folder.mkdir(exist_ok=True)
            except FileExistsError as error:
                raise LayoutError(f"{folder} is there but is no folder; move it away") from error
            except OSError as error:
                raise LayoutError(f"{folder} cannot be made: {error.strerror}; mend its rights or room") from error
            if folder.is_symlink():
                raise LayoutError(f"{folder} is a symbolic link; sortd moves files only below real folders")

    def area_of(self, path: str) -> Area | None:
        """Tell which of its folders a path lies in, or is; None: none of them."""
        prefix = os.fspath(self.root) + os.sep
        first = path.removeprefix(prefix).split(os.sep, 1)[0] if path.startswith(prefix) else ""
        return _AREAS.get(first)


def find_datasets(root: Path) -> list[Layout]:
    """List the datasets below ``root``, by name.

    Raises:
        LayoutError: ``root`` is missing or cannot be listed.
    """
    try:
        with os.scandir(root) as entries:
            folders = [
                Path(entry.path) for entry in entries if rule_for_folder(entry.name) is None and _is_folder(entry)
            ]
    except OSError as error:
        raise LayoutError(
            f"{root} cannot be listed: {error.strerror}; set root to the folder of your datasets"
        ) from error
    return [layout for folder in sorted(folders) if (layout := Layout(folder)).is_dataset]


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    """Whether an entry is a folder; one that its disk says nothing about keeps no other from being found."""
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        return False


def enclosing_dataset(folder: Path) -> Path | None:
    """Return the dataset that a folder lies in, through whatever links; None: it lies in none."""
    return next((above for above in Path(os.path.realpath(folder)).parents if Layout(above).is_dataset), None)


def misplaced_root(root: Path) -> str | None:
    """Say why no dataset can be found below ``root``, and what it should be; None where it may hold some, or does."""
    around = root if Layout(root).is_dataset else enclosing_dataset(root)
    if around is None:
        return None
    try:
        if find_datasets(root):
            return None
    except LayoutError:
        return None  # whoever lists it says why it cannot be
    what = "is itself a dataset, which has a Clases/ in it" if around == root else f"lies inside the dataset {around}"
    return f"{root} {what}: set `root` to {around.parent}, the folder that holds the datasets"
