"""Reports: the pages that ``explain`` and ``eval`` write, each one file with its pictures inside."""

import os
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2

from sortd import __version__
from sortd.commands.console import format_time, printable
from sortd.deciding.explanation import PROBABLE
from sortd.deciding.prompts import written_name
from sortd.decoding.thumbnails import thumbnail
from sortd.errors import DestinationError
from sortd.files import write_atomic

TEMPLATES = Path(__file__).parent / "templates"
CLASSES_AT_MOST = 40
"""A page lists so many classes of one decision: the others are next to impossible anyway."""

LARGE_SIDE_PIXELS = 400

Picture = Callable[[str], str | None]
"""Makes a ``data:`` address of the image at a path, None where it cannot be shown."""


def explain_page(facts: Mapping[str, Any], *, now: datetime, picture: Picture = thumbnail) -> str:
    """Return the page of one explanation, see ``explain.Explained.facts``."""
    scores = facts["scores"][:CLASSES_AT_MOST]
    return render(
        "explain.html",
        now,
        facts={**facts, "label": _shown(facts["label"])},
        name=printable(os.path.basename(facts["path"])),
        path=printable(facts["path"]),
        image=thumbnail(facts["path"], side_pixels=LARGE_SIDE_PIXELS),
        unit="probability" if facts["mode"] in PROBABLE else "cosine",
        scores=[{**one, "label": _shown(one["label"]), "width": width} for one, width in _widths(scores)],
        hidden=len(facts["scores"]) - len(scores),
        neighbours=[
            {
                **one,
                "label": _shown(one["label"]),
                "image": picture(one["path"]),
                "name": printable(os.path.basename(one["path"])),
            }
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


def see_that_a_page_fits(file: Path) -> None:
    """Refuse a place that no page can be written to, before the long work that the page is about.

    Raises:
        DestinationError: it is a folder, or its folder is missing or may not be written to.
    """
    folder = file.absolute().parent
    if file.is_dir():
        raise DestinationError(f"{file} is a folder; name a file with --html")
    if not folder.is_dir():
        raise DestinationError(f"{folder} is no folder; make it, or name another place with --html")
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
        raise DestinationError(f"{folder} may not be written to; name another place with --html")


def write_page(file: Path, page: str) -> None:
    """Write a page beside and rename it, so that a browser never loads half.

    Raises:
        DestinationError: it cannot be written there.
    """
    try:
        write_atomic(file, page.encode(), durable=False)
    except OSError as error:
        raise DestinationError(f"{file} cannot be written: {error.strerror}; name another place with --html") from error


def render(template: str, now: datetime, **values: Any) -> str:  # noqa: ANN401 -- whatever the template shows
    """Return a template filled in; every value is escaped, and one that is missing is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made_at = now.strftime("%Y-%m-%d %H:%M")
    return environment.get_template(template).render(version=__version__, made_at=made_at, **values)


def _shown(label: str | None) -> str | None:
    return None if label is None else printable(written_name(label))


def _widths(scores: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], float]]:
    """Return each score with the length of its bar in percent of the largest; negative cosines have none."""
    largest = max((one["score"] for one in scores), default=0.0)
    return [(one, round(100 * max(one["score"], 0.0) / largest, 1) if largest > 0 else 0.0) for one in scores]
