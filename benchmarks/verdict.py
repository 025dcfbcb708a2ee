"""Measure the seconds of the verdict on int8, without the export.

    python -m benchmarks.verdict [--photos FOLDER ...] [--references 20] [--model FOLDER] [--cache FOLDER] [--json]

With an empty cache, with the rows that torch left there, and with those of int8 too. References are drawn pictures of
three classes, or photos, a dataset for each folder. Without ``--model`` it is a CLIP ViT-B/32 with random weights.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import argument_parser, print_json, used_seconds, write_config
from benchmarks.workload import make_model
from sortd.commands.precision import judge_int8
from sortd.config import Config, read_config
from sortd.daemon.references import References
from sortd.daemon.resources import Resources, reference_settings_of
from sortd.encoder import models
from sortd.encoder.export import make_exports
from sortd.layout import Area, find_datasets
from tests.daemon_process import make_dataset


def measure(model: str, cache: Path, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Return the seconds of the verdict, of the clock and of the processors, by what the cache holds."""
    root = scratch / "Data"
    for folder in options.photos:
        for one in sorted(path for path in folder.iterdir() if path.is_dir()):
            (root / folder.name / "Images").mkdir(parents=True, exist_ok=True)
            (target := root / folder.name / "Clases" / one.name).mkdir(parents=True)
            for photo in sorted(one.iterdir())[: options.references]:
                shutil.copy(photo, target)
    if not options.photos:
        make_dataset(root, references=options.references)
    config = read_config(write_config(scratch, model=model, cache_dir=cache, backend="torch"), {"HOME": str(scratch)})
    exported = make_exports(models.locate_configured(config))
    facts: dict[str, Any] = {}
    for before in ("nothing cached", "float32 cached", "all cached"):
        if before == "float32 cached":
            for file in cache.glob("embeddings.sqlite*"):
                file.unlink()
            embed_all(config)
        began, began_cpu = time.perf_counter(), used_seconds()
        verdict = judge_int8(config, exported, lambda _: None)
        seconds = {"seconds": time.perf_counter() - began, "cpu_seconds": used_seconds() - began_cpu}
        chosen = ("serves", "references", "filed", "same", "mean_cosine")
        facts[before] = {key: round(value, 1) for key, value in seconds.items()} | {key: verdict[key] for key in chosen}
    return facts


def embed_all(config: Config) -> None:
    """Embed the references as a daemon with torch does."""
    resources = Resources(config)
    embedder, _, _ = resources.load()
    for layout in find_datasets(config.root):
        References(layout.area(Area.CLASES)).support(embedder, reference_settings_of(config.dataset(layout.name)))
    resources.unload()


def main() -> int:
    """Print the seconds."""
    parser = argument_parser(__doc__)
    parser.add_argument("--model")
    parser.add_argument("--cache", type=Path, help="folder of the exports; default: a temporary one")
    parser.add_argument("--photos", type=Path, nargs="*", default=[])
    parser.add_argument("--references", type=int, default=20, help="of each class")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory(prefix="sortd-bench-") as folder:
        scratch = Path(folder)
        model = options.model or str(make_model(scratch / "model"))
        print_json(measure(model, options.cache or scratch / "cache", options, scratch), n=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
