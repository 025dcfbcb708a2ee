"""Compare the speed of sortd with that of the bare model, for images that decode fast.

    python -m benchmarks.efficiency [--pixels 640x480] [--backends torch onnx-int8] [--piece 96] [--rounds 6] [--json]

In each round ``sortd run`` files JPEGs of 0.3 megapixels, and the bare forward runs on tensors that are ready, at its
best batch. The ratio of images a second is the efficiency: all that reading, decoding, hashing, caching, deciding,
journaling and moving take away. The floors: 0.95 with torch, 0.9 with ONNX; int8 files 1.7 times as many as
torch.
"""

import argparse
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from benchmarks.comparison import alternate, claim_of_ratio, conclude, summary
from benchmarks.harness import argument_parser
from benchmarks.workload import Filing, Material, add_options, forward_side

FLOORS = {"torch": 0.95, "onnx": 0.9, "onnx-int8": 0.9}
FLOOR_OF_INT8 = 1.7


def compare(folder: Path, options: argparse.Namespace) -> int:
    """Measure, print and return the exit code."""
    material = Material(folder, options)
    with ExitStack() as stack:
        sides, filings = {}, {}
        for backend in options.backends:
            filings[backend] = stack.enter_context(Filing(material, backend))
            sides[f"{backend}: sortd"] = filings[backend].side(options.piece)
            sides[f"{backend}: bare forward"] = forward_side(material, backend, options.piece)
        pieces = alternate(sides, rounds=options.rounds)
        stages = {backend: filing.stages_ms() for backend, filing in filings.items()}
    claims = [
        claim_of_ratio(
            f"{backend}: sortd over the bare forward",
            pieces,
            f"{backend}: sortd",
            f"{backend}: bare forward",
            least=FLOORS[backend],
        )
        for backend in options.backends
    ]
    if {"torch", "onnx-int8"} <= set(options.backends):
        what = "onnx-int8: sortd over sortd with torch"
        claims.append(claim_of_ratio(what, pieces, "onnx-int8: sortd", "torch: sortd", least=FLOOR_OF_INT8))
    return conclude(summary(pieces), claims, as_json=options.json, rounds=options.rounds, more={"stages_ms": stages})


def main() -> int:
    """Print the comparison; exit 1 if a floor is missed, 3 if the rounds disagree."""
    parser = argument_parser(__doc__, rounds=6)
    add_options(parser, photos=96, piece=96, pixels="640x480")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sortd-bench-", dir=options.folder) as name:
        return compare(Path(name), options)


if __name__ == "__main__":
    sys.exit(main())
