"""Checks of the calibration: what the library can honour of the wanted settings, from the last prototypes, no model."""

from collections.abc import Iterator

from sortd.commands.console import counted
from sortd.commands.finding import Finding, Topic, note, warning
from sortd.config import DatasetConfig
from sortd.layout import Area, Layout
from sortd.prototypes import PrototypeSet

LOW_SHARE_FILED = 0.5
"""A sorter that sends more than this to review is not used."""


def calibration_findings(layout: Layout, config: DatasetConfig, prototypes: PrototypeSet | None) -> Iterator[Finding]:
    """Tell what the last rebuild found out about the settings.

    Args:
        layout: the dataset.
        config: its settings, as they are now.
        prototypes: what it was served with last; None: it never was.
    """
    if prototypes is None:
        what = "was not learnt yet: what its references can honour is known after the first run"
        yield note(Topic.CALIBRATION, layout.root, what, "sortd once, or sortd eval")
        return
    facts, clases = prototypes.calibration, layout.area(Area.CLASES)
    for sentence in facts.notes:
        yield warning(Topic.CALIBRATION, clases, sentence, "add references, or ask for less (`abstain` in config.yaml)")
    made = f"generation {prototypes.generation}, judged on {counted(facts.held_out, 'reference')} left out in turn: "
    if not facts.held_out:
        what = f"generation {prototypes.generation}: no class has two images that differ, so its accuracy is not known"
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
    if _differs(config, prototypes):
        what = "was last learnt under other settings (mode or abstain); what is said of it holds for those"
        yield note(Topic.CALIBRATION, layout.root, what, "start or reload sortd")


def _differs(config: DatasetConfig, prototypes: PrototypeSet) -> bool:
    """Tell whether the settings have changed since."""
    then, now = prototypes.settings.abstain, config.abstain
    asked = None if now is None else (now.precision, now.strangers)
    return (config.mode, asked) != (
        prototypes.settings.mode.value,
        None if then is None else (then.precision, then.strangers),
    )
