"""The verdict on int8: whether it files the references of the datasets as float32 does.

A sample of the references is embedded with both, and ``classify.held_out`` compares the decisions; if the sample does
not settle it, more references are. Rows come from the cache if they are known, and stay in it. The verdict is stored
with the export; the daemon only reads it.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from sortd.classify.held_out import LEAST_COSINE, Agreement, agreement, agreement_figures, is_settled, refuse_quick
from sortd.commands.console import counted
from sortd.commands.moves import datasets_there
from sortd.commands.status import settings_with_corrections
from sortd.config import Config
from sortd.daemon.embedder import Embedder
from sortd.daemon.references import STRANGERS_FOLDER, ClassFolder, References, ReferencesAbsentError
from sortd.daemon.resources import Resources
from sortd.encoder.clip import torch_encoder_id
from sortd.encoder.export import Progress
from sortd.encoder.onnx_encoder import Exports, OnnxEncoder, Precision
from sortd.encoder.quantize import photographic_noise
from sortd.errors import SortdError
from sortd.layout import Area, Layout

FIRST_REFERENCES = 400  # of all datasets together: enough that FILED_TO_SETTLE of them can be filed
MAX_REFERENCES = 1000  # of a dataset; with so many, a share of 0.99 has a standard error of 0.003
MAX_PER_CLASS = 20  # of these; a sample of few classes would make the comparison too easy
PROBES = 16  # synthetic images; the mean of their cosines has a standard error of a quarter of their deviation
TEMPLATES = 2  # for each class name: the mean of more differs less between the precisions, not more
_GOLDEN = 0.6180339887498949


def judge_int8(config: Config, exported: Exports, on_progress: Progress) -> dict[str, Any]:
    """Compare int8 with float32; return whether it may be used, and the figures, as plain values."""
    parts: dict[str, Agreement] = {}
    refusal, probes = None, None
    try:
        exact, quick = (_encoder(config, exported, precision) for precision in Precision)
        noise = photographic_noise(exact.preprocessing, PROBES)
        probes = float((exact.encode_images(noise) * quick.encode_images(noise)).sum(axis=1).mean())
        if probes >= LEAST_COSINE:
            parts = _compare(config, exported, exact, quick, datasets_there(config), on_progress)
            refusal = refuse_quick(parts)
        else:  # also for NaN
            refusal = f"the rows of synthetic images differ: mean cosine {probes:.4f}, needed {LEAST_COSINE}"
    except (ValueError, OSError, SortdError) as error:  # a reference changed, int8 does not run, a journal is damaged
        refusal = f"it could not be compared with fp32: {error}"
    return {
        "serves": (Precision.FP32 if refusal else Precision.INT8).value,
        "refusal": refusal,
        "probe_cosine": probes,
        **agreement_figures(parts),
    }


def _encoder(config: Config, exported: Exports, precision: Precision) -> OnnxEncoder:
    return OnnxEncoder(exported, precision, device="cpu", threads=config.threads, decoding=config.decoding.jpeg)


def _compare(
    config: Config,
    exported: Exports,
    exact: OnnxEncoder,
    quick: OnnxEncoder,
    layouts: Sequence[Layout],
    on_progress: Progress,
) -> dict[str, Agreement]:
    """Return the agreement on each dataset, on few references if they settle the verdict."""
    # Rows of torch are as good as those of the float32 export, which was compared with torch when it was made.
    in_torch = torch_encoder_id(exported.model, exact.dimensions, exact.preprocessing, config.decoding.jpeg)
    compared: dict[str, Agreement] = {}
    with Resources(config, load_encoder=lambda _: quick) as resources:
        by_quick, by_exact = resources.load_beside(exact, equal_ids=(in_torch,))
        for most in (FIRST_REFERENCES // max(1, len(layouts)), MAX_REFERENCES):
            before, compared = compared, {}
            for layout in layouts:
                with suppress(ReferencesAbsentError):
                    what, choose = f"comparing int8: {layout.name}", partial(sample, most=most)
                    report = partial(_report, on_progress, what)
                    known = before.get(layout.name)
                    compared[layout.name] = _agreement(config, layout, by_quick, by_exact, choose, report, known)
            if is_settled(compared, largest=MAX_REFERENCES) or compared == before:
                break
    return compared


def _agreement(
    config: Config,
    layout: Layout,
    by_quick: Embedder,
    by_exact: Embedder,
    choose: Callable[[Sequence[ClassFolder]], Sequence[ClassFolder]],
    report: Callable[[int, int], None],
    before: Agreement | None,
) -> Agreement:
    """Return the agreement on the chosen references of a dataset; ``before`` if that was on as many.

    Raises ReferencesAbsentError: there are none.
    """
    settings = settings_with_corrections(config, layout)
    brief = replace(settings, templates=settings.templates[:TEMPLATES])
    references = References(layout.area(Area.CLASES), choose=choose)
    fast, _ = references.support(by_quick, brief, tell=report)
    if before is not None and len(fast.sources) == before.references:
        return before
    accurate, _ = references.support(by_exact, brief)  # from the cache: both were encoded when an image was decoded
    return agreement(accurate, fast, settings.settings)


def _report(on_progress: Progress, what: str, done: int, total: int) -> None:
    on_progress(f"{what}, {done} of {counted(total, 'reference')}")


def sample(folders: Sequence[ClassFolder], *, most: int = MAX_REFERENCES) -> list[ClassFolder]:
    """Return the classes and references to compare: all of a small library, an even sample of a large one.

    A smaller sample is a part of a larger one, so that nothing is encoded in vain. Images that belong to no class are
    left out, since they have no label to compare.
    """
    known = [folder for folder in folders if folder.label != STRANGERS_FOLDER]
    if sum(len(folder.files) for folder in known) <= most:
        return known
    fewer = [replace(folder, files=tuple(_evenly(folder.files, MAX_PER_CLASS))) for folder in known]
    size = sum(len(folder.files) for folder in fewer)
    return list(_evenly(fewer, max(2, len(fewer) * most // max(size, most))))


def _evenly(items: Sequence[Any], most: int) -> list[Any]:
    """Return some items, evenly chosen; those of a smaller number are among those of a larger one."""
    order = sorted(range(len(items)), key=lambda index: index * _GOLDEN % 1.0)
    return [items[index] for index in sorted(order[:most])]
