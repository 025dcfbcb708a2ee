"""Compare how the real command files the sample data with the known content of its drawings.

    python -m benchmarks.sample [--batches 3] [--seed 1] [--json]

Each batch is one that ``Data/draw.py incoming`` draws (the first is the one of ``make run``): into a copy of the sample
in a temporary folder, with the truth beside it. ``sortd once`` then files it twice: with ``abstain: off`` and at the
defaults. Printed are the screws filed into their own class, those filed into another, those that wait in Review/, and
the strangers that were filed at all.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import yaml

from benchmarks.harness import argument_parser, print_json

SAMPLE = Path(__file__).parents[1] / "Data"
DATASET = "Tornillos"
FILED, REJECTED = "Dataset", "Rejected"

ABSTENTION = {"abstain off": "off", "defaults": None}


@dataclass(frozen=True, slots=True)
class Outcome:
    """Counts of the images of some batches by destination."""

    screws: int = 0
    right: int = 0
    wrong: int = 0
    waiting: int = 0
    strangers: int = 0
    strangers_filed: int = 0

    def plus(self, other: "Outcome") -> "Outcome":
        """Add the counts of another batch."""
        return Outcome(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))


def file_batch(seed: int, abstain: str | None) -> Outcome:
    """Draw one batch, file it, and compare."""
    with tempfile.TemporaryDirectory() as scratch:
        place, dataset = Path(scratch), Path(scratch) / "Data" / DATASET
        shutil.copytree(SAMPLE / DATASET / "Clases", dataset / "Clases")
        truth = place / "truth.json"
        draw = [sys.executable, str(SAMPLE / "draw.py"), "incoming", "--dataset", str(dataset), "--seed", str(seed)]
        subprocess.run([*draw, "--truth", str(truth)], check=True, capture_output=True)
        settings: dict[str, object] = {"root": "Data", "model": "packaged", "state_dir": "state", "cache_dir": "cache"}
        if abstain is not None:
            settings["abstain"] = abstain
        (place / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        once = [sys.executable, "-m", "sortd", "once", "--config", str(place / "config.yaml")]
        subprocess.run(once, check=True, capture_output=True)
        return compare(dataset, json.loads(truth.read_text(encoding="utf-8")))


def compare(dataset: Path, truth: dict[str, str]) -> Outcome:
    """Count the files of a batch by folder; the file in ``Rejected/`` is the truncated drawing."""
    label_of = {path.name: path.parent.name for path in (dataset / FILED).rglob("*") if path.is_file()}
    rejected = {path.name for path in (dataset / REJECTED).rglob("*")}
    screws = {name: label for name, label in truth.items() if label}
    strangers = {name for name, label in truth.items() if not label} - rejected
    right = sum(label_of.get(name) == label for name, label in screws.items())
    filed = sum(name in label_of for name in screws)
    return Outcome(
        screws=len(screws),
        right=right,
        wrong=filed - right,
        waiting=len(screws) - filed,
        strangers=len(strangers),
        strangers_filed=sum(name in label_of for name in strangers),
    )


def main() -> None:
    """File every batch with every setting and print the counts."""
    parser = argument_parser(__doc__)
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    results = {}
    for name, abstain in ABSTENTION.items():
        total = Outcome()
        for seed in range(arguments.seed, arguments.seed + arguments.batches):
            total = total.plus(file_batch(seed, abstain))
        results[name] = total
        if not arguments.json:
            share = 100 * total.right / total.screws
            print(
                f"{name:12s} {total.right} of {total.screws} screws right ({share:.0f} %), {total.wrong} wrong, "
                f"{total.waiting} in Review/; {total.strangers_filed} of {total.strangers} strangers filed",
                flush=True,
            )
    if arguments.json:
        named = {name: {part: getattr(one, part) for part in one.__slots__} for name, one in results.items()}
        print_json(named, n=arguments.batches)


if __name__ == "__main__":
    main()
