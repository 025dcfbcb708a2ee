"""The engines of ``bulk decide``: equal decisions, and each image once, whatever is killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pytest

import sortd
from sortd.bulk.decide import SETTINGS_FILE, UNREADABLE
from sortd.bulk.engines import decide_shard
from sortd.bulk.plan import DECISIONS, MANIFEST, parts_of
from sortd.errors import DataError
from tests.bulk.bulk_run import (
    PIDS,
    decisions_of,
    draw_images,
    load_fake,
    plan_in_parts,
    save_classifier,
    settings_for,
)
from tests.command_line import write_config
from tests.daemon_process import PATIENCE_SECONDS, DaemonProcess
from tests.test_architecture import REPOSITORY

IMAGES, ROWS = 100, 16


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved classifier of three colours."""
    return save_classifier(tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="module")
def decided(tmp_path_factory: pytest.TempPathFactory, classifier: Path) -> Path:
    """A run that one shard has decided, with an image that is broken and one that is gone."""
    folder = tmp_path_factory.mktemp("decided")
    draw_images(folder / "photos", IMAGES - 2)
    (folder / "photos" / "broken.jpg").write_bytes(b"\xff\xd8\xff no image")
    (folder / "photos" / "gone.png").write_bytes(b"")
    plan_in_parts(folder / "photos", folder / "run", ROWS)
    (folder / "photos" / "gone.png").unlink()
    decide_shard(folder / "run", settings_for(classifier), load=load_fake)
    return folder / "run"


@pytest.fixture
def run(decided: Path, tmp_path: Path) -> Path:
    """A run of the same images that is not decided."""
    shutil.copytree(decided / MANIFEST, tmp_path / "run" / MANIFEST)
    shutil.copy(decided / "plan.json", tmp_path / "run")
    return tmp_path / "run"


@contextmanager
def deciding(run: Path, classifier: Path, engine: str, pids: Path) -> Iterator["subprocess.Popen[str]"]:
    """Start ``tests.bulk.bulk_run`` with a slow encoder, and kill it at the end of the block."""
    pids.mkdir(exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.bulk.bulk_run", run, classifier, engine],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, PIDS: os.fspath(pids)},
    )
    try:
        yield process
    finally:
        process.kill()
        _, err = process.communicate()
        assert process.returncode in {0, -signal.SIGKILL}, err


def wait_until(is_true: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    """Wait until something is true, or a process has ended."""
    until = time.monotonic() + PATIENCE_SECONDS
    while not is_true() and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.01)


def uris_of(table: pa.Table) -> list[str]:
    """Return the URIs of decisions."""
    return [str(uri) for uri in table["uri"].to_pylist()]


def count_of_decided(run: Path) -> int:
    """Return how many parts of a run are decided."""
    return len(parts_of(run / DECISIONS))


def test_decisions_of_two_shards_equal_those_of_one(run: Path, decided: Path, classifier: Path) -> None:
    """Files are equal byte by byte; the refused images have their reasons."""
    for shard in ((1, 2), (2, 2)):
        facts = decide_shard(run, settings_for(classifier), shard, load=load_fake)
        assert facts["parts"] in {3, 4}
    for name in sorted(os.listdir(decided / DECISIONS)):
        assert (run / DECISIONS / name).read_bytes() == (decided / DECISIONS / name).read_bytes()
    rows = decisions_of(decided).to_pylist()
    assert len({row["id"] for row in rows}) == len(rows) == IMAGES
    refused = {Path(row["uri"]).name: row["reason"] for row in rows if row["sha256"] is None}
    assert refused.keys() == {"broken.jpg", "gone.png"}
    assert all(reason.startswith(UNREADABLE) for reason in refused.values())
    assert {row["label"] for row in rows} == {"red", "green", "blue", None}


def test_decisions_do_not_depend_on_what_could_be_read(run: Path, decided: Path, classifier: Path) -> None:
    """Where an image of a batch is unreadable now, the others are equal bit by bit but for their familiarity."""
    before = decisions_of(decided)
    lost = next(row["uri"] for row in before.to_pylist() if row["sha256"] is not None)
    os.rename(lost, f"{lost}.away")
    try:
        decide_shard(run, settings_for(classifier), load=load_fake)
    finally:
        os.rename(f"{lost}.away", lost)
    here = uris_of(before)
    index = pa.array([at for at, uri in enumerate(here) if uri != lost])
    found = decisions_of(run)
    assert uris_of(found) == here
    columns = [name for name in before.column_names if name != "familiarity"]
    assert found.take(index).select(columns).equals(before.take(index).select(columns))
    likeness = [table.take(index)["familiarity"].to_pylist() for table in (found, before)]
    assert likeness[0] == pytest.approx(likeness[1], abs=1e-4)


def test_labels_equal_those_of_once(classifier: Path, tmp_path: Path) -> None:
    """So many images are decided alike; among more, ``once`` also counts their neighbours."""
    shutil.copytree(classifier.parent / "Data", tmp_path / "Data")
    inbox = tmp_path / "Data" / "Colours" / "Images"
    draw_images(inbox, 24)
    run = plan_in_parts(inbox, tmp_path / "run", ROWS)
    decide_shard(run, settings_for(classifier), load=load_fake)
    labels = {Path(row["uri"]).name: row["label"] for row in decisions_of(run).to_pylist()}
    with DaemonProcess(write_config(tmp_path), "once") as daemon:
        assert daemon.wait() == 0
    with sortd.open_dataset(tmp_path / "Data" / "Colours", config=tmp_path / "config.yaml") as dataset:
        moves = {Path(move["from"]).name: move for move in dataset.history()}
    assert labels == {name: move["label"] if move["outcome"] == "filed" else None for name, move in moves.items()}
    assert len(set(labels.values())) == 4


def test_shard_killed_three_times_decides_each_image_once(
    run: Path, decided: Path, classifier: Path, tmp_path: Path
) -> None:
    """What was complete is kept, and the rest is decided as if nothing had happened."""
    for _ in range(3):
        before = count_of_decided(run)
        with deciding(run, classifier, "1/1", tmp_path / "pids") as process:
            wait_until(lambda before=before: count_of_decided(run) > before, process)  # type: ignore[misc]
            process.send_signal(signal.SIGKILL)
    facts = decide_shard(run, settings_for(classifier), load=load_fake)
    assert facts["parts"] + facts["parts_before"] == count_of_decided(run)
    assert decisions_of(run).equals(decisions_of(decided))


def test_other_settings_are_refused(run: Path, classifier: Path) -> None:
    """Decisions of two batch sizes or classifiers are not mixed in one run."""
    decide_shard(run, settings_for(classifier), (1, 7), load=load_fake)
    with pytest.raises(DataError, match="another batch_size"):
        decide_shard(run, settings_for(classifier, batch_size=4), (2, 7), load=load_fake)
    for damaged in ("{", "[]"):
        (run / SETTINGS_FILE).write_text(damaged)
        with pytest.raises(DataError, match=SETTINGS_FILE):
            decide_shard(run, settings_for(classifier), (2, 7), load=load_fake)


def test_shard_out_of_range_is_refused(run: Path, classifier: Path) -> None:
    """There is no shard 0, nor one beyond the last."""
    for shard in ((0, 2), (3, 2)):
        with pytest.raises(DataError, match="1/2 to 2/2"):
            decide_shard(run, settings_for(classifier), shard, load=load_fake)


@pytest.mark.slow
def test_ray_killed_driver_and_actors_decide_each_image_once(
    run: Path, decided: Path, classifier: Path, tmp_path: Path
) -> None:
    """The decisions equal those of a shard, after the driver was killed once and an actor twice."""
    with deciding(run, classifier, "2", tmp_path / "pids") as process:
        wait_until(lambda: count_of_decided(run) > 0, process)
        process.send_signal(signal.SIGKILL)
    pids = tmp_path / "pids again"
    with deciding(run, classifier, "2", pids) as process:
        killed: set[str] = set()
        for _ in range(2):
            wait_until(lambda: bool(set(os.listdir(pids)) - killed), process)
            for pid in set(os.listdir(pids)) - killed:
                killed.add(pid)
                os.kill(int(pid), signal.SIGKILL)
                break
        out, err = process.communicate()
    assert process.returncode == 0, err
    facts = json.loads(out)
    assert facts["parts"] + facts["parts_before"] == count_of_decided(run) == len(parts_of(run / MANIFEST))
    assert decisions_of(run).equals(decisions_of(decided))
    assert len(killed) == 2
    assert "Traceback" not in err
