"""Measure in per cent the groups of the pile in Review, and which of its images are best labelled next.

    python -m benchmarks.groups FEATURES.npz… [--references 2 4 16] [--draws 2] [--json]

Files as in ``benchmarks/decisions.py``. Groups: a fifth, or a half, of the classes is left out; the pile is all queries
that are not filed, doubtful ones of known classes as well as all others. Purity: the share of images that belong to the
class of most in their group, in groups of five or more; "third": in the tightest of these that hold a third of the
pile. Linkages are compared where the groups of five or more hold a third of the pile. "new": the share of the images in
groups proposed as new classes whose class is new.

Labels: as many images of the pile as there are classes are labelled, and become references. Coverage: the largest share
of other images of which 95 % are right, by confidence.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.cluster.hierarchy import fcluster, linkage

from benchmarks.decisions import Features, read, support_of
from benchmarks.harness import argument_parser, print_json
from sortd.classify.build import build
from sortd.classify.decide import decide, score_batch
from sortd.classify.groups import LEAST_NEW, find_groups, group_distance, link_rows, next_to_label, whitened_rows
from sortd.classify.prototypes import PrototypeSet
from sortd.classify.types import DecisionSettings
from sortd.events import Assigned

Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

MOST = 1500
"""Queries of one world."""
SHARES = {"a fifth": 0.8, "half": 0.5}
STEPS = np.arange(0.2, 1.0, 0.01)


@dataclass(frozen=True, eq=False)
class Pile:
    """Prototypes, and the queries that they do not file."""

    prototypes: PrototypeSet
    rows: Array
    labels: IntArray
    is_new: npt.NDArray[np.bool_]


def piles(features: Features, references: int, share: float, draws: int) -> Iterator[Pile]:
    """Yield the piles of queries where only a share of the classes has references."""
    for seed in range(draws):
        dice = np.random.default_rng([seed, references])
        known = np.sort(dice.permutation(features.classes)[: max(2, int(share * features.classes))])
        drawn = [dice.permutation(np.flatnonzero(features.pool_labels == label))[:references] for label in known]
        support = support_of(features, np.concatenate(drawn), known)
        prototypes = build(support, DecisionSettings(), generation=1)
        asked = dice.permutation(len(features.queries))[:MOST]
        rest = asked[_is_left(prototypes, features.queries[asked])]
        labels = features.query_labels[rest]
        yield Pile(prototypes, features.queries[rest].astype(np.float64), labels, ~np.isin(labels, known))


def measure_groups(pile: Pile) -> dict[str, float]:
    """Return the figures of the groups of one pile."""
    rows = whitened_rows(pile.prototypes, pile.rows)
    clusters = link_rows(rows, group_distance(pile.prototypes))
    covered, pure = _purity(pile, clusters)
    by_tightness = sorted(
        (one for one in clusters if len(one) >= LEAST_NEW), key=lambda one: -float(np.square(rows[one].mean(0)).sum())
    )
    ends = np.cumsum([len(one) for one in by_tightness])
    third = by_tightness[: int(np.searchsorted(ends, len(rows) / 3)) + 1]
    found = find_groups(pile.prototypes, pile.rows, [f"{at:08d}" for at in range(len(rows))])
    proposed = [at for group in found if group.is_new for at in group.members]
    facts = {
        "pile": float(len(rows)),
        "distance": 100.0 * group_distance(pile.prototypes),
        "covered": covered,
        "purity": pure,
        "purity of a third": _purity(pile, third)[1],
        "new": float(pile.is_new.mean() * 100.0),
        "proposed": 100.0 * len(proposed) / len(rows),
        "proposed and new": float(pile.is_new[proposed].mean() * 100.0) if proposed else float("nan"),
    }
    spaces = {"embeddings": pile.rows, "standardised": _standardised(pile), "whitened": rows}
    return facts | {f"a third, {name}": _at_a_third(pile, one) for name, one in spaces.items()}


def measure_labels(features: Features, references: int, draws: int) -> dict[str, dict[str, float]]:
    """Return coverage and accuracy by the way in which the next images to label are chosen."""
    results: dict[str, list[tuple[float, float]]] = {}
    everything = np.arange(features.classes)
    for seed in range(draws):
        dice = np.random.default_rng([seed, references, 1])
        drawn = [dice.permutation(np.flatnonzero(features.pool_labels == label))[:references] for label in everything]
        support = support_of(features, np.concatenate(drawn), everything)
        prototypes = build(support, DecisionSettings(), generation=1)
        asked, tested = np.array_split(dice.permutation(len(features.queries))[: 2 * MOST], 2)
        pile = asked[_is_left(prototypes, features.queries[asked])]
        queries = features.queries[pile].astype(np.float64)
        count = min(features.classes, len(pile))
        unsure = np.argsort(score_batch(prototypes, queries, prototypes.settings.mode).confidence)
        choices = {
            "none": [],
            "random": dice.permutation(len(pile))[:count].tolist(),
            "least confident": unsure[:count].tolist(),
            "centres": next_to_label(whitened_rows(prototypes, queries), count),
        }
        for name, choice in choices.items():
            chosen = pile[np.array(choice, np.int64)]
            more = replace(
                support,
                embeddings=np.concatenate([support.embeddings, features.queries[chosen]]),
                classes=np.concatenate([support.classes, features.query_labels[chosen]]),
                sources=(*support.sources, *map(str, chosen)),
            )
            results.setdefault(name, []).append(
                _coverage(build(more, DecisionSettings(), generation=1), features, tested)
            )
    return {
        name: dict(zip(("coverage", "accuracy"), np.mean(rows, axis=0).round(2).tolist(), strict=True))
        for name, rows in results.items()
    }


def main() -> None:
    """Measure and print."""
    parser = argument_parser(__doc__)
    parser.add_argument("features", nargs="+", type=Path)
    parser.add_argument("--references", nargs="+", type=int, default=[2, 4, 16])
    parser.add_argument("--draws", type=int, default=2)
    arguments = parser.parse_args()
    files = [read(path) for path in arguments.features]
    groups: dict[str, list[dict[str, float]]] = {}
    labels: dict[str, list[dict[str, dict[str, float]]]] = {}
    for features in files:
        for references in arguments.references:
            for left_out, share in SHARES.items():
                measured = [measure_groups(pile) for pile in piles(features, references, share, arguments.draws)]
                groups[f"{features.name}, {references} references, {left_out} left out"] = measured
            labels.setdefault(f"{references} references", []).append(
                measure_labels(features, references, arguments.draws)
            )
    means = {name: _mean(rows) for name, rows in groups.items()}
    means["mean"] = _mean([row for rows in groups.values() for row in rows])
    chosen = {name: {way: _mean([one[way] for one in each]) for way in each[0]} for name, each in labels.items()}
    if arguments.json:
        print_json({"groups": means, "labels": chosen}, n=arguments.draws)
        return
    for name, row in means.items():
        print(f"{name:>42}: " + ", ".join(f"{fact} {value:.1f}" for fact, value in row.items()))
    for name, ways in chosen.items():
        for way, row in ways.items():
            print(f"{name:>42}, {way:>16}: " + ", ".join(f"{fact} {value:.1f}" for fact, value in row.items()))


def _is_left(prototypes: PrototypeSet, rows: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    return np.array([not isinstance(one, Assigned) for one in decide(prototypes, rows)], dtype=np.bool_)


def _standardised(pile: Pile) -> Array:
    assert pile.prototypes.whitening is not None
    return pile.prototypes.whitening.space.place(pile.rows)


def _purity(pile: Pile, clusters: list[IntArray]) -> tuple[float, float]:
    """Return the share of the pile in groups of LEAST_NEW or more, and their purity."""
    large = [one for one in clusters if len(one) >= LEAST_NEW]
    held = sum(map(len, large))
    pure = sum(int(np.bincount(pile.labels[one]).max()) for one in large)
    return 100.0 * held / len(pile.rows), 100.0 * pure / held if held else float("nan")


def _at_a_third(pile: Pile, rows: Array) -> float:
    """Return the purity at the smallest distance at which the groups hold a third of the pile."""
    tree = linkage(rows, "average", metric="cosine")
    for step in STEPS:
        clusters = fcluster(tree, step, "distance")
        covered, pure = _purity(pile, [np.flatnonzero(clusters == one) for one in np.unique(clusters)])
        if covered >= 100.0 / 3:
            return pure
    return float("nan")


def _coverage(prototypes: PrototypeSet, features: Features, tested: IntArray) -> tuple[float, float]:
    judged = score_batch(prototypes, features.queries[tested].astype(np.float64), prototypes.settings.mode)
    right = (judged.best == features.query_labels[tested])[np.argsort(-judged.confidence)]
    reached = np.flatnonzero(np.cumsum(right) >= 0.95 * np.arange(1, len(right) + 1))
    return 100.0 * (int(reached[-1]) + 1 if len(reached) else 0) / len(tested), float(right.mean() * 100.0)


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    known = {fact: [row[fact] for row in rows if np.isfinite(row[fact])] for fact in rows[0]}
    return {fact: round(float(np.mean(values)), 2) for fact, values in known.items() if values}


if __name__ == "__main__":
    main()
