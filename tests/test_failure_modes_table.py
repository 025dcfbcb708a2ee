"""The table of failure modes against the tests: no row is missing, and every test that it names exists."""

import ast
import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
TABLE = REPOSITORY / "docs" / "failure-modes.md"

ROWS = {
    *(str(number) for number in range(1, 99)),
    *("32b", "50b", "50c", "75b", "75c"),
}
"""Every row of the list that the table answers."""

REASON = "cannot happen: "


def rows() -> list[list[str]]:
    """Return the cells of each row, but for the heads of the tables."""
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if re.match(r"\| \d", line)]


def names_in(file: Path) -> set[str]:
    """Return the tests of a file as pytest names them, without running any of it."""
    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        match node:
            case ast.FunctionDef(name=name):
                names.add(name)
            case ast.ClassDef(name=group, body=body):
                names |= {f"{group}::{one.name}" for one in body if isinstance(one, ast.FunctionDef)}
    return {name for name in names if name.rpartition("::")[2].startswith("test_")}


def test_every_failure_mode_has_one_row() -> None:
    """No number is missing, none stands there twice."""
    numbers = [cells[0] for cells in rows()]
    assert len(numbers) == len(set(numbers))
    assert set(numbers) == ROWS


def test_every_row_is_whole() -> None:
    """Five cells, none of them empty; the last one names a test or says why there is nothing to test."""
    for cells in rows():
        assert len(cells) == 5, cells
        assert all(cells), cells
        assert re.match(r"`tests/|cannot happen: \w", cells[4]), cells


def test_every_row_cites_where_it_was_seen() -> None:
    """A project and a number, so that the story can be read there."""
    for cells in rows():
        assert re.search(r"\w.* #\d+", cells[1]), cells


def test_every_test_that_is_named_exists() -> None:
    """As pytest would find it."""
    named = set(re.findall(r"`(tests/[\w/]+\.py)::([\w:]+)`", TABLE.read_text(encoding="utf-8")))
    there = {file: names_in(REPOSITORY / file) for file in {file for file, _ in named}}
    assert len(named) > 100
    assert sorted(f"{file}::{name}" for file, name in named if name not in there[file]) == []


def test_most_rows_are_shown_by_a_test() -> None:
    """Reasons are for what cannot happen, not for what was not done."""
    reasons = [cells[0] for cells in rows() if cells[4].startswith(REASON)]
    assert len(reasons) < 5, reasons
