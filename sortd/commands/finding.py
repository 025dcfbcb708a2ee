"""What ``sortd check`` finds: a fact about a subject, its severity, and what to do about it."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """How bad a finding is."""

    NOTE = "note"  # worth knowing, nothing to do
    WARNING = "warning"  # sortd works, but not as well as it could
    ERROR = "error"  # sortd does not start, or part of it cannot work


class Topic(StrEnum):
    """What a finding is about; the exit code depends on it."""

    CONFIGURATION = "configuration"
    FOLDERS = "folders"
    FILE_SYSTEM = "file_system"
    WATCHING = "watching"
    REFERENCES = "references"
    CALIBRATION = "calibration"
    MODEL = "model"
    PROCESS = "process"
    MACHINE = "machine"


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact that ``sortd check`` tells."""

    severity: Severity
    topic: Topic
    subject: str
    """The path, or the key, that it is about."""
    what: str
    mend: str = ""


def note(topic: Topic, subject: object, what: str, mend: str = "") -> Finding:
    """Return something worth knowing."""
    return Finding(Severity.NOTE, topic, str(subject), what, mend)


def warning(topic: Topic, subject: object, what: str, mend: str = "") -> Finding:
    """Return something to mend when there is time."""
    return Finding(Severity.WARNING, topic, str(subject), what, mend)


def error(topic: Topic, subject: object, what: str, mend: str = "") -> Finding:
    """Return something to mend before sortd can work."""
    return Finding(Severity.ERROR, topic, str(subject), what, mend)


def exit_code(findings: Iterable[Finding]) -> int:
    """Return what the command exits with, as in sysexits(3): 78 configuration, 69 model, 65 references, 0 no error."""
    topics = {finding.topic for finding in findings if finding.severity is Severity.ERROR}
    if topics - {Topic.REFERENCES, Topic.CALIBRATION, Topic.MODEL}:
        return 78
    if Topic.MODEL in topics:
        return 69
    return 65 if topics else 0
