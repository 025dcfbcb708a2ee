"""Server-sent events: what changes on a page while it is open, as texts by name."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import datetime
from gettext import NullTranslations
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from sortd.commands.console import printable
from sortd.commands.moves import journal_of
from sortd.errors import SortdError
from sortd.layout import Layout
from sortd.review.effects import running_state
from sortd.review.index import Index
from sortd.review.rendering import effect_number, session_of, translations_of

EVERY_SECONDS = 1.0
PING_EVERY = 15
"""Turns without a change after which a comment is sent, so that a connection that is gone is noticed."""


def answers_today(index: Index, layout: Layout) -> int:
    """Return to how many images a person gave a class since midnight, local time."""
    midnight = datetime.now().astimezone().replace(hour=0, minute=0, second=0, microsecond=0)
    with journal_of(index.config, layout).open() as history:
        return sum(history.given_since(midnight.timestamp()).values())


def live_texts(
    index: Index, layout: Layout, line: Mapping[str, Any] | None, translations: NullTranslations
) -> dict[str, str]:
    """Return the texts of a page that change: waiting, today, state, grouping, problem, and the effect of ``line``."""
    waiting, today = len(index.waiting(layout)), answers_today(index, layout)
    running = running_state(index.config, layout)
    problem = "" if running is None else running.problem
    gettext, ngettext = translations.gettext, translations.ngettext
    return {
        "waiting": ngettext("%(num)d image waits", "%(num)d images wait", waiting) % {"num": waiting},
        "today": gettext("%(num)d of %(all)d answered today") % {"num": today, "all": today + waiting},
        "grouping": _grouping_text(index, layout, translations),
        "state": gettext("sortd does not run") if running is None else gettext("sortd runs"),
        "problem": gettext("sortd has a problem: %(problem)s") % {"problem": printable(problem)} if problem else "",
        **({} if line is None else {"effect": line["text"]}),
    }


def _grouping_text(index: Index, layout: Layout, translations: NullTranslations) -> str:
    match index.grouping(layout):
        case "running":
            return translations.gettext("Similar images are being grouped; they come first when this is done.")
        case "done":
            return translations.gettext("Similar images are grouped now: load the page again.")
    return ""


async def events(request: Request) -> StreamingResponse:
    """Send the changed texts of a page once a second, until it is closed."""
    state = request.app.state
    layout = await run_in_threadpool(state.index.dataset, request.path_params["key"])
    translations = translations_of(request)
    known = effect_number(request)
    session = session_of(request)

    def texts() -> dict[str, str]:
        return live_texts(state.index, layout, state.effects.line(known, session, translations), translations)

    return StreamingResponse(_stream(request, texts), media_type="text/event-stream")


async def _stream(request: Request, current: Callable[[], dict[str, str]]) -> AsyncIterator[str]:
    last: dict[str, str] = {}
    silent = 0
    while not await request.is_disconnected():
        try:
            texts = await run_in_threadpool(current)
        except SortdError:
            texts = last  # a disk that is away: the page itself says so when it is loaded
        silent += 1
        if changed := {name: text for name, text in texts.items() if last.get(name) != text}:
            yield f"data: {json.dumps(changed)}\n\n"
            last, silent = texts, 0
        elif silent >= PING_EVERY:
            yield ":\n\n"
            silent = 0
        await asyncio.sleep(EVERY_SECONDS)


routes = [Route("/d/{key}/events", events)]
