"""The pipeline: every image is answered once, batches are full if possible, and no queue blocks another."""

import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sortd.daemon import embedder
from sortd.daemon.embedder import Embedder, Pipeline
from sortd.events import EmbeddedImage, ImageRefused, Preprocessing, Refusal, Stamp
from sortd.images.decode import DecodeLimits
from sortd.images.decoder_process import start_process
from sortd.images.pool import DecodedImage, DecoderPool
from sortd.store.cache import Cache
from sortd.watch.scan import stamp
from tests.fake_encoder import SEEN, FakeEncoder

SMALL = Preprocessing(16, 16, 16)
File = tuple[str, Stamp]


@pytest.fixture(scope="module")
def pool() -> Iterator[DecoderPool]:
    """Two processes, warm."""
    with DecoderPool(2, SMALL, DecodeLimits(), timeout_seconds=30) as pool:
        yield pool


def pictures(folder: Path, count: int, *, seed: int = 0) -> list[File]:
    """Write small pictures, no two alike, and stamp them."""
    folder.mkdir(exist_ok=True)
    files = []
    for number in range(count):
        values = np.random.default_rng([seed, number]).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        path = folder / f"{number:03}.png"
        Image.fromarray(values).save(path)
        files.append((os.fspath(path), _stamp(path)))
    return files


def _stamp(path: Path) -> Stamp:
    found = stamp(os.fspath(path))
    assert found is not None
    return found


class Recording:
    """An encoder of the pipeline that notes its batches, and the answers that were delivered."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self.batches: list[list[str]] = []
        self.answers: list[EmbeddedImage | ImageRefused] = []

    def encode(self, batch: Sequence[DecodedImage]) -> list[EmbeddedImage]:
        """Answer with rows of nothing."""
        self.batches.append([image.path for image in batch])
        return [EmbeddedImage(image.path, image.stamp, np.zeros(1, np.float32), image.content) for image in batch]


def drain(pipeline: Pipeline) -> None:
    """Advance until nothing is left."""
    while pipeline.has_work:
        pipeline.advance()


def test_pipeline_each_image_is_answered_once_in_full_batches(pool: DecoderPool, tmp_path: Path) -> None:
    """Forty images take as few batches as possible, with refusals among them."""
    files = pictures(tmp_path, 40)
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(files[0][0]).read_bytes()[:60])
    recording = Recording()
    pipeline = Pipeline(pool, recording.encode, batch_size=10)
    pipeline.add(pipeline.open(recording.answers.extend), [*files[:20], (str(broken), _stamp(broken)), *files[20:]])
    drain(pipeline)
    assert sorted(answer.path for answer in recording.answers) == sorted([*(path for path, _ in files), str(broken)])
    assert [a.refusal for a in recording.answers if isinstance(a, ImageRefused)] == [Refusal.UNREADABLE]
    assert max(map(len, recording.batches)) <= 10


def test_pipeline_first_image_waits_for_no_batch_and_batches_grow(pool: DecoderPool, tmp_path: Path) -> None:
    """The first forward has one image, later ones at most twice as many as the one before; again after a pause."""
    recording = Recording()
    pipeline = Pipeline(pool, recording.encode, batch_size=32)
    queue = pipeline.open(recording.answers.extend)
    files = pictures(tmp_path, 40)
    for some in (files[:30], files[30:]):
        pipeline.add(queue, some)
        recording.batches.clear()
        drain(pipeline)
        sizes = [len(batch) for batch in recording.batches]
        assert (sizes[0], sum(sizes)) == (1, len(some))
        assert all(size <= 2**number for number, size in enumerate(sizes))


@pytest.mark.parametrize(("starved_seconds", "processes"), [(0.0, 2), (float("inf"), 1)])
def test_pipeline_starts_another_process_only_when_the_encoder_waits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, starved_seconds: float, processes: int
) -> None:
    """One process is enough where images are decoded faster than they are encoded."""
    monkeypatch.setattr(embedder, "STARVED_SECONDS", starved_seconds)
    recording = Recording()
    with DecoderPool(2, SMALL, DecodeLimits(), started=[start_process()]) as growing:
        pipeline = Pipeline(growing, recording.encode, batch_size=4)
        pipeline.add(pipeline.open(recording.answers.extend), pictures(tmp_path, 20))
        drain(pipeline)
        assert (len(recording.answers), len(growing.process_ids)) == (20, processes)


def test_pipeline_single_image_is_encoded_without_waiting(pool: DecoderPool, tmp_path: Path) -> None:
    """It is encoded in the step in which it is decoded."""
    recording = Recording()
    pipeline = Pipeline(pool, recording.encode, batch_size=32)
    (file,) = pictures(tmp_path, 1)
    pipeline.add(pipeline.open(recording.answers.extend), [file])
    pipeline.advance()
    assert recording.batches == [[file[0]]]


def test_pipeline_queues_take_turns(pool: DecoderPool, tmp_path: Path) -> None:
    """An image in a queue of its own is answered before most of those in a long queue."""
    many, one = pictures(tmp_path / "many", 60), pictures(tmp_path / "one", 1, seed=1)
    recording = Recording()
    pipeline = Pipeline(pool, recording.encode, batch_size=4)
    pipeline.add(pipeline.open(recording.answers.extend), many)
    pipeline.advance()
    pipeline.add(pipeline.open(recording.answers.extend), one)
    drain(pipeline)
    assert [answer.path for answer in recording.answers].index(one[0][0]) < 20


def test_pipeline_images_under_way_are_limited(pool: DecoderPool, tmp_path: Path) -> None:
    """At most a batch and two images for each process are decoded, and so open, at a time."""
    recording = Recording()
    pipeline = Pipeline(pool, recording.encode, batch_size=4)
    opened = pipeline.open(recording.answers.extend)
    pipeline.add(opened, pictures(tmp_path, 60))
    pipeline.advance()
    left = len(opened.waiting)
    assert 60 - left - len(recording.answers) <= 8
    drain(pipeline)


def test_pipeline_processes_decode_during_a_forward(pool: DecoderPool, tmp_path: Path) -> None:
    """Before a forward begins, the decoders have received the next images."""
    recording = Recording()
    given: list[int] = []

    def encode(batch: Sequence[DecodedImage]) -> list[EmbeddedImage]:
        given.append(16 - len(opened.waiting) - len(recording.answers) - len(batch))
        return recording.encode(batch)

    pipeline = Pipeline(pool, encode, batch_size=4)
    opened = pipeline.open(recording.answers.extend)
    pipeline.add(opened, pictures(tmp_path, 16))
    drain(pipeline)
    assert given[0] >= 4


def test_pipeline_closed_queue_leaves_nothing(pool: DecoderPool, tmp_path: Path) -> None:
    """Its images are dropped, its files are closed, and other queues get all of their answers."""
    dropped, kept = pictures(tmp_path / "a", 30), pictures(tmp_path / "b", 10, seed=1)
    before = len(os.listdir("/proc/self/fd"))
    recording = Recording()
    pipeline = Pipeline(pool, recording.encode, batch_size=4)
    opened = pipeline.open(lambda _: None)
    pipeline.add(opened, dropped)
    pipeline.add(pipeline.open(recording.answers.extend), kept)
    pipeline.advance()
    pipeline.close(opened)
    drain(pipeline)
    assert sorted(answer.path for answer in recording.answers) == [path for path, _ in kept]
    assert len(os.listdir("/proc/self/fd")) == before


def test_pipeline_queue_closed_during_a_forward_is_told_nothing(pool: DecoderPool, tmp_path: Path) -> None:
    """A dataset may be closed while an encoder in another process is waited for; other queues have their answers."""
    recording = Recording()
    kept: list[EmbeddedImage | ImageRefused] = []

    def encode(batch: Sequence[DecodedImage]) -> list[EmbeddedImage]:
        if closed in pipeline._queues:
            pipeline.close(closed)
        return recording.encode(batch)

    pipeline = Pipeline(pool, encode, batch_size=4)
    closed, other = pipeline.open(recording.answers.extend), pipeline.open(kept.extend)
    files = pictures(tmp_path, 4)
    pipeline.add(closed, files[:2])
    pipeline.add(other, files[2:])
    drain(pipeline)
    assert recording.answers == []
    assert {answer.path for answer in kept} == {path for path, _ in files[2:]}


def test_pipeline_wake_descriptor_ends_the_wait(pool: DecoderPool, tmp_path: Path) -> None:
    """A new job is accepted at once, even while a slow image is decoded."""
    slow = tmp_path / "slow.png"
    Image.fromarray(np.zeros((3000, 3000, 3), np.uint8)).save(slow)
    recording = Recording()
    pipeline = Pipeline(pool, recording.encode, batch_size=4)
    pipeline.add(pipeline.open(recording.answers.extend), [(str(slow), _stamp(slow))])
    bell = os.eventfd(1)
    try:
        pipeline.wake_descriptor = bell
        pipeline.advance()
        assert recording.answers == []
    finally:
        os.close(bell)
    drain(pipeline)
    assert len(recording.answers) == 1


def test_embedder_references_let_other_queues_continue(tmp_path: Path) -> None:
    """While many files are embedded, an image of another queue is answered, and the callback is called."""
    with DecoderPool(1, SEEN, DecodeLimits()) as decoders, Cache(tmp_path / "cache.sqlite") as cache:
        embedder = Embedder(FakeEncoder(), decoders, cache, batch_size=4)
        others: list[EmbeddedImage | ImageRefused] = []
        opened = embedder.open(others.extend)
        (one,) = pictures(tmp_path / "one", 1, seed=1)
        attended: list[str] = []

        def attend() -> None:
            if not attended:
                embedder.add(opened, [one])
            attended.append(threading.current_thread().name)

        bell = os.eventfd(0, os.EFD_NONBLOCK)
        try:
            embedder.on_progress(attend, wake_descriptor=bell)
            files = pictures(tmp_path / "many", 40)
            answers = [(answer.path, len(others)) for answer in embedder.embed(files)]
        finally:
            os.close(bell)
        assert len(answers) == 40
        assert len(others) == 1
        assert answers[-1][1] == 1
        assert not embedder.has_work
        forwards = embedder.forwards
        assert len(list(embedder.embed([one]))) == 1
        assert embedder.forwards == forwards
