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

SEEDS = (0, 1, 2)


@pytest.mark.slow
def test_two_processes_train_as_well_as_one(tmp_path: Path, write_config: Callable[..., Path]) -> None:
    """The same data, split and number of steps; the test score differs by no more than with other seeds."""
    make_photos(tmp_path / "Data", COUNTS)
    more = make_photos(tmp_path / "more", COUNTS, seed=1) / "Clases"
    run = write_run(tmp_path / "run", str(more), {str(file): file.parent.name for file in more.rglob("*.png")})
    config = write_config(device="cpu", threads=1)
    base = build_tiny_vit(tmp_path / "vit")

    def train(seed: int, *options: object) -> dict[str, Any]:
        arguments = ("--config", config, "--base", base, "--manifest", run, "--seed", seed, "--json", *options)
        recipe = ("--epochs", 6, "--batch-size", 8, "--learning-rate", 1e-3, "--test", 0.25, "--validation", 0.25)
        done = subprocess.run(
            [sys.executable, "-m", "sortd", "finetune", "Shapes", *map(str, (*arguments, *recipe))],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        facts: dict[str, Any] = json.loads(done.stdout)
        return facts

    one = {seed: train(seed) for seed in SEEDS}
    two = train(0, "--processes", 2, "--output", tmp_path / "of two")
    assert two["data"] == one[0]["data"]
    assert two["data"]["filed"] == sum(COUNTS.values())
    assert steps_of(two, tmp_path / "of two") == steps_of(one[0], Path(one[0]["folder"]))
    losses = {seed: facts["comparison"]["finetuned"]["log_loss"] for seed, facts in one.items()}
    loss = two["comparison"]["finetuned"]["log_loss"]
    spread = max(losses.values()) - min(losses.values())
    print(f"log loss of one process {losses}, of two {loss}")
    assert abs(loss - losses[0]) <= max(spread, 0.1), (losses, loss)


def steps_of(facts: dict[str, Any], folder: Path) -> int:
    """Return how many steps a training took."""
    metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
    assert facts["model_id"]
    return int(max(entry["step"] for entry in metrics["log"]))
