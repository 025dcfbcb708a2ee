"""What is said about a mistake in the configuration: to somebody who wrote YAML and knows nothing of pydantic."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic_core import ErrorDetails

from sortd.configuring.sources import ANY, Keys, siblings, variable_name
from sortd.configuring.yaml_tree import Tree

_WANTED = {
    "float_parsing": "is no number",
    "int_parsing": "is no whole number",
    "int_from_float": "is no whole number",
    "bool_parsing": "is neither yes nor no",
    "string_pattern_mismatch": "is none of auto, cpu, cuda, cuda:0, mps",
    "tuple_type": "is not a list; write one `- ...` line for each",
}
_GROUPS = {"model_type", "model_attributes_type", "dict_type", "mapping_type"}


def lines(file: Path | None, tree: Tree, wrong: Mapping[str, str], keys: Keys) -> list[str]:
    """Return a line for each mistake in the file, in its order, then one for each in a variable."""
    known = [variable_name(key) for key in keys if ANY not in key]
    in_file = sorted(tree.mistakes, key=lambda mistake: (mistake.line, mistake.column))
    return [
        *(
            f"{file}:{mistake.line}:{mistake.column}: "
            + (f"{'.'.join(map(str, mistake.path))}: " if mistake.path else "")
            + mistake.message
            for mistake in in_file
        ),
        *(
            f"{name}: {message}{_meant(name, known, likeness=0.8) if message.startswith('unknown') else ''}"
            for name, message in wrong.items()
        ),
    ]


def said(details: ErrorDetails, keys: Keys) -> str:
    """Put one of pydantic's errors into words."""
    path, given, context, kind = details["loc"], details["input"], details.get("ctx", {}), details["type"]
    match kind:
        case "extra_forbidden":
            is_for_all = path[0] == "datasets" and path[2:] in keys
            meant = "; it holds for all datasets alike" if is_for_all else _meant(str(path[-1]), siblings(keys, path))
            message = f"unknown key{meant}"
        case "literal_error" if isinstance(given, str):
            allowed = [word.strip("' ") for word in str(context["expected"]).replace(" or ", ",").split(",")]
            message = f"{given!r} is none of {', '.join(allowed)}{_meant(given, allowed)}"
        case "value_error":
            message = str(context["error"])
        case _ if kind in _GROUPS:
            message = "must be a group of keys, indented below it" + (", or `off`" if path[-1] == "abstain" else "")
        case "missing":
            message = "has no default, since neither HOME nor a folder of systemd is set; give it"
        case "string_too_short":
            message = "must not be empty"
        case _ if kind in _WANTED:
            message = f"{given!r} {_WANTED[kind]}"
        case _ if kind == "literal_error" or kind.endswith("_type"):
            message = "must be one value, not a list or a group of keys"
        case _:
            message = f"{given!r} {details['msg'].replace('Input should', 'should')}"
    return message


def _meant(word: str, known: Sequence[str], *, likeness: float = 0.6) -> str:
    near = (difflib.get_close_matches(written, known, 1, likeness) for written in (word, word.casefold(), word.upper()))
    return next((f"; did you mean {found[0]}?" for found in near if found), "")
