"""The command ``eval``: evaluate the references of datasets, print the figures, and write them to an HTML page."""

import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from sortd import __version__
from sortd.classify.evaluate import EvaluationReport, evaluate
from sortd.classify.prompts import written_name
from sortd.classify.proportions import estimated, with_intervals
from sortd.commands.console import bar, counted, format_time, print_line, print_table, printable, say, show
from sortd.commands.status import chosen_datasets, serving_facts, settings_with_corrections
from sortd.config import Config
from sortd.daemon.embedder import Embedder
from sortd.daemon.references import References, keep_evaluated
from sortd.daemon.resources import LoadEncoder, Resources
from sortd.encoder.models import PACKAGED, STRONGER, locate_clip
from sortd.errors import DataError, DestinationError, ModelError, SortdError, StorageError
from sortd.events import ImageRefused
from sortd.files import write_atomic
from sortd.images.thumbnails import thumbnails
from sortd.layout import Area, Layout

SUSPECTS_PRINTED = 5
MODE_COLUMNS = {
    "mode": "mode",
    "new images": "distinct_accuracy",
    "by class": "balanced_accuracy",
    "by image": "accuracy",
}
TRADE_COLUMNS = {"precision wanted": "precision", "coverage": "filed", "precision": "expected", "": "note"}
CLASS_COLUMNS = {
    "class": "label",
    "images": "references",
    "recall": "recall",
    "precision": "precision",
    "F1": "f1",
    "confused with": "confused_with",
    "needs images": "needs_images",
}
JUDGED = {
    "modes": {"distinct_accuracy": "distinct_judged", "balanced_accuracy": "judged", "accuracy": "judged"},
    "trade_offs": {"filed": "held_out", "expected": "judged"},
    "class_reports": {"recall": "judged", "precision": "decided"},
}
"""The shares of each list of a report, and where the number of images behind them is."""
CALIBRATED = {"accuracy": "held_out", "filed_expected": "held_out", "precision_expected": "precision_judged"}
TEXTS = {"mode", "label", "note", "confused_with", "needs_images"}

TEMPLATES = Path(__file__).parents[1] / "templates"
HIGH_ACCURACY = 0.95
"""Leave-one-out accuracy from which a stronger model is not recommended."""
MATRIX_CLASSES = 30
"""Largest size of the confusion matrix; the classes with the most errors are shown."""
SUSPECTS_ON_PAGE = 24
_SUSPECTS = {
    "mislabelled": ("Probably mislabelled", "resembles"),
    "duplicate": ("Near-duplicates in two classes", "is also in"),
    "outlier": ("Outliers of their class", ""),
}
NOW_BELOW, NOW_ABOVE = 20.0, 12.0
"""Distance of the label "now" below its point, or above it near the axis."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 56.0, 620.0, 20.0, 270.0  # of the curve, in SVG units


@dataclass(frozen=True, slots=True)
class DatasetEvaluation:
    """The evaluation of one dataset."""

    dataset: str
    root: Path
    report: EvaluationReport
    refused: tuple[ImageRefused, ...]  # references that could not be read
    serving: dict[str, Any]
    """The classifier in use (``status.serving_facts``); the report is about the prototypes."""
    next_model: str | None
    """The stronger model to try, if the packaged one decides and is often wrong."""

    def facts(self) -> dict[str, Any]:
        """Return the evaluation as plain values."""
        unreadable = [{"path": one.path, "message": one.message} for one in self.refused]
        report = self.report.to_json()
        for name, counts in JUDGED.items():
            report[name] = [with_intervals(row, counts) for row in report[name]]
        calibration = report["calibration"]
        calibration["precision_judged"] = calibration["checked"] or calibration["filed_held_out"]
        report["calibration"] = with_intervals(calibration, CALIBRATED)
        return {
            "root": str(self.root),
            **report,
            "unreadable": unreadable,
            "serving": self.serving,
            "next_model": self.next_model,
        }


def evaluate_datasets(
    config: Config,
    dataset: str | None = None,
    *,
    load_encoder: LoadEncoder | None = None,
    tell: Callable[[str, int, int], None] = lambda *_: None,
) -> Iterator[DatasetEvaluation]:
    """Yield the evaluation of one dataset or of all, and raise the first error of a dataset after the last one.

    ``tell(step, done, total)`` is called for each reference; ``load_encoder`` replaces the configured model.

    Raises DataError: there is no such dataset, or a dataset has no references; JournalError; ModelError.
    """
    chosen, refusal = chosen_datasets(config, dataset), None
    with Resources(config, load_encoder=load_encoder) as resources:
        for layout in chosen:
            try:
                yield _examined(config, layout, resources.embedder(), tell)
            except (DataError, StorageError) as error:
                refusal = refusal or error
    if refusal is not None:
        raise refusal


def _examined(
    config: Config, layout: Layout, embedder: Embedder, tell: Callable[[str, int, int], None]
) -> DatasetEvaluation:
    reference_settings = settings_with_corrections(config, layout)
    reading = partial(tell, f"reading {layout.name}")
    support, refused = References(layout.area(Area.CLASES)).support(embedder, reference_settings, tell=reading)
    tell(f"evaluating {layout.name}", len(support.sources), len(support.sources))
    report = evaluate(support, reference_settings.settings, keep=partial(keep_evaluated, config, layout))
    serving = serving_facts(config, layout)
    return DatasetEvaluation(layout.name, layout.root, report, refused, serving, _next_model(config, report))


def _next_model(config: Config, report: EvaluationReport) -> str | None:
    accuracy = report.whole_accuracy
    if accuracy is None or accuracy >= HIGH_ACCURACY or config.encoder_socket is not None:
        return None
    with suppress(ModelError):
        return STRONGER if locate_clip(config.model, cache_dir=config.cache_dir).folder == PACKAGED else None
    return None


def show_evaluation(config: Config, dataset: str | None, html: Path | None, *, as_json: bool) -> None:
    """Evaluate one dataset or all, write the page, print the figures, then raise the first error of a dataset."""
    check_page_path(html)
    examined: dict[str, dict[str, Any]] = {}
    refusal: SortdError | None = None
    with bar("loading the model") as tell:
        try:
            for one in evaluate_datasets(config, dataset, tell=tell):
                examined[one.dataset] = one.facts()
        except SortdError as error:
            if not examined:
                raise
            refusal = error
    if html is not None:
        write_page(html, evaluation_page(examined, now=datetime.now().astimezone()))
    show({"datasets": examined}, _print_evaluations, as_json=as_json)
    if refusal is not None:
        raise refusal


def _print_evaluations(facts: Mapping[str, Mapping[str, Any]]) -> None:
    for name, examined in facts["datasets"].items():
        _print_evaluation(name, examined)


def _print_evaluation(name: str, facts: Mapping[str, Any]) -> None:
    print_line(
        f"{printable(name)}: {counted(facts['classes'], 'class')}, {counted(facts['references'], 'reference')}",
        style="bold",
    )
    for sentence in evaluation_sentences(facts):
        print_line(printable(sentence))
    for text in facts["calibration"]["notes"]:
        print_line(f"setting not met: {text}", style="yellow")
    print_line("")
    modes = [
        {**one, "mode": f"{one['mode']} (in force)" if one["mode"] == facts["mode"] else one["mode"]}
        for one in facts["modes"]
    ]
    _print_facts(modes, MODE_COLUMNS, JUDGED["modes"])
    trades = [
        {**one, "precision": str(one["precision"]), "note": "" if one["is_attained"] else "too few references"}
        for one in facts["trade_offs"]
    ]
    if trades:
        _print_facts(trades, TRADE_COLUMNS, JUDGED["trade_offs"])
    classes = [{**one, "f1": "" if one["f1"] is None else f"{one['f1']:.2f}"} for one in facts["class_reports"]]
    _print_facts(classes, CLASS_COLUMNS, JUDGED["class_reports"])
    for kind in ("mislabelled", "duplicate", "outlier"):
        doubtful = [one for one in facts["suspects"] if one["kind"] == kind]
        for one in doubtful[:SUSPECTS_PRINTED]:
            print_line(f"{_doubt(one)}: {printable(one['source'])}", style="yellow")
        if len(doubtful) > SUSPECTS_PRINTED:
            print_line(f"{len(doubtful) - SUSPECTS_PRINTED} more {kind}; --html shows them", style="yellow")
    for one in facts["unreadable"]:
        print_line(f"cannot be read: {printable(one['path'])}: {printable(one['message'])}", style="yellow")
    print_line("")


def _doubt(suspect: Mapping[str, Any]) -> str:
    label, other = (printable(written_name(suspect[key] or "")) for key in ("label", "other_label"))
    match suspect["kind"]:
        case "mislabelled":
            return f"probably mislabelled: in {label}, resembles {other} ({suspect['score']:.2f})"
        case "duplicate":
            return f"near-duplicate: in {label}, and in {other} ({printable(suspect['other_source'])})"
    return f"outlier of {label} ({suspect['score']:.2f})"


def _print_facts(facts: Sequence[Mapping[str, Any]], columns: Mapping[str, str], counts: Mapping[str, str]) -> None:
    """Print a table of facts; ``columns`` maps titles to keys, ``counts`` shares to the images behind them."""
    rows = [
        [estimated(one[key], one[counts[key]]) if key in counts else one[key] for key in columns.values()]
        for one in facts
    ]
    print_table(tuple(columns), rows, right=[column for column, key in columns.items() if key not in TEXTS])
    print_line("")


def evaluation_sentences(facts: Mapping[str, Any]) -> list[str]:
    """Return the classifier in use and the advice in sentences."""
    said = [_classifier_sentence(facts["serving"])]
    said += [f"{sentence[0].upper()}{sentence[1:]}." for sentence in facts["advice"]["sentences"]]
    if facts["next_model"] is not None:
        name = facts["next_model"]
        certainty = "probably" if facts["is_labelled_enough"] else "besides the references possibly"
        said.append(
            f"The packaged model is small and {certainty} the limit: "
            f"`sortd models fetch {name}` gets a stronger one, and `sortd models --available` lists others."
        )
    needy = [one for one in facts["class_reports"] if one["needs_images"]]
    if needy:
        named = "; ".join(f"{label_on_page(one['label'])}: {one['needs_images']}" for one in needy[:8])
        more = f"; and {len(needy) - 8} more" if len(needy) > 8 else ""  # noqa: PLR2004 -- as many as were named
        said.append(f"Add images to {len(needy)} of {facts['classes']} classes ({named}{more}).")
    if facts["is_labelled_enough"] is not None:
        half, whole = facts["half_accuracy"], facts["whole_accuracy"]
        verdict = "more references would help little" if facts["is_labelled_enough"] else "more references would help"
        by_half, by_all = estimated(half, facts["half_judged"]), estimated(whole, facts["whole_judged"])
        said.append(f"Accuracy with half of the references {by_half}, with all {by_all}: {verdict}.")
    return said


def _classifier_sentence(serving: Mapping[str, Any]) -> str:
    if serving["deciding"] == "finetuned":
        rest = "this evaluation is of the prototypes; `sortd models` compares the two"
        return f"Classifier in use: fine-tuned model {serving['model_id']}; {rest}."
    if serving["refusal"] is not None:
        return f"Classifier in use: prototypes; fine-tuned model refused: {printable(serving['refusal'])}."
    return "Classifier in use: prototypes."


def check_page_path(file: Path | None) -> None:
    """Raise DestinationError if a page cannot be written to this path, if one is given."""
    if file is None:
        return
    folder = file.absolute().parent
    if file.is_dir():
        raise DestinationError(f"{file} is a folder; give a file with --html")
    if not folder.is_dir():
        raise DestinationError(f"{folder} is not a folder; create it, or give another path with --html")
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
        raise DestinationError(f"{folder} is not writable; give another path with --html")


def write_page(file: Path, page: str) -> None:
    """Write a page atomically and say so; raise DestinationError if it cannot be written."""
    try:
        write_atomic(file, page.encode(), durable=False)
    except OSError as error:
        raise DestinationError(f"{file} cannot be written: {error.strerror}; give another path with --html") from error
    say(f"sortd: page written to {file}")


def render(template: str, now: datetime, **values: Any) -> str:  # noqa: ANN401 -- whatever the template shows
    """Return a rendered template with escaped values; a missing value is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["estimated"] = estimated
    environment.filters |= {
        "plain": printable,
        "label": label_on_page,
        "filename": lambda path: printable(os.path.basename(path)),
        "when": format_time,
    }
    made_at = now.strftime("%Y-%m-%d %H:%M")
    return environment.get_template(template).render(version=__version__, made_at=made_at, **values)


def label_on_page(label: str | None) -> str:
    """Return the name of a class for a page; empty for None."""
    return "" if label is None else printable(written_name(label))


def evaluation_page(examined: Mapping[str, Mapping[str, Any]], *, now: datetime) -> str:
    """Return the page of several datasets, from ``DatasetEvaluation.facts`` by name."""
    return render(
        "evaluation.html",
        now,
        datasets=[_dataset(name, facts) for name, facts in examined.items()],
        encoder_id=", ".join(sorted({facts["encoder_id"] for facts in examined.values()})),
    )


def _dataset(name: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    mine = next((mode for mode in facts["modes"] if mode["mode"] == facts["mode"]), None)
    return {
        "name": name,
        "report": facts,
        "accuracy": None if mine is None else mine["distinct_accuracy"],
        "judged": 0 if mine is None else mine["distinct_judged"],
        "sentences": evaluation_sentences(facts),
        "modes": sorted(facts["modes"], key=lambda mode: -(mode["distinct_accuracy"] or 0.0)),
        "curve": None if mine is None else precision_plot(mine["curve"], facts["calibration"]),
        "classes": sorted(facts["class_reports"], key=lambda one: (one["recall"] is None, one["recall"] or 0.0)),
        "matrix": _matrix(facts["confusion"]),
        **_suspects(facts["suspects"]),
    }


def precision_plot(points: Sequence[Sequence[float]], calibration: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the plot of precision against the filed share, with the point of the current settings."""
    if len(points) < 2:  # noqa: PLR2004 -- a line has two ends
        return None
    lowest = min(precision for _, _, precision in points)
    step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2) if (1.0 - lowest) / step <= 5 or step == 0.2)  # noqa: PLR2004
    floor = max(0.0, 1.0 - step * max(1, math.ceil((1.0 - lowest) / step - 1e-9)))

    def place(share: float, precision: float) -> tuple[float, float]:
        across = _LEFT + (_RIGHT - _LEFT) * share
        down = _BOTTOM - (_BOTTOM - _TOP) * (precision - floor) / (1.0 - floor)
        return round(across, 1), round(min(down, _BOTTOM), 1)

    drawn = [place(share, precision) for _, share, precision in sorted(points, key=lambda point: point[1])]
    levels = [floor + index * step for index in range(round((1.0 - floor) / step) + 1)]
    now = None
    if calibration["filed_expected"]:
        filed = calibration["filed_expected"]
        shares, precisions = zip(*sorted((share, precision) for _, share, precision in points), strict=True)
        x, y = place(filed, float(np.interp(filed, shares, precisions)))
        now = {"x": x, "y": y, "text_y": y + NOW_BELOW if y + NOW_BELOW < _BOTTOM else y - NOW_ABOVE}
    return {
        "points": " ".join(f"{x},{y}" for x, y in drawn),
        "rows": [{"y": place(0.0, level)[1], "text": f"{level:.0%}"} for level in levels],
        "columns": [{"x": place(share / 100, 1.0)[0], "text": f"{share} %"} for share in range(0, 101, 20)],
        "now": now,
    }


def _matrix(confusion: Sequence[Sequence[Any]]) -> dict[str, Any] | None:
    """Return the confusion matrix of the classes with the most errors."""
    counts: dict[tuple[str, str], int] = {(own, decided): number for own, decided, number in confusion}
    mistakes: dict[str, int] = defaultdict(int)
    for (own, decided), number in counts.items():
        mistakes[own] += number * (own != decided)
        mistakes[decided] += number * (own != decided)
    if not mistakes:
        return None
    chosen = sorted(sorted(mistakes, key=lambda label: -mistakes[label])[:MATRIX_CLASSES])
    rows = []
    for own in chosen:
        whole = sum(number for (row, _), number in counts.items() if row == own)
        cells = []
        for decided in chosen:
            number = counts.get((own, decided), 0)
            strength = round(0.12 + 0.5 * number / whole, 3) if number else 0.0  # a single error is visible
            cells.append({"label": decided, "number": number, "is_right": own == decided, "strength": strength})
        rows.append({"label": own, "cells": cells})
    return {"labels": chosen, "rows": rows, "hidden": len(mistakes) - len(chosen)}


def _suspects(suspects: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the ``suspects`` by kind, and their ``images``."""
    groups, paths = [], list[str | None]()
    for kind, (title, verb) in _SUSPECTS.items():
        if members := [one for one in suspects if one["kind"] == kind]:
            shown = members[:SUSPECTS_ON_PAGE]
            groups.append({"title": title, "verb": verb, "members": shown, "hidden": len(members) - len(shown)})
            paths += [path for one in shown for path in (one["source"], one["other_source"])]
    return {"suspects": groups, "images": thumbnails(path for path in paths if path is not None)}
