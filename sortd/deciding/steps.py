"""Steps: a long computation as a generator that yields between its parts and returns its result.

Whoever runs it decides what else is done between two steps.
"""

from collections.abc import Callable, Generator, Iterator
from typing import TypeVar

Result = TypeVar("Result")
Steps = Generator[None, None, Result]

CELLS = 1_000_000
"""Cells of a table that one step computes: their intermediate results stay in the processor's cache."""


def finish(steps: Steps[Result], *, between: Callable[[], None] = lambda: None) -> Result:
    """Take all steps, and call ``between`` after each; return the result."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: Result = end.value
            return result
        between()


def parts(rows: int, columns: int, cells: int | None = None) -> Iterator[slice]:
    """Yield the rows of a table, from the first to the last, as many at a time as have that many cells, or CELLS."""
    size = max((CELLS if cells is None else cells) // max(columns, 1), 1)
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))
