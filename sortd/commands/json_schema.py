"""The JSON Schema of what commands print with ``--json``, and docs/json.md, from the types of the documents.

python -m sortd.commands.json_schema docs
"""

import json
import sys
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from sortd.commands import model_documents, run_documents  # noqa: F401 -- their documents are in DOCUMENTS then
from sortd.commands.console import JSON_VERSION
from sortd.commands.documents import DOCUMENTS, Document, FailedDocument

TEXT = """# JSON output

`sortd COMMAND --json` prints one JSON document, an object, to standard output. Messages go to standard error.
The documents have one shape, of which [json.schema.json](json.schema.json) is the JSON Schema.

- `command` is the command, for example `models fetch`, and `schema` the version of the shape: {version}. New keys do
  not change the version; ignore the keys that you do not know. The other keys are the facts.
- The same thing has the same name everywhere: `dataset` is the name of a dataset and `root` its folder; `path` is the
  absolute path of a file; `label` is a class; `id` is the number of a move in the journal of its dataset. `datasets`,
  `accuracy` and other mappings have the name of the dataset or class as key.
- A time is text in UTC: `2026-03-01T14:30:00.000Z`. `at` and the keys that end with `_at` or `_since` are times.
- A share or probability is a number from 0 to 1. Numbers that are not known or not finite are `null`, never `NaN`.
- Bytes of file names that are not UTF-8 are lone surrogates (`\\udcff` is the byte 0xFF), as in Python's `os.fsdecode`.
- `sortd once --dry-run --json` prints such a document on a line for each image as soon as it is decided (JSON lines),
  and `sortd history --json` prints each move on a line of its document as it is read.

If a command fails, the last line of standard error is one JSON object: `command`, `schema`, `error` with the message
and `exit_code`. Standard output is then empty, or a whole document about what could be done. A wrong option (exit code
2) is reported as text. Exit codes are those of the command without `--json`.

This file is made by `python -m sortd.commands.json_schema docs`.
"""

_WORDS = {
    "string": "text",
    "boolean": "true or false",
    "array": "list of",
    "object": "mapping to",
}


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of all documents; ``$defs`` has each by the name of its type."""
    names: dict[type[Document], list[str]] = {}
    for command, some in DOCUMENTS.items():
        shapes: tuple[type[Document], ...] = (*some, FailedDocument)
        for shape in shapes:
            names.setdefault(shape, []).append(command)
    _, schema = TypeAdapter.json_schemas([(shape, "validation", TypeAdapter(shape)) for shape in names])
    definitions: dict[str, Any] = _without_titles(schema["$defs"])
    for shape, commands in names.items():
        envelope = {"command": {"enum": commands}, "schema": {"const": JSON_VERSION}}
        one = definitions[shape.__name__]
        one["properties"] = envelope | one["properties"]
        one["required"] = [*envelope, *one["required"]]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "The JSON that sortd prints",
        "anyOf": [{"$ref": f"#/$defs/{shape.__name__}"} for shape in names],
        "$defs": definitions,
    }


def _without_titles(schema: Any) -> Any:  # noqa: ANN401 -- any JSON
    match schema:
        case dict():
            return {key: _without_titles(one) for key, one in schema.items() if key != "title" or isinstance(one, dict)}
        case list():
            return [_without_titles(one) for one in schema]
    return schema


def markdown() -> str:
    """Return docs/json.md."""
    definitions = json_schema()["$defs"]
    documents = {shape.__name__ for some in DOCUMENTS.values() for shape in some}
    named = {name: one for name, one in definitions.items() if name in documents}
    parts = {name: one for name, one in definitions.items() if name not in documents}
    lines = [TEXT.format(version=JSON_VERSION), "## Documents", ""]
    for some in (named, None, parts):
        if some is None:
            lines += ["## Objects in them", ""]
            continue
        for name, one in some.items():
            about = one["description"].replace("``", "`").removesuffix(".")
            lines += [f"### {name}", "", f"{about}.", "", "| key | value | |", "|---|---|---|"]
            required = one.get("required", ())
            for key, kind in one["properties"].items():
                if key in {"command", "schema"}:
                    continue
                said = kind.get("description", "").replace("``", "`")
                optional = "" if key in required else "may be missing"
                cell = "; ".join(text for text in (optional, said) if text)
                lines.append(f"| `{key}` | {_written(kind)} | {cell} |")
            lines.append("")
    return "\n".join(lines)


def _written(kind: dict[str, Any]) -> str:
    """Return the type of a value in words."""
    if reference := kind.get("$ref"):
        name = reference.rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in kind:
        return " or ".join(_written(one) for one in kind["anyOf"])
    if "enum" in kind:
        return ", ".join(f"`{json.dumps(one)}`" for one in kind["enum"])
    several = kind.get("prefixItems") or [kind[key] for key in ("items", "additionalProperties") if key in kind]
    inner = ", ".join("figures" if one is True or not one else _written(one) for one in several)
    word = "time" if "pattern" in kind else _WORDS.get(kind["type"], kind["type"])
    return f"{word} {inner}" if inner else word


def write(folder: Path) -> None:
    """Write ``json.md`` and ``json.schema.json`` to a folder."""
    (folder / "json.md").write_text(markdown(), encoding="utf-8")
    head = json_schema()
    lines = [f"{json.dumps(name)}: {json.dumps(one)}" for name, one in head.pop("$defs").items()]
    text = f'{json.dumps(head)[:-1]}, "$defs": {{\n' + ",\n".join(lines) + "\n}}\n"
    (folder / "json.schema.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
