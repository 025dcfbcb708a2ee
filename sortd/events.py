"""The facts that cross between the core and the edges: stamps, events and commands, all frozen.

Events go into the core, commands come out (see ``core/sorter.py``). Paths are absolute ``str`` as ``os.fsdecode`` gives
them. Times are seconds of a monotonic clock.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # numpy takes a tenth of a second, which commands that only read the configuration need not wait
    from sortd.arrays import FloatArray
    from sortd.classify.prototypes import FinetunedClassifier, PrototypeSet
    from sortd.classify.types import Decision


def signed(number: int) -> int:
    """Return an integer modulo 2**64 as a signed 64-bit integer, which is what SQLite holds."""
    return (number + 2**63) % 2**64 - 2**63


@dataclass(frozen=True, slots=True)
class Stamp:
    """One version of one file: another write, or another file under the same name, has another stamp.

    File systems hold times from the year 1 to 2446 and beyond, 64 bits of nanoseconds only those from 1677 to 2262:
    others are kept modulo 2**64. Build both sides of a comparison as stamps.
    """

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int = 0
    """When bytes, name, rights or links last changed; no program can set it. 0: not known, as in the journal."""

    def agrees_with(self, other: "Stamp") -> bool:
        """Tell whether both are one version, by all that both know."""
        is_one = replace(self, ctime_ns=0) == replace(other, ctime_ns=0)
        return is_one and (self.ctime_ns == other.ctime_ns or 0 in {self.ctime_ns, other.ctime_ns})

    def __post_init__(self) -> None:
        """Bring the times into the range of 64 bits."""
        for name in ("mtime_ns", "ctime_ns"):
            if not -(2**63) <= getattr(self, name) < 2**63:
                object.__setattr__(self, name, signed(getattr(self, name)))

    @property
    def columns(self) -> tuple[int, int, int, int]:
        """Device, inode, size and time as signed 64-bit integers; inode numbers use all 64 bits on some disks."""
        return signed(self.device), signed(self.inode), signed(self.size), self.mtime_ns

    def is_same_version(self, other: "Stamp") -> bool:
        """Whether both are one version; the device does not count, its number changes when a disk is mounted again."""
        return (self.inode, self.size, self.mtime_ns) == (other.inode, other.size, other.mtime_ns)


@dataclass(frozen=True, slots=True)
class DatasetId:
    """One dataset from when it is taken up until it is let go: another one of the same name has another number."""

    name: str
    number: int = 0


class Fit(StrEnum):
    """How an image of any shape comes to the shape that an encoder sees."""

    CROP = "crop"  # the shortest edge resized, then the centre cropped (CLIP)
    STRETCH = "stretch"  # resized straight to height and width, whatever its own proportions (SigLIP)


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """What an encoder sees: the shortest edge resized (bicubic unless said), then the centre cropped, in pixels."""

    shortest_edge: int
    crop_height: int
    crop_width: int
    resample: int = 3  # PIL.Image.Resampling.BICUBIC
    fit: Fit = Fit.CROP


class Writer(StrEnum):
    """Does some process have the file open for writing? What a read lease on it told."""

    ABSENT = "absent"
    PRESENT = "present"
    UNKNOWN = "unknown"  # no lease to be had: not our file, or a network file system
    UNFINISHED = "unfinished"  # a file beside it says that a program has not finished it, open or not


class Refusal(StrEnum):
    """Why an image could not be embedded."""

    UNREADABLE = "unreadable"  # an image by name or content that does not decode: set aside
    TOO_LARGE = "too_large"  # over a limit: set aside
    POISON = "poison"  # its decoding killed workers or ran over the time limit again and again: set aside
    NOT_AN_IMAGE = "not_an_image"  # left where it is
    EMPTY = "empty"  # left where it is until it changes
    DENIED = "denied"  # cannot be read for want of rights, or the disk fails: left where it is
    CHANGED = "changed"  # looked at again
    VANISHED = "vanished"  # forgotten


class Outcome(StrEnum):
    """Where a move takes an image, in the words of the log."""

    FILED = "filed"
    REVIEW = "sent_to_review"
    REJECTED = "rejected"
    FOLLOWED = "followed"  # a companion that came later than its image


class MoveFailure(StrEnum):
    """Why a move did not happen. The file is where it was, unless it vanished."""

    CHANGED = "changed"  # another version stands under that name now
    VANISHED = "vanished"  # nothing stands under that name
    BUSY = "busy"  # a writer has it open
    DESTINATION = "destination"  # no room, no rights, read-only: this folder waits and is tried again
    SOURCE = "source"  # nothing may be taken out of the folder in which it lies, which is tried again


# ---------------------------------------------------------------- events: what the core is told


@dataclass(frozen=True, slots=True)
class ImageSeen:
    """A file stands in ``Images/`` with this stamp; ``closed`` tells of a close after writing.

    ``writer`` is set in the answer to an ``Inspect`` alone. With ``is_aside`` it stands in ``Rejected/``, where
    sortd had put an older version of it. ``since`` is when it came, where an event told of it.
    """

    path: str
    stamp: Stamp
    writer: Writer | None = None
    closed: bool = False
    is_aside: bool = False
    since: float | None = None


@dataclass(frozen=True, slots=True)
class ReviewSeen:
    """An image that sortd itself put into ``Review/`` rests there; that generation could not decide it."""

    path: str
    stamp: Stamp
    generation: int = 0


@dataclass(frozen=True, slots=True)
class ImageHeld:
    """This version of this file is not to be moved until it changes or is released."""

    path: str
    stamp: Stamp


@dataclass(frozen=True, slots=True)
class ImageGone:
    """Nothing stands under that name any more."""

    path: str


@dataclass(frozen=True, slots=True)
class FoldersGone:
    """Nothing stands under the names of these folders any more, nor below them."""

    folders: frozenset[str]


@dataclass(frozen=True, slots=True)
class LookRefused:
    """The disk or the rights refused a look at this name: nothing is known about what stands there."""

    path: str


@dataclass(frozen=True, slots=True)
class ReferencesTouched:
    """Something changed below ``Clases/``."""


@dataclass(frozen=True, slots=True)
class EmbeddedImage:
    """One image of an answer: its embedding, a unit-length float32 row of shape (dimensions,).

    Where a fine-tuned model decides, the row is its logits, float32 (classes,), which are of any length.
    """

    path: str
    stamp: Stamp
    embedding: "FloatArray"
    content: str  # hexadecimal sha256 of the bytes
    decode_seconds: float = 0.0
    encode_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Embedded:
    """Images that the worker has embedded: some of those that it was asked for, as they come."""

    images: tuple[EmbeddedImage, ...]
    encoder_id: str


@dataclass(frozen=True, slots=True)
class ImageRefused:
    """The worker's answer for one image that it could not embed."""

    path: str
    stamp: Stamp
    refusal: Refusal
    message: str


@dataclass(frozen=True, slots=True)
class PrototypesBuilt:
    """A rebuild ended well; the core swaps one reference. Where ``finetuned`` is given, that decides instead."""

    prototypes: "PrototypeSet"
    finetuned: "FinetunedClassifier | None" = None
    job: int = field(kw_only=True)  # of the ``Rebuild`` that it answers


@dataclass(frozen=True, slots=True)
class RebuildFailed:
    """A rebuild did not serve: the last good prototypes stay; with ``references_absent`` nothing moves either.

    It is tried again by and by, unless ``is_lasting``: then only a change of the references, or force, helps.
    """

    message: str
    references_absent: bool = False
    is_lasting: bool = False
    job: int = field(kw_only=True)  # of the ``Rebuild`` that it answers


@dataclass(frozen=True, slots=True)
class DatasetAbsent:
    """The dataset, or a disk of it, is not there: nothing moves until a rebuild that begins later ends well."""

    message: str


@dataclass(frozen=True, slots=True)
class Moved:
    """A move is done and durable."""

    path: str
    stamp: Stamp
    destination: str
    outcome: Outcome
    moved_stamp: Stamp
    note: str = ""  # what was not as it should be: a source that had to be kept, say


@dataclass(frozen=True, slots=True)
class MoveFailed:
    """A move did not happen."""

    path: str
    stamp: Stamp
    failure: MoveFailure
    message: str


@dataclass(frozen=True, slots=True)
class Released:
    """The operator lets a held file go (``path=None``: every one); a dataset that the guard holds is held on."""

    path: str | None = None


@dataclass(frozen=True, slots=True)
class DatasetReleased:
    """The operator has looked: a dataset that the guard holds is let go; files that are held stay so."""


@dataclass(frozen=True, slots=True)
class ScanStarted:
    """A scan of ``Images/`` begins; every file found follows as ``ImageSeen``. Of ``Review/``: as ``ReviewSeen``."""

    in_review: bool = False


@dataclass(frozen=True, slots=True)
class ScanFinished:
    """The scan that began last, of ``Images/`` or of ``Review/``, has named every file."""

    in_review: bool = False


@dataclass(frozen=True, slots=True)
class Tick:
    """A deadline passed."""


@dataclass(frozen=True, slots=True)
class StopRequested:
    """Begin nothing new; what is on its way to the disk is finished."""


OfImages = ImageSeen | ReviewSeen | ImageHeld | ImageGone | FoldersGone | LookRefused | Released | Moved | MoveFailed
OfWorker = Embedded | ImageRefused | PrototypesBuilt | RebuildFailed
OfDataset = ReferencesTouched | DatasetAbsent | DatasetReleased | ScanStarted | ScanFinished | Tick | StopRequested
Event = OfImages | OfWorker | OfDataset

# ---------------------------------------------------------------- commands: what the core asks for


@dataclass(frozen=True, slots=True)
class Inspect:
    """Look at this name again; answer ``ImageSeen`` (with ``writer``) or ``ImageGone``."""

    path: str


@dataclass(frozen=True, slots=True)
class Embed:
    """Embed these versions of these files, newest first; ``Embedded`` or an ``ImageRefused`` answers each."""

    images: tuple[tuple[str, Stamp], ...]


@dataclass(frozen=True, slots=True)
class Rebuild:
    """Build the prototypes anew; answer ``PrototypesBuilt`` or ``RebuildFailed``, with this number."""

    job: int


@dataclass(frozen=True, slots=True)
class Scan:
    """Scan ``Images/``: some of what was seen did not fit into the backlog."""


@dataclass(frozen=True, slots=True)
class Move:
    """Move this version of this file into that folder of the dataset, and say why."""

    path: str
    stamp: Stamp
    folder: str  # relative to the dataset: "Dataset/<class>", "Review/<class>" or "Rejected"
    outcome: Outcome
    decision: "Decision | None" = None  # None where the image was refused
    reason: str = ""  # of an abstention or a refusal
    content: str = ""  # hexadecimal sha256, where it is known
    encoder_id: str = ""
    generation: int = 0
    milliseconds: Mapping[str, float] = field(default_factory=dict)  # settle, decode, encode
    wanted: str = ""  # the name that it is to have there, if it is another one


@dataclass(frozen=True, slots=True)
class Leave:
    """This file stays where it is, and that is worth a line in the log (once)."""

    path: str
    refusal: Refusal
    message: str
    stamp: Stamp | None = None  # the version that was refused


@dataclass(frozen=True, slots=True)
class Hold:
    """Nothing moves in this dataset until somebody has looked and said so (``DatasetReleased``); say why."""

    reason: str


Command = Inspect | Embed | Rebuild | Scan | Move | Leave | Hold
