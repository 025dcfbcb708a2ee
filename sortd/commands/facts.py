"""The commands ``check``, ``status`` and ``history``, which change nothing and never import torch."""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from time import time
from typing import Any

from sortd.commands.check import check_all
from sortd.commands.check_references import DECODING_SECONDS, Finding, Topic, exit_code
from sortd.commands.console import (
    counted,
    format_duration,
    format_time,
    load_config,
    out_of,
    print_json,
    print_line,
    print_table,
    printable,
    say,
)
from sortd.commands.journals import journals, narrowed, record_facts
from sortd.commands.overview import overview
from sortd.config import find_config_file
from sortd.errors import JournalError
from sortd.store.history import History
from sortd.store.records import Selection

AT_REST = {"abstained", "refused", "held"}
"""States of images that wait for nothing: they are counted as files in Review/ and as held."""

NOT_RUNNING = 75
"""Exit code of ``status`` and ``rebuild`` if no sortd runs."""

STYLES = {"sent to review": "yellow", "rejected": "red", "undone": "cyan"}
MARKS = {"note": ("·", ""), "warning": ("!", "yellow"), "error": ("✗", "bold red")}


def show_check(config: Path | None, *, as_json: bool, thorough: bool) -> int:
    """Print each finding as soon as its check yields it, and return the exit code."""
    findings, seconds = [], float("inf") if thorough else DECODING_SECONDS
    for finding in check_all(config, os.environ, decoding_seconds=seconds):
        findings.append(finding)
        if not as_json:
            _print_finding(finding)
    counts = {word: sum(1 for finding in findings if finding.severity == word) for word in ("error", "warning")}
    if as_json:
        print_json(
            {"errors": counts["error"], "warnings": counts["warning"], "findings": [asdict(f) for f in findings]}
        )
    elif any(counts.values()):
        print_line(", ".join(counted(number, word) for word, number in counts.items() if number), style="bold")
    elif unknown := sum(1 for finding in findings if finding.topic is Topic.CALIBRATION and finding.mend):
        what = f"no problem found, but the accuracy of {counted(unknown, 'dataset')} is not known"
        print_line(what, style="bold yellow")
    else:
        print_line("no problem found", style="bold green")
    return exit_code(findings)


def _print_finding(finding: Finding) -> None:
    mark, style = MARKS[finding.severity.value]
    print_line(f"{mark} {finding.severity.value}: {printable(finding.subject)}", style=style)
    print_line(f"    {printable(finding.what)}")
    if finding.mend:
        print_line(f"    -> {printable(finding.mend)}", style="green")


def show_status(path: Path | None, *, as_json: bool) -> int:
    """Print the overview and return the exit code, which is 75 if no sortd runs."""
    config = load_config(path)
    file = path or find_config_file(os.environ)
    facts = {"config": None if file is None else os.path.abspath(file), **overview(config)}
    if as_json:
        print_json(facts)
    else:
        _print_status(facts)
    return 0 if facts["running"] else NOT_RUNNING


def _print_status(facts: Mapping[str, Any]) -> None:
    _print_run(facts)
    for name, dataset in facts["datasets"].items():
        _print_dataset(name, dataset)
    root = printable(facts["root"])
    if not os.path.isdir(facts["root"]):
        advice = "create it, mount its disk, or set `root` to the folder of your datasets"
        print_line(f"{root} is missing: {advice}", style="bold red")
    elif not facts["datasets"]:
        print_line(f"{root} holds no dataset; create one: sortd init {root}/NAME")


def _print_row(name: str, text: str, *, style: str = "") -> None:
    print_line(f"  {name:<10}{text}", style=style)


def _print_run(facts: Mapping[str, Any]) -> None:
    if facts["running"]:
        since = facts.get("started_at")
        age = "" if since is None else f" since {format_time(since)} ({format_duration(time() - since)})"
        state = "runs" if facts.get("ready") else "is starting"
        print_line(f"sortd {facts['version']} {state}{age}, pid {facts['pid']}", style="bold green")
    else:
        when = f"; last status {format_time(facts['written_at'])}" if facts.get("written_at") else ""
        died = "does not run: it was killed, or could not record why it ended; see its log (stderr, journalctl)"
        how = {"never ran": "has not run yet", "died": died, "failed": f"does not run: {facts.get('ended_by')}"}
        print_line(printable(f"sortd {how.get(facts['ended'], 'does not run')}{when}"), style="bold yellow")
    _print_row("config", printable(facts["config"] or "no file found: built-in values"))
    _print_row("state", printable(facts["state_dir"]))
    if facts.get("model"):
        model, _, hint = facts["model"].partition("; ")
        _print_row("model", f"{model}, {facts['encoder_id']}")
        if hint:
            _print_row("", hint)
    elif facts["running"] and facts.get("loading"):
        _print_row("model", printable(facts["loading"]))
    if other := facts.get("other_root"):
        _print_row("root", f"the running sortd uses {printable(other)}, this configuration {facts['root']}")
    for watched in facts.get("watching") or ():
        why = f" ({watched['why']})" if watched["why"] else ""
        _print_row("watching", f"{printable(watched['root'])}: {watched['mode']}{why}")
    if facts.get("config_problem"):
        print_line("  the changed configuration is not valid; the previous one is still used:", style="bold red")
        for line in facts["config_problem"].splitlines():
            print_line(f"    {printable(line)}", style="red")


def _print_dataset(name: str, facts: Mapping[str, Any]) -> None:
    print_line("")
    print_line(printable(name), style="bold")
    _print_state(facts)
    _print_counts(facts)
    if facts["accuracy"]:
        _print_accuracy(facts["accuracy"])


def _print_state(facts: Mapping[str, Any]) -> None:
    """Print the problems of a dataset, its references, and the classifier that decides."""
    for problem in dict.fromkeys((facts.get("problem"), facts.get("journal_problem"))):
        if problem:
            _print_row("problem", printable(problem), style="bold red")
    if facts.get("held_since"):
        since = format_time(facts["held_since"])
        _print_row("held", f"since {since}: nothing in it is moved; sortd tries again")
    if facts["root"] is None:
        _print_row("folder", "is missing or not mounted; these facts are from its journal")
    if facts.get("classes") is not None:
        built = f"{counted(len(facts['classes']), 'class')} from {counted(facts.get('references', 0), 'reference')}"
        _print_row("classes", f"{built}, generation {facts.get('generation', 0)}, mode {facts.get('mode')}")
    classifier = facts["classifier"]
    is_finetuned = classifier["deciding"] == "finetuned"
    by = f"the fine-tuned model {classifier['model_id']}" if is_finetuned else "the prototypes"
    _print_row("decided", f"by {by}")
    if classifier.get("refusal"):
        _print_row("problem", printable(classifier["refusal"]), style="bold red")


def _print_counts(facts: Mapping[str, Any]) -> None:
    """Print how many files wait, were moved, or stay in Images/."""
    images = facts.get("images") or {}
    waiting = [f"{number:,} {word}" for word, number in images.items() if number and word not in AT_REST]
    if not images and facts.get("in_images"):
        waiting = [f"{counted(facts['in_images'], 'file')} in Images/"]
    if waiting:
        _print_row("waiting", ", ".join(waiting))
    total = ", ".join(f"{number:,} {outcome.replace('_', ' ')}" for outcome, number in sorted(facts["total"].items()))
    last = f"; last {format_time(facts['last_move_at'])}" if facts["last_move_at"] else ""
    _print_row("moved", f"{total or 'nothing'}{last}")
    if facts.get("in_review"):
        _print_row("review", f"{counted(facts['in_review'], 'file')} in Review/")
    if reasons := (facts.get("left") or {}).get("reasons", {}):
        counts = ", ".join(f"{number:,} {reason.replace('_', ' ')}" for reason, number in reasons.items())
        _print_row("left", f"in Images/: {counts}; their paths: sortd status --json")
    if facts["held"]:
        _print_row("held", f"{counted(facts['held'], 'file')}; to release them: sortd release --all")


def _print_accuracy(accuracy: Mapping[str, Any]) -> None:
    """Print for each class the number of filed, corrected and undone images, and the precision of the checked ones."""
    numbers = ("filed", "corrected", "undone")
    rows = []
    for label, one in accuracy.items():
        checked = one["checked"]
        right = out_of(checked - one["corrected"] - one["undone"], checked) if checked else "not checked"
        rows.append((label, *(one[name] for name in numbers), right))
    print_table(("class", *numbers, "right"), rows, right=numbers)
    if any(one["checked"] for one in accuracy.values()):
        print_line("  right: among the images filed before the last correction or undo in the class")


def show_history(
    path: Path | None,
    *,
    dataset: str | None,
    file: Path | None,
    limit: int,
    as_json: bool,
    **conditions: Any,  # noqa: ANN401 -- of Selection
) -> None:
    """Print the records that meet the conditions, newest first; then raise JournalError if a journal was unreadable."""
    config, refusal, records = load_config(path), None, list[dict[str, Any]]()
    dataset, relative = narrowed(config, dataset, file)
    for place in journals(config, dataset):
        if not place.is_there:
            continue
        try:
            with History.open(place.file) as history:
                found = history.moves(Selection(path=relative, limit=limit or None, **conditions))
        except JournalError as error:
            refusal = refusal or error
        else:
            records += [record_facts(place, record) for record in found]
    records.sort(key=lambda one: (one["at"], one["id"]), reverse=True)
    records = records[: limit or None]
    if as_json:
        print_json(records)
    else:
        _print_records(records, limit)
    if refusal is not None:
        raise refusal


def _print_records(records: Sequence[Mapping[str, Any]], limit: int) -> None:
    rows = [_columns(record) for record in records]
    if sys.stdout.isatty():  # so many columns would be too wide
        for row in rows:
            _print_record(*row)
    else:
        print_table(("when", "dataset", "outcome", "from", "to", "score", "margin", "reason", "run"), rows)
    if not records:
        say("sortd: the journal has no such move")
    if limit and len(records) == limit:
        say(f"sortd: these are the newest {limit} moves; --limit 0 shows all")


def _print_record(when: str, dataset: str, outcome: str, source: str, destination: str, *facts: str) -> None:
    score, margin, reason, run = facts
    why = [f"score {score}, margin {margin}"] if score else []
    shown = ", ".join([*why, *([reason] if reason else []), f"run {run}"])
    line = f"{when}  {dataset}  {outcome}: {source} -> {destination}  ({shown})"
    print_line(printable(line), style=STYLES.get(outcome, ""))


def _columns(record: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        format_time(record["at"]),
        record["dataset"],
        record["outcome"].replace("_", " ") + (" (undone)" if record["undone_by"] else ""),
        _relative(record["from"]),
        _relative(record["to"]),
        "" if record["score"] is None else f"{record['score']:.3f}",
        "" if record["margin"] is None else f"{record['margin']:.3f}",
        record["reason"] or "",
        record["run"],
    )


def _relative(path: str) -> str:
    """Return a path relative to its dataset."""
    for area in ("/Images/", "/Dataset/", "/Review/", "/Rejected/"):
        if area in path:
            return path[path.index(area) + 1 :]
    return path
