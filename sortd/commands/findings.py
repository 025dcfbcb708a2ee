"""The findings of `sortd check`: their severity and topic, the output, and the exit code."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import partial

from sortd.commands.console import counted, print_line, printable, show

MARKS = {"note": ("·", ""), "warning": ("!", "yellow"), "error": ("✗", "bold red")}


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


def show_findings(found: Iterable[Finding], *, as_json: bool) -> int:
    """Print each finding as soon as its check yields it, and return the exit code."""
    findings = []
    for finding in found:
        findings.append(finding)
        if not as_json:
            _print_finding(finding)
    counts = {word: sum(1 for finding in findings if finding.severity == word) for word in ("error", "warning")}
    facts = {"errors": counts["error"], "warnings": counts["warning"], "findings": [asdict(f) for f in findings]}
    show(facts, lambda _: _print_summary(findings, counts), as_json=as_json)
    return exit_code(findings)


def _print_summary(findings: Sequence[Finding], counts: Mapping[str, int]) -> None:
    if any(counts.values()):
        print_line(", ".join(counted(number, word) for word, number in counts.items() if number), style="bold")
    elif unknown := sum(1 for finding in findings if finding.topic is Topic.CALIBRATION and finding.mend):
        what = f"no problem found, but the accuracy of {counted(unknown, 'dataset')} is not known"
        print_line(what, style="bold yellow")
    else:
        print_line("no problem found", style="bold green")


def _print_finding(finding: Finding) -> None:
    mark, style = MARKS[finding.severity.value]
    print_line(f"{mark} {finding.severity.value}: {printable(finding.subject)}", style=style)
    print_line(f"    {printable(finding.what)}")
    if finding.mend:
        print_line(f"    -> {printable(finding.mend)}", style="green")


def exit_code(findings: Iterable[Finding]) -> int:
    """Return the exit code of the command (sysexits(3)): 78 configuration, 69 model, 65 references, 0 no error."""
    topics = {finding.topic for finding in findings if finding.severity is Severity.ERROR}
    if topics - {Topic.REFERENCES, Topic.CALIBRATION, Topic.MODEL}:
        return 78
    return 69 if Topic.MODEL in topics else 65 if topics else 0
