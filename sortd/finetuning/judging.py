"""Judging: a trained network is averaged, calibrated, held beside the prototypes, and written down."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sortd import __version__
from sortd.finetuned import FinetunedFacts, probabilities_of
from sortd.finetuning.averaging import choose_share
from sortd.finetuning.base import Base
from sortd.finetuning.measures import Judged, confusion, per_class
from sortd.finetuning.network import Network
from sortd.finetuning.plan import Plan, lesson_of, read_pixels, writing
from sortd.finetuning.result import write_story, write_weights
from sortd.finetuning.start import logits_of_all, temperature_of
from sortd.finetuning.training import Trained, score_of
from sortd.finetuning.verdict import compare

if TYPE_CHECKING:
    import torch


def judge_and_write(
    network: Network,
    base: Base,
    start: "Mapping[str, torch.Tensor]",
    plan: Plan,
    work: Path,
    trained: Trained,
    *,
    seconds: float,
) -> Path:
    """Average, calibrate and compare a trained network; write it all into a folder in the work folder, and return it.

    Args:
        network: with the best weights of its training.
        base: what it was made from.
        start: the weights before training.
        plan: of the training.
        work: where the plan lies.
        trained: what the training told.
        seconds: what it took.

    Raises:
        DestinationError: the disk is full, or not to be written.
    """
    validation, test = (lesson_of(plan, work, part) for part in ("validation", "test"))
    share, shares = choose_share(
        network.module,
        start,
        logits=lambda: logits_of_all(network, validation.pixels),
        score=lambda logits: score_of(logits, validation.classes)["score"],
    )
    held = logits_of_all(network, validation.pixels)
    temperature = temperature_of(held, validation.classes)
    known = probabilities_of(logits_of_all(network, test.pixels), temperature)
    odd = probabilities_of(logits_of_all(network, read_pixels(plan, work, "strangers")), temperature)
    challenger = Judged("finetuned", known, odd.max(axis=1, initial=0.0))
    seen = np.concatenate([probabilities_of(held, temperature), known])
    classes = np.concatenate([validation.classes, test.classes])
    metrics = {
        **_described(plan, per_class(challenger.best, test.classes, plan.labels)),
        "best_step": trained.best_step,
        "share": share,
        "shares": shares,
        "temperature": temperature,
        "validation": score_of(held, validation.classes),
        "comparison": compare(plan.champions, challenger, test.classes, plan.labels),
        "seconds": round(seconds, 1),
        "log": trained.log,
    }
    beside = work / "result"
    with writing(work):
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
    write_weights(beside, network.module, base.config, base.processor)
    facts = FinetunedFacts(
        folder=beside,
        dataset=plan.dataset,
        labels=plan.labels,
        temperature=temperature,
        base=plan.base,
        model_id="",  # it follows from what is written
        preprocessing=plan.preprocessing,
        decoding=plan.decoding,
        created=plan.created,
        confidence=seen.max(axis=1),
        is_right=seen.argmax(axis=1) == classes,
        classes=classes,
        metrics=metrics,
    )
    write_story(facts, trained.log, confusion(challenger.best, test.classes, len(plan.labels)))
    return beside


def _described(plan: Plan, judged: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what metrics tell of a plan, each class with how it was judged."""
    shown = ("precision", "recall", "f1")
    classes = [
        {**held, **{key: found[key] for key in shown}} for held, found in zip(plan.data["classes"], judged, strict=True)
    ]
    epochs = plan.recipe.passes(len(plan.classes["train"]), together=plan.recipe.batch_size)
    return {
        "version": __version__,
        "dataset": plan.dataset,
        "created": plan.created,
        "base": plan.base,
        "labels": list(plan.labels),
        "recipe": {**asdict(plan.recipe), "epochs": epochs},
        "extra": list(plan.extra),
        "data": {key: value for key, value in plan.data.items() if key not in {"classes", "left_out"}},
        "left_out": plan.data["left_out"],
        "classes": classes,
    }
