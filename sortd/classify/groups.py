"""Groups of images that wait for a person, by average linkage in the whitened space, and which to label next."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sortd.arrays import Array, BoolArray, IntArray
from sortd.classify.decide import familiarity, score_batch
from sortd.classify.gaussian import fit_gaussian, fit_space
from sortd.classify.library import unit_rows
from sortd.classify.prototypes import PrototypeSet

FALSE_PAIRS = 0.005
"""Share of the pairs of two classes that lie within the distance of a group."""
USUAL_DISTANCE = 0.62
"""Cosine distance of groups without references; otherwise the mean of this and of what they show. On CLIP ViT-B/32
features of four public sets 47 % of the pile was then in groups of five or more, of which 85 % belonged to the class of
most in the group; the worst of 24 libraries had 73 %. By the references alone it was 42, 86 and 72 %."""
HALVINGS = 2
LARGEST_HALF = 1500  # references
FEWEST_HALVED = 4
"""Classes, so that each half has a pair of them."""
LARGEST_PILE = 4000
"""Images that are linked, which needs their table of distances; any other joins the nearest group of these."""
LEAST_NEW = 5
"""Size of the smallest group that is proposed as a class."""
IDENTIFIER_DIGITS = 8


@dataclass(frozen=True, slots=True)
class ImageGroup:
    """Images that resemble each other."""

    id: str  # hexadecimal, derived from the contents of the members
    members: tuple[int, ...]  # rows, the most central first
    familiarity: float | None  # mean of the members (mean of known images: 0); None without a gate
    nearest_label: str | None  # the class with the highest mean probability
    is_new: bool  # whether it is proposed as a new class: large and less familiar than images that are filed

    @property
    def size(self) -> int:
        """The number of members."""
        return len(self.members)


def find_groups(prototypes: PrototypeSet, embeddings: Array, contents: Sequence[str]) -> list[ImageGroup]:
    """Return the groups of two or more of n images: proposed classes first, then by size; the same for any order.

    ``embeddings`` are (n, d) unit rows, ``contents`` the hexadecimal hashes of the images.
    """
    order = np.array(sorted(range(len(contents)), key=contents.__getitem__), dtype=np.int64)
    rows = whitened_rows(prototypes, embeddings[order])
    found = [
        _described(prototypes, embeddings, order[_central_first(rows, members)], contents)
        for members in link_rows(rows, group_distance(prototypes))
        if len(members) > 1
    ]
    return sorted(found, key=lambda group: (not group.is_new, -group.size, group.id))


def whitened_rows(prototypes: PrototypeSet, embeddings: Array) -> Array:
    """Return unit rows (n, d) in the whitened space; without references, of the centred embeddings."""
    if not len(embeddings):
        return np.zeros(embeddings.shape)
    if prototypes.whitening is None:
        return unit_rows(embeddings - embeddings.mean(axis=0))
    return unit_rows(prototypes.whitening.space.place(embeddings) @ prototypes.whitening.whitener)


def group_distance(prototypes: PrototypeSet) -> float:
    """Return the cosine distance up to which images form a group.

    That within which FALSE_PAIRS of the pairs of references of two classes lie, shrunk to the usual one. The references
    of each half of the classes are compared in a space that was fitted to the other half, since that is how images of
    unknown classes are seen.
    """
    rows, classes = prototypes.references.astype(np.float64), prototypes.classes
    present = np.flatnonzero(prototypes.counts)
    if len(present) < 2:  # noqa: PLR2004 -- no pair of classes
        return USUAL_DISTANCE
    parts = [present]
    if len(present) >= FEWEST_HALVED:
        orders = [np.random.default_rng(halving).permutation(present) for halving in range(HALVINGS)]
        parts = [order[start::2] for order in orders for start in range(2)]
    apart = [_distances_apart(rows, classes, np.isin(classes, part)) for part in parts]
    return 0.5 * (USUAL_DISTANCE + float(np.quantile(np.concatenate(apart), FALSE_PAIRS)))


def _distances_apart(rows: Array, classes: IntArray, left_out: BoolArray) -> Array:
    """Return the distances of pairs of two left out classes in the space of the other rows, or of all."""
    fitted = left_out if left_out.all() else ~left_out
    kept, index = np.unique(classes[fitted], return_inverse=True)
    counts = np.bincount(index, minlength=len(kept))
    space = fit_space(rows[fitted], index, counts)
    gaussian = fit_gaussian(space.place(rows[fitted]), index, counts)
    sample = np.flatnonzero(left_out)
    sample = sample[np.unique(np.linspace(0, len(sample) - 1, LARGEST_HALF).astype(np.int64))]
    placed = unit_rows(space.place(rows[sample]) @ gaussian.whitener)
    apart = classes[sample][:, None] != classes[sample]
    return np.asarray((1.0 - placed @ placed.T)[apart], dtype=np.float64)


def link_rows(rows: Array, distance: float) -> list[IntArray]:
    """Return the members of each cluster of unit rows (n, d) by average linkage up to a cosine distance."""
    from scipy.cluster.hierarchy import fcluster, linkage

    if len(rows) < 2:  # noqa: PLR2004 -- a pair
        return [np.arange(len(rows))] if len(rows) else []
    sample = np.unique(np.linspace(0, len(rows) - 1, LARGEST_PILE).astype(np.int64))
    clusters = np.full(len(rows), -1, dtype=np.int64)
    clusters[sample] = fcluster(linkage(rows[sample], "average", metric="cosine"), distance, "distance") - 1
    if len(sample) < len(rows):
        sizes = np.bincount(clusters[sample])
        means = np.zeros((len(sizes), rows.shape[1]))
        np.add.at(means, clusters[sample], rows[sample])
        means /= sizes[:, None]
        others = np.flatnonzero(clusters < 0)
        cosines = rows[others] @ means.T
        nearest = cosines.argmax(axis=1)
        is_near = cosines[np.arange(len(others)), nearest] >= 1.0 - distance
        clusters[others] = np.where(is_near, nearest, len(sizes) + np.arange(len(others)))
    by_cluster = np.argsort(clusters, kind="stable")
    return np.split(by_cluster, np.flatnonzero(np.diff(clusters[by_cluster])) + 1)


def next_to_label(rows: Array, count: int) -> list[int]:
    """Return rows of n images to label next: the centres of ``count`` clusters by Ward's method.

    With fewer than four references a class this finds more of the classes than any other order; see
    ``benchmarks/groups.py``. The largest cluster comes first; ``rows`` are unit rows (n, d).
    """
    from scipy.cluster.hierarchy import fcluster, linkage

    if len(rows) <= count:
        return list(range(len(rows)))
    sample = np.unique(np.linspace(0, len(rows) - 1, LARGEST_PILE).astype(np.int64))
    clusters = fcluster(linkage(rows[sample], "ward"), count, "maxclust")
    found = [np.flatnonzero(clusters == cluster) for cluster in np.unique(clusters)]
    found.sort(key=len, reverse=True)
    return [int(sample[_central_first(rows[sample], members)[0]]) for members in found]


def _central_first(rows: Array, members: IntArray) -> IntArray:
    """Return members ordered by their cosine to the mean of all, the largest first."""
    return members[np.argsort(-(rows[members] @ rows[members].mean(axis=0)), kind="stable")]


def _described(prototypes: PrototypeSet, embeddings: Array, members: IntArray, contents: Sequence[str]) -> ImageGroup:
    hashed = hashlib.sha256("".join(sorted(contents[at] for at in members)).encode()).hexdigest()
    familiar, label, least = None, None, None
    if prototypes.labels:
        judged = score_batch(prototypes, embeddings[members], prototypes.settings.mode)
        label = prototypes.labels[int(judged.probabilities.mean(axis=0).argmax())]
        values = familiarity(prototypes, embeddings[members], judged)
        if values is not None and prototypes.calibration.gate is not None:
            familiar, least = float(values.mean()), prototypes.calibration.gate.least
    is_new = len(members) >= LEAST_NEW and familiar is not None and least is not None and familiar < least
    return ImageGroup(hashed[:IDENTIFIER_DIGITS], tuple(int(at) for at in members), familiar, label, is_new)
