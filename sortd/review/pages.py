"""The pages: each answers a GET from what is on disk, and changes nothing.

The state of a page is in its address. Forms contain ids of images, never paths; ``acts.py`` answers them.
"""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from sortd.classify.proportions import proportion
from sortd.commands.audit import AuditSample, open_sample
from sortd.commands.console import printable
from sortd.commands.explain import explain_image
from sortd.commands.moves import journal_of
from sortd.commands.rejected import rejected_images
from sortd.companions import is_image
from sortd.errors import DataError, ImageError, JournalError, SortdError
from sortd.events import LIKE_NO_CLASS, NO_CLASS, Outcome
from sortd.layout import Area, Layout
from sortd.review.activity import Activity
from sortd.review.figures import dataset_figures, suspects_by_kind
from sortd.review.index import PAGE_SIZE, Index, ReviewBatch, ShownImage, dataset_key
from sortd.review.live import answers_today, live_texts
from sortd.review.rendering import (
    class_key,
    effect_number,
    index_of,
    number_of,
    rendered,
    session_of,
    static_files,
    translations_of,
)
from sortd.store.records import Selection
from sortd.watch.scan import whole_files

DIGITS = 9
"""Classes that a digit chooses."""
CLASSES_AS_BUTTONS = 200
CLASSES_TO_COMPLETE = 1000
"""Classes in the completion of the field for a name; more would make the page slow."""
LARGE_BATCH = 6
"""Images up to which each is shown in the large size."""
BATCHES_LISTED = 12
NEAREST_OF_BATCH = 6
MOVES_SHOWN = 100
CLASS_MOVES = 500
"""Moves in which the newest images of a class are looked for."""
WRONG_SHOWN = 60
REJECTED_SHOWN = 200
SCORES_SHOWN = 12


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    say = translations_of(request).gettext
    texts = {
        404: say("There is no such page. A file that changed or was moved has another address: look again."),
        405: say("This address does not answer that."),
    }
    message = texts.get(error.status_code, printable(error.detail))
    page = rendered(request, "error.html", status=error.status_code, message=message)
    page.headers.update(error.headers or {})
    return page


def _own_error(request: Request, error: Exception) -> Response:
    return rendered(request, "error.html", status=503, message=printable(str(error)))


def _failure(request: Request, _: Exception) -> Response:
    message = translations_of(request).gettext("sortd review failed; its log says why.")
    return rendered(request, "error.html", status=500, message=message)


def _layout(request: Request) -> Layout:
    try:
        return index_of(request).dataset(request.path_params["key"])
    except DataError as error:
        raise HTTPException(404) from error


def _common(layout: Layout, here: str) -> dict[str, Any]:
    """Return what the head of each page of a dataset shows."""
    return {"dataset": layout.name, "key": dataset_key(layout), "here": here}


def _progress(request: Request, layout: Layout, waiting: int) -> dict[str, Any]:
    """Return the progress of a dataset, and the texts that are kept up to date while a page is open."""
    index, effects = index_of(request), request.app.state.effects
    answered = answers_today(index, layout)
    line = effects.line(effect_number(request), session_of(request), translations_of(request))
    texts = live_texts(index, layout, line, translations_of(request))
    return {"progress": {"answered": answered, "waiting": waiting, "all": answered + waiting}, "texts": texts}


def _choices(request: Request, layout: Layout) -> dict[str, Any]:
    """Return the classes that a form offers: those of the digits, then all others."""
    labels = index_of(request).labels(layout)
    used = Activity(request.app.state.config.state_dir, layout).recent_labels()
    known = set(labels)
    recent = list(dict.fromkeys([*(one for one in used if one in known and one != NO_CLASS), *labels]))
    return {
        "recent": recent[:DIGITS],
        "others": sorted(recent[DIGITS : DIGITS + CLASSES_AS_BUTTONS]),
        "labels": labels[:CLASSES_TO_COMPLETE],
    }


def _address(path: str, **values: object) -> str:
    """Return a relative address; empty values are left out."""
    kept = {name: value for name, value in values.items() if value}
    return f"{path}?{urlencode(kept)}" if kept else path


def _shared(near: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Mapping[str, Any]]:
    """Return the references that are nearest to most of the images, each once with its largest similarity."""
    found: dict[str, Mapping[str, Any]] = {}
    counts = Counter[str]()
    for one in (one for several in near.values() for one in several):
        key = one["image"].id
        counts[key] += 1
        if key not in found or one["similarity"] > found[key]["similarity"]:
            found[key] = one
    ranked = sorted(found, key=lambda key: (-counts[key], -found[key]["similarity"]))
    return [found[key] for key in ranked[:NEAREST_OF_BATCH]]


def home(request: Request) -> Response:
    """List the datasets; with one there is only its page."""
    index = index_of(request)
    layouts = index.datasets()
    if len(layouts) == 1:
        return RedirectResponse(f"/d/{dataset_key(layouts[0])}/", 303)
    rows = []
    for layout in layouts:
        waiting, problem = 0, ""
        try:
            waiting = len(index.waiting(layout))
        except SortdError as error:
            problem = str(error)
        rows.append({"name": layout.name, "key": dataset_key(layout), "waiting": waiting, "problem": problem})
    return rendered(request, "home.html", rows=rows)


def dataset_page(request: Request) -> Response:
    """Show what waits in a dataset, its classes and their figures."""
    layout, index = _layout(request), index_of(request)
    waiting = index.waiting(layout)
    return rendered(
        request,
        "dataset.html",
        **_common(layout, "overview"),
        **_progress(request, layout, len(waiting)),
        newest=sorted(waiting, key=lambda image: -(image.arrived_at or 0.0))[:BATCHES_LISTED],
        figures=dataset_figures(index, layout),
        **_choices(request, layout),
    )


def waiting_page(request: Request) -> Response:
    """Show one batch of the images that wait, with the forms that answer it."""
    layout, index = _layout(request), index_of(request)
    batches = index.batches(layout)
    asked, after = request.query_params.get("batch", ""), request.query_params.get("after", "")
    position = _position(batches, asked, after)
    common = {
        **_common(layout, "waiting"),
        **_progress(request, layout, sum(len(one.images) for one in batches)),
        "path": f"/d/{dataset_key(layout)}/waiting",
    }
    if position is None:
        return rendered(request, "nothing.html", **common, is_skipped=bool(batches))
    batch = batches[position]
    pages = ceil(len(batch.images) / PAGE_SIZE)
    page = min(number_of(request.query_params.get("page", "")) or 1, pages)
    shown = batch.images[(page - 1) * PAGE_SIZE : page * PAGE_SIZE]
    near = index.nearest(layout, shown)
    return rendered(
        request,
        "waiting.html",
        **common,
        batch=batch,
        is_unlike=2 * sum(image.reason in LIKE_NO_CLASS for image in shown) > len(shown),  # Enter must not confirm then
        shown=shown,
        near=near,
        references=_shared(near),
        second=_second(batch, shown),
        page=page,
        pages=pages,
        after=after,
        is_large=len(shown) <= LARGE_BATCH,
        back=_address(common["path"], batch=batch.id, after=after, page=page if page > 1 else 0),
        later=_address(common["path"], after=batch.id),
        **_listed(request, batches, position),
        **_choices(request, layout),
    )


def _position(batches: Sequence[ReviewBatch], asked: str, after: str) -> int | None:
    """Return which batch to show: the one asked for, or else the one after another; None if there is none."""
    places = {batch.id: position for position, batch in enumerate(batches)}
    position = places.get(asked, places[after] + 1 if after in places else 0)
    return position if position < len(batches) else None


def _second(batch: ReviewBatch, shown: Sequence[ShownImage]) -> str | None:
    """Return the most frequent second guess, or best guess if the batch has another one."""
    guesses = [image.second if image.guess == batch.guess else image.guess for image in shown]
    found = Counter(guess for guess in guesses if guess is not None and guess != batch.guess).most_common(1)
    return found[0][0] if found else None


def _listed(request: Request, batches: Sequence[ReviewBatch], position: int) -> dict[str, Any]:
    """Return the other batches of one page of their list."""
    others = [*batches[position + 1 :], *batches[:position]]
    lists = max(1, ceil(len(others) / BATCHES_LISTED))
    at = min(number_of(request.query_params.get("list", "")) or 1, lists)
    return {"others_of_list": others[(at - 1) * BATCHES_LISTED : at * BATCHES_LISTED], "list": at, "lists": lists}


def image_page(request: Request) -> Response:
    """Explain the decision on one image."""
    index, config = index_of(request), request.app.state.config
    image = index.find(request.path_params["id"])
    layout = None if image is None else next((one for one in index.datasets() if one.name == image.dataset), None)
    if image is None or layout is None:
        raise HTTPException(404)
    area, problem, facts = layout.area_of(image.path), "", dict[str, Any]()
    try:
        facts = explain_image(config, Path(image.path), layout.name, only_stored=True).facts()
    except JournalError:
        raise
    except (DataError, ImageError, OSError) as error:
        problem = str(error)
    here = f"/d/{dataset_key(layout)}"
    is_waiting = area is Area.REVIEW
    return rendered(
        request,
        "image.html",
        **_common(layout, "image"),
        image=image,
        facts=facts,
        problem=problem,
        scores=facts.get("scores", ())[:SCORES_SHOWN],
        near=_neighbours(index, layout, facts),
        is_waiting=is_waiting,
        is_filed=area is Area.DATASET,
        relative=os.path.relpath(image.path, layout.root),
        back=f"{here}/waiting" if is_waiting else f"{here}/",
        **_choices(request, layout),
    )


def _neighbours(index: Index, layout: Layout, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = [{**one, "image": index.image_at(layout, one["path"])} for one in facts.get("neighbours", ())]
    return [one for one in found if one["image"] is not None]


def audited_page(request: Request) -> Response:
    """Show the open sample of filed images, what the answers so far prove, and what was found wrong."""
    layout, index, config = _layout(request), index_of(request), request.app.state.config
    sample, wrong = open_sample(layout.state_folder(config.state_dir)), list[ShownImage]()
    with journal_of(config, layout).open() as history:
        accuracy = history.accuracy().values()
        right, judged = sum(one.audited_right for one in accuracy), sum(one.audited for one in accuracy)
        unchecked = len(history.to_audit())
        records = history.finished(Activity(config.state_dir, layout).found_wrong(WRONG_SHOWN))
    for record in records:
        path = os.path.join(layout.root, record.destination_path)
        why = record.move_reason
        image = index.image_at(layout, path, guess=why.label, score=why.score, mode=why.mode)
        wrong += [] if image is None else [image]
    size = 0 if sample is None else len(sample.images)
    return rendered(
        request,
        "audit.html",
        **_common(layout, "audit"),
        groups=[] if sample is None else _sample_groups(index, layout, sample),
        size=size,
        drawn_from=0 if sample is None else sample.unchecked,
        if_right=proportion(size, size),
        proven=proportion(right, judged),
        unchecked=unchecked,
        wrong=wrong,
        **_choices(request, layout),
    )


def _sample_groups(index: Index, layout: Layout, sample: AuditSample) -> list[tuple[str, list[ShownImage], int]]:
    """Return the images of a sample by class, and how many of each are gone."""
    groups = []
    for label in sorted({one["label"] for one in sample.images}):
        ours = [one for one in sample.images if one["label"] == label]
        found = [index.image_at(layout, one["path"], guess=label, score=one["score"]) for one in ours]
        there = [image for image in found if image is not None]
        groups.append((label, there, len(ours) - len(there)))
    return groups


def class_page(request: Request) -> Response:
    """Show the references of a class and the newest images in it, which can be filed elsewhere."""
    layout, index = _layout(request), index_of(request)
    label = next((one for one in index.labels(layout) if class_key(one) == request.path_params["name"]), None)
    if label is None:
        raise HTTPException(404)
    refusals: list[OSError] = []
    paths = sorted(path for path, _ in whole_files(f"{layout.area(Area.CLASES)}/{label}", report=refusals.append))
    pictures = [index.image_at(layout, path) for path in paths[:PAGE_SIZE] if is_image(path)]
    filed: dict[str, ShownImage] = {}
    with journal_of(index.config, layout).open() as history:
        records = history.moves(Selection(label=label, undoable=True, limit=CLASS_MOVES))
    for record in records:
        path, why = os.path.join(layout.root, record.destination_path), record.move_reason
        if record.move.destination == f"{Area.DATASET}/{label}" and path not in filed and len(filed) < PAGE_SIZE:
            score = None if why.outcome == Outcome.ASSIGNED else why.score
            # Without the content of the record: the file may be another one since, and its picture would be wrong.
            found = index.image_at(layout, path, guess=label, score=score, mode=why.mode)
            filed |= {} if found is None else {path: found}
    return rendered(
        request,
        "class.html",
        **_common(layout, "overview"),
        label=label,
        references=[image for image in pictures if image is not None],
        hidden_references=max(0, len(paths) - PAGE_SIZE),
        filed=list(filed.values()),
        **_choices(request, layout),
    )


def rejected_page(request: Request) -> Response:
    """List the rejected files with their reasons."""
    layout = _layout(request)
    index, found = index_of(request), list[tuple[ShownImage, str]]()
    files = rejected_images(request.app.state.config, layout)
    for one in files[:REJECTED_SHOWN]:
        image = index.image_at(layout, one["path"])
        found += [] if image is None else [(image, one["reason"])]
    return rendered(
        request,
        "rejected.html",
        **_common(layout, "rejected"),
        files=found,
        hidden=max(0, len(files) - REJECTED_SHOWN),
    )


def runs_page(request: Request) -> Response:
    """List the last runs and the last moves."""
    layout, index, config = _layout(request), index_of(request), request.app.state.config
    shown = [
        {
            **one,
            "image": index.image_at(layout, str(one["to"])),
            "from": os.path.relpath(str(one["from"]), layout.root),
            "to": os.path.relpath(str(one["to"]), layout.root),
        }
        for one in journal_of(config, layout).moves(Selection(limit=MOVES_SHOWN))
    ]
    return rendered(
        request,
        "runs.html",
        **_common(layout, "runs"),
        runs=Activity(config.state_dir, layout).runs(),
        moves=shown,
    )


def references_page(request: Request) -> Response:
    """Show how well the references separate the classes, and those that look misplaced."""
    layout = _layout(request)
    found = request.app.state.evaluations.find(layout)
    groups = suspects_by_kind(index_of(request), layout, found["suspects"]) if found else []
    return rendered(request, "references.html", **_common(layout, "references"), evaluation=found, groups=groups)


def static_file(request: Request) -> Response:
    """Return the style sheet or the script."""
    found = static_files().get(request.path_params["name"])
    if found is None:
        raise HTTPException(404)
    body, mark, kind = found
    headers = {"Cache-Control": "private, max-age=31536000, immutable", "ETag": f'"{mark}"'}
    return Response(body, media_type=kind, headers=headers)


routes = [
    Route("/", home),
    Route("/static/{name}", static_file),
    Route("/image/{id}", image_page),
    Route("/d/{key}/", dataset_page),
    Route("/d/{key}/waiting", waiting_page),
    Route("/d/{key}/class/{name}", class_page),
    Route("/d/{key}/audit", audited_page),
    Route("/d/{key}/rejected", rejected_page),
    Route("/d/{key}/runs", runs_page),
    Route("/d/{key}/references", references_page),
]
_Handler = Callable[[Request, Exception], Response]
error_handlers: Mapping[Any, _Handler] = {HTTPException: _http_error, SortdError: _own_error, 500: _failure}
