"""The templates of the pages: their environment, filters, and responses."""

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from gettext import NullTranslations
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import jinja2
from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import HTMLResponse

from sortd import __version__
from sortd.classify.explain import REASONS
from sortd.classify.prompts import written_name
from sortd.classify.types import PROBABILISTIC
from sortd.commands.console import format_time, printable
from sortd.errors import SortdError
from sortd.review.i18n import catalogue, chosen_language, translatable
from sortd.review.index import Index, ShownImage

TEMPLATES = Path(__file__).parents[1] / "templates" / "review"
STATIC = Path(__file__).with_name("static")
OUTCOMES = {
    "filed": translatable("filed"),
    "sent_to_review": translatable("sent to Review"),
    "rejected": translatable("rejected"),
    "followed": translatable("companion moved"),
    "assigned": translatable("assigned by a person"),
    "refiled": translatable("moved to another class"),
    "undone": translatable("taken back"),
    "confirmed": translatable("confirmed by a person"),
    "corrected": translatable("corrected by a person"),
}
"""The outcomes of moves in words."""
CHECKS = {
    "confidence": translatable("confidence"),
    "familiarity": translatable("likeness to known images"),
    "strangers": translatable("likeness to images of no class"),
}
"""The conditions for filing in words."""
CLASS_MARK = "="
"""Begins the form value of an existing class, which ``class_key`` follows."""


class _Page(HTMLResponse):
    def render(self, content: Any) -> bytes:  # noqa: ANN401 - as the base class
        return str(content).encode("utf-8", "backslashreplace")


def class_key(label: str) -> str:
    """Return a short name of a class for forms and addresses, since its own may contain any bytes."""
    return hashlib.blake2b(os.fsencode(label), digest_size=6).hexdigest()


def form_label(label: str) -> str:
    """Return the form value of an existing class."""
    return CLASS_MARK + class_key(label)


def language_of(request: Request) -> str:
    """Return the language of the answer to a request."""
    return chosen_language(request.headers.get("accept-language", ""))


def translations_of(request: Request) -> NullTranslations:
    """Return the translations into the language of a request."""
    return catalogue(language_of(request))


def rendered(request: Request, template: str, *, status: int = 200, **values: Any) -> HTMLResponse:  # noqa: ANN401
    """Return a page in the language of the request; ``values`` are whatever the template shows."""
    language = language_of(request)
    query = urlencode([(name, value) for name, value in request.query_params.multi_items() if name != "effect"])
    here = request.url.path + (f"?{query}" if query else "")
    common = {
        "without_effect": here,
        "back": here,
        "form_token": session_of(request),
        "effect": _effect(request),
        "dataset": None,
        "key": None,
        "here": "",
        "texts": None,
    }
    text = _environment(language).get_template(template).render(common | values)
    return _Page(text, status, headers={"Content-Language": language, "Vary": "Accept-Language"})


def effect_number(request: Request) -> int:
    """Return the number of the act that led to this page; 0: none."""
    return number_of(request.query_params.get("effect", ""))


def number_of(text: str) -> int:
    """Return the number in a field of a form or an address; 0 for anything else."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else 0  # noqa: PLR2004 -- 64 bits


def _effect(request: Request) -> dict[str, Any] | None:
    number = effect_number(request)
    found: dict[str, Any] | None = None
    if number:
        with suppress(SortdError):  # its dataset may be away; the page says so
            found = request.app.state.effects.line(number, session_of(request), translations_of(request))
    return found


@cache
def _environment(language: str) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.i18n"],
    )
    texts = catalogue(language)
    environment.install_gettext_callables(texts.gettext, texts.ngettext, newstyle=True)  # type: ignore[attr-defined]  # by the extension
    say = texts.gettext
    environment.filters |= {
        "plain": printable,
        "isolated": _isolated,
        "filename": lambda path: _isolated(os.path.basename(path)),
        "plain_filename": lambda path: printable(os.path.basename(path)),
        "label": lambda label: _isolated(written_name(label)),
        "plain_label": lambda label: printable(written_name(label)),
        "form_label": form_label,
        "class_key": class_key,
        "percent": percent,
        "when": lambda seconds: format_time(seconds)[:16],
        "score": lambda image: _score(image, say),
        "reason": lambda reason: say(REASONS[reason]) if reason in REASONS else printable(reason),
        "outcome": lambda outcome: say(OUTCOMES[outcome]) if outcome in OUTCOMES else printable(outcome),
        "check": lambda name: say(CHECKS[name]) if name in CHECKS else printable(name),
    }
    environment.globals |= {
        "version": __version__,
        "language": language,
        "static": {name: f"/static/{name}?v={mark}" for name, (_, mark, _) in static_files().items()},
    }
    return environment


def _isolated(text: str) -> Markup:
    """Return a name so that its own direction of writing does not change what surrounds it."""
    return Markup("<bdi>{}</bdi>").format(printable(text))


def percent(share: float) -> str:
    """Return a share as ``84 %``; one that is not whole never becomes 0 or 100."""
    rounded = round(100 * share)
    if rounded in {0, 100} and share not in {0.0, 1.0}:
        return "< 1\u00a0%" if rounded == 0 else "> 99\u00a0%"
    return f"{rounded}\u00a0%"


def _score(image: ShownImage, say: Callable[[str], str]) -> str:
    if image.score is None:
        return ""
    if image.mode in PROBABILISTIC or image.mode == "finetuned":
        return percent(image.score)
    return say("similarity %s") % f"{image.score:.2f}"


@cache
def static_files() -> dict[str, tuple[bytes, str, str]]:
    """Return the style sheet and the script by name: their bytes, a mark of their version, and their media type."""
    kinds = {"review.css": "text/css", "review.js": "text/javascript", "icon.svg": "image/svg+xml"}
    bodies = {name: (STATIC / name).read_bytes() for name in kinds}
    return {name: (body, hashlib.sha256(body).hexdigest()[:12], kinds[name]) for name, body in bodies.items()}


def session_of(request: Request) -> str:
    """Return what tells the people at this server apart: the token of the forms of a session."""
    return getattr(request.state, "form_token", "")


def index_of(request: Request) -> Index:
    """Return the index of the server that a request came to."""
    index: Index = request.app.state.index
    return index
