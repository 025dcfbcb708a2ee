"""The names of the library: what an import costs, and the examples in docstrings and docs/api.md."""

import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import sortd
from tests.test_architecture import REPOSITORY, SLOW

MODULES = ("sortd.api.images", "sortd.api.classifier", "sortd.api.dataset", "sortd.api.estimator")


def test_import_loads_no_heavy_library() -> None:
    """``import sortd`` alone loads neither torch nor numpy nor any other library that takes long."""
    heavy = sorted(SLOW | {"numpy", "PIL", "pydantic", "structlog", "sklearn"})
    script = f"import sys, sortd; sys.exit([name for name in {heavy} if name in sys.modules] or 0)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_name_can_be_imported() -> None:
    """Each name in ``__all__`` is there, and no other name appears by accident."""
    assert all(getattr(sortd, name) is not None for name in sortd.__all__)
    assert dir(sortd) == sorted(sortd.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sortd.nothing


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_give_what_they_say(name: str) -> None:
    """The examples of a module run and print what stands below them."""
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_examples_in_the_guide_give_what_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples of docs/api.md run on the sample data and print what stands below them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Data").symlink_to(REPOSITORY / "Data")
    results = doctest.testfile(str(REPOSITORY / "docs" / "api.md"), module_relative=False)
    assert results.attempted > 5
    assert results.failed == 0
