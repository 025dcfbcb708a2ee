"""Images as programs have them (paths, Pillow images, arrays), and an encoder that embeds them."""

import os
import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from PIL import Image

from sortd.arrays import FloatArray, Pixels
from sortd.daemon.embedder import Embedder
from sortd.encoder.clip import Encoder
from sortd.errors import DataError, UnreadableError
from sortd.events import ImageRefused, Preprocessing, Stamp
from sortd.images.decode import DecodeLimits, Jpeg, fit_image
from sortd.images.pool import DecoderPool
from sortd.store.cache import CACHE_FILE, Cache
from sortd.watch.scan import stamp

BATCH_SIZE = 32

ImageLike = str | os.PathLike[str] | Image.Image | Pixels
"""A path, a Pillow image, or an array: uint8 (height, width, 3), or (height, width) for grey."""


class LoadedEncoder:
    """An encoder of images, and of texts if ``has_text``; used by one thread at a time.

    Files are decoded as the daemon does: in processes without network or other files, within limits, so that a
    hostile image ends one of them and nothing else. Those processes start with the first file and end with ``close``,
    or with the block where it is used as a context manager.
    """

    def __init__(self, encoder: Encoder, *, cache_dir: Path | None = None, jpeg: Jpeg = "draft") -> None:
        """Use a loaded model; embeddings of files are kept in ``cache_dir``, or until ``close``."""
        self.encoder = encoder
        self._cache_dir, self._jpeg = cache_dir, jpeg
        self._embedder: Embedder | None = None
        self._end: Callable[[], object] = lambda: None

    def __enter__(self) -> Self:
        """Return the encoder."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    @property
    def id(self) -> str:
        """The identity of weights, preprocessing and backend; equal ones mean equal embeddings."""
        return self.encoder.encoder_id

    @property
    def dimension(self) -> int:
        """The length of an embedding."""
        return self.encoder.dimensions

    @property
    def has_text(self) -> bool:
        """Whether it embeds texts."""
        return self.encoder.has_text

    def encode_images(self, images: Sequence[ImageLike]) -> FloatArray:
        """Return float32 (n, d) unit rows, one for each image.

        Args:
            images: paths, Pillow images and arrays, in any mixture.

        Raises:
            UnreadableError: a file is missing, no image, broken or too large; the message names it.
            TypeError: ``images`` is a single image.
            ValueError: an array is not uint8, or has another shape than (height, width, 3) or (height, width).
        """
        check_images(images)
        rows = np.zeros((len(images), self.dimension), np.float32)
        paths = {at: os.path.realpath(image) for at, image in enumerate(images) if isinstance(image, str | os.PathLike)}
        found = self._encode_files(list(dict.fromkeys(paths.values()))) if paths else {}
        for at, path in paths.items():
            rows[at] = found[path]
        others = [at for at in range(len(images)) if at not in paths]
        for start in range(0, len(others), BATCH_SIZE):
            some = others[start : start + BATCH_SIZE]
            pixels = np.stack([_pixels(images[at], self.encoder.preprocessing) for at in some])
            rows[some] = self.encoder.encode_images(pixels)
        return rows

    def encode_texts(self, texts: Sequence[str]) -> FloatArray:
        """Return float32 (n, d) unit rows in the space of the images.

        Raises:
            DataError: this is an encoder of images only.
        """
        if not self.has_text:
            raise DataError(f"{self.id} is an encoder of images, without texts")
        if isinstance(texts, str):
            raise TypeError("texts is one string; pass a list of them")
        return self.encoder.encode_texts(list(texts)) if len(texts) else np.zeros((0, self.dimension), np.float32)

    def _encode_files(self, paths: Sequence[str]) -> dict[str, FloatArray]:
        versions: list[tuple[str, Stamp]] = []
        for path in paths:
            try:
                version = stamp(path)
            except OSError as error:
                raise UnreadableError(f"{path} cannot be read: {error.strerror}") from error
            if version is None:
                raise UnreadableError(f"{path} is not a file")
            versions.append((path, version))
        rows = {}
        for answer in self.embedder().embed(versions):
            if isinstance(answer, ImageRefused):
                raise UnreadableError(f"{answer.path}: {answer.message}")
            rows[answer.path] = answer.embedding
        return rows

    def embedder(self) -> Embedder:
        """Return what embeds files; its decoding processes and its cache are opened with the first call."""
        if self._embedder is None:
            scratch = tempfile.TemporaryDirectory(prefix="sortd-", ignore_cleanup_errors=True)
            cache = Cache((self._cache_dir or Path(scratch.name)) / CACHE_FILE)
            workers = len(os.sched_getaffinity(0))
            pool = DecoderPool(workers, self.encoder.preprocessing, DecodeLimits(), jpeg=self._jpeg)
            self._embedder = Embedder(self.encoder, pool, cache, batch_size=BATCH_SIZE)
            self._end = weakref.finalize(self, _close, pool, cache, scratch)
        return self._embedder

    def close(self) -> None:
        """End the decoding processes, and forget embeddings that are not in a ``cache_dir``; it can be used again."""
        self._embedder = None
        self._end()


def _close(pool: DecoderPool, cache: Cache, scratch: "tempfile.TemporaryDirectory[str]") -> None:
    pool.close()
    cache.close()
    scratch.cleanup()


def load_encoder(
    model: str = "packaged",
    *,
    text_model: str | None = None,
    backend: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> LoadedEncoder:
    """Load a model from this disk, never from the network, and test it; the packaged one is always there.

    >>> import sortd
    >>> encoder = sortd.load_encoder("packaged", device="cpu")
    >>> encoder.dimension
    384
    >>> encoder.encode_texts(["a photo of a dog", "a photo of a car"]).shape
    (2, 384)
    >>> encoder.close()

    Args:
        model: ``packaged``, ``auto``, a name that ``sortd models fetch`` downloaded, or a folder.
        text_model: a text model of the same space, for other languages.
        backend: ``auto``, ``torch``, ``onnx`` or ``onnx-int8``; the last two need ``sortd models export``.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        threads: threads of a forward pass; None: the backend's choice.
        cache_dir: where embeddings of files are kept and where fetched models lie; None: nothing is kept.

    Raises:
        ModelError: the model is missing, has no images, or fails its test.
    """
    from sortd.encoder.backends import load_model

    folder = None if cache_dir is None else Path(os.path.abspath(cache_dir))  # it is opened with the first file
    loaded = load_model(model, text_model=text_model, backend=backend, device=device, cache_dir=folder, threads=threads)
    return LoadedEncoder(loaded, cache_dir=folder)


def check_images(images: object) -> None:
    """Raise TypeError if a single image was passed where a sequence of them is needed."""
    is_array = isinstance(images, np.ndarray) and (images.ndim == 2 or _is_colour(images))  # noqa: PLR2004 -- grey
    if is_array or isinstance(images, str | bytes | os.PathLike) or not hasattr(images, "__len__"):
        raise TypeError("images is a single one or no sequence; pass a list of paths, Pillow images or arrays")


def _is_colour(array: npt.NDArray[Any]) -> bool:
    return array.ndim == 3 and array.shape[2] == 3  # noqa: PLR2004 -- height, width and RGB


def _pixels(image: object, preprocessing: Preprocessing) -> Pixels:
    """Return the input of the encoder, uint8 (height, width, 3), for a Pillow image or an array."""
    if isinstance(image, Image.Image):
        if not all(image.size):
            raise ValueError(f"an image has the size {image.size}, so no pixels")
        try:
            return fit_image(image, preprocessing)
        except OSError as error:  # Pillow reads the pixels of a file that it has opened now
            raise UnreadableError(f"{getattr(image, 'filename', '') or 'a Pillow image'}: {error}") from error
    array = np.asarray(image)
    if array.dtype != np.uint8 or not (_is_colour(array) or array.ndim == 2) or not array.size:  # noqa: PLR2004 -- grey
        raise ValueError(
            f"an array is {array.dtype} {array.shape}; it must be uint8 (height, width, 3), or (height, width) for grey"
        )
    return fit_image(Image.fromarray(array), preprocessing)
