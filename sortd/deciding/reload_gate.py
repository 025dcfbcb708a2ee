"""The reload gate: a rebuild that decides much worse than the generation in service does not replace it."""

import numpy as np

from sortd.deciding.prototype_set import PrototypeSet

MOST_LOST = 0.10
"""Leave-one-out accuracy, on the classes that both share, that a rebuild may lose."""
STANDARD_ERRORS = 2.0
"""A loss must also be this many standard errors large: four references more or less are no proof."""
ABSTENTIONS = 2.0
"""Times as many abstentions as before are too many,"""
MORE_ABSTENTIONS = 0.10
"""if they are this much more of all known images, too."""


def refuse_reload(old: PrototypeSet, new: PrototypeSet) -> str | None:
    """Return why the old generation should stay, as a sentence, or None if the new one may serve.

    Classes that went away or came are not held against the new generation: what the user did is obeyed. With another
    encoder or other settings there is nothing to compare, for that was asked for.
    """
    if old.encoder_id != new.encoder_id or old.settings != new.settings:
        return None
    return _worse_accuracy(old, new) or _more_abstentions(old, new)


def shared_recalls(old: PrototypeSet, new: PrototypeSet) -> list[tuple[str, float, float]]:
    """Return (label, recall before, recall now) of the classes that both generations could judge."""
    now = dict(zip(new.labels, new.recall.tolist(), strict=True))
    then = zip(old.labels, old.recall.tolist(), strict=True)
    pairs = [(label, before, now.get(label, np.nan)) for label, before in then]
    return [pair for pair in pairs if np.isfinite(pair[1]) and np.isfinite(pair[2])]


def _worse_accuracy(old: PrototypeSet, new: PrototypeSet) -> str | None:
    shared = shared_recalls(old, new)
    if not shared:
        return None
    before = float(np.mean([pair[1] for pair in shared]))
    now = float(np.mean([pair[2] for pair in shared]))
    judged = {label for label, _, _ in shared}
    sizes = [
        sum(int(count) for label, count in zip(one.labels, one.counts, strict=True) if label in judged)
        for one in (old, new)
    ]
    error = float(np.sqrt(sum(0.25 / max(size, 1) for size in sizes)))
    if before - now <= max(MOST_LOST, STANDARD_ERRORS * error):
        return None
    worst = max(shared, key=lambda pair: pair[1] - pair[2])
    return (
        f"the new references decide {now:.0%} of their own images right, left out one by one, where the old ones"
        f" decided {before:.0%} on the same classes; {worst[0]!r} fell from {worst[1]:.0%} to {worst[2]:.0%}"
    )


def _more_abstentions(old: PrototypeSet, new: PrototypeSet) -> str | None:
    if old.calibration.filed_expected is None or new.calibration.filed_expected is None:
        return None
    before, now = 1.0 - old.calibration.filed_expected, 1.0 - new.calibration.filed_expected
    if now <= ABSTENTIONS * before or now - before <= MORE_ABSTENTIONS:
        return None
    return f"the new references would send {now:.0%} of known images to review, where the old ones sent {before:.0%}"
