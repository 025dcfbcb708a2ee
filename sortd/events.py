"""Stamps, events and commands: the frozen values that the core and the rest of the daemon exchange.

Events go into the core, commands come out (see ``core/sorter.py``). Paths are absolute ``str`` as ``os.fsdecode``
returns them. Times are seconds of a monotonic clock.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

if TYPE_CHECKING:  # numpy takes 0.1 s to import, which commands that only read the configuration can save
    from sortd.arrays import FloatArray
    from sortd.classify.prototypes import Classifier, FinetunedClassifier, PrototypeSet


def signed(number: int) -> int:
    """Return an integer modulo 2**64 as a signed 64-bit integer, as SQLite stores it."""
    return (number + 2**63) % 2**64 - 2**63


class Stamp(NamedTuple):
    """One version of one file: a write or another file under the same name changes the stamp.

    File systems store times from year 1 to 2446 and beyond, 64 bits of nanoseconds only 1677 to 2262: other times are
    kept modulo 2**64 (see ``files.stamp_of``). A scan makes one for each file: a tuple costs less.
    """

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int = 0  # the change time, which no program can set; 0: unknown, as in the journal

    def agrees_with(self, other: "Stamp") -> bool:
        """Return whether both are the same version; an unknown change time equals any."""
        is_one = self[:4] == other[:4]
        return is_one and (self.ctime_ns == other.ctime_ns or 0 in {self.ctime_ns, other.ctime_ns})

    @property
    def columns(self) -> tuple[int, int, int, int]:
        """Device, inode, size and mtime as signed 64-bit integers; some file systems use all 64 bits for inodes."""
        return signed(self.device), signed(self.inode), signed(self.size), self.mtime_ns

    def is_same_version(self, other: "Stamp") -> bool:
        """Return whether both are the same version on any device: its number changes with each mount."""
        return (self.inode, self.size, self.mtime_ns) == (other.inode, other.size, other.mtime_ns)


@dataclass(frozen=True, slots=True)
class DatasetId:
    """One dataset from its opening to its closing: another one of the same name has another number."""

    name: str
    number: int = 0


class Fit(StrEnum):
    """How an image is resized to the input of an encoder."""

    CROP = "crop"  # the shortest edge resized, then the centre cropped (CLIP)
    STRETCH = "stretch"  # resized to height and width, without keeping the aspect ratio (SigLIP)
    WHOLE = "whole"  # all of it, reduced to fit into height and width, never enlarged: for people, not for encoders


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """The input of an encoder, in pixels."""

    shortest_edge: int
    crop_height: int
    crop_width: int
    resample: int = 3  # PIL.Image.Resampling.BICUBIC
    fit: Fit = Fit.CROP

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:
        """Return the preprocessing with these fields, as JSON has them."""
        numbers = {key: int(value) for key, value in fields.items() if key != "fit"}
        return cls(**numbers, fit=Fit(fields["fit"]))


class Writer(StrEnum):
    """Whether a process has the file open for writing, by a read lease on it."""

    ABSENT = "absent"
    PRESENT = "present"
    UNKNOWN = "unknown"  # no lease possible: another user's file, or a network file system
    UNFINISHED = "unfinished"  # a control file beside it says that a program has not finished it


class Refusal(StrEnum):
    """Why an image could not be embedded."""

    UNREADABLE = "unreadable"  # looks like an image but cannot be decoded: goes to Rejected/
    TOO_LARGE = "too_large"  # over a limit: goes to Rejected/
    POISON = "poison"  # its decoding killed processes or exceeded the time limit repeatedly: goes to Rejected/
    NOT_AN_IMAGE = "not_an_image"  # stays where it is
    EMPTY = "empty"  # stays where it is until it changes
    DENIED = "denied"  # cannot be read because of permissions or the disk: stays where it is
    ABSTAINED = "abstained"  # no class is certain, and the action puts nothing into Review/: stays where it is
    CHANGED = "changed"  # settles again
    VANISHED = "vanished"  # forgotten


class Outcome(StrEnum):
    """The kind of a move, as named in the log."""

    FILED = "filed"
    REVIEW = "sent_to_review"
    REJECTED = "rejected"
    FOLLOWED = "followed"  # a companion that arrived after its image
    ASSIGNED = "assigned"  # filed into a class that a person named; a reference of that class from then on
    REFILED = "refiled"  # moved from one class to another by a later decision, see ``sortd reconsider``


class MoveFailure(StrEnum):
    """Why a move did not happen; unless it vanished, the file is in its place."""

    CHANGED = "changed"  # another version has this name now
    VANISHED = "vanished"  # no file has this name
    BUSY = "busy"  # a writer has it open
    DESTINATION = "destination"  # disk full, permissions, read-only: the folder is retried
    SOURCE = "source"  # the source folder does not allow it and is retried


class Mode(StrEnum):
    """The rule that computes one score per class."""

    AVG = "avg"  # mean cosine to the references of a class
    MAX = "max"  # largest cosine to a reference of a class
    MEAN = "mean"  # cosine to the unit mean of the references
    TEXT = "text"  # cosine to the prototype of the class's name
    BEST = "best"  # Gaussians and kernels over the whitened references
    MIXED = "mixed"  # best, with the class's name as prior mean


class ClassifierKind(StrEnum):
    """The classifier of a dataset."""

    PROTOTYPES = "prototypes"  # one of the modes above
    FINETUNED = "finetuned"  # a model that was trained on the dataset's own folders


DecidedBy = Mode | Literal[ClassifierKind.FINETUNED]

Action = Literal["move", "copy", "hardlink", "symlink", "keywords"]  # what is done with a decided image of Images/


@dataclass(frozen=True, slots=True)
class Assigned:
    """The image is filed into ``label``."""

    label: str
    score: float  # probability of the class for the modes in PROBABILISTIC, else its cosine
    margin: float  # difference to the second-best score
    second_label: str | None
    mode: DecidedBy
    confidence: float = 1.0  # probability of the class among the known classes
    precision: float | None = None  # precision of held-out images with at least this confidence; None: not calibrated
    familiarity: float | None = field(default=None, compare=False)
    """Likeness to the references of the class, None without a gate; its last digits depend on the other images."""

    @property
    def best_label(self) -> str:
        """The label."""
        return self.label

    @property
    def probability(self) -> float:
        """The probability of the class among the known classes: ``confidence``."""
        return self.confidence

    @property
    def reason(self) -> None:
        """None: the image is filed."""


NO_CLASS = "_none"
"""The folder in Review/ for images without a best guess, and for those that look like no class."""
LIKE_NO_CLASS = frozenset({"typicality", "stranger"})
"""The reasons to abstain from any class; by the others only the best one is in doubt."""


@dataclass(frozen=True, slots=True)
class Abstained:
    """The image is not filed; ``reason`` is a key of ``explain.REASONS``."""

    reason: str
    best_label: str | None
    score: float
    margin: float
    second_label: str | None
    mode: DecidedBy
    confidence: float = 0.0
    precision: float | None = None
    familiarity: float | None = field(default=None, compare=False)

    @property
    def label(self) -> None:
        """None: the image is not filed; ``best_label`` is the best guess."""

    @property
    def probability(self) -> float:
        """The probability of the best guess among the known classes: ``confidence``."""
        return self.confidence

    @property
    def review_folder(self) -> str:
        """The folder in Review/ for the image: its best guess, or ``NO_CLASS``."""
        return NO_CLASS if self.best_label is None or self.reason in LIKE_NO_CLASS else self.best_label


Decision = Assigned | Abstained


# ---------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class ImageSeen:
    """A file is in ``Images/`` with this stamp; ``closed``: it was closed after writing.

    ``writer`` is set in the answer to an ``Inspect``, and where the first scan finds a file that has settled.
    ``is_aside``: the file is in ``Rejected/``, and sortd had put an older version of it there. ``since``: when it
    arrived, if an event said so. ``still_seconds``: for how long it had not changed, by its times.
    """

    path: str
    stamp: Stamp
    writer: Writer | None = None
    closed: bool = False
    is_aside: bool = False
    since: float | None = None
    still_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class ReviewSeen:
    """An image that sortd put into ``Review/`` is still there; ``generation`` could not decide it.

    ``is_unfamiliar``: it looked like no class.
    """

    path: str
    stamp: Stamp
    generation: int = 0
    is_unfamiliar: bool = False


@dataclass(frozen=True, slots=True)
class ImageHeld:
    """This version of this file must not be moved until it changes or is released."""

    path: str
    stamp: Stamp


@dataclass(frozen=True, slots=True)
class ImageGone:
    """There is no file under this path any more."""

    path: str


@dataclass(frozen=True, slots=True)
class FoldersGone:
    """These folders do not exist any more."""

    folders: frozenset[str]


@dataclass(frozen=True, slots=True)
class LookRefused:
    """A file could not be inspected because of the disk or its permissions, so nothing is known about it."""

    path: str


@dataclass(frozen=True, slots=True)
class ReferencesTouched:
    """Something changed below ``Clases/``."""


@dataclass(frozen=True, slots=True)
class EmbeddedImage:
    """One image and its embedding, a float32 row of unit length, shape (dimensions,).

    Where a fine-tuned model decides, the row holds its logits, float32 (classes,), of any length.
    """

    path: str
    stamp: Stamp
    embedding: "FloatArray"
    content: str  # hexadecimal sha256 of the bytes
    decode_seconds: float = 0.0
    encode_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Embedded:
    """Some of the images that the worker was asked to embed."""

    images: tuple[EmbeddedImage, ...]
    encoder_id: str


@dataclass(frozen=True, slots=True)
class ImageRefused:
    """An image that the worker could not embed."""

    path: str
    stamp: Stamp
    refusal: Refusal
    message: str


@dataclass(frozen=True, slots=True)
class PrototypesBuilt:
    """A rebuild succeeded; ``finetuned``, if given, decides instead of the prototypes."""

    prototypes: "PrototypeSet"
    finetuned: "FinetunedClassifier | None" = None
    job: int = field(kw_only=True)  # of the ``Rebuild``

    @property
    def classifier(self) -> "Classifier":
        """What decides."""
        return self.finetuned or self.prototypes


@dataclass(frozen=True, slots=True)
class RebuildFailed:
    """A rebuild failed: the last prototypes stay in use; with ``references_absent`` nothing is moved either.

    It is retried unless ``is_lasting``: then only a change of the references, or ``--force``, helps.
    """

    message: str
    references_absent: bool = False
    is_lasting: bool = False
    job: int = field(kw_only=True)  # of the ``Rebuild``


@dataclass(frozen=True, slots=True)
class DatasetAbsent:
    """The dataset, or a disk of it, is missing: nothing is moved until a later rebuild succeeds."""

    message: str


@dataclass(frozen=True, slots=True)
class Moved:
    """A move is done and durable."""

    path: str
    stamp: Stamp
    destination: str
    outcome: Outcome
    moved_stamp: Stamp
    note: str = ""  # a problem that did not stop the move, such as a source that had to be kept


@dataclass(frozen=True, slots=True)
class MoveFailed:
    """A move did not happen."""

    path: str
    stamp: Stamp
    failure: MoveFailure
    message: str


@dataclass(frozen=True, slots=True)
class Released:
    """The operator released a held file (``path=None``: all); a hold by the guard stays."""

    path: str | None = None


@dataclass(frozen=True, slots=True)
class DatasetReleased:
    """The operator released the hold by the guard; held files stay held."""


@dataclass(frozen=True, slots=True)
class ScanStarted:
    """A scan of ``Images/`` begins: an ``ImageSeen`` follows for each file; of ``Review/``: a ``ReviewSeen``."""

    in_review: bool = False


@dataclass(frozen=True, slots=True)
class ScanFinished:
    """The last scan of ``Images/``, or of ``Review/``, has reported every file."""

    in_review: bool = False


@dataclass(frozen=True, slots=True)
class Tick:
    """A deadline passed."""


@dataclass(frozen=True, slots=True)
class StopRequested:
    """Start nothing new; the moves under way are finished."""


Event = (
    ImageSeen | ReviewSeen | ImageHeld | ImageGone | FoldersGone | LookRefused | Released | Moved | MoveFailed
    | Embedded | ImageRefused | PrototypesBuilt | RebuildFailed
    | ReferencesTouched | DatasetAbsent | DatasetReleased | ScanStarted | ScanFinished | Tick | StopRequested
)  # fmt: skip

# ---------------------------------------------------------------- commands


@dataclass(frozen=True, slots=True)
class Inspect:
    """Inspect this path; the answer is ``ImageSeen`` (with ``writer``) or ``ImageGone``."""

    path: str


@dataclass(frozen=True, slots=True)
class Embed:
    """Embed these versions of these files, newest first; each is answered by ``Embedded`` or ``ImageRefused``."""

    images: tuple[tuple[str, Stamp], ...]


@dataclass(frozen=True, slots=True)
class Rebuild:
    """Rebuild the prototypes; the answer, ``PrototypesBuilt`` or ``RebuildFailed``, has this number."""

    job: int


@dataclass(frozen=True, slots=True)
class Scan:
    """Scan ``Images/``: some images did not fit into the backlog."""


@dataclass(frozen=True, slots=True)
class Move:
    """Move this version of this file into a folder of the dataset."""

    path: str
    stamp: Stamp
    folder: str  # relative to the dataset: "Dataset/<class>", "Review/<class>" or "Rejected"
    outcome: Outcome
    decision: Decision | None = None  # None if the image was refused
    reason: str = ""  # of an abstention or a refusal
    content: str = ""  # hexadecimal sha256, if known
    encoder_id: str = ""
    generation: int = 0
    milliseconds: Mapping[str, float] = field(default_factory=dict)  # settle, decode, encode
    wanted: str = ""  # its new name, if another one
    action: Action = "move"

    @property
    def assigned_label(self) -> str | None:
        """The class that a person named; None for any other move."""
        return self.folder.partition("/")[2] if self.outcome is Outcome.ASSIGNED else None


@dataclass(frozen=True, slots=True)
class Leave:
    """Log once that this file stays where it is."""

    path: str
    refusal: Refusal
    message: str
    stamp: Stamp | None = None


@dataclass(frozen=True, slots=True)
class Hold:
    """Log that nothing is moved in this dataset until it is released (``DatasetReleased``)."""

    reason: str


Decide = Callable[["Classifier", "FloatArray", Sequence[int]], list[Decision]]
"""Returns the decision of a classifier for each row of embeddings or logits.

The numbers are those of ``classify.decide.decide``: the generation that took an image for one of no class, or 0."""

Command = Inspect | Embed | Rebuild | Scan | Move | Leave | Hold
