"""sortd with an encoder that breaks on demand: what a graphics card does when it is in a bad state, or is slow."""

import os
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sortd import exits
from sortd.commands.console import load_config
from sortd.commands.run import run_daemon
from sortd.config import Config
from tests.fake_encoder import FakeEncoder


@dataclass(frozen=True, slots=True)
class BrokenEncoder(FakeEncoder):
    """Does what the word in the file ``$BREAK_FILE`` says: raise, nan, zero, or wait; without the file it is sound."""

    def encode_images(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Embed pixels, or fail to.

        Raises:
            RuntimeError: as PyTorch does after an error of the card.
        """
        file = Path(os.environ["BREAK_FILE"])
        how = file.read_text() if file.exists() else ""
        rows = FakeEncoder.encode_images(self, pixels)
        match how:
            case "raise":
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            case "nan":
                return np.full_like(rows, np.nan)
            case "zero":
                return np.zeros_like(rows)
            case "wait":
                while file.exists():
                    time.sleep(0.01)
        return rows


def load_encoder(_: Config) -> BrokenEncoder:
    """Return the encoder that breaks on demand; where ``$LOAD_GATE`` names a FIFO, once somebody has opened that."""
    if gate := os.environ.get("LOAD_GATE"):
        Path(gate).read_bytes()
    return BrokenEncoder()


def main() -> None:
    """Do what ``sortd run`` does."""
    with exits.exit_on_error():
        configured = partial(load_config, Path(sys.argv[sys.argv.index("--config") + 1]))
        run_daemon(configured, once=sys.argv[1] == "once", load_encoder=load_encoder)


if __name__ == "__main__":
    main()
