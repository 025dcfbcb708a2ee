"""The structure of the package: layers (import-linter, contracts in pyproject.toml), sizes, names and imports.

``python -m tests.test_architecture`` prints the figures.
"""

import ast
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "sortd"
MOST_LINES, FEWEST_LINES = 500, 60
"""Of a module."""

PURE = ("core", "classify")
FORBIDDEN_TO_PURE = {
    "os", "io", "time", "datetime", "threading", "queue", "subprocess", "socket", "logging", "structlog", "sqlite3",
    "random", "tempfile", "shutil", "torch", "PIL", "watchdog", "sentence_transformers", "transformers", "sklearn",
}  # fmt: skip
"""What pure packages must not import: files, clocks, threads, logs, models, randomness."""

SLOW = {
    "torch", "transformers", "sentence_transformers", "sklearn", "onnxruntime", "onnx", "tokenizers", "matplotlib",
    "accelerate", "peft", "safetensors",
}  # fmt: skip
"""Libraries that take long to import: imported inside of functions only, so that light commands start at once."""

NEEDS_AT_ITS_TOP = {"api/estimator.py": {"sklearn"}}
"""Modules that only those import who use such a library: a base class cannot wait for its first use."""

MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(module: Path) -> str:
    """Return the path of a module in the package."""
    return module.relative_to(PACKAGE).as_posix()


def imported(module: Path, *, top_level_only: bool) -> set[str]:
    """Return the top-level packages that a module imports."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if isinstance(child, ast.Import):
                found.update(alias.name.split(".")[0] for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module:
                found.add(child.module.split(".")[0])
            if not (top_level_only and isinstance(child, ast.FunctionDef | ast.Lambda)):
                visit(child)

    visit(ast.parse(module.read_text(encoding="utf-8")))
    return found


def names_defined_twice() -> dict[str, list[str]]:
    """Return the public classes and functions that several modules define, with those modules."""
    where = defaultdict(list)
    for module in MODULES:
        for node in ast.parse(module.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                where[node.name].append(name_of(module))
    return {name: modules for name, modules in sorted(where.items()) if len(modules) > 1}


def lines_of(module: Path) -> int:
    """Return how many lines a module has."""
    return len(module.read_text(encoding="utf-8").splitlines())


def test_layers_are_kept() -> None:
    """Imports point down the layers, and packages of one layer do not import each other."""
    linter = Path(sys.executable).parent / "lint-imports"  # in a process of its own, since it sets up logging
    done = subprocess.run([linter, "--no-cache"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_module_has_a_docstring_and_no_more_than_500_lines(module: Path) -> None:
    """A module is small enough to be read at once, and says what it is."""
    assert ast.get_docstring(ast.parse(module.read_text(encoding="utf-8")))
    assert lines_of(module) <= MOST_LINES


@pytest.mark.parametrize("module", [path for path in MODULES if name_of(path).split("/")[0] in PURE], ids=name_of)
def test_pure_module_imports_nothing_impure(module: Path) -> None:
    """The core and the classifiers know no file, clock, thread, log or model."""
    assert not imported(module, top_level_only=False) & FORBIDDEN_TO_PURE


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_module_imports_nothing_slow_at_its_top(module: Path) -> None:
    """Heavy libraries are imported where they are used."""
    assert not imported(module, top_level_only=True) & SLOW - NEEDS_AT_ITS_TOP.get(name_of(module), set())


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_module_unpickles_nothing(module: Path) -> None:
    """A cache or a model file must not run code."""
    pickles = {"pickle", "joblib", "shelve", "marshal", "dill", "cloudpickle"}
    assert not imported(module, top_level_only=False) & pickles
    assert "allow_pickle=True" not in module.read_text(encoding="utf-8")


def test_public_names_are_defined_once() -> None:
    """A public class or function has a name of its own."""
    assert names_defined_twice() == {}


def main() -> None:
    """Print the figures of the package as JSON."""
    sizes = {name_of(module): lines_of(module) for module in MODULES}
    small = sorted(name for name, lines in sizes.items() if lines < FEWEST_LINES and not name.endswith("__init__.py"))
    figures = {
        "modules": len(sizes),
        "modules_without_init": sum(not name.endswith("__init__.py") for name in sizes),
        "lines": sum(sizes.values()),
        "lines_of_tests": sum(map(lines_of, (REPOSITORY / "tests").rglob("*.py"))),
        "largest": dict(sorted(sizes.items(), key=lambda item: -item[1])[:8]),
        "under_60_lines": small,
        "defined_twice": names_defined_twice(),
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()


LEAN = {
    "sortd.commands.run": SLOW | {"huggingface_hub", "uvicorn", "starlette", "numpy.random"},
    "sortd.images.decoder_process": SLOW | {"pydantic", "structlog", "rich", "typer", "asyncio", "ssl", "sqlite3"},
}
"""What a daemon with ONNX Runtime, and each of its decoding processes, must not hold in memory; by their module."""


@pytest.mark.parametrize("module", LEAN)
def test_process_that_stays_imports_no_library_that_it_does_not_need(module: str) -> None:
    """Each megabyte is taken for as long as the daemon runs, by every decoding process again."""
    code = (
        "import sys, numpy\nbefore = set(sys.modules)  # older versions of numpy import numpy.random\n"
        f"import {module}\nfrom sortd.images.decode import load_decoders\nload_decoders()\n"
        "print(*sys.modules.keys() - before)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert LEAN[module] & set(run.stdout.split()) == set()
