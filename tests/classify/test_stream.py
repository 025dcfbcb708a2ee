"""The stream: images are as familiar as those that resemble them among the last ones."""

from dataclasses import replace

import numpy as np
import pytest

from sortd.classify.build import build
from sortd.classify.decide import decide
from sortd.classify.prototypes import PrototypeSet
from sortd.classify.stream import KEPT, Stream
from sortd.classify.types import DecisionSettings
from sortd.events import Assigned, Decision
from tests.made_features import Array, Blobs, support_set


def library(blobs: Blobs, generation: int = 1) -> PrototypeSet:
    """Return prototypes of six classes."""
    index = np.repeat(np.arange(6), 16)
    return build(support_set(blobs.draw(index), index), DecisionSettings(), generation=generation)


def filed(decisions: list[Decision]) -> float:
    """Return the share of filed images."""
    return float(np.mean([isinstance(one, Assigned) for one in decisions]))


def stream_of(prototypes: PrototypeSet, rows: Array, stream: Stream) -> list[Decision]:
    """Return decisions in batches of 32."""
    parts = np.split(rows, range(32, len(rows), 32))
    return [one for part in parts for one in stream.decide(prototypes, part, [0] * len(part))]


def test_stream_first_image_is_decided_as_without_a_stream() -> None:
    """Where nothing is known, an image stands for itself."""
    blobs = Blobs(6, spread=1.2)
    prototypes = library(blobs)
    for row in blobs.draw([0, 1, 2, 3, 4, 5]):
        assert Stream().decide(prototypes, row[None], [0]) == decide(prototypes, row[None])


def test_stream_group_of_strangers_is_filed_less_and_known_images_are_filed() -> None:
    """A kind of images that the library lacks, and images of its classes, arrive in turn."""
    blobs = Blobs(7, spread=1.2)
    prototypes = library(blobs)
    known, strange = blobs.draw(np.tile(np.arange(6), 60)), blobs.draw([6] * 120)
    order = np.random.default_rng(0).permutation(480)
    rows = np.concatenate([known, strange])[order]
    found = stream_of(prototypes, rows, Stream())
    is_strange = order >= len(known)
    strangers = [one for one, strange in zip(found, is_strange, strict=True) if strange]
    others = [one for one, strange in zip(found, is_strange, strict=True) if not strange]
    assert filed(strangers) <= filed(decide(prototypes, strange))
    assert filed(others) > 0.9


def test_stream_image_decided_again_is_not_its_own_neighbour() -> None:
    """The same image a hundred times is remembered once, and decided as the first time."""
    blobs = Blobs(6, spread=1.2)
    prototypes, stream = library(blobs), Stream()
    row = blobs.draw([3])
    first = stream.decide(prototypes, row, [0])
    assert all(stream.decide(prototypes, row, [0]) == first for _ in range(100))
    assert len(stream) == 1


def test_stream_new_generation_judges_the_remembered_images_again() -> None:
    """A stream that has served another generation decides as one that has served this one alone."""
    blobs = Blobs(6, spread=1.2)
    old, new, rows = library(blobs), library(blobs, 2), blobs.draw(np.tile(np.arange(6), 40))
    stream, fresh = Stream(), Stream()
    stream_of(old, rows, stream)
    stream_of(new, rows, fresh)
    asked = blobs.draw([0, 1, 2, 3, 4, 5])
    assert stream.decide(new, asked, [0] * 6) == fresh.decide(new, asked, [0] * 6)


def test_stream_image_decided_again_by_a_new_generation_is_remembered_once() -> None:
    """Also before the new generation has judged the remembered one: Review/ must not fill the stream."""
    blobs, stream = Blobs(6, spread=1.2), Stream()
    rows = blobs.draw(np.tile(np.arange(6), 60))
    stream_of(library(blobs), rows, stream)
    stream.decide(library(blobs, 2), rows[:32], [0] * 32)
    assert len(stream) == len(rows)


def test_stream_one_reference_a_class_decides_without_neighbours() -> None:
    """Without known images, familiarity has no mean: an image in doubt is not taken for one of no class."""
    blobs, index = Blobs(6, spread=1.2), np.arange(6)
    prototypes = build(support_set(blobs.draw(index), index), DecisionSettings(), generation=1)
    rows = blobs.draw(np.tile(index, 60))
    assert stream_of(prototypes, rows, Stream()) == decide(prototypes, rows)


def test_stream_rows_of_another_encoder_are_forgotten() -> None:
    """Embeddings of another encoder of the same dimensions say nothing about those of this one."""
    blobs, stream, fresh, index = Blobs(6, spread=1.2), Stream(), Stream(), np.repeat(np.arange(6), 16)
    stream_of(library(blobs), blobs.draw(np.tile(np.arange(6), 60)), stream)
    other = support_set(blobs.draw(index)[:, ::-1].copy(), index)
    prototypes = build(replace(other, encoder_id="another"), DecisionSettings(), generation=2)
    asked = blobs.draw(np.tile(np.arange(6), 8))[:, ::-1]
    assert stream_of(prototypes, asked, stream) == stream_of(prototypes, asked, fresh)
    assert len(stream) == len(asked)


def test_stream_row_that_is_not_finite_raises_and_is_not_remembered() -> None:
    """A broken row is refused as by ``decide``, without a trace."""
    blobs, stream = Blobs(6, spread=1.2), Stream()
    rows = blobs.draw([0, 1])
    rows[1, 3] = np.nan
    with pytest.raises(ValueError, match="row 1"):
        stream.decide(library(blobs), rows, [0, 0])
    assert not len(stream)


def test_stream_with_more_classes_than_it_can_serve_remembers_nothing() -> None:
    """Where neighbours would have no weight, nothing is computed for them."""
    blobs = Blobs(6, spread=1.2)
    prototypes, stream, rows = library(blobs), Stream(kept=48), blobs.draw(np.tile(np.arange(6), 5))
    assert stream_of(prototypes, rows, stream) == decide(prototypes, rows)
    assert not len(stream)


def test_stream_remembers_a_bounded_number_of_images() -> None:
    """The oldest are dropped."""
    blobs = Blobs(6, spread=1.2)
    prototypes, stream = library(blobs), Stream(kept=100)
    stream_of(prototypes, blobs.draw(np.tile(np.arange(6), 50)), stream)
    assert len(stream) == 100
    assert KEPT >= 1000
