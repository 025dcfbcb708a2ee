"""Compare prototypes and fine-tuned models on real photos: 70 % for training, 30 % for the test, three seeds.

    python -m benchmarks.finetuned_photos FOLDER... [--effort thorough standard] [--references N] [--test 0.3]
                                          [--base packaged] [--seeds 3] [--epochs N] [--threads 1] [--json]

Each FOLDER holds one folder of images a class. The prototypes learn from all of the 70 %; fine-tuning holds a tenth of
all photos back from them for validation. Near-duplicates stay on one side, and a hundred photos of the other folders
serve as strangers. Encoder, decoding and command are those of sortd, and nothing is fetched.

Efforts are compared on the same splits, in turns; ``thorough`` trains all layers for all epochs, as sortd did before it
had efforts. With ``--references``, so many photos of each class are used. ``cpu_seconds`` are of all processors, with
the decoders; they include evaluating all modes, and for the first effort also embedding the photos.
"""

import argparse
import itertools
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import argument_parser, print_json, used_seconds, write_config
from sortd.config import read_config
from sortd.finetune.recipe import Effort, TrainingRequest
from sortd.finetune.run import run_finetuning
from sortd.layout import Layout

VALIDATION = 0.1
STRANGERS = 100


def copy_dataset(folder: Path, others: list[Path], root: Path, references: int | None) -> Layout:
    """Copy a folder of photos, or some of each class, into a dataset below ``root``, with strangers from others."""
    layout = Layout(root / folder.name)
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        (target := layout.root / "Clases" / path.name).mkdir(parents=True)
        for photo in sorted(path.iterdir())[:references]:
            shutil.copy(photo, target)
    strange = sorted(path for other in others for path in other.glob("*/*"))
    odd = layout.root / "Clases" / "_none"
    for number in np.random.default_rng(0).permutation(len(strange))[:STRANGERS]:
        odd.mkdir(exist_ok=True)
        shutil.copy(strange[number], odd / f"{number}{strange[number].suffix}")
    return layout


def measure(folders: list[Path], arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield one row for each folder, seed and effort: accuracies in per cent, and the time."""
    changes = {} if arguments.epochs is None else {"epochs": arguments.epochs}
    with tempfile.TemporaryDirectory(prefix="finetuned-photos-") as place:
        root = Path(place)
        config = read_config(write_config(root, model=arguments.model, threads=arguments.threads), {"HOME": place})
        for folder, seed, effort in itertools.product(folders, range(arguments.seeds), arguments.effort):
            layout = Layout(config.root / folder.name)
            if not layout.is_dataset:
                others = [other for other in folders if other != folder]
                copy_dataset(folder, others, config.root, arguments.references)
            recipe = replace(effort.recipe, test=arguments.test, validation=VALIDATION, seed=seed, **changes)
            request = TrainingRequest(layout, base=arguments.base, side=arguments.side, recipe=recipe)
            began, output = used_seconds(), root / f"{folder.name}-{seed}-{effort}"
            facts = run_finetuning(request, config, output, now=datetime.now(UTC))
            assert facts is not None
            compared = facts.metrics["comparison"]
            modes = {mode: 100 * row["accuracy"] for mode, row in compared["prototypes"].items()}
            yield {
                "folder": folder.name,
                "seed": seed,
                "effort": effort.value,
                "images": compared["images"],
                **modes,
                "finetuned": 100 * compared["finetuned_accuracy"],
                "gain": 100 * (compared["finetuned_accuracy"] - compared["best_mode_accuracy"]),
                "p": compared["mcnemar"]["p_value"],
                "verdict": compared["verdict"],
                "ece": compared["finetuned"]["calibration_error"],
                "auroc": (compared["finetuned"]["open_set"] or {}).get("auroc"),
                "share": facts.metrics["share"],
                "steps": float(max(row["step"] for row in facts.metrics["log"])),
                "seconds": facts.metrics["seconds"],
                "cpu_seconds": used_seconds() - began,
            }


def differences(rows: list[dict[str, Any]], efforts: list[Effort]) -> dict[str, dict[str, float]]:
    """Return, for each other effort, its points of accuracy over the first one's, by split, and its share of time."""
    found = {}
    for effort in efforts[1:]:
        one, other = ([row for row in rows if row["effort"] == each.value] for each in (efforts[0], effort))
        points = [after["finetuned"] - before["finetuned"] for before, after in zip(one, other, strict=True)]
        error = float(np.std(points, ddof=1) / np.sqrt(len(points))) if len(points) > 1 else float("nan")
        share = sum(row["cpu_seconds"] for row in other) / sum(row["cpu_seconds"] for row in one)
        found[effort.value] = {"points": float(np.mean(points)), "standard_error": error, "cpu_share": share}
    return found


def main() -> None:
    """Measure and print a row for each training, and the means."""
    parser = argument_parser(__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--base", default="packaged")
    parser.add_argument("--model", default="packaged", help="the encoder of the prototypes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--effort", type=Effort, nargs="+", default=[Effort.STANDARD], help="compared with the first")
    parser.add_argument("--references", type=int, help="photos of each class; default: all")
    parser.add_argument("--test", type=float, default=0.3, help="share of the photos for the test")
    parser.add_argument("--threads", type=int, default=0, help="of torch; default: its own number")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--side", type=int)
    arguments = parser.parse_args()
    rows = []
    for row in measure(arguments.folders, arguments):
        rows.append(row)
        if not arguments.json:
            print("  ".join(f"{key} {shown(value)}" for key, value in row.items()), flush=True)
    means = {
        f"{folder}, {effort}": {
            key: float(np.mean([row[key] for row in rows if (row["folder"], row["effort"]) == (folder, effort)]))
            for key, value in rows[0].items()
            if isinstance(value, float) and key != "p"
        }
        for folder, effort in dict.fromkeys((row["folder"], row["effort"]) for row in rows)
    }
    compared = differences(rows, arguments.effort)
    if arguments.json:
        print_json({"rows": rows, "means": means, "differences": compared}, n=arguments.seeds)
        return
    for folder, mean in means.items():
        print(f"mean of {folder}: " + "  ".join(f"{key} {shown(value)}" for key, value in mean.items()))
    for effort, one in compared.items():
        print(
            f"{effort} compared with {arguments.effort[0]}: {one['points']:+.1f} points of accuracy "
            f"(standard error {one['standard_error']:.1f}) in {one['cpu_share']:.0%} of the processor time"
        )
    print(f"mean gain over the best mode: {shown(float(np.mean([mean['gain'] for mean in means.values()])))} points")


def shown(value: object) -> str:
    """Return a value as it is printed."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 1 else f"{value:.1f}"


if __name__ == "__main__":
    main()
