"""Evidence: which checked images the threshold follows, and what they weigh."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from sortd.daemon.audit import checked_answers, evidence_of
from sortd.events import Mode
from sortd.store.journal import Journal
from sortd.store.records import Selection
from tests.store.test_journal import filed


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    """A journal of 150 filed images of one class, which nobody has checked."""
    made = Journal(tmp_path / "journal.sqlite")
    for number in range(150):
        filed(made, f"t{number}", name=f"{number}.jpg")
    return made


def correct(journal: Journal, moves: Sequence[int]) -> None:
    """Record that a person moved these images to another class."""
    records = [journal.history.moves(Selection(id=move))[0] for move in moves]
    journal.record_corrections([(record, "dog", f"Dataset/dog/{record.id}.jpg") for record in records])


def test_evidence_needs_a_hundred_checked_images(journal: Journal) -> None:
    """99 audited images are none, 100 are; other modes have no evidence."""
    journal.record_checks([(move, move > 9) for move in range(1, 100)])
    assert evidence_of(journal.history, Mode.MIXED) is None
    journal.record_checks([(100, True)])
    found = evidence_of(journal.history, Mode.MIXED)
    assert found is not None
    assert (len(found.right), sum(found.right), found.is_random) == (100, 91, True)
    assert set(found.weight) == {1.0}
    assert set(found.confidence) == {0.9}
    assert evidence_of(journal.history, Mode.BEST) is None
    assert evidence_of(journal.history, Mode.MAX) is None


def test_evidence_of_samples_weighs_what_was_corrected_before_by_its_share(journal: Journal) -> None:
    """30 of 150 were corrected, which no sample holds: they weigh a fifth of all."""
    correct(journal, range(1, 31))
    journal.record_checks([(move, True) for move in range(31, 131)])
    found = evidence_of(journal.history, Mode.MIXED)
    assert found is not None
    assert (len(found.right), sum(found.right), found.is_random) == (130, 100, True)
    wrong = sum(weight for weight, right in zip(found.weight, found.right, strict=True) if not right)
    assert wrong / sum(found.weight) == pytest.approx(0.2)
    assert sum(found.weight) == pytest.approx(100)


def test_evidence_without_samples_is_not_random(journal: Journal) -> None:
    """What was filed until the last correction counts as checked, and is marked as what nobody drew."""
    correct(journal, [3, 140])
    found = evidence_of(journal.history, Mode.MIXED)
    assert found is not None
    assert (len(found.right), sum(found.right), found.is_random) == (150, 148, False)


@pytest.mark.parametrize("answer", [[1, 1], ["1", True], 1, [0, True], [1 << 63, True], [1, True, 2], None])
def test_answers_that_are_none_are_refused(answer: object) -> None:
    """Each is the number of a move and a truth."""
    assert checked_answers([[7, True], [8, False]]) == [(7, True), (8, False)]
    with pytest.raises(ValueError, match="not the number of a move"):
        checked_answers([[7, True], answer])
