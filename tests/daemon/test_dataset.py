"""A dataset at work, with its real journal and mover, and a worker whose answers the test gives."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import monotonic

import numpy as np
import pytest
from structlog.testing import capture_logs

from sortd.arrays import FloatArray
from sortd.config import DatasetConfig, read_config
from sortd.core.sorter import SorterSettings
from sortd.core.state import State
from sortd.daemon.dataset import Dataset
from sortd.daemon.dataset_lock import OpenDataset, Presence
from sortd.daemon.datasets import Datasets
from sortd.daemon.metrics import Metrics
from sortd.daemon.resources import reference_settings_of
from sortd.daemon.worker import Answer, EmbedJob, Forget, Job, RebuildJob
from sortd.events import (
    DatasetId,
    Embedded,
    EmbeddedImage,
    Move,
    Outcome,
    PrototypesBuilt,
    RebuildFailed,
    ReferencesTouched,
    Released,
)
from sortd.files import stamp_of
from sortd.layout import Area, Layout
from sortd.moving.copy_queue import CopyQueue
from sortd.moving.mover import Mover
from sortd.store.history import History
from sortd.store.journal import Journal
from sortd.watch.watcher import FileEvent
from tests.command_line import write_config
from tests.core.test_guard import near, prototypes
from tests.daemon_process import make_dataset

STRANGERS = near(3, 40, 0.6)
"""Embeddings of what belongs to no class, more than a trial takes."""


class Bench:
    """One run of a dataset; what its journal holds is all that the next run knows."""

    def __init__(self, folder: Path, *, limit: int = 1000) -> None:
        """Begin the run."""
        self.layout = Layout(folder / "set")
        self.layout.root.mkdir(exist_ok=True)
        self.layout.make()
        self.journal = Journal(folder / "journal.sqlite", run="run")
        self.asked: list[Job] = []
        self.generation = 0
        self.rows: dict[str, FloatArray] = {}
        self.dataset = Dataset(
            DatasetId("set", 1),
            OpenDataset(
                self.layout, self.journal, Mover(self.layout.root, self.journal), Presence(self.layout, self.journal)
            ),
            SorterSettings(settle_seconds=0, guard_images=20, backlog_limit=limit),
            reference_settings_of(DatasetConfig()),
            ask=self.asked.append,
            metrics=Metrics(),
        )
        self.dataset.begin()

    def die(self) -> None:
        """End as by SIGKILL: nothing is said to the dataset."""
        self.journal.close()

    def drop(self, rows: FloatArray, name: str = "") -> None:
        """Put images into the inbox that will have these embeddings."""
        for number, row in enumerate(rows):
            path = self.layout.area(Area.IMAGES) / f"{name}{number}.png"
            path.write_bytes(b"image")
            self.rows[str(path)] = row
        self.dataset.scans.begin()
        while self.dataset.scans._inbox.has_more:  # a slice of a scan is limited by time, and machines differ
            self.dataset.continue_looking()

    def work(self) -> None:
        """Let the loop turn until it has nothing to do; rebuilds stay unanswered."""
        while True:
            self.dataset.tick(monotonic() + 0.001)
            self.dataset.continue_looking()
            self.dataset.flush()
            jobs = [job for job in self.asked if isinstance(job, EmbedJob)]
            for job in jobs:
                self.asked.remove(job)
                images = tuple(EmbeddedImage(path, mark, self._row(path), path) for path, mark in job.images)
                self.dataset.answer(Answer(job.dataset, (Embedded(images, "encoder"),)))
            deadline = self.dataset.sorter.next_deadline()
            is_due = deadline is not None and deadline <= monotonic()
            if not (jobs or is_due or self.dataset.has_more_to_look_at or self.dataset.move_queue.is_due):
                return

    def _row(self, path: str) -> FloatArray:
        row: FloatArray = self.rows.get(path, STRANGERS[0])
        return row

    def serve(self, generation: int) -> None:
        """Let a rebuild end with this generation."""
        if generation != self.generation and not self.rebuilds:
            self.dataset.receive(ReferencesTouched())
        self.generation = generation
        self.work()
        (job,) = self.rebuilds
        self.asked.remove(job)
        built = prototypes(generation)
        built = replace(built, added=np.full(len(built.classes), generation))
        self.dataset.answer(Answer(job.dataset, (PrototypesBuilt(built, job=job.job),)))
        self.work()

    @property
    def rebuilds(self) -> list[RebuildJob]:
        """The rebuilds that were asked for and not answered."""
        return [job for job in self.asked if isinstance(job, RebuildJob)]

    def count(self, area: Area) -> int:
        """Count the files of an area."""
        return sum(1 for path in self.layout.area(area).rglob("*") if path.is_file())


@contextmanager
def run(folder: Path, *, limit: int = 1000) -> Iterator[Bench]:
    """Run a dataset until the block ends, which is no clean stop."""
    bench = Bench(folder, limit=limit)
    try:
        yield bench
    finally:
        bench.die()


@pytest.fixture
def held(tmp_path: Path) -> Path:
    """A dataset whose second generation is held, by a run that was killed."""
    with run(tmp_path) as bench:
        bench.serve(1)
    with run(tmp_path) as bench:
        bench.serve(2)
        bench.drop(STRANGERS)
        with capture_logs() as lines:
            bench.work()
        assert [line["event"] for line in lines if line["log_level"] != "debug"] == ["dataset.held"]
    return tmp_path


def test_dataset_hold_survives_kills_and_is_told_at_each_start(held: Path) -> None:
    """Images that were held stay where they are under the same generation, run after run."""
    for _ in range(2):
        with capture_logs() as lines, run(held) as bench:
            bench.serve(2)
            assert bench.count(Area.IMAGES) == 40
            assert bench.dataset.is_stuck
            assert "review" in str(bench.dataset.problem)
        assert [line["event"] for line in lines].count("dataset.held") == 1


def test_dataset_hold_survives_a_reload(held: Path) -> None:
    """Settings are taken over and the prototypes looked at anew; the generation is the one that is held."""
    with run(held) as bench:
        bench.serve(2)
        bench.dataset.reload(SorterSettings(settle_seconds=0, guard_images=20), reference_settings_of(DatasetConfig()))
        bench.serve(2)
        assert bench.count(Area.IMAGES) == 40


def test_dataset_another_generation_after_a_hold_is_tried_again(held: Path) -> None:
    """Fewer images are enough for that trial: those that were held do not go because some were taken away."""
    for number in range(30):
        (held / "set" / "Images" / f"{number}.png").unlink()
    with run(held) as bench:
        with capture_logs() as lines:
            bench.serve(3)
        assert bench.count(Area.IMAGES) == 10
        assert "dataset.held" in [line["event"] for line in lines]
        assert bench.journal.history.guard().held == 3


def test_dataset_release_of_the_hold_lasts(held: Path) -> None:
    """What was released moves, and the next run of the same generation tries nothing again."""
    with run(held) as bench:
        bench.serve(2)
        assert "review" in str(bench.dataset.release())
        bench.work()
        assert (bench.count(Area.IMAGES), bench.count(Area.REVIEW)) == (0, 40)
        assert bench.dataset.release() is None
    with run(held) as bench:
        bench.serve(2)
        bench.drop(STRANGERS, "more")
        bench.work()
        assert bench.count(Area.IMAGES) == 0


def test_dataset_release_of_a_file_moves_nothing_that_the_guard_holds(held: Path) -> None:
    """They are two things."""
    with run(held) as bench:
        bench.serve(2)
        for path in (None, str(held / "set" / "Images" / "7.png")):
            bench.dataset.receive(Released(path))
            bench.work()
            assert bench.dataset.held_because is not None
        assert bench.count(Area.IMAGES) == 40


def test_dataset_guard_is_armed_after_a_kill_before_its_trial(tmp_path: Path) -> None:
    """A generation that served and was never tried is tried by the next run, or the one after."""
    with run(tmp_path) as bench:
        bench.serve(1)
        bench.serve(2)
    with run(tmp_path) as bench:
        bench.serve(2)
    with run(tmp_path) as bench:
        bench.serve(2)
        bench.drop(STRANGERS)
        bench.work()
        assert bench.count(Area.IMAGES) == 40


def test_dataset_generation_is_noted_when_it_is_taken_into_service(tmp_path: Path) -> None:
    """Whatever ends the run afterwards: no number is used twice."""
    with run(tmp_path) as bench:
        bench.serve(1)
        bench.serve(5)
        with History.open(bench.journal.path) as history:
            assert history.last_generation() == 5
            assert history.guard().trusted == 1


def test_dataset_that_is_held_is_not_stuck_before_its_references_were_looked_at(held: Path) -> None:
    """They may have been mended since: another generation is tried, and ``once`` does not end before."""
    with run(held) as bench:
        assert bench.dataset.held_because is not None
        assert not bench.dataset.is_stuck
        bench.serve(2)
        assert bench.dataset.is_stuck


def test_dataset_first_generation_is_never_held(tmp_path: Path) -> None:
    """Also after a kill: there was nothing before it that it could be worse than."""
    with run(tmp_path) as bench:
        bench.serve(1)
    with run(tmp_path) as bench:
        bench.serve(1)
        bench.drop(STRANGERS)
        bench.work()
        assert bench.count(Area.IMAGES) == 0


def test_dataset_absence_found_by_a_move_does_not_end_a_rebuild(tmp_path: Path) -> None:
    """Nothing moves before the rebuild that runs, and one that begins when all is there again, have ended."""
    with run(tmp_path) as bench:
        bench.serve(1)
        bench.drop(near(0, 3))
        bench.work()
        bench.dataset.receive(ReferencesTouched())
        bench.work()
        (job,) = bench.rebuilds
        bench.layout.marker.rmdir()
        image = bench.layout.area(Area.IMAGES) / "late.png"
        image.write_bytes(b"image")
        bench.dataset.move_queue.add(Move(str(image), stamp_of(os.lstat(image)), "Dataset/a", Outcome.FILED))
        bench.dataset.flush()
        bench.layout.marker.mkdir()
        bench.dataset.scans.begin()
        bench.work()
        assert bench.count(Area.IMAGES) == 1
        bench.asked.remove(job)
        bench.dataset.answer(Answer(job.dataset, (RebuildFailed("late", job=job.job - 1),)))
        bench.work()
        assert bench.count(Area.IMAGES) == 1
        bench.dataset.answer(Answer(job.dataset, (PrototypesBuilt(prototypes(1), job=job.job),)))
        bench.work()
        bench.serve(1)
        assert bench.count(Area.IMAGES) == 0


def test_dataset_force_outlives_a_rebuild_that_failed(tmp_path: Path) -> None:
    """What somebody asked for is done by the rebuild that ends well, and by no later one."""
    with run(tmp_path) as bench:
        bench.serve(1)
        bench.dataset.rebuild(force=True)
        bench.work()
        (job,) = bench.rebuilds
        assert job.force
        bench.asked.clear()
        bench.dataset.answer(Answer(job.dataset, (RebuildFailed("the disk failed", job=job.job),)))
        bench.dataset.receive(ReferencesTouched())
        bench.work()
        (again,) = bench.rebuilds
        assert again.force
        bench.serve(2)
        bench.dataset.receive(ReferencesTouched())
        bench.work()
        assert [job.force for job in bench.rebuilds] == [False]


def test_dataset_images_taken_out_of_review_are_forgotten(tmp_path: Path) -> None:
    """By a hint about each, or by the next look through Review/, and no failure is told of."""
    with run(tmp_path) as bench:
        bench.serve(1)
        bench.drop(STRANGERS[:6])
        bench.work()
        standing = sorted(path for path in bench.layout.area(Area.REVIEW).rglob("*.png"))
        assert bench.dataset.sorter.images.counts[State.REVIEWED] == 6
        with capture_logs() as lines:
            for path in standing[:2]:
                path.unlink()
                bench.dataset.file_event(FileEvent(str(path)))
            bench.work()
            assert bench.dataset.sorter.images.counts[State.REVIEWED] == 4
            for path in standing[2:5]:
                path.unlink()
            bench.dataset.scans.begin_review()
            bench.work()
            assert bench.dataset.sorter.images.counts[State.REVIEWED] == 1
            bench.serve(2)
        assert [line for line in lines if line["event"] == "move.failed"] == []


def test_dataset_review_beyond_the_backlog_is_told_and_taken_up_later(tmp_path: Path) -> None:
    """Nothing is dropped without a word, and what is taken away makes room."""
    with run(tmp_path, limit=4) as bench:
        bench.serve(1)
        with capture_logs() as lines:
            bench.drop(STRANGERS[:4])
            bench.work()
            bench.drop(STRANGERS[4:6], "more")
            bench.work()
            bench.dataset.scans.begin_review()
            bench.work()
        assert [line["event"] for line in lines].count("backlog.full") == 1
        standing = sorted(path for path in bench.layout.area(Area.REVIEW).rglob("*.png"))
        known = [path for path in standing if str(path) in bench.dataset.sorter.images]
        assert (len(standing), len(known)) == (6, 4)
        for path in known[:2]:
            path.unlink()
        bench.dataset.scans.begin_review()
        bench.work()
        bench.dataset.scans.begin_review()
        bench.work()
        assert all(str(path) in bench.dataset.sorter.images for path in standing if path not in known[:2])


def test_dataset_images_in_review_are_decided_again_after_a_restart(tmp_path: Path) -> None:
    """Those that sortd put there, and no others, whenever the new prototypes come."""
    with run(tmp_path) as bench:
        bench.serve(1)
        bench.drop(STRANGERS[:3])
        bench.work()
        (bench.layout.area(Area.REVIEW) / "own.png").write_bytes(b"the user's")
    with run(tmp_path) as bench:
        bench.rows = {
            str(path): near(0, 1)[0] for path in bench.layout.area(Area.REVIEW).rglob("*.png") if path.name != "own.png"
        }
        bench.serve(2)
        assert (bench.count(Area.REVIEW), bench.count(Area.DATASET)) == (1, 3)


def test_dataset_image_that_vanished_before_its_move_is_no_failure(tmp_path: Path) -> None:
    """Who takes images out of Review/ has done nothing wrong, and the line says what is so."""
    with run(tmp_path) as bench:
        bench.serve(1)
        image = bench.layout.area(Area.IMAGES) / "a.png"
        image.write_bytes(b"image")
        bench.dataset.move_queue.add(Move(str(image), stamp_of(os.lstat(image)), "Dataset/a", Outcome.FILED))
        image.unlink()
        with capture_logs() as lines:
            bench.dataset.flush()
        assert [(line["event"], line["log_level"], line["path"]) for line in lines] == [
            ("image.vanished", "info", str(image))
        ]


@pytest.fixture
def collection(tmp_path: Path) -> Iterator[tuple[Datasets, list[Job]]]:
    """The datasets below one root, none yet, and what they ask of a worker."""
    (tmp_path / "Data").mkdir()
    config = read_config(write_config(tmp_path), {"HOME": str(tmp_path)})
    copier = CopyQueue(lambda _: None)
    asked: list[Job] = []
    made = Datasets(config, ask=asked.append, copier=copier, metrics=Metrics())
    yield made, asked
    copier.stop()
    made.close()


def test_collection_answer_for_a_dataset_that_was_made_anew_is_not_its_own(
    collection: tuple[Datasets, list[Job]], tmp_path: Path
) -> None:
    """Each has an identity of its own, by which answers about its predecessor are known, prototypes among them."""
    datasets, asked = collection
    root = make_dataset(tmp_path / "Data", references=1)
    datasets.discover()
    first = datasets.by_name["Colours"].identity
    told: list[Dataset] = []
    datasets.tell(first, told.append)
    assert told == [datasets.by_name["Colours"]]
    shutil.rmtree(root)
    datasets.discover()
    make_dataset(tmp_path / "Data", references=1)
    datasets.discover()
    second = datasets.by_name["Colours"].identity
    datasets.tell(first, told.append)
    datasets.tell(second, told.append)
    assert told[1:] == [datasets.by_name["Colours"]]
    forgotten = [job for job in asked if isinstance(job, Forget)]
    assert forgotten == [Forget(first, with_stored=True), Forget(first), Forget(second, with_stored=True)]


def test_collection_that_stops_takes_up_no_dataset(collection: tuple[Datasets, list[Job]], tmp_path: Path) -> None:
    """It would never hear that the daemon stops, and would keep it from ending."""
    datasets, _ = collection
    datasets.discover()
    datasets.stop()
    make_dataset(tmp_path / "Data", references=1)
    datasets.discover()
    assert list(datasets) == []


def test_collection_dataset_that_was_away_keeps_what_is_stored_of_it(
    collection: tuple[Datasets, list[Job]], tmp_path: Path
) -> None:
    """It is the same one, marker and all: the reload gate has something to measure by."""
    datasets, asked = collection
    root = make_dataset(tmp_path / "Data", references=1)
    datasets.discover()
    root.rename(tmp_path / "away")
    datasets.discover()
    (tmp_path / "away").rename(root)
    asked.clear()
    datasets.discover()
    assert not [job for job in asked if isinstance(job, Forget)]
