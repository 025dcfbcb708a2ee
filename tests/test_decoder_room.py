"""The room that decoding takes: large images wait for one another, small ones for nobody."""

import os
import signal
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sortd.decoding.decoder_process import ROOM_UNASKED_PIXELS
from sortd.decoding.decoders import Batch, DecodedImage, DecoderPool
from sortd.errors import CrowdedError
from sortd.images import Limits, decode, decode_file
from sortd.messages import ImageRefused, Preprocessing, Refusal
from tests.bombs import one_bit_png, saved
from tests.test_decoders import open_files, photo, stamped, warmed, while_stopped

SMALL = Preprocessing(64, 64, 64)
WIDTH, HEIGHT = 3000, 2000
PIXELS = WIDTH * HEIGHT


@pytest.fixture
def mixed(tmp_path: Path) -> list[Path]:
    """Write images of six megapixels, among many small ones."""
    paths = []
    for number in range(6):
        paths.append(tmp_path / f"large-{number}.png")
        paths[-1].write_bytes(one_bit_png(WIDTH, HEIGHT))
        paths += [photo(tmp_path / f"small-{number}-{k}.png", k) for k in range(4)]
    return paths


def taken_by_turns(pool: DecoderPool, batch: Batch) -> Iterator[int]:
    """Decode a batch, and yield what its large images have been given whenever the processes have been fed."""
    while batch.waiting or batch.unanswered:
        pool.feed(batch)
        yield sum(job.wanted_pixels for handle in pool._handles for job in handle.jobs)
        pool.collect(None)


def until_a_large_one_is_given(pool: DecoderPool, batch: Batch) -> None:
    """Decode until a process has been given a large image, which is not answered yet."""
    given = taken_by_turns(pool, batch)
    while not next(given):
        pass


@pytest.mark.parametrize("at_a_time", [1, 2])
def test_large_images_share_the_room_of_the_greatest_that_is_allowed(
    mixed: list[Path], tmp_path: Path, at_a_time: int
) -> None:
    """As many as fit are decoded at a time, and never more; every image comes out as it would alone."""
    batch, limits = Batch(deque(stamped(*mixed))), Limits(max_pixels=at_a_time * PIXELS + 1)
    with DecoderPool(3, SMALL, limits) as pool:
        warmed(pool, tmp_path)
        assert max(taken_by_turns(pool, batch)) == at_a_time * PIXELS
    answers = {answer.path: answer for answer in batch.answers}
    assert len(batch.answers) == len(mixed)
    for path in map(os.fspath, mixed):
        answer = answers[path]
        assert isinstance(answer, DecodedImage)
        assert np.array_equal(answer.pixels, decode_file(path, SMALL, limits))


def test_small_images_go_on_while_a_large_one_waits(mixed: list[Path], tmp_path: Path) -> None:
    """While the one process that has a large image does not end it, all small ones are answered by the other."""
    limits = Limits(max_pixels=PIXELS)
    with DecoderPool(2, SMALL, limits) as pool:
        warmed(pool, tmp_path)
        batch = Batch(deque(stamped(*[path for path in mixed if "large" in path.name])))
        until_a_large_one_is_given(pool, batch)
        (busy,) = [handle for handle in pool._handles if any(job.wanted_pixels for job in handle.jobs)]
        os.kill(busy.process_id, signal.SIGSTOP)
        small = Batch(deque(stamped(*[path for path in mixed if "small" in path.name])))
        (free,) = [handle for handle in pool._handles if handle is not busy]
        before = len(batch.answers)
        pool.feed(small)
        while free.load:
            pool.collect(None)
            pool.feed(small)
        assert {type(answer) for answer in small.answers} == {DecodedImage}
        assert len(batch.answers) == before
        os.kill(busy.process_id, signal.SIGCONT)
        while batch.unanswered or batch.waiting or small.unanswered or small.waiting:
            pool.feed(batch)
            pool.feed(small)
            pool.collect(None)
        assert len(small.answers) == 24
        assert {type(answer) for answer in batch.answers} == {DecodedImage}


def test_a_large_image_that_ends_its_process_is_poison_and_the_next_one_is_decoded(tmp_path: Path) -> None:
    """The room that it had is free again."""
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path in paths:
        path.write_bytes(one_bit_png(WIDTH, HEIGHT))
    with DecoderPool(1, SMALL, Limits(max_pixels=PIXELS), kills=1) as pool:
        (process_id,) = warmed(pool, tmp_path)
        batch = Batch(deque(stamped(paths[0])))
        until_a_large_one_is_given(pool, batch)
        with while_stopped(process_id, lambda: os.kill(process_id, signal.SIGKILL)):
            pool.collect(None)
        (poison,) = batch.answers
        assert isinstance(poison, ImageRefused)
        assert poison.refusal is Refusal.POISON
        others = list(pool.decode_all(stamped(*paths[1:])))
    assert {type(answer) for answer in others} == {DecodedImage}
    assert len(others) == 2


def test_large_images_that_nobody_wants_any_more_are_closed(mixed: list[Path], tmp_path: Path) -> None:
    """They wait for nothing, and hold no file open."""
    with DecoderPool(1, SMALL, Limits(max_pixels=PIXELS)) as pool:
        warmed(pool, tmp_path)
        before = open_files()
        batch = Batch(deque(stamped(*[path for path in mixed if "large" in path.name])))
        while not pool._large:
            pool.feed(batch)
            pool.collect(None)
        assert open_files() > before
        pool.drop(batch)
        assert open_files() == before
        (later,) = pool.decode_all(stamped(photo(tmp_path / "later.png")))
        assert isinstance(later, DecodedImage)


class TestWhatAnImageTakes:
    """The room is told by the header, before anything is decoded."""

    @staticmethod
    def room_of(content: bytes, folder: Path, *, preprocessing: Preprocessing = SMALL) -> int:
        """Return how much room an image asks for when it is given none."""
        path = folder / "image"
        path.write_bytes(content)
        with path.open("rb") as file, pytest.raises(CrowdedError) as raised:
            decode(file, preprocessing, Limits(), room_pixels=0)
        return raised.value.pixels

    def test_a_photo_takes_what_it_is_decoded_at(self, tmp_path: Path) -> None:
        """A JPEG of twelve megapixels is decoded at an eighth of its sides, and asks for nothing."""
        jpeg = saved(Image.new("RGB", (4000, 3000)), "JPEG")
        assert self.room_of(jpeg, tmp_path) == 500 * 375
        assert ROOM_UNASKED_PIXELS > 500 * 375

    def test_a_progressive_one_takes_all_its_coefficients(self, tmp_path: Path) -> None:
        """They are held until the last scan, at whatever scale it is decoded."""
        jpeg = saved(Image.new("RGB", (4000, 3000)), "JPEG", progressive=True)
        assert self.room_of(jpeg, tmp_path) == 4000 * 3000

    def test_a_file_that_is_larger_than_its_pixels_takes_its_bytes(self, tmp_path: Path) -> None:
        """Some decoders read all of it before they begin."""
        assert self.room_of(saved(Image.new("RGB", (64, 64)), "WEBP") + 400_000 * b"x", tmp_path) > 100_000

    def test_no_image_takes_more_than_there_is(self, tmp_path: Path) -> None:
        """A progressive JPEG over the limit on pixels, which its scale brings below it, gets all the room."""
        jpeg = saved(Image.new("L", (9000, 7000)), "JPEG", progressive=True)
        assert self.room_of(jpeg, tmp_path) == Limits().max_pixels
