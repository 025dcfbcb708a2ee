"""The languages of the pages: English in the code, others as gettext catalogues in ``locale/``.

The catalogues are compiled when they are first used, so that no compiled file can be older than its source.
"""

import re
from functools import cache
from gettext import GNUTranslations, NullTranslations
from io import BytesIO
from pathlib import Path

from babel.messages.mofile import write_mo
from babel.messages.pofile import read_po

CATALOGUES = Path(__file__).with_name("locale")
"""Contains ``<language>.po`` for each language but English."""
ENGLISH = "en"
_RANGE = re.compile(r"\s*([A-Za-z]{1,8}|\*)(?:-[A-Za-z0-9]{1,8})*\s*(?:;\s*q\s*=\s*([01](?:\.\d{0,3})?))?\s*")


@cache
def languages() -> frozenset[str]:
    """Return the languages of the pages as two letters."""
    return frozenset({ENGLISH, *(file.stem for file in CATALOGUES.glob("*.po"))})


def chosen_language(accepted: str) -> str:
    """Return the language that a browser likes best, from its ``Accept-Language``; English if it names none of ours."""
    wanted = [found for part in accepted.split(",") if (found := _RANGE.fullmatch(part))]
    ranked = sorted(wanted, key=lambda one: -float(one[2] or 1))  # stable: of equal ones the first
    ours = (one[1].lower() for one in ranked if float(one[2] or 1) > 0)
    return next((one for one in ours if one in languages()), ENGLISH)


@cache
def catalogue(language: str) -> NullTranslations:
    """Return the translations of a language."""
    if language == ENGLISH:
        return NullTranslations()
    compiled = BytesIO()
    with (CATALOGUES / f"{language}.po").open("rb") as file:
        write_mo(compiled, read_po(file, locale=language))
    compiled.seek(0)
    return GNUTranslations(compiled)


def translatable(text: str) -> str:
    """Return a text unchanged; marks it for the catalogues where it is translated later."""
    return text
