"""The command ``bulk report``: what was decided in a run, how much of it is right, and a page with a random sample."""

import csv
import hashlib
import heapq
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any

from sortd.bulk.decide import UNREADABLE
from sortd.bulk.plan import decided_rows, read_run
from sortd.bulk.storage import local_path, read_blocks
from sortd.classify.proportions import out_of, proportion
from sortd.commands.console import counted, print_line, print_table, printable, say, show
from sortd.commands.evaluation import check_page_path, render, write_page
from sortd.errors import DataError
from sortd.images.decode import DecodeLimits
from sortd.images.thumbnails import thumbnails

EXAMPLES = 10
"""Unreadable images that are named."""
_COLUMNS = ("id", "uri", "label", "probability", "reason")


def read_labels(file: Path) -> dict[str, str]:
    """Return the class of each URI in a CSV file with the columns ``uri`` and ``label``; empty for none.

    Raises:
        DataError: the file cannot be read, or lacks a column.
    """
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            rows = csv.DictReader(lines)
            if not {"uri", "label"} <= set(rows.fieldnames or ()):
                raise DataError(f"{file} has no columns uri and label; its first line must name them")
            return {row["uri"]: row["label"] or "" for row in rows}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} cannot be read: {error}") from error


def make_report(
    run: Path, *, labels: Mapping[str, str] | None = None, sample: int = 60, seed: int = 0
) -> dict[str, Any]:
    """Return what was decided in a run as plain values, with a random sample of the images that were read.

    The decisions may be incomplete. ``labels`` are the true classes of some URIs, to state the precision. With one
    ``seed``, the same images are drawn whichever engine decided.

    Raises:
        DataError: the run has no plan, or its decisions are damaged.
    """
    plan, examples = read_run(run), list[dict[str, str]]()
    filed, right, judged, others = (Counter[str]() for _ in range(4))

    def read_rows() -> Iterator[dict[str, Any]]:
        """Count the decisions, and yield those on images that were read."""
        for row in chain.from_iterable(decided_rows(run, _COLUMNS)):
            label, uri, reason = row["label"], row["uri"], row["reason"] or ""
            if label is None:
                others[UNREADABLE if reason.startswith(UNREADABLE) else reason] += 1
            else:
                filed[label] += 1
            if label is not None and labels is not None and uri in labels:
                judged[label] += 1
                right[label] += labels[uri] == label
            if not reason.startswith(UNREADABLE):
                yield row
            elif len(examples) < EXAMPLES:
                examples.append({"uri": uri, "reason": reason})

    drawn = heapq.nsmallest(sample, read_rows(), key=lambda row: _random_order(seed, row["id"]))
    unreadable = others.pop(UNREADABLE, 0)
    return {
        "run": os.fspath(run),
        "source": plan["source"],
        "planned": plan["count"],
        "decided": filed.total() + others.total() + unreadable,
        "filed": filed.total(),
        "unreadable": unreadable,
        "classes": dict(filed.most_common()),
        "reasons": dict(others.most_common()),
        "examples": examples,
        "checked": proportion(sum(right.values()), sum(judged.values())),
        "checked_by_class": {label: proportion(right[label], judged[label]) for label in sorted(judged)},
        "seed": seed,
        "sample": drawn,
    }


def _random_order(seed: int, identifier: str) -> bytes:
    return hashlib.sha256(f"{seed} {identifier}".encode()).digest()


def show_report(run: Path, *, labels: Path | None, sample: int, seed: int, page: Path | None, as_json: bool) -> None:
    """Print the report of a run, and write its page."""
    check_page_path(page)
    truth = None if labels is None else read_labels(labels)
    facts = make_report(run, labels=truth, sample=sample, seed=seed)
    show(facts, _print_report, as_json=as_json)
    if page is not None:
        write_page(page, report_page(facts, now=datetime.now().astimezone()))


def _print_report(facts: Mapping[str, Any]) -> None:
    classes = [
        (label, number, _checked(facts["checked_by_class"].get(label))) for label, number in facts["classes"].items()
    ]
    print_table(("class", "filed", "right"), classes, right=("filed",))
    if facts["reasons"]:
        print_table(("not filed because of", "images"), list(facts["reasons"].items()), right=("images",))
    for one in facts["examples"]:
        say(f"sortd: {printable(one['uri'])}: {printable(one['reason'])}")
    if facts["checked"]["judged"]:
        print_line(f"right: {_checked(facts['checked'])}")
    missing = facts["planned"] - facts["decided"]
    print_line(
        f"{counted(facts['decided'], 'image')} decided: {facts['filed']:,} filed, {facts['unreadable']:,} unreadable"
        + (f"; {missing:,} are not decided yet" if missing else "")
    )


def _checked(figures: Mapping[str, Any] | None) -> str:
    return "" if figures is None else out_of(figures["right"], figures["judged"])


def report_page(facts: Mapping[str, Any], *, now: datetime) -> str:
    """Return the page of a report: its sample by class."""
    return render(
        "bulk.html",
        now,
        facts=facts,
        checked=_checked(facts["checked"]) if facts["checked"]["judged"] else "",
        sample=[{**one, "label": one["label"] or ""} for one in facts["sample"]],
        images=_pictures(facts["sample"]),
    )


def _pictures(sample: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return small pictures of a sample by URI, without those that cannot be read any more."""
    limit = DecodeLimits().max_bytes
    with tempfile.TemporaryDirectory(prefix="sortd-bulk-") as scratch:
        paths = {}
        for number, uri in enumerate(one["uri"] for one in sample):
            path = local_path(uri)
            if path is None:
                path = os.path.join(scratch, f"{number}{os.path.splitext(uri)[1][:8].replace('/', '')}")
                with suppress(OSError), open(path, "wb") as file:
                    file.writelines(read_blocks(uri, limit=limit))
            paths[uri] = path
        found = thumbnails(paths.values())
    return {uri: found[path] for uri, path in paths.items() if path in found}
