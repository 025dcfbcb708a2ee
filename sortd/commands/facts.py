"""The commands that only look: ``check``, ``status`` and ``history``; none of them imports torch."""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from time import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sortd.commands.console import (
    ConfigOption,
    DatasetOption,
    JsonOption,
    counted,
    load_config,
    moment_option,
    out_of,
    print_json,
    print_line,
    print_table,
    printable,
    say,
)
from sortd.errors import JournalError

if TYPE_CHECKING:
    from sortd.commands.finding import Finding
    from sortd.config import Config

RESTING = {"abstained", "refused", "held"}
"""States of images that wait for nothing; they are told of as files in Review/ and as held."""

NOT_RUNNING = 75
"""The exit code of ``status`` where no sortd runs, as of ``rebuild``: start one and try again."""

MARKS = {"note": ("·", ""), "warning": ("!", "yellow"), "error": ("✗", "bold red")}


def check(
    config: ConfigOption = None,
    as_json: JsonOption = False,
    thorough: Annotated[
        bool, typer.Option("--thorough", help="Decode every reference, however long it takes.")
    ] = False,
) -> None:
    """Look at configuration, folders, rights, disks, references and model, and say what to mend."""
    from sortd.commands.check import check as findings_of
    from sortd.commands.finding import Topic, exit_code

    findings = []
    for finding in findings_of(config, os.environ, thorough=thorough):
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
        what = "nothing is wrong, but what the references can honour is not known"
        print_line(f"{what} of {counted(unknown, 'dataset')}", style="bold yellow")
    else:
        print_line("all is well", style="bold green")
    raise typer.Exit(exit_code(findings))


def _print_finding(finding: "Finding") -> None:
    mark, style = MARKS[finding.severity.value]
    print_line(f"{mark} {finding.severity.value}: {printable(finding.subject)}", style=style)
    print_line(f"    {printable(finding.what)}")
    if finding.mend:
        print_line(f"    -> {printable(finding.mend)}", style="green")


def status(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Tell whether sortd runs (exit code 75: none does), with which model, what waits, and how often it was right."""
    from sortd.commands.overview import overview
    from sortd.config import find

    loaded = load_config(config)
    file = config or find(os.environ)
    facts = {"config": None if file is None else os.path.abspath(file), **overview(loaded)}
    if as_json:
        print_json(facts)
    else:
        _print_status(facts)
    raise typer.Exit(0 if facts["running"] else NOT_RUNNING)


def _print_status(facts: Mapping[str, Any]) -> None:
    _print_run(facts)
    for name, dataset in facts["datasets"].items():
        _print_dataset(name, dataset)
    if not os.path.isdir(facts["root"]):
        mend = "make it, mount its disk, or set `root` to the folder of your datasets"
        print_line(f"{printable(facts['root'])} is missing: {mend}", style="bold red")
    elif not facts["datasets"]:
        root = printable(facts["root"])
        print_line(f"{root} holds no dataset; make one: sortd init {root}/NAME")


def _print_run(facts: Mapping[str, Any]) -> None:
    from sortd.moments import duration, shown

    if facts["running"]:
        since = facts.get("started_at")
        age = "" if since is None else f" since {shown(since)} ({duration(time() - since)})"
        state = "runs" if facts.get("ready") else "is starting"
        print_line(f"sortd {facts['version']} {state}{age}, pid {facts['pid']}", style="bold green")
    else:
        when = f"; last heard of {shown(facts['written_at'])}" if facts.get("written_at") else ""
        died = "does not run: it was killed, or could not write down why it ended; its log may say (stderr, journalctl)"
        how = {"never ran": "has not run yet", "died": died, "failed": f"does not run: {facts.get('ended_by')}"}
        print_line(printable(f"sortd {how.get(facts['ended'], 'does not run')}{when}"), style="bold yellow")
    print_line(f"  config    {printable(facts['config'] or 'no file was found: all defaults')}")
    print_line(f"  state     {printable(facts['state_dir'])}")
    if facts.get("model"):
        model, _, hint = facts["model"].partition("; ")
        print_line(f"  model     {model}, {facts['encoder_id']}")
        if hint:
            print_line(f"            {hint}")
    elif facts["running"] and facts.get("loading"):
        print_line(f"  model     {printable(facts['loading'])}")
    if facts.get("other_root"):
        print_line(
            f"  root      that one works on {printable(facts['other_root'])}, this configuration says {facts['root']}"
        )
    for watched in facts.get("watching") or ():
        why = f" ({watched['why']})" if watched["why"] else ""
        print_line(f"  watching  {printable(watched['root'])}: {watched['mode']}{why}")
    if facts.get("config_problem"):
        print_line("  the last configuration was refused, the one before it is still in force:", style="bold red")
        for line in facts["config_problem"].splitlines():
            print_line(f"    {printable(line)}", style="red")


def _print_dataset(name: str, facts: Mapping[str, Any]) -> None:
    from sortd.moments import shown

    print_line("")
    print_line(printable(name), style="bold")
    _print_problems(facts)
    if facts["root"] is None:
        print_line("  folder    is gone or not mounted; this is from its journal")
    if facts.get("classes") is not None:
        learnt = f"{counted(len(facts['classes']), 'class')} from {counted(facts.get('references', 0), 'reference')}"
        print_line(f"  learnt    {learnt}, generation {facts.get('generation', 0)}, mode {facts.get('mode')}")
    _print_classifier(facts["classifier"])
    waiting = {word: number for word, number in (facts.get("images") or {}).items() if number and word not in RESTING}
    if waiting:
        print_line("  waiting   " + ", ".join(f"{number:,} {word}" for word, number in waiting.items()))
    elif facts.get("in_images") and not facts.get("images"):
        print_line(f"  waiting   {counted(facts['in_images'], 'file')} in Images/")
    total = ", ".join(f"{number:,} {outcome.replace('_', ' ')}" for outcome, number in sorted(facts["total"].items()))
    last = f"; last {shown(facts['last_move_at'])}" if facts["last_move_at"] else ""
    print_line(f"  so far    {total or 'nothing moved'}{last}")
    if facts.get("in_review"):
        print_line(f"  review    {counted(facts['in_review'], 'file')} in Review/")
    _print_left(facts)
    if facts["accuracy"]:
        _print_accuracy(facts["accuracy"])


def _print_accuracy(accuracy: Mapping[str, Any]) -> None:
    """Print by class what became of what was filed, and how much of it is known to be right."""
    numbers = ("filed", "corrected", "undone")
    rows = [(label, *(one[name] for name in numbers), _right(one)) for label, one in accuracy.items()]
    print_table(("class", *numbers, "right"), rows, right=numbers)
    if any(one["checked"] for one in accuracy.values()):
        print_line("  right: of those filed before you last corrected or undid an image of the class")


def _right(facts: Mapping[str, Any]) -> str:
    """Return how many of a class's images were right, of those that a person has checked."""
    checked = facts["checked"]
    return out_of(checked - facts["corrected"] - facts["undone"], checked) if checked else "not checked"


def _print_problems(facts: Mapping[str, Any]) -> None:
    from sortd.moments import shown

    for problem in {facts.get("problem"): None, facts.get("journal_problem"): None}:  # each once
        if problem:
            print_line(f"  problem   {printable(problem)}", style="bold red")
    if facts.get("held_since"):
        print_line(
            f"  held      since {shown(facts['held_since'])}: nothing in it is moved; sortd tries again by itself"
        )


def _print_left(facts: Mapping[str, Any]) -> None:
    """Say how many files stay in Images/ and why, and how to let go those that are held."""
    reasons = (facts.get("left") or {}).get("reasons", {})
    if reasons:
        counts = ", ".join(f"{number:,} {reason.replace('_', ' ')}" for reason, number in reasons.items())
        print_line(f"  left      in Images/: {counts}; their paths: sortd status --json")
    if facts["held"]:
        print_line(f"  held      {counted(facts['held'], 'file')}; let them go: sortd release --all")


def _print_classifier(facts: Mapping[str, Any]) -> None:
    by = f"the fine-tuned model {facts['model_id']}" if facts["deciding"] == "finetuned" else "the prototypes"
    print_line(f"  decided   by {by}")
    if facts.get("refusal"):
        print_line(f"  problem   {printable(facts['refusal'])}", style="bold red")


def history(  # noqa: PLR0913, PLR0917 -- each is an option of the command line
    config: ConfigOption = None,
    dataset: DatasetOption = None,
    label: Annotated[str | None, typer.Option("--label", help="Only this class.")] = None,
    outcome: Annotated[
        str | None, typer.Option("--outcome", help="Only filed, sent_to_review, rejected or undone.")
    ] = None,
    since: Annotated[
        str | None, typer.Option("--since", help="From then on: 2026-03-01, '14:30', 2h, yesterday.")
    ] = None,
    until: Annotated[str | None, typer.Option("--until", help="Until then.")] = None,
    run: Annotated[str | None, typer.Option("--run", help="Only this run of sortd.")] = None,
    path: Annotated[Path | None, typer.Option("--path", help="Only this file: where it was or went.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=0, help="At most so many, the newest; 0: all.")] = 50,
    as_json: JsonOption = False,
) -> None:
    """Tell what was moved where and why, newest first."""
    if outcome not in {None, "filed", "sent_to_review", "rejected", "undone"}:
        raise typer.BadParameter("must be filed, sent_to_review, rejected or undone", param_hint="--outcome")
    records, refusal = _records(
        load_config(config),
        dataset=dataset,
        label=label,
        outcome=outcome,
        since=moment_option("--since", since),
        until=moment_option("--until", until),
        run=run,
        path=path,
        limit=limit or None,
    )
    if as_json:
        print_json(records)
    else:
        _print_records(records, limit)
    if refusal is not None:
        raise refusal


def _print_records(records: Sequence[Mapping[str, Any]], limit: int) -> None:
    if sys.stdout.isatty():
        for record in records:
            _print_record(record)
    else:
        columns = ("when", "dataset", "outcome", "from", "to", "score", "margin", "reason", "run")
        print_table(columns, (_columns(record) for record in records))
    if not records:
        say("sortd: the journal knows of no such move")
    if limit and len(records) == limit:
        say(f"sortd: the newest {limit}; --limit 0 shows all")


def _columns(record: Mapping[str, Any]) -> tuple[object, ...]:
    from sortd.moments import shown

    return (
        shown(record["at"]),
        record["dataset"],
        record["outcome"].replace("_", " ") + (" (undone)" if record["undone_by"] else ""),
        _relative(record["from"]),
        _relative(record["to"]),
        "" if record["score"] is None else f"{record['score']:.3f}",
        "" if record["margin"] is None else f"{record['margin']:.3f}",
        record["reason"],
        record["run"],
    )


def _print_record(record: Mapping[str, Any]) -> None:
    """Print a record as one line, which a narrow terminal may break where it likes: columns would be too many."""
    when, dataset, outcome, source, destination, score, margin, reason, run = map(str, _columns(record))
    why = [f"score {score}, margin {margin}"] if score else []
    why += [reason] if reason else []
    line = f"{when}  {dataset}  {outcome}: {source} -> {destination}  ({', '.join([*why, f'run {run}'])})"
    styles = {"sent to review": "yellow", "rejected": "red", "undone": "cyan"}
    print_line(printable(line), style=styles.get(outcome, ""))


def _records(
    config: "Config",
    *,
    dataset: str | None,
    path: Path | None,
    **conditions: Any,  # noqa: ANN401 -- of Selection
) -> tuple[Sequence[dict[str, Any]], JournalError | None]:
    """Return the records of all journals that were asked for, newest first, and why one could not be read."""
    from sortd.commands.journals import journals, narrowed, record_facts
    from sortd.store.history import History
    from sortd.store.records import Selection

    dataset, relative = narrowed(config, dataset, path)
    records: list[dict[str, Any]] = []
    refusal = None
    for place in journals(config, dataset):
        if not place.is_there:
            continue
        try:
            with History.open(place.file) as history:
                found_here = history.moves(Selection(path=relative, **conditions))
        except JournalError as error:
            refusal = refusal or error
        else:
            records += [record_facts(place, record) for record in found_here]
    records.sort(key=lambda one: (one["at"], one["id"]), reverse=True)
    return records[: conditions["limit"]], refusal


def _relative(path: str) -> str:
    """Shorten a path to what lies in its dataset."""
    for area in ("/Images/", "/Dataset/", "/Review/", "/Rejected/"):
        if area in path:
            return path[path.index(area) + 1 :]
    return path
