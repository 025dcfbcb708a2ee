"""The HTML pages of ``explain``, ``eval`` and ``groups``, with embedded pictures."""

import math
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from sortd import __version__
from sortd.classify.prompts import written_name
from sortd.classify.types import PROBABILISTIC
from sortd.commands.console import format_time, printable
from sortd.errors import DestinationError
from sortd.files import write_atomic
from sortd.images.decode import thumbnail

TEMPLATES = Path(__file__).parents[1] / "templates"
CLASSES_AT_MOST = 40
"""Largest number of classes on the page of one decision."""
LARGE_SIDE_PIXELS = 400
MATRIX_CLASSES = 30
"""Largest size of the confusion matrix; the classes with the most errors are shown."""
SUSPECTS_SHOWN = 24
PICTURES_OF_GROUP = 60
PICTURES_OF_PAGE = 1200
"""Largest number of pictures of a page; the largest groups have theirs first."""
_SUSPECTS = {
    "mislabelled": ("Probably mislabelled", "resembles"),
    "duplicate": ("Near-duplicates in two classes", "is also in"),
    "outlier": ("Outliers of their class", ""),
}
NOW_BELOW, NOW_ABOVE = 20.0, 12.0
"""Distance of the label "now" below its point, or above it near the axis."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 56.0, 620.0, 20.0, 270.0  # of the curve, in SVG units
Picture = Callable[[str], str | None]
"""Returns a ``data:`` URL of the image at a path, or None if it cannot be read."""


def explain_page(facts: Mapping[str, Any], *, now: datetime, picture: Picture = thumbnail) -> str:
    """Return the page of one explanation, from ``ImageExplanation.facts``."""
    scores = facts["scores"][:CLASSES_AT_MOST]
    return render(
        "explain.html",
        now,
        facts={**facts, "label": _shown(facts["label"])},
        name=_file_name(facts["path"]),
        path=printable(facts["path"]),
        image=thumbnail(facts["path"], side_pixels=LARGE_SIDE_PIXELS),
        unit="probability" if facts["mode"] in PROBABILISTIC else "cosine",
        scores=[{**one, "label": _shown(one["label"]), "width": width} for one, width in _widths(scores)],
        hidden=len(facts["scores"]) - len(scores),
        neighbours=[
            {**one, "label": _shown(one["label"]), "image": picture(one["path"]), "name": _file_name(one["path"])}
            for one in facts["neighbours"]
        ],
        history=[
            {
                "when": format_time(one["at"]),
                "outcome": one["outcome"].replace("_", " "),
                "label": _shown(one["label"]),
                "undone": one["undone_by"] is not None,
                "origin": printable(one["from"]),
                "destination": printable(one["to"]),
            }
            for one in facts["history"]
        ],
    )


def check_page_path(file: Path) -> None:
    """Check that a page can be written to this path.

    Raises:
        DestinationError: it is a folder, or its folder is missing or not writable.
    """
    folder = file.absolute().parent
    if file.is_dir():
        raise DestinationError(f"{file} is a folder; give a file with --html")
    if not folder.is_dir():
        raise DestinationError(f"{folder} is not a folder; create it, or give another path with --html")
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
        raise DestinationError(f"{folder} is not writable; give another path with --html")


def write_page(file: Path, page: str) -> None:
    """Write a page atomically; raise DestinationError if it cannot be written."""
    try:
        write_atomic(file, page.encode(), durable=False)
    except OSError as error:
        raise DestinationError(f"{file} cannot be written: {error.strerror}; give another path with --html") from error


def render(template: str, now: datetime, **values: Any) -> str:  # noqa: ANN401 -- whatever the template shows
    """Return a rendered template with escaped values; a missing value is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made_at = now.strftime("%Y-%m-%d %H:%M")
    return environment.get_template(template).render(version=__version__, made_at=made_at, **values)


def _shown(label: str | None) -> str:
    """Return the name of a class for a page; empty for None."""
    return "" if label is None else printable(written_name(label))


def _file_name(path: str) -> str:
    return printable(os.path.basename(path))


def _widths(scores: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], float]]:
    """Return each score with the length of its bar in per cent of the largest score."""
    largest = max((one["score"] for one in scores), default=0.0)
    return [(one, round(100 * max(one["score"], 0.0) / largest, 1) if largest > 0 else 0.0) for one in scores]


def evaluation_page(examined: Mapping[str, Mapping[str, Any]], *, now: datetime, picture: Picture = thumbnail) -> str:
    """Return the page of several datasets, from ``DatasetEvaluation.facts`` by name."""
    return render(
        "evaluation.html",
        now,
        datasets=[_dataset(name, facts, picture) for name, facts in examined.items()],
        encoder_id=", ".join(sorted({facts["encoder_id"] for facts in examined.values()})),
    )


def evaluation_sentences(facts: Mapping[str, Any]) -> list[str]:
    """Return the classifier in use and the advice in sentences."""
    said = [_classifier_sentence(facts["serving"])]
    said += [f"{sentence[0].upper()}{sentence[1:]}." for sentence in facts["advice"]["sentences"]]
    needy = [one for one in facts["class_reports"] if one["needs_images"]]
    if needy:
        named = "; ".join(f"{_shown(one['label'])}: {one['needs_images']}" for one in needy[:8])
        more = f"; and {len(needy) - 8} more" if len(needy) > 8 else ""  # noqa: PLR2004 -- as many as were named
        said.append(f"Add images to {len(needy)} of {facts['classes']} classes ({named}{more}).")
    if facts["is_labelled_enough"] is not None:
        half, whole = facts["half_accuracy"], facts["whole_accuracy"]
        verdict = "more references would help little" if facts["is_labelled_enough"] else "more references would help"
        said.append(f"Accuracy with half of the references {half:.1%}, with all {whole:.1%}: {verdict}.")
    return said


def _classifier_sentence(serving: Mapping[str, Any]) -> str:
    if serving["deciding"] == "finetuned":
        rest = "this evaluation is of the prototypes; `sortd models` compares the two"
        return f"Classifier in use: fine-tuned model {serving['model_id']}; {rest}."
    if serving["refusal"] is not None:
        return f"Classifier in use: prototypes; fine-tuned model refused: {printable(serving['refusal'])}."
    return "Classifier in use: prototypes."


def _dataset(name: str, facts: Mapping[str, Any], picture: Picture) -> dict[str, Any]:
    mine = next((mode for mode in facts["modes"] if mode["mode"] == facts["mode"]), None)
    return {
        "name": printable(name),
        "root": printable(facts["root"]),
        "report": facts,
        "accuracy": None if mine is None else mine["distinct_accuracy"],
        "judged": 0 if mine is None else mine["distinct_judged"],
        "sentences": evaluation_sentences(facts),
        "modes": sorted(facts["modes"], key=lambda mode: -(mode["distinct_accuracy"] or 0.0)),
        "curve": None if mine is None else _curve(mine["curve"], facts["calibration"]),
        "classes": [
            {**one, "label": _shown(one["label"]), "confused_with": _shown(one["confused_with"])}
            for one in sorted(facts["class_reports"], key=lambda one: (one["recall"] is None, one["recall"] or 0.0))
        ],
        "matrix": _matrix(facts["confusion"]),
        "suspects": _suspects(facts["suspects"], picture),
        "unreadable": [{key: printable(text) for key, text in one.items()} for one in facts["unreadable"]],
    }


def _curve(points: Sequence[Sequence[float]], calibration: Mapping[str, Any]) -> dict[str, Any] | None:
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
        x, y = place(calibration["filed_expected"], _precision_at(calibration["filed_expected"], points))
        now = {"x": x, "y": y, "text_y": y + NOW_BELOW if y + NOW_BELOW < _BOTTOM else y - NOW_ABOVE}
    return {
        "points": " ".join(f"{x},{y}" for x, y in drawn),
        "rows": [{"y": place(0.0, level)[1], "text": f"{level:.0%}"} for level in levels],
        "columns": [{"x": place(share / 100, 1.0)[0], "text": f"{share} %"} for share in range(0, 101, 20)],
        "now": now,
    }


def _precision_at(filed: float, points: Sequence[Sequence[float]]) -> float:
    """Return the precision of the curve at this filed share, by linear interpolation."""
    shares, precisions = zip(*sorted((share, precision) for _, share, precision in points), strict=True)
    return float(np.interp(filed, shares, precisions))


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
        cells = [
            {
                "label": _shown(decided),
                "number": counts.get((own, decided), 0),
                "is_right": own == decided,
                "strength": _strength(counts.get((own, decided), 0) / max(whole, 1)),
            }
            for decided in chosen
        ]
        rows.append({"label": _shown(own), "cells": cells})
    return {"labels": [_shown(label) for label in chosen], "rows": rows, "hidden": len(mistakes) - len(chosen)}


def _strength(share: float) -> float:
    """Return the opacity of a cell; single errors are visible, and numbers stay readable."""
    return round(0.12 + 0.5 * share, 3) if share else 0.0


def _suspects(suspects: Sequence[Mapping[str, Any]], picture: Picture) -> list[dict[str, Any]]:
    groups = []
    for kind, (title, verb) in _SUSPECTS.items():
        members = [one for one in suspects if one["kind"] == kind]
        if members:
            shown = [_suspect(one, picture) for one in members[:SUSPECTS_SHOWN]]
            groups.append({"title": title, "verb": verb, "members": shown, "hidden": len(members) - len(shown)})
    return groups


def _suspect(one: Mapping[str, Any], picture: Picture) -> dict[str, Any]:
    other = one["other_source"]
    return {
        "image": picture(one["source"]),
        "label": _shown(one["label"]),
        "other_label": _shown(one["other_label"]),
        "score": one["score"],
        "name": _file_name(one["source"]),
        "other_name": None if other is None else _file_name(other),
        "other_image": None if other is None else picture(other),
    }


def groups_page(found: Mapping[str, Mapping[str, Any]], *, now: datetime, picture: Picture = thumbnail) -> str:
    """Return the page of several datasets, from ``GroupedPile.facts`` by name."""
    left = PICTURES_OF_PAGE

    def pictures(paths: Sequence[str], most: int) -> list[dict[str, Any]]:
        nonlocal left
        shown = paths[: min(most, left)]
        left -= len(shown)
        return [{"image": picture(path), "name": _file_name(path)} for path in shown]

    datasets = []
    for name, facts in found.items():
        asked, groups = pictures(facts["next_to_label"], PICTURES_OF_GROUP), []
        for group in facts["groups"]:
            members = pictures(group["members"], PICTURES_OF_GROUP)
            hidden = group["size"] - len(members)
            groups.append(
                {**group, "nearest_label": _shown(group["nearest_label"]), "pictures": members, "hidden": hidden}
            )
        datasets.append({**facts, "name": printable(name), "groups": groups, "next_to_label": asked})
    return render("groups.html", now, datasets=datasets)
