"""The command ``models export``: exports the model to ONNX and compares int8 with float32 on the user's references.

Both precisions embed the references of all datasets (a sample, if there are many), and ``classify.held_out`` compares
the decisions. The verdict is stored with the export; the daemon only reads it.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np

from sortd.classify.held_out import LEAST_COSINE, agreement, agreement_figures, refuse_quick
from sortd.classify.types import SupportSet
from sortd.commands.console import counted
from sortd.commands.examination import settings_with_corrections
from sortd.config import Config
from sortd.daemon.references import STRANGERS_FOLDER, ClassFolder, References, ReferencesAbsentError
from sortd.daemon.resources import Resources
from sortd.encoder.export import CALIBRATION_IMAGES, Progress, make_exports
from sortd.encoder.models import locate_configured
from sortd.encoder.onnx_encoder import Exports, OnnxEncoder, Precision, write_verdict
from sortd.encoder.quantize import photographic_noise
from sortd.errors import LayoutError, ModelError, SortdError
from sortd.layout import Area, Layout, find_datasets

MAX_REFERENCES = 1000  # that are compared; with so many, a share of 0.99 has a standard error of 0.003
MAX_PER_CLASS = 20  # of these; a sample of few classes would make the comparison too easy


def export(config: Config, *, on_progress: Progress = lambda _: None) -> None:
    """Export the configured model unless a valid export exists, and compare int8 with float32 on all references.

    Raises:
        ModelError: it cannot be exported, or the verdict cannot be written.
    """
    made = make_exports(locate_configured(config), on_progress=on_progress)
    if Precision.INT8 in made.precisions:
        facts = judge_int8(config, made, on_progress)
        try:
            write_verdict(made, config.root, facts)
        except OSError as error:
            raise ModelError(f"cannot write the verdict on int8 to {error.filename}: {error.strerror}") from error


def judge_int8(config: Config, exported: Exports, on_progress: Progress) -> dict[str, Any]:
    """Compare int8 with float32; return whether it may be used, and the figures, as plain values."""
    layouts: list[Layout] = []
    with suppress(LayoutError):  # without a root there are no references
        layouts = find_datasets(config.root)
    parts, refusal, probes = {}, None, None
    try:
        exact, exact_probes = _embed(config, exported, Precision.FP32, layouts, on_progress)
        fast, fast_probes = _embed(config, exported, Precision.INT8, layouts, on_progress)
        probes = float((exact_probes * fast_probes).sum(axis=1).mean())
        settings = {layout.name: settings_with_corrections(config, layout).settings for layout in layouts}
        parts = {name: agreement(exact[name], fast[name], settings[name]) for name in exact.keys() & fast.keys()}
        refusal = refuse_quick(parts)
        if not probes >= LEAST_COSINE:  # also for NaN
            refusal = f"the rows of synthetic images differ: mean cosine {probes:.4f}, needed {LEAST_COSINE}"
    except (ValueError, OSError, SortdError) as error:  # a reference changed, int8 does not run, a journal is damaged
        refusal = f"it could not be compared with fp32: {error}"
    return {
        "serves": (Precision.FP32 if refusal else Precision.INT8).value,
        "refusal": refusal,
        "probe_cosine": probes,
        **agreement_figures(parts),
    }


def _embed(
    config: Config, exported: Exports, precision: Precision, layouts: Sequence[Layout], on_progress: Progress
) -> tuple[dict[str, SupportSet], Any]:
    """Return the support set of each dataset, and the rows of synthetic images, in one precision."""
    encoder = OnnxEncoder(
        exported,
        precision,
        device="cpu",
        threads=config.threads,
        decoding=config.decoding.jpeg,
    )
    probes = encoder.encode_images(photographic_noise(encoder.preprocessing, CALIBRATION_IMAGES))
    resources = Resources(config, load_encoder=lambda _: encoder)
    supports: dict[str, SupportSet] = {}
    try:
        embedder, _, _ = resources.load()
        for layout in layouts:
            report = _counter(on_progress, f"comparing int8: {layout.name} in {precision}")
            with suppress(ReferencesAbsentError):
                references = References(layout.area(Area.CLASES), choose=sample)
                supports[layout.name], _ = references.support(
                    embedder, settings_with_corrections(config, layout), tell=report
                )
    finally:
        resources.unload()
    return supports, np.asarray(probes)


def _counter(on_progress: Progress, what: str) -> Callable[[int, int], None]:
    return lambda done, total: on_progress(f"{what}, {done} of {counted(total, 'reference')}")


def sample(folders: Sequence[ClassFolder]) -> list[ClassFolder]:
    """Return the classes and references to compare: all of a small library, an even sample of a large one.

    Images that belong to no class are left out, since they have no label to compare.
    """
    known = [folder for folder in folders if folder.label != STRANGERS_FOLDER]
    if sum(len(folder.files) for folder in known) <= MAX_REFERENCES:
        return known
    fewer = [replace(folder, files=tuple(_every_nth(folder.files, MAX_PER_CLASS))) for folder in known]
    size = sum(len(folder.files) for folder in fewer)
    return list(_every_nth(fewer, max(2, len(fewer) * MAX_REFERENCES // max(size, MAX_REFERENCES))))


def _every_nth(items: Sequence[Any], most: int) -> Sequence[Any]:
    return items if len(items) <= most else [items[index * len(items) // most] for index in range(most)]
