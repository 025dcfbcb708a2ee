"""A console line: what somebody at a terminal reads of a log line; JSON, and the level debug, have all of it."""

import json
import os
from collections.abc import Mapping, MutableMapping
from typing import Any

PADDED = 22
"""Columns that an event takes: the longest that is frequent, ``image.sent_to_review``, and a space."""

_UNSAID = ("encoder_id",)
"""Long, and the same in every line until the next start: ``model.loaded`` says it once."""

REASONS = {
    "no_classes": "no class to choose from",
    "name_only": "the class is known by its name alone",
    "too_few": "too few references",
    "stranger": "looks like what belongs to no class",
    "typicality": "unlike the references",
    "margin": "another class is too near",
}
"""Why an image is sent to Review/, in few words; ``sortd explain`` says it in a sentence."""


def for_people(line: MutableMapping[str, Any], *, after_event: str = "") -> MutableMapping[str, Any]:
    """Shorten a line: a move becomes one sentence, any other line loses what it repeats.

    ``image.filed  Tornillos: Images/a.jpg -> Dataset/hex/  0.998, then cross 0.001``

    Args:
        line: event and fields, as the log has them.
        after_event: what ends the emphasis of the event's name where there are colours.

    Returns:
        A line with fewer fields; control characters of names are escaped in the sentence.
    """
    path, destination = line.get("path"), line.get("destination")
    if not (isinstance(path, str) and isinstance(destination, str)) or "exception" in line or "exc_info" in line:
        return {name: value for name, value in line.items() if name not in _UNSAID}
    sentence = f"{line.get('dataset', '')}: {_way(path, destination)}  {_why(line)}".rstrip()
    event = f"{line['event']!s:<{PADDED}}{after_event} {_escaped(sentence)}"
    kept = {name: line[name] for name in ("timestamp", "level", "suppressed") if name in line}
    return {**kept, "event": event}


def _way(path: str, destination: str) -> str:
    """Return from where to where below the folder that both lie in; the name a second time only if it is another."""
    common = os.path.commonpath([path, destination])
    source, target = os.path.relpath(path, common), os.path.relpath(destination, common)
    folder, name = os.path.split(target)
    return f"{source} -> {f'{folder}/' if name == os.path.basename(path) and folder else target}"


def _why(line: Mapping[str, Any]) -> str:
    """Return how sure it was, the class that came second with its score, and the reason not to file."""
    score, margin, second = (line.get(name) for name in ("score", "margin", "second_label"))
    said = [] if score is None else [f"{score:.3f}"]
    if score is not None and margin is not None and second is not None:
        said.append(f"then {second} {score - margin:.3f}")
    if line.get("reason"):
        said.append(REASONS.get(line["reason"], str(line["reason"])))
    return ", ".join(said)


def _escaped(text: str) -> str:
    """Return a text that cannot paint or break a line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def readable_json(facts: object, *, encoding: str | None = "utf-8", **options: Any) -> str:  # noqa: ANN401 -- of json.dumps
    """Return JSON in which letters of every language stand as they are, so that a name can be searched for.

    Escaped are characters that cannot be seen, among them those that paint a terminal, and bytes that are no UTF-8.

    Args:
        facts: what to write.
        encoding: of the stream; where it is not UTF-8, everything beyond ASCII is escaped.
        options: of ``json.dumps``.
    """
    if (encoding or "utf-8").replace("-", "").lower() != "utf8":
        return json.dumps(facts, **options)
    text = json.dumps(facts, ensure_ascii=False, **options)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)
