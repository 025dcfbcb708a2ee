"""Fine-tuning in two processes by accelerate's launcher: as good as in one, on the images of a bulk run as well."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.bulk.decided_run import write_run
from tests.finetune.test_run import COUNTS, make_photos
from tests.tiny_vit import build_tiny_vit

NOISE = 0.15
"""Largest difference of validation accuracies by chance; it was 0.03 among three orders of the images."""


@pytest.mark.slow
def test_two_processes_train_as_well_as_one(tmp_path: Path, write_config: Callable[..., Path]) -> None:
    """The same data, split and number of steps; the accuracy differs by no more than chance."""
    make_photos(tmp_path / "Data", {label: 2 * count for label, count in COUNTS.items()})
    more = make_photos(tmp_path / "more", {label: 3 * count for label, count in COUNTS.items()}, seed=1) / "Clases"
    run = write_run(tmp_path / "run", str(more), {str(file): file.parent.name for file in more.rglob("*.png")})
    config = write_config(device="cpu", threads=1)
    base = build_tiny_vit(tmp_path / "vit")

    def train(name: str, *options: object) -> dict[str, Any]:
        arguments = ("--config", config, "--base", base, "--manifest", run, "--output", tmp_path / name, *options)
        recipe = ("--epochs", 8, "--batch-size", 16, "--learning-rate", 1e-3, "--test", 0.2, "--validation", 0.3)
        done = subprocess.run(
            [sys.executable, "-m", "sortd", "finetune", "Shapes", *map(str, (*arguments, *recipe))],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        facts: dict[str, Any] = json.loads((tmp_path / name / "metrics.json").read_text("utf-8"))
        return facts

    one, two = train("one"), train("two", "--processes", 2)
    assert two["data"] == one["data"]
    assert two["data"]["filed"] == 3 * sum(COUNTS.values())
    assert steps_of(two) == steps_of(one)
    assert abs(accuracy_of(two) - accuracy_of(one)) <= NOISE, (accuracy_of(one), accuracy_of(two))


def steps_of(metrics: dict[str, Any]) -> int:
    """Return how many steps a training took."""
    return int(max(entry["step"] for entry in metrics["log"]))


def accuracy_of(metrics: dict[str, Any]) -> float:
    """Return the accuracy on the validation images after the last step."""
    return float([entry["eval_accuracy"] for entry in metrics["log"] if "eval_accuracy" in entry][-1])
