"""The preparation of a fine-tuning: photos are found, split, judged by the prototypes, and decoded for training."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from sortd.config import Config
from sortd.daemon.resources import Site
from sortd.decoding.decoders import DecodedImage, DecoderPool
from sortd.encoder import Encoder
from sortd.errors import DataError
from sortd.events import Preprocessing, Stamp
from sortd.finetuning.base import find_base, load_base
from sortd.finetuning.champion import embed_names, judge_by_prototypes
from sortd.finetuning.groups import near_duplicate_groups
from sortd.finetuning.photos import PLACED, Photos, Source, find_candidates, gather
from sortd.finetuning.plan import Plan, pixels_file, write_plan, writing
from sortd.finetuning.recipe import Recipe
from sortd.finetuning.split import Split, split_by_group
from sortd.images import Limits
from sortd.layout import Area, Layout
from sortd.references import class_labels

LARGER = 1.25
"""Training images are kept so much larger than what the network sees, so that a crop of them is no blur."""
FEWEST_JUDGES = 30
"""With fewer test images a difference of ten points is chance."""

LoadEncoder = Callable[[Config], Encoder]


@dataclass(frozen=True, slots=True)
class Order:
    """What ``sortd finetune`` was asked for."""

    layout: Layout
    source: Source = Source.CLASES
    base: str = "auto"
    side: int | None = None
    recipe: Recipe = field(default_factory=Recipe)
    extra: tuple[str, ...] = ()


def prepare(
    order: Order,
    config: Config,
    work: Path,
    *,
    created: str,
    load_encoder: LoadEncoder | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Plan:
    """Do everything that comes before training, and write it to the work folder.

    Args:
        order: what was asked for.
        config: where everything is, and the encoder of the prototypes.
        work: an empty folder.
        created: when, ISO 8601.
        load_encoder: stands in for the configured model.
        tell: told what is done.

    Raises:
        DataError: the dataset cannot be trained on.
        ModelError: the encoder or the base cannot be had.
        DestinationError: the disk is full.
    """
    layout, recipe = order.layout, order.recipe
    find_base(order.base, cache_dir=config.cache_dir)  # a missing one is to be told of before minutes of reading
    known, strangers = find_candidates(layout, order.source, config.state_dir)
    site = Site(config, load_encoder=load_encoder)
    try:
        embedder, _, _ = site.load()
        photos = gather(known, strangers, embedder)
        tell("reading the photos")
        split = split_photos(photos, recipe)
        named = embed_names(layout, photos.labels, config.dataset(layout.name).prompts, embedder)
        champions = judge_by_prototypes(photos, split, named, embedder.encoder.encoder_id)
    finally:
        site.unload()
    tell("judging by the prototypes")
    base = load_base(order.base, photos.labels, cache_dir=config.cache_dir, side=order.side)
    plan = Plan(
        dataset=layout.name,
        labels=photos.labels,
        base=base.name,
        side=order.side,
        recipe=replace(recipe, learning_rate=recipe.learning_rate or base.learning_rate),
        extra=order.extra,
        created=created,
        decoding=config.decoding.jpeg,
        preprocessing=base.preprocessing,
        source=enlarged(base.preprocessing),
        data=_described(photos, split, layout, order),
        classes={
            "train": photos.classes[split.train],
            "validation": photos.classes[split.validation],
            "test": photos.classes[split.test],
        },
        weights=photos.weights[split.train].astype(np.float32),
        champions=tuple(champions),
    )
    chosen = {part: [photos.files[at] for at in getattr(split, part)] for part in ("train", "validation", "test")}
    for part, files in {**chosen, "strangers": list(photos.stranger_files)}.items():
        _decode(files, plan.size_of(part), config, pixels_file(work, part))
    tell("decoding the photos")
    write_plan(plan, work)
    return plan


def split_photos(photos: Photos, recipe: Recipe) -> Split:
    """Return the split of photos, near-duplicates on one side.

    Raises:
        DataError: too few to judge anything by.
    """
    groups = near_duplicate_groups(photos.embeddings, photos.classes)
    may_judge = photos.weights == PLACED
    shares = {"test": recipe.test, "validation": recipe.validation}
    split = split_by_group(photos.classes, groups, may_judge, **shares, seed=recipe.seed)
    for part in ("test", "validation"):
        own = photos.classes[getattr(split, part)]
        if len(np.unique(own)) < 2:  # noqa: PLR2004 - of one class alone nothing can be confused
            few = ", ".join(f"{label} {number}" for label, number in photos.counts.items())
            raise DataError(
                f"too few images that differ and that a person placed to hold some back for {part} ({few}): "
                "fine-tuning needs three or more of two classes at least; with so few, the prototypes decide better"
            )
    return split


def enlarged(seen: Preprocessing) -> Preprocessing:
    """Return the size at which training images are kept."""
    edge, height, width = (round(LARGER * side) for side in (seen.shortest_edge, seen.crop_height, seen.crop_width))
    return replace(seen, shortest_edge=max(edge, height, width), crop_height=height, crop_width=width)


def _decode(files: Sequence[tuple[str, Stamp]], size: Preprocessing, config: Config, target: Path) -> None:
    """Decode files into one file of pixels, in their order.

    Raises:
        DataError: a file that could be read before cannot be any more.
        DestinationError: the disk is full.
    """
    said = config.decoding
    limits = Limits(max_pixels=said.max_pixels, max_side=said.max_side_pixels, max_bytes=said.max_bytes)
    workers = said.workers or max(1, min(8, os.cpu_count() or 1))
    places = {file: index for index, file in enumerate(files)}
    each = size.crop_height * size.crop_width * 3
    with writing(target.parent), open(target, "wb") as file:
        if not files:
            return
        with DecoderPool(workers, size, limits, timeout_seconds=said.timeout_seconds, jpeg=said.jpeg) as pool:
            for answer in pool.decode_all(files):
                if not isinstance(answer, DecodedImage):
                    raise DataError(f"{answer.path} cannot be read any more: {answer.message}; run it again")
                file.seek(places[answer.path, answer.stamp] * each)
                file.write(answer.pixels.tobytes())


def _described(photos: Photos, split: Split, layout: Layout, order: Order) -> dict[str, Any]:
    """Return what the result tells of its data, with what the user should know before believing it."""
    parts = {
        part: np.bincount(photos.classes[getattr(split, part)], minlength=len(photos.labels))
        for part in ("train", "validation", "test")
    }
    rows = [
        {"label": label, "images": number, **{part: int(held[index]) for part, held in parts.items()}}
        for index, (label, number) in enumerate(photos.counts.items())
    ]
    return {
        "source": order.source.value,
        "images": len(photos.files),
        "filed": int((photos.weights != PLACED).sum()),
        "strangers": len(photos.stranger_files),
        "classes": rows,
        "left_out": [{"path": one.path, "why": one.why} for one in photos.left_out],
        "notes": _notes(rows, layout, photos, len(split.test)),
    }


def _notes(rows: Sequence[dict[str, Any]], layout: Layout, photos: Photos, test: int) -> list[str]:
    notes = []
    unjudged = [str(row["label"]) for row in rows if not row["test"]]
    if unjudged:
        notes.append(f"trained on but judged by nothing, having too few images that differ: {', '.join(unjudged)}")
    taught = set(class_labels(layout.area(Area.CLASES)))
    nameless, foreign = sorted(taught - set(photos.labels)), sorted(set(photos.labels) - taught)
    if nameless:
        notes.append(
            "without an image, so the model does not know them and sortd will not take it while their folders are "
            f"there: {', '.join(nameless)}"
        )
    if foreign:
        notes.append(f"not in Clases/, so sortd will not take the model before they are: {', '.join(foreign)}")
    if test < FEWEST_JUDGES:
        notes.append(f"only {test} test images: the figures are rough")
    return notes
