"""The folders of a dataset, the marker that shows that it is mounted, and the search for datasets."""

import hashlib
import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from sortd.errors import LayoutError
from sortd.names import rule_for_folder

JOURNAL_FILE = "journal.sqlite"  # in the state folder of a dataset

MARKER = ".sortd"  # the folder that shows that a dataset is mounted; contains its lock and the pointer to its state


class Area(StrEnum):
    """The folders of a dataset by name."""

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
        """The name of the dataset, which is that of its folder."""
        return self.root.name

    def area(self, area: Area) -> Path:
        """Return the path of a folder of the dataset."""
        return self.root / area.value

    @property
    def marker(self) -> Path:
        """The marker folder."""
        return self.root / MARKER

    @property
    def is_dataset(self) -> bool:
        """Whether the folder is a dataset: it has a ``Clases/``."""
        return os.path.isdir(self.area(Area.CLASES))

    @property
    def is_present(self) -> bool:
        """Whether the marker is a folder and not a link; if not, or on an error, the disk counts as not mounted."""
        return os.path.isdir(self.marker) and not os.path.islink(self.marker)

    @property
    def key(self) -> str:
        """A unique name among the datasets of all roots: its name with a hash of its path."""
        place = hashlib.sha256(os.fsencode(os.path.realpath(self.root))).hexdigest()[:8]
        return f"{self.name}-{place}"

    def state_folder(self, state: Path) -> Path:
        """Return the dataset's folder in the state directory."""
        return state / self.key

    def make(self) -> None:
        """Create the missing folders and the marker.

        Raises:
            LayoutError: one of them is a link or a file, or cannot be created.
        """
        for folder in (*(self.area(area) for area in Area), self.marker):
            try:
                folder.mkdir(exist_ok=True)
            except FileExistsError as error:
                raise LayoutError(f"{folder} is not a folder; move it away") from error
            except OSError as error:
                said = f"{folder} cannot be created: {error.strerror}; check its permissions and the free space"
                raise LayoutError(said) from error
            if folder.is_symlink():
                raise LayoutError(f"{folder} is a symbolic link; sortd moves files only below real folders")

    def area_of(self, path: str) -> Area | None:
        """Return the folder of the dataset that contains, or is, a path; None: none."""
        prefix = os.fspath(self.root) + os.sep
        first = path.removeprefix(prefix).split(os.sep, 1)[0] if path.startswith(prefix) else ""
        return _AREAS.get(first)


def find_datasets(root: Path) -> list[Layout]:
    """Return the datasets below ``root`` by name.

    Raises:
        LayoutError: ``root`` does not exist or cannot be listed.
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
    """Tell whether an entry is a folder; False on an error, so that other datasets are still found."""
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        return False


def enclosing_dataset(folder: Path) -> Path | None:
    """Return the dataset that contains a folder, with links resolved; None: none."""
    return next((above for above in Path(os.path.realpath(folder)).parents if Layout(above).is_dataset), None)


def misplaced_root(root: Path) -> str | None:
    """Return why ``root`` cannot contain datasets, with the folder to set; None: it can."""
    around = root if Layout(root).is_dataset else enclosing_dataset(root)
    if around is None:
        return None
    try:
        if find_datasets(root):
            return None
    except LayoutError:
        return None  # the caller's own listing fails with this error
    what = "is itself a dataset: it has a Clases/" if around == root else f"lies inside the dataset {around}"
    return f"{root} {what}; set `root` to {around.parent}, the folder that contains the datasets"
