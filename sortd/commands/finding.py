"""A finding of ``sortd check``: a fact about a path or a key, its severity, and what to do about it."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial


class Severity(StrEnum):
    """How bad a finding is."""

    NOTE = "note"  # nothing to do
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
    """One fact about ``subject``, a path or a key; a ``topic`` of None is replaced by that of the check."""

    severity: Severity
    topic: Topic | None
    subject: str
    what: str
    mend: str = ""


def _finding(severity: Severity, subject: object, what: str, mend: str = "", topic: Topic | None = None) -> Finding:
    return Finding(severity, topic, str(subject), what, mend)


note, warning, error = (partial(_finding, severity) for severity in Severity)


def exit_code(findings: Iterable[Finding]) -> int:
    """Return the exit code of the command (sysexits(3)): 78 configuration, 69 model, 65 references, 0 no error."""
    topics = {finding.topic for finding in findings if finding.severity is Severity.ERROR}
    if topics - {Topic.REFERENCES, Topic.CALIBRATION, Topic.MODEL}:
        return 78
    return 69 if Topic.MODEL in topics else 65 if topics else 0
