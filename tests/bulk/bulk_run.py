"""A bulk run of small images in small parts, and ``bulk decide`` with the fake encoder in a process of its own.

``python -m tests.bulk.bulk_run RUN CLASSIFIER ENGINE`` decides, and prints the facts as JSON; ENGINE is ``I/N`` or a
number of actors. If ``$BULK_PIDS`` names a folder, each process that encodes leaves a file there whose name is
its number, and takes its time, so that it can be killed.
"""

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset

from sortd.api.classifier import Classifier
from sortd.api.images import LoadedEncoder
from sortd.bulk.decide import DecideSettings
from sortd.bulk.engines import RayOptions, decide_shard, decide_with_ray
from sortd.bulk.plan import DECISIONS, make_plan
from sortd.commands.console import load_config
from sortd.config import Config
from sortd.exits import exit_on_error
from tests.daemon_process import COLOURS, make_dataset, picture, teach
from tests.fake_encoder import FakeEncoder

PIDS = "BULK_PIDS"
FORWARD_SECONDS = 0.1
"""Of a slow encoder."""


@dataclass(frozen=True, slots=True)
class SlowEncoder(FakeEncoder):
    """Takes its time, as a network does."""

    def encode_images(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Embed pixels (B, 16, 16, 3) as unit rows (B, 48)."""
        time.sleep(FORWARD_SECONDS)
        return FakeEncoder.encode_images(self, pixels)


def load_fake(_: Config) -> FakeEncoder:
    """Return the fake encoder; a slow one if its process is to be killed."""
    if folder := os.environ.get(PIDS):
        (Path(folder) / str(os.getpid())).touch()
        return SlowEncoder()
    return FakeEncoder()


def settings_for(classifier: Path, *, batch_size: int = 8, **decoding: float) -> DecideSettings:
    """Return the settings of a classifier, one processor, with other limits of decoding."""
    config = load_config(None)
    config = config.model_copy(update={"decoding": config.decoding.model_copy(update=decoding)})
    return DecideSettings.of(config, classifier, model=None, processors=1, batch_size=batch_size)


def save_classifier(folder: Path) -> Path:
    """Save the classifier of a dataset of three colours, which is made in the same folder; return its path."""
    dataset = make_dataset(folder / "Data")
    teach(dataset)
    with LoadedEncoder(FakeEncoder()) as encoder:
        Classifier.from_folder(dataset / "Clases", encoder=encoder).save(folder / "classifier")
    return folder / "classifier"


def draw_images(folder: Path, count: int) -> None:
    """Put images of the three colours, and some of none, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(COLOURS)
    for number in range(count):
        image = picture(names[number % 3], 5000 + number, (40, 40), patches=40)
        (image.convert("L") if number % 7 == 0 else image).save(folder / f"{number:03}.png", compress_level=1)


def plan_in_parts(source: Path, run: Path, rows: int) -> Path:
    """Plan a run whose parts have so few rows; return its folder."""
    make_plan(str(source), run, fewest_rows=rows)
    return run


def decisions_of(run: Path) -> pa.Table:
    """Return all decisions of a run by id."""
    return pyarrow.dataset.dataset(run / DECISIONS).to_table().sort_by("id")


def main() -> None:
    """Decide; errors become exit codes as those of sortd."""
    run, classifier, engine = sys.argv[1:]
    settings = settings_for(Path(classifier))
    with exit_on_error():
        if "/" in engine:
            number, shards = map(int, engine.split("/"))
            facts = decide_shard(Path(run), settings, (number, shards), load=load_fake)
        else:
            facts = decide_with_ray(Path(run), settings, RayOptions(int(engine)), load=load_fake)
        print(json.dumps(facts))


if __name__ == "__main__":
    from tests.bulk.bulk_run import main as run_main  # Ray pickles functions of this module by its name

    run_main()
