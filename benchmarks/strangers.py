"""Measure in per cent how many strangers are filed by default, and how well each familiarity score detects them.

    python -m benchmarks.strangers [--photos FOLDER...] [--features FILE.npz...] [--references 3 6 16] [--draws 2]

In folders of photos every class in turn is left out: its images are near strangers, those of the other folders far
ones. Of the files of features (see benchmarks/decisions.py) small libraries are drawn, of 4, 10 and 30 classes; near
strangers are of a third as many other classes of the same file, far ones of the other files. Photos are embedded by the
packaged model and filed with ``precision`` as given, since at 0.95 it is sure of few of them; features with 0.95.

AUROC: how often a known image that is recognised looks more familiar than a near stranger, by each respect alone,
whether it is sure enough to be filed or not.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.decisions import Features, read, support_of
from benchmarks.harness import argument_parser, print_json
from benchmarks.photos import embed_folder
from sortd.classify.build import build
from sortd.classify.decide import decide, open_set_scores, score_batch
from sortd.classify.open_set import log_odds
from sortd.classify.prototypes import PrototypeSet
from sortd.classify.types import AbstainSettings, DecisionSettings, SupportSet
from sortd.encoder.backends import load_model
from sortd.encoder.clip import Encoder
from sortd.events import Assigned

Array = npt.NDArray[np.float64]
Rows = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

CLASSES = (4, 10, 30)
SURE = 0.95
EVERY = 7
"""Every n-th far stranger is used, since there are many."""
MOST = 600
"""Queries of one kind that a library of features decides."""


@dataclass(frozen=True, eq=False)
class World:
    """A library, what belongs to it, and what does not."""

    name: str
    support: SupportSet
    precision: float
    queries: Rows
    labels: IntArray
    near: Rows
    far: Rows


def photo_worlds(
    encoder: Encoder, folders: list[Path], references: list[int], draws: int, precision: float
) -> Iterator[World]:
    """Yield each folder with each of its classes left out; folders of two classes only lend far strangers."""
    embedded = [embed_folder(encoder, folder) for folder in folders]
    for features in embedded:
        name, rows, classes = features.name, features.pool, features.pool_labels
        others = [other.pool for other in embedded if other.name != name]
        far = np.concatenate(others)[::EVERY] if others else rows[:0]
        for count in references:
            for seed in range(draws if features.classes > 2 else 0):
                dice = np.random.default_rng([seed, count])
                drawn = [dice.permutation(np.flatnonzero(classes == each))[:count] for each in range(features.classes)]
                rest = np.setdiff1d(np.arange(len(rows)), np.concatenate(drawn))
                for left_out in range(features.classes):
                    known = np.delete(np.arange(features.classes), left_out)
                    asked = rest[classes[rest] != left_out]
                    yield World(
                        name=f"{name}, {count} references",
                        support=support_of(features, np.concatenate(drawn), known),
                        precision=precision,
                        queries=rows[asked],
                        labels=np.searchsorted(known, classes[asked]),
                        near=rows[rest[classes[rest] == left_out]],
                        far=far,
                    )


def feature_worlds(files: list[Features], references: list[int], draws: int) -> Iterator[World]:
    """Yield small libraries of each file."""
    for features in files:
        others = [other.queries[:: 3 * EVERY] for other in files if other.name != features.name]
        far = np.concatenate(others) if others else features.queries[:0]
        for classes in CLASSES:
            for count in references:
                for seed in range(draws):
                    dice = np.random.default_rng([seed, classes, count])
                    order = dice.permutation(features.classes)
                    known = np.sort(order[: min(classes, features.classes * 3 // 4)])
                    strange = order[len(known) : len(known) + max(3, len(known) // 3)]
                    pool = [dice.permutation(np.flatnonzero(features.pool_labels == each))[:count] for each in known]
                    asked = dice.permutation(np.flatnonzero(np.isin(features.query_labels, known)))[:MOST]
                    near = dice.permutation(np.flatnonzero(np.isin(features.query_labels, strange)))[:MOST]
                    yield World(
                        name=f"{features.name}, {classes} classes, {count} references",
                        support=support_of(features, np.concatenate(pool), known),
                        precision=SURE,
                        queries=features.queries[asked],
                        labels=np.searchsorted(known, features.query_labels[asked]),
                        near=features.queries[near],
                        far=far,
                    )


def measure(world: World) -> dict[str, float]:
    """Return shares of known images filed and filed rightly, of strangers filed, and AUROCs; per cent."""
    abstain = AbstainSettings(precision=world.precision)
    prototypes = build(world.support, DecisionSettings(abstain=abstain), generation=1)
    chosen = _chosen(prototypes, world.queries)
    facts = {
        "filed": float((chosen >= 0).mean() * 100.0),
        "right": float((chosen == world.labels).mean() * 100.0),
        "near filed": float((_chosen(prototypes, world.near) >= 0).mean() * 100.0),
    }
    if len(world.far):
        facts["far filed"] = float((_chosen(prototypes, world.far) >= 0).mean() * 100.0)
    known, best = respects(prototypes, world.queries)
    strange, _ = respects(prototypes, world.near)
    recognised = best == world.labels
    return facts | {f"AUROC {name}": _auroc(known[name][recognised], strange[name]) for name in known}


def respects(prototypes: PrototypeSet, rows: Rows) -> tuple[dict[str, Array], IntArray]:
    """Return how familiar images look in each respect and in all (B,), more being more, and their best classes."""
    gate = prototypes.calibration.gate
    assert gate is not None
    queries = rows.astype(np.float64)
    judged = score_batch(prototypes, queries, prototypes.settings.mode)
    looks = open_set_scores(prototypes, queries, judged, gate)
    confidence = judged.probabilities[np.arange(len(queries)), judged.best]
    found = {
        "familiarity": gate.familiarity(looks, confidence),
        "cosine": looks.cosine,
        "typicality": looks.typicality,
        "nearness": None if looks.remoteness is None else -looks.remoteness,
        "odds": log_odds(confidence),
    }
    return {name: values for name, values in found.items() if values is not None}, judged.best


def main() -> None:
    """Measure every world and print the means by name."""
    parser = argument_parser(__doc__)
    parser.add_argument("--photos", nargs="*", type=Path, default=[])
    parser.add_argument("--features", nargs="*", type=Path, default=[])
    parser.add_argument("--references", nargs="+", type=int, default=[3, 6, 16])
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--precision", type=float, default=0.7)
    arguments = parser.parse_args()
    gathered: dict[str, list[dict[str, float]]] = {}
    worlds = list(feature_worlds([read(file) for file in arguments.features], arguments.references, arguments.draws))
    if arguments.photos:
        encoder = load_model("packaged")
        worlds += photo_worlds(encoder, arguments.photos, arguments.references, arguments.draws, arguments.precision)
    for world in worlds:
        gathered.setdefault(world.name, []).append(measure(world))
    means: dict[str, Any] = {name: _mean(rows) for name, rows in gathered.items()}
    means["mean of features"] = _mean([row for name, rows in gathered.items() if "classes" in name for row in rows])
    means["mean of photos"] = _mean([row for name, rows in gathered.items() if "classes" not in name for row in rows])
    if arguments.json:
        print_json(means, n=arguments.draws)
        return
    for name, row in means.items():
        if row:
            print(f"{name:>38}: " + ", ".join(f"{fact} {value:.1f}" for fact, value in row.items()))


def _chosen(prototypes: PrototypeSet, rows: Rows) -> IntArray:
    index = {label: at for at, label in enumerate(prototypes.labels)}
    return np.array([index[one.label] if isinstance(one, Assigned) else -1 for one in decide(prototypes, rows)])


def _auroc(known: Array, strange: Array) -> float:
    """Return the share of pairs in which the known one has more, of ties a half (Mann and Whitney), per cent."""
    order = np.sort(strange)
    below, upto = (np.searchsorted(order, known, side=side) for side in ("left", "right"))
    return float((below + upto).mean() / 2.0 / max(len(strange), 1) * 100.0) if len(known) else float("nan")


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    facts = dict.fromkeys(fact for row in rows for fact in row)
    return {fact: round(float(np.nanmean([row[fact] for row in rows if fact in row])), 2) for fact in facts}


if __name__ == "__main__":
    main()
