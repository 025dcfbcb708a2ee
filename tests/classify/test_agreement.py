"""Agreement: quick rows serve only where they decide the references as the exact ones do, and barely moved."""

from dataclasses import replace

import numpy as np
import pytest

from sortd.classify.held_out import (
    FEWEST_FILED,
    FILED_TO_SETTLE,
    Agreement,
    agreement,
    is_settled,
    pooled,
    refuse_quick,
)
from sortd.classify.types import AbstainSettings, DecisionSettings, SupportSet
from sortd.events import Mode
from tests.made_features import Array, Blobs, support_set, unit

BLOBS = Blobs(8, spread=0.6)
CLASSES = np.repeat(np.arange(8), 10)
ROWS = BLOBS.draw(CLASSES)
TEXT, TEXT_MEAN = BLOBS.names(0.5)
EXACT = support_set(ROWS, CLASSES, text=TEXT, text_mean=TEXT_MEAN)


def moved(support: SupportSet, by: float, seed: int = 0) -> SupportSet:
    """The same references, each row moved by noise of that length."""
    noise = np.random.default_rng(seed).normal(0, 1, support.embeddings.shape)
    rows: Array = unit(support.embeddings + by * unit(noise))
    return replace(support, embeddings=rows, encoder_id="quick")


@pytest.mark.parametrize("mode", Mode)
def test_refuse_quick_nearly_equal_rows_pass(mode: Mode) -> None:
    """In every mode, with and without abstention."""
    for settings in (
        DecisionSettings(mode),
        DecisionSettings(mode, abstain=None),
        DecisionSettings(mode, AbstainSettings(0.5)),
    ):
        found = agreement(EXACT, moved(EXACT, 0.01), settings)
        assert (found.references, found.judged) == (80, 80)
        assert found.same >= 79  # with a precision of 0.5, references that are undecided count as well
        assert found.mean_cosine == pytest.approx(1 / np.sqrt(1 + 0.01**2), abs=1e-4)
        assert refuse_quick({"Screws": found}) is None


def test_refuse_quick_other_labels_are_refused() -> None:
    """The message names dataset and share."""
    wrong = replace(EXACT, embeddings=EXACT.embeddings.copy(), encoder_id="quick")
    wrong.embeddings[:3] = EXACT.embeddings[50:53]
    found = agreement(EXACT, wrong, DecisionSettings(Mode.AVG, abstain=None))
    assert (found.right_exact, found.right_quick) == (80, 77)
    said = refuse_quick({"Screws": replace(found, cosines=80.0)})
    assert said is not None
    assert "3 of the 80 filed references of Screws get another label: 96.2% equal" in said


def test_refuse_quick_distant_rows_are_refused() -> None:
    """Although the labels agree."""
    apart = support_set(
        unit(np.eye(4, 64)[np.repeat(np.arange(4), 10)] + 0.01 * ROWS[:40]), np.repeat(np.arange(4), 10)
    )
    found = agreement(apart, moved(apart, 0.3), DecisionSettings(Mode.AVG, abstain=None))
    assert found.share == 1
    assert "differ: mean cosine 0.95" in (refuse_quick({"Screws": found}) or "")


def test_refuse_quick_nan_is_refused() -> None:
    """NaN compares with nothing."""
    found = replace(agreement(EXACT, EXACT, DecisionSettings(Mode.AVG, abstain=None)), cosines=float("nan"))
    assert refuse_quick({"Screws": found}) is not None


def test_refuse_quick_few_references_are_refused() -> None:
    """Also none, and classes of one reference, which cannot be left out."""
    few = support_set(ROWS[:20], CLASSES[:20])
    alone = support_set(BLOBS.draw(range(8)), range(8))
    nothing = support_set(ROWS[:0], [], labels=2)
    for support, judged in ((few, 20), (alone, 0), (nothing, 0)):
        found = agreement(support, support, DecisionSettings(abstain=None))
        assert found.judged == judged
        said = refuse_quick({"Screws": found})
        assert said is not None
        assert said.startswith(f"only {judged} left-out references are filed")
        assert str(FEWEST_FILED) in said
    assert refuse_quick({}) is not None


def test_refuse_quick_datasets_are_counted_together_and_checked_separately() -> None:
    """Each dataset must agree, however large the others are."""
    few = support_set(ROWS[:20], CLASSES[:20])
    found = agreement(few, few, DecisionSettings(abstain=None))
    assert refuse_quick({"Screws": found, "Coins": found}) is None
    assert pooled({"Screws": found, "Coins": found}).filed == 40
    many = replace(found, references=5000, judged=5000, filed=5000, same=5000, cosines=5000.0)
    said = refuse_quick({"Screws": many, "Coins": replace(found, same=19)})
    assert said is not None
    assert "filed references of Coins get another label" in said


def test_agreement_of_other_references_raises() -> None:
    """A file may change between the two runs."""
    with pytest.raises(ValueError, match="have different references"):
        agreement(EXACT, replace(EXACT, sources=(*EXACT.sources[:-1], "another.png")), DecisionSettings())


def compared(filed: int, different: int = 0, *, cosine: float = 0.999) -> dict[str, Agreement]:
    """The agreement on so many filed references of one dataset, and half as many others."""
    return {
        "Screws": replace(
            pooled({}), references=2 * filed, judged=2 * filed, filed=filed, same=filed - different,
            cosines=2 * filed * cosine,
        )
    }  # fmt: skip


def test_is_settled_equal_labels_of_many_references() -> None:
    """With fewer, or with one difference, more references are compared."""
    assert is_settled(compared(FILED_TO_SETTLE), largest=1000)
    assert not is_settled(compared(FILED_TO_SETTLE - 1), largest=1000)
    assert not is_settled(compared(FILED_TO_SETTLE, 1), largest=1000)
    assert not is_settled({}, largest=1000)


def test_is_settled_refusal_that_no_more_references_change() -> None:
    """The rows differ, or more labels than may differ among all."""
    assert is_settled(compared(50, cosine=0.98), largest=1000)
    assert is_settled(compared(50, cosine=float("nan")), largest=1000)
    assert is_settled(compared(50, 11), largest=1000)
    assert not is_settled(compared(50, 5), largest=1000)
    assert refuse_quick(compared(50, 5)) is not None


def test_is_settled_one_dataset_differs_is_not_settled() -> None:
    """However many the others are."""
    both = {"Coins": compared(50, 2)["Screws"], **compared(2 * FILED_TO_SETTLE)}
    assert not is_settled(both, largest=1000)
