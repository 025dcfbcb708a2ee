"""The command ``status``: the run of sortd, the datasets, and the classifier that decides each of them.

The facts come from the status file, the journals and the folders; no model is loaded, and nothing is changed.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from time import time
from typing import Any

from sortd import errors
from sortd.classify.proportions import estimated, interval, out_of, proportion, with_intervals
from sortd.commands.console import counted, format_duration, format_time, print_line, print_table, printable, show
from sortd.commands.moves import JournalPlace, datasets_there, journal_of, journals
from sortd.config import Config, find_config_file
from sortd.daemon.audit import evidence_of
from sortd.daemon.control import NotRunningError
from sortd.daemon.learnt import labelled_images, learnt_counts
from sortd.daemon.references import ReferencesAbsentError, ReferenceSettings, class_labels
from sortd.daemon.reporting import LISTED
from sortd.daemon.resources import reference_settings_of, select_classifier, unfit
from sortd.encoder import finetuned
from sortd.encoder.finetuned import FinetunedFacts, finetuning_results, read_facts
from sortd.errors import DataError, JournalError, ModelError
from sortd.layout import Area, Layout, Reason, Why, find_datasets, owner_of, rule_below, rule_for_folder
from sortd.moving.fs import is_version
from sortd.service import read_status
from sortd.store.checks import FiledImages
from sortd.store.history import History
from sortd.store.records import Selection
from sortd.watch.scan import scan, scan_all, why_unfinished

Row = dict[str, str]
"""A file or folder that stays in Images/: its ``path``, ``reason`` and ``message``."""

STATUS_KEYS = (
    "pid", "version", "model", "encoder_id", "ready", "loading", "config_problem", "encoder_problem", "endpoint",
    "watching", "written_at", "ended_by",
)  # fmt: skip
NOT_KNOWN = {"deciding": "prototypes", "model_id": None, "refusal": None}
"""The classifier of a missing dataset, of which only the journal is known."""

AT_REST = {"abstained", "refused", "held"}
"""States of images that wait for nothing: they are counted as files in Review/ and as held."""


def show_status(config: Config, named: Path | None, *, as_json: bool) -> int:
    """Print the overview and the configuration file, which ``named`` may name; return 0, or 75 if no sortd runs."""
    file = named or find_config_file(os.environ)
    facts = {"config": None if file is None else os.path.abspath(file), **overview(config)}
    show(facts, _print_status, as_json=as_json)
    return 0 if facts["running"] else NotRunningError.exit_code


def overview(config: Config) -> dict[str, Any]:
    """Return all facts as plain values; if no sortd runs or a dataset is not mounted, those of the journals."""
    last = read_status(config.state_dir)
    is_alive = last is not None and last["alive"]
    run: dict[str, Any] = {
        "running": is_alive,
        "ended": None if is_alive else _ended(last),
        "root": str(config.root),
        "state_dir": str(config.state_dir),
    }
    if last is not None:
        run |= {key: last.get(key) for key in STATUS_KEYS}
        run["started_at"] = _started_at(last.get("started_ticks")) if is_alive else None
        run["other_root"] = last["root"] if last.get("root") not in {None, str(config.root)} else None
    live = (last or {}).get("datasets", {})
    places = [place for place in journals(config) if place.root is not None or place.is_there]
    known = {place.dataset for place in places}
    places += [JournalPlace(name, None, Path()) for name in live if is_alive and name not in known]  # never served
    datasets = {
        place.dataset: _dataset(config, place, live.get(place.dataset, {}), is_alive=bool(is_alive))
        for place in reversed(places)
    }
    return run | {"datasets": dict(sorted(datasets.items()))}


def _ended(last: dict[str, Any] | None) -> str:
    """Return how the last run ended, according to its status file."""
    if last is None:
        return "never ran"
    return "died" if last.get("running") else "failed" if last.get("ended_by") else "stopped"


def _dataset(config: Config, place: JournalPlace, live: dict[str, Any], *, is_alive: bool) -> dict[str, Any]:
    """Return one dataset's facts; those that only a running sortd knows are missing if none runs."""
    facts: dict[str, Any] = {"root": None if place.root is None else str(place.root)}
    if not (is_alive and "classifier" in live):  # a running sortd reports the classifier that decides
        facts["classifier"] = NOT_KNOWN if place.root is None else serving_facts(config, Layout(place.root))
    if is_alive:
        facts |= live
    else:
        facts |= {key: live[key] for key in ("problem", "generation", "classes", "references", "mode") if key in live}
    journal, held = _from_journal(place)
    facts |= journal
    if place.root is not None:
        layout = Layout(place.root)
        facts["in_images"], left = _look_through(layout)
        facts["left"] = _left([*left, *held], facts.get("left"))
        facts["in_review"] = _count_review(layout)
        facts["learnt"] = _learnt_facts(config, place)
    if not is_alive and facts.get("hold"):  # newer than the problem in the status file
        facts["problem"] = facts["hold"]
    return facts


def _from_journal(place: JournalPlace) -> tuple[dict[str, Any], list[Row]]:
    """Return the facts of a journal, and its held files that have not changed since."""
    facts: dict[str, Any] = {"total": {}, "held": 0, "last_move_at": None, "accuracy": {}}
    if not place.is_there:
        return facts, []
    try:
        with place.open() as history:
            last, held = history.moves(Selection(limit=1)), history.held()
            facts = {
                "total": history.counts(),
                "held": len(held),
                "hold": history.guard().reason or None,
                "last_move_at": last[0].ended_at if last else None,
                **_checked_facts(history),
            }
    except JournalError as error:
        return facts | {"journal_problem": str(error)}, []
    rows, why = [], "it is held after an undo until it changes or is released: sortd release PATH"
    for path, mark in ((f"{place.root}/{relative}", mark) for relative, mark in held.items()):
        with suppress(OSError):
            rows += [_row(path, Reason.HELD, why)] if is_version(os.lstat(path), mark) else []
    return facts, rows


def _checked_facts(history: History) -> dict[str, Any]:
    """Return what a person has checked: filed images by class, those of random samples, and guesses in Review/."""
    accuracy = history.accuracy()
    audited, right = (sum(getattr(one, name) for one in accuracy.values()) for name in ("audited", "audited_right"))
    return {
        "accuracy": {label: _filed_facts(filed) for label, filed in accuracy.items()},
        "audit": {"images": sum(one.filed for one in accuracy.values()), **proportion(right, audited)},
        "guesses": proportion(*history.guesses()),
    }


def _filed_facts(filed: FiledImages) -> dict[str, Any]:
    """Return the counts of a class as plain values, with the precision and its interval if some images are checked."""
    if not filed.checked:
        return {**asdict(filed), "right": None, "interval": None}
    bounds = tuple(round(bound, 4) for bound in interval(filed.right, filed.checked))
    return {**asdict(filed), "right": round(filed.right / filed.checked, 4), "interval": bounds}


def _learnt_facts(config: Config, place: JournalPlace) -> dict[str, dict[str, int]]:
    """Return how many images in Dataset/ are references of each class; none if the journal cannot be read."""
    learns = config.dataset(place.dataset).learn_from_corrections
    if place.root is not None:
        with suppress(JournalError), place.open() as history:
            return learnt_counts(Layout(place.root), history, with_corrections=learns)
    return {}


def _look_through(layout: Layout) -> tuple[int | None, list[Row]]:
    """Return the number of files in Images/ to sort, or None if it cannot be listed, and the entries that stay."""
    images, root = os.fspath(layout.area(Area.IMAGES)), os.fspath(layout.root)
    refused: list[OSError] = []
    count, rows, owners = 0, [], set()
    for path, found in scan_all(images, report=refused.append):
        if isinstance(found, Why):
            rows.append(_row(path, found.reason, found.message))
            if (owner := owner_of(path)) is not None:
                owners.add(owner)
        else:
            count += 1
    for owner in sorted(owners):
        why = why_unfinished(owner, root) if os.path.lexists(owner) and not rule_below(owner, root) else None
        if why is not None:
            rows.append(_row(owner, why.reason, why.message))
            count -= os.path.isfile(owner)
    rows += [_row(error.filename, "unreadable", errors.unreadable(error)) for error in refused]
    is_listed = images not in {error.filename for error in refused}
    return count if is_listed else None, rows


def _left(rows: Sequence[Row], live: Mapping[str, Any] | None) -> dict[str, Any]:
    """Count the entries that stay in Images/ by reason: the rows of this scan, and those of the running sortd."""
    seen = {row["path"] for row in rows}
    looked_into: list[Row] = [] if live is None else live["files"]
    reasons = Counter(row["reason"] for row in rows)
    reasons.update({} if live is None else live["reasons"])
    reasons.subtract(row["reason"] for row in looked_into if row["path"] in seen)
    files = [*rows, *(row for row in looked_into if row["path"] not in seen)]
    counted = {reason: count for reason, count in sorted(reasons.items()) if count > 0}
    return {"total": sum(counted.values()), "reasons": counted, "files": files[:LISTED]}


def _row(path: str, reason: str, message: str) -> Row:
    return {"path": path, "reason": str(reason), "message": message}


def _count_review(layout: Layout) -> int | None:
    """Return the number of files in Review/, or None if it cannot be listed."""
    refused: list[OSError] = []
    review = os.fspath(layout.area(Area.REVIEW))
    count = sum(1 for _ in scan(review, report=refused.append, rule_at_top=rule_for_folder))
    return None if refused else count


def _started_at(ticks: int | None) -> float | None:
    """Convert clock ticks since boot (see proc_pid_stat(5)) to seconds since the epoch."""
    if ticks is None:
        return None
    with open("/proc/stat", encoding="ascii", errors="replace") as lines:
        booted = next(float(line.split()[1]) for line in lines if line.startswith("btime"))
    return booted + ticks / os.sysconf("SC_CLK_TCK")


# ---------------------------------------------------------------- the classifier in use


def serving_facts(config: Config, layout: Layout) -> dict[str, Any]:
    """Return the classifier in use as plain values without loading a model.

    ``deciding`` is ``prototypes`` or ``finetuned``, ``refusal`` why the configured model is not used, and ``expected``
    the results on its held-out images under the settings of the dataset.
    """
    own = config.dataset(layout.name)
    facts: dict[str, Any] = {"classifier": own.classifier, "deciding": "prototypes"}
    facts |= dict.fromkeys(("folder", "model_id", "refusal", "expected"))
    try:
        promotion = finetuned.read_promotion(layout.state_folder(config.state_dir))
        if promotion is not None:
            facts |= {"folder": str(promotion.folder), "model_id": promotion.model_id}
        elif own.classifier != "finetuned":
            return facts
        labels = class_labels(layout.area(Area.CLASES))
    except (ModelError, ReferencesAbsentError) as error:
        return {**facts, "refusal": str(error)}
    found = select_classifier(layout, config.state_dir, own.classifier, labels)
    classifier = found.classifier(reference_settings_of(own).settings.abstain, generation=0)
    if classifier is not None:
        calibration = classifier.calibration
        facts["deciding"] = "finetuned"
        expected = {
            "held_out": calibration.held_out,
            "filed_held_out": calibration.filed_held_out,
            "right_held_out": calibration.right_held_out,
            "least_confidence": calibration.confidence,
            "filed": calibration.filed_expected,
            "right": calibration.precision_expected,
            "notes": list(calibration.notes),
        }
        facts["expected"] = with_intervals(expected, {"filed": "held_out", "right": "filed_held_out"})
    return {**facts, "refusal": found.refusal}


def list_finetuned_models(config: Config) -> dict[str, Any]:
    """Return the fine-tuned models of each dataset, newest first, as plain values."""
    return {layout.name: _models_of(config, layout) for layout in datasets_there(config)}


def _models_of(config: Config, layout: Layout) -> dict[str, Any]:
    serving = serving_facts(config, layout)
    folders = finetuning_results(layout.state_folder(config.state_dir))
    if serving["folder"] is not None and Path(serving["folder"]) not in folders:
        folders.append(Path(serving["folder"]))
    rows = []
    for folder in folders:
        try:
            row = result_facts(read_facts(folder))
        except ModelError as error:
            row = {"folder": str(folder), "problem": str(error)}
        is_promoted = row["folder"] == serving["folder"]
        rows.append({**row, "promoted": is_promoted, "serves": is_promoted and serving["deciding"] == "finetuned"})
    return {**serving, "results": rows}


def promotable_model(config: Config, layout: Layout) -> FinetunedFacts | None:
    """Return the newest model of a dataset if it is stronger than the prototypes and can be promoted."""
    found = finetuning_results(layout.state_folder(config.state_dir))
    try:
        facts = read_facts(found[0]) if found else None
        labels = class_labels(layout.area(Area.CLASES))
    except (ModelError, ReferencesAbsentError):
        return None  # damaged, or not mounted
    if facts is None or facts.verdict != "stronger" or unfit(facts, labels, dataset=layout.name) is not None:
        return None
    return facts


def result_facts(facts: FinetunedFacts) -> dict[str, Any]:
    """Return the facts of one fine-tuned model as plain values."""
    comparison = facts.metrics["comparison"]
    said = {
        "folder": str(facts.folder),
        "model_id": facts.model_id,
        "base": facts.base,
        "created": facts.created,
        "classes": len(facts.labels),
        "verdict": facts.verdict,
        "accuracy": comparison.get("finetuned_accuracy"),
        "prototypes_accuracy": comparison.get("best_mode_accuracy"),
        "images": comparison.get("images"),
        "best_mode": comparison.get("best_mode"),
        "problem": None,
    }
    return with_intervals(said, {"accuracy": "images", "prototypes_accuracy": "images"})


def accuracy_comparison(facts: FinetunedFacts) -> str:
    """Return the accuracies of a model and of the prototypes in words."""
    said = result_facts(facts)
    ours, theirs = (estimated(said[key], said["images"] or 0) for key in ("accuracy", "prototypes_accuracy"))
    return f"accuracy {ours}, mode {said['best_mode']}: {theirs}"


def dataset_named(config: Config, name: str | None) -> Layout:
    """Return a dataset by name, or the only one.

    Raises DataError: there is no such dataset, or not exactly one; LayoutError: the root cannot be listed.
    """
    layouts = {layout.name: layout for layout in find_datasets(config.root)}
    if name is None and len(layouts) == 1:
        return next(iter(layouts.values()))
    there = ", ".join(layouts) or "none; create one with `sortd init DIR`"
    if name is None:
        raise DataError(f"choose a dataset with --dataset NAME; there are: {there}")
    if name not in layouts:
        raise DataError(f"there is no dataset {name!r} in {config.root}; there are: {there}")
    return layouts[name]


def chosen_datasets(config: Config, name: str | None) -> list[Layout]:
    """Return one dataset by its name, or all; raises as ``dataset_named``, also if there is none at all."""
    chosen = find_datasets(config.root) if name is None else [dataset_named(config, name)]
    if not chosen:
        raise DataError(f"there is no dataset in {config.root}; create one with `sortd init DIR`")
    return chosen


def settings_with_corrections(config: Config, layout: Layout) -> ReferenceSettings:
    """Return the reference settings of a dataset, with references and checked images by its journal.

    Raises JournalError: the journal cannot be read.
    """
    reference_settings = reference_settings_of(config.dataset(layout.name))
    learns = reference_settings.learns_from_corrections
    with journal_of(config, layout).open() as history:
        labelled = labelled_images(layout, history, with_corrections=learns)
        evidence = evidence_of(history, reference_settings.settings.mode)
        return replace(reference_settings, corrections=labelled, evidence=evidence)


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


def _print_problem(name: str, problem: str | None, *, style: str = "bold yellow") -> None:
    if problem:
        _print_row(name, printable(problem), style=style)


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
        _print_problem("", hint, style="")
    elif facts["running"] and facts.get("loading"):
        _print_row("model", printable(facts["loading"]))
    if facts["running"]:
        _print_problem("encoder", facts.get("encoder_problem"))
        _print_problem("endpoint", (facts.get("endpoint") or {}).get("problem"))
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
        audit, guesses = facts["audit"], facts["guesses"]
        drawn = f": {out_of(audit['right'], audit['judged'])} in random samples" if audit["judged"] else ""
        to_check = f"sortd audit --dataset {printable(name)}"
        print_line(f"  right among all filed images: {audit['words']}{drawn}; to check more: {to_check}")
        if guesses["judged"]:
            print_line(f"  right guesses of images in Review/: {out_of(guesses['right'], guesses['judged'])}")


def _print_state(facts: Mapping[str, Any]) -> None:
    """Print the problems of a dataset, its references, and the classifier that decides."""
    for problem in dict.fromkeys((facts.get("problem"), facts.get("journal_problem"))):
        _print_problem("problem", problem, style="bold red")
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
    _print_problem("problem", classifier.get("refusal"), style="bold red")


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
    if learnt := facts.get("learnt"):
        counts = ", ".join(f"{printable(label)} {sum(ways.values())}" for label, ways in learnt.items())
        total = counted(sum(sum(ways.values()) for ways in learnt.values()), "image")
        _print_row("learnt", f"from {total} in Dataset/ that a person gave a class: {counts}")
    if reasons := (facts.get("left") or {}).get("reasons", {}):
        counts = ", ".join(f"{number:,} {reason.replace('_', ' ')}" for reason, number in reasons.items())
        _print_row("left", f"in Images/: {counts}; their paths: sortd status --json")
    if facts["held"]:
        _print_row("held", f"{counted(facts['held'], 'file')}; to release them: sortd release --all")


def _print_accuracy(accuracy: Mapping[str, Any]) -> None:
    """Print for each class the number of filed, corrected and undone images, and the precision of the checked ones."""
    numbers = {"filed": "filed", "corrected": "corrected", "undone": "undone", "found wrong": "found_wrong"}
    rows = []
    for label, one in accuracy.items():
        checked = one["checked"]
        wrong = one["corrected"] + one["undone"] + one["found_wrong"]
        right = out_of(checked - wrong, checked) if checked else "not checked"
        rows.append((label, *(one[key] for key in numbers.values()), right))
    print_table(("class", *numbers, "right"), rows, right=tuple(numbers))
    if any(one["checked"] for one in accuracy.values()):
        print_line("  right: among those audited, and those filed before the last correction or undo in the class")
