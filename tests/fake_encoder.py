"""An encoder without a network: embeddings from the colours of a few regions, for whatever is not the model."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sortd.events import Preprocessing

GRID = 4  # regions along each side
SIDE = 16  # pixels
SEEN = Preprocessing(shortest_edge=SIDE, crop_height=SIDE, crop_width=SIDE)
COLOURS = {
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "cyan": (0, 255, 255),
    "magenta": (255, 0, 255),
    "grey": (128, 128, 128),
}


@dataclass(frozen=True, slots=True)
class FakeEncoder:
    """Sees the mean colour of each region of a 4 x 4 grid; a text that names a colour is where that colour is.

    Deterministic, honest (like colours are near, unlike ones far) and some microseconds an image.
    """

    encoder_id: str = "fake-48"
    dimensions: int = 3 * GRID * GRID
    preprocessing: Preprocessing = SEEN
    has_text: bool = True

    def encode_images(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Embed pixels (B, 16, 16, 3) as unit rows (B, 48)."""
        count = len(pixels)
        regions = pixels.reshape(count, GRID, SIDE // GRID, GRID, SIDE // GRID, 3).mean(axis=(2, 4))
        # The offset keeps mid grey away from the zero vector.
        rows = (regions / 255.0 - 0.45).reshape(count, self.dimensions)
        return self._unit(rows)

    def encode_texts(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Embed texts as unit rows (T, 48): a known colour as that colour, anything else as noise of its own."""
        return self._unit(np.stack([self._row(text) for text in texts])) if texts else self._none()

    def _row(self, text: str) -> npt.NDArray[np.float64]:
        named = next((COLOURS[word] for word in text.casefold().split() if word in COLOURS), None)
        if named is not None:
            return np.tile(np.asarray(named) / 255.0 - 0.45, GRID * GRID)
        seed = hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:8]
        return np.random.default_rng(int.from_bytes(seed)).standard_normal(self.dimensions)

    def _none(self) -> npt.NDArray[np.float32]:
        return np.empty((0, self.dimensions), np.float32)

    @staticmethod
    def _unit(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        unit: npt.NDArray[np.float32] = (rows / np.maximum(lengths, 1e-12)).astype(np.float32)
        return unit
