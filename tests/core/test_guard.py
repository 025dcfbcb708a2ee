"""The guard: which batches are held, which pass, and how a hold is released."""

import numpy as np
import numpy.typing as npt
import pytest

from sortd.classify.build import build
from sortd.classify.decide import decide_by
from sortd.classify.prototypes import PrototypeSet
from sortd.classify.types import AbstainSettings, DecisionSettings, SupportSet
from sortd.core.guard import GuardState, verdict
from sortd.core.sorter import Sorter, SorterSettings
from sortd.events import (
    Assigned,
    Command,
    DatasetReleased,
    Embed,
    Embedded,
    EmbeddedImage,
    Hold,
    ImageSeen,
    Mode,
    Move,
    PrototypesBuilt,
    Rebuild,
    ReferencesTouched,
    ReviewSeen,
    Stamp,
    Tick,
    Writer,
)

Rows = npt.NDArray[np.float32]

WIDTH = 16
DICE = np.random.default_rng(3)
CENTRES = np.linalg.qr(DICE.normal(size=(WIDTH, WIDTH)))[0][:4].astype(np.float32)


def near(centre: int, count: int, spread: float = 0.15) -> Rows:
    """Return unit rows about one of the classes' centres."""
    rows = CENTRES[centre] + spread * np.random.default_rng(centre + 100 * count).normal(size=(count, WIDTH))
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float32)


def prototypes(generation: int) -> PrototypeSet:
    """Return three classes of twelve references each, calibrated."""
    support = SupportSet(
        labels=("a", "b", "c"),
        embeddings=np.concatenate([near(centre, 12) for centre in range(3)]),
        classes=np.repeat(np.arange(3), 12),
        sources=tuple(map(str, range(36))),
        encoder_id="encoder",
        fingerprint=str(generation),
    )
    return build(support, DecisionSettings(mode=Mode.BEST, abstain=AbstainSettings()), generation=generation)


def drop(sorter: Sorter, rows: Rows, now: float) -> list[Move | Hold]:
    """Drop images with these embeddings at once and answer every request for them; return the moves and holds."""
    known = {f"{now}-{index}.png": row for index, row in enumerate(rows)}
    stamps = {path: Stamp(1, index + int(now), 1, 1) for index, path in enumerate(known)}
    for path, stamp in stamps.items():
        sorter.receive(ImageSeen(path, stamp), now)
    commands = sorter.receive(Tick(), now + 1)
    for path, stamp in stamps.items():
        commands += sorter.receive(ImageSeen(path, stamp, Writer.ABSENT), now + 1)
    return answer(sorter, commands, known, now + 2)


def answer(sorter: Sorter, commands: list[Command], known: dict[str, Rows], now: float) -> list[Move | Hold]:
    """Answer every ``Embed`` until none is asked any more."""
    told: list[Move | Hold] = []
    while commands:
        command = commands.pop(0)
        if isinstance(command, Embed):
            images = tuple(EmbeddedImage(path, stamp, known[path], path) for path, stamp in command.images)
            commands += sorter.receive(Embedded(images, "encoder"), now)
        elif isinstance(command, Move | Hold):
            told.append(command)
    return told


@pytest.fixture
def changed() -> Sorter:
    """A core whose second generation was just built."""
    sorter = Sorter(SorterSettings(settle_seconds=1, guard_images=20), decide=decide_by)
    assert sorter.receive(Tick(), 0) == [Rebuild(1)]
    sorter.receive(PrototypesBuilt(prototypes(1), job=1), 0)
    sorter.receive(ReferencesTouched(), 1)
    sorter.receive(Tick(), 2)
    sorter.receive(PrototypesBuilt(prototypes(2), job=2), 3)
    return sorter


def test_guard_predicted_batch_passes(changed: Sorter) -> None:
    """A batch of known images is checked and then moved completely."""
    told = drop(changed, np.concatenate([near(centre, 15) for centre in range(3)]), 10)
    assert len(told) == 45
    assert all(isinstance(command, Move) for command in told)


def test_guard_single_class_batch_passes(changed: Sorter) -> None:
    """A batch with high confidence in one class, as from a camera, is not held."""
    assert len(drop(changed, near(1, 40), 10)) == 40


def test_guard_unpredicted_batch_is_held_until_released(changed: Sorter) -> None:
    """Nothing is moved, the reason is reported once, and a release moves everything."""
    rows = near(3, 40, 0.6)
    told = drop(changed, rows, 10)
    assert [type(command) for command in told] == [Hold]
    assert isinstance(told[0], Hold)
    assert "review" in told[0].reason
    assert not changed.may_move
    known = {f"10-{index}.png": row for index, row in enumerate(rows)}
    moved = answer(changed, changed.receive(DatasetReleased(), 20), known, 20)
    assert len(moved) == 40


def test_guard_small_batch_is_never_held(changed: Sorter) -> None:
    """A batch below the configured size is not checked."""
    assert len(drop(changed, near(3, 5, 0.6), 10)) == 5


@pytest.mark.parametrize("counts", [(1,), (3,), (1, 1), (0, 0)])
def test_guard_library_that_files_nothing_is_not_held(counts: tuple[int, ...]) -> None:
    """Where too few references support no decision, nothing else was predicted."""
    support = SupportSet(
        labels=tuple("abc"[: len(counts)]),
        embeddings=np.concatenate([near(centre, 12)[:count] for centre, count in enumerate(counts)]),
        classes=np.repeat(np.arange(len(counts)), counts),
        sources=tuple(map(str, range(sum(counts)))),
        encoder_id="encoder",
    )
    few = build(support, DecisionSettings(), generation=2)
    decisions = decide_by(few, np.concatenate([near(centre, 15) for centre in range(3)]))
    assert not any(isinstance(one, Assigned) for one in decisions)
    assert verdict(decisions, few) is None


def test_guard_images_that_stay_in_review_are_no_batch() -> None:
    """What was sent to Review/ and stays there says nothing against new prototypes; new images are checked still."""
    sorter = Sorter(SorterSettings(settle_seconds=1, guard_images=20), decide=decide_by)
    sorter.receive(Tick(), 0)
    sorter.receive(PrototypesBuilt(prototypes(1), job=1), 0)
    known = {f"Review/_none/{index}.png": row for index, row in enumerate(near(3, 40, 0.6))}
    for index, path in enumerate(known):
        sorter.receive(ReviewSeen(path, Stamp(1, 900 + index, 1, 1), 1), 0)
    sorter.receive(ReferencesTouched(), 1)
    sorter.receive(Tick(), 2)
    commands = sorter.receive(PrototypesBuilt(prototypes(2), job=2), 3)
    assert answer(sorter, commands, known, 3) == []
    assert sorter.may_move
    assert sorter.is_drained
    assert [type(command) for command in drop(sorter, near(3, 40, 0.6), 10)] == [Hold]


def test_guard_first_generation_is_not_held() -> None:
    """Without an earlier generation there is no change to check."""
    sorter = Sorter(SorterSettings(settle_seconds=1, guard_images=20), decide=decide_by)
    sorter.receive(Tick(), 0)
    sorter.receive(PrototypesBuilt(prototypes(1), job=1), 0)
    assert len(drop(sorter, near(3, 40, 0.6), 10)) == 40


def test_guard_change_while_stopped_is_checked() -> None:
    """The last trusted generation is known after a restart."""
    sorter = Sorter(SorterSettings(settle_seconds=1, guard_images=20), decide=decide_by, guard=GuardState(1))
    sorter.receive(Tick(), 0)
    sorter.receive(PrototypesBuilt(prototypes(2), job=1), 0)
    assert [type(command) for command in drop(sorter, near(3, 40, 0.6), 10)] == [Hold]
