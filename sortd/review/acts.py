"""What a person does on the pages: POST handlers, each of which sends a request to the running sortd.

A form names images by their ids, so that an image that changed since it was shown is refused and nothing of it moves.
Sending a form twice does nothing more: its images are no longer where they were.
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse
from starlette.routing import Route

from sortd.commands.assign import assign_to_class
from sortd.commands.audit import answer_sample_by_ids, draw_sample, open_sample
from sortd.commands.console import printable
from sortd.commands.moves import journal_of, undo_records_of
from sortd.commands.rejected import retry_rejected
from sortd.daemon.assign import image_facts
from sortd.errors import DataError, SortdError
from sortd.events import NO_CLASS, Outcome
from sortd.layout import Area, Layout
from sortd.review.effects import Act, Effects
from sortd.review.index import Index, ShownImage, dataset_key
from sortd.review.rendering import CLASS_MARK, form_label, index_of, number_of, session_of
from sortd.store.records import Record, Selection

NONE_ACTIONS = frozenset({"none", "example"})
"""The buttons for images of no class, which become examples of that or do not."""
LONGEST_BACK = 2000
MOST_FIELDS = 25_000
"""Fields of a form: those of the largest sample of an audit."""
_CLASS_VALUE = re.compile(f"{CLASS_MARK}[0-9a-f]{{12}}")


async def assign(request: Request, *, area: Area, kind: str) -> RedirectResponse:
    """File images of Review/ into a class, or of Dataset/ into another; or set them apart as none of the classes."""
    index, layout, form = await _begin(request)
    images, refused = _found(index, form.getlist("image"), area, layout)
    action = _text(form, "action")
    is_none = action in NONE_ACTIONS
    label = NO_CLASS if is_none else await run_in_threadpool(_label, index, layout, _text(form, "label"))
    act = await _added(
        request, layout, action if is_none else "none" if label == NO_CLASS else kind, label=label, refused=refused
    )
    if images:
        await _carried_out(
            act,
            lambda: assign_to_class(
                index.config,
                layout,
                label,
                [image_facts(one.path, one.stamp) for one in images],
                is_example=act.kind == "example",
            ),
            "assigned",
            asked=frozenset(one.path for one in images),
        )
        await run_in_threadpool(_list_again, index, layout)
    return _back(form, act)


async def undo(request: Request) -> RedirectResponse:
    """Take back the act of this person that the form names, or the newest, or the newest assignment in the journal."""
    form = await request.form(max_fields=MOST_FIELDS)
    index, effects, session = index_of(request), _effects(request), session_of(request)
    layout = await run_in_threadpool(index.dataset, _text(form, "dataset"))
    if number := _number(form, "number"):
        named = effects.get(number, session)
        if named is None or named.dataset != dataset_key(layout) or not named.can_be_undone:
            message = "this was taken back before, or is not known any more: look again"
            return _back(form, await _added(request, layout, "undone", refused=[message]))
        return _back(form, await _taken_back(request, layout, named))
    while (newest := effects.newest(dataset_key(layout), session)) is not None:
        if newest.ids or newest.later or await run_in_threadpool(_ended_later, index, layout, newest):
            return _back(form, await _taken_back(request, layout, newest))
        newest.is_tried = True  # its request failed, and moved nothing
    ids = await run_in_threadpool(_newest_assigned, index, layout, effects.ids_of_others(session))
    return _back(form, await _undone(request, layout, ids))


async def _taken_back(request: Request, layout: Layout, one: Act) -> Act:
    """Undo the moves of an act, those included that ended after its answer."""
    one.is_tried = True  # before the request, so that a second one takes the act before
    ended = await run_in_threadpool(_ended_later, index_of(request), layout, one)
    act = await _undone(request, layout, [*one.ids, *ended], undoes=one.number)
    one.is_tried = not act.is_unanswered
    one.is_undone = act.moved + act.later > 0
    if one.later > len(ended):
        act.refused.append(f"{one.later - len(ended)} may still be copied to another disk: take this back again then")
        one.is_undone = False
    return act


async def undo_consequences(request: Request) -> RedirectResponse:
    """Take back what sortd filed because of an act, as far as the page has shown it."""
    form = await request.form(max_fields=MOST_FIELDS)
    index, effects = index_of(request), _effects(request)
    act = effects.get(_number(form, "number"), session_of(request))
    if act is None:
        raise HTTPException(404, "this act is not known any more")
    layout = await run_in_threadpool(index.dataset, act.dataset)
    filed, last = await run_in_threadpool(effects.consequences, act), _number(form, "last")
    return _back(form, await _undone(request, layout, [one for one in filed if one <= last]))


async def undo_run(request: Request) -> RedirectResponse:
    """Take back the moves of one run of sortd that the page has shown."""
    index, layout, form = await _begin(request)
    shown = range(_number(form, "first"), _number(form, "last") + 1)
    moves = await run_in_threadpool(_moves, index, layout, Selection(run=_text(form, "run"), undoable=True))
    return _back(form, await _undone(request, layout, [one.id for one in moves if one.id in shown]))


async def _undone(request: Request, layout: Layout, ids: Sequence[int], *, undoes: int = 0) -> Act:
    index = index_of(request)
    act = await _added(request, layout, "undone", undoes=undoes)
    if ids:
        await _carried_out(act, lambda: undo_records_of(index.config, layout, ids), "undone", only=frozenset(ids))
        act.ids = []
        await run_in_threadpool(_list_again, index, layout)
    return act


async def retry(request: Request) -> RedirectResponse:
    """Try rejected images again."""
    index, layout, form = await _begin(request)
    images, refused = _found(index, form.getlist("image"), Area.REJECTED, layout)
    act = await _added(request, layout, "retried", refused=refused)
    if images:
        await _carried_out(act, lambda: retry_rejected(index.config, layout, [one.path for one in images]), "retried")
        act.ids = []
    return _back(form, act)


async def draw(request: Request) -> RedirectResponse:
    """Draw a random sample of filed images to look at."""
    index, layout, form = await _begin(request)
    act = await _added(request, layout, "audited")
    try:
        await run_in_threadpool(draw_sample, index.config, layout, None)
    except SortdError as error:
        act.refused.append(printable(str(error)))
    return _back(form, act)


async def answer_audit(request: Request) -> RedirectResponse:
    """Record which images of the open sample are in a wrong class; the form names all that were shown."""
    index, layout, form = await _begin(request)
    act = await _added(request, layout, "audited")
    shown, wrong = ({one for one in form.getlist(name) if isinstance(one, str)} for name in ("shown", "wrong"))
    try:
        told = await run_in_threadpool(_answered, index, layout, shown, wrong & shown)
        act.right, act.judged = told["sample"]["right"], told["sample"]["judged"]
    except SortdError as error:
        act.refused.append(printable(str(error)))
    return _back(form, act)


def _answered(index: Index, layout: Layout, shown: set[str], wrong: set[str]) -> dict[str, Any]:
    """Answer the open sample; raise DataError if another one was shown."""
    sample = open_sample(layout.state_folder(index.config.state_dir))
    images = [(one, index.image_at(layout, one["path"])) for one in (() if sample is None else sample.images)]
    if {image.id for _, image in images if image is not None} != shown:
        raise DataError("the sample changed since it was shown, or was answered: look again")
    return answer_sample_by_ids(
        index.config, layout, [one["id"] for one, image in images if image is not None and image.id in wrong]
    )


_HANDLERS: Mapping[str, Callable[..., Any]] = {
    "/undo": undo,
    "/undo-consequences": undo_consequences,
    "/d/{key}/assign": partial(assign, area=Area.REVIEW, kind="assigned"),
    "/d/{key}/correct": partial(assign, area=Area.DATASET, kind="corrected"),
    "/d/{key}/undo-run": undo_run,
    "/d/{key}/retry": retry,
    "/d/{key}/draw": draw,
    "/d/{key}/audit": answer_audit,
}
routes = [Route(path, handler, methods=["POST"]) for path, handler in _HANDLERS.items()]


def _effects(request: Request) -> Effects:
    found: Effects = request.app.state.effects
    return found


async def _added(request: Request, layout: Layout, kind: str, **facts: Any) -> Act:  # noqa: ANN401 - of Act
    """Note an act of this person."""
    generation = await run_in_threadpool(_last_generation, index_of(request), layout)
    return _effects(request).add(dataset_key(layout), session_of(request), kind, generation=generation, **facts)


async def _begin(request: Request) -> tuple[Index, Layout, FormData]:
    index = index_of(request)
    form = await request.form(max_fields=MOST_FIELDS)
    return index, await run_in_threadpool(index.dataset, request.path_params["key"]), form


def _text(form: FormData, name: str) -> str:
    value = form.get(name, "")
    return value if isinstance(value, str) else ""


def _number(form: FormData, name: str) -> int:
    return number_of(_text(form, name))


def _label(index: Index, layout: Layout, text: str) -> str:
    """Return the class that a form names: an existing one by its key, or the text."""
    if not _CLASS_VALUE.fullmatch(text):
        return text.strip()
    label = next((label for label in index.labels(layout) if form_label(label) == text), None)
    if label is None:
        raise HTTPException(400, "this class does not exist any more; look again")
    return label


def _found(index: Index, ids: Iterable[object], area: Area, layout: Layout) -> tuple[list[ShownImage], list[str]]:
    """Return the images of a form that are as they were shown, and a message for the others."""
    found, changed = list[ShownImage](), 0
    folder = f"{layout.root}{os.sep}{area}{os.sep}"
    for one in dict.fromkeys(one for one in ids if isinstance(one, str)):
        image = index.find(one)
        if image is None or not image.path.startswith(folder):
            changed += 1
        else:
            found.append(image)
    return found, [f"{changed} changed or were moved since they were shown: look again"] if changed else []


async def _carried_out(
    act: Act,
    work: Callable[[], Mapping[str, Any]],
    key: str,
    *,
    asked: frozenset[str] = frozenset(),
    only: frozenset[int] | None = None,
) -> None:
    """Carry out the request of an act by ``work`` and note the results, ``key`` in its reply, or why it failed.

    ``asked`` are the images of the request, which may be moved later, or although it failed; ``only`` the moves that
    count, by default all.
    """
    try:
        reply = await run_in_threadpool(work)
    except SortdError as error:
        act.refused.append(printable(str(error)))
        act.unknown, act.is_unanswered = asked, True
        return
    for one in reply[key]:
        where = one.get("destination", one.get("restored"))
        if where is None:
            act.refused.append(printable(str(one["message"])))
        elif only is None or one["id"] in only:  # otherwise a companion that follows its image
            act.moved += 1
            if one.get("id") is not None:
                act.ids.append(one["id"])
    act.later = reply.get("later", 0)
    act.unknown = asked - {one.get("path") for one in reply[key]}


def _back(form: FormData, act: Act) -> RedirectResponse:
    """Return to the page of the form, which shows the effect; only addresses of this server count."""
    given = _text(form, "back")[:LONGEST_BACK]
    if not given.startswith("/") or given.startswith(("//", "/\\")) or not given.isprintable():
        given = f"/d/{act.dataset}/"
    parts = urlsplit(given)
    query = [(name, value) for name, value in parse_qsl(parts.query) if name != "effect"]
    return RedirectResponse(
        urlunsplit(("", "", parts.path, urlencode([*query, ("effect", str(act.number))]), "")), status_code=303
    )


def _list_again(index: Index, layout: Layout) -> None:
    """Read Review/ after an act; if that fails, the page says so, which also shows the effect of the act."""
    with suppress(SortdError):
        index.waiting(layout, now=True)


def _newest_assigned(index: Index, layout: Layout, others: frozenset[int]) -> list[int]:
    """Return the newest move that a person asked for, that was not undone and is not among ``others``, as a list."""
    newest = _moves(index, layout, Selection(outcome=Outcome.ASSIGNED, undoable=True, limit=len(others) + 1))
    return [one.id for one in newest if one.id not in others][:1]


def _ended_later(index: Index, layout: Layout, act: Act) -> list[int]:
    """Return the moves of an act that ended after its answer, or without one."""
    if not act.unknown:
        return []
    found = _moves(index, layout, Selection(outcome=Outcome.ASSIGNED, since=act.at, undoable=True))
    return [one.id for one in found if f"{layout.root}/{one.source_path}" in act.unknown and one.id not in act.ids]


def _last_generation(index: Index, layout: Layout) -> int:
    with journal_of(index.config, layout).open() as history:
        return history.last_generation()


def _moves(index: Index, layout: Layout, selection: Selection) -> list[Record]:
    with journal_of(index.config, layout).open() as history:
        return history.moves(selection)
