"""The command ``models export``: the model is written for ONNX Runtime, and int8 is held against float32, once.

The references of all datasets (an even sample of many) are embedded in both precisions and compared as
``deciding/agreement.py`` says. The verdict is kept beside the export; the daemon reads it and judges nothing.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from sortd.classify.held_out import LEAST_COSINE, agreement, agreement_figures, refuse_quick
from sortd.classify.types import SupportSet
from sortd.commands.console import counted
from sortd.commands.examination import taught
from sortd.config import Config
from sortd.daemon.resources import Resources
from sortd.encoder.backends import located
from sortd.encoder.export import CALIBRATION_IMAGES, make
from sortd.encoder.onnx_encoder import Exports, OnnxEncoder, Precision, write_verdict
from sortd.encoder.quantize import photographic_noise
from sortd.errors import LayoutError, ModelError
from sortd.layout import Area, Layout, find_datasets
from sortd.references import STRANGERS_FOLDER, ClassFolder, References, ReferencesAbsentError

LARGEST_SAMPLE = 1000
"""References that are compared: with so many, a share of 0.99 is known to 0.003."""
LARGEST_CLASS = 20
"""Of these, from one class: a comparison within few classes would be an easier one than what sortd does."""

Tell = Callable[[str], None]
Answer = tuple[dict[str, SupportSet], Any]


def export(config: Config, *, tell: Tell = lambda _: None) -> None:
    """Export the configured model unless a sound export stands, and compare int8 with fp32 by the references at hand.

    Args:
        config: the model, and where the datasets are.
        tell: hears in a few words what is under way.

    Raises:
        ModelError: it cannot be exported here.
        StorageError: the verdict cannot be written down.
    """
    model, words = located(config)
    made = make(model, words, cache_dir=config.cache_dir, tell=tell)
    if Precision.INT8 in made.precisions:
        facts = compare_precisions(config, made, tell)
        try:
            write_verdict(made, config.root, facts)
        except OSError as error:
            raise ModelError(f"{error.filename}: {error.strerror}; the verdict on int8 cannot be kept there") from error


def compare_precisions(config: Config, exported: Exports, tell: Tell) -> dict[str, Any]:
    """Hold int8 against float32; return whether it may serve, and the figures, as plain values."""
    layouts: list[Layout] = []
    with suppress(LayoutError):  # the root is not there: there is no reference
        layouts = find_datasets(config.root)
    parts, refusal, probes = {}, None, None
    try:
        exact, exact_probes = _answers(config, exported, Precision.FP32, layouts, tell)
        quick, quick_probes = _answers(config, exported, Precision.INT8, layouts, tell)
        probes = float((exact_probes * quick_probes).sum(axis=1).mean())
        settings = {layout.name: taught(config, layout).settings for layout in layouts}
        parts = {name: agreement(exact[name], quick[name], settings[name]) for name in exact.keys() & quick.keys()}
        refusal = refuse_quick(parts)
        if not probes >= LEAST_COSINE:  # no number is not enough either
            refusal = f"its rows of made-up images moved too far: mean cosine {probes:.4f}, needed {LEAST_COSINE}"
    except (ValueError, OSError, ModelError) as error:  # a reference changed meanwhile, or int8 does not run
        refusal = f"it could not be held against fp32: {error}"
    return {
        "serves": (Precision.FP32 if refusal else Precision.INT8).value,
        "refusal": refusal,
        "probe_cosine": probes,
        **agreement_figures(parts),
    }


def _answers(config: Config, exported: Exports, precision: Precision, layouts: Sequence[Layout], tell: Tell) -> Answer:
    """Return the support set of each dataset, and the rows of made-up images, in one precision."""
    encoder = OnnxEncoder(
        exported,
        precision,
        device="cpu",
        cache_dir=config.cache_dir,
        threads=config.threads,
        decoding=config.decoding.jpeg,
    )
    probes = encoder.encode_images(photographic_noise(encoder.preprocessing, CALIBRATION_IMAGES))
    site = Resources(config, load_encoder=lambda _: encoder)
    supports: dict[str, SupportSet] = {}
    try:
        embedder, _, _ = site.load()
        for layout in layouts:
            hear = partial(_tell_progress, tell, f"judging int8: {layout.name} in {precision}")
            with suppress(ReferencesAbsentError):
                references = References(layout.area(Area.CLASES), choose=sample)
                supports[layout.name], _ = references.support(embedder, taught(config, layout), tell=hear)
    finally:
        site.unload()
    return supports, np.asarray(probes)


def _tell_progress(tell: Tell, what: str, done: int, total: int) -> None:
    tell(f"{what}, {done} of {counted(total, 'reference')}")


def sample(folders: Sequence[ClassFolder]) -> list[ClassFolder]:
    """Return classes and references to compare: all of a small library, an even choice of a large one.

    Examples of what belongs to no class are left out, for they have no label to agree on.
    """
    known = [folder for folder in folders if folder.label != STRANGERS_FOLDER]
    if sum(len(folder.files) for folder in known) <= LARGEST_SAMPLE:
        return known
    fewer = [replace(folder, files=tuple(_evenly(folder.files, LARGEST_CLASS))) for folder in known]
    size = sum(len(folder.files) for folder in fewer)
    return list(_evenly(fewer, max(2, len(fewer) * LARGEST_SAMPLE // max(size, LARGEST_SAMPLE))))


def _evenly(items: Sequence[Any], most: int) -> Sequence[Any]:
    if len(items) <= most:
        return items
    return [items[index * len(items) // most] for index in range(most)]
