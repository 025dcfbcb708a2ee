"""The worker: answers come as they are done, nobody waits for another's slow image, and a stop waits for none."""

import errno
import os
import queue
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from sortd.arrays import FloatArray
from sortd.classify.build import build
from sortd.classify.prototypes import PrototypeSet
from sortd.classify.types import AbstainSettings, DecisionSettings
from sortd.config import Config
from sortd.daemon.embedder import TEXTS_AT_ONCE, Embedder
from sortd.daemon.references import ReferenceSettings
from sortd.daemon.resources import PrototypeStore, Resources
from sortd.daemon.worker import (
    Answer,
    EmbedJob,
    Forget,
    Job,
    Posted,
    RebuildJob,
    Worker,
    WorkerDied,
    WorkerLoading,
    WorkerReady,
)
from sortd.encoder.clip import Encoder
from sortd.encoder.remote import AS_COMMAND, Waiting
from sortd.events import DatasetId, Embedded, ImageRefused, Mode, PrototypesBuilt, RebuildFailed, Stamp
from sortd.images.decode import DecodeLimits
from sortd.images.pool import DecoderPool
from sortd.store.cache import Cache
from sortd.watch.scan import stamp
from tests.daemon_process import COLOURS, PATIENCE_SECONDS, make_dataset, picture, teach
from tests.fake_encoder import SEEN, FakeEncoder

TEACHING = ReferenceSettings(DecisionSettings(Mode.MAX, None))


class Heard:
    """What a worker has posted so far."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self.posts: queue.SimpleQueue[Posted] = queue.SimpleQueue()
        self.answers: list[Answer] = []

    def wait_for(self, is_there: Callable[[], bool]) -> None:
        """Take posts in until something is true of the answers."""
        until = time.monotonic() + PATIENCE_SECONDS
        while not is_there():
            posted = self.posts.get(timeout=max(0.0, until - time.monotonic()))
            assert isinstance(posted, Answer), posted
            self.answers.append(posted)

    def paths(self, dataset: str) -> list[str]:
        """Name the images of a dataset that were answered, in order."""
        events = [event for answer in self.answers if answer.dataset.name == dataset for event in answer.events]
        embedded = [image.path for event in events if isinstance(event, Embedded) for image in event.images]
        return embedded + [event.path for event in events if isinstance(event, ImageRefused)]


@contextmanager
def working(
    tmp_path: Path,
    encoder: Encoder | None = None,
    stored: dict[str, PrototypeSet] | None = None,
    *,
    first: Sequence[Job] = (),
) -> Iterator[tuple[Worker, Heard]]:
    """Run a worker with one decoder and batches of four, and stop it at the end.

    Args:
        tmp_path: where its cache lies.
        encoder: a fake one by default.
        stored: where its prototypes are kept, by name of the dataset; nothing is kept without it.
        first: what it is asked while it still loads.
    """
    kept: dict[str, PrototypeSet] = {} if stored is None else stored
    pool = DecoderPool(1, SEEN, DecodeLimits())
    cache = Cache(tmp_path / "cache.sqlite")
    heard = Heard()

    class Fake(Resources):
        """A fake encoder and a store of prototypes in memory."""

        def load(self, waiting: Waiting = AS_COMMAND) -> tuple[Embedder, PrototypeStore, str]:
            """Return both."""
            del waiting

            def forget(name: str) -> None:
                kept.pop(name, None)

            store = PrototypeStore(kept.get, (lambda *_: None) if stored is None else kept.__setitem__, forget)
            return Embedder(encoder or FakeEncoder(), pool, cache, batch_size=4), store, "fake"

        def unload(self) -> None:
            """Close what was opened."""
            pool.close()
            cache.close()

    config = Config(root=tmp_path, state_dir=tmp_path / "state", cache_dir=tmp_path)
    worker = Worker(Fake(config), heard.posts.put)
    for job in first:
        worker.ask(job)
    worker.start()
    try:
        assert isinstance(heard.posts.get(timeout=PATIENCE_SECONDS), WorkerLoading)
        assert isinstance(heard.posts.get(timeout=PATIENCE_SECONDS), WorkerReady)
        yield worker, heard
    finally:
        assert worker.stop(PATIENCE_SECONDS)


def test_worker_image_of_a_dataset_that_begins_is_embedded_though_the_model_loads_long(tmp_path: Path) -> None:
    """To forget what is stored under the dataset's name is asked first, and must not take its first images along."""
    picture("red", 1).save(tmp_path / "a.png")
    image, new = stamped(tmp_path / "a.png"), DatasetId("new", 2)
    asked = (Forget(new, with_stored=True), EmbedJob(new, (image,)))
    with working(tmp_path, first=asked) as (_, heard):
        heard.wait_for(lambda: heard.paths("new") == [image[0]])


def stamped(path: Path) -> tuple[str, Stamp]:
    """Name a file with its stamp."""
    mark = stamp(os.fspath(path))
    assert mark is not None
    return os.fspath(path), mark


def slow_image(path: Path) -> tuple[str, Stamp]:
    """Write an image of 36 megapixels: hundreds of times the work of a small one."""
    Image.new("RGB", (6000, 6000), "teal").save(path, compress_level=1)
    return stamped(path)


def quick_images(folder: Path, count: int) -> list[tuple[str, Stamp]]:
    """Write small images, no two alike."""
    folder.mkdir(exist_ok=True)
    for number in range(count):
        picture("red", number).save(folder / f"{number:03}.png")
    return [stamped(path) for path in sorted(folder.iterdir())]


def test_answers_come_as_they_are_done(tmp_path: Path) -> None:
    """The images before a slow one are answered without it, though they were asked for together."""
    quick, slow = quick_images(tmp_path / "quick", 3), slow_image(tmp_path / "slow.png")
    with working(tmp_path) as (worker, heard):
        worker.ask(EmbedJob(DatasetId("one"), (*quick, slow)))
        heard.wait_for(lambda: len(heard.paths("one")) >= 3)
        assert sorted(heard.paths("one")) == [path for path, _ in quick]
        heard.wait_for(lambda: len(heard.paths("one")) == 4)


def test_worker_stop_waits_for_no_decoding(tmp_path: Path) -> None:
    """What is under way is left, unanswered."""
    slow = [slow_image(tmp_path / f"{number}.png") for number in range(2)]
    with working(tmp_path) as (worker, heard):
        worker.ask(EmbedJob(DatasetId("one"), tuple(slow)))
        assert worker.stop(PATIENCE_SECONDS)
        assert heard.posts.qsize() <= 1


def test_worker_rebuild_does_not_hold_up_the_images_of_another_dataset(tmp_path: Path) -> None:
    """They take turns with the references, so they are answered before the prototypes are built."""
    references = make_dataset(tmp_path / "Data", references=30)
    images = quick_images(tmp_path / "images", 4)
    with working(tmp_path) as (worker, heard):
        worker.ask(RebuildJob(DatasetId("taught"), references / "Clases", TEACHING, 0, 1))
        worker.ask(EmbedJob(DatasetId("other"), tuple(images)))
        heard.wait_for(lambda: any(answer.dataset.name == "taught" for answer in heard.answers))
        assert len(heard.paths("other")) == 4
        (built,) = [answer for answer in heard.answers if answer.dataset.name == "taught"]
        assert [type(event) for event in built.events] == [PrototypesBuilt]


def test_rebuild_while_it_computes_lets_images_pass_and_shows_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images that arrive while prototypes are computed are answered before those are there; the watchdog is fed."""
    dataset = make_dataset(tmp_path / "Data")
    (image,) = quick_images(tmp_path / "images", 1)
    asked: list[Worker] = []
    progress: list[float | None] = []

    def until_the_image_is_answered(*given: Any, pause: Callable[[], None], **named: Any) -> PrototypeSet:
        asked[0].ask(EmbedJob(DatasetId("other"), (image,)))
        while not heard.paths("other"):
            with suppress(queue.Empty):
                answer = heard.posts.get_nowait()
                assert isinstance(answer, Answer)
                heard.answers.append(answer)
            progress.append(asked[0].busy_since)
            pause()
        return build(*given, pause=pause, **named)

    monkeypatch.setattr("sortd.daemon.references.build", until_the_image_is_answered)
    with working(tmp_path) as (worker, heard):
        asked.append(worker)
        worker.ask(RebuildJob(DatasetId("taught"), dataset / "Clases", TEACHING, 0, 1))
        heard.wait_for(lambda: any(answer.dataset.name == "taught" for answer in heard.answers))
    assert [answer.dataset.name for answer in heard.answers] == ["other", "taught"]
    assert len(progress) == len(set(progress)) > 0


def test_worker_stop_ends_a_rebuild_while_it_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the prototypes take, a stop waits for no more than one step."""
    dataset = make_dataset(tmp_path / "Data")
    began = threading.Event()

    def for_ever(*_: object, pause: Callable[[], None], **__: object) -> PrototypeSet:
        while True:
            began.set()
            pause()

    monkeypatch.setattr("sortd.daemon.references.build", for_ever)
    with working(tmp_path) as (worker, heard):
        worker.ask(RebuildJob(DatasetId("taught"), dataset / "Clases", TEACHING, 0, 1))
        assert began.wait(PATIENCE_SECONDS)
        assert worker.stop(PATIENCE_SECONDS)
        assert heard.posts.qsize() == 0


def test_names_of_many_classes_are_encoded_some_at_a_time(tmp_path: Path) -> None:
    """Between them other images have their turn, and each text is encoded once."""
    batches: list[int] = []
    turns: list[None] = []

    class Counting(FakeEncoder):
        def encode_texts(self, texts: Sequence[str]) -> FloatArray:
            batches.append(len(texts))
            return FakeEncoder.encode_texts(self, texts)

    with DecoderPool(1, SEEN, DecodeLimits()) as pool, Cache(tmp_path / "cache.sqlite") as cache:
        embedder = Embedder(Counting(), pool, cache)
        embedder.on_progress(lambda: turns.append(None), wake_descriptor=None)
        texts = [f"a photo of {number}" for number in range(3 * TEXTS_AT_ONCE + 1)]
        rows = embedder.embed_texts([*texts, *texts])
        assert batches == [TEXTS_AT_ONCE] * 3 + [1]
        assert len(turns) >= 4
        assert np.array_equal(rows, np.concatenate([FakeEncoder().encode_texts(texts)] * 2))
        embedder.embed_texts(texts)
        assert len(batches) == 4


def test_worker_stop_ends_a_rebuild_between_two_batches(tmp_path: Path) -> None:
    """Hundreds of new references do not keep sortd from stopping: the next start goes on from the cache."""
    references = make_dataset(tmp_path / "Data", references=200)
    with working(tmp_path) as (worker, heard):
        worker.ask(RebuildJob(DatasetId("taught"), references / "Clases", TEACHING, 0, 1))
        assert worker.stop(PATIENCE_SECONDS)
        assert heard.posts.qsize() == 0


def test_references_that_are_absent_are_an_answer(tmp_path: Path) -> None:
    """The worker goes on after it."""
    with working(tmp_path) as (worker, heard):
        worker.ask(RebuildJob(DatasetId("none"), tmp_path / "Clases", TEACHING, 0, 1))
        heard.wait_for(lambda: bool(heard.answers))
        (event,) = heard.answers[0].events
        assert isinstance(event, RebuildFailed)
        assert event.references_absent
        (quick,) = quick_images(tmp_path / "images", 1)
        worker.ask(EmbedJob(DatasetId("one"), (quick,)))
        heard.wait_for(lambda: heard.paths("one") == [quick[0]])


class OddEncoder(FakeEncoder):
    """Stumbles over the name of one class."""

    def encode_texts(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Embed texts, but for those that name the odd class."""
        if any("odd" in text for text in texts):
            raise OverflowError("too odd")
        return super().encode_texts(texts)


def test_rebuild_that_stumbles_is_a_failure_of_its_dataset_alone(tmp_path: Path) -> None:
    """Whatever it is that was not foreseen: it is answered as failed, and another dataset is learnt after it."""
    odd, other = make_dataset(tmp_path, "Odd"), make_dataset(tmp_path, "Other")
    (odd / "Clases" / "red").rename(odd / "Clases" / "odd")
    with working(tmp_path, OddEncoder()) as (worker, heard):
        worker.ask(RebuildJob(DatasetId("odd"), odd / "Clases", TEACHING, 0, 1))
        worker.ask(RebuildJob(DatasetId("other"), other / "Clases", TEACHING, 0, 2))
        heard.wait_for(lambda: len(heard.answers) == 2)
    (failed,), (built,) = (answer.events for answer in heard.answers)
    assert failed == RebuildFailed("OverflowError: too odd", job=1)
    assert isinstance(built, PrototypesBuilt)


def bind(path: str) -> None:
    """Make a socket."""
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path)


@pytest.mark.parametrize(
    "put",
    [
        os.mkdir,
        os.mkfifo,
        lambda path: os.symlink("/etc/passwd", path),
        lambda path: os.symlink(path, path),
        bind,
    ],
    ids=["folder", "pipe", "link", "link loop", "socket"],
)
def test_rebuild_description_that_is_no_file_is_said_and_the_class_is_learnt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, put: Callable[[str], None]
) -> None:
    """Whatever stands there as ``class.txt``: it is named with its path, and no rebuild leaves a descriptor open."""
    dataset = make_dataset(tmp_path)
    monkeypatch.chdir(dataset / "Clases" / "red")  # the path of a socket must be short
    put("class.txt")
    job = RebuildJob(DatasetId("one"), dataset / "Clases", TEACHING, 0, 1)
    with working(tmp_path) as (worker, heard):
        worker.ask(job)
        heard.wait_for(lambda: len(heard.answers) == 1)
        for _ in range(3):
            worker.ask(job)
        heard.wait_for(lambda: len(heard.answers) == 4)
        assert not [
            name for name in os.listdir("/proc/self/fd") if "class.txt" in os.path.realpath(f"/proc/self/fd/{name}")
        ]
    for answer in heard.answers:
        (built,) = answer.events
        assert isinstance(built, PrototypesBuilt)
        assert built.prototypes.labels == ("blue", "green", "red")
        assert answer.rebuilt is not None
        (refused,) = answer.rebuilt.refused
        assert refused.path == str(dataset / "Clases" / "red" / "class.txt")
        assert refused.message.startswith("the description of the class cannot be read: ")


def test_worker_rebuild_without_descriptors_ends_the_worker_and_blames_no_reference(tmp_path: Path) -> None:
    """What this process ran out of is said for what it is; a new start has it again."""
    dataset = make_dataset(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with working(tmp_path) as (worker, heard):
        spare = max(map(int, os.listdir("/proc/self/fd"))) + 1
        taken = [os.open("/dev/null", os.O_RDONLY) for _ in range(spare)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (spare, before[1]))
        try:
            worker.ask(RebuildJob(DatasetId("one"), dataset / "Clases", TEACHING, 0, 1))
            posted = heard.posts.get(timeout=PATIENCE_SECONDS)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
            for descriptor in taken:
                os.close(descriptor)
    assert isinstance(posted, WorkerDied)
    assert isinstance(posted.error, OSError)
    assert posted.error.errno == errno.EMFILE


def test_worker_dataset_made_anew_is_not_measured_by_its_predecessor(tmp_path: Path) -> None:
    """A library that differs from the one that stood under its name is learnt, not kept out by the reload gate."""
    stored: dict[str, PrototypeSet] = {}
    dataset = make_dataset(tmp_path / "Data")
    teach(dataset, references=12)
    clases = dataset / "Clases"
    best = ReferenceSettings(DecisionSettings(Mode.BEST, AbstainSettings()))
    first, second = DatasetId("Colours", 1), DatasetId("Colours", 2)
    with working(tmp_path, stored=stored) as (worker, heard):
        worker.ask(RebuildJob(first, clases, best, 0, 1))
        heard.wait_for(lambda: bool(heard.answers))
        for index, folder in enumerate(COLOURS):  # many images of another class in each: it decides much worse
            for number in range(16):
                wrong = picture([*COLOURS][index - 1], 5000 + 100 * index + number, patches=40)
                wrong.save(clases / folder / f"wrong{number}.png")
        worker.ask(Forget(first))
        worker.ask(Forget(second, with_stored=True))
        worker.ask(RebuildJob(second, clases, best, 1, 1))
        heard.wait_for(lambda: len(heard.answers) > 1)
    (built,) = heard.answers[1].events
    assert isinstance(built, PrototypesBuilt)
    assert (heard.answers[1].dataset, built.prototypes.generation) == (second, 2)
    assert stored["Colours"].fingerprint == built.prototypes.fingerprint


def test_worker_answers_carry_the_dataset_and_the_rebuild_that_they_are_about(tmp_path: Path) -> None:
    """Two datasets of one name are told apart, and so are two rebuilds, whether they end well or not."""
    clases = make_dataset(tmp_path / "Data") / "Clases"
    with working(tmp_path) as (worker, heard):
        worker.ask(RebuildJob(DatasetId("Colours", 1), clases, TEACHING, 0, 7))
        worker.ask(RebuildJob(DatasetId("Colours", 2), tmp_path / "absent", TEACHING, 0, 8))
        heard.wait_for(lambda: len(heard.answers) > 1)
    told = [(answer.dataset.number, event) for answer in heard.answers for event in answer.events]
    assert [(number, event.job) for number, event in told if isinstance(event, PrototypesBuilt)] == [(1, 7)]
    assert [(number, event.job) for number, event in told if isinstance(event, RebuildFailed)] == [(2, 8)]
