"""The page of an evaluation: figures, curve, matrix and suspects in the shape that its template shows."""

import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sortd.classify.prompts import written_name
from sortd.commands.console import printable
from sortd.decoding.thumbnails import thumbnail
from sortd.report import Picture, render

MATRIX_CLASSES = 30
"""A larger matrix cannot be read; those with the most mistakes are shown."""

SUSPECTS_SHOWN = 24

_SUSPECTS = {
    "mislabelled": ("They look like another class", "looks like"),
    "duplicate": ("Nearly the same picture in two classes", "is also in"),
    "outlier": ("They are unlike the rest of their class", ""),
}
NOW_BELOW, NOW_ABOVE = 20.0, 12.0
"""How far below its point the word "now" stands, or above it where the numbers of the axis are below."""

_LEFT, _RIGHT, _TOP, _BOTTOM = 56.0, 620.0, 20.0, 270.0  # of the curve, in units of its drawing


def evaluation_page(examined: Mapping[str, Mapping[str, Any]], *, now: datetime, picture: Picture = thumbnail) -> str:
    """Return the page for some datasets.

    Args:
        examined: by dataset, the facts of ``examination.Examined.facts``.
        now: when the page is made.
        picture: makes thumbnails.
    """
    return render(
        "evaluation.html",
        now,
        datasets=[_dataset(name, facts, picture) for name, facts in examined.items()],
        encoder_id=", ".join(sorted({facts["encoder_id"] for facts in examined.values()})),
    )


def sentences(facts: Mapping[str, Any]) -> list[str]:
    """Return who decides and what to do, in sentences, each beginning with a capital letter."""
    said = [_said_of_the_classifier(facts["serving"])]
    said += [f"{sentence[0].upper()}{sentence[1:]}." for sentence in facts["advice"]["sentences"]]
    needy = [one for one in facts["class_reports"] if one["needs_images"]]
    if needy:
        named = "; ".join(f"{_shown(one['label'])}: {one['needs_images']}" for one in needy[:8])
        more = f"; and {len(needy) - 8} more" if len(needy) > 8 else ""  # noqa: PLR2004 -- as many as were named
        said.append(f"Add images to {len(needy)} of {facts['classes']} classes ({named}{more}).")
    if facts["is_labelled_enough"] is not None:
        half, whole = facts["half_accuracy"], facts["whole_accuracy"]
        verdict = (
            "more of the same would help little" if facts["is_labelled_enough"] else "more images would still help"
        )
        said.append(
            f"Labelled enough? With half of the references {half:.1%} are right, with all {whole:.1%}: {verdict}."
        )
    return said


def _said_of_the_classifier(serving: Mapping[str, Any]) -> str:
    if serving["deciding"] == "finetuned":
        rest = "what follows is about the prototypes beside it, and `sortd models` compares them"
        return f"A fine-tuned model decides ({serving['model_id']}); {rest}."
    if serving["refusal"] is not None:
        return f"The prototypes decide, since the fine-tuned model does not serve: {printable(serving['refusal'])}."
    return "The prototypes decide."


def _dataset(name: str, facts: Mapping[str, Any], picture: Picture) -> dict[str, Any]:
    mine = next((mode for mode in facts["modes"] if mode["mode"] == facts["mode"]), None)
    return {
        "name": printable(name),
        "root": printable(facts["root"]),
        "report": facts,
        "accuracy": None if mine is None else mine["distinct_accuracy"],
        "judged": 0 if mine is None else mine["distinct_judged"],
        "sentences": sentences(facts),
        "modes": sorted(facts["modes"], key=lambda mode: -(mode["distinct_accuracy"] or 0.0)),
        "curve": None if mine is None else _curve(mine["curve"], facts["calibration"]),
        "classes": [
            {
                **one,
                "label": _shown(one["label"]),
                "confused_with": one["confused_with"] and _shown(one["confused_with"]),
            }
            for one in sorted(facts["class_reports"], key=lambda one: (one["recall"] is None, one["recall"] or 0.0))
        ],
        "matrix": _matrix(facts["confusion"]),
        "suspects": _suspects(facts["suspects"], picture),
        "unreadable": [{key: printable(text) for key, text in one.items()} for one in facts["unreadable"]],
    }


def _curve(points: Sequence[Sequence[float]], calibration: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the drawing of precision against the share filed, and where the settings in force stand on it."""
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
    """Return the precision that the curve has where so large a share is filed; straight between its points."""
    ends = sorted((share, precision) for _, share, precision in points)
    after = next((at for at, (share, _) in enumerate(ends) if share >= filed), len(ends) - 1)
    if after == 0 or ends[after][0] <= filed:
        return ends[after][1]
    (left, low), (right, high) = ends[after - 1], ends[after]
    return low + (high - low) * (filed - left) / (right - left)


def _matrix(confusion: Sequence[Sequence[Any]]) -> dict[str, Any] | None:
    """Return the confusion matrix, of the classes with the most mistakes where there are many."""
    counts: dict[tuple[str, str], int] = {(own, taken): number for own, taken, number in confusion}
    mistakes: dict[str, int] = defaultdict(int)
    for (own, taken), number in counts.items():
        mistakes[own] += number * (own != taken)
        mistakes[taken] += number * (own != taken)
    if not mistakes:
        return None
    chosen = sorted(sorted(mistakes, key=lambda label: -mistakes[label])[:MATRIX_CLASSES])
    rows = []
    for own in chosen:
        whole = sum(number for (row, _), number in counts.items() if row == own)
        cells = [
            {
                "label": _shown(taken),
                "number": counts.get((own, taken), 0),
                "is_right": own == taken,
                "strength": _strength(counts.get((own, taken), 0) / max(whole, 1)),
            }
            for taken in chosen
        ]
        rows.append({"label": _shown(own), "cells": cells})
    return {"labels": [_shown(label) for label in chosen], "rows": rows, "hidden": len(mistakes) - len(chosen)}


def _shown(label: str) -> str:
    """Return a class's name as a page can show it: HTML makes one blank of many."""
    return printable(written_name(label))


def _strength(share: float) -> float:
    """Return how opaque a cell is: a single mistake among many must be seen, and the number on it be read."""
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
        "other_label": None if one["other_label"] is None else _shown(one["other_label"]),
        "score": one["score"],
        "name": printable(os.path.basename(one["source"])),
        "other_name": None if other is None else printable(os.path.basename(other)),
        "other_image": None if other is None else picture(other),
    }
