"""What the tests share: a model without a download, a place to work in, and a guard against leaks."""

import os
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from sortd.encoder.finetuned import FinetunedFacts
from sortd.store.journal import Journal
from tests.daemon_process import make_dataset
from tests.filing_world import Dataset
from tests.finetuned_folder import make_vit
from tests.tiny_clip import build_tiny_clip


def pytest_xdist_auto_num_workers() -> int:
    """Return how many processes run the tests: two more than there are processors, since many tests wait."""
    return len(os.sched_getaffinity(0)) + 2


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, dict[str, Any] | None, dict[str, Any] | None]:
    """Send reports between processes without lone surrogates, which names that are no UTF-8 bring into them."""
    report = yield
    return None if report is None else {key: _sendable(value) for key, value in report.items()}


def _sendable(value: Any) -> Any:
    match value:
        case str():
            return value.encode("utf-8", "backslashreplace").decode("utf-8")
        case dict():
            return {_sendable(key): _sendable(one) for key, one in value.items()}
        case list() | tuple():
            return type(value)(map(_sendable, value))
    return value


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of random weights, made once."""
    return build_tiny_clip(tmp_path_factory.mktemp("model") / "tiny-clip")


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> FinetunedFacts:
    """A small fine-tuned ViT whose head tells the three colours apart, made once."""
    return make_vit(tmp_path_factory.mktemp("finetuned") / "20260101T000000Z-0")


@pytest.fixture(autouse=True)
def _no_thread_leaks() -> Iterator[None]:
    """Every thread that a test starts has ended when it ends."""
    before = set(threading.enumerate())
    yield
    leaked = [thread for thread in threading.enumerate() if thread not in before and not thread.daemon]
    for thread in leaked:
        thread.join(5)
    assert not [thread.name for thread in leaked if thread.is_alive()]


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that other users may enter; pytest closes its own to them, whenever another pytest begins."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """A dataset of three colours, in ``Data`` below the temporary folder."""
    return make_dataset(tmp_path / "Data")


@pytest.fixture
def write_config(tmp_path: Path, tiny_clip: Path) -> Callable[..., Path]:
    """Write a configuration that keeps everything below the temporary folder, and return its path."""

    def write(**keys: object) -> Path:
        values = {
            "root": tmp_path / "Data",
            "model": tiny_clip,
            "state_dir": tmp_path / "state",
            "cache_dir": tmp_path / "cache",
            "settle_seconds": 0.3,
            "abstain": "off",
            "mode": "max",
            **keys,
        }
        path = tmp_path / "config.yaml"
        path.write_text("".join(f"{key}: {value}\n" for key, value in values.items()), encoding="utf-8")
        return path

    return write


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """An empty dataset."""
    return Dataset.below(tmp_path)


@pytest.fixture
def journal(dataset: Dataset) -> Iterator[Journal]:
    """Its journal."""
    with dataset.journal() as journal:
        yield journal
