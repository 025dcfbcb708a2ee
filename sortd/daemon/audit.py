"""What checked images say of the threshold, and the answers of an audit as a request carries them."""

from collections.abc import Sequence

from sortd.classify.types import BLENDED, ENOUGH_CHECKED, Evidence
from sortd.events import Mode
from sortd.store.checks import CheckedImage
from sortd.store.history import History

NEWEST = 2000
"""The images, of those that a person has checked, that decide the threshold: older ones say less about new ones."""


def evidence_of(history: History, mode: Mode) -> Evidence | None:
    """Return the checked images that the threshold of a mode follows; None if they are too few.

    Those of random samples are used if they suffice. They were drawn from what nobody had corrected or taken back, so
    that each of them counts for as many images as the filed ones without a correction are per image of the samples.

    Raises:
        JournalError: the journal cannot be read.
    """
    if mode not in BLENDED:
        return None  # the scores of the other modes in the journal are no probabilities
    newest = history.newest_checked(mode.value, NEWEST)
    audited = [one for one in newest if one.is_audited]
    if len(audited) >= ENOUGH_CHECKED:
        acted = [one for one in newest if one.is_acted_on and not one.is_audited]
        filed = max(history.counts().get("filed", 0), len(audited) + len(acted))
        weights = [(filed - len(acted)) / filed] * len(audited) + [len(audited) / filed] * len(acted)
        return _evidence([*audited, *acted], weights, is_random=True)
    if len(newest) >= ENOUGH_CHECKED:
        return _evidence(newest, [1.0] * len(newest), is_random=False)
    return None


def _evidence(images: Sequence[CheckedImage], weights: Sequence[float], *, is_random: bool) -> Evidence:
    confidence, right = [one.score for one in images], [one.is_right for one in images]
    return Evidence(tuple(confidence), tuple(right), tuple(weights), is_random=is_random)


def checked_answers(answers: Sequence[object]) -> list[tuple[int, bool]]:
    """Return the numbers of moves, and whether each image is right, from a request; raise ValueError if invalid."""
    found = []
    for answer in answers:
        match answer:
            case [int(move), bool(is_right)] if 0 < move < 1 << 63:
                found.append((move, is_right))
            case _:
                raise ValueError(f"{answer!r:.100} is not the number of a move and whether its image is right")
    return found
