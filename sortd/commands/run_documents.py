"""The JSON of the commands that run or set up sortd, and of those of bulk work, as types."""

from typing import Any

from sortd.commands.documents import CheckedProportion, Document, Figures


class DryRunDocument(Document, commands=("once",)):
    """``sortd once --dry-run``: one image, on one line."""

    dataset: str
    path: str
    destination: str
    outcome: str
    label: str | None = None
    """The class, or the best guess of an image that would go to Review/."""
    reason: str | None = None
    score: float | None = None
    margin: float | None = None
    second_label: str | None = None
    mode: str | None = None
    generation: int | None = None
    encoder_id: str | None = None


class OnceCounts(Document):
    """What became of the images of one dataset."""

    filed: dict[str, int]
    """Images by class."""
    review: dict[str, int]
    """Images in Review/ by reason."""
    rejected: int


class OnceDocument(Document, commands=("once",)):
    """``sortd once``."""

    datasets: dict[str, OnceCounts]


class EffectiveValue(Document):
    """The value of a key of the configuration."""

    value: str | float | bool | list[Any] | None
    source: str
    """``file:line``, the name of a variable, or ``default``."""


class ConfigDocument(Document, commands=("config",)):
    """``sortd config --effective``."""

    config: str | None
    """The file; null without one."""
    values: dict[str, EffectiveValue]
    """By key, for example ``abstain.precision``."""


class NotifyTarget(Document):
    """A receiver of notifications."""

    target: str
    events: list[str]
    problem: str | None = None
    """Why the test message was not taken; null if it was. Only with --test."""


class NotifyDocument(Document, commands=("notify",)):
    """``sortd notify``."""

    targets: list[NotifyTarget]
    messages_per_hour: int
    quiet_hours: str | None


class BulkPlanDocument(Document, commands=("bulk plan",)):
    """``sortd bulk plan``."""

    run: str
    source: str
    created: str
    version: int
    """Of the files of the run."""
    count: int
    """Number of images."""
    parts: int
    errors: int
    """Entries of the source that could not be read."""
    examples: list[str]
    """Some of them, with the reason."""


class BulkStage(Document):
    """A stage of the work on images."""

    seconds: float
    """Sum over all processes."""
    images_per_second: float | None


class BulkDecideDocument(Document, commands=("bulk decide",)):
    """``sortd bulk decide``."""

    engine: str
    run: str
    parts: int
    parts_before: int
    """Parts that were decided before."""
    images: int
    filed: int
    unreadable: int
    seconds: float
    working_seconds: float
    """Without the start of the engine and the model."""
    images_per_second: float | None
    stages: dict[str, BulkStage]


class BulkApplyDocument(Document, commands=("bulk apply", "bulk undo")):
    """``sortd bulk apply`` and ``sortd bulk undo``."""

    run: str
    dry_run: bool | None = None
    moved: dict[str, int]
    """Images that were moved, or would be, by class; after an undo of files, by dataset."""
    before: int
    """Images for which it was done before."""
    later: int
    """Images that the running sortd moves later."""
    abstained: dict[str, int]
    """Images that stay, by the reason of the decision."""
    refused: dict[str, int]
    """Images that were not moved, by reason."""
    listed: list[dict[str, str]]
    """Some of the refused images."""


class BulkReportDocument(Document, commands=("bulk report",)):
    """``sortd bulk report``."""

    run: str
    source: str
    planned: int
    decided: int
    filed: int
    unreadable: int
    classes: dict[str, int]
    reasons: dict[str, int]
    """Abstentions by reason."""
    examples: list[dict[str, str]]
    """Some unreadable images."""
    checked: CheckedProportion
    checked_by_class: dict[str, CheckedProportion]
    seed: int
    sample: list[Figures]
    """Images drawn at random, with their decisions."""
