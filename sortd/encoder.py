"""A CLIP as a function from pixels, or words, to unit-length rows in one space.

The images come in at the very size that the model sees (``Encoder.preprocessing`` says which), so what is left of the
model's own image processor is one multiplication and one subtraction, done for a whole batch at once.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from sortd.encoding import models
from sortd.encoding.backends import choose
from sortd.encoding.exports import Exports, find, make
from sortd.encoding.manifest import Precision
from sortd.encoding.model_folders import ModelFolder
from sortd.encoding.onnx_encoder import OnnxEncoder
from sortd.encoding.rows import BROKEN, Pixels, Rows
from sortd.errors import ModelError
from sortd.events import Preprocessing

__all__ = ["Encoder", "Pixels", "Rows", "load", "probe"]

SAME_ROW = 1e-3  # two runs on one image: a GPU may add in another order, but not differ by more
TRIAL_TEXTS = ("a photo",)
ONE_ROW = 1e-6  # two unlike images: nearer than this, the model does not look at them


class Encoder(Protocol):
    """What sortd asks of a model. One thread at a time."""

    @property
    def encoder_id(self) -> str:
        """What embeddings depend on: weights, decoding, preprocessing, backend; equal ids mean equal embeddings."""

    @property
    def dimensions(self) -> int:
        """The length of an embedding."""

    @property
    def preprocessing(self) -> Preprocessing:
        """The size, and the way to it, at which images are handed over."""

    @property
    def has_text(self) -> bool:
        """Can it embed words?"""

    def encode_images(self, pixels: Pixels) -> Rows:
        """Embed RGB pixels (B, H, W, 3) of the size that ``preprocessing`` names, as unit rows (B, d)."""

    def encode_texts(self, texts: Sequence[str]) -> Rows:
        """Embed texts as unit rows (T, d) in the space of the images."""


def load(
    model: str,
    *,
    text_model: str | None = None,
    backend: str = "auto",
    device: str = "auto",
    cache_dir: Path | None = None,
    threads: int | None = None,
    decoding: str = "draft",
) -> Encoder:
    """Load a CLIP from this disk, never from the network, and see that it works.

    Args:
        model: ``auto``, ``packaged``, a name or a folder; see ``models.locate``.
        text_model: a sentence-transformers text model taught into the same space, for words in other languages
            (``clip-ViT-B-32-multilingual-v1`` goes with ``clip-ViT-B-32``); None takes the CLIP's own text tower.
        backend: ``auto``, ``torch``, ``onnx`` or ``onnx-int8``; see ``backends.choose``. Those of ONNX Runtime export
            the model first where that has not been done, which takes a minute and ``cache_dir``; ``auto`` takes
            ``onnx`` where an export stands. Whether int8 rows may decide is found out by ``running/precision.py``.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        cache_dir: where fetched models, exports and the hashes of weights are kept.
        threads: how many threads a forward may use; None or 0 leaves it to the backend.
        decoding: how the pixels that will come were decoded (``draft`` or ``full``): embeddings of the one are not
            quite those of the other, so it is part of ``encoder_id``.

    Raises:
        ModelError: It cannot be had, is no CLIP, needs preprocessing that sortd does not do, or answers garbage.
    """
    folder = models.locate(model, cache_dir=cache_dir)
    words = None if text_model is None else models.locate_text(text_model, cache_dir=cache_dir)
    kind, _, rounded = backend.partition("-")
    chosen = choose(kind, folder, words, device=device, cache_dir=cache_dir)
    exported = _exported(folder, words, cache_dir, may_make=kind == "onnx") if chosen.name == "onnx" else None
    encoder: Encoder
    if exported is not None:
        precision = Precision(rounded or "fp32")
        encoder = OnnxEncoder(
            exported, precision, device=device, cache_dir=cache_dir, threads=threads, decoding=decoding
        )
    else:
        from sortd.encoding.torch_encoder import TorchEncoder

        encoder = TorchEncoder(folder, words, device=device, cache_dir=cache_dir, threads=threads, decoding=decoding)
    # The text tower of an export was tried when that was made and is checked by content; opening it is half of a start.
    probe(encoder, texts=() if exported is not None else TRIAL_TEXTS)
    return encoder


def _exported(
    folder: ModelFolder, words: ModelFolder | None, cache_dir: Path | None, *, may_make: bool
) -> Exports | None:
    if cache_dir is None:
        raise ModelError("`backend: onnx` needs a folder for its exports; set `cache_dir`")
    found = find(folder, words, cache_dir=cache_dir)
    return make(folder, words, cache_dir=cache_dir) if found is None and may_make else found


def probe(encoder: Encoder, *, texts: Sequence[str] = TRIAL_TEXTS) -> None:
    """See that a model answers with sense: a device in a bad state returns zeros or noise and calls it success.

    Raises:
        ModelError: Rows that are not finite, the same for unlike images, or different for the same image.
    """
    height, width = encoder.preprocessing.crop_height, encoder.preprocessing.crop_width
    ramp = np.linspace(0, 255, width, dtype=np.uint8)
    smooth = np.broadcast_to(ramp[None, :, None], (height, width, 3))
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    first, second, again = encoder.encode_images(np.stack([smooth, noise, smooth]))
    if float(np.abs(first - again).max()) > SAME_ROW:
        raise ModelError(f"model {encoder.encoder_id} embeds one image in two ways: {BROKEN}")
    if float(np.dot(first, second)) > 1 - ONE_ROW:
        raise ModelError(f"model {encoder.encoder_id} embeds two unlike images as one: {BROKEN}")
    if encoder.has_text and texts:
        encoder.encode_texts(texts)
