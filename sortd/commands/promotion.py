"""Promotion and demotion of fine-tuned models, and the classifier in use."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sortd.commands.status import accuracy_comparison, dataset_named, result_facts
from sortd.config import Config
from sortd.daemon.control import AnsweredError, ask
from sortd.daemon.references import ReferencesAbsentError, class_labels
from sortd.daemon.resources import unfit
from sortd.encoder import finetuned
from sortd.encoder.finetuned import finetuning_results, read_facts
from sortd.errors import DataError, StartupError
from sortd.layout import Area, Layout


def promote(
    config: Config, dataset: str | None, folder: Path | None, *, force: bool, clock: Callable[[], float] = time.time
) -> dict[str, Any]:
    """Promote a fine-tuned model, notify the running sortd, and return the outcome as plain values.

    Args:
        config: the configuration.
        dataset: None: the only one.
        folder: result folder; None: the newest one of the dataset.
        force: promote also a model that is weaker than the prototypes.
        clock: returns seconds since the epoch.

    Raises:
        DataError: there is no such dataset or result, or the model has other classes or is weaker.
        ModelError: the result folder is invalid.
        DestinationError: the state folder cannot be written.
    """
    layout = dataset_named(config, dataset)
    state_folder = layout.state_folder(config.state_dir)
    found = finetuning_results(state_folder) if folder is None else [folder.absolute()]
    if not found:
        raise DataError(
            f"{layout.name} has no fine-tuned model in {state_folder}: run `sortd finetune {layout.name}`, or give the "
            "folder of a model"
        )
    facts = read_facts(found[0])
    try:
        refusal = unfit(facts, class_labels(layout.area(Area.CLASES)), dataset=layout.name)
    except ReferencesAbsentError as error:
        raise DataError(f"{error}: the classes of the model cannot be checked; is the disk mounted?") from error
    if refusal is not None:
        raise DataError(refusal)
    if facts.verdict == "weaker" and not force:
        raise DataError(
            f"{facts.folder} is weaker than the prototypes on images that neither had seen "
            f"({accuracy_comparison(facts)}): fine-tune with more images, or promote it all the same with --force"
        )
    promotion = finetuned.Promotion(facts.folder, facts.model_id, facts.verdict, clock())
    finetuned.write_promotion(state_folder, promotion)
    wanted = config.dataset(layout.name).classifier
    own = {"dataset": layout.name, "classifier": wanted, "serves": wanted != "prototypes"}
    return {**own, **result_facts(facts), "told": _notify(config, layout)}


def demote(config: Config, dataset: str | None) -> dict[str, Any]:
    """Remove the promotion of a dataset, notify the running sortd, and return the outcome; raise as ``promote``."""
    layout = dataset_named(config, dataset)
    was_promoted = finetuned.remove_promotion(layout.state_folder(config.state_dir))
    told = _notify(config, layout) if was_promoted else None
    return {"dataset": layout.name, "demoted": was_promoted, "told": told}


def _notify(config: Config, layout: Layout) -> str:
    """Request a rebuild from the running sortd, and return the outcome in a sentence."""
    try:
        reply = ask(config.state_dir, {"do": "rebuild", "datasets": [layout.name], "force": False})
    except (AnsweredError, StartupError) as error:  # the next reload or start applies it
        return f"the running sortd did not apply it: {error}"
    if reply is None:
        return "sortd is not running; it will apply this at its next start"
    return "the running sortd applies it; `sortd status` shows the classifier in use"
