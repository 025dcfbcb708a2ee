"""Parse YAML into mappings, lists and the text of every scalar, with the line and column of each key.

YAML 1.1 would convert `No`, `off`, `1.0` and `12:30`; here every scalar stays text, and the configuration model decides
its type. No tag constructs an object, so none can run code.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import yaml

Value: TypeAlias = "str | list[Value] | dict[str, Value] | None"
Path: TypeAlias = tuple[str | int, ...]

MAX_YAML_BYTES = 64 * 1024  # some 2,000 lines; PyYAML reads about 200 KB a second
MAX_VALUES = 20_000  # what aliases may expand to
MAX_DEPTH = 20

_PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "map", "seq")}
_EMPTY = {"", "~", "null", "Null", "NULL"}


@dataclass(frozen=True, slots=True)
class Mistake:
    """A mistake and its position; lines and columns count from 1."""

    path: Path
    message: str
    line: int = 1
    column: int = 1


@dataclass(slots=True)
class Tree:
    """A document: its value, the position of each key, and the mistakes in it."""

    value: Value = None
    places: dict[Path, tuple[int, int]] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)

    def place(self, path: Path) -> tuple[int, int]:
        """Return the line and column of a key, or of the nearest group around it in the file."""
        nearest = next((path[:end] for end in range(len(path), 0, -1) if path[:end] in self.places), ())
        return self.places.get(nearest, (1, 1))

    def mistake(self, path: Path, message: str) -> None:
        """Record a mistake in a key or its value."""
        self.mistakes.append(Mistake(path, message, *self.place(path)))


class _MalformedError(Exception):
    """The document cannot be parsed further."""

    def __init__(self, message: str, place: tuple[int, int] = (1, 1)) -> None:
        super().__init__(message)
        self.place = place


def _place(mark: yaml.Mark | None) -> tuple[int, int]:
    return (1, 1) if mark is None else (mark.line + 1, mark.column + 1)


def parse(content: bytes) -> Tree:
    """Parse one YAML document; the tree has its mistakes and the value of the rest.

    An empty file is a mistake, since a failed write leaves one; a file of comments is not.
    """
    tree = Tree()
    try:
        text = _text(content)
        node = _compose(text)
        if node is not None:
            tree.value = _Reader(tree).read(node, ())
    except _MalformedError as error:
        tree.mistakes.append(Mistake((), str(error), *error.place))
    return tree


def _text(content: bytes) -> str:
    if len(content) > MAX_YAML_BYTES:
        raise _MalformedError(
            f"has {len(content):,} bytes, more than the {MAX_YAML_BYTES:,} that a configuration may have"
        )
    if not content.strip():
        raise _MalformedError("is empty, as after a failed write; put `root:` in it or remove it")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[: error.start]
        place = (before.count(b"\n") + 1, len(before) - before.rfind(b"\n"))
        raise _MalformedError("is not UTF-8 text; save it as UTF-8", place) from error


def _compose(text: str) -> yaml.Node | None:
    try:
        node: yaml.Node | None = yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        raise _MalformedError(_explained(error), _place(error.problem_mark or error.context_mark)) from error
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        place = (before.count("\n") + 1, len(before) - before.rfind("\n"))
        code = error.character if isinstance(error.character, int) else ord(str(error.character)[:1] or "\0")
        raise _MalformedError(f"holds the control character U+{code:04X}; is this a text file?", place) from error
    except RecursionError as error:
        raise _MalformedError("is nested too deeply for a configuration") from error
    return node


def _explained(error: yaml.MarkedYAMLError) -> str:
    problem = " ".join(part for part in (error.problem, error.context) if part)
    if "'\\t'" in problem:
        return "a tab begins this line or value; YAML indents with spaces only"
    return f"is not YAML: {problem}"


class _Reader:
    """Converts nodes to values, and records positions and mistakes."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._values = 0

    def read(self, node: yaml.Node, path: Path) -> Value:
        self._values += 1
        if self._values > MAX_VALUES or len(path) > MAX_DEPTH:
            raise _MalformedError("expands to far more than a configuration holds (aliases?)", _place(node.start_mark))
        if node.tag not in _PLAIN_TAGS:
            self._mistake(path, node, f"the tag {node.tag.replace('tag:yaml.org,2002:', '!!')} is not allowed here")
            return None
        if isinstance(node, yaml.MappingNode):
            return dict(self._pairs(node, path))
        if isinstance(node, yaml.SequenceNode):
            return [self._item(item, (*path, index)) for index, item in enumerate(node.value)]
        is_plain = isinstance(node, yaml.ScalarNode) and node.style is None
        return None if is_plain and node.value in _EMPTY else str(node.value)

    def _item(self, node: yaml.Node, path: Path) -> Value:
        self._tree.places[path] = _place(node.start_mark)
        return self.read(node, path)

    def _pairs(self, node: yaml.MappingNode, path: Path) -> Iterator[tuple[str, Value]]:
        seen: set[str] = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self._mistake(path, key, "a key must be a word, not a list or a mapping")
                continue
            name = str(key.value)
            if name in seen:
                self._mistake((*path, name), key, "is given twice; keep one")
                continue
            seen.add(name)
            self._tree.places[*path, name] = _place(key.start_mark)
            yield name, self.read(value, (*path, name))

    def _mistake(self, path: Path, node: yaml.Node, message: str) -> None:
        self._tree.mistakes.append(Mistake(path, message, *_place(node.start_mark)))
