"""Moments as people write them: ``2026-03-01``, ``2026-03-01 14:30``, ``14:30``, ``2h``, ``3d``, ``yesterday``."""

import re
from datetime import datetime, timedelta

_AGE = re.compile(r"(\d+(?:\.\d+)?)\s*(s|sec|m|min|h|hours?|d|days?|w|weeks?)(?:\s+ago)?")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def moment(text: str, now: datetime) -> float:
    """Return a moment as seconds since the epoch.

    Args:
        text: a date, a date and time, a time of today, an age, ``today`` or ``yesterday``; local time unless it says
            otherwise (``2026-03-01T14:30+02:00``).
        now: the present, aware of its time zone.

    Raises:
        ValueError: it is none of these.
    """
    word = text.strip().lower()
    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
    if word in {"now", "today", "yesterday"}:
        return {"now": now, "today": midnight, "yesterday": midnight - timedelta(days=1)}[word].timestamp()
    if (age := _AGE.fullmatch(word)) is not None:
        return now.timestamp() - float(age[1]) * _SECONDS[age[2][0]]
    if re.fullmatch(r"\d{1,2}:\d\d(:\d\d)?", word):
        word = f"{now:%Y-%m-%d}T{word:0>5}"
    try:
        parsed = datetime.fromisoformat(word.upper())
        return (parsed if parsed.tzinfo is not None else parsed.astimezone()).timestamp()
    except (ValueError, OverflowError, OSError) as error:
        raise ValueError(
            f"{text!r} is no moment: write 2026-03-01, '2026-03-01 14:30', 14:30, 2h, 3d or yesterday"
        ) from error


def shown(seconds: float) -> str:
    """Return seconds since the epoch as local date and time; the number where no calendar holds it."""
    try:
        return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return f"{seconds:g} s"


def duration(seconds: float) -> str:
    """Return a length of time in its two largest units."""
    whole = max(0, int(seconds))
    units = [(86_400, "d"), (3600, "h"), (60, "min"), (1, "s")]
    parts: list[str] = []
    for size, unit in units:
        if whole >= size and len(parts) < 2:  # noqa: PLR2004 -- two units say enough
            parts.append(f"{whole // size} {unit}")
            whole %= size
    return " ".join(parts) or "0 s"
