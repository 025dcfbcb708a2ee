"""The JSON that commands print with ``--json``, as types; those about models are in ``model_documents``."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Time = Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$")]
Interval = tuple[float, float] | None
Figures = dict[str, Any]
"""Figures that only the command itself describes, in the text that it prints without ``--json``."""


DOCUMENTS: dict[str, list[type["Document"]]] = {}
"""The documents of each command, once the modules that define them are imported."""


class Document(BaseModel):
    """An object; the docstrings of its keys are their descriptions."""

    model_config = ConfigDict(use_attribute_docstrings=True, protected_namespaces=())  # model_id is a key

    def __init_subclass__(cls, *, commands: tuple[str, ...] = (), **configuration: Any) -> None:  # noqa: ANN401
        """Note the commands that print such an object."""
        super().__init_subclass__(**configuration)
        for command in commands:
            DOCUMENTS.setdefault(command, []).append(cls)


class FailedDocument(Document):
    """A failed command, on standard error."""

    error: str
    exit_code: int


class CheckFinding(Document):
    """A finding of ``sortd check``."""

    severity: Literal["note", "warning", "error"]
    topic: str | None
    subject: str
    """The path or key that it is about."""
    what: str
    mend: str
    """What to do; empty if nothing."""


class CheckDocument(Document, commands=("check",)):
    """``sortd check``."""

    errors: int
    warnings: int
    findings: list[CheckFinding]


class CheckedProportion(Document):
    """How many checked images are right, and what that says of all."""

    right: float
    judged: int
    interval: Interval
    """Bounds of the 95 % confidence interval."""
    at_least: float | None
    words: str


class AuditedProportion(CheckedProportion):
    """What random samples say of all filed images."""

    images: int
    """Number of filed images."""


class ClassAccuracy(Document):
    """The filed images of one class, and what a person found of them."""

    filed: int
    checked: int
    corrected: int
    undone: int
    found_wrong: int
    audited: int
    audited_right: int
    right: float | None
    """Share of the checked images that is right."""
    interval: Interval


class ServingClassifier(Document):
    """The classifier that decides a dataset."""

    deciding: Literal["prototypes", "finetuned"]
    model_id: str | None
    refusal: str | None = None
    """Why the configured model is not used."""
    classifier: str | None = None
    """The key ``classifier`` of the configuration."""
    folder: str | None = None
    expected: Figures | None = None


class LeftEntry(Document):
    """A file or folder that stays in Images/."""

    path: str
    reason: str
    message: str


class LeftEntries(Document):
    """What stays in Images/."""

    total: int
    reasons: dict[str, int]
    files: list[LeftEntry]
    """At most 1000 of them."""


class DatasetStatus(Document):
    """The status of one dataset; some keys are known only to a running sortd, or absent if the disk is not mounted."""

    root: str | None
    """null: the folder is missing or not mounted."""
    classifier: ServingClassifier
    total: dict[str, int]
    """Number of moves by outcome, with undone ones."""
    held: int
    hold: str | None = None
    """Why the guard holds the dataset."""
    last_move_at: Time | None
    accuracy: dict[str, ClassAccuracy]
    audit: AuditedProportion | None = None
    guesses: CheckedProportion | None = None
    learnt: dict[str, dict[str, int]] | None = None
    in_images: int | None = None
    in_review: int | None = None
    left: LeftEntries | None = None
    problem: str | None = None
    journal_problem: str | None = None
    held_since: Time | None = None
    moving: bool | None = None
    rebuilding: bool | None = None
    images: dict[str, int] | None = None
    """Number of images by state."""
    outcomes: dict[str, int] | None = None
    """Number of images of this run by outcome."""
    generation: int | None = None
    classes: list[str] | None = None
    references: int | None = None
    mode: str | None = None
    files_looked_at: int | None = None


class WatchedRoot(Document):
    """A watched folder."""

    root: str
    mode: str
    why: str | None


class EndpointStatus(Document):
    """The address of ``metrics.http``, and why sortd does not listen there."""

    address: str
    problem: str | None


class StatusDocument(Document, commands=("status",)):
    """``sortd status``; the keys from ``pid`` to ``other_root`` are missing if sortd has never run."""

    config: str | None
    running: bool
    ended: Literal["never ran", "died", "failed", "stopped"] | None
    root: str
    state_dir: str
    datasets: dict[str, DatasetStatus]
    pid: int | None = None
    version: str | None = None
    model: str | None = None
    encoder_id: str | None = None
    ready: bool | None = None
    loading: str | None = None
    config_problem: str | None = None
    encoder_problem: str | None = None
    endpoint: EndpointStatus | None = None
    watching: list[WatchedRoot] | None = None
    written_at: Time | None = None
    ended_by: str | None = None
    started_at: Time | None = None
    other_root: str | None = None


class JournalMove(Document):
    """A move, or what a person did with the image of one (``corrected``, ``confirmed``)."""

    id: int
    dataset: str
    run: str
    at: Time | None
    outcome: str
    label: str | None
    source: str = Field(alias="from")
    destination: str = Field(alias="to")
    size: int
    companions: list[str]
    action: str
    score: float | None
    margin: float | None
    second_label: str | None
    mode: str | None
    reason: str
    generation: int
    encoder_id: str
    content: str
    """sha256 of the image, in hexadecimal; empty if not known."""
    undoes: int | None
    undone_by: int | None
    lost: list[str]
    """Metadata that could not be kept."""
    learnt: bool | None = None
    """Whether the image is a reference; only where a person gave it a class."""


class HistoryDocument(Document, commands=("history",)):
    """``sortd history``."""

    moves: list[JournalMove]
    """The newest first."""


class PrunedJournal(Document):
    """The records of one dataset that were removed."""

    records: int
    """Removed, or with ``--dry-run`` to be removed."""
    kept: int
    """Old records that are still needed."""
    bytes_before: int
    bytes_after: int


class PrunedDocument(Document, commands=("history",)):
    """``sortd history --prune``."""

    dry_run: bool
    before_at: Time
    datasets: dict[str, PrunedJournal]


class ExplainedScore(Document):
    """The score of a class for one image."""

    label: str
    score: float
    references: int
    nearest: float | None
    """Largest cosine of a reference of the class."""


class NearReference(Document):
    """A reference near an image."""

    path: str
    label: str
    similarity: float


class LeftReason(Document):
    """Why a file stays in Images/."""

    reason: str
    message: str


class ExplainDocument(Document, commands=("explain",)):
    """``sortd explain``."""

    path: str
    dataset: str
    content: str
    outcome: Literal["left", "filed", "sent_to_review"]
    left: LeftReason | None
    label: str | None
    reason: str
    score: float
    margin: float
    second_label: str | None
    mode: str
    confidence: float | None
    precision: float | None
    familiarity: float | None
    scores: list[ExplainedScore]
    neighbours: list[NearReference]
    thresholds: list[Figures]
    text_share: float
    classifier: Literal["prototypes", "finetuned"]
    refusal: str | None
    generation: int | None
    encoder_id: str
    held_out: int
    is_checked: bool
    turned_away: int
    other_modes: list[Figures]
    sentences: list[str]
    history: list[JournalMove]


class ExportDocument(Document, commands=("export",)):
    """``sortd export``."""

    dataset: str
    out: str
    format: str
    images: int
    checked: int
    splits: dict[str, int]


class UndoneMove(Document):
    """The undo of one move."""

    dataset: str
    id: int
    was: str
    restored: str | None
    """The path now; null: it was not moved back, and ``message`` says why."""
    message: str


class UndoDocument(Document, commands=("undo",)):
    """``sortd undo``."""

    undone: list[UndoneMove]
    later: int
    """Images that are still to be copied back from another file system."""
    dry_run: bool
    recovered: int | None = None
    """Moves that a crash had interrupted and that were recovered before."""


class ReleaseDocument(Document, commands=("release",)):
    """``sortd release``, by dataset."""

    released: dict[str, int]
    lifted: dict[str, str] | None = None
    """Why the guard had held the datasets that are released."""
    still_held: dict[str, str] | None = None


class RetriedImage(Document):
    """A rejected image that is tried again."""

    path: str
    restored: str | None
    message: str


class RetryDocument(Document, commands=("release",)):
    """``sortd release`` of a file in Rejected/."""

    retried: list[RetriedImage]
    later: int


class RebuildDocument(Document, commands=("rebuild",)):
    """``sortd rebuild``."""

    rebuilding: list[str]


class UnreadableImage(Document):
    """A file that cannot be read."""

    path: str
    message: str


class ReviewGroup(Document):
    """Images in Review/ that resemble each other."""

    id: str
    size: int
    members: list[str]
    familiarity: float | None
    nearest_label: str | None
    is_new: bool


class DatasetGroups(Document):
    """The groups of one dataset."""

    root: str
    waiting: int
    alone: int
    groups: list[ReviewGroup]
    next_to_label: list[str]
    unreadable: list[UnreadableImage]


class GroupsDocument(Document, commands=("groups",)):
    """``sortd groups``."""

    datasets: dict[str, DatasetGroups]


class PlacedImage(Document):
    """An image that a person gave a class."""

    path: str
    destination: str | None
    """null: it was not moved, and ``message`` says why."""
    id: int | None
    message: str


class AcceptDocument(Document, commands=("groups",)):
    """``sortd groups --accept``."""

    dataset: str
    group: str
    label: str
    assigned: list[PlacedImage]
    later: int


class AssignDocument(Document, commands=("assign",)):
    """``sortd assign``."""

    dataset: str
    label: str
    example: bool
    assigned: list[PlacedImage]
    later: int


class RefileProposal(Document):
    """A filed image that would be filed into another class now."""

    id: int
    path: str
    former: str | None = Field(alias="from")
    proposed: str = Field(alias="to")
    then: float | None
    now: float
    margin: float
    second_label: str | None
    mode: str


class DatasetReconsidered(Document):
    """The filed images of one dataset, decided again."""

    root: str
    considered: int
    abstained: int
    proposals: list[RefileProposal]
    unreadable: list[UnreadableImage]
    refiled: list[PlacedImage] | None = None
    later: int | None = None


class ReconsiderDocument(Document, commands=("reconsider",)):
    """``sortd reconsider``."""

    applied: bool
    datasets: dict[str, DatasetReconsidered]


class SampledImage(Document):
    """An image of a sample."""

    id: int
    path: str
    label: str
    score: float | None


class SampleDocument(Document, commands=("audit",)):
    """``sortd audit``."""

    dataset: str
    root: str
    drawn_at: Time
    unchecked: int
    images: list[SampledImage]
    if_none_is_wrong: CheckedProportion


class AnswersDocument(Document, commands=("audit",)):
    """``sortd audit --wrong`` and ``--all-right``."""

    dataset: str
    sample: CheckedProportion
    wrong: list[SampledImage]
    gone: list[str]
    all: CheckedProportion
