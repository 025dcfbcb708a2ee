"""Measure the decision rules on embeddings of labelled images: accuracy, and the share of strangers that are filed.

    python -m benchmarks.decisions FEATURES.npz… [--draws 2] [--json]

Each file holds ``reference_pool`` (n, d), ``reference_labels`` (n,), ``queries`` (m, d) and ``query_labels`` (m,), and
maybe ``text`` (C, d), the prototypes of the class names, with ``text_mean`` (d,), the mean of generic nouns.
References are drawn from the pool, 1, 2, 4, 8, 16 of each class and uneven ones (1 to 20, log-uniform), every query is
decided. Open-set worlds have 16 references a class: far strangers are the queries of the other files, near strangers
those of classes that were left out (a fifth of them, or half). They arrive among the known images, in random order and
batches of 64, as in a folder; known images are also decided without them. Needs numpy, no torch.
"""

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import argument_parser, print_json

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import numpy.typing as npt

from sortd.classify.build import build
from sortd.classify.decide import decide, score_batch
from sortd.classify.prototypes import PrototypeSet
from sortd.classify.stream import Stream
from sortd.classify.types import AbstainSettings, DecisionSettings, SupportSet
from sortd.events import Assigned, Decision, Mode

Array = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

BATCH = 64
SIZES = ("1", "2", "4", "8", "16", "uneven")
MODES = (Mode.AVG, Mode.MAX, Mode.MEAN, Mode.BEST, Mode.MIXED)
SETTINGS = {
    "defaults": AbstainSettings(),
    "strangers 0.05": AbstainSettings(strangers=0.05),
}


@dataclass(frozen=True, eq=False)
class Features:
    """One file: a pool to draw references from, and queries; rows are float32 and of unit length."""

    name: str
    pool: Array
    pool_labels: IntArray
    queries: Array
    query_labels: IntArray
    text: Array | None = None
    text_mean: Array | None = None

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return int(self.pool_labels.max()) + 1


@dataclass(frozen=True, eq=False)
class World:
    """Prototypes of some classes, the queries that belong to them, and strangers by kind."""

    support: SupportSet
    queries: Array
    labels: IntArray
    strangers: dict[str, Array]


def read(path: Path) -> Features:
    """Return the features of one file."""
    with np.load(path) as data:
        return Features(
            name=path.stem,
            pool=_unit(data["reference_pool"]),
            pool_labels=data["reference_labels"].astype(np.int64),
            queries=_unit(data["queries"]),
            query_labels=data["query_labels"].astype(np.int64),
            text=_unit(data["text"]) if "text" in data else None,
            text_mean=data["text_mean"].astype(np.float32) if "text_mean" in data else None,
        )


def draw(features: Features, size: str, seed: int) -> IntArray:
    """Return rows of the pool: up to ``size`` of each class."""
    generator = np.random.default_rng([seed, SIZES.index(size)])
    rows = []
    for label in range(features.classes):
        members = generator.permutation(np.flatnonzero(features.pool_labels == label))
        wanted = int(np.exp(generator.uniform(0.0, np.log(21.0)))) if size == "uneven" else int(size)
        rows.append(members[:wanted])
    return np.sort(np.concatenate(rows))


def support_of(features: Features, rows: IntArray, classes: IntArray) -> SupportSet:
    """Return the support set of some classes, which are renumbered in order."""
    index = np.full(features.classes, -1)
    index[classes] = np.arange(len(classes))
    rows = rows[index[features.pool_labels[rows]] >= 0]
    return SupportSet(
        labels=tuple(f"{label:05d}" for label in classes),
        embeddings=features.pool[rows],
        classes=index[features.pool_labels[rows]],
        sources=tuple(f"{features.name}/{row}" for row in rows),
        text=None if features.text is None else features.text[classes],
        text_mean=features.text_mean,
        encoder_id="clip-ViT-B-32",
        fingerprint=features.name,
    )


def accuracy(features: Features, size: str, seed: int) -> dict[str, float]:
    """Return the percentage of right queries by mode."""
    support = support_of(features, draw(features, size, seed), np.arange(features.classes))
    prototypes = build(support, DecisionSettings(abstain=None), generation=1)
    return {mode.value: _right(prototypes, features, mode) for mode in MODES}


def folders(features: Features, size: str, seed: int) -> dict[str, float]:
    """Return the percentage of right queries by mode where each class is a folder of five unlike ones."""
    count = min(features.classes // 5, 10)
    chosen = np.random.default_rng([seed, 55]).permutation(features.classes)[: 5 * count]
    folder = np.full(features.classes, -1)
    folder[chosen] = np.arange(len(chosen)) // 5
    is_pool, is_query = folder[features.pool_labels] >= 0, folder[features.query_labels] >= 0
    rows = draw(features, size, seed)
    rows = rows[is_pool[rows]]
    mixed = Features(
        name=features.name,
        pool=features.pool,
        pool_labels=folder[features.pool_labels],
        queries=features.queries[is_query],
        query_labels=folder[features.query_labels[is_query]],
    )
    prototypes = build(support_of(mixed, rows, np.arange(count)), DecisionSettings(abstain=None), generation=1)
    return {mode.value: _right(prototypes, mixed, mode) for mode in MODES}


def worlds(files: list[Features], seed: int) -> Iterator[tuple[str, World]]:
    """Yield the open-set worlds of one draw, named by file and kind of stranger."""
    for features in files:
        rows = draw(features, "16", seed)
        everything = np.arange(features.classes)
        far = {
            other.name: other.queries
            for other in files
            if other.name != features.name and other.pool.shape[1] == features.pool.shape[1]
        }
        support = support_of(features, rows, everything)
        yield f"{features.name} / far", World(support, features.queries, features.query_labels, far)
        order = np.random.default_rng([seed, 99]).permutation(features.classes)
        for kind, share in (("a fifth left out", 0.8), ("half left out", 0.5)):
            known = np.sort(order[: max(2, int(share * features.classes))])
            is_known = np.isin(features.query_labels, known)
            yield (
                f"{features.name} / near, {kind}",
                World(
                    support=support_of(features, rows, known),
                    queries=features.queries[is_known],
                    labels=np.searchsorted(known, features.query_labels[is_known]),
                    strangers={"near": features.queries[~is_known]},
                ),
            )


def open_set(world: World) -> dict[str, dict[str, Any]]:
    """Return percentages by settings: strangers filed by kind, known images filed right and wrong, precision."""
    result: dict[str, dict[str, Any]] = {}
    plain = build(world.support, DecisionSettings(mode=Mode.AVG, abstain=None), generation=1)
    result["argmax of avg"] = _outcome(plain, world)
    for name, abstain in SETTINGS.items():
        result[name] = _outcome(build(world.support, DecisionSettings(abstain=abstain), generation=1), world)
    return result


def costs() -> dict[str, dict[str, float]]:
    """Return the seconds of a rebuild and the milliseconds of one decision for random libraries."""
    result = {}
    generator = np.random.default_rng(0)
    for references, classes in ((3000, 100), (20000, 200)):
        centres = generator.standard_normal((classes, 512)) * 0.5
        labels = np.sort(np.arange(references) % classes)
        rows = _unit(centres[labels] + generator.standard_normal((references, 512)) + 2.0)
        features = Features("made up", rows, labels, rows[:200], labels[:200])
        support = support_of(features, np.arange(references), np.arange(classes))
        busy, begun = time.process_time(), time.perf_counter()
        prototypes = build(support, DecisionSettings(), generation=1)
        rebuild_busy, built = time.process_time() - busy, time.perf_counter()
        busy = time.process_time()
        for query in features.queries:
            decide(prototypes, query[None])
        decision_busy, decided = time.process_time() - busy, time.perf_counter()
        result[f"{references} references, {classes} classes"] = {
            "rebuild_seconds": round(built - begun, 3),
            "rebuild_processor_seconds": round(rebuild_busy, 3),
            "decision_milliseconds": round((decided - built) / len(features.queries) * 1000.0, 3),
            "decision_processor_milliseconds": round(decision_busy / len(features.queries) * 1000.0, 3),
        }
    return result


def main() -> None:
    """Measure and print."""
    parser = argument_parser(__doc__)
    parser.add_argument("features", nargs="+", type=Path)
    parser.add_argument("--draws", type=int, default=2)
    arguments = parser.parse_args()
    files = [read(path) for path in arguments.features]
    results = {
        "accuracy": measure_accuracy(files, arguments.draws),
        "open_set": measure_open_set(files, arguments.draws),
        "folders": measure_folders(files, arguments.draws),
        "cost": costs(),
        "draws": arguments.draws,
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
    }
    if arguments.json:
        print_json(results, n=arguments.draws)
    else:
        print_tables(results)


def measure_accuracy(files: list[Features], draws: int) -> dict[str, dict[str, dict[str, float]]]:
    """Return mean percentages by file, mode and size."""
    result: dict[str, dict[str, dict[str, float]]] = {}
    for features in files:
        result[features.name] = {mode.value: {} for mode in MODES}
        for size in SIZES:
            each = [accuracy(features, size, seed) for seed in range(draws)]
            for mode in MODES:
                result[features.name][mode.value][size] = round(float(np.mean([one[mode.value] for one in each])), 2)
    return result


def measure_folders(files: list[Features], draws: int) -> dict[str, dict[str, dict[str, float]]]:
    """Return mean percentages by file, mode and references of each of the five classes in a folder."""
    result: dict[str, dict[str, dict[str, float]]] = {}
    for features in files:
        result[features.name] = {mode.value: {} for mode in MODES}
        for size in ("2", "4", "8"):
            each = [folders(features, size, seed) for seed in range(draws)]
            for mode in MODES:
                result[features.name][mode.value][size] = _mean(one[mode.value] for one in each)
    return result


def measure_open_set(files: list[Features], draws: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Return mean percentages by world and settings."""
    gathered: dict[str, list[dict[str, dict[str, Any]]]] = {}
    for seed in range(draws):
        for name, world in worlds(files, seed):
            gathered.setdefault(name, []).append(open_set(world))
    return {name: _average(each) for name, each in gathered.items()}


def print_tables(results: dict[str, Any]) -> None:
    """Print accuracy, open set and cost as tables."""
    print(f"accuracy, percent, mean of {results['draws']} draws\n{'':>30}" + "".join(f"{size:>8}" for size in SIZES))
    for name, modes in results["accuracy"].items():
        for mode, sizes in modes.items():
            print(f"{name:>20} {mode:>9}" + "".join(f"{sizes[size]:8.1f}" for size in SIZES))
    for mode in MODES:
        means = [np.mean([modes[mode.value][size] for modes in results["accuracy"].values()]) for size in SIZES]
        print(f"{'mean':>20} {mode.value:>9}" + "".join(f"{mean:8.1f}" for mean in means))
    print("\nopen set, percent, 16 references a class")
    for world, settings in results["open_set"].items():
        for setting, facts in settings.items():
            strangers = ", ".join(f"{kind} {share:.1f}" for kind, share in facts["strangers_filed"].items())
            print(
                f"{world:>36} {setting:>15}: known right {facts['known_filed_right']:5.1f},"
                f" wrong {facts['known_filed_wrong']:4.1f}; strangers filed: {strangers}"
            )
    print("\nfolders of five unlike classes, percent, 2, 4 and 8 references of each")
    for mode in MODES:
        means = [
            np.mean([modes[mode.value][size] for modes in results["folders"].values()]) for size in ("2", "4", "8")
        ]
        print(f"{'mean':>20} {mode.value:>9}" + "".join(f"{mean:8.1f}" for mean in means))
    print("\ncost")
    for library, cost in results["cost"].items():
        rebuild = f"{cost['rebuild_seconds']} s ({cost['rebuild_processor_seconds']} s of a processor)"
        decision = f"{cost['decision_milliseconds']} ms ({cost['decision_processor_milliseconds']} ms)"
        print(f"{library:>36}: {rebuild}, a decision {decision}")


def _unit(rows: npt.NDArray[np.floating]) -> Array:
    exact = rows.astype(np.float64)
    return np.asarray(exact / np.linalg.norm(exact, axis=1, keepdims=True), dtype=np.float32)


def _right(prototypes: PrototypeSet, features: Features, mode: Mode) -> float:
    best = score_batch(prototypes, features.queries.astype(np.float64), mode).best
    return float((best == features.query_labels).mean() * 100.0)


def _outcome(prototypes: PrototypeSet, world: World) -> dict[str, Any]:
    decisions = decide_as_stream(prototypes, world.queries)
    labels = np.array([prototypes.labels.index(one.label) if isinstance(one, Assigned) else -1 for one in decisions])
    filed, right = labels >= 0, labels == world.labels
    return {
        "strangers_filed": {kind: _filed(prototypes, world.queries, rows) for kind, rows in world.strangers.items()},
        "known_filed_right": float(right.mean() * 100.0),
        "known_filed_wrong": float((filed & ~right).mean() * 100.0),
        "precision": float(right[filed].mean() * 100.0) if filed.any() else 100.0,
    }


def _filed(prototypes: PrototypeSet, known: Array, strangers: Array) -> float:
    decisions = decide_as_stream(prototypes, np.concatenate([known, strangers]))[len(known) :]
    return float(np.mean([isinstance(one, Assigned) for one in decisions]) * 100.0)


def decide_as_stream(prototypes: PrototypeSet, rows: Array) -> list[Decision]:
    """Return the decision of each row, as the daemon makes them if the rows arrive in random order."""
    order, stream = np.random.default_rng(0).permutation(len(rows)), Stream()
    found: dict[int, Decision] = {}
    for start in range(0, len(rows), BATCH):
        part = order[start : start + BATCH]
        found |= zip(part.tolist(), stream.decide(prototypes, rows[part], [0] * len(part)), strict=True)
    return [found[at] for at in range(len(rows))]


def _average(each: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    return {
        setting: {
            fact: {kind: _mean(one[setting][fact][kind] for one in each) for kind in value}
            if isinstance(value, dict)
            else _mean(one[setting][fact] for one in each)
            for fact, value in facts.items()
        }
        for setting, facts in each[0].items()
    }


def _mean(values: Iterator[float]) -> float:
    return round(float(np.mean(list(values))), 2)


if __name__ == "__main__":
    main()
