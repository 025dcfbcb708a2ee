"""Checks of the calibration: what the library can honour of the wanted settings, from the last prototypes, no model."""

from collections.abc import Iterator

from sortd.classify.prototypes import PrototypeSet
from sortd.commands.console import counted
from sortd.commands.finding import Finding, Topic, note, warning
from sortd.commands.stored import SETTINGS, settings_differ
from sortd.config import DatasetConfig
from sortd.layout import Area, Layout

LOW_SHARE_FILED = 0.5
"""A sorter that sends more than this to review is not used."""

TO_LEARN = "sortd eval tells it now; a sortd that runs, or starts, learns it by itself"


def calibration_findings(
    layout: Layout, config: DatasetConfig, prototypes: PrototypeSet | None, *, changed: str | None = None
) -> Iterator[Finding]:
    """Tell what was found out about the settings when the dataset was learnt last.

    Args:
        layout: the dataset.
        config: its settings, as they are now.
        prototypes: what was learnt last, by a sortd that serves or by ``sortd eval``; None: nothing ever was.
        changed: what is other than it was then: what was found out holds no longer.
    """
    if prototypes is None:
        what = "was not learnt yet, so what its references can honour is not known"
        yield note(Topic.CALIBRATION, layout.root, what, TO_LEARN)
        return
    facts, clases = prototypes.calibration, layout.area(Area.CLASES)
    by = f"generation {prototypes.generation}" if prototypes.generation else "the last `sortd eval`"
    if changed is None and settings_differ(config, prototypes):
        changed = SETTINGS
    if changed is not None:
        what = f"the {changed} have changed since {by}, so what can be honoured is not known"
        yield note(Topic.CALIBRATION, layout.root, what, TO_LEARN)
        return
    for sentence in facts.notes:
        yield warning(Topic.CALIBRATION, clases, sentence, "add references, or ask for less (`abstain` in config.yaml)")
    made = f"{by}, judged on {counted(facts.held_out, 'reference')} left out in turn: "
    if not facts.held_out:
        what = f"{by}: no class has two images that differ, so its accuracy is not known"
        yield note(Topic.CALIBRATION, clases, what, "add references")
    elif prototypes.settings.abstain is None:
        yield note(Topic.CALIBRATION, clases, f"{made}{facts.accuracy or 0.0:.1%} are right; every image is filed")
    elif facts.filed_expected is not None:
        right = "" if facts.precision_expected is None else f", {facts.precision_expected:.1%} of them right"
        yield note(Topic.CALIBRATION, clases, f"{made}{facts.filed_expected:.0%} of known images would be filed{right}")
        if facts.filed_expected < LOW_SHARE_FILED:
            what = f"only {facts.filed_expected:.0%} of known images would be filed, the others go to Review/"
            mend = "add references (sortd eval says of which classes), or lower `abstain.precision`"
            yield warning(Topic.CALIBRATION, clases, what, mend)
