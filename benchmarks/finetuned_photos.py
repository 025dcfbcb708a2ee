"""Compare prototypes and a fine-tuned model on real photos: 70 % for training, 30 % for the test, three seeds.

    python -m benchmarks.finetuned_photos FOLDER... [--base packaged] [--seeds 3] [--epochs N] [--json]

Each FOLDER holds one folder of images a class. The prototypes learn from all of the 70 %; fine-tuning holds a tenth of
all photos back from them for validation. Near-duplicates stay on one side, and a hundred photos of the other folders
serve as strangers. Encoder, decoding and command are those of sortd, and nothing is fetched.
"""

import argparse
import itertools
import shutil
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import argument_parser, print_json, write_config
from sortd.config import read_config
from sortd.finetune.recipe import Recipe, TrainingRequest
from sortd.finetune.run import run_finetuning
from sortd.layout import Layout

TEST, VALIDATION = 0.3, 0.1
STRANGERS = 100


def copy_dataset(folder: Path, others: list[Path], root: Path) -> Layout:
    """Copy a folder of photos into a dataset below ``root``, with strangers from other folders."""
    layout = Layout(root / folder.name)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.copytree(path, layout.root / "Clases" / path.name)
    strange = sorted(path for other in others for path in other.glob("*/*"))
    odd = layout.root / "Clases" / "_none"
    for number in np.random.default_rng(0).permutation(len(strange))[:STRANGERS]:
        odd.mkdir(exist_ok=True)
        shutil.copy(strange[number], odd / f"{number}{strange[number].suffix}")
    return layout


def measure(folders: list[Path], arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield one row for each folder and seed: accuracies in per cent, and the time."""
    changes = {} if arguments.epochs is None else {"epochs": arguments.epochs}
    with tempfile.TemporaryDirectory(prefix="finetuned-photos-") as place:
        root = Path(place)
        config = read_config(write_config(root, model=arguments.model), {"HOME": place})
        for folder, seed in itertools.product(folders, range(arguments.seeds)):
            layout = Layout(config.root / folder.name)
            if not layout.is_dataset:
                copy_dataset(folder, [other for other in folders if other != folder], config.root)
            recipe = Recipe(test=TEST, validation=VALIDATION, seed=seed, **changes)
            request = TrainingRequest(layout, base=arguments.base, side=arguments.side, recipe=recipe)
            facts = run_finetuning(request, config, root / f"{folder.name}-{seed}", now=datetime.now(UTC))
            assert facts is not None
            compared = facts.metrics["comparison"]
            modes = {mode: 100 * row["accuracy"] for mode, row in compared["prototypes"].items()}
            yield {
                "folder": folder.name,
                "seed": seed,
                "images": compared["images"],
                **modes,
                "finetuned": 100 * compared["finetuned_accuracy"],
                "gain": 100 * (compared["finetuned_accuracy"] - compared["best_mode_accuracy"]),
                "p": compared["mcnemar"]["p_value"],
                "verdict": compared["verdict"],
                "ece": compared["finetuned"]["calibration_error"],
                "auroc": (compared["finetuned"]["open_set"] or {}).get("auroc"),
                "share": facts.metrics["share"],
                "seconds": facts.metrics["seconds"],
            }


def main() -> None:
    """Measure and print a row for each training, and the means."""
    parser = argument_parser(__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--base", default="packaged")
    parser.add_argument("--model", default="packaged", help="the encoder of the prototypes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--side", type=int)
    arguments = parser.parse_args()
    rows = []
    for row in measure(arguments.folders, arguments):
        rows.append(row)
        if not arguments.json:
            print("  ".join(f"{key} {shown(value)}" for key, value in row.items()), flush=True)
    means = {
        folder: {
            key: float(np.mean([row[key] for row in rows if row["folder"] == folder]))
            for key, value in rows[0].items()
            if isinstance(value, float) and key != "p"
        }
        for folder in dict.fromkeys(row["folder"] for row in rows)
    }
    if arguments.json:
        print_json({"rows": rows, "means": means}, n=arguments.seeds)
        return
    for folder, mean in means.items():
        print(f"mean of {folder}: " + "  ".join(f"{key} {shown(value)}" for key, value in mean.items()))
    print(f"mean gain over the best mode: {shown(float(np.mean([mean['gain'] for mean in means.values()])))} points")


def shown(value: object) -> str:
    """Return a value as it is printed."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 1 else f"{value:.1f}"


if __name__ == "__main__":
    main()
