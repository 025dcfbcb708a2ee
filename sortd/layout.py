"""The folders of a dataset, the marker that shows that it is mounted, and the names that sortd ignores.

``RULES`` lists the names that programs give to unfinished and to internal files. ``rule_for`` applies to files and
folders in the inbox and below class folders, ``rule_for_folder`` to the folders of datasets and classes. The latter
ignores only hidden folders and those of file systems, servers and desktops, so that a class may be called
``engine.part`` or ``door.lock``.
"""

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path

from sortd.errors import LayoutError

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
CLASS_AREAS = frozenset({Area.CLASES, Area.DATASET, Area.REVIEW})
"""The folders of a dataset that contain a folder for each class."""


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


@dataclass(frozen=True, slots=True)
class Misplacement:
    """A root that is a dataset, or a root or a dataset that lies inside one, where sortd ignores it."""

    folder: Path
    what: str
    advice: str

    def __str__(self) -> str:
        """Return both as one message with the path."""
        return f"{self.folder} {self.what}; {self.advice}"


def inside_dataset(folder: Path) -> Misplacement | None:
    """Return that a root or a dataset lies inside a dataset; None: it does not."""
    around = enclosing_dataset(folder)
    return None if around is None else _misplaced(folder, f"lies inside the dataset {around}", around)


def root_problem(root: Path) -> Misplacement | None:
    """Return that a root is a dataset or lies inside one; None: it is neither."""
    if Layout(root).is_dataset:
        return _misplaced(root, f"is itself a dataset: it has a {Area.CLASES}/", root)
    return inside_dataset(root)


def misplaced_root(root: Path) -> Misplacement | None:
    """Return why ``root`` cannot contain datasets; None: it can, or it contains some in spite of ``root_problem``."""
    problem = root_problem(root)
    try:
        return None if problem is None or find_datasets(root) else problem
    except LayoutError:
        return None  # the caller's own listing fails with this error


def nested_datasets(root: Path) -> list[Misplacement]:
    """Return each dataset that is a folder of another dataset."""
    try:
        outer = find_datasets(root)
        inner = [layout.root for around in outer for layout in find_datasets(around.root) if layout.name not in _AREAS]
    except LayoutError:
        return []  # the caller's own listing fails with this error
    return [found for folder in inner if (found := inside_dataset(folder)) is not None]


def _misplaced(folder: Path, what: str, around: Path) -> Misplacement:
    return Misplacement(folder, what, f"set `root` to {around.parent}, with every dataset directly in it")


# ---------------------------------------------------------------- ignored names


class Reason(StrEnum):
    """Why a file stays in the inbox, for the log and for ``sortd status``."""

    UNFINISHED = "unfinished"  # by its own name or by a control file
    BACKUP = "backup"
    SYSTEM = "system"  # an internal file of a program, a server or the operating system
    HIDDEN = "hidden"
    SYMBOLIC_LINK = "symbolic_link"
    SPECIAL_FILE = "special_file"  # a pipe, a socket, a device
    HELD = "held"  # undone and not released


@dataclass(frozen=True, slots=True)
class Why:
    """The reason why one file or folder stays."""

    reason: Reason
    message: str


@dataclass(frozen=True, slots=True)
class Rule:
    """The names of one program's unfinished or internal files."""

    program: str
    pattern: str  # a glob in lower case, for names in any case; only for display if there is a regex
    example: str
    source: str
    reason: Reason = Reason.UNFINISHED
    is_control: bool = False  # while it exists, the file with this name without the ending is unfinished
    regex: str = ""  # used instead of the glob, with case

    def matches(self, name: str) -> bool:
        """Tell whether a name matches."""
        if self.regex:
            return re.fullmatch(self.regex, name, re.DOTALL) is not None
        return fnmatchcase(name.lower(), self.pattern)

    @property
    def ending(self) -> str:
        """The suffix that a control file adds to the name of its file."""
        return self.pattern.removeprefix("*")

    @property
    def why(self) -> Why:
        """The reason why a file or folder with such a name stays, and what to do to have it filed."""
        match self.reason:
            case Reason.UNFINISHED if self.is_control:
                said = f"{self.program} keeps the state of an unfinished file in it ({self.pattern})"
            case Reason.UNFINISHED:
                said = f"{self.program} names an unfinished file so ({self.pattern}); rename it if it is complete"
            case Reason.BACKUP:
                said = f"{self.program} names a backup so ({self.pattern}); rename it to have it filed"
            case Reason.SYSTEM:
                said = f"it is an internal file of {self.program} ({self.pattern})"
            case _:
                said = "it is hidden, because its name begins with a dot; rename it to have it filed"
        return Why(self.reason, said)


_IMAGE = r"(?i:jpe?g|jpe|jfif|png|bmp|dib|gif|webp|tiff?|avif|hei[cf])"

_BACKUP, _SYSTEM, _HIDDEN = Reason.BACKUP, Reason.SYSTEM, Reason.HIDDEN

RULES: tuple[Rule, ...] = (
    # Control files: the file itself has its final name and often its final size.
    Rule("aria2", "*.aria2", "IMG_1.jpg.aria2", "aria2c(1), Control File", is_control=True),
    Rule("lftp", "*.lftp-pget-status", "IMG_1.jpg.lftp-pget-status", "lftp(1), pget -c", is_control=True),
    Rule("Axel", "*.st", "IMG_1.jpg.st", "axel.c, axel_open", is_control=True),
    Rule("yt-dlp", "*.ytdl", "clip.webp.ytdl", "yt_dlp/downloader/fragment.py", is_control=True),
    Rule("Aspera", "*.aspera-ckpt", "IMG_1.jpg.aspera-ckpt", "aspera.conf, resume_suffix", is_control=True),
    Rule("Aspera", "*.aspx", "IMG_1.jpg.aspx", "ascp, resume files before 4.0", is_control=True),
    Rule("aria2", "*.aria2__temp", "IMG_1.jpg.aria2__temp", "DefaultBtProgressInfoFile.cc"),
    # Browsers.
    Rule("Chrome, Edge or another Chromium", "*.crdownload", "Unconfirmed 8123.crdownload", "chromium, download_path"),
    Rule("Chrome", "*.crswap", "IMG_1.jpg.crswap", "chromium, File System Access"),
    Rule("Chrome", ".com.google.chrome.*", ".com.google.Chrome.k2Xw9A", "chromium, file_util_posix.cc"),
    Rule("Chromium", ".org.chromium.chromium.*", ".org.chromium.Chromium.k2Xw9A", "chromium, file_util_posix.cc"),
    Rule("Safari", "*.download", "IMG_1.jpg.download", "Safari: a folder with the file in it"),
    Rule("Opera", "*.opdownload", "IMG_1.jpg.opdownload", "Opera"),
    Rule("yt-dlp", "*.part-frag*", "clip.webp.part-Frag12.part", "yt_dlp/downloader/fragment.py"),
    Rule("Edge, rclone or Aspera", "*.partial", "IMG_1.jpg.5f1b2c3d.partial", "rclone docs, --partial-suffix"),
    # Downloaders and file sharing.
    Rule("Free Download Manager", "*.fdmdownload", "IMG_1.jpg.fdmdownload", "Free Download Manager 6"),
    Rule("DownThemAll", "*.dtapart", "IMG_1.jpg.dtapart", "DownThemAll 3"),
    Rule("GetRight", "*.getright", "IMG_1.jpg.GetRight", "GetRight"),
    Rule("FlashGet", "*.jc!", "IMG_1.jpg.jc!", "FlashGet"),
    Rule("Orbit", "*.ob!", "IMG_1.jpg.ob!", "Orbit Downloader"),
    Rule("Thunder", "*.xltd", "IMG_1.jpg.xltd", "Xunlei 9"),
    Rule("Thunder", "*.xltd.cfg", "IMG_1.jpg.xltd.cfg", "Xunlei 9"),
    Rule("Thunder", "*.td", "IMG_1.jpg.td", "Xunlei 7"),
    Rule("Thunder", "*.td.cfg", "IMG_1.jpg.td.cfg", "Xunlei 7"),
    Rule("uTorrent", "*.!ut", "IMG_1.jpg.!ut", "uTorrent, bt.incomplete_ext"),
    Rule("uTorrent", "~utorrentpartfile_*", "~uTorrentPartFile_1A2B3C.dat", "uTorrent, diskio.use_partfile"),
    Rule("BitTorrent", "*.!bt", "IMG_1.jpg.!bt", "BitTorrent 7"),
    Rule("qBittorrent", "*.!qb", "IMG_1.jpg.!qB", "qBittorrent, Append .!qB extension"),
    Rule("BitComet", "*.bc!", "IMG_1.jpg.bc!", "BitComet"),
    Rule("Vuze", "*.az!", "IMG_1.jpg.az!", "Vuze, incomplete file suffix"),
    Rule("eMule", "*.part.met", "001.part.met", "eMule, CPartFile"),
    Rule("eMule", "*.part.met.bak", "001.part.met.bak", "eMule, CPartFile"),
    Rule("SABnzbd", "_unpack_*", "_UNPACK_holiday", "SABnzbd, prepare_extraction_path"),
    Rule("DC++", "*.dctmp", "IMG_1.jpg.dctmp", "DC++, TEMP_EXTENSION"),
    # File transfer.
    Rule("rsync", ".~tmp~", ".~tmp~", "rsync(1), --delay-updates"),
    Rule("rsync", ".rsync-*", ".rsync-partial", "rsync(1), --partial-dir"),
    Rule("WinSCP", "*.filepart", "IMG_1.jpg.filepart", "WinSCP, Transfer to temporary filename"),
    Rule("lftp or ProFTPD", ".in.*", ".in.IMG_1.jpg.", "lftp(1), xfer:temp-file-name; mod_xfer, HiddenStores"),
    Rule("lftp", "*.lftp", "IMG_1.jpg.lftp", "lftp(1), xfer:temp-file-name"),
    Rule("Pure-FTPd", ".pureftpd-upload.*", ".pureftpd-upload.5f1b2c3d.15.1a2b.3c4d5e6f", "pure-ftpd, ftpd.c"),
    Rule("gsutil", "*_.gstmp", "IMG_1.jpg_.gstmp", "gsutil, copy_helper.py"),
    Rule("AzCopy", ".azdownload-*", ".azDownload-6f9619ff-IMG_1.jpg", "azcopy, xferDecider"),
    Rule(
        *("the AWS command line", "NAME.jpg.XXXXXXXX", "IMG_1.jpg.6eF00aB1", "s3transfer, random_file_extension"),
        regex=rf".+\.{_IMAGE}\.(?=[0-9]*[a-fA-F])[0-9a-fA-F]{{8}}",
    ),
    # Synchronisers.
    Rule("Syncthing", ".syncthing.*.tmp", ".syncthing.IMG_1.jpg.tmp", "syncthing, lib/fs/tempname.go"),
    Rule("Syncthing", "~syncthing~*", "~syncthing~IMG_1.jpg.tmp", "syncthing, lib/fs/tempname.go"),
    Rule("Syncthing", ".st[fiv]*", ".stfolder", "Syncthing docs, Ignoring Files", _SYSTEM),
    Rule("Nextcloud or ownCloud", ".*.~*", ".IMG_1.jpg.~2f1a", "nextcloud/desktop, propagatedownload.cpp"),
    Rule("Nextcloud or ownCloud", "*.octransferid*", "a.jpg.ocTransferId2111130212.part", "nextcloud/server, File.php"),
    Rule("Nextcloud or ownCloud", ".sync_*.db*", ".sync_2f1a3b4c.db-wal", "nextcloud, syncjournaldb.cpp", _SYSTEM),
    Rule("ownCloud", "._sync_*", "._sync_2f1a3b4c.db", "owncloud/client, syncjournaldb.cpp", _SYSTEM),
    Rule("Resilio Sync", "*.!sync", "IMG_1.jpg.!sync", "Resilio Sync"),
    Rule("BitTorrent Sync", "*.bts", "IMG_1.jpg.bts", "BitTorrent Sync 1"),
    Rule("Resilio Sync", "*.rsls", "IMG_1.jpg.rsls", "Resilio Sync, Selective Sync placeholders"),
    Rule("Dropbox", ".dropbox*", ".dropbox.cache", "Dropbox", _SYSTEM),
    Rule("Google Drive", ".tmp.drivedownload", ".tmp.drivedownload", "Google Drive for desktop"),
    Rule("Google Drive", ".tmp.driveupload", ".tmp.driveupload", "Google Drive for desktop"),
    Rule("iCloud", ".*.icloud", ".IMG_1.jpg.icloud", "iCloud Drive, placeholder of a file that is not on this disk"),
    Rule("MEGA", ".getxfer.*.mega", ".getxfer.4711.3.mega", "MEGA SDK, LocalPath::tmpNameLocal"),
    Rule("Unison", "*.unison.tmp", ".unison.IMG_1.jpg.2f1a3b4c.unison.tmp", "unison, os.ml"),
    # Telephones.
    Rule("Android", ".pending-*", ".pending-1712345678-IMG_1.jpg", "MediaProvider, FileUtils.java"),
    Rule("Android", ".trashed-*", ".trashed-1712345678-IMG_1.jpg", "MediaProvider, FileUtils.java", _SYSTEM),
    Rule("Android", ".thumbnails", ".thumbnails", "MediaStore", _SYSTEM),
    Rule("Android", ".nomedia", ".nomedia", "MediaStore.MEDIA_IGNORE_FILENAME", _SYSTEM),
    # Programs that save beside a file and rename.
    Rule("GNOME", ".goutputstream-*", ".goutputstream-U6EGP0", "glib, glocalfileoutputstream.c"),
    Rule(
        *("a Qt program", "NAME.jpg.XXXXXX", "IMG_1.jpg.kQzWvB", "Qt, QSaveFile"),
        regex=rf".+\.{_IMAGE}\.(?=[A-Z]*[a-z])(?=[a-z]*[A-Z])[A-Za-z]{{6}}",
    ),
    Rule(
        *("a macOS program", "NAME.jpg.sb-XXXXXXXX-XXXXXX", "IMG_1.jpg.sb-5f4b7d7e-0VfYhH", "macOS, safe save"),
        regex=r".+\.sb-[0-9a-f]{8}-[A-Za-z0-9]{6}",
    ),
    Rule("ExifTool", "*_exiftool_tmp", "IMG_1.jpg_exiftool_tmp", "exiftool, Writer.pl"),
    Rule("digiKam", "*.digikamtempfile.*", "EditorWindow-kQzWvB.digikamtempfile.jpg", "digikam, editorwindow.cpp"),
    Rule("sed", "sedXXXXXX", "sedAb3x9Z", "sed -i", regex=r"sed(?=.*[A-Z])[A-Za-z0-9]{6}"),
    Rule("sortd", ".sortd-*.part", ".sortd-4f2a.0.part", "docs/durability.md"),
    Rule("Microsoft Office", "~$*", "~$report.jpg", "Office, owner file", _SYSTEM),
    Rule("LibreOffice", ".~lock.*#", ".~lock.report.odt#", "LibreOffice, DocumentLockFile", _SYSTEM),
    Rule("Vim", "*.swp", ".IMG_1.jpg.swp", "vim, :help swap-file", _SYSTEM),
    Rule("Emacs", "#*#", "#IMG_1.jpg#", "Emacs manual, Auto Save Files", _BACKUP),
    Rule("Emacs, gedit or cp --backup", "*~", "IMG_1.jpg~", "Emacs manual, Backup Names; cp(1)", _BACKUP),
    # File systems, servers, desktops.
    Rule("macOS", ".ds_store", ".DS_Store", "Finder", _SYSTEM),
    Rule("macOS", "._*", "._IMG_1.jpg", "AppleDouble", _SYSTEM),
    Rule("macOS", "icon\r", "Icon\r", "Finder", _SYSTEM),
    Rule("macOS", "__macosx", "__MACOSX", "Archive Utility", _SYSTEM),
    Rule("Windows", "thumbs.db", "Thumbs.db", "Explorer", _SYSTEM),
    Rule("Windows", "ehthumbs*.db", "ehthumbs_vista.db", "Media Center", _SYSTEM),
    Rule("Windows", "desktop.ini", "Desktop.ini", "Explorer", _SYSTEM),
    Rule("Windows", "$recycle.bin", "$RECYCLE.BIN", "Explorer", _SYSTEM),
    Rule("Windows", "system volume information", "System Volume Information", "NTFS", _SYSTEM),
    Rule("Synology DSM", "@eadir", "@eaDir", "DSM", _SYSTEM),
    Rule("Synology DSM", "#recycle", "#recycle", "DSM", _SYSTEM),
    Rule("Synology DSM", "#snapshot", "#snapshot", "DSM", _SYSTEM),
    Rule("Synology DSM", "@tmp", "@tmp", "DSM", _SYSTEM),
    Rule("QNAP QTS", "@recycle", "@Recycle", "QTS", _SYSTEM),
    Rule("QNAP QTS", "@recently-snapshot", "@Recently-Snapshot", "QTS", _SYSTEM),
    Rule("Linux", "lost+found", "lost+found", "mklost+found(8)", _SYSTEM),
    Rule("Linux", ".trash*", ".Trash-1000", "freedesktop.org, Trash specification", _SYSTEM),
    Rule("NFS", ".nfs*", ".nfs0000000000000123", "nfs(5), silly rename", _SYSTEM),
    Rule("FUSE", ".fuse_hidden*", ".fuse_hidden0000012300000001", "libfuse, hard_remove", _SYSTEM),
    # What many programs do.
    Rule("Firefox, KDE, yt-dlp or another downloader", "*.part", "IMG_1.jpg.part", "firefox, ExternalHelperAppService"),
    Rule("many a program", "*.tmp", "IMG_1.jpg.tmp", "custom"),
    Rule("many a program", "*.temp", "IMG_1.jpg.temp", "custom"),
    Rule("many a program", "*.incomplete", "IMG_1.jpg.incomplete", "custom"),
    Rule("many a program", "*.inprogress", "IMG_1.jpg.inprogress", "custom"),
    Rule("many a program", "*.unfinished", "IMG_1.jpg.unfinished", "custom"),
    Rule("many a program", "*.downloading", "IMG_1.jpg.downloading", "custom"),
    Rule("many a program", "*.uploading", "IMG_1.jpg.uploading", "custom"),
    Rule("many a program", "*.lock", "IMG_1.jpg.lock", "custom", _SYSTEM),
    Rule(
        *("rsync", ".NAME.XXXXXX", ".IMG_1.jpg.Xk3d9Q", "rsync, receiver.c"),
        regex=r"\..+\.(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{6}",
    ),
    Rule("the user", ".*", ".facebook_1.jpg", "ls(1)", _HIDDEN),
)
"""Every rule; the first match counts."""

CONTROLS: tuple[Rule, ...] = tuple(rule for rule in RULES if rule.is_control)

# A fast filter for most names, by the fixed beginning or ending of each rule.
_FIXED = [(rule, re.split(r"[*\[]", rule.pattern)) for rule in RULES if not rule.regex]


def _shortest(texts: set[str], covers: Callable[[str, str], bool]) -> tuple[str, ...]:
    """Return the texts that no other one covers, as ".part" covers ".part.met" among beginnings."""
    return tuple(text for text in texts if not any(covers(text, other) for other in texts - {text}))


_BEGINNINGS = _shortest({parts[0] for _, parts in _FIXED if parts[0]}, str.startswith)
_ENDINGS = _shortest({parts[-1] for _, parts in _FIXED if not parts[0] and parts[-1]}, str.endswith)
_REGEXES = [(rule, rule.regex.removeprefix(".+")) for rule in RULES if rule.regex]
_SHAPES = re.compile(
    "|".join(
        [
            # Without the ".+" at their beginning, by which each character would be tried.
            *(r"\A" * (rest == rule.regex) + rf"(?:{rest})\Z" for rule, rest in _REGEXES),
            *(f"(?i:{re.escape(parts[1])})" for _, parts in _FIXED if not (parts[0] or parts[-1])),
        ]
    ),
    re.DOTALL,
)


def rule_for(name: str) -> Rule | None:
    """Return the rule by which a base name in the inbox or below a class folder is ignored; None: it is not."""
    lowered = name.lower()
    if not (lowered.startswith(_BEGINNINGS) or lowered.endswith(_ENDINGS) or _SHAPES.search(name)):
        return None
    return next((rule for rule in RULES if rule.matches(name)), None)


def rule_for_folder(name: str) -> Rule | None:
    """Return the rule by which a folder with this name is not a dataset or class; None: it may be one."""
    rule = rule_for(name)
    if rule is None or name.startswith("."):
        return rule
    return rule if rule.reason is Reason.SYSTEM and "*" not in rule.pattern else None


def owner_of(path: str) -> str | None:
    """Return the path of the file that a control file describes; None: it is not a control file."""
    return next((path.removesuffix(rule.ending) for rule in CONTROLS if path.endswith(rule.ending)), None)


def rule_below(path: str, root: str) -> tuple[str, Rule] | None:
    """Return the first ignored component below ``root`` of an absolute path, as a path, and its rule.

    ``root``, which is a dataset or the folder of datasets, may itself be in a hidden folder such as ``~/.local``.
    """
    folder, _, name = path.rpartition("/")
    if len(folder) < len(root) or not path.startswith(f"{root}/"):
        return None
    if (above := _rule_of_folder(folder, root)) is not None:
        return above
    area, _, named = folder.removeprefix(root).rpartition("/")
    is_class = area == "" and named in CLASS_AREAS
    rule = (rule_for_folder if folder == root or is_class else rule_for)(name)
    return None if rule is None else (path, rule)


@lru_cache(maxsize=1024)  # called for each file event, many of which are in few folders
def _rule_of_folder(folder: str, root: str) -> tuple[str, Rule] | None:
    return rule_below(folder, root)
