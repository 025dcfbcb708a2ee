"""Measure whether the setting ``precision`` holds for new images: the share of filed images that is right.

    python -m benchmarks.promise [--features FILE.npz...] [--photos FOLDER...] [--draws 3] [--json]

References are drawn by seed, 1, 2, 4, 8 and 16 of each class; all other images are filed with a precision of 0.9, 0.95
and 0.98. Folders of photos are embedded by the packaged model, also blurred, darkened and as JPEG of quality 30, with
references that were not changed. Where some names of files begin with ``ref_``, references are also drawn from these
alone and the others filed, and the reverse: two sources of images. Of files of features (benchmarks/decisions.py) 4 and
10 classes are used too. The status is 1 if a rule is broken: for each setting and number of references the mean share
over the folders and files is at least the setting less 2 points, none is more than 7 points below the setting (those
with at least 30 filed images), and with one reference of each class nothing is filed.
"""

import io
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance, ImageFilter

from benchmarks.decisions import Features, decide_as_stream, draw, read, support_of
from benchmarks.harness import argument_parser, print_json
from benchmarks.photos import embed_files, embed_folder, photos_of
from sortd.classify.build import build
from sortd.classify.proportions import interval
from sortd.classify.types import AbstainSettings, DecisionSettings, SupportSet
from sortd.encoder.backends import load_model
from sortd.encoder.clip import Encoder
from sortd.events import Assigned

Rows = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

SIZES = ("1", "2", "4", "8", "16")
SETTINGS = (0.9, 0.95, 0.98)
FEW_CLASSES = (4, 10)
MEAN_BELOW, WORST_BELOW = 0.02, 0.07
"""How far the mean and the worst share may be below the setting."""
FEWEST_FILED = 30
"""Filed images below which a share is not compared: its interval is wider than the rule."""


@dataclass(frozen=True, eq=False)
class World:
    """A library and the images that it files."""

    name: str
    size: str
    support: SupportSet
    queries: Rows
    labels: IntArray


@dataclass
class Outcome:
    """What was filed in all draws."""

    asked: int = 0
    filed: int = 0
    right: int = 0

    @property
    def precision(self) -> float:
        """The share of filed images that is right."""
        return self.right / self.filed


def blurred(image: Image.Image) -> Image.Image:
    """Return an image out of focus."""
    return image.filter(ImageFilter.GaussianBlur(max(image.size) / 150))


def darkened(image: Image.Image) -> Image.Image:
    """Return an image with 60 % of its brightness."""
    return ImageEnhance.Brightness(image).enhance(0.6)


def compressed(image: Image.Image) -> Image.Image:
    """Return an image as JPEG of quality 30 shows it."""
    written = io.BytesIO()
    image.save(written, "JPEG", quality=30)
    return Image.open(io.BytesIO(written.getvalue()))


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "blurred": blurred,
    "darkened": darkened,
    "jpeg 30": compressed,
}


def changed(encoder: Encoder, folder: Path, change: Callable[[Image.Image], Image.Image]) -> Rows:
    """Return the embeddings of the photos of a folder after a change."""
    with tempfile.TemporaryDirectory() as kept:
        copies = []
        for at, (_, path) in enumerate(photos_of(folder)):
            copies.append(Path(kept) / f"{at}.png")
            with Image.open(path) as image:
                change(image.convert("RGB")).save(copies[-1])
        return embed_files(encoder, copies)


def feature_worlds(features: Features, draws: int) -> Iterator[World]:
    """Yield the libraries of a file: all classes, and few of them."""
    for size in SIZES:
        for seed in range(draws):
            rows = draw(features, size, seed)
            for count in (features.classes, *FEW_CLASSES):
                order = np.random.default_rng([seed, count]).permutation(features.classes)
                chosen = np.sort(order[:count])
                asked = np.isin(features.query_labels, chosen)
                yield World(
                    name=features.name if count == features.classes else f"{features.name}, {count} classes",
                    size=size,
                    support=support_of(features, rows, chosen),
                    queries=features.queries[asked],
                    labels=np.searchsorted(chosen, features.query_labels[asked]),
                )


def photo_worlds(encoder: Encoder, folder: Path, draws: int) -> Iterator[World]:
    """Yield the libraries of a folder: what they file as it is, changed, and from another source."""
    photos = embed_folder(encoder, folder)
    rows, classes, everything = photos.pool, photos.pool_labels, np.arange(photos.classes)
    kinds = {"": rows} | {f", {name}": changed(encoder, folder, change) for name, change in CHANGES.items()}
    is_reference = np.array([path.name.startswith("ref_") for _, path in photos_of(folder)])
    sources = {", from ref_ to others": is_reference, ", from others to ref_": ~is_reference}
    for size in SIZES:
        for seed in range(draws):
            chosen = _drawn(classes, np.ones(len(rows), np.bool_), size, seed)
            asked = np.setdiff1d(np.arange(len(rows)), chosen)
            support = support_of(photos, chosen, everything)
            for kind, queries in kinds.items():
                yield World(folder.name + kind, size, support, queries[asked], classes[asked])
            for kind, is_source in sources.items() if is_reference.any() else ():
                support = support_of(photos, _drawn(classes, is_source, size, seed), everything)
                yield World(folder.name + kind, size, support, rows[~is_source], classes[~is_source])


def _drawn(classes: IntArray, usable: npt.NDArray[np.bool_], size: str, seed: int) -> IntArray:
    dice = np.random.default_rng([seed, int(size)])
    each = [dice.permutation(np.flatnonzero((classes == label) & usable))[: int(size)] for label in np.unique(classes)]
    return np.concatenate(each)


def measure(worlds: Iterator[World]) -> dict[str, dict[str, dict[float, Outcome]]]:
    """Return what was filed by name, size and setting."""
    found: dict[str, dict[str, dict[float, Outcome]]] = {}
    for world in worlds:
        sizes = found.setdefault(world.name, {size: {setting: Outcome() for setting in SETTINGS} for size in SIZES})
        for setting, outcome in sizes[world.size].items():
            settings = DecisionSettings(abstain=AbstainSettings(precision=setting))
            decisions = decide_as_stream(build(world.support, settings, generation=1), world.queries)
            labels = [world.support.labels.index(one.label) for one in decisions if isinstance(one, Assigned)]
            own = [own for own, one in zip(world.labels, decisions, strict=True) if isinstance(one, Assigned)]
            outcome.asked += len(decisions)
            outcome.filed += len(labels)
            outcome.right += int(np.count_nonzero(np.equal(labels, own)))
    return found


def broken_rules(found: dict[str, dict[str, dict[float, Outcome]]]) -> list[str]:
    """Return a sentence for each broken rule."""
    broken = []
    for size in SIZES:
        for setting in SETTINGS:
            outcomes = {name: sizes[size][setting] for name, sizes in found.items() if sizes[size][setting].filed}
            if size == "1":
                broken += [
                    f"{name} files {outcome.filed} images with one reference" for name, outcome in outcomes.items()
                ]
                continue
            shares = {name: one.precision for name, one in outcomes.items() if one.filed >= FEWEST_FILED}
            where = f"with {size} references at {setting:g}"
            if shares and np.mean(list(shares.values())) < setting - MEAN_BELOW:
                broken.append(f"the mean {where} is {np.mean(list(shares.values())):.3f}")
            broken += [
                f"{name} {where}: {share:.3f} of {outcomes[name].filed}"
                for name, share in shares.items()
                if share < setting - WORST_BELOW
            ]
    return broken


def main() -> int:
    """Measure, print a line for each library and setting, and the rules that are broken."""
    parser = argument_parser(__doc__)
    parser.add_argument("--features", nargs="*", type=Path, default=[])
    parser.add_argument("--photos", nargs="*", type=Path, default=[])
    parser.add_argument("--draws", type=int, default=3)
    arguments = parser.parse_args()
    found: dict[str, dict[str, dict[float, Outcome]]] = {}
    for file in arguments.features:
        found |= measure(feature_worlds(read(file), arguments.draws))
    encoder = load_model("packaged") if arguments.photos else None
    for folder in arguments.photos:
        assert encoder is not None
        found |= measure(photo_worlds(encoder, folder, arguments.draws))
    broken = broken_rules(found)
    if arguments.json:
        figures = {
            name: {size: {str(setting): vars(one) for setting, one in row.items()} for size, row in sizes.items()}
            for name, sizes in found.items()
        }
        print_json({"libraries": figures, "broken": broken}, n=arguments.draws)
        return int(bool(broken))
    for setting in SETTINGS:
        print(f"\nprecision {setting:g}: right of the filed (95 % interval), share filed; by references a class")
        for name, sizes in found.items():
            print(f"{name:>34}" + "".join(_cell(sizes[size][setting]) for size in SIZES))
        cells = [[sizes[size][setting] for sizes in found.values()] for size in SIZES]
        print(f"{'mean':>34}" + "".join(_mean_cell(outcomes) for outcomes in cells))
    print("\nno rule is broken" if not broken else "\n" + "\n".join(broken))
    return int(bool(broken))


def _cell(outcome: Outcome) -> str:
    if not outcome.filed:
        return f"{'nothing filed':>30}"
    low, high = interval(outcome.right, outcome.filed)
    share = f"{100 * outcome.precision:.1f} % ({100 * low:.0f} to {100 * high:.0f})"
    return f"{f'{share}, {100 * outcome.filed / outcome.asked:.0f} %':>30}"


def _mean_cell(outcomes: list[Outcome]) -> str:
    shares = [one.precision for one in outcomes if one.filed >= FEWEST_FILED]
    filed = np.mean([one.filed / one.asked for one in outcomes])
    return (
        f"{f'{100 * np.mean(shares):.1f} % of {len(shares)}, {100 * filed:.0f} %' if shares else 'nothing filed':>30}"
    )


if __name__ == "__main__":
    sys.exit(main())
