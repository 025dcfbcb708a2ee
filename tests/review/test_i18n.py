"""The languages of the pages: which is chosen, and that no text lacks its translation."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from babel.messages.extract import extract_from_file
from babel.messages.pofile import read_po

import sortd
from sortd.classify.explain import REASONS
from sortd.review.i18n import CATALOGUES, catalogue, chosen_language, languages

PACKAGE = Path(sortd.__file__).parent
KEYWORDS = {"_": None, "gettext": None, "ngettext": (1, 2), "say": None, "translate": None, "translatable": None}


def texts() -> dict[str, str | None]:
    """Return every text of the pages, with its plural."""
    found: dict[str, str | None] = dict.fromkeys(REASONS.values())
    sources = [("jinja2.ext:babel_extract", path) for path in (PACKAGE / "templates" / "review").glob("*.html")]
    sources += [("python", path) for path in (PACKAGE / "review").glob("*.py")]
    for method, path in sources:
        for _, message, _, _ in extract_from_file(method, path, keywords=KEYWORDS):
            one, several = (message, None) if isinstance(message, str) else (message[0], message[1])
            assert found.setdefault(one, several) == several, f"{path}: {one!r} has two plurals"
    return found


def placeholders(text: str) -> set[str]:
    """Return what a text leaves to be filled in."""
    return set(re.findall(r"%\(\w+\)s|%%|%s|\{\w*\}", text))


def as_list(text: str | Sequence[str] | None) -> list[str]:
    """Return a text, or its forms of one and of several."""
    return [text] if isinstance(text, str) else list(text or ())


@pytest.mark.parametrize("language", sorted(languages() - {"en"}))
def test_catalogue_has_every_text_and_no_other(language: str) -> None:
    """Each text is translated, with the same placeholders, and no translation is left of a text that went."""
    with (CATALOGUES / f"{language}.po").open("rb") as file:
        found = {message.id: message for message in read_po(file, locale=language) if message.id}
    ids = {one if several is None else (one, several) for one, several in texts().items()}
    assert set(found) == ids
    for message in found.values():
        assert not message.fuzzy
        forms, originals = as_list(message.string), as_list(message.id)
        assert all(forms)
        assert {frozenset(placeholders(one)) for one in forms} == {frozenset(placeholders(one)) for one in originals}


@pytest.mark.parametrize(
    ("accepted", "language"),
    [
        ("", "en"),
        ("es", "es"),
        ("es-MX,es;q=0.9,en;q=0.8", "es"),
        ("en;q=0.3, es;q=0.7", "es"),
        ("fr,de;q=0.5", "en"),
        ("es;q=0, en", "en"),
        ("fr, ES;q=0.1", "es"),
        ("*", "en"),
        (";;,q=,\x00es;q=9" * 1000, "en"),
    ],
)
def test_language_is_the_one_that_the_browser_likes_best(accepted: str, language: str) -> None:
    """What is not understood, or is not among the catalogues, counts for nothing."""
    assert chosen_language(accepted) == language


def test_catalogue_chooses_plurals() -> None:
    """The compiled catalogue has the rule of its language."""
    texts = catalogue("es")
    one, several = "%(num)s image", "%(num)s images"
    assert [texts.ngettext(one, several, number) for number in (0, 1, 2)] == [
        "%(num)s imágenes",
        "%(num)s imagen",
        "%(num)s imágenes",
    ]
